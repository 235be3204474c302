"""What the stages call when no data is named: the world, the base student, the stages before."""

from pathlib import Path

from runtime import checkpoint, ranks
from scale_model.base import train_base, write_student
from scale_model.world import make

ANSWER = 96  # tokens at most; the longest report has about 70


def prepare(args, stage):
    """Fills in what `stage` ('spd', 'selfdistill' or 'apo') lacks with the scale model, in the process group that is running: the
    world, the base student, the stages before it. All of it lies in --output_dir (default runs/demo) and is made once."""
    import selfdistill
    import spd

    given = [f"--{name}" for name in ("student", "positives", "task_file") if getattr(args, name, None)]
    if given:
        raise ValueError(f"{given[0]} without --studies: expected the studies too; the scale model makes its own")
    root = Path(args.output_dir or "runs/demo")
    world, base = root / "world", root / "base"
    ranks.say(f"no --studies: the scale model, in {root}")

    def make_inputs():
        if not (world / "task.json").exists():
            make(world, seed=args.seed)
        if not (base / "config.json").exists():
            train_base(root / "base.safetensors") if args.train_base else None
            with checkpoint.whole(base) as temporary:
                write_student(temporary, *((root / "base.safetensors", None) if args.train_base else ()))

    ranks.on_rank_zero(make_inputs)
    inputs = {"studies": world / "studies.jsonl", "images": world, "task_file": world / "task.json", "seed": args.seed}
    done = {"spd": {"student": base, "replay": world / "replay.jsonl", "output_dir": root / "spd"},
            "selfdistill": {"student": root / "spd" / "student", "output_dir": root / "selfdistill"},
            "apo": {"student": root / "spd" / "student", "positives": root / "selfdistill" / "positives.jsonl", "output_dir": root / "apo"}}
    for earlier, module in (("spd", spd), ("selfdistill", selfdistill)):
        if earlier == stage:
            break
        flags = [f"--{key}={value}" for key, value in {**inputs, **done[earlier]}.items()]
        if earlier == "spd" and getattr(args, "max_steps", None):
            flags.append(f"--max_steps={args.max_steps}")  # a short run is short in both training stages
        module.run(module.parse(["--preset", "demo", *flags]))
    for key, value in {**inputs, **done[stage]}.items():
        setattr(args, key, value if key == "seed" else str(value))


def report(args):
    """Prints evaluate's table of the test films after all stages and writes results.json."""
    import evaluate

    root = Path(args.output_dir).parent
    ranks.say("one seed, not a result; EXPERIMENT.md has five, with every control")
    evaluate.run(evaluate.parse([
        "classify", f"--studies={args.studies}", f"--images={args.images}", f"--task_file={args.task_file}", f"--output={root / 'results.json'}",
        f"--student=SPD, all teachers={root / 'spd' / 'student'}", f"--student=SPD, all teachers + APO={root / 'apo' / 'student'}",
        f"--max_new_tokens={ANSWER}", "--batch_size=50", "--mode=parse", "--bootstrap=0"]))
