"""The student: a Qwen2.5-VL, what it sees of a study, what of it trains, its log-probabilities.

Packed step. The K = 1 + N responses of a study share image and prompt, so image and prefix are
computed once, and the responses follow the prefix as branches of one row:

    ids     prefix (P tokens) | t+ | t^1 | ... | t^N     each without its last token, which is only
                                                         a target
    sees    i sees j if j <= i and j is in the prefix, in i's own branch or in that branch's parent
    place   M-RoPE of the prefix; the positions of every branch begin right behind the prefix, as
            if there were no other branch

That is exact: log-probabilities and gradients equal those of K separate forwards
(tests/test_packed.py). The LM head is applied to response tokens only, in chunks that are computed
again in the backward pass, so no [tokens x vocabulary] tensor is kept.

Shapes: B studies, K responses, P prefix tokens, S row length, R response tokens of the whole batch,
V vocabulary.
"""

import copy
import hashlib
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

# The versions of transformers that were tried: 4.x cannot read a saved student, and 5.4 gives other
# positions where a study has two images, without a word.
OLDEST, NEWEST = (5, 5, 4), (5, 24)


def require_tested(version):
    """Raises SystemExit for a transformers before OLDEST, and warns of one after NEWEST."""
    found = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    tested = "expected 5.5.4 to 5.24, requirements.txt has the one that is tested most"
    if found < OLDEST:
        raise SystemExit(f"transformers {version}: {tested}")
    if found[:2] > NEWEST and os.environ.get("RANK", "0") == "0":  # once for all ranks
        warnings.warn(f"transformers {version}: {tested}", stacklevel=2)


require_tested(transformers.__version__)  # before the imports that an old version may not know

from transformers import (  # noqa: E402
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl  # noqa: E402

import data  # noqa: E402
from runtime import adapter  # noqa: E402
from runtime.checkpoint import as_umask_says  # noqa: E402
from runtime.records import printable, read_json  # noqa: E402

# all linear layers of the decoder
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINABLE = ("lora", "merger", "decoder", "vision")
MAX_PIXELS = 1024 * 28 * 28  # of an image where no flag says more: 1,024 tokens
LM_HEAD_CHUNK = 512  # rows of fp32 logits that exist at a time
# Processor.prefix as a template, for transformers' AutoProcessor and for servers. Qwen's own one
# puts "You are a helpful assistant." where there is no system message; this one puts nothing.
CHAT_TEMPLATE = r"""
{%- for message in messages -%}
  {%- if message['role'] != 'system'
         or message['content'] not in ['', [{'type': 'text', 'text': ''}]] -%}
    {{- '<|im_start|>' + message['role'] + '\n' -}}
    {%- if message['content'] is string -%}
      {{- message['content'] -}}
    {%- else -%}
      {%- for content in message['content'] -%}
        {%- if content['type'] == 'image' or 'image' in content or 'image_url' in content -%}
          {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
        {%- elif 'text' in content -%}
          {{- content['text'] -}}
        {%- endif -%}
      {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


# ------------------------------------------------------------------------------------- loading

def require_family(path):
    """Raises ValueError unless a folder or hub id holds a Qwen2.5-VL, of any size, unquantised.

    path  folder or hub id, of which only config.json and the index of the weights are read; of an
          adapter's folder adapter_config.json, and these of its base
    """
    if not str(path):  # as NAME= in evaluate.py; Path would take the working directory
        raise ValueError("--student: empty, expected the folder or hub id of a Qwen2.5-VL")
    of_adapter, base = adapter.is_adapter(path), adapter.base_of(path)
    name, where = f"--student {path}", ""
    if of_adapter:
        name = f"{Path(path) / adapter.CONFIG}: base_model_name_or_path {base}"
        where = ", a relative path taken from the working directory"
    try:
        config, _ = PreTrainedConfig.get_config_dict(base, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"{name}: expected the folder or hub id of a Qwen2.5-VL{where}: "
                         f"{str(error).splitlines()[0]}") from None
    except (TypeError, RecursionError):
        raise ValueError(f"{name}: its config.json is no JSON object or is nested too deeply, "
                         "expected that of a Qwen2.5-VL") from None
    if (Path(base) / adapter.CONFIG).exists():  # which of the two is meant would be a guess
        raise ValueError(f"{name} holds config.json and {adapter.CONFIG}, expected one of them")
    family = config.get("model_type")
    if family != "qwen2_5_vl":
        inner = Path(base) / "student" / "config.json"
        meant = f"; {inner.parent} may be meant" if inner.exists() else ""
        raise ValueError(
            f"{name} is a {family or 'model without a model_type'}, expected a "
            f"Qwen2.5-VL (qwen2_5_vl) of any size{meant}. For another family these would have to "
            "be true: student.Processor writes its chat format and image tokens; student.pack "
            "takes its positions from the model and lets branches restart behind the prefix; its "
            "attention takes a 4-D mask; set_trainable finds its decoder, its vision tower and "
            "what joins them. tests/test_packed.py then says whether the packed step is still "
            "exact")
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:  # its weights are no plain layers, which LoRA, merging and bf16 or fp32 take
        method = isinstance(quantised, dict) and quantised.get("quant_method")
        raise ValueError(f"{name} is quantised ({method or 'by an unnamed method'}), expected the "
                         "folder or hub id of the same model unquantised, whose config.json has "
                         "no quantization_config")
    index = Path(base) / "model.safetensors.index.json"
    if index.exists():
        require_index(index)


def require_index(file):
    """Raises ValueError unless model.safetensors.index.json names weights as transformers reads it.

    file  {"metadata": {...}, "weight_map": {tensor: name of a .safetensors file beside it}};
          transformers would unpickle a file of any other kind, and `fingerprint` would not see one
          elsewhere
    """
    content = read_json(file)
    for key in ("metadata", "weight_map"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise ValueError(f'{file}: "{key}": expected an object, as in the index of a saved '
                             "model")
    if not content["weight_map"]:
        raise ValueError(f'{file}: "weight_map" is empty, expected {{tensor: its file}}')
    for name in content["weight_map"].values():
        if not isinstance(name, str) or not name.endswith(".safetensors"):
            raise ValueError(f"{file}: names {name!r}, expected .safetensors files only")
        if name != Path(name).name:
            raise ValueError(f"{file}: names {name!r}, expected files in its own folder")


def load(path, bf16=False, device="cpu", gradient_checkpointing=False):
    """Loads a Qwen2.5-VL of any size, in eval mode; safetensors only, no remote code.

    What generation_config.json and config.json say of generating is left out: no figure hangs on
    it, and nothing of it is saved.

    path    folder or hub id; of an adapter's folder the base is loaded, with the adapter in it
    bf16    weights in bf16, else in fp32
    device  torch.device or its name, where the model is put
    gradient_checkpointing  recompute each layer in the backward pass (in train mode)
    Returns the model. Raises ValueError for another family, for weights that cannot be read, and
    where they are not those of config.json.
    """
    require_family(path)
    base = adapter.base_of(path)
    try:
        model, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            base, dtype=torch.bfloat16 if bf16 else torch.float32, attn_implementation="sdpa",
            use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
            generation_config=GenerationConfig())
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"--student {base}: expected its weights as safetensors: {error}") from None
    require_its_weights(base, found)
    if adapter.is_adapter(path):
        load_adapter(model, path)
    # It fills what `sample` leaves open: no field of it comes from the folder, not even from the
    # fields for generating that config.json may have too.
    model.generation_config = GenerationConfig()
    embed = model.model.visual.patch_embed
    # Patches do not overlap, so their convolution is a matrix product. Conv3d is several times
    # slower, on a CPU and in bf16.
    embed.forward = lambda patches: F.linear(patches.to(embed.proj.weight.dtype),
                                             embed.proj.weight.flatten(1))
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(device).eval()


def require_its_weights(path, found):
    """Raises ValueError unless a student's weights are all that its config.json describes.

    transformers draws the weights that a folder lacks at random. A head that is tied to the
    embedding is not missed.

    path   folder or hub id
    found  what from_pretrained says with output_loading_info
    """
    faults = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    faults += [f"{name} is unexpected" for name in sorted(found["unexpected_keys"])]
    faults += [f"{name} has the shape {tuple(there)}, expected {tuple(wanted)}"
               for name, there, wanted in sorted(found["mismatched_keys"])]
    if faults:
        more = f" and {len(faults) - 3} more faults" if len(faults) > 3 else ""
        raise ValueError(f"--student {path}: expected the weights that its config.json describes, "
                         f"found that {printable(', '.join(faults[:3]))}{more}")


def digest(model, processor):
    """A text that differs where another student was loaded, also one of the same size.

    model      the student
    processor  Processor, for its tokenizer and image processor
    The bits of the weights are added up as whole numbers, which takes no order and no rounding.
    """
    parts = [processor.tokenizer.backend_tokenizer.to_str(),
             processor.image_processor.to_json_string(), model.config.to_json_string()]
    for name, p in model.named_parameters():
        bits = p.detach().view(torch.int32 if p.element_size() == 4 else torch.int16).view(-1)
        total = sum(int(some.sum(dtype=torch.int64)) for some in bits.split(2**24))
        parts.append(f"{name} {tuple(p.shape)} {total}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


# --------------------------------------------------------------------- what it sees of a study

class Processor:
    """Turns a study into the student's tensors.

    student     folder or hub id, of which only tokenizer and image processor are read; an
                adapter without them has its base's
    task        data.Task, for its system prompt
    images      folder that image paths are relative to
    max_pixels  pixels of an image at most, 28 x 28 make one token; None: 1,024 tokens, or what
                the folder's image processor allows where that is less
    max_tokens  tokens of a study's packed row at most; in a longer row the ends of the longest
                responses are cut (training.drop_long finds these studies); None: no bound
    max_length  tokens of image, prompt and one response at most; in a longer sequence the end of
                that response is cut; None: no bound
    Raises ValueError where the tokenizer or the image processor cannot be read or is not that of a
    Qwen2.5-VL, and for more pixels than the image processor allows or fewer than it enlarges to.
    The chat format is written here because transformers' AutoProcessor needs torchvision.
    """

    def __init__(self, student, task, images=".", max_pixels=None, max_tokens=None,
                 max_length=None):
        self.task, self.images = task, images
        self.max_tokens, self.max_length = max_tokens, max_length
        source = adapter.processor_of(student)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.image_processor = qwen2_vl.Qwen2VLImageProcessorPil.from_pretrained(source)
        except Exception as error:  # a broken file can make them raise nearly anything
            raise ValueError(f"--student {student}: expected the tokenizer and image processor "
                             f"of a Qwen2.5-VL: {error}") from None
        self.saved_size = self.image_processor.size  # its bounds of height x width, in pixels
        least, allowed = self.saved_size["shortest_edge"], self.saved_size["longest_edge"]
        config = f"{source}/preprocessor_config.json"
        if type(least) is not int or type(allowed) is not int or not 0 < least <= allowed:
            raise ValueError(f"{config}: shortest_edge {least!r} and longest_edge {allowed!r}, "
                             "expected numbers of pixels, the first not above the second")
        for key, value in (("patch_size", 14), ("merge_size", 2), ("temporal_patch_size", 2),
                           ("do_resize", True)):  # --max_pixels holds only with these
            if (found := getattr(self.image_processor, key)) != value:
                raise ValueError(f"{config}: {key} is {found!r}, expected {value} as of a "
                                 "Qwen2.5-VL")
        if max_pixels is not None and max_pixels > allowed:
            raise ValueError(f"--max_pixels {max_pixels}: {config} allows {allowed}, "
                             f"expected {allowed} or less")
        self.max_pixels = min(MAX_PIXELS, allowed) if max_pixels is None else max_pixels
        if least > self.max_pixels:
            raise ValueError(f"--max_pixels {self.max_pixels}: {config} enlarges an image to "
                             f"{least}, expected {least} or more")
        self.image_processor.size = {"shortest_edge": least, "longest_edge": self.max_pixels}
        special = self.tokenizer.convert_tokens_to_ids
        self.start, self.end = special("<|im_start|>"), special("<|im_end|>")
        self.vision_start, self.vision_end = special("<|vision_start|>"), special("<|vision_end|>")
        self.image_pad, self.pad = special("<|image_pad|>"), self.tokenizer.pad_token_id
        # either one ends a text, as in Qwen's generation_config.json
        self.ends = [self.end, special("<|endoftext|>")]

    def tokens(self, text):
        """Token ids of plain text; '<|im_end|>' inside a teacher's text stays text."""
        encoded = self.tokenizer(text, split_special_tokens=True, add_special_tokens=False)
        return encoded["input_ids"]

    def text(self, ids):
        """The text of a response's token ids, without the end tokens behind it."""
        ids = [int(i) for i in ids]
        while ids and ids[-1] in self.ends:
            ids.pop()
        return self.tokenizer.decode(ids)

    def pixels(self, study):
        """The films of a study: pixel_values (patches, 1176) fp32, image_grid_thw (images, 3)."""
        images = [data.load_image(path, self.images) for path in study.images]
        out = self.image_processor(images=images, return_tensors="pt")
        return out["pixel_values"], out["image_grid_thw"]

    def prefix(self, prompt, image_grid_thw):
        """v and l in Qwen's chat format, up to where the response begins.

        prompt          text of l
        image_grid_thw  (images, 3): frames, height, width of each image in patches
        Returns ids (P,).
        """
        ids = []
        if self.task.prompts["system"]:
            system = self.tokens("system\n" + self.task.prompts["system"])
            ids += [self.start, *system, self.end, *self.tokens("\n")]
        ids += [self.start, *self.tokens("user\n")]
        for frames, height, width in image_grid_thw.tolist():
            pads = frames * height * width // self.image_processor.merge_size ** 2
            ids += [self.vision_start, *[self.image_pad] * pads, self.vision_end]
        ids += [*self.tokens(prompt), self.end, *self.tokens("\n")]
        ids += [self.start, *self.tokens("assistant\n")]
        return torch.tensor(ids)

    def response(self, text):
        """The ids (n,) of a response's text t, with the end token as the last one."""
        return torch.tensor([*self.tokens(text), self.end])

    def __call__(self, study, prompt, responses=()):
        """Encodes one study as `pack` and `sampling.sample` take it.

        study      data.Study
        prompt     text of l
        responses  K texts, None where a teacher is absent
        Returns {"id", "prefix_ids" (P,), "pixel_values" (patches, 1176), "image_grid_thw"
        (images, 3), "responses" [K of (n,) or None]}. Raises ValueError naming an image that
        cannot be read.
        """
        pixel_values, image_grid_thw = self.pixels(study)
        prefix = self.prefix(prompt, image_grid_thw)
        responses = [None if text is None else self.response(text) for text in responses]
        lengths = [len(r) for r in responses if r is not None]
        kept = iter(cut_lengths(len(prefix), lengths, self.max_length, self.max_tokens))
        responses = [None if r is None else r[:next(kept)] for r in responses]
        return {"id": study.id, "prefix_ids": prefix, "pixel_values": pixel_values,
                "image_grid_thw": image_grid_thw, "responses": responses}

    def lengths(self, study, prompt, responses):
        """The lengths of a study, found without decoding its images: only their headers are read.

        study      data.Study
        prompt     text of l
        responses  K texts, None where a teacher is absent
        Returns (P, [n of each response that is present]) in tokens. Raises ValueError naming an
        image that cannot be read.
        """
        grids = []
        for path in study.images:
            with data.open_image(path, self.images) as image:
                size, side = self.image_processor.size, self.image_processor.patch_size
                height, width = smart_resize(
                    image.height, image.width, side * self.image_processor.merge_size,
                    size["shortest_edge"], size["longest_edge"])
            grids.append([1, height // side, width // side])
        prefix = self.prefix(prompt, torch.tensor(grids))
        return len(prefix), [len(self.tokens(text)) + 1 for text in responses if text is not None]


def smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=MAX_PIXELS):
    """The size at which the student sees an image: multiples of `factor` within the two bounds.

    height, width           of the image in pixels
    factor                  side of one token in pixels
    min_pixels, max_pixels  the bounds of height x width
    Returns (height, width) in pixels.
    """
    return qwen2_vl.smart_resize(height, width, factor, min_pixels, max_pixels)


def cut_lengths(prefix, lengths, max_length, max_tokens):
    """How many tokens each response of a study keeps within Processor's two bounds.

    prefix      tokens of image and prompt
    lengths     [tokens of each response]
    max_length  of `prefix` and one response; None: no bound
    max_tokens  of `prefix` and all that the first bound leaves; None: no bound
    Returns [tokens], in the order of `lengths`.
    """
    if max_length:
        lengths = [min(length, max_length - prefix) for length in lengths]
    return shorten_longest(lengths, max_tokens - prefix) if max_tokens else lengths


def shorten_longest(lengths, budget):
    """How many tokens each response keeps so that all fit; the longest are cut first.

    lengths  tokens of each response
    budget   tokens that they may have together
    Returns [tokens], in the order of `lengths`.
    """
    kept = dict.fromkeys(range(len(lengths)), 0)
    for left, i in zip(range(len(lengths), 0, -1), sorted(kept, key=lengths.__getitem__)):
        kept[i] = min(lengths[i], budget // left)
        budget -= kept[i]
    return list(kept.values())


# --------------------------------------------------------------------------------- what trains

class LoRALinear(nn.Module):
    """W x + (alpha / r) B A dropout(x) with a frozen W (Hu et al. 2021).

    base     the linear layer with W, (out, in)
    r        rank: A is (r, in), B is (out, r), both fp32 even where W is bf16; B starts at zero
    alpha    scale
    dropout  probability, of the input of A
    """

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.alpha, self.scale = base, alpha, alpha / r
        self.dropout = nn.Dropout(dropout)
        fp32 = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def change(self):
        """(alpha / r) B A, in fp32."""
        return self.scale * self.lora_B @ self.lora_A


def lora_layers(model):
    """{name: LoRALinear} of a model."""
    return {name: module for name, module in model.named_modules()
            if isinstance(module, LoRALinear)}


def replace_module(model, name, module):
    """Puts `module` in the place of the submodule `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def parse_train(flag):
    """The parts of the model that --train names, a list.

    Raises ValueError for an unknown part and for lora together with decoder.
    """
    train = flag.split(",")
    if set(train) - set(TRAINABLE) or {"lora", "decoder"} <= set(train):
        raise ValueError(f"--train {flag}: expected some of {', '.join(TRAINABLE)}, "
                         "and not both lora and decoder")
    return train


def require_trainable(path, train, r, alpha):
    """Raises ValueError where these parts cannot train on an adapter; other students pass.

    path      --student: folder or hub id
    train     list of parts
    r, alpha  of LoRA, which goes on with the adapter's own and must be as there
    """
    if not adapter.is_adapter(path):
        return
    config = adapter.read_config(path)
    if "decoder" in train:
        raise ValueError(f"--train {','.join(train)}: --student {path} is an adapter, expected "
                         "a student for the decoder to train, with LoRA merged")
    if "lora" in train and (r, alpha) != (config["r"], config["lora_alpha"]):
        raise ValueError(f"--lora_r {r} --lora_alpha {alpha}: --student {path} has r "
                         f"{config['r']} and alpha {config['lora_alpha']}, expected these, since "
                         "--train lora goes on with this adapter")


def set_trainable(model, train, r=8, alpha=32, dropout=0.0, seed=0):
    """Freezes everything but what trains.

    model    the student, changed in place
    train    list of parts: lora (every linear layer of the decoder, or the adapter that the model
             was loaded with), merger, decoder, vision (the tower without its merger)
    r        rank of the adapters
    alpha    their scale is alpha / r
    dropout  probability, of the adapters' input
    seed     of the adapters' A
    Returns {name: parameter} of what trains.
    """
    model.requires_grad_(False)
    modules = modules_of(model)
    for part in train:
        for name in modules[part]:
            model.get_submodule(name).requires_grad_(True)
    if "lora" in train:
        if not lora_layers(model):
            add_lora(model, r, alpha, seed)
        for layer in lora_layers(model).values():
            layer.dropout = nn.Dropout(dropout)
            layer.lora_A.requires_grad_(True)
            layer.lora_B.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def modules_of(model):
    """The names of the modules that each part of --train makes train, {part: [name]}."""
    blocks = range(len(model.model.visual.blocks))
    return {"lora": [], "merger": ["model.visual.merger"],
            "decoder": ["model.language_model", "lm_head"],
            "vision": ["model.visual.patch_embed", *(f"model.visual.blocks.{i}" for i in blocks)]}


def add_lora(model, r, alpha, seed):
    """Puts a new adapter on every linear layer of the decoder; the arguments are set_trainable's.
    """
    decoder = model.model.language_model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in list(decoder.named_modules()):
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
                replace_module(decoder, name, LoRALinear(module, r, alpha, 0.0))


@torch.no_grad()
def merge_lora(model):
    """Folds every adapter into its layer, in place; the sum is taken in fp32.

    Returns how far the layers' change is off after rounding to their dtype, |W' - W - d| / |d| over
    all layers together, with d = (alpha / r) B A; 0 where nothing changes.
    """
    errors, changes = [torch.zeros(())], [torch.zeros(())]
    for name, layer in lora_layers(model).items():
        weight, change = layer.base.weight, layer.change()
        before = weight.data.float()  # of fp32 weights no copy, which `weight` itself would be
        weight.data = (before + change).to(weight.dtype)
        errors.append((weight.float() - before - change).norm().cpu())
        changes.append(change.norm().cpu())
        replace_module(model, name, layer.base)
    error, change = torch.stack(errors).norm().item(), torch.stack(changes).norm().item()
    return error / change if change else 0.0


def enable_gradient_checkpointing(model):
    """Recomputes each layer in the backward pass (active in train mode).

    transformers also makes the patch embedding's output require gradients, which would send the
    backward pass through a frozen tower; non-reentrant checkpointing needs no such hook.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


# ------------------------------------------------------------------------------- what is saved

def adapter_tensors(model, whole):
    """What an adapter holds, {name in PEFT's file: parameter}.

    model  the student with adapters
    whole  names of the modules that it holds whole (PEFT's modules_to_save), of the vision tower
           and its merger; like PEFT's they match the end of a module's name
    """
    held = {f"{name}.{part}.weight": getattr(layer, part)
            for name, layer in lora_layers(model).items() for part in ("lora_A", "lora_B")}
    for name, module in model.named_modules():
        if name.startswith("model.visual.") and name.endswith(tuple(whole)):
            held |= {f"{name}.{inner}": p for inner, p in module.named_parameters()}
    return {f"base_model.model.{name}": p for name, p in held.items()}


def save_adapter(model, folder, start, train):
    """Writes LoRA, and what trained beside it, in PEFT's format.

    model   the student with adapters
    folder  where adapter_model.safetensors and adapter_config.json are written;
            PeftModel.from_pretrained(base_model, folder) loads them
    start   folder or hub id of the student that training began from: the base of the adapter, or an
            adapter, whose base it is and of which everything is kept
    train   list of parts that trained, as `set_trainable` had them
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    modules = modules_of(model)
    whole = [name for part in train for name in modules[part]]
    if adapter.is_adapter(start):
        whole += adapter.read_config(start).get("modules_to_save") or []
    tensors = {name: p.detach().cpu().contiguous()
               for name, p in adapter_tensors(model, whole).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    as_umask_says(folder)
    layers = lora_layers(model)
    layer = next(iter(layers.values()))
    targets = dict.fromkeys(name.rpartition(".")[2] for name in layers)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM",
              "base_model_name_or_path": str(adapter.base_of(start)),
              "r": len(layer.lora_A), "lora_alpha": layer.alpha, "lora_dropout": layer.dropout.p,
              "bias": "none", "inference_mode": True,
              # an expression, since a plain list of names would also hit the vision tower
              "target_modules": rf"model\.language_model\..*\.({'|'.join(targets)})",
              "modules_to_save": sorted(set(whole)) or None}
    (folder / adapter.CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_adapter(model, folder):
    """Puts an adapter into its base: LoRA as layers in fp32, what it holds whole in the base's
    dtype.

    model   the base, changed in place
    folder  of the adapter, as `save_adapter` and PEFT write it
    Raises ValueError naming the file where its weights do not fit the base.
    """
    config, file = adapter.read_config(folder), Path(folder) / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: expected the adapter's weights as safetensors: {error}") from None
    base, end = config["base_model_name_or_path"], ".lora_A.weight"
    linear = {name: module for name, module in model.named_modules()
              if name.startswith("model.language_model.") and isinstance(module, nn.Linear)}
    for name in [name.removesuffix(end) for name in tensors if name.endswith(end)]:
        name = name.removeprefix("base_model.model.")
        if name not in linear:
            raise ValueError(f"{file}: {name} is no linear layer of the decoder of {base}, "
                             "expected LoRA on these alone")
        replace_module(
            model, name, LoRALinear(linear[name], config["r"], config["lora_alpha"], 0.0))
    if not lora_layers(model):
        raise ValueError(f"{file}: holds no LoRA weights, expected those of layers of {base}")
    expected = adapter_tensors(model, config.get("modules_to_save") or [])
    for name in sorted({*expected, *tensors}):
        found, wanted = (tuple(some[name].shape) if name in some else "no such weight"
                         for some in (tensors, expected))
        if found != wanted:
            raise ValueError(f"{file}: {name}: found {found}, expected {wanted} for {base}, r "
                             f"{config['r']} and the config's modules_to_save")
    with torch.no_grad():
        for name, p in expected.items():
            p.copy_(tensors[name])


def save_student(model, processor, folder, card):
    """Writes a folder that transformers and vLLM load as it is.

    model      the student, without adapters
    processor  Processor, for its tokenizer and image processor
    folder     where all is written
    card       text of the model card, README.md
    """
    model.save_pretrained(folder)
    as_umask_says(folder)
    save_all_but_weights(model, processor, folder, card)


def save_all_but_weights(model, processor, folder, card):
    """Writes what `save_student` does beside the weights, in seconds; takes what it takes."""
    folder = Path(folder)
    model.config.save_pretrained(folder)
    ends = GenerationConfig(eos_token_id=processor.ends, pad_token_id=processor.pad)
    ends.save_pretrained(folder)
    save_processor(processor, folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_processor(processor, folder):
    """Writes the files from which AutoProcessor and servers build the prompts that Processor does.

    processor  Processor, for its tokenizer and image processor
    folder     where tokenizer, image processor and chat template are written; the bounds of an
               image's size are those that the processor was read with, whatever --max_pixels
    """
    folder = Path(folder)
    processor.tokenizer.chat_template = CHAT_TEMPLATE
    processor.tokenizer.save_pretrained(folder)
    image_processor = copy.copy(processor.image_processor)
    image_processor.size = processor.saved_size
    image_processor.save_pretrained(folder)
    config = read_json(folder / "tokenizer_config.json")
    if "extra_special_tokens" in config:  # transformers 4 fails on the new name of this list
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    written = {
        "tokenizer_config.json": config,
        # where the processors of transformers 4 looked for the template at first
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "processor_config.json": {"processor_class": "Qwen2_5_VLProcessor"},
    }
    for name, value in written.items():
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


# ----------------------------------------------------------------------------- the packed step

class Branch(NamedTuple):
    """Tokens behind the prefix, or behind another branch, that see no other branch.

    ids      (n,) the tokens that run
    targets  (m,) the tokens that are predicted: the first one from the last token of the parent,
             the others from `ids`; empty where nothing is scored
    column   the column of logps in which the targets are summed
    parent   index of the branch that comes before this one; None: the prefix
    """
    ids: torch.Tensor
    targets: torch.Tensor
    column: int
    parent: int = None


def response_branches(responses):
    """The branches of K responses, each (n,) or None; a last token is only a target."""
    return [Branch(response[:-1], response, column) for column, response in enumerate(responses)
            if response is not None]


def pack(examples, model):
    """Packs B encoded studies with K responses each, on the CPU.

    examples  B dicts as Processor returns them: prefix_ids (P,), pixel_values (patches, 1176 =
              3 colours x 2 frames x 14 x 14), image_grid_thw (images, 3): frames, height, width
              in patches; responses [K of (n,) or None], or branches [Branch] with K columns
    model     the student, which knows its image token and its positions
    Returns a dict:
        ids (B, S)                the rows: prefix, then the branches
        position_ids (3, B, S)    M-RoPE: time, row, column
        branch (B, S)             0 prefix, 1 + index of the branch, -1 padding
        parent (B, S)             the number of the branch before a token's branch, or its own
        source (R,)               where in the flattened (B * S) rows each target is predicted from
        targets (R,), owner (R,)  the targets; b * K + column of each
        tokens (B, K)             response lengths in tokens
        pixel_values, image_grid_thw  of all images
        studies                   the B ids, a list
    """
    K = examples[0].get("columns") or len(examples[0]["responses"])
    rows = [pack_row(example, model) for example in examples]
    B, S = len(rows), max(len(row["ids"]) for row in rows)
    batch = {"ids": torch.zeros(B, S).long(), "position_ids": torch.zeros(3, B, S).long(),
             "branch": torch.full((B, S), -1), "parent": torch.full((B, S), -1)}
    for b, row in enumerate(rows):
        n = len(row["ids"])
        for key in ("ids", "branch", "parent"):
            batch[key][b, :n] = row[key]
        batch["position_ids"][:, b, :n] = row["positions"]
    batch["source"] = torch.cat([b * S + row["source"] for b, row in enumerate(rows)])
    batch["targets"] = torch.cat([row["targets"] for row in rows])
    batch["owner"] = torch.cat([b * K + row["column"] for b, row in enumerate(rows)])
    batch["tokens"] = torch.bincount(batch["owner"], minlength=B * K).view(B, K)
    batch["pixel_values"] = torch.cat([example["pixel_values"] for example in examples])
    batch["image_grid_thw"] = torch.cat([example["image_grid_thw"] for example in examples])
    batch["studies"] = [example["id"] for example in examples]
    return batch


def pack_row(example, model):
    """One row of `pack`.

    example  one of its examples
    model    the student
    Returns {"ids", "branch", "parent" (n,), "positions" (3, n), "source", "targets", "column" (m,)}
    for n tokens and m targets.
    """
    prefix = example["prefix_ids"]
    # Without these types of the tokens get_rope_index would give positions in one dimension.
    image = (prefix == model.config.image_token_id).long()
    grid = example["image_grid_thw"]
    position, _ = model.model.get_rope_index(prefix[None], image[None], image_grid_thw=grid)
    P = len(prefix)
    ids, branch, parent = [prefix], [torch.zeros(P).long()], [torch.zeros(P).long()]
    positions, source, targets, column = [position[:, 0]], [], [], []
    # the end of the prefix and of every branch: index of the last token, position behind it
    prefix_end = (P - 1, int(position.max()) + 1)
    ends, at = [], P
    branches = example.get("branches") or response_branches(example["responses"])
    for number, one in enumerate(branches, 1):
        n = len(one.ids)
        last, behind = prefix_end if one.parent is None else ends[one.parent]
        ids.append(one.ids)
        branch.append(torch.full((n,), number))
        parent.append(torch.full((n,), number if one.parent is None else one.parent + 1))
        positions.append((behind + torch.arange(n)).expand(3, n))
        source += [last, *range(at, at + n)][:len(one.targets)]
        targets.append(one.targets)
        column += [one.column] * len(one.targets)
        ends.append((at + n - 1, behind + n))
        at += n
    return {"ids": torch.cat(ids), "branch": torch.cat(branch), "parent": torch.cat(parent),
            "positions": torch.cat(positions, 1), "source": torch.tensor(source, dtype=torch.long),
            "targets": torch.cat(targets), "column": torch.tensor(column, dtype=torch.long)}


def to_device(device, *batches):
    """A list of the batches that are not None, with their tensors on `device`."""
    return [{key: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
             for key, value in batch.items()} for batch in batches if batch is not None]


def target_logps(hidden, head, targets):
    """The log-probability of each target.

    hidden   (n, hidden size), from which the targets are predicted
    head     (V, hidden size), the weight of the LM head
    targets  (n,) token ids
    Returns (n,) fp32.
    """
    return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")


class PackedStudent(nn.Module):
    """log pi(t^u | v, l) of packed batches.

    forward(batch, ...) takes batches as `pack` returns them, on the model's device. It returns for
    each batch logps (B, K) fp32: the sum over a response's tokens with its end token, 0 for an
    absent response.

    It is a module of its own because DDP reduces gradients only where the wrapped module itself is
    called, and is called once a step.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batches):
        return [self.logps(batch) for batch in batches]

    def logps(self, batch):
        """The logps (B, K) of one packed batch."""
        branch, parent = batch["branch"], batch["parent"]
        i = torch.arange(branch.shape[1], device=branch.device)
        # a token sees (B, S, S):
        sees = branch[:, None, :] == 0                              # the prefix,
        sees = sees | (branch[:, None, :] == branch[:, :, None])    # its own branch,
        sees = sees | (branch[:, None, :] == parent[:, :, None])    # the parent of that branch,
        sees = sees & (i[:, None] >= i)                             # and nothing that comes later
        hidden = self.model.model(
            input_ids=batch["ids"],
            position_ids=batch["position_ids"],
            attention_mask=sees[:, None],
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            use_cache=False).last_hidden_state                      # (B, S, hidden size)
        hidden = hidden.flatten(0, 1)[batch["source"]]              # (R, hidden size)
        head, logps = self.model.lm_head.weight, []
        for h, target in zip(hidden.split(LM_HEAD_CHUNK), batch["targets"].split(LM_HEAD_CHUNK)):
            if torch.is_grad_enabled():
                logps.append(checkpoint(target_logps, h, head, target, use_reentrant=False))
            else:
                logps.append(target_logps(h, head, target))
        sums = torch.zeros(batch["tokens"].numel(), device=hidden.device)
        return sums.index_add(0, batch["owner"], torch.cat(logps)).view(batch["tokens"].shape)
