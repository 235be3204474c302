"""Scores of reports against references: BLEU-1..4, METEOR, ROUGE-L, CIDEr.

    python -m metrics hypotheses.txt references.txt        one text a line, line i against line i
    python -m metrics hypotheses.json references.json      {id: [text]} and {id: [text, ...]}

The scores have the names that pycocoevalcap gives them.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from .meteor import Meteor
from .text import bleu, check, cider, clean_r2gen, rouge_l

CLEANING = {"none": ("texts as they are", lambda text: text),
            "r2gen": ("R2Gen's cleaning, without its cut at 99 words and its <unk>", clean_r2gen)}


def read(path):
    """The texts of a file.

    path  .json, or any other file, which has one text a line
    Returns {id: [text, ...]} of a .json, {line number: [line]} of another file.
    Raises ValueError, which names the file and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b"\n") + 1
        byte = error.object[error.start]
        raise ValueError(f"{path}:{line}: not UTF-8 (byte {byte:#04x})") from None
    if not text.strip():
        raise ValueError(f"{path}: empty, expected a text a line, or {{id: [texts]}} in a .json")
    if path.suffix != ".json":
        lines = text.removesuffix("\n").split("\n")
        return {number: [line] for number, line in enumerate(lines, 1)}
    try:
        items = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON of the form {{id: [texts]}}: {error}") from None
    if not isinstance(items, dict) or not items:
        raise ValueError(f"{path}: not JSON of the form {{id: [texts]}}")
    return items


def unique(pairs):
    """The dict of a JSON object's [(key, value)]; ValueError if a key is there twice."""
    items = dict(pairs)
    if len(items) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the id {twice!r} is there twice")
    return items


def read_both(hypotheses, references):
    """The two files as `bleu` and the others take them.

    hypotheses  path
    references  path
    Returns ({id: [text]}, {id: [text, ...]}). Raises ValueError if they do not belong together.
    """
    if (hypotheses.suffix == ".json") != (references.suffix == ".json"):
        raise ValueError(f"{hypotheses} and {references}: either both are .json or both are text")
    ours, theirs = read(hypotheses), read(references)
    if hypotheses.suffix != ".json" and len(ours) != len(theirs):
        raise ValueError(f"{hypotheses} has {len(ours)} lines, {references} has {len(theirs)}, "
                         "expected line i against line i")
    try:
        check(ours, theirs)
    except ValueError as error:
        raise ValueError(f"{hypotheses} and {references}: {error}") from None
    return ours, theirs


def score(args):
    """Prints the scores.

    args  the command's flags
    Returns {name: value}; METEOR is None if its files are missing and no folder was named.
    """
    hypotheses, references = read_both(args.hypotheses, args.references)
    meteor = refusal = None
    try:
        meteor = Meteor(args.meteor)
    except FileNotFoundError as error:
        if args.meteor:
            raise
        refusal = error
    description, clean = CLEANING[args.clean]
    hypotheses, references = cleaned(hypotheses, clean), cleaned(references, clean)
    print(f"{len(hypotheses)} items, {sum(map(len, references.values()))} references; "
          f"{description}\n", flush=True)
    values = {}

    def show(name, value):
        values[name] = value
        print(f"{name:8}", "not computed" if value is None else f"{value:.4f}", flush=True)

    for n, value in enumerate(bleu(hypotheses, references).corpus, 1):
        show(f"Bleu_{n}", value)
    show("METEOR", meteor and meteor.score(hypotheses, references).corpus)
    show("ROUGE_L", rouge_l(hypotheses, references).corpus)
    show("CIDEr", cider(hypotheses, references).corpus)
    if refusal:
        print(f"\n{refusal}")
    return values


def cleaned(items, clean):
    """{id: [text, ...]} with each text cleaned by a function of it."""
    return {key: [clean(text) for text in texts] for key, texts in items.items()}


def main():
    """The command `python -m metrics`."""
    parser = argparse.ArgumentParser(
        prog="python -m metrics",
        description="BLEU, METEOR, ROUGE-L and CIDEr of reports against references.")
    parser.add_argument("hypotheses", type=Path,
                        help="text, one hypothesis a line, or .json, {id: [text]}")
    parser.add_argument("references", type=Path,
                        help="text, one reference a line, or .json, {id: [text, ...]}, "
                             "the same ids")
    parser.add_argument("--clean", choices=CLEANING, default="r2gen",
                        help="done to all texts first: nothing, or R2Gen's cleaning "
                             "(default: r2gen)")
    parser.add_argument("--meteor", metavar="FOLDER",
                        help="folder with METEOR's jar and data/ "
                             "(default: the installed pycocoevalcap's)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    try:
        values = score(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"metrics: {error}") from None
    if args.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
