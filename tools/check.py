"""Everything that is wrong with a studies.jsonl, at once, before a stage stumbles over it.

    python tools/check.py studies.jsonl --images files
    python tools/check.py studies.jsonl --images files --student Qwen/Qwen2.5-VL-7B-Instruct --num_workers 16 --out good.jsonl

Prints each fault as 'file:line: kind: what, and what was expected', then how many records have each kind, how many are good and how
many of those can be trained on, and ends with status 1 if there was a fault. The kinds:

    json        the line is no JSON object in UTF-8
    field       a field is missing, empty or of the wrong type
    label       a finding or class that the task does not have
    trajectory  a teacher's text is empty or no text
    duplicate   an id that an earlier line has; the earlier one stays good
    image       missing; outside; unreadable (decoded to the end); too large (a bomb, or an aspect ratio beyond 200)
    same text   two teachers of a study say the same, word for word
    refusal     a teacher declines to answer
    leak        the student's prompt tells this study's diagnosis
    length      image, prompt and trajectories exceed --max_tokens: a stage would leave the study out, or cut it with --truncate

--allow KIND,... counts and prints a kind without holding it against a record: --allow refusal is what --refusals keep and drop cope with.
--out writes the records without a fault, as they stand, and rejected.jsonl beside it: {"line", "faults", "record" or "text"}.

Faults are printed as they are found and only the digests of the ids are kept, so the memory is that of a million ids and not of a
million records. Token lengths need the student's tokenizer: with images they are what a stage will see; with --skip_images those of
the texts alone.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ surrounds the paper's scripts and is no package of its own

import data  # noqa: E402
from runtime.records import faults, line_of, parse_line, writing  # noqa: E402

KINDS = ("json", "field", "label", "trajectory", "duplicate", "image missing", "image outside", "image unreadable", "image too large",
         "same text", "refusal", "leak", "length")
FIELDS = {"labels": "label", "trajectories": "trajectory"}  # of records.faults, which names the field first
IMAGE_FAULTS = {"no such image": "image missing", "lies outside": "image outside", "pixels, expected": "image too large",
                "decompression bomb": "image too large"}  # what data.load_image says, in the order in which it is looked for


class TextLengths:
    """Token lengths without the image, and without torch: tokenizer.json is read by the library that transformers itself uses."""

    def __init__(self, student, task):
        from tokenizers import Tokenizer

        file = Path(student) / "tokenizer.json"
        if not Path(student).exists():
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(student, "tokenizer.json")
        try:
            self.tokenizer, self.task = Tokenizer.from_file(str(file)), task
        except Exception as error:  # the library has no narrower one
            raise ValueError(f"{file}: expected the student's tokenizer: {error}") from None
        self.tokenizer.encode_special_tokens = True  # '<|im_end|>' in a text is text

    def lengths(self, study, prompt, responses):
        count = lambda text: len(self.tokenizer.encode(text, add_special_tokens=False).ids)
        return count(self.task.prompts["system"]) + count(prompt), [count(text) + 1 for text in responses]


class Check:
    """check(line) -> (id or None, [(kind, sentence)], {teacher: tokens}, how many teachers a record of the training split has, None where
    it is of another) of one line of bytes; what a worker process holds."""

    def __init__(self, args):
        self.args, self.task, self.encoder = args, data.load_task(args.task_file), None
        self.template = self.task.prompts[args.prompt]
        self.told = {f: value for f, value in data.read_classes(self.template, self.task).items() if value in self.task.positive}
        if args.student:
            self.encoder = TextLengths(args.student, self.task) if args.skip_images else \
                data.Encoder(args.student, self.task, args.images, args.max_pixels)

    def __call__(self, line):
        try:
            record = parse_line(line)
        except ValueError as error:
            return None, [("json", str(error))], {}, None
        found = [(FIELDS.get(sentence.split('"')[1], "field"), sentence) for sentence in faults(record, self.task)]
        name = record.get("id") if isinstance(record.get("id"), str) else None
        if any(kind == "field" for kind, _ in found):
            return name, found, {}, None
        image = record["image"]
        good = lambda key: all(kind != FIELDS[key] for kind, _ in found)
        study = data.Study(name, tuple(image if isinstance(image, list) else [image]), record.get("labels", {}) if good("labels") else {},
                           record.get("trajectories", {}) if good("trajectories") else {})
        pictures = [] if self.args.skip_images else self.images(study)
        found += pictures + self.texts(study)
        tokens = {}
        if self.encoder and not pictures:
            prefix, lengths = self.encoder.lengths(study, data.student_prompt(study, self.task, self.args.prompt), study.trajectories.values())
            tokens, total = dict(zip(study.trajectories, lengths)), prefix + sum(lengths)
            if total > self.args.max_tokens:
                found.append(("length", f"{total} tokens, expected at most --max_tokens {self.args.max_tokens}"))
        return name, found, tokens, len(study.trajectories) if record.get("split") in (None, "train") else None

    def images(self, study):
        found = []
        for path in study.images:
            try:
                data.load_image(path, self.args.images)
            except ValueError as error:
                kind = next((kind for sign, kind in IMAGE_FAULTS.items() if sign in str(error)), "image unreadable")
                found.append((kind, str(error)))
        return found

    def texts(self, study):
        found, first = [], {}
        for teacher, text in study.trajectories.items():
            words = " ".join(text.split()).lower()
            if words in first:
                found.append(("same text", f"{first[words]!r} and {teacher!r} say the same, expected a text of each teacher's own"))
            first.setdefault(words, teacher)
            if data.is_refusal(text, self.task):
                found.append(("refusal", f"{teacher!r} declines: {text.strip()[:80]!r}"))
        if study.labels and "{diseases}" in self.template:
            found.append(("leak", f"the student is asked {data.student_prompt(study, self.task, self.args.prompt)[:200]!r}, expected no diagnosis"))
        elif told := [f for f, value in self.told.items() if study.labels.get(f) == value]:
            found.append(("leak", f"the student's prompt says {', '.join(told)}, as this study's labels do, expected no diagnosis"))
        return found


def results(path, args):
    """Yields (line number, bytes, result of Check) of each line that is not blank, in order; in --num_workers processes if there are any."""
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        check, run = Check(args), map
        if args.num_workers:  # spawned, since a fork of a process with torch's threads may hang
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(args.num_workers, _start, (args,)))
            check, run = _work, functools.partial(pool.map, chunksize=8)
        bar = stack.enter_context(tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc="check"))
        while batch := list(itertools.islice(lines, 64 * max(1, args.num_workers))):
            for (number, line), result in zip(batch, run(check, [line for _, line in batch])):
                yield number, line, result
            bar.update(sum(len(line) for _, line in batch))


def _start(args):
    global _check
    _check = Check(args)


def _work(line):
    return _check(line)


def check(args):
    """Checks the file of `args.studies` and writes what `args.out` asks for. Returns the figures that --json prints."""
    seen, kinds, lengths, records, bad, training, taught = {}, Counter(), {}, 0, 0, 0, 0
    with contextlib.ExitStack() as stack:
        if args.out:
            good, rejected = (stack.enter_context(writing(path)) for path in (args.out, Path(args.out).with_name("rejected.jsonl")))
        for number, line, (name, found, lengths_here, teachers) in results(args.studies, args):
            records += 1
            if name is not None:
                digest = int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")
                if seen.setdefault(digest, number) != number:
                    found.append(("duplicate", f"{name!r} stands in line {seen[digest]} already, expected it once"))
            for kind, sentence in found:
                tqdm.write(f"{args.studies}:{number}: {kind}: {sentence}")
            kinds.update({kind for kind, _ in found})
            for teacher, n in lengths_here.items():
                lengths.setdefault(teacher, Counter())[n] += 1
            against = [f"{kind}: {sentence}" for kind, sentence in found if kind not in args.allow]
            bad += bool(against)
            training += teachers is not None and not against
            taught += bool(teachers) and not against
            if args.out and not against:
                good.write(line.rstrip(b"\r\n") + b"\n")
            elif args.out:
                as_read = {"text": line.decode("utf-8", "replace").rstrip("\r\n")} if found[0][0] == "json" else {"record": json.loads(line)}
                rejected.write(line_of({"line": number, "faults": against, **as_read}))
        if not records:
            raise ValueError(f"{args.studies}: no record, expected one JSON object a line")
    return {"records": records, "good": records - bad, "training": training, "with trajectories": taught,
            "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]}, "tokens": {teacher: spread(count) for teacher, count in lengths.items()}}


def spread(count):
    """{tokens: how many texts} -> n, mean, 95% and the longest."""
    n, below = sum(count.values()), 0
    for length in sorted(count):
        below += count[length]
        if below >= 0.95 * n:
            break
    return {"n": n, "mean": sum(k * v for k, v in count.items()) / n, "95%": length, "longest": max(count)}


def parse(argv=None):
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", help="studies.jsonl")
    parser.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument("--skip_images", action="store_true", help="do not open images")
    parser.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument("--student", help="folder or hub id whose tokenizer counts tokens (default: lengths are not checked)")
    parser.add_argument("--max_tokens", type=int, default=8192, help="tokens of a study: image, prompt and trajectories (default: %(default)s)")
    parser.add_argument("--max_pixels", type=int, default=1024 * 28 * 28, help="pixels per image, 784 make a token (default: %(default)s)")
    parser.add_argument("--prompt", choices=("student", "teacher"), default="student", help="the student's prompt; teacher: Appendix B's, a leak")
    parser.add_argument("--allow", type=lambda text: text.split(","), default=[], metavar="KIND,...", help="kinds that are counted but reject no record")
    parser.add_argument("--out", metavar="GOOD.jsonl", help="records without a fault; the others go to rejected.jsonl beside it")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that open images and count tokens (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if unknown := set(args.allow) - set(KINDS):
        parser.error(f"--allow {','.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
    if args.out and (Path(args.out).resolve() == Path(args.studies).resolve() or Path(args.out).name == "rejected.jsonl"):
        parser.error(f"--out {args.out}: expected another name than the input's and rejected.jsonl")
    return args


def main():
    args = parse()
    try:
        found = check(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"check: {error}") from None
    for kind, count in found["kinds"].items():
        print(f"{count:>9,} records: {kind}{' (allowed)' if kind in args.allow else ''}")
    for teacher, row in found["tokens"].items():
        print(f"{teacher:24}{row['n']:>9,} texts, tokens: mean {row['mean']:.0f}, 95% {row['95%']}, longest {row['longest']}")
    print(f"{args.studies}: {found['good']:,} of {found['records']:,} records are good")
    print(f"{found['with trajectories']:,} of the {found['training']:,} good ones of the training split have trajectories")
    if found["training"] and not found["with trajectories"]:
        print("warning: there is nothing to train on before tools/collect.py or tools/convert.py studies --into has put trajectories in")
    if args.json:
        print(json.dumps(found))
    raise SystemExit(int(found["good"] < found["records"]))


if __name__ == "__main__":
    main()
