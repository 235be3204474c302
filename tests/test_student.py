"""Which students are taken: every size of Qwen2.5-VL, and no other family."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import apo
import data
import selfdistill
import spd
import student
from scale_model import base as scale_base

# hidden, layers, heads, kv heads, intermediate; the tower's intermediate; tied: the published
# config.json of each size
PUBLISHED = {
    "3B": (2048, 36, 16, 2, 11008, 3420, True),
    "7B": (3584, 28, 28, 4, 18944, 3420, False),
    "32B": (5120, 64, 40, 8, 27648, 3456, False),
    "72B": (8192, 80, 64, 8, 29568, 3456, False),
}


def config_of(size):
    hidden, layers, heads, kv_heads, intermediate, tower, tied = PUBLISHED[size]
    text = dict(
        vocab_size=152_064 if not tied else 151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        rope_parameters=dict(
            rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]))
    vision = dict(
        depth=32, hidden_size=1280, intermediate_size=tower, num_heads=16,
        out_hidden_size=hidden, fullatt_block_indexes=[7, 15, 23, 31])
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=tied)


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_part_is_found_in_every_published_size(size):
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            config_of(size), dtype=torch.bfloat16)
    hidden, layers, *_ = PUBLISHED[size]
    count = lambda *train: sum(p.numel() for p in student.set_trainable(model, train).values())
    merger = count("merger")
    assert merger == 5120 * 5120 + 5120 + 5120 * hidden + hidden + 1280
    assert count("decoder", "merger", "vision") == sum(p.numel() for p in model.parameters())
    adapters = student.set_trainable(model, ["lora"])
    assert len(adapters) == layers * 7 * 2 and all(".language_model." in name for name in adapters)


@pytest.mark.parametrize("sizes", [
    dict(layers=1, width=32, heads=2, kv_heads=1),
    dict(layers=4, width=64, heads=8, kv_heads=8, vision_layers=3),
])
@pytest.mark.parametrize("tied", [True, False])
def test_another_size_trains_and_comes_back_from_its_folder(
        tmp_path, studies, task, world, sizes, tied):
    texts = [text for s in studies for text in s.trajectories.values()]
    model, tokenizer = scale_base.build_student(1, texts, **sizes)
    if not tied:
        model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 0.9)
    scale_base.save_student(tmp_path / "base", model, tokenizer)
    model = student.load(tmp_path / "base")
    processor = student.Processor(tmp_path / "base", task, world)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tied

    def logps(model):
        example = processor(studies[0], "list", ["edema mild", "edema severe"])
        return student.PackedStudent(model)(student.pack([example], model))[0]
    student.set_trainable(model, ["decoder", "merger"])
    logps(model).sum().backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-3 * p.grad
    student.save_student(model, processor, tmp_path / "trained", "card\n")
    assert torch.equal(logps(student.load(tmp_path / "trained")), logps(model))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava", "something_new", None])
def test_another_family_is_refused_with_what_would_have_to_be_true(base, tmp_path, family):
    folder = tmp_path / "other"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    config |= {"model_type": family} if family else {}
    (folder / "config.json").write_text(json.dumps(config))
    message = (
        rf"{folder} is a {family or 'model without'}.*expected a Qwen2.5-VL"
        ".*would have to be true.*4-D mask")
    with pytest.raises(ValueError, match=message):
        student.load(folder)


@pytest.mark.parametrize("stage", [spd, selfdistill, apo])
def test_a_stage_refuses_it_before_any_work(stage, tmp_path, run_flags):
    folder = tmp_path / "other"
    folder.mkdir()
    # no tokenizer, no weights: nothing else is looked at
    (folder / "config.json").write_text('{"model_type": "llava"}')
    own = ["--positives", run_flags[3]] if stage is apo else []
    flags = [*run_flags[:-1], folder, "--output_dir", tmp_path / "run", *own]
    with pytest.raises(ValueError, match=rf"--student {folder} is a llava, expected a Qwen2.5-VL"):
        stage.run(stage.parse([str(flag) for flag in flags]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lengths, budget, kept", [
    ([10, 20, 30], 100, [10, 20, 30]),
    ([10, 20, 30], 60, [10, 20, 30]),
    ([10, 20, 30], 45, [10, 17, 18]),
    ([50, 10, 50], 60, [25, 10, 25]),
    ([30, 30], 10, [5, 5]),
    ([], 10, []),
    ([7], 3, [3]),
])
def test_the_longest_responses_give_way_first(lengths, budget, kept):
    assert student.shorten_longest(lengths, budget) == kept


def test_lengths_from_the_header_equal_the_encoded_study(processor, studies, task):
    study = studies[0]
    example = processor(study, data.student_prompt(study, task), study.trajectories.values())
    prompt = data.student_prompt(study, task)
    prefix, lengths = processor.lengths(study, prompt, study.trajectories.values())
    assert prefix == len(example["prefix_ids"])
    assert lengths == [len(r) for r in example["responses"]]


def test_saved_weights_have_the_hubs_names(base, model, processor, tmp_path):
    """transformers writes what vLLM's Qwen2.5-VL mapping reads.

    That is visual.*, model.layers.*, model.embed_tokens, lm_head (here tied).
    """
    student.save_student(model, processor, tmp_path / "out", "card")
    names = set(load_file(tmp_path / "out" / "model.safetensors"))
    assert {
        "visual.patch_embed.proj.weight",
        "visual.merger.mlp.0.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.norm.weight",
        "model.embed_tokens.weight",
    } <= names
    known = ("visual.", "model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    assert all(name.startswith(known) for name in names)
