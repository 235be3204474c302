"""The tiny student of the scale model: the real model class with 0.66 M parameters, and how it was pre-trained.

Qwen is pre-trained, so the tiny student is too, on films and reports of its own: to describe signs in words that name no
diagnosis, to read several reports, and to write what most of them say. That last skill is privileged help which the paper's
student does not get from us, and it fades in stage 1 unless a little of it is replayed there (replay.jsonl).
"""

import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as deserialise
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import data
import student
from scale_model.world import PRIOR, SIZE, TASK, TEACHERS, draw_film, draw_nuisance, imagine, named, plurality, speak, write

# ------------------------------------------------------------------------------------------------------ the tiny student

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BASE = Path(__file__).with_name("base.safetensors")
BASE_SHA256 = "b0d29aca089efaa02bb785e929dc2ac94ca4d49f7a34519a4de6baf12db48e94"


def build_student(seed, texts, vocabulary=700, vision_layers=2, vision_width=64, layers=3, width=96, heads=4, kv_heads=2,
                  initializer_range=0.15, rope_theta=1e6):
    """A random student of the real class. Sizes in layers, units and heads; 0.66 M parameters as they stand; with Qwen's own
    initializer_range of 0.02 a model this small learns to read its context far slower. texts: what the byte-level BPE is trained on.
    Returns (Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer).
    """
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL_TOKENS))
    tokenizer = blank.train_new_from_iterator(texts, vocab_size=vocabulary)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    rotary = width // heads // 2  # pairs of a head; M-RoPE shares them among time, row and column
    row = (rotary - rotary // 4) // 2
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048, initializer_range=initializer_range,
                rope_parameters=dict(rope_type="default", rope_theta=rope_theta, mrope_section=[rotary - 2 * row, row, row]),
                bos_token_id=None, eos_token_id=token["<|im_end|>"], pad_token_id=token["<|endoftext|>"])
    vision = dict(depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width, num_heads=4, out_hidden_size=width,
                  patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=SIZE, fullatt_block_indexes=[vision_layers - 1],
                  initializer_range=initializer_range)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, initializer_range=initializer_range,
                              image_token_id=token["<|image_pad|>"], video_token_id=token["<|video_pad|>"],
                              vision_start_token_id=token["<|vision_start|>"], vision_end_token_id=token["<|vision_end|>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def save_student(folder, model, tokenizer):
    """Writes model, tokenizer and image processor as a folder that from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)


def pack_student(folder, file):
    """A student's folder -> one file: weights in fp16 without the tied head, the folder's JSON files as its metadata."""
    weights = {name: tensor.half() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    texts = {path.name: path.read_text() for path in sorted(Path(folder).glob("*.json"))}
    write(file, serialise(weights, metadata={"files": json.dumps(texts)}))


def write_student(folder, file=BASE, sha256=BASE_SHA256):
    """The base student as a folder that from_pretrained loads, from the one file that ships. sha256 None accepts any file.
    Raises ValueError if the file's digest is not `sha256`."""
    content = Path(file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{file}: sha256 is {digest}, expected {sha256}: not the base student of this version of scale_model")
    header = int.from_bytes(content[:8], "little")                              # safetensors: length of the JSON header, header, tensors
    texts = json.loads(json.loads(content[8:8 + header])["__metadata__"]["files"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float() for name, tensor in deserialise(content).items()}
    write(folder / "model.safetensors", serialise(weights, metadata={"format": "pt"}))
    for name, text in texts.items():
        write(folder / Path(name).name, text)


SIGNS = {"block": ("none", "faint", "strong"), "level": ("none", "low", "high"), "spots": ("none", "few", "many"),
         "rim": ("none", "thin", "wide"), "haze": ("none", "light", "dense")}


def caption(grades):
    """What a film shows in words that name no diagnosis: a sign for each finding, in their order."""
    return "shapes: " + ", ".join(f"{sign} {amounts[g]}" for (sign, amounts), g in zip(SIGNS.items(), grades)) + "."


def train_base(file, films=1500, steps=1100, seed=0, consensus=True):
    """Pre-trains the base student and packs it into `file`; about five minutes on one thread.

    Two things side by side: captions of `films` drawn films, and reading: reports that no film has to do with, and 'what do most
    of them say', answered in three of the teachers' voices and until near the end in a neutral one too, which is learnt faster. At first
    two reports agree and each names the findings in an order of its own, so that only looking a finding up helps; then they become
    seven, and as noisy as `imagine` makes them. consensus False: the answer is one reader's, drawn at random: a base that can read and
    repeat, and was never told to compare. Returns the file's sha256.
    """
    torch.set_num_threads(1)
    rng, lookup, ramp, alone = np.random.default_rng([seed, 99]), 250, 150, int(0.85 * steps)  # from `alone` on no neutral answer
    neutral = lambda grades: "overall: " + ", ".join(f"{word} {grade}" for word, grade in named(grades).items()) + "."
    texts = [text for _ in range(400) for text in imagine(rng)[0].values()] + [caption(rng.integers(0, 3, 5)) for _ in range(300)]
    texts += [neutral([0] * 5)] * 50
    texts += [*TASK["prompts"].values(), "describe the shapes", "Reader 1: ", "user\n", "assistant\n"] * 50
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder, *build_student(seed, texts))
        write(Path(folder) / "task.json", json.dumps(TASK))
        encoder, model = data.Encoder(folder, data.load_task(Path(folder) / "task.json")), student.load(folder)
        packed, optimizer = student.PackedStudent(model).train(), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
        grades, nuisance = rng.choice(3, size=(films, 5), p=PRIOR), draw_nuisance(rng, films)
        drawn = [Image.fromarray(draw_film(g, z, rng)).convert("RGB") for g, z in zip(grades, nuisance)]
        pixels = encoder.image_processor(images=drawn, return_tensors="pt")
        grid = pixels["image_grid_thw"][:1]
        pixel_values = pixels["pixel_values"].view(films, grid[0].prod(), -1)

        def row(film, prompt, responses):
            return {"prefix_ids": encoder.prefix(prompt, grid), "pixel_values": pixel_values[film], "image_grid_thw": grid,
                    "responses": [encoder.response(text) for text in responses]}

        def reading(step):
            noise = min(1.0, max(0.0, (step - lookup) / ramp))
            agreement = None if noise == 1 else rng.uniform(1 - 0.66 * noise, 1, 5)
            readers = rng.choice(TEACHERS, 2 + round(5 * noise), replace=False)
            reports, answers = imagine(rng, agreement, readers, shuffled=step < lookup)
            says = plurality(answers) if consensus else answers[rng.integers(len(answers))]
            prompt = data.compare_prompt(data.Study(str(step), (), {}, reports), encoder.task, int(rng.integers(2**31)))
            voices = [speak(voice, named(says), rng) for voice in rng.choice(TEACHERS, 3, replace=False)]
            return row(rng.integers(films), prompt, [neutral(says)] * (step < alone) + voices)

        for step in tqdm(range(steps), desc="base"):
            cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * step / steps - 1)))  # over the second half
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 30, cosine + 1e-3)
            batches = [student.pack([reading(step) for _ in range(10)], model),
                       student.pack([row(i, "describe the shapes", [caption(grades[i])]) for i in rng.integers(0, films, 8)], model)]
            compare, captions = packed(*batches)
            loss = -captions.sum() / batches[1]["tokens"].sum()
            # while it is there, the neutral answer counts as much as the voices together
            for part in ([slice(0, 1), slice(1, None)] if step < alone else [slice(None)]):
                loss = loss - compare[:, part].sum() / batches[0]["tokens"][:, part].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        save_student(folder, model, encoder.tokenizer)
        (Path(folder) / "task.json").unlink()
        pack_student(folder, file)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
