"""One process or many: joining torchrun's ranks, agreeing, ending together, and how a command ends where something is wrong."""

import contextlib
import gc
import os
import resource
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tqdm import tqdm


def init():
    """Joins torchrun's process group (nccl on CUDA, gloo on CPU) or runs alone. Returns the device."""
    transformers.utils.logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # as torchrun does: sums then do not depend on the number of cores, nor speed on who else uses them
    if "RANK" in os.environ and not dist.is_initialized():
        # hours, since the others wait while rank 0 hashes a student or reads what stage 2 sampled; a rank that dies ends them at once all the same
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=3), device_id=device if cuda else None)
    return device


def close():
    """Leaves the process group when all ranks are there. The cycles of DDP and the sharding optimiser go first: what they still hold of
    the group when the interpreter ends makes a finished gloo run abort now and then."""
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def process_group(name):
    """Around a command's main(): joins the process group, leaves it at the end.

    Bad input, a full disk or a gradient that is not finite ends with one line that begins with `name` and with status 1; any other
    exception keeps its traceback. A rank that fails leaves at once: in good order it would wait for the others, who wait for it."""
    init()
    try:
        yield
    except BaseException as error:
        for bar in list(getattr(tqdm, "_instances", [])):
            bar.close()  # or the message would stand on the bar's line
        if isinstance(error, (ValueError, OSError, FloatingPointError, SafetensorError)):
            what = str(error).rpartition("\nValueError: ")[2].strip()  # of a loader's process, whose message is its traceback, the last line
            error = SystemExit(f"{name}: {f'rank {rank()}: ' if world() > 1 else ''}{what}")
        elif isinstance(error, SystemExit) and isinstance(error.code, str):
            error = SystemExit(f"{name}: {error.code}")
        elif world() > 1 and isinstance(error, RuntimeError) and (isinstance(error, dist.DistBackendError) or "gloo" in str(error)):
            time.sleep(2)  # torchrun names the rank that it sees end first, and this is not the one
            last = str(error).strip().splitlines()[-1][-200:]
            error = SystemExit(f"{name}: rank {rank()} stops, since another rank was lost or cannot be reached ({last}); the same command goes on")
        if world() > 1 and not (isinstance(error, SystemExit) and not error.code):
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            elif isinstance(error.code, str):
                sys.stderr.write(f"{error.code}\n")  # in one piece, since other ranks may write too
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(getattr(error, "code", None), int) else 1)
        close()
        raise error from None
    close()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_reduce(tensor):
    """The sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """A list of every rank's value, on every rank."""
    values = [value] * world()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def peak_gib(device):
    """The most memory so far: of the GPU, or of this process on a CPU (resident set)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def say(*words):
    if rank() == 0:
        print(*words, flush=True)


def on_rank_zero(work):
    """Runs work() on rank 0 while the other ranks wait, and returns what it returned there (None elsewhere). If it fails, all stop."""
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
