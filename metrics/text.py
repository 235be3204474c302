"""BLEU, ROUGE-L and CIDEr as pycocoevalcap 1.2 computes them, TF-IDF similarity, R2Gen's cleaning.

    hypotheses = {"s1": ["heart size is normal ."]}                                one text an item
    references = {"s1": ["the heart is normal in size .", "normal heart size ."]}  one or more
    bleu(hypotheses, references)
    -> Score(corpus=(.8, .76, .65, .40), items={"s1": (.8, .76, .65, .40)})

A score is of texts that were cleaned before, and the cleaning decides more than most models do:
report it with the score. Texts are split at blanks, nothing is lower-cased or tokenised here.
Written from the formulas and by comparing with the running package. Standard library only.
"""

import math
import re
from collections import Counter
from typing import NamedTuple

ORDER = 4  # longest n-gram of BLEU and CIDEr


class Score(NamedTuple):
    """A score of a corpus and of its items.

    corpus  one number, a tuple of four for BLEU
    items   {id: the same for one item}
    """

    corpus: float
    items: dict


def check(hypotheses, references):
    """Checks what is to be scored.

    hypotheses  {id: [text]}
    references  {id: [text, ...]}
    Raises ValueError unless both have the same ids, each with one hypothesis and at least one
    reference, all strings.
    """
    if not hypotheses and not references:
        raise ValueError("empty input")
    sides = (("reference", hypotheses, references), ("hypothesis", references, hypotheses))
    for name, some, others in sides:
        missing = [key for key in some if key not in others]
        if missing:
            raise ValueError(f"{len(missing)} ids without {name}, the first is {missing[0]!r}")
    for key in hypotheses:
        for name, texts in (("hypothesis", hypotheses[key]), ("references", references[key])):
            is_list = isinstance(texts, list | tuple)
            if not is_list or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{key!r}: the {name} must be a list of strings")
        if len(hypotheses[key]) != 1:
            raise ValueError(f"{key!r} has {len(hypotheses[key])} hypotheses instead of one")
        if not references[key]:
            raise ValueError(f"{key!r} has no reference")


def _ngrams(tokens, n):
    """{n-gram: how often the tokens have it}, an n-gram being a tuple of n tokens."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


def bleu(hypotheses, references):
    """BLEU-1 .. BLEU-4 (Papineni et al. 2002), brevity penalty with the closest reference length.

        BLEU-n = BP (p_1 ... p_n)^(1/n)
        p_k    = (hits_k + 1e-15) / (guesses_k + 1e-9)
        BP     = exp(1 - 1 / ratio) if ratio < 1, else 1
        ratio  = (h + 1e-15) / (r + 1e-9)

    guesses_k: the k-grams of the hypothesis; hits_k: the same, each counted at most as often as in
    the reference that has it most often; h: words of the hypothesis; r: words of the reference
    nearest in length (of two, the shorter). The corpus score has the sums over the items in these
    formulas, it is not the mean.

    hypotheses  {id: [text]}
    references  {id: [text, ...]}, the same ids
    Returns Score of (BLEU-1, .., BLEU-4), equal to pycocoevalcap's Bleu(4), option 'closest',
    within 1e-9. O(number of words).
    Raises ValueError as `check` does.
    """
    check(hypotheses, references)
    items, total = {}, [0] * (2 * ORDER + 2)
    for key, (hypothesis,) in hypotheses.items():
        others = [reference.split() for reference in references[key]]
        counts = _bleu_counts(hypothesis.split(), others)
        items[key] = _bleu(counts)
        total = [a + b for a, b in zip(total, counts)]
    return Score(_bleu(total), items)


def _bleu_counts(tokens, others):
    """[4 numbers of hits, 4 of guesses, words, words of the nearest reference] of one item."""
    hits = []
    for n in range(1, ORDER + 1):
        most = Counter()
        for other in others:
            most |= _ngrams(other, n)
        hits.append((_ngrams(tokens, n) & most).total())
    guesses = [max(0, len(tokens) - n) for n in range(ORDER)]
    _, nearest = min((abs(len(other) - len(tokens)), len(other)) for other in others)
    return [*hits, *guesses, len(tokens), nearest]


def _bleu(counts):
    """(BLEU-1, .., BLEU-4) of what `_bleu_counts` returns or of its sum over items."""
    *counts, length, nearest = counts
    ratio = (length + 1e-15) / (nearest + 1e-9)
    penalty = math.exp(min(0, 1 - 1 / ratio))
    scores, product = [], 1
    for n, (hits, guesses) in enumerate(zip(counts[:ORDER], counts[ORDER:]), 1):
        product *= (hits + 1e-15) / (guesses + 1e-9)
        scores.append(penalty * product ** (1 / n))
    return tuple(scores)


def rouge_l(hypotheses, references):
    """ROUGE-L (Lin 2004): F-measure of the longest common subsequence, recall weighing more.

        F = (1 + b^2) P R / (R + b^2 P)     b = 1.2
        P = max lcs(h, r) / |h|
        R = max lcs(h, r) / |r|

    Each maximum is over the references by itself; F is 0 if nothing is common. Texts are split at
    each single blank, so that two blanks in a row make an empty word. Corpus: mean over items.

    hypotheses  {id: [text]}
    references  {id: [text, ...]}, the same ids
    Returns Score, equal to pycocoevalcap's Rouge within 1e-9. O(|h| |r|) for a pair.
    Raises ValueError as `check` does.
    """
    check(hypotheses, references)
    items = {}
    for key, (hypothesis,) in hypotheses.items():
        tokens, precision, recall = hypothesis.split(" "), 0, 0
        for reference in references[key]:
            other = reference.split(" ")
            common = _lcs(tokens, other)
            precision = max(precision, common / len(tokens))
            recall = max(recall, common / len(other))
        both = (1 + 1.2 ** 2) * precision * recall
        items[key] = both / (recall + 1.2 ** 2 * precision) if precision else 0.0
    return Score(math.fsum(items.values()) / len(items), items)


def _lcs(first, second):
    """Length of the longest common subsequence of two lists of words."""
    # row[j]: that of the words of `first` so far and second[:j]
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for j, other in enumerate(second, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def cider(hypotheses, references):
    """CIDEr-D (Vedantam et al. 2015), n = 1 .. 4, sigma = 6, document frequencies of this corpus.

        CIDEr = 10 * mean over n and over the references r of
                sum(min(g_n(h), g_n(r)) * g_n(r)) / (|g_n(h)| |g_n(r)|) * exp(-d^2 / (2 sigma^2))

    The vector g_n(text) holds count * idf of every n-gram, with idf = log N - log max(1, df): N
    items, df of them with the n-gram in a reference. d is the difference in the number of bigrams.
    Corpus: mean over items. Since idf comes from the corpus, an item's score depends on the others,
    and a corpus of one item scores 0.

    hypotheses  {id: [text]}
    references  {id: [text, ...]}, the same ids
    Returns Score, equal to pycocoevalcap's Cider within 1e-9; where no reference has a word that
    one fails, and this is 0. O(number of words).
    Raises ValueError as `check` does.
    """
    check(hypotheses, references)
    found = {key: [_all_ngrams(reference) for reference in references[key]] for key in references}
    frequency = Counter()
    for of_item in found.values():
        frequency.update({ngram for of_reference in of_item for of_order in of_reference
                          for ngram in of_order})
    idf = {ngram: math.log(len(found)) - math.log(max(1, df)) for ngram, df in frequency.items()}
    unseen = math.log(len(found))  # of an n-gram that is in no reference
    items = {}
    for key, (hypothesis,) in hypotheses.items():
        of_hypothesis = _all_ngrams(hypothesis)
        ours = _vectors(of_hypothesis, idf, unseen)
        total = 0
        for of_reference in found[key]:
            apart = of_hypothesis[1].total() - of_reference[1].total()
            gauss = math.exp(-apart ** 2 / (2 * 6 ** 2))
            theirs = _vectors(of_reference, idf, unseen)
            for (h, h_norm), (r, r_norm) in zip(ours, theirs):
                if h_norm and r_norm:
                    common = sum(min(value, r[ngram]) * r[ngram]
                                 for ngram, value in h.items() if ngram in r)
                    total += gauss * common / (h_norm * r_norm)
        items[key] = 10 * total / ORDER / len(found[key])
    return Score(math.fsum(items.values()) / len(items), items)


def _all_ngrams(text):
    """[{n-gram: count}] of a text, for n = 1 .. 4."""
    tokens = text.split()
    return [_ngrams(tokens, n) for n in range(1, ORDER + 1)]


def _vectors(of_text, idf, unseen):
    """[({n-gram: count * idf}, its length)] of what `_all_ngrams` returns."""
    weighted = [{ngram: count * idf.get(ngram, unseen) for ngram, count in of_order.items()}
                for of_order in of_text]
    return [(vector, math.hypot(*vector.values())) for vector in weighted]


def tf_idf(references):
    """TF-IDF (Salton and Buckley 1988) with document frequencies from the references.

    A text's vector has count * (1 + log((1 + n) / (1 + df))) for each word, divided by its length:
    n texts, df of them with the word. Words are runs of letters, digits and '_', lower-case. A word
    of no reference has df 0 and counts, in scikit-learn it is dropped.

    references  list of texts
    Returns a function of a text that gives {word: weight}, a vector of length 1, or {} for a text
    without words. For texts without other words it equals sklearn's
    TfidfVectorizer(token_pattern=r"\\w+") within 1e-12. O(number of words).
    """
    words = lambda text: re.findall(r"\w+", text.lower())
    frequency = Counter(word for reference in references for word in set(words(reference)))

    def vector(text):
        weights = {word: count * (1 + math.log((1 + len(references)) / (1 + frequency[word])))
                   for word, count in Counter(words(text)).items()}
        norm = math.hypot(*weights.values())
        return {word: weight / norm for word, weight in weights.items()}

    return vector


def similarity(hypotheses, references):
    """Cosine of the `tf_idf` vectors of a hypothesis and its nearest reference.

    It is 0 without a common word. Corpus: mean over items.

    hypotheses  {id: [text]}
    references  {id: [text, ...]}, the same ids; all of them give the document frequencies
    Returns Score, each number in 0..1. O(number of words).
    Raises ValueError as `check` does.
    """
    check(hypotheses, references)
    vector = tf_idf([text for texts in references.values() for text in texts])
    items = {}
    for key, (hypothesis,) in hypotheses.items():
        ours = vector(hypothesis)
        items[key] = max(math.fsum(weight * theirs.get(word, 0) for word, weight in ours.items())
                         for theirs in map(vector, references[key]))
    return Score(math.fsum(items.values()) / len(items), items)


def clean_r2gen(report):
    """A report as R2Gen (Chen et al. 2020, cuhksz-nlp/R2Gen) scores it.

    That is `clean_report_mimic_cxr`, then words joined by single blanks:

     1. Line ends become blanks; repeated '_', ' ' and '.' are halved a fixed number of times.
     2. List numbers 1. to 5. are removed, all is lower-cased and cut at '. '.
     3. In each sentence " / \\ ' and . , ? ; * ! % ^ & _ + ( ) : < = > @ [ ] { } are dropped; '-'
        and '#' stay.
     4. Sentences are joined by ' . '; an empty sentence stays, as ' . .'.

    What R2Gen does besides is left out: it cuts references at 99 words and turns words seen fewer
    than 10 times in training into <unk>.

    report  str
    Returns a str, equal to R2Gen's output on its tokenizer's words. O(length).
    """
    report = report.replace("\n", " ")
    for repeated, times in (("_", 7), (" ", 6), (".", 8)):
        for _ in range(times):
            report = report.replace(2 * repeated, repeated)
    report = report.replace("1. ", "")
    for before in (". ", " "):
        for number in "2345":
            report = report.replace(f"{before}{number}. ", ". ")
    sentences = report.strip().lower().split(". ")
    dropped = r"""["/\\'.,?;*!%^&_+(){}\]:-\[]"""
    cleaned = " . ".join(re.sub(dropped, "", sentence) for sentence in sentences) + " ."
    return " ".join(cleaned.split())
