"""How the teachers are compared: against other tools, against formulas written out, and the command
on the scale model and on chest texts."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.metrics import cohen_kappa_score, matthews_corrcoef

import data
import evaluate
from evaluation import teachers
from evaluation.tables import FIVE
from metrics.findings import finding_scores
from scale_model import world as scale_world

NAMES = scale_world.TEACHERS
PAPER_TXT = os.environ.get("PAPER_TXT")


def chest(*rows):
    """Rows of (report, labels, {teacher: text})."""
    return [data.Study(f"s{i}", (), labels, texts, report)
            for i, (report, labels, texts) in enumerate(rows)]


FEW = chest(
    ("Small left pleural effusion. No pneumothorax.", {"Pleural Effusion": 1, "Pneumothorax": 0},
     {"a": "There is a pleural effusion. No pneumothorax.",
      "b": "Pneumothorax is present. No pleural effusion."}),
    ("Possible pneumonia.", {"Pneumonia": -1},
     {"a": "Possible pneumonia and a rib fracture.",
      "b": "I'm sorry, but I cannot interpret X-rays."}),
    ("Pulmonary edema.", {"Edema": 1}, {"a": "Pulmonary edema."}))


def test_texts_are_read_the_same_by_one_process_and_by_several():
    read = teachers.readings(FEW, ["a", "b"], data.CHEST)
    assert read == teachers.readings(FEW, ["a", "b"], data.CHEST, num_workers=2)
    assert read["b"] == [{"Pleural Effusion": 0, "Pneumothorax": 1}, {}, None]


def random_readings(rng, count, classes=(1, 0, -1, None), findings=data.CHEST.findings[:6]):
    drawn = rng.choice(np.array(classes, dtype=object), size=(count, len(findings)))
    return [{f: c for f, c in zip(findings, row) if c is not None} for row in drawn]


@pytest.mark.parametrize("uncertain", ["negative", "positive", "ignore"])
def test_precision_and_recall_are_those_of_the_findings_reader_on_chest_findings(uncertain):
    rng = np.random.default_rng(0)
    read, truth = random_readings(rng, 200), random_readings(rng, 200)
    ours = teachers.precision_recall(read, truth, data.CHEST, uncertain)
    oracle = finding_scores(read, truth, uncertain, findings=data.CHEST.findings[:6])
    assert ours == {key: oracle[key] for key in ours} and 0.2 < ours["f1"] < 0.7


def test_precision_recall_accuracy_and_refusals_by_hand():
    result = teachers.measure(FEW, data.CHEST, "labels")
    a, b = result["teachers"]["a"], result["teachers"]["b"]
    assert (a["tp"], a["fp"], a["fn"]) == (2, 0, 0)  # nobody's label names the fracture
    assert (b["tp"], b["fp"], b["fn"]) == (0, 1, 1)  # the third study has no text of b
    assert a["accuracy"] == {"Edema": 1, "Pleural Effusion": 1, "Pneumonia": 1, "Pneumothorax": 1}
    assert a["mean"] == 1
    assert b["accuracy"] == {"Pleural Effusion": 0, "Pneumonia": 0, "Pneumothorax": 0}
    assert (b["texts"], b["refused"], a["refused"]) == (2, 0.5, 0) and a["words"] == (7 + 6 + 2) / 3
    assert result["gap"]["Pneumonia"] == {"gap": 1, "best": "a", "worst": "b"}
    assert result["gap"]["Edema"]["gap"] == 0
    positive = teachers.measure(FEW, data.CHEST, "labels", uncertain="positive")["teachers"]
    assert (positive["a"]["tp"], positive["b"]["fn"]) == (3, 2)


MUTE = chest(*[(study.report, study.labels, {
    **study.trajectories, "vague": f"It looks fine to me, film {i}.",
    **({} if i else {"c": "I'm sorry, but I cannot interpret X-rays."})})
    for i, study in enumerate(FEW)])


def test_a_teacher_of_which_nothing_is_read_has_no_accuracy_and_is_nobodys_worst():
    before, after = (teachers.measure(some, data.CHEST, "labels", samples=20)
                     for some in (FEW, MUTE))
    assert {name: (row["unread"], row["refused"]) for name, row in after["teachers"].items()} == {
        "a": (0, 0), "b": (0, 0.5), "vague": (1, 0), "c": (0, 1)}  # a refusal is not unread
    for name in ("vague", "c"):
        row = after["teachers"][name]
        figures = ("precision", "recall", "f1", "mean")
        assert [row[key] for key in figures] == [None] * 4 and row["accuracy"] == row["n"] == {}
    assert after["gap"] == before["gap"] and after["errors"] == before["errors"]
    assert [row[:2] for row in after["kappa"]["matrix"][:2]] == before["kappa"]["matrix"]
    assert after["kappa"]["matrix"][2] == [None] * 4
    half = teachers.measure(
        chest(*[("Edema.", {"Edema": 1}, {"a": text}) for text in ("Edema.", "Fine.")]),
        data.CHEST, "labels", samples=20)["teachers"]["a"]
    assert (half["unread"], half["accuracy"]) == (0.5, {"Edema": 0.5})


def test_the_table_has_a_column_of_what_could_not_be_read():
    lines = teachers.drift_table(
        teachers.measure(MUTE, data.CHEST, "labels", samples=20), data.CHEST).splitlines()
    head, *rows = lines[1:6]
    assert head.split()[-2:] == ["refused", "unread"]
    assert [row.split()[-2:] for row in rows] == [
        ["0.000", "0.000"], ["0.500", "0.000"], ["0.000", "1.000"], ["1.000", "0.000"]]
    at = next(i for i, line in enumerate(lines) if line.startswith("accuracy"))
    (vague,) = [line for line in lines[at:] if line.startswith("vague")]
    assert set(vague.split()[1:]) == {"-"}
    nobody = teachers.measure(chest((None, {"Edema": 1}, {"a": "Fine.", "b": "Good."})), data.CHEST)
    assert nobody["gap"] == {} and nobody["errors"]["given"] == []
    assert "accuracy" not in teachers.drift_table(nobody, data.CHEST)


def test_against_the_report_its_findings_are_the_truth():
    rows = teachers.measure(FEW, data.CHEST, "report")["teachers"]
    assert rows["a"]["accuracy"]["Pneumonia"] == 1
    assert rows["a"]["similarity"] > rows["b"]["similarity"] > 0
    no_truth = teachers.measure(FEW, data.CHEST, None)
    assert no_truth["teachers"]["a"]["f1"] is no_truth["teachers"]["a"]["mean"] is None
    assert no_truth["errors"]["given"] == []
    assert "no labels, no reports" in teachers.drift_table(no_truth, data.CHEST)


def test_a_study_without_any_label_is_no_truth_and_not_all_negative():
    studies = [*FEW, *chest((None, {}, {"a": "Pulmonary edema.", "b": "Pulmonary edema."}))]
    before, after = (teachers.measure(some, data.CHEST, "labels")["teachers"]["b"]
                     for some in (FEW, studies))
    assert (after["fp"], after["texts"]) == (before["fp"], 3)


@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    """The folder of a tiny random BERT that takes 12 tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    texts = [text for study in FEW for text in (study.report, *study.trajectories.values())]
    words = ["[PAD]", "[UNK]", *sorted({word for text in texts for word in teachers.words(text)})]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]",
                            model_max_length=12).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=2,
                   num_attention_heads=2, intermediate_size=32, max_position_embeddings=12,
                   initializer_range=0.5)).save_pretrained(folder)
    return folder


def test_encoder_similarity_is_the_cosine_of_mean_hidden_states(text_encoder):
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text_encoder)
    model = AutoModel.from_pretrained(text_encoder).eval()

    def alone(text):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state[0].mean(0)

    means, kind = teachers.similarities(FEW, ["a", "b"], str(text_encoder))
    expected = [torch.cosine_similarity(alone(s.report), alone(s.trajectories["a"]), 0).item()
                for s in FEW]
    assert means["a"] == pytest.approx(np.mean(expected), abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert str(text_encoder) in kind and "1 texts cut" in kind  # the refusal has 12 words and marks


def test_kappa_is_the_mean_of_scikit_learns_over_the_findings_that_have_one():
    rng = np.random.default_rng(1)
    first, second = random_readings(rng, 80), random_readings(rng, 80)
    second = [a if rng.random() < 0.4 else b for a, b in zip(first, second)]
    for reading in (*first, *second):
        reading.pop(data.CHEST.findings[0], None)  # one class only: undefined
    said = lambda readings, finding: [str(reading.get(finding)) for reading in readings]
    expected = [cohen_kappa_score(said(first, finding), said(second, finding))
                for finding in data.CHEST.findings[1:6]]
    found = teachers.kappa([*first, None, {}], [*second, {}, None], data.CHEST)
    assert found == pytest.approx(np.mean(expected), abs=1e-12)
    assert teachers.kappa([None], [{}], data.CHEST) is None
    assert teachers.kappa(first, first, data.CHEST) == 1


def test_wrong_counts_enumerate_the_poisson_binomial():
    rates = np.array([[0.1, 0.7, 0.4], [0.5, 0.0, 1.0]])
    for row, out in zip(rates, teachers.wrong_counts(rates)):
        expected = np.zeros(4)
        for wrong in itertools.product((0, 1), repeat=3):
            expected[sum(wrong)] += np.prod([p if w else 1 - p for p, w in zip(row, wrong)])
        assert np.allclose(out, expected)


def errors(wrong, classes=None):
    """wrong (n, N, F) bool, classes (n, F) -> readings and truths of N teachers that say the truth
    or, where wrong, another class."""
    n, N, F = wrong.shape
    classes = np.zeros((n, F), int) if classes is None else classes
    findings = data.CHEST.findings[:F]
    read = {f"t{u}": [] for u in range(N)}
    for u, readings in enumerate(read.values()):
        for i in range(n):
            said = zip(findings, classes[i], wrong[i, u])
            readings.append({finding: int(value ^ other) for finding, value, other in said})
    return read, [{f: int(c) for f, c in zip(findings, row)} for row in classes]


def test_phi_of_one_finding_is_the_correlation_of_the_errors_and_the_ratio_counts_them():
    rng = np.random.default_rng(2)
    hard = rng.random(300) < 0.3
    wrong = (rng.random((300, 3, 1)) < np.where(hard, 0.8, 0.2)[:, None, None])
    out = teachers.dependence(*errors(wrong), data.CHEST, samples=200)
    assert out["phi"][0][1] == pytest.approx(matthews_corrcoef(wrong[:, 0, 0], wrong[:, 1, 0]),
                                             abs=1e-12)
    assert out["phi"][0][1] > 0.2
    rates, most = wrong.mean(0)[:, 0], wrong.sum(1)[:, 0] >= 2
    two = sum(np.prod([rates[u] if u != left else 1 - rates[u] for u in range(3)])
              for left in range(3))
    assert out["all"]["observed"] == wrong.all(1).sum()
    assert out["all"]["expected"] == pytest.approx(300 * rates.prod())
    assert out["most"]["observed"] == most.sum()
    assert out["most"]["expected"] == pytest.approx(300 * (two + rates.prod()))
    assert 1 < out["all"]["interval"][0] < out["all"]["ratio"] < out["all"]["interval"][1]


def test_teachers_that_err_together_are_wrong_together_more_often_by_one_over_their_rate():
    wrong = np.repeat((np.arange(200) % 4 == 0)[:, None, None], 2, axis=1)
    out = teachers.dependence(*errors(wrong), data.CHEST, samples=50)
    assert out["phi"] == [[pytest.approx(1)] * 2] * 2 and out["all"]["ratio"] == pytest.approx(4)


def test_independent_errors_with_other_rates_per_finding_are_found_independent():
    rates, covered = np.random.default_rng(3).uniform(0.1, 0.9, (4, 5)), 0
    for seed in range(40):
        out = teachers.dependence(*errors(np.random.default_rng(seed).random((200, 4, 5)) < rates),
                                  data.CHEST, samples=200, seed=seed)
        covered += out["most"]["interval"][0] <= 1 <= out["most"]["interval"][1]
        assert np.abs(np.array(out["phi"]) - np.eye(4)).max() < 5 / np.sqrt(1000)
    assert covered >= binom.ppf(0.001, 40, 0.95)


def test_dependence_that_the_true_class_explains_is_told_apart():
    classes = np.random.default_rng(4).integers(0, 2, (400, 2))
    misses = np.random.default_rng(5).random((400, 3, 2)) < 0.7
    wrong = np.repeat(classes[:, None, :] == 1, 3, axis=1) & misses
    by_finding = teachers.dependence(*errors(wrong, classes), data.CHEST, "finding", samples=100)
    by_class = teachers.dependence(*errors(wrong, classes), data.CHEST, "finding and class",
                                   samples=100)
    assert by_finding["phi"][0][1] > 0.4 and by_finding["all"]["interval"][0] > 1.5
    assert abs(by_class["phi"][0][1]) < 0.15
    assert by_class["all"]["interval"][0] < 1 < by_class["all"]["interval"][1]


def test_what_cannot_be_computed_is_none_and_no_error():
    read, truth = errors(np.zeros((5, 2, 1), bool))
    out = teachers.dependence(read, truth, data.CHEST, samples=10)
    assert out["phi"] == [[None, None], [None, None]]
    assert out["all"] == {"observed": 0, "expected": 0, "ratio": None, "interval": None}
    read["t1"] = [None] * 5
    assert teachers.dependence(read, truth, data.CHEST) is None


def command(capsys, monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "teachers", *map(str, flags)])
    capsys.readouterr()
    evaluate.main()
    return capsys.readouterr().out


def test_the_command_measures_the_scale_model_beside_table_2(world, studies, task, tmp_path, capsys,
                                                             monkeypatch):
    flags = ["--studies", world / "studies.jsonl", "--task_file", world / "task.json", "--samples",
             20, "--json"]
    out = command(capsys, monkeypatch, *flags, "--output", tmp_path / "teachers.json").splitlines()
    result = json.loads(out[-1])
    assert json.loads((tmp_path / "teachers.json").read_text()) == result
    assert command(capsys, monkeypatch, *flags).splitlines() == out
    other = evaluate.baselines(studies, [], task, evaluate.read_teachers(studies, task))
    for name in NAMES:
        assert result["teachers"][name]["accuracy"] == other[name]["accuracy"]
    assert set(result["teachers"]) == set(NAMES)
    for matrix in (result["kappa"]["matrix"], result["errors"]["given"][0]["phi"]):
        assert np.array(matrix).shape == (7, 7)
    at = next(i for i, line in enumerate(out) if line.startswith("  paper: gpt-5"))
    assert out[at].split() == ["paper:", "gpt-5", "0.75", "0.68", "0.89", "0.90", "0.52", "0.75"]
    assert out[at - 1].startswith("gpt-5 ")
    assert any(line.split() == ["paper", "0.76", "0.28", "0.53", "0.82", "0.57"] for line in out)


def test_table_2s_mean_stands_below_that_of_its_five_findings_and_the_mean_of_all_apart():
    truth = dict.fromkeys(data.CHEST.findings[:13], 0)
    said = lambda *wrong: ". ".join(f"No {f.lower()}" for f in FIVE if f not in wrong)
    studies = chest((None, truth, {"gpt-5": said("Edema"), "grok-4": said("Edema", "Pneumonia")}))

    def printed():
        """The table, and what is below 'mean 5' and 'mean all' in the line of gpt-5 and in the
        paper's below it."""
        text = teachers.drift_table(teachers.measure(studies, data.CHEST, "labels", samples=2),
                                    data.CHEST)
        lines = text.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith("accuracy"))
        head, ours, paper = lines[at:at + 3]
        end = head.index("mean 5") + len("mean 5")
        below = [(line[end - 6:end].strip(), line[end:].strip()) for line in (ours, paper)]
        return text, head[end - 6:], *below

    text, head, ours, paper = printed()
    assert head == "mean 5 mean all"
    assert ours == ("0.800", f"{4 / 13:.3f}")
    assert paper == ("0.75", "")
    assert "no mean 5" not in text
    del truth["Pneumothorax"]
    text, head, ours, paper = printed()
    assert ours == ("-", f"{3 / 12:.3f}") and paper == ("0.75", "")
    assert "no mean 5 where one of the paper's five findings has no figure: Pneumothorax" in text


def test_teachers_of_table_2_that_are_not_there_are_not_run(world, capsys, monkeypatch):
    flags = ["--studies", world / "studies.jsonl", "--task_file", world / "task.json", "--samples",
             20]
    printed = command(capsys, monkeypatch, *flags, "--teachers", "gpt-5,moonshot")
    assert printed.count("not run") == 5
    names = ("GPT-5-nano", "claude-sonnet-4", "llava")
    assert [teachers.of_the_paper(name) for name in names] == ["gpt-5", "sonnet-4", None]


@pytest.mark.parametrize("more, message",
                         [({}, "no study has report, expected some for --against report"),
                          ({"trajectories": {}},
                           "no study has trajectories, expected the teachers' texts")])
def test_what_is_missing_is_named(tmp_path, more, message):
    record = {"id": "s", "image": "x.png", "labels": {"Edema": 1}, "trajectories": {"a": "Edema."},
              **more}
    (tmp_path / "studies.jsonl").write_text(json.dumps(record))
    args = evaluate.parse(
        ["teachers", "--studies", str(tmp_path / "studies.jsonl"), "--against", "report"])
    with pytest.raises(ValueError, match=message):
        teachers.run(args)


@pytest.mark.skipif(not PAPER_TXT, reason="PAPER_TXT is not set to the paper's text")
def test_table_2_is_the_papers():
    text = Path(PAPER_TXT).read_text(encoding="utf-8")
    start = text.index("MLLM Teachers with Huge Parameters")
    part = text[start:text.index("Student Model (7B MLLM)", start)]
    rows = {m[1].lower(): tuple(map(float, m[2].split()))
            for m in re.finditer(r"^([\w.-]+)\t((?:[\d.]+\t?){6})$", part, re.MULTILINE)}
    assert rows.keys() == set(NAMES)
    assert teachers.OF_THE_PAPER == rows
