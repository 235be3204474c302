"""Records from elsewhere to studies.jsonl, and studies.jsonl to TRL's preference format.

    python tools/convert.py studies cxr_max.jsonl --mapping mapping.json --into studies.jsonl --out with_teachers.jsonl
    python tools/convert.py trl --studies studies.jsonl --positives runs/positives/positives.jsonl --images DIR --out preferences.jsonl

studies: the schema of the published CXR-MAX is not known here, so a mapping file names its fields. Input: .jsonl, .json (a list of
objects) or .csv. One row a study, or one row an answer: then "trajectories" names the teacher's field and the text's, and the rows of
an id are put together. An example of each, as tools/cxr_max_mapping.json and in docs/data.md:

    {"id": "study_id", "image": "image_path", "split": "split", "report": "findings",
     "labels": {"Edema": "labels.edema"}, "classes": {"positive": 1, "negative": 0, "uncertain": -1},
     "trajectories": {"gpt-5": "responses.gpt5", "grok-4": "responses.grok4"}}
    {"id": {"field": "image", "match": "s[0-9]{8}"}, "image": "image", "labels": "labels",
     "trajectories": {"teacher": "model", "text": "messages.1.content"}}

A field is a path, its steps joined by dots, a number being a place in a list; {"field", "match"} takes the part of it that matches.
"labels" names an object {finding: class} or a field for each finding; "classes" says what the file's words for the classes mean; a
field that is absent or null is left out. Every record is checked as the stages check it; nothing is written if one is faulty.

--into takes ids and trajectories only and puts them into records that are there, as prepare_mimic.py wrote them: their images, labels and
splits stay, and so does who is left out, MS-CXR-T's patients above all; a teacher that a record has already stays too. The id of a
record is that of the row, or that behind an 's', as MIMIC-CXR's folders have it: 50414267 goes into s50414267. "image" may then be left out.

trl: one row for each teacher of a study that has a t+: prompt and chosen (t+) and rejected (t^u) as messages, images as paths, which
datasets.load_dataset("json", ...).cast_column("images", datasets.List(datasets.Image())) opens. TRL knows pairs only: the N negatives
of a study become N independent rows, DPO takes the place of Eq. 11, and the weights w_u are lost.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
from evaluation import datasets  # noqa: E402
from runtime.records import atomic, line_of, read_json, read_jsonl  # noqa: E402

FIELDS = ("id", "image", "split", "report")


def objects(path):
    """Yields (place, object) of a .jsonl, .json or .csv; the place is 'file:line', or 'file[index]' in a .json."""
    if path.endswith(".csv"):
        lines = datasets.csv_lines(path)
        head = next(lines, (1, []))[1]
        if len(set(head)) < len(head):
            raise ValueError(f"{path}:1: expected each column once, found {', '.join(map(repr, head))}")
        for line, row in lines:
            if len(row) != len(head):
                raise ValueError(f"{path}:{line}: expected {len(head)} fields")
            yield f"{path}:{line}", {key: value for key, value in zip(head, row) if value != ""}
    elif path.endswith(".json"):
        content = read_json(path)
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects, found {type(content).__name__}")
        yield from ((f"{path}[{at}]", item) for at, item in enumerate(content))
    else:
        yield from ((f"{path}:{line}", record) for line, record in read_jsonl(path))


def read_mapping(path, needed=("id", "image", "trajectories")):
    """Raises ValueError naming the file and what was expected."""
    mapping = read_json(path)

    def expect(condition, what):
        if not condition:
            raise ValueError(f"{path}: expected {what}")

    field = lambda value: isinstance(value, str) or isinstance(value, dict) and set(value) == {"field", "match"} \
        and all(isinstance(v, str) for v in value.values())
    expect(isinstance(mapping, dict) and set(needed) <= set(mapping), f"an object with {', '.join(needed)}")
    expect(set(mapping) <= {*FIELDS, "labels", "classes", "trajectories"}, f"only {', '.join(FIELDS)}, labels, classes and trajectories")
    for key in FIELDS:
        expect(key not in mapping or field(mapping[key]), f'"{key}": the path of a field, or {{"field", "match"}}')
    labels, trajectories = mapping.get("labels", {}), mapping["trajectories"]
    expect(isinstance(labels, str) or isinstance(labels, dict) and all(map(field, labels.values())), '"labels": a field, or {finding: field}')
    expect(isinstance(mapping.get("classes", {}), dict), '"classes": {word in the file: class of the task}')
    expect(isinstance(trajectories, dict) and trajectories and all(map(field, trajectories.values())),
           '"trajectories": {teacher: field}, or {"teacher": field, "text": field}')
    for value in [v for part in (mapping, labels, trajectories) if isinstance(part, dict) for v in part.values()]:
        if isinstance(value, dict) and set(value) == {"field", "match"}:
            try:
                re.compile(value["match"])
            except re.error as error:
                raise ValueError(f"{path}: {value['match']!r}: no regular expression: {error}") from None
    return mapping


def get(item, field):
    """What stands at a field of an object, None if nothing does or its "match" is not in it."""
    path, match = (field["field"], field["match"]) if isinstance(field, dict) else (field, None)
    for step in path.split("."):
        if isinstance(item, dict):
            item = item.get(step)
        elif isinstance(item, list) and re.fullmatch("[0-9]{1,9}", step) and int(step) < len(item):
            item = item[int(step)]
        else:
            return None
    if match is not None:
        found = re.search(match, str(item)) if item is not None else None
        return found[0] if found else None
    return item


def convert(item, mapping):
    """One object of the file -> a record of studies.jsonl, perhaps with one teacher's text only."""
    record = {key: get(item, mapping[key]) for key in FIELDS if key in mapping}
    record = {key: value for key, value in record.items() if value is not None}
    if isinstance(record.get("id"), int):
        record["id"] = str(record["id"])
    labels = mapping.get("labels", {})
    labels = get(item, labels) if isinstance(labels, str) else {finding: get(item, field) for finding, field in labels.items()}
    if isinstance(labels, dict):
        classes = mapping.get("classes", {})
        labels = {finding: classes.get(str(value), value) for finding, value in labels.items() if value is not None}
    record["labels"] = {} if labels is None else labels
    texts = mapping["trajectories"]
    if set(texts) == {"teacher", "text"}:
        teacher = get(item, texts["teacher"])
        texts = {None if isinstance(teacher, (dict, list)) else teacher: get(item, texts["text"])}
    else:
        texts = {teacher: text for teacher, field in texts.items() if (text := get(item, field)) is not None}
    record["trajectories"] = texts
    return record


def read_rows(args, mapping, task):
    """-> {id: record}. With --into only ids and trajectories count. Raises ValueError listing every fault with its place."""
    long, records, wrong = set(mapping["trajectories"]) == {"teacher", "text"}, {}, []
    same = () if args.into else (*FIELDS, "labels")
    for place, item in tqdm(objects(args.file), desc="rows", disable=None):
        record = convert(item, mapping) if isinstance(item, dict) else {}
        found = [f'"trajectories": the teacher is {name!r}, expected a name' for name in record.get("trajectories", {})
                 if not isinstance(name, str) or not name] or data.record_faults(record, task)
        if args.into:
            found = [fault for fault in found if fault.startswith(('"id"', '"trajectories"'))]
        known = None if found else records.get(record["id"])
        if known and not long:
            found = [f'"id": {record["id"]!r} stands there twice, expected one row a study']
        elif known and set(known["trajectories"]) & set(record["trajectories"]):
            found = [f"a second text of {', '.join(record['trajectories'])} for study {record['id']!r}, expected one"]
        elif known and (other := [key for key in same if known.get(key) != record.get(key)]):
            found = [f"{', '.join(other)} of study {record['id']!r} differ from an earlier row, expected the same"]
        elif known:
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


def put_into(args, rows, task):
    """The records of --into with the trajectories of the rows -> (records, {"without a record", "without a row", "of the training split"})."""
    prepared = {study.id: study.record for study in data.read_studies(args.into, task)}
    into = {id: id if id in prepared or f"s{id}" in rows else f"s{id}" for id in rows}
    texts = {into[id]: row["trajectories"] for id, row in rows.items() if into[id] in prepared}
    if not texts:
        raise ValueError(f"{args.file}: none of its {len(rows)} studies is in {args.into}, expected ids such as {next(iter(prepared))}, "
                         f"found {next(iter(rows))}")
    records = [{**record, "trajectories": {**texts[id], **record.get("trajectories", {})}} if id in texts else record
               for id, record in prepared.items()]
    left = [record for id, record in prepared.items() if id not in texts]
    return records, {"without a record": sum(id not in prepared for id in into.values()), "without a row": len(left),
                     "of the training split": sum(record.get("split") in (None, "train") for record in left)}


def studies(args):
    """Writes args.out; returns {"studies", "trajectories": {teacher: n}} and, with --into, the counts of `put_into`."""
    mapping = read_mapping(args.mapping, ("id", "trajectories") if args.into else ("id", "image", "trajectories"))
    task = data.load_task(args.task_file)
    rows = read_rows(args, mapping, task)
    records, counts = put_into(args, rows, task) if args.into else (list(rows.values()), {})
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        file.writelines(map(line_of, records))
    teachers = data.teacher_names([data.Study(r["id"], (), {}, r.get("trajectories", {})) for r in records])
    texts = {teacher: sum(teacher in r.get("trajectories", {}) for r in records) for teacher in teachers}
    print(f"{args.out}: {len(records)} studies; {', '.join(f'{teacher} {n}' for teacher, n in texts.items())}")
    if args.into:
        print(f"{counts['without a record']} studies of {args.file} have no record in {args.into} and are left out; "
              f"{counts['without a row']} records got nothing, {counts['of the training split']} of them of the training split")
    elif not args.task_file:
        print(f"warning: {args.out} holds whatever {args.file} does, patients of MS-CXR-T too, which is then no test set any more; "
              "--into puts the trajectories into the records of prepare_mimic.py, which leaves those patients out")
    return {"studies": len(records), "trajectories": texts, **counts}


def preferences(study, task, images, prompt):
    """The rows of a study, one for each teacher that answered. TRL puts the images before the text of the user's message, as the stages do."""
    data.require_images([study], images)
    said = lambda role, text: {"role": role, "content": text}
    system = [said("system", task.prompts["system"])] if task.prompts["system"] else []
    for teacher, text in study.trajectories.items():
        yield {"prompt": [*system, said("user", data.student_prompt(study, task, prompt))], "chosen": [said("assistant", study.t_plus)],
               "rejected": [said("assistant", text)], "images": [str(data.image_path(path, images)) for path in study.images],
               "study": study.id, "teacher": teacher}


def trl(args):
    """Writes args.out; returns {"studies", "rows"}."""
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
    print(f"{args.out}: {rows} pairs of {len(read)} studies. Each teacher is a pair of its own here: the weights w_u are lost, "
          "and DPO on these pairs is not Eq. 11")
    return {"studies": len(read), "rows": rows}


def parse(argv=None):
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("studies", help="records from elsewhere to studies.jsonl")
    p.set_defaults(run=studies)
    p.add_argument("file", help=".jsonl, .json or .csv")
    p.add_argument("--mapping", required=True, help="mapping.json, which names the file's fields")
    p.add_argument("--into", metavar="STUDIES.jsonl", help="records of prepare_mimic.py that get the trajectories (default: the file's own records)")
    p.add_argument("--out", help="default: studies.jsonl, with --into with_teachers.jsonl")
    q = commands.add_parser("trl", help="studies.jsonl and positives.jsonl to TRL's preference pairs")
    q.set_defaults(run=trl)
    q.add_argument("--studies", required=True, help="studies.jsonl")
    q.add_argument("--positives", required=True, help="positives.jsonl of stage 2")
    q.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    q.add_argument("--split", default="train", help="which studies (default: %(default)s)")
    q.add_argument("--teachers", help="NAME,...: only these teachers (default: all)")
    q.add_argument("--refusals", choices=("keep", "drop"), default="drop", help="trajectories that decline to answer (default: %(default)s)")
    q.add_argument("--prompt", choices=("student", "teacher"), default="student", help="teacher: Appendix B's, which names the diagnosis")
    q.add_argument("--out", default="preferences.jsonl", help="default: %(default)s")
    for command in (p, q):
        command.add_argument("--task_file", help="task.json; without it MIMIC-CXR's 14 findings")
        command.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if args.command == "studies":
        args.out = args.out or ("with_teachers.jsonl" if args.into else "studies.jsonl")
    return args


def main():
    args = parse()
    try:
        report = args.run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"convert: {error}") from None
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
