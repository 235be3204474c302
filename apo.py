"""Critique: autonomous preference optimisation (Sec. 2.3, Eq. 8-11).

t+ is preferred to every teacher's trajectory.

    r(v, l, t) = beta log( pi_theta(t | v, l) / pi_st(t | v, l) )                                (8)
    L_APO = -E log [ exp r(t+) / ( exp r(t+) + sum_u w_u exp r(t^u) ) ]                       (9-11)

reads   studies.jsonl, positives.jsonl (stage 2), pi_st (stage 1), both start and frozen reference
        (an adapter's folder: its base with it, from which --train lora goes on)
writes  OUTPUT_DIR/student, adapter, reference.safetensors, log.jsonl, checkpoints

    torchrun --nproc_per_node=4 apo.py                  all stages on the scale model, then a table
    torchrun --nproc_per_node=4 apo.py --studies studies.jsonl --images files \\
             --base Qwen/Qwen2.5-VL-7B-Instruct --output_dir runs/x         all stages on your data
    torchrun --nproc_per_node=4 apo.py --studies studies.jsonl --images files \\
             --student runs/x/spd/student --positives runs/x/selfdistill/positives.jsonl \\
             --output_dir runs/x/apo                                               this stage alone
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 apo.py ...

Where the paper is silent or contradicts itself:
  1. w_u = 1 for each teacher that answered, so the first loss is log(1 + N); 'normalised' weights
     are another objective.
  2. beta = 0.1 at 7B (DPO's value, and the authors' script's), 1 for the scale model: it is an
     inverse guidance scale (README).
  3. log pi(t | v, l) is the sum over a response's tokens with its end token; --length_norm takes
     the mean.
  4. "The visual encoder and text decoder are frozen" leaves the merger between them (--preset
     paper). The authors' script trains LoRA at 5e-7 (--preset released).
  5. No dropout here, so that the first loss is exact.
"""

import torch


def response_logps(logits, labels):
    """log pi(t | v, l) of whole responses, the plain form.

    logits  (B, T, V) of the model
    labels  (B, T) the input ids, with -100 off the response; logits[:, t] predicts labels[:, t + 1]
    Returns (B,) fp32, summed over the response's tokens. The stages compute the same by
    PackedStudent.logps, for a study's 1+N responses at once; this is the form to read, to check
    that by (tests/test_packed.py), and to copy.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (B, T-1)
    return (logps * (labels != -100)).sum(-1)                                          # (B,)


def apo_loss(logps, ref_logps, weights=None, mask=None, beta=0.1):
    """Eq. 11 for B studies with N teachers: one preferred response against N weighted ones.

    logps      (B, 1+N) fp32 sequence log-probs under pi_theta, in nats; column 0 is t+, columns 1..
               the teachers (bf16 would round a log-prob of -400 to whole nats)
    ref_logps  (B, 1+N) fp32, the same under the frozen pi_st
    weights    (N,) or (B, N): w_u >= 0; None means 1
    mask       (B, N) bool, False where a teacher is absent: reward 0, gradient exactly 0; None: all
    beta       of Eq. 8
    Returns losses (B,) and rewards (B, 1+N), detached. N = 1, w = 1 is DPO; w = 1 is S-DPO. Raises
    ValueError for other shapes, a negative or non-finite weight and a study without any teacher.
    """
    B, N = logps.shape[0], logps.shape[-1] - 1
    if mask is None:
        mask = torch.ones(B, N, dtype=torch.bool, device=logps.device)
    right = logps.shape == ref_logps.shape == (B, 1 + N) and mask.shape == (B, N)
    if not right or mask.dtype != torch.bool:
        raise ValueError("expected logps and ref_logps (B, 1+N) and mask (B, N) bool")
    weights = torch.as_tensor(1.0 if weights is None else weights, device=logps.device)
    if not ((weights >= 0) & (weights < float("inf"))).all():
        raise ValueError("weights: expected finite w_u >= 0")
    if not mask.any(dim=1).all():
        raise ValueError("mask: expected at least one teacher in every row")
    present = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # t+ is always there
    # an absent column may hold anything, also NaN
    log_ratios = torch.where(present, logps, 0) - torch.where(present, ref_logps, 0)
    rewards = beta * log_ratios                                                            # Eq. 8
    log_w = weights.to(logps.dtype).expand(B, N).log().masked_fill(~mask, float("-inf"))
    weighted = torch.cat([rewards[:, :1], rewards[:, 1:] + log_w], dim=1)                # (B, 1+N)
    log_z = torch.logsumexp(weighted, dim=1)                              # the denominator of Eq. 9
    losses = log_z - rewards[:, 0]       # Eq. 11: -log of Eq. 9; their mean over studies is Eq. 10
    return losses, rewards.detach()


# The loss above needs torch alone; copy it. Below is stage 3.

import argparse  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

from safetensors import SafetensorError, safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import data  # noqa: E402
import evaluate  # noqa: E402
import selfdistill  # noqa: E402
import student  # noqa: E402
import training  # noqa: E402
from runtime import flags, ranks  # noqa: E402
from runtime.checkpoint import as_umask_says, fingerprint  # noqa: E402
from runtime.records import atomic  # noqa: E402
from runtime.run_folder import RunFolder  # noqa: E402
from runtime.shared import shared_map  # noqa: E402

PRESETS = {
    "paper": dict(train="merger", learning_rate=2e-5, beta=0.1, global_batch=4, refusals="keep"),
    "released": dict(train="lora", lora_r=8, lora_alpha=32, learning_rate=5e-7, beta=0.1,
                     warmup_ratio=0.05, global_batch=4, max_length=4096, max_tokens=8 * 4096,
                     refusals="keep"),
    "demo": dict(train="lora", learning_rate=1e-3, beta=1.0, global_batch=4, micro_batch=0,
                 gradient_checkpointing=False),
}

RELEASED = """\
released follows the authors' script: 5% of the steps are warm-up, and a sequence of image, prompt
and one response is cut at 4,096 tokens. Its 32 pairs (t+, trajectory) a step are 4 studies of seven
teachers here, 28: 5 would be 35, which 4 GPUs do not divide. With one teacher they are
--global_batch 32. --max_tokens is eight such sequences, so that it leaves out no study."""


def parse(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_training_arguments(parser)
    g = parser.add_argument_group("this stage")
    g.add_argument("--positives", help="positives.jsonl of stage 2")
    g.add_argument("--beta", type=flags.above_zero, default=0.1,
                   help="Eq. 8; smaller goes further from pi_st (default: %(default)s)")
    g.add_argument("--teacher_weights", help="NAME=W,... for w_u of Eq. 9 (others 1), or "
                   "'normalised': sum 1 over those present")
    g.add_argument("--length_norm", action=argparse.BooleanOptionalAction, default=False,
                   help="mean instead of sum over tokens")
    g.add_argument("--nll_alpha", type=flags.zero_or_more, default=0.0,
                   help="adds this times the NLL of t+ per token (default: %(default)s)")
    return flags.parse(parser, PRESETS, argv, RELEASED)


def after_compare(args):
    """The flags with what stages 1 and 2 made, where they are asked for.

    They are with --base and on the scale model, and lie in OUTPUT_DIR/spd and /selfdistill. Raises
    ValueError where an input is missing.
    """
    if args.base or args.studies is None:
        made = selfdistill.run(flags.inherit(args, selfdistill.parse))
        args = flags.replaced(args, **made, base=None, output_dir=flags.in_chain(args, "apo"))
    flags.require(
        args, student="stage 1 makes pi_st: spd.py --studies ... --output_dir runs/spd, in "
        "runs/spd/student; --base QWEN in its place makes all",
        positives="stage 2 makes them: selfdistill.py --studies ... --student runs/spd/student "
        "--output_dir runs/positives")
    student.require_family(args.student)
    train = student.parse_train(args.train)
    student.require_trainable(args.student, train, args.lora_r, args.lora_alpha)
    return args


def teacher_weights(flag, names):
    """w_u of Eq. 9.

    flag   --teacher_weights: 'NAME=W,...', 'normalised' or None
    names  the N teachers
    Returns (N,) fp32, or None for 'normalised'. Raises ValueError for an unknown teacher or a
    weight below 0.
    """
    if flag == "normalised":
        return None
    weights = dict.fromkeys(names, 1.0)
    for part in filter(None, (flag or "").split(",")):
        name, _, value = part.rpartition("=")
        try:
            weights[name] = float(value) if name in weights else None
        except ValueError:
            weights[name] = None
        if weights[name] is None or not 0 <= weights[name] < math.inf:
            raise ValueError(f"--teacher_weights {part}: expected NAME=W with W >= 0 and NAME one "
                             f"of {', '.join(names)}")
    return torch.tensor([weights[name] for name in names])


def terms(tokens, weights, length_norm):
    """What Eq. 11 takes beside the log-probs, of a micro-batch.

    tokens   (B, 1+N) lengths of t+ and the trajectories, 0 where a teacher is absent
    weights  (N,), or None for 'normalised': 1 over how many are present
    Returns w (N,) or (B, N), mask (B, N), and the factor of log-probs: 1, or 1 / tokens (B, 1+N).
    """
    mask = tokens[:, 1:] > 0
    w = mask / mask.sum(1, keepdim=True) if weights is None else weights.to(tokens.device)
    return w, mask, 1 / tokens.clamp(min=1) if length_norm else 1


# ------------------------------------------------------------------------ the frozen reference

# nats by which a token's log-prob may differ between two passes, without and with --bf16
ROUNDING = {False: 1e-4, True: 4e-3}


def checked_reference(model, plan, encode, folder, key, weights, args):
    """The reference, after a look at the first step: at pi_theta = pi_st its losses are known.

    weights, args  as `first_loss` takes them; the others as `reference_logps` takes them
    A film that was changed in place shows there, and in no key. The reference is then computed
    again. Returns what `reference_logps` returns. Raises ValueError where that is of no help.
    """
    ref = reference_logps(model, plan, encode, folder, key, args.num_workers)
    off, study, loss, expected = first_loss(model, plan, encode, ref, weights, args)
    if off > 0:
        ranks.print_once(f"warning: {folder.path / 'reference.safetensors'}: with it the first "
                         f"loss of study {study!r} is {loss:.4f}, expected log(1 + sum of w_u) = "
                         f"{expected:.4f}; its image has changed since, or the processor. "
                         "Computing the reference again")
        ref = reference_logps(model, plan, encode, folder, key, args.num_workers, anew=True)
        off, study, loss, expected = first_loss(model, plan, encode, ref, weights, args)
    if off > 0:
        raise ValueError(f"study {study!r}: its first loss is {loss:.4f} with a reference that was "
                         f"just computed, expected log(1 + sum of w_u) = {expected:.4f}: its image "
                         "or this machine gives another log pi_st in each pass")
    return ref


@torch.no_grad()
def first_loss(model, plan, encode, ref, weights, args):
    """The loss of the study of the first step that is furthest from Eq. 11 at pi_theta = pi_st.

    model    still pi_st
    plan     training.Plan
    encode   (epoch, index) -> example as student.Processor returns it
    ref      (n, 1+N) the reference
    weights  what `teacher_weights` returns
    args     the flags: beta, length_norm, bf16
    Returns (how far it is off beyond rounding, 0 or less where it is not; the study's id; its loss;
    log(1 + sum_u w_u)), the same on all ranks. A loss of NaN is left to the step, which names it.
    """
    packed, found = student.PackedStudent(model).eval(), []
    for keys in plan.micro_batches()[:plan.accumulation]:
        (batch,) = student.to_device(
            model.device, student.pack([encode(*key) for key in keys], model))
        w, mask, scale = terms(batch["tokens"], weights, args.length_norm)
        ref_logps = ref[[index for _, index in keys]].to(model.device) * scale          # (B, 1+N)
        (logps,) = packed(batch)
        losses, _ = apo_loss(logps * scale, ref_logps, w, mask, args.beta)
        expected, _ = apo_loss(ref_logps, ref_logps, w, mask, args.beta)
        rounding = args.beta * ROUNDING[args.bf16] * (batch["tokens"] * scale).amax(1)
        off = ((losses - expected).abs() - rounding).nan_to_num()
        found += zip(off.tolist(), batch["studies"], losses.tolist(), expected.tolist())
    return max(ranks.gather(max(found)))


@torch.no_grad()
def reference_logps(model, plan, encode, folder, key, num_workers, anew=False):
    """log pi_st of all responses, computed once and cached in the run folder.

    model   still pi_st: what trains has not moved yet
    encode  (epoch, index) -> example as student.Processor returns it
    key     `reference_key`; a cache of another one is made anew
    anew    whether it is made anew also where the cache has this key
    Returns (n, 1+N) fp32 on the CPU. It goes through the packed path that trains, and the studies
    share micro-batches as in the first epoch, so that the first rewards are exactly 0 and the first
    loss is log(1 + sum_u w_u).
    """
    file, parts = folder.path / "reference.safetensors", folder.path / "reference.parts"
    if file.exists() and not anew:
        try:
            with safe_open(file, "pt") as cached:
                if cached.metadata().get("key") == key:
                    return cached.get_tensor("logps")
            ranks.print_once("critique: the cached reference belongs to other input, computing it "
                             "again")
        except SafetensorError as error:
            ranks.print_once(f"warning: {file} is damaged ({error}), computing it again")
    packed = student.PackedStudent(model).eval()

    def work(indices, examples):
        batch = student.pack(examples, model)
        with ranks.out_of_memory(batch):
            (logps,) = packed(*student.to_device(model.device, batch))
        return logps.tolist()  # fp32 survives JSON: a float is printed with all its digits

    rows = shared_map(plan.order(0), lambda index: encode(0, index), work, plan.micro_batch,
                      parts / key[:16], num_workers, desc="reference")
    logps = torch.tensor([rows[index] for index in range(len(rows))])

    def write():
        with atomic(file) as temporary:
            save_file({"logps": logps}, temporary, metadata={"key": key})
        as_umask_says(file.parent)
        shutil.rmtree(parts)

    ranks.on_rank_zero(write)
    return logps


def reference_key(args, task, studies, names):
    """sha256 over all that the reference depends on: checkpoint, texts, images (by path and size),
    prompt, image size, where a text is cut, number format. tools/drift.py, which takes it too, has
    no max_length."""
    files = [(path, (Path(args.images) / path).stat().st_size)
             for study in studies for path in study.images]
    records = [(study.id, study.t_plus, study.trajectories,
                data.student_prompt(study, task, args.prompt)) for study in studies]
    parts = [fingerprint(args.student), task.prompts["system"], args.max_pixels, args.max_tokens,
             getattr(args, "max_length", None), args.bf16, names, records, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


# ------------------------------------------------------------------------------------ the log

def log_keys(names):
    """The keys of log.jsonl (README, 'Log keys') for these teachers."""
    columns = ["chosen", *names]
    return ["loss", "rewards/margins", "rewards/accuracies", "rewards/rejected", "logps/chosen",
            "tokens", "tokens/chosen", *(f"rewards/{name}" for name in columns),
            *(f"accuracies/{name}" for name in names)]


def record(log, losses, rewards, logps, tokens, names, last):
    """One micro-batch into the log.

    losses (B,); rewards, logps, tokens (B, 1+N). Margins and 'rejected' are means over the teachers
    present; an accuracy counts rewards of t+ above a teacher's, 'rewards/accuracies' above all.
    last: whether the step ends with it, so that 'tokens' is a mean over steps.
    """
    B, mask = len(losses), tokens[:, 1:] > 0                                              # (B, N)
    margins = rewards[:, :1] - rewards[:, 1:]                                             # (B, N)
    log.add("loss", losses.sum(), B)
    log.add("rewards/margins", margins[mask].sum(), mask.sum())
    log.add("rewards/rejected", rewards[:, 1:][mask].sum(), mask.sum())
    log.add("rewards/accuracies", ((margins > 0) | ~mask).all(1).sum(), B)
    log.add("logps/chosen", logps[:, 0].sum(), B)
    log.add("tokens", tokens.sum(), int(last and ranks.rank() == 0))
    log.add("tokens/chosen", tokens[:, 0].sum(), B)
    log.add("rewards/chosen", rewards[:, 0].sum(), B)
    for u, name in enumerate(names):
        here = mask[:, u]
        log.add(f"rewards/{name}", rewards[here, 1 + u].sum(), here.sum())
        log.add(f"accuracies/{name}", (margins[here, u] > 0).sum(), here.sum())


def warnings_of(line, names, progress, beta, length_norm=False):
    """What a log line says of a run that goes wrong (README, 'Log keys').

    progress  share of the steps that are done
    """
    if line["loss"] < 0.05 * math.log(1 + len(names)) and progress < 0.25:
        yield ("the loss is near 0 early: t+ may be told apart by style alone, read some t+ beside "
               "the teachers' texts")
    # how many nats of t+ below pi_st's, per token with --length_norm
    fallen = -line["rewards/chosen"] / beta
    if fallen > 0.1 * (1 if length_norm else line["tokens/chosen"]):
        yield ("log pi(t+) fell by more than a nat per ten tokens: a larger --beta, a smaller "
               "--learning_rate or --nll_alpha hold it")


def warn(line, names, progress, args):
    """Prints the warnings of a log line, if there is one."""
    if line:
        for warning in warnings_of(line, names, progress, args.beta, args.length_norm):
            ranks.print_once(f"step {line['step']}: warning: {warning}")


@training.naming_the_way_on()
def run(args):
    """Stage 3: pi_theta, from t+ against every teacher; with --base stages 1 and 2 before it.

    args: what `parse` returns. Returns RunFolder.outputs. Raises as spd.run does.
    """
    args = after_compare(args)
    device, train = ranks.init(), student.parse_train(args.train)
    task = data.load_task(args.task_file)
    studies, names, dropped = data.training_studies(
        args.studies, task, args.split, args.teachers, args.refusals, args.positives)
    weights = teacher_weights(args.teacher_weights, names)                                   # (N,)
    training.require_same_inputs(args, studies=studies)  # with their t+
    with RunFolder(args, ("studies", "positives", "task_file", "student")) as folder:
        if folder.finished:
            return folder.outputs("critique")
        processor = training.open_processor(args, task)
        (studies,) = training.drop_broken(folder, args, studies)
        prompt = lambda study: data.student_prompt(study, task, args.prompt)
        # column 0 is t+, columns 1.. the teachers; None where one gave no text
        texts = lambda study: [study.t_plus, *map(study.trajectories.get, names)]
        studies, lengths = training.drop_long(processor, studies, prompt, texts, args, folder)
        plan = training.Plan(lengths, args)
        ranks.print_once(f"critique: {plan}; {', '.join(names)}; {dropped} refusals dropped")
        model = training.open_student(args, processor, folder, device)
        parameters = student.set_trainable(
            model, train, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
        optimizer = training.make_optimizer(parameters, args, shard="decoder" in train)
        packed = training.wrap(student.PackedStudent(model), device)

        encode = lambda epoch, i: processor(studies[i], prompt(studies[i]), texts(studies[i]))
        training.warm_up(packed, plan, encode, model)
        if args.dry_run:
            return training.report_dry_run(plan, packed, encode, parameters, optimizer, 12_132)
        key = reference_key(args, task, studies, names)
        ref = checked_reference(model, plan, encode, folder, key, weights, args)        # (n, 1+N)
        start, log = folder.resume(parameters, optimizer, log_keys(names), device)
        for step, batches in training.steps(plan, start, encode, model, log, args, "critique"):
            for micro, batch in enumerate(batches):
                last = micro == plan.accumulation - 1
                with training.micro_step(packed, batch, last, args.seed, step, micro):
                    ref_logps = ref[batch["index"]].to(device)                          # (B, 1+N)
                    (batch,) = student.to_device(device, batch)
                    tokens = batch["tokens"]                                            # (B, 1+N)
                    w, mask, scale = terms(tokens, weights, args.length_norm)  # mask: who answered
                    (logps,) = packed(batch)                                            # (B, 1+N)
                    losses, rewards = apo_loss(
                        logps * scale, ref_logps * scale, w, mask, args.beta)           # Eq. 11
                    nll = -(logps[:, 0] / tokens[:, 0]).sum() / args.global_batch  # of t+, a token
                    loss = losses.sum() / args.global_batch + args.nll_alpha * nll      # Eq. 10
                    (loss * ranks.world()).backward()  # DDP takes the mean over ranks, not the sum
                training.report_non_finite(loss, batch)
                record(log, losses.detach(), rewards, logps.detach(), tokens, names, last)
            stopping = log.reduce(folder.stop.asked)  # all raise here if one loss is not finite
            rate = plan.learning_rate(step)
            norm = training.update(parameters, optimizer, rate, args.max_grad_norm)
            line = log.write_if_due(step + 1, plan, learning_rate=rate, grad_norm=norm)
            warn(line, names, (step + 1) / plan.steps, args)
            folder.save_if_due(step + 1, plan, parameters, optimizer, log, stopping)
        training.finish(folder, model, processor, args, "preference optimisation (Eq. 11)")
        return folder.outputs("critique")


# ----------------------------------------------------------------------------- the closing table

def closing_table(made, preset, max_pixels):
    """Ends the chain: evaluate's table of both students, the teachers and their vote.

    made        what `run` returned; OUTPUT_DIR/spd is beside its student's folder
    preset      'demo' is scored on what the students write, since the tiny one was not taught
                questions
    max_pixels  flag of the stages
    It is of another split than training's that has labels; where there is none, one line says how
    to evaluate.
    """
    root = made["student"].parent.parent
    task = data.load_task(made["task_file"])
    labelled = [study.split for study in data.read_studies(made["studies"], task) if study.labels]
    others = [split for split in ("test", *labelled)
              if split in labelled and split not in ("train", None)]
    # --no-merge leaves the adapter alone
    after = made["student"] if made["student"].exists() else root / "apo" / "adapter"
    if not others:
        ranks.print_once("no closing table: no other split than train has labels; to evaluate: "
                         "python evaluate.py classify --studies STUDIES --images DIR "
                         f"--student {after}")
        return
    argv = ["classify", "--studies", made["studies"], "--images", made["images"],
            "--split", others[0], "--output", root / "results.json",
            "--student", f"SPD, all teachers={root / 'spd' / 'student'}",
            "--student", f"SPD, all teachers + APO={after}"]
    if made["task_file"]:
        argv += ["--task_file", made["task_file"]]
    if max_pixels is not None:
        argv += ["--max_pixels", max_pixels]
    if preset == "demo":
        ranks.print_once("one seed, not a result; experiment/README.md has five, with all controls")
        argv += ["--mode", "parse", "--bootstrap", 0, "--max_new_tokens", 96, "--batch_size", 50]
    evaluate.run(evaluate.parse([str(word) for word in argv]))


def main():
    args = parse()
    with ranks.process_group("critique"):
        made = run(args)
        if (args.base or args.studies is None) and not args.dry_run:
            closing_table(made, args.preset, args.max_pixels)


if __name__ == "__main__":
    main()
