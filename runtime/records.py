"""Lines of JSON, read strictly; files and folders, written whole or not at all. No torch here."""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

# Levels of nested JSON. The depth at which Python itself gives up depends on the depth of the call,
# and what was read must be writable again.
MAX_DEPTH = 100
# control characters, characters that break a line or change its direction, and lone surrogates
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def read_jsonl(path):
    """Reads a JSON-lines file, strictly.

    Yields (line number, object); blank lines are skipped. Raises ValueError 'file:line: what' for a
    line that is not one JSON object in UTF-8: NaN, a byte-order mark, a lone surrogate and a line
    that ends too early are faults, U+2028 inside a text is not.
    """
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                yield number, parse_line(line)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def parse_line(line):
    """The object of one line, given as bytes. Raises ValueError, which names no file and line."""
    try:
        record = _parse(line)
    except ValueError as error:
        raise ValueError(f"not a JSON object in UTF-8: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    return record


def read_json(path):
    """The value of a JSON file, read as strictly as by `read_jsonl`.

    Raises ValueError 'file: not a JSON file: why'.
    """
    try:
        return _parse(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def _parse(content):
    """The JSON value of bytes in UTF-8. Raises ValueError with the reason."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=_no_constant,
                           object_pairs_hook=_unique)
        if too_deep(value):
            _refuse(f"nested deeper than {MAX_DEPTH}")
        if b"\\ud" in content.lower():  # it may be a lone surrogate, which cannot be encoded
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        hint = ""
        if content.startswith(b"\xef\xbb\xbf"):
            hint = " (a UTF-8 byte-order mark; save the file without it)"
        raise ValueError(f"{str(error)[:200]}{hint}") from None
    return value


def too_deep(value):
    """Whether lists and objects are nested deeper than MAX_DEPTH; found without recursion."""
    level, depth = [value], 0
    while level and depth <= MAX_DEPTH:
        level = [inner for outer in level for inner in _inside(outer)]
        depth += 1
    return bool(level)


def _inside(value):
    """The values that lie directly in an object or a list; nothing lies in any other value."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _refuse(message):
    raise ValueError(message)


def _no_constant(name):
    """Refuses NaN and Infinity, which json.loads would take."""
    _refuse(f"{name} is not JSON")


def _unique(pairs):
    """The dict of an object's pairs. json.loads would keep the last of two equal keys and say
    nothing, and so lose a second text of one teacher."""
    record = dict(pairs)
    if len(record) < len(pairs):
        _refuse("the same key twice in one object")
    return record


def is_name(value):
    """Whether `value` is a text of one line that is not blank and has no control characters.

    Ids, paths and teachers' names must be that, since they are printed on a terminal, which obeys
    control characters.
    """
    return isinstance(value, str) and value.strip() != "" and not CONTROL.search(value)


def printable(text):
    """A text from elsewhere in one line, with control characters spelled as in '\\x1b[2J'."""
    return CONTROL.sub(lambda found: repr(found[0])[1:-1], str(text))


def require_folder(path):
    """Raises ValueError unless the folder exists in which the file `path` will be written.

    It is called before long work, so that the fault does not show only after it.
    """
    if Path(path).is_dir() or not Path(path).resolve().parent.is_dir():
        raise ValueError(f"{path}: expected a file in a folder that is there")


def line_of(record):
    """One line of a JSON-lines file, as bytes."""
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")


# -------------------------------------------------------------------------- whole or not at all

@contextlib.contextmanager
def atomic(path):
    """A context that gives a temporary path for a file or a folder.

    path  the name that it gets at the end, when all of it is on the disk
    After an error nothing is left of it, and what was at `path` before stays. Where `path` or the
    temporary path is a link, the link is removed and what it leads to stays as it is. Raises
    OSError where writing fails, as on a full disk.
    """
    path = Path(path)
    temporary = temporary_of(path)
    remove(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            fsync(file)
        if path.is_dir() and not path.is_symlink() and temporary.is_dir():
            remove(path)  # a folder replaces a folder, but a file does not
        os.replace(temporary, path)
        fsync(path.parent)
    except BaseException as error:
        remove(temporary)
        if is_of_writing(error, temporary):
            raise WriteError(f"{path} could not be written: {error}") from None
        raise


class WriteError(OSError):
    """Something could not be written, as on a full disk; its text says what."""


def is_of_writing(error, temporary):
    """Whether an error inside `atomic` is of what is written, and not of a file that is read.

    An OSError names the file that could not be opened; where writing to an open file fails, it
    names none. safetensors has its own error.
    """
    if isinstance(error, WriteError):
        return False
    if not isinstance(error, OSError):
        return isinstance(error, SafetensorError)
    return error.filename is None or Path(error.filename).is_relative_to(temporary)


def temporary_of(path):
    """The name under which `atomic` writes `path`."""
    return path.with_name(f".tmp-{path.name}")


def remove(path):
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def fsync(path):
    """Waits until a file or a folder's entries are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def write_text(path, text):
    """Writes a text file in UTF-8 by `atomic`."""
    with atomic(path) as temporary:
        temporary.write_bytes(text.encode("utf-8"))


def write_jsonl(path, records):
    """Writes records, one JSON object a line, by `atomic`."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
