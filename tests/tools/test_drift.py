"""Drift along the stream of studies.

The statistic against its formula, the stated rate of alarms, planted drifts of the scale model, and
the command.
"""

import json

import numpy as np
import pytest
import torch
from scipy.stats import binom

import data
import student
from scale_model import world as scale_world
from tools import drift

NAMES = scale_world.TEACHERS
EDEMA = list(scale_world.FINDINGS).index("Edema")


@pytest.fixture(scope="module", autouse=True)
def each_text_is_read_once():
    """The streams of many seeds say the same few thousand texts; reading them is most of the time.
    """
    read, known = data.read_classes, {}

    def read_once(text, task):
        key = text, id(task)
        if key not in known:
            known[key] = read(text, task)
        return dict(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "read_classes", read_once)
        yield


def stream(
        seed, count, turn=0.0, change=None, who=NAMES, only=None, world="nuisance",
        prior=lambda when: scale_world.PRIOR):
    """Studies with the texts of the scale model's teachers, some of whom turn their blind spots.

    seed          of the teachers and of the studies
    count         number of studies
    turn, change  as scale_model.world.Teachers takes them
    who           names of the teachers that turn
    only          numbers of the findings for which they turn; None: for all
    world         of the scale model
    prior         prior(position in [0, 1]): the grades' shares
    Returns [data.Study].
    """
    still = scale_world.Teachers(seed, world)
    turning = scale_world.Teachers(seed, world, turn, change)
    turned_findings = slice(None) if only is None else only
    studies = []
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        grades = rng.choice(3, size=5, p=prior(i / count))
        (nuisance,) = scale_world.draw_nuisance(rng, 1)
        coin = rng.integers(2**31)  # both draw the same, so that they differ by the turn alone
        answers, turned = (
            t.answer(grades, nuisance, i / count, np.random.default_rng(coin))
            for t in (still, turning))
        for u in map(NAMES.index, who):
            answers[u, turned_findings] = turned[u, turned_findings]
        labels = {f: scale_world.GRADES[g] for f, g in zip(scale_world.FINDINGS, grades)}
        texts = {name: scale_world.speak(name, scale_world.named(row), rng)
                 for name, row in zip(NAMES, answers)}
        studies.append(data.Study(f"s{i}", (), labels, texts))
    return studies


def detect(studies, task, on="errors", **flags):
    return drift.detect(
        drift.columns(studies, NAMES, task, on), NAMES, **{"permutations": 99, **flags})


def alarms(result):
    return [
        name for name, row in [*result["teachers"].items(), ("jointly", result["joint"])]
        if row["alarm"]]


# ------------------------------------------------------------------------------------ the statistic

def test_the_statistic_is_the_formula_of_the_docstring():
    rng = np.random.default_rng(0)
    n, names, step, window = 40, ["u", "v"], 5, 10
    x = {
        f: (rng.random((2, n, 1)) < p).astype(float)
        for f, p in (("A", 0.3), ("B", 0.5), ("C", 0.6))}
    result = drift.detect(x, names, step, window, permutations=19, seed=3)

    one = lambda column: (column - column.mean()) / column.std()
    column = lambda u, f: one(x[f][u, :, 0])
    groups = {}
    for u, name in enumerate(names):
        for f in x:
            groups[name, f, "alone"] = [column(u, f)]
            groups[name, f, "with others"] = [one(column(u, f) * column(u, g)) for g in x if g != f]
    both = {f: one(column(0, f) * column(1, f)) for f in x}
    groups |= {(None, f, "all pairs"): [both[f]] for f in x}
    groups |= {(None, name, "with the others"): list(both.values()) for name in names}
    positions = [10, 15, 20, 25, 30]
    block, orders, draw = np.arange(n) // step, [np.arange(n)], np.random.default_rng(3)
    for _ in range(19):
        blocks = draw.permutation(block)  # which block each study falls into
        orders.append(np.argsort(blocks, kind="stable"))

    def difference(p, order, at):
        before, after = p[order][at - window:at].mean(), p[order][at:at + window].mean()
        return window * window / (2 * window) * (before - after) ** 2

    T = np.array([[[np.mean([difference(p, order, at) for p in part]) for part in groups.values()]
                   for at in positions] for order in orders])
    z = np.cbrt(T)
    z = (z - z.mean(0)) / z.std(0)
    largest = z.max((1, 2))
    assert result["windows"] == positions
    for name in (*names, None):
        row = result["joint"] if name is None else result["teachers"][name]
        mine = [g for g, key in enumerate(groups) if key[0] == name]
        assert row["statistic"] == pytest.approx(z[0][:, mine].max(1), abs=1e-3)
        assert row["p"] == np.mean(largest >= z[0][:, mine].max() - 1e-4)
        for f, found in row["findings"].items():
            of = [g for g, key in enumerate(groups) if key[:2] == (name, f)]
            assert found["p"] == np.mean(largest >= z[0][:, of].max() - 1e-4)
            assert found["where"] == positions[int(z[0][:, of].max(1).argmax())]
    assert result["threshold"] == pytest.approx(np.sort(largest)[-2], abs=1e-3)


def test_without_a_window_all_before_is_compared_with_all_after():
    edges, places = drift.blocks(103, 10, None)
    assert edges.tolist() == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 103]
    assert places == [(0, b, 10) for b in range(1, 10)]
    assert drift.blocks(100, None, 25)[0].tolist() == [0, 25, 50, 75, 100]
    assert drift.blocks(100, None, 50)[0].tolist() == [0, 25, 50, 75, 100]
    assert drift.blocks(103, 10, 20)[1] == [(b - 2, b, b + 2) for b in range(2, 9)]


def test_errors_are_centred_by_finding_and_true_class_and_missing_ones_are_zero(task):
    says = lambda grade: f"edema is {grade}"
    rows = [
        ("mild", "mild"), ("mild", "absent"), ("severe", "mild"), ("severe", "severe"),
        ("severe", "absent"), ("mild", None), (None, "mild")]
    studies = []
    for i, (label, said) in enumerate(rows):
        labels = {"Edema": label} if label else {}
        studies.append(data.Study(str(i), (), labels, {"t": says(said)} if said else {}))
    errors = drift.columns(studies, ["t"], task, "errors")
    assert errors["Edema"][0, :, 0] == pytest.approx([-1/2, 1/2, 1/3, -2/3, 1/3, 0, 0])
    found = drift.columns(studies, ["t"], task, "findings")["Edema"][0]  # absent, mild, severe
    assert found[0] == pytest.approx([-2/6, 1/2, -1/6])
    assert (found[5] == 0).all()
    assert list(errors) == ["Edema"]


# ------------------------------------------------------------------------------- the rate of alarms

@pytest.mark.parametrize("on, flags", [("errors", {}), ("findings", {"window": 20})])
def test_a_stationary_stream_alarms_at_the_stated_rate(task, on, flags):
    seeds, alpha = 50, 0.1
    raised = 0
    for seed in range(seeds):
        studies = stream(seed, 60, world=scale_world.WORLDS[seed % 3])
        raised += bool(alarms(detect(studies, task, on, seed=seed, alpha=alpha, **flags)))
    assert binom.ppf(0.001, seeds, alpha) <= raised <= binom.ppf(0.999, seeds, alpha)


def test_labels_that_become_more_frequent_are_no_drift_of_the_teachers_but_of_the_findings(task):
    seeds, alpha = 30, 0.1
    shift = lambda when: (0.7, 0.2, 0.1) if when < 0.5 else (0.1, 0.2, 0.7)
    # errors depend on the true grade
    streams = [stream(seed, 80, world="class", prior=shift) for seed in range(seeds)]
    raised = sum(bool(alarms(detect(s, task, seed=seed, alpha=alpha)))
                 for seed, s in enumerate(streams))
    assert raised <= binom.ppf(0.999, seeds, alpha)
    assert all(alarms(detect(s, task, "findings", seed=seed)) for seed, s in enumerate(streams[:8]))


# ----------------------------------------------------------------------------------- planted drifts

def test_the_teacher_that_turns_is_named_and_the_place_and_no_other(task):
    named, near, others = 0, 0, 0
    for seed in range(10):
        teacher = NAMES[seed % 7]
        result = detect(stream(seed, 500, np.pi / 2, 0.6, who=[teacher]), task, seed=seed)
        row = result["teachers"][teacher]
        named += row["alarm"]
        near += row["alarm"] and abs(row["where"] - 300) <= 75
        others += bool(set(alarms(result)) - {teacher, "jointly"})
        assert row["alarm"] == (max(row["statistic"]) > result["threshold"])
    assert named >= 9 and near >= 7 and others <= binom.ppf(0.999, 10, 0.05)


def test_the_finding_in_which_a_teacher_turns_is_named(task):
    found, jointly = 0, 0
    for seed in range(4):
        studies = stream(seed, 1200, np.pi / 2, 0.5, who=["moonshot"], only=EDEMA)
        result = detect(studies, task, seed=seed)
        found += result["teachers"]["moonshot"]["findings"]["Edema"]["alarm"]
        jointly += result["joint"]["finding"] == "Edema"
    assert found >= 3 and jointly >= 3


@pytest.mark.parametrize("change, flags", [(None, {}), (0.5, {"window": 100})])
def test_a_turn_of_all_teachers_is_found_gradual_or_at_once(task, change, flags):
    for seed in range(3):
        result = detect(stream(seed, 400, np.pi / 2, change), task, seed=seed, **flags)
        assert result["joint"]["alarm"] and len(alarms(result)) >= 5
        assert change is None or abs(result["joint"]["where"] - 200) <= 50


def test_without_labels_the_joint_stream_finds_it_and_names_the_teacher(task):
    studies = stream(1, 800, np.pi / 2, 0.5, who=["moonshot"])
    for study in studies:
        study.labels = {}
    joint = detect(studies, task, "findings")["joint"]
    assert joint["alarm"] and abs(joint["where"] - 400) <= 80
    assert max(
        joint["teachers"], key=lambda name: joint["teachers"][name]["statistic"]) == "moonshot"


def test_a_teacher_that_gets_worse_or_begins_to_decline_is_found_by_its_rate(task):
    studies = stream(0, 300)
    for study in studies[200:]:
        study.trajectories["glm-4.5v"] = "i cannot look at films"
    result = detect(studies, task)
    row = result["teachers"]["glm-4.5v"]
    assert row["alarm"]
    assert row["where"] in (195, 210)
    assert all(found["alarm"] for found in row["findings"].values())
    assert not set(alarms(result)) - {"glm-4.5v", "jointly"}


def test_a_teacher_that_is_always_right_is_listed_and_never_alarms():
    x = {"A": np.stack([np.zeros((40, 1)), np.random.default_rng(0).normal(size=(40, 1))])}
    row = drift.detect(x, ["right", "other"], permutations=19)["teachers"]["right"]
    assert (
        set(row["statistic"]), row["p"], row["alarm"], row["findings"]) == ({0.0}, 1.0, False, {})


# -------------------------------------------------------------------------------------- the command

@pytest.fixture
def flags(world):
    return [
        "--studies", world / "studies.jsonl", "--task_file", world / "task.json", "--permutations",
        39, "--step", 6]


def command(capsys, *flags):
    capsys.readouterr()
    drift.run(drift.parse(list(map(str, flags))))
    return capsys.readouterr().out


def test_the_command_ends_with_the_json_that_it_writes_and_gives_the_same_twice(
        flags, tmp_path, capsys):
    out = command(capsys, *flags, "--json", "--output", tmp_path / "drift.json")
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads((tmp_path / "drift.json").read_text())
    assert command(capsys, *flags, "--json") == out
    assert result["windows"] == [6, 12, 18, 24, 30]
    assert result["ids"][0] == "train-00006"
    assert result["on"] == "errors"
    assert all(name in out for name in (*NAMES, "jointly", "all before against all after"))


def test_the_stream_can_be_ordered_by_a_key(world, task, flags, tmp_path, capsys):
    records = [json.loads(line) for line in (world / "studies.jsonl").read_text().splitlines()]
    shuffled = tmp_path / "studies.jsonl"
    numbered = [{**record, "at": i} for i, record in enumerate(records)]
    numbered.sort(key=lambda record: record["z"])
    shuffled.write_text("".join(json.dumps(record) + "\n" for record in numbered))
    last = lambda out: {
        key: value for key, value in json.loads(out.splitlines()[-1]).items() if key != "order_by"}
    of = ["--studies", shuffled, *flags[2:], "--json"]
    by_key = last(command(capsys, *of, "--order_by", "at"))
    assert by_key == last(command(capsys, *flags, "--json"))
    assert by_key != last(command(capsys, *of))
    with pytest.raises(
            ValueError, match="has 'date': None, expected a number or a text to order by"):
        command(capsys, *of, "--order_by", "date")
    mixed = [data.Study(str(i), (), {}, {}, record={"k": k}) for i, k in enumerate((1, "2"))]
    with pytest.raises(ValueError, match="is a text in one of the studies"):
        drift.ordered(mixed, "k", "studies.jsonl")


def test_log_probs_per_token_of_the_student_join_the_findings_and_are_not_computed_twice(
        flags, world, base, studies, processor, task, tmp_path, capsys, monkeypatch):
    of = [
        *flags, "--student", base, "--images", world, "--batch_size", 5, "--no-bf16", "--output",
        tmp_path / "drift.json"]
    first = command(capsys, *of)
    result = json.loads((tmp_path / "drift.json").read_text())
    assert result["on"] == "errors and log-prob"
    assert all(
        "log-prob" in row["findings"] for row in (result["teachers"]["gpt-5"], result["joint"]))

    file = tmp_path / "drift.json.logps.jsonl"
    kept = [json.loads(line) for line in file.read_text().split("\n") if line]
    study, packed = studies[3], student.PackedStudent(student.load(base))
    text = study.trajectories["grok-4"]
    seen = processor(study, data.student_prompt(study, task), [text])
    with torch.no_grad():
        (logps,) = packed(student.pack([seen], packed.model))
    per_token = logps.item() / len(processor.response(text))
    assert kept[3]["id"] == study.id
    assert kept[3]["logps"][NAMES.index("grok-4")] == pytest.approx(per_token, rel=1e-4)

    file.write_text(file.read_text()[:-700])  # stopped in the middle of a line
    passes, forward = [], student.PackedStudent.forward
    with monkeypatch.context() as patch:
        patch.setattr(
            student.PackedStudent, "forward",
            lambda self, *batches: passes.append(1) or forward(self, *batches))
        assert command(capsys, *of) == first and 1 <= len(passes) < 4
        patch.setattr(student, "load", lambda *args: pytest.fail("all log-probs are there"))
        assert command(capsys, *of) == first


def test_a_change_of_the_log_probs_alone_is_named(task):
    studies = stream(2, 200)
    x = drift.columns(studies, NAMES, task, "errors")
    x["log-prob"] = np.random.default_rng(0).normal(size=(7, 200, 1))
    x["log-prob"][3, 120:] += 1
    result = drift.detect(x, NAMES, permutations=99)
    row = result["teachers"][NAMES[3]]
    assert row["finding"] == "log-prob"
    assert row["findings"]["log-prob"]["how"] == "alone"
    assert abs(row["where"] - 120) <= 20


@pytest.mark.parametrize(
    "more, message",
    [
        (["--window", 30], r"36 studies: expected at least 60 for two windows of 30"),
        (
            ["--window", 10],
            r"--window 10 --step 6: expected a window that is a multiple of the step"),
        (["--teachers", "nobody"], "--teachers nobody: expected some of gpt-5")])
def test_what_cannot_be_compared_is_refused(flags, capsys, more, message):
    with pytest.raises(ValueError, match=message):
        command(capsys, *flags, *more)


def test_an_alpha_that_no_permutation_can_reach_is_refused(flags, capsys):
    with pytest.raises(SystemExit):
        command(capsys, *flags, "--alpha", 0.01)
    assert "expected 1 / (1 + permutations) = 0.0250 or more" in capsys.readouterr().err


def test_it_runs_as_a_script_from_anywhere(script):
    assert "--order_by" in script("tools/drift.py", "--help", start="python").stdout
