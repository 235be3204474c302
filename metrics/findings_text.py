"""How findings.py cuts a text.

A text that was unfolded (unfold.py) is cut into lines, lines into sentences, sentences into labels
and what is said of them.
"""

import re

from . import findings_phrases as vocabulary
from .unfold import cells_of, is_row

_SKIPPED = re.compile(vocabulary.SKIPPED_SECTIONS)
_SECTION = re.compile(f"{vocabulary.SKIPPED_SECTIONS}|{vocabulary.OTHER_SECTIONS}")
_BULLET = re.compile(r"^(?:[-*•+–·]|\(?\d{1,2}[.)])\s+|^(?=[✓✔✅❌✗✘☐☑☒])")
# its first character begins a run of .!? so that a long one is looked at once
_SENTENCE_END = re.compile(
    r"(?<![.!?])(?:[.!]|\?(?=[.!?])|(?<=\S)\?)[.!?]*[\"')\]*_]*(?=\s|$)"
    r"|(?<=[a-z]{3})\.(?=[A-Z])")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:dr|mr|mrs|ms|vs|e\.g|i\.e|cf|approx|st)$", re.IGNORECASE)
_LABEL_END = re.compile(r":(?=[\s*_]|$)|\s[-–—]+\s|—")
# boxes, ticks and signs: "[x] edema", "edema (-)"; few sentences have one
_HAS_SIGN = re.compile(
    r"[\[(✓✔✅☑☒❌✗✘☐]|^\s*[-–−+yn]\s*$|\s[-–−+]\s*(?:[,;]|$)")
_SIGNS = [(re.compile(pattern), new) for pattern, new in (
    (r"\((?:no|negative|absent|[-–−])\)|^\s*[-–−n]\s*$", " absent"),
    (r"\((?:yes|positive|present|\+)\)|^\s*[+y]\s*$", " present"),
    (r"[❌✗✘☐]\W{0,5}$", " absent"), (r"[✓✔✅☑☒]\W{0,5}$", " present"),
    (r"\(\?\)", " possible"),
    (r"(?<=\w) [-–−](?=\s*(?:[,;]|$))", " absent"),
    (r"(?<=\w) \+(?=\s*(?:[,;]|$))", " present"),
    (r"^\[ ?\]", "no "), (r"^\[[x✓✔]\]", ""),  # a box before its finding
    (r"\[ ?\]", " absent"), (r"\[[x✓✔]\]", " present"),
    (r"[❌✗✘☐]", " no "), (r"[✓✔✅☑☒]", " "))]
_SPELLINGS = [(re.compile(pattern), new) for pattern, new in (
    (r"_{3,}", " xxxx "),  # a de-identified blank
    (r"[*_`#~]+", ""), (r"’", "'"), (r"\bwith/without\b", "with or without"),
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
    for pattern, new in [*(_SIGNS if _HAS_SIGN.search(text) else ()), *_SPELLINGS]:
        text = pattern.sub(new, text)
    return text.strip()


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
    for number, (kind, line) in enumerate(lines_of(text)):
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
