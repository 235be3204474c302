"""The student: a Qwen2.5-VL, what of it trains, its packed log-probabilities, and sampling from it.

Packed step. The K = 1 + N responses of a study share image and prompt, so image and prefix run once and the responses lie
behind the prefix as branches of one row:

    ids     prefix (P tokens) | t+ | t^1 | ... | t^N        each response without its last token, which is only a target
    sees    i sees j if j <= i and (j is in the prefix or in i's own branch)
    place   M-RoPE of the prefix; every branch goes on right behind it, as if it stood there alone

That is exact: the log-probabilities and gradients equal those of K separate forwards (tests/test_packed.py). The LM head runs on
response tokens only, in chunks that are computed again in the backward pass, so no [tokens x vocabulary] tensor is kept.

Shapes: B studies, K responses, P prefix tokens, S row length, R response tokens of the whole batch, V vocabulary.
"""

import json
import math
import random
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig, PreTrainedConfig, Qwen2_5_VLForConditionalGeneration
from transformers.generation import LogitsProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from runtime.records import read_json

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all linear layers of the decoder
TRAINABLE = ("lora", "merger", "decoder", "vision")
LM_HEAD_CHUNK = 512  # rows of fp32 logits alive at a time


def require_family(path):
    """Raises ValueError unless a folder or hub id holds a Qwen2.5-VL, of any size; only its config.json is read."""
    try:
        family = PreTrainedConfig.get_config_dict(path, trust_remote_code=False)[0].get("model_type")
    except OSError as error:
        raise ValueError(f"--student {path}: expected the folder or hub id of a Qwen2.5-VL: {str(error).splitlines()[0]}") from None
    if family != "qwen2_5_vl":
        inner = Path(path) / "student" / "config.json"
        raise ValueError(
            f"--student {path} is a {family or 'model without a model_type'}, expected a Qwen2.5-VL (qwen2_5_vl) of any size"
            + (f"; {inner.parent} may be meant" if inner.exists() else "")
            + ". For another family these would have to be true: data.Encoder writes its chat format and image tokens; student.pack takes its "
            "positions from the model and lets branches restart behind the prefix; its attention takes a 4-D mask; set_trainable finds its "
            "decoder, its vision tower and what joins them. tests/test_packed.py then says whether the packed step is still exact")
    index = Path(path) / "model.safetensors.index.json"
    if index.exists() and not all(str(file).endswith(".safetensors") for file in read_json(index)["weight_map"].values()):
        raise ValueError(f"{index}: expected .safetensors files only")  # transformers would unpickle what else it names, if with care


def load(path, dtype=torch.float32, device="cpu"):
    """A Qwen2.5-VL of any size from a folder or a hub id (safetensors only, no remote code), in eval mode. Raises ValueError for other families."""
    require_family(path)
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--student {path}: expected its weights as safetensors: {error}") from None
    embed = model.model.visual.patch_embed
    # patches do not overlap, so the convolution is a matrix product; Conv3d is several times slower, on CPU and in bf16
    embed.forward = lambda patches: F.linear(patches.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    return model.to(device).eval()


# ------------------------------------------------------------------------------------------------------- what trains

class LoRALinear(nn.Module):
    """W x + (alpha / r) B A dropout(x), W frozen (Hu et al. 2021). A, B stay fp32 beside a bf16 W; B starts at zero."""

    def __init__(self, base, r, alpha, dropout):
        super().__init__()
        self.base, self.scale, self.dropout, self.enabled = base, alpha / r, nn.Dropout(dropout), True
        new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=base.weight.device)
        self.lora_A = nn.Parameter(new(r, base.in_features))
        self.lora_B = nn.Parameter(new(base.out_features, r).zero_())
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):
        if not self.enabled:
            return self.base(x)
        low = F.linear(self.dropout(x), self.lora_A.to(x.dtype))
        return self.base(x) + self.scale * F.linear(low, self.lora_B.to(x.dtype))

    def merged(self):
        """The plain linear layer with W + (alpha / r) B A, the sum taken in fp32."""
        self.base.weight.data = (self.base.weight.float() + self.scale * self.lora_B @ self.lora_A).to(self.base.weight.dtype)
        return self.base


def lora_layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def _replace(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def parse_train(flag):
    """--train as a list of parts. Raises ValueError for an unknown part and for lora beside decoder."""
    train = flag.split(",")
    if set(train) - set(TRAINABLE) or {"lora", "decoder"} <= set(train):
        raise ValueError(f"--train {flag}: expected some of {', '.join(TRAINABLE)}, and not both lora and decoder")
    return train


def set_trainable(model, train, r=8, alpha=32, dropout=0.0, seed=0):
    """Freezes everything but `train`, a list of lora | merger | decoder | vision. LoRA goes on every linear layer of the decoder;
    'vision' is the tower without its merger. Returns {name: parameter}."""
    model.requires_grad_(False)
    parts = {"merger": [model.model.visual.merger], "decoder": [model.model.language_model, model.lm_head],
             "vision": [model.model.visual.patch_embed, model.model.visual.blocks], "lora": []}
    for part in train:
        for module in parts[part]:
            module.requires_grad_(True)
    if "lora" in train:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, module in list(model.model.language_model.named_modules()):
                if isinstance(module, nn.Linear) and name.rpartition(".")[2] in LORA_TARGETS:
                    _replace(model.model.language_model, name, LoRALinear(module, r, alpha, dropout))
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_lora(model):
    """Folds every adapter into its layer, in place."""
    for name, layer in lora_layers(model).items():
        _replace(model, name, layer.merged())


def save_adapter(model, folder, base, r, alpha, dropout):
    """The LoRA weights in PEFT's format: PeftModel.from_pretrained(base_model, folder) loads them."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in lora_layers(model).items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": r, "lora_alpha": alpha,
              "lora_dropout": dropout, "bias": "none", "inference_mode": True,
              # an expression, since a plain list of names would also hit the vision tower
              "target_modules": rf"model\.language_model\..*\.({'|'.join(LORA_TARGETS)})"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def save(model, encoder, folder, card):
    """A folder that transformers and vLLM load as it is: weights, config, tokenizer, image processor and a model card."""
    folder = Path(folder)
    model.save_pretrained(folder)
    encoder.tokenizer.save_pretrained(folder)
    encoder.image_processor.save_pretrained(folder)
    (folder / "README.md").write_text(card, encoding="utf-8")


# --------------------------------------------------------------------------------------------------- the packed step

def pack(examples, model):
    """B encoded studies (data.Encoder) with K responses each -> the packed batch, on CPU.

    examples: B dicts of prefix_ids (P,), pixel_values (patches, 1176 = 3 colours x 2 frames x 14 x 14), image_grid_thw (images, 3): frames,
    height, width in patches; responses [K of (n,) or None]. A row is the prefix and behind it the responses without their last token,
    each a branch: S tokens at most. The responses of all rows have R tokens.
    -> ids (B, S), position_ids (3, B, S), branch (B, S): 0 prefix, 1 + k the response of column k, -1 padding; source (R,): where in the
    flattened (B * S) rows each target is predicted from; targets (R,); owner (R,): b * K + k; tokens (B, K): response lengths.
    """
    config = model.config
    K = len(examples[0]["responses"])
    rows = []
    for b, example in enumerate(examples):
        prefix = example["prefix_ids"]
        image = (prefix == config.image_token_id).long()  # without the types Qwen2.5-VL falls back to 1-D positions
        position, _ = model.model.get_rope_index(prefix[None], image[None], image_grid_thw=example["image_grid_thw"])
        P, behind = len(prefix), int(position.max()) + 1
        ids, branch, positions, source, owner, at = [prefix], [torch.zeros(P).long()], [position[:, 0]], [], [], P
        for k, response in enumerate(example["responses"]):
            if response is None:
                continue
            n = len(response) - 1
            ids.append(response[:-1])
            branch.append(torch.full((n,), 1 + k))
            positions.append((behind + torch.arange(n)).expand(3, n))  # every branch restarts behind the prefix
            source += [P - 1, *range(at, at + n)]  # its first token is predicted from the prefix's last one
            owner += [b * K + k] * (n + 1)
            at += n
        rows.append((torch.cat(ids), torch.cat(branch), torch.cat(positions, 1), torch.tensor(source, dtype=torch.long), owner))
    B, S = len(rows), max(len(row[0]) for row in rows)
    batch = {"ids": torch.zeros(B, S).long(), "branch": torch.full((B, S), -1), "position_ids": torch.zeros(3, B, S).long()}
    for b, (ids, branch, positions, _, _) in enumerate(rows):
        batch["ids"][b, :len(ids)], batch["branch"][b, :len(ids)], batch["position_ids"][:, b, :len(ids)] = ids, branch, positions
    responses = [r for example in examples for r in example["responses"]]
    batch["source"] = torch.cat([b * S + row[3] for b, row in enumerate(rows)])
    batch["owner"] = torch.tensor([o for row in rows for o in row[4]], dtype=torch.long)
    batch["targets"] = torch.cat([r for r in responses if r is not None])
    batch["tokens"] = torch.tensor([0 if r is None else len(r) for r in responses]).view(B, K)
    batch["pixel_values"] = torch.cat([example["pixel_values"] for example in examples])
    batch["image_grid_thw"] = torch.cat([example["image_grid_thw"] for example in examples])
    return batch


def _target_logps(hidden, head, targets):
    return -F.cross_entropy(F.linear(hidden, head).float(), targets, reduction="none")


class PackedStudent(nn.Module):
    """forward(batch of `pack`, ...) -> for each batch logps (B, K) fp32: log pi(t^u | v, l), summed over a response's tokens with
    its end token; 0 for an absent response. A module of its own, since DDP reduces gradients only if the wrapped module itself is
    called, and once a step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batches):
        return [self.logps(batch) for batch in batches]

    def logps(self, batch):
        branch = batch["branch"]
        i = torch.arange(branch.shape[1], device=branch.device)
        sees = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])  # (B, S, S)
        if "parent" in batch:  # branches on branches, see questions.py
            sees |= branch[:, None, :] == batch["parent"][:, :, None]
        sees &= i[:, None] >= i
        hidden = self.model.model(input_ids=batch["ids"], position_ids=batch["position_ids"], attention_mask=sees[:, None],
                                  pixel_values=batch["pixel_values"], image_grid_thw=batch["image_grid_thw"],
                                  use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch["source"]]  # (R, hidden size)
        head, logps = self.model.lm_head.weight, []
        for h, target in zip(hidden.split(LM_HEAD_CHUNK), batch["targets"].split(LM_HEAD_CHUNK)):
            if torch.is_grad_enabled():
                logps.append(checkpoint(_target_logps, h, head, target, use_reentrant=False))
            else:
                logps.append(_target_logps(h, head, target))
        zeros = torch.zeros(batch["tokens"].numel(), device=hidden.device)
        return zeros.index_add(0, batch["owner"], torch.cat(logps)).view(batch["tokens"].shape)


def step_flops(config, prefix, responses, patches, train, checkpointing=True):
    """(model, hardware) FLOPs of one packed step on one study; hardware includes what is computed again in the backward pass.

    config: Qwen2_5_VLConfig; prefix: its tokens; responses: tokens of each with its end token; patches: of the image; train: some of
    lora | merger | decoder | vision. What LoRA and a training merger add is left out, it is below 1%.
    """
    text, vision = config.text_config, config.vision_config
    h, kv = text.hidden_size, text.hidden_size // text.num_attention_heads * text.num_key_value_heads
    weights = text.num_hidden_layers * (2 * h * h + 2 * h * kv + 3 * h * text.intermediate_size)
    tokens = prefix + sum(n - 1 for n in responses)
    attended = prefix * (prefix + 1) / 2 + sum((n - 1) * (prefix + n / 2) for n in responses)  # pairs that the mask lets see
    head = 2 * h * text.vocab_size * sum(responses)
    decoder = 2 * weights * tokens + 4 * h * text.num_hidden_layers * attended + head

    w, full = vision.hidden_size, len(vision.fullatt_block_indexes)
    weights = vision.depth * (4 * w * w + 3 * w * vision.intermediate_size) + w * 3 * vision.temporal_patch_size * vision.patch_size ** 2
    weights += (4 * w) * (4 * w + vision.out_hidden_size) / 4  # the merger takes four patches at a time
    window = min(patches, (vision.window_size // vision.patch_size) ** 2)
    tower = 2 * weights * patches + 4 * w * patches * (full * patches + (vision.depth - full) * window)

    # forward 1, gradient of the activations 1, gradient of the weights 1; nothing goes back into a frozen tower
    model = decoder * (3 if "decoder" in train else 2) + tower * (3 if "vision" in train else 1)
    again = decoder + tower * ("vision" in train) if checkpointing else head
    return model, model + again


def batch_flops(model, batch, train, checkpointing):
    """`step_flops` of a packed batch, summed over its studies."""
    prefixes, patches = (batch["branch"] == 0).sum(1).tolist(), batch["image_grid_thw"].prod(1).sum().item() / len(batch["tokens"])
    rows = [step_flops(model.config, prefix, [n for n in lengths if n], patches, train, checkpointing)
            for prefix, lengths in zip(prefixes, batch["tokens"].tolist())]
    return [sum(column) for column in zip(*rows)]


def to(batch, device):
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def enable_gradient_checkpointing(model):
    """Recomputes each layer in the backward pass (active in train mode). transformers also makes the patch embedding's output
    require gradients, which would send the backward pass through a frozen tower; non-reentrant checkpointing needs no such hook."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


# ---------------------------------------------------------------------------------------------------------- sampling

def _folded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """SDPA for a left-padded batch. Decoding puts the query groups into the query axis, which spares a copy of the key-value cache for
    each group in every step; the prompts go row by row without their padding, causal by themselves, which spares the mask."""
    B, H, q, D = query.shape
    if q == 1:
        out = F.scaled_dot_product_attention(query.view(B, key.shape[1], -1, D), key, value, attn_mask=attention_mask, scale=scaling)
        return out.reshape(B, 1, H, D), None
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    out = torch.zeros_like(query)
    for b, pad in enumerate((~attention_mask[:, 0, -1]).sum(-1).tolist()):
        row = slice(b, b + 1), slice(None), slice(pad, None)
        out[row] = F.scaled_dot_product_attention(query[row], key[row], value[row], is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("folded", _folded_attention)
AttentionMaskInterface.register("folded", sdpa_mask)


class SeededSampling(LogitsProcessor):
    """Draws each row's token from its own random numbers and leaves only that token possible, so that what a study samples
    depends on its seed and neither on its neighbours in the batch nor on the number of ranks."""

    def __init__(self, seeds, temperature, top_p):
        self.streams = [random.Random(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids, scores):
        p = torch.softmax(scores.double() / self.temperature, -1)
        if self.top_p < 1:  # keep the smallest set that holds top_p of the mass
            ordered, token = p.sort(dim=-1, descending=True)
            p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, token, ordered.cumsum(-1) - ordered >= self.top_p), 0)
        cumulated = p.cumsum(-1)
        u = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64, device=scores.device)
        drawn = torch.searchsorted(cumulated, u[:, None] * cumulated[:, -1:] * (1 - 1e-12), right=True)  # the first that exceeds it
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


@torch.no_grad()
def sample(model, encoder, examples, seeds, temperature=1.0, top_p=1.0, max_new_tokens=1024):
    """Responses to B encoded prefixes, in one left-padded batch. temperature 0 is greedy.
    seeds: B strings or ints, one per study. -> B pairs (ids (n,), finish): 'stop' with the end token, or 'length'."""
    longest = max(len(example["prefix_ids"]) for example in examples)
    ids = torch.stack([F.pad(e["prefix_ids"], (longest - len(e["prefix_ids"]), 0), value=encoder.pad) for e in examples])
    padding = torch.tensor([longest - len(example["prefix_ids"]) for example in examples])
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, repetition_penalty=1.0,  # Qwen's own has 1.05
                              eos_token_id=encoder.end, pad_token_id=encoder.pad)
    text_config = model.model.language_model.config
    before, text_config._attn_implementation = text_config._attn_implementation, "folded"
    training = model.training
    model.eval()
    try:
        batch = to({"input_ids": ids, "attention_mask": (torch.arange(longest) >= padding[:, None]).long(),
                    "pixel_values": torch.cat([example["pixel_values"] for example in examples]),
                    "image_grid_thw": torch.cat([example["image_grid_thw"] for example in examples]),
                    "mm_token_type_ids": (ids == model.config.image_token_id).long()}, model.device)
        out = model.generate(**batch, generation_config=config,
                             logits_processor=[SeededSampling(seeds, temperature, top_p)] if temperature else [])
    finally:
        text_config._attn_implementation = before
        model.train(training)
    results = []
    for row in out[:, longest:].cpu():
        ends = (row == encoder.end).nonzero()
        results.append((row[:int(ends[0]) + 1], "stop") if len(ends) else (row, "length"))
    return results
