"""The frozen reference of stage 3, its log's warnings, its presets, --dry_run."""

import argparse
import functools
import json
import math
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import write_positives
from PIL import Image
from safetensors.torch import load_file, save_file

import apo
import data
import student
import training


@pytest.fixture
def batch(model, processor, studies, task):
    texts = [[study.trajectories["gpt-5"], *study.trajectories.values()] for study in studies[:6]]
    return [processor(s, data.student_prompt(s, task), t) for s, t in zip(studies, texts)]


@pytest.fixture
def asked(model, batch, tmp_path):
    """asked(key, fail_at) computes or reads the reference of six studies.

    asked.encoded lists what was encoded.
    """
    args = SimpleNamespace(seed=0, global_batch=2, micro_batch=2, num_epochs=1, max_steps=None)
    plan, encoded = training.Plan([1] * 6, args), []

    def encode(epoch, index):
        if len(encoded) == asked.fail_at:
            raise KeyboardInterrupt
        encoded.append(index)
        return batch[index]

    def asked(key, fail_at=None):
        asked.fail_at = fail_at
        return apo.reference_logps(model, plan, encode, SimpleNamespace(path=tmp_path), key, 0)

    asked.plan, asked.encoded = plan, encoded
    return asked


def test_the_reference_is_the_students_and_its_cache_is_used_for_the_same_key_alone(
        model, batch, asked, tmp_path, capsys):
    first = asked("a")
    for indices in (asked.plan.order(0)[at:at + 2] for at in (0, 2, 4)):
        (want,) = student.PackedStudent(model)(student.pack([batch[i] for i in indices], model))
        assert torch.equal(first[indices], want.detach())
    assert torch.equal(asked("a"), first) and len(asked.encoded) == 6
    asked("b")
    assert len(asked.encoded) == 12 and "belongs to other input" in capsys.readouterr().out
    (tmp_path / "reference.safetensors").write_bytes(b"cut")
    assert torch.equal(asked("b"), first)
    assert len(asked.encoded) == 18
    assert "reference.safetensors is damaged" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]


def test_a_reference_pass_goes_on_where_it_was_stopped(asked, tmp_path):
    whole = asked("other").clone()
    (tmp_path / "reference.safetensors").unlink()
    asked.encoded.clear()
    with pytest.raises(KeyboardInterrupt):
        asked("a", fail_at=4)
    assert len(asked.encoded) == 4 and not (tmp_path / "reference.safetensors").exists()
    (part,) = tmp_path.glob("reference.parts/*/part-0.jsonl")
    part.write_bytes(part.read_bytes()[:-5])  # the kill came in the middle of a line
    assert torch.equal(asked("a"), whole)
    # the torn micro-batch and the one never begun
    assert asked.encoded[4:] == asked.plan.order(0)[2:]


# --- at pi_theta = pi_st the first loss is log(1 + sum of w_u)

TERMS = {
    "plain": {}, "length_norm": {"length_norm": True},
    "weights": {"weights": torch.arange(7.0)}, "normalised": {"weights": None}}


ONE_EACH = torch.ones(7)


def encode_of(examples, encoded, epoch, index):
    """An example of a list, or of a function of the index, which is noted down."""
    encoded.append(index)
    return examples(index) if callable(examples) else examples[index]


@pytest.fixture
def checked(model, batch, asked, tmp_path):
    """checked(examples, ...) computes or reads the reference of six studies, and checks it."""
    def checked(examples=batch, weights=ONE_EACH, **changes):
        args = SimpleNamespace(**{"beta": 0.1, "length_norm": False, "bf16": False,
                                  "num_workers": 0, **changes})
        encode = functools.partial(encode_of, examples, asked.encoded)
        folder = SimpleNamespace(path=tmp_path)
        asked.encoded.clear()
        return apo.checked_reference(model, asked.plan, encode, folder, "a", weights, args)

    return checked


def other_film(example):
    return {**example, "pixel_values": 1 - example["pixel_values"]}


@pytest.mark.parametrize("terms", TERMS)
def test_a_cached_reference_of_other_films_is_told_by_the_first_loss_and_made_again(
        checked, batch, asked, studies, capsys, terms):
    terms = TERMS[terms]
    # an absent teacher has no weight
    batch[asked.plan.order(0)[0]]["responses"][3] = None
    before = checked(**terms)
    assert torch.equal(checked(**terms), before)
    assert asked.encoded == asked.plan.order(0)[:2]  # the first step alone is looked at
    assert "warning" not in capsys.readouterr().out
    second = asked.plan.order(0)[1]
    changed = [other_film(one) if i == second else one for i, one in enumerate(batch)]
    after = checked(changed, **terms)
    (said,) = capsys.readouterr().out.splitlines()
    assert not torch.equal(after[second], before[second])
    first, loss, expected = re.fullmatch(
        r"warning: .*reference.safetensors: with it the first loss of study '(.*)' is ([\d.]+), "
        r"expected log\(1 \+ sum of w_u\) = ([\d.]+); .* again", said).groups()
    assert first == studies[second].id and loss != expected
    w = terms.get("weights", ONE_EACH)
    assert float(expected) == pytest.approx(math.log(2 if w is None else 1 + w.sum()), abs=1e-4)
    assert torch.equal(checked(changed, **terms), after)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("bf16, nats, told", [
    (False, 0.001, False), (False, 0.5, True), (True, 0.05, False), (True, 4, True)])
def test_rounding_of_the_number_format_is_no_other_reference(
        checked, asked, tmp_path, capsys, bf16, nats, told):
    file = tmp_path / "reference.safetensors"
    checked(bf16=bf16)
    logps = load_file(file)["logps"]
    logps[asked.plan.order(0)[0], 0] += nats
    save_file({"logps": logps}, file, metadata={"key": "a"})
    checked(bf16=bf16)
    assert ("warning" in capsys.readouterr().out) == told


def test_a_reference_that_is_off_again_ends_the_run(checked, batch, asked):
    def film(index):  # another one in every pass
        return {**batch[index], "pixel_values": batch[index]["pixel_values"] * len(asked.encoded)}

    with pytest.raises(ValueError, match=r"^study '.*': its first loss is [\d.]+ with a reference "
                       r"that was just computed, expected log\(1 \+ sum of w_u\) = 2.0794: "):
        checked(film)


def test_a_loss_that_is_no_number_is_left_to_the_step_which_names_it(checked, batch, capsys):
    checked([{**one, "pixel_values": one["pixel_values"] * math.nan} for one in batch])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_film_changed_in_place_does_not_go_into_the_first_loss(
        script, world, base, tmp_path, ranks):
    """All films change but keep their sizes in bytes; the run goes on from its beginning."""
    shutil.copytree(world, tmp_path / "world")
    films, out = tmp_path / "world" / "films", tmp_path / "out"
    positives = write_positives(
        tmp_path / "positives.jsonl",
        [s for s in data.read_studies(world / "studies.jsonl", data.load_task(world / "task.json"))
         if s.split == "train"])
    flags = ["--preset", "demo", "--studies", world / "studies.jsonl", "--images",
             tmp_path / "world", "--task_file", world / "task.json", "--student", base,
             "--positives", positives, "--output_dir", out, "--max_steps", 1, "--logging_steps", 1,
             "--micro_batch", 1, "--no-merge"]
    script("apo.py", *flags, ranks=ranks)
    kept = {name: (out / name).read_bytes() for name in ("reference.safetensors", "args.json")}
    shutil.rmtree(out)
    out.mkdir()
    for name, content in kept.items():
        (out / name).write_bytes(content)
    for film in films.iterdir():
        size = film.stat().st_size
        Image.new("L", Image.open(film).size, 255).save(film)
        film.write_bytes(film.read_bytes().ljust(size, b"\0"))
        assert film.stat().st_size == size
    said = script("apo.py", *flags, ranks=ranks).stdout
    assert said.count("Computing the reference again") == 1
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == torch.tensor(8.0).log().item()
    assert (out / "reference.safetensors").read_bytes() != kept["reference.safetensors"]


def test_the_key_changes_with_everything_the_reference_depends_on(
        base, world, task, studies, tmp_path):
    args = argparse.Namespace(
        images=str(world), student=str(base), prompt="student", max_pixels=784, max_tokens=100,
        max_length=None, bf16=False)
    names = data.teacher_names(studies)

    def key(**changes):
        changed = argparse.Namespace(**{**vars(args), **changes})
        return apo.reference_key(changed, task, studies[:2], names)

    keys = {
        key(), key(max_pixels=1568), key(max_tokens=99), key(bf16=True), key(prompt="teacher"),
        key(student="another/checkpoint"), key(max_length=50)}
    assert len(keys) == 7 and key() in keys
    text = studies[0].trajectories["gpt-5"]
    studies[0].trajectories["gpt-5"] = text + "."
    assert key() not in keys
    studies[0].trajectories["gpt-5"] = text
    assert key() in keys


def line(**values):
    return {"loss": 1.0, "rewards/chosen": 0.0, "tokens/chosen": 50.0, **values}


def test_the_log_warns_of_the_style_shortcut_and_of_a_falling_t_plus():
    names = ["a", "b", "c"]
    assert list(apo.warnings_of(line(), names, 0.1, 0.5)) == []
    assert "style" in next(apo.warnings_of(line(loss=0.01), names, 0.1, 0.5))
    assert list(apo.warnings_of(line(loss=0.01), names, 0.9, 0.5)) == []
    falls = line(**{"rewards/chosen": -2.55})
    assert "nat per ten tokens" in next(apo.warnings_of(falls, names, 0.9, 0.5))
    assert list(apo.warnings_of(line(**{"rewards/chosen": -2.45}), names, 0.9, 0.5)) == []


@pytest.fixture
def positives(tmp_path, studies):
    rows = [
        {"id": s.id, "t_plus": list(s.trajectories.values())[i % 7] + " overall."}
        for i, s in enumerate(studies) if s.split == "train"]
    (tmp_path / "positives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "positives.jsonl"


@pytest.mark.parametrize("preset, trains", [("paper", "merger"), ("released", "lora")])
def test_the_presets_run_on_a_tiny_student_and_begin_at_log_1_plus_n(
        script, run_flags, positives, tmp_path, preset, trains):
    script("apo.py", *run_flags, "--preset", preset, "--positives", positives, "--max_steps", 2,
           "--logging_steps", 1, "--output_dir", tmp_path)
    settings = json.loads((tmp_path / "args.json").read_text())
    assert (settings["train"], settings["global_batch"], settings["beta"]) == (trains, 4, 0.1)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    # log(1 + 7) to the bit: the reference has the same micro-batch shapes and goes the same path
    assert first["loss"] == torch.tensor(8.0).log().item()
    assert first["rewards/chosen"] == 0 and first["rewards/grok-4"] == 0


def test_a_dry_run_prints_the_plan_and_leaves_nothing(script, run_flags, positives, tmp_path):
    for name, own in (("spd.py", []), ("apo.py", ["--positives", positives])):
        out = script(name, *run_flags, *own, "--preset", "paper",
                     "--output_dir", tmp_path / "nothing", "--dry_run").stdout
        assert "24 studies, 6 steps of 4 = 1 ranks x 4 micro-batches x 1 studies" in out
        assert "the paper's: 1" in out and "tokens per study" in out and "GiB per GPU" in out
        assert "one step of the longest studies: " in out and "so all 6 take " in out
        assert ", the update's temporaries 0.00, in all " in out
    assert not (tmp_path / "nothing").exists()
