"""The whole pipeline on something that is no chest: the leaves of docs/data.md, three made-up teachers, drawn pictures, no code changed."""

import json
import random

import check
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageDraw

import apo
import data
import evaluate
import selfdistill
import spd
from scale_model import base as scale_base

CLASSES = ("none", "few", "many")
VOICES = {"botanist": {"none": "there are no {f}", "few": "there are few {f}", "many": "there are many {f}"},
          "farmer": {"none": "{f} are absent", "few": "{f} are rare", "many": "{f} are frequent"},
          "robot": {"none": "no {f}", "few": "few {f}", "many": "many {f}"}}
WORDS = {"botanist": ("speckles", "holes"), "farmer": ("spots", "holes"), "robot": ("spots", "holes")}


def readme_task():
    """The task.json that stands in docs/data.md."""
    section = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Another domain", 1)[1].split("\n## ", 1)[0]
    return section[section.index('    {"name"'):section.index("\n\n`findings` gives")]


def draw(path, grades, rng):
    picture = Image.new("RGB", (56, 56), (40, 130, 40))
    pen = ImageDraw.Draw(picture)
    for colour, count in zip(((90, 60, 20), (255, 255, 255)), (3 * CLASSES.index(grade) for grade in grades)):
        for _ in range(count):
            x, y = rng.randrange(4, 48), rng.randrange(4, 48)
            pen.ellipse((x, y, x + 5, y + 5), fill=colour)
    picture.save(path)


@pytest.fixture(scope="module")
def leaves(tmp_path_factory):
    """A folder with pictures/, studies.jsonl, task.json and a tiny student that has never seen the words."""
    folder, rng = tmp_path_factory.mktemp("leaves"), random.Random(0)
    (folder / "pictures").mkdir()
    (folder / "task.json").write_text(readme_task())
    records = []
    for i in range(20):
        grades = [rng.choice(CLASSES) for _ in range(2)]
        draw(folder / "pictures" / f"{i}.png", grades, rng)
        say = lambda teacher, grades: ", ".join(VOICES[teacher][g].format(f=word) for g, word in zip(grades, WORDS[teacher])) + "."
        answers = {name: say(name, [g if rng.random() > 0.3 else rng.choice(CLASSES) for g in grades]) for name in VOICES}
        if i == 3:
            answers["robot"] = "As an AI I cannot judge leaves."
        records.append({"id": f"leaf-{i}", "image": f"{i}.png", "labels": dict(zip(("Spots", "Holes"), grades)), "trajectories": answers,
                        "split": "train" if i < 12 else "test"})
    (folder / "studies.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    texts = [text for record in records for text in record["trajectories"].values()]
    scale_base.save_student(folder / "base", *scale_base.build_student(0, texts * 20, vocabulary=400, width=64))
    return folder


def test_the_four_stages_run_on_another_task(leaves, capsys):
    inputs = ["--studies", leaves / "studies.jsonl", "--task_file", leaves / "task.json", "--images", leaves / "pictures"]

    def run(stage, *flags):
        return stage.run(stage.parse([*map(str, [*flags, *inputs])]))

    found = check.check(check.parse([*map(str, [inputs[1], *inputs[2:], "--student", leaves / "base"])]))
    assert found["kinds"] == {"refusal": 1} and set(found["tokens"]) == set(VOICES)

    train = ["--refusals", "drop", "--no-gradient_checkpointing", "--micro_batch", 0, "--no-bf16", "--train", "decoder,merger", "--logging_steps", 1]
    run(spd, *train, "--student", leaves / "base", "--output_dir", leaves / "spd", "--num_epochs", 15, "--learning_rate", 5e-3)
    run(selfdistill, "--refusals", "drop", "--no-bf16", "--student", leaves / "spd" / "student", "--output_dir", leaves / "positives",
        "--max_new_tokens", 40, "--temperature", 0.5)
    positives = [json.loads(line) for line in (leaves / "positives" / "positives.jsonl").read_text().splitlines()]
    stats = json.loads((leaves / "positives" / "stats.json").read_text())
    assert len(positives) >= 8 and stats["positives"] == len(positives) and stats["studies"] == 12
    assert stats["unread"] < 1 and stats["agreement_with_vote"] > 0  # some t+ is in words that the task's phrases read
    run(apo, *train, "--student", leaves / "spd" / "student", "--positives", leaves / "positives" / "positives.jsonl", "--output_dir", leaves / "apo",
        "--learning_rate", 1e-4)
    log = [json.loads(line) for line in (leaves / "apo" / "log.jsonl").read_text().splitlines()]
    assert {"rewards/botanist", "rewards/farmer", "rewards/robot"} <= set(log[0]) and log[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert np.log(3) - 1e-4 < log[0]["loss"] < np.log(4) + 1e-4  # log(1 + N), and N is 2 where the robot declined

    capsys.readouterr()
    argv = ["classify", *map(str, inputs), "--student", f"leaf reader={leaves / 'apo' / 'student'}", "--max_new_tokens", "40", "--json"]
    argv += ["--mode", "parse"]
    evaluate.run(evaluate.parse(argv))
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(rows) == {"label prior", *VOICES, "vote of the teachers", "leaf reader"}
    for row in rows.values():
        assert set(row.get("greedy", row)["accuracy"]) == {"Spots", "Holes"}
    # the teachers are right in 80% of their answers, so their texts were read in all three voices
    assert all(rows[teacher]["unread"] == 0 and rows[teacher]["mean"] > 0.5 for teacher in VOICES)


def test_a_chest_text_means_nothing_to_this_task(leaves):
    task = data.load_task(leaves / "task.json")
    assert data.read_classes("The heart is large, no effusion.", task) == {}
    assert data.read_classes("There are many speckles and no holes.", task) == {"Spots": "many", "Holes": "none"}
    assert data.is_refusal("As an AI I cannot judge leaves.", task) and not data.is_refusal("I cannot see spots: no spots.", task)
