"""The students that a command of evaluate.py asks: its flags for them, and their names."""

import argparse
from pathlib import Path

import torch

import student
from runtime import flags


def add_arguments(parser):
    """Adds the flags of all commands that ask a student."""
    parser.add_argument("--student", action="append", required=True,
                        help="NAME=FOLDER or FOLDER (or a hub id), of a student or of a LoRA "
                        "adapter on one; may be given several times")
    parser.add_argument("--max_pixels", type=flags.at_least_one,
                        help="pixels per image, 784 a token (default: 802816, or what the "
                        "student's folder allows where that is less)")
    parser.add_argument("--num_workers", type=flags.at_least_zero, default=0,
                        help="processes per rank that load images (default: %(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction,
                        default=torch.cuda.is_available(), help="weights in bf16")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if anything is missing")
    parser.add_argument("--output",
                        help="results.json to write; the same command goes on where it stopped")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def add_answer_arguments(parser):
    """Adds the flags of the commands in which a student writes texts."""
    parser.add_argument("--max_new_tokens", type=flags.at_least_one, default=1024,
                        help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--batch_size", type=flags.at_least_one, default=32,
                        help="studies per forward of generated answers (default: %(default)s)")
    parser.add_argument("--seed", type=flags.a_seed, default=0,
                        help="of the sampled answers and the bootstrap (default: %(default)s)")
    parser.add_argument("--split", help="which studies: train, validate, test (default: test)")


def named(given):
    """The students to be asked.

    given  values of --student: NAME=FOLDER, FOLDER or a hub id
    Returns {name: folder or hub id}. Raises ValueError if two have the same name, or one is no
    Qwen2.5-VL.
    """
    folders = {}
    for value in given:
        name, equals, path = value.partition("=")
        if Path(value).exists() or not equals:
            name, path = value, value
        if name in folders:
            raise ValueError(f"--student {value}: a second student named {name!r}, "
                             "expected NAME=FOLDER with names that differ")
        student.require_family(path)
        folders[name] = path
    return folders
