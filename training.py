"""What the two training loops share: plan of a run, schedule, optimiser, micro-step, update.

The loops themselves are written out in both scripts, spd.py and apo.py. What every stage does with
a study that is too long, or whose image is broken, is here too.

A run is a function of its settings and its step: epochs are permuted from (seed, epoch), dropout is
seeded from (seed, step, micro-batch, rank), the learning rate is computed from the step. So a run
that was stopped and goes on gives the same results as a run that was never stopped.
"""

import contextlib
import hashlib
import math
import random
import sys
import tempfile
import time

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from tqdm import tqdm

import data
import student
from runtime import adapter, ranks
from runtime.checkpoint import fingerprint
from runtime.records import atomic, printable
from runtime.shared import loader, shared_map

# flags that may differ between ranks: where something lies on a node, and how it is loaded there
MAY_DIFFER = ("studies", "images", "task_file", "student", "replay", "positives", "output_dir",
              "server", "num_workers")
# what the message of an image that cannot be read ends with
WAY_ON = ("; mend it and the same command goes on, or begin anew with --resume never "
          "--skip_broken, which leaves out such studies; tools/check.py lists them")

# -------------------------------------------------------------------------------- plan of a run

def schedule(step, total_steps, peak, minimum, warmup_steps):
    """The learning rate of a step: a linear warm-up, then half a cosine downwards.

    step          0 to total_steps - 1
    total_steps   of the run
    peak          learning rate at the end of the warm-up
    minimum       learning rate of the last step
    warmup_steps  of the warm-up; 0: none
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return minimum + 0.5 * (peak - minimum) * (1 + math.cos(math.pi * min(1.0, progress)))


def require_same_inputs(args, **lists):
    """Raises ValueError, on all ranks, where they have other flags, another task or other records.

    args   the flags; where a file or folder lies, and what loads it, may differ
    lists  of data.Study, by the flag that they were read from; their order counts
    """
    def read():
        seen = {f"--{flag}": str(value) for flag, value in sorted(vars(args).items())
                if flag not in (*MAY_DIFFER, *lists)}
        seen["--task_file"] = args.task_file and fingerprint(args.task_file)[:12]
        for flag, studies in lists.items():
            digest = hashlib.sha256()
            for study in studies:
                digest.update(repr(study).encode())
            seen[f"--{flag}"] = f"{len(studies)} records, sha256 {digest.hexdigest()[:12]}"
        return seen

    ranks.require_same(read)


def open_processor(args, task):
    """The student.Processor of a stage's flags. task: data.Task."""
    return student.Processor(args.student, task, args.images, args.max_pixels, args.max_tokens,
                             args.max_length)


def open_student(args, processor, folder, device):
    """Loads the student of a stage's flags, and tries all that saving it takes but its weights.

    args       the flags: student, bf16, gradient_checkpointing
    processor  student.Processor
    folder     RunFolder, in which a temporary folder is written and removed
    device     torch.device
    Returns the model. Raises ValueError where a student that was trained from it could not be
    saved, which would else show only when all steps are done.
    """
    model = student.load(args.student, args.bf16, device, args.gradient_checkpointing)
    ranks.require_same(lambda: {"--student": student.digest(model, processor)})

    def save():
        with tempfile.TemporaryDirectory(prefix=".tmp-student-", dir=folder.path) as temporary:
            student.save_all_but_weights(model, processor, temporary, card=args.student)

    try:
        ranks.on_rank_zero(save)
    except OSError:  # of the disk
        raise
    except Exception as error:  # a broken file can make transformers raise nearly anything
        raise ValueError(f"--student {args.student}: a student that is trained from it could not "
                         f"be saved: {printable(error)}") from None
    return model


def drop_long(processor, studies, prompt, responses, args, folder):
    """Leaves out the studies that are too long, and counts the responses that are cut.

    processor         student.Processor
    studies           [data.Study]
    prompt(study)     text of l
    responses(study)  the texts of its responses, None where a teacher is absent
    args              the flags, as `fitted` takes them
    folder            RunFolder, whose too_long.jsonl lists these studies: {"id", "tokens" of the
                      packed row before any cut, "cut": how many responses are; 0: left out}
    Returns (studies to use, [packed length of each in tokens]).
    """
    kept, tokens, long = [], [], []
    for study in tqdm(studies, desc="lengths", disable=ranks.rank() > 0):
        prefix, lengths = processor.lengths(study, prompt(study), responses(study))
        fit = fitted(prefix, lengths, args)
        if fit != lengths:
            cut = sum(new < old for new, old in zip(fit or (), lengths))
            long.append({"id": study.id, "tokens": prefix + sum(lengths), "cut": cut})
        if fit is not None:
            kept.append(study)
            tokens.append(prefix + sum(fit))
    found = hashlib.sha256(repr((tokens, long)).encode()).hexdigest()[:12]
    ranks.require_same(lambda: {
        "the studies' lengths, from the sizes of their images and the tokenizer": found})
    if long:
        cut = [study["cut"] for study in long if study["cut"]]
        or_length = f" or --max_length {args.max_length}" if args.max_length else ""
        ranks.print_once(f"{len(long)} studies exceed --max_tokens {args.max_tokens}{or_length}: "
                         f"{sum(cut)} responses of {len(cut)} of them are cut, "
                         f"{len(long) - len(cut)} left out; see too_long.jsonl")
        folder.write_lines("too_long.jsonl", long)
    return kept, tokens


def fitted(prefix, lengths, args):
    """How many tokens each response of a study keeps.

    prefix   tokens of image and prompt
    lengths  [tokens of each response]
    args     the flags: max_length, of image, prompt and one response, beyond which that response
             is cut; max_tokens, of image, prompt and all responses; truncate, which cuts the
             longest responses beyond max_tokens
    Returns [tokens], or None where the study is left out: it is beyond max_tokens without truncate,
    or a response that is cut would keep less than 16 tokens.
    """
    max_tokens = args.max_tokens if args.truncate else None
    fit = student.cut_lengths(prefix, lengths, args.max_length, max_tokens)
    room = all(new >= min(old, 16) for new, old in zip(fit, lengths))
    return fit if room and prefix + sum(fit) <= args.max_tokens else None


def drop_broken(folder, args, *lists):
    """Leaves out the studies that have an image that cannot be read, with --skip_broken.

    folder  RunFolder, whose broken.jsonl lists them: {"id", "image", "reason"}. A run that goes on
            leaves out the images that are listed there and opens none, so that it keeps its studies
    args    the flags: skip_broken, images, num_workers
    lists   of data.Study
    All images are decoded, shared over the ranks, and all ranks leave out the same studies. Returns
    the lists, without these studies. Raises SystemExit where a list has none left.
    """
    if not args.skip_broken:
        return lists
    listed = folder.read_lines("broken.jsonl")
    if listed is None:
        images = list(dict.fromkeys(path for some in lists for s in some for path in s.images))
        reasons = shared_map(
            images, lambda path: fault_of(path, args.images), lambda paths, faults: faults,
            num_workers=args.num_workers, desc="images")
        listed = [{"id": study.id, "image": path, "reason": reasons[path]}
                  for some in lists for study in some for path in study.images if reasons[path]]
    broken = {line["image"] for line in listed}
    kept = [[study for study in some if broken.isdisjoint(study.images)] for some in lists]
    left_out = sum(map(len, lists)) - sum(map(len, kept))
    if any(some and not rest for some, rest in zip(lists, kept)):
        raise SystemExit(f"--skip_broken: {left_out} studies left out, which leaves none; the "
                         f"first image: {listed[0]['reason']}")
    folder.write_lines("broken.jsonl", listed)
    ranks.print_once(f"--skip_broken: {left_out} studies left out, for {len(broken)} images that "
                     "cannot be read; see broken.jsonl")
    return kept


def fault_of(path, root):
    """Why an image cannot be read to its end, or None; takes what data.load_image takes."""
    try:
        data.load_image(path, root)
    except data.ImageError as error:
        return str(error)
    return None


@contextlib.contextmanager
def naming_the_way_on():
    """A context in which the error of an image that cannot be read says how to go on.

    It decorates the stages' run(), of which a later stage's calls an earlier one's.
    """
    try:
        yield
    except data.ImageError as error:
        raise ValueError(ranks.message_of(error) + WAY_ON) from None


class Plan:
    """Which study is in which micro-batch of which step, and how fast each step learns.

    lengths  packed length of each study in tokens
    args     the flags:
                 global_batch   studies per step over all ranks
                 micro_batch    studies per forward on a rank; 0: the rank's whole share
                 num_epochs     passes over the studies
                 max_steps      steps at most; None: no limit
                 seed           of the epochs' permutations
                 learning_rate, min_learning_rate, warmup_steps  as `schedule` takes them
                 warmup_ratio   warm-up as a share of the steps, where there are no warmup_steps
    A step takes the next `global_batch` studies of its epoch's permutation, an equal share on each
    rank; the studies that are left over at the end of an epoch are not used in it. Raises
    ValueError where the numbers do not divide.
    """

    def __init__(self, lengths, args):
        self.args, self.lengths, self.global_batch = args, lengths, args.global_batch
        global_batch = args.global_batch
        share, rest = divmod(global_batch, ranks.world())
        self.micro_batch = args.micro_batch or share
        if self.micro_batch < 1 or rest or share % self.micro_batch:
            raise ValueError(f"--global_batch {global_batch}: expected a multiple of "
                             f"{ranks.world()} ranks x --micro_batch {self.micro_batch}")
        if len(lengths) < global_batch:
            raise ValueError(f"{len(lengths)} studies: expected at least one --global_batch of "
                             f"{global_batch}")
        self.accumulation = share // self.micro_batch
        self.steps_per_epoch = len(lengths) // global_batch
        steps = self.steps_per_epoch * args.num_epochs
        self.steps = min(steps, args.max_steps) if args.max_steps else steps

    def __str__(self):
        return (f"{len(self.lengths)} studies, {self.steps} steps of {self.global_batch} = "
                f"{ranks.world()} ranks x {self.accumulation} micro-batches x "
                f"{self.micro_batch} studies")

    def order(self, epoch):
        """The permutation of the studies' indices in an epoch."""
        order = list(range(len(self.lengths)))
        random.Random(f"{self.args.seed} {epoch} order").shuffle(order)
        return order

    def micro_batches(self, start=0):
        """This rank's micro-batches from step `start` on, as lists of (epoch, study's index)."""
        batches, share = [], self.global_batch // ranks.world()
        for step in range(start, self.steps):
            epoch, at = divmod(step, self.steps_per_epoch)
            if at == 0 or step == start:
                order = self.order(epoch)
            mine = at * self.global_batch + ranks.rank() * share
            for first in range(mine, mine + share, self.micro_batch):
                batches.append([(epoch, index) for index in order[first:first + self.micro_batch]])
        return batches

    def longest(self):
        """This rank's micro-batch with the longest study, [(epoch, index)]."""
        longest_of = lambda batch: max(self.lengths[index] for _, index in batch)
        return max(self.micro_batches(), key=longest_of)

    def learning_rate(self, step):
        """The learning rate of a step."""
        args = self.args
        warmup_steps = args.warmup_steps or math.ceil(args.warmup_ratio * self.steps)
        return schedule(step, self.steps, args.learning_rate, args.min_learning_rate, warmup_steps)

    def due(self, done, every):
        """Whether what happens after `every` steps happens after `done`; the end always counts."""
        return done % every == 0 or done == self.steps


def steps(plan, start, encode, model, log, args, desc):
    """Yields (step, [its packed micro-batches of this rank]) from `start` on, with a progress bar.

    plan     Plan
    start    the first step, where the run goes on
    encode(epoch, index)  returns an example as student.Processor does; runs in loader processes
    model    the student
    log      Log, whose newest line is shown in the bar
    args     the flags: num_workers, loader processes per rank
    desc     name of the bar
    A batch is on the CPU and has what student.pack returns, and "index" (B,), the studies' indices.
    """
    model.train()  # after the reference pass of stage 3 it is in eval mode
    mine = plan.micro_batches(start)
    stream = zip(mine, loader(lambda key: encode(*key), mine, args.num_workers))
    bar = tqdm(total=plan.steps, initial=start, desc=desc, disable=ranks.rank() > 0)
    with contextlib.closing(bar):
        for step in range(start, plan.steps):
            batches = []
            for keys, examples in [next(stream) for _ in range(plan.accumulation)]:
                index = torch.tensor([index for _, index in keys])
                batches.append({**student.pack(examples, model), "index": index})
            yield step, batches
            bar.update()
            if log.line:
                bar.set_postfix(loss=f"{log.line['loss']:.3f}")


# -------------------------------------------------------------------- the wrapped student, a step

def wrap(packed, device):
    """The packed student in DDP, which makes its gradients means over the ranks.

    packed  student.PackedStudent
    device  torch.device of this rank
    Returns `packed` itself where there is only one process.
    """
    if ranks.world() == 1:
        return packed
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(packed, device_ids=device_ids, gradient_as_bucket_view=True)


def warm_up(packed, plan, encode, model):
    """Runs two passes on the longest micro-batch, whose gradients are thrown away.

    packed  what `wrap` returns
    plan    Plan
    encode(epoch, index)  returns an example as student.Processor does
    model   the student
    Returns the seconds of the second pass.

    There are two reasons. Where memory is not enough, the run ends now and not after hours. And DDP
    arranges its buckets anew after the first pass, which changes the order of its sums: a resumed
    run would else differ in the last bit from a run that was never stopped.
    """
    examples = [encode(epoch, index) for epoch, index in plan.longest()]
    (batch,) = student.to_device(model.device, student.pack(examples, model))
    packed.train()
    for _ in range(2):
        began = time.perf_counter()
        with ranks.out_of_memory(batch):
            (packed(batch)[0].sum() * 0).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    packed.zero_grad(set_to_none=False)
    return seconds


def seed_step(seed, step, micro):
    """Seeds torch for micro-batch number `micro` of a step on this rank."""
    digest = hashlib.sha256(f"{seed} {step} {micro} {ranks.rank()}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextlib.contextmanager
def micro_step(packed, batch, last, seed, step, micro):
    """A context for forward and backward of a micro-batch.

    packed  what `wrap` returns
    batch   the micro-batch, whose studies are named where memory is not enough
    last    whether it is the last one of its step: only then gradients are summed over the ranks
    seed, step, micro  seed of the run, number of the step, number of the micro-batch: dropout is
            seeded from them
    """
    seed_step(seed, step, micro)
    sync = contextlib.nullcontext() if last or ranks.world() == 1 else packed.no_sync()
    with ranks.out_of_memory(batch), sync:
        yield


def report_non_finite(loss, batch):
    """Names the studies of a micro-batch whose loss is NaN or infinite.

    All ranks then stop before the step is taken, in Log.reduce or in `update`.
    """
    if not torch.isfinite(loss):
        studies = ", ".join(batch["studies"])
        tqdm.write(f"rank {ranks.rank()}: loss {loss.item()} on studies {studies}",
                   file=sys.stderr)


# -------------------------------------------------------------------------------- the optimiser

# Elements of a weight that are updated at a time: of Qwen's embedding, which has 545 million, the
# fp32 gradient and AdamW's temporaries would else take 4 to 6 GiB.
SLICE = 2**24


class MasterAdamW(torch.optim.AdamW):
    """AdamW that updates in fp32: a bf16 weight has a master copy in the optimiser's state.

    Without it a bf16 weight might never change: at a learning rate of 2e-5 most updates are smaller
    than its last bit.
    """

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:  # and slice by slice, so that few fp32 gradients exist
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment] = torch.zeros_like(p, dtype=torch.float32)
                    if p.dtype != torch.float32:
                        state["master"] = p.float()
                master = state.get("master", p)
                whole = p, master, p.grad, state["exp_avg"], state["exp_avg_sq"]
                for weight, updated, grad, exp_avg, exp_avg_sq in zip(*map(slices, whole)):
                    adamw(
                        [updated], [grad.float()], [exp_avg], [exp_avg_sq], [],
                        [state["step"].clone()],  # which adamw advances, once for each slice
                        amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
                        weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)
                    if master is not p:
                        weight.copy_(updated)
                state["step"] += 1


def slices(tensor):
    """Views (n,) of a contiguous tensor, n at most SLICE, which together are all of it."""
    return tensor.view(-1).split(SLICE)


def make_optimizer(parameters, args, shard):
    """The optimiser, AdamW.

    parameters  {name: parameter} of what trains
    args        the flags: learning_rate, adam_beta1, adam_beta2, weight_decay (decoupled)
    shard       whether each rank keeps masters and moments of a part of the parameters only
                (ZeRO-1), which is needed where the decoder trains
    """
    betas = args.adam_beta1, args.adam_beta2
    settings = dict(lr=args.learning_rate, betas=betas, weight_decay=args.weight_decay)
    if shard and ranks.world() > 1:
        # Imported only here, since the import compiles optimisers that are deprecated, and warns.
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters.values(), optimizer_class=MasterAdamW, **settings)
    return MasterAdamW(parameters.values(), **settings)


def update(parameters, optimizer, learning_rate, max_grad_norm):
    """Clips the gradients, takes the optimiser's step and sets the gradients to zero.

    parameters     {name: parameter} of what trains
    optimizer      what `make_optimizer` returns
    learning_rate  of this step
    max_grad_norm  the norm to which the gradients together are clipped; 0: they are not clipped
    Returns their norm before clipping. Raises FloatingPointError where it is not finite, before
    anything is changed: on all ranks, since all have the same gradients.
    """
    norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), max_grad_norm or math.inf))
    if not math.isfinite(norm):
        raise FloatingPointError(
            f"gradient norm {norm}; nothing was updated. The studies are named above where the "
            "loss itself was not finite")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return norm


# ---------------------------------------------------------------- the end of a dry run, of a run

def report_dry_run(plan, packed, encode, parameters, optimizer, paper_steps):
    """Prints what --dry_run found: the batch arithmetic, tokens, memory, and the time of a step.

    plan         Plan
    packed       what `wrap` returns, which `warm_up` has called: there are gradients, of 0
    encode(epoch, index)  returns an example as student.Processor does
    parameters   {name: parameter} of what trains
    optimizer    what `make_optimizer` returns
    paper_steps  steps of the paper's run
    A step with gradients of 0 is taken here, in which the optimiser makes its state, and then the
    longest micro-batch passes beside that state, so that the peak of memory is that of training.
    """
    model = getattr(packed, "module", packed).model  # DDP has the packed student in .module
    began = time.perf_counter()
    update(parameters, optimizer, 0.0, 1.0)
    seconds = time.perf_counter() - began
    seconds += plan.accumulation * warm_up(packed, plan, encode, model)
    hours = plan.steps * seconds / 3600
    peak = max(ranks.gather(ranks.peak_gib(model.device)))

    tokens = sorted(plan.lengths)
    mean, most = sum(tokens) / len(tokens), tokens[int(0.95 * (len(tokens) - 1))]

    trained = list(parameters.values())
    trained_count, count = (sum(p.numel() for p in some) for some in (trained, model.parameters()))
    weights, gradients, states, temporaries = memory(model, trained, optimizer)
    total = weights + gradients + states + temporaries
    masters = " and fp32 masters" if any(p.dtype != torch.float32 for p in trained) else ""

    ranks.print_once("\n".join([
        f"{plan}",
        f"steps: {plan.steps}; the paper's: {paper_steps:,}",
        f"tokens per study: mean {mean:.0f}, 95% {most}, longest {tokens[-1]}",
        f"trains {trained_count:,} of {count:,} parameters",
        f"GiB per GPU: weights {weights:.2f}, gradients {gradients:.2f}, moments{masters} "
        f"{states:.2f}, the update's temporaries {temporaries:.2f}, in all {total:.2f} before "
        "activations",
        f"one step of the longest studies: {seconds:.1f} s, so all {plan.steps:,} take "
        f"{hours:.1f} hours or less; peak memory {peak:.2f} GiB"]))


def memory(model, trained, optimizer):
    """What a GPU holds at most during an update, in GiB.

    model      the student
    trained    its parameters that train
    optimizer  what `make_optimizer` returns, which has taken a step
    Returns (weights; gradients, which are DDP's buckets too; moments and masters of the rank that
    has most of them; temporaries of the largest slice). Clipping and ZeRO-1's broadcast take none.
    """
    local = getattr(optimizer, "optim", optimizer)  # of a sharded one the part of this rank
    states = gib(value for state in local.state.values() for value in state.values() if value.ndim)
    # AdamW has two of fp32 at a time, on a GPU one; a bf16 gradient becomes a third one
    temporaries = max(
        (2 if p.dtype == torch.float32 else 3) * 4 * min(p.numel(), SLICE) for p in trained)
    return gib(model.parameters()), gib(trained), max(ranks.gather(states)), temporaries / 2**30


def gib(tensors):
    """The size of tensors in GiB."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30


def finish(folder, model, processor, args, stage):
    """Writes what a stage has trained, each part whole or not at all, and marks its folder.

    adapter/       the LoRA weights, and what trained beside them, in PEFT's format; also where
                   --student is an adapter and other parts train
    student/       the student with LoRA merged, as transformers loads it
    finished.json  is written last; "merge_error" is what student.merge_lora returns

    folder     RunFolder
    model      the student; where student/ is written its adapters are merged into it
    processor  student.Processor
    args       the flags: student, train, merge
    stage      what it is called in the model card and in finished.json
    """
    train, has_lora = student.parse_train(args.train), bool(student.lora_layers(model))

    def write():
        if has_lora:
            with atomic(folder.path / "adapter") as temporary:
                student.save_adapter(model, temporary, args.student, train)
                student.save_processor(processor, temporary)
        if not args.merge and has_lora:
            return {}
        merged = {"merge_error": student.merge_lora(model)} if has_lora else {}
        card = (f"---\nbase_model: {args.student}\nlibrary_name: transformers\n"
                f"pipeline_tag: image-text-to-text\nlicense: other\n---\n"
                f"Student after {stage} (trained: {args.train}). For research; not a medical "
                "device.\n")
        with atomic(folder.student) as temporary:
            student.save_student(model, processor, temporary, card)
        return merged

    merged = ranks.on_rank_zero(write) or {}  # the other ranks neither write nor print
    folder.mark_finished(stage=stage, train=args.train, **merged)
    made, in_adapter = folder.student, folder.path / "adapter"
    if not made.exists():
        base = adapter.base_of(args.student)
        made = f"the adapter in {in_adapter} on {base}; --merge writes student/"
    seen = (f", trained with --max_pixels {args.max_pixels}, which later commands need too"
            if args.max_pixels is not None else "")
    ranks.print_once(f"the student after {stage} is {made}{seen}")
    if merged:
        report_merge(merged["merge_error"], model.dtype, folder.student, in_adapter)


def report_merge(error, dtype, merged, in_adapter):
    """Prints what merging lost, with the way to lose nothing where that is more than 5%.

    error       what student.merge_lora returned
    dtype       of the weights
    merged      folder of the student with LoRA merged
    in_adapter  folder of the adapter
    """
    dtype = str(dtype).removeprefix("torch.")
    ranks.print_once(f"merging changed what LoRA adds to its layers by {error:.2%} (rounding to "
                     f"{dtype})")
    if error > 0.05:
        ranks.print_once(f"warning: {merged} has lost a part of what was learnt: LoRA's change is "
                         f"small beside the last digit of weights in {dtype}. The adapter has all "
                         f"of it; the next command takes it as --student {in_adapter}")
