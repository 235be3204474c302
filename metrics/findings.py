"""Which of the 14 CheXpert / MIMIC-CXR findings a text asserts about a chest radiograph.

    read_findings("No pneumothorax. Small left effusion, possibly pneumonia.")
    -> {"Pneumothorax": Reading(0, "No pneumothorax."), "Pleural Effusion": Reading(1, ...),
        "Pneumonia": Reading(-1, ...)}

It reads by rules, without a model: radiology reports and answers of chat models, JSON included; a
bare "Yes" is read together with the question before it.

The layouts of chat models become lines (unfold.py), and a text is cut into sentences and, at colons
and dashes, into labels and what is said of them (findings_text.py). In each piece one regular
expression finds mentions and cues (the vocabulary is in findings_phrases.py). A sweep to the right
carries "no", "possible", "history of" to what follows; a sweep to the left carries "is absent",
"cannot be excluded", "is enlarged" to what precedes; conjunctions and verbs end a scope.

The conventions are those of the CheXpert labeler (Irvin et al. 2019,
stanfordmlgroup/chexpert-labeler) and of NegBio (Peng et al. 2018), without their parser and without
their code:

 1. Over the mentions of a finding, positive > uncertain > negative. "No definite X" is negative,
    "no new X" is uncertain.
 2. "No Finding" is 1 if no other finding except Support Devices and no other abnormality
    (emphysema, granuloma, hernia, ...) is positive or uncertain; else it is absent, never 0. Unlike
    the labeler's, it needs a text that says something: a finding that is denied, "lungs are clear",
    "no acute process". An empty text gives {}.
 3. "likely", "consistent with", "suggestive of" are positive; "A or B", "A versus B", "probable",
    "may represent" are uncertain, and so is "concerning for X", which many radiologists mean as
    positive.
 4. Heart size: "upper limits of normal" is 0, "borderline" -1, "borderline enlarged" 1, "stable"
    alone -1.
 5. Heart failure is Edema and uncertain Cardiomegaly; vascular congestion is uncertain Edema;
    fibrosis is Pleural Other. Radiologists' own labels seldom share these.
 6. A negation ends where a new statement begins behind "and" or a comma: "no pneumothorax, and a
    small effusion is present", "no edema and a nodule". "No consolidation and effusion" denies
    both.
 7. Ours: pleural plaques are Pleural Other; "history of X", questions, definitions, what "would be
    seen", recommendations and the sections in SKIPPED_SECTIONS (indication, comparison, ...) say
    nothing about the image. Sentences in another language than English are not read.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from . import findings_phrases as vocabulary
from .findings_text import normalise, pieces
from .unfold import unfold

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum",
            "Fracture", "Lung Lesion", "Lung Opacity", "No Finding", "Pleural Effusion",
            "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices")
POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1


class Reading(NamedTuple):
    """What a text says of one finding.

    value     1 positive, 0 negative, -1 uncertain
    sentence  the one that decided it
    """

    value: int
    sentence: str


class _Mention(NamedTuple):
    """One place of a text that says something of a finding."""

    finding: str
    value: int
    sentence: str


@dataclass(slots=True)
class _Event:
    """A mention or cue in a piece of text, and what the sweeps find out about it."""

    start: int
    end: int
    kind: str
    findings: tuple
    rules_right: bool = False  # "resolved effusion" (True) against "effusion has resolved"
    status: str = None         # a status word after negation: "not enlarged" is normal
    before: str = None         # what the words before it say: neg, unc, unc!, ign
    after: str = None          # what the words after it say: neg, unc
    status_before: str = None  # the same for the status of an organ
    status_after: str = None


# ------------------------------------------------------------------------------ the vocabulary

def _phrases():
    """Every phrase -> (kind, findings). A phrase listed under two findings is a mention of both."""
    tables = [("mention", vocabulary.MENTIONS), ("weak", vocabulary.WEAK_MENTIONS),
              ("failure", vocabulary.HEART_FAILURE), ("anatomy", vocabulary.ANATOMY)]
    rows = [("other", vocabulary.OTHER_ABNORMALITIES), *vocabulary.CUES.items(),
            ("nothing", vocabulary.NOT_MENTIONS)]
    tables += [(kind, {None: row}) for kind, row in rows]
    phrases = {}
    for kind, table in tables:
        for finding, row in table.items():
            for entry in row.split("|"):
                first, _, rest = entry.partition(" ")
                for phrase in (f"{word} {rest}".strip() for word in first.split("/")):
                    _, findings = phrases.get(phrase, (kind, ()))
                    phrases[phrase] = kind, findings + ((finding,) if finding else ())
    return phrases


def _place(phrase):
    """The key that sorts phrases: by first letter, then more words first ("~" is half a word)."""
    return phrase[0], phrase.count("~") / 2 - len(phrase.split()), phrase


def _expression(phrase):
    """The source of a phrase's regular expression, one group."""
    words = phrase.replace("*", r"\w*").split()
    said = " ".join(f"(?:{word.replace('/', '|')})" if "/" in word else word for word in words)
    return rf"({said})(?!\w)".replace(" ~ ", rf" (?:(?:{vocabulary.DEGREE}) ){{0,3}}")


def _compile():
    """One regular expression for all phrases, and the (kind, findings) of its groups from 1 on."""
    letters, kinds = {}, [None]
    phrases = _phrases()
    for phrase in sorted(phrases, key=_place):
        letters.setdefault(phrase[0], []).append(_expression(phrase))
        kinds.append(phrases[phrase])
    branches = (f"(?={letter})(?:{'|'.join(sources)})" for letter, sources in letters.items())
    return re.compile(rf"\b(?:{'|'.join(branches)})|[,;()?]"), kinds


_PHRASE, _KINDS = _compile()
_GENERIC = re.compile("|".join(vocabulary.GENERIC))
_REFUSAL = re.compile("|".join(vocabulary.REFUSALS))
_DEFINITION = re.compile(vocabulary.DEFINITION)
_THIS_IMAGE = re.compile(vocabulary.THIS_IMAGE)
_CLAUSE_START = re.compile(rf"(?:,? and)? (?:{vocabulary.CLAUSE_STARTS})\b")
# "no pneumothorax, | and pneumonia cannot be excluded"
_OWN_DOUBT = re.compile(
    r"(?:,? and)? (?:[^\s,]+ ){1,5}(?:can)?not (?:\w+ ){0,3}(?:excluded|ruled out)")
# "no pneumothorax and | effusions have developed", "... and | atelectasis persists"
_OWN_VERB = re.compile(
    r"(?:,? and)? (?:[^\s,]+ ){1,5}(?:(?:has|have|had) (?!not)"
    r"|(?:persist|remain|worsen|increas|develop|appear)(?:s|ed)?\b"
    r"|(?:is|are) (?:\w+ )?(?:stable|unchanged|enlarged|increased|larger|worse|improved|decreased"
    r"|smaller|new)\b)")
# "no pneumothorax, | chest tube in good position"
_OWN_DEVICE = re.compile(
    r"(?:,? and)? (?:[^\s,]+ ){0,3}(?:tube|catheter|line|lead|pacemaker|picc|port|device)s?"
    r" (?:tip|in|with|terminat|end|project|overl|remain|is|are)")
# "no pneumothorax, and | a nodule is seen"; but "no pneumothorax, nodule, and mass is seen"
_IS_THERE = re.compile(
    r"(?:,? and)? (?:[^\s,]+ ){1,5}(?:is|are|was|were) (?!not|no\b|absent|ruled)")
# "no consolidation and | a moderate effusion"; but "without a mass and a nodule" denies both
_OWN_ARTICLE = re.compile(r"(?:,? and)? (?:a|an|one|two|several) ")
_ARTICLE = re.compile(r"\b(?:a|an|any)\b")
_COPULA = re.compile(r"\b(?:is|are|was|were)\b")
# "enlarged and | stable", which is one status
_STILL = re.compile(r" (?:stable|unchanged|unaltered|similar)\b")
_STILL_END = re.compile(r"\W*$|[,;]| (?:from|since|compared|in|to|when)\b")
_WORD = re.compile(r"[^\W\d_]+")
_LATIN = re.compile(r"[a-zà-ÿ]")
_SIDE = re.compile(r"\b(?:left|right)\b")
_SIDE_END = re.compile(r"[,;]| but | while ")
# a probability is no answer
_NO_ANSWER = re.compile(
    r"(?:\d*\.\d+|\d+ ?%|n/?a|null|unknown|not (?:applicable|assessed|mentioned|reported))\W*")
_QUESTION = re.compile(
    r"(?:is|are|was|does|do|did|can|could|would|should|has|have|what|which|how|where|why)\b.*\?$")

_MENTIONS = {"mention", "weak", "failure", "other", "disease"}
_TARGETS = _MENTIONS | {"anatomy", "noun"}
_STATUSES = {"stable": UNCERTAIN, "normal": NEGATIVE, "borderline": UNCERTAIN, "unseen": UNCERTAIN,
             "abnormal": POSITIVE}
_STRENGTH = tuple(_STATUSES).index  # of two statuses side by side the stronger one counts
_OPPOSITE = {"abnormal": "normal", "normal": "abnormal"}
_LEFT_ENDS = ("affirm", "still", "neg", "unc", "unc!", "ign", "neg<>", "unc<>")
_JOINING = ("and", "or", ",", "(", ")", "abnormal", "?")  # in a piece that only names findings


# ---------------------------------------------------------------------------- events and sweeps

def _events(text):
    """The mentions and cues of a normalised piece, left to right, with their directions."""
    events, negated = [], None  # where the negation begins that is still at work
    for match in _PHRASE.finditer(text):
        kind, findings = _KINDS[match.lastindex] if match.lastindex else (match[0], ())
        last = events[-1] if events else None
        if last and last.kind == "abnormal" and _joins_status(kind, events, text, match.end()):
            kind = "nothing"
        elif kind in (",", "and") and _begins_clause(text, match, negated):
            kind = "break"
        elif kind == "," and last and last.kind == "neg" and last.end == match.start():
            last.kind = "neg<"  # "No, there is ..." is an answer and negates nothing that follows
        elif kind == "?" and match.end() < len(text):
            kind = "unc"
        if kind == "neg":
            negated = match.end() if negated is None else negated
        elif kind in ("break", ";"):
            negated = None
        if kind != "nothing":
            events.append(_Event(match.start(), match.end(), kind, findings))
    _mark_directions(events)
    return events


def _joins_status(kind, events, text, end):
    """Whether a comma, "and" or "but" that ends at `end` joins the last status to "stable".

    It does in "enlarged and stable heart", and not in "heart enlarged, stable mediastinum".
    """
    still = _STILL.match(text, end) if kind in (",", "and", "break") else None
    if not still:
        return False
    attributive = kind != "," and all(event.kind != "anatomy" for event in events)
    return attributive or bool(_STILL_END.match(text, still.end()))


def _begins_clause(text, match, negated):
    """Whether a new statement begins behind a comma or an "and".

    text     of the piece
    match    of the comma or "and"
    negated  where the words begin that a negation rules, or None
    """
    end = match.end()
    if _CLAUSE_START.match(text, end):
        return True
    if negated is None:
        return False
    if any(own.match(text, end) for own in (_OWN_DOUBT, _OWN_VERB, _OWN_DEVICE)):
        return True
    denied = text[max(negated, match.start() - 300):match.start()]
    # "no pneumothorax is seen and", "no pneumothorax, and"; in "no pneumothorax, nodule, and" a
    # list goes on
    lists = "," in denied or not text.startswith(", and", match.start())
    whole = _COPULA.search(denied) or not lists
    if whole and _IS_THERE.match(text, end):
        return True
    return bool(_OWN_ARTICLE.match(text, end) and not _ARTICLE.search(denied))


def _mark_directions(events):
    """Marks what rules to the right: a noun follows nearby, and no noun and verb precede."""
    target = None  # where the next noun begins, if nothing that cannot precede it is in between
    before = zip(events[::-1], events[-2::-1] + [None], events[-3::-1] + [None, None])
    for event, one_back, two_back in before:
        if event.kind in _TARGETS:
            target = event.start
        elif event.kind not in _STATUSES and not event.kind.endswith("<>"):
            target = None
        predicative = two_back and one_back.kind == "copula" and two_back.kind in _TARGETS
        near = target is not None and target - event.end <= 60
        event.rules_right = near and not predicative and event.kind != "unseen"


def _status(kind, state, used):
    """A status word under the state before it: "not enlarged" is normal."""
    if state == "neg" and not used:
        return _OPPOSITE.get(kind, kind)
    if state in ("unc", "unc!") and kind == "abnormal":
        return "borderline"
    return kind


def _outlasts(state, cue, used):
    """Whether a state remains under a new cue."""
    if state == "neg":  # negation outlasts doubt: "no findings suspicious for"
        return cue == "unc" or (cue == "ign" and not used)
    return state == "ign" or (state == "unc!" and cue == "unc")


def _sweep_right(events, state):
    """Carries cues to what follows them.

    events  of a piece, left to right; `before`, `status`, `status_before` of each are set
    state   what rules the piece from its beginning, or None
    Returns the state that still waits for its finding ("No evidence of the following:"), or None.
    """
    status = aside = None
    used = answered = status_used = soft = negated = False
    for event in events:
        kind, cue = event.kind, None
        if kind in _STATUSES and state != "ign":
            event.status = _status(kind, state, used)
            if event.rules_right:
                beside = status and not status_used
                status = max(event.status, status, key=_STRENGTH) if beside else event.status
                status_used = False
        event.before, event.status_before = state, status
        if kind in _TARGETS:
            used = status_used = True
            answered = answered or bool(event.findings)
        elif kind in ("neg", "unc", "unc!", "ign") or (kind.endswith("<>") and event.rules_right):
            cue = kind.rstrip("<>")
        elif kind == "purpose" and negated:
            cue = "neg"
        elif kind in ("break", ";"):
            state = status = None
        elif kind in ("copula", "with", "there") and used and state != "ign":
            state = status = None
        elif kind == "," and soft:
            state = None
        elif kind == "(":
            aside = state
        elif kind == ")":
            state = aside
        if cue and not _outlasts(state, cue, used):
            state, used, answered = cue, False, False
            soft, negated = kind == "unc<>", negated or cue == "neg"
    return None if answered else state


def _sweep_left(events):
    """Carries cues to what precedes them: sets `after` and `status_after` of each event."""
    state = status = None
    verbs, used, listed, beside, apart = 0, False, False, False, False
    for event in reversed(events):
        kind = event.kind
        # "widened mediastinum, heart normal": the first has a status of its own
        event.after, event.status_after = state, None if apart and event.status_before else status
        apart = apart or (kind == "," and used)
        turns_left = kind.endswith("<>") and not event.rules_right
        if kind in _TARGETS:
            used, beside = True, False
        elif kind in ("neg<", "unc<", "unseen", "?") or turns_left:
            state = "neg" if kind.startswith("neg") else "unc"
            verbs, used, listed = 0, False, False
        elif kind in _LEFT_ENDS or kind in _STATUSES:
            state = None
        elif kind in ("copula", "verb"):
            verbs, beside = verbs + 1, False
            if verbs > 1:
                state = status = None
        elif kind in ("break", ";", "with", "there"):
            state = status = None
        elif kind in ("and", "or"):
            listed = True
        elif kind == "," and used and not listed:
            # "cardiomegaly, pneumothorax not seen" against "A, B and C are absent"
            state = None
        if event.status and not event.rules_right:
            joined = status and (beside or (kind == "stable" and not used))  # "normal and stable"
            status = max(event.status, status, key=_STRENGTH) if joined else event.status
            verbs, used, beside, apart = 0, False, True, False


def _mark_contrasts(events):
    """What is denied and then goes on is there: "resolved left but persists on the right"."""
    goes_on = beyond = own = False
    for event in reversed(events):
        if event.kind in ("break", ";", "with"):
            goes_on, beyond, own = False, goes_on and event.kind == "break", False
        elif event.kind == "still":
            goes_on = not own
        elif event.kind in _TARGETS:
            event.after = None if beyond else event.after
            goes_on, beyond, own = False, False, True


def _mark_alternatives(events):
    """Mentions joined by "or", "versus" are uncertain unless something else is said of them.

    "A, B, or C" joins all three; in "opacity, atelectasis or pneumonia" the first is there and the
    others may explain it.
    """
    for at, middle in enumerate(events):
        if middle.kind not in ("or", "versus"):
            continue
        right = events[at + 1] if at + 1 < len(events) else None
        lists = at and events[at - 1].kind == "," and middle.start - events[at - 1].end <= 1
        last = at - 2 if lists else at - 1  # where the mention before it is
        precedes = (last >= 0 and events[last].kind in _TARGETS
                    and middle.start - events[last].end <= 15)
        follows = right and right.kind in _TARGETS and right.start - middle.end <= 40
        if precedes:
            # "A, B or both"
            both = middle.end - middle.start > len("or") and middle.kind == "or"
            for left in _listed(events, last) if lists or both else [events[last]]:
                left.after = left.after or "unc"
        if follows and (precedes or middle.kind == "versus"):
            right.after = right.after or "unc"


def _listed(events, last):
    """The mentions of a list "A, B" whose last one is events[last], right to left."""
    expected = "target"
    for at in range(last, -1, -1):
        event = events[at]
        is_target = event.kind in _TARGETS
        is_explained = "Lung Opacity" in event.findings and at != last
        if is_target != (expected == "target") or is_explained or not (
                is_target or event.kind == ","):
            return
        if is_target:
            yield event
        expected = "," if is_target else "target"


# -------------------------------------------------------------------------- pieces of a sentence

class _Piece:
    """A piece of a sentence, read.

    values       [(finding, value)] that it says by itself
    labels       [(finding, kind)] that the next piece may answer; kind is "mention" or "anatomy"
    open_state   what still waits for its finding: "No evidence of the following:"
    list_state   what it says of a list below it, as the label "Absent:"
    is_normal    it calls something normal
    is_abnormal  it names an abnormality that is not one of the 14
    is_bare      it only names findings
    is_question  it asks; an open question ("Is there edema?") asserts nothing, "Left effusion?" is
                 a doubt
    """

    def __init__(self, text, state):
        self.text = text = normalise(text)
        self.events = events = _events(text)
        generic = _is_generic(text, events)
        waiting = _sweep_right(events, "ign" if generic else state)
        self.open_state = "ign" if generic else waiting
        _sweep_left(events)
        _mark_contrasts(events)
        _mark_alternatives(events)
        about = [] if generic else [event for event in events if event.before != "ign"]
        self.values, self.labels = _values_and_labels(about)
        self.list_state = _list_state(text, events)
        self.is_abnormal = any(event.kind == "other" and _value(event) != NEGATIVE
                               for event in about)
        said_alone = text.strip(".! ") in ("normal", "unremarkable", "within normal limits")
        self.is_normal = said_alone or _calls_normal(about)
        self.is_bare = all(event.kind in _TARGETS or event.kind in _JOINING for event in events)
        self.is_open_question = bool(_QUESTION.match(text))
        self.is_question = self.is_open_question or (self.is_bare and text.endswith("?"))
        if self.is_question or (self.is_bare and len(text) <= 80):
            self.labels += [(finding, "mention") for finding, value in self.values
                            if value != NEGATIVE]

    def answers(self, labels, asked):
        """What this piece says of the labels before it: "Pneumothorax: none seen".

        labels  [(finding, kind)] of the piece before it
        asked   whether that was a question
        Returns [(finding, value)].
        """
        skipped = ("copula", "noun", "with", "there", "verb")
        first = next((event for event in self.events if event.kind not in skipped), None)
        answered = first and (first.kind in ("neg", "neg<", "affirm", "still")
                              or (first.kind.startswith("unc") and not self.values))
        if self.open_state == "ign" or (asked and not answered) or _NO_ANSWER.fullmatch(self.text):
            return []
        sides = _SIDE_END.split(self.text)  # "none on the left, small on the right"
        if len(sides) > 1 and all(len(_SIDE.findall(side)) == 1 for side in sides):
            return [answer for side in sides
                    for answer in _Piece(side, None).answers(labels, asked=False)]
        status = next((event.status for event in self.events if event.status), None)
        given = {"mention": _answer(self.text, first), "anatomy": _STATUSES.get(status)}
        read = {finding for finding, _ in self.values}
        return [(finding, given[kind]) for finding, kind in labels
                if finding not in read and given[kind] is not None]


def _answer(text, first):
    """The value that an answer gives, read from its first cue; without one the text affirms."""
    if first and first.start <= 40:
        if first.kind.startswith(("neg", "normal", "clear", "sharp")):
            return NEGATIVE
        if first.kind.startswith("un"):  # unc, unseen
            return UNCERTAIN
    return {"0": NEGATIVE, "-1": UNCERTAIN}.get(text, POSITIVE)


def _values_and_labels(events):
    """[(finding, value)] and, of organs without a status, [(finding, "anatomy")] of the events."""
    values, labels = [], []
    for event in events:
        value = _value(event)
        if event.kind == "anatomy" and value is None:
            labels += [(finding, "anatomy") for finding in event.findings]
        elif event.kind in _TARGETS:
            values += [(finding, value) for finding in event.findings]
        if event.kind == "failure" and value != NEGATIVE:
            values.append(("Cardiomegaly", UNCERTAIN))
    return values, labels


def _calls_normal(events):
    """Whether a noun is called clear or normal, or disease in general is denied."""
    well = any(event.kind == "clear" or event.status == "normal" for event in events)
    return any((event.kind in ("noun", "anatomy") and well)
               or (event.kind == "disease" and _value(event) == NEGATIVE) for event in events)


def _list_state(text, events):
    """What a label says of the list below it: "neg", "unc" or None."""
    kinds = [event.kind for event in events if event.kind not in ("copula", "disease", "noun")]
    only = kinds[0] if len(kinds) == 1 else ""
    if only.startswith("neg<") or text.startswith("negative"):
        return "neg"
    doubts = only.startswith("unc<") or "differential" in text or text.startswith("ddx")
    return "unc" if doubts else None


def _is_generic(text, events):
    """True for sentences about medicine in general: "Pleural effusion refers to ..."."""
    if _THIS_IMAGE.search(text):
        return False
    first = events[0] if events and not text.startswith("the ") else None
    named = first and first.kind in _MENTIONS and first.start <= 25
    return bool((named and _DEFINITION.match(text, first.end)) or _GENERIC.search(text))


def _value(event):
    """1, 0, -1 of a mention or noun; of an organ the value of its status, None without one."""
    if event.kind == "anatomy":
        return _STATUSES.get(event.status_after or event.status_before)
    if event.before != "unc!" and "neg" in (event.before, event.after):
        return NEGATIVE
    return UNCERTAIN if event.before or event.after or event.kind == "weak" else POSITIVE


# -------------------------------------------------------------------------------- the whole text

def _read(text):
    """Reads a text.

    Returns its [_Mention], the first sentence that calls something normal (or None), and whether
    there is another abnormality than the 14 findings.
    """
    mentions, normal, abnormal = [], None, False
    labels, label_text, asked, was_label, unanswered = [], "", False, False, []
    last_number = last_sentence = list_state = state = None
    is_mixed = _may_be_foreign(text)
    for number, kind, sentence, part, is_label in pieces(unfold(text, _names_finding)):
        if is_mixed and sentence is not last_sentence and _is_foreign(sentence):
            continue
        if number != last_number:  # a line that ends in a label rules the list below it
            list_state = state if was_label else list_state if kind == "bullet" else None
        piece = _Piece(part, state if sentence is last_sentence else list_state)
        # "Absent:" above a list
        state = piece.open_state or (is_label and piece.list_state) or list_state
        is_label = is_label or piece.is_question
        if labels and not (is_label and piece.is_bare):
            said = sentence if label_text in sentence else f"{label_text} {sentence}"
            answers = piece.answers(labels, asked)
            mentions += [_Mention(*answer, said) for answer in answers] or unanswered
            labels = unanswered = []
        if is_label and piece.labels:
            labels, label_text, asked = piece.labels, sentence, piece.is_question
            named = {finding for finding, label_kind in labels if label_kind == "mention"}
            if asked and not piece.is_open_question:
                unanswered = [_Mention(finding, value, sentence)
                              for finding, value in piece.values if finding in named]
            piece.values = [(finding, value) for finding, value in piece.values
                            if finding not in named]
        mentions += [_Mention(finding, value, sentence) for finding, value in piece.values]
        abnormal = abnormal or piece.is_abnormal
        normal = normal or (sentence if piece.is_normal and not piece.is_question else None)
        last_number, last_sentence, was_label = number, sentence, is_label
    if labels and not asked and not label_text.rstrip(" *_").endswith(":"):
        # a heading with nothing below it
        mentions += [_Mention(finding, POSITIVE, label_text)
                     for finding, kind in labels if kind == "mention"]
    return mentions + unanswered, normal, abnormal


def _names_finding(cell):
    """Whether a table's cell is the name of a finding."""
    return len(cell) <= 40 and any(event.kind in ("mention", "weak", "failure", "anatomy")
                                   for event in _events(normalise(cell)))


def _may_be_foreign(text):
    """Whether a text has any word that tells another language; most texts have none."""
    words = set(_WORD.findall(text.lower()))
    return not (text.isascii() and words.isdisjoint(vocabulary.FOREIGN)
                and words.isdisjoint(vocabulary.RATHER_FOREIGN))


def _is_foreign(text):
    """Whether a text is in a language that is not read: its small words are of other languages."""
    foreign = english = 0
    if not _may_be_foreign(text):
        return False
    for word in _WORD.findall(text.lower().replace("de novo", "")):
        foreign += 3 * (word in vocabulary.FOREIGN or not (word.isascii() or _LATIN.search(word)))
        foreign += word in vocabulary.RATHER_FOREIGN or not word.isascii()
        english += 2 * (word in vocabulary.ENGLISH)
    return foreign > max(1, english)


def read_findings(text):
    """The findings that a text asserts about the image.

    text  a radiology report or an answer of a chat model: str of any length, in which markdown,
          JSON and line breaks are understood. An answer that says no more than "Yes" is read with
          its question before it: f"Does this chest X-ray show edema? {answer}"
    Returns {finding: Reading(value, sentence)}; what is not mentioned is absent. The docstring of
    the module lists the conventions. The same text always gives the same answer, in time linear in
    its length.
    """
    if _is_foreign(text):
        return {}
    mentions, normal, abnormal = _read(text)
    readings = {}
    for value in (POSITIVE, UNCERTAIN, NEGATIVE):  # of several mentions the first of these decides
        for mention in mentions:
            if mention.value == value and mention.finding not in readings:
                sentence = " ".join(mention.sentence.split())
                readings[mention.finding] = Reading(value, sentence)
    readings = {finding: readings[finding] for finding in FINDINGS if finding in readings}
    others = [reading for finding, reading in readings.items() if finding != "Support Devices"]
    denied = all(reading.value == NEGATIVE for reading in others)
    if (normal or others) and not abnormal and denied:
        sentence = " ".join(normal.split()) if normal else others[0].sentence
        readings["No Finding"] = Reading(POSITIVE, sentence)
    return readings


def is_refusal(text):
    """Whether a text declines: it has a refusing phrase and says nothing about this image.

    text  str of any length
    Returns True for "As an AI, I cannot ..."; False with a finding (a denied one too) or another
    abnormality beside the phrase. Explanations of a disease in general are no findings. The time is
    linear in the length of the text.
    """
    if not _REFUSAL.search(normalise(text)):
        return False
    mentions, normal, abnormal = _read(text)
    return not (mentions or normal or abnormal)


# ------------------------------------------------------------------------------------- agreement

def finding_scores(predicted, reference, uncertain="negative", findings=FINDINGS):
    """Precision, recall and F1 of positive findings, micro-averaged and for each finding.

        precision = tp / (tp + fp)     recall = tp / (tp + fn)     F1 = 2 tp / (2 tp + fp + fn)

    Positive means value 1; the micro average counts all (text, finding) pairs together.

    predicted  [{finding: value}], one of each text; value 1, 0 or -1, an absent finding is negative
    reference  the same for the same texts
    uncertain  what -1 counts as: "negative", "positive", or "ignore" (pairs with -1 on either side
               are left out)
    findings   the findings that count
    Returns {"precision", "recall", "f1", "tp", "fp", "fn", "per_finding": {finding: the same six}};
    a rate is None where its denominator is 0.
    Raises ValueError for unequal lengths, no texts, an unknown policy, finding or value.
    """
    if len(predicted) != len(reference):
        raise ValueError(f"{len(predicted)} predicted texts but {len(reference)} reference texts")
    if not predicted:
        raise ValueError("no texts to score")
    if uncertain not in ("negative", "positive", "ignore"):
        raise ValueError(f"uncertain must be negative, positive or ignore, not {uncertain!r}")
    for finding, value in [item for read in (*predicted, *reference) for item in read.items()]:
        if finding not in FINDINGS or value not in (POSITIVE, NEGATIVE, UNCERTAIN):
            raise ValueError(f"{finding!r}: {value!r} is not one of the 14 findings "
                             "with value 1, 0 or -1")
    doubt = {"positive": True, "negative": False, "ignore": None}[uncertain]
    counts_as = {POSITIVE: True, NEGATIVE: False, UNCERTAIN: doubt}
    counts = {}
    for finding in findings:
        pairs = [(counts_as[guess.get(finding, NEGATIVE)], counts_as[truth.get(finding, NEGATIVE)])
                 for guess, truth in zip(predicted, reference)]
        counts[finding] = [pairs.count((True, True)), pairs.count((True, False)),
                           pairs.count((False, True))]
    per_finding = {finding: _rates(*count) for finding, count in counts.items()}
    return {**_rates(*map(sum, zip(*counts.values()))), "per_finding": per_finding}


def _rates(tp, fp, fn):
    """Precision, recall and F1 of true positives, false positives and false negatives."""
    return {"precision": tp / (tp + fp) if tp + fp else None,
            "recall": tp / (tp + fn) if tp + fn else None,
            "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None,
            "tp": tp, "fp": fp, "fn": fn}
