"""Scores of answers against labels: accuracy, macro accuracy, AUC, macro AUC, bootstrap intervals, Cohen's kappa.

Plain lists in, plain numbers out; standard library only. Where a score is undefined it is None, never 0 or NaN.
"""

import math
import random
from collections import Counter
from typing import NamedTuple


class MacroAUC(NamedTuple):
    """`value`: the mean over the classes that have an AUC, None if none has. `per_class`: {class: AUC or None}. `left_out`: how many are None."""

    value: float
    per_class: dict
    left_out: int


def _check(first, second):
    if len(first) != len(second):
        raise ValueError(f"unequal lengths: {len(first)} and {len(second)}")
    if not len(first):
        raise ValueError("empty input")


def accuracy(labels, predictions):
    """The share of items that are right: sum(label == prediction) / n.

    Args:
        labels, predictions: (n,) sequences of hashable classes; a prediction of None (an answer that cannot be read) is wrong

    Returns:
        float in 0..1. Equals sklearn.metrics.accuracy_score exactly. O(n).

    Raises:
        ValueError: unequal lengths or empty input.
    """
    _check(labels, predictions)
    return sum(label == prediction for label, prediction in zip(labels, predictions)) / len(labels)


def macro_accuracy(labels, predictions):
    """The mean over the classes of their recall: mean over c of sum(label == prediction == c) / sum(label == c).

    Classes are those that occur in `labels`; always answering the majority class gives 1 / (number of classes).

    Args:
        labels, predictions: (n,) sequences of hashable classes; a prediction of None is wrong

    Returns:
        float in 0..1. Equals sklearn.metrics.balanced_accuracy_score (Brodersen et al. 2010) within 1e-12. O(n).

    Raises:
        ValueError: unequal lengths or empty input.
    """
    _check(labels, predictions)
    total = Counter(labels)
    right = Counter(label for label, prediction in zip(labels, predictions) if label == prediction)
    return sum(right[label] / count for label, count in total.items()) / len(total)


def auc(labels, scores):
    """The area under the ROC curve: the probability that a positive item scores above a negative one, ties counting one half.

    Mann-Whitney (Hanley and McNeil 1982): AUC = (R - p (p + 1) / 2) / (p q) with p positives, q negatives, and R the sum of the
    positives' ranks, tied scores sharing their mean rank.

    Args:
        labels: (n,) sequence of 0 / 1 or False / True
        scores: (n,) sequence of real numbers, infinities allowed; any increasing transform gives the same AUC

    Returns:
        float in 0..1, or None if only one class is present. Equals sklearn.metrics.roc_auc_score within 1e-12. O(n log n).

    Raises:
        ValueError: unequal lengths, empty input, a label other than 0 and 1, a score that is NaN.
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

    Args:
        labels: {class: (n_c,) sequence of 0 / 1}; classes may differ in length, so items without a label can be left out class by class
        scores: {class: (n_c,) sequence of real numbers}, the same classes

    Returns:
        MacroAUC(value, per_class, left_out). If no class is left out and all have the same items, `value` equals
        sklearn.metrics.roc_auc_score(..., average="macro") within 1e-12. O(sum of n_c log n_c).

    Raises:
        ValueError: no classes, other classes in `scores` than in `labels`, or what `auc` raises, with the class named.
    """
    if not labels or set(labels) != set(scores):
        raise ValueError(f"labels have the classes {sorted(map(str, labels))}, scores {sorted(map(str, scores))}")
    per_class = {}
    for name in labels:
        try:
            per_class[name] = auc(labels[name], scores[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    known = [value for value in per_class.values() if value is not None]
    return MacroAUC(math.fsum(known) / len(known) if known else None, per_class, len(per_class) - len(known))


def bootstrap_interval(statistic, *columns, level=0.95, samples=1000, seed=0):
    """A percentile bootstrap interval (Efron 1979): the statistic of `samples` sets of n items drawn with replacement.

    The bounds are the (1 - level) / 2 and (1 + level) / 2 quantiles, interpolated linearly between order statistics as numpy.percentile
    does. The draws come from random.Random(seed): the same seed gives the same interval.

    Args:
        statistic: function of the resampled columns, e.g. `auc`; resamples where it returns None are left out
        columns: one or more (n,) sequences; items are drawn jointly, e.g. bootstrap_interval(auc, labels, scores)
        level: share of the resampled statistics that the interval covers, in 0..1
        samples: number of resamples
        seed: seed of the draws

    Returns:
        (low, high). O(samples * (n + cost of the statistic)).

    Raises:
        ValueError: no column, unequal lengths, empty input, level or samples out of range, a statistic that is None in all resamples.
    """
    if not columns:
        raise ValueError("no column to resample")
    for column in columns:
        _check(columns[0], column)
    if not 0 < level < 1 or samples < 1:
        raise ValueError(f"level must lie between 0 and 1 and samples be at least 1, not {level} and {samples}")
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
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def cohen_kappa(first, second):
    """Agreement of two raters beyond chance (Cohen 1960): kappa = (p_o - p_e) / (1 - p_e).

    p_o is the share of items on which they agree, p_e = sum over c of share_first(c) * share_second(c).

    Args:
        first, second: (n,) sequences of hashable classes

    Returns:
        float in -1..1, or None if both raters give all items one same class (p_e = 1).
        Equals sklearn.metrics.cohen_kappa_score (unweighted; it gives NaN where this gives None) within 1e-12. O(n).

    Raises:
        ValueError: unequal lengths or empty input.
    """
    _check(first, second)
    n = len(first)
    agreed = sum(a == b for a, b in zip(first, second))
    counts_first, counts_second = Counter(first), Counter(second)
    by_chance = sum(count * counts_second[name] for name, count in counts_first.items())  # n^2 p_e, an integer
    return (n * agreed - by_chance) / (n * n - by_chance) if by_chance < n * n else None
