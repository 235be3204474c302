"""METEOR 1.5 for English without Java (Denkowski and Lavie 2014).

    Meteor().score({"s1": ["no effusion ."]}, {"s1": ["there is no pleural effusion ."]})
    -> Score(corpus, items)

The numbers are those of `meteor-1.5.jar -l en -norm`, task 'rank'. Words of a hypothesis and of a
reference are aligned by four modules: the same word, the same stem, a common WordNet synset, or
phrases that the paraphrase table calls equal. Among the alignments of a beam search the one with
most matched words, then fewest chunks, then least distance is scored; a chunk is a run of matches
that is contiguous on both sides:

    P, R  = sum over matched words of module weight * word weight
            / sum over all words of word weight                    P: hypothesis, R: reference
    F     = 1 / ((1 - alpha) / P + alpha / R)
    score = F (1 - gamma (chunks / m)^beta)

m is the number of matched words, the mean of the two sides; there is no penalty if all words match
in one chunk. The word weight is delta for content words, 1 - delta for function words.

The word lists, WordNet and the table are not part of this folder: they are read from the user's
copy of METEOR, which the PyPI package pycocoevalcap brings along, and nothing is computed without
them. This was written from the papers and from observing the running jar; where the two differ the
jar is followed:

 1. The search counts matched words as integers: adding length * weight truncates after every match,
    so a lone stem, synonym or one-word paraphrase adds nothing.
 2. A match adds its distance to the path that it extends, not to the extended one. A chunk counts
    when it ends.
 3. Matches that share no word with another are fixed before the search, whether they help or not.
 4. Words and stems are equal if Java's 32-bit hashes of them are.
 5. A pair listed in both directions gives the same match twice, which then counts as ambiguous.
 6. Two equal texts are aligned by equal words only.
"""

import functools
import gzip
import importlib.util
import re
import sys
import zipfile
import zlib
from dataclasses import dataclass
from itertools import chain
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
REFUSAL = (f"METEOR needs its own files, {JAR} and {TABLE} (no Java): `pip install pycocoevalcap` "
           "brings both and they are found there; if you have them elsewhere, name their folder "
           "with `--meteor FOLDER`")

# The normaliser's character classes and its replacements in order; digits are 0-9, \xb5 and Greek
# are not letters.
LETTER = ("A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u017e\u0400-\u0527\u1d00-\u1d7f"
          "\ua640-\ua697")
BLANKS = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
UP_TO_BLANK = "".join(map(chr, range(33)))
REPLACEMENTS = [(re.compile(pattern), replacement) for pattern, replacement in (
    ("[‘’`]", "'"),
    ("[“”]|''", '"'),
    ("–", " - "),
    (rf"([^{LETTER}0-9 \t\n\v\f\r.',-])", r" \1 "),
    (r"(\.\.+)", r" \1 "),
    ("([^0-9]),([^0-9])", r"\1 , \2"),  # matches share no character, so "a,,b" becomes "a , ,b"
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

# WordNet's suffixes of nouns, verbs and adjectives: suffix -> ending of the base form, tried in
# this order.
INFLECTIONS = (
    ("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
    ("men", "man"), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"),
    ("ing", ""), ("er", ""), ("est", ""), ("er", "e"), ("est", "e"))

# Tables of the stemmer: whole words, words that end after step 1a, suffix -> replacement for
# steps 2 to 4.
SPECIAL_STEMS = {
    "skis": "ski", "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "idly": "idl",
    "gently": "gentl", "ugly": "ugli", "early": "earli", "only": "onli", "singly": "singl"}
UNCHANGED = ("sky", "news", "howe", "atlas", "cosmos", "bias", "andes")
SPECIAL_STEMS |= {word: word for word in UNCHANGED}
FINISHED = {
    "inning", "outing", "canning", "herring", "earring", "proceed", "exceed", "succeed"}
STEP_2 = {
    "tional": "tion", "enci": "ence", "anci": "ance", "abli": "able", "entli": "ent", "izer": "ize",
    "ization": "ize", "ational": "ate", "ation": "ate", "ator": "ate", "alism": "al", "aliti": "al",
    "alli": "al", "fulness": "ful", "ousli": "ous", "ousness": "ous", "iveness": "ive",
    "iviti": "ive", "biliti": "ble", "bli": "ble", "ogi": "og", "fulli": "ful", "lessli": "less",
    "li": ""}
STEP_3 = {
    "tional": "tion", "ational": "ate", "alize": "al", "icate": "ic", "iciti": "ic", "ical": "ic",
    "ful": "", "ness": "", "ative": ""}
STEP_4 = {
    "al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ism", "ate",
    "iti", "ous", "ive", "ize", "ion"}
DOUBLES = ("bb", "dd", "ff", "gg", "mm", "nn", "pp", "rr", "tt")
VOWEL, CONSONANT = "[aeiouy]", "[^aeiouy]"
SHORT_SYLLABLE = re.compile(f"(^|{CONSONANT}){VOWEL}[^aeiouywxY]$|^{VOWEL}{CONSONANT}$")


# ------------------------------------------------------------------------------------- the words

@functools.cache
def stem(word):
    """The stem of a word: Snowball's English stemmer (Porter 2001, snowballstem.org) of 2006-2015.

    Later versions have other exceptions and differ on some hundred words.

    word  str in lower case
    Returns a str, equal to the jar's `Stemmer en` on the 350,000 words with which it was compared:
    those of WordNet and of the table, and random ones. O(length).
    """
    if word in SPECIAL_STEMS or len(word) < 3:
        return SPECIAL_STEMS.get(word, word)
    word = word.removeprefix("'")
    word = re.sub(f"({VOWEL})y", r"\1Y", re.sub("^y", "Y", word))  # Y is a consonant
    match = re.match("gener|commun|arsen", word) or re.search(VOWEL + CONSONANT, word)
    region_1 = match.end() if match else len(word)
    match = re.compile(VOWEL + CONSONANT).search(word, region_1)
    region_2 = match.end() if match else len(word)
    word = _stem_step_1a(word)
    if word in FINISHED:
        return word
    word = _stem_step_1b(word, region_1)
    if re.search(f".{CONSONANT}[yY]$", word):                            # step 1c
        word = word[:-1] + "i"
    base, suffix = _split(word, STEP_2)
    wanted = {"ogi": "l$", "li": "[cdeghkmnrt]$"}.get(suffix, "")
    if suffix and len(base) >= region_1 and re.search(wanted, base):
        word = base + STEP_2[suffix]
    base, suffix = _split(word, STEP_3)
    if suffix and len(base) >= (region_2 if suffix == "ative" else region_1):
        word = base + STEP_3[suffix]
    base, suffix = _split(word, STEP_4)
    if suffix and len(base) >= region_2 and (suffix != "ion" or base.endswith(("s", "t"))):
        word = base
    return _stem_step_5(word, region_1, region_2).replace("Y", "y")


def _split(word, suffixes):
    """(before, suffix) for the longest of the suffixes that ends the word, else (word, '')."""
    starts = range(max(0, len(word) - 7), len(word))
    return next(((word[:i], word[i:]) for i in starts if word[i:] in suffixes), (word, ""))


def _stem_step_1a(word):
    """A word without the endings of a genitive and of a plural."""
    word, _ = _split(word, {"'", "'s", "'s'"})
    if word.endswith("sses"):
        return word[:-2]
    if word.endswith(("ied", "ies")):
        return word[:-2] if len(word) > 4 else word[:-1]
    is_plural = word.endswith("s") and not word.endswith(("us", "ss"))
    return word[:-1] if is_plural and re.search(VOWEL, word[:-2]) else word


def _stem_step_1b(word, region_1):
    """A word without -ed, -ing and what follows these."""
    base, suffix = _split(word, {"eed", "eedly", "ed", "edly", "ing", "ingly"})
    if suffix.startswith("eed"):
        return base + "ee" if len(base) >= region_1 else word
    if not suffix or not re.search(VOWEL, base):
        return word
    is_short = len(base) <= region_1 and SHORT_SYLLABLE.search(base)
    if base.endswith(("at", "bl", "iz")) or is_short:
        return base + "e"
    return base[:-1] if base.endswith(DOUBLES) else base


def _stem_step_5(word, region_1, region_2):
    """A word without a final e, or without the second l of a final ll."""
    base = word[:-1]
    if len(base) >= region_2:
        return base if word.endswith(("e", "ll")) else word
    is_long = len(base) >= region_1 and not SHORT_SYLLABLE.search(base)
    return base if word.endswith("e") and is_long else word


@functools.cache
def java_hash(word):
    """Java's String.hashCode without its sign. O(length).

        sum over the n UTF-16 units of unit_i 31^(n - 1 - i) modulo 2^32
    """
    units, value = word.encode("utf-16-be", "surrogatepass"), 0
    for high, low in zip(units[::2], units[1::2]):
        value = (31 * value + 256 * high + low) % 2 ** 32
    return value


# --------------------------------------------------------------------------------- the alignment

class Match(NamedTuple):
    """Words of the hypothesis that agree with words of the reference.

    module                 EXACT, STEM, SYNONYM or PARAPHRASE
    start, length          words start .. start + length - 1 of the hypothesis
    ref_start, ref_length  the same of the reference
    words, ref_words       bit masks of these words
    """

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
    """An alignment of the reference's words so far."""

    matches: tuple = ()
    used: int = 0        # bit masks of words
    ref_used: int = 0
    covered: int = 0     # truncated weighted numbers of words
    ref_covered: int = 0
    chunks: int = 0
    distance: int = 0
    end: int = None      # where the hypothesis would continue the open chunk; None: none is open

    def extend(self, match):
        """The path that goes on with a match."""
        weight = SEARCH_WEIGHTS[match.module]
        covered = int(self.covered + match.length * weight)
        ref_covered = int(self.ref_covered + match.ref_length * weight)
        chunks = self.chunks + (self.end not in (None, match.start))
        # by position: this is called so often that keywords take a tenth more time
        return _Path(self.matches + (match,),
                     self.used | match.words, self.ref_used | match.ref_words,
                     covered, ref_covered, chunks, self.distance, match.start + match.length)

    def close(self):
        """Ends the open chunk."""
        self.chunks += self.end is not None
        self.end = None

    @property
    def rank(self):
        """The better the path, the smaller."""
        return -self.covered - self.ref_covered, self.chunks, self.distance


def align(found, beam=BEAM):
    """The best path over the words of a reference, from left to right.

    A path is extended by each match that starts at the current word and meets free words only, and
    also goes on without one; then the `beam` best are kept, equal ones in the order in which they
    arose.

    found  for each word of the reference, the list of matches that start there, in the order of the
           modules
    beam   paths kept at a word
    Returns a _Path with the matches of the alignment and its number of chunks.
    O(words * beam * matches at a word).
    """
    fixed = _unambiguous(found)
    start = _Path()
    for match in fixed.values():
        start.used |= match.words
        start.ref_used |= match.ref_words
    paths, rank = [start], attrgetter("rank")
    for i, here in enumerate([*found, []]):  # beyond the last word the open chunks end
        best, paths = sorted(paths, key=rank)[:beam], []
        for path in best:
            if i in fixed:
                paths.append(path.extend(fixed[i]))
            elif path.ref_used >> i & 1:
                paths.append(path)
            else:
                for match in here:
                    if not (match.words & path.used or match.ref_words & path.ref_used):
                        paths.append(path.extend(match))
                        path.distance += abs(match.ref_start - match.start)
                path.close()
                paths.append(path)
    return min(paths, key=rank)


def _unambiguous(found):
    """{word of the reference: match} of the matches that share no word with another."""
    once = twice = ref_once = ref_twice = 0  # words that some match covers, and that several do
    for match in chain.from_iterable(found):
        twice |= once & match.words
        ref_twice |= ref_once & match.ref_words
        once |= match.words
        ref_once |= match.ref_words
    return {match.ref_start: match for match in chain.from_iterable(found)
            if not (match.words & twice or match.ref_words & ref_twice)}


# ------------------------------------------------------------------------------------- the score

class Statistics(NamedTuple):
    """What the score of a pair, or summed over pairs that of a corpus, is computed from."""

    matched: float      # weighted words of the hypothesis: those that match, and all
    total: float
    ref_matched: float  # the same of the reference
    ref_total: float
    words: int          # matched words of both sides
    chunks: int

    @property
    def score(self):
        """F (1 - gamma (chunks / m)^beta) with m half of `words`."""
        if not self.matched or not self.ref_matched:
            return 0.0
        precision, recall = self.matched / self.total, self.ref_matched / self.ref_total
        f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        return f_mean * (1 - GAMMA * (self.chunks / (self.words / 2)) ** BETA)


def find_folder(folder=None):
    """The folder with METEOR's files.

    folder  path; None: that of the installed pycocoevalcap
    Returns a Path. Raises FileNotFoundError, which says how to get the files.
    """
    if folder is None:
        package = importlib.util.find_spec("pycocoevalcap")
        folder = package and Path(package.submodule_search_locations[0], "meteor")
    missing = [name for name in (JAR, TABLE) if not folder or not Path(folder, name).is_file()]
    if missing:
        where = f" in {folder}" if folder else ""
        raise FileNotFoundError(f"{REFUSAL}. Missing{where}: {', '.join(missing)}")
    return Path(folder)


class Meteor:
    """METEOR with the word lists of a folder; they take 0.1 s and 30 MB to read.

    folder  as for `find_folder`
    Raises FileNotFoundError as that does, ValueError for a jar that is not METEOR 1.5's.
    """

    def __init__(self, folder=None):
        folder = find_folder(folder)
        self.table = folder / TABLE
        try:
            with zipfile.ZipFile(folder / JAR) as jar:
                read = lambda name: jar.read(name).decode("utf-8").splitlines()
                self.function_words = set(read("function/english.words"))
                prefixes = [line.split() for line in read("nonbreaking/english.prefixes")
                            if line.strip() and not line.startswith("#")]
                synsets = read("synonym/english.synsets")        # a word, its ids, a word, ...
                exceptions = read("synonym/english.exceptions")  # a base form, its forms, ...
        except (zipfile.BadZipFile, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / JAR} is not METEOR 1.5's: {error}") from None
        self.prefixes = {prefix for prefix, *rest in prefixes if not rest}
        self.number_prefixes = {prefix for prefix, *rest in prefixes if rest}  # #NUMERIC_ONLY#
        self.synsets = {word: ids for word, ids in zip(synsets[::2], synsets[1::2])
                        if "_" not in word}
        self.base_forms = {}
        for base, forms in zip(exceptions[::2], exceptions[1::2]):
            for form in forms.split():
                self.base_forms.setdefault(form, []).append(base)
        self.lexicon = {}

    def normalise(self, text):
        """The words of a text, as the jar's -norm gives them.

        Punctuation is split off, hyphens between letters or digits become blanks, contractions are
        split before the apostrophe. A final full stop is split off except after listed
        abbreviations and before a lower-case word; an abbreviation with inner full stops loses all
        of them.

        text  str
        Returns a list of lower-case words. O(length).
        """
        text = f" {text} "
        for pattern, replacement in REPLACEMENTS:
            text = pattern.sub(replacement, text)
        words = re.split("[ \t\n\f\r]+", text.strip(" \t\n\f\r"))
        words = [self._split_stop(word, following)
                 for word, following in zip(words, words[1:] + [""])]
        text = " ".join(words).translate(BLANKS).lower().strip(UP_TO_BLANK)
        return [word for word in re.split("[ \t\n\f\r]+", text) if word]

    def _split_stop(self, word, following):
        """A word whose final full stop is split off or dropped where -norm does so."""
        before = word.removesuffix(".")
        if before == word or not before.strip("."):
            return word
        if "." in before and re.search(f"[{LETTER}]", before):
            return word.replace(".", "")
        if before in self.prefixes or re.match("[a-z]", following):
            return word
        if before in self.number_prefixes and re.match("[0-9]", following):
            return word
        return before + " ."

    def synset_ids(self, word):
        """The ids of WordNet's synsets of a word and of its base forms, a set of str.

        Base forms are those listed as exceptions, else the first that is a known word.
        """
        bases = self.base_forms.get(word, [])
        if not bases and len(word) > 2 and not word.endswith("ss"):
            candidates = (word.removesuffix(suffix) + ending
                          for suffix, ending in INFLECTIONS if word.endswith(suffix))
            bases = [base for base in candidates if base in self.synsets][:1]
        return {number for known in (word, *bases)
                for number in self.synsets.get(known, "").split()}

    def look_up(self, word):
        """(hash, hash of the stem, synset ids) of a word, remembered."""
        if word not in self.lexicon:
            self.lexicon[word] = java_hash(word), java_hash(stem(word)), self.synset_ids(word)
        return self.lexicon[word]

    def read_paraphrases(self, sentences):
        """The part of the paraphrase table that the sentences need.

        A phrase can occur if each two words of it that follow each other do so in a sentence. The
        5.3 million pairs are read once, as a stream: 5 to 10 s, and memory for what is kept, some
        MB for radiology reports.

        sentences  list of lists of words
        Returns {phrase: [phrases that the table lists for it]}, of those that can occur.
        Raises ValueError for a damaged table.
        """
        known = {(word,) for words in sentences for word in words}
        known.update(pair for words in sentences for pair in zip(words, words[1:]))
        paraphrases, last, wanted = {}, None, False
        try:
            with gzip.open(self.table, "rt", encoding="utf-8", newline="\n") as lines:
                # probability, phrase, phrase
                for _, source, target in zip(lines, lines, lines, strict=True):
                    if source != last:
                        last, wanted = source, _can_occur(source, known)
                    if wanted and _can_occur(target, known):
                        phrase = sys.intern(target[:-1])  # it is in many lists
                        paraphrases.setdefault(source[:-1], []).append(phrase)
        except (EOFError, zlib.error, ValueError, gzip.BadGzipFile) as error:
            raise ValueError(f"{self.table} is damaged: {error}") from None
        return paraphrases

    def find_matches(self, hypothesis, reference, paraphrases):
        """For each word of the reference, the matches that start there.

        hypothesis   list of words
        reference    list of words
        paraphrases  what `read_paraphrases` returns
        Returns a list of lists of Match, in the order of the modules.
        O(words of the one * words of the other + paraphrases).
        """
        ours = [self.look_up(word) for word in hypothesis]
        theirs = [self.look_up(word) for word in reference]
        if [word for word, _, _ in ours] == [word for word, _, _ in theirs]:
            return [_exact_matches(ours, i, their) for i, their in enumerate(theirs)]
        found = [_exact_matches(ours, i, their) + _close_matches(ours, i, their)
                 for i, their in enumerate(theirs)]
        our_spans, our_places = _spans(hypothesis)
        their_spans, their_places = _spans(reference)
        for phrase, i, ref_length in their_spans:
            for other in paraphrases.get(phrase, ()):
                found[i] += [Match(PARAPHRASE, j, length, i, ref_length)
                             for j, length in our_places.get(other, ())]
        for phrase, j, length in our_spans:
            for other in paraphrases.get(phrase, ()):
                for i, ref_length in their_places.get(other, ()):
                    found[i].append(Match(PARAPHRASE, j, length, i, ref_length))
        return found

    def compare(self, hypothesis, reference, paraphrases):
        """The statistics of a pair.

        hypothesis   list of words
        reference    list of words
        paraphrases  what `read_paraphrases` returns
        Returns Statistics.
        """
        path = align(self.find_matches(hypothesis, reference, paraphrases))
        ours, theirs = self.word_weights(hypothesis), self.word_weights(reference)
        matched = sum(SCORE_WEIGHTS[m.module] * sum(ours[m.start:m.start + m.length])
                      for m in path.matches)
        ref_matched = sum(
            SCORE_WEIGHTS[m.module] * sum(theirs[m.ref_start:m.ref_start + m.ref_length])
            for m in path.matches)
        words = sum(m.length + m.ref_length for m in path.matches)
        perfect = path.chunks == 1 and words == len(hypothesis) + len(reference)
        return Statistics(matched, sum(ours), ref_matched, sum(theirs), words,
                          0 if perfect else path.chunks)

    def word_weights(self, words):
        """delta for each content word, 1 - delta for each function word."""
        return [1 - DELTA if word in self.function_words else DELTA for word in words]

    def score(self, hypotheses, references):
        """METEOR of each item and of the corpus; the docstring of the module has the formula.

        An item's score is that of its best reference. The corpus score is computed from the summed
        statistics of these, in which an item that matches wholly in one chunk adds no chunk; it is
        not the mean.

        hypotheses  {id: [text]}
        references  {id: [text, ...]}, the same ids
        Returns Score, equal to `java -Dfile.encoding=UTF-8 -jar meteor-1.5.jar - - -stdio -l en
        -norm` within 1e-9, and so to pycocoevalcap's Meteor, which leaves the encoding to the
        locale. Texts with '|||' or line ends, that program's separators, cannot be compared. The
        table is streamed once (5 to 10 s), then a pair takes O(words * beam * matches at a word),
        some milliseconds.
        Raises ValueError as `check` does, or for a damaged table.
        """
        check(hypotheses, references)
        words = {key: [self.normalise(text) for text in (*hypotheses[key], *references[key])]
                 for key in hypotheses}
        sentences = [sentence for of_item in words.values() for sentence in of_item]
        paraphrases = self.read_paraphrases(sentences)
        best = {}
        for key, (hypothesis, *others) in words.items():
            pairs = (self.compare(hypothesis, reference, paraphrases) for reference in others)
            best[key] = max(pairs, key=attrgetter("score"))
        total = Statistics(*map(sum, zip(*best.values())))
        return Score(total.score, {key: statistics.score for key, statistics in best.items()})


def _can_occur(line, known):
    """Whether a phrase of the table is a known word or made of known pairs of words."""
    words = line.split()
    if len(words) > 1:
        return all(pair in known for pair in zip(words, words[1:]))
    return tuple(words) in known


def _exact_matches(ours, i, their):
    """The matches of a reference's word i, as `look_up` gives it, with the same word."""
    word, _, _ = their
    return [Match(EXACT, j, 1, i, 1) for j, (our_word, _, _) in enumerate(ours) if our_word == word]


def _close_matches(ours, i, their):
    """The matches of a reference's word i with other words: first the same stem, then a synonym."""
    word, root, ids = their
    others = [(j, our_root, our_ids) for j, (our_word, our_root, our_ids) in enumerate(ours)
              if our_word != word]
    stems = [Match(STEM, j, 1, i, 1) for j, our_root, _ in others if our_root == root]
    synonyms = [Match(SYNONYM, j, 1, i, 1) for j, _, our_ids in others
                if not ids.isdisjoint(our_ids)]
    return stems + synonyms


def _spans(words):
    """[(phrase, start, length)] of all phrases of the words, and {phrase: [(start, length)]}."""
    every, places = [], {}
    for start in range(len(words)):
        for length in range(1, min(LONGEST_PHRASE, len(words) - start) + 1):
            phrase = " ".join(words[start:start + length])
            every.append((phrase, start, length))
            places.setdefault(phrase, []).append((start, length))
    return every, places
