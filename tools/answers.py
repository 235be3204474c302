"""What a student answers, one line a study: {"id", "text"}, for the gallery of tools/report.py.

    python tools/answers.py --student runs/apo/student --studies studies.jsonl --images files \\
        --limit 12 --output after.jsonl
    torchrun --nproc_per_node=4 tools/answers.py ...     shared over the ranks, the same file

The answers are greedy, to the prompt that the student was trained with.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import data  # noqa: E402
import sampling  # noqa: E402
import student  # noqa: E402
from runtime import flags, ranks  # noqa: E402
from runtime.records import require_folder, write_text  # noqa: E402


def parse(argv=None):
    """The flags of a list of words; None: of the command line."""
    parser = argparse.ArgumentParser(description="A student's greedy answers, one line a study.")
    parser.add_argument(
        "--student", required=True,
        help="folder or hub id, or the folder of a LoRA adapter")
    parser.add_argument(
        "--studies", required=True,
        help="studies.jsonl")
    parser.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument(
        "--task_file",
        help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument(
        "--split", default="test",
        help="which studies (default: %(default)s)")
    parser.add_argument(
        "--limit", type=flags.at_least_one,
        help="only the first so many studies (default: all)")
    parser.add_argument(
        "--output", required=True,
        help="file to write")
    parser.add_argument(
        "--max_pixels", type=flags.at_least_one,
        help="pixels per image, 784 a token (default: 802816, or what the student's folder allows "
             "where that is less)")
    parser.add_argument(
        "--max_new_tokens", type=flags.at_least_one, default=1024,
        help="tokens of an answer (default: %(default)s)")
    parser.add_argument(
        "--batch_size", type=flags.at_least_one, default=32,
        help="studies per forward (default: %(default)s)")
    parser.add_argument(
        "--num_workers", type=flags.at_least_zero, default=0,
        help="processes per rank that load images (default: %(default)s)")
    parser.add_argument(
        "--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(),
        help="weights in bf16")
    return parser.parse_args(argv)


def run(args):
    """Writes args.output.

    args  the flags of `parse`
    A study with an image that cannot be read is left out, and said. Returns {id: text}. Raises
    ValueError where none can be read, and ValueError or OSError where another input or the output
    is faulty.
    """
    require_folder(args.output)
    student.require_family(args.student)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)[:args.limit]
    processor = student.Processor(args.student, task, args.images, args.max_pixels)
    model = student.load(args.student, args.bf16, ranks.init())
    failed = {}
    texts = sampling.answers(model, processor, studies, task, 0.0, batch_size=args.batch_size,
                             max_new_tokens=args.max_new_tokens, num_workers=args.num_workers,
                             failed=failed)
    answered = {study.id: text for study, text in zip(studies, texts) if study.id not in failed}
    if failed and not answered:
        raise ValueError(f"no image could be read, the first: {next(iter(failed.values()))}")
    lines = [json.dumps({"id": key, "text": text}, ensure_ascii=False) + "\n"
             for key, text in answered.items()]
    ranks.on_rank_zero(lambda: write_text(Path(args.output), "".join(lines)))
    ranks.print_once(f"{args.output}: {len(lines)} answers")
    for key, why in failed.items():
        ranks.print_once(f"left out: {key}: {why}")
    return answered


def main():
    """Runs the command, under torchrun on all ranks."""
    args = parse()
    with ranks.process_group("answers"):
        run(args)


if __name__ == "__main__":
    main()
