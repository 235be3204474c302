"""The scale model of the paper: what runs when no data is named, on any CPU.

Real weights, films and teachers cannot be shipped. So the default of every stage is a drawn world
with simulated teachers (films.py, world.py) and a student of the real model class with 0.66 M
parameters (base.py). The stages treat them as they treat any other data and student.

    python -m scale_model make --out world --seed 0 --world nuisance
        writes films/, studies.jsonl, replay.jsonl, task.json, to look at
    python -m scale_model student --out student
        writes the base student as a folder that from_pretrained loads
    python -m scale_model base --out base.safetensors
        trains that base student again; five minutes on one CPU thread
"""

import argparse

from runtime import flags
from runtime.records import require_folder
from scale_model.base import train_base, write_student
from scale_model.world import WORLDS, make


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="scale_model", description="The scale model of the paper.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser(
        "make", help="draw a world: films, studies.jsonl, replay.jsonl, task.json")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--seed", type=flags.a_seed, default=0, help="default: %(default)s")
    p.add_argument("--world", choices=WORLDS, default="nuisance",
                   help="how the teachers err (default: %(default)s)")
    for split, count in (("train", 800), ("validate", 200), ("test", 200)):
        p.add_argument(f"--{split}", type=flags.at_least_zero, default=count,
                       help="films (default: %(default)s)")
    p.add_argument("--replay", type=flags.at_least_zero, default=2400,
                   help="rows of replay.jsonl (default: %(default)s)")
    p.add_argument("--drift", type=flags.finite, default=0.0,
                   help="radians by which the teachers' blind spots turn (default: %(default)s)")
    p.add_argument("--change", type=flags.zero_to_one,
                   help="position in [0, 1] of the stream at which they turn at once "
                        "(default: gradually)")
    p = commands.add_parser("student", help="unpack the base student that ships")
    p.add_argument("--out", required=True, help="folder to write")
    p = commands.add_parser(
        "base", help="train the base student anew; another processor gives other last bits")
    p.add_argument("--out", required=True, help="file to write")
    return parser.parse_args(argv)


def run(args):
    """Runs a command. args: what `parse` returns."""
    args = vars(args)
    command, out = args.pop("command"), args.pop("out")
    if command == "make":
        make(out, **args)
    elif command == "student":
        write_student(out)
    else:
        require_folder(out)
        print("sha256", train_base(out))


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"scale_model: {error}") from None


if __name__ == "__main__":
    main()
