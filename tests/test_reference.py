"""The frozen reference, cached and online, and what a study may hold: --max_tokens, --truncate, --dry_run."""

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file

import apo
import data
import reference
import student
import training


@pytest.fixture
def batch(model, encoder, studies, task):
    texts = [[study.trajectories["gpt-5"], *study.trajectories.values()] for study in studies[:2]]
    return student.pack([encoder(s, data.student_prompt(s, task), t) for s, t in zip(studies, texts)], model)


@pytest.mark.parametrize("train", [["lora"], ["merger"], ["lora", "merger"]])
def test_the_online_reference_is_the_untrained_student(model, batch, train):
    packed = student.PackedStudent(model)
    (before,) = packed(batch)
    parameters = student.set_trainable(model, train)
    merger = reference.frozen_merger(model, train)
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.05)
    with reference.as_reference(model, merger):
        (inside,) = packed(batch)
    (after,) = packed(batch)
    assert torch.equal(inside, before) and not inside.requires_grad
    assert not torch.allclose(after, before, rtol=1e-3) and after.requires_grad


@pytest.mark.parametrize("train", [["decoder"], ["vision"], ["merger", "vision"]])
def test_online_is_refused_where_the_reference_would_move(train):
    with pytest.raises(ValueError, match="--reference cached"):
        reference.require_online(train)


def test_the_cache_is_used_for_the_same_key_and_made_anew_for_another(model, batch, tmp_path, capsys):
    args = argparse.Namespace(output_dir=tmp_path, seed=0, global_batch=2, micro_batch=2, num_epochs=1, max_steps=None, num_workers=0)
    plan, calls = training.Plan(2, args), []

    def batch_of(examples):
        calls.append(examples)
        return batch

    packed = student.PackedStudent(model)
    (want,) = packed(batch)
    example = lambda index: {"id": index}
    first = reference.cached_logps(packed, example, batch_of, plan, "a", args)
    assert torch.equal(first[plan.order(0)], want.detach())
    assert torch.equal(reference.cached_logps(packed, example, batch_of, plan, "a", args), first) and len(calls) == 1
    reference.cached_logps(packed, example, batch_of, plan, "b", args)
    assert len(calls) == 2 and "belongs to other input" in capsys.readouterr().out
    (tmp_path / "reference.safetensors").write_bytes(b"cut")
    assert torch.equal(reference.cached_logps(packed, example, batch_of, plan, "b", args), first)
    assert len(calls) == 3 and "reference.safetensors is damaged" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["reference.safetensors"]


def test_a_reference_pass_goes_on_where_it_was_stopped(model, batch, tmp_path):
    args = argparse.Namespace(output_dir=tmp_path, seed=0, global_batch=2, micro_batch=2, num_epochs=1, max_steps=None, num_workers=0)
    plan, calls = training.Plan(6, args), []

    def batch_of(examples, stop_at=None):
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        calls.append(examples)
        return batch

    packed = student.PackedStudent(model)
    with pytest.raises(KeyboardInterrupt):
        reference.cached_logps(packed, lambda index: {"id": index}, lambda examples: batch_of(examples, 2), plan, "a", args)
    assert len(calls) == 2 and not (tmp_path / "reference.safetensors").exists()
    (part,) = tmp_path.glob("reference.parts/*/part-0.jsonl")
    part.write_bytes(part.read_bytes()[:-5])  # the kill came in the middle of a line
    logps = reference.cached_logps(packed, lambda index: {"id": index}, batch_of, plan, "a", args)
    again = [[example["id"] for example in call] for call in calls[2:]]
    assert again == [plan.order(0)[2:4], plan.order(0)[4:]]  # the torn micro-batch and the one never begun
    assert torch.equal(logps[plan.order(0)], packed(batch)[0].detach().repeat(3, 1))


def test_the_key_changes_with_everything_the_reference_depends_on(base, world, task, studies, tmp_path):
    args = argparse.Namespace(images=str(world), student=str(base), prompt="student", max_pixels=784, max_tokens=100, bf16=False)
    names = data.teacher_names(studies)

    def key(**changes):
        return reference.cache_key(argparse.Namespace(**{**vars(args), **changes}), task, studies[:2], names)

    keys = {key(), key(max_pixels=1568), key(max_tokens=99), key(bf16=True), key(prompt="teacher"), key(student="another/checkpoint")}
    assert len(keys) == 6 and key() in keys
    text = studies[0].trajectories["gpt-5"]
    studies[0].trajectories["gpt-5"] = text + "."
    assert key() not in keys
    studies[0].trajectories["gpt-5"] = text
    assert key() in keys


@pytest.mark.parametrize("lengths, budget, kept", [
    ([10, 20, 30], 100, [10, 20, 30]), ([10, 20, 30], 60, [10, 20, 30]), ([10, 20, 30], 45, [10, 17, 18]),
    ([50, 10, 50], 60, [25, 10, 25]), ([30, 30], 10, [5, 5]), ([], 10, []), ([7], 3, [3])])
def test_the_longest_responses_give_way_first(lengths, budget, kept):
    assert data.shares(lengths, budget) == kept


def test_lengths_from_the_header_equal_the_encoded_study(encoder, studies, task):
    study = studies[0]
    example = encoder(study, data.student_prompt(study, task), study.trajectories.values())
    prefix, lengths = encoder.lengths(study, data.student_prompt(study, task), study.trajectories.values())
    assert prefix == len(example["prefix_ids"]) and lengths == [len(r) for r in example["responses"]]


def test_a_study_that_does_not_fit_is_reported_left_out_or_cut(base, task, world, studies):
    texts = lambda study: list(study.trajectories.values())
    prompt = lambda study: data.student_prompt(study, task)
    encoder = data.Encoder(base, task, world)
    sizes = [sum(lengths) + prefix for prefix, lengths in (encoder.lengths(s, prompt(s), texts(s)) for s in studies)]
    limit = sorted(sizes)[len(sizes) // 2]
    kept, long, tokens = training.fit(encoder, studies, prompt, texts, limit, truncate=False)
    assert [s.id for s in kept] == [s.id for s, n in zip(studies, sizes) if n <= limit] and tokens == [n for n in sizes if n <= limit]
    assert [(row["id"], row["tokens"], row["cut"]) for row in long] == [(s.id, n, False) for s, n in zip(studies, sizes) if n > limit]

    kept, long, tokens = training.fit(encoder, studies, prompt, texts, limit, truncate=True)
    assert kept == studies and all(row["cut"] for row in long) and max(tokens) == limit
    cutter = data.Encoder(base, task, world, max_tokens=limit)
    for study, size in zip(studies, sizes):
        example, whole = cutter(study, prompt(study), texts(study)), encoder(study, prompt(study), texts(study))
        assert sum(map(len, example["responses"])) + len(example["prefix_ids"]) == min(size, limit)
        assert torch.equal(example["prefix_ids"], whole["prefix_ids"])  # neither image nor prompt is cut
        assert all(torch.equal(r, w[:len(r)]) for r, w in zip(example["responses"], whole["responses"]))


def test_no_room_beside_the_image_is_no_study(encoder, studies, task):
    kept, long, _ = training.fit(encoder, studies[:1], lambda s: data.student_prompt(s, task), lambda s: s.trajectories.values(), 30, truncate=True)
    assert kept == [] and long[0]["cut"] is False


def line(**values):
    return {"loss": 1.0, "log_ratio/chosen": 0.0, "tokens/chosen": 50.0, **values}


def test_the_log_warns_of_the_style_shortcut_and_of_a_falling_t_plus():
    names = ["a", "b", "c"]
    assert list(apo.warnings_of(line(), names, 0.1)) == []
    assert "style" in next(apo.warnings_of(line(loss=0.01), names, 0.1))
    assert list(apo.warnings_of(line(loss=0.01), names, 0.9)) == []
    assert "nat per ten tokens" in next(apo.warnings_of(line(**{"log_ratio/chosen": -5.1}), names, 0.9))
    assert list(apo.warnings_of(line(**{"log_ratio/chosen": -4.9}), names, 0.9)) == []


@pytest.fixture
def positives(tmp_path, studies):
    rows = [{"id": s.id, "t_plus": list(s.trajectories.values())[i % 7] + " overall."} for i, s in enumerate(studies) if s.split == "train"]
    (tmp_path / "positives.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "positives.jsonl"


@pytest.mark.parametrize("preset, trains", [("paper", "merger"), ("released", "lora")])
def test_the_presets_run_on_a_tiny_student_and_online_equals_cached(script, run_flags, positives, tmp_path, preset, trains):
    logs = []
    for kind in ("cached", "online"):
        script("apo.py", *run_flags, "--preset", preset, "--positives", positives, "--max_steps", 2, "--logging_steps", 1, "--output_dir",
               tmp_path / kind, "--reference", kind)
        logs.append((tmp_path / kind / "log.jsonl").read_text())
        settings = json.loads((tmp_path / kind / "args.json").read_text())
        assert (settings["train"], settings["global_batch"], settings["beta"]) == (trains, 4, 0.1)
    assert logs[0] == logs[1]
    first = json.loads(logs[0].splitlines()[0])
    assert first["loss"] == torch.tensor(8.0).log().item()  # log(1 + 7) to the bit: same micro-batch shapes, same path
    assert first["rewards/chosen"] == 0 and first["rewards/grok-4"] == 0


def test_a_dry_run_prints_the_plan_and_leaves_nothing(script, run_flags, positives, tmp_path):
    for name, own in (("spd.py", []), ("apo.py", ["--positives", positives])):
        out = script(name, *run_flags, *own, "--preset", "paper", "--output_dir", tmp_path / "nothing", "--dry_run").stdout
        assert "24 studies, 6 steps of 4 = 1 ranks x 4 micro-batches x 1 studies" in out
        assert "the paper's: 1" in out and "tokens per study" in out and "GiB per GPU" in out
        assert "one step of the longest studies: " in out and "so all 6 take " in out
    assert not (tmp_path / "nothing").exists()


def test_saved_weights_have_the_hubs_names(base, model, encoder, tmp_path):
    """transformers writes and vLLM's Qwen2.5-VL mapping reads: visual.*, model.layers.*, model.embed_tokens, lm_head (here tied)."""
    student.save(model, encoder, tmp_path / "out", "card")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {"visual.patch_embed.proj.weight", "visual.merger.mlp.0.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight",
            "model.embed_tokens.weight"} <= names
    assert all(name.startswith(("visual.", "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")) for name in names)
