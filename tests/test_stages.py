"""The four stages as a user starts them: by torchrun on records, and with no data named at all."""

import json

import numpy as np
import pytest
from faults import Job

from scale_model import world as scale_world


def test_two_ranks_walk_learn_compare_critique_measure(script, run_flags, world, tmp_path):
    inputs = run_flags[:-2]  # without --student
    pi_st, after_apo = tmp_path / "spd" / "student", tmp_path / "apo" / "student"
    script("spd.py", *run_flags, "--replay", world / "replay.jsonl", "--global_batch", 4,
           "--num_epochs", 4, "--learning_rate", 3e-3, "--output_dir", tmp_path / "spd",
           "--logging_steps", 1, ranks=2)
    script("selfdistill.py", *inputs, "--student", pi_st, "--output_dir", tmp_path / "positives",
           "--max_new_tokens", 300, ranks=2)
    script("apo.py", *inputs, "--student", pi_st,
           "--positives", tmp_path / "positives" / "positives.jsonl",
           "--output_dir", tmp_path / "apo", "--logging_steps", 1, ranks=2)
    out = script("evaluate.py", "classify", *inputs[2:], "--student", f"after APO={after_apo}",
                 "--max_new_tokens", 60, "--mode", "parse", "--json", ranks=2).stdout

    spd = [json.loads(line) for line in (tmp_path / "spd" / "log.jsonl").read_text().splitlines()]
    apo = [json.loads(line) for line in (tmp_path / "apo" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in spd] == list(range(1, 25)) and spd[-1]["loss"] < spd[0]["loss"]
    assert apo[0]["loss"] == pytest.approx(np.log(8), abs=1e-5) and apo[-1]["loss"] < apo[0]["loss"]
    assert apo[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    for teacher in ("gpt-5", "moonshot"):
        assert {f"rewards/{teacher}", f"accuracies/{teacher}"} <= set(apo[0])
    rows = json.loads(out.strip().splitlines()[-1])["rows"]
    assert {"label prior", "gpt-5", "vote of the teachers", "after APO"} <= set(rows)
    assert set(rows["after APO"]["greedy"]["accuracy"]) == {
        "Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax", "Edema"}
    for folder in ("spd", "apo"):
        names = {path.name for path in (tmp_path / folder).iterdir()}
        assert {"args.json", "env.json", "log.jsonl", "speed.jsonl", "finished.json"} <= names


SHORT = ["--max_steps", "3", "--save_steps", "2", "--logging_steps", "1"]


def begin_demo(folder):
    """A world of a few films where the scale model would draw its 1,200, which it then takes."""
    scale_world.make(folder / "world", train=96, validate=0, test=32, replay=64)
    return folder


@pytest.fixture(scope="module")
def demo(script, tmp_path_factory):
    """(folder, what was printed) of README's first command, made short."""
    folder = begin_demo(tmp_path_factory.mktemp("demo") / "demo")
    flags = [*SHORT, "--output_dir", folder]
    return folder, script("apo.py", *flags, ranks=2, start="torchrun").stdout


def test_without_data_the_scale_model_is_made_and_the_second_call_finds_it_done(demo, tmp_path):
    folder, first = demo
    assert "no --studies: the scale model" in first and "one seed, not a result" in first
    assert "paper: SPD, all teachers + APO" in first
    results = (folder / "results.json").read_bytes()
    with Job("apo.py", [*SHORT, "--output_dir", str(folder)], tmp_path / "out") as job:
        assert job.wait(100) == [0], job.text()
    again = job.text()
    assert "learn: " in again and again.count("is finished") == 3
    assert "holds these results already" in again
    assert (folder / "results.json").read_bytes() == results


def test_the_scale_model_goes_on_after_a_kill_in_any_stage(demo, tmp_path):
    flags = [*SHORT, "--output_dir", str(begin_demo(tmp_path / "cut"))]
    for fault in ("kill:step=3", "kill_batch:batch=2", "kill:step=3", "none"):
        with Job("apo.py", flags, tmp_path / "out", 2, fault) as job:
            assert job.wait(200) == ([0, 0] if fault == "none" else [-9, 1]), job.text()
    for file in ("world/studies.jsonl", "spd/log.jsonl", "spd/student/model.safetensors",
                 "selfdistill/positives.jsonl", "apo/log.jsonl", "apo/student/model.safetensors"):
        assert (demo[0] / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file
    assert "paper: SPD, all teachers + APO" in job.text()
