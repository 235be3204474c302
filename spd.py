"""Learn: supervised pre-distillation on the trajectories of all teachers (Sec. 2.2, Eq. 5-6).

    Z_m = { P(z_m^u | t_<m^u), u = 1 .. N }                                                  (5)
    q*(z_m | t_<m) = argmin_q  sum_u  KL( P(z_m^u | t_<m^u) || q(z_m | t_<m) )               (6)

Teachers behind an API give text, not the distributions Z_m: of each only the token that was drawn
is known. So the KL is taken at its Monte-Carlo estimate: up to a constant it is the cross-entropy
of the student on every teacher's trajectory. The result is the pre-distilled student pi_st, the
policy that samples t+ in stage 2 and the frozen reference of stage 3.

reads   studies.jsonl (image, prompt, trajectories), a Qwen2.5-VL
writes  OUTPUT_DIR/student (pi_st), adapter, log.jsonl, checkpoints

    python spd.py                                                     scale model, one process
    torchrun --nproc_per_node=4 spd.py --studies studies.jsonl --images files \\
             --student Qwen/Qwen2.5-VL-7B-Instruct --output_dir runs/spd
    torchrun --nnodes=2 --nproc_per_node=4 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 spd.py ...

Where the paper is silent or contradicts itself:
  1. The loss is the mean over the tokens of the global batch, end tokens included.
  2. --global_batch counts studies; a study's trajectories are packed behind one image and prompt.
  3. LoRA of rank 8 on every decoder linear, merged afterwards: learning rate 1e-4 with dropout 0.1
     suggests it.
  4. Warm-up of 20 steps (Table 6 also says ratio 0.05); cosine down to 1e-7.
"""

import random

import torch

import data
import student
import training
from runtime import flags, ranks
from runtime.run_folder import RunFolder
from scale_model.inputs import make_inputs

PRESETS = {
    "paper": dict(train="lora", lora_r=8, lora_alpha=32, lora_dropout=0.1, learning_rate=1e-4,
                  warmup_steps=20, global_batch=4, refusals="keep"),
    "released": dict(train="lora", lora_r=8, lora_alpha=32, lora_dropout=0.05, learning_rate=1e-4,
                     warmup_ratio=0.05, global_batch=4, max_length=2304, max_tokens=7 * 2304,
                     refusals="keep"),
    "demo": dict(train="decoder,merger", learning_rate=2e-3, warmup_steps=20, num_epochs=5,
                 global_batch=16, micro_batch=0, trajectories_per_study=4, replay_rows=3,
                 gradient_checkpointing=False),
}

RELEASED = """\
released follows the authors' script: 5% of the steps are warm-up, and a sequence of image, prompt
and one trajectory is cut at 2,304 tokens. Its 32 trajectories a step are 4 studies of seven
teachers here, 28: 5 would be 35, which 4 GPUs do not divide. With one teacher they are
--global_batch 32. --max_tokens is seven such sequences, so that it leaves out no study."""


def parse(argv=None):
    parser = flags.stage_parser(__doc__)
    flags.add_training_arguments(parser)
    g = parser.add_argument_group("this stage")
    g.add_argument("--trajectories_per_study", type=flags.at_least_zero, default=0,
                   help="drawn anew for each study and epoch; 0: all (default: %(default)s)")
    g.add_argument("--replay", help="studies.jsonl of which some are learnt beside in each step, "
                   "so that a skill stays alive (scale model: that of Eq. 7)")
    g.add_argument("--replay_rows", type=flags.at_least_one, default=3,
                   help="of its studies per step (default: %(default)s)")
    g.add_argument("--replay_weight", type=flags.zero_or_more, default=0.5,
                   help="of their loss (default: %(default)s)")
    return flags.parse(parser, PRESETS, argv, RELEASED)


def choose_teachers(study, names, count, seed, epoch):
    """The teachers of this study in this epoch, in their fixed order.

    count  how many of those that answered, drawn by (seed, epoch, study); 0: all
    """
    present = [name for name in names if name in study.trajectories]
    if count and count < len(present):
        drawn = set(random.Random(f"{seed} {epoch} {study.id} teachers").sample(present, count))
        present = [name for name in present if name in drawn]
    return present


def first_inputs(args):
    """The flags with what this stage starts from.

    Without --studies that is the scale model's records and base; with --base the stage runs in
    OUTPUT_DIR/spd. Raises ValueError where something is missing.
    """
    if args.studies is None:
        args = flags.replaced(args, **make_inputs(args.output_dir, args.seed, args.train_base))
    if args.base:
        folder = flags.in_chain(args, "spd")
        args = flags.replaced(args, student=args.base, base=None, output_dir=folder)
    flags.require(args, student="name a Qwen2.5-VL folder or hub id, such as "
                  "Qwen/Qwen2.5-VL-7B-Instruct")
    student.require_family(args.student)
    train = student.parse_train(args.train)
    student.require_trainable(args.student, train, args.lora_r, args.lora_alpha)
    return args


def read_replay(path, task, rows):
    """The studies of --replay, each with one trajectory; [] without the flag."""
    studies = data.read_studies(path, task) if path else []
    if path and (len(studies) < rows or any(len(study.trajectories) != 1 for study in studies)):
        raise ValueError(f"{path}: expected one trajectory in each record, and at least "
                         f"--replay_rows {rows} records")
    return studies


def usable(studies, replay, folder, args, processor):
    """The studies, and those of --replay, without those that --skip_broken leaves out.

    Raises ValueError where fewer than --replay_rows are left of --replay, where a film of one of
    them is missing, or where one is longer than --max_length, or than --max_tokens and may not be
    cut.
    """
    studies, replay = training.drop_broken(folder, args, studies, replay)
    if replay and len(replay) < args.replay_rows:
        raise ValueError(f"{args.replay}: {len(replay)} records with images that can be read, "
                         f"expected at least --replay_rows {args.replay_rows}")
    shown = {path for study in studies for path in study.images}  # those are looked at later
    data.require_images([s for s in replay if not shown.issuperset(s.images)], args.images)
    for study in replay:
        prompt, texts = data.student_prompt(study, processor.task), study.trajectories.values()
        # A token has at least a byte, so most rows need not be tokenised, which takes seconds.
        words = [processor.task.prompts["system"], prompt, *texts]
        size = sum(len(text.encode()) for text in words)
        most = min(args.max_tokens, args.max_length or args.max_tokens)
        if size + len(study.images) * (processor.max_pixels // 784 + 2) + 64 <= most:
            continue
        prefix, lengths = processor.lengths(study, prompt, texts)
        tokens = prefix + sum(lengths)
        if args.max_length and tokens > args.max_length:  # what is replayed is learnt to its end
            bound = f"--max_length {args.max_length}"
        elif training.fitted(prefix, lengths, args) is None:
            bound = f"--max_tokens {args.max_tokens}"
        else:
            continue
        raise ValueError(f"{args.replay}: {study.id!r} takes {tokens} tokens, expected at most "
                         f"{bound}")
    return studies, replay


def replay_batch(replay, step, args, processor, model):
    """This rank's share of the studies that a step replays, packed; None where it has none."""
    draw = random.Random(f"{args.seed} {step} replay")
    rows = draw.sample(replay, args.replay_rows) if replay else []
    mine = []
    for study in rows[ranks.rank()::ranks.world()]:
        prompt = data.student_prompt(study, processor.task)
        mine.append(processor(study, prompt, study.trajectories.values()))
    return student.pack(mine, model) if mine else None


def count_tokens(batches, replayed, device):
    """Response tokens of a step over all ranks: of its micro-batches, and of what is replayed."""
    counts = [sum(int(batch["tokens"].sum()) for batch in some)
              for some in (batches, [replayed] if replayed else [])]
    return ranks.all_reduce(torch.tensor(counts, device=device)).tolist()


def record(log, logps, of_replay, batch, replayed, names, last):
    """One micro-batch into the log. logps (B, N); of_replay: [] or [(rows, 1)]."""
    tokens = batch["tokens"]                                                              # (B, N)
    for u, name in enumerate(names):
        log.add(f"loss/{name}", -logps[:, u].sum(), tokens[:, u].sum())
    log.add("loss", -logps.sum(), tokens.sum())
    once = int(last and ranks.rank() == 0)  # counted once a step: the mean is over steps
    log.add("tokens", tokens.sum(), once)
    for of in of_replay:
        log.add("replay_loss", -of.detach().sum(), replayed["tokens"].sum())


@training.naming_the_way_on()
def run(args):
    """Stage 1: pi_st from the trajectories of all teachers.

    args: what `parse` returns. Returns RunFolder.outputs, at once where it is finished. Raises
    ValueError (bad input), OSError (disk), FloatingPointError (loss), SystemExit (stopped).
    """
    args = first_inputs(args)
    device, train = ranks.init(), student.parse_train(args.train)
    task = data.load_task(args.task_file)
    studies, names, dropped = data.training_studies(
        args.studies, task, args.split, args.teachers, args.refusals)
    replay = read_replay(args.replay, task, args.replay_rows)
    training.require_same_inputs(args, studies=studies, replay=replay)
    with RunFolder(args, ("studies", "task_file", "student", "replay")) as folder:
        if folder.finished:
            return folder.outputs("learn")
        processor = training.open_processor(args, task)
        studies, replay = usable(studies, replay, folder, args, processor)
        prompt = lambda study: data.student_prompt(study, task, args.prompt)
        studies, lengths = training.drop_long(
            processor, studies, prompt, lambda s: s.trajectories.values(), args, folder)
        plan = training.Plan(lengths, args)
        ranks.print_once(f"learn: {plan}; teachers {', '.join(names)}; {dropped} refusals dropped")
        model = training.open_student(args, processor, folder, device)
        parameters = student.set_trainable(
            model, train, args.lora_r, args.lora_alpha, args.lora_dropout, args.seed)
        optimizer = training.make_optimizer(parameters, args, shard="decoder" in train)
        packed = training.wrap(student.PackedStudent(model), device)

        def encode(epoch, index):
            study = studies[index]
            drawn = choose_teachers(study, names, args.trajectories_per_study, args.seed, epoch)
            texts = [study.trajectories[name] if name in drawn else None for name in names]
            return processor(study, prompt(study), texts)

        training.warm_up(packed, plan, encode, model)
        if args.dry_run:
            return training.report_dry_run(plan, packed, encode, parameters, optimizer, 10_686)
        keys = ("loss", "replay_loss", "tokens", *(f"loss/{name}" for name in names))
        start, log = folder.resume(parameters, optimizer, keys, device)
        for step, batches in training.steps(plan, start, encode, model, log, args, "learn"):
            replayed = replay_batch(replay, step, args, processor, model)
            tokens, replay_tokens = count_tokens(batches, replayed, device)
            for micro, batch in enumerate(batches):
                last = micro == plan.accumulation - 1
                with training.micro_step(packed, batch, last, args.seed, step, micro):
                    inputs = student.to_device(device, batch, replayed if last else None)
                    logps, *more = packed(*inputs)          # (B, N), and (rows, 1) of the replay
                    loss = -logps.sum() / tokens                                         # Eq. 6
                    loss = loss - sum(args.replay_weight * m.sum() / replay_tokens for m in more)
                    (loss * ranks.world()).backward()  # DDP takes the mean over ranks, not the sum
                training.report_non_finite(loss, batch)
                record(log, logps.detach(), more, batch, replayed, names, last)
            stopping = log.reduce(folder.stop.asked)  # all raise here if one loss is not finite
            rate = plan.learning_rate(step)
            norm = training.update(parameters, optimizer, rate, args.max_grad_norm)
            log.write_if_due(step + 1, plan, learning_rate=rate, grad_norm=norm)
            folder.save_if_due(step + 1, plan, parameters, optimizer, log, stopping)
        training.finish(folder, model, processor, args, "supervised pre-distillation (Eq. 6)")
        return folder.outputs("learn")


def main():
    args = parse()
    with ranks.process_group("learn"):
        run(args)


if __name__ == "__main__":
    main()
