"""The folder of a LoRA adapter in PEFT's format: what it says of itself. No torch here.

    adapter_config.json        rank r, scale alpha / r, and base_model_name_or_path: the student
                               that the adapter belongs to, whose weights it leaves as they are
    adapter_model.safetensors  the weights, which student.py reads
    tokenizer and image processor, if it can be served as it is; else they are the base's

A relative base_model_name_or_path is taken from the working directory, as PEFT takes it.
"""

import json
from pathlib import Path

from runtime.records import read_json

CONFIG = "adapter_config.json"

# what must hold for an adapter to mean (alpha / r) B A: {key: (what is expected, whether it is so)}
FIELDS = {
    "peft_type": ('"LORA"', lambda v: v == "LORA"),
    "base_model_name_or_path": ("the folder or hub id of the student that the adapter belongs to",
                                lambda v: isinstance(v, str) and v),
    "r": ("a whole number above 0", lambda v: type(v) is int and v > 0),
    "lora_alpha": ("a number above 0", lambda v: type(v) in (int, float) and v > 0),
    "bias": ('"none"', lambda v: v in (None, "none")),
    "init_lora_weights": ("a way that leaves the base as it is",
                          lambda v: v in (None, True, False, "gaussian")),
    "modules_to_save": ("a list of names of modules", lambda v: v is None or (
        isinstance(v, list) and all(isinstance(name, str) and name for name in v))),
    **{name: ("none", lambda v: not v) for name in (
        "use_rslora", "use_dora", "use_qalora", "rank_pattern", "alpha_pattern", "lora_bias",
        "layer_replication", "target_parameters", "trainable_token_indices")},
}


def is_adapter(path):
    """Whether a --student is an adapter's folder; one with a config.json is a student's."""
    return (Path(path) / CONFIG).exists() and not (Path(path) / "config.json").exists()


def read_config(folder):
    """What adapter_config.json holds.

    folder  of an adapter
    Raises ValueError naming the file and the key where it means another thing than W + (alpha / r)
    B A on a student.
    """
    file = Path(folder) / CONFIG
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object")
    for name, (expected, is_good) in FIELDS.items():
        value = config.get(name)
        if not is_good(value):
            raise ValueError(f'{file}: "{name}": expected {expected}, found {json.dumps(value)}')
    base = config["base_model_name_or_path"]
    if is_adapter(base):
        raise ValueError(f"{file}: base_model_name_or_path {base}: expected the student itself, "
                         "not another adapter")
    return config


def base_of(path):
    """The student that a --student's weights lie in: an adapter's base, else `path` itself.

    path  folder or hub id
    Raises as `read_config` does.
    """
    return read_config(path)["base_model_name_or_path"] if is_adapter(path) else path


def processor_of(path):
    """Where the tokenizer and image processor of a --student are: in its folder, or its base's.

    path  folder or hub id
    Raises as `read_config` does.
    """
    own = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
    return path if any((Path(path) / name).exists() for name in own) else base_of(path)
