"""Which students are taken, every size of Qwen2.5-VL and no other family; and what is saved."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from chat_server import ServersProcessor
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import apo
import data
import sampling
import selfdistill
import spd
import student
from runtime.checkpoint import fingerprint, save_checkpoint
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


def copy_of(folder, to):
    """A copy of a student's folder whose files are its own."""
    return Path(shutil.copytree(folder, to))


def change_json(file, **changes):
    """Changes keys of a JSON file, which is made where it is not there."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | changes))


@pytest.mark.parametrize("key, value, method", [
    ("quantization_config", {"quant_method": "awq", "bits": 4}, "awq"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "gptq"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ("quantization_config", {"quant_method": "fp8"}, "fp8"),
    ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ("quantization_config", {"bits": 4}, "by an unnamed method"),
    ("quantization_config", "int8", "by an unnamed method"),
])
def test_a_quantised_student_is_refused_with_the_way(base, tmp_path, key, value, method):
    folder = copy_of(base, tmp_path / "quantised")
    change_json(folder / "config.json", **{key: value})
    with pytest.raises(ValueError, match=rf"^--student {folder} is quantised \({method}\), "
                       "expected the folder or hub id of the same model unquantised"):
        student.load(folder)
    change_json(folder / "config.json", **{key: None})
    student.require_family(folder)


# name of a weight in the file -> what is there in its place, and what is said of it
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
OTHER_WEIGHTS = {
    "one is missing": ({Q: None}, "model.language_model.layers.0.self_attn.q_proj.weight is "
                       "missing"),
    "one of the tower is missing": ({"visual.merger.ln_q.weight": None},
                                    "model.visual.merger.ln_q.weight is missing"),
    "the embedding is missing, to which the head is tied": (
        {"model.embed_tokens.weight": None},
        "lm_head.weight is missing, model.language_model.embed_tokens.weight is missing"),
    "one is unexpected": ({"model.layers.77.x\x1b[2J": torch.zeros(2)},
                          r"model.language_model.layers.77.x\x1b[2J is unexpected"),
    "one has another shape": ({NORM: torch.zeros(2)}, "model.language_model.norm.weight has the "
                              "shape (2,), expected (96,)"),
    "all kinds at once": (
        {Q: None, "model.layers.77.x": torch.zeros(2), NORM: torch.zeros(2, 3),
         "visual.merger.ln_q.weight": torch.zeros(1)},
        "model.language_model.layers.0.self_attn.q_proj.weight is missing, "
        "model.language_model.layers.77.x is unexpected, model.language_model.norm.weight has the "
        "shape (2, 3), expected (96,) and 1 more faults"),
}


def with_weights(base, folder, changes):
    """A copy of a student of whose weights some are others; None: it is not there."""
    copy_of(base, folder)
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: value for name, value in tensors.items() if value is not None},
              folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("case", OTHER_WEIGHTS)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(base, tmp_path, case):
    """transformers would draw what is missing at random, without a seed."""
    changes, says = OTHER_WEIGHTS[case]
    folder = with_weights(base, tmp_path / "other", changes)
    with pytest.raises(ValueError, match=re.escape(
            f"--student {folder}: expected the weights that its config.json describes, found that "
            f"{says}") + "$"):
        student.load(folder)


def test_a_shard_that_the_index_does_not_have_is_missed(base, tmp_path):
    folder = copy_of(base, tmp_path / "shards")
    student.load(base).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    student.load(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][NORM]
    lost = {file for file in set(index["weight_map"].values()) if "00002-of" in file}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items()
                           if file not in lost}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="found that .* is missing"):
        student.load(folder)


def test_a_tied_head_may_be_there_or_not(base, tmp_path):
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    for name, changes in {
            "both": {"lm_head.weight": head.clone()},
            "the head alone": {"lm_head.weight": head, "model.embed_tokens.weight": None}}.items():
        model = student.load(with_weights(base, tmp_path / name, changes))
        assert torch.equal(model.lm_head.weight, head)
        assert torch.equal(model.model.language_model.embed_tokens.weight, head)


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


# --- the versions of transformers

@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.4.0", "5.5.3", "5.5.0.dev0"])
def test_an_older_transformers_is_refused(version):
    with pytest.raises(SystemExit, match=rf"^transformers {version}: expected 5.5.4 to 5.24, "):
        student.require_tested(version)


@pytest.mark.parametrize("version", ["5.5.4", "5.10.0", "5.17.0", "5.24.0", "5.24.3"])
def test_a_tested_transformers_passes_without_a_word(version, recwarn):
    student.require_tested(version)
    assert not recwarn


@pytest.mark.parametrize("version", ["5.25.0", "6.0.0", "10.0"])
def test_a_newer_transformers_is_warned_of_on_rank_0(version, monkeypatch, recwarn):
    monkeypatch.setenv("RANK", "1")
    student.require_tested(version)
    assert not recwarn
    monkeypatch.setenv("RANK", "0")
    student.require_tested(version)
    (warning,) = recwarn
    assert str(warning.message).startswith(f"transformers {version}: expected 5.5.4 to 5.24, ")


def test_a_command_ends_with_one_line_under_an_older_transformers(tmp_path):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text('__version__ = "4.30.0"\n')
    done = subprocess.run(
        [sys.executable, ROOT / "spd.py", "--help"], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"transformers 4.30.0: expected .*\n", done.stderr), done.stderr


def test_the_tested_versions_stand_in_readme_and_hold_the_pinned_one():
    pinned = re.search("transformers==(.*)", (ROOT / "requirements.txt").read_text())[1]
    student.require_tested(pinned)
    assert "transformers 5.5.4 to 5.24" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (student.OLDEST, student.NEWEST) == ((5, 5, 4), (5, 24))


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


# --- what a server makes of a saved student

@pytest.fixture(scope="module", params=["the scale model's base", "a trained student"])
def folder(request, base, processor, tmp_path_factory):
    """A student's folder as it is written."""
    path = tmp_path_factory.mktemp("saved")
    if request.param == "a trained student":
        student.save_student(student.load(base), processor, path, "card")
    else:
        scale_base.write_student(path)
    return path


@pytest.mark.parametrize("sizes", [[(112, 140)], [(300, 90), (112, 140)]])
@pytest.mark.parametrize("system", ["", "You are a helpful assistant.", "Be brief.\n\n No 'if'. "])
def test_a_server_builds_our_prompt_token_for_token(folder, tmp_path, system, sizes):
    prompts = {**scale_base.TASK["prompts"], "system": system}
    task = data.make_task({**scale_base.TASK, "prompts": prompts}, "x")
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (200, i, 0)).save(tmp_path / f"{i}.png")
    study = data.Study("s", tuple(f"{i}.png" for i in range(len(sizes))), {}, {})
    ours = student.Processor(folder, task, tmp_path)
    server = ServersProcessor.from_pretrained(folder)
    films = [data.load_image(path, tmp_path) for path in study.images]
    for text in ("Edema?", "\n leading and trailing blanks \n\n", " 3 < 4 {{ x }} {% if %}"):
        example = ours(study, text)
        content = [*({"type": "image_url", "image_url": {"url": "data:,"}} for _ in films),
                   {"type": "text", "text": text}]
        chat = [{"role": "user", "content": content}]
        if system:
            chat.insert(0, {"role": "system", "content": system})
        theirs = server.encode(chat, films)
        assert theirs["input_ids"][0].tolist() == example["prefix_ids"].tolist()
        assert torch.equal(theirs["image_grid_thw"], example["image_grid_thw"])
        assert torch.equal(theirs["pixel_values"], example["pixel_values"])


@pytest.mark.parametrize("empty", ["", [{"type": "text", "text": ""}]])
def test_an_empty_system_message_is_none(folder, empty):
    server = ServersProcessor.from_pretrained(folder)
    user = {"role": "user", "content": "Edema?"}
    with_it, without = ([{"role": "system", "content": empty}, user], [user])
    assert server.apply_chat_template(with_it) == server.apply_chat_template(without)
    turns = [user, {"role": "assistant", "content": "No."}]
    assert server.apply_chat_template(turns) == (
        "<|im_start|>user\nEdema?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n")


def test_the_template_of_the_student_before_is_not_kept(base, task, tmp_path):
    """The folder of Qwen2.5-VL has a text-only template for its tokenizer, and another one."""
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    for file in base.iterdir():
        (before / file.name).write_bytes(file.read_bytes())
    (before / "chat_template.json").write_text('{"chat_template": "of the processor"}')
    settings = json.loads((before / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{{ messages[0]['content'] + 'of the tokenizer' }}"
    (before / "tokenizer_config.json").write_text(json.dumps(settings))
    student.save_processor(student.Processor(before, task), after)
    assert transformers.AutoTokenizer.from_pretrained(after).chat_template == student.CHAT_TEMPLATE
    assert ServersProcessor.from_pretrained(after).chat_template == student.CHAT_TEMPLATE
    assert "of the" not in "".join(file.read_text() for file in after.iterdir())


def test_its_files_are_those_that_older_readers_look_for(folder, base):
    """transformers 4 takes no list as extra_special_tokens; without config.json, as beside an
    adapter, AutoProcessor needs the processor's class."""
    read = lambda name: json.loads((folder / name).read_text())
    assert "extra_special_tokens" not in read("tokenizer_config.json")
    assert read("chat_template.json") == {"chat_template": student.CHAT_TEMPLATE}
    assert read("processor_config.json") == {"processor_class": "Qwen2_5_VLProcessor"}
    assert read("preprocessor_config.json")["image_processor_type"] == "Qwen2VLImageProcessor"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert {"<|im_start|>", "<|im_end|>", "<|image_pad|>"} <= set(tokenizer.all_special_tokens)


def test_either_end_token_ends_a_text_here_and_in_its_generation_config(base, processor, tmp_path):
    model = student.load(base)
    student.save_student(model, processor, tmp_path, "card")
    ends = [processor.end, processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")]
    saved = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == processor.ends == ends and saved.pad_token_id == processor.pad
    words = processor.tokens("mild edema")
    assert processor.text([*words, ends[0]]) == processor.text([*words, ends[1]]) == "mild edema"
    # what stands between is not glued over
    for marker in (*ends, processor.start):
        text = processor.text([*words, marker, *words, ends[0]])
        assert selfdistill.fault(text, "stop") == "holds a chat marker"


INVALID = {"do_sample": False, "temperature": 0.7, "top_p": 0.9}  # transformers saves no such file


def test_what_a_folder_says_of_generating_is_neither_used_nor_saved(
        base, task, world, studies, tmp_path):
    folder = copy_of(base, tmp_path / "before")
    change_json(folder / "generation_config.json", **INVALID, no_repeat_ngram_size=1)
    model, processor = student.load(folder), student.Processor(folder, task, world)
    examples = [processor(study, data.student_prompt(study, task)) for study in studies[:3]]
    one, other = (sampling.sample(some, processor, examples, [0, 1, 2], 0.0, 1.0, 24)
                  for some in (model, student.load(base)))
    assert [ids.tolist() for ids, _ in one] == [ids.tolist() for ids, _ in other]
    student.save_student(model, processor, tmp_path / "after", "card")
    saved = json.loads((tmp_path / "after" / "generation_config.json").read_text())
    saved.pop("transformers_version")
    own = {"_from_model_config", "eos_token_id", "pad_token_id"}
    assert set(saved) <= own and saved["eos_token_id"] == processor.ends


# fields that `sample` leaves open, with values that change texts
OF_GENERATING = [
    {"num_beams": 2, "num_return_sequences": 2}, {"suppress_tokens": list(range(20, 200))},
    {"no_repeat_ngram_size": 1}, {"min_new_tokens": 24}, {"max_time": 1e-9},
    {"guidance_scale": 9.0}, {"sequence_bias": [[[i], -99.0] for i in range(20, 200)]},
    {"return_dict_in_generate": True, "output_logits": True}]


def say_of_generating(folder, place, values):
    """Puts fields into generation_config.json, config.json, or the text_config of that."""
    file = folder / ("config.json" if place == "text_config" else place)
    config = json.loads(file.read_text()) if file.exists() else {}
    (config["text_config"] if place == "text_config" else config).update(values)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
def test_no_field_of_generating_comes_from_a_folder(
        base, processor, studies, task, tmp_path, place):
    """With num_beams and num_return_sequences study i had the answer of study i // 2."""
    examples = [processor(study, data.student_prompt(study, task)) for study in studies[:3]]

    def texts(folder):
        model = student.load(folder)
        assert vars(model.generation_config) == vars(transformers.GenerationConfig())
        drawn = sampling.sample(model, processor, examples, [0, 1, 2], 1.0, 0.9, 6)
        greedy = sampling.sample(model, processor, examples, [0, 1, 2], 0.0, 1.0, 6)
        return [(ids.tolist(), finish) for ids, finish in drawn + greedy]

    expected = texts(base)
    for values in OF_GENERATING:
        folder = copy_of(base, tmp_path / min(values))
        say_of_generating(folder, place, values)
        assert texts(folder) == expected, values


def test_every_field_of_generating_is_reset(base, tmp_path):
    """Also those that a later transformers may have, in the three places at once."""
    fields = [name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")]
    assert {"num_beams", "max_time", "min_new_tokens", "suppress_tokens"} <= set(fields)
    folder = copy_of(base, tmp_path / "folder")
    say_of_generating(folder, "generation_config.json", dict.fromkeys(fields, 2))
    of_the_model = {"use_cache", "output_hidden_states", "output_attentions", "pad_token_id",
                    "eos_token_id", "bos_token_id", "transformers_version"}
    no_2 = {"assistant_ensemble_weight", "compile_config", "cache_implementation",
            "watermarking_config"}  # of which transformers refuses a 2 itself
    others = dict.fromkeys({*fields} - of_the_model - no_2, 2)
    say_of_generating(folder, "config.json", others)
    say_of_generating(folder, "text_config", others)
    reset = student.load(folder).generation_config
    assert vars(reset) == vars(transformers.GenerationConfig())


OF_NO_FIGURE = {"generation_config.json": "{}", "README.md": "card", "chat_template.json": "{}",
                "chat_template.jinja": "x", "video_preprocessor_config.json": "{}", "notes.txt": "",
                "trainer_state.json": "{}"}


@pytest.mark.parametrize("name", OF_NO_FIGURE)
def test_a_file_that_changes_no_figure_is_no_part_of_the_fingerprint(base, tmp_path, name):
    folder = copy_of(base, tmp_path / "copy")
    before = fingerprint(folder)
    (folder / name).write_text(OF_NO_FIGURE[name] + " ")
    assert fingerprint(folder) == before


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model-00002-of-00002.safetensors",
    "model.safetensors.index.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "adapter_config.json"])
def test_a_file_that_changes_a_figure_is_a_part_of_the_fingerprint(base, tmp_path, name):
    folder = copy_of(base, tmp_path / "copy")
    before = fingerprint(folder)
    with open(folder / name, "a") as file:
        file.write(" ")
    assert fingerprint(folder) != before


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_saved_weights_have_the_permissions_of_any_file(base, processor, tmp_path, umask):
    before = os.umask(umask)
    try:
        model = student.load(base)
        student.save_student(model, processor, tmp_path / "student", "card")
        parameters = student.set_trainable(model, ["lora"])
        student.save_adapter(model, tmp_path / "adapter", base, ["lora"])
        save_checkpoint(tmp_path, 1, parameters, torch.optim.AdamW(parameters.values()), {}, 1)
    finally:
        assert os.umask(before) == umask
    weights = list(tmp_path.rglob("*.safetensors"))
    assert len(weights) == 4
    modes = {file.name: file.stat().st_mode & 0o777 for file in weights}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


# ------------------------------------------------------------------------ the size of its images

def bound_of(folder):
    """What preprocessor_config.json of a folder allows, in pixels."""
    config = json.loads((folder / "preprocessor_config.json").read_text())
    return config["size"]["longest_edge"]


def with_processor(base, folder, **change):
    """A copy of the student with other settings of its image processor. Returns the folder."""
    shutil.copytree(base, folder)
    config = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps({**config, **change}))
    return folder


@pytest.fixture
def bounded(base, tmp_path):
    """A copy of the student whose image processor allows 200 tokens an image."""
    size = {"shortest_edge": 56 * 56, "longest_edge": 200 * 784}
    return with_processor(base, tmp_path / "bounded", size=size, max_pixels=200 * 784)


def test_more_pixels_than_the_folder_allows_are_refused_and_none_given_are_as_many(
        bounded, base, task):
    assert student.Processor(base, task).max_pixels == student.MAX_PIXELS < bound_of(base)
    assert student.Processor(bounded, task).max_pixels == 200 * 784
    assert student.Processor(bounded, task, max_pixels=200 * 784).max_pixels == 200 * 784
    with pytest.raises(ValueError, match=re.escape(
            f"--max_pixels {200 * 784 + 1}: {bounded}/preprocessor_config.json allows {200 * 784}, "
            f"expected {200 * 784} or less")):
        student.Processor(bounded, task, max_pixels=200 * 784 + 1)


@pytest.mark.parametrize("max_pixels", [None, 784_000])
def test_a_folder_that_enlarges_an_image_above_max_pixels_is_refused(base, task, tmp_path,
                                                                     max_pixels):
    changed = with_processor(base, tmp_path / "x", size={"shortest_edge": 802_817,
                                                         "longest_edge": 10 ** 9})
    with pytest.raises(ValueError, match=re.escape(
            f"--max_pixels {max_pixels or student.MAX_PIXELS}: {changed}/preprocessor_config.json "
            "enlarges an image to 802817, expected 802817 or more")):
        student.Processor(changed, task, max_pixels=max_pixels)
    assert student.Processor(changed, task, max_pixels=802_817).max_pixels == 802_817


@pytest.mark.parametrize("change, message", [
    ({"patch_size": 5000}, "patch_size is 5000, expected 14"),
    ({"merge_size": 200}, "merge_size is 200, expected 2"),
    ({"temporal_patch_size": 900}, "temporal_patch_size is 900, expected 2"),
    ({"do_resize": False}, "do_resize is False, expected True"),
    ({"size": {"shortest_edge": "1", "longest_edge": 10 ** 6}}, "expected numbers of pixels"),
    ({"size": {"shortest_edge": -1, "longest_edge": 10 ** 6}}, "expected numbers of pixels"),
    ({"size": {"shortest_edge": 10 ** 7, "longest_edge": 10 ** 6}}, "expected numbers of pixels")])
def test_nothing_in_a_folder_turns_max_pixels_off(base, task, tmp_path, change, message):
    changed = with_processor(base, tmp_path / "x", **change)
    with pytest.raises(ValueError, match=rf"{changed}/preprocessor_config.json: .*{message}"):
        student.Processor(changed, task)


@pytest.mark.parametrize("max_pixels", [None, 30 * 784])
def test_a_saved_processor_keeps_the_bound_of_its_base(bounded, task, tmp_path, max_pixels):
    processor = student.Processor(bounded, task, max_pixels=max_pixels)
    student.save_processor(processor, tmp_path)
    assert bound_of(tmp_path) == 200 * 784
    assert processor.image_processor.size["longest_edge"] == processor.max_pixels
