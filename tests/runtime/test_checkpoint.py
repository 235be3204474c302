"""The run folder: what it refuses, what a save keeps, what a damaged or full disk leaves."""

import argparse
import contextlib
import errno
import json
import resource

import pytest
import torch
from faults import Job

import training
from runtime import checkpoint, ranks
from runtime.log import Log
from runtime.records import write_text
from runtime.run_folder import RunFolder


def trained(seed=0):
    torch.manual_seed(seed)
    parameters = {
        "w": torch.nn.Parameter(torch.randn(3, 2)),
        "h": torch.nn.Parameter(torch.randn(4).bfloat16())}
    optimiser = training.MasterAdamW(parameters.values(), lr=0.1)
    return parameters, optimiser


def steps(parameters, optimiser, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in parameters.values():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimiser.step()


def test_a_checkpoint_restores_weights_masters_and_moments_to_the_bit(tmp_path):
    parameters, optimiser = trained()
    steps(parameters, optimiser, [1, 2])
    checkpoint.save_checkpoint(tmp_path, 2, parameters, optimiser, {"log": {}}, 2)
    steps(parameters, optimiser, [3, 4])
    again, fresh = trained(seed=9)
    path, manifest = checkpoint.newest_checkpoint(tmp_path)
    checkpoint.load_checkpoint(path, again, fresh)
    steps(again, fresh, [3, 4])
    assert manifest["step"] == 2
    for name, p in parameters.items():
        assert torch.equal(p, again[name])
        moments = optimiser.state[p]["exp_avg"]
        assert torch.equal(moments, fresh.state[again[name]]["exp_avg"])
    master = optimiser.state[parameters["h"]]["master"]
    assert torch.equal(master, fresh.state[again["h"]]["master"])


@pytest.mark.parametrize("name", ["trainable", "optimizer-0"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, damage, name, capsys):
    parameters, optimiser = trained()
    for step in (1, 2, 3):
        steps(parameters, optimiser, [step])
        checkpoint.save_checkpoint(tmp_path, step, parameters, optimiser, {"log": {}}, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]
    file = tmp_path / "step-000003" / f"{name}.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "no manifest":
        (tmp_path / "step-000003" / "manifest.json").unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(bytes(content[:-5] if damage == "truncated" else content))
    path, manifest = checkpoint.newest_checkpoint(tmp_path)
    assert path.name == "step-000002" and manifest["step"] == 2
    assert "falling back" in capsys.readouterr().out


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_of_the_manifest_that_flips_falls_back_to_the_checkpoint_before(
        tmp_path, bit, capsys):
    """Each byte of it, its own checksum too: neither another step nor other sums come through."""
    parameters, optimiser = trained()
    for step in (1, 2):
        log = {"loss": [0.1 * step, 1e-07], "tokens": [1234.0, 8]}
        checkpoint.save_checkpoint(tmp_path, step, parameters, optimiser, {"log": log}, 2)
    file = tmp_path / "step-000002" / "manifest.json"
    good = file.read_bytes()
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 2
    for at in range(bit % 3, len(good), 3):
        flipped = bytearray(good)
        flipped[at] ^= 1 << bit
        file.write_bytes(flipped)
        _, manifest = checkpoint.newest_checkpoint(tmp_path)
        assert manifest["step"] == 1 and manifest["log"]["loss"] == [0.1, 1e-07], (at, flipped[at])
        assert "step-000002 is damaged" in capsys.readouterr().out


@pytest.mark.parametrize("content", [
    "{}", "[]", "1", "null", "", "\n", '{"step": 1}', '{"manifest_sha256": 1}',
    '{"step": 1, "sha256": {}, "log": {}}', "[" * 9999])
def test_a_manifest_of_another_kind_is_damaged(tmp_path, content, capsys):
    (tmp_path / "step-000001").mkdir()
    (tmp_path / "step-000001" / "manifest.json").write_text(content)
    assert checkpoint.newest_checkpoint(tmp_path) == (None, None)
    assert "step-000001 is damaged" in capsys.readouterr().out


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    parameters, optimiser = trained()
    checkpoint.save_checkpoint(tmp_path, 1, parameters, optimiser, {"log": {}}, 2)
    with pytest.raises(ValueError, match="other parameters"):
        checkpoint.load_checkpoint(tmp_path / "step-000001", {"v": parameters["w"]}, optimiser)


def test_the_log_is_cut_back_to_the_step_it_resumes_from(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    Log(tmp_path, ["loss"], torch.device("cpu"), step=4)
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'


def test_a_log_line_is_the_mean_over_its_interval(tmp_path):
    log = Log(tmp_path, ["loss", "reward", "never"], torch.device("cpu"))
    log.add("loss", 6.0, 3)
    log.reduce()
    log.add("loss", 2.0, 1)
    log.add("reward", 5.0)
    log.reduce()
    written = {"step": 2, "loss": 2.0, "reward": 5.0, "learning_rate": 0.1}
    assert log.write(2, learning_rate=0.1) == written
    assert json.loads((tmp_path / "log.jsonl").read_text()) == written


def test_the_newest_checkpoints_stay_and_one_that_was_found_damaged_goes(tmp_path):
    parameters, optimiser = trained()
    kept = lambda: [int(path.name[5:]) for path in sorted(tmp_path.glob("step-*"))]
    for step in range(1, 6):
        checkpoint.save_checkpoint(tmp_path, step, parameters, optimiser, {"log": {}}, 3)
    assert kept() == [3, 4, 5]
    (tmp_path / "step-000005" / "trainable.safetensors").unlink()
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 4
    checkpoint.save_checkpoint(tmp_path, 5, parameters, optimiser, {"log": {}}, 3)
    assert kept() == [3, 4, 5] and checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 5
    (tmp_path / "step-000005" / "trainable.safetensors").unlink()
    (tmp_path / "step-000004" / "manifest.json").write_text("{")
    steps(parameters, optimiser, [1])
    # the run went on from step 3
    checkpoint.save_checkpoint(tmp_path, 4, parameters, optimiser, {"log": {}}, 3)
    assert kept() == [3, 4] and checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 4


@contextlib.contextmanager
def small_disk(size):
    """Inside, files cannot grow beyond so many bytes: a full disk without one.

    The limit is of the whole process, and what pytest prints may go into a file too, so that it
    ends where the block ends.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 100, 250])
def test_a_save_onto_a_full_disk_leaves_the_checkpoint_before(tmp_path, size):
    parameters, optimiser = trained()
    checkpoint.save_checkpoint(tmp_path, 1, parameters, optimiser, {"log": {}}, 1)
    steps(parameters, optimiser, [1])
    message = "step-000002 could not be written: .*File too large"
    with small_disk(size), pytest.raises(OSError, match=message):
        checkpoint.save_checkpoint(tmp_path, 2, parameters, optimiser, {"log": {}}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.newest_checkpoint(tmp_path)[1]["step"] == 1


def test_a_file_on_a_full_disk_keeps_what_it_held(tmp_path):
    write_text(tmp_path / "results.json", "before")
    with small_disk(3), pytest.raises(OSError, match="results.json could not be written"):
        write_text(tmp_path / "results.json", "afterwards")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "before"


@pytest.mark.parametrize("size, lost", [
    (20_000, "--student {base}: a student that is trained from it could not be saved: "),
    (1_000_000, "{full}/student could not be written: ")])
def test_a_run_on_a_full_disk_ends_with_one_line_and_goes_on_when_there_is_room(
        run_flags, base, tmp_path, size, lost):
    """First the trial of a save before the first step finds no room, then the finished student."""
    flags = [*run_flags, "--train", "lora", "--max_steps", 3, "--save_steps", 2,
             "--logging_steps", 1]

    def run(folder, fault="none", expect=0):
        with Job("spd.py", [*flags, "--output_dir", tmp_path / folder], tmp_path / "out", 1,
                 fault) as job:
            assert job.wait(300) == [expect], job.text()
        return job.text()

    said = run("full", f"full_disk:step=all,bytes={size}", expect=1)
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    assert last.startswith("learn: " + lost.format(base=base, full=tmp_path / "full"))
    assert not list((tmp_path / "full").glob(".tmp-*"))
    assert not (tmp_path / "full" / "finished.json").exists()
    run("full")
    run("whole")
    for file in ("log.jsonl", "student/model.safetensors"):
        one, two = (tmp_path / folder / file for folder in ("full", "whole"))
        assert one.read_bytes() == two.read_bytes(), file


# --- whose folder it is

def run_folder(folder, studies="studies", **flags):
    """A RunFolder as a training stage makes it, not entered."""
    inputs = folder.with_name("studies.jsonl")
    inputs.write_text(studies)
    settings = {
        "output_dir": folder, "resume": "auto", "resume_anyway": False, "seed": 0,
        "global_batch": 4, "micro_batch": 1, "train": "lora", "save_steps": 5, "merge": True,
        "studies": str(inputs), **flags}
    return RunFolder(argparse.Namespace(**settings), ("studies",))


def claim(folder, studies="studies", **flags):
    """Enters the run folder and leaves it."""
    with run_folder(folder, studies, **flags):
        pass


@pytest.fixture
def begun(tmp_path):
    """A run folder with a checkpoint in it."""
    claim(tmp_path / "run")
    checkpoint.save_checkpoint(tmp_path / "run", 1, *trained(), {"log": {}}, 1)
    return tmp_path / "run"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change, message", [
    ({"studies": "others"}, "studies_sha256: "),
    ({"seed": 7}, "seed: 0 there, 7 here"),
    ({"global_batch": 8}, "global_batch: 4 there, 8 here"),
    ({"seed": 7, "global_batch": 8, "resume_anyway": True},
     "global_batch: 4 there, 8 here\n  seed: 0 there, 7 here"),
    ({"micro_batch": 2}, "or --resume_anyway:\n  micro_batch: 1 there, 2 here"),
])
def test_a_run_of_other_settings_is_refused_with_the_differences(begun, change, message):
    before = contents(begun)
    with pytest.raises(SystemExit) as refused:
        claim(begun, **change)
    beginning = f"{begun}: was begun with other settings, choose another --output_dir"
    assert str(refused.value).startswith(beginning) and message in str(refused.value)
    assert contents(begun) == before


def test_another_number_of_ranks_is_refused_unless_asked_for(begun, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    with pytest.raises(SystemExit, match="world_size: 1 there, 2 here"):
        claim(begun)
    with pytest.raises(SystemExit, match="world_size: 1 there, 2 here"):
        claim(begun, resume_anyway=True, seed=1)
    claim(begun, resume_anyway=True, micro_batch=2)
    assert (
        "goes on with other settings:\n  micro_batch: 1 there, 2 here\n"
        "  world_size: 1 there, 2 here") in capsys.readouterr().out
    assert json.loads((begun / "args.json").read_text())["world_size"] == 2
    claim(begun, micro_batch=2)  # that is its settings now


def test_shards_of_the_optimiser_do_not_go_to_another_number_of_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "world", lambda: 2)
    claim(tmp_path / "run", train="decoder,merger")
    checkpoint.save_checkpoint(tmp_path / "run", 1, *trained(), {"log": {}}, 1)
    monkeypatch.setattr(ranks, "world", lambda: 4)
    message = "choose another --output_dir:\n  world_size: 2 there, 4 here"
    with pytest.raises(SystemExit, match=message):
        claim(tmp_path / "run", train="decoder,merger", resume_anyway=True)


def test_a_finished_run_is_finished_for_any_number_of_ranks(begun, monkeypatch):
    (begun / "finished.json").write_text("{}")
    (begun / "student").mkdir()
    monkeypatch.setattr(ranks, "world", lambda: 2)
    claim(begun)


def test_after_no_merge_the_students_folder_can_still_be_asked_for(begun):
    (begun / "finished.json").write_text("{}")
    done = lambda merge: run_folder(begun, merge=merge).finished
    assert done(False) and not done(True)
    claim(begun, merge=True)
    (begun / "student").mkdir()
    assert done(True)


def test_inputs_and_films_may_lie_elsewhere(begun):
    claim(begun, images="/scratch/1")
    claim(begun, images="/scratch/2", studies="studies")


def test_what_changes_no_number_may_change(begun):
    claim(begun, save_steps=9, resume_anyway=True)
    claim(begun, save_steps=2)


def test_a_folder_in_which_nothing_was_made_is_begun_anew(tmp_path):
    """A first call that ended on bad input must not stand in the way of the second."""
    claim(tmp_path / "run", studies="faulty")
    claim(tmp_path / "run", studies="mended", seed=1)
    assert json.loads((tmp_path / "run" / "args.json").read_text())["seed"] == 1


def test_resume_never_begins_anew_and_must_needs_a_checkpoint(begun, capsys):
    parameters, optimiser = trained()

    def run(how):
        folder = run_folder(begun, seed=3, resume=how)
        step, _ = folder.resume(parameters, optimiser, ["loss"], torch.device("cpu"))
        folder.stop.over()
        return step

    assert run("auto") == run("must") == 1
    claim(begun, seed=3, resume="never")
    assert not list(begun.glob("step-*")) and run("auto") == run("never") == 0
    with pytest.raises(SystemExit) as stop:
        run("must")
    assert stop.value.code == 2
    assert "--resume must, but there is no valid checkpoint" in capsys.readouterr().out


def test_a_second_run_in_the_folder_names_the_lock(begun):
    with run_folder(begun):
        before = contents(begun)
        message = (
            r"run: another run holds .*run/\.lock; wait for it or choose another --output_dir")
        with pytest.raises(SystemExit, match=message):
            claim(begun, resume="never")
        assert contents(begun) == before
    claim(begun)


def test_a_finished_earlier_stage_is_taken_as_it_was_made_unless_its_input_is_another(
        begun, capsys):
    (begun / "finished.json").write_text("{}")
    (begun / "student").mkdir()
    claim(begun, seed=7, earlier=True)
    message = "is taken as it was made, with other settings:\n  seed: 0 there, 7 here"
    assert message in capsys.readouterr().out
    assert json.loads((begun / "args.json").read_text())["seed"] == 0
    with pytest.raises(SystemExit, match="studies_sha256: "):
        claim(begun, studies="others", earlier=True)


def test_an_earlier_stage_that_is_not_finished_is_not_taken_with_other_settings(begun):
    with pytest.raises(SystemExit, match="seed: 0 there, 7 here"):
        claim(begun, seed=7, earlier=True)


def test_a_dry_run_leaves_no_folder(tmp_path):
    with run_folder(tmp_path / "run", dry_run=True) as folder:
        folder.write_lines("too_long.jsonl", [{"id": "a"}])
        assert folder.path is None and not folder.finished
    assert not (tmp_path / "run").exists()


def test_a_disk_without_locks_is_warned_of(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("runtime.run_folder.fcntl.flock", no_locks)
    claim(tmp_path / "run")
    warning = "No locks available; nothing keeps a second run out of this folder"
    assert warning in capsys.readouterr().out


def test_what_a_kill_left_half_written_is_removed(begun):
    (begun / ".tmp-step-000002").mkdir()
    (begun / ".tmp-step-000002" / "trainable.safetensors").write_text("half")
    (begun / ".tmp-log.jsonl").write_text("half")
    claim(begun)
    names = sorted(path.name for path in begun.iterdir())
    assert names == [".lock", "args.json", "env.json", "step-000001"]
