"""Speed and memory of the packed step and of sampling, as ratios within one run: the same weights, data and device for everyone.

    python tests/bench.py step                                 packed, separate sequences and TRL's DPOTrainer, about 3 minutes
    python tests/bench.py step --device cuda --size 7b         the 7B shape with random weights, lengths of the paper's Appendix B
    python tests/bench.py sample                               folded against plain attention

A step is one study and one update: forward, backward, clip, AdamW.
    packed      student.PackedStudent with the cached reference, Eq. 11
    separate    the usual implementation of Eq. 11: 1 + N padded sequences, full logits, a reference forward in every step
    TRL         DPOTrainer on the N pairs (t+, t^u), --trl_pairs at a time, with its reference forward
The log-probs of the first step have to agree, so that equal work is compared. TRL gets its token ids and pixels from a collator
outside the measured time. All have student.load's patch embedding: with the stock Conv3d the others would be slower still.

Each competitor is a process of its own. On CPU they take turns, so that what else runs on the machine slows all of them, and memory
is the peak resident set above what it was with the model just built. On CUDA one follows the other, and memory is the allocator's
peak, weights included. With --json the last line of `step` is
    {"mode": {"full" | "lora" | "merger": {"time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu", "peak_gib"}},
     "teacher_cost"}
with null for what was not measured. Ratios say how many times the packed step's time or memory the other one takes; teacher_cost is
time(N) / time(1) divided by tokens(N) / tokens(1).
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402
from transformers import AttentionInterface, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402

import apo  # noqa: E402
import student  # noqa: E402
import training  # noqa: E402

TRAIN = {"full": ["decoder", "merger", "vision"], "lora": ["lora"], "merger": ["merger"]}
FIELDS = ("time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu", "peak_gib")
LORA = dict(r=8, alpha=32)
LEARNING_RATE = 1e-6
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bf16 of the SXM modules, per second

# text: hidden, layers, heads, kv heads, intermediate, vocabulary; vision: hidden, layers, heads, intermediate, full attention at;
# image: merged tokens high and wide; prompt: text tokens of the prefix; responses: t+, then the teachers
SIZES = {
    "tiny": dict(text=(32, 2, 4, 2, 64, 300), vision=(32, 2, 2, 64, [1]), image=(4, 4), prompt=9, responses=(7, 5, 9)),
    "small": dict(text=(128, 6, 4, 2, 512, 20_000), vision=(64, 4, 2, 192, [3]), image=(14, 14), prompt=54,
                  responses=(90, 72, 35, 62, 94, 68, 139, 161)),  # Appendix B's times 1/4
    "7b": dict(text=(3584, 28, 28, 4, 18944, 152_064), vision=(1280, 32, 16, 3420, [7, 15, 23, 31]), image=(32, 32), prompt=80,
               responses=(361, 287, 140, 249, 375, 273, 557, 644)),
}


# ---------------------------------------------------------------------------------------------------- model and data

def make_config(size):
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SIZES[size]["text"]
    width, depth, vision_heads, vision_intermediate, full = SIZES[size]["vision"]
    pairs = hidden // heads // 2  # rotary pairs of a head, shared among time, row and column
    row = (pairs - pairs // 4) // 2
    spread = 1.2 / hidden ** 0.5  # Qwen's 0.02 at 3584; with 0.02 a small model hardly looks at its context
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, rms_norm_eps=1e-6, initializer_range=spread,
                num_attention_heads=heads, num_key_value_heads=kv_heads, bos_token_id=None, eos_token_id=None, pad_token_id=0,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[pairs - 2 * row, row, row]))
    vision = dict(hidden_size=width, depth=depth, num_heads=vision_heads, intermediate_size=vision_intermediate, window_size=112,
                  fullatt_block_indexes=full, out_hidden_size=hidden, initializer_range=spread)
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, initializer_range=spread, tie_word_embeddings=False, image_token_id=vocabulary - 1,
                            video_token_id=vocabulary - 2, vision_start_token_id=vocabulary - 3, vision_end_token_id=vocabulary - 4)


def build(size, device):
    """The student of a size with random weights, the same at every call, made on the device: bf16 on CUDA, else fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(
            make_config(size), dtype=torch.bfloat16 if device == "cuda" else torch.float32, attn_implementation="sdpa")
    embed = model.model.visual.patch_embed  # as in student.load
    embed.forward = lambda patches: F.linear(patches.to(embed.proj.weight.dtype), embed.proj.weight.flatten(1))
    return model.eval()


def make_study(size, teachers=None, more=0):
    """A study of random tokens and pixels as data.Encoder would give it, with t+ and the first `teachers` teachers (None: all);
    more: text tokens that its prompt is longer by."""
    spec, config, g = SIZES[size], make_config(size), torch.Generator().manual_seed(1)
    words = lambda n: torch.randint(1, config.text_config.vocab_size - 8, (n,), generator=g)
    responses = [words(n) for n in spec["responses"]]
    (high, wide), text = spec["image"], words(spec["prompt"] - 2 + more)
    image = [config.vision_start_token_id, *[config.image_token_id] * (high * wide), config.vision_end_token_id]
    return {"prefix_ids": torch.cat([text[:4], torch.tensor(image), text[4:]]),
            "pixel_values": torch.randn(4 * high * wide, 3 * 2 * 14 * 14, generator=g),
            "image_grid_thw": torch.tensor([[1, 2 * high, 2 * wide]]), "responses": responses[:None if teachers is None else 1 + teachers]}


def padded(study, responses):
    """Each response behind its own prefix and image, right-padded: (the model's inputs, labels with -100 off the response)."""
    prefix, K = study["prefix_ids"], len(responses)
    width = max(map(len, responses))
    behind = lambda first, rows, value: torch.cat([first.expand(K, -1), torch.stack([F.pad(r, (0, width - len(r)), value=value) for r in rows])], 1)
    ids = behind(prefix, responses, 0)
    return {"input_ids": ids, "attention_mask": behind(torch.ones_like(prefix), [torch.ones_like(r) for r in responses], 0),
            "pixel_values": study["pixel_values"].repeat(K, 1), "image_grid_thw": study["image_grid_thw"].repeat(K, 1),
            "mm_token_type_ids": (ids == prefix.max()).int()}, behind(torch.full_like(prefix, -100), responses, -100)


def step_flops(text, vision, prefix, responses, patches, train, checkpointing=True):
    """(model, hardware) FLOPs of one packed step on one study; hardware includes what is computed again in the backward pass.

    text, vision: the two parts of a Qwen2_5_VLConfig; prefix: its tokens; responses: tokens of each with its end token; patches: of
    the image; train: some of lora | merger | decoder | vision. What LoRA and a training merger add is left out, it is below 1%.
    """
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


# ------------------------------------------------------------------------------------------------------- competitors

def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Turns:
    """A competitor's end of the pipe: every step waits for its turn and reports its seconds."""

    def __init__(self, pipe, device):
        self.pipe, self.device, self.before = pipe, device, 0

    def built(self):
        """The model stands; on CPU, memory is counted from here."""
        self.before = 0 if self.device == "cuda" else self.memory()

    def memory(self):
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return peak - self.before

    def begin(self):
        self.pipe.recv()
        self.start = clock(self.device)

    def end(self):
        self.pipe.send(clock(self.device) - self.start)


@contextlib.contextmanager
def without_adapter(model):
    layers = student.lora_layers(model).values()
    for layer in layers:
        layer.forward = layer.base.forward
    yield model
    for layer in layers:
        del layer.forward


def run_ours(turns, name, mode, args):
    """'packed', 'one teacher' (packed with N = 1) or 'separate'. Returns the log-probs (1 + N) of the first step."""
    model = build(args.size, args.device)
    turns.built()
    study = make_study(args.size, 1 if name == "one teacher" else None)
    if name == "separate":
        inputs, labels = padded(study, study["responses"])
        inputs, labels = student.to(inputs, args.device), labels.to(args.device)
        logps = lambda model: apo.response_logps(model(**inputs, use_cache=False).logits, labels)[None]
        start = None if mode == "lora" else build(args.size, args.device)  # LoRA's reference is the model without its adapter
    else:
        batch = student.to(student.pack([study], model), args.device)
        logps = lambda model: student.PackedStudent(model)(batch)[0]
        with torch.no_grad():
            ref_logps = logps(model)
    parameters = student.set_trainable(model, TRAIN[mode], **LORA)
    if args.gradient_checkpointing:
        student.enable_gradient_checkpointing(model)
    settings = SimpleNamespace(learning_rate=LEARNING_RATE, adam_beta1=0.9, adam_beta2=0.98, weight_decay=0.05)
    optimizer = training.make_optimizer(parameters, settings, shard=False)
    model.train()
    first = []
    for _ in range(1 + args.repeats):
        turns.begin()
        if name == "separate":
            with without_adapter(model) if mode == "lora" else contextlib.nullcontext(start) as reference, torch.no_grad():
                ref_logps = logps(reference)
        now = logps(model)
        losses, _ = apo.apo_loss(now, ref_logps)
        losses.sum().backward()
        training.update(parameters, optimizer, LEARNING_RATE, max_grad_norm=1.0)
        turns.end()
        first = first or now[0].tolist()
    return first


def run_trl(turns, mode, args):
    """DPOTrainer.train() as it is. Returns the log-prob of t+ and the teachers' mean, which it logs, for the first step."""
    import datasets
    import peft
    import tokenizers
    import trl

    model = build(args.size, args.device)
    turns.built()
    study = make_study(args.size)
    t_plus, *teachers = study["responses"]
    lora, first = mode == "lora", {}
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(mode == "full" or (mode == "merger" and ".visual.merger." in key))

    def collate(rows):
        inputs, labels = padded(study, [t_plus] * len(rows) + [teachers[row["images"]] for row in rows])
        return {**inputs, "completion_mask": (labels != -100).long()}

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, *_, **__):
            turns.end()
            for key in ("logps/chosen", "logps/rejected"):
                first.setdefault(key, statistics.mean(trainer._metrics["train"][key]))

    class Processor(transformers.ProcessorMixin):  # tells DPOTrainer the padding token, and that the model sees images
        def __init__(self):
            words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
            self.tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<pad>")

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=args.trl_pairs, gradient_accumulation_steps=len(teachers) // args.trl_pairs,
            max_steps=1 + args.repeats, learning_rate=LEARNING_RATE, max_length=None, gradient_checkpointing=args.gradient_checkpointing,
            bf16=args.device == "cuda", use_cpu=args.device == "cpu", remove_unused_columns=False, dataloader_pin_memory=False,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True)
        adapter = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], task_type="CAUSAL_LM",
                                  target_modules=rf"model\.language_model\..*\.({'|'.join(student.LORA_TARGETS)})")
        trainer = trl.DPOTrainer(
            model=model, ref_model=None if lora else build(args.size, args.device), args=settings, data_collator=collate,
            train_dataset=datasets.Dataset.from_dict({"images": list(range(len(teachers)))}), processing_class=Processor(),
            callbacks=[Callback()], peft_config=adapter if lora else None)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return [first["logps/chosen"], first["logps/rejected"]]


def competitor(pipe, name, mode, args):
    """The process of one competitor."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    turns = Turns(pipe, args.device)
    try:
        logps = run_trl(turns, mode, args) if name == "TRL" else run_ours(turns, name, mode, args)
        pipe.send({"memory": turns.memory(), "logps": logps, "gpu": torch.cuda.get_device_name() if args.device == "cuda" else ""})
    except torch.OutOfMemoryError:
        pipe.send("out of memory")


def compete(names, mode, args):
    """{name: {"seconds" of every repeat, "memory", "logps", "gpu"}}, without those that ran out of memory."""
    context, results = multiprocessing.get_context("forkserver"), {}
    for group in [names] if args.device == "cpu" else [[name] for name in names]:
        pipes, processes = {}, []
        for name in group:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=competitor, args=(theirs, name, mode, args)))
            processes[-1].start()
            theirs.close()
            results[name] = {"seconds": []}
        for _ in range(1 + args.repeats):
            for name, pipe in list(pipes.items()):
                pipe.send("go")
                try:
                    seconds = pipe.recv()
                except EOFError:
                    raise SystemExit(f"{mode}: {name} failed, its error is above") from None
                if seconds == "out of memory":
                    print(f"{mode}: {name} ran out of memory")
                    del pipes[name], results[name]
                else:
                    results[name]["seconds"].append(seconds)
        for name, pipe in pipes.items():
            results[name]["seconds"].pop(0)  # the warm-up
            results[name].update(pipe.recv())
        for process in processes:
            process.join()
    return results


# ------------------------------------------------------------------------------------------------------- subcommands

def equal_work(results, tolerance):
    """The largest relative difference of each one's log-probs from the packed ones; exits where they are not the same."""
    packed, differences = results["packed"]["logps"], {}
    for name, result in results.items():
        expected = [packed[0], statistics.mean(packed[1:])] if name == "TRL" else packed[:len(result["logps"])]
        differences[name] = max(abs(a - b) / abs(b) for a, b in zip(result["logps"], expected, strict=True))
        if not differences[name] <= tolerance:
            raise SystemExit(f"{name}: log-probs {result['logps']}, packed {expected}: not the same work")
    return differences


def step(args):
    names = ["packed", "separate"] + ["TRL"] * (not args.no_trl and all(map(importlib.util.find_spec, ("trl", "peft", "datasets"))))
    spec, config = SIZES[args.size], make_config(args.size)
    high, wide = spec["image"]
    prefix = high * wide + spec["prompt"]
    tokens = lambda responses: prefix + sum(responses) - len(responses)
    report = {"mode": {mode: dict.fromkeys(FIELDS) for mode in TRAIN}, "teacher_cost": None}
    print(f"{args.size} on {args.device}: prefix {prefix}, responses {spec['responses']}, packed into {tokens(spec['responses'])} tokens")
    for mode in args.modes.split(","):
        first = mode == args.modes.split(",")[0]
        results = compete(names + ["one teacher"] * first, mode, args)
        if "packed" not in results:
            continue
        differences = equal_work(results, tolerance=2e-2 if args.device == "cuda" else 1e-4)
        packed, line = results["packed"], report["mode"][mode]
        ratio = lambda name: statistics.median(a / b for a, b in zip(results[name]["seconds"], packed["seconds"])) if name in results else None
        line.update(time_vs_separate=ratio("separate"), time_vs_trl=ratio("TRL"), peak_gib=packed["memory"] / 2**30)
        if "separate" in results:
            line["memory_vs_separate"] = results["separate"]["memory"] / packed["memory"]
        seconds = statistics.median(packed["seconds"])
        flops = step_flops(config.text_config, config.vision_config, prefix, spec["responses"], 4 * high * wide, TRAIN[mode], args.gradient_checkpointing)
        for peak in [peak for gpu, peak in PEAK_FLOPS.items() if gpu in packed["gpu"]]:
            line["mfu"], line["hfu"] = (count / seconds / peak for count in flops)
        for name, result in results.items():
            print(f"{mode:8}{name:12}{statistics.median(result['seconds']):8.3f} s {ratio(name):6.2f}x {result['memory'] / 2**30:8.3f} GiB "
                  f"{result['memory'] / packed['memory']:6.2f}x   log-probs differ by {differences[name]:.0e}")
        print(f"{mode:8}packed: {flops[0] / seconds / 1e12:.3g} TFLOP/s without and {flops[1] / seconds / 1e12:.3g} with recomputation"
              + (f", MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}" if line["mfu"] else ""), flush=True)
        if "one teacher" in results:
            time_ratio, token_ratio = 1 / ratio("one teacher"), tokens(spec["responses"]) / tokens(spec["responses"][:2])
            report["teacher_cost"] = time_ratio / token_ratio
            print(f"{mode:8}{len(spec['responses']) - 1} teachers take {time_ratio:.2f}x the time of one, and {token_ratio:.2f}x its tokens")
    return report


def sample(args):
    """Eq. 7's prompt: the study's, with all trajectories in it; its length differs from row to row, so that there is padding."""
    spec, model = SIZES[args.size], build(args.size, args.device)
    encoder = SimpleNamespace(pad=0, end=model.config.text_config.vocab_size)  # an end that never comes
    examples = [make_study(args.size, more=sum(spec["responses"][1:]) - i) for i in range(min(args.batch, spec["responses"][1]))]
    examples = (examples * args.batch)[:args.batch]
    new_tokens = args.new_tokens or spec["responses"][0]
    seconds, ids = {"folded": [], "plain": [], "prefill": []}, {}
    for _ in range(1 + args.repeats):
        for name in seconds:
            AttentionInterface.register("folded", sdpa_attention_forward if name == "plain" else student._folded_attention)
            start = clock(args.device)
            out = student.sample(model, encoder, examples, range(args.batch), temperature=0, max_new_tokens=1 if name == "prefill" else new_tokens)
            seconds[name].append(clock(args.device) - start)
            ids[name] = torch.stack([row for row, _ in out])
    same = (ids["folded"] == ids["plain"]).float().mean().item()
    if args.device == "cpu" and same < 1:
        raise SystemExit(f"folded and plain attention agree on {same:.1%} of the tokens: not the same work")
    folded, plain, prefill = (torch.tensor(times[1:]) for times in seconds.values())  # without the warm-up
    ratio, decoding = (plain / folded).median().item(), ((plain - prefill) / (folded - prefill)).median().item()
    print(f"{args.size} on {args.device}: {args.batch} prompts of {len(examples[0]['prefix_ids'])} tokens, {new_tokens} new ones each, {same:.1%} of them the same\n"
          f"plain {plain.median():.3f} s, folded {folded.median():.3f} s, of which prompts {prefill.median():.3f} s: {ratio:.2f}x, decoding alone {decoding:.2f}x")
    return {"time_vs_plain": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, repeats in ((step, 5), (sample, 3)):
        p = commands.add_parser(command.__name__)
        p.set_defaults(run=command)
        p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
        p.add_argument("--size", choices=tuple(SIZES), default="small", help="of the model and the study (default: %(default)s)")
        p.add_argument("--repeats", type=int, default=repeats, help="measured after one warm-up; the median counts (default: %(default)s)")
        p.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: %(default)s)")
        p.add_argument("--json", action="store_true", help="end with one line of JSON")
        if command is step:
            p.add_argument("--modes", default="lora,merger,full", help="what trains, in this order (default: %(default)s)")
            p.add_argument("--no_trl", action="store_true", help="leave TRL out, as where it is not installed")
            p.add_argument("--trl_pairs", type=int, default=1, help="pairs per forward of TRL, a divisor of N (default: %(default)s)")
            p.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True, help="for all competitors")
        else:
            p.add_argument("--batch", type=int, default=32, help="prompts at a time (default: %(default)s)")
            p.add_argument("--new_tokens", type=int, help="per prompt (default: the length of t+)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = args.run(args)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
