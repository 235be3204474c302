"""Which of the 14 CheXpert / MIMIC-CXR findings a text asserts about a chest radiograph: read by rules, without a model.

    read_findings("No pneumothorax. Small left effusion, possibly pneumonia.")
    -> {"Pneumothorax": Reading(0, "No pneumothorax."), "Pleural Effusion": Reading(1, ...), "Pneumonia": Reading(-1, ...)}

It reads radiology reports and answers of chat models, JSON included; a bare "Yes" is read behind its question. A text is cut into
sentences and, at colons and dashes, into labels and what is said of them (findings_text.py). In each piece one regular expression finds
mentions and cues (the vocabulary is in findings_phrases.py); a sweep to the right carries "no", "possible", "history of" to what
follows, a sweep to the left carries "is absent", "cannot be excluded", "is enlarged" to what precedes; conjunctions and verbs end a
scope. Conventions are those of the CheXpert labeler (Irvin et al. 2019, stanfordmlgroup/chexpert-labeler) and of NegBio (Peng et al.
2018), without their parser and without their code:

 1. Over the mentions of a finding, positive > uncertain > negative. "No new X" and "no definite X" are uncertain.
 2. "No Finding" is 1 if no other finding except Support Devices and no other abnormality (emphysema, granuloma, hernia, ...) is positive
    or uncertain; else it is absent, never 0. Unlike the labeler's, it needs a text that says something: a finding denied, "lungs are
    clear", "no acute process". An empty text gives {}.
 3. "likely", "consistent with", "suggestive of" are positive; "A or B", "A versus B", "probable", "may represent" are uncertain.
 4. Heart size: "upper limits of normal" is 0, "borderline" -1, "borderline enlarged" 1, "stable" alone -1.
 5. Heart failure is Edema and uncertain Cardiomegaly; vascular congestion is uncertain Edema; fibrosis is Pleural Other.
 6. Ours: pleural plaques are Pleural Other; "history of X", questions, definitions, recommendations and the sections in
    SKIPPED_SECTIONS (indication, comparison, ...) say nothing about the image.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from . import findings_phrases as vocabulary
from .findings_text import normalise, pieces

FINDINGS = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Enlarged Cardiomediastinum", "Fracture", "Lung Lesion", "Lung Opacity",
            "No Finding", "Pleural Effusion", "Pleural Other", "Pneumonia", "Pneumothorax", "Support Devices")
POSITIVE, NEGATIVE, UNCERTAIN = 1, 0, -1


class Reading(NamedTuple):
    """What a text says of one finding: value 1 positive, 0 negative, -1 uncertain; `sentence` is the one that decided it."""

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


def _phrases():
    """Every phrase -> (kind, findings). A phrase listed under two findings is a mention of both."""
    tables = [("mention", vocabulary.MENTIONS), ("weak", vocabulary.WEAK_MENTIONS), ("failure", vocabulary.HEART_FAILURE),
              ("anatomy", vocabulary.ANATOMY)]
    rows = [("other", vocabulary.OTHER_ABNORMALITIES), *vocabulary.CUES.items(), ("nothing", vocabulary.NOT_MENTIONS)]
    tables += [(kind, {None: row}) for kind, row in rows]
    phrases = {}
    for kind, table in tables:
        for finding, row in table.items():
            for entry in row.split("|"):
                first, _, rest = entry.partition(" ")
                for phrase in (f"{word} {rest}".strip() for word in first.split("/")):
                    phrases[phrase] = kind, phrases.get(phrase, (kind, ()))[1] + ((finding,) if finding else ())
    return phrases


def _compile():
    """One regular expression for all phrases, by first letter and then those of more words first; (kind, findings) of each of its groups."""
    letters, kinds = {}, [None]
    for phrase, kind in sorted(_phrases().items(), key=lambda item: (item[0][0], item[0].count("~") / 2 - len(item[0].split()), item[0])):
        regex = " ".join(f"(?:{word.replace('/', '|')})" if "/" in word else word for word in phrase.replace("*", r"\w*").split())
        letters.setdefault(phrase[0], []).append(rf"({regex})(?!\w)".replace(" ~ ", rf" (?:(?:{vocabulary.DEGREE}) ){{0,3}}"))
        kinds.append(kind)
    branches = (f"(?={letter})(?:{'|'.join(regexes)})" for letter, regexes in letters.items())
    return re.compile(rf"\b(?:{'|'.join(branches)})|[,;()?]"), kinds


_PHRASE, _KINDS = _compile()
_GENERIC, _REFUSAL = re.compile("|".join(vocabulary.GENERIC)), re.compile("|".join(vocabulary.REFUSALS))
_DEFINITION, _THIS_IMAGE = re.compile(vocabulary.DEFINITION), re.compile(vocabulary.THIS_IMAGE)
_CLAUSE_START = re.compile(rf"(?:,? and)? (?:{vocabulary.CLAUSE_STARTS})\b")
_OWN_DOUBT = re.compile(r"(?:,? and)? (?:[^\s,]+ ){1,5}(?:can)?not (?:\w+ ){0,3}(?:excluded|ruled out)")
_SIDE, _SIDE_END = re.compile(r"\b(?:left|right)\b"), re.compile(r"[,;]| but | while ")
_NO_ANSWER = re.compile(r"(?:\d*\.\d+|\d+ ?%|n/?a|null|unknown|not (?:applicable|assessed|mentioned|reported))\W*")  # a probability is none
_QUESTION = re.compile(r"(?:is|are|was|does|do|did|can|could|would|should|has|have|what|which|how|where|why)\b.*\?$")
_MENTIONS = {"mention", "weak", "failure", "other", "disease"}
_TARGETS = _MENTIONS | {"anatomy", "noun"}
_STATUSES = {"stable": UNCERTAIN, "normal": NEGATIVE, "borderline": UNCERTAIN, "unseen": UNCERTAIN, "abnormal": POSITIVE}
_STRENGTH = tuple(_STATUSES).index  # side by side the stronger one counts



def _events(text):
    """The mentions and cues of a normalised piece, left to right, each with the direction in which it rules."""
    events, target, negated = [], None, False
    for match in _PHRASE.finditer(text):
        kind, findings = _KINDS[match.lastindex] if match.lastindex else (match[0], ())
        if kind in (",", "and") and (_CLAUSE_START.match(text, match.end()) or (negated and _OWN_DOUBT.match(text, match.end()))):
            kind = "break"
        elif kind == "," and events and events[-1].kind == "neg" and events[-1].end == match.start():
            events[-1].kind = "neg<"  # "No, there is ..." is an answer and negates nothing that follows
        elif kind == "?" and match.end() < len(text):
            kind = "unc"
        negated = kind == "neg" or (negated and kind not in ("break", ";"))
        if kind != "nothing":
            events.append(_Event(match.start(), match.end(), kind, findings))
    for event, one_back, two_back in zip(events[::-1], events[-2::-1] + [None], events[-3::-1] + [None, None]):
        if event.kind in _TARGETS:
            target = event.start
        elif event.kind not in _STATUSES and not event.kind.endswith("<>"):
            target = None
        predicative = two_back and one_back.kind == "copula" and two_back.kind in _TARGETS
        event.rules_right = target is not None and target - event.end <= 60 and not predicative and event.kind != "unseen"
    return events


def _sweep_right(events, state):
    """Carry cues to what follows them. Returns the state still waiting for its finding ("No evidence of the following:")."""
    status = aside = None
    used = answered = status_used = soft = negated = False
    for event in events:
        kind, cue = event.kind, None
        if kind in _STATUSES and state != "ign":
            event.status = kind
            if state == "neg" and not used:
                event.status = {"abnormal": "normal", "normal": "abnormal"}.get(kind, kind)
            elif state in ("unc", "unc!") and kind == "abnormal":
                event.status = "borderline"
            if event.rules_right:
                status = event.status if status_used or not status else max(event.status, status, key=_STRENGTH)
                status_used = False
        event.before, event.status_before = state, status
        if kind in _TARGETS:
            used = status_used = True
            answered = answered or bool(event.findings)
        elif kind in ("neg", "unc", "unc!", "ign") or (kind.endswith("<>") and event.rules_right):
            cue = kind.rstrip("<>")
        elif kind == "purpose" and negated:
            cue = "neg"
        elif kind in ("break", ";") or (kind in ("copula", "with", "there") and used and state != "ign"):
            state = status = None
        elif kind == "," and soft:
            state = None
        elif kind == "(":
            aside = state
        elif kind == ")":
            state = aside
        # Negation outlasts doubt ("no findings suspicious for"); what is not about the image stays so.
        if cue and not {"neg": cue == "unc" or (cue == "ign" and not used), "unc!": cue == "unc", "ign": True}.get(state):
            state, used, answered, soft, negated = cue, False, False, kind == "unc<>", negated or cue == "neg"
    return None if answered else state


def _sweep_left(events):
    """Carry cues to what precedes them."""
    state = status = None
    verbs, used, listed, beside = 0, False, False, False
    for event in reversed(events):
        kind = event.kind
        event.after, event.status_after = state, status
        if kind in _TARGETS:
            used, beside = True, False
        elif kind in ("neg<", "unc<", "unseen", "?") or (kind.endswith("<>") and not event.rules_right):
            state, verbs, used, listed = "neg" if kind.startswith("neg") else "unc", 0, False, False
        elif kind in ("affirm", "still", "neg", "unc", "unc!", "ign", "neg<>", "unc<>") or kind in _STATUSES:
            state = None
        elif kind in ("copula", "verb"):
            verbs, beside = verbs + 1, False
            if verbs > 1:
                state = status = None
        elif kind in ("break", ";", "with", "there"):
            state = status = None
        elif kind in ("and", "or"):
            listed = True
        elif kind == "," and used and not listed:  # "cardiomegaly, pneumothorax not seen" against "A, B and C are absent"
            state = None
        if event.status and not event.rules_right:
            joined = status and (beside or (kind == "stable" and not used))  # "normal and stable"
            status = max(event.status, status, key=_STRENGTH) if joined else event.status
            verbs, used, beside = 0, False, True


def _mark_contrasts(events):
    """What is denied and then said to go on is there: "resolved on the left but persists on the right"."""
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
    """Mentions joined by "or" or "versus" are uncertain unless something else is said of them."""
    for left, middle, right in zip(events, events[1:], events[2:] + events[:1]):
        precedes = left.kind in _TARGETS and middle.start - left.end <= 15
        follows = right.kind in _TARGETS and 0 < right.start - middle.end <= 40
        if middle.kind in ("or", "versus"):
            left.after = left.after or ("unc" if precedes else None)
            right.after = right.after or ("unc" if follows and (precedes or middle.kind == "versus") else None)


class _Piece:
    """A piece of a sentence, read: `values` [(finding, value)], `labels` [(finding, kind)] that the next piece may answer, and more."""

    def __init__(self, text, state):
        self.text = text = normalise(text)
        self.events = _events(text)
        generic = _is_generic(text, self.events)
        self.open_state = _sweep_right(self.events, "ign" if generic else state)
        self.open_state = "ign" if generic else self.open_state
        _sweep_left(self.events)
        _mark_contrasts(self.events)
        _mark_alternatives(self.events)
        self.values, self.labels, self.is_normal, self.is_abnormal = [], [], False, False
        about = [event for event in self.events if event.before != "ign"] if not generic else []
        well = any(event.kind == "clear" or event.status == "normal" for event in about)
        for event in about:
            value = _value(event)
            if event.kind == "anatomy" and value is None:
                self.labels += [(finding, "anatomy") for finding in event.findings]
            elif event.kind in _TARGETS:
                self.values += [(finding, value) for finding in event.findings]
            if event.kind == "failure" and value != NEGATIVE:
                self.values.append(("Cardiomegaly", UNCERTAIN))
            self.is_abnormal = self.is_abnormal or (event.kind == "other" and value != NEGATIVE)
            self.is_normal = self.is_normal or (event.kind in ("noun", "anatomy") and well) or (event.kind == "disease" and value == NEGATIVE)
        only = self.events[0].kind if len(self.events) == 1 else ""
        self.list_state = "neg" if only.startswith("neg<") or text.startswith("negative") else "unc" if only.startswith("unc<") else None
        self.is_normal = self.is_normal or text.strip(".! ") in ("normal", "unremarkable", "within normal limits")
        self.is_bare = all(event.kind in _TARGETS or event.kind in ("and", "or", ",", "(", ")", "abnormal", "?") for event in self.events)
        self.is_open_question = bool(_QUESTION.match(text))  # asserts nothing; "Left effusion?" is a doubt
        self.is_question = self.is_open_question or (self.is_bare and text.endswith("?"))
        if self.is_question or (self.is_bare and len(text) <= 80):
            self.labels += [(finding, "mention") for finding, value in self.values if value != NEGATIVE]

    def answers(self, labels, asked):
        """[(finding, value)] that this piece gives to the labels before it: "Pneumothorax: none seen", "Heart: mildly enlarged"."""
        first = next((event for event in self.events if event.kind not in ("copula", "noun", "with", "there", "verb")), None)
        answered = first and (first.kind in ("neg", "neg<", "affirm", "still") or (first.kind.startswith("unc") and not self.values))
        if self.open_state == "ign" or (asked and not answered) or _NO_ANSWER.fullmatch(self.text):
            return []
        sides = _SIDE_END.split(self.text)
        if len(sides) > 1 and all(len(_SIDE.findall(side)) == 1 for side in sides):  # "none on the left, small on the right"
            return [answer for side in sides for answer in _Piece(side, None).answers(labels, asked=False)]
        value = {"0": NEGATIVE, "-1": UNCERTAIN}.get(self.text, POSITIVE)
        if first and first.start <= 40 and first.kind.startswith(("neg", "normal", "clear", "sharp")):
            value = NEGATIVE
        elif first and first.start <= 40 and first.kind.startswith("un"):  # unc, unseen
            value = UNCERTAIN
        status = next((event.status for event in self.events if event.status), None)
        given = {"mention": value, "anatomy": _STATUSES.get(status)}
        read = {finding for finding, _ in self.values}
        return [(finding, given[kind]) for finding, kind in labels if finding not in read and given[kind] is not None]


def _is_generic(text, events):
    """True for sentences about medicine in general: "Pleural effusion refers to ...", "pneumonia may appear as ..."."""
    if _THIS_IMAGE.search(text):
        return False
    first = events[0] if events and not text.startswith("the ") else None
    defined = first and first.kind in _MENTIONS and first.start <= 25 and _DEFINITION.match(text, first.end)
    return bool(defined or _GENERIC.search(text))


def _value(event):
    """1, 0, -1 for a mention or noun; for an organ the value of its status, None without one."""
    if event.kind == "anatomy":
        return _STATUSES.get(event.status_after or event.status_before)
    if event.before != "unc!" and "neg" in (event.before, event.after):
        return NEGATIVE
    return UNCERTAIN if event.before or event.after or event.kind == "weak" else POSITIVE


def _read(text):
    """[(finding, value, sentence)] of the text, the first sentence that calls something normal, whether another abnormality is there."""
    mentions, normal, abnormal = [], None, False
    labels, label_text, asked, was_label, unanswered = [], "", False, False, []
    last_number = last_sentence = list_state = state = None
    for number, kind, sentence, part, is_label in pieces(text):
        if number != last_number:  # a line that ends in a label rules the list below it
            list_state = state if was_label else list_state if kind == "bullet" else None
        piece = _Piece(part, state if sentence is last_sentence else list_state)
        state = piece.open_state or (is_label and piece.list_state) or list_state  # "Absent:" above a list
        is_label = is_label or piece.is_question
        if labels and not (is_label and piece.is_bare):
            said = sentence if label_text in sentence else f"{label_text} {sentence}"
            mentions += [(finding, value, said) for finding, value in piece.answers(labels, asked)] or unanswered
            labels = unanswered = []
        if is_label and piece.labels:
            labels, label_text, asked = piece.labels, sentence, piece.is_question
            named = {finding for finding, label_kind in labels if label_kind == "mention"}
            if asked and not piece.is_open_question:
                unanswered = [(finding, value, sentence) for finding, value in piece.values if finding in named]
            piece.values = [(finding, value) for finding, value in piece.values if finding not in named]
        mentions += [(finding, value, sentence) for finding, value in piece.values]
        abnormal = abnormal or piece.is_abnormal
        normal = normal or (sentence if piece.is_normal and not piece.is_question else None)
        last_number, last_sentence, was_label = number, sentence, is_label
    if labels and not asked and not label_text.rstrip(" *_").endswith(":"):  # a heading with nothing below it
        mentions += [(finding, POSITIVE, label_text) for finding, kind in labels if kind == "mention"]
    mentions += unanswered
    return mentions, normal, abnormal


def read_findings(text):
    """The findings that a text asserts about the image.

    Args:
        text: a radiology report or an answer of a chat model (str of any length; markdown, JSON and line breaks are understood). An answer
            that says no more than "Yes" is read with its question before it: f"Does this chest X-ray show edema? {answer}"

    Returns:
        {finding: Reading(value, sentence)}, value 1 positive, 0 negative, -1 uncertain; what is not mentioned is absent.
        The module docstring lists the conventions. The same text always gives the same answer, in time linear in its length.
    """
    mentions, normal, abnormal = _read(text)
    readings = {}
    for finding, value, sentence in sorted(mentions, key=lambda mention: (POSITIVE, UNCERTAIN, NEGATIVE).index(mention[1])):
        if finding not in readings:
            readings[finding] = Reading(value, " ".join(sentence.split()))
    readings = {finding: readings[finding] for finding in FINDINGS if finding in readings}
    others = [reading for finding, reading in readings.items() if finding != "Support Devices"]
    if (normal or others) and not abnormal and all(reading.value == NEGATIVE for reading in others):
        readings["No Finding"] = Reading(POSITIVE, " ".join(normal.split()) if normal else others[0].sentence)
    return readings


def is_refusal(text):
    """True if the text has a refusing phrase ("As an AI, I cannot ...") and says nothing about this image.

    A disclaimer beside a finding, also a denied one, or beside another abnormality is no refusal; explanations of a disease in general
    are not findings. Linear in the length of the text.
    """
    return bool(_REFUSAL.search(normalise(text))) and not any(_read(text))


def finding_scores(predicted, reference, uncertain="negative", findings=FINDINGS):
    """Precision, recall and F1 of positive findings, micro-averaged over all (text, finding) pairs, and per finding.

    precision = tp / (tp + fp), recall = tp / (tp + fn), F1 = 2 tp / (2 tp + fp + fn); positive means value 1.

    Args:
        predicted, reference: lists of {finding: value}, of equal length; value 1, 0 or -1, an absent finding counts as negative
        uncertain: what -1 counts as: "negative", "positive", or "ignore" (pairs with -1 on either side are left out)
        findings: the findings that count

    Returns:
        {"precision", "recall", "f1", "tp", "fp", "fn", "per_finding": {finding: the same six}}; a rate is None where its denominator is 0.

    Raises:
        ValueError: unequal lengths, no texts, an unknown policy, finding or value.
    """
    if len(predicted) != len(reference):
        raise ValueError(f"{len(predicted)} predicted texts but {len(reference)} reference texts")
    if not predicted:
        raise ValueError("no texts to score")
    if uncertain not in ("negative", "positive", "ignore"):
        raise ValueError(f"uncertain must be negative, positive or ignore, not {uncertain!r}")
    for finding, value in [item for read in (*predicted, *reference) for item in read.items()]:
        if finding not in FINDINGS or value not in (POSITIVE, NEGATIVE, UNCERTAIN):
            raise ValueError(f"{finding!r}: {value!r} is not one of the 14 findings with value 1, 0 or -1")
    counts_as = {POSITIVE: True, NEGATIVE: False, UNCERTAIN: {"positive": True, "negative": False, "ignore": None}[uncertain]}
    counts = {}
    for finding in findings:
        pairs = [(counts_as[guess.get(finding, NEGATIVE)], counts_as[truth.get(finding, NEGATIVE)]) for guess, truth in zip(predicted, reference)]
        counts[finding] = pairs.count((True, True)), pairs.count((True, False)), pairs.count((False, True))
    return {**_rates(*map(sum, zip(*counts.values()))), "per_finding": {finding: _rates(*count) for finding, count in counts.items()}}


def _rates(tp, fp, fn):
    return {"precision": tp / (tp + fp) if tp + fp else None, "recall": tp / (tp + fn) if tp + fn else None,
            "f1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None, "tp": tp, "fp": fp, "fn": fn}
