"""Real films and real teachers' texts through all stages.

Skipped, with the reason, where nobody has them at hand.
"""

import csv
import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import apo
import data
import student
from scale_model import base as scale_base
from scale_model import world as scale_world

REAL_CXR, PAPER_TXT = os.environ.get("REAL_CXR"), os.environ.get("PAPER_TXT")
needs_films = pytest.mark.skipif(
    not REAL_CXR, reason="REAL_CXR is not set to a folder with selection.csv and films")
needs_paper = pytest.mark.skipif(not PAPER_TXT, reason="PAPER_TXT is not set to the paper's text")
SMALL = ["--max_pixels", 64 * 28 * 28]  # 64 image tokens a film keep the tiny student quick


def chest_studies():
    """The films of selection.csv as records of the built-in task.

    The simulated teachers say their labels, each with errors.
    """
    rng, numpy_rng = random.Random(0), np.random.default_rng(0)
    asked = ["Pneumonia", "Pneumothorax", "Lung Opacity", "Pleural Effusion", "Cardiomegaly"]
    with open(Path(REAL_CXR) / "selection.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            positive = [f for f in row["findings_mimic14"].split("|") if f]
            truth = {finding: finding in positive for finding in asked}
            trajectories = {}
            for teacher in scale_world.TEACHERS:
                answers = {
                    f.lower(): "present" if said ^ (rng.random() < 0.2) else "absent"
                    for f, said in truth.items()}
                trajectories[teacher] = scale_world.speak(teacher, answers, numpy_rng)
            # films without labels are not scored
            labels = {finding: int(here) for finding, here in truth.items()} if positive else {}
            yield {
                "id": Path(row["file"]).stem, "image": row["file"], "labels": labels,
                "trajectories": trajectories}


@needs_films
def test_all_stages_run_on_real_films_and_give_the_same_twice(script, tmp_path):
    records = list(chest_studies())
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "studies.jsonl").write_text(lines)
    scale_base.write_student(tmp_path / "base")
    inputs = ["--studies", tmp_path / "studies.jsonl", "--images", REAL_CXR, *SMALL]
    assert any(not r["labels"] for r in records) and sum(bool(r["labels"]) for r in records) > 10

    for run in ("one", "two"):
        out = tmp_path / run
        pi_st, positives = out / "spd" / "student", out / "positives" / "positives.jsonl"
        script("spd.py", *inputs, "--student", tmp_path / "base", "--output_dir", out / "spd",
               "--preset", "demo", "--global_batch", 4, "--num_epochs", 4,
               "--learning_rate", 2e-3, "--logging_steps", 1)
        script("selfdistill.py", *inputs, "--student", pi_st, "--output_dir", out / "positives",
               "--preset", "demo", "--max_new_tokens", 160, "--temperature", 0.7)
        script("apo.py", *inputs, "--student", pi_st, "--positives", positives,
               "--output_dir", out / "apo", "--preset", "demo", "--logging_steps", 1)
    # that evaluate.py says the same twice is held by tests/evaluation
    script("evaluate.py", "classify", *inputs, "--student", tmp_path / "one" / "apo" / "student",
           "--output", tmp_path / "one" / "results.json", "--max_new_tokens", 96, "--mode", "parse")

    one, two = tmp_path / "one", tmp_path / "two"
    first = {}
    for name in ("spd", "apo"):
        text = (one / name / "log.jsonl").read_text()
        first[name] = [json.loads(line) for line in text.splitlines()]
    assert first["spd"][-1]["loss"] < 0.7 * first["spd"][0]["loss"]
    assert first["apo"][0]["loss"] == pytest.approx(np.log(8), abs=1e-4)
    values = [value for lines in first.values() for line in lines for value in line.values()]
    assert all(np.isfinite(value) for value in values)
    stats = json.loads((one / "positives" / "stats.json").read_text())
    assert stats["positives"] >= 4
    assert stats["positives"] + sum(stats["dropped"].values()) == len(records)
    rows = json.loads((one / "results.json").read_text())["rows"]
    scored = sum(bool(record["labels"]) for record in records)
    assert all(n == scored for n in rows["gpt-5"]["n"].values()) and 0.6 < rows["gpt-5"]["mean"] < 1
    ours = next(row for name, row in rows.items() if name.endswith("student"))
    assert 0 <= ours["greedy"]["mean"] <= 1 and 0 <= ours["sampled"]["unread"] <= 1
    for file in ("spd/log.jsonl", "spd/student/model.safetensors", "positives/positives.jsonl",
                 "apo/log.jsonl", "apo/student/model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes(), file


@needs_films
def test_every_real_film_loads_and_keeps_its_shape(base):
    processor = student.Processor(base, data.CHEST, REAL_CXR)
    for path in sorted(Path(REAL_CXR, "images").iterdir()):
        relative = f"images/{path.name}"
        width, height = data.load_image(relative, REAL_CXR).size
        pixels, grid = processor.pixels(data.Study("x", (relative,), {}, {}))
        _, h, w = grid[0].tolist()
        assert pixels.shape == (h * w, 1176) and torch.isfinite(pixels).all()
        assert w / h == pytest.approx(width / height, rel=0.12)


def appendix_b():
    """The texts of the paper's Appendix B, {teacher: text}."""
    paper = Path(PAPER_TXT).read_text(encoding="utf-8")
    appendix = paper[paper.index("B CXR-MAX DATASET"):paper.index("C IMPLEMENTATION DETAILS")]
    headings = {
        "Claude Sonnet-4": "sonnet-4",
        "GPT-5-nano": "gpt-5",
        "GLM-4.5V": "glm-4.5v",
        "Gemini-2.5-flash-lite": "gemini-2.5",
        "Moonshot-v1": "moonshot",
        "Qwen-VL-Max": "qwen-vl-max",
        "Grok-4": "grok-4",
    }
    parts = re.split(r"\n(" + "|".join(map(re.escape, headings)) + r")\n", appendix)
    texts = {headings[name]: text.strip() for name, text in zip(parts[1::2], parts[2::2])}
    assert len(texts) == 7 and all(len(text) > 400 for text in texts.values())
    return texts


@needs_paper
def test_the_papers_own_example_goes_through_data_prompt_and_loss(base, world, tmp_path):
    texts = appendix_b()
    image = json.loads((world / "studies.jsonl").read_text().splitlines()[0])["image"]
    labels = {"Atelectasis": 1, "Pleural Effusion": 1}
    record = {"id": "appendix-b", "image": image, "labels": labels, "trajectories": texts}
    (tmp_path / "studies.jsonl").write_text(json.dumps(record) + "\n")
    (study,) = data.read_studies(tmp_path / "studies.jsonl", data.CHEST)
    assert data.student_prompt(study, data.CHEST, "teacher") == (
        "This is a patient's chest DR image. "
        "The patient has been diagnosed with Atelectasis and Pleural Effusion. "
        "Can you find the basis for the diagnosis in the image?")
    refusing = [name for name, text in texts.items() if data.is_refusal(text, data.CHEST)]
    assert refusing == ["moonshot"]
    vote = data.vote(texts, data.CHEST)
    assert vote["Pleural Effusion"] == 1 and vote["Atelectasis"] == 1

    prompt = data.compare_prompt(study, data.CHEST, seed=0)
    assert all(text in prompt for text in texts.values())
    assert not any(name in prompt for name in ("gpt-5", "Claude", "Moonshot-v1"))

    processor, model = student.Processor(base, data.CHEST, world), student.load(base)
    names = data.teacher_names([study])
    t_plus = (
        "Blunted left costophrenic angle: small left pleural effusion, "
        "with left basal atelectasis.")
    responses = [t_plus, *(texts[n] for n in names)]
    example = processor(study, data.student_prompt(study, data.CHEST), responses)
    assert [processor.text(r) for r in example["responses"]] == responses
    with torch.no_grad():
        batch = student.pack([example], model)
        (logps,) = student.PackedStudent(model)(batch)
        alone = []
        for response in example["responses"]:
            single = student.pack([{**example, "responses": [response]}], model)
            alone.append(student.PackedStudent(model)(single)[0][0, 0])
        alone = torch.stack(alone)
    assert torch.allclose(logps[0], alone, rtol=1e-5)
    losses, rewards = apo.apo_loss(logps, logps)
    assert losses.item() == pytest.approx(np.log(8), rel=1e-6) and not rewards.any()
