"""The packed step against K separate forwards, what it scores, what trains, and PEFT's adapter."""

import json

import pytest
import torch

import data
import student
from apo import response_logps

SPECIAL = "effusion <|im_end|> is <|image_pad|> severe. the image shows more"


@pytest.fixture
def examples(processor, studies, task):
    """Three studies: ragged texts, an absent teacher, special tokens, an empty text, two images."""
    texts = [["edema is absent", SPECIAL, "a"],
             ["findings : none", None, "key points : x"],
             ["", "assessment - edema : mild , pneumonia : large", "looks"]]
    two = data.Study("two", studies[2].images + studies[3].images, {}, {})
    return [processor(study, data.student_prompt(study, task), t)
            for study, t in zip([studies[0], studies[1], two], texts)]


def separate_logps(model, examples):
    """(B, K): one plain forward per response through `response_logps`, the form that people copy.

    It is 0 where a teacher is absent.
    """
    rows = []
    for example in examples:
        for response in example["responses"]:
            if response is None:
                rows.append(torch.zeros(1))
                continue
            ids = torch.cat([example["prefix_ids"], response])[None]
            logits = model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=example["pixel_values"],
                image_grid_thw=example["image_grid_thw"],
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
            ).logits
            labels = ids.clone()
            labels[:, :len(example["prefix_ids"])] = -100
            rows.append(response_logps(logits, labels))
    return torch.cat(rows).view(len(examples), -1)


def close(a, b, tolerance):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item() < tolerance


def test_packed_log_probs_equal_separate_forwards(model, examples):
    (logps,) = student.PackedStudent(model)(student.pack(examples, model))
    assert torch.allclose(logps, separate_logps(model, examples), rtol=1e-6, atol=0)
    assert logps[1, 1] == 0 and logps.dtype == torch.float32


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_separate_forwards(model, examples, checkpointing):
    coefficients = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    parameters = student.set_trainable(model, ["decoder", "merger", "vision"])
    (separate_logps(model, examples) * coefficients).sum().backward()
    want = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    if checkpointing:
        student.enable_gradient_checkpointing(model)
    model.train()
    (logps,) = student.PackedStudent(model)(student.pack(examples, model))
    (logps * coefficients).sum().backward()
    assert len(want) == len(list(model.named_parameters()))
    for name, p in parameters.items():
        assert close(p.grad, want[name], 1e-5), name


def test_branches_do_not_see_each_other(model, examples):
    (before,) = student.PackedStudent(model)(student.pack(examples, model))
    long = torch.cat([examples[1]["responses"][0], examples[0]["responses"][2]])
    examples[0]["responses"][2] = long
    (after,) = student.PackedStudent(model)(student.pack(examples, model))
    assert torch.allclose(before[0, :2], after[0, :2], rtol=1e-6)
    assert not torch.allclose(before[0, 2], after[0, 2], rtol=1e-3)


def test_the_scored_tokens_are_exactly_the_responses(model, examples, processor):
    batch = student.pack(examples, model)
    flat = [r for example in examples for r in example["responses"] if r is not None]
    scored = [batch["targets"][batch["owner"] == o] for o in batch["owner"].unique()]
    assert [s.tolist() for s in scored] == [r.tolist() for r in flat]
    assert batch["tokens"].sum() == len(batch["targets"]) and (batch["tokens"][1, 1] == 0)
    texts = [t.tolist() for t in scored]
    assert all(ids[-1] == processor.end and processor.end not in ids[:-1] for ids in texts)
    assert processor.text(scored[1]) == SPECIAL


def test_each_target_is_predicted_from_the_token_before_it(model, examples):
    batch = student.pack(examples, model)
    ids, branch, S = batch["ids"].flatten(), batch["branch"].flatten(), batch["ids"].shape[1]
    for example, row in zip(examples, range(3)):
        assert torch.equal(batch["ids"][row, :len(example["prefix_ids"])], example["prefix_ids"])
    predicted = (batch[key].tolist() for key in ("targets", "source", "owner"))
    for target, source, owner in zip(*predicted):
        assert source // S == owner // 3
        # absent responses have no branch
        own = (batch["tokens"][owner // 3, :owner % 3] > 0).sum() + 1
        assert branch[source] in (0, own)
        if branch[source] == 0:
            assert source % S == len(examples[owner // 3]["prefix_ids"]) - 1
        elif source + 1 < len(ids) and branch[source + 1] == branch[source]:
            assert ids[source + 1] == target


def test_positions_restart_behind_the_prefix(model, examples):
    batch = student.pack(examples, model)
    for b, example in enumerate(examples):
        P = len(example["prefix_ids"])
        behind = batch["position_ids"][:, b, :P].max() + 1
        for u in batch["branch"][b].unique():
            if u > 0:
                positions = batch["position_ids"][:, b, batch["branch"][b] == u]
                expected = behind + torch.arange(positions.shape[1])
                assert torch.equal(positions, expected.expand(3, -1))


def test_chunks_of_the_head_do_not_change_the_sum(model, examples, monkeypatch):
    batch = student.pack(examples, model)
    (whole,) = student.PackedStudent(model)(batch)
    monkeypatch.setattr(student, "LM_HEAD_CHUNK", 7)
    (chunked,) = student.PackedStudent(model)(batch)
    assert torch.allclose(whole, chunked, rtol=1e-6)


def test_bf16_is_close_to_fp32(base, examples):
    (exact,) = student.PackedStudent(student.load(base))(student.pack(examples, student.load(base)))
    model = student.load(base, torch.bfloat16)
    (rough,) = student.PackedStudent(model)(student.pack(examples, model))
    assert rough.dtype == torch.float32
    assert torch.allclose(rough, exact, rtol=0.03, atol=0.3)


# --- what trains

@pytest.mark.parametrize("train, expected", [
    (["merger"], lambda n: "visual.merger" in n),
    (["vision"], lambda n: "visual" in n and "merger" not in n),
    (["decoder"], lambda n: "visual" not in n),
    (["lora"], lambda n: "lora_" in n),
    (["merger", "lora"], lambda n: "visual.merger" in n or "lora_" in n),
])
def test_train_selects_exactly_these_parameters(model, train, expected):
    chosen = student.set_trainable(model, train)
    assert set(chosen) == {name for name, _ in model.named_parameters() if expected(name)}
    assert chosen
    assert all(p.requires_grad == (name in chosen) for name, p in model.named_parameters())


def test_lora_sits_on_all_decoder_linears_and_nowhere_else(model):
    student.set_trainable(model, ["lora"])
    layers = student.lora_layers(model)
    assert len(layers) == 7 * model.config.text_config.num_hidden_layers
    assert all(name.startswith("model.language_model.layers.") for name in layers)


@pytest.mark.parametrize("flag", ["", "all", "lora,decoder", "lora,"])
def test_an_unknown_choice_of_what_trains_is_refused(flag):
    with pytest.raises(ValueError, match="--train"):
        student.parse_train(flag)


def test_a_frozen_tower_gets_no_backward_pass(model, examples):
    """Gradient checkpointing must not drag the gradient through the frozen vision tower.

    transformers hooks the tower's patch embedding.
    """
    student.set_trainable(model, ["lora"])
    student.enable_gradient_checkpointing(model)
    model.train()
    features = []
    listen = lambda _, __, out: features.append(out.requires_grad)
    model.model.visual.merger.register_forward_hook(listen)
    (logps,) = student.PackedStudent(model)(student.pack(examples, model))
    logps.sum().backward()
    assert features[0] is False


def scatter_lora(model):
    for layer in student.lora_layers(model).values():
        layer.lora_B.data.normal_(std=0.05)


def test_a_new_adapter_changes_nothing_and_a_merged_one_changes_nothing_more(model, examples):
    batch = student.pack(examples, model)
    packed = student.PackedStudent(model)
    (before,) = packed(batch)
    student.set_trainable(model, ["lora"], seed=1)
    assert torch.equal(packed(batch)[0], before)
    scatter_lora(model)
    (adapted,) = packed(batch)
    assert not torch.allclose(adapted, before, rtol=1e-3)
    student.merge_lora(model)
    assert not student.lora_layers(model)
    assert torch.allclose(packed(batch)[0], adapted, rtol=1e-5)


def test_peft_loads_the_adapter_and_gives_the_same_logits(base, examples, tmp_path):
    peft = pytest.importorskip("peft", reason="the oracle peft is not installed")
    model = student.load(base)
    student.set_trainable(model, ["lora"], r=4, alpha=16)
    scatter_lora(model)
    student.save_adapter(model, tmp_path / "adapter", base, ["lora"])
    theirs = peft.PeftModel.from_pretrained(student.load(base), tmp_path / "adapter").eval()
    assert torch.equal(separate_logps(model, examples), separate_logps(theirs, examples))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_a_saved_student_is_a_folder_that_loads_as_it_is(
        model, examples, processor, tmp_path, task, world):
    student.set_trainable(model, ["lora"])
    scatter_lora(model)
    student.merge_lora(model)
    student.save_student(model, processor, tmp_path / "out", "---\nlicense: other\n---\n")
    again = student.load(tmp_path / "out")
    assert torch.equal(separate_logps(again, examples), separate_logps(model, examples))
    fresh = student.Processor(tmp_path / "out", task, world)
    assert fresh.tokens("edema is mild") == processor.tokens("edema is mild")
    assert {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "preprocessor_config.json", "generation_config.json", "README.md",
    } <= {p.name for p in (tmp_path / "out").iterdir()}
