"""Scores of answers against labels: accuracy, AUC, bootstrap intervals, Cohen's kappa.

Plain lists in, plain numbers out; standard library only. Where a score is undefined it is None,
never 0 or NaN.
"""

import math
import random
from collections import Counter
from typing import NamedTuple


class MacroAUC(NamedTuple):
    """The mean of several AUCs.

    value      the mean over the classes that have an AUC, None if none has
    per_class  {class: AUC or None}
    left_out   how many of these are None
    """

    value: float
    per_class: dict
    left_out: int


def _check(first, second):
    """Raises ValueError unless both sequences are of one length above 0."""
    if len(first) != len(second):
        raise ValueError(f"unequal lengths: {len(first)} and {len(second)}")
    if not len(first):
        raise ValueError("empty input")


def accuracy(labels, predictions):
    """The share of items that are right: sum(label == prediction) / n.

    labels       (n,) sequence of hashable classes
    predictions  (n,) sequence of the same; None, an answer that cannot be read, is wrong
    Returns a float in 0..1, equal to sklearn.metrics.accuracy_score. O(n).
    Raises ValueError for unequal lengths or empty input.
    """
    _check(labels, predictions)
    return sum(label == prediction for label, prediction in zip(labels, predictions)) / len(labels)


def macro_accuracy(labels, predictions):
    """The mean of the classes' recalls (Brodersen et al. 2010).

        mean over c of sum(label == prediction == c) / sum(label == c)

    Classes are those that occur in `labels`; who always answers the majority class gets
    1 / (number of classes).

    labels       (n,) sequence of hashable classes
    predictions  (n,) sequence of the same; None is wrong
    Returns a float in 0..1, equal to sklearn.metrics.balanced_accuracy_score within 1e-12. O(n).
    Raises ValueError for unequal lengths or empty input.
    """
    _check(labels, predictions)
    total = Counter(labels)
    right = Counter(label for label, prediction in zip(labels, predictions) if label == prediction)
    return sum(right[label] / count for label, count in total.items()) / len(total)


def auc(labels, scores):
    """The area under the ROC curve.

    It is the probability that a positive item scores above a negative one, a tie counting one half,
    computed as by Mann and Whitney (Hanley and McNeil 1982):

        AUC = (R - p (p + 1) / 2) / (p q)

    with p positives, q negatives, and R the sum of the positives' ranks, in which tied scores share
    their mean rank.

    labels  (n,) sequence of 0 / 1 or False / True
    scores  (n,) sequence of real numbers, infinities allowed; any increasing transform of them
            gives the same AUC
    Returns a float in 0..1, equal to sklearn.metrics.roc_auc_score within 1e-12, or None if only
    one class is present. O(n log n).
    Raises ValueError for unequal lengths, empty input, a label other than 0 and 1, a score that is
    NaN.
    """
    _check(labels, scores)
    if any(label not in (0, 1) for label in labels):
        raise ValueError("labels must be 0 or 1")
    if any(math.isnan(score) for score in scores):
        raise ValueError("a score is NaN")
    positives = sum(1 for label in labels if label)
    negatives = len(labels) - positives
    if not positives or not negatives:
        return None
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    twice_rank_sum = start = 0  # ranks are doubled, so that means of tied ranks stay integers
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        twice_rank_sum += (start + 1 + end) * sum(1 for i in order[start:end] if labels[i])
        start = end
    return (twice_rank_sum - positives * (positives + 1)) / (2 * positives * negatives)


def macro_auc(labels, scores):
    """The unweighted mean of `auc` over the classes that have both positive and negative items.

    labels  {class: (n_c,) sequence of 0 / 1}; classes may differ in length, so that items without a
            label can be left out class by class
    scores  {class: (n_c,) sequence of real numbers}, the same classes
    Returns MacroAUC. If no class is left out and all have the same items, its value equals
    sklearn.metrics.roc_auc_score(..., average="macro") within 1e-12. O(sum of n_c log n_c).
    Raises ValueError for no classes, other classes in `scores` than in `labels`, or what `auc`
    raises, with the class named.
    """
    if not labels or set(labels) != set(scores):
        raise ValueError(f"labels have the classes {sorted(map(str, labels))}, "
                         f"scores {sorted(map(str, scores))}")
    per_class = {}
    for name in labels:
        try:
            per_class[name] = auc(labels[name], scores[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    known = [value for value in per_class.values() if value is not None]
    mean = math.fsum(known) / len(known) if known else None
    return MacroAUC(mean, per_class, len(per_class) - len(known))


def bootstrap_interval(statistic, *columns, level=0.95, samples=1000, seed=0):
    """A percentile bootstrap interval (Efron 1979), as of bootstrap_interval(auc, labels, scores).

    The statistic is computed on `samples` sets of n items that are drawn with replacement. The
    bounds are its (1 - level) / 2 and (1 + level) / 2 quantiles, interpolated linearly between
    order statistics as numpy.percentile does.

    statistic  function of the resampled columns, e.g. `auc`; resamples where it returns None are
               left out
    columns    one or more (n,) sequences, whose items are drawn jointly
    level      share of the resampled statistics that the interval covers, in 0..1
    samples    number of resamples
    seed       of random.Random, from which the draws come; the same seed, the same interval
    Returns (low, high). O(samples * (n + cost of the statistic)).
    Raises ValueError for no column, unequal lengths, empty input, level or samples out of range, a
    statistic that is None in all resamples.
    """
    if not columns:
        raise ValueError("no column to resample")
    for column in columns:
        _check(columns[0], column)
    if not 0 < level < 1 or samples < 1:
        raise ValueError("level must lie between 0 and 1 and samples be at least 1, "
                         f"not {level} and {samples}")
    rng, n = random.Random(seed), len(columns[0])
    values = []
    for _ in range(samples):
        drawn = rng.choices(range(n), k=n)
        values.append(statistic(*([column[i] for i in drawn] for column in columns)))
    values = sorted(value for value in values if value is not None)
    if not values:
        raise ValueError("the statistic is undefined in every resample")
    return _quantile(values, (1 - level) / 2), _quantile(values, (1 + level) / 2)


def _quantile(ordered, share):
    """The quantile of an ordered list at a share in 0..1, between two items a weighted mean."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def cohen_kappa(first, second):
    """Agreement of two raters beyond chance (Cohen 1960).

        kappa = (p_o - p_e) / (1 - p_e)

    p_o is the share of items on which they agree, p_e = sum over c of
    share_first(c) * share_second(c).

    first   (n,) sequence of hashable classes
    second  (n,) sequence of the same
    Returns a float in -1..1, equal to sklearn.metrics.cohen_kappa_score (unweighted) within 1e-12,
    or None (NaN there) if both raters give all items one same class (p_e = 1). O(n).
    Raises ValueError for unequal lengths or empty input.
    """
    _check(first, second)
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second))
    counts_first, counts_second = Counter(first), Counter(second)
    # n^2 p_e, an integer
    by_chance = sum(count * counts_second[name] for name, count in counts_first.items())
    return (n * agreed - by_chance) / (n * n - by_chance) if by_chance < n * n else None
