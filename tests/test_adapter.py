"""An adapter's folder as --student, what merging loses in bf16, what is saved beside LoRA."""

import json
import math
import re
import shutil
from pathlib import Path

import answers
import check
import drift
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import apo
import evaluate
import selfdistill
import spd
import student
from runtime import adapter
from runtime.checkpoint import fingerprint


def scatter(model, std=0.05):
    """Moves what trains, each tensor to other values."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_A" not in name:
                p += std * torch.randn_like(p)


def trained(base, train=("lora",), r=4, alpha=16, bf16=False):
    """A student whose adapter is no longer zero."""
    model = student.load(base, bf16)
    student.set_trainable(model, list(train), r, alpha)
    scatter(model)
    return model


def saved(base, folder, train=("lora",), **how):
    """(model, folder) of a trained student, saved as an adapter."""
    model = trained(base, train, **how)
    student.save_adapter(model, folder, base, list(train))
    return model, folder


def change(folder, **changes):
    """Changes adapter_config.json; a value of None takes the key away."""
    file = Path(folder) / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.fixture
def batch(model, processor, studies):
    examples = [processor(s, "list", list(s.trajectories.values())[:2]) for s in studies[:2]]
    return student.pack(examples, model)


def logps(model, batch):
    with torch.no_grad():
        return student.PackedStudent(model)(batch)[0]


# ---------------------------------------------------------------- the folder as a student

@pytest.mark.parametrize("train", [["lora"], ["lora", "merger"], ["lora", "vision", "merger"]])
@pytest.mark.parametrize("bf16", [False, True])
def test_what_is_saved_comes_back_bit_for_bit(base, batch, tmp_path, train, bf16):
    model, folder = saved(base, tmp_path / "adapter", train, bf16=bf16)
    again = student.load(folder, bf16)
    assert torch.equal(logps(again, batch), logps(model, batch))
    assert not torch.equal(logps(again, batch), logps(student.load(base, bf16), batch))
    weight = {True: torch.bfloat16, False: torch.float32}[bf16]
    before = dict(student.load(base, bf16).named_parameters())
    layers = student.lora_layers(again)
    assert len(layers) == len(student.lora_layers(model))
    for name, layer in layers.items():
        assert torch.equal(layer.base.weight, before[f"{name}.weight"])
        assert layer.base.weight.dtype == weight
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_the_processor_is_the_folders_own_or_the_bases(base, processor, task, world, tmp_path):
    _, folder = saved(base, tmp_path / "adapter")
    assert adapter.processor_of(folder) == str(base)
    text = "mild edema"
    assert student.Processor(folder, task, world).tokens(text) == processor.tokens(text)
    assert check.TextLengths(folder, task).count(text) == len(processor.tokens(text))
    student.save_processor(processor, folder)
    shutil.copytree(base, tmp_path / "moved")
    change(folder, base_model_name_or_path=str(tmp_path / "moved"))
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (tmp_path / "moved" / name).unlink()
    assert adapter.processor_of(folder) == folder
    assert student.Processor(folder, task, world).tokens(text) == processor.tokens(text)
    assert check.TextLengths(folder, task).count(text) == len(processor.tokens(text))


def test_a_relative_base_is_taken_from_the_working_directory(
        base, batch, tmp_path, monkeypatch):
    shutil.copytree(base, tmp_path / "there" / "base")
    monkeypatch.chdir(tmp_path / "there")
    model, folder = saved(Path("base"), tmp_path / "adapter")
    assert torch.equal(logps(student.load(folder), batch), logps(model, batch))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=(
            rf"^{folder}/adapter_config.json: base_model_name_or_path base: expected the folder or "
            "hub id of a Qwen2.5-VL, a relative path taken from the working directory: ")):
        student.load(folder)


BROKEN_CONFIGS = {
    "another method": (dict(peft_type="IA3"), '"peft_type": expected "LORA", found "IA3"'),
    "no base": (dict(base_model_name_or_path=None),
                '"base_model_name_or_path": expected the folder or hub id'),
    "no rank": (dict(r=0), '"r": expected a whole number above 0, found 0'),
    "no scale": (dict(lora_alpha="x"), '"lora_alpha": expected a number above 0, found "x"'),
    "another scale": (dict(use_rslora=True), '"use_rslora": expected none, found true'),
    "ranks of layers": (dict(rank_pattern={"q_proj": 2}), '"rank_pattern": expected none'),
    "DoRA": (dict(use_dora=True), '"use_dora": expected none, found true'),
    "a bias": (dict(bias="all"), '"bias": expected "none", found "all"'),
    "another base": (dict(init_lora_weights="pissa"), '"init_lora_weights": expected'),
    "whole modules": (dict(modules_to_save="merger"), '"modules_to_save": expected a list'),
    "all modules": (dict(modules_to_save=[""]), '"modules_to_save": expected a list'),
    "another rank": (dict(r=3), "lora_A.weight: found (4, "),
}


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_a_config_that_means_something_else_is_refused(base, tmp_path, case):
    changes, said = BROKEN_CONFIGS[case]
    _, folder = saved(base, tmp_path / "adapter")
    change(folder, **changes)
    with pytest.raises(ValueError, match=rf"^{folder}/adapter_.*: .*{re.escape(said)}"):
        student.load(folder)


def test_a_config_that_is_no_object_is_refused(base, tmp_path):
    _, folder = saved(base, tmp_path / "adapter")
    (folder / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=rf"^{folder}/adapter_config.json: expected a JSON object"):
        student.load(folder)


def without_a_tensor(tensors):
    del tensors[max(tensors)]


def with_a_tensor_more(tensors):
    tensors["base_model.model.lm_head.weight"] = torch.zeros(1)


def of_a_layer_that_is_not_there(tensors):
    key = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
    tensors[key.replace("layers.0", "layers.7")] = tensors.pop(key)


def with_none(tensors):
    tensors.clear()


@pytest.mark.parametrize("spoil, said", [
    (without_a_tensor, "v_proj.lora_B.weight: found no such weight, expected ("),
    (with_a_tensor_more, "lm_head.weight: found (1,), expected no such weight for "),
    (of_a_layer_that_is_not_there, "layers.7.mlp.down_proj is no linear layer of the decoder of "),
    (with_none, "holds no LoRA weights"),
])
def test_weights_that_do_not_fit_the_base_are_refused(base, tmp_path, spoil, said):
    _, folder = saved(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    spoil(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=rf"^{file}: .*{re.escape(said)}"):
        student.load(folder)


def test_a_folder_without_its_weights_or_with_two_meanings_is_refused(base, tmp_path):
    _, folder = saved(base, tmp_path / "adapter")
    shutil.copytree(folder, tmp_path / "bare")
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: expected the adapter's weig"):
        student.load(tmp_path / "bare")
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(folder / "adapter_config.json", tmp_path / "both")
    with pytest.raises(ValueError, match="both holds config.json and adapter_config.json, expected "
                       "one of them"):
        student.load(tmp_path / "both")
    shutil.copytree(folder, tmp_path / "second")
    change(tmp_path / "second", base_model_name_or_path=str(folder))
    with pytest.raises(ValueError, match="expected the student itself, not another adapter"):
        student.load(tmp_path / "second")


def test_the_fingerprint_covers_the_adapter_and_its_base(base, tmp_path):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    _, folder = saved(own, tmp_path / "adapter")
    prints = [fingerprint(folder)]
    tensors = load_file(own / "model.safetensors")
    tensors["lm_head.weight" if "lm_head.weight" in tensors else max(tensors)] += 1
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    prints.append(fingerprint(folder))
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[max(tensors)] += 1
    save_file(tensors, folder / "adapter_model.safetensors")
    prints.append(fingerprint(folder))
    assert len(set(prints)) == 3


# ---------------------------------------------------------------- what PEFT makes of it

@pytest.mark.parametrize("train", [["lora"], ["lora", "merger"], ["lora", "vision"],
                                   ["lora", "merger", "vision"]])
def test_peft_gives_the_same_logits(base, batch, tmp_path, train):
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    import transformers

    model, folder = saved(base, tmp_path / "adapter", train)
    # not student.load, whose patch embedding PEFT could not replace
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(base).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, folder).eval()
    inputs = dict(
        input_ids=batch["ids"], position_ids=batch["position_ids"],
        pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"])
    with torch.no_grad():
        expected, logits = theirs(**inputs).logits, model(**inputs).logits
        before = student.load(base)(**inputs).logits
    assert torch.allclose(logits, expected, atol=1e-4)  # their convolution of patches rounds
    assert not torch.allclose(before, expected, atol=0.1)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["modules_to_save"] is None) == (train == ["lora"])


@pytest.mark.parametrize("train", [["lora"], ["lora", "merger"]])
def test_what_peft_saves_is_read(base, batch, tmp_path, train):
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    config = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["merger"] if "merger" in train else None, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(student.load(base), config)
    scatter(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    change(tmp_path / "adapter", base_model_name_or_path=str(base))
    ours = student.load(tmp_path / "adapter")
    assert set(student.lora_layers(ours)) == {
        f"model.language_model.layers.{i}.self_attn.{name}"
        for i in range(ours.config.text_config.num_hidden_layers) for name in ("q_proj", "v_proj")}
    inner = theirs.get_base_model()
    assert torch.allclose(logps(ours, batch), logps(inner, batch), atol=1e-5)
    # and saved again: PEFT then finds every layer that it looks for
    student.save_adapter(ours, tmp_path / "again", tmp_path / "adapter", ["lora"])
    again = peft.PeftModel.from_pretrained(student.load(base), tmp_path / "again")
    assert torch.allclose(logps(again.get_base_model(), batch), logps(ours, batch), atol=1e-5)
    saved_first, saved_again = (load_file(tmp_path / name / "adapter_model.safetensors")
                                for name in ("adapter", "again"))
    assert set(saved_first) == set(saved_again)


# ---------------------------------------------------------------- what merging loses

@pytest.mark.parametrize("std, least, most", [(5e-5, 0.9, 2), (5e-4, 0.2, 0.9), (0.05, 0.0, 0.05)])
def test_merging_into_bf16_says_how_much_of_the_change_is_lost(base, std, least, most):
    model = student.load(base, bf16=True)
    student.set_trainable(model, ["lora"])
    layers, exact, change = student.lora_layers(model), {}, {}
    torch.manual_seed(0)
    for name, layer in layers.items():
        torch.nn.init.normal_(layer.base.weight, std=0.02)
        torch.nn.init.normal_(layer.lora_A, std=0.01)
        torch.nn.init.normal_(layer.lora_B, std=std)
        change[name] = (4 * layer.lora_B.double() @ layer.lora_A.double()).detach()
        exact[name] = layer.base.weight.double() + change[name]
    lost = student.merge_lora(model)
    weights = dict(model.named_parameters())
    norm = lambda tensors: math.sqrt(sum(float(t.square().sum()) for t in tensors))
    errors = [weights[f"{name}.weight"].double() - exact[name] for name in exact]
    assert lost == pytest.approx(norm(errors) / norm(change.values()), rel=1e-3)
    assert least < lost < most


def test_merging_into_fp32_loses_nothing_and_nothing_of_nothing(base):
    assert student.merge_lora(trained(base)) < 1e-5
    model = student.load(base, bf16=True)
    student.set_trainable(model, ["lora"])
    assert student.merge_lora(model) == 0


LITTLE = ["--max_steps", "2", "--lora_dropout", "0"]


def run(stage, run_flags, out, capsys, *more):
    """Runs a stage on the tiny world. Returns what it printed."""
    words = [*run_flags[:-1], *more, "--output_dir", out]
    stage.run(stage.parse([str(word) for word in words]))
    return capsys.readouterr().out


@pytest.mark.parametrize("bf16", [True, False])
def test_the_end_of_a_lora_run_says_what_merging_lost(
        run_flags, base, tmp_path, capsys, bf16):
    out = tmp_path / "out"
    said = run(spd, run_flags, out, capsys, base, "--train", "lora", *LITTLE, "--learning_rate",
               "1e-6", "--min_learning_rate", "1e-7", "--bf16" if bf16 else "--no-bf16")
    lost = json.loads((out / "finished.json").read_text())["merge_error"]
    assert f"merging changed what LoRA adds to its layers by {lost:.2%}" in said
    warning = f"warning: {out}/student has lost"
    assert (warning in said) == bf16 == (lost > 0.05)
    assert not bf16 or f"--student {out}/adapter" in said.partition(warning)[2]


def test_without_lora_nothing_is_merged(run_flags, base, tmp_path, capsys):
    out = tmp_path / "out"
    assert "merging" not in run(spd, run_flags, out, capsys, base, "--train", "merger", *LITTLE)
    assert "merge_error" not in json.loads((out / "finished.json").read_text())
    assert not (out / "adapter").exists()


# ---------------------------------------------------------------- stages and commands take it

def test_a_stages_adapter_is_whole_and_can_be_served(
        run_flags, base, batch, task, tmp_path, capsys):
    out = tmp_path / "out"
    said = run(spd, run_flags, out, capsys, base, "--train", "lora,merger", *LITTLE, "--no-bf16",
               "--learning_rate", "1e-3")
    assert "has lost" not in said
    again = student.load(out / "adapter")
    assert torch.allclose(logps(again, batch), logps(student.load(out / "student"), batch),
                          atol=1e-3)
    merger = dict(student.load(out / "student").model.visual.merger.named_parameters())
    before = dict(student.load(base).model.visual.merger.named_parameters())
    for name, p in again.model.visual.merger.named_parameters():
        assert torch.equal(p, merger[name]) and not torch.equal(p, before[name])
    of_a_server = ("tokenizer.json", "preprocessor_config.json", "chat_template.json")
    assert all((out / "adapter" / name).exists() for name in of_a_server)
    assert adapter.processor_of(out / "adapter") == out / "adapter"
    with safe_open(out / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert "base_model.model.model.visual.merger.ln_q.weight" in file.keys()


@pytest.fixture
def pi_st(base, tmp_path):
    return saved(base, tmp_path / "pi_st", ["lora", "merger"])[1]


def test_critique_starts_from_an_adapter_and_refers_to_it(
        run_flags, base, pi_st, positives, batch, tmp_path, capsys):
    out = tmp_path / "out"
    of_it = ["--lora_r", 4, "--lora_alpha", 16, "--positives", positives, "--no-bf16",
             "--logging_steps", 1]
    run(apo, run_flags, out, capsys, pi_st, "--train", "lora", *LITTLE, *of_it)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(math.log(8), abs=1e-4)  # pi_theta = pi_st = base + LoRA
    after = student.load(out / "adapter")
    assert adapter.base_of(out / "adapter") == str(base)
    assert torch.allclose(logps(after, batch), logps(student.load(out / "student"), batch),
                          atol=1e-3)
    before = student.load(pi_st)
    assert not torch.equal(logps(after, batch), logps(before, batch))
    # it goes on from the adapter, not from LoRA of its own, and keeps what it held whole
    for name, layer in student.lora_layers(after).items():
        assert torch.allclose(layer.lora_B, student.lora_layers(before)[name].lora_B, atol=0.01)
    for name, p in before.model.visual.merger.named_parameters():
        assert torch.equal(p, after.model.visual.merger.get_parameter(name))


def test_what_trains_beside_a_loaded_adapter_is_saved_with_it(
        run_flags, pi_st, positives, batch, tmp_path, capsys):
    out = tmp_path / "out"
    run(apo, run_flags, out, capsys, pi_st, "--train", "vision", *LITTLE, "--positives", positives,
        "--no-bf16", "--no-merge")
    before, after = load_file(pi_st / "adapter_model.safetensors"), load_file(
        out / "adapter" / "adapter_model.safetensors")
    more = set(after) - set(before)
    assert more and all("visual.blocks" in key or "patch_embed" in key for key in more)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not torch.equal(logps(student.load(out / "adapter"), batch),
                           logps(student.load(pi_st), batch))


@pytest.mark.parametrize("flags, said", [
    (["--train", "lora"], "--lora_r 8 --lora_alpha 32: .*pi_st has r 4 and alpha 16, expected"),
    (["--train", "decoder"], "--train decoder: .*pi_st is an adapter, expected "),
    (["--train", "decoder,merger"], "--train decoder,merger: .*pi_st is an adapter, expected "),
])
@pytest.mark.parametrize("stage", [spd, apo])
def test_what_cannot_train_on_an_adapter_is_refused_before_any_work(
        run_flags, pi_st, positives, tmp_path, capsys, stage, flags, said):
    of_apo = ["--positives", positives] if stage is apo else []
    with pytest.raises(ValueError, match=said):
        run(stage, run_flags, tmp_path / "out", capsys, pi_st, *flags, *of_apo)
    assert not (tmp_path / "out").exists()


def test_compare_samples_from_an_adapter_what_it_samples_from_the_student_merged(
        run_flags, talker, task, world, tmp_path, capsys):
    _, folder = saved(talker, tmp_path / "adapter")
    processor = student.Processor(talker, task, world)
    model = student.load(folder)
    student.merge_lora(model)
    student.save_student(model, processor, tmp_path / "merged", "card")
    for name in ("adapter", "merged"):
        run(selfdistill, run_flags, tmp_path / f"of_{name}", capsys, tmp_path / name,
            "--max_new_tokens", 12, "--no-bf16")
    positives = [(tmp_path / f"of_{name}" / "positives.jsonl").read_text()
                 for name in ("adapter", "merged")]
    assert positives[0] == positives[1]


def test_the_closing_table_of_a_chain_without_merging_is_of_the_adapter(
        world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate, "run", lambda args: asked.append(args.student[-1]))
    made = {"student": tmp_path / "apo" / "student", "studies": world / "studies.jsonl",
            "images": world, "task_file": world / "task.json"}
    apo.closing_table(made, "paper", None)
    made["student"].mkdir(parents=True)
    apo.closing_table(made, "paper", None)
    assert [student.partition("=")[2] for student in asked] == [
        f"{tmp_path}/apo/adapter", f"{tmp_path}/apo/student"]


def test_the_other_commands_take_it(run_flags, world, pi_st, tmp_path, capsys):
    studies = ["--studies", world / "studies.jsonl", "--task_file", world / "task.json"]
    images = ["--images", world]
    commands = (
        (evaluate, ["classify", *studies, *images, "--student", pi_st, "--split", "test",
                    "--bootstrap", 0, "--no-bf16"]),
        (answers, [*studies, *images, "--student", pi_st, "--split", "test", "--max_new_tokens", 4,
                   "--output", tmp_path / "answers.jsonl", "--no-bf16"]),
        (drift, [*studies, *images, "--student", pi_st, "--permutations", 20, "--split", "train",
                 "--no-bf16"]),
    )
    for command, words in commands:
        command.run(command.parse([str(word) for word in words]))
