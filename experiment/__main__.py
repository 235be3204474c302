"""The experiment on the scale model: which of the paper's claims hold there?

README.md in this folder has the question, the rows and the rules.

    python -m experiment ladder --jobs 2
        every row in both worlds, seeds 0-4 -> runs/ladder/results.json
    python -m experiment beta --jobs 2
        APO at five values of beta, after it -> runs/ladder/beta.json, beta.svg
    python evaluate.py ablation runs/ladder/results.json
        the ladder beside the paper's Table 5
"""

import argparse
import json

from experiment import beta, ladder
from runtime import flags
from scale_model.world import WORLDS

COMMANDS = {"ladder": ladder.run, "beta": beta.run}
HELP = {
    "ladder": "the experiment: every row in both worlds over seeds, to results.json",
    "beta": "APO at five values of beta on a finished ladder, to beta.json and beta.svg",
}


def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="experiment", description="The experiment on the scale model.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in HELP.items():
        p = commands.add_parser(name, help=what, description=what)
        p.add_argument("--out", default="runs/ladder",
                       help="folder of the experiment (default: %(default)s)")
        p.add_argument("--worlds", nargs="+", choices=WORLDS, default=["nuisance", "class"],
                       help="default: %(default)s")
        p.add_argument("--seeds", nargs="+", type=flags.a_seed, default=[0, 1, 2, 3, 4],
                       help="default: %(default)s")
        p.add_argument("--split", choices=("validate", "test"), default="test",
                       help="studies that are scored (default: %(default)s)")
        p.add_argument("--jobs", type=flags.at_least_one, default=2,
                       help="processes, a world and seed each (default: %(default)s)")
        p.add_argument("--films", type=flags.at_least_one,
                       help="of each split, to try the mechanics (default: 800, 200, 200)")
        p.add_argument("--max_steps", type=flags.at_least_one,
                       help="of each training stage, to try the mechanics (default: all)")
        p.add_argument("--base_steps", type=flags.at_least_one,
                       help="of the base that is not taught consensus, to try the mechanics "
                            "(default: 1100)")
        p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def main():
    args = parse()
    try:
        content = COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"experiment: {error}") from None
    if args.json:
        print(json.dumps(content))


if __name__ == "__main__":
    main()
