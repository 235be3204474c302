"""Lines of a studies.jsonl: read, checked, written. Nothing here needs torch, so that what only handles records stays small.

A file is written whole or not at all (`writing`); what is read is checked line by line and never guessed.
"""

import contextlib
import json
import os
import re
from pathlib import Path

MAX_DEPTH = 100  # of nested JSON: where Python itself gives up depends on who calls, and what was read must be writable too
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # also what breaks lines or turns their direction


def read_jsonl(path):
    """Yields (line number, object) of a JSON-lines file. Raises ValueError 'file:line: what' for anything that is not one
    JSON object a line. NaN, a byte-order mark, lone surrogates and torn lines are faults, U+2028 inside a text is not."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, parse_line(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def parse_line(line):
    """The object of one line of bytes. Raises ValueError without file and line."""
    try:
        record = _parse(line)
    except ValueError as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def read_json(path):
    """The value of a JSON file, as strict as `read_jsonl`. Raises ValueError 'file: not a JSON file: why'."""
    try:
        return _parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def _parse(content):
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=lambda name: _refuse(f"{name} is not JSON"), object_pairs_hook=_unique)
        if too_deep(value):
            _refuse(f"nested deeper than {MAX_DEPTH}")
        if b"\\ud" in content.lower():
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        hint = " (a UTF-8 byte-order mark; save the file without it)" if content.startswith(b"\xef\xbb\xbf") else ""
        raise ValueError(f"{str(error)[:200]}{hint}") from None
    return value


def too_deep(value):
    """Whether lists and objects are nested deeper than MAX_DEPTH, level by level and so without recursion."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in (outer.values() if isinstance(outer, dict) else outer)]
        depth += 1
    return bool(level)


def _refuse(message):
    raise ValueError(message)


def _unique(pairs):
    """json.loads keeps the last of two equal keys without a word: a second text of one teacher would be lost."""
    record = dict(pairs)
    if len(record) < len(pairs):
        _refuse("the same key twice in one object")
    return record


def is_name(value):
    """A text of one line without control characters: ids, paths and teachers' names are printed, and may not speak to the terminal."""
    return isinstance(value, str) and value.strip() != "" and not CONTROL.search(value)


def shown(text):
    """A stranger's text in one line, control characters written out: '\\x1b[2J'."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], str(text))


def faults(record, task):
    """What is wrong with one studies.jsonl record: a list of sentences, empty if nothing is."""
    found = []
    text = lambda value: isinstance(value, str) and value.strip() != ""
    if not is_name(record.get("id")):
        found.append('"id": expected a non-empty string without control characters')
    image = record.get("image")
    images = image if isinstance(image, list) else [image]
    if not (1 <= len(images) <= 2 and all(map(is_name, images))):
        found.append('"image": expected a path or a list of two paths, without control characters')
    labels = record.get("labels", {})
    if not isinstance(labels, dict):
        found.append('"labels": expected an object {finding: class}')
    else:
        for finding, value in labels.items():
            if finding not in task.findings:
                found.append(f'"labels": unknown finding {finding!r}, expected one of {", ".join(task.findings)}')
            elif isinstance(value, bool) or value not in task.classes:
                found.append(f'"labels": {finding} is {value!r}, expected one of {", ".join(map(repr, task.classes))}')
    trajectories = record.get("trajectories", {})
    if not isinstance(trajectories, dict):
        found.append('"trajectories": expected an object {teacher: text}')
    else:
        found += [f'"trajectories": {name!r}: expected a name without control characters' for name in trajectories if not is_name(name)]
        found += [f'"trajectories": {name!r} is empty or no text, expected words' for name, value in trajectories.items() if not text(value)]
    for key in ("report", "split", "t_plus"):
        if record.get(key) is not None and not isinstance(record[key], str):
            found.append(f'"{key}": expected a string')
    return found


def require_folder(path):
    """Raises ValueError unless the folder that the file `path` will lie in is there: to be asked before long work, not after it."""
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder that is there")


@contextlib.contextmanager
def writing(path):
    """A binary file that appears under its name once it is complete and on the disk; after an error nothing is left of it. Where a link
    lies in its place, or in that of the temporary file, the link goes and what it leads to stays as it is."""
    path = Path(path)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.unlink(missing_ok=True)
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def line_of(record):
    """One line of a JSON-lines file, as bytes."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")
