"""Speed and memory of the packed step and of sampling, as ratios within one run: the same weights, data and device for everyone. And of
metrics/, see bench_metrics.py.

    python tests/bench.py step                                 packed, separate sequences and TRL's DPOTrainer
    python tests/bench.py step --device cuda --size 7b         the 7B shape with random weights, lengths of the paper's Appendix B
    python tests/bench.py sample                               folded against plain attention in decoding
    python tests/bench.py metrics                              BLEU, ROUGE-L, CIDEr and METEOR beside the oracles
    python tests/bench.py evaluate                             14 questions in one packed row against a forward for each

A step is one study and one update (forward, backward, clip, AdamW) with gradient checkpointing:
    packed      student.PackedStudent with the cached reference, Eq. 11
    separate    the usual implementation of Eq. 11: 1 + N padded sequences, full logits, a reference forward in every step
    TRL         DPOTrainer on the N pairs (t+, t^u), --trl_pairs at a time; token ids and pixels are given outside the measured time
The log-probs of the first step have to agree, so that equal work is compared. All have student.load's patch embedding: with the
stock Conv3d the others would be slower still.

Each competitor is a process. On CPU they take turns, so that whatever else runs slows all of them, and memory is the peak resident
set above that of the model just built; on CUDA one follows the other, and memory is the allocator's peak with the weights.
--json ends with {"mode": {"full" | "lora" | "merger": {"time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu",
"peak_gib"}}, "teacher_cost"}, null where not measured: how many times the packed step's time or memory the others take, and
time(N) / time(1) over tokens(N) / tokens(1).
"""

import argparse
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
import student  # noqa: E402
import training  # noqa: E402
from evaluation import questions  # noqa: E402

TRAIN = {"full": ["decoder", "merger", "vision"], "lora": ["lora"], "merger": ["merger"]}
FIELDS = ("time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu", "peak_gib")
LORA = dict(r=8, alpha=32)
LEARNING_RATE = 1e-6

# text: hidden, layers, heads, kv heads, intermediate, vocabulary; vision: hidden, layers, heads, intermediate, full attention at;
# image: merged tokens high and wide; prompt: text tokens of the prefix; responses: t+, then the teachers
SIZES = {
    "tiny": dict(text=(32, 2, 4, 2, 64, 300), vision=(32, 2, 2, 64, [1]), image=(4, 4), prompt=9, responses=(7, 5, 9)),
    "small": dict(text=(128, 6, 8, 2, 512, 20_000), vision=(64, 4, 2, 192, [3]), image=(14, 14), prompt=54,
                  responses=(90, 72, 35, 62, 94, 68, 139, 161)),  # Appendix B's times 1/4
    "7b": dict(text=(3584, 28, 28, 4, 18944, 152_064), vision=(1280, 32, 16, 3420, [7, 15, 23, 31]), image=(32, 32), prompt=80,
               responses=(361, 287, 140, 249, 375, 273, 557, 644)),
}


def make_config(size):
    hidden, layers, heads, kv_heads, intermediate, vocabulary = SIZES[size]["text"]
    width, depth, vision_heads, vision_intermediate, full = SIZES[size]["vision"]
    pairs = hidden // heads // 2  # rotary pairs of a head, shared among time, row and column
    row = (pairs - pairs // 4) // 2
    spread = 1.2 / hidden ** 0.5  # 0.02 at 7B; with 0.02 a small model hardly looks at its context
    text = dict(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, rms_norm_eps=1e-6,
                num_attention_heads=heads, num_key_value_heads=kv_heads, initializer_range=spread, bos_token_id=None, eos_token_id=None,
                pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[pairs - 2 * row, row, row]))
    vision = dict(hidden_size=width, depth=depth, num_heads=vision_heads, intermediate_size=vision_intermediate, window_size=112,
                  fullatt_block_indexes=full, out_hidden_size=hidden, initializer_range=spread)
    return transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False, initializer_range=spread, image_token_id=vocabulary - 1,
        video_token_id=vocabulary - 2, vision_start_token_id=vocabulary - 3, vision_end_token_id=vocabulary - 4)


def build(size, device):
    """The student of a size with random weights, the same at every call, made on the device: bf16 on CUDA, else fp32."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.Qwen2_5_VLForConditionalGeneration._from_config(
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
    prefix, K, width = study["prefix_ids"], len(responses), max(map(len, responses))
    behind = lambda tails, value: torch.stack([F.pad(tail, (0, width - len(tail)), value=value) for tail in tails])
    rows = lambda first, tails, value: torch.cat([first.expand(K, -1), behind(tails, value)], 1)
    ids = rows(prefix, responses, 0)
    return {"input_ids": ids, "attention_mask": rows(torch.ones_like(prefix), [torch.ones_like(r) for r in responses], 0),
            "pixel_values": study["pixel_values"].repeat(K, 1), "image_grid_thw": study["image_grid_thw"].repeat(K, 1),
            "mm_token_type_ids": (ids == prefix.max()).int()}, rows(torch.full_like(prefix, -100), responses, -100)


def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device):
    return torch.cuda.max_memory_allocated() if device == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_ours(turn, model, name, mode, args):
    """'packed', 'one teacher' (packed with N = 1) or 'separate'. Returns the log-probs (1 + N) of the first step."""
    study = make_study(args.size, 1 if name == "one teacher" else None)
    if name == "separate":
        inputs, labels = padded(study, study["responses"])
        inputs, labels = student.to(inputs, args.device), labels.to(args.device)
        logps = lambda model: apo.response_logps(model(**inputs, use_cache=False).logits, labels)[None]
        start = model if mode == "lora" else build(args.size, args.device)  # LoRA's reference is the model without the adapter
    else:
        batch = student.to(student.pack([study], model), args.device)
        logps = lambda model: student.PackedStudent(model)(batch)[0]
        with torch.no_grad():
            ref_logps = logps(model)
    parameters = student.set_trainable(model, TRAIN[mode], **LORA)
    student.enable_gradient_checkpointing(model)
    settings = SimpleNamespace(learning_rate=LEARNING_RATE, adam_beta1=0.9, adam_beta2=0.98, weight_decay=0.05)
    optimizer = training.make_optimizer(parameters, settings, shard=False)
    model.train()
    first = []
    for _ in range(1 + args.repeats):
        done = turn()
        if name == "separate":
            with torch.no_grad(), mock.patch.object(student.LoRALinear, "forward", lambda layer, x: layer.base(x)):
                ref_logps = logps(start)
        now = logps(model)
        losses, _ = apo.apo_loss(now, ref_logps)
        losses.sum().backward()
        training.update(parameters, optimizer, LEARNING_RATE, max_grad_norm=1.0)
        done()
        first = first or now[0].tolist()
    return first


def run_trl(turn, model, mode, args):
    """DPOTrainer.train() as it is. Returns the log-prob of t+ and the teachers' mean, which it logs, for the first step."""
    import datasets
    import peft
    import trl

    study = make_study(args.size)
    t_plus, *teachers = study["responses"]
    lora, first = mode == "lora", []
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(mode == "full" or (mode == "merger" and ".visual.merger." in key))

    def collate(rows):
        inputs, labels = padded(study, [t_plus] * len(rows) + [teachers[row["images"]] for row in rows])
        return {**inputs, "completion_mask": (labels != -100).long()}

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.done = turn()

        def on_step_end(self, *_, **__):
            self.done()
            if not first:
                first.extend(statistics.mean(trainer._metrics["train"][key]) for key in ("logps/chosen", "logps/rejected"))

    class Processor(transformers.ProcessorMixin):  # tells DPOTrainer the padding token, and that the model sees images
        def __init__(self):
            self.tokenizer = SimpleNamespace(pad_token="<pad>", pad_token_id=0, eos_token_id=None, bos_token_id=None)

    with tempfile.TemporaryDirectory() as folder:
        settings = trl.DPOConfig(
            output_dir=folder, per_device_train_batch_size=args.trl_pairs, gradient_accumulation_steps=len(teachers) // args.trl_pairs,
            max_steps=1 + args.repeats, learning_rate=LEARNING_RATE, max_length=None, bf16=args.device == "cuda",
            use_cpu=args.device == "cpu", remove_unused_columns=False, dataloader_pin_memory=False, logging_strategy="no",
            save_strategy="no", report_to="none", disable_tqdm=True)
        adapter = peft.LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], task_type="CAUSAL_LM",
                                  target_modules=rf"model\.language_model\..*\.({'|'.join(student.LORA_TARGETS)})")
        trainer = trl.DPOTrainer(
            model=model, ref_model=None if lora else build(args.size, args.device), args=settings, data_collator=collate,
            train_dataset=datasets.Dataset.from_dict({"images": list(range(len(teachers)))}), processing_class=Processor(),
            callbacks=[Callback()], peft_config=adapter if lora else None)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return first


def competitor(pipe, name, mode, args):
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    if name == "TRL":
        import trl  # noqa: F401  its own size is no part of the step's memory

    def turn():
        """Waits for the turn. Returns what is to be called at its end, to report the seconds."""
        pipe.recv()
        start = clock(args.device)
        return lambda: pipe.send(clock(args.device) - start)

    try:
        model = build(args.size, args.device)
        before = 0 if args.device == "cuda" else peak_memory(args.device)
        logps = run_trl(turn, model, mode, args) if name == "TRL" else run_ours(turn, model, name, mode, args)
        gpu = torch.cuda.get_device_name() if args.device == "cuda" else ""
        pipe.send({"memory": peak_memory(args.device) - before, "logps": logps, "gpu": gpu})
    except torch.OutOfMemoryError:
        pipe.send("out of memory")


def compete(names, mode, args):
    """{name: {"seconds" of every repeat, "memory", "logps", "gpu"}}, without those that ran out of memory."""
    context, results = multiprocessing.get_context("fork" if args.device == "cpu" else "spawn"), {}  # CUDA does not survive a fork
    for group in [names] if args.device == "cpu" else [[name] for name in names]:
        pipes, processes = {}, []
        for name in group:
            pipes[name], theirs = context.Pipe()
            processes.append(context.Process(target=competitor, args=(theirs, name, mode, args), daemon=True))
            processes[-1].start()
            theirs.close()
            results[name] = {"seconds": []}
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
                    del pipes[name], results[name]
                elif turn > args.repeats:
                    results[name].update(answer)
                elif turn > 0:
                    results[name]["seconds"].append(answer)
        for process in processes:
            process.join()  # gives its memory back
    return results


def step(args):
    """The packed step against separate sequences and TRL's DPOTrainer."""
    names = ["packed", "separate"] + ["TRL"] * (not args.no_trl and all(map(importlib.util.find_spec, ("trl", "peft", "datasets"))))
    config, responses, (high, wide) = make_config(args.size), SIZES[args.size]["responses"], SIZES[args.size]["image"]
    prefix, modes = high * wide + SIZES[args.size]["prompt"], args.modes or ["lora", "merger"] + ["full"] * (args.size != "7b")
    tokens = lambda responses: prefix + sum(responses) - len(responses)
    report = {"mode": {mode: dict.fromkeys(FIELDS) for mode in TRAIN}, "teacher_cost": None}
    print(f"{args.size} on {args.device}: prefix {prefix}, responses {responses}, packed into {tokens(responses)} tokens")
    for mode in modes:
        results = compete(names + ["one teacher"] * (mode == modes[0]), mode, args)
        if "packed" not in results:
            continue
        packed, line, times = results["packed"], report["mode"][mode], {}
        seconds = statistics.median(packed["seconds"])
        flops = student.step_flops(config, prefix, responses, 4 * high * wide, TRAIN[mode])
        line["peak_gib"] = packed["memory"] / 2**30
        for peak in [peak for gpu, peak in training.PEAK_FLOPS.items() if gpu in packed["gpu"]]:
            line["mfu"], line["hfu"] = (count / seconds / peak for count in flops)
        for name, result in results.items():
            ours = packed["logps"][:len(result["logps"])] if name != "TRL" else [packed["logps"][0], statistics.mean(packed["logps"][1:])]
            difference = max(abs(a - b) / abs(b) for a, b in zip(result["logps"], ours, strict=True))
            times[name] = statistics.median(a / b for a, b in zip(result["seconds"], packed["seconds"]))
            print(f"{mode:8}{name:12}{statistics.median(result['seconds']):8.3f} s {times[name]:6.2f}x {result['memory'] / 2**30:8.3f} GiB "
                  f"{result['memory'] / packed['memory']:6.2f}x   log-probs differ by {difference:.0e}")
            if not difference <= (3e-3 if args.device == "cuda" else 1e-4):  # bf16 rounds by 4e-4, a branch that sees another changes 9e-3
                raise SystemExit(f"{mode}: {name} does other work than packed")
        print(f"{mode:8}packed: {flops[0] / seconds / 1e12:.3g} TFLOP/s without and {flops[1] / seconds / 1e12:.3g} with recomputation"
              + (f", MFU {line['mfu']:.1%}, HFU {line['hfu']:.1%}" if line["mfu"] else ""), flush=True)
        line["time_vs_separate"], line["time_vs_trl"] = times.get("separate"), times.get("TRL")
        if "separate" in results:
            line["memory_vs_separate"] = results["separate"]["memory"] / packed["memory"]
        if "one teacher" in results:
            token_ratio = tokens(responses) / tokens(responses[:2])
            report["teacher_cost"] = 1 / times["one teacher"] / token_ratio
            print(f"{mode:8}N = {len(responses) - 1} takes {1 / times['one teacher']:.2f}x the time of N = 1 for {token_ratio:.2f}x the tokens")
    return report


def sample(args):
    """Folded against plain attention: while t+ is decoded, which is what --json gives, and with the prompts before it.

    On CPU the process's own time counts, so that whatever else runs there does not."""
    torch.set_num_threads(args.threads)
    now = time.process_time if args.device == "cpu" else lambda: clock(args.device)
    responses, model = SIZES[args.size]["responses"], build(args.size, args.device)
    encoder = SimpleNamespace(pad=0, end=model.config.text_config.vocab_size)  # an end that never comes
    # Eq. 7's prompt has all trajectories in it; lengths differ from row to row, so that there is padding
    examples = [make_study(args.size, more=sum(responses[1:]) - row % responses[1]) for row in range(args.batch)]
    starts, whole, decoding, ids = [], {"folded": [], "plain": []}, {"folded": [], "plain": []}, {}
    model.register_forward_pre_hook(lambda *_: starts.append(now()))
    for _ in range(1 + args.repeats):
        for name, attention in (("folded", student._folded_attention), ("plain", sdpa_attention_forward)):
            transformers.AttentionInterface.register("folded", attention)
            starts.clear()
            out = student.sample(model, encoder, examples, range(args.batch), temperature=0, max_new_tokens=args.new_tokens or max(responses))
            whole[name].append(now() - starts[0])
            decoding[name].append(now() - starts[1])
            ids[name] = torch.stack([row for row, _ in out])
    ratios = [statistics.median(b / a for a, b in zip(times["folded"][1:], times["plain"][1:])) for times in (decoding, whole)]
    same = (ids["folded"] == ids["plain"]).float().mean().item()
    print(f"{args.size} on {args.device}: {args.batch} prompts of {len(examples[0]['prefix_ids'])} tokens, {ids['plain'].shape[1]} new ones each, "
          f"{same:.1%} the same")
    print(f"decoding: plain takes {ratios[0]:.2f}x the time of folded, {statistics.median(decoding['folded'][1:]):.3f} s; "
          f"with the prompts {ratios[1]:.2f}x")
    if args.device == "cpu" and same < 1:
        raise SystemExit("folded and plain attention give other tokens")
    return {"time_vs_plain": ratios[0]}


@torch.no_grad()
def evaluate(args):
    """The closed questions of one image in one packed row (questions.option_logps) against one forward per question, image included.

    A question has 17 tokens with the turn's end (Qwen's for 'Does this chest X-ray show a pneumothorax?') and is answered by 'yes' or 'no' in
    four spellings of a token each; both ways read these eight log-probs and have to agree."""
    torch.set_num_threads(args.threads)
    model, study, g = build(args.size, args.device), make_study(args.size), torch.Generator().manual_seed(2)
    prefix, vocabulary = study["prefix_ids"], model.config.text_config.vocab_size
    prefix = prefix[:int((prefix == model.config.vision_end_token_id).nonzero()[-1]) + 1]
    words = lambda n: torch.randint(1, vocabulary - 8, (n,), generator=g)
    asked, spellings = [words(17) for _ in range(args.questions)], [words(1) for _ in range(8)]
    example = {**study, "prefix_ids": prefix, "responses": asked, "spelled": [(u, ids) for u in range(args.questions) for ids in spellings],
               "owners": [(u, option) for u in range(args.questions) for option in range(8)]}
    inputs = student.to({key: study[key] for key in ("pixel_values", "image_grid_thw")}, args.device)

    def separate():
        found = {}
        for u, question in enumerate(asked):
            ids = torch.cat([prefix, question])[None].to(args.device)
            types = (ids == model.config.image_token_id).int()
            logits = model(input_ids=ids, mm_token_type_ids=types, use_cache=False, logits_to_keep=1, **inputs).logits
            logps = logits[0, -1].float().log_softmax(-1)
            found[u] = {option: logps[ids].item() for option, ids in enumerate(spellings)}
        return found

    ways, seconds, answers = {"packed": lambda: questions.option_logps(model, example), "separate": separate}, {"packed": [], "separate": []}, {}
    for _ in range(1 + args.repeats):
        for name, way in ways.items():
            start = clock(args.device)
            answers[name] = way()
            seconds[name].append(clock(args.device) - start)
    differ = max(abs(answers["packed"][u][o] - answers["separate"][u][o]) for u in range(args.questions) for o in range(8))
    ratio = statistics.median(b / a for a, b in zip(seconds["packed"][1:], seconds["separate"][1:]))
    print(f"{args.size} on {args.device}: {args.questions} questions behind {len(prefix)} tokens of image and prompt; "
          f"log-probs differ by {differ:.1e}")
    print(f"separate forwards take {ratio:.2f}x the time of packed, {statistics.median(seconds['packed'][1:]):.3f} s an image")
    if differ > (0.3 if args.device == "cuda" else 1e-4):
        raise SystemExit("packed and separate questions get other answers")
    return {"time_vs_separate": ratio}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, repeats in ((step, 3), (sample, 3), (evaluate, 5)):
        p = commands.add_parser(command.__name__, help=command.__doc__.splitlines()[0], description=command.__doc__)
        p.set_defaults(run=command)
        p.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
        p.add_argument("--size", choices=tuple(SIZES), default="small", help="of the model and the study (default: %(default)s)")
        p.add_argument("--repeats", type=int, default=repeats, help="measured after one warm-up; the median counts (default: %(default)s)")
        p.add_argument("--threads", type=int, default=1, help="CPU threads of each process (default: %(default)s)")
        p.add_argument("--json", action="store_true", help="end with one line of JSON")
        if command is step:
            p.add_argument("--modes", nargs="+", choices=tuple(TRAIN), help="what trains (default: all; at 7b not full, which needs 124 GiB)")
            p.add_argument("--no_trl", action="store_true", help="leave TRL out, as where it is not installed")
            p.add_argument("--trl_pairs", type=int, default=1, help="pairs per forward of TRL, a divisor of N (default: %(default)s)")
        elif command is evaluate:
            p.add_argument("--questions", type=int, default=14, help="findings asked about (default: %(default)s)")
        else:
            p.add_argument("--batch", type=int, default=32, help="prompts at a time (default: %(default)s)")
            p.add_argument("--new_tokens", type=int, help="per prompt (default: as in the longest response)")
    p = commands.add_parser("metrics", help="speed of metrics/ beside the oracles", description=bench_metrics.__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter)
    p.set_defaults(run=bench_metrics.run)
    bench_metrics.add_flags(p)
    args = parser.parse_args()
    report = args.run(args)
    if args.json:
        print(json.dumps(report))


if __name__ == "__main__":
    main()
