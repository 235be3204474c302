"""The flags of the stages, presets, and which flags an earlier stage of the chain takes over.

A flag has the name that TRL or transformers' Trainer gives it, where its meaning is the same.
"""

import argparse
import math
import os

import torch


def at_least_one(text):
    """argparse's type of a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def at_least_zero(text):
    """argparse's type of a whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, 0 or more")
    return int(text)


def a_seed(text):
    """argparse's type of a seed: the whole numbers that torch and numpy both take."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 0 to 2**63 - 1")
    return int(text)


def above_zero(text):
    """argparse's type of a finite number above 0."""
    return _number(text, lambda value: value > 0, "a number above 0")


def zero_or_more(text):
    """argparse's type of a finite number of at least 0."""
    return _number(text, lambda value: value >= 0, "a number, 0 or more")


def zero_to_one(text):
    """argparse's type of a number from 0 to 1, both included."""
    return _number(text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def below_one(text):
    """argparse's type of a number from 0 to 1, of which 1 is left out."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 to less than 1")


def up_to_one(text):
    """argparse's type of a number from 0 to 1, of which 0 is left out."""
    return _number(text, lambda value: 0 < value <= 1, "a number above 0, 1 at most")


def finite(text):
    """argparse's type of any number but NaN and infinity."""
    return _number(text, lambda value: True, "a number")


def _number(text, fits, expected):
    """The finite number of a flag's text.

    fits(value)  whether the flag may have it
    expected     what the flag takes, for the message
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and fits(value)):
        raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
    return value


# -------------------------------------------------------------------------- what the stages have

# what an earlier stage takes from a later one that asks for it
SHARED = ("studies", "images", "task_file", "split", "teachers", "refusals", "base", "output_dir",
          "preset", "max_pixels", "num_workers", "bf16", "seed", "train_base", "skip_broken")


def stage_parser(doc):
    """A parser whose --help begins with a stage's docstring."""
    return argparse.ArgumentParser(usage="%(prog)s [flags]", description=doc, allow_abbrev=False,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def add_data_arguments(parser):
    """Adds the flags that all three stages have."""
    g = parser.add_argument_group("data and student")
    g.add_argument(
        "--studies",
        help="studies.jsonl; without it the scale model is made and used")
    g.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument(
        "--task_file",
        help="task.json; without it MIMIC-CXR's 14 findings")
    g.add_argument(
        "--split", default="train",
        help="which studies to use (default: %(default)s)")
    g.add_argument(
        "--base",
        help="folder or hub id of a Qwen2.5-VL: all stages up to this one, from it, in "
             "OUTPUT_DIR/spd, /selfdistill and /apo")
    g.add_argument(
        "--student",
        help="folder or hub id of the Qwen2.5-VL to start from, or the folder of a LoRA adapter on "
             "one: this stage alone, in OUTPUT_DIR")
    g.add_argument(
        "--output_dir",
        help="run folder; the same command continues in it (default: runs/demo for the scale "
             "model)")
    g.add_argument(
        "--teachers",
        help="NAME,...: only these teachers (default: all)")
    g.add_argument(
        "--refusals", choices=("keep", "drop"), default="drop",
        help="trajectories that decline to answer (default: %(default)s)")
    g.add_argument(
        "--max_pixels", type=at_least_one,
        help="pixels per image, 784 make a token (default: 802816, or what the student's folder "
             "allows where that is less)")
    g.add_argument(
        "--num_workers", type=at_least_zero, default=4 if torch.cuda.is_available() else 0,
        help="processes per rank that load images (default: 4 on a GPU, else 0)")
    g.add_argument(
        "--skip_broken", action="store_true",
        help="open all images first and leave out the studies of which one cannot be read, see "
             "broken.jsonl; else the first of them ends the run")
    g.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="weights in bf16, updates in fp32 (default: on a GPU)")
    g.add_argument(
        "--seed", type=a_seed, default=0,
        help="of everything random (default: %(default)s)")
    g.add_argument(
        "--train_base", action="store_true",
        help="scale model only: train its base student anew instead of taking the file that "
             "ships")


def add_training_arguments(parser):
    """Adds the flags of the two stages that train."""
    add_data_arguments(parser)
    add_optimisation_arguments(parser)
    add_row_arguments(parser)
    add_run_arguments(parser)


def add_optimisation_arguments(parser):
    """Adds the flags that say what trains and how."""
    g = parser.add_argument_group("optimisation")
    g.add_argument(
        "--train", default="lora",
        help="what trains: lora,merger,decoder,vision (default: %(default)s); where --student is "
             "an adapter, lora goes on with it, at its r and alpha, and decoder is refused")
    g.add_argument(
        "--lora_r", type=at_least_one, default=8,
        help="rank (default: %(default)s)")
    g.add_argument(
        "--lora_alpha", type=at_least_one, default=32,
        help="scale is alpha / r (default: %(default)s)")
    g.add_argument(
        "--lora_dropout", type=below_one, default=0.0,
        help="on the adapters' input (default: %(default)s)")
    g.add_argument(
        "--num_epochs", type=at_least_one, default=1,
        help="passes over the studies (default: %(default)s)")
    g.add_argument(
        "--max_steps", type=at_least_one,
        help="optimiser steps at most, of an earlier stage too (default: all)")
    g.add_argument(
        "--global_batch", type=at_least_one, default=4,
        help="studies per optimiser step over all ranks (default: %(default)s)")
    g.add_argument(
        "--micro_batch", type=at_least_zero, default=1,
        help="studies per forward on a rank; 0: the rank's whole share (default: %(default)s)")
    g.add_argument(
        "--learning_rate", type=above_zero, default=1e-4,
        help="peak (default: %(default)s)")
    g.add_argument(
        "--min_learning_rate", type=zero_or_more, default=1e-7,
        help="at the end of the cosine, --learning_rate at most (default: %(default)s)")
    g.add_argument(
        "--warmup_steps", type=at_least_zero, default=0,
        help="linear warm-up (default: %(default)s)")
    g.add_argument(
        "--warmup_ratio", type=zero_to_one, default=0.0,
        help="warm-up as a share of all steps, rounded up, in the place of --warmup_steps "
             "(default: %(default)s)")
    g.add_argument("--adam_beta1", type=below_one, default=0.9, help="default: %(default)s")
    g.add_argument("--adam_beta2", type=below_one, default=0.98, help="default: %(default)s")
    g.add_argument(
        "--weight_decay", type=zero_or_more, default=0.05,
        help="decoupled (default: %(default)s)")
    g.add_argument(
        "--max_grad_norm", type=zero_or_more, default=1.0,
        help="clip to this global norm, 0: never (default: %(default)s)")
    g.add_argument(
        "--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute layers in the backward pass")


def add_row_arguments(parser):
    """Adds the flags that say what of a study is learnt from, and how long it may be."""
    g = parser.add_argument_group("a study's row")
    g.add_argument(
        "--prompt", choices=("student", "teacher"), default="student",
        help="teacher: Appendix B's, which names the diagnosis")
    g.add_argument(
        "--max_length", type=at_least_one,
        help="tokens of a sequence: image, prompt and one response, whose end is cut beyond it "
             "(default: no bound)")
    g.add_argument(
        "--max_tokens", type=at_least_one, default=8192,
        help="tokens of a study: image, prompt and responses (default: %(default)s)")
    g.add_argument(
        "--truncate", action="store_true",
        help="cut the longest responses of a study beyond --max_tokens; else it is left out")


def add_run_arguments(parser):
    """Adds the flags that say what a run writes and how it goes on."""
    g = parser.add_argument_group("run")
    g.add_argument(
        "--dry_run", action="store_true",
        help="print the plan, the memory and what a step takes, write nothing (the scale model "
             "makes what it lacks)")
    g.add_argument(
        "--logging_steps", type=at_least_one, default=10,
        help="steps per line of log.jsonl (default: %(default)s)")
    g.add_argument(
        "--save_steps", type=at_least_one, default=500,
        help="steps per checkpoint (default: %(default)s)")
    g.add_argument(
        "--save_total_limit", type=at_least_one, default=2,
        help="checkpoints kept (default: %(default)s)")
    g.add_argument(
        "--resume", choices=("auto", "must", "never"), default="auto",
        help="go on from the newest checkpoint (default: %(default)s)")
    g.add_argument(
        "--resume_anyway", action="store_true",
        help="go on with another number of ranks, --micro_batch or --gradient_checkpointing: the "
             "same studies in each step, other rounding and dropout")
    g.add_argument(
        "--merge", action=argparse.BooleanOptionalAction, default=True,
        help="write student/ with LoRA merged, beside adapter/")


def parse(parser, presets, argv=None, note=""):
    """Parses a stage's flags. What argv gives overrides the preset, which overrides the defaults.

    parser   of the stage
    presets  {name: {flag: value}}
    argv     list of words; None: the command line
    note     what --help says below the list of presets
    Returns the flags. Exits with status 2 for flags that do not go together.
    """
    parser.add_argument(
        "--preset", choices=tuple(presets),
        help="a set of defaults, listed below; any flag overrides it (default: paper with "
             "--studies, else demo)")
    listed = "presets:"
    for name, preset in presets.items():
        settings = ", ".join(f"{flag}={value}" for flag, value in preset.items())
        listed += f"\n  {name:8}  {settings}"
    parser.epilog = f"{listed}\n\n{note}"
    # The preset is read first, so that --help shows it as the defaults.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--preset")
    early.add_argument("--studies")
    first, _ = early.parse_known_args(argv)
    name = first.preset or ("paper" if first.studies else "demo")
    parser.set_defaults(**presets.get(name, {}), preset=name)
    args = parser.parse_args(argv)
    refuse_empty(args, parser)
    args.earlier = False  # whether a later stage asks for this one
    refuse_combinations(args, parser)
    if args.studies is None:
        args.output_dir = args.output_dir or "runs/demo"
    return args


def refuse_empty(args, parser):
    """Exits with status 2 where a flag has an empty text.

    A shell makes one of "$UNSET", and as a path it would be the working directory.
    """
    for name, value in vars(args).items():
        if "" in (value if isinstance(value, list) else [value]):
            parser.error(f"--{name}: empty, expected a text, such as a path")


def refuse_combinations(args, parser):
    """Exits with status 2 where flags do not go together, and says what is expected.

    There are flags for the whole chain of stages, flags for one stage alone, and flags for studies
    of one's own; they must not be mixed.
    """
    given = [f"--{name}" for name in ("student", "positives", "task_file", "base")
             if getattr(args, name, None)]
    if args.studies is None and given:
        parser.error(f"{given[0]} without --studies: expected the studies too; the scale model "
                     "makes its own")
    if args.base and "--student" in given:
        parser.error("--base with --student: --base walks all stages from that model, --student "
                     "is where this stage alone starts; expected one of them")
    if args.base and getattr(args, "server", None):
        parser.error("--base with --server: the server is pi_st; expected --server alone, after "
                     "spd.py")
    if "--positives" in given and "--student" not in given:
        parser.error("--positives without --student: expected pi_st, which sampled them, too; or "
                     "--base alone, which makes both")
    if hasattr(args, "train") and args.min_learning_rate > args.learning_rate:
        parser.error(f"--min_learning_rate {args.min_learning_rate:g}: expected at most "
                     f"--learning_rate {args.learning_rate:g}, where the cosine begins")
    if hasattr(args, "train") and args.warmup_steps and args.warmup_ratio:
        parser.error(f"--warmup_steps {args.warmup_steps} with --warmup_ratio "
                     f"{args.warmup_ratio:g}: expected one of them, and 0 for the other where "
                     f"--preset {args.preset} sets it")
    if args.base and getattr(args, "dry_run", False) and hasattr(args, "beta"):
        parser.error("--dry_run with --base: this stage needs what the others make; expected "
                     "spd.py --dry_run, or --student and --positives")


def require(args, **how):
    """Raises ValueError where an input is missing, and says how it is made.

    args  the flags
    how   flag="the command that makes this input"; a hub id as --student is not looked for
    """
    hints = {"studies": "one JSON object a line, see data.py", **how,
             "output_dir": "name the run's folder"}
    for name, hint in hints.items():
        value = getattr(args, name)
        if name == "output_dir" and getattr(args, "dry_run", False):
            continue
        hub_id = name == "student" and value and value.count("/") == 1
        if not value or not (name == "output_dir" or hub_id or os.path.exists(value)):
            raise ValueError(f"--{name}{' ' + value if value else ''}: missing; {hint}")


# -------------------------------------------------------------------------------------- the chain

def inherit(args, parse):
    """The flags of an earlier stage: its preset's, and those that it takes from the later one.

    args   flags of the later stage, which asks for it
    parse  the earlier stage's function that parses flags
    """
    shared = {name: getattr(args, name) for name in SHARED}
    # Stage 2 has no steps, but it gives the number to stage 1.
    shared["max_steps"] = getattr(args, "max_steps", None)
    return replaced(parse(["--preset", args.preset]), earlier=True, **shared)


def in_chain(args, stage):
    """The folder of a stage of the chain, OUTPUT_DIR/stage; None without --output_dir."""
    return args.output_dir and os.path.join(args.output_dir, stage)


def replaced(args, **changes):
    """A copy of flags of which some are changed; a Path becomes a text, as it is in a flag."""
    changes = {name: str(value) if isinstance(value, os.PathLike) else value
               for name, value in changes.items()}
    return argparse.Namespace(**{**vars(args), **changes})
