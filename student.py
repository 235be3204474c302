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

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

import data
from runtime.records import read_json

# all linear layers of the decoder
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRAINABLE = ("lora", "merger", "decoder", "vision")
LM_HEAD_CHUNK = 512  # rows of fp32 logits that exist at a time


# ------------------------------------------------------------------------------------- loading

def require_family(path):
    """Raises ValueError unless a folder or hub id holds a Qwen2.5-VL, of any size.

    path  folder or hub id, of which only config.json and the index of the weights are read
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, trust_remote_code=False)
    except OSError as error:
        raise ValueError(f"--student {path}: expected the folder or hub id of a Qwen2.5-VL: "
                         f"{str(error).splitlines()[0]}") from None
    family = config.get("model_type")
    if family != "qwen2_5_vl":
        inner = Path(path) / "student" / "config.json"
        meant = f"; {inner.parent} may be meant" if inner.exists() else ""
        raise ValueError(
            f"--student {path} is a {family or 'model without a model_type'}, expected a "
            f"Qwen2.5-VL (qwen2_5_vl) of any size{meant}. For another family these would have to "
            "be true: student.Processor writes its chat format and image tokens; student.pack "
            "takes its positions from the model and lets branches restart behind the prefix; its "
            "attention takes a 4-D mask; set_trainable finds its decoder, its vision tower and "
            "what joins them. tests/test_packed.py then says whether the packed step is still "
            "exact")
    index = Path(path) / "model.safetensors.index.json"
    if index.exists():  # transformers would unpickle a file of any other kind that it names
        files = read_json(index)["weight_map"].values()
        if not all(str(file).endswith(".safetensors") for file in files):
            raise ValueError(f"{index}: expected .safetensors files only")


def load(path, bf16=False, device="cpu", gradient_checkpointing=False):
    """Loads a Qwen2.5-VL of any size, in eval mode; safetensors only, no remote code.

    path    folder or hub id
    bf16    weights in bf16, else in fp32
    device  torch.device or its name, where the model is put
    gradient_checkpointing  recompute each layer in the backward pass (in train mode)
    Returns the model. Raises ValueError for another family and for weights that cannot be read.
    """
    require_family(path)
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=torch.bfloat16 if bf16 else torch.float32, attn_implementation="sdpa",
            use_safetensors=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"--student {path}: expected its weights as safetensors: {error}") from None
    embed = model.model.visual.patch_embed
    # Patches do not overlap, so their convolution is a matrix product. Conv3d is several times
    # slower, on a CPU and in bf16.
    embed.forward = lambda patches: F.linear(patches.to(embed.proj.weight.dtype),
                                             embed.proj.weight.flatten(1))
    if gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.to(device).eval()


# --------------------------------------------------------------------- what it sees of a study

class Processor:
    """Turns a study into the student's tensors.

    student     folder or hub id, of which only tokenizer and image processor are read
    task        data.Task, for its system prompt
    images      folder that image paths are relative to
    max_pixels  pixels of an image at most; 28 x 28 pixels make one token
    max_tokens  tokens of a study's packed row at most; in a longer row the ends of the longest
                responses are cut (training.drop_long finds these studies); None: no bound
    Raises ValueError where the tokenizer or the image processor cannot be read. The chat format is
    written here because transformers' AutoProcessor needs torchvision.
    """

    def __init__(self, student, task, images=".", max_pixels=1024 * 28 * 28, max_tokens=None):
        self.task, self.images, self.max_tokens = task, images, max_tokens
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(student, trust_remote_code=False)
            self.image_processor = qwen2_vl.Qwen2VLImageProcessorPil.from_pretrained(student)
        except Exception as error:  # a broken file can make them raise nearly anything
            raise ValueError(f"--student {student}: expected the tokenizer and image processor "
                             f"of a Qwen2.5-VL: {error}") from None
        size = self.image_processor.size
        self.image_processor.size = {"shortest_edge": size["shortest_edge"],
                                     "longest_edge": min(size["longest_edge"], max_pixels)}
        special = self.tokenizer.convert_tokens_to_ids
        self.start, self.end = special("<|im_start|>"), special("<|im_end|>")
        self.vision_start, self.vision_end = special("<|vision_start|>"), special("<|vision_end|>")
        self.image_pad, self.pad = special("<|image_pad|>"), self.tokenizer.pad_token_id

    def tokens(self, text):
        """Token ids of plain text; '<|im_end|>' inside a teacher's text stays text."""
        encoded = self.tokenizer(text, split_special_tokens=True, add_special_tokens=False)
        return encoded["input_ids"]

    def text(self, ids):
        """The text of a response's token ids, without the end token."""
        return self.tokenizer.decode([int(i) for i in ids if int(i) not in (self.end, self.pad)])

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
        if self.max_tokens:
            lengths = [len(r) for r in responses if r is not None]
            kept = iter(shorten_longest(lengths, self.max_tokens - len(prefix)))
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


def smart_resize(height, width, factor=28, min_pixels=56 * 56, max_pixels=1024 * 28 * 28):
    """The size at which the student sees an image: multiples of `factor` within the two bounds.

    height, width           of the image in pixels
    factor                  side of one token in pixels
    min_pixels, max_pixels  the bounds of height x width
    Returns (height, width) in pixels.
    """
    return qwen2_vl.smart_resize(height, width, factor, min_pixels, max_pixels)


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
        self.base, self.scale, self.dropout = base, alpha / r, nn.Dropout(dropout)
        fp32 = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **fp32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, **fp32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def merged(self):
        """The plain linear layer with W + (alpha / r) B A, the sum taken in fp32."""
        weight = self.base.weight
        weight.data = (weight.float() + self.scale * self.lora_B @ self.lora_A).to(weight.dtype)
        return self.base


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


def set_trainable(model, train, r=8, alpha=32, dropout=0.0, seed=0):
    """Freezes everything but what trains.

    model    the student, changed in place
    train    list of parts: lora (every linear layer of the decoder), merger, decoder, vision (the
             tower without its merger)
    r        rank of the adapters
    alpha    their scale is alpha / r
    dropout  probability, of the adapters' input
    seed     of the adapters' A
    Returns {name: parameter} of what trains.
    """
    model.requires_grad_(False)
    visual, decoder = model.model.visual, model.model.language_model
    parts = {"merger": [visual.merger], "decoder": [decoder, model.lm_head],
             "vision": [visual.patch_embed, visual.blocks], "lora": []}
    for part in train:
        for module in parts[part]:
            module.requires_grad_(True)
    if "lora" in train:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, module in list(decoder.named_modules()):
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
                    replace_module(decoder, name, LoRALinear(module, r, alpha, dropout))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def merge_lora(model):
    """Folds every adapter into its layer, in place."""
    for name, layer in lora_layers(model).items():
        replace_module(model, name, layer.merged())


def enable_gradient_checkpointing(model):
    """Recomputes each layer in the backward pass (active in train mode).

    transformers also makes the patch embedding's output require gradients, which would send the
    backward pass through a frozen tower; non-reentrant checkpointing needs no such hook.
    """
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def save_adapter(model, folder, base, r, alpha, dropout):
    """Writes the LoRA weights in PEFT's format.

    model   the student with adapters
    folder  where adapter_model.safetensors and adapter_config.json are written;
            PeftModel.from_pretrained(base_model, folder) loads them
    base    folder or hub id of the student that the adapters belong to
    r, alpha, dropout  as `set_trainable` had them
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in lora_layers(model).items():
        for part in ("lora_A", "lora_B"):
            weight = getattr(layer, part).detach().cpu().contiguous()
            tensors[f"base_model.model.{name}.{part}.weight"] = weight
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base),
              "r": r, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none",
              "inference_mode": True,
              # an expression, since a plain list of names would also hit the vision tower
              "target_modules": rf"model\.language_model\..*\.({'|'.join(LORA_TARGETS)})"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save_student(model, processor, folder, card):
    """Writes a folder that transformers and vLLM load as it is.

    model      the student, without adapters
    processor  Processor, for its tokenizer and image processor
    folder     where all is written
    card       text of the model card, README.md
    """
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


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
