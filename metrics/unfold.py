"""The layouts of an answer as lines "finding: value": JSON, tables, blocks, several labels a line.

    unfold('{"Edema": true, "Fracture": null}', ...)              -> "Edema: yes"
    unfold("| Edema | Fracture |\\n|---|---|\\n| no | yes |", ...)  -> "Edema: no", "Fracture: yes"
    unfold("### Edema\\n- Side: left\\n- Status: absent", ...)      -> "Edema: absent", "Side: left"
    unfold("Edema: no, fracture: yes", ...)                       -> "Edema: no", "fracture: yes"

Both readers (findings.py, phrases.py) unfold a text before they read it. Running text stays as it
is. O(length).
"""

import json
import re

# Keys that hold the name of a finding, and keys that hold what is said of it, the first one first.
NAMES = ("finding", "label", "name", "diagnosis", "condition", "observation", "pathology",
         "abnormality", "disease")
STATES = ("present", "presence", "detected", "status", "value", "answer", "result", "state",
          "verdict", "found", "visible", "seen", "observed", "exists", "positive", "grade",
          "severity", "class", "classification", "category", "prediction", "level", "degree",
          "rating", "assessment")

LONGEST_BLOCK = 12  # lines
MOST_FAULTY = 50  # places that look like JSON and are none, before no more are tried

# an object anywhere, a list where a line begins or behind a colon
_JSON_START = re.compile(r"(?=\{\s*[\"'}])|(?:^|(?<=: ))[ \t]*(?=[{\[])", re.MULTILINE)
_DECODER = json.JSONDecoder()
# Python's own parser takes a minute for 50 kB of faulty text.
_PYTHON = re.compile(r"""'((?:[^'\\\n]|\\.)*)'|("(?:[^"\\\n]|\\.)*")|\b(?:True|False|None)\b""")
_TRAILING_COMMA = re.compile(r",(\s*[}\]])")
_FENCE = re.compile(r"^ *```\w* *$", re.MULTILINE)
_SENTENCE = re.compile(r"[.:;](?:\s|$)")
_TICK = re.compile(r"[xX✓✔✅☑☒]|\[[xX]\]|\([xX]\)")
_MARK = re.compile(rf"(?:{_TICK.pattern}|[-–☐]|\[ ?\]|\( ?\))?")
_ARROW = re.compile(r"(?<! ) *(?:-{1,9}>|={1,9}>|→|⇒) *| = ")
_SIDES = re.compile(r"\b(left|right) ?: *(\w+ ?), ?(left|right) ?:", re.IGNORECASE)
# of marks and digits at most 30, or "1, 1, 1, ..." would be looked through from each comma on
_LABELLED = re.compile(r"[\W\d]{0,30}[^:;,.|]{2,60}:\W{0,30}\s")
_NEXT_LABEL = re.compile(r"[,;]\s+(?=[\W\d]{0,30}[^\W\d][^:;,.|]{0,40}:\W{0,30}\s)")
_HEADING = re.compile(
    rf"\W*(?:\d{{1,2}}[.)]\s*)?(?:(?:{'|'.join(NAMES)})[\s*_]*:[\s*_]*)?"
    r"([^\W\d][^:.|]{0,59}?)[\s*_:]*", re.IGNORECASE)
# two columns apart by a tab or by blanks, and "finding,verdict"
_COLUMNS = re.compile(r"([^\s.,:;][^.,:;\t]{0,39}?)(?:\t+| {2,})([^\s.,:;][^.,:;\t]{0,39})\.?")
_VERDICT = re.compile(r"([^\W\d][^.,:;]{1,39}),\s*(yes|no|y|n|true|false|present|absent|positive"
                      r"|negative|none|0|1)(?:,.*)?", re.IGNORECASE)
_PROPERTY = re.compile(r"\W*([^\W\d][\w ]{0,24}?)[*_]*\s*:[*_\s]*([^\s*_].*)")


def unfold(text, names_finding):
    """Lays a text out in lines.

    text           str of any length
    names_finding  names_finding(cell) says whether a cell of a table's head names a finding
    Returns the text with its JSON, tables and blocks as lines "finding: value". "left: no, right:
    yes" loses its colons.
    """
    text = _without_json(_without_tags(text))
    lines, rows = [], []
    for line in [*text.split("\n"), ""]:
        if is_row(line):
            rows.append(line)
            continue
        lines += _table_lines(rows, names_finding) if rows else []
        lines.append(line)
        rows = []
    lines = [_ARROW.sub(": ", _SIDES.sub(r"\1 \2, \3", _two_columns(line))) for line in lines[:-1]]
    return "\n".join(part for line in _without_blocks(lines) for part in _labels(line))


def _without_tags(text):
    """The text with the tables and lists of HTML as lines."""
    if not re.search(r"<(?:td|th|li|br)\b", text, re.IGNORECASE):
        return text
    text = re.sub(r"</t[dh]>\s*<t[dh][^>]*>", " | ", text, flags=re.IGNORECASE)
    text = re.sub(r"<(?:tr|li|br|p|h\d)\b[^>]*>", "\n", text, flags=re.IGNORECASE)
    return re.sub(r"</?[a-z]\w{0,9}[^<>]{0,80}>", "", text, flags=re.IGNORECASE)


def _two_columns(line):
    """A line of two columns, or "finding,verdict", as "finding: verdict"; else as it is."""
    match = _COLUMNS.fullmatch(line.strip()) or _VERDICT.fullmatch(line.strip())
    return f"{match[1]}: {match[2]}" if match else line


def _labels(line):
    """A line, cut before each label but the first: "Edema: no, fracture: yes"."""
    return _NEXT_LABEL.split(line) if _LABELLED.match(line) else [line]


# -------------------------------------------------------------------------------------------- JSON

def _without_json(text):
    """The text with its JSON as lines: objects anywhere, lists at the beginning of a line or behind
    a colon."""
    parts, end, failed = [], 0, 0
    for match in _JSON_START.finditer(text):
        if match.start() < end:
            continue
        if failed == MOST_FAULTY:
            break
        try:
            value, stop = _decode(text, match.end())
        except ValueError:
            failed += 1
            continue
        except RecursionError:
            break
        items = [value] if isinstance(value, dict) else value
        # "[1] Edema" is a reference, "[ ]" a box
        if items and all(isinstance(item, (dict, str)) for item in items):
            parts += [text[end:match.start()], "\n".join(["", *_json_lines(value), ""])]
            end = stop
    return _FENCE.sub("", "".join([*parts, text[end:]])) if parts else text


def _decode(text, start):
    """(value, end) of the JSON at a place of a text, or of a Python literal with single quotes.

    Raises ValueError where there is neither, RecursionError where it is too deep.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except ValueError:
        if not re.match(r"[{\[]\s*\{?\s*'", text[start:start + 20]):
            raise
    end = 1 + max(text.rfind("}"), text.rfind("]"))
    said = _TRAILING_COMMA.sub(r"\1", _PYTHON.sub(_as_json, text[start:end]))
    return json.loads(said), end


def _as_json(match):
    """A text in quotes, True, False or None of Python as JSON."""
    if match[1] is None:
        return match[2] or {"True": "true", "False": "false", "None": "null"}[match[0]]
    said = match[1].replace("\\'", "'").replace('\\"', '"').replace('"', '\\"')
    return f'"{said}"'


def _json_lines(value, label=""):
    """The lines of a JSON value that is said of `label`, one after the other.

    {"Edema": true} and {"finding": "Edema", "present": true} give "Edema: yes"; null says nothing;
    lists are bullets below their name.
    """
    if isinstance(value, dict):
        return _object_lines(value, label)
    if isinstance(value, (list, tuple)):
        return _list_lines(value, label)
    if isinstance(value, bool) or value in ("Y", "N", "y", "n"):
        value = "yes" if value in (True, "Y", "y") else "no"
    label = re.sub(r"^(?:has|is|shows) | (?:present|detected|seen|found)$", "", label)
    return [] if value is None else [f"{label}: {value}"]


def _list_lines(value, label):
    """Yields the lines of a JSON list that is said of `label`."""
    yield f"\n{label}:" if label else ""
    for item in value:
        yield from [f"- {item}"] if isinstance(item, str) else _json_lines(item)


def _object_lines(value, label):
    """Yields the lines of a JSON object that is said of `label`."""
    value = {re.sub("(?<=[a-z])(?=[A-Z])|_", " ", str(key)): item for key, item in value.items()}
    keys = {_plain(key): key for key in value}
    names = NAMES if label else (*NAMES, "class", "category")
    named = next((keys[key] for key in names if isinstance(value.get(keys.get(key)), str)), None)
    state = next((keys[key] for key in STATES if keys.get(key) not in (None, named)), None)
    others = [key for key, item in value.items() if key != named and isinstance(item, (bool, str))]
    if named and not state and len(others) == 1:
        state = others[0]  # {"finding": "Edema", "course": "stable"}
    name = value[named] if named else label
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


def _plain(key):
    """A key as NAMES and STATES have it: "is present" -> "present", "finding name" -> "finding"."""
    return re.sub(r"^(?:is|was) | name$", "", key.lower())


# ------------------------------------------------------------------------------- tables and blocks

def is_row(line):
    """Whether a line is a row of a table: "| Edema | no |" or "Edema | no"."""
    return line.lstrip().startswith("|") or (" | " in line and not _SENTENCE.search(line))


def cells_of(line):
    """The cells of a table's row, without the blanks around them."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _table_lines(rows, names_finding):
    """The lines of a table.

    Where the columns are findings, "finding: cell"; where they are left and right, "finding: cell
    on the left, ..."; where they are ticked, "finding: column", and a row without a tick, or with
    several, says nothing; else the rows as they are.
    """
    head, *body = [cells_of(row) for row in rows if row.strip("|-: \t")] or [[]]
    findings = [cell for cell in head if names_finding(cell)]
    if len(findings) > 1 and not any(names_finding(row[0]) for row in body):
        return [f"{finding}: {cell}" for row in body for finding, cell in zip(head, row)
                if cell and finding in findings]
    if {"left", "right"} <= {cell.lower() for cell in head}:
        sides = [[f"{cell} on the {side}" for side, cell in zip(head[1:], cells)]
                 for _, *cells in body]
        return [f"{name}: {', '.join(said)}" for (name, *_), said in zip(body, sides)]
    marks = [cell for row in body for cell in row[1:]]
    is_ruled = len(rows) > 1 and not rows[1].strip("|-: \t")
    if not (is_ruled and all(map(_MARK.fullmatch, marks)) and any(map(_TICK.fullmatch, marks))):
        return rows
    lines = []
    for name, *cells in body:
        ticked = [option for option, cell in zip(head[1:], cells) if _TICK.fullmatch(cell)]
        lines += [f"{name}: {option}" for option in ticked[:1] if len(ticked) == 1]
    return lines


def _without_blocks(lines):
    """Yields the lines; a heading with properties below it becomes "heading: state" before them.

    A block is a name by itself, or "Finding: name", and below it lines "property: value" of which
    one property is of STATES, LONGEST_BLOCK lines at most.
    """
    at = 0
    while at < len(lines):
        heading = _HEADING.fullmatch(lines[at])
        end = at + 1
        properties = []
        while heading and end < min(len(lines), at + LONGEST_BLOCK):
            match = _PROPERTY.fullmatch(lines[end])
            if lines[end].strip() and not match or match and _plain(match[1]) in NAMES:
                break
            properties += [match] if match else []
            end += 1
        state = next((match for match in properties if _plain(match[1]) in STATES), None)
        if state is None:
            yield lines[at]
            at += 1
            continue
        yield f"{heading[1]}: {state[2]}"
        yield from (match[0] for match in properties if match is not state)
        yield ""
        at = end
