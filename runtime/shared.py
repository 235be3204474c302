"""Long work over many keys: shared over the ranks, written as it is done, continued after a stop.

    PARTS/part-RANK.jsonl     [key, value] a line, appended after each batch

Which keys are in a batch together depends neither on the number of ranks nor on what is done
already. So 1 rank and 4 ranks find the same values, whether they were stopped or not.
"""

import contextlib
import ctypes
import hashlib
import io
import json
import multiprocessing.queues
import os
import resource
import signal
import stat
import sys
import threading
from multiprocessing.pool import ThreadPool
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import ranks


def shared_map(keys, encode, work, batch_size=1, parts=None, num_workers=0, threads=0, failed=None,
               desc=""):
    """Works on every key once, on one of the ranks.

    keys         list of str or int
    encode(key)  returns an example; runs in loader processes, or with `threads` in a thread
    work(keys, examples)  returns a list of one JSON value for each key
    batch_size   keys per call of `work`
    parts        folder into which each batch is written when it is done; None: nothing is written
    num_workers  loader processes per rank
    threads      how many batches are worked on at a time, each in a thread of its own, for work
                 that waits for a server; 0: one at a time, without threads
    failed       dict that takes {key: why} where `encode` raises ValueError; None: the ValueError
                 is raised
    desc         name of the progress bar
    Returns {key: value} in the order of `keys`, without those that failed, on every rank.
    """
    batches = [keys[i:i + batch_size] for i in range(0, len(keys), batch_size)]
    values = read_parts(parts) if parts else {}
    batches = [batch for batch in batches if not all(key in values for key in batch)]
    # nobody goes on, and writes, before everybody has read
    ranks.require_same(lambda: {f"what is to do, and done in {parts}": digest(batches, values)})
    mine, found, unreadable = batches[ranks.rank()::ranks.world()], {}, {}

    def guarded(key):
        try:
            return encode(key)
        except ValueError as error:
            if failed is None:
                raise
            return Unreadable(str(error))

    def threaded(batch):
        return worked_on(batch, [guarded(key) for key in batch], work)

    with contextlib.ExitStack() as stack:
        part = None
        if parts:
            Path(parts).mkdir(parents=True, exist_ok=True)
            handle = open_own(Path(parts) / f"part-{ranks.rank()}.jsonl",
                              os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            part = stack.enter_context(os.fdopen(handle, "ab"))
        if threads:
            stream = stack.enter_context(ThreadPool(threads)).imap_unordered(threaded, mine)
        else:
            loaded = zip(mine, loader(guarded, mine, num_workers))
            stream = (worked_on(batch, examples, work) for batch, examples in loaded)
        for new, broken in tqdm(stream, total=len(mine), desc=desc, disable=ranks.rank() > 0):
            unreadable |= broken
            found |= new
            if part and new:
                part.write(part_lines(new))
                part.flush()
    for theirs, missing in ranks.gather((found, unreadable)):
        values |= theirs
        if failed is not None:
            failed.update(missing)
    return {key: values[key] for key in keys if key in values}


def digest(batches, values):
    """The batches that are left and what is done, as a text."""
    content = json.dumps([batches, values], sort_keys=True, ensure_ascii=False)
    sha256 = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{len(batches)} batches, {len(values)} done, sha256 {sha256[:12]}"


class Unreadable(str):
    """Why a key has no example."""


def worked_on(batch, examples, work):
    """Works on a batch.

    batch     keys
    examples  of each key an example, or Unreadable
    work      as `shared_map` takes it
    Returns ({key: value} of the keys that have an example, {key: why} of the others).
    """
    broken = {key: str(why) for key, why in zip(batch, examples) if isinstance(why, Unreadable)}
    good = {key: one for key, one in zip(batch, examples) if key not in broken}
    return dict(zip(good, work(list(good), list(good.values())))) if good else {}, broken


def part_lines(values):
    """{key: value} as bytes to append. They begin with a newline, which ends a line that a killed
    run may have left incomplete."""
    lines = (json.dumps([key, value], ensure_ascii=False) + "\n" for key, value in values.items())
    return ("\n" + "".join(lines)).encode()


def read_parts(folder):
    """What earlier calls have written, {key: value}, without lines that are incomplete."""
    values = {}
    for part in sorted(Path(folder).glob("part-*.jsonl")):
        with os.fdopen(open_own(part, os.O_RDONLY), "rb") as file:
            lines = file.read().split(b"\n")[:-1]
        for line in lines:
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            values[key] = value
    return values


def open_own(path, flags):
    """Opens a file that a run has written or writes: no link, and no pipe, which would wait.

    path   of the file
    flags  of os.open
    Returns its handle. Raises ValueError for anything but a regular file.
    """
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError:
        if os.path.lexists(path) and not stat.S_ISREG(mode := os.lstat(path).st_mode):
            raise ValueError(f"{path}: {found_instead(mode)}, expected a regular file") from None
        raise
    if not stat.S_ISREG(mode := os.fstat(handle).st_mode):
        os.close(handle)
        raise ValueError(f"{path}: {found_instead(mode)}, expected a regular file")
    return handle


def found_instead(mode):
    """What a path leads to, for a message. mode: its st_mode."""
    kinds = {stat.S_IFLNK: "a link", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe",
             stat.S_IFREG: "a regular file"}
    return f"found {kinds.get(stat.S_IFMT(mode), 'something else')}"


# ---------------------------------------------------------------------------------- the loader

def loader(encode, batches, num_workers=0):
    """An iterable of each batch as a list of examples.

    encode(key)  returns an example
    batches      list of lists of keys
    num_workers  processes that encode; 0: this process does
    """
    if num_workers:
        allow_open_files()
    loaded = torch.utils.data.DataLoader(
        Items(encode),
        batch_sampler=batches,
        collate_fn=as_one_tensor if num_workers else list,
        num_workers=num_workers,
        worker_init_fn=_in_worker,
        # a generator of its own, since iter(DataLoader) would else draw from the global one
        generator=torch.Generator(),
        # `encode` is a function within a function, which cannot be pickled; from Python 3.14 on
        # the default would pickle it
        multiprocessing_context="fork" if num_workers else None)
    return map(of_one_tensor, loaded) if num_workers else loaded


def allow_open_files():
    """Raises the limit of open files as far as a process may; it is often 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def as_one_tensor(examples):
    """A batch as one tensor of bytes, on its way from a loader process.

    Each tensor that travels is an open file until it is freed, and the studies of a batch, with 20
    teachers each, have more than the 1,024 that many systems allow.
    """
    content = io.BytesIO()
    torch.save(examples, content)
    return torch.frombuffer(content.getbuffer(), dtype=torch.uint8)


def of_one_tensor(content):
    """The examples that `as_one_tensor` was given."""
    return torch.load(io.BytesIO(content.numpy()), weights_only=False)  # bytes of our own process


class Items:
    """A data set whose items are encode(key)."""

    def __init__(self, encode):
        self.encode = encode

    def __getitem__(self, key):
        return self.encode(key)


def _in_worker(_):
    """Makes a loader process end with its main process, and not before it.

    A scheduler sends SIGTERM to every process, but the main process needs its loader to finish its
    step. So a SIGTERM ends the worker only where the main process sent it, as it does after an
    error. And the worker ends when its main process is killed: until then it would hold the run's
    lock and sockets. A batch that cannot be sent ends the worker, and so the command: the main
    process would else wait for it for ever.
    """
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)
    os.setpgid(0, 0)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_asked_by, args=(os.getppid(),), daemon=True).start()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_unsent(error, _):
    """Ends a loader process after an error in the thread that sends its batches."""
    sys.stderr.write(f"a loader process could not send a batch: {error}\n")
    sys.stderr.flush()
    os._exit(1)


def _end_if_asked_by(parent):
    """Waits for a SIGTERM from the process with the id `parent`, then ends this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
