"""METEOR 1.5 for English (Denkowski and Lavie 2014) without Java: the numbers of `meteor-1.5.jar -l en -norm`, task 'rank'.

    Meteor().score({"s1": ["no effusion ."]}, {"s1": ["there is no pleural effusion ."]})  ->  Score(corpus, items)

Words of a hypothesis and of a reference are aligned by four modules: the same word, the same stem, a common WordNet synset, or phrases
that the paraphrase table calls equal. Among the alignments of a beam search the one with most matched words, then fewest chunks, then
least distance is scored; a chunk is a run of matches that is contiguous on both sides:

    P, R  = sum over matched words of module weight * word weight / sum over all words of word weight     (hypothesis, reference)
    F     = 1 / ((1 - alpha) / P + alpha / R)
    score = F (1 - gamma (chunks / m)^beta)      m: matched words, the mean of the two sides; no penalty if all match in one chunk

The word weight is delta for content words, 1 - delta for function words. The word lists, WordNet and the table are not part of this
folder: they are read from the user's copy of METEOR, which the PyPI package pycocoevalcap brings along, and nothing is computed
without them. This was written from the papers and from observing the running jar; where the two differ the jar is followed:

 1. The search counts matched words as integers: adding length * weight truncates after every match, so a lone stem, synonym or
    one-word paraphrase adds nothing.
 2. A match adds its distance to the path that it extends, not to the extended one. A chunk counts when it ends.
 3. Matches that share no word with another are fixed before the search, whether they help or not.
 4. Words and stems are equal if Java's 32-bit hashes of them are.
 5. A pair listed in both directions gives the same match twice, which then counts as ambiguous.
 6. Two equal texts are aligned by equal words only.
"""

import functools
import gzip
import importlib.util
import re
import zipfile
import zlib
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from .text import Score, check

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
EXACT, STEM, SYNONYM, PARAPHRASE = range(4)
SCORE_WEIGHTS = (1, 0.6, 0.8, 0.6)   # of the four modules, in P and R
SEARCH_WEIGHTS = (1, 0.5, 0.5, 0.5)  # the same in the search
BEAM = 40
LONGEST_PHRASE = 7                   # words, in the paraphrase table

JAR, TABLE = "meteor-1.5.jar", "data/paraphrase-en.gz"
REFUSAL = (f"METEOR needs its own files, {JAR} and {TABLE} (no Java): `pip install pycocoevalcap` brings both and they are found there; "
           "if you have them elsewhere, name their folder with `--meteor FOLDER`")

# The normaliser's character classes and its replacements in order; digits are 0-9, \xb5 and Greek are not letters.
LETTER = "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527\u1d00-\u1d7f\ua640-\ua697"
BLANKS = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
UP_TO_BLANK = "".join(map(chr, range(33)))
REPLACEMENTS = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[‘’`]", "'"),
    ("[“”]|''", '"'),
    ("–", " - "),
    (rf"([^{LETTER}0-9 \t\n\v\f\r.',-])", r" \1 "),
    (r"(\.\.+)", r" \1 "),
    ("([^0-9]),([^0-9])", r"\1 , \2"),              # matches share no character, so "a,,b" becomes "a , ,b"
    ("([0-9]),([^0-9])", r"\1 , \2"),
    ("([^0-9]),([0-9])", r"\1 , \2"),
    ("--", "-"),
    (f"([^{LETTER}])'([^{LETTER}])", r"\1 ' \2"),
    (f"([^{LETTER}0-9])'([{LETTER}])", r"\1 ' \2"),
    (f"([{LETTER}])'([^{LETTER}])", r"\1 ' \2"),
    (f"([{LETTER}])'([{LETTER}])", r"\1 '\2"),
    ("([0-9])'(s)", r"\1 '\2"),
    (f"([{LETTER}0-9.])-([{LETTER}0-9])", r"\1 \2"),
)]

# WordNet's suffixes of nouns, verbs and adjectives: suffix -> ending of the base form, tried in this order.
INFLECTIONS = (("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"), ("ies", "y"),
               ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"))

# Tables of the stemmer: whole words, words that end after step 1a, suffix -> replacement for steps 2 to 4.
SPECIAL_STEMS = {"skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl", "gently": "gentl",
                 "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl"}
SPECIAL_STEMS |= {word: word for word in ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")}
FINISHED = {"inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = {"tional": "tion", "enci": "ence", "anci": "ance", "abli": "able", "entli": "ent", "izer": "ize", "ization": "ize",
          "ational": "ate", "ation": "ate", "ator": "ate", "alism": "al", "aliti": "al", "alli": "al", "fulness": "ful", "ousli": "ous",
          "ousness": "ous", "iveness": "ive", "iviti": "ive", "biliti": "ble", "bli": "ble", "ogi": "og", "fulli": "ful",
          "lessli": "less", "li": ""}
STEP_3 = {"tional": "tion", "ational": "ate", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic", "ful": "", "ness": "", "ative": ""}
STEP_4 = {"al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ism", "ate", "iti", "ous", "ive", "ize", "ion"}
VOWEL, CONSONANT = "[aeiouy]", "[^aeiouy]"
SHORT_SYLLABLE = re.compile(f"(^|{CONSONANT}){VOWEL}[^aeiouywxY]$|^{VOWEL}{CONSONANT}$")


@functools.cache
def stem(word):
    """The stem of a lower-case word: Snowball's English stemmer (Porter 2001, snowballstem.org) as of 2006-2015.

    Later versions have other exceptions and differ on some hundred words. Equals the jar's `Stemmer en` on the 350,000 words with which
    it was compared: those of WordNet and of the table, and random ones. O(length).
    """
    if word in SPECIAL_STEMS or len(word) < 3:
        return SPECIAL_STEMS.get(word, word)
    word = word.removeprefix("'")
    word = re.sub(f"({VOWEL})y", r"\1Y", re.sub("^y", "Y", word))  # Y is a consonant
    start = lambda begin: match.end() if (match := re.compile(VOWEL + CONSONANT).search(word, begin)) else len(word)
    prefix = re.match("gener|commun|arsen", word)
    region_1 = prefix.end() if prefix else start(0)
    region_2 = start(region_1)

    def split(suffixes):
        """(before, suffix) for the longest of the suffixes that ends the word, else (word, '')."""
        return next(((word[:i], word[i:]) for i in range(max(0, len(word) - 7), len(word)) if word[i:] in suffixes), (word, ""))

    word, _ = split({"'", "'s", "'s'"})
    if word.endswith("sses"):                                                          # step 1a
        word = word[:-2]
    elif word.endswith(("ied", "ies")):
        word = word[:-2] if len(word) > 4 else word[:-1]
    elif word.endswith("s") and not word.endswith(("us", "ss")) and re.search(VOWEL, word[:-2]):
        word = word[:-1]
    if word in FINISHED:
        return word
    base, suffix = split({"eed", "eedly", "ed", "edly", "ing", "ingly"})               # step 1b
    if suffix.startswith("eed"):
        word = base + "ee" if len(base) >= region_1 else word
    elif suffix and re.search(VOWEL, base):
        word = base
        if word.endswith(("at", "bl", "iz")) or len(word) <= region_1 and SHORT_SYLLABLE.search(word):
            word += "e"
        elif word.endswith(("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")):
            word = word[:-1]
    if re.search(f".{CONSONANT}[yY]$", word):                                          # step 1c
        word = word[:-1] + "i"
    base, suffix = split(STEP_2)
    wanted = {"ogi": "l$", "li": "[cdeghkmnrt]$"}.get(suffix, "")
    if suffix and len(base) >= region_1 and re.search(wanted, base):
        word = base + STEP_2[suffix]
    base, suffix = split(STEP_3)
    if suffix and len(base) >= (region_2 if suffix == "ative" else region_1):
        word = base + STEP_3[suffix]
    base, suffix = split(STEP_4)
    if suffix and len(base) >= region_2 and (suffix != "ion" or base.endswith(("s", "t"))):
        word = base
    base = word[:-1]                                                                   # step 5
    if word.endswith("e") and (len(base) >= region_2 or len(base) >= region_1 and not SHORT_SYLLABLE.search(base)):
        word = base
    elif word.endswith("ll") and len(base) >= region_2:
        word = base
    return word.replace("Y", "y")


@functools.cache
def java_hash(word):
    """Java's String.hashCode without its sign: sum of unit_i 31^(n - 1 - i) modulo 2^32 over the n UTF-16 units. O(length)."""
    units, value = word.encode("utf-16-be", "surrogatepass"), 0
    for high, low in zip(units[::2], units[1::2]):
        value = (31 * value + 256 * high + low) % 2 ** 32
    return value


class Match(NamedTuple):
    """Words start .. start + length - 1 of the hypothesis agree with ref_start .. of the reference; `words`, `ref_words` are bit masks."""

    module: int
    start: int
    length: int
    ref_start: int
    ref_length: int

    @property
    def words(self):
        return (1 << self.length) - 1 << self.start

    @property
    def ref_words(self):
        return (1 << self.ref_length) - 1 << self.ref_start


@dataclass(slots=True)
class _Path:
    """An alignment of the reference's words so far. `end`: where the hypothesis would continue the open chunk, None if none is open."""

    matches: tuple = ()
    used: int = 0        # bit masks of words
    ref_used: int = 0
    covered: int = 0     # truncated weighted numbers of words
    ref_covered: int = 0
    chunks: int = 0
    distance: int = 0
    end: int = None

    def extend(self, match):
        weight = SEARCH_WEIGHTS[match.module]
        return _Path(self.matches + (match,), self.used | match.words, self.ref_used | match.ref_words,
                     int(self.covered + match.length * weight), int(self.ref_covered + match.ref_length * weight),
                     self.chunks + (self.end not in (None, match.start)), self.distance, match.start + match.length)

    def close(self):
        self.chunks += self.end is not None
        self.end = None

    @property
    def rank(self):
        return -self.covered - self.ref_covered, self.chunks, self.distance


def align(found, beam=BEAM):
    """The best path over the reference's words, from left to right.

    Each path is extended by every match that starts at the current word and uses free words, and goes on without one; then the `beam`
    best remain, equal ones in the order in which they arose.

    Args:
        found: for each word of the reference the matches that start there, in the modules' order
        beam: paths kept

    Returns:
        _Path with the alignment and its number of chunks. O(words * beam * matches at a word).
    """
    matches = [match for here in found for match in here]
    single = lambda covers: [sum(covers(match) >> i & 1 for match in matches) == 1 for i in range(max(map(attrgetter("start"), matches)) + 8)]
    return matches, single
