"""Texts from the student, loaded here or behind a server: seeded sampling, answers to many studies.

The text that is sampled for a study depends on its seed, and neither on its neighbours in the batch
nor on the number of ranks. Decoding is transformers' `generate` with an attention of our own
("folded"), which does not copy the key-value cache and needs no mask for the prompts.

Shapes: B studies, P prompt tokens, V vocabulary; H heads of size D, q query positions.
"""

import hashlib
import math
import random
import threading

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AttentionInterface, AttentionMaskInterface, GenerationConfig
from transformers.generation import LogitsProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import data
import student
from runtime import endpoint, ranks
from runtime.records import printable
from runtime.shared import shared_map

# ------------------------------------------------------------------------------------- decoding

def folded_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention by SDPA for a left-padded batch, with the arguments that transformers gives.

    query           (B, H, q, D)
    key, value      (B, heads of the key-value cache, length so far, D)
    attention_mask  (B, 1, q, length so far) bool, or None where nothing is padded
    scaling         factor of the scores; None: 1 / sqrt(D)
    Returns ((B, q, H, D), None).

    While decoding (q = 1) the query heads that share a key are put into the query axis, so that the
    key-value cache is not copied for each of them in every step. The prompts are computed row by
    row without their padding, where causal attention needs no mask.
    """
    B, H, q, D = query.shape
    if q == 1:
        grouped = query.view(B, key.shape[1], -1, D)
        out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask,
                                             scale=scaling)
        return out.reshape(B, 1, H, D), None
    if attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask,
                                      scaling=scaling, **kwargs)
    out = torch.zeros_like(query)
    for b, pad in enumerate((~attention_mask[:, 0, -1]).sum(-1).tolist()):
        row = slice(b, b + 1), slice(None), slice(pad, None)
        out[row] = F.scaled_dot_product_attention(query[row], key[row], value[row], is_causal=True,
                                                  scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("folded", folded_attention)
AttentionMaskInterface.register("folded", sdpa_mask)


class SeededSampling(LogitsProcessor):
    """Draws each row's token from its own random numbers and leaves only that token possible.

    seeds        B strings or ints
    temperature  above 0
    top_p        nucleus mass; 1 keeps all tokens
    """

    def __init__(self, seeds, temperature, top_p):
        self.streams = [random.Random(seed) for seed in seeds]
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids, scores):
        p = torch.softmax(scores.double() / self.temperature, -1)               # (B, V)
        if self.top_p < 1:  # keep the smallest set that holds top_p of the mass
            ordered, token = p.sort(dim=-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p
            p = p.masked_fill(torch.zeros_like(p, dtype=torch.bool).scatter(-1, token, beyond), 0)
        cumulated = p.cumsum(-1)
        u = torch.tensor([stream.random() for stream in self.streams], dtype=torch.float64,
                         device=scores.device)
        # the first token at which the cumulated mass exceeds u of the whole mass
        threshold = u[:, None] * cumulated[:, -1:] * (1 - 1e-12)                # (B, 1)
        drawn = torch.searchsorted(cumulated, threshold, right=True)
        return torch.full_like(scores, -math.inf).scatter(-1, drawn, 0.0)


@torch.no_grad()
def sample(model, processor, examples, seeds, temperature=1.0, top_p=1.0, max_new_tokens=1024):
    """Samples a response to each of B encoded prefixes, in one left-padded batch.

    model           the student; its mode (train or eval) is restored afterwards
    processor       student.Processor
    examples        B dicts as student.Processor returns them
    seeds           B strings or ints, one per study
    temperature     0 is greedy
    top_p           nucleus mass; 1 keeps all tokens
    max_new_tokens  tokens of a response at most
    Returns B pairs (ids (n,), finish): finish is 'stop' where an end token is the last one, else
    'length'.
    """
    longest = max(len(example["prefix_ids"]) for example in examples)
    padding = [longest - len(example["prefix_ids"]) for example in examples]
    ids = torch.stack([F.pad(example["prefix_ids"], (pad, 0), value=processor.pad)
                       for example, pad in zip(examples, padding)])             # (B, P)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # Qwen's generation_config.json has 1.05
        eos_token_id=processor.ends,
        pad_token_id=processor.pad)
    text_config = model.model.language_model.config
    before, text_config._attn_implementation = text_config._attn_implementation, "folded"
    was_training = model.training
    model.eval()
    try:
        (batch,) = student.to_device(model.device, {
            "input_ids": ids,
            "attention_mask": (torch.arange(longest) >= torch.tensor(padding)[:, None]).long(),
            "pixel_values": torch.cat([example["pixel_values"] for example in examples]),
            "image_grid_thw": torch.cat([example["image_grid_thw"] for example in examples]),
            "mm_token_type_ids": (ids == model.config.image_token_id).long()})
        drawing = [SeededSampling(seeds, temperature, top_p)] if temperature else []
        out = model.generate(**batch, generation_config=config, logits_processor=drawing)
    finally:
        text_config._attn_implementation = before
        model.train(was_training)
    results = []
    for row in out[:, longest:].cpu():
        ends = torch.isin(row, torch.tensor(processor.ends)).nonzero()
        results.append((row[:int(ends[0]) + 1], "stop") if len(ends) else (row, "length"))
    return results


# ---------------------------------------- a student that samples: loaded here, or behind a server

class LoadedStudent:
    """Samples t+ from a student that is loaded here.

    path            folder or hub id of the student
    task            data.Task
    images          folder that image paths are relative to
    max_pixels      pixels of an image at most, or None, as student.Processor takes it
    bf16            weights in bf16, else in fp32
    seed            of the order of the readers in the prompt
    temperature     0 is greedy
    top_p           nucleus mass
    max_new_tokens  tokens of a text at most
    encode(study) returns what `sample` takes; sample(examples, seeds) returns [(text, tokens,
    finish)], one for each example.
    """

    def __init__(self, path, task, images, max_pixels, bf16, seed, temperature, top_p,
                 max_new_tokens):
        self.processor = student.Processor(path, task, images, max_pixels)
        self.model = student.load(path, bf16, ranks.init())
        ranks.require_same(lambda: {"--student": student.digest(self.model, self.processor)})
        self.task, self.seed = task, seed
        self.decoding = temperature, top_p, max_new_tokens

    def encode(self, study):
        return self.processor(study, data.compare_prompt(study, self.task, self.seed))

    def sample(self, examples, seeds):
        longest = max((example["prefix_ids"] for example in examples), key=len)
        batch = {"studies": [example["id"] for example in examples], "longest prompt": longest}
        with ranks.out_of_memory(batch, "--batch_size or --max_new_tokens"):
            out = sample(self.model, self.processor, examples, seeds, *self.decoding)
        return [(self.processor.text(ids), len(ids), finish) for ids, finish in out]


class ServedStudent:
    """Samples t+ from a student behind an OpenAI-compatible server, by the same two methods.

    server  runtime.endpoint.Endpoint
    path    folder or hub id of the student, of which only tokenizer and image processor are read;
            None: the server's prompt is not compared with the student's
    The other arguments are LoadedStudent's. `sample` raises endpoint.Failure where the server gives
    no answer, and where its first answer was to another prompt.
    """

    def __init__(self, server, path, task, images, max_pixels, seed, temperature, top_p,
                 max_new_tokens):
        self.server, self.task, self.images = server, task, images
        self.seed, self.temperature, self.top_p = seed, temperature, top_p
        self.max_new_tokens = max_new_tokens
        self.processor = student.Processor(path, task, images, max_pixels) if path else None
        without = student.MAX_PIXELS if max_pixels is None else max_pixels
        self.max_pixels = self.processor.max_pixels if path else without
        self.compared, self.lock = False, threading.Lock()

    def prompt(self, study):
        """The text of (l, T), in which a server finds no special tokens of the student."""
        return data.compare_prompt(study, self.task, self.seed).replace("<|", "< |")

    def encode(self, study):
        """The study and the messages of its request: the films at the size that the student sees,
        and (l, T)."""
        parts = []
        for path in study.images:
            with data.DECODERS:  # of the requests in flight, few decode a film at a time
                image = data.load_image(path, self.images)
                height, width = student.smart_resize(image.height, image.width,
                                                     max_pixels=self.max_pixels)
                resized = image.resize((width, height), Image.Resampling.BICUBIC)
                del image  # which may be far larger
            parts.append(endpoint.image_part(resized, "PNG"))
        text = self.prompt(study)
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        if system := self.task.prompts["system"]:
            messages.insert(0, {"role": "system", "content": system})
        return study, messages

    def sample(self, examples, seeds):
        return [self.ask(study, messages, seed) for (study, messages), seed in zip(examples, seeds)]

    def ask(self, study, messages, seed):
        """One sample, (text, tokens, finish); the server gets a number made from `seed`, a text."""
        number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "little") >> 1
        try:
            answer = endpoint.ask(
                self.server, messages, seed, temperature=self.temperature, top_p=self.top_p,
                max_tokens=self.max_new_tokens, seed=number,
                skip_special_tokens=False)  # of vLLM and SGLang; else chat markers would go unseen
        except endpoint.Failure as failure:
            where = f"{self.server.url}, sample {seed!r}"
            raise endpoint.Failure(failure.kind, f"{where}: {failure}") from None
        prompt_tokens, tokens = endpoint.count(answer.usage) or (None, None)
        with self.lock:  # of the requests in flight, none returns before the first is compared
            if not self.compared:
                self.compare(study, prompt_tokens)
            self.compared = True
        return answer.text, tokens, answer.finish

    def compare(self, study, prompt_tokens):
        """Raises endpoint.Failure where the server saw another prompt than the student would.

        study          whose prompt was sent
        prompt_tokens  how many tokens it had for the server; None where it does not say
        Where there is nothing to compare with, that is printed.
        """
        url = self.server.url
        if prompt_tokens is None or self.processor is None:
            why = "it sends no usage" if prompt_tokens is None else "no --student is given"
            ranks.print_once(f"{url}: {why}, so that its prompt was not compared with the "
                             "student's; another chat template would not be noticed")
            return
        expected, _ = self.processor.lengths(study, self.prompt(study), ())
        if prompt_tokens != expected:
            raise endpoint.Failure("stop", (
                f"{url}: study {study.id}: the prompt has {prompt_tokens} tokens for the server, "
                f"expected {expected} as for --student; look at the server's chat template "
                "(student/ holds the right one), the size that it gives to images (at most "
                f"--max_pixels {self.max_pixels}) and the task's system prompt"))


def served_model(server, url):
    """The name of the only model that a server has.

    server  runtime.endpoint.Endpoint
    url     its address, for the message
    Raises ValueError where it has none or several.
    """
    names = endpoint.models(server)
    if len(names) != 1:
        raise ValueError(f"{url} serves {printable(', '.join(names)) or 'nothing'}: expected "
                         "--server_model with the name of pi_st")
    return names[0]


# -------------------------------------------------------------------------------------- answers

def answers(model, processor, studies, task, temperature, seed=0, batch_size=50,
            max_new_tokens=1024, prompt="student", num_workers=0, desc="answers", parts=None,
            failed=None):
    """The student's text for each study, shared over the ranks.

    model           the student
    processor       student.Processor
    studies         [data.Study]
    task            data.Task
    temperature     0: greedy; else one sample per study, drawn by its own seed
    seed            from which the studies' seeds are made
    batch_size      studies per call of `sample`
    max_new_tokens  tokens of a text at most
    prompt          which of the task's prompts is asked
    num_workers, desc, parts, failed  as runtime.shared.shared_map takes them
    Returns the texts in the studies' order, on every rank; None for a study that is in `failed`.
    """
    by_id = {study.id: study for study in studies}

    def encode(key):
        return processor(by_id[key], data.student_prompt(by_id[key], task, prompt))

    def work(keys, examples):
        seeds = [f"{seed} {key} answer" for key in keys]
        out = sample(model, processor, examples, seeds, temperature, 1.0, max_new_tokens)
        return [processor.text(ids) for ids, _ in out]

    texts = shared_map(list(by_id), encode, work, batch_size, parts, num_workers,
                       failed=failed, desc=desc)
    return [texts.get(study.id) for study in studies]
