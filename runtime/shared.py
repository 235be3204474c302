"""Long work over many keys: shared over the ranks, written as it is done, continued after a stop.

    PARTS/part-RANK.jsonl     [key, value] a line, appended after each batch

Which keys are in a batch together depends neither on the number of ranks nor on what is done
already. So 1 rank and 4 ranks find the same values, whether they were stopped or not.
"""

import contextlib
import ctypes
import json
import os
import signal
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
    ranks.barrier()  # nobody writes before everybody has read
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
            part = stack.enter_context(open(Path(parts) / f"part-{ranks.rank()}.jsonl", "ab"))
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
        for line in part.read_bytes().split(b"\n")[:-1]:
            try:
                key, value = json.loads(line)
            except ValueError:
                continue
            values[key] = value
    return values


# ---------------------------------------------------------------------------------- the loader

def loader(encode, batches, num_workers=0):
    """A DataLoader that gives each batch as a list of examples.

    encode(key)  returns an example
    batches      list of lists of keys
    num_workers  processes that encode; 0: this process does
    """
    return torch.utils.data.DataLoader(
        Items(encode),
        batch_sampler=batches,
        collate_fn=list,
        num_workers=num_workers,
        worker_init_fn=_in_worker,
        # a generator of its own, since iter(DataLoader) would else draw from the global one
        generator=torch.Generator(),
        # `encode` is a function within a function, which cannot be pickled; from Python 3.14 on
        # the default would pickle it
        multiprocessing_context="fork" if num_workers else None)


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
    lock and sockets.
    """
    os.setpgid(0, 0)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_asked_by, args=(os.getppid(),), daemon=True).start()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_if_asked_by(parent):
    """Waits for a SIGTERM from the process with the id `parent`, then ends this process."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
