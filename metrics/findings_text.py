"""How findings.py cuts a text: JSON and tables into lines, lines into sentences, sentences into labels and what is said of them."""

import json
import re

from . import findings_phrases as vocabulary

_SKIPPED, _SECTION = re.compile(vocabulary.SKIPPED_SECTIONS), re.compile(f"{vocabulary.SKIPPED_SECTIONS}|{vocabulary.OTHER_SECTIONS}")
_SIDES = re.compile(r"\b(left|right) ?: *(\w+ ?), ?(left|right) ?:", re.IGNORECASE)
_BULLET = re.compile(r"^(?:[-*•+–·]|\(?\d{1,2}[.)])\s+|^(?=[✓✔✅❌✗✘])")
# its first character begins a run of .!? so that a long one is looked at once
_SENTENCE_END = re.compile(r"(?<![.!?])(?:[.!]|\?(?=[.!?])|(?<=\S)\?)[.!?]*[\"')\]*_]*(?=\s|$)|(?<=[a-z]{3})\.(?=[A-Z])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:dr|mr|mrs|ms|vs|e\.g|i\.e|cf|approx|st)$", re.IGNORECASE)
_LABEL_END = re.compile(r":(?=[\s*_]|$)|\s[-–—]+\s|—")
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"_{3,}", " xxxx "),  # a de-identified blank
    (r"\(no\)", " absent"), (r"\(yes\)", " present"),
    (r"[*_`#~]+", ""), (r"[❌✗✘]", " no "), (r"[✓✔✅]", " "), (r"’", "'"), (r"\band/or\b", "or"), (r"\bw/o\b", "without"),
    (r"\br/o\b", "rule out"), (r"\bc/w\b", "consistent with"), (r"\bh/o\b", "history of"),
    (r"\b(?:can't|can not|could not|couldn't)\b", "cannot"), (r"n't\b", " not"), (r"'m\b", " am"), (r"'re\b", " are"),
    (r"(?<=[a-z])[-‐‑](?=[a-z])", " "), (r"\s+", " "))]


def normalise(text):
    """Lower case, without marks, spellings and contractions made one, single blanks: what the rules see. O(length)."""
    text = text.lower()
    for pattern, new in _SPELLINGS:
        text = pattern.sub(new, text)
    return text.strip()


def _unfold(text):
    """The text with JSON in it, all of it or what is fenced by ```, as lines "finding: value"; "left: no, right: yes" without its colons."""
    parts = text.split("```")
    for i, part in enumerate(parts):
        part = part.strip().removeprefix("json").lstrip()
        if part.startswith(("{", "[")) and (i % 2 or len(parts) == 1):
            try:
                parts[i] = "\n".join(["", *_json_lines(json.loads(part)), ""])
            except (ValueError, RecursionError):
                pass
    return _SIDES.sub(r"\1 \2, \3", "```".join(parts))


def _json_lines(value, label=""):
    """{"Edema": true} and {"finding": "Edema", "present": true} give "Edema: yes"; null says nothing; lists are bullets below their name."""
    if isinstance(value, dict):
        value = {re.sub("(?<=[a-z])(?=[A-Z])|_", " ", key): item for key, item in value.items()}
        keys = {key.lower(): key for key in value}
        named = next((keys[key] for key in vocabulary.JSON_NAMES if isinstance(value.get(keys.get(key)), str)), None)
        state = next((keys[key] for key in vocabulary.JSON_STATES if key in keys), None)
        name = value[named] if named else label
        if named and not state:
            yield f"{name}."
        elif name and state:
            yield from _json_lines(value[state], name)
        elif label and keys.keys() <= {"left", "right"}:
            yield f"{label}: " + ", ".join(line.replace(":", "") for key, item in value.items() for line in _json_lines(item, key))
            return
        for key, item in value.items():
            if key not in (named, state if name else None):
                yield from _json_lines(item, key)
    elif isinstance(value, list):
        yield f"\n{label}:" if label else ""
        for item in value:
            yield from [f"- {item}"] if isinstance(item, str) else _json_lines(item)
    elif value is not None:
        yield f"{label}: {({True: 'yes', False: 'no'}[value] if isinstance(value, bool) else value)}"


def _lines(text):
    """(kind, line), kind blank, bullet, heading or plain. Lines that were only wrapped are joined again, rules of dashes are dropped."""
    lines, previous = [("blank", [""])], ""
    for line in map(str.strip, text.splitlines()):
        if line.startswith("|"):  # a row of a table reads like "label: value"
            line = " : ".join(cell.strip() for cell in line.strip("|").split("|"))
        if line and not line.strip("-:=_*# \t"):
            continue
        is_heading = line.startswith("#") or re.fullmatch(r"\*\*[^*]+\*\*:?", line)
        kind = "blank" if not line else "bullet" if _BULLET.match(line) else "heading" if is_heading else "plain"
        wrapped = previous.endswith(",") or (len(previous) >= 45 and previous[-1] not in ".:;!?")
        if wrapped and kind == "plain" and lines[-1][0] != "heading" and not re.match(r"[^:.]{1,40}:(?:\s|$)", line):
            lines[-1][1].append(line)
        else:
            lines.append((kind, [line]))
        previous = line
    for (kind, parts), (_, following) in zip(lines, lines[1:] + lines[:1]):
        line = " ".join(parts)
        if following[0].startswith(("- ", "* ", "• ")) and not line.startswith(("-", "*", "•")) and len(line) < 50 and line[-1:] not in ".;!?,":
            kind = "heading"  # "2. Pneumothorax" above a list of dashes
        yield kind, line


def _sentences(line):
    start = 0
    for match in _SENTENCE_END.finditer(line):
        if not _ABBREVIATION.search(line[max(start, match.start() - 8):match.start()]):
            yield line[start:match.end()].strip()
            start = match.end()
    yield line[start:].strip()


def pieces(text):
    """(number of the line, its kind, sentence, piece of it, whether the piece is a label) of all that is about the image. O(length)."""
    skipped = begun = False
    for number, (kind, line) in enumerate(_lines(_unfold(text))):
        skipped = skipped and not (kind == "blank" and begun)
        for sentence in _sentences(_BULLET.sub("", line)):
            cuts = [(match.start(), match.end()) for match in _LABEL_END.finditer(sentence)]
            for (_, start), (end, _) in zip([(0, 0)] + cuts, cuts + [(len(sentence), 0)]):
                name = sentence[start:end].strip(" *_#").lower()
                is_label = end < len(sentence) or kind == "heading"
                if is_label and _SECTION.fullmatch(name):
                    skipped, begun = bool(_SKIPPED.fullmatch(name)), False
                elif skipped:
                    begun = begun or bool(name)
                elif name.strip(".,;x"):
                    yield number, kind, sentence, sentence[start:end], is_label
