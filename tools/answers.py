"""What a student answers, one line a study: {"id", "text"}, for the gallery of tools/report.py or for reading.

    python tools/answers.py --student runs/apo/student --studies studies.jsonl --images files --limit 12 --output after.jsonl
    torchrun --nproc_per_node=4 tools/answers.py ...                                          shared over the ranks, the same file

Greedy, with the prompt that the student was trained with.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ surrounds the paper's scripts and is no package of its own

import data  # noqa: E402
import evaluate  # noqa: E402
import student  # noqa: E402
from runtime import (
    checkpoint,  # noqa: E402
    flags,  # noqa: E402
    ranks,  # noqa: E402
)
from runtime.records import require_folder  # noqa: E402


def parse(argv=None):
    parser = argparse.ArgumentParser(description="A student's greedy answers, one line a study.")
    parser.add_argument("--student", required=True, help="folder or hub id")
    parser.add_argument("--studies", required=True, help="studies.jsonl")
    parser.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--split", default="test", help="which studies (default: %(default)s)")
    parser.add_argument("--limit", type=flags.at_least_one, help="only the first so many studies (default: all)")
    parser.add_argument("--output", required=True, help="file to write")
    parser.add_argument("--max_pixels", type=flags.at_least_one, default=1024 * 28 * 28,
                        help="pixels per image, 784 a token (default: %(default)s)")
    parser.add_argument("--max_new_tokens", type=flags.at_least_one, default=1024, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--batch_size", type=flags.at_least_one, default=32, help="studies per forward (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=0, help="processes per rank that load images (default: %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available(), help="weights in bf16")
    return parser.parse_args(argv)


def run(args):
    """Writes the file -> {id: text}."""
    require_folder(args.output)
    student.require_family(args.student)
    task = data.load_task(args.task_file)
    studies = data.read_studies(args.studies, task, args.split)[:args.limit]
    encoder = data.Encoder(args.student, task, args.images, args.max_pixels)
    model = student.load(args.student, torch.bfloat16 if args.bf16 else torch.float32, ranks.init())
    texts = evaluate.answers(model, encoder, studies, task, 0.0, batch_size=args.batch_size, max_new_tokens=args.max_new_tokens,
                             num_workers=args.num_workers)
    lines = [json.dumps({"id": study.id, "text": text}, ensure_ascii=False) + "\n" for study, text in zip(studies, texts)]
    ranks.on_rank_zero(lambda: checkpoint.write_text(Path(args.output), "".join(lines)))
    ranks.say(f"{args.output}: {len(lines)} answers")
    return {study.id: text for study, text in zip(studies, texts)}


def main():
    args = parse()
    with ranks.process_group("answers"):
        run(args)


if __name__ == "__main__":
    main()
