"""The frozen reference pi_st of Eq. 8 and 11: computed once and cached, or kept inside the model that trains.

cached   log pi_st of every response, once, before training, in OUTPUT_DIR/reference.safetensors. Works for whatever trains.
online   a second forward in each step: adapters off, a frozen copy of the merger in place. Nothing to store, a third more time.

Both go through the packed path that trains, so the first rewards are 0 and the first loss is log(1 + sum_u w_u).
"""

import contextlib
import copy
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import checkpoint
import data
import student
import training


@torch.no_grad()
def cached_logps(packed, load, plan, columns, key, args):
    """log pi_st of all responses, (n, 1+N) fp32 on CPU, in the micro-batches of the first epoch. load(lists of study indices) ->
    packed batches. Made anew when `key` is not the file's."""
    file = Path(args.output_dir) / "reference.safetensors"
    if file.exists():
        with safe_open(file, "pt") as cached:
            if cached.metadata().get("key") == key:
                return cached.get_tensor("logps")
        training.say("critique: the cached reference belongs to other input, computing it again")
    packed.eval()
    mine = plan.all_studies()
    total = torch.zeros(plan.n, columns)
    for indices, batch in tqdm(zip(mine, load(mine)), total=len(mine), desc="reference", disable=training.rank() > 0):
        (logps,) = packed(batch)
        total[indices] = logps.cpu()
    total = training.all_reduce(total.to(next(packed.parameters()).device)).cpu()  # every study was one rank's, so the sum is exact

    def write():
        save_file({"logps": total}, file.with_name(".tmp-reference"), metadata={"key": key})
        file.with_name(".tmp-reference").replace(file)

    training.on_rank_zero(write)
    return total


def key(args, task, studies, names):
    """sha256 over all that the reference depends on: checkpoint, texts, images, prompt, image size, number format."""
    files = [(path, (Path(args.images) / path).stat().st_size) for study in studies for path in study.images]
    records = [(study.id, study.t_plus, study.trajectories, data.student_prompt(study, task, args.prompt)) for study in studies]
    parts = [checkpoint.fingerprint(args.student), task.prompts["system"], args.max_pixels, args.max_tokens, args.bf16, names, records, files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def frozen_merger(model, train):
    """What `online` needs beside the model: a copy of the merger if that trains, else None.
    Raises ValueError where pi_st cannot be kept inside pi_theta."""
    if {"decoder", "vision"} & set(train):
        raise ValueError(f"--reference online with --train {','.join(train)}: expected lora or merger only, the rest needs --reference cached")
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
