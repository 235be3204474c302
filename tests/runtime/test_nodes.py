"""Two nodes, each with inputs of its own: ranks that see different things stop together.

Rank 1 works in a folder of its own ("node:" in faults.py), so that a relative path leads it to
another copy. Without a comparison such a run trained to its end, or waited for hours.
"""

import argparse
import json
import shutil

import pytest
from faults import Job
from PIL import Image
from safetensors.torch import load_file, save_file

import training
from runtime import ranks

SETTINGS = ["--studies", "studies.jsonl", "--task_file", "task.json", "--images", "films",
            "--student", "student"]
TRAINING = ["--preset", "demo", *SETTINGS, "--global_batch", 4, "--max_steps", 1]
COMMANDS = {
    "spd.py": [*TRAINING, "--replay", "replay.jsonl"],
    "selfdistill.py": ["--preset", "demo", *SETTINGS, "--max_new_tokens", 4, "--attempts", 1],
    "apo.py": [*TRAINING, "--positives", "positives.jsonl"],
    "evaluate.py": ["classify", *SETTINGS, "--bootstrap", 0],
}


@pytest.fixture
def nodes(world, base, positives, tmp_path, monkeypatch):
    """The folders of rank 0 and rank 1, alike in all but one thing, which a test changes."""
    for node in (tmp_path / "0", tmp_path / "1"):
        node.mkdir()
        for name in ("studies.jsonl", "task.json", "replay.jsonl"):
            shutil.copy(world / name, node)
        shutil.copy(positives, node / "positives.jsonl")
        shutil.copytree(base, node / "student")
        shutil.copytree(world, node / "films")
    monkeypatch.chdir(tmp_path / "0")
    return tmp_path / "0", tmp_path / "1"


def run(name, nodes, *more, out=True):
    """The ranks' exit codes and what they printed. out: the folder that all ranks share."""
    where = []
    if out:
        one = nodes[0].parent / "out"
        where = ["--output", f"{one}.json"] if name == "evaluate.py" else ["--output_dir", one]
    with Job(name, [*COMMANDS[name], *where, *more], nodes[0].parent / "printed", 2,
             f"node:rank=1,folder={nodes[1]}") as job:
        return job.wait(60), job.text()


def change_lines(file, change):
    file.write_text("".join(f"{line}\n" for line in change(file.read_text().splitlines())))


def another_text(lines):
    """Another first word in one of the second study's trajectories; positives lack the first."""
    record = json.loads(lines[1])
    name, text = next(iter(record["trajectories"].items()))
    record["trajectories"][name] = f"another {text}"
    return [lines[0], json.dumps(record), *lines[2:]]


def another_task(node):
    task = json.loads((node / "task.json").read_text())
    task["prompts"]["student"] += " "
    (node / "task.json").write_text(json.dumps(task))


def another_film(node):
    """Another size of the second study's film."""
    study = json.loads((node / "studies.jsonl").read_text().splitlines()[1])
    image = Image.open(node / "films" / study["image"])
    image.resize((image.width * 2, image.height)).save(node / "films" / study["image"])


def other_weights(node):
    """The last bit but a few of one weight, so that all sizes stay."""
    file = node / "student" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 2 ** -10
    save_file(tensors, file, metadata={"format": "pt"})


def another_tokenizer(node):
    """Two tokens have each other's id, so that all lengths stay."""
    file = node / "student" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(tokenizer))


def of_studies(change):
    return lambda node: change_lines(node / "studies.jsonl", change)


# what is changed on rank 1's node: how, and how the message begins
CHANGES = {
    "a record less": (of_studies(lambda lines: [lines[0], *lines[2:]]), "--studies: "),
    "another order": (of_studies(lambda lines: lines[::-1]), "--studies: "),
    "another text": (of_studies(another_text), "--studies: "),
    "another task": (another_task, "--task_file: "),
    "a film of another size": (another_film, "the studies' lengths, from the sizes of their "),
    "other weights": (other_weights, "--student: "),
    "another tokenizer": (another_tokenizer, "--student: "),
}


def require_stopped(ran, says):
    """Both ranks have ended by themselves, and each says what differs."""
    codes, printed = ran
    assert codes == [1, 1] and "Traceback" not in printed, printed
    assert printed.count(says) == 2, printed
    assert printed.count("on rank 1: expected the same on all ranks") == 2, printed


@pytest.mark.parametrize("name", ["spd.py", "apo.py"])
@pytest.mark.parametrize("change", CHANGES)
def test_ranks_with_other_inputs_stop_before_the_first_step(nodes, name, change):
    make, says = CHANGES[change]
    make(nodes[1])
    require_stopped(run(name, nodes), says)
    assert not (nodes[0].parent / "out" / "log.jsonl").exists()


@pytest.mark.parametrize("name, file, says", [
    ("spd.py", "replay.jsonl", "--replay: "), ("apo.py", "positives.jsonl", "--studies: ")])
def test_a_stages_own_input_counts_too(nodes, name, file, says):
    change_lines(nodes[1] / file, lambda lines: lines[:-1])
    require_stopped(run(name, nodes), says)


@pytest.mark.parametrize("change", ["another order", "another task", "other weights",
                                    "another tokenizer"])
def test_ranks_that_sample_stop_before_the_first_text(nodes, change):
    make, says = CHANGES[change]
    make(nodes[1])
    require_stopped(run("selfdistill.py", nodes), says)
    assert not (nodes[0].parent / "out" / "positives.jsonl").exists()


@pytest.mark.parametrize("change, says", [
    ("another order", "the studies and the sizes of their images: "),
    ("another task", "task.json: "), ("other weights", "student: "),
    ("another tokenizer", "student: ")])
def test_ranks_that_evaluate_stop_before_the_first_answer(nodes, change, says):
    make, _ = CHANGES[change]
    make(nodes[1])
    require_stopped(run("evaluate.py", nodes, out=change == "other weights"), says)


def test_equal_copies_on_each_node_are_as_good_as_one(nodes):
    codes, printed = run("apo.py", nodes)
    assert codes == [0, 0], printed


# --- what ranks write must lie in one place

@pytest.mark.parametrize("name", ["spd.py", "selfdistill.py", "apo.py"])
def test_a_run_folder_that_is_not_the_same_for_all_ranks_is_refused(nodes, name):
    """Else the ranks would go on from other checkpoints, or one would find that all is finished."""
    require_stopped(run(name, nodes, "--output_dir", "runs", out=False), "--output_dir: ")
    assert not (nodes[0] / "runs" / "finished.json").exists()


def test_results_that_only_one_node_has_are_no_results(nodes):
    flags = ["--output", "results.json"]
    assert run("evaluate.py", nodes, *flags, out=False)[0] == [0, 0]
    assert (nodes[0] / "results.json").exists() and not (nodes[1] / "results.json").exists()
    require_stopped(run("evaluate.py", nodes, *flags, out=False),
                    "what --output results.json holds: ")


def test_answers_that_only_one_node_has_are_not_taken_for_all(nodes, tmp_path):
    """What is done differs, and so would the batches that each rank takes."""
    flags = ["--output", "results.json"]
    with Job("evaluate.py", [*COMMANDS["evaluate.py"], *flags], tmp_path / "printed", 1,
             "kill_batch:batch=3") as job:
        assert job.wait() == [-9]
    assert list((nodes[0] / "results.json.parts").rglob("part-0.jsonl"))
    require_stopped(run("evaluate.py", nodes, *flags, out=False), "what is to do, and done in ")


def test_flags_that_differ_are_named(monkeypatch):
    ranks_flags = [argparse.Namespace(seed=seed, save_steps=5, images=f"/{seed}", studies="x",
                                      task_file=None, num_workers=seed) for seed in (0, 1)]
    monkeypatch.setattr(ranks, "world", lambda: 2)
    found = []
    monkeypatch.setattr(ranks, "gather", lambda value: found.append(value) or [value] * 2)
    for args in ranks_flags:
        training.require_same_inputs(args, studies=[])
    monkeypatch.setattr(ranks, "gather", lambda value: found)
    with pytest.raises(ValueError) as refused:
        training.require_same_inputs(ranks_flags[0], studies=[])
    assert str(refused.value) == "--seed: 0 on rank 0, 1 on rank 1: expected the same on all ranks"
