"""Real faults in real processes.

They are killed ranks, saves and loaders, signals, losses that are not finite, memory and disks that
are not enough. A run of two or four ranks is one gloo group (faults.Job); where torchrun itself is
what fails or has to notice, it runs. Whatever happened, the same command goes on, and the log and
the student are the bytes of the run that nothing happened to.
"""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from faults import Job, children

SETTINGS = ["--lora_dropout", 0.1, "--global_batch", 8, "--micro_batch", 1, "--num_epochs", 4,
            "--max_steps", 8, "--save_steps", 3, "--logging_steps", 1,
            "--teachers", "gpt-5,gemini-2.5,grok-4"]


@pytest.fixture(scope="module")
def flags(world, base, positives):
    """flags("apo.py", folder): a run of 8 steps of 8 studies, with accumulation and dropout.

    It is saved after steps 3, 6 and 8.
    """
    common = ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world,
              "--task_file", world / "task.json", "--student", base]
    own = {"apo.py": ["--positives", positives], "spd.py": ["--replay", world / "replay.jsonl"]}

    def of(stage, folder, *more):
        settings = [*common, *own[stage], *SETTINGS, "--output_dir", folder, *more]
        return [*map(str, settings)]
    return of


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory, script):
    """whole("apo.py", 2): the folder of a run to which nothing happened.

    It is made when it is first asked for; four ranks by torchrun.
    """
    made = {}

    def of(stage, ranks, *more):
        key = stage, ranks, *more
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = folder / "run"
            if ranks == 4:
                script(stage, *flags(stage, made[key], *more), ranks=4)
            else:
                with Job(stage, flags(stage, made[key], *more), folder / "out", ranks) as job:
                    assert job.wait() == [0] * ranks, job.text()
        return made[key]
    return of


def begin(flags, folder, stage="apo.py", ranks=1, fault="none", more=()):
    return Job(stage, flags(stage, folder / "run", *more), folder / "out", ranks, fault)


def goes_on(flags, whole, folder, stage="apo.py", ranks=1, more=()):
    """The same command, without the fault: it ends as the run to which nothing happened.

    -> what it said
    """
    with begin(flags, folder, stage, ranks, more=more) as job:
        assert job.wait() == [0] * ranks, job.text()
    for file in ("log.jsonl", "student/model.safetensors"):
        expected = (whole(stage, ranks, *more) / file).read_bytes()
        assert (folder / "run" / file).read_bytes() == expected, file
    assert not list((folder / "run").glob(".tmp-*"))
    return job.text()


def logged(folder):
    log = folder / "run" / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(folder):
    return sorted(path.name for path in (folder / "run").iterdir() if "step-" in path.name)


# --- SIGKILL

def test_four_ranks_killed_twice_at_random_moments_write_the_same_bytes(flags, whole, tmp_path):
    draw = random.Random(8)
    for steps in (4, 7):
        with begin(flags, tmp_path, ranks=4) as job:
            job.wait_for(lambda job=job, steps=steps: job.logged() >= steps)
            time.sleep(draw.uniform(0, 0.15))
            assert job.running(), "the run was over before the kill"
            job.kill()
            assert job.wait() == [-9] * 4
    assert "continuing from" in goes_on(flags, whole, tmp_path, ranks=4)


@pytest.mark.parametrize("place, newest, more", [
    ("at=shard", "step-000003", ()),
    ("at=fsync,count=4", "step-000003", ()),
    ("at=rename", "step-000003", ()),
    ("at=renamed", "step-000006", ()),
    ("at=removing", "step-000006", ("--save_total_limit", "1")),
])
def test_a_kill_inside_a_save_leaves_a_checkpoint_to_go_on_from(
        flags, whole, tmp_path, place, newest, more):
    with begin(flags, tmp_path, fault=f"kill_save:step=6,{place}", more=more) as job:
        assert job.wait() == [-9]
    left = {"step-000003", newest, *([] if newest == "step-000006" else [".tmp-step-000006"])}
    assert set(checkpoints(tmp_path)) == left
    out = goes_on(flags, lambda *_: whole("apo.py", 1), tmp_path, more=more)
    assert f"run/{newest}" in out and "damaged" not in out


def test_one_of_four_ranks_killed_inside_a_save_stops_the_others(flags, whole, tmp_path):
    with begin(flags, tmp_path, ranks=4, fault="kill_save:step=6,at=shard") as job:
        assert job.wait() == [-9, 1, 1, 1]
    assert checkpoints(tmp_path) == [".tmp-step-000006", "step-000003"]
    assert "run/step-000003" in goes_on(flags, whole, tmp_path, ranks=4)


def test_a_killed_process_takes_its_loader_workers_along(flags, whole, tmp_path):
    """They hold the folder's lock too: as long as one lives, the same command is refused.

    By themselves they would notice after 5 seconds.
    """
    def is_free():
        with open(tmp_path / "run" / ".lock") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                return False

    with begin(flags, tmp_path, fault="kill:step=5", more=("--num_workers", "2")) as job:
        assert job.wait() == [-9]
        wait_for(is_free, 2)
        goes_on(flags, whole, tmp_path)


def torchrun(fault, stage, flags, output):
    """Two ranks under torchrun, as a group of their own.

    Their loader workers and they live in sessions of their own: see `children`.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone",
               ROOT / "tests" / "faults.py", fault, stage]
    return subprocess.Popen(
        [*map(str, command), *flags],
        stdout=open(output, "w"), stderr=subprocess.STDOUT, start_new_session=True)


def end(*pids):
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


def test_torchrun_names_a_lost_rank_and_all_stop_within_a_minute(flags, whole, tmp_path):
    own = flags("apo.py", tmp_path / "run")
    running = torchrun("kill:rank=1,step=5", "apo.py", own, tmp_path / "out")
    ranks = []
    try:
        wait_for(lambda: logged(tmp_path) == 4, 90)
        ranks = children(running.pid)
        assert len(ranks) >= 2
        assert running.wait(60) == 1
        wait_for(lambda: not any(map(alive, ranks)), 10)
    finally:
        end(running.pid, *ranks)
    out = (tmp_path / "out").read_text()
    cause = out[out.index("Root Cause"):]
    assert "rank      : 1" in cause and "SIGKILL" in cause
    stops = (
        r"critique: rank 0 stops, since another rank was lost or cannot be reached \(.+\); "
        r"the same command goes on")
    assert re.search(stops, out)
    goes_on(flags, whole, tmp_path, ranks=2)


def alive(pid):
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


def test_orphans_of_a_killed_torchrun_keep_the_folder_to_themselves(flags, tmp_path):
    own, ranks = flags("apo.py", tmp_path / "run"), []
    running = torchrun("hold:step=5", "apo.py", own, tmp_path / "out")
    try:
        wait_for(lambda: "holding" in (tmp_path / "out").read_text(), 90)
        ranks = children(running.pid)
        running.kill()
        running.wait(10)
        before = contents(tmp_path / "run")
        assert len(ranks) == 2 and all(map(alive, ranks)) and logged(tmp_path) == 4
        with Job("apo.py", flags("apo.py", tmp_path / "run"), tmp_path / "second", 2) as second:
            assert second.wait() == [1, 1]
        assert f"another run holds {tmp_path / 'run' / '.lock'}" in second.text()
        assert "Traceback" not in second.text()
        assert contents(tmp_path / "run") == before
    finally:
        end(running.pid, *ranks)


# --- SIGTERM, a second command

def test_a_second_run_in_the_folder_is_refused_and_the_first_goes_on(flags, whole, tmp_path):
    with begin(flags, tmp_path) as first:
        first.wait_for(lambda: first.logged() >= 2)
        first.signal(signal.SIGSTOP)
        before = contents(tmp_path / "run")
        with Job("apo.py", flags("apo.py", tmp_path / "run"), tmp_path / "second") as second:
            assert second.wait() == [1]
        assert f"another run holds {tmp_path / 'run' / '.lock'}" in second.text()
        assert contents(tmp_path / "run") == before
        first.signal(signal.SIGCONT)
        assert first.wait() == [0]
    expected = (whole("apo.py", 1) / "log.jsonl").read_bytes()
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == expected


def test_sigterm_with_loader_workers_saves_the_step_and_stops(flags, whole, tmp_path):
    with begin(flags, tmp_path, ranks=2, more=("--num_workers", "2")) as job:
        job.wait_for(lambda: job.logged() >= 4)
        for pid in [child for rank in job.ranks for child in children(rank.pid)]:
            # a scheduler signals every process, also the loader's workers
            os.kill(pid, signal.SIGTERM)
        job.signal(signal.SIGTERM)  # and torchrun the ranks' process groups
        job.signal(signal.SIGTERM)
        assert job.wait(30) == [0, 0]
    assert "Traceback" not in job.text() and "worker" not in job.text()
    steps = logged(tmp_path)
    assert f"stopped after step {steps}; the same command goes on" in job.text()
    assert checkpoints(tmp_path)[-1] == f"step-{steps:06d}"
    assert f"run/step-{steps:06d}" in goes_on(flags, whole, tmp_path, ranks=2)


def test_a_second_sigterm_kills_and_the_old_checkpoint_stays(flags, whole, tmp_path):
    with begin(flags, tmp_path, fault="hold:step=5") as job:
        job.wait_for(lambda: "holding" in job.text())
        job.signal(signal.SIGTERM)
        time.sleep(0.5)
        job.signal(signal.SIGTERM)  # the same request: a scheduler and torchrun both send it
        time.sleep(3.5)
        assert job.running()
        job.signal(signal.SIGTERM)
        assert job.wait(10) == [-signal.SIGTERM]
    assert checkpoints(tmp_path) == ["step-000003"]
    assert "run/step-000003" in goes_on(flags, whole, tmp_path)


# --- losses, memory and disks that are not fit

@pytest.mark.parametrize("stage, fault", [
    ("apo.py", "nan"), ("apo.py", "inf"),
    ("spd.py", "nan"), ("spd.py", "inf"), ("spd.py", "nan_loss")])
def test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step(
        flags, whole, tmp_path, stage, fault):
    with begin(flags, tmp_path, stage, 2, f"{fault}:rank=1,step=5") as job:
        assert job.wait() == [1, 1]
    out = job.text()
    assert re.search(r"rank 1: loss (nan|inf|-inf) on studies train-\d+\n", out)
    assert not re.search("rank 0: loss [a-z]+ on", out)
    assert out.count("nothing was updated") == 2 and "Traceback" not in out
    log = (whole(stage, 2) / "log.jsonl").read_bytes().splitlines(keepends=True)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == b"".join(log[:4])
    assert checkpoints(tmp_path) == ["step-000003"] and not (tmp_path / "run" / "student").exists()
    goes_on(flags, whole, tmp_path, stage, 2)


@pytest.mark.parametrize("stage", ["apo.py", "spd.py"])
def test_a_rank_without_memory_names_studies_and_shapes_and_all_stop(flags, whole, tmp_path, stage):
    with begin(flags, tmp_path, stage, 2, "out_of_memory:rank=1,step=5") as job:
        assert job.wait() == [1, 1]
    message = r"rank 1: out of memory on studies train-\d+; .*pixel_values \(\d+, \d+\)"
    assert re.search(message, job.text()) and "Traceback" not in job.text()
    goes_on(flags, whole, tmp_path, stage, 2)


def test_a_disk_that_is_full_for_one_rank_loses_nothing(flags, whole, tmp_path):
    """The decoder's optimiser is sharded, so each rank writes."""
    more, fault = ("--train", "decoder"), "full_disk:rank=1,step=6,bytes=100000"
    with begin(flags, tmp_path, ranks=2, fault=fault, more=more) as job:
        assert job.wait() == [1, 1]
    assert "critique: rank 1: " in job.text() and "File too large" in job.text()
    assert "Traceback" not in job.text()
    assert "step-000003" in checkpoints(tmp_path) and "step-000006" not in checkpoints(tmp_path)
    goes_on(flags, whole, tmp_path, ranks=2, more=more)


def test_an_error_that_nobody_foresaw_ends_the_run_with_loader_workers_too(flags, tmp_path):
    """Python waits at its end for workers that it has sent SIGTERM: they must not ignore it."""
    with begin(flags, tmp_path, fault="error:step=5", more=("--num_workers", "2")) as job:
        assert job.wait(30) == [1]
    assert "LookupError" in job.text()


# --- the stages that sample and evaluate

@pytest.fixture(scope="module")
def sampling(world, talker):
    return ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world,
            "--task_file", world / "task.json", "--student", talker, "--max_new_tokens", "10",
            "--batch_size", "4", "--attempts", "2", "--no-bf16"]


@pytest.fixture(scope="module")
def sampled(sampling, tmp_path_factory):
    """What stage 2 writes when nothing happens, in six batches."""
    folder = tmp_path_factory.mktemp("sampled")
    with Job("selfdistill.py", [*sampling, "--output_dir", folder / "run"], folder / "out") as job:
        assert job.wait() == [0], job.text()
    names = ("positives.jsonl", "dropped.jsonl", "stats.json")
    return {name: (folder / "run" / name).read_bytes() for name in names}


@pytest.mark.parametrize("ranks, batches", [(1, (3, 2)), (2, (2,))])
def test_a_killed_stage_2_writes_the_same_positives(sampling, sampled, tmp_path, ranks, batches):
    """batches: in which one of those that are left rank 0 is killed, each time."""
    begun, flags = 0, [*sampling, "--output_dir", tmp_path / "run"]
    for batch in batches:
        fault = f"kill_batch:batch={batch}"
        with Job("selfdistill.py", flags, tmp_path / "out", ranks, fault) as job:
            assert job.wait() == [-9, *[1] * (ranks - 1)]
        parts = b"".join(path.read_bytes() for path in (tmp_path / "run").glob("part-*.jsonl"))
        assert begun < len(parts) and not (tmp_path / "run" / "positives.jsonl").exists()
        begun = len(parts)
    with Job("selfdistill.py", flags, tmp_path / "out", ranks) as job:
        assert job.wait() == [0] * ranks, job.text()
    assert {name: (tmp_path / "run" / name).read_bytes() for name in sampled} == sampled


def test_a_killed_evaluation_gives_the_same_results(world, base, tmp_path):
    def classify(name, fault="none"):
        flags = ["classify", "--studies", world / "studies.jsonl", "--images", world,
                 "--task_file", world / "task.json", "--student", base, "--bootstrap", 0,
                 "--output", tmp_path / f"{name}.json"]
        with Job("evaluate.py", flags, tmp_path / "out", 1, fault) as job:
            return job.wait()[0]

    assert classify("killed", "kill_batch:batch=5") == -9
    (part,) = (tmp_path / "killed.json.parts").rglob("part-0.jsonl")
    assert len([json.loads(line) for line in part.read_text().splitlines() if line]) == 4
    assert not (tmp_path / "killed.json").exists()
    assert classify("killed") == classify("whole") == 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert not (tmp_path / "killed.json.parts").exists()
