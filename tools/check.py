"""Everything that is wrong with a studies.jsonl, at once, before a stage stumbles over it.

    python tools/check.py studies.jsonl --images files
    python tools/check.py studies.jsonl --images files --student Qwen/Qwen2.5-VL-7B-Instruct \\
        --num_workers 16 --out good.jsonl
    python tools/check.py studies.jsonl --show 10

Prints each fault as 'file:line: kind: what, and what was expected', then how many records have each
kind, of how many texts of each teacher nothing could be read (with an example; refusals are not
among them), how many records are good and how many of those can be trained on, and ends with status
1 if there was a fault. The kinds:

    json        the line is no JSON object in UTF-8
    field       a field is missing, empty or of the wrong type
    label       a finding or class that the task does not have
    trajectory  a teacher's text is empty or no text
    duplicate   an id that an earlier line has; the earlier one stays good
    image       missing; outside; unreadable (decoded to the end); too large (a bomb, or an aspect
                ratio beyond 200)
    same text   two teachers of a study say the same, word for word
    refusal     a teacher declines to answer, or only thinks
    chat marker a text holds marks of a chat template, such as <|im_end|>
    loop        a text says the same sentence of at least three words five times, or its end repeats
                the same words, 30 at most, five times
    leak        the student's prompt tells this study's diagnosis
    length      image, prompt and trajectories exceed --max_tokens: a stage would leave the study
                out, or cut it with --truncate

--allow KIND,... counts and prints a kind without holding it against a record. Refusals, for
example, may be allowed, since --refusals of the stages keeps or drops them. Of a text only the
answer is looked at, as a stage does: not what a teacher thinks before it, between <think> and
</think>.
--show N prints N texts, the same number of each teacher and evenly over the file, and below each
what was read in it, with the words that decided; nothing else is done, and no image is opened.
--out writes the records without a fault, byte for byte, and rejected.jsonl beside it:
{"line", "faults", "record" or "text"}.

Faults are printed as they are found and only the digests of the ids are kept, so the memory is that
of a million ids and not of a million records. Token lengths need the student's tokenizer: with
images they are what a stage will see; with --skip_images those of the texts alone.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import data  # noqa: E402
from runtime import adapter  # noqa: E402
from runtime.records import atomic, line_of, parse_line, printable  # noqa: E402

KINDS = ("json", "field", "label", "trajectory", "duplicate", "image missing", "image outside",
         "image unreadable", "image too large", "same text", "refusal", "chat marker", "loop",
         "leak", "length")
# data.record_faults names the field first in each sentence; any field that is not here is "field"
FIELDS = {"labels": "label", "trajectories": "trajectory"}
# takes for granted what it names, unlike "Is there edema?"
OPEN_QUESTION = re.compile(r"(\b(?:why|what|how|where)\b[^?.!]*)\?", re.IGNORECASE)
SENTENCE_END = re.compile(r"[.!?](?=\s)|[。！？\n]")
ROW_OR_WORD = re.compile(r"^[^|\n]*\|[^|\n]*\|.*|\w+", re.MULTILINE)
REPEATS = 5  # so many times the same is a loop


# ----------------------------------------------------------------------------------------- one line

class TextLengths:
    """Token lengths without the image, and without torch.

    student  folder or hub id, whose tokenizer.json is read by the library that transformers uses;
             an adapter without one has its base's
    task     data.Task, for its system prompt
    Raises ValueError where the tokenizer cannot be read.
    """

    def __init__(self, student, task):
        from tokenizers import Tokenizer

        student = adapter.processor_of(student)
        file = Path(student) / "tokenizer.json"
        if not Path(student).exists():
            from huggingface_hub import hf_hub_download

            file = hf_hub_download(student, "tokenizer.json")
        try:
            self.tokenizer, self.task = Tokenizer.from_file(str(file)), task
        except Exception as error:  # the library has no narrower one
            raise ValueError(f"{file}: expected the student's tokenizer: {error}") from None
        self.tokenizer.encode_special_tokens = True  # '<|im_end|>' in a text is text

    def count(self, text):
        """The number of tokens of a text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def lengths(self, study, prompt, responses):
        """Returns (tokens of the prompts, [tokens of each response with its end token]); takes the
        arguments of student.Processor.lengths, of which `study` is not used."""
        prefix = self.count(self.task.prompts["system"]) + self.count(prompt)
        return prefix, [self.count(text) + 1 for text in responses]


class Checked(NamedTuple):
    """What was found in a line.

    name      the id; None where there is none
    found     [(kind, sentence)]
    tokens    {teacher: tokens of its text}, empty where they are not counted
    unread    {teacher: the beginning of its text if nothing was read in it, else None}
    teachers  how many teachers a record of the training split has; None where it is of another
              split or cannot be read
    """
    name: str
    found: list
    tokens: dict
    unread: dict
    teachers: int = None


class Check:
    """Checks a line of bytes by itself; a worker process holds one.

    args  the flags of `parse`
    check(line) returns a Checked. Raises ValueError where the task or the student's tokenizer
    cannot be read.
    """

    def __init__(self, args):
        self.args, self.task, self.processor = args, data.load_task(args.task_file), None
        self.template = self.task.prompts[args.prompt]
        said = data.read_classes(OPEN_QUESTION.sub(r"\1.", self.template), self.task)
        self.told = {finding: value for finding, value in said.items()
                     if value in self.task.positive}
        if args.student and args.skip_images:
            self.processor = TextLengths(args.student, self.task)
        elif args.student:
            import student  # not at the top: it needs torch, and checking records little memory

            self.processor = student.Processor(args.student, self.task, args.images,
                                               args.max_pixels)

    def __call__(self, line):
        try:
            record = parse_line(line)
        except ValueError as error:
            return Checked(None, [("json", str(error))], {}, {})
        found = [(FIELDS.get(sentence.split('"')[1], "field"), sentence)
                 for sentence in data.record_faults(record, self.task)]
        kinds = {kind for kind, _ in found}
        name = record.get("id") if isinstance(record.get("id"), str) else None
        if "field" in kinds:
            return Checked(name, found, {}, {})
        image = record["image"]
        # labels or trajectories that are faulty themselves are not looked at any further
        said = {} if "trajectory" in kinds else record.get("trajectories", {})
        study = data.Study(
            id=name,
            images=tuple(image if isinstance(image, list) else [image]),
            labels={} if "label" in kinds else record.get("labels", {}),
            trajectories={teacher: data.answer_of(text) for teacher, text in said.items()},
            prompt=record.get("prompt"))
        of_images = [] if self.args.skip_images else self.images(study)
        of_texts, unread = self.texts(study)
        found += of_images + of_texts + self.leaks(study)
        tokens = {}
        if self.processor and not of_images:
            prefix, lengths = self.processor.lengths(study, self.prompt(study),
                                                     study.trajectories.values())
            tokens, total = dict(zip(study.trajectories, lengths)), prefix + sum(lengths)
            if total > self.args.max_tokens:
                found.append(("length", f"{total} tokens, expected at most --max_tokens "
                                        f"{self.args.max_tokens}"))
        trains = record.get("split") in (None, "train")
        teachers = sum(map(bool, study.trajectories.values())) if trains else None
        return Checked(name, found, tokens, unread, teachers)

    def prompt(self, study):
        """What the student is asked about a study."""
        return data.student_prompt(study, self.task, self.args.prompt)

    def images(self, study):
        """[(kind, sentence)] of a study's images, which are decoded to the end."""
        found = []
        for path in study.images:
            try:
                data.load_image(path, self.args.images)
            except data.ImageError as error:
                found.append((error.kind, str(error)))
        return found

    def texts(self, study):
        """Looks at a study's trajectories. Returns [(kind, sentence)] and Checked.unread."""
        found, unread, first = [], {}, {}
        for teacher, text in study.trajectories.items():
            words = " ".join(text.split()).lower()
            if words and words in first:
                found.append(("same text", f"{first[words]!r} and {teacher!r} say the same, "
                                           "expected a text of each teacher's own"))
            first.setdefault(words, teacher)
            declines = data.is_refusal(text, self.task)
            if declines:
                said = f"declines: {text.strip()[:80]!r}" if text else "only thinks"
                found.append(("refusal", f"{teacher!r} {said}"))
            if marker := data.CHAT_MARKER.search(text):
                found.append(("chat marker", f"{teacher!r} says {marker[0]!r}, expected the answer "
                                             "without marks of a chat template"))
            if repeated := loop(text):
                found.append(("loop", f"{teacher!r} says {repeated[:80]!r} {REPEATS} times or "
                                      "more, expected it once"))
            read = declines or data.read_classes(text, self.task)
            unread[teacher] = None if read else printable(text.strip()[:80])
        return found, unread

    def leaks(self, study):
        """[(kind, sentence)] of what the student is asked."""
        found = []
        if study.labels and "{diseases}" in self.template:
            found.append(("leak", f"the student is asked {self.prompt(study)[:200]!r}, expected no "
                                  "diagnosis"))
        elif told := [f for f, value in self.told.items() if study.labels.get(f) == value]:
            found.append(("leak", f"the student's prompt says {', '.join(told)}, as this study's "
                                  "labels do, expected no diagnosis"))
        return found


def loop(text):
    """What a text repeats REPEATS times or more, in lower case; None where it repeats nothing.

    text  str of any length: a sentence of at least three words counts wherever it stands, and at
          the end of the text the same 1 to 30 words one behind the other
    What is shorter than a sentence or has a label, as "Edema" or "Basis: none was seen", belongs to
    the sentence behind it, so that the same may be said of each finding; the number of an item
    does not. A row of a table is one word, and may hold the same word five times.
    """
    counts, before = Counter(), []
    for piece in SENTENCE_END.split(text.lower()):
        words = re.findall(r"\w+", piece)
        if not "".join(words).isdigit():
            before += words
        if len(words) >= 3 and ":" not in piece:
            counts[" ".join(before)] += 1
            before = []
    sentence, count = max(counts.items(), key=lambda item: item[1], default=(None, 0))
    if count >= REPEATS:
        return sentence
    words = ROW_OR_WORD.findall(text.lower())
    for length in range(1, 31):
        end = words[-length:]
        if len(words) >= REPEATS * length and words[-REPEATS * length:] == end * REPEATS:
            return " ".join(end)
    return None


# ----------------------------------------------------------------------------------------- the file

def checked_lines(path, args):
    """Checks the lines of a file that are not blank, in --num_workers processes if there are any.

    path  the file
    args  the flags of `parse`
    Yields (line number, the line's bytes, Checked), in the file's order.
    """
    with open(path, "rb") as file, contextlib.ExitStack() as stack:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        work, run = Check(args), map
        if args.num_workers:  # spawned, since a fork of a process with torch's threads may hang
            processes = multiprocessing.get_context("spawn")
            pool = stack.enter_context(processes.Pool(args.num_workers, _start, (args,)))
            work, run = _work, functools.partial(pool.map, chunksize=8)
        bar = stack.enter_context(
            tqdm(total=os.path.getsize(path), unit="B", unit_scale=True, desc="check"))
        while batch := list(itertools.islice(lines, 64 * max(1, args.num_workers))):
            for (number, line), checked in zip(batch, run(work, [line for _, line in batch])):
                yield number, line, checked
            bar.update(sum(len(line) for _, line in batch))


def _start(args):
    """Makes the Check of a worker process."""
    global _check
    _check = Check(args)


def _work(line):
    """The Checked of a line, in a worker process."""
    return _check(line)


def check(args):
    """Checks the file of `args.studies`, prints its faults and writes what `args.out` asks for.

    args  the flags of `parse`
    Returns what --json prints: {"records", "good", "training", "with trajectories", "kinds": {kind:
    records}, "tokens": {teacher: as `length_summary` returns}, "unread": {teacher: {"texts",
    "unread": how many of them nothing was read in, "share", "example": {"id", "text"} of the first,
    or None}}}. Raises ValueError where the file has no record.
    """
    seen, counts, kinds, lengths, unread = {}, Counter(), Counter(), {}, {}
    with contextlib.ExitStack() as stack:
        if args.out:
            files = [stack.enter_context(open(stack.enter_context(atomic(path)), "wb"))
                     for path in (args.out, Path(args.out).with_name("rejected.jsonl"))]
        for number, line, checked in checked_lines(args.studies, args):
            name, found, tokens, unread_texts, teachers = checked
            if name is not None and (before := seen.setdefault(digest(name), number)) != number:
                found.append(("duplicate", f"{name!r} is in line {before} already, expected it "
                                           "once"))
            for kind, sentence in found:
                tqdm.write(f"{args.studies}:{number}: {kind}: {sentence}")
            kinds.update({kind for kind, _ in found})
            for teacher, n in tokens.items():
                lengths.setdefault(teacher, Counter())[n] += 1
            count_unread(unread, name, unread_texts)
            against = [f"{kind}: {sentence}" for kind, sentence in found if kind not in args.allow]
            counts["records"] += 1
            counts["good"] += not against
            counts["training"] += teachers is not None and not against
            counts["with trajectories"] += bool(teachers) and not against
            if args.out:
                write(*files, number, line, found, against)
        if not counts["records"]:
            raise ValueError(f"{args.studies}: no record, expected one JSON object a line")
    return {**counts, "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
            "tokens": {teacher: length_summary(count) for teacher, count in lengths.items()},
            "unread": unread}


def count_unread(rows, name, texts):
    """Counts the texts of a record of which nothing was read.

    rows   {teacher: {"texts", "unread", "share", "example"}} so far, which is changed
    name   the record's id
    texts  Checked.unread
    """
    for teacher, text in texts.items():
        row = rows.setdefault(teacher, {"texts": 0, "unread": 0, "share": 0.0, "example": None})
        row["texts"] += 1
        row["unread"] += text is not None
        row["share"] = row["unread"] / row["texts"]
        if text is not None and row["example"] is None:
            row["example"] = {"id": name, "text": text}


def digest(name):
    """A number of 64 bits for an id, which takes less memory than the id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def write(good, rejected, number, line, found, against):
    """Writes a line to the file that it belongs to.

    good, rejected  the two files, open for bytes
    number, line    the line and its bytes
    found           [(kind, sentence)]
    against         the faults that are not allowed, as they are written
    """
    if not against:
        good.write(line.rstrip(b"\r\n") + b"\n")
    elif "json" in dict(found):
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        rejected.write(line_of({"line": number, "faults": against, "text": text}))
    else:
        rejected.write(line_of({"line": number, "faults": against, "record": json.loads(line)}))


def length_summary(count):
    """Returns {"n", "mean", "95%", "longest"} of {tokens: how many texts}."""
    n, below = sum(count.values()), 0
    for length in sorted(count):
        below += count[length]
        if below >= 0.95 * n:
            break
    mean = sum(tokens * texts for tokens, texts in count.items()) / n
    return {"n": n, "mean": mean, "95%": length, "longest": max(count)}


# --------------------------------------------------------------------------------- a look at some

def show(args):
    """Prints `args.show` texts of the file of `args.studies`, and what was read in each.

    args  the flags of `parse`
    They are as many of each teacher as of any other, evenly over the file; the same file, the same
    texts. Raises ValueError where no record has texts.
    """
    task = data.load_task(args.task_file)
    counts = Counter(teacher for _, texts in texts_of(args.studies) for teacher in texts)
    if not counts:
        raise ValueError(f"{args.studies}: no record with an id has trajectories, expected the "
                         "teachers' texts")
    chosen, seen = chosen_texts(counts, args.show), Counter()
    for name, texts in texts_of(args.studies):
        for teacher, text in texts.items():
            if seen[teacher] in chosen[teacher]:
                print("\n".join([f"{printable(name)}, {teacher}", *shown(text, task), ""]))
            seen[teacher] += 1


def texts_of(path):
    """Yields (id, {teacher: text}) of the records of a file.

    Records are left out whose id or trajectories are faulty, which a check names.
    """
    with open(path, "rb") as file:
        for line in filter(bytes.strip, file):
            try:
                record = parse_line(line)
            except ValueError:
                continue
            texts = record.get("trajectories", {})
            if isinstance(record.get("id"), str) and not data.trajectory_faults(texts):
                yield record["id"], texts


def chosen_texts(counts, number):
    """Which texts are shown.

    counts  {teacher: how many texts it has}
    number  how many are shown
    Returns {teacher: set of which of its texts, numbered from 0}.
    """
    shares = dict.fromkeys(counts, 0)
    left = min(number, sum(counts.values()))
    while left:
        for teacher in shares:
            if left and shares[teacher] < counts[teacher]:
                shares[teacher] += 1
                left -= 1
    chosen = {}
    for at, (teacher, share) in enumerate(shares.items()):
        shift = (2 * at + 1) / (2 * len(shares))  # the teachers' texts are of other studies
        chosen[teacher] = {int((i + shift) * counts[teacher] / share) for i in range(share)}
    return chosen


def shown(text, task):
    """The lines in which `show` prints a text and what was read in it."""
    answer = data.answer_of(text)
    lines = [f"    {printable(line)}".rstrip() for line in shortened(answer, 1200).split("\n")]
    if not answer.strip():
        lines = ["    (only thinking)"]
    read = data.read_with_words(text, task)
    lines += [f"  {finding}: {value}   <- {printable(shortened(words, 200))}"
              for finding, (value, words) in read.items()]
    if not read:
        lines.append("  declines" if data.is_refusal(text, task) else "  nothing was read")
    return lines


def shortened(text, most):
    """A text of which the middle is left out if it has more than `most` characters."""
    if len(text) <= most:
        return text
    begin, end = 2 * most // 3, most // 3
    return f"{text[:begin]} [... {len(text) - begin - end:,} characters ...] {text[-end:]}"


# -------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line. Exits with status 2 where they do
    not go together."""
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "studies",
        help="studies.jsonl")
    parser.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    parser.add_argument(
        "--skip_images", action="store_true",
        help="do not open images")
    parser.add_argument(
        "--task_file",
        help="task.json; without it MIMIC-CXR's 14 findings")
    parser.add_argument(
        "--student",
        help="folder or hub id whose tokenizer counts tokens (default: lengths are not checked)")
    parser.add_argument(
        "--max_tokens", type=int, default=8192,
        help="tokens of a study: image, prompt and trajectories (default: %(default)s)")
    parser.add_argument(
        "--max_pixels", type=int,
        help="pixels per image, 784 make a token (default: 802816, or what the student's folder "
             "allows where that is less)")
    parser.add_argument(
        "--prompt", choices=("student", "teacher"), default="student",
        help="the student's prompt; teacher: Appendix B's, a leak")
    add_results(parser)
    args = parser.parse_args(argv)
    if args.show is not None and args.show < 1:
        parser.error(f"--show {args.show}: expected at least 1")
    if args.show and (args.out or args.json):
        parser.error("--show: checks nothing, expected neither --out nor --json with it")
    if unknown := set(args.allow) - set(KINDS):
        parser.error(f"--allow {','.join(sorted(unknown))}: expected some of {', '.join(KINDS)}")
    same = args.out and Path(args.out).resolve() == Path(args.studies).resolve()
    if same or args.out and Path(args.out).name == "rejected.jsonl":
        parser.error(f"--out {args.out}: expected another name than the input's and rejected.jsonl")
    return args


def add_results(parser):
    """Adds the flags that say what is done with what is found."""
    parser.add_argument(
        "--allow", type=lambda text: text.split(","), default=[], metavar="KIND,...",
        help="kinds that are counted but reject no record")
    parser.add_argument(
        "--out", metavar="GOOD.jsonl",
        help="records without a fault; the others go to rejected.jsonl beside it")
    parser.add_argument(
        "--num_workers", type=int, default=0,
        help="processes that open images, read texts and count tokens (default: %(default)s)")
    parser.add_argument(
        "--json", action="store_true",
        help="end with one line of JSON")
    parser.add_argument(
        "--show", type=int, metavar="N",
        help="print N texts and what was read in each, and do nothing else")


def main():
    """Runs the command; ends with status 1 where there is a fault."""
    args = parse()
    try:
        if args.show:
            show(args)
            return
        found = check(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"check: {error}") from None
    for kind, count in found["kinds"].items():
        print(f"{count:>9,} records: {kind}{' (allowed)' if kind in args.allow else ''}")
    for teacher, row in found["tokens"].items():
        print(f"{teacher:24}{row['n']:>9,} texts, tokens: mean {row['mean']:.0f}, "
              f"95% {row['95%']}, longest {row['longest']}")
    for teacher, row in found["unread"].items():
        example = ', as in {id}: "{text}"'.format(**row["example"]) if row["example"] else ""
        print(f"{teacher:24}{row['texts']:>9,} texts, nothing was read in {row['unread']:,} "
              f"({row['share']:.1%}){example}")
    print(f"{args.studies}: {found['good']:,} of {found['records']:,} records are good")
    print(f"{found['with trajectories']:,} of the {found['training']:,} good ones of the training "
          "split have trajectories")
    if found["training"] and not found["with trajectories"]:
        print("warning: there is nothing to train on before tools/collect.py or tools/convert.py "
              "studies --into has put trajectories in")
    if args.json:
        print(json.dumps(found))
    raise SystemExit(int(found["good"] < found["records"]))


if __name__ == "__main__":
    main()
