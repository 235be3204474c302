"""What a run writes over and removes: its own files, no link, no pipe, nothing of somebody else."""

import argparse
import os

import pytest
from test_checkpoint import claim, contents, run_folder, trained
from test_fuzz import within

import apo
import evaluate
import selfdistill
import spd
import student
from evaluation import results
from runtime import checkpoint, flags
from runtime import run_folder as run_folders
from runtime.shared import open_own, read_parts, shared_map

TRAINING = (*run_folders.OF_A_RUN, *run_folders.OF_TRAINING)
NAMES = sorted({name.replace("*", "1") for name in (*TRAINING, *run_folders.OF_SAMPLING)})
STAGES = {"training": {}, "sampling": {"train": None}}


def enter(folder, stage="training", **settings):
    """Claims a folder as a training stage or as stage 2, which has no --train."""
    run = run_folder(folder, **settings)
    if stage == "sampling":
        del run.args.train
    with run:
        pass


def stage_of(name):
    """The kind of stage that writes a name."""
    of = name.replace("1", "*")
    return "sampling" if of in run_folders.OF_SAMPLING else "training"


# ---------------------------------------------------------------------------- links, pipes, folders

def link_to_a_file(path, victim):
    path.symlink_to(victim / "file")


def link_to_a_folder(path, victim):
    path.symlink_to(victim)


def link_to_nothing(path, victim):
    path.symlink_to(victim / "none")


def pipe(path, victim):
    os.mkfifo(path)


def other_kind(path, victim):
    """A file in the place of a folder, a folder in the place of a file."""
    is_folder = path.name.replace("1", "*") in run_folders.FOLDERS
    path.write_text("x") if is_folder else path.mkdir()


IN_PLACE = {"found a link": [link_to_a_file, link_to_a_folder, link_to_nothing],
            "found a pipe": [pipe], "found a": [other_kind]}


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "file").write_text("precious")
    return folder


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
@pytest.mark.parametrize("says, make", [(says, make) for says, some in IN_PLACE.items()
                                        for make in some])
def test_what_is_no_file_of_a_run_is_refused_at_the_start(tmp_path, victim, says, make, resume):
    """`student` as a link to a folder made a run fail when all its steps were done."""
    for name in NAMES:
        folder = tmp_path / name.replace(".", "_")
        enter(folder, stage_of(name))
        (folder / name).unlink(missing_ok=True)
        make(folder / name, victim)
        before = contents(folder) | contents(victim)
        with within(5, asleep=True), pytest.raises(SystemExit) as refused:
            enter(folder, stage_of(name), resume=resume)
        assert str(refused.value).startswith(f"{folder / name}: {says}"), refused.value
        assert "remove it, or choose another --output_dir" in str(refused.value)
        assert contents(folder) | contents(victim) == before and os.path.lexists(folder / name)


@pytest.mark.parametrize("make, says", [
    (link_to_a_file, "found a link"), (link_to_nothing, "found a link"), (pipe, "found a pipe"),
    (lambda path, _: path.mkdir(), "found a folder")])
def test_a_lock_that_is_no_file_is_refused(tmp_path, victim, make, says):
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / ".lock", victim)
    with within(5, asleep=True), pytest.raises(ValueError, match=f"/run/.lock: {says}, expected a"):
        claim(tmp_path / "run")
    assert (victim / "file").read_text() == "precious" and not (victim / "none").exists()


def test_a_lock_keeps_what_is_in_it(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("precious")  # as where it is a second name of a file
    claim(tmp_path / "run")
    assert (tmp_path / "run" / ".lock").read_text() == "precious"


def test_a_finished_folder_may_be_made_of_links(tmp_path, victim):
    """Nothing is written there: its student may have moved to another disk."""
    claim(tmp_path / "run")
    (tmp_path / "run" / "finished.json").write_text("{}")
    (tmp_path / "run" / "student").symlink_to(victim)
    claim(tmp_path / "run")
    claim(tmp_path / "run", resume="never")
    assert not os.path.lexists(tmp_path / "run" / "student")
    assert (victim / "file").read_text() == "precious"


@pytest.mark.parametrize("make, says", [
    (link_to_a_file, "found a link"), (link_to_nothing, "found a link"), (pipe, "found a pipe"),
    (lambda path, _: path.mkdir(), "found a folder")])
@pytest.mark.parametrize("name", ["part-0.jsonl", "part-7.jsonl"])
def test_a_part_that_is_no_file_is_neither_read_nor_written(tmp_path, victim, make, says, name):
    parts = tmp_path / "parts"
    parts.mkdir()
    make(parts / name, victim)
    for touch in (lambda: read_parts(parts),
                  lambda: shared_map(["a"], str, lambda keys, _: keys, 1, parts),
                  lambda: open_own(parts / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        with (within(5, asleep=True),
              pytest.raises(ValueError, match=f"{name}: {says}, expected a regular file")):
            touch()
    assert (victim / "file").read_text() == "precious" and not (victim / "none").exists()


def test_results_that_are_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with within(5, asleep=True), pytest.raises(ValueError, match="was not written by evaluate.py"):
        results.read_before(tmp_path / "results.json")


# ----------------------------------------------------------------------------- whose the files are

def put(path):
    """A file or a folder of somebody else."""
    if path.name.replace("1", "*") in run_folders.FOLDERS:
        path.mkdir()
        path /= "weights"
    path.write_text("precious")


@pytest.mark.parametrize("resume", ["auto", "must", "never"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "args.json"])
def test_what_no_run_has_written_is_neither_removed_nor_replaced(tmp_path, name, resume):
    """As where --output_dir is the working directory by mistake."""
    put(tmp_path / name)
    before = contents(tmp_path)
    for stage in STAGES:
        if name in run_folders.OF_A_RUN or stage == stage_of(name):
            with pytest.raises(SystemExit, match=rf"{name}.*: is there, but .* has no args.json of "
                               "a run that wrote it; expected another --output_dir"):
                enter(tmp_path, stage, resume=resume)
        else:  # such a run writes nothing of that name
            enter(tmp_path, stage, resume=resume)
            (tmp_path / "args.json").unlink()
            (tmp_path / "env.json").unlink()
        kept = contents(tmp_path)
        assert {path: kept[path] for path in before if path in kept} == before


def test_resume_never_removes_what_the_run_in_args_json_wrote_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    claim(folder)
    checkpoint.save_checkpoint(folder, 1, *trained(), {"log": {}}, 1)
    (folder / "student").mkdir()
    (folder / "log.jsonl").write_text("{}\n")
    for name in ("notes.txt", "positives.jsonl", "part-1.jsonl", "stats.json", ".tmp-mine"):
        (folder / name).write_text("precious")
    claim(folder, seed=3, resume="never")
    assert sorted(path.name for path in folder.iterdir()) == [
        ".lock", ".tmp-mine", "args.json", "env.json", "notes.txt", "part-1.jsonl",
        "positives.jsonl", "stats.json"]
    with run_folder(folder, seed=3) as run:
        run.mark_finished()
    assert (folder / "part-1.jsonl").read_text() == "precious"


def test_a_kill_while_resume_never_removes_leaves_the_claim(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    claim(folder)
    for name in ("log.jsonl", "speed.jsonl", "too_long.jsonl"):
        (folder / name).write_text("{}\n")

    def stop(path):
        if not path.name.startswith("log"):
            raise KeyboardInterrupt
        path.unlink()

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(run_folders, "remove", stop)
        claim(folder, resume="never")
    assert (folder / "args.json").exists()
    claim(folder, seed=3, resume="never")
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "args.json", "env.json"]


def test_the_parts_of_results_are_removed_and_nothing_beside_them(tmp_path):
    folder, key = tmp_path / "results.json.parts", "0123456789abcdef"
    own = [folder / key / "0" / "greedy" / "part-0.jsonl", folder / key / "part-12.jsonl"]
    others = [folder / "notes.txt", folder / key / "0" / "notes.txt", folder / "part-0.jsonl"]
    (folder / key / "0" / "greedy").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / key[::-1]).symlink_to(elsewhere)
    for path in (*own, *others, elsewhere / "part-0.jsonl"):
        path.write_text("x")
    results.remove_parts(folder)
    assert not any(path.exists() for path in own) and not (folder / key / "0" / "greedy").exists()
    assert all(path.exists() for path in (*others, elsewhere / "part-0.jsonl"))
    for path in others:
        path.unlink()
    (folder / key[::-1]).unlink()
    own[0].parent.mkdir(parents=True)
    own[0].write_text("x")
    results.remove_parts(folder)
    assert not folder.exists()


# -------------------------------------------------------------------------------------- empty texts

TEXTS = {
    spd: ("studies", "images", "task_file", "split", "base", "student", "output_dir", "teachers",
          "replay", "train"),
    selfdistill: ("studies", "images", "task_file", "base", "student", "output_dir", "server",
                  "server_model", "server_key_env"),
    apo: ("studies", "images", "task_file", "base", "student", "output_dir", "positives",
          "teacher_weights"),
    evaluate: ("studies", "images", "task_file", "student", "output", "ms_cxr_t", "split"),
}


@pytest.mark.parametrize("command, flag", [(c, f) for c, some in TEXTS.items() for f in some])
def test_an_empty_text_is_refused_in_every_flag(command, flag, capsys):
    """As of --output_dir "$UNSET"."""
    argv = ["--studies", "s", "--student", "m"]
    argv = ["classify", *argv] if command is evaluate else [*argv, "--output_dir", "out"]
    with pytest.raises(SystemExit) as refused:
        command.parse([*argv, f"--{flag}", ""])
    assert refused.value.code == 2
    assert f"error: --{flag}: empty, expected a text, such as a path" in capsys.readouterr().err


def test_a_path_that_is_empty_in_a_script_of_ones_own_is_missing(tmp_path):
    (tmp_path / "s").write_text("")
    args = argparse.Namespace(studies=str(tmp_path / "s"), output_dir="")
    with pytest.raises(ValueError, match="^--output_dir: missing; name the run's folder"):
        flags.require(args)


def test_a_name_without_a_student_is_refused(monkeypatch, base):
    monkeypatch.chdir(base)  # where there is one
    with pytest.raises(ValueError, match="^--student: empty, expected the folder or hub id"):
        evaluate.students.named(["ours="])
    assert student.require_family(base) is None
