"""Speed and memory of the packed step and of sampling, as ratios within one run.

Within a run the weights, the data and the device are the same for everyone. For metrics/ see
bench_metrics.py.

    python tests/bench.py step         packed, separate sequences and TRL's DPOTrainer
    python tests/bench.py step --device cuda --size 7b
                                       the 7B shape with random weights, lengths of the paper's
                                       Appendix B
    python tests/bench.py sample       folded against plain attention in decoding
    python tests/bench.py metrics      BLEU, ROUGE-L, CIDEr and METEOR beside the oracles
    python tests/bench.py evaluate     14 questions in one packed row against a forward for each

A step is one study and one update (forward, backward, clip, AdamW) with gradient checkpointing:
    packed      student.PackedStudent with the cached reference, Eq. 11
    separate    the usual implementation of Eq. 11: 1 + N padded sequences, full logits, a reference
                forward in every step
    TRL         DPOTrainer on the N pairs (t+, t^u), --trl_pairs at a time; token ids and pixels are
                given outside the measured time
The log-probs of the first step have to agree, so that equal work is compared. All have
student.load's patch embedding: with the stock Conv3d the others would be slower still.

Each competitor is a process. On CPU they take turns, so that whatever else runs slows all of them,
and memory is the peak resident set above that of the model just built; on CUDA one follows the
other, and memory is the allocator's peak with the weights.

--json ends with {"mode": {"full" | "lora" | "merger": {"time_vs_separate", "time_vs_trl",
"memory_vs_separate", "mfu", "hfu", "peak_gib"}}, "teacher_cost"}, null where not measured: how many
times the packed step's time or memory the others take, the shares of the GPU's peak FLOP/s that are
reached without and with what is recomputed, and time(N) / time(1) over tokens(N) / tokens(1).
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import bench_metrics  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import apo  # noqa: E402
import sampling  # noqa: E402
import student  # noqa: E402
import training  # noqa: E402
from evaluation import questions  # noqa: E402

TRAIN = {"full": ["decoder", "merger", "vision"], "lora": ["lora"], "merger": ["merger"]}
FIELDS = ("time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu", "peak_gib")
LORA = dict(r=8, alpha=32)
LEARNING_RATE = 1e-6

# text       hidden, layers, heads, kv heads, intermediate, vocabulary
# vision     hidden, layers, heads, intermediate, layers with full attention
# image      merged tokens high and wide
# prompt     text tokens of the prefix
# responses  tokens of t+, then of the teachers' texts
SIZES = {
    "tiny": dict(
        text=(32, 2, 4, 2, 64, 300), vision=(32, 2, 2, 64, [1]), image=(4, 4), prompt=9,
        responses=(7, 5, 9)),
    "small": dict(
        text=(128, 6, 8, 2, 512, 20_000), vision=(64, 4, 2, 192, [3]), image=(14, 14), prompt=54,
        responses=(90, 72, 35, 62, 94, 68, 139, 161)),  # Appendix B's times 1/4
    "7b": dict(
        text=(3584, 28, 28, 4, 18944, 152_064), vision=(1280, 32, 16, 3420, [7, 15, 23, 31]),
        image=(32, 32), prompt=80, responses=(361, 287, 140, 249, 375, 273, 557, 644)),
}


# ----------------------------------------------------------------------------------- the arithmetic

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 of SXM modules, a second


def step_flops(config, prefix, responses, patches, train, checkpointing=True):
    """FLOPs of one packed step on one study.

    config         Qwen2_5_VLConfig
    prefix         tokens of image and prompt
    responses      tokens of each response with its end token
    patches        of the image
    train          some of lora, merger, decoder, vision
    checkpointing  whether layers are computed again in the backward pass
    Returns (model, hardware) FLOPs; hardware includes what is computed again. What LoRA and a
    training merger add is left out, it is below 1%.
    """
    decoder, head = decoder_flops(config.text_config, prefix, responses)
    tower = tower_flops(config.vision_config, patches)
    # forward 1, gradient of the activations 1, gradient of the weights 1; no gradient goes into a
    # frozen tower
    model = decoder * (3 if "decoder" in train else 2) + tower * (3 if "vision" in train else 1)
    again = decoder + tower * ("vision" in train) if checkpointing else head
    return model, model + again


def decoder_flops(text, prefix, responses):
    """FLOPs of a forward of the decoder with its LM head, and those of the LM head.

    text       the decoder's config
    prefix     tokens of image and prompt
    responses  tokens of each response with its end token, which is only a target
    """
    h = text.hidden_size
    kv = h // text.num_attention_heads * text.num_key_value_heads
    weights = text.num_hidden_layers * (2 * h * h + 2 * h * kv + 3 * h * text.intermediate_size)
    tokens = packed_length(prefix, responses)
    attended = prefix * (prefix + 1) / 2  # pairs of tokens that the mask lets see each other
    attended += sum((n - 1) * (prefix + n / 2) for n in responses)
    head = 2 * h * text.vocab_size * sum(responses)
    return 2 * weights * tokens + 4 * h * text.num_hidden_layers * attended + head, head


def tower_flops(vision, patches):
    """FLOPs of a forward of the vision tower with its merger; vision is its config."""
    w, full = vision.hidden_size, len(vision.fullatt_block_indexes)
    weights = vision.depth * (4 * w * w + 3 * w * vision.intermediate_size)
    weights += w * 3 * vision.temporal_patch_size * vision.patch_size ** 2
    weights += (4 * w) * (4 * w + vision.out_hidden_size) / 4  # the merger takes four patches
    window = min(patches, (vision.window_size // vision.patch_size) ** 2)
    attended = patches * (full * patches + (vision.depth - full) * window)
    return 2 * weights * patches + 4 * w * attended


def packed_length(prefix, responses):
    """Tokens of a packed row: the last token of a response is only a target."""
    return prefix + sum(responses) - len(responses)


# -------------------------------------------------------------------------- the model and the study

def make_config(size):
    """The Qwen2_5_VLConfig of a size."""
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SIZES[size]["text"]
    width, depth, vision_heads, vision_intermediate, full = SIZES[size]["vision"]
    pairs = hidden // heads // 2  # rotary pairs of a head, shared among time, row and column
    row = (pairs - pairs // 4) // 2
    deviation = 1.2 / hidden ** 0.5  # 0.02 at 7B; with 0.02 a small model hardly sees its context
    text = dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, rms_norm_eps=1e-6, num_attention_heads=heads,
        num_key_value_heads=kv_heads, initializer_range=deviation, bos_token_id=None,
        eos_token_id=None, pad_token_id=0,
        rope_parameters=dict(rope_type="default", rope_theta=1e6,
                             mrope_section=[pairs - 2 * row, row, row]))
    vision = dict(
        hidden_size=width, depth=depth, num_heads=vision_heads,
        intermediate_size=vision_intermediate, window_size=112, fullatt_block_indexes=full,
        out_hidden_size=hidden, initializer_range=deviation)
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False,
        initializer_range=deviation, image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2, vision_start_token_id=vocabulary - 3,
        vision_end_token_id=vocabulary - 4)


def build(size, device):
    """The student of a size with random weights, the same at every call, made on the device: bf16
    on CUDA, else fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
            make_config(size), dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            attn_implementation="sdpa")
    embed = model.model.visual.patch_embed  # as in student.load
    embed.forward = lambda patches: F.linear(patches.to(embed.proj.weight.dtype),
                                             embed.proj.weight.flatten(1))
    return model.eval()


def make_study(size, teachers=None, more=0):
    """A study of random tokens and pixels, as student.Processor would return it.

    size      one of SIZES
    teachers  how many of them are there beside t+; None: all
    more      text tokens that its prompt is longer by
    """
    spec, config, g = SIZES[size], make_config(size), torch.Generator().manual_seed(1)
    words = lambda n: torch.randint(1, config.text_config.vocab_size - 8, (n,), generator=g)
    responses = [words(n) for n in spec["responses"]]
    (high, wide), text = spec["image"], words(spec["prompt"] - 2 + more)
    image = [config.vision_start_token_id, *[config.image_token_id] * (high * wide),
             config.vision_end_token_id]
    return {"id": "study",
            "prefix_ids": torch.cat([text[:4], torch.tensor(image), text[4:]]),
            "pixel_values": torch.randn(4 * high * wide, 3 * 2 * 14 * 14, generator=g),
            "image_grid_thw": torch.tensor([[1, 2 * high, 2 * wide]]),
            "responses": responses[:None if teachers is None else 1 + teachers]}


def padded(study, responses):
    """Each response behind its own prefix and image, right-padded.

    study      what `make_study` returns
    responses  K of (n,)
    Returns (the model's inputs, labels (K, longest row) with -100 off the response).
    """
    prefix, K = study["prefix_ids"], len(responses)
    width = max(map(len, responses))

    def rows(first, tails, value):
        tails = torch.stack([F.pad(tail, (0, width - len(tail)), value=value) for tail in tails])
        return torch.cat([first.expand(K, -1), tails], 1)

    ids = rows(prefix, responses, 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": rows(torch.ones_like(prefix), [torch.ones_like(r) for r in responses], 0),
        "pixel_values": study["pixel_values"].repeat(K, 1),
        "image_grid_thw": study["image_grid_thw"].repeat(K, 1),
        "mm_token_type_ids": (ids == prefix.max()).int()}
    return inputs, rows(torch.full_like(prefix, -100), responses, -100)


# ---------------------------------------------------------------------------------- the competitors

def clock(device):
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes, see the docstring of this file."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ours(turn, model, name, mode, args):
    """Runs one of our ways.

    turn   what `begin_turn` does
    model  the student, which is trained
    name   'packed', 'one teacher' (packed with N = 1) or 'separate'
    mode   what trains, one of TRAIN
    args   the flags
    Returns the log-probs (1 + N) of the first step.
    """
    study = make_study(args.size, 1 if name == "one teacher" else None)
    if name == "separate":
        inputs, labels = padded(study, study["responses"])
        (inputs,), labels = student.to_device(args.device, inputs), labels.to(args.device)
        logps = lambda model: apo.response_logps(model(**inputs, use_cache=False).logits,
                                                 labels)[None]
        # LoRA's reference is the model without the adapter
        start = model if mode == "lora" else build(args.size, args.device)
    else:
        (batch,) = student.to_device(args.device, student.pack([study], model))
        logps = lambda model: student.PackedStudent(model)(batch)[0]
        with torch.no_grad():
            ref_logps = logps(model)
    parameters = student.set_trainable(model, TRAIN[mode], **LORA)
    student.enable_gradient_checkpointing(model)
    settings = SimpleNamespace(learning_rate=LEARNING_RATE, adam_beta1=0.9, adam_beta2=0.98,
                               weight_decay=0.05)
    optimizer = training.make_optimizer(parameters, settings, shard=False)
    model.train()
    first = []
    without_lora = mock.patch.object(student.LoRALinear, "forward", lambda layer, x: layer.base(x))
    for _ in range(1 + args.repeats):
        done = turn()
        if name == "separate":
            with torch.no_grad(), without_lora:
                ref_logps = logps(start)
        now = logps(model)
        losses, _ = apo.apo_loss(now, ref_logps)
        losses.sum().backward()
        training.update(parameters, optimizer, LEARNING_RATE, max_grad_norm=1.0)
        done()
        first = first or now[0].tolist()
    return first


class PaddingToken(transformers.ProcessorMixin):
    """Tells DPOTrainer the padding token, and that the model sees images."""

    def __init__(self):
        self.tokenizer = SimpleNamespace(pad_token="<pad>", pad_token_id=0, eos_token_id=None,
                                         bos_token_id=None)


class Turns(transformers.TrainerCallback):
    """Lets DPOTrainer take its turns, and notes the log-probs of the first step.

    turn     what `begin_turn` does
    trainer  is set when there is one
    first    [of t+, the teachers' mean], as it logs them
    """

    def __init__(self, turn):
        self.turn, self.trainer, self.first = turn, None, []

    def on_step_begin(self, *_, **__):
        self.done = self.turn()

    def on_step_end(self, *_, **__):
        self.done()
        if not self.first:
            logged = self.trainer._metrics["train"]
            self.first = [statistics.mean(logged[key])
                          for key in ("logps/chosen", "logps/rejected")]


def run_trl(turn, model, mode, args):
    """Runs DPOTrainer.train() as it is; takes the arguments of `run_ours`.

    Returns [log-prob of t+, the teachers' mean] of the first step.
    """
    import datasets
    import peft
    import trl

    study = make_study(args.size)
    t_plus, *teachers = study["responses"]
    lora = mode == "lora"
    for key, parameter in model.named_parameters():
        merger = mode == "merger" and ".visual.merger." in key
        parameter.requires_grad_(mode == "full" or merger)

    def collate(rows):
        rejected = [teachers[row["images"]] for row in rows]
        inputs, labels = padded(study, [t_plus] * len(rows) + rejected)
        return {**inputs, "completion_mask": (labels != -100).long()}

    turns = Turns(turn)
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=args.trl_pairs,
            gradient_accumulation_steps=len(teachers) // args.trl_pairs,
            max_steps=1 + args.repeats, learning_rate=LEARNING_RATE, max_length=None,
            bf16=args.device == "cuda", use_cpu=args.device == "cpu", remove_unused_columns=False,
            dataloader_pin_memory=False, logging_strategy="no", save_strategy="no",
            report_to="none", disable_tqdm=True)
        layers = "|".join(student.LORA_TARGETS)
        adapter = peft.LoraConfig(
            r=LORA["r"], lora_alpha=LORA["alpha"], task_type="CAUSAL_LM",
            target_modules=rf"model\.language_model\..*\.({layers})")
        trainer = trl.DPOTrainer(
            model=model, ref_model=None if lora else build(args.size, args.device), args=settings,
            data_collator=collate,
            train_dataset=datasets.Dataset.from_dict({"images": list(range(len(teachers)))}),
            processing_class=PaddingToken(), callbacks=[turns],
            peft_config=adapter if lora else None)
        turns.trainer = trainer
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return turns.first


def begin_turn(pipe, device):
    """Waits for the turn. Returns what is to be called at its end, which reports the seconds."""
    pipe.recv()
    return functools.partial(end_turn, pipe, device, clock(device))


def end_turn(pipe, device, start):
    """Reports the seconds since `start`."""
    pipe.send(clock(device) - start)


def competitor(pipe, name, mode, args):
    """What the process of a competitor does.

    pipe  on which it gets its turns, and on which it reports the seconds of each and, at the end,
          {"memory", "logps", "gpu"} or 'out of memory'
    name  as of `run_ours`, or 'TRL'
    mode  what trains, one of TRAIN
    args  the flags
    """
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    if name == "TRL":
        import trl  # noqa: F401  its own size is no part of the step's memory
    turn = functools.partial(begin_turn, pipe, args.device)
    try:
        model = build(args.size, args.device)
        before = 0 if args.device == "cuda" else peak_memory(args.device)
        if name == "TRL":
            logps = run_trl(turn, model, mode, args)
        else:
            logps = run_ours(turn, model, name, mode, args)
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
        pipe.send({"memory": peak_memory(args.device) - before, "logps": logps, "gpu": gpu})
    except torch.OutOfMemoryError:
        pipe.send("out of memory")


def compete(names, mode, args):
    """Runs competitors in turns.

    names  of the competitors
    mode   what trains, one of TRAIN
    args   the flags
    Returns {name: {"seconds" of every repeat, "memory", "logps", "gpu"}}, without those that ran
    out of memory.
    """
    on_cpu, measured = args.device == "cpu", {}
    context = multiprocessing.get_context("fork" if on_cpu else "spawn")  # CUDA survives no fork
    for group in [names] if on_cpu else [[name] for name in names]:
        pipes, processes = {}, []
        for name in group:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(
                target=competitor, args=(theirs, name, mode, args), daemon=True))
            processes[-1].start()
            theirs.close()
            measured[name] = {"seconds": []}
        for turn in range(2 + args.repeats):  # the warm-up, the repeats, the report
            for name, pipe in list(pipes.items()):
                try:
                    if turn <= args.repeats:
                        pipe.send("go")
                    answer = pipe.recv()
                except (EOFError, OSError):
                    raise SystemExit(f"{mode}: {name} failed, its error is above") from None
                if answer == "out of memory":
                    print(f"{mode}: {name} ran out of memory")
                    del pipes[name], measured[name]
                elif turn > args.repeats:
                    measured[name].update(answer)
                elif turn > 0:
                    measured[name]["seconds"].append(answer)
        for process in processes:
            process.join()  # gives its memory back
    return measured


# ------------------------------------------------------------------------------------- the commands

def step(args):
    """The packed step against separate sequences and TRL's DPOTrainer."""
    names = ["packed", "separate"]
    if not args.no_trl and all(map(importlib.util.find_spec, ("trl", "peft", "datasets"))):
        names.append("TRL")
    responses, (high, wide) = SIZES[args.size]["responses"], SIZES[args.size]["image"]
    prefix = high * wide + SIZES[args.size]["prompt"]
    length = packed_length(prefix, responses)
    modes = args.modes or ["lora", "merger"] + ["full"] * (args.size != "7b")
    report = {"mode": {mode: dict.fromkeys(FIELDS) for mode in TRAIN}, "teacher_cost": None}
    print(f"{args.size} on {args.device}: prefix {prefix}, responses {responses}, packed into "
          f"{length} tokens")
    for mode in modes:
        measured = compete(names + ["one teacher"] * (mode == modes[0]), mode, args)
        if "packed" not in measured:
            continue
        times = {name: compare(mode, name, result, measured["packed"], args.device)
                 for name, result in measured.items()}
        flops = step_flops(make_config(args.size), prefix, responses, 4 * high * wide, TRAIN[mode])
        line = report["mode"][mode]
        line |= speed(mode, flops, measured["packed"])
        line["time_vs_separate"], line["time_vs_trl"] = times.get("separate"), times.get("TRL")
        if "separate" in measured:
            line["memory_vs_separate"] = (measured["separate"]["memory"]
                                          / measured["packed"]["memory"])
        if "one teacher" in measured:
            token_ratio = length / packed_length(prefix, responses[:2])
            time_ratio = 1 / times["one teacher"]
            report["teacher_cost"] = time_ratio / token_ratio
            print(f"{mode:8}N = {len(responses) - 1} takes {time_ratio:.2f}x the time of N = 1 for "
                  f"{token_ratio:.2f}x the tokens")
    return report


def compare(mode, name, result, packed, device):
    """Prints a competitor's line.

    mode, name      what trains, and the competitor
    result, packed  what `compete` returns of it, and of the packed step
    device          'cpu' or 'cuda', which says how exactly the log-probs have to agree
    Returns how many times the packed step's time it takes. Raises SystemExit where its log-probs
    are others.
    """
    ours = packed["logps"][:len(result["logps"])]
    if name == "TRL":
        t_plus, *rest = packed["logps"]
        ours = [t_plus, statistics.mean(rest)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(result["logps"], ours, strict=True))
    times = statistics.median(a / b for a, b in zip(result["seconds"], packed["seconds"]))
    print(f"{mode:8}{name:12}{statistics.median(result['seconds']):8.3f} s {times:6.2f}x "
          f"{result['memory'] / 2**30:8.3f} GiB {result['memory'] / packed['memory']:6.2f}x   "
          f"log-probs differ by {difference:.0e}")
    # bf16 rounds by 4e-4, a branch that sees another one changes 9e-3
    if not difference <= (3e-3 if device == "cuda" else 1e-4):
        raise SystemExit(f"{mode}: {name} does other work than packed")
    return times


def speed(mode, flops, packed):
    """Prints the FLOP/s of the packed step.

    mode    what trains
    flops   what `step_flops` returns
    packed  what `compete` returns of the packed step
    Returns {"peak_gib"} and, on a GPU of PEAK_FLOPS, "mfu" and "hfu".
    """
    seconds, line = statistics.median(packed["seconds"]), {"peak_gib": packed["memory"] / 2**30}
    model, hardware = flops
    of_peak = ""
    for gpu, peak in PEAK_FLOPS.items():
        if gpu in packed["gpu"]:
            line |= {"mfu": model / seconds / peak, "hfu": hardware / seconds / peak}
            of_peak = f", MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}"
    print(f"{mode:8}packed: {model / seconds / 1e12:.3g} TFLOP/s without and "
          f"{hardware / seconds / 1e12:.3g} with recomputation{of_peak}", flush=True)
    return line


def sample(args):
    """Folded against plain attention, in decoding (the ratio of --json) and with the prompts.

    On CPU the process's own time counts, so that whatever else runs there does not."""
    torch.set_num_threads(args.threads)
    now = time.process_time if args.device == "cpu" else lambda: clock(args.device)
    responses, model = SIZES[args.size]["responses"], build(args.size, args.device)
    end = model.config.text_config.vocab_size  # an end that never comes
    processor = SimpleNamespace(pad=0, ends=[end])
    # Eq. 7's prompt has all trajectories in it; lengths differ, so that there is padding
    examples = [make_study(args.size, more=sum(responses[1:]) - row % responses[1])
                for row in range(args.batch)]
    starts, ids = [], {}
    whole, decoding = {"folded": [], "plain": []}, {"folded": [], "plain": []}
    model.register_forward_pre_hook(lambda *_: starts.append(now()))
    ways = {"folded": sampling.folded_attention, "plain": sdpa_attention_forward}
    for _ in range(1 + args.repeats):
        for name, attention in ways.items():
            transformers.AttentionInterface.register("folded", attention)
            starts.clear()
            out = sampling.sample(model, processor, examples, range(args.batch), temperature=0,
                                  max_new_tokens=args.new_tokens or max(responses))
            whole[name].append(now() - starts[0])
            decoding[name].append(now() - starts[1])
            ids[name] = torch.stack([row for row, _ in out])
    in_decoding, with_prompts = (median_ratio(seconds["plain"], seconds["folded"])
                                 for seconds in (decoding, whole))
    same = (ids["folded"] == ids["plain"]).float().mean().item()
    print(f"{args.size} on {args.device}: {args.batch} prompts of {len(examples[0]['prefix_ids'])} "
          f"tokens, {ids['plain'].shape[1]} new ones each, {same:.1%} the same")
    print(f"decoding: plain takes {in_decoding:.2f}x the time of folded, "
          f"{statistics.median(decoding['folded'][1:]):.3f} s; with the prompts "
          f"{with_prompts:.2f}x")
    if args.device == "cpu" and same < 1:
        raise SystemExit("folded and plain attention give other tokens")
    return {"time_vs_plain": in_decoding}


def median_ratio(theirs, ours):
    """The median of the ratios of seconds, without the first pair, which was the warm-up."""
    return statistics.median(a / b for a, b in zip(theirs[1:], ours[1:]))


@torch.no_grad()
def evaluate(args):
    """The closed questions of one image in one packed row against one forward per question.

    The packed way is questions.option_logps; the other one encodes the image for each question. A
    question has 17 tokens with the turn's end (Qwen's for 'Does this chest X-ray show a
    pneumothorax?') and is answered by 'yes' or 'no' in four spellings of a token each; both ways
    read these eight log-probs and have to agree."""
    torch.set_num_threads(args.threads)
    model, study = build(args.size, args.device), make_study(args.size)
    g = torch.Generator().manual_seed(2)
    words = lambda n: torch.randint(1, model.config.text_config.vocab_size - 8, (n,), generator=g)
    prefix = study["prefix_ids"]
    prefix = prefix[:int((prefix == model.config.vision_end_token_id).nonzero()[-1]) + 1]
    asked, spellings = [words(17) for _ in range(args.questions)], [words(1) for _ in range(8)]
    example = packed_questions({**study, "prefix_ids": prefix}, asked, spellings)
    ways = {"packed": lambda: questions.option_logps(model, example),
            "separate": lambda: separate_questions(model, study, prefix, asked, spellings)}
    seconds, answers = {"packed": [], "separate": []}, {}
    for _ in range(1 + args.repeats):
        for name, way in ways.items():
            start = clock(args.device)
            answers[name] = way()
            seconds[name].append(clock(args.device) - start)
    differ = max(abs(answers["packed"][u][option] - logp)
                 for u, logps in answers["separate"].items() for option, logp in logps.items())
    ratio = median_ratio(seconds["separate"], seconds["packed"])
    print(f"{args.size} on {args.device}: {args.questions} questions behind {len(prefix)} tokens "
          f"of image and prompt; log-probs differ by {differ:.1e}")
    print(f"separate forwards take {ratio:.2f}x the time of packed, "
          f"{statistics.median(seconds['packed'][1:]):.3f} s an image")
    if differ > (0.3 if args.device == "cuda" else 1e-4):
        raise SystemExit("packed and separate questions get other answers")
    return {"time_vs_separate": ratio}


def packed_questions(study, asked, spellings):
    """A study with closed questions, as questions.encode would return it.

    study      what `make_study` returns
    asked      the questions, each (n,)
    spellings  the options, each (n,); an option has one spelling here
    """
    branches, owners = [], []
    for u, question in enumerate(asked):
        parent = len(branches)
        branches.append(student.Branch(question, torch.tensor([], dtype=torch.long), 0))
        for option, ids in enumerate(spellings):
            branches.append(student.Branch(ids[:-1], ids, len(owners), parent))
            owners.append((u, option))
    return {**study, "branches": branches, "columns": len(owners), "owners": owners}


def separate_questions(model, study, prefix, asked, spellings):
    """What questions.option_logps returns, from one forward per question.

    model             the student
    study             what `make_study` returns, for its image
    prefix            (P,), up to the image's end
    asked, spellings  as `packed_questions` takes them; spellings of one token
    """
    (inputs,) = student.to_device(
        model.device, {key: study[key] for key in ("pixel_values", "image_grid_thw")})
    found = {}
    for u, question in enumerate(asked):
        ids = torch.cat([prefix, question])[None].to(model.device)
        types = (ids == model.config.image_token_id).int()
        logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, logits_to_keep=1,
                       **inputs).logits
        logps = logits[0, -1].float().log_softmax(-1)
        found[u] = {option: logps[token].item() for option, token in enumerate(spellings)}
    return found


def main():
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, repeats in ((step, 3), (sample, 3), (evaluate, 5)):
        add_command(commands, command, repeats)
    p = commands.add_parser("metrics", help="speed of metrics/ beside the oracles",
                            description=bench_metrics.__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(run=bench_metrics.run)
    bench_metrics.add_flags(p)
    args = parser.parse_args()
    report = args.run(args)
    if args.json:
        print(json.dumps(report))


def add_command(commands, command, repeats):
    """Adds the parser of a command.

    commands  the subparsers
    command   step, sample or evaluate
    repeats   default of --repeats
    """
    p = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0],
                            description=command.__doc__)
    p.set_defaults(run=command)
    p.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu",
        help="default: %(default)s")
    p.add_argument(
        "--size", choices=tuple(SIZES), default="small",
        help="of the model and the study (default: %(default)s)")
    p.add_argument(
        "--repeats", type=int, default=repeats,
        help="measured after one warm-up; the median counts (default: %(default)s)")
    p.add_argument(
        "--threads", type=int, default=1,
        help="CPU threads of each process (default: %(default)s)")
    p.add_argument(
        "--json", action="store_true",
        help="end with one line of JSON")
    if command is step:
        p.add_argument(
            "--modes", nargs="+", choices=tuple(TRAIN),
            help="what trains (default: all; at 7b not full, which needs 124 GiB)")
        p.add_argument(
            "--no_trl", action="store_true",
            help="leave TRL out, as where it is not installed")
        p.add_argument(
            "--trl_pairs", type=int, default=1,
            help="pairs per forward of TRL, a divisor of N (default: %(default)s)")
    elif command is evaluate:
        p.add_argument(
            "--questions", type=int, default=14,
            help="findings asked about (default: %(default)s)")
    else:
        p.add_argument(
            "--batch", type=int, default=32,
            help="prompts at a time (default: %(default)s)")
        p.add_argument(
            "--new_tokens", type=int,
            help="per prompt (default: as in the longest response)")


if __name__ == "__main__":
    main()
