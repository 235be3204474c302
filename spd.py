"""Learn: supervised pre-distillation on the trajectories of all teachers (Sec. 2.2, Eq. 5-6).

    Z_m = { P(z_m^u | t_<m^u), u = 1 .. N }                                                                          (5)
    q*(z_m | t_<m) = argmin_q  sum_u  KL( P(z_m^u | t_<m^u) || q(z_m | t_<m) )                                       (6)

Teachers behind an API give text, not the distributions Z_m: of each only the token that was drawn is known. So the KL is taken at its
Monte-Carlo estimate: up to a constant it is the cross-entropy of the student on every teacher's trajectory. The result is the
pre-distilled student pi_st, the policy that samples t+ in stage 2 and the frozen reference of stage 3.

reads   studies.jsonl (image, prompt, trajectories), a Qwen2.5-VL
writes  OUTPUT_DIR/student (pi_st), adapter, log.jsonl, checkpoints

    python spd.py                                                            scale model, one process
    torchrun --nproc_per_node=4 spd.py --studies studies.jsonl --images files --student Qwen/Qwen2.5-VL-7B-Instruct --output_dir runs/spd
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 spd.py ...       the same on two nodes

Where the paper is silent or contradicts itself:
  1. The loss is the mean over the tokens of the global batch, end tokens included.
  2. --global_batch counts studies; the seven trajectories of a study are packed behind one image and prompt.
  3. LoRA of rank 8 on every decoder linear, merged afterwards: learning rate 1e-4 with dropout 0.1 suggests it.
  4. Warm-up of 20 steps (Table 6 also says ratio 0.05); cosine down to 1e-7.
"""

import argparse
import random

import torch
from tqdm import tqdm

import data
import student
import training
from runtime import checkpoint, flags, ranks

PRESETS = {
    "paper": dict(train="lora", lora_r=8, lora_alpha=32, lora_dropout=0.1, learning_rate=1e-4, warmup_steps=20, global_batch=4,
                  refusals="keep"),
    "released": dict(train="lora", lora_r=8, lora_alpha=32, lora_dropout=0.05, learning_rate=1e-4, warmup_steps=20, global_batch=4,
                     refusals="keep"),
    "demo": dict(train="decoder,merger", learning_rate=2e-3, warmup_steps=20, num_epochs=5, global_batch=16, micro_batch=0,
                 trajectories_per_study=4, replay_rows=3, gradient_checkpointing=False),
}


def parse(argv=None):
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_training_arguments(parser)
    g = parser.add_argument_group("this stage")
    g.add_argument("--trajectories_per_study", type=flags.at_least_zero, default=0,
                   help="drawn anew for each study and epoch; 0: all (default: %(default)s)")
    g.add_argument("--replay", help="jsonl of studies with trajectories and t_plus: rows that keep alive the skill of Eq. 7 (scale model)")
    g.add_argument("--replay_rows", type=flags.at_least_one, default=3, help="replay rows per step (default: %(default)s)")
    g.add_argument("--replay_weight", type=float, default=0.5, help="of their loss (default: %(default)s)")
    return flags.parse(parser, PRESETS, argv)


def choose_teachers(study, names, count, seed, epoch):
    """The teachers of this study in this epoch, in their fixed order: all that answered, or `count` of them drawn by seed."""
    present = [name for name in names if name in study.trajectories]
    if count and count < len(present):
        drawn = set(random.Random(f"{seed} {epoch} {study.id} teachers").sample(present, count))
        present = [name for name in present if name in drawn]
    return present


def run(args):
    flags.require(args, student="name a Qwen2.5-VL folder or hub id, such as Qwen/Qwen2.5-VL-7B-Instruct")
    device = ranks.init()
    train = student.parse_train(args.train)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)
    names = data.keep_teachers(studies, args.teachers)
    dropped = 0
    if args.refusals == "drop":
        studies, dropped = data.drop_refusals(studies, task)
    studies = [study for study in studies if study.trajectories]
    if not studies:
        raise ValueError(f"{args.studies}: no study has trajectories, expected the teachers' texts")
    replay = data.read_studies(args.replay, task) if args.replay else []
    if replay and (sum(study.t_plus is not None for study in replay) < len(replay) or len(replay) < args.replay_rows):
        raise ValueError(f'{args.replay}: expected "t_plus" in each record, and at least --replay_rows {args.replay_rows} records')
    lock = checkpoint.open_run(args, {"studies": args.studies, "task_file": args.task_file, "student": args.student, "replay": args.replay})
    if checkpoint.finished(args):
        ranks.say(f"learn: {args.output_dir} is finished")
        return
    encoder = data.Encoder(args.student, task, args.images, args.max_pixels, args.max_tokens)
    studies, long, tokens = training.fit(encoder, studies, lambda s: data.student_prompt(s, task, args.prompt),
                                         lambda s: s.trajectories.values(), args.max_tokens, args.truncate)
    checkpoint.report_long(args, long)
    plan = training.Plan(len(studies), args)
    ranks.say(f"learn: {plan}; teachers {', '.join(names)}; {dropped} refusals dropped")

    model = student.load(args.student, torch.bfloat16 if args.bf16 else torch.float32, device)
    parameters = student.set_trainable(model, train, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing(model)
    optimizer = training.make_optimizer(parameters, args, shard="decoder" in train)
    if args.dry_run:
        ranks.say(training.describe(plan, model, parameters, tokens, 10_686, "decoder" in train, args.bf16))
        all_steps, (studies, tokens, plan) = plan.steps, training.longest_step(studies, tokens, args)
    start, sums = checkpoint.resume(args, parameters, optimizer)
    packed = training.wrap(student.PackedStudent(model), device)

    def encode(key):
        epoch, index = key
        study = studies[index]
        chosen = choose_teachers(study, names, args.trajectories_per_study, args.seed, epoch)
        return encoder(study, data.student_prompt(study, task, args.prompt), [study.trajectories.get(n) if n in chosen else None for n in names])

    def replay_examples(step):
        rows = random.Random(f"{args.seed} {step} replay").sample(replay, args.replay_rows) if replay else []
        return [encoder(s, data.compare_prompt(s, task, args.seed), [s.t_plus]) for s in rows[ranks.rank()::ranks.world()]]

    def batch_of(examples):
        return student.to(student.pack(examples, model), device)

    stream = iter(training.loader(encode, plan.micro_batches(start), args.num_workers))
    log = checkpoint.Log(args.output_dir, ("loss", "replay_loss", "tokens", *(f"loss/{name}" for name in names)), device, start, sums)
    stop = training.Stop()
    packed.train()
    if start < plan.steps:
        longest = plan.longest(tokens)
        training.warm_up(packed, batch_of([encode(key) for key in longest]), [studies[index].id for _, index in longest])
    bar = tqdm(total=plan.steps, initial=start, desc="learn", disable=ranks.rank() > 0)
    for step in range(start, plan.steps):
        micro_batches = [next(stream) for _ in range(plan.accumulation)]
        extra = replay_examples(step)
        count = lambda examples: sum(len(r) for e in examples for r in e["responses"] if r is not None)
        all_tokens, replay_tokens = ranks.all_reduce(torch.tensor([sum(map(count, micro_batches)), count(extra)], device=device)).tolist()

        for micro, examples in enumerate(micro_batches):
            last = micro == len(micro_batches) - 1
            batches = [batch_of(examples)] + ([batch_of(extra)] if extra and last else [])
            training.seed_step(args.seed, step, micro)
            ids = [example["id"] for example in examples]
            with training.on_studies(ids, batches[0]), training.synced(packed, last):
                logps, *of_replay = packed(*batches)                                     # (B, N), and (replay rows, 1)
                loss = -logps.sum() / all_tokens                                                            # Eq. 6
                if of_replay:
                    replay_loss = -of_replay[0].sum()
                    loss = loss + args.replay_weight * replay_loss / replay_tokens
                    log.add("replay_loss", replay_loss.detach(), count(extra))
                (loss * ranks.world()).backward()                               # DDP takes the mean over ranks, we want the sum
            for u, name in enumerate(names):
                log.add(f"loss/{name}", -logps[:, u].detach().sum(), batches[0]["tokens"][:, u].sum())
            log.add("loss", -logps.detach().sum(), count(examples))
            for batch in batches:
                log.add_flops(model, batch, train, args.gradient_checkpointing)
            log.add("tokens", count(examples), int(last and ranks.rank() == 0))  # counted once a step: the mean is over steps
            training.report_non_finite(loss, ids)

        stopping = log.reduce(stop.asked)
        learning_rate = training.schedule(step, plan.steps, args.learning_rate, args.min_learning_rate, args.warmup_steps)
        norm = training.update(parameters, optimizer, learning_rate, args.max_grad_norm)
        bar.update()
        done = step + 1
        if done % args.logging_steps == 0 or done == plan.steps:
            line = log.write(done, learning_rate=learning_rate, grad_norm=norm)
            bar.set_postfix(loss=f"{line['loss']:.3f}")
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
    checkpoint.finish(args, model, encoder, parameters, "supervised pre-distillation (Eq. 6)")
    ranks.say(f"learn: pi_st is {checkpoint.result(args)}")
    if lock:
        lock.close()


def main():
    args = parse()
    with ranks.process_group("learn"):
        if args.studies is None:
            from scale_model import chain

            chain.prepare(args, "spd")
        run(args)


if __name__ == "__main__":
    main()
