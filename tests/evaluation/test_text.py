"""BLEU, ROUGE-L, CIDEr and R2Gen's cleaning of metrics/text.py.

Numbers are worked out by hand; where pycocoevalcap is installed it is the oracle.
"""

import math
import random

import pytest

from metrics.text import bleu, cider, clean_r2gen, rouge_l, similarity, tf_idf

METRICS = {"bleu": bleu, "rouge_l": rouge_l, "cider": cider}
WORDS = ("the heart is normal in size . no pleural effusion , or pneumothorax seen 2.5 cm "
         "left-sided T5/T6 ( stable ) größer 肺炎 naïve e\u0301dème \U0001fac1 İ ß").split()


def random_text(rng, longest):
    """Words between single blanks.

    Now and then there is a double blank, a tab, a no-break space or a blank at an end.
    """
    words = [rng.choice(WORDS[:rng.choice((8, len(WORDS)))])
             for _ in range(rng.randint(0, longest))]
    text = "".join(word + rng.choice([" "] * 20 + ["  ", "\t", "\u00a0"]) for word in words)
    return text if rng.random() < 0.1 else text.strip()


def vary(rng, text):
    """The text with some words dropped or replaced."""
    return " ".join(rng.choice(WORDS) if rng.random() < 0.2 else word
                    for word in text.split(" ") if rng.random() < 0.9)


def random_corpus(rng, size):
    """(hypotheses, references) of `size` items, with 1 to 4 references.

    Of the hypotheses an eighth each is empty, identical with a reference and unrelated.
    """
    hypotheses, references = {}, {}
    for i in range(size):
        others = [random_text(rng, rng.choice((3, 12, 60))) for _ in range(rng.randint(1, 4))]
        # pycocoevalcap's CIDEr fails on a corpus without any word in the references
        others[0] = others[0].strip() or "normal"
        near = vary(rng, others[0])
        kinds = ["", others[-1], random_text(rng, 20), near, near, near, near, near]
        hypotheses[f"s{i}"] = [rng.choice(kinds)]
        references[f"s{i}"] = others
    return hypotheses, references


CORPORA = [(size, seed) for size, seeds in ((1, 60), (2, 30), (5, 20), (40, 10))
           for seed in range(seeds)]  # 620 items
ORACLE = "pycocoevalcap is the oracle of this test; it is in tests/requirements.txt"


@pytest.fixture(scope="module")
def oracles():
    for module in ("bleu.bleu", "rouge.rouge", "cider.cider"):
        pytest.importorskip(f"pycocoevalcap.{module}", reason=ORACLE)
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    return {"bleu": Bleu, "rouge_l": Rouge, "cider": Cider}


@pytest.mark.parametrize("name", METRICS)
def test_scores_equal_pycocoevalcap(oracles, name):
    """Corpus and items within 1e-9.

    Corpora have 1 to 40 items, empty texts, several references, unicode and odd blanks.
    """
    items = empty = several = 0
    for size, seed in CORPORA:
        hypotheses, references = random_corpus(random.Random(1000 * size + seed), size)
        quiet = [0] if name == "bleu" else []
        corpus, per_item = oracles[name]().compute_score(references, hypotheses, *quiet)
        if name == "bleu":
            corpus, per_item = tuple(corpus), zip(*per_item)
        ours = METRICS[name](hypotheses, references)
        assert ours.corpus == pytest.approx(corpus, rel=0, abs=1e-9)
        assert list(ours.items) == list(references)
        for value, expected in zip(ours.items.values(), per_item, strict=True):
            assert value == pytest.approx(expected, rel=0, abs=1e-9)
        items += size
        empty += sum(hypothesis == [""] for hypothesis in hypotheses.values())
        several += sum(len(others) > 1 for others in references.values())
    assert items >= 500 and empty >= 50 and several >= 300


def test_bleu_by_hand():
    # words 4 of 4, bigrams 1 of 3, no trigram; the nearest reference has 5 words
    references = ["no effusion or is seen", "a b c d e f g seen"]
    (one, two, three, four), _ = bleu({"a": ["no effusion is seen"]}, {"a": references})
    penalty = math.exp(1 - 5 / 4)
    assert one == pytest.approx(penalty) and two == pytest.approx(penalty * (2 / 3) ** 0.5)
    assert 0 < four < three < 1e-4  # 1e-15 instead of no hit


def test_bleu_counts_a_repeated_word_as_often_as_one_reference_has_it():
    (one, *_), _ = bleu({"a": ["no no no no"]}, {"a": ["no no a b", "no c d e"]})
    assert one == pytest.approx(2 / 4)


def test_bleu_takes_the_shorter_of_two_references_that_are_equally_near():
    (one, *_), _ = bleu({"a": ["w x y"]}, {"a": ["w x y z", "w x"]})
    assert one == pytest.approx(1)


def test_bleu_of_a_corpus_is_not_the_mean():
    corpus, items = bleu({"a": ["x"], "b": ["y y y"]}, {"a": ["x"], "b": ["z z z"]})
    (of_a, *_), (of_b, *_) = items["a"], items["b"]
    assert corpus[0] == pytest.approx(1 / 4) and (of_a + of_b) / 2 == pytest.approx(1 / 2)


def test_rouge_l_by_hand():
    # "the is normal" of 3 and of 5 words: P = 1 from the first reference, R = 1 from the second
    score = rouge_l({"a": ["the is normal"]}, {"a": ["the heart is normal today", "is"]})
    assert score.corpus == pytest.approx(1) and score.items == {"a": score.corpus}
    score = rouge_l({"a": ["the is normal"]}, {"a": ["the heart is normal today"]})
    assert score.corpus == pytest.approx(2.44 * 0.6 / (0.6 + 1.44))
    assert rouge_l({"a": ["x"], "b": ["y"]}, {"a": ["x"], "b": ["z"]}).corpus == 0.5


def test_rouge_l_counts_the_empty_word_between_two_blanks():
    assert rouge_l({"a": ["x  y"]}, {"a": ["x  y"]}).corpus == pytest.approx(1)
    score = rouge_l({"a": ["x  y"]}, {"a": ["x y"]})
    assert score.corpus == pytest.approx(2.44 * 2 / 3 / (1 + 1.44 * 2 / 3))


def test_cider_by_hand():
    # only "x" and "y" are shared by nobody else: cosine 1 for n = 1, no bigrams at all
    score = cider({"a": ["x"], "b": ["z"]}, {"a": ["x"], "b": ["y"]})
    assert score.items == {"a": pytest.approx(10 / 4), "b": 0}
    assert score.corpus == pytest.approx(10 / 8)


def test_no_words_anywhere_score_zero():
    for metric in METRICS.values():
        corpus, items = metric({"a": [""]}, {"a": [""]})
        assert corpus == items["a"]
    assert cider({"a": [""]}, {"a": [""]}).corpus == 0
    assert rouge_l({"a": [""]}, {"a": ["x"]}).corpus == 0


def test_cider_of_one_item_is_zero():
    assert cider({"a": ["x y z w"]}, {"a": ["x y z w"]}) == (0, {"a": 0})


def test_tf_idf_similarity_equals_scikit_learn():
    oracle = pytest.importorskip("sklearn.feature_extraction.text",
                                 reason="scikit-learn is the oracle of this test")
    hypotheses, references = random_corpus(random.Random(0), 60)
    texts = [text for others in references.values() for text in others]
    known = " ".join(texts).split()
    hypotheses = {key: [" ".join(word for word in text.split() if word in known)]
                  for key, (text,) in hypotheses.items()}
    vectorizer = oracle.TfidfVectorizer(token_pattern=r"\w+").fit(texts)
    vector_of = lambda text: vectorizer.transform([text])
    cosine = lambda one, other: (vector_of(one) @ vector_of(other).T)[0, 0]
    expected = {key: max(cosine(text, other) for other in references[key])
                for key, (text,) in hypotheses.items()}
    score = similarity(hypotheses, references)
    assert score.items == pytest.approx(expected, abs=1e-9)
    assert score.corpus == pytest.approx(sum(expected.values()) / 60, abs=1e-9)
    vector = tf_idf(texts)
    for text in texts[:20]:
        row, names = vector_of(text), vectorizer.get_feature_names_out()
        assert vector(text) == pytest.approx({names[i]: row[0, i] for i in row.indices}, abs=1e-12)


def test_a_word_of_no_reference_lowers_the_similarity():
    references = {"a": ["mild edema"], "b": ["no edema"]}
    score = similarity({"a": ["Mild edema."], "b": ["no edema zebra"]}, references)
    assert score.items["a"] == pytest.approx(1) and 0 < score.items["b"] < 0.9
    assert similarity({"a": [""], "b": ["x"]}, references) == (0, {"a": 0, "b": 0})


@pytest.mark.parametrize("metric", [*METRICS.values(), similarity], ids=[*METRICS, "similarity"])
@pytest.mark.parametrize("hypotheses, references, message", [
    ({}, {}, "empty input"),
    ({"a": ["x"], "b": ["y"]}, {"a": ["x"]}, "1 ids without reference, the first is 'b'"),
    ({"a": ["x"]}, {"a": ["x"], "c": ["y"]}, "1 ids without hypothesis, the first is 'c'"),
    ({"a": "x"}, {"a": ["x"]}, "'a': the hypothesis must be a list of strings"),
    ({"a": ["x"]}, {"a": [3]}, "'a': the references must be a list of strings"),
    ({"a": ["x", "y"]}, {"a": ["x"]}, "'a' has 2 hypotheses instead of one"),
    ({"a": ["x"]}, {"a": []}, "'a' has no reference"),
])
def test_bad_input_is_an_error(metric, hypotheses, references, message):
    with pytest.raises(ValueError, match=message):
        metric(hypotheses, references)


@pytest.mark.parametrize("report, cleaned", [
    ("The heart is normal.\nNo effusion.", "the heart is normal . no effusion ."),
    ("1. Heart normal. 2. No effusion. 3. Clear.", "heart normal . no effusion . clear ."),
    ("FINDINGS: The lungs\n  are   clear", "findings the lungs are clear ."),
    # ':-[' is a range from ':' to '[', so '-' and '#' stay
    ("A:B;C <d> =e @f [g] {h} (i) j_k l+m n? o! p* q% r^ s&",
     "abc d e f g h i jk lm n o p q r s ."),
    ("left-sided #3", "left-sided #3 ."),
    ("a/b \\ c's \"d\"", "ab cs d ."),
    ("seen on ___ , ________ .", "seen on ."),
    ("Normal. . . Clear", "normal . . . clear ."),  # empty sentences stay
    ("Size 2.5 cm. Ends", "size 25 cm . ends ."),
    ("wait ... stop", "wait . stop ."),
    ("Compared to 1. and 10. are", "compared to and 10 . are ."),
    ("grade 2. today", "grade . today ."),          # ' 2. ' is taken for a list number
    ("", "."),
    ("ÖDEM. Größe", "ödem . größe ."),
])
def test_r2gen_cleaning(report, cleaned):
    assert clean_r2gen(report) == cleaned


def test_r2gen_cleaning_halves_repeats_a_fixed_number_of_times():
    assert clean_r2gen("a" + "." * 2 ** 8 + " b") == "a . b ."
    assert clean_r2gen("a" + "_" * 1000 + "b") == "ab ."
    assert clean_r2gen("a" + " " * 500 + "b") == "a b ."
