"""How findings.py cuts a text.

JSON and tables become lines, lines are cut into sentences, sentences into labels and what is said
of them.
"""

import json
import re

from . import findings_phrases as vocabulary

_SKIPPED = re.compile(vocabulary.SKIPPED_SECTIONS)
_SECTION = re.compile(f"{vocabulary.SKIPPED_SECTIONS}|{vocabulary.OTHER_SECTIONS}")
_JSON_START = re.compile(r"(?:^|(?<=: ))[ \t]*(?=[{\[])", re.MULTILINE)
_DECODER = json.JSONDecoder()
_FENCE = re.compile(r"^ *```\w* *$", re.MULTILINE)
_SENTENCE = re.compile(r"[.:;](?:\s|$)")
_TICK = re.compile(r"[xX✓✔✅☑☒]|\[[xX]\]|\([xX]\)")
_MARK = re.compile(rf"(?:{_TICK.pattern}|[-–☐]|\[ ?\]|\( ?\))?")
_SIDES = re.compile(r"\b(left|right) ?: *(\w+ ?), ?(left|right) ?:", re.IGNORECASE)
_BULLET = re.compile(r"^(?:[-*•+–·]|\(?\d{1,2}[.)])\s+|^(?=[✓✔✅❌✗✘☐☑☒])")
# its first character begins a run of .!? so that a long one is looked at once
_SENTENCE_END = re.compile(
    r"(?<![.!?])(?:[.!]|\?(?=[.!?])|(?<=\S)\?)[.!?]*[\"')\]*_]*(?=\s|$)"
    r"|(?<=[a-z]{3})\.(?=[A-Z])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:dr|mr|mrs|ms|vs|e\.g|i\.e|cf|approx|st)$", re.IGNORECASE)
_LABEL_END = re.compile(r":(?=[\s*_]|$)|\s[-–—]+\s|—")
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"_{3,}", " xxxx "),  # a de-identified blank
    (r"\((?:no|[-–−])\)|^\s*[-–−]\s*$", " absent"), (r"\((?:yes|\+)\)|^\s*\+\s*$", " present"),
    (r"\(\?\)", " possible"), (r"\bwith/without\b", "with or without"),
    (r"^\[ ?\]", "no "), (r"^\[[x✓✔]\]", ""), (r"\[ ?\]", " absent"), (r"\[[x✓✔]\]", " present"),
    (r"[*_`#~]+", ""), (r"[❌✗✘☐]", " no "), (r"[✓✔✅☑☒]", " "), (r"’", "'"),
    (r"\band/or\b", "or"), (r"\bw/o\b", "without"),
    (r"\br/o\b", "rule out"), (r"\bc/w\b", "consistent with"), (r"\bh/o\b", "history of"),
    (r"\b(?:can't|can not|could not|couldn't)\b", "cannot"),
    (r"n't\b", " not"), (r"'m\b", " am"), (r"'re\b", " are"),
    (r"(?<=[a-z])[-‐‑](?=[a-z])", " "), (r"\s+", " "))]


def normalise(text):
    """A text as the rules see it.

    text  str
    Returns it in lower case, without marks, with one spelling of each contraction and abbreviation
    and with single blanks. O(length).
    """
    text = text.lower()
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip()


def unfold(text):
    """The text with its JSON, and its tables whose columns are ticked, as lines "finding: value".

    JSON begins a line or stands behind a colon; several objects may follow each other. Any other
    text stays as it is, but "left: no, right: yes" loses its colons.
    """
    parts, end = [], 0
    for match in _JSON_START.finditer(text):
        if match.start() < end:
            continue
        try:
            value, stop = _DECODER.raw_decode(text, match.end())
        except ValueError:
            continue
        except RecursionError:
            break
        # "[1] Edema" is a reference
        if isinstance(value, dict) or value and all(isinstance(item, (dict, str)) for item in value):
            parts += [text[end:match.start()], "\n".join(["", *_json_lines(value), ""])]
            end = stop
    text = _unticked("".join([*parts, text[end:]]))
    return _SIDES.sub(r"\1 \2, \3", _FENCE.sub("", text) if parts else text)


def is_row(line):
    """Whether a line is a row of a table: "| Edema | no |" or "Edema | no"."""
    return line.lstrip().startswith("|") or (" | " in line and not _SENTENCE.search(line))


def cells_of(line):
    """The cells of a table's row, without the blanks around them."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_rows(text):
    """Yields each table of a text, a list of rows of cells; rules of dashes are dropped.

    text  str
    """
    rows = []
    for line in [*text.splitlines(), ""]:
        if is_row(line):
            if line.strip("|-: \t"):
                rows.append(cells_of(line))
        elif rows:
            yield rows
            rows = []


def _unticked(text):
    """The text with the tables whose columns are ticked as lines "finding: name of the column"."""
    lines, rows = [], []
    for line in [*text.split("\n"), ""]:
        if is_row(line):
            rows.append(line)
            continue
        lines += _ticked_lines(rows) or rows
        lines.append(line)
        rows = []
    return "\n".join(lines[:-1])


def _ticked_lines(rows):
    """The lines of a table whose columns are ticked; None where it is another table.

    A row without a tick, or with several, says nothing.
    """
    head, *body = [cells_of(row) for row in rows if row.strip("|-: \t")] or [[]]
    marks = [cell for row in body for cell in row[1:]]
    if not all(map(_MARK.fullmatch, marks)) or not any(map(_TICK.fullmatch, marks)):
        return None
    lines = []
    for name, *cells in body:
        ticked = [option for option, cell in zip(head[1:], cells) if _TICK.fullmatch(cell)]
        lines += [f"{name}: {option}" for option in ticked[:1] if len(ticked) == 1]
    return lines


def _json_lines(value, label=""):
    """The lines of a JSON value that is said of `label`, one after the other.

    {"Edema": true} and {"finding": "Edema", "present": true} give "Edema: yes"; null says nothing;
    lists are bullets below their name.
    """
    if isinstance(value, dict):
        return _object_lines(value, label)
    if isinstance(value, list):
        return _list_lines(value, label)
    if isinstance(value, bool):
        value = "yes" if value else "no"
    return [] if value is None else [f"{label}: {value}"]


def _list_lines(value, label):
    """Yields the lines of a JSON list that is said of `label`."""
    yield f"\n{label}:" if label else ""
    for item in value:
        yield from [f"- {item}"] if isinstance(item, str) else _json_lines(item)


def _object_lines(value, label):
    """Yields the lines of a JSON object that is said of `label`."""
    value = {re.sub("(?<=[a-z])(?=[A-Z])|_", " ", key): item for key, item in value.items()}
    keys = {re.sub(r"^(?:is|was) | name$", "", key.lower()): key for key in value}
    named = next((keys[key] for key in vocabulary.JSON_NAMES
                  if isinstance(value.get(keys.get(key)), str)), None)
    state = next((keys[key] for key in vocabulary.JSON_STATES if key in keys), None)
    name = value[named] if named else label
    others = [key for key, item in value.items() if key != named and isinstance(item, (bool, str))]
    if named and not state and len(others) == 1:
        state = others[0]  # {"finding": "Edema", "course": "stable"}
    if named and not state:
        yield f"{name}."
    elif name and state:
        yield from _json_lines(value[state], name)
    elif label and keys.keys() <= {"left", "right"}:
        sides = [line.replace(":", "") for key, item in value.items()
                 for line in _json_lines(item, key)]
        yield f"{label}: " + ", ".join(sides)
        return
    for key, item in value.items():
        if key not in (named, state if name else None):
            yield from _json_lines(item, key)


def lines_of(text):
    """Yields (kind, line); kind is blank, bullet, heading or plain.

    Lines that were only wrapped are joined again, rules of dashes are dropped.
    """
    lines, previous = [("blank", [""])], ""
    for line in map(str.strip, text.splitlines()):
        if is_row(line):  # it reads like "label: value"
            line = " : ".join(filter(None, cells_of(line)))
        if line and not line.strip("-:=_*# \t"):
            continue
        kind, (last_kind, last_parts) = _kind(line), lines[-1]
        if kind == "plain" and last_kind != "heading" and _continues(line, previous):
            last_parts.append(line)
        else:
            lines.append((kind, [line]))
        previous = line
    for (kind, parts), (_, (following, *_)) in zip(lines, lines[1:] + lines[:1]):
        line = " ".join(parts)
        is_item = line.startswith(("-", "*", "•")) or len(line) >= 50 or line[-1:] in ".;!?,"
        if following.startswith(("- ", "* ", "• ")) and not is_item:
            kind = "heading"  # "2. Pneumothorax" above a list of dashes
        yield kind, line


def _kind(line):
    """What a line is: blank, bullet, heading or plain."""
    if not line:
        return "blank"
    if _BULLET.match(line):
        return "bullet"
    is_heading = line.startswith("#") or re.fullmatch(r"\*\*[^*]+\*\*:?", line)
    return "heading" if is_heading else "plain"


def _continues(line, previous):
    """Whether the line before was only wrapped, so that it goes on in this one."""
    wrapped = previous.endswith(",") or (len(previous) >= 45 and previous[-1] not in ".:;!?")
    return wrapped and not re.match(r"[^:.]{1,40}:(?:\s|$)", line)


def _sentences(line):
    """Yields the sentences of a line; the last one may be empty."""
    start = 0
    for match in _SENTENCE_END.finditer(line):
        if not _ABBREVIATION.search(line[max(start, match.start() - 8):match.start()]):
            yield line[start:match.end()].strip()
            start = match.end()
    yield line[start:].strip()


def pieces(text):
    """Cuts a text, leaving out the sections that are not about the image. O(length).

    text  str
    Yields (number, kind, sentence, piece, is_label): the number and kind (blank, bullet, heading or
    plain) of the line, the sentence, the piece of it, and whether that piece is a label.
    """
    skipped = begun = False
    for number, (kind, line) in enumerate(lines_of(unfold(text))):
        skipped = skipped and not (kind == "blank" and begun)
        for sentence in _sentences(_BULLET.sub("", line)):
            cuts = [match.span() for match in _LABEL_END.finditer(sentence)]
            for (_, start), (end, _) in zip([(0, 0)] + cuts, cuts + [(len(sentence), 0)]):
                name = sentence[start:end].strip(" *_#").lower()
                is_label = end < len(sentence) or kind == "heading"
                if is_label and _SECTION.fullmatch(name):
                    skipped, begun = bool(_SKIPPED.fullmatch(name)), False
                elif skipped:
                    begun = begun or bool(name)
                elif name.strip(".,;x"):
                    yield number, kind, sentence, sentence[start:end], is_label
