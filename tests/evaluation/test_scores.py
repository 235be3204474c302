"""The scores of metrics/scores.py: worked out by hand, properties, and scikit-learn as oracle."""

import math
import random

import pytest

from metrics.scores import accuracy, auc, bootstrap_interval, cohen_kappa, macro_accuracy, macro_auc

ORACLE = "scikit-learn is the oracle of this test; it is in tests/requirements.txt"


def test_accuracy_is_the_share_of_right_answers():
    assert accuracy([1, 0, 1, 2], [1, 1, 1, 2]) == 0.75


def test_an_unread_answer_is_wrong():
    assert accuracy([1, 0], [1, None]) == 0.5
    assert macro_accuracy([1, 0], [1, None]) == 0.5


def test_macro_accuracy_is_the_mean_recall_of_the_classes():
    value = macro_accuracy(["a", "a", "a", "b"], ["a", "a", "c", "b"])
    assert value == pytest.approx((2 / 3 + 1) / 2)


def test_macro_accuracy_of_the_majority_answer_is_one_over_the_number_of_classes():
    assert macro_accuracy([0] * 90 + [1] * 9 + [2], [0] * 100) == pytest.approx(1 / 3)


def test_auc_counts_the_pairs_in_the_right_order():
    # positives .8 .4, negatives .5 .3: (.8 > .5) (.8 > .3) (.4 > .3) of four pairs
    assert auc([1, 1, 0, 0], [0.8, 0.4, 0.5, 0.3]) == 0.75


def test_auc_counts_a_tie_as_one_half():
    assert auc([1, 0], [0.5, 0.5]) == 0.5
    # positives 2 1, negatives 2 0: 1/2 + 1 + 0 + 1 of four pairs
    assert auc([1, 1, 0, 0], [2, 1, 2, 0]) == 0.625


def test_auc_of_perfect_reversed_and_constant_scores():
    assert auc([0, 0, 1, 1], [1, 2, 3, 4]) == 1
    assert auc([1, 1, 0, 0], [1, 2, 3, 4]) == 0
    assert auc([1, 0, 1, 0], [7, 7, 7, 7]) == 0.5


def test_auc_takes_booleans_and_infinities():
    assert auc([True, False], [math.inf, -math.inf]) == 1


def test_auc_is_none_when_one_class_is_missing():
    assert auc([1, 1], [0.1, 0.2]) is None
    assert auc([0], [0.1]) is None


def test_auc_equals_the_count_over_all_pairs():
    rng = random.Random(1)
    for _ in range(50):
        n = rng.randint(2, 40)
        labels = [0, 1] + [rng.randint(0, 1) for _ in range(n - 2)]
        scores = [rng.randint(0, 6) for _ in range(n)]
        above = [score for score, label in zip(scores, labels) if label]
        below = [score for score, label in zip(scores, labels) if not label]
        pairs = [(a > b) + (a == b) / 2 for a in above for b in below]
        assert auc(labels, scores) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_is_unchanged_by_an_increasing_transform():
    rng = random.Random(2)
    labels = [rng.randint(0, 1) for _ in range(200)]
    scores = [rng.uniform(-3, 3) for _ in range(200)]
    assert auc(labels, scores) == auc(labels, [math.exp(score) for score in scores])


def test_macro_auc_leaves_out_classes_without_both_and_says_how_many():
    labels = {"Edema": [1, 0], "Fracture": [0, 0], "Pneumonia": [1, 0, 1]}
    scores = {"Edema": [0.9, 0.1], "Fracture": [0.3, 0.4], "Pneumonia": [0.2, 0.5, 0.7]}
    result = macro_auc(labels, scores)
    assert result == (0.75, {"Edema": 1.0, "Fracture": None, "Pneumonia": 0.5}, 1)


def test_macro_auc_of_no_usable_class_is_none():
    assert macro_auc({"Edema": [1]}, {"Edema": [0.3]}) == (None, {"Edema": None}, 1)


def test_kappa_by_hand():
    # agree on 20 + 15 of 50; chance (25 * 30 + 25 * 20) / 2500 = .5; kappa = (.7 - .5) / .5
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohen_kappa(first, second) == pytest.approx(0.4, abs=1e-12)


def test_kappa_of_full_agreement_chance_and_full_disagreement():
    assert cohen_kappa([0, 1, 2], [0, 1, 2]) == 1
    assert cohen_kappa([0, 0, 1, 1], [0, 1, 0, 1]) == 0
    assert cohen_kappa([0, 1], [1, 0]) == -1


def test_kappa_is_none_when_chance_explains_everything():
    assert cohen_kappa([1, 1], [1, 1]) is None


def test_bootstrap_interval_repeats_with_the_seed_and_changes_with_it():
    rng = random.Random(3)
    labels = [rng.randint(0, 1) for _ in range(60)]
    scores = [label + rng.gauss(0, 1) for label in labels]
    first = bootstrap_interval(auc, labels, scores, samples=200, seed=5)
    assert first == bootstrap_interval(auc, labels, scores, samples=200, seed=5)
    assert first != bootstrap_interval(auc, labels, scores, samples=200, seed=6)
    assert first[0] < auc(labels, scores) < first[1]


def test_bootstrap_interval_draws_items_jointly():
    column = list(range(20))
    assert bootstrap_interval(accuracy, column, column, samples=50) == (1, 1)


def test_bootstrap_interval_of_a_mean_matches_its_standard_error():
    values = [0, 1] * 100
    low, high = bootstrap_interval(lambda drawn: sum(drawn) / len(drawn), values, samples=2000)
    error = 1.96 * math.sqrt(0.25 / 200)
    assert low == pytest.approx(0.5 - error, abs=0.01)
    assert high == pytest.approx(0.5 + error, abs=0.01)


def test_bootstrap_interval_widens_with_the_level():
    values = [random.Random(4).gauss(0, 1) for _ in range(50)] + list(range(10))
    mean = lambda drawn: sum(drawn) / len(drawn)
    narrow = bootstrap_interval(mean, values, level=0.5, samples=300)
    wide = bootstrap_interval(mean, values, level=0.99, samples=300)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_bootstrap_interval_leaves_out_undefined_resamples():
    low, high = bootstrap_interval(auc, [1, 0], [0.9, 0.1], samples=100)
    assert (low, high) == (1, 1)
    with pytest.raises(ValueError, match="undefined"):
        bootstrap_interval(auc, [1, 1], [0.9, 0.1], samples=10)


@pytest.mark.parametrize("function", [
    accuracy, macro_accuracy, auc, cohen_kappa, lambda a, b: bootstrap_interval(accuracy, a, b)])
def test_unequal_lengths_and_empty_input_are_errors(function):
    with pytest.raises(ValueError, match="unequal lengths: 2 and 1"):
        function([1, 0], [1])
    with pytest.raises(ValueError, match="empty"):
        function([], [])


def test_other_bad_input_is_an_error():
    with pytest.raises(ValueError, match="0 or 1"):
        auc([1, -1], [0.1, 0.2])
    with pytest.raises(ValueError, match="NaN"):
        auc([1, 0], [0.1, math.nan])
    with pytest.raises(ValueError, match="classes"):
        macro_auc({"Edema": [1]}, {"Fracture": [0.1]})
    with pytest.raises(ValueError, match="classes"):
        macro_auc({}, {})
    with pytest.raises(ValueError, match="Edema: unequal lengths"):
        macro_auc({"Edema": [1, 0]}, {"Edema": [0.1]})
    with pytest.raises(ValueError, match="no column"):
        bootstrap_interval(auc)
    with pytest.raises(ValueError, match="level"):
        bootstrap_interval(accuracy, [1], [1], level=1)
    with pytest.raises(ValueError, match="samples"):
        bootstrap_interval(accuracy, [1], [1], samples=0)


@pytest.mark.parametrize("seed", range(20))
def test_scores_equal_scikit_learn(seed):
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = random.Random(seed)
    n, classes = rng.randint(2, 300), rng.randint(2, 5)
    labels = [0, 1] + [rng.randrange(classes) for _ in range(n - 2)]
    predictions = [label if rng.random() < 0.6 else rng.randrange(classes) for label in labels]
    assert accuracy(labels, predictions) == oracle.accuracy_score(labels, predictions)
    # it warns of classes without labels
    known = [prediction if prediction in labels else labels[0] for prediction in predictions]
    balanced = oracle.balanced_accuracy_score(labels, known)
    assert macro_accuracy(labels, known) == pytest.approx(balanced, abs=1e-12)
    kappa = oracle.cohen_kappa_score(labels, predictions)
    assert cohen_kappa(labels, predictions) == pytest.approx(kappa, abs=1e-12)
    binary = [0, 1] + [rng.randint(0, 1) for _ in range(n - 2)]
    for scores in ([rng.gauss(label, 1) for label in binary], [rng.randint(0, 4) for _ in binary]):
        area = oracle.roc_auc_score(binary, scores)
        assert auc(binary, scores) == pytest.approx(area, abs=1e-12)


def test_macro_auc_equals_scikit_learn():
    oracle = pytest.importorskip("sklearn.metrics", reason=ORACLE)
    rng = random.Random(9)
    labels = [[rng.randint(0, 1) for _ in range(14)] for _ in range(500)]
    scores = [[label + rng.gauss(0, 2) for label in row] for row in labels]
    ours = macro_auc(dict(enumerate(zip(*labels))), dict(enumerate(zip(*scores))))
    macro = oracle.roc_auc_score(labels, scores, average="macro")
    assert ours.value == pytest.approx(macro, abs=1e-12)
    assert ours.left_out == 0


def test_bootstrap_bounds_equal_numpy_percentiles():
    numpy = pytest.importorskip("numpy", reason="numpy.percentile is the oracle of this test")
    values = [random.Random(8).random() for _ in range(37)]
    seen = []

    def mean(drawn):
        seen.append(sum(drawn) / len(drawn))
        return seen[-1]

    bounds = bootstrap_interval(mean, values, level=0.9, samples=123)
    assert bounds == pytest.approx(tuple(numpy.percentile(seen, [5, 95])), abs=1e-12)
