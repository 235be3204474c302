"""One process or many: how ranks join, agree and leave, and how a command ends after an error."""

import contextlib
import gc
import os
import re
import resource
import signal
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm

# Errors that tell the user what is wrong with the input, the disk or the numbers: a command that
# meets one of them prints its message without a traceback.
PLAIN_ERRORS = (ValueError, OSError, FloatingPointError, SafetensorError)


# ------------------------------------------------------------------------------ joining, leaving

def init():
    """Joins torchrun's process group (nccl on CUDA, gloo on CPU), or runs alone.

    Returns the torch.device of this rank.
    """
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # As torchrun does. Sums then do not depend on the number of cores, and the speed does not
        # depend on who else uses them.
        torch.set_num_threads(1)
    if "RANK" in os.environ and not dist.is_initialized():
        # Hours, since the others wait while rank 0 hashes a student or reads what stage 2 has
        # sampled. The others still end at once when a rank dies.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3),
                                device_id=device if cuda else None)
    return device


def close():
    """Leaves the process group when all ranks have come here.

    DDP and the sharding optimiser are in cycles of references, which are collected first: if they
    hold parts of the group until the interpreter ends, a finished gloo run sometimes aborts.
    """
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def process_group(name):
    """A context for a command's main(): joins the process group, and leaves it at the end.

    name  of the command, with which the line after an error begins
    An error that `ending` knows ends the command with one line and status 1; any other exception
    keeps its traceback.
    """
    init()
    try:
        yield
    except BaseException as error:
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()  # else the message would be printed on the bar's line
        if another_rank_is_lost(error):
            time.sleep(2)  # torchrun blames the rank that ends first, which must be the lost one
        last = ending(error, name)
        if world() > 1 and is_failure(last):
            leave_at_once(last)
        close()
        raise last from None
    close()


def ending(error, name):
    """The exception with which a command ends after an error.

    error  what was raised in its main()
    name   of the command
    Returns a SystemExit with one line where that says enough, else the error itself.
    """
    if isinstance(error, PLAIN_ERRORS):
        of_rank = f"rank {rank()}: " if world() > 1 else ""
        return SystemExit(f"{name}: {of_rank}{message_of(error)}")
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        return SystemExit(f"{name}: {error.code}")
    if another_rank_is_lost(error):
        why = str(error).strip().splitlines()[-1][-200:]
        return SystemExit(f"{name}: rank {rank()} stops, since another rank was lost or cannot be "
                          f"reached ({why}); the same command goes on")
    return error


def message_of(error):
    """An error's message. An error of a loader process has that process's traceback in its text;
    the message is what comes last in it."""
    *_, message = re.split(rf"\n(?:[\w.]+\.)?{type(error).__name__}: ", str(error))
    return message.strip()


def another_rank_is_lost(error):
    """Whether a collective failed, as it does where another rank has ended or is out of reach."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    # nccl has a type for it. gloo raises a plain RuntimeError, whose text is the only sign of it.
    return isinstance(error, dist.DistBackendError) or "gloo" in str(error)


def is_failure(error):
    """Whether a command that ends with this exception has failed; SystemExit 0 is no failure."""
    return not isinstance(error, SystemExit) or bool(error.code)


def leave_at_once(error):
    """Prints what a failed rank has to say and ends it, with its status.

    The rank does not leave the group properly: it would wait there for the other ranks, while they
    wait for it in a collective.
    """
    status = 1
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    elif isinstance(error.code, str):
        sys.stderr.write(f"{error.code}\n")  # in one piece, since other ranks may write too
    elif isinstance(error.code, int):
        status = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# ------------------------------------------------------------------------------------- agreeing

def rank():
    """The number of this process, 0 to world() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    """Waits until every rank has come here."""
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """Puts the sum over the ranks into `tensor`, and returns it."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """A list of every rank's value, on every rank."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def require_same(read):
    """Stops all ranks together where they have read different things.

    Each node may have a copy of its own of an input, and one of them may be old.

    read()  returns {what it is: a text that differs where it does}; called with several ranks only
    Raises ValueError, on every rank, that says what differs.
    """
    if world() == 1:
        return
    first, *others = gather(read())
    for number, other in enumerate(others, 1):
        differ = [f"{what}: {first.get(what)} on rank 0, {other.get(what)} on rank {number}"
                  for what in {**first, **other} if first.get(what) != other.get(what)]
        if differ:
            raise ValueError(f"{'; '.join(differ)}: expected the same on all ranks")


def print_once(*words):
    """Prints on rank 0 and nowhere else."""
    if rank() == 0:
        print(*words, flush=True)


def on_rank_zero(work):
    """Runs work() on rank 0 while the other ranks wait.

    Returns what it returned there, and None on the other ranks. If it fails, all ranks stop.
    """
    failed, result = torch.zeros(1), None
    try:
        if rank() == 0:
            failed += 1
            result = work()
            failed -= 1
    finally:
        nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        stop = all_reduce(failed.to("cuda" if nccl else "cpu")).item()
    if stop and rank() != 0:
        raise SystemExit(1)
    return result


# ------------------------------------------------------------------------------- memory, signals

@contextlib.contextmanager
def out_of_memory(
        batch,
        smaller="--micro_batch, --max_tokens or --max_pixels, or --gradient_checkpointing,"):
    """A context in which a lack of memory ends this rank and says on which studies it did.

    batch    dict with "studies" (their ids) and tensors, whose shapes are printed
    smaller  the flags that take less memory where they are smaller
    Raises SystemExit where memory is not enough.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack_of_memory(error):
            raise
        studies = ", ".join(batch["studies"])
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items()
                           if isinstance(value, torch.Tensor))
        raise SystemExit(f"rank {rank()}: out of memory on studies {studies}; {shapes}; a smaller "
                         f"{smaller} takes less") from None


def is_lack_of_memory(error):
    """Whether an error says that memory was not enough."""
    # torch's allocator on a CPU raises a plain RuntimeError, which only its text tells from others
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def peak_gib(device):
    """The most memory in use so far, in GiB.

    device  torch.device: memory of that GPU, or on a CPU of this process (its resident set)
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Stop:
    """A request to stop, made by SIGTERM: `asked` is then True.

    The loop finishes its step, saves and ends. A second SIGTERM kills the process, as does the
    first one after over(). A SIGTERM within three seconds of the first one is the same request: a
    scheduler signals every process, and torchrun passes the signal on to them too.
    """

    def __init__(self):
        self.asked, self.since = False, None
        signal.signal(signal.SIGTERM, self._ask)

    def over(self):
        """From here on a SIGTERM kills the process, as usual."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, *_):
        """The handler of SIGTERM."""
        if self.asked and time.monotonic() > self.since + 3:
            self.over()
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.asked:
            self.asked, self.since = True, time.monotonic()
