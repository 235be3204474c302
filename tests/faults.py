"""Runs a stage with one fault in it, in this process or under torchrun.

Here is also `Job`, a stage's ranks as processes that can be killed.

    python tests/faults.py 'kill:step=3' apo.py --flags
    torchrun --nproc_per_node=4 tests/faults.py 'nan:rank=2,step=3' spd.py --flags

Every fault is one rank's (rank=0 if it is not said). Steps are counted from 1, as log.jsonl and
step-N/ do.

    none
    kill:step=N[,when=after]             SIGKILL of the rank before, or after, the optimiser's
                                         step N
    kill_save:step=N,at=PLACE[,count=K]  SIGKILL inside the save of step N; PLACE is
        shard                            half of the rank's optimiser shard is written
        fsync                            before the K-th fsync (1)
        rename                           before the temporary folder is renamed
        renamed                          after that, before old checkpoints are removed
        removing                         a file of an old checkpoint is removed, others are not
    kill_batch:batch=N                   SIGKILL when the N-th batch is loaded, in a stage that
                                         samples or evaluates
    nan:step=N, inf:step=N               the log-probs of the step's first micro-batch become NaN
                                         or infinite, and so the gradients
    nan_loss:step=N, inf_loss:step=N     the loss alone does: the gradients stay finite
    out_of_memory:step=N                 torch.OutOfMemoryError in the forward of the step's first
                                         micro-batch
    error:step=N                         an exception there that nobody foresaw
    full_disk:step=N,bytes=B             no file may grow beyond B bytes inside the save of step N
                                         ('finish': inside the last writing, 'all': from the start),
                                         by RLIMIT_FSIZE: a write then fails as on a full disk
    node:folder=PATH                     the rank works in another folder, as on a node of its own:
                                         a relative path leads it to another file
    hold:step=N                          says "holding" and waits before the optimiser's step N, to
                                         be killed from outside
"""

import math
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import safetensors.torch  # noqa: E402
import torch  # noqa: E402

import student  # noqa: E402
import training  # noqa: E402
from runtime import checkpoint, run_folder, shared  # noqa: E402

# --- the faults


def die():
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # a signal to oneself may take a moment


def watch_steps():
    """-> {"step", "micro"} of the micro-batch that is at work, kept up to date.

    It is empty before the first one.
    """
    now, seed_step = {}, training.seed_step

    def watched(seed, step, micro):
        now.update(step=step + 1, micro=micro)
        seed_step(seed, step, micro)

    training.seed_step = watched
    return now


def around_update(step, before=None, after=None):
    now, update = watch_steps(), training.update

    def faulty(*args):
        if before and now["step"] == int(step):
            before()
        norm = update(*args)
        if after and now["step"] == int(step):
            after()
        return norm

    training.update = faulty


def after_forward(step, fault):
    """fault(log-probs) -> log-probs, of the first micro-batch of a step."""
    now, forward = watch_steps(), student.PackedStudent.forward

    def faulty(self, *batches):
        logps, *more = forward(self, *batches)
        if now == {"step": int(step), "micro": 0}:
            logps = fault(logps)
        return [logps, *more]

    student.PackedStudent.forward = faulty


def kill(step, when="before"):
    around_update(step, **{when: die})


def hold(step):
    def wait():
        print("holding", flush=True)
        time.sleep(120)

    around_update(step, before=wait)


def kill_batch(batch):
    loader = shared.loader

    def faulty(*args):
        for at, examples in enumerate(loader(*args), 1):
            if at == int(batch):
                die()
            yield examples

    shared.loader = faulty


def out_of_memory(step):
    def fail(logps):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB (a fault that a test asked for)")

    after_forward(step, fail)


def error(step):
    def fail(logps):
        raise LookupError("a fault that a test asked for")

    after_forward(step, fail)


def around_save(step, prepare, restore=lambda: None):
    """prepare() and restore() before and after one save.

    step: of which step, or 'finish' for the last writing of all.
    """
    module, name = (training, "finish") if step == "finish" else (run_folder, "save_checkpoint")
    save = getattr(module, name)

    def faulty(*args):
        if step == "finish" or args[1] == int(step):
            prepare()
        try:
            return save(*args)
        finally:
            restore()

    setattr(module, name, faulty)


def kill_save(step, at, count="1"):
    around_save(step, lambda: PLACES[at](int(count)))


def in_fsync(count):
    fsync, calls = os.fsync, []

    def faulty(handle):
        calls.append(handle)
        if len(calls) == count:
            die()
        fsync(handle)

    os.fsync = faulty


def in_rename(count, before=True):
    replace = os.replace

    def faulty(source, target):
        if before and Path(target).name.startswith("step-"):
            die()
        replace(source, target)
        if Path(target).name.startswith("step-"):
            die()

    os.replace = faulty


def in_shard(count):
    save_file = checkpoint.save_file

    def faulty(tensors, path, *args, **kwargs):
        if Path(path).name.startswith("optimizer-"):
            content = safetensors.torch.save(tensors)
            Path(path).write_bytes(content[:len(content) // 2])
            die()
        save_file(tensors, path, *args, **kwargs)

    checkpoint.save_file = faulty


def in_removal(count):
    rmtree = shutil.rmtree

    def faulty(path, *args, **kwargs):
        if Path(path).name.startswith("step-") and Path(path).exists():
            min(Path(path).iterdir()).unlink()
            die()
        rmtree(path, *args, **kwargs)

    shutil.rmtree = faulty


PLACES = {
    "shard": in_shard,
    "fsync": in_fsync,
    "rename": in_rename,
    "renamed": lambda count: in_rename(count, before=False),
    "removing": in_removal,
}


def full_disk(step, bytes):
    # beyond it Python gets EFBIG, since it ignores SIGXFSZ
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(bytes), before[1]))
    if step == "all":
        fill()
    else:
        around_save(step, fill, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


FAULTS = {
    "none": lambda: None,
    "kill": kill,
    "kill_save": kill_save,
    "kill_batch": kill_batch,
    "hold": hold,
    "node": lambda folder: os.chdir(folder),
    "out_of_memory": out_of_memory,
    "error": error,
    "full_disk": full_disk,
    "nan": lambda step: after_forward(step, lambda logps: logps * math.nan),
    "inf": lambda step: after_forward(step, lambda logps: logps * math.inf),
    "nan_loss": lambda step: after_forward(step, lambda logps: logps + math.nan),
    "inf_loss": lambda step: after_forward(step, lambda logps: logps - math.inf),
}


def run(fault, script, flags):
    """A script, or a package as by python -m, with the fault in it.

    fault: NAME or NAME:KEY=VALUE,...
    """
    name, _, settings = fault.partition(":")
    settings = dict(part.split("=") for part in settings.split(",") if part)
    if int(settings.pop("rank", 0)) == int(os.environ.get("RANK", 0)):
        FAULTS[name](**settings)
    sys.argv = [script, *flags]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


# --- ranks that can be killed

class Job:
    """A stage's ranks as processes, without torchrun.

    They are one gloo group, each rank a session of its own, and are forked from a server that has
    torch imported, so that a start takes a moment instead of seconds. Use it as a context: at its
    end, whatever still lives is killed.

    script  "apo.py" or another script of the project, or "scale_model", as python -m takes it
    flags   its flags
    output  a file that takes what all ranks print
    ranks   how many processes
    fault   NAME or NAME:KEY=VALUE,..., see the top of this file
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["apo", "spd", "selfdistill", "evaluate", "experiment.ladder",
                                    "faults"])

    def __init__(self, script, flags, output, ranks=1, fault="none"):
        # for the server's imports
        os.environ["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
        flags = list(map(str, flags))
        folder = flags[flags.index("--output_dir") + 1] if "--output_dir" in flags else ""
        self.log = Path(folder) / "log.jsonl"
        self.log_before = self._log_file()
        self.output, environment = Path(output), dict(os.environ)
        self.output.unlink(missing_ok=True)
        if ranks > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            environment |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        self.ranks = []
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank)} if ranks > 1 else environment
            self.ranks.append(self.context.Process(
                target=_rank, args=(own, os.getcwd(), str(output), fault, script, flags)))
        for process in self.ranks:
            process.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        for process in self.ranks:
            process.join(10)

    def signal(self, number, ranks=None):
        """Sends a signal to the process groups of ranks (default: all), as torchrun does."""
        for process in self.ranks if ranks is None else [self.ranks[rank] for rank in ranks]:
            if process.exitcode is None:
                try:
                    os.killpg(process.pid, number)
                except ProcessLookupError:  # so young that it has no group yet, or gone this moment
                    process.kill() if number == signal.SIGKILL else None

    def kill(self):
        self.signal(signal.SIGKILL)

    def running(self):
        return all(process.exitcode is None for process in self.ranks)

    def _log_file(self):
        return self.log.stat().st_ino if self.log.exists() else None

    def trains(self):
        """Whether its training loop has begun.

        The loop begins by cutting log.jsonl back, in a new file.
        """
        return self._log_file() not in (None, self.log_before)

    def logged(self):
        """Lines of log.jsonl, once it trains; 0 before that."""
        return self.log.read_bytes().count(b"\n") if self.trains() else 0

    def wait(self, timeout=60):
        """-> the ranks' exit codes (-9: SIGKILL). Raises TimeoutError."""
        deadline = time.monotonic() + timeout
        for process in self.ranks:
            process.join(max(0, deadline - time.monotonic()))
            if process.exitcode is None:
                raise TimeoutError(f"a rank still runs after {timeout} s:\n{self.text()[-3000:]}")
        return [process.exitcode for process in self.ranks]

    def wait_for(self, condition, timeout=60):
        """Until condition() holds. Raises TimeoutError, also where the job ends before."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or not self.running() and not condition():
                raise TimeoutError(f"it did not come to that:\n{self.text()[-3000:]}")
            time.sleep(0.002)

    def text(self):
        return self.output.read_text(errors="replace") if self.output.exists() else ""


def children(pid):
    """The processes that a process has started and that live."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()]


def _rank(environment, folder, output, fault, script, flags):
    os.setsid()
    # what a process that nobody forked would have
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ |= environment
    os.chdir(folder)
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    run(fault, script, flags)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], sys.argv[3:])
