"""METEOR of metrics/meteor.py against the program itself, meteor-1.5.jar.

Where pycocoevalcap is installed, which has METEOR's files, 1,000 random items are scored and
compared with the running jar. Without Java they are compared with scores that it gave before, and a
warning says so. The pairs at the end need neither: they use word lists of our own, with which the
jar's code was run.
"""

import gzip
import random
import shutil
import statistics
import warnings
import zipfile

import pytest
from bench_metrics import SENTENCES, random_report, run_jar

from metrics.meteor import JAR, TABLE, Meteor, find_folder, stem

ODD = ["½", "µL", "Größe", "肺炎", "e\u0301dema", "\U0001fac1", "Ωmega", "naïve", "a_b",
       "#3", "e.g.", "U.S.A.", "No.", "Dr.", "...", "3,000", "-", "''", "and/or", "T5-T6",
       "''stable''", "isn't", "patients'", "38.5°", "(", "!?", "\u00a0", "x-ray", "--", "$5",
       "10%", "ﬁne", "İ", "1.5.", "'s", "&"]


def random_items(count=1000):
    """[(hypothesis, references)]: reports of one to five sentences, up to three references.

    Some texts are empty, equal, shuffled or odd.
    """
    rng, sentences, items = random.Random(0), SENTENCES.splitlines(), []
    for _ in range(count):
        topics = rng.choices(sentences, k=rng.choice((1, 1, 2, 3, 5)))
        references = [random_report(rng, [topic for topic in topics if rng.random() < 0.9])
                      for _ in range(rng.choice((1, 1, 2, 3)))]
        words = random_report(rng, topics).split()
        kind = rng.random()
        if kind < 0.03:
            words = []
        elif kind < 0.08:
            words = rng.choice(references).split()
        elif kind < 0.2:
            rng.shuffle(words)
        elif kind < 0.4:
            words = [rng.choice(ODD) if rng.random() < 0.2 else word for word in words]
            references[0] = " ".join(rng.choice(ODD) if rng.random() < 0.1 else word
                                     for word in references[0].split())
        elif kind < 0.5:
            words = [word.upper() if rng.random() < 0.5 else word.strip(".,")
                     for word in words]
        items.append((" ".join(words), references))
    return items


def corpus(items):
    hypotheses = {i: [hypothesis] for i, (hypothesis, _) in enumerate(items)}
    return hypotheses, {i: references for i, (_, references) in enumerate(items)}


@pytest.fixture(scope="module")
def folder():
    try:
        return find_folder()
    except FileNotFoundError as error:
        warnings.warn("pycocoevalcap is not installed: METEOR is compared with frozen scores of a "
                      "few pairs only", stacklevel=1)
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def scored(folder):
    """(items, our scores of them); the table is read once for all tests."""
    items = random_items()
    return items, Meteor(folder).score(*corpus(items))


def test_the_random_items_are_of_all_kinds():
    items = random_items()
    texts = [hypothesis for hypothesis, _ in items]
    assert len(items) == 1000 and texts.count("") >= 20
    assert sum(hypothesis in references for hypothesis, references in items) >= 30
    assert sum(len(references) > 1 for _, references in items) >= 300
    assert sum(any(letter > "\u00ff" for letter in text) for text in texts) >= 50


def test_scores_equal_the_running_jar(folder, scored):
    """Each of 1,000 items and the corpus, within 1e-9."""
    if not shutil.which("java"):
        warnings.warn("no Java: METEOR is compared with frozen scores only", stacklevel=1)
        pytest.skip("no Java; the frozen scores are compared")
    items, ours = scored
    total, scores, _ = run_jar(folder, items)
    assert list(ours.items.values()) == pytest.approx(scores, rel=0, abs=1e-9)
    assert ours.corpus == pytest.approx(total, rel=0, abs=1e-9)


# The jar's corpus score of random_items() and the means of 50 item scores in a row:
# total, scores, _ = run_jar(find_folder(), random_items())
# [statistics.mean(scores[i:i + 50]) for i in range(0, 1000, 50)]
FROZEN_CORPUS = 0.3071264825567542
FROZEN = [0.3550591570143, 0.3391585662343, 0.3205483419538, 0.3095402203702, 0.2491074258925,
          0.3641153607184, 0.3564931437403, 0.3159292208324, 0.3777619188771, 0.3161431966774,
          0.3108905971747, 0.3101830967982, 0.3076328409871, 0.3529468613752, 0.3262781869894,
          0.2908945321815, 0.3108112121146, 0.3747745691113, 0.3155983172409, 0.3461269181174]


def test_scores_equal_those_that_the_jar_gave(scored):
    _, ours = scored
    values = list(ours.items.values())
    means = [statistics.mean(values[i:i + 50]) for i in range(0, len(values), 50)]
    assert means == pytest.approx(FROZEN, rel=0, abs=1e-11)
    assert ours.corpus == pytest.approx(FROZEN_CORPUS, rel=0, abs=1e-9)


# Word lists of our own in METEOR's formats.
FUNCTION_WORDS = ["the", "is", "no", "of", "a", ".", ","]
PREFIXES = ["# comment", "Dr", "No #NUMERIC_ONLY#"]
SYNSETS = ["big", "1 2", "large", "2", "ox", "7", "cattle", "7 8", "film", "9", "x_ray", "9",
           "radiograph", "9"]
EXCEPTIONS = ["ox", "oxen", "film", "filmed filmy"]
PARAPHRASES = [("no evidence of", "without"), ("without", "no evidence of"),
               ("pleural effusion", "fluid in the chest"), ("seen", "visualized")]


def write_folder(folder, classes_of=None):
    """Writes METEOR's files with the lists above and returns their folder.

    classes_of  a jar whose code is put in, so that it can run on these lists
    """
    (folder / TABLE).parent.mkdir(parents=True)
    lists = {"function/": [], "function/english.words": FUNCTION_WORDS,
             "nonbreaking/": [], "nonbreaking/english.prefixes": PREFIXES,
             "synonym/": [], "synonym/english.synsets": SYNSETS,
             "synonym/english.exceptions": EXCEPTIONS, "synonym/english.relations": ["1", "2"]}
    with zipfile.ZipFile(folder / JAR, "w") as jar:
        for name, lines in lists.items():
            jar.writestr(name, "".join(f"{line}\n" for line in lines))
        if classes_of:
            with zipfile.ZipFile(classes_of) as source:
                for name in source.namelist():
                    if name.endswith((".class", "MANIFEST.MF")):
                        jar.writestr(name, source.read(name))
    with gzip.open(folder / TABLE, "wt", encoding="utf-8") as table:
        for source, target in PARAPHRASES:
            table.write(f"0.5\n{source}\n{target}\n")
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("meteor") / "own")


PAIRS = [
    ("the heart is large .", ["the heart is large ."], 1.0),
    ("", ["the heart is large ."], 0.0),
    ("the heart is large .", [""], 0.0),
    ("lungs clear", ["heart enlarged"], 0.0),
    ("the lungs are clear", ["clear are the lungs"], 0.43354749322305886),
    ("heart big", ["heart large"], 0.8999999999999999),
    ("filmed oxen", ["radiograph cattle"], 0.8000000000000002),
    ("enlarging effusions", ["enlarged effusion"], 0.6),
    ("without pneumothorax", ["no evidence of pneumothorax"], 0.7570977917981073),
    ("no evidence of pneumothorax", ["without pneumothorax"], 0.7920792079207921),
    ("fluid in the chest", ["pleural effusion"], 0.5999999999999999),
    ("pleural effusion is visualized", ["fluid in the chest is seen"], 0.6302596239928379),
    ("no effusion seen , no edema seen , no effusion",
     ["no edema visualized and no effusion seen ."], 0.3625652899279469),
    ("the the the heart", ["the heart the heart"], 0.2900878266954308),
    ("heart is normal", ["lungs are clear", "the heart is normal", "heart big"],
     0.46222744466331606),
    ("Dr. Smith saw No. 5, i.e. the T5-T6 film.", ["dr smith saw no 5 ie the t5 t6 film ."],
     0.4343230035595197),
    ("No. Dr. x. y", ["no . dr x. y"], 0.3473961178344186),
    ("patient's isn't “stable” – 3,000/µL…",
     ["patient 's isn 't \"stable\" - 3,000 / µl …"], 0.4020632456566925),
    ("Größe naïve 肺炎 \U0001fac1", ["größe NAÏVE 肺炎 \U0001fac1"], 1.0),
    ("a\u0109 x", ["b\u00ea x"], 1.0),  # different words with the same 32-bit hash
]


PAIR_ITEMS = [(hypothesis, references) for hypothesis, references, _ in PAIRS]
PAIR_SCORES = [score for _, _, score in PAIRS]


def test_scores_with_our_own_lists_equal_those_that_the_jar_gave(small):
    ours = Meteor(small).score(*corpus(PAIR_ITEMS))
    assert list(ours.items.values()) == pytest.approx(PAIR_SCORES, rel=0, abs=1e-12)


def test_the_jar_gives_these_scores_with_our_own_lists(folder, tmp_path):
    if not shutil.which("java"):
        pytest.skip("no Java")
    _, scores, _ = run_jar(write_folder(tmp_path / "own", folder / JAR), PAIR_ITEMS)
    assert scores == pytest.approx(PAIR_SCORES, rel=0, abs=1e-12)


def test_an_item_scores_like_its_best_reference(small):
    meteor, hypothesis = Meteor(small), ["heart is big"]
    references = ["lungs clear", "the heart is large", "big"]
    alone = [meteor.score({"a": hypothesis}, {"a": [reference]}).corpus for reference in references]
    assert meteor.score({"a": hypothesis}, {"a": references}).items["a"] == max(alone)


def test_the_order_of_the_items_does_not_matter(small):
    forward = Meteor(small).score(*corpus(PAIR_ITEMS))
    backward = Meteor(small).score(*corpus(PAIR_ITEMS[::-1]))
    assert list(forward.items.values()) == list(backward.items.values())[::-1]
    assert forward.corpus == pytest.approx(backward.corpus, abs=1e-12)


@pytest.mark.parametrize("word, expected", [
    ("effusions", "effus"), ("consolidation", "consolid"), ("atelectatic", "atelectat"),
    ("opacities", "opac"), ("bodies", "bodi"), ("died", "die"), ("skies", "sky"), ("news", "news"),
    ("agreed", "agre"), ("hopping", "hop"), ("hoping", "hope"), ("sinuses", "sinus"),
    ("generally", "general"), ("communication", "communic"), ("playing", "play"),
    ("yellowish", "yellowish"), ("rationally", "ration"), ("succeeding", "succeed"),
    ("proceeds", "proceed"), ("is", "is"), ("o", "o"), ("2.5", "2.5"),
    ("größe", "größe"), ("", ""),
])
def test_stems(word, expected):
    assert stem(word) == expected


@pytest.mark.parametrize("text, words", [
    ("The heart is normal.", "the heart is normal ."),
    ("e.g. T5-T6, isn't it?", "eg t5 t6 , isn 't it ?"),
    ("Dr. Who sees no. 5", "dr. who sees no . 5"),
    ("No. 5 of no. x", "no. 5 of no. x"),
    ("3,000 or 3,x", "3,000 or 3 , x"),
    (" \u00a0\t", ""),
])
def test_normalised_words(small, text, words):
    assert Meteor(small).normalise(text) == words.split()


def test_without_its_files_it_refuses_and_says_how_to_get_them(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install pycocoevalcap.*--meteor FOLDER"):
        Meteor()
    remedy = "pip install pycocoevalcap.*--meteor FOLDER"
    with pytest.raises(FileNotFoundError, match=f"{remedy}.*Missing in {tmp_path}: {JAR}, {TABLE}"):
        Meteor(tmp_path)
    (write_folder(tmp_path / "own") / TABLE).unlink()
    with pytest.raises(FileNotFoundError, match=f"Missing in .*own: {TABLE}$"):
        Meteor(tmp_path / "own")


def test_damaged_files_are_errors(tmp_path):
    texts = {"a": ["x"]}, {"a": ["x"]}
    folder = write_folder(tmp_path / "own")
    whole = (folder / TABLE).read_bytes()
    for damaged in (whole[:-12], b"no table", gzip.compress(b"0.5\nsource\n"),
                    gzip.compress(b"0.5\n\xff\nx\n"), whole[:30] + b"\0\0" + whole[32:]):
        (folder / TABLE).write_bytes(damaged)
        with pytest.raises(ValueError, match="paraphrase-en.gz is damaged"):
            Meteor(folder).score(*texts)
    (folder / JAR).write_bytes(b"no zip")
    with pytest.raises(ValueError, match=f"{JAR} is not METEOR 1.5's"):
        Meteor(folder)
    with zipfile.ZipFile(folder / JAR, "w") as jar:
        jar.writestr("function/english.words", "the\n")
    with pytest.raises(ValueError, match=f"{JAR} is not METEOR 1.5's.*english.prefixes"):
        Meteor(folder)


def test_bad_input_is_an_error(small):
    with pytest.raises(ValueError, match="the first is 'b'"):
        Meteor(small).score({"a": ["x"], "b": ["x"]}, {"a": ["x"]})
