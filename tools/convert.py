"""Records from elsewhere to studies.jsonl, and studies.jsonl to TRL's preference format.

    python tools/convert.py studies cxr_max.jsonl --mapping mapping.json --into studies.jsonl \\
        --out with_teachers.jsonl
    python tools/convert.py trl --studies studies.jsonl --images DIR \\
        --positives runs/positives/positives.jsonl --out preferences.jsonl

studies: the schema of the published CXR-MAX is not known here, so a mapping file names its fields.
Input: .jsonl, .json (a list of objects) or .csv. One row a study, or one row an answer: then
"trajectories" names the teacher's field and the text's, and the rows of an id are put together. An
example of each, as tools/cxr_max_mapping.json and in docs/data.md:

    {"id": "study_id", "image": "image_path", "split": "split", "report": "findings",
     "labels": {"Edema": "labels.edema"},
     "classes": {"positive": 1, "negative": 0, "uncertain": -1},
     "trajectories": {"gpt-5": "responses.gpt5", "grok-4": "responses.grok4"}}
    {"id": {"field": "image", "match": "s[0-9]{8}"}, "image": "image", "labels": "labels",
     "trajectories": {"teacher": "model", "text": "messages.1.content"}}

A field is a path, its steps joined by dots, a number being a place in a list; {"field", "match"}
takes the part of it that matches. "labels" names an object {finding: class} or a field for each
finding; "classes" says what the file's words for the classes mean; a field that is absent or null
is left out. Every record is checked as the stages check it; nothing is written if one is faulty.

--into takes ids and trajectories only and puts them into records that are there, as
prepare_mimic.py wrote them: their images, labels and splits stay, and so does who is left out,
MS-CXR-T's patients above all; a teacher that a record has already stays too. The id of a record is
that of the row, or that behind an 's', as MIMIC-CXR's folders have it: 50414267 goes into
s50414267. "image" may then be left out.

trl: one row for each teacher of a study that has a t+: prompt and chosen (t+) and rejected (t^u) as
messages, images as paths, which

    datasets.load_dataset("json", ...).cast_column("images", datasets.List(datasets.Image()))

opens. TRL knows pairs only: the N negatives of a study become N independent rows, DPO takes the
place of Eq. 11, and the weights w_u are lost.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import data  # noqa: E402
from evaluation import datasets  # noqa: E402
from runtime.records import atomic, line_of, read_json, read_jsonl  # noqa: E402

FIELDS = ("id", "image", "split", "report")


# -------------------------------------------------------------------------- the file, the mapping

def objects(path):
    """The objects of a .jsonl, .json or .csv.

    path  the file
    Yields (place, object); the place is 'file:line', or 'file[index]' in a .json. Raises ValueError
    where the file cannot be read.
    """
    if path.endswith(".csv"):
        yield from csv_objects(path)
    elif path.endswith(".json"):
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects, found {type(content).__name__}")
        yield from ((f"{path}[{at}]", item) for at, item in enumerate(content))
    else:
        yield from ((f"{path}:{line}", record) for line, record in read_jsonl(path))


def csv_objects(path):
    """`objects` of a .csv: the names of its head are the keys, empty fields are left out."""
    lines = datasets.csv_lines(path)
    _, head = next(lines, (1, []))
    if len(set(head)) < len(head):
        raise ValueError(f"{path}:1: expected each column once, found {', '.join(map(repr, head))}")
    for line, row in lines:
        if len(row) != len(head):
            raise ValueError(f"{path}:{line}: expected {len(head)} fields")
        yield f"{path}:{line}", {key: value for key, value in zip(head, row) if value != ""}


def read_mapping(path, needed=("id", "image", "trajectories")):
    """Reads a mapping file, see the docstring of this file.

    path    the file
    needed  keys that it must have
    Returns a dict. Raises ValueError naming the file and what was expected.
    """
    mapping = read_json(path)

    def expect(condition, what):
        """Raises ValueError unless the condition is true."""
        if not condition:
            raise ValueError(f"{path}: expected {what}")

    expect(isinstance(mapping, dict) and set(needed) <= set(mapping),
           f"an object with {', '.join(needed)}")
    expect(set(mapping) <= {*FIELDS, "labels", "classes", "trajectories"},
           f"only {', '.join(FIELDS)}, labels, classes and trajectories")
    for key in FIELDS:
        expect(key not in mapping or is_field(mapping[key]),
               f'"{key}": the path of a field, or {{"field", "match"}}')
    labels, trajectories = mapping.get("labels", {}), mapping["trajectories"]
    expect(isinstance(labels, str) or are_fields(labels),
           '"labels": a field, or {finding: field}')
    expect(isinstance(mapping.get("classes", {}), dict),
           '"classes": {word in the file: class of the task}')
    expect(trajectories and are_fields(trajectories),
           '"trajectories": {teacher: field}, or {"teacher": field, "text": field}')
    for part in (mapping, labels, trajectories):
        for value in part.values() if isinstance(part, dict) else ():
            if has_match(value):
                require_expression(value["match"], path)
    return mapping


def has_match(value):
    """Whether a value of a mapping is {"field", "match"}."""
    return isinstance(value, dict) and set(value) == {"field", "match"}


def is_field(value):
    """Whether a value of a mapping names a field."""
    texts = value.values() if has_match(value) else [value]
    return all(isinstance(text, str) for text in texts)


def are_fields(value):
    """Whether a value of a mapping is an object of fields."""
    return isinstance(value, dict) and all(map(is_field, value.values()))


def require_expression(match, path):
    """Raises ValueError naming the file unless `match` is a regular expression."""
    try:
        re.compile(match)
    except re.error as error:
        raise ValueError(f"{path}: {match!r}: no regular expression: {error}") from None


# ------------------------------------------------------------------------------------- the records

def get(item, field):
    """The value of a field of an object; None where there is none or its "match" is not in it."""
    path, match = (field["field"], field["match"]) if isinstance(field, dict) else (field, None)
    for step in path.split("."):
        if isinstance(item, dict):
            item = item.get(step)
        elif (isinstance(item, list) and re.fullmatch("[0-9]{1,9}", step)
              and int(step) < len(item)):
            item = item[int(step)]
        else:
            return None
    if match is not None:
        found = re.search(match, str(item)) if item is not None else None
        return found[0] if found else None
    return item


def is_long(mapping):
    """Whether a row of the file is one answer; else it is one study."""
    return set(mapping["trajectories"]) == {"teacher", "text"}


def convert(item, mapping):
    """A record of studies.jsonl from one object of the file, with one teacher's text only if a row
    is one answer."""
    record = {key: get(item, mapping[key]) for key in FIELDS if key in mapping}
    record = {key: value for key, value in record.items() if value is not None}
    if isinstance(record.get("id"), int):
        record["id"] = str(record["id"])
    record["labels"] = labels_of(item, mapping)
    texts = mapping["trajectories"]
    if is_long(mapping):
        teacher = get(item, texts["teacher"])
        if isinstance(teacher, (dict, list)):
            teacher = None
        record["trajectories"] = {teacher: get(item, texts["text"])}
    else:
        said = {teacher: get(item, field) for teacher, field in texts.items()}
        record["trajectories"] = {teacher: text for teacher, text in said.items()
                                  if text is not None}
    return record


def labels_of(item, mapping):
    """The labels of one object of the file, {finding: class}; what else is there is returned as it
    is, so that the record's check names it."""
    fields = mapping.get("labels", {})
    if isinstance(fields, str):
        labels = get(item, fields)
    else:
        labels = {finding: get(item, field) for finding, field in fields.items()}
    if isinstance(labels, dict):
        classes = mapping.get("classes", {})
        return {finding: classes.get(str(value), value) for finding, value in labels.items()
                if value is not None}
    return {} if labels is None else labels


def read_rows(args, mapping, task):
    """The records of args.file.

    args     the flags of `parse`; with --into only ids and trajectories count
    mapping  what `read_mapping` returns
    task     data.Task
    Returns {id: record}. Raises ValueError that lists the first 20 faults with their places.
    """
    records, wrong = {}, []
    for place, item in tqdm(objects(args.file), desc="rows", disable=None):
        record = convert(item, mapping) if isinstance(item, dict) else {}
        found = row_faults(record, task, args.into)
        known = None if found else records.get(record["id"])
        if known:
            found = second_row_faults(known, record, is_long(mapping), args.into)
            if not found:
                known["trajectories"] |= record["trajectories"]
        elif not found:
            records[record["id"]] = record
        wrong += [f"{place}: {fault}" for fault in found]
    if wrong:
        more = f"\n... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError("\n".join(wrong[:20]) + more)
    if not records:
        raise ValueError(f"{args.file}: no row, expected at least one")
    return records


def row_faults(record, task, into):
    """What is wrong with a row's record, a list of sentences; with --into only as to its id and
    trajectories."""
    found = [f'"trajectories": the teacher is {name!r}, expected a name'
             for name in record.get("trajectories", {}) if not isinstance(name, str) or not name]
    found = found or data.record_faults(record, task)
    if into:
        found = [fault for fault in found if fault.startswith(('"id"', '"trajectories"'))]
    return found


def second_row_faults(known, record, long, into):
    """What is wrong with a further row of a study, a list of sentences.

    known   the record of the rows before it
    record  of this row
    long    whether a row is one answer
    into    whether only ids and trajectories count
    """
    name = record["id"]
    if not long:
        return [f'"id": {name!r} is there twice, expected one row a study']
    if set(known["trajectories"]) & set(record["trajectories"]):
        teachers = ", ".join(record["trajectories"])
        return [f"a second text of {teachers} for study {name!r}, expected one"]
    same = () if into else (*FIELDS, "labels")
    if differ := [key for key in same if known.get(key) != record.get(key)]:
        return [f"{', '.join(differ)} of study {name!r} differ from an earlier row, expected the "
                "same"]
    return []


def put_into(args, rows, task):
    """Puts the trajectories of the rows into the records of --into.

    args  the flags of `parse`
    rows  what `read_rows` returns
    task  data.Task
    Returns (records, {"without a record", "without a row", "of the training split": counts}).
    Raises ValueError where no row has a record.
    """
    prepared = {study.id: study.record for study in data.read_studies(args.into, task)}
    into = {id: id if id in prepared or f"s{id}" in rows else f"s{id}" for id in rows}
    texts = {into[id]: row["trajectories"] for id, row in rows.items() if into[id] in prepared}
    if not texts:
        raise ValueError(f"{args.file}: none of its {len(rows)} studies is in {args.into}, "
                         f"expected ids such as {next(iter(prepared))}, found {next(iter(rows))}")
    records, left = [], []
    for id, record in prepared.items():
        if id in texts:
            known = record.get("trajectories", {})
            record = {**record, "trajectories": {**texts[id], **known}}
        else:
            left.append(record)
        records.append(record)
    counts = {"without a record": sum(id not in prepared for id in into.values()),
              "without a row": len(left),
              "of the training split": sum(record.get("split") in (None, "train")
                                           for record in left)}
    return records, counts


def studies(args):
    """Writes args.out, a studies.jsonl.

    args  the flags of `parse`
    Returns {"studies", "trajectories": {teacher: n}} and, with --into, the counts of `put_into`.
    Raises ValueError where an input is faulty.
    """
    needed = ("id", "trajectories") if args.into else ("id", "image", "trajectories")
    mapping = read_mapping(args.mapping, needed)
    task = data.load_task(args.task_file)
    rows = read_rows(args, mapping, task)
    records, counts = put_into(args, rows, task) if args.into else (list(rows.values()), {})
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        file.writelines(map(line_of, records))
    texts = {}
    for record in records:
        for teacher in record.get("trajectories", {}):
            texts[teacher] = texts.get(teacher, 0) + 1
    listed = ", ".join(f"{teacher} {n}" for teacher, n in texts.items())
    print(f"{args.out}: {len(records)} studies; {listed}")
    if args.into:
        print(f"{counts['without a record']} studies of {args.file} have no record in {args.into} "
              f"and are left out; {counts['without a row']} records got nothing, "
              f"{counts['of the training split']} of them of the training split")
    elif not args.task_file:
        print(f"warning: {args.out} holds whatever {args.file} does, patients of MS-CXR-T too, "
              "which is then no test set any more; --into puts the trajectories into the records "
              "of prepare_mimic.py, which leaves those patients out")
    return {"studies": len(records), "trajectories": texts, **counts}


# ----------------------------------------------------------------------------------- pairs for TRL

def preferences(study, task, images, prompt):
    """The rows of a study, one for each teacher that answered.

    study   data.Study with a t+
    task    data.Task
    images  folder that image paths are relative to
    prompt  'student' or 'teacher'
    Yields {"prompt", "chosen", "rejected": messages, "images", "study", "teacher"}; TRL puts the
    images before the text of the user's message, as the stages do. Raises ValueError naming an
    image that cannot be read.
    """
    data.require_images([study], images)
    said = lambda role, text: {"role": role, "content": text}
    system = [said("system", task.prompts["system"])] if task.prompts["system"] else []
    for teacher, text in study.trajectories.items():
        yield {"prompt": [*system, said("user", data.student_prompt(study, task, prompt))],
               "chosen": [said("assistant", study.t_plus)],
               "rejected": [said("assistant", text)],
               "images": [str(data.image_path(path, images)) for path in study.images],
               "study": study.id,
               "teacher": teacher}


def trl(args):
    """Writes args.out, TRL's preference pairs.

    args  the flags of `parse`
    Returns {"studies", "rows": counts}. Raises ValueError where an input is faulty.
    """
    task = data.load_task(args.task_file)
    read = data.read_positives(args.positives, data.read_studies(args.studies, task, args.split))
    data.keep_teachers(read, args.teachers)
    if args.refusals == "drop":
        read, dropped = data.drop_refusals(read, task)
        print(f"{dropped} refusals dropped")
    rows = 0
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        for study in tqdm(read, desc="studies", disable=None):
            for row in preferences(study, task, args.images, args.prompt):
                file.write(line_of(row))
                rows += 1
    print(f"{args.out}: {rows} pairs of {len(read)} studies. Each teacher is a pair of its own "
          "here: the weights w_u are lost, and DPO on these pairs is not Eq. 11")
    return {"studies": len(read), "rows": rows}


# ------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line. args.run(args) runs the command."""
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (add_studies, add_trl):
        command = add(commands)
        command.add_argument(
            "--task_file",
            help="task.json; without it MIMIC-CXR's 14 findings")
        command.add_argument(
            "--json", action="store_true",
            help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.command == "studies":
        args.out = args.out or ("with_teachers.jsonl" if args.into else "studies.jsonl")
    return args


def add_studies(commands):
    """Adds the parser of `studies` to the subparsers, and returns it."""
    p = commands.add_parser("studies", help="records from elsewhere to studies.jsonl")
    p.set_defaults(run=studies)
    p.add_argument(
        "file",
        help=".jsonl, .json or .csv")
    p.add_argument(
        "--mapping", required=True,
        help="mapping.json, which names the file's fields")
    p.add_argument(
        "--into", metavar="STUDIES.jsonl",
        help="records of prepare_mimic.py that get the trajectories (default: the file's own "
             "records)")
    p.add_argument(
        "--out",
        help="default: studies.jsonl, with --into with_teachers.jsonl")
    return p


def add_trl(commands):
    """Adds the parser of `trl` to the subparsers, and returns it."""
    p = commands.add_parser(
        "trl", help="studies.jsonl and positives.jsonl to TRL's preference pairs")
    p.set_defaults(run=trl)
    p.add_argument(
        "--studies", required=True,
        help="studies.jsonl")
    p.add_argument(
        "--positives", required=True,
        help="positives.jsonl of stage 2")
    p.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    p.add_argument(
        "--split", default="train",
        help="which studies (default: %(default)s)")
    p.add_argument(
        "--teachers",
        help="NAME,...: only these teachers (default: all)")
    p.add_argument(
        "--refusals", choices=("keep", "drop"), default="drop",
        help="trajectories that decline to answer (default: %(default)s)")
    p.add_argument(
        "--prompt", choices=("student", "teacher"), default="student",
        help="teacher: Appendix B's, which names the diagnosis")
    p.add_argument(
        "--out", default="preferences.jsonl",
        help="default: %(default)s")
    return p


def main():
    """Runs the command."""
    args = parse()
    try:
        report = args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert: {error}") from None
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
