"""Which class of which finding a text names, in the words that a task.json lists.

    phrases = Phrases({"Spots": ["spots"], "Holes": ["holes"]},
                      {"none": ["no {finding}", "{finding} are absent"],
                       "many": ["many {finding}"]})
    phrases.read("There are many spots. No holes.")
    -> {"Spots": ("many", "There are many spots"), "Holes": ("none", "No holes.")}

A phrase is words, {finding} for any of the finding's words, and * for up to four words that name no
finding. The layouts of chat models become lines first (unfold.py). Then a text is read in two ways;
what the first has read, the second leaves as it is:

 1. Items: a label and what is said of it, "Spots: many, holes: few", "**Spots**" above "Many", and
    "Many: spots". A class is told by its name, or by the words of its phrases without {finding} and
    without the verb beside it: "absent" of "{finding} are absent".
 2. Phrases in running text. A phrase ends with its clause and says nothing where it is denied.

docs/data.md has an example of each rule. Of several mentions of a finding the earliest counts.
"""

import itertools
import re
from typing import NamedTuple

from .findings_text import lines_of
from .unfold import unfold

LONGEST_LABEL = 80  # characters
GAP = 4  # how many words a * stands for at most
REACH = 120  # how many characters before a class what denies it is looked for
VERB = r"(?:is|are|was|were|be|been|has|have|had|seems?|appears?|looks?)"
# "not many spots", "no sign of many spots"; "not only many spots" denies nothing
DENIAL = (r"(?:\b(?:no|not|never|neither|nor|without|hardly|cannot|rather than|instead of|far from"
          r"|less than|anything but|doubt|false|untrue|incorrect|wrong|unlikely)|n't)\b"
          r"(?! (?:only|just|doubt|question))")
# "I would not call the spots severe", "it is unclear whether they are severe"
CALLED = re.compile(rf"{DENIAL}\W+(?:call|say|describe|consider|rate|grade|think)\b"
                    r"|\b(?:whether|unclear|uncertain|false|untrue|incorrect|wrong"
                    r"|(?<!no )(?<!without )doubt)\b",
                    re.IGNORECASE)
DENIES = re.compile(DENIAL, re.IGNORECASE)
# but "not severe but mild" says mild
DENIED = re.compile(rf"{DENIAL}\W+(?:(?!(?:but|and)\b)\w+\s+){{0,4}}$", re.IGNORECASE)
# A comma is looked at by itself.
CLAUSE_END = re.compile(
    r"[.;!?](?=\s|$)|[\n|\"{}]|:\s|\s[-–—]+\s|—"
    r"|\b(?:while|whereas|although|though|however)\b", re.IGNORECASE)
CHUNK_END = re.compile(r",|\b(?=but\b)", re.IGNORECASE)
JOINS = re.compile(r"\b(?:and|or|nor)\b|[&/]", re.IGNORECASE)
SUPPOSED = re.compile(r"\bif\b[^,]*", re.IGNORECASE)
LABEL_END = re.compile(r"\s*[:=]\s*|\s+[-–—]+>?\s+|\s*—\s*|\?\s+")
MARKS = re.compile(r"^[\W_]*(?:\(?\d{1,2}[.)]\s+)?[\W_]*|[\W_]+$")
HEADING = re.compile(r"\s*(?:#|\*\*[^*]+\*\*:?\s*$|.*:\s*$)")


class _Hit(NamedTuple):
    """A phrase that was found in a chunk of a clause.

    apart   1 where "and" or "or" stands between the class and the finding, 2 where the phrase is
            only the finding, else 0
    length  of what was matched, in words
    start   where it begins
    words   (start, end) of its words on the side of the class
    value   the class
    group   number of the findings that are named
    leads   whether the class stands before the findings
    """
    apart: int
    length: int
    start: int
    words: tuple
    value: str
    group: int
    leads: bool


class Phrases:
    """The compiled phrases of a task.

    findings  {finding: [words that name it]}
    classes   {class: [phrases]}
    positive  the classes that are disease; with one such class "yes" beside a label is that class,
              with one other class "no" is that one
    """

    def __init__(self, findings, classes, positive=()):
        named = sorted(((words, finding) for finding, words_of in findings.items()
                        for words in words_of), key=lambda pair: -len(pair[0]))
        self._finding_of = {" ".join(words.lower().split()): finding for words, finding in named}
        name = "|".join(rf"(?<!\w){_source(words)}(?!\w)" for words, _ in named)
        self._name = re.compile(name, re.IGNORECASE)
        self._phrases = [(value, *_running(phrase), _own_words(phrase))
                         for value, phrases in classes.items() for phrase in phrases]
        self._bare = _bare_words(classes, positive)
        self._beside = [(value, _beside(value)) for value in classes]
        self._group = self._compile_group(name, classes)

    def read(self, text):
        """What a text says.

        text  str of any length, in which JSON, tables, lists and headings are understood
        Returns {finding: (class, the line or clause that decided)}.
        """
        text, found = unfold(text.replace("\x00", " "), self._label), {}
        if not self._name.search(text):
            return found
        for way in (self._read_items, self._read_running):
            for finding, value, words in way(text):
                if finding not in found:
                    found[finding] = value, " ".join(words.split())
        return found

    def _compile_group(self, name, classes):
        """The expression of findings that are joined: "hemorrhage, exudates or hard drusen".

        Before the last one up to two words may stand that tell no class and deny nothing.
        """
        telling = {word.lower() for phrases in classes.values() for phrase in phrases
                   for word in phrase.split() if word not in ("{finding}", "*")}
        telling |= {word.lower() for value in classes for word in str(value).split()}
        telling |= {"no", "not", "without", "is", "are", "there", "has", "have", "with"}
        other = "|".join(map(re.escape, sorted(telling)))
        word = rf"(?!(?:{other})\b)[\w-]+\s+"
        joined = (rf"\s*,?\s*\b(?:or|nor)\s+(?:{word}){{0,2}}?"
                  r"|\s*,?\s*(?:\band\s+|&\s*)(?:the\s+)?|\s*[,/]\s*")
        return re.compile(rf"(?:{name})(?:(?:{joined})(?:{name}))*", re.IGNORECASE)

    def _findings_in(self, text):
        """The findings that a text names, in order."""
        names = (" ".join(match[0].lower().split()) for match in self._name.finditer(text))
        return tuple(dict.fromkeys(map(self._finding_of.get, names)))

    # ---------------------------------------------------------------------------- beside a label

    def _label(self, text):
        """The findings of a label; () where it says anything else beside."""
        if len(text) > LONGEST_LABEL:
            return ()
        text = MARKS.sub("", text)
        if len(re.findall(r"\w+", self._name.sub("", text))) > 3:
            return ()
        groups = self._group.findall(text)
        return self._findings_in(groups[-1]) if groups and not self._class_of(text) else ()

    def _class_of(self, said):
        """The class that is told first in what is said of a label; None without any."""
        first, lower = None, said.lower()
        for value, needle, expression in self._bare:
            if needle not in lower:
                continue
            for match in expression.finditer(said):
                if not DENIED.search(said[max(0, match.start() - REACH):match.start()]):
                    if first is None or match.start() < first[0]:
                        first = match.start(), value
                    break
        return first and first[1]

    def _class_alone(self, text):
        """The class that a text tells and nothing else; None where it says more."""
        text = MARKS.sub("", text) if len(text) <= LONGEST_LABEL else ""
        return next((value for value, _, words in self._bare if words.fullmatch(text)), None)

    def _read_items(self, text):
        """Yields (finding, class, line) of labels, headings and lists below a class."""
        waiting, ruling, left = (), None, 0
        for kind, line in lines_of(text):
            if kind == "blank":
                continue
            items = list(self._items(line))
            for names, said in items:
                if (value := self._class_of(said)) and not said.rstrip().endswith("?"):
                    yield from ((finding, value, line) for finding in names)
            heading = () if items else self._label(line.rsplit(":", 1)[-1] or line)
            if heading or items or self._name.search(line) or HEADING.match(line):
                if ruling and kind == "bullet" and not items:
                    yield from ((finding, ruling, line) for finding in self._findings_in(line)
                                if not self._class_of(line))
                waiting, left = heading, 3
                # "Spots:" alone waits for the lines below it
                waiting = waiting or next((names for names, said in items if not said.strip()), ())
            elif waiting and left:
                left -= 1
                if value := self._class_of(line):
                    yield from ((finding, value, line) for finding in waiting)
                    waiting = ()
            if kind != "bullet":
                ruling = self._class_alone(line)

    def _items(self, line):
        """Yields (findings, what is said of them) of a line's labels: "Spots: many, holes: few".

        Of "Many: spots" it yields (findings, "Many").
        """
        parts = LABEL_END.split(line)
        tails = [parts[0], *map(self._tail, parts[1:])]
        for at, (label, said) in enumerate(zip(tails, parts[1:])):
            if at + 2 < len(parts):
                said = said[:len(said) - len(tails[at + 1])]
            if names := self._label(label[1 + max(label.rfind(mark) for mark in ",;.|("):]):
                other = self._name.search(said)
                yield names, said[:other.start()] if other else said
            elif self._class_alone(label) and self._findings_in(said):
                yield self._findings_in(said), label

    def _tail(self, part):
        """The end of what stands between two labels, which is the second label; "" for none."""
        if cut := 1 + max(part.rfind(mark) for mark in ",;.|("):
            return part[cut:]
        names = [match.start() for match in self._name.finditer(part)]
        return part[names[-1]:] if names else ""

    # ------------------------------------------------------------------------------ running text

    def _read_running(self, text):
        """Yields (finding, class, clause) of the phrases, clause by clause."""
        for _, line in lines_of(text):
            start = 0
            for match in [*CLAUSE_END.finditer(line), None]:
                clause = line[start:match.end() if match else len(line)]
                # what is asked or supposed says nothing
                if self._name.search(clause) and not clause.rstrip().endswith("?"):
                    said = SUPPOSED.sub("", clause.rstrip(".;!:|\"{}[]"))
                    for pair in self._read_clause(said):
                        yield *pair, clause
                start = match.end() if match else start

    def _read_clause(self, clause):
        """Yields (finding, class) of a clause, the earliest first.

        A phrase reaches over a comma only where nothing is named behind it: "hemorrhages, severe".
        """
        chunks = self._chunks(clause)
        for at, chunk in enumerate(chunks):
            if not self._name.search(chunk):
                continue
            read = self._read_chunk(chunk)
            behind = list(itertools.takewhile(lambda other: not self._name.search(other),
                                              chunks[at + 1:at + 3]))
            more = [f"{chunk} {other}" for other in behind]
            before = chunks[at - 1] if at else ""
            if before and len(before.split()) < 4 and not self._name.search(before):
                more += [] if self._answers(before) else [f"{before} {chunk}"]
            for text in more:
                if set(self._findings_in(chunk)) - read.keys():
                    read = self._read_chunk(text) | read
            yield from read.items()

    def _answers(self, chunk):
        """Whether a chunk is no more than "yes" or "no"."""
        return chunk.strip(" .!*_").lower() in ("yes", "no")

    def _chunks(self, clause):
        """A clause cut at "but" and at its commas, not at those between joined findings."""
        chunks, start, joined = [], 0, bytearray(len(clause) + 1)
        for match in self._group.finditer(clause):
            joined[slice(*match.span())] = b"x" * len(match[0])
        for match in CHUNK_END.finditer(clause):
            if not joined[match.start()]:
                chunks.append(clause[start:match.start()])
                start = match.end()
        return [*chunks, clause[start:]]

    def _read_chunk(self, chunk):
        """{finding: class} of a chunk, the earliest first."""
        groups = []

        def number(match):
            groups.append(match[0])
            return f"\x00{len(groups) - 1}\x00"

        marked = self._group.sub(number, chunk)
        read, taken = {}, bytearray(len(marked))
        for hit in sorted(self._hits(marked)):
            if any(taken[slice(*hit.words)]) or (hit.apart == 2 and hit.group in read):
                continue  # a class is told of the findings that are nearest
            taken[slice(*hit.words)] = b"x" * (hit.words[1] - hit.words[0])
            read.setdefault(hit.group, {}).setdefault(hit.leads, hit)
        told = {}
        for group, hits in sorted(read.items()):
            for finding, value in self._share(groups[group], hits):
                told.setdefault(finding, value)
        return told

    def _hits(self, marked):
        """Yields the _Hit of every phrase in a chunk whose groups are \\x00NUMBER\\x00."""
        lower = marked.lower()
        for value, expression, denies, words in self._phrases:
            if all(word in lower for word in words):
                for match in _overlapping(expression, marked):
                    hit = _hit(match, value)
                    # what may deny it stands before its words, or between the finding and the last
                    before = marked[max(0, hit.start - REACH):hit.start]
                    inside = match[0][:-len(words[-1])] if words else ""
                    said = before if hit.leads else inside
                    called = CALLED.search(marked[max(0, match.start() - REACH):match.start()])
                    if not called and (denies or not DENIED.search(said)):
                        yield hit
        for value, expression in self._beside:
            if str(value).lower() in lower:
                yield from (_hit(match, value) for match in expression.finditer(marked))

    def _share(self, names, hits):
        """Yields (finding, class) of joined findings.

        names  as they stand: "hemorrhage and exudates"
        hits   {True: the class before them, False: the class behind them}
        Of "no hemorrhage and exudates are severe" each takes its own; in "spots, holes are rare"
        nothing is said of the first.
        """
        findings = self._findings_in(names)
        before, behind = hits.get(True), hits.get(False)
        is_list = JOINS.search(names)  # and no mere comma between two statements
        if behind and (before or not is_list):
            yield findings[-1], behind.value
            findings = findings[:-1]
        chosen = before or (behind if is_list else None)
        if chosen:
            yield from ((finding, chosen.value) for finding in findings)


# --------------------------------------------------------------------------------- compiling

def _source(words):
    """The expression of some words, whatever blanks are between them."""
    return r"\s+".join(map(re.escape, words.split()))


def _own_words(phrase):
    """The words of a phrase that any text must have in which it is found, in lower case."""
    return [word.lower() for word in phrase.split() if word not in ("{finding}", "*")]


def _running(phrase):
    """(expression, whether it denies by itself) of a phrase in a chunk of marked groups."""
    between, expression = r"[^\w\x00]+", ""
    for token in phrase.split():
        if token == "*":
            expression += rf"(?:{between}\w+){{0,{GAP}}}?" if expression else ""
            continue
        expression += between if expression else ""
        if token == "{finding}":
            # the first one is told of
            number = r"\d+" if "(?P<group>" in expression else r"(?P<group>\d+)"
            expression += rf"\x00{number}\x00"
        else:
            expression += rf"(?<!\w){re.escape(token)}(?!\w)"
    denies = bool(DENIES.search(phrase))
    return re.compile(expression, re.IGNORECASE), denies


def _beside(value):
    """The expression of a class's name beside a finding: "spots (many) and holes (few)"."""
    mark = r"[^\w\x00]"
    return re.compile(rf"(?:^|\band\b){mark}*\x00(?P<group>\d+)\x00{mark}+{_source(str(value))}"
                      rf"(?={mark}*(?:$|\band\b))", re.IGNORECASE)


def _bare_words(classes, positive):
    """[(class, a word that must be there, expression)] of the words that tell a class of a label.

    The longer ones are first.
    """
    told = [(value, str(value).split()) for value in classes]
    told += [(value, _without_finding(phrase)) for value, phrases in classes.items()
             for phrase in phrases]
    healthy = [value for value in classes if value not in positive]
    told += [(value, [word]) for values, words in ((list(positive), ("yes", "true")),
                                                   (healthy, ("no", "false")))
             if positive and len(values) == 1 for value in values for word in words]
    bare = [(value, words[0].lower(), _apart(words)) for value, words in told if words]
    return sorted(bare, key=lambda row: -len(row[2].pattern))


def _apart(words):
    """The expression of words with up to GAP others between each two of them.

    Of each word it takes the nearest one: to try the others too would take 5 times as long a word.
    """
    expression = rf"(?<![\w.]){re.escape(words[0])}"
    for word in words[1:]:
        expression += rf"(?>\W+(?:\w+\W+){{0,{GAP}}}?{re.escape(word)}(?!\w))"
    return re.compile(rf"{expression}(?!\w|\.\d)", re.IGNORECASE)


def _without_finding(phrase):
    """The words of a phrase that tell its class beside a label; [] where none are left."""
    words = [word for word in phrase.split() if word not in ("{finding}", "*")]
    while words and re.fullmatch(VERB, words[0]):
        words.pop(0)
    while words and re.fullmatch(VERB, words[-1]):
        words.pop()
    return words


def _overlapping(expression, text):
    """Yields the matches of an expression, also those that begin inside another."""
    match = expression.search(text)
    while match:
        yield match
        match = expression.search(text, match.start() + 1)


def _hit(match, value):
    """The _Hit of a match of a phrase's expression."""
    group = match.start("group") - 1, match.end("group") + 1
    leads = match.start() < group[0]
    words = (match.start(), group[0]) if leads else (group[1], match.end())
    said = match.string[slice(*words)]
    # a phrase that is only {finding} comes last of all
    apart = 1 if JOINS.search(said) else 2 if not said else 0
    return _Hit(apart, len(match[0].split()), match.start(), words, value, int(match["group"]),
                leads)

