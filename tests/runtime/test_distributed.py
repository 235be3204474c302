"""The same run on one process and on several, the same command twice, a run that is resumed."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from safetensors.torch import load_file


def test_two_ranks_have_the_gradients_of_one_process(script, base, world, tmp_path):
    """Eq. 6 and Eq. 11, for each choice of what trains, with gradient checkpointing.

    1 micro-batch of 4 is held against 2 ranks x 2 of 1.
    """
    script("tests/gradients.py", base, world, tmp_path / "one", 4)
    script("tests/gradients.py", base, world, tmp_path / "two", 1, ranks=2)
    one, two = load_file(tmp_path / "one"), load_file(tmp_path / "two")
    runs = {name.rsplit(" ", 1)[0] for name in one}
    assert len(runs) == 6 and set(one) == set(two)
    for run in runs:
        names = [name for name in one if name.startswith(run + " ")]
        total = sum(float(one[name].square().sum()) for name in names) ** 0.5
        assert total > 0
        for name in names:
            assert (one[name] - two[name]).norm() < 1e-6 * max(total, float(one[name].norm())), name


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def own(name, world, positives):
    """The input that only this stage has."""
    return ["--replay", world / "replay.jsonl"] if name == "spd.py" else ["--positives", positives]


@pytest.fixture
def stage(script, run_flags, world, positives):
    def run(name, out, *flags, ranks=1, expect=0, **how):
        return script(
            name, *run_flags, *own(name, world, positives), "--global_batch", 4,
            "--num_epochs", 1, "--logging_steps", 1, "--output_dir", out, *flags,
            ranks=ranks, expect=expect, **how)
    return run


@pytest.mark.parametrize("name", ["spd.py", "apo.py"])
def test_the_losses_of_two_ranks_are_those_of_one_process(stage, tmp_path, name):
    stage(name, tmp_path / "one", "--max_steps", 4)
    stage(name, tmp_path / "two", "--max_steps", 4, "--micro_batch", 1, ranks=2)
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5, abs=1e-5)
        assert one["tokens"] == two["tokens"]


@pytest.mark.parametrize("name", ["spd.py", "apo.py"])
def test_the_same_command_gives_the_same_bytes(stage, tmp_path, name):
    for out, start in (("a", "python"), ("b", "fork")):  # whose sets have other orders
        stage(name, tmp_path / out, "--max_steps", 3, "--lora_dropout", 0.1, "--train",
              "lora,merger", start=start)
    for file in ("log.jsonl", "student/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name, ranks, train", [("spd.py", 2, "decoder,merger")])
def test_a_run_stopped_by_sigterm_goes_on_bit_for_bit(
        stage, run_flags, world, positives, tmp_path, name, ranks, train):
    flags = ["--train", train, "--lora_dropout", "0.1", "--micro_batch", "1", "--max_steps", "6",
             "--logging_steps", "2"]
    stage(name, tmp_path / "whole", *flags, ranks=ranks)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}",
               "--standalone", ROOT / name, *run_flags, *own(name, world, positives),
               "--global_batch", 4, "--num_epochs", 1, *flags, "--output_dir", tmp_path / "stopped"]
    running = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    log = tmp_path / "stopped" / "log.jsonl"
    while not log.exists() or not log.read_text():
        assert running.poll() is None and time.time() < deadline, "no line was logged"
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    running.wait(timeout=60)
    if not (tmp_path / "stopped" / "finished.json").exists():
        assert list((tmp_path / "stopped").glob("step-*")), "SIGTERM left no checkpoint"
    stage(name, tmp_path / "stopped", *flags, ranks=ranks)
    for file in ("log.jsonl", "student/model.safetensors"):
        stopped, whole = (tmp_path / folder / file for folder in ("stopped", "whole"))
        assert stopped.read_bytes() == whole.read_bytes(), file


def test_a_checkpoint_continues_with_masters_and_moments(stage, tmp_path):
    """save_steps leaves step-2; the run is made to look killed after it.

    It goes on to the same weights.
    """
    flags = ["--train", "decoder", "--max_steps", 4, "--save_steps", 2, "--bf16"]
    stage("apo.py", tmp_path / "whole", *flags, ranks=2)
    stage("apo.py", tmp_path / "cut", *flags, ranks=2)
    names = sorted(path.name for path in (tmp_path / "cut").glob("step-*"))
    assert names == ["step-000002", "step-000004"]
    shutil.rmtree(tmp_path / "cut" / "step-000004")
    (tmp_path / "cut" / "finished.json").unlink()
    log = (tmp_path / "cut" / "log.jsonl").read_text()
    (tmp_path / "cut" / "log.jsonl").write_text(log + '{"step": 4, "lo')  # a torn line
    again = stage("apo.py", tmp_path / "cut", *flags, ranks=2)
    assert "continuing from" in again.stdout and "step-000002" in again.stdout
    assert (tmp_path / "cut" / "log.jsonl").read_text() == log
    cut, whole = (tmp_path / name / "student" / "model.safetensors" for name in ("cut", "whole"))
    assert cut.read_bytes() == whole.read_bytes()


def test_a_finished_stage_says_so_and_another_command_is_refused(stage, tmp_path):
    stage("spd.py", tmp_path / "run", "--max_steps", 1)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert "is finished" in stage("spd.py", tmp_path / "run", "--max_steps", 1).stdout
    refused = stage("spd.py", tmp_path / "run", "--max_steps", 2, "--seed", 5, expect=1)
    assert "seed: 0 there, 5 here" in refused.stdout
    assert "max_steps: 1 there, 2 here" in refused.stdout
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
