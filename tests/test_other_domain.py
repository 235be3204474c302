"""The whole pipeline on something that is no chest: the leaves of docs/data.md, no code changed.

There are three made-up teachers and drawn pictures.
"""

import json
import random
import re

import check
import numpy as np
import pytest
import torch
from conftest import ROOT
from faults import Job
from PIL import Image, ImageDraw

import apo
import data
import evaluate
import selfdistill
import spd
import student
from scale_model import base as scale_base

CLASSES = ("none", "few", "many")
VOICES = {
    "botanist": {
        "none": "there are no {f}", "few": "there are few {f}", "many": "there are many {f}"},
    "farmer": {"none": "{f} are absent", "few": "{f} are rare", "many": "{f} are frequent"},
    "robot": {"none": "no {f}", "few": "few {f}", "many": "many {f}"},
}
WORDS = {
    "botanist": ("speckles", "holes"), "farmer": ("spots", "holes"), "robot": ("spots", "holes")}


def readme_task():
    """The task.json that is written in docs/data.md."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("## Another domain", 1)[1].split("\n## ", 1)[0]
    return section[section.index('    {"name"'):section.index("\n\n`findings` gives")]


def draw(path, grades, rng):
    picture = Image.new("RGB", (56, 56), (40, 130, 40))
    pen = ImageDraw.Draw(picture)
    counts = (3 * CLASSES.index(grade) for grade in grades)
    for colour, count in zip(((90, 60, 20), (255, 255, 255)), counts):
        for _ in range(count):
            x, y = rng.randrange(4, 48), rng.randrange(4, 48)
            pen.ellipse((x, y, x + 5, y + 5), fill=colour)
    picture.save(path)


def say(teacher, grades):
    """A teacher's text: what it says of spots and of holes, in its own words."""
    voice = VOICES[teacher]
    phrases = [voice[grade].format(f=word) for grade, word in zip(grades, WORDS[teacher])]
    return ", ".join(phrases) + "."


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """A folder with pictures/, studies.jsonl, task.json, base/.

    base/ is a tiny student that has never seen the words.
    """
    folder, rng = tmp_path_factory.mktemp("leaves"), random.Random(0)
    (folder / "pictures").mkdir()
    (folder / "task.json").write_text(readme_task())
    records = []
    for i in range(28):
        grades = [rng.choice(CLASSES) for _ in range(2)]
        draw(folder / "pictures" / f"{i}.png", grades, rng)
        answers = {}
        for name in VOICES:
            seen = [g if rng.random() > 0.3 else rng.choice(CLASSES) for g in grades]
            answers[name] = say(name, seen)
        if i == 3:
            answers["robot"] = "As an AI I cannot judge leaves."
        records.append({
            "id": f"leaf-{i}", "image": f"{i}.png",
            "labels": dict(zip(("Spots", "Holes"), grades)),
            "trajectories": answers, "split": "train" if i < 20 else "test"})
    (folder / "studies.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [text for record in records for text in record["trajectories"].values()]
    model, tokenizer = scale_base.build_student(0, texts * 20, vocabulary=400, width=64)
    scale_base.save_student(folder / "base", model, tokenizer)
    return folder


def test_the_four_stages_run_on_another_task(leaves, capsys):
    inputs = ["--studies", leaves / "studies.jsonl", "--task_file", leaves / "task.json",
              "--images", leaves / "pictures"]

    def run(stage, *flags):
        return stage.run(stage.parse([*map(str, [*flags, *inputs])]))

    asked = [inputs[1], *inputs[2:], "--student", leaves / "base"]
    found = check.check(check.parse([*map(str, asked)]))
    assert found["kinds"] == {"refusal": 1} and set(found["tokens"]) == set(VOICES)

    pi_st, after_apo = leaves / "spd" / "student", leaves / "apo" / "student"
    file = leaves / "positives" / "positives.jsonl"
    train = ["--refusals", "drop", "--no-gradient_checkpointing", "--micro_batch", 0, "--no-bf16",
             "--train", "decoder,merger", "--logging_steps", 1]
    run(spd, *train, "--student", leaves / "base", "--output_dir", leaves / "spd",
        "--num_epochs", 15, "--learning_rate", 5e-3)
    run(selfdistill, "--refusals", "drop", "--no-bf16", "--student", pi_st,
        "--output_dir", leaves / "positives", "--max_new_tokens", 40, "--temperature", 0.5)
    positives = [json.loads(line) for line in file.read_text().splitlines()]
    stats = json.loads((leaves / "positives" / "stats.json").read_text())
    assert len(positives) >= 8 and stats["positives"] == len(positives) and stats["studies"] == 20
    # some t+ is in words that the task's phrases read
    assert stats["unread"] < 1 and stats["agreement_with_vote"] > 0
    run(apo, *train, "--student", pi_st, "--positives", file, "--output_dir", leaves / "apo",
        "--learning_rate", 1e-4)
    log = [json.loads(line) for line in (leaves / "apo" / "log.jsonl").read_text().splitlines()]
    assert {"rewards/botanist", "rewards/farmer", "rewards/robot"} <= set(log[0])
    assert log[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    # log(1 + N), and N is 2 where the robot declined
    assert np.log(3) - 1e-4 < log[0]["loss"] < np.log(4) + 1e-4

    capsys.readouterr()
    argv = ["classify", *map(str, inputs), "--student", f"leaf reader={after_apo}",
            "--max_new_tokens", "40", "--json", "--mode", "parse"]
    evaluate.run(evaluate.parse(argv))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(rows) == {"label prior", *VOICES, "vote of the teachers", "leaf reader"}
    for row in rows.values():
        assert set(row.get("greedy", row)["accuracy"]) == {"Spots", "Holes"}
    # the teachers are right in 80% of their answers, so their texts were read in all three voices
    assert all(rows[teacher]["unread"] == 0 and rows[teacher]["mean"] > 0.5 for teacher in VOICES)


@pytest.fixture(scope="module")
def chain(leaves, tmp_path_factory):
    """chain(folder) -> the flags of one command for all stages, from a student whose texts end."""
    base = tmp_path_factory.mktemp("base") / "talker"
    task = data.load_task(leaves / "task.json")
    model, processor = student.load(leaves / "base"), student.Processor(leaves / "base", task)
    with torch.no_grad():
        model.lm_head.weight[processor.end] *= 8
    scale_base.save_student(base, model, processor.tokenizer)
    inputs = ["--studies", leaves / "studies.jsonl", "--task_file", leaves / "task.json",
              "--images", leaves / "pictures", "--base", base, "--preset", "demo", "--max_steps", 3,
              "--save_steps", 2, "--logging_steps", 1, "--max_pixels", 40 * 28 * 28]
    return lambda folder: [*map(str, [*inputs, "--output_dir", folder])]


def test_one_command_walks_all_stages_and_goes_on_after_a_kill_in_each(chain, script, tmp_path):
    out = script("apo.py", *chain(tmp_path / "whole"), ranks=2).stdout
    assert [out.count(f"{stage}: {tmp_path}/whole/{folder} is finished") for stage, folder in (
        ("learn", "spd"), ("compare", "selfdistill"), ("critique", "apo"))] == [1, 1, 1]
    table = out[out.index("label prior"):]
    for row in (*VOICES, "vote of the teachers", "SPD, all teachers", "SPD, all teachers + APO"):
        # a student of so few steps may say nothing that can be read, and has no figure then
        figure = r"(?:[01]\.\d|-)" if row.startswith("SPD") else r"[01]\.\d"
        assert re.search(rf"(?m)^{re.escape(row)} +{figure}", table), row

    # a step of stage 1, the sampling of stage 2, a step of stage 3: what is finished is not begun
    # again
    kills = (("kill:step=3", "spd"), ("kill_batch:batch=1", "selfdistill"), ("kill:step=3", "apo"))
    for fault, left in kills:
        with Job("apo.py", chain(tmp_path / "cut"), tmp_path / "out", 2, fault) as job:
            assert job.wait(120) == [-9, 1], job.text()
        assert sorted(path.name for path in (tmp_path / "cut").iterdir())[-1] == max("spd", left)
        assert not (tmp_path / "cut" / left / "finished.json").exists()
    with Job("apo.py", chain(tmp_path / "cut"), tmp_path / "out", 2) as job:
        assert job.wait(120) == [0, 0], job.text()
    for file in ("spd/log.jsonl", "spd/student/model.safetensors", "selfdistill/positives.jsonl",
                 "apo/log.jsonl", "apo/student/model.safetensors"):
        whole, cut = (tmp_path / name / file for name in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), file
    expected, results = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut"))
    assert results["rows"] == expected["rows"]
    assert results["settings"]["max_pixels"] == 40 * 28 * 28  # of the stages, for the table too
    assert f"spd/student, trained with --max_pixels {40 * 28 * 28}, which later" in out


def test_an_earlier_stage_of_other_settings_is_run_first_by_itself(chain, leaves, tmp_path):
    """Its folder is found finished, whatever its settings; but not if its records are others."""
    def run(stage, *more, expect=0):
        with Job(stage, [*own, *more], tmp_path / "out") as job:
            assert job.wait(120) == [expect], job.text()
        return job.text()

    own = chain(tmp_path / "x")
    run("spd.py", "--learning_rate", "1e-3", "--max_steps", "1")
    out = run("apo.py")
    assert f"{tmp_path}/x/spd: is taken as it was made, with other settings:" in out
    assert "learning_rate: 0.001 there, 0.002 here" in out and "max_steps: 1 there, 3 here" in out
    assert len((tmp_path / "x" / "spd" / "log.jsonl").read_text().splitlines()) == 1
    others = tmp_path / "others.jsonl"
    lines = (leaves / "studies.jsonl").read_text().splitlines(keepends=True)
    others.write_text("".join(lines[:-1]))
    own[own.index("--studies") + 1] = str(others)
    assert "studies_sha256" in run("apo.py", expect=1)


def test_without_labels_elsewhere_the_chain_says_how_to_evaluate(chain, leaves, tmp_path):
    records = [json.loads(line) for line in (leaves / "studies.jsonl").read_text().splitlines()]
    for record in records:
        del record["labels"]
    unlabelled = tmp_path / "unlabelled.jsonl"
    unlabelled.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = chain(tmp_path / "x")
    flags[flags.index("--studies") + 1] = str(unlabelled)
    with Job("apo.py", flags, tmp_path / "out") as job:
        assert job.wait(120) == [0], job.text()
    assert (
        "no closing table: no other split than train has labels; "
        "to evaluate: python evaluate.py classify") in job.text()


def test_a_chest_text_means_nothing_to_this_task(leaves):
    task = data.load_task(leaves / "task.json")
    assert data.read_classes("The heart is large, no effusion.", task) == {}
    assert data.read_classes("There are many speckles and no holes.", task) == {
        "Spots": "many", "Holes": "none"}
    assert data.is_refusal("As an AI I cannot judge leaves.", task)
    assert not data.is_refusal("I cannot see spots: no spots.", task)
