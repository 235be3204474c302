"""The tiny student of the scale model: the real model class with 0.66 M parameters, pre-trained.

Qwen is pre-trained, so the tiny student is too, on films and reports of its own. It learns to
describe signs in words that name no diagnosis, to read several reports, and to write what most of
them say. That last skill is privileged help which the paper's student does not get from us, and it
fades in stage 1 unless a little of it is replayed there (replay.jsonl).
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
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

import data
import student
from runtime.records import atomic
from scale_model.films import SIZE, draw_film, draw_nuisance
from scale_model.world import PRIOR, TASK, TEACHERS, imagine, named, plurality, speak

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BASE = Path(__file__).with_name("base.safetensors")
BASE_SHA256 = "b0d29aca089efaa02bb785e929dc2ac94ca4d49f7a34519a4de6baf12db48e94"


# ----------------------------------------------------------------------------- the tiny student

def build_student(seed, texts, vocabulary=700, vision_layers=2, vision_width=64, layers=3, width=96,
                  heads=4, kv_heads=2, initializer_range=0.15, rope_theta=1e6):
    """A random student of the real class; with these defaults it has 0.66 M parameters.

    seed           of its weights
    texts          what the byte-level BPE is trained on, an iterable of str
    vocabulary     tokens
    vision_layers, vision_width  of the vision tower, in layers and units
    layers, width  of the decoder, in layers and units
    heads, kv_heads  of the decoder's attention
    initializer_range  standard deviation of the weights; with Qwen's own 0.02 a model this small
                   learns to read its context far slower
    rope_theta     base of the rotary frequencies
    Returns (Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer).
    """
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>",
                           extra_special_tokens=list(SPECIAL_TOKENS))
    tokenizer = blank.train_new_from_iterator(texts, vocab_size=vocabulary)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    rotary = width // heads // 2  # pairs of a head; M-RoPE shares them among time, row and column
    row = (rotary - rotary // 4) // 2
    rope = dict(rope_type="default", rope_theta=rope_theta,
                mrope_section=[rotary - 2 * row, row, row])
    text = dict(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        max_position_embeddings=2048, initializer_range=initializer_range, rope_parameters=rope,
        bos_token_id=None, eos_token_id=token["<|im_end|>"], pad_token_id=token["<|endoftext|>"])
    vision = dict(
        depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width,
        num_heads=4, out_hidden_size=width, patch_size=14, spatial_merge_size=2,
        temporal_patch_size=2, window_size=SIZE, fullatt_block_indexes=[vision_layers - 1],
        initializer_range=initializer_range)
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=True,
        initializer_range=initializer_range,
        image_token_id=token["<|image_pad|>"], video_token_id=token["<|video_pad|>"],
        vision_start_token_id=token["<|vision_start|>"],
        vision_end_token_id=token["<|vision_end|>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def save_student(folder, model, tokenizer):
    """Writes model, tokenizer and image processor as a folder that from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    qwen2_vl.Qwen2VLImageProcessorPil().save_pretrained(folder)


def pack_student(folder, file):
    """Packs a student's folder into one file.

    folder  as `save_student` writes it
    file    safetensors to write: the weights in fp16 without the tied head; its metadata has the
            folder's JSON files, {name: text}, under "files"
    """
    tensors = load_file(Path(folder) / "model.safetensors")
    weights = {name: tensor.half() for name, tensor in tensors.items()}
    texts = {path.name: path.read_text() for path in sorted(Path(folder).glob("*.json"))}
    with atomic(file) as temporary:
        temporary.write_bytes(serialise(weights, metadata={"files": json.dumps(texts)}))


def write_student(folder, file=BASE, sha256=BASE_SHA256):
    """Writes a student as a folder that from_pretrained loads, from the one file that ships.

    folder  to write
    file    as `pack_student` writes it
    sha256  that the file must have; None accepts any
    Raises ValueError if the file's digest is another one.
    """
    content = Path(file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{file}: sha256 is {digest}, expected {sha256}: not the base student of "
                         "this version of scale_model")
    # safetensors: the header's length in 8 bytes, the header, the tensors
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    texts = json.loads(header["__metadata__"]["files"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float() for name, tensor in deserialise(content).items()}
    (folder / "model.safetensors").write_bytes(serialise(weights, metadata={"format": "pt"}))
    for name, text in texts.items():
        (folder / Path(name).name).write_text(text)
    task = data.make_task(TASK, "the scale model")
    student.save_processor(student.Processor(folder, task), folder)  # its template does not ship


# ----------------------------------------------------------------------------- its pre-training

# a sign for each finding, in their order, and its amounts for the three grades
SIGNS = {"block": ("none", "faint", "strong"), "level": ("none", "low", "high"),
         "spots": ("none", "few", "many"), "rim": ("none", "thin", "wide"),
         "haze": ("none", "light", "dense")}
DESCRIBE = "describe the shapes"
LOOKUP, RAMP = 250, 150  # steps with two reports that agree; then until there are seven noisy ones


def train_base(file, films=1500, steps=1100, seed=0, consensus=True):
    """Pre-trains the base student and packs it into a file; about five minutes on one thread.

    file       to write, as `pack_student` does
    films      how many are drawn, to be described
    steps      optimiser steps; each has 10 readings and 8 captions
    seed       of everything random
    consensus  False: the answer to several reports is one reader's, drawn at random: a base that
               can read and repeat, and was never told to compare
    It learns two things side by side: captions of the films, and reading, see `reading`. Returns
    the file's sha256.
    """
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 99])
    neutral_steps = int(0.85 * steps)
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder, *build_student(seed, vocabulary_texts(rng)))
        processor = student.Processor(folder, data.make_task(TASK, "the scale model"))
        model = student.load(folder)
        packed = student.PackedStudent(model).train()
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
        grades, encoded = draw_films(processor, films, rng)
        for step in tqdm(range(steps), desc="base"):
            neutral = step < neutral_steps
            readings = [reading(processor, encoded, step, neutral, consensus, rng)
                        for _ in range(10)]
            captions = [example(processor, encoded[i], DESCRIBE, [caption(grades[i])])
                        for i in rng.integers(0, films, 8)]
            batches = student.pack(readings, model), student.pack(captions, model)
            loss = base_loss(packed(*batches), batches, neutral)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps)
            optimizer.step()
        save_student(folder, model, processor.tokenizer)
        pack_student(folder, file)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


def vocabulary_texts(rng):
    """The texts that the tokenizer is trained on: reports, captions, neutral answers, prompts."""
    texts = [text for _ in range(400) for text in imagine(rng)[0].values()]
    texts += [caption(rng.integers(0, 3, 5)) for _ in range(300)]
    texts += [neutral_answer([0] * 5)] * 50
    texts += [*TASK["prompts"].values(), DESCRIBE, "Reader 1: ", "user\n", "assistant\n"] * 50
    return texts


def caption(grades):
    """What a film shows in words that name no diagnosis: a sign for each finding, in order."""
    signs = (f"{sign} {amounts[g]}" for (sign, amounts), g in zip(SIGNS.items(), grades))
    return f"shapes: {', '.join(signs)}."


def neutral_answer(grades):
    """What most reports say, in no teacher's voice."""
    return "overall: " + ", ".join(f"{word} {grade}" for word, grade in named(grades).items()) + "."


def draw_films(processor, count, rng):
    """Draws films and encodes them.

    Returns their grades (count, 5), and for each what `example` takes: {"id", "pixel_values" (64,
    1176), "image_grid_thw" (1, 3)}.
    """
    grades, nuisance = rng.choice(3, size=(count, 5), p=PRIOR), draw_nuisance(rng, count)
    drawn = [draw_film(g, z, rng) for g, z in zip(grades, nuisance)]
    images = [Image.fromarray(film).convert("RGB") for film in drawn]
    pixels = processor.image_processor(images=images, return_tensors="pt")
    grid = pixels["image_grid_thw"][:1]
    pixel_values = pixels["pixel_values"].view(count, grid[0].prod(), -1)
    return grades, [{"id": str(i), "pixel_values": values, "image_grid_thw": grid}
                    for i, values in enumerate(pixel_values)]


def example(processor, film, prompt, texts):
    """A film with a prompt and responses, as student.pack takes it."""
    return {**film, "prefix_ids": processor.prefix(prompt, film["image_grid_thw"]),
            "responses": [processor.response(text) for text in texts]}


def reading(processor, encoded, step, neutral, consensus, rng):
    """An example of reading: reports about no film at all, and 'what do most of them say'.

    processor  student.Processor
    encoded    films, of which one is shown that has nothing to do with the reports
    step       at first two reports agree and each names the findings in an order of its own, so
               that only looking a finding up helps; then they become seven, and as noisy as
               `imagine` makes them
    neutral    whether the first answer is a neutral one, which is learnt faster, before those in
               three of the teachers' voices
    consensus  as in `train_base`
    """
    noise = min(1.0, max(0.0, (step - LOOKUP) / RAMP))
    agreement = None if noise == 1 else rng.uniform(1 - 0.66 * noise, 1, 5)
    readers = rng.choice(TEACHERS, 2 + round(5 * noise), replace=False)
    reports, answers = imagine(rng, agreement, readers, shuffled=step < LOOKUP)
    says = plurality(answers) if consensus else answers[rng.integers(len(answers))]
    order = int(rng.integers(2**31))
    prompt = data.compare_prompt(data.Study(str(step), (), {}, reports), processor.task, order)
    texts = [neutral_answer(says)] if neutral else []
    texts += [speak(voice, named(says), rng) for voice in rng.choice(TEACHERS, 3, replace=False)]
    return example(processor, encoded[rng.integers(len(encoded))], prompt, texts)


def base_loss(logps, batches, neutral):
    """The loss of a step: per token of the captions, plus per token of the answers.

    logps    of the readings (10, 4 or 3) and of the captions (8, 1)
    batches  the packed readings and captions
    neutral  whether the first answer of a reading is neutral; it then counts as much as the voices
             together
    """
    (answers, captions), (readings, described) = logps, batches
    loss = -captions.sum() / described["tokens"].sum()
    for part in ([slice(0, 1), slice(1, None)] if neutral else [slice(None)]):
        loss = loss - answers[:, part].sum() / readings["tokens"][:, part].sum()
    return loss


def learning_rate(step, steps):
    """30 steps of warm-up to 2e-3; a cosine over the second half of the steps."""
    cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * step / steps - 1)))
    return 2e-3 * min(1, (step + 1) / 30, cosine + 1e-3)
