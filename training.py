"""What the two training loops (spd.py, apo.py) share: plan of an epoch, loader, wrapping, optimiser. The loops themselves stand in both
scripts, alike as they are, so that each reads from top to bottom.

A run is a function of its settings and its step: epochs are permuted from (seed, epoch), dropout is seeded from (seed, step,
micro-batch, rank), the learning rate is computed from the step. So a run that was stopped goes on as if it had not been.
"""

import contextlib
import ctypes
import hashlib
import math
import os
import random
import signal
import sys
import threading
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from tqdm import tqdm

from runtime import ranks

# ------------------------------------------------------------------------------------------------------- plan of a run

def schedule(step, total_steps, peak, minimum, warmup_steps):
    """Learning rate of step 0..total_steps-1: linear warm-up to `peak`, then a cosine down to `minimum`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(encoder, studies, prompt, responses, max_tokens, truncate):
    """Which studies fit: prompt(study) and responses(study) give the texts of a packed row of at most max_tokens.
    -> (studies to use, [{"id", "tokens", "cut"}] of those that do not fit, packed length of each used study). A study that does not
    fit is left out, or with `truncate` kept and cut, unless its image and prompt alone leave no room for the responses."""
    kept, long, tokens = [], [], []
    for study in tqdm(studies, desc="lengths", disable=ranks.rank() > 0):
        prefix, lengths = encoder.lengths(study, prompt(study), responses(study))
        total = prefix + sum(lengths)
        room = max_tokens - prefix >= 16 * len(lengths)
        if total > max_tokens:
            long.append({"id": study.id, "tokens": total, "cut": truncate and room})
        if total <= max_tokens or truncate and room:
            kept.append(study)
            tokens.append(min(total, max_tokens))
    return kept, long, tokens


class Plan:
    """Which study stands in which micro-batch of which step. An epoch is a permutation from (seed, epoch); a step takes the next
    `global_batch` studies of it, each rank an equal share of them; an epoch's incomplete tail is dropped.
    Raises ValueError if the numbers do not divide."""

    def __init__(self, n, args):
        self.n, self.seed, self.global_batch = n, args.seed, args.global_batch
        share, rest = divmod(args.global_batch, ranks.world())
        self.micro_batch = args.micro_batch or share
        if self.micro_batch < 1 or rest or share % self.micro_batch:
            raise ValueError(f"--global_batch {args.global_batch}: expected a multiple of {ranks.world()} ranks x --micro_batch {self.micro_batch}")
        if n < args.global_batch:
            raise ValueError(f"{n} studies: expected at least one --global_batch of {args.global_batch}")
        self.accumulation = share // self.micro_batch
        self.steps_per_epoch = n // args.global_batch
        steps = self.steps_per_epoch * args.num_epochs
        self.steps = min(steps, args.max_steps) if args.max_steps else steps

    def __str__(self):
        return (f"{self.n} studies, {self.steps} steps of {self.global_batch} = {ranks.world()} ranks x {self.accumulation} micro-batches "
                f"x {self.micro_batch} studies")

    def order(self, epoch):
        order = list(range(self.n))
        random.Random(f"{self.seed} {epoch} order").shuffle(order)
        return order

    def micro_batches(self, start=0):
        """This rank's micro-batches from step `start` on: lists of (epoch, index of the study)."""
        batches, share = [], self.global_batch // ranks.world()
        for step in range(start, self.steps):
            epoch, at = divmod(step, self.steps_per_epoch)
            if at == 0 or step == start:
                order = self.order(epoch)
            mine = at * self.global_batch + ranks.rank() * share
            for first in range(mine, mine + share, self.micro_batch):
                batches.append([(epoch, index) for index in order[first:first + self.micro_batch]])
        return batches

    def longest(self, tokens):
        """This rank's micro-batch with the longest study, [(epoch, index)]. tokens: packed length of each study."""
        return max(self.micro_batches(), key=lambda batch: max(tokens[index] for _, index in batch))


class _Items:
    def __init__(self, encode):
        self.encode = encode

    def __getitem__(self, key):
        return self.encode(key)


def _in_worker(_):
    """A worker leaves SIGTERM to its main process, also where a scheduler signals every process: without its loader that could not finish
    the step. Only its main process may end it by SIGTERM, or an error there would wait for it for ever. And it ends when that is killed:
    until then it holds the run's lock and sockets."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_if_asked_by, args=(os.getppid(),), daemon=True).start()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end_if_asked_by(parent):
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def loader(encode, batches, num_workers=0):
    """Iterates over `batches`, each key passed to encode(key), with a generator of its own: iter(DataLoader) draws from the global one."""
    context = "fork" if num_workers else None  # `encode` is a function within a function; Python 3.14 would want to pickle it
    return torch.utils.data.DataLoader(_Items(encode), batch_sampler=batches, collate_fn=list, num_workers=num_workers,
                                       worker_init_fn=_in_worker, generator=torch.Generator(), multiprocessing_context=context)


def seed_step(seed, step, micro):
    torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {step} {micro} {ranks.rank()}".encode()).digest()[:8], "little") >> 1)


def longest_step(studies, tokens, args):
    """What --dry_run trains on: one step of the longest studies. -> (studies, tokens, plan)"""
    longest = sorted(range(len(studies)), key=lambda index: tokens[index])[-args.global_batch:]
    studies, tokens, plan = [studies[index] for index in longest], [tokens[index] for index in longest], Plan(len(longest), args)
    plan.steps = 1
    return studies, tokens, plan


def report_dry_run(bar, all_steps, device):
    """The last line of --dry_run, after the one step that `bar` counted."""
    seconds = bar.format_dict["elapsed"]
    ranks.say(f"one step of the longest studies: {seconds:.1f} s, so all {all_steps:,} take {all_steps * seconds / 3600:.1f} hours or less; "
              f"peak memory {ranks.peak_gib(device):.2f} GiB")


def describe(plan, model, parameters, tokens, paper_steps, sharded, bf16):
    """The lines that --dry_run prints: arithmetic of the batch, steps beside the paper's, tokens per study, GiB per GPU."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    gradients = sum(p.numel() * p.element_size() for p in parameters.values())
    states = sum(p.numel() * (12 if p.dtype != torch.float32 else 8) for p in parameters.values()) / (ranks.world() if sharded else 1)
    gib = lambda size: f"{size / 2**30:.2f}"
    ordered = sorted(tokens)
    return "\n".join([
        str(plan), f"steps: {plan.steps}; the paper's: {paper_steps:,}",
        f"tokens per study: mean {sum(tokens) / len(tokens):.0f}, 95% {ordered[int(0.95 * (len(tokens) - 1))]}, longest {ordered[-1]}",
        f"trains {sum(p.numel() for p in parameters.values()):,} of {sum(p.numel() for p in model.parameters()):,} parameters",
        f"GiB per GPU: weights {gib(weights)}, gradients {gib(gradients)}, moments{' and fp32 masters' if bf16 else ''} {gib(states)}, "
        f"in all {gib(weights + gradients + states)} before activations"])


# --------------------------------------------------------------------------------------- the wrapped student, the optimiser

def wrap(packed, device):
    """DDP around the packed student, whose gradients then are means over ranks; alone in one process it stays as it is."""
    if ranks.world() == 1:
        return packed
    return DistributedDataParallel(packed, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)


def synced(module, last):
    """Reduces gradients over ranks in the last micro-batch of a step only; to be entered before the forward."""
    return contextlib.nullcontext() if last or ranks.world() == 1 else module.no_sync()


def warm_up(module, batch, ids):
    """Two passes that count for nothing, on the longest micro-batch: if memory is not enough, that shows now and not after hours. And
    DDP lays its buckets anew after the first pass, which changes the order of sums, so that without them a resumed run would differ in
    the last bit from one that was never stopped."""
    for _ in range(2):
        with on_studies(ids, batch):
            (module(batch)[0].sum() * 0).backward()
    module.zero_grad(set_to_none=False)


@contextlib.contextmanager
def on_studies(ids, batch, smaller="--micro_batch, --max_tokens or --max_pixels, or --gradient_checkpointing,"):
    """Around the passes of a micro-batch: where memory is not enough, says on which studies and on what shapes, and this rank ends."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, a CPU's allocator raises a plain one
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in batch.items() if isinstance(value, torch.Tensor))
        raise SystemExit(f"rank {ranks.rank()}: out of memory on studies {', '.join(ids)}; {shapes}; a smaller {smaller} takes less") from None


PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 of the SXM modules, per second


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose update happens in fp32: bf16 weights have a master copy in the state (at lr 2e-5 a bf16 weight may never move)."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:  # one at a time, so that only one fp32 gradient is alive
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    zeros = lambda p=p: torch.zeros_like(p, dtype=torch.float32)
                    state.update(step=torch.tensor(0.0), exp_avg=zeros(), exp_avg_sq=zeros())
                    if p.dtype != torch.float32:
                        state["master"] = p.float()
                master = state.get("master", p)
                adamw([master], [p.grad.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]], amsgrad=False, beta1=beta1,
                      beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
                if master is not p:
                    p.copy_(master)


def make_optimizer(parameters, args, shard):
    """parameters: {name: parameter}. shard: masters and moments live on one rank each (needed when the decoder trains)."""
    settings = dict(lr=args.learning_rate, betas=(args.adam_beta1, args.adam_beta2), weight_decay=args.weight_decay)
    if shard and ranks.world() > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer  # here, since the import scripts old optimisers and warns of each

        return ZeroRedundancyOptimizer(parameters.values(), optimizer_class=MasterAdamW, **settings)
    return MasterAdamW(parameters.values(), **settings)


def report_non_finite(loss, ids):
    """Names the studies of a micro-batch whose loss is NaN or infinite; all ranks then stop before the step, in Log.reduce or `update`."""
    if not torch.isfinite(loss):
        tqdm.write(f"rank {ranks.rank()}: loss {loss.item()} on studies {', '.join(ids)}", file=sys.stderr)


def update(parameters, optimizer, learning_rate, max_grad_norm):
    """Clips, steps, clears; returns the gradient norm before clipping. The reduced gradients are the same on every rank, so all of
    them raise FloatingPointError together, and before anything moved, if one is not finite."""
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm {norm}; nothing was updated. The studies are named above where the loss itself was not finite")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return norm


class Stop:
    """Set by SIGTERM: the loop finishes its step, saves and ends. A second SIGTERM kills, as does the first one after over(). One that
    comes within three seconds is the same request: a scheduler signals every process, and torchrun sends it on."""

    def __init__(self):
        self.asked, self.since = False, None
        signal.signal(signal.SIGTERM, self._ask)

    def over(self):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _ask(self, *_):
        if self.asked and time.monotonic() > self.since + 3:
            self.over()
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self.asked:
            self.asked, self.since = True, time.monotonic()
