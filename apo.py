"""Critique: autonomous preference optimisation (Sec. 2.3, Eq. 8-11). t+ is preferred to every teacher's trajectory.

    r(v, l, t) = beta log( pi_theta(t | v, l) / pi_st(t | v, l) )                                                    (8)
    L_APO = -E log [ exp r(t+) / ( exp r(t+) + sum_u w_u exp r(t^u) ) ]                                          (9-11)

reads   studies.jsonl, positives.jsonl (stage 2), pi_st (stage 1), which is both the start and the frozen reference
writes  OUTPUT_DIR/student, adapter, reference.safetensors, log.jsonl, checkpoints

    torchrun --nproc_per_node=4 apo.py                                              all stages on the scale model, then a table
    torchrun --nproc_per_node=4 apo.py --studies studies.jsonl --images files --positives runs/positives/positives.jsonl \\
             --student runs/spd/student --output_dir runs/apo
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 apo.py ...       on two nodes

Where the paper is silent or contradicts itself:
  1. w_u = 1 for each teacher that answered, so the first loss is log(1 + N); 'normalised' weights are another objective.
  2. beta = 0.1 at 7B (DPO's value, and the authors' script's), 1 for the scale model: it is an inverse guidance scale (README).
  3. log pi(t | v, l) is the sum over a response's tokens with its end token; --length_norm takes the mean.
  4. "The visual encoder and text decoder are frozen" leaves the merger between them (--preset paper). The authors' script trains
     LoRA at 5e-7 (--preset released).
  5. No dropout here, so that the first loss is exact.
"""

import torch


def response_logps(logits, labels):
    """log pi(t | v, l) of whole responses, the plain form.

    logits (B, T, V) of the model; labels (B, T) the input ids, with -100 off the response. logits[:, t] predicts labels[:, t + 1].
    -> (B,) fp32, summed over the response's tokens. The stages compute the same by PackedStudent.logps, for a study's 1+N responses at
    once; this is the form to read, to check that by (tests/test_packed.py), and to copy.
    """
    logits, labels = logits[:, :-1].float(), labels[:, 1:]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]  # (B, T-1)
    return (logps * (labels != -100)).sum(-1)


def apo_loss(logps, ref_logps, weights=None, mask=None, beta=0.1):
    """Eq. 11 for B studies with N teachers: one preferred response against N weighted ones.

    logps, ref_logps (B, 1+N) fp32: sequence log-probs under pi_theta and under the frozen pi_st; column 0 is t+, columns 1.. the teachers
    (bf16 would round a log-prob of -400 to whole nats). weights (N,) or (B, N): w_u >= 0, None means 1. mask (B, N) bool: False where a
    teacher is absent (reward 0, gradient exactly 0). -> losses (B,), rewards (B, 1+N) detached. N = 1, w = 1 is DPO; w = 1 is S-DPO.
    Raises ValueError for other shapes, a negative or non-finite weight and a study without any teacher.
    """
    B, N = logps.shape[0], logps.shape[-1] - 1
    mask = torch.ones(B, N, dtype=torch.bool, device=logps.device) if mask is None else mask
    if not logps.shape == ref_logps.shape == (B, 1 + N) or mask.shape != (B, N) or mask.dtype != torch.bool:
        raise ValueError("expected logps and ref_logps (B, 1+N) and mask (B, N) bool")
    weights = torch.ones(N, device=logps.device) if weights is None else torch.as_tensor(weights, device=logps.device)
    if not ((weights >= 0) & (weights < float("inf"))).all():
        raise ValueError("weights: expected finite w_u >= 0")
    if not mask.any(dim=1).all():
        raise ValueError("mask: expected at least one teacher in every row")
    present = torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)  # t+ is always there
    log_ratios = torch.where(present, logps, 0) - torch.where(present, ref_logps, 0)  # an absent column may hold anything, also NaN
    rewards = beta * log_ratios                                                                                 # Eq. 8
    log_w = weights.to(logps.dtype).expand(B, N).log().masked_fill(~mask, float("-inf"))
    log_z = torch.logsumexp(torch.cat([rewards[:, :1], rewards[:, 1:] + log_w], dim=1), dim=1)                  # Eq. 9's denominator
    losses = log_z - rewards[:, 0]                                      # Eq. 11: -log of Eq. 9, whose mean over B is Eq. 10
    return losses, rewards.detach()


# The loss above needs torch alone; copy it. Below is stage 3.

import argparse  # noqa: E402
import math  # noqa: E402

from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
import reference  # noqa: E402
import student  # noqa: E402
import training  # noqa: E402
from runtime import (
    checkpoint,  # noqa: E402
    flags,  # noqa: E402
    ranks,  # noqa: E402
)

PRESETS = {
    "paper": dict(train="merger", learning_rate=2e-5, beta=0.1, global_batch=4, refusals="keep"),
    "released": dict(train="lora", lora_r=8, lora_alpha=32, learning_rate=5e-7, beta=0.1, global_batch=4, refusals="keep"),
    "demo": dict(train="lora", learning_rate=1e-3, beta=1.0, global_batch=4, micro_batch=0, gradient_checkpointing=False),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_training_arguments(parser)
    g = parser.add_argument_group("this stage")
    g.add_argument("--positives", help="positives.jsonl of stage 2")
    g.add_argument("--beta", type=flags.above_zero, default=0.1, help="Eq. 8; smaller goes further from pi_st (default: %(default)s)")
    g.add_argument("--teacher_weights", help="NAME=W,... for w_u of Eq. 9 (others 1), or 'normalised': sum 1 over those present")
    g.add_argument("--reference", choices=("cached", "online"), default="cached",
                   help="log pi_st once before training, or in every step (default: %(default)s)")
    g.add_argument("--length_norm", action=argparse.BooleanOptionalAction, default=False, help="mean instead of sum over tokens")
    g.add_argument("--nll_alpha", type=float, default=0.0, help="adds this times the NLL of t+ per token (default: %(default)s)")
    return flags.parse(parser, PRESETS, argv)


def teacher_weights(flag, names):
    """-> w (N,), or None for 'normalised'. Raises ValueError for an unknown teacher or a weight below 0."""
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
            raise ValueError(f"--teacher_weights {part}: expected NAME=W with W >= 0 and NAME one of {', '.join(names)}")
    return torch.tensor([weights[name] for name in names])


def warnings_of(line, names, progress):
    """What the log line says of a run that goes wrong (README, 'Log keys')."""
    if line["loss"] < 0.05 * math.log(1 + len(names)) and progress < 0.25:
        yield "the loss is near 0 early: t+ may be told apart by style alone, read some t+ beside the teachers' texts"
    if line["log_ratio/chosen"] < -0.1 * line["tokens/chosen"]:
        yield "log pi(t+) fell by more than a nat per ten tokens: a larger --beta, a smaller --learning_rate or --nll_alpha hold it"


def run(args):
    flags.require(args, student="stage 1 makes pi_st: spd.py --studies ... --output_dir runs/spd, in runs/spd/student",
                  positives="stage 2 makes them: selfdistill.py --studies ... --student runs/spd/student --output_dir runs/positives")
    device = ranks.init()
    train = student.parse_train(args.train)
    if args.reference == "online":
        reference.require_online(train)
    task = data.load_task(args.task_file)
    studies = data.read_positives(args.positives, data.read_studies(args.studies, task, args.split))
    names = data.keep_teachers(studies, args.teachers)
    weights = teacher_weights(args.teacher_weights, names)
    dropped = 0
    if args.refusals == "drop":
        studies, dropped = data.drop_refusals(studies, task)
    studies = [study for study in studies if study.trajectories]
    lock = checkpoint.open_run(args, {"studies": args.studies, "positives": args.positives, "task_file": args.task_file, "student": args.student})
    if checkpoint.finished(args):
        ranks.say(f"critique: {args.output_dir} is finished")
        return
    encoder = data.Encoder(args.student, task, args.images, args.max_pixels, args.max_tokens)
    studies, long, tokens = training.fit(encoder, studies, lambda s: data.student_prompt(s, task, args.prompt),
                                         lambda s: [s.t_plus, *s.trajectories.values()], args.max_tokens, args.truncate)
    checkpoint.report_long(args, long)
    plan = training.Plan(len(studies), args)
    ranks.say(f"critique: {plan}; t+ against {', '.join(names)}; {dropped} refusals dropped")

    model = student.load(args.student, torch.bfloat16 if args.bf16 else torch.float32, device)
    packed = student.PackedStudent(model)

    def encode(index):
        study = studies[index]
        return encoder(study, data.student_prompt(study, task, args.prompt), [study.t_plus, *map(study.trajectories.get, names)])

    def batch_of(examples):
        return student.to(student.pack(examples, model), device)

    parameters = student.set_trainable(model, train, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing(model)
    if args.dry_run:
        ranks.say(training.describe(plan, model, parameters, tokens, 12_132, "decoder" in train, args.bf16))
        all_steps, (studies, tokens, plan) = plan.steps, training.longest_step(studies, tokens, args)
    if args.reference == "cached":  # before a checkpoint is loaded: the model is still pi_st
        ref = reference.cached_logps(packed, encode, batch_of, plan, reference.cache_key(args, task, studies, names), args)
    else:
        merger = reference.frozen_merger(model, train)
    optimizer = training.make_optimizer(parameters, args, shard="decoder" in train)
    start, sums = checkpoint.resume(args, parameters, optimizer)
    packed = training.wrap(packed, device)

    mine = [[index for _, index in batch] for batch in plan.micro_batches(start)]
    stream = zip(mine, training.loader(encode, mine, args.num_workers))
    columns = ["chosen", *names]
    log = checkpoint.Log(args.output_dir, ["loss", "rewards/margins", "rewards/accuracies", "rewards/rejected", "logps/chosen", "tokens",
                                         "tokens/chosen", *(f"rewards/{c}" for c in columns), *(f"log_ratio/{c}" for c in columns),
                                         *(f"accuracies/{name}" for name in names)], device, start, sums)
    stop = training.Stop()
    packed.train()
    if start < plan.steps:
        longest = [index for _, index in plan.longest(tokens)]
        training.warm_up(packed, batch_of([encode(index) for index in longest]), [studies[index].id for index in longest])
    bar = tqdm(total=plan.steps, initial=start, desc="critique", disable=ranks.rank() > 0)
    for step in range(start, plan.steps):
        for micro in range(plan.accumulation):
            indices, examples = next(stream)
            batch, ids = batch_of(examples), [studies[index].id for index in indices]
            training.seed_step(args.seed, step, micro)
            mask = batch["tokens"][:, 1:] > 0                                                                     # (B, N)
            w = mask / mask.sum(1, keepdim=True) if weights is None else weights.to(device)                # None: 'normalised'
            scale = 1 / batch["tokens"].clamp(min=1) if args.length_norm else 1
            last = micro == plan.accumulation - 1
            with training.on_studies(ids, batch), training.synced(packed, last):
                (logps,) = packed(batch)                                                                        # (B, 1+N)
                if args.reference == "cached":
                    ref_logps = ref[indices].to(device)
                else:
                    with reference.as_reference(model, merger):
                        ref_logps = student.PackedStudent(model).logps(batch)  # beside DDP, which expects one forward a backward
                losses, rewards = apo_loss(logps * scale, ref_logps * scale, w, mask, args.beta)           # Eq. 11
                loss = losses.sum() / args.global_batch                                                          # Eq. 10
                if args.nll_alpha:
                    loss = loss - args.nll_alpha * (logps[:, 0] / batch["tokens"][:, 0]).sum() / args.global_batch
                (loss * ranks.world()).backward()                            # DDP takes the mean over ranks, we want the sum
            record(log, losses.detach(), rewards, (logps - ref_logps).detach(), logps.detach(), batch["tokens"], mask, names,
                   steps=int(last and ranks.rank() == 0))
            log.add_flops(model, batch, train, args.gradient_checkpointing)
            training.report_non_finite(loss, ids)

        stopping = log.reduce(stop.asked)
        learning_rate = training.schedule(step, plan.steps, args.learning_rate, args.min_learning_rate, args.warmup_steps)
        norm = training.update(parameters, optimizer, learning_rate, args.max_grad_norm)
        bar.update()
        done = step + 1
        if done % args.logging_steps == 0 or done == plan.steps:
            line = log.write(done, learning_rate=learning_rate, grad_norm=norm)
            bar.set_postfix(loss=f"{line['loss']:.3f}", margin=f"{line['rewards/margins']:.2f}")
            for warning in warnings_of(line, names, done / plan.steps):
                ranks.say(f"step {done}: warning: {warning}")
        if (done % args.save_steps == 0 or stopping or done == plan.steps) and not args.dry_run:
            checkpoint.save_checkpoint(args.output_dir, done, parameters, optimizer, {"log": log.sums}, args.save_total_limit)
        if stopping and done < plan.steps:
            ranks.say(f"stopped after step {done}; the same command goes on")
            raise SystemExit(0)
    stop.over()
    bar.close()
    if args.dry_run:
        training.report_dry_run(bar, all_steps, device)
        return
    checkpoint.finish(args, model, encoder, parameters, "autonomous preference optimisation (Eq. 11)")
    ranks.say(f"critique: pi_theta is {checkpoint.result(args)}")
    if lock:
        lock.close()


def record(log, losses, rewards, log_ratios, logps, tokens, mask, names, steps):
    """One micro-batch into the log. rewards, log_ratios, logps, tokens (B, 1+N); mask (B, N); margins and 'rejected' are means over
    the teachers present, an accuracy counts rewards of t+ above a teacher's, 'rewards/accuracies' above all of them. steps: 1 once a step, so
    that 'tokens' is a mean over steps."""
    B, margins = len(losses), rewards[:, :1] - rewards[:, 1:]
    log.add("loss", losses.sum(), B)
    log.add("rewards/margins", margins[mask].sum(), mask.sum())
    log.add("rewards/rejected", rewards[:, 1:][mask].sum(), mask.sum())
    log.add("rewards/accuracies", ((margins > 0) | ~mask).all(1).sum(), B)
    log.add("logps/chosen", logps[:, 0].sum(), B)
    log.add("tokens", tokens.sum(), steps)
    log.add("tokens/chosen", tokens[:, 0].sum(), B)
    present = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)
    for column, name in enumerate(["chosen", *names]):
        here = present[:, column]
        log.add(f"rewards/{name}", rewards[here, column].sum(), here.sum())
        log.add(f"log_ratio/{name}", log_ratios[here, column].sum(), here.sum())
        if column:
            log.add(f"accuracies/{name}", (margins[here, column - 1] > 0).sum(), here.sum())


def main():
    args = parse()
    with ranks.process_group("critique"):
        if args.studies is None:
            from scale_model import chain

            chain.prepare(args, "apo")
            run(args)
            if not args.dry_run:
                chain.report(args)
        else:
            run(args)


if __name__ == "__main__":
    main()
