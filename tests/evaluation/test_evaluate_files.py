"""evaluate.py on the public datasets' files: the commands as a user starts them, what they say is
missing, and where they continue."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_datasets as files
import torch
from conftest import ROOT

import data
import evaluate
import sampling
import spd
import student
from evaluation import datasets, questions, reports, tables, zeroshot
from metrics import meteor, scores

REAL_CXR, PAPER_TXT = os.environ.get("REAL_CXR"), os.environ.get("PAPER_TXT")


def run(capsys, monkeypatch, *flags):
    """evaluate.py run as a script in this process -> (the lines that it prints, its last line of
    JSON, its exit status)."""
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags), "--json"])
    capsys.readouterr()
    status = 0
    try:
        evaluate.main()
    except SystemExit as stop:
        status = stop.code
    *lines, last = capsys.readouterr().out.splitlines()
    return lines, json.loads(last), status


@pytest.fixture(scope="module")
def asked(base):
    return ["--student", f"ours={base}", "--no-bf16"]


# ----------------------------------------------------------------------------------------- classify

def test_progression_prints_top1_and_macro_with_intervals_beside_table_1(tmp_path, asked, capsys,
                                                                         monkeypatch, script):
    flags = ["classify", "--task", "progression", *files.write_ms_cxr_t(tmp_path), *asked,
             "--bootstrap", "50"]
    lines, out, _ = run(capsys, monkeypatch, *flags)
    ours = out["rows"]["ours"]["options"]
    assert ours["n"] == {"Consolidation": 1, "Pleural Effusion": 2, "Pneumothorax": 1, "Edema": 1}
    assert ours["unread"] == 0
    for key in ("top1", "macro"):
        assert set(ours[key]["value"]) == set(ours[key]["interval"]) == {*ours["n"], "mean"}
        for name, (low, high) in ours[key]["interval"].items():
            assert low <= ours[key]["value"][name] <= high
    assert ours["top1"]["value"]["mean"] == pytest.approx(ours["mean"])
    text = "\n".join(lines)
    assert "paper: CoCa-CXR" in text
    assert "Pleural Effusion: n 2, improving 0.500, stable 0.500, worsening 0.000" in text
    intervals = r"mean all 0\.\d+ \[0\.\d+, [01]\.\d+\]"
    assert re.search(rf"ours, options, macro accuracy \[95%\]: .*{intervals}", text)
    # none of its labels in these rows
    assert "no mean 5 where one of the paper's five findings has no figure: Pneumonia" in lines
    assert "majority class" in out["rows"] and out["missing"] == 0
    two = script("evaluate.py", *flags, "--json", ranks=2).stdout.splitlines()
    assert json.loads(two[-1]) == out


def test_presence_has_always_no_and_the_majority_beside_it(tmp_path, asked, capsys, monkeypatch):
    lines, out, _ = run(capsys, monkeypatch, "classify", "--task", "presence",
                        *files.write_ms_cxr_t(tmp_path), *asked, "--bootstrap", "0")
    assert out["rows"]["always no"]["accuracy"] == {
        "Consolidation": 0.5, "Edema": 0.5, "Pleural Effusion": 0.0, "Pneumonia": 1.0,
        "Pneumothorax": 0.5}
    assert out["rows"]["majority class"]["accuracy"]["Pleural Effusion"] == 1.0
    assert any(line == "Pleural Effusion: n 1, 1 1.000, 0 0.000" for line in lines)
    assert "2 labels left out" in lines[-1]


@pytest.mark.parametrize("kind", ["progression", "presence"])
def test_generated_text_is_read_and_its_unread_rate_printed(tmp_path, asked, capsys, monkeypatch,
                                                            kind):
    flags = ["classify", "--task", kind, *files.write_ms_cxr_t(tmp_path), *asked, "--bootstrap",
             "0", "--mode", "parse", "--max_new_tokens", "8"]
    asked_with = []
    says = "The pleural effusion is improving." if kind == "progression" else "There is edema."

    def sample(model, processor, examples, *rest):
        asked_with.extend(processor.text(example["prefix_ids"]) for example in examples)
        return [(processor.response(says), "stop") for _ in examples]

    monkeypatch.setattr(sampling, "sample", sample)
    _, out, _ = run(capsys, monkeypatch, *flags)
    greedy = out["rows"]["ours"]["greedy"]
    if kind == "progression":
        assert greedy["accuracy"]["Pleural Effusion"] == 0.5
        assert greedy["unread"] == 3 / 5
        assert "earlier film" in asked_with[0]
    else:
        assert greedy["accuracy"]["Edema"] == 0.5 and greedy["unread"] == 6 / 8


def test_what_is_missing_is_said_and_strict_exits_with_1(tmp_path, asked, capsys, monkeypatch):
    flags = ["classify", "--task", "progression", *files.write_ms_cxr_t(tmp_path), *asked,
             "--bootstrap", "0"]
    film = tmp_path / "files" / f"{files.FILMS[1]}.jpg"
    # its header is whole, so only reading it shows the fault
    film.write_bytes(film.read_bytes()[:-200])
    (tmp_path / "files" / f"{files.FILMS[2]}.jpg").unlink()
    lines, out, status = run(capsys, monkeypatch, *flags)
    assert status == 0
    assert out["missing"] == 2
    assert out["rows"]["ours"]["options"]["n"] == {"Pneumothorax": 1, "Edema": 1}
    assert "missing, left out: 2" in lines
    assert any("no such image" in line for line in lines)
    assert any("not a readable image" in line for line in lines)
    assert run(capsys, monkeypatch, *flags, "--strict")[1:] == (out, 1)


def test_labels_that_no_question_offers_are_left_out_of_every_row(tmp_path, world, asked, capsys,
                                                                  monkeypatch):
    image = json.loads((world / "studies.jsonl").read_text().splitlines()[0])["image"]
    with open(tmp_path / "studies.jsonl", "w") as file:
        for i, edema in enumerate((1, 0, -1)):
            record = {"id": f"s{i}", "image": image, "labels": {"Edema": edema},
                      "trajectories": {"u": "There is edema."}}
            file.write(json.dumps(record) + "\n")
    lines, out, _ = run(capsys, monkeypatch, "classify", "--studies", tmp_path / "studies.jsonl",
                        "--images", world, *asked, "--bootstrap", "0")
    assert all(tables.plain(row)["n"] == {"Edema": 2} for row in out["rows"].values())
    assert "1 labels left out that are none of 0, 1" in lines and out["rows"]["u"]["mean"] == 0.5


@pytest.mark.parametrize("flags, message", [
    (["--task", "progression"], "expected --ms_cxr_t"),
    (["--task", "presence", "--ms_cxr_t", "x.csv"], "expected --ms_cxr_t and --chexpert_csv"),
    ([], "expected one of --studies and --task"),
    (["--studies", "x", "--task", "presence"], "expected one of --studies and --task"),
    (["--task", "progression", "--ms_cxr_t", "x", "--split", "test"],
     "expected --split and --task_file only with --studies"),
    (["--task", "progression", "--ms_cxr_t", "x", "--task_file", "t"],
     "expected --split and --task_file only with --studies")])
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.parse(["classify", "--student", "x", *flags])
    assert message in capsys.readouterr().err


def test_the_split_is_test_where_none_is_given():
    asked = (["classify", "--studies", "x"], ["reports", "--studies", "x"],
             ["classify", "--studies", "x", "--split", "train"])
    splits = [evaluate.parse([*flags, "--student", "x"]).split for flags in asked]
    assert splits == ["test", "test", "train"]


def test_with_more_findings_than_the_papers_the_mean_of_its_five_has_an_interval_of_its_own():
    findings = ["Cardiomegaly", *tables.FIVE]
    studies = [data.Study(str(i), (), dict.fromkeys(findings, i % 2), {}) for i in range(20)]
    readings = [{**study.labels, "Cardiomegaly": 9} for study in studies]
    top1 = evaluate.intervals(readings, studies, findings, scores.accuracy, 20, 0)
    assert top1["value"]["mean 5"] == 1.0
    assert top1["interval"]["mean 5"] == (1.0, 1.0)
    assert top1["value"]["mean"] == pytest.approx(5 / 6)
    score = {"accuracy": dict.fromkeys(findings, 1.0), "top1": top1}
    (line,) = tables.student_lines("S", {"options": score})
    assert line.endswith("mean 5 1.000 [1.000, 1.000], mean all 0.833 [0.833, 0.833]")
    five = evaluate.intervals(readings, studies, findings[1:], scores.accuracy, 20, 0)
    assert "mean 5" not in five["value"]


def test_intervals_draw_whole_studies_and_leave_out_what_has_no_label():
    studies = [data.Study(str(i), (), {"A": i % 2, **({"B": 1} if i < 10 else {})}, {})
               for i in range(40)]
    readings = [{"A": 1, "B": 1} for _ in studies]
    top1 = evaluate.intervals(readings, studies, ["A", "B"], scores.accuracy, 200, 0)
    macro = evaluate.intervals(readings, studies, ["A", "B"], scores.macro_accuracy, 200, 0)
    assert top1["value"] == {"A": 0.5, "B": 1.0, "mean": 0.75} == macro["value"]
    assert top1["interval"]["B"] == (1.0, 1.0)
    low, high = top1["interval"]["A"]
    assert 0.3 < low < 0.42 and 0.58 < high < 0.7  # 0.5 +- 1.96 sqrt(0.25 / 40) is 0.345 .. 0.655
    # always the same answer: half of the two classes, however they are drawn
    assert macro["interval"]["A"] == (0.5, 0.5)
    low, high = top1["interval"]["mean"]
    assert 0.64 < low < 0.71 and 0.79 < high < 0.86


# ------------------------------------------------------------------------------------------ reports

def test_reports_are_scored_beside_tables_3_and_7(tmp_path, asked, capsys, monkeypatch):
    flags = ["reports", *files.write_annotation(tmp_path), *asked]
    says = iter(("The heart is enlarged. No effusion.", "Clear lungs. No pneumothorax.",
                 "Left basal pneumonia."))
    prompts = []

    def sample(model, processor, examples, *rest):
        prompts.extend(processor.text(example["prefix_ids"]) for example in examples)
        return [(processor.response(next(says)), "stop") for _ in examples]

    monkeypatch.setattr(sampling, "sample", sample)
    meteor = SimpleNamespace(score=lambda ours, theirs: SimpleNamespace(corpus=0.4321))
    monkeypatch.setattr(reports, "Meteor", lambda folder: meteor)
    lines, out, _ = run(capsys, monkeypatch, *flags)
    row, text = out["rows"]["ours"], "\n".join(lines)
    # cleaned: 'the heart is [mildly] enlarged . no effusion .' 9 of 9 words;
    # 'clear lungs . no pneumothorax .' and 'left basal pneumonia .' whole
    length = 8 + 6 + 4
    assert row["BLEU-1"] == pytest.approx(2.718281828 ** (1 - (length + 1) / length), abs=1e-6)
    assert row["METEOR"] == 0.4321
    assert row["findings"]["tp"] == 3 and row["findings"]["f1"] == 1.0 and row["n"] == 3
    assert "findings section" in prompts[0]
    assert "paper: CounterfactRFT" in text
    assert "paper: PromptMRG" in text
    assert "cleaning: r2gen" in text
    assert len(re.findall(r"here: ours .*0\.432", text)) == 2
    assert "CIDEr" in text


def test_without_meteors_files_the_rest_is_scored_and_the_command_to_get_them_is_said(
    tmp_path, asked, capsys, monkeypatch):
    flags = ["reports", *files.write_annotation(tmp_path), *asked, "--meteor", tmp_path,
             "--max_new_tokens", "5", "--strict", "--clean", "none"]
    lines, out, status = run(capsys, monkeypatch, *flags)
    assert status == 1
    assert out["missing"] == 1
    assert out["rows"]["ours"]["METEOR"] is None
    assert 0 <= out["rows"]["ours"]["BLEU-4"] < 1
    assert any("pip install pycocoevalcap" in line for line in lines)
    assert any(line.startswith("here: ours") and "not run" in line for line in lines)


def test_report_files_and_records_are_sources_too(tmp_path, world, asked, capsys, monkeypatch):
    monkeypatch.setattr(reports, "Meteor", lambda folder: None)
    short = [*asked, "--max_new_tokens", "3"]
    _, out, _ = run(capsys, monkeypatch, "reports", *files.write_mimic_reports(tmp_path), *short,
                    "--section", "both")
    assert out["rows"]["ours"]["n"] == 2 and out["missing"] == 1
    image = json.loads((world / "studies.jsonl").read_text().splitlines()[0])["image"]
    kinds = ({"report": "Clear."}, {}, {"report": "Edema.", "split": "train"})
    records = [{"id": f"s{i}", "image": image, **more} for i, more in enumerate(kinds)]
    (tmp_path / "studies.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    _, out, _ = run(capsys, monkeypatch, "reports", "--studies", tmp_path / "studies.jsonl",
                    "--images", world, *short)
    assert out["rows"]["ours"]["n"] == 1


@pytest.mark.skipif(meteor.importlib.util.find_spec("pycocoevalcap") is None,
                    reason="pycocoevalcap, which brings METEOR's files, is not installed")
def test_the_real_meteor_is_in_the_table():
    texts = ["no effusion .", "the heart is large"]
    references = ["no pleural effusion .", "the heart is large"]
    row = reports.score_reports(texts, references, "none", meteor.Meteor(), "negative")
    assert 0.4 < row["METEOR"] < 1


# ---------------------------------------------------------------------------------------- zero-shot

@pytest.fixture
def four(tmp_path):
    """The flags that name every dataset."""
    writers = {"open_i": files.write_open_i, "chestx_ray14": files.write_chestx_ray14,
               "chexpert": files.write_chexpert, "chestx_det10": files.write_chestx_det10}
    flags = []
    for name, write in writers.items():
        (tmp_path / name).mkdir()
        flags += [f"--{name}", write(tmp_path / name)]
    return flags


def test_zeroshot_scores_every_dataset_and_says_what_is_missing(four, asked, base, capsys,
                                                                monkeypatch, script):
    lines, out, status = run(capsys, monkeypatch, "zeroshot", *four, *asked, "--strict")
    row, text = out["rows"]["ours"], "\n".join(lines)
    assert status == 1
    assert out["missing"] == 4
    assert "Open-I: CXR2_IM-0652-2001.png: of 2.xml, no such image" in text
    assert [(name, figures["n"]) for name, figures in row.items()] == [
        ("Open-I", 3), ("ChestX-ray14", 2), ("CheXpert", 4), ("ChestX-Det10", 2)]
    chexpert = row["CheXpert"]
    assert chexpert["classes"] + chexpert["left_out"] == 5
    assert chexpert["studies"] == 3
    assert 0 <= chexpert["per_study"] <= 1
    # a class nobody has does not count
    assert row["Open-I"]["auc"]["Hernia"] is None and row["Open-I"]["positive"]["Granuloma"] == 2
    model, folder = student.load(base), Path(four[1])
    bench = datasets.open_i(folder)
    processor = student.Processor(base, bench.task, folder)
    question = {"x": ("Does this chest X-ray show a granuloma?", ["yes", "no"])}
    tokens = questions.tokenise(processor, question)
    odds = []
    for study in bench.studies:
        example = questions.encode(processor, study, tokens)
        answer = questions.option_logps(model, example)["x"]
        odds.append(answer["yes"] - answer["no"])
    assert row["Open-I"]["auc"]["Granuloma"] == scores.auc(
        [study.labels["Granuloma"] for study in bench.studies], odds)
    assert re.search(r"paper: CARZero +0\.84 +0\.81 +0\.92 +0\.80$", text, re.M)
    assert re.search(r"here: ours( +[01]\.\d{3}){4}", text)
    two = script("evaluate.py", "zeroshot", *four, *asked, "--json", ranks=2).stdout.splitlines()
    assert json.loads(two[-1]) == out


def test_a_dataset_that_is_not_there_does_not_stop_the_others(four, asked, tmp_path, capsys,
                                                              monkeypatch):
    (tmp_path / "chestx_det10" / "test.json").unlink()
    lines, out, _ = run(capsys, monkeypatch, "zeroshot", *four[4:], *asked)
    assert list(out["rows"]["ours"]) == ["CheXpert"]
    assert any("chestx_det10: no test.json" in line for line in lines)
    assert any(line.startswith("here: ours") and line.count("not run") == 3 for line in lines)
    with pytest.raises(ValueError, match="no test.json"):
        evaluate.run(evaluate.parse(
            ["zeroshot", "--chestx_det10", str(tmp_path / "chestx_det10"), *map(str, asked)]))


def test_zeroshot_goes_on_at_the_image_where_it_was_stopped(four, asked, tmp_path, capsys,
                                                            monkeypatch):
    flags = ["zeroshot", *four, *asked, "--output", tmp_path / "zeroshot.json"]
    whole = run(capsys, monkeypatch, "zeroshot", *four, *asked)[1]
    right, calls = questions.option_logps, []

    def stops(model, example):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(example["id"])
        return right(model, example)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(questions, "option_logps", stops)
        run(capsys, patch, *flags)
    first, calls[:] = set(calls), []

    def counts(model, example):
        calls.append(example["id"])
        return right(model, example)

    with monkeypatch.context() as patch:
        patch.setattr(questions, "option_logps", counts)
        assert run(capsys, patch, *flags)[1] == whole
        assert len(calls) == 11 - 4
        assert not first & set(calls)
        # finished: read from the file
        assert run(capsys, patch, *flags)[1] == whole and len(calls) == 11 - 4
    assert not (tmp_path / "zeroshot.json.parts").exists()
    files.film(tmp_path / "chestx_det10" / "test_data" / "36304.png", 3)
    # an image has come: measured anew
    assert run(capsys, monkeypatch, *flags)[1]["rows"]["ours"]["ChestX-Det10"]["n"] == 3


def test_aucs_by_hand():
    """Five images of three studies; the second class has no label on the last."""
    labels = ({"A": 1, "B": 0}, {"A": 1, "B": 0}, {"A": 0, "B": 1}, {"A": 0, "B": 1}, {"A": 0})
    studies = [data.Study(str(i), (), given, {}, record={"group": group})
               for i, (given, group) in enumerate(zip(labels, "xxyyz"))]
    logits = ((3, 1), (-5, 2), (-1, 0), (2, 3), (0, 9))
    odds = {str(i): {"A": a, "B": b, "C": 0.0} for i, (a, b) in enumerate(logits)}
    bench = datasets.Benchmark("x", datasets.binary_task("x", ("A", "B", "C")), Path(), studies,
                               ("A", "B"))
    out = zeroshot.aucs(bench, odds, "max")
    assert out["auc"] == {"A": 3 / 6, "B": 2 / 4}
    assert out["macro"] == 0.5
    assert (out["classes"], out["left_out"]) == (2, 0)
    # A: x 3 over y 2 and z 0; B: y 3 over x 2
    assert out["per_study"] == (1.0 + 1.0) / 2 and out["studies"] == 3
    # A: x -1 under y .5 and z 0; B: x 1.5, y 1.5
    assert zeroshot.aucs(bench, odds, "mean")["per_study"] == (0.0 + 0.5) / 2


# ------------------------------------------------------------------------------------------- tables

def test_all_tables_stand_beside_what_was_run(tmp_path, asked, four, capsys, monkeypatch, world):
    task, ms_cxr_t = world / "task.json", files.write_ms_cxr_t(tmp_path)
    named = ["--student", f"SPD, all teachers={asked[1].partition('=')[2]}"]
    run(capsys, monkeypatch, "zeroshot", *four[4:6], *asked, "--output", tmp_path / "z.json")
    run(capsys, monkeypatch, "classify", "--task", "presence", *ms_cxr_t, *asked, "--bootstrap",
        "0", "--output", tmp_path / "c.json")
    run(capsys, monkeypatch, "classify", "--studies", world / "studies.jsonl", "--images", world,
        "--task_file", task, "--bootstrap", "0", *named, "--output", tmp_path / "s.json")
    lines, out, _ = run(capsys, monkeypatch, "tables", tmp_path / "z.json", tmp_path / "c.json",
                        tmp_path / "s.json")
    text = "\n".join(lines)
    numbers = re.findall(r"^Table (\d)\.", text, re.M)
    assert numbers == ["1", "2", "3", "4", "5", "7"]
    tables = out["tables"]
    assert list(tables["1"]) == ["ours [MS-CXR-T presence]"]
    assert tables["4"]["ours"][2] is not None
    assert tables["4"]["ours"][0] is None
    assert "    no Avg. of ours [MS-CXR-T presence]" not in text
    assert len(tables["1"]["ours [MS-CXR-T presence]"]) == 6
    assert "gpt-5 [studies.jsonl]" in tables["2"]
    assert list(tables["5"]) == ["SPD, all teachers [studies.jsonl]"]
    assert tables["3"] == tables["7"] == {}
    assert len(re.findall(r"^here( +not run){6}$", text, re.M)) == 2  # Tables 3 and 7
    with pytest.raises(ValueError, match="task.json: expected the --output of"):
        evaluate.run(evaluate.parse(["tables", str(task)]))


def classified(path, rows, **settings):
    defaults = {"command": "classify", "task": None, "studies": None, "blank": "exclude"}
    path.write_text(json.dumps({"settings": {**defaults, **settings}, "rows": rows}))
    return path


def share(**accuracy):
    return {"accuracy": accuracy, "mean": sum(accuracy.values()) / len(accuracy)}


LADDER = tuple(tables.TABLE_5)
WHOLE = dict(zip(tables.FIVE, (0.81, 0.62, 0.73, 0.94, 0.55)))


def test_table_5_is_of_ms_cxr_t_and_has_the_students_of_every_task_result(tmp_path):
    rows = {"always no": share(**WHOLE), "SPD": {"options": share(**WHOLE)},
            **{name: {"options": share(**WHOLE)} for name in LADDER}}
    ours = tables.collect([
        classified(tmp_path / "progression.json", rows, task="progression"),
        classified(tmp_path / "presence.json", rows, task="presence"),
        classified(tmp_path / "negative.json", rows, task="presence", blank="negative")])
    sources = ("progression", "presence", "presence, blank negative")
    assert list(ours[5]) == [f"{name} [MS-CXR-T {source}]" for source in sources for name in LADDER]
    assert list(ours[1]) == [f"{name} [MS-CXR-T {source}]"
                             for source in sources for name in ("SPD", *LADDER)]
    assert ours[2] == {}
    one = ours[5]["SPD, one teacher [MS-CXR-T progression]"]
    assert one == [*WHOLE.values(), pytest.approx(0.73)]
    head, *lines = tables.beside(5, ours[5]).splitlines()[1:]
    assert {len(line) for line in lines} == {len(head)}
    assert len(lines) == 3 + 9
    assert "mean all" not in head


def test_what_stands_below_avg_is_the_mean_of_the_papers_five_findings(tmp_path):
    fourteen = {**dict.fromkeys(data.CHEST.findings, 0.0), **WHOLE}
    four = {**WHOLE, "Fracture": 1.0}
    del four["Pneumonia"]
    rows = {"gpt-5": share(**fourteen), "u": share(**four)}
    ours = tables.collect([classified(tmp_path / "r.json", rows, studies="x/s.jsonl")])[2]
    assert ours["gpt-5 [s.jsonl]"] == [*WHOLE.values(), pytest.approx(3.65 / 5),
                                       pytest.approx(3.65 / 14)]
    assert ours["u [s.jsonl]"] == [0.81, 0.62, None, 0.94, 0.55, None, pytest.approx(3.92 / 5)]
    lines = tables.beside(2, ours).splitlines()
    assert lines[1].split() == ["Con.", "PE", "Pna.", "Pnx.", "Ede.", "Avg.", "mean", "all"]
    assert [line.split("]")[-1].split() for line in lines[-3:-1]] == [
        ["0.810", "0.620", "0.730", "0.940", "0.550", "0.730", "0.261"],
        ["0.810", "0.620", "-", "0.940", "0.550", "-", "0.784"]]
    assert {len(line) for line in lines[-3:-1]} == {len(lines[1])}
    assert lines[-1] == "    no Avg. of u [s.jsonl]: no figure for Pna."


def test_a_row_that_two_files_have_stands_twice_if_its_figures_differ(tmp_path):
    first, same, other = (tmp_path / f"{name}.json" for name in ("first", "same", "other"))
    for path, more in ((first, {}), (same, {}), (other, {"Fracture": 1.0})):
        classified(path, {"S": {"options": share(**WHOLE, **more)}}, task="presence")
    names = ["S [MS-CXR-T presence]", f"S [MS-CXR-T presence] ({other})"]
    assert list(tables.collect([first, same, other])[1]) == names


def test_a_student_with_a_name_of_table_5_has_its_rows_beside_it_on_ms_cxr_t(tmp_path, asked,
                                                                             capsys, monkeypatch):
    flags = ["classify", "--task", "presence", *files.write_ms_cxr_t(tmp_path), "--bootstrap", "0",
             "--no-bf16", "--student"]
    folder = asked[1].partition("=")[2]
    of = {name: "\n".join(run(capsys, monkeypatch, *flags, f"{name}={folder}")[0])
          for name in ("ours", "SPD, one teacher")}
    assert "paper: SPD, one teacher" not in of["ours"]
    assert all("paper: CoCa-CXR" in text for text in of.values())
    assert "paper: SPD, all teachers + APO" in of["SPD, one teacher"]


def test_the_recipes_of_measure_md_are_commands_and_make_the_rows_of_table_5():
    """A shell expands them, and prints the words of each command instead of running it."""
    part = (ROOT / "docs/measure.md").read_text().split("## On the real files")[1].split("\n## ")[0]
    lines = "\n".join(line for line in part.splitlines() if line.startswith("    "))
    prints = ("for name in python torchrun pip; do "
              "eval \"$name() { printf '%s\\x1f' \\\"\\$@\\\"; echo; }\"; done\n")
    done = subprocess.run(["bash", "-euc", prints + lines], capture_output=True, text=True,
                          check=True)
    commands = [line.split("\x1f")[:-1] for line in done.stdout.splitlines()]
    assert ["install", "pycocoevalcap"] in commands
    asked = [evaluate.parse(words[1:]) for words in commands if words[0] == "evaluate.py"]
    trained = [spd.parse(words[2:]) for words in commands if "spd.py" in words]
    tasks = [(args.task, args.blank) for args in asked
             if args.command == "classify" and args.student == ["S"] and args.output]
    assert tasks == [("progression", "exclude"), ("presence", "exclude"), ("presence", "negative")]
    ladders = [args for args in asked if args.command == "classify" and len(args.student) == 3]
    assert [args.task for args in ladders] == ["presence", "progression"]
    assert all([value.partition("=")[0] for value in args.student] == list(tables.TABLE_5)
               for args in ladders)
    folders = [(args.teachers, args.output_dir) for args in trained]
    assert folders == [("gpt-5", "runs/spd1"), (None, "runs/spd")]
    made = {args.output for args in asked if args.command != "tables" and args.output}
    assert all({*args.results} - {"..."} <= made for args in asked if args.command == "tables")


@pytest.mark.skipif(not PAPER_TXT, reason="PAPER_TXT is not set to the paper's text")
def test_the_papers_figures_are_the_papers():
    """Every row of the paper's tables is in the dicts, and nothing else."""
    text = Path(PAPER_TXT).read_text(encoding="utf-8")
    rows = re.findall(r"^([^\t\n]+)\t(.*)$", text, re.M)
    number = lambda cell: None if cell == "-" else float(cell)
    marks = {("✓", "-", "-"): "SPD, one teacher", ("✓", "✓", "-"): "SPD, all teachers",
             ("✓", "✓", "✓"): "SPD, all teachers + APO"}
    found = set()
    for name, rest in rows:
        cells = rest.split("\t")
        if name == "✓":
            name, cells = marks["✓", cells[0], cells[1]], cells[2:]
        cells = cells if re.fullmatch(r"[\d.-]+", cells[0]) else cells[1:]  # a venue
        if len(cells) in (4, 6) and all(re.fullmatch(r"0\.\d+|-", cell) for cell in cells):
            found.add((name, tuple(map(number, cells))))
    ours = {(name, figures) for _, _, table in tables.TABLES.values()
            for name, figures in table.items()}
    assert found == ours and len(ours) > 30


# --------------------------------------------------------------------------------------- real films

@pytest.mark.skipif(not REAL_CXR,
                    reason="REAL_CXR is not set to a folder with selection.csv and films")
def test_real_films_are_classified_and_ranked_the_same_twice(base, tmp_path, capsys, monkeypatch):
    """The 28 films as a ChestX-ray14 folder and as records; a tiny random student, so only finite
    and repeatable figures are asked for."""
    selection = Path(REAL_CXR) / "selection.csv"
    rows = [row for _, row in datasets.csv_columns(selection, "file", "findings_mimic14")]
    lines = []
    with open(tmp_path / "studies.jsonl", "w") as file:
        for row in rows:
            found = row["findings_mimic14"]
            labels = {finding: int(finding in found.split("|"))
                      for finding in ("Pneumonia", "Pleural Effusion", "Lung Opacity")}
            record = {"id": row["file"], "image": row["file"], "labels": labels}
            file.write(json.dumps(record) + "\n")
            nih = [str(int(finding in ("Pneumonia", "Effusion") and finding in found))
                   for finding in datasets.CHESTX_RAY14]
            lines.append(f"{row['file']} {' '.join(nih)}")
    shutil.copytree(Path(REAL_CXR) / "images", tmp_path / "nih" / "images")
    (tmp_path / "nih" / "test_list.txt").write_text("\n".join(lines))
    student_flags = ["--student", f"ours={base}", "--no-bf16", "--max_pixels", 64 * 28 * 28]
    classify = ["classify", "--studies", tmp_path / "studies.jsonl", "--images", REAL_CXR,
                "--bootstrap", "100"]
    for command in (classify, ["zeroshot", "--chestx_ray14", tmp_path / "nih"]):
        one, two = (run(capsys, monkeypatch, *command, *student_flags)[1] for _ in range(2))
        assert one == two and (one["missing"] == 0 or command[0] == "zeroshot")
        row = one["rows"]["ours"]
        if command[0] == "classify":
            assert row["options"]["n"] == dict.fromkeys(
                ("Lung Opacity", "Pleural Effusion", "Pneumonia"), 28)
            assert 0 <= row["options"]["mean"] <= 1
        else:
            assert row["ChestX-ray14"]["n"] == 28
            assert 0 < row["ChestX-ray14"]["auc"]["Pneumonia"] < 1
    auc = one["rows"]["ours"]["ChestX-ray14"]["auc"]
    assert torch.isfinite(torch.tensor([auc["Pneumonia"], auc["Effusion"]])).all()
