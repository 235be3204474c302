"""What is measured: scores against arithmetic done by hand, the table as it is printed, and the
command on one and two ranks."""

import json
import re
from collections import Counter

import pytest

import data
import evaluate
import sampling
import student
from data import Study
from evaluation import tables

TASK = {
    "findings": {"Effusion": ["effusion"], "Edema": ["edema"], "Heart": ["heart"]},
    "positive": ["yes"],
    "classes": {"no": ["no {finding}"], "yes": ["{finding} yes"]},
    "prompts": {"student": "", "teacher": "{diseases}", "compare": "{readers}"},
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "task.json"
    path.write_text(json.dumps(TASK))
    return data.load_task(path)


def cases(*rows):
    """Rows of labels and teachers' texts."""
    return [Study(f"s{i}", (), labels, dict(zip("uvw", texts)))
            for i, (labels, texts) in enumerate(rows)]


def score(readings, studies, task):
    votes = evaluate.votes_of(evaluate.read_teachers(studies, task), task)
    return evaluate.score(readings, studies, task, votes)


def baselines(studies, train, task):
    return evaluate.baselines(studies, train, task, evaluate.read_teachers(studies, task))


# ------------------------------------------------------------------------------------------- scores

def test_accuracy_is_per_finding_over_its_labels_and_the_mean_is_unweighted(three):
    studies = cases(({"Effusion": "yes", "Edema": "no"}, []), ({"Effusion": "no"}, []),
                    ({"Effusion": "yes"}, []), ({"Effusion": "yes"}, []))
    readings = [{"Effusion": "yes", "Edema": "no", "Heart": "yes"},
                {"Effusion": "yes", "Edema": "yes"}, {"Heart": "no"}, {"Effusion": "yes"}]
    assert score(readings, studies, three) == {
        # Heart has no label, so no score
        "accuracy": {"Effusion": 2 / 4, "Edema": 1 / 1}, "mean": 0.75,
        "n": {"Effusion": 4, "Edema": 1},
        "unread": 1 / 5,  # one of five labels was not read, and it counts as wrong
        "agreement_with_vote": None}


def test_agreement_is_with_what_the_teachers_say_not_with_the_labels(three):
    studies = cases(({"Edema": "no"}, ["edema yes, no heart", "edema yes"]),
                    ({}, ["no effusion", "silence"]), ({"Edema": "no"}, ["silence"]))
    out = score([{"Edema": "yes"}, {"Effusion": "no"}, {"Edema": "no"}], studies, three)
    assert out["agreement_with_vote"] == 2 / 3 and out["accuracy"] == {"Edema": 1 / 2}


def test_without_labels_there_is_no_score(three):
    assert score([{"Edema": "yes"}], cases(({}, [])), three) == {
        "accuracy": {}, "mean": None, "n": {}, "unread": None, "agreement_with_vote": None}


def test_the_prior_is_the_most_frequent_training_class(three):
    train = cases(({"Effusion": "yes", "Edema": "no"}, []), ({"Effusion": "no"}, []),
                  ({"Effusion": "no"}, []))
    assert evaluate.prior(train, three) == {"Effusion": "no", "Edema": "no"}


def test_the_baselines_are_the_prior_each_teacher_and_their_vote(three):
    studies = cases(({"Edema": "yes"}, ["edema yes", "edema yes", "no edema"]),
                    ({"Edema": "no"}, ["edema yes", "no edema", "no edema"]),
                    ({"Edema": "no"}, ["no edema"]))
    rows = baselines(studies, cases(({"Edema": "no"}, [])), three)
    assert {name: (row["mean"], row["unread"]) for name, row in rows.items()} == {
        # v and w are silent on the third
        "label prior": (2 / 3, 0), "u": (2 / 3, 0), "v": (2 / 3, 1 / 3), "w": (1 / 3, 1 / 3),
        "vote of the teachers": (1, 0)}
    assert list(rows)[0] == "label prior" and list(rows)[-1] == "vote of the teachers"
    # nobody to vote
    assert list(baselines(cases(({"Edema": "no"}, [])), studies, three)) == ["label prior"]


def test_a_teacher_or_a_vote_that_was_never_read_has_no_accuracy(three):
    studies = cases(({"Edema": "yes"}, ["edema yes", "it looks fine"]),
                    ({"Edema": "no"}, ["edema yes", "all is well"]))
    rows = baselines(studies, studies, three)
    assert rows["u"]["accuracy"] == {"Edema": 0.5} and rows["v"] == {
        "accuracy": {}, "mean": None, "n": {"Edema": 2}, "unread": 1, "agreement_with_vote": 0}
    line = tables.accuracy_table(rows, three.findings).splitlines()[-2]
    assert line.split() == ["v", "-", "-", "1.000"]
    nothing = cases(({"Edema": "yes"}, ["it looks fine"]))
    assert baselines(nothing, studies, three)["vote of the teachers"]["accuracy"] == {}


def test_a_voice_is_known_by_its_first_words():
    studies = cases(({}, ["The film shows edema.", "Key points: edema"]),
                    ({}, ["the  FILM shows\nno edema", "The film shows nothing"]))
    texts = ["The film shows a heart", "key points: edema yes", "Something else entirely",
             "the film", ""]
    # 'the film shows': u twice, v once
    assert evaluate.styles(texts, studies) == {"u": 1, "v": 1, "other": 3}


def test_the_scale_models_teachers_have_seven_voices(studies):
    for name in data.teacher_names(studies):
        texts = [s.trajectories[name] for s in studies]
        assert evaluate.styles(texts, studies) == {name: len(studies)}


# -------------------------------------------------------------------------------------------- table

def scores(**accuracy):
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy), "unread": 0.125}


def cells(text):
    """{row: {column: figure, or '-'}}, read by where a figure ends below its column's name."""
    head, *lines = text.splitlines()
    ends = {match.end(): match[0] for match in re.finditer(r"mean \w+|\S+", head)}
    rows = {}
    for line in lines:
        figures = re.finditer(r"\S+", line[34:])
        rows[line[:34].strip()] = {ends[34 + m.end()]: m[0] if m[0] == "-" else float(m[0])
                                   for m in figures}
    return rows


FIVE = dict(zip(tables.FIVE, (0.81, 0.62, 0.73, 0.94, 0.55)))


def test_the_table_puts_every_figure_below_its_name():
    rows = {"teacher": scores(**FIVE),
            "student": {"greedy": scores(**{**FIVE, "Edema": 0.25}), "sampled": {"mean": 0.5}}}
    out = cells(tables.accuracy_table(rows, tables.FIVE, tables.TABLE_5))
    assert out["teacher"] == {"Con.": 0.81, "PE": 0.62, "Pna.": 0.73, "Pnx.": 0.94, "Ede.": 0.55,
                              "mean": 0.73, "unread": 0.125}
    assert out["student"] == {"Con.": 0.81, "PE": 0.62, "Pna.": 0.73, "Pnx.": 0.94, "Ede.": 0.25,
                              "mean": 0.67, "sampled": 0.5, "unread": 0.125}
    assert out["paper: SPD, all teachers + APO"] == {"Con.": 0.84, "PE": 0.67, "Pna.": 0.78,
                                                     "Pnx.": 0.96, "Ede.": 0.65, "mean": 0.78}


def test_the_table_leaves_out_findings_that_nobody_has_and_marks_what_one_row_lacks():
    text = tables.accuracy_table({"a": scores(Effusion=0.5, Heart=1.0), "b": scores(Effusion=0.25)},
                                 ("Effusion", "Edema", "Heart"))
    assert text.splitlines()[0].split() == ["Effusi", "Heart", "mean", "sampled", "unread"]
    assert text.splitlines()[2].split() == ["b", "0.250", "-", "0.250", "0.125"]


def test_the_papers_figures_stay_below_their_findings_when_the_data_lack_one():
    some = {name: value for name, value in FIVE.items() if name != "Pneumonia"}
    text = tables.accuracy_table({"student": scores(**some)}, tables.FIVE, tables.TABLE_5)
    text, note = text.rsplit("\n", 1)
    out = cells(text)
    assert out["paper: SPD, all teachers + APO"]["Ede."] == 0.65
    assert out["paper: SPD, all teachers + APO"]["mean 5"] == 0.78
    # four findings have no mean of five
    assert out["student"]["mean 5"] == "-" and out["student"]["mean all"] == 0.73
    assert note == "no mean 5 where one of the paper's five findings has no figure: Pneumonia"


def test_the_papers_mean_stands_below_that_of_its_five_findings_and_never_below_that_of_all():
    fourteen = {**dict.fromkeys(data.CHEST.findings, 0.0), **FIVE}
    sampled = {**scores(**{**fourteen, "Edema": 0.05}), "mean": 0.0}
    rows = {"u": scores(**fourteen), "student": {"greedy": scores(**fourteen), "sampled": sampled}}
    text = tables.accuracy_table(rows, data.CHEST.findings, tables.TABLE_5)
    out = cells(text)
    assert list(out["u"])[:6] == ["Con.", "PE", "Pna.", "Pnx.", "Ede.", "Ate."]
    assert len(out["u"]) == 14 + 3
    for row in ("u", "student"):
        assert out[row]["mean 5"] == 0.73 and out[row]["mean all"] == 0.261  # 3.65 / 5 and / 14
    assert out["student"]["sampled"] == 0.63  # 3.15 / 5
    paper = out["paper: SPD, all teachers"]
    assert {"mean 5": 0.68} == {key: value for key, value in paper.items() if "mean" in key}
    assert "no mean" not in text
    # nothing of the paper's beside
    assert "mean all" not in tables.accuracy_table({"u": scores(**fourteen)}, data.CHEST.findings)
    thirteen = {finding: value for finding, value in fourteen.items() if finding != "Edema"}
    rows["v"] = scores(**thirteen)
    *lines, note = tables.accuracy_table(rows, data.CHEST.findings, tables.TABLE_5).splitlines()
    assert note.endswith(": Edema")
    assert [cells("\n".join(lines))[row]["mean 5"] for row in "uv"] == [0.73, "-"]


# ------------------------------------------------------------------------------------------ answers

def test_answers_do_not_depend_on_the_batch_they_are_in(model, processor, studies, task):
    for temperature in (0.0, 1.0):
        one, three_at_once, all_at_once = (
            sampling.answers(model, processor, studies[:7], task, temperature, batch_size=size,
                             max_new_tokens=12) for size in (1, 3, 50))
        assert one == three_at_once == all_at_once and len(set(one)) > 1
    assert one != sampling.answers(model, processor, studies[:7], task, 1.0, seed=1,
                                   max_new_tokens=12)


def test_the_prompt_that_names_the_diagnosis_is_used_only_when_asked_for(processor, studies, task,
                                                                         monkeypatch):
    prompts = []

    def sample(model, processor, examples, *rest):
        prompts.extend(processor.text(example["prefix_ids"]) for example in examples)
        return [(processor.response("x"), "stop") for _ in examples]

    monkeypatch.setattr(sampling, "sample", sample)
    healthy = data.student_prompt(Study("", (), {}, {}), task, "teacher")
    ill = [s for s in studies if data.student_prompt(s, task, "teacher") != healthy][:1]
    for kind in ("student", "teacher"):
        assert sampling.answers(None, processor, ill, task, 0.0, prompt=kind) == ["x"]
    assert task.prompts["student"] in prompts[0]
    assert "diagnosis" not in prompts[0]
    assert "the diagnosis is" in prompts[1]


# -------------------------------------------------------------------------------------- the command

@pytest.fixture(scope="module")
def chatter(tmp_path_factory, world, base, processor):
    """A task in which even a random student's babble says something, and the flags that name it: a
    finding is said in any word of the tokenizer that begins with one of its letters."""
    folder = tmp_path_factory.mktemp("chatter")
    words = sorted({processor.text([i]).strip() for i in range(len(processor.tokenizer))})
    words = [word for word in words if word.isascii() and word.isalpha()]
    findings = {letters: [word for word in words if word[0] in letters]
                for letters in ("bdfh", "ace", "mnlo", "psr")}
    (folder / "task.json").write_text(json.dumps({
        **TASK, "findings": findings, "positive": ["said"],
        "classes": {"unsaid": ["never {finding}"], "said": ["{finding}"]}}))
    texts = {"u": "edema is mild", "v": "never absent"}
    records = []
    for i in range(8):
        labels = {finding: ("said", "unsaid")[(i + at) % 3 == 0]
                  for at, finding in enumerate(findings) if (i + at) % 5}
        records.append({"id": f"s{i}", "image": f"films/test-{i:05d}.png", "labels": labels,
                        "split": "test", "trajectories": texts})
    image = "films/test-00000.png"
    records.append({"id": "t", "image": image, "labels": {"ace": "unsaid"}, "split": "train"})
    records.append({"id": "n", "image": image, "split": "validate"})
    (folder / "studies.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    return ["classify", "--studies", folder / "studies.jsonl", "--images", world, "--task_file",
            folder / "task.json", "--student", f"random={base}", "--max_new_tokens", "40",
            "--batch_size", "3", "--no-bf16", "--mode", "parse", "--bootstrap", "20"]


def command(capsys, monkeypatch, *flags):
    """What evaluate.py prints, run as a script in this process."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags)])
    capsys.readouterr()
    evaluate.main()
    return capsys.readouterr().out


def test_one_and_two_ranks_print_the_same_table_and_end_with_one_line_of_json(chatter, capsys,
                                                                              monkeypatch, script):
    one = command(capsys, monkeypatch, *chatter, "--json").splitlines()
    two = script("evaluate.py", *chatter, "--json", ranks=2).stdout.splitlines()
    rows = json.loads(one[-1])["rows"]
    assert json.loads(two[-1]) == json.loads(one[-1])
    assert [line for line in two if line in one] == one  # the table, and the JSON
    assert list(rows) == ["label prior", "u", "v", "vote of the teachers", "random"]
    # so it could have differed
    assert 0 < rows["random"]["greedy"]["mean"] < 1 and 0 < rows["random"]["sampled"]["mean"] < 1
    assert rows["random"]["greedy"]["example"] != rows["random"]["sampled"]["example"]
    of = {name: rows[name]["accuracy"]["ace"] for name in ("label prior", "u", "v")}
    assert of["label prior"] == of["v"] == 1 - of["u"]


def test_each_text_of_a_teacher_is_read_once_however_many_rows_there_are(chatter, capsys,
                                                                         monkeypatch):
    records = map(json.loads, chatter[2].read_text().splitlines())
    texts = [text for record in records if record["split"] == "test"
             for text in record["trajectories"].values()]
    read, read_classes = Counter(), data.read_classes

    def counting(text, task):
        read[text] += 1
        return read_classes(text, task)

    monkeypatch.setattr(data, "read_classes", counting)
    command(capsys, monkeypatch, *chatter, "--max_new_tokens", "1")
    assert len(texts) == 16 and all(read[text] == texts.count(text) for text in texts)


def test_results_are_written_with_their_settings_and_not_computed_twice(chatter, capsys,
                                                                        monkeypatch, tmp_path):
    results = tmp_path / "results.json"
    flags = [*chatter, "--output", results, "--max_new_tokens", "4"]
    first = command(capsys, monkeypatch, *flags)
    written = json.loads(results.read_text())
    assert written["settings"]["max_new_tokens"] == 4 and written["rows"]["random"]["sampled"]["n"]
    with monkeypatch.context() as patch:
        patch.setattr(student, "load", lambda *args: pytest.fail("the results are there"))
        assert first.strip() in command(capsys, patch, *flags)
    again = command(capsys, monkeypatch, *flags, "--seed", "1")
    assert "holds these results" not in again
    assert json.loads(results.read_text())["settings"]["seed"] == 1


def test_results_that_are_there_already_still_end_with_json(chatter, capsys, monkeypatch, tmp_path):
    flags = [*chatter, "--output", tmp_path / "results.json", "--max_new_tokens", "4", "--json"]
    first = command(capsys, monkeypatch, *flags).splitlines()[-1]
    assert json.loads(command(capsys, monkeypatch, *flags).splitlines()[-1]) == json.loads(first)


def test_a_changed_task_is_measured_anew(chatter, capsys, monkeypatch, tmp_path):
    spec = json.loads(chatter[chatter.index("--task_file") + 1].read_text())
    (tmp_path / "task.json").write_text(json.dumps(spec))
    flags = [*chatter, "--task_file", tmp_path / "task.json", "--output", tmp_path / "results.json",
             "--max_new_tokens", "4"]
    command(capsys, monkeypatch, *flags)
    (tmp_path / "task.json").write_text(
        json.dumps({**spec, "findings": {**spec["findings"], "ace": ["looks"]}}))
    assert "holds these results" not in command(capsys, monkeypatch, *flags)


@pytest.mark.parametrize("split, message", [
    ("validate", "no study of split 'validate' has labels, expected some to score against"),
    ("nowhere", "no study of split 'nowhere', expected at least one")])
def test_a_split_without_labels_is_refused_before_a_model_is_loaded(chatter, monkeypatch, split,
                                                                    message):
    monkeypatch.setattr(student, "load", lambda *args: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message):
        evaluate.run(evaluate.parse([*map(str, chatter), "--split", split]))


def test_a_student_is_named_by_flag_or_by_folder(chatter, base, capsys, monkeypatch):
    at = chatter.index("--student")
    rest = [*chatter[:at], *chatter[at + 2:], "--max_new_tokens", "1"]
    printed = command(capsys, monkeypatch, *rest, "--student", base, "--student", f"again={base}",
                      "--json")
    rows = json.loads(printed.splitlines()[-1])["rows"]
    assert rows[str(base)] == rows["again"]


@pytest.mark.parametrize("name", ["mine=", ""])
def test_a_folder_with_an_equals_sign_in_its_name_is_found(chatter, base, tmp_path, monkeypatch,
                                                           name):
    folder = tmp_path / "lr=1e-4"
    folder.symlink_to(base)
    at, asked = chatter.index("--student"), []
    score = {"accuracy": {"ace": 1.0}, "mean": 1.0, "unread": 0.0, "styles": {}}

    def classify(path, *rest):
        asked.append(str(path))
        return {"greedy": score, "sampled": score}

    monkeypatch.setattr(evaluate, "classify", classify)
    rest = map(str, [*chatter[:at], *chatter[at + 2:]])
    evaluate.run(evaluate.parse([*rest, "--student", f"{name}{folder}"]))
    assert asked == [str(folder)]
