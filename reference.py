"""The frozen reference pi_st of Eq. 8 and 11: computed once and cached, or kept inside the model that trains.

cached   log pi_st of every response, once, before training, in OUTPUT_DIR/reference.safetensors. Works for whatever trains.
online   a second forward in each step: adapters off, a frozen copy of the merger in place. Nothing to store, a third more time.

Both go through the packed path that trains, so the first rewards are 0 and the first loss is log(1 + sum_u w_u).
"""

import contextlib
import copy
import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import data
import student
import training
from evaluation import results
from runtime import checkpoint, ranks


@torch.no_grad()
def cached_logps(packed, encode, batch_of, plan, key, args):
    """log pi_st of all responses, (n, 1+N) fp32 on CPU. encode(index) -> example, batch_of(examples) -> packed batch. The studies share
    micro-batches as in the first epoch, so that the first rewards are exactly 0. Made anew when `key` is not the file's."""
    file = Path(args.output_dir) / "reference.safetensors"
    if file.exists():
        try:
            with safe_open(file, "pt") as cached:
                if cached.metadata().get("key") == key:
                    return cached.get_tensor("logps")
            ranks.say("critique: the cached reference belongs to other input, computing it again")
        except SafetensorError as error:
            ranks.say(f"warning: {file} is damaged ({error}), computing it again")
    packed.eval()

    def work(indices, examples):
        batch = batch_of(examples)
        with training.on_studies([example["id"] for example in examples], batch):
            return packed(batch)[0].tolist()

    parts = file.with_name("reference.parts")
    rows = results.spread(plan.order(0), encode, work, plan.micro_batch, parts / key[:16], args.num_workers, desc="reference")
    total = torch.tensor([rows[index] for index in range(plan.n)])  # fp32 survives JSON: a float is printed with all its digits

    def write():
        with checkpoint.whole(file) as temporary:
            save_file({"logps": total}, temporary, metadata={"key": key})
        shutil.rmtree(parts)

    ranks.on_rank_zero(write)
    return total


def cache_key(args, task, studies, names):
    """sha256 over all that the reference depends on: checkpoint, texts, images (by path and size), prompt, image size, number format."""
    files = [(path, (Path(args.images) / path).stat().st_size) for study in studies for path in study.images]
    records = [(study.id, study.t_plus, study.trajectories, data.student_prompt(study, task, args.prompt)) for study in studies]
    parts = [checkpoint.fingerprint(args.student), task.prompts["system"], args.max_pixels, args.max_tokens, args.bf16, names, records, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def require_online(train):
    """Raises ValueError where pi_st cannot be kept inside pi_theta."""
    if {"decoder", "vision"} & set(train):
        raise ValueError(f"--reference online with --train {','.join(train)}: expected lora or merger only, the rest needs --reference cached")


def frozen_merger(model, train):
    """What `online` needs beside the model: a copy of the merger if that trains, else None."""
    return copy.deepcopy(model.model.visual.merger).requires_grad_(False) if "merger" in train else None


@contextlib.contextmanager
def as_reference(model, merger):
    """Inside, the model is pi_st: adapters off, `merger` (of frozen_merger) in place, no gradients."""
    layers, training_merger = student.lora_layers(model).values(), model.model.visual.merger
    for layer in layers:
        layer.enabled = False
    if merger is not None:
        model.model.visual.merger = merger
    try:
        with torch.no_grad():
            yield
    finally:
        model.model.visual.merger = training_merger
        for layer in layers:
            layer.enabled = True
