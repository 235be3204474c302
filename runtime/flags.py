"""The flags of the stages: names are TRL's and Trainer's where the meaning is the same; presets; which inputs must be there."""

import argparse
import math
import os

import torch

import student


def at_least_one(text):
    """argparse's type of a count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return int(text)


def at_least_zero(text):
    """argparse's type of a count that may be 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number, 0 or more")
    return int(text)


def above_zero(text):
    """argparse's type of a number > 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0")
    return value


def add_data_arguments(parser):
    """The flags that all three stages have; names are TRL's and Trainer's where the meaning is the same."""
    g = parser.add_argument_group("data and student")
    g.add_argument("--studies", help="studies.jsonl; without it the scale model of demo.py is made and used")
    g.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    g.add_argument("--split", default="train", help="which studies to use (default: %(default)s)")
    g.add_argument("--student", help="folder or hub id of the Qwen2.5-VL to start from")
    g.add_argument("--output_dir", help="run folder; the same command continues in it")
    g.add_argument("--teachers", help="NAME,...: only these teachers (default: all)")
    g.add_argument("--refusals", choices=("keep", "drop"), default="drop", help="trajectories that decline to answer (default: %(default)s)")
    g.add_argument("--max_pixels", type=at_least_one, default=1024 * 28 * 28, help="pixels per image, 784 make a token (default: %(default)s)")
    g.add_argument("--num_workers", type=at_least_zero, default=4 if torch.cuda.is_available() else 0,
                   help="processes per rank that load images (default: 4 on a GPU, else 0)")
    g.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
                   help="weights in bf16, updates in fp32 (default: on a GPU)")
    g.add_argument("--seed", type=int, default=0, help="of everything random (default: %(default)s)")
    g.add_argument("--train_base", action="store_true", help="scale model only: train its base student anew instead of taking the file that ships")


def add_training_arguments(parser):
    """The flags of the two stages that train."""
    add_data_arguments(parser)
    g = parser.add_argument_group("optimisation")
    g.add_argument("--train", default="lora", help="what trains: lora,merger,decoder,vision (default: %(default)s)")
    g.add_argument("--lora_r", type=at_least_one, default=8, help="rank (default: %(default)s)")
    g.add_argument("--lora_alpha", type=int, default=32, help="scale is alpha / r (default: %(default)s)")
    g.add_argument("--lora_dropout", type=float, default=0.0, help="on the adapters' input (default: %(default)s)")
    g.add_argument("--num_epochs", type=at_least_one, default=1, help="passes over the studies (default: %(default)s)")
    g.add_argument("--max_steps", type=at_least_one, help="optimiser steps at most (default: all)")
    g.add_argument("--global_batch", type=at_least_one, default=4, help="studies per optimiser step over all ranks (default: %(default)s)")
    g.add_argument("--micro_batch", type=at_least_zero, default=1,
                   help="studies per forward on a rank; 0: the rank's whole share (default: %(default)s)")
    g.add_argument("--learning_rate", type=above_zero, default=1e-4, help="peak (default: %(default)s)")
    g.add_argument("--min_learning_rate", type=float, default=1e-7, help="at the end of the cosine (default: %(default)s)")
    g.add_argument("--warmup_steps", type=at_least_zero, default=0, help="linear warm-up (default: %(default)s)")
    g.add_argument("--adam_beta1", type=float, default=0.9, help="default: %(default)s")
    g.add_argument("--adam_beta2", type=float, default=0.98, help="default: %(default)s")
    g.add_argument("--weight_decay", type=float, default=0.05, help="decoupled (default: %(default)s)")
    g.add_argument("--max_grad_norm", type=float, default=1.0, help="clip to this global norm, 0: never (default: %(default)s)")
    g.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute layers in the backward pass")
    g.add_argument("--prompt", choices=("student", "teacher"), default="student", help="teacher: Appendix B's, which names the diagnosis")
    g.add_argument("--max_tokens", type=at_least_one, default=8192, help="tokens of a study: image, prompt and responses (default: %(default)s)")
    g.add_argument("--truncate", action="store_true", help="cut the longest responses of a study beyond --max_tokens; else it is left out")
    g = parser.add_argument_group("run")
    g.add_argument("--dry_run", action="store_true",
                   help="print the plan and the memory budget, run one step, write nothing (the scale model makes what it lacks)")
    g.add_argument("--logging_steps", type=at_least_one, default=10, help="steps per line of log.jsonl (default: %(default)s)")
    g.add_argument("--save_steps", type=at_least_one, default=500, help="steps per checkpoint (default: %(default)s)")
    g.add_argument("--save_total_limit", type=at_least_one, default=2, help="checkpoints kept (default: %(default)s)")
    g.add_argument("--resume", choices=("auto", "must", "never"), default="auto", help="go on from the newest checkpoint (default: %(default)s)")
    g.add_argument("--resume_anyway", action="store_true", help="go on with another number of ranks, --micro_batch or "
                   "--gradient_checkpointing: the same studies in each step, other rounding and dropout")
    g.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True, help="write student/ with LoRA merged, beside adapter/")


def parse(parser, presets, argv=None):
    """argv over the preset over the defaults. A preset is a plain dict of flags; without --studies it is 'demo'."""
    parser.add_argument("--preset", choices=tuple(presets), help="a set of defaults, listed below; any flag overrides it (default: paper "
                        "with --studies, else demo)")
    parser.epilog = "presets:\n" + "\n".join(f"  {name:8}  {', '.join(f'{k}={v}' for k, v in flags.items())}" for name, flags in presets.items())
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # so that --help shows the defaults that hold
    early.add_argument("--preset")
    early.add_argument("--studies")
    first, _ = early.parse_known_args(argv)
    name = first.preset or ("paper" if first.studies else "demo")
    parser.set_defaults(**presets.get(name, {}), preset=name)
    return parser.parse_args(argv)


def require(args, **how):
    """Raises ValueError before any work where an input is missing, and says how it is made, or where --student is of a family that the
    code does not fit. how: {flag: the command that makes the input}."""
    for name, hint in {"studies": "one JSON object a line, see data.py", **how, "output_dir": "name the run's folder"}.items():
        value = getattr(args, name)
        if name == "output_dir" and getattr(args, "dry_run", False):
            continue
        hub_id = name == "student" and value and value.count("/") == 1
        if value is None or not (name == "output_dir" or hub_id or os.path.exists(value)):
            raise ValueError(f"--{name}{' ' + value if value else ''}: missing; {hint}")
    if "student" in how:
        student.require_family(args.student)
