"""The scale model of the paper: what runs when no data is named, on any CPU.

Real weights, films and teachers cannot be shipped. So the default of every stage is a drawn world with simulated teachers
(demo_world.py) and a student of the real model class with 0.66 M parameters; nothing downstream knows.

    python demo.py make --out world --seed 0 --world nuisance      films/, studies.jsonl, replay.jsonl, task.json, to look at
    python demo.py student --out student                           the base student as a folder that from_pretrained loads
    python demo.py base --out demo_base.safetensors                how that base student was made, five minutes on one CPU thread

Qwen is pre-trained, so the tiny student is too, on films and reports of its own: to describe signs in words that name no diagnosis,
to read several reports, and to write what most of them say. That last skill is privileged help which the paper's student does not
get from us, and it fades in stage 1 unless a little of it is replayed there (replay.jsonl).
"""

import argparse
import hashlib
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load as deserialise
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from tqdm import tqdm
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import checkpoint
import ranks
from demo_world import PRIOR, SIZE, TASK, TEACHERS, WORLDS, draw_film, draw_nuisance, imagine, make, named, plurality, speak, write
from records import require_folder

# ------------------------------------------------------------------------------------------------------ the tiny student

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
BASE = Path(__file__).with_name("demo_base.safetensors")
BASE_SHA256 = "b0d29aca089efaa02bb785e929dc2ac94ca4d49f7a34519a4de6baf12db48e94"


def build_student(seed, texts, vocabulary=700, vision_layers=2, vision_width=64, layers=3, width=96, heads=4, kv_heads=2,
                  initializer_range=0.15, rope_theta=1e6):
    """A random student of the real class. Sizes in layers, units and heads; 0.66 M parameters as they stand; with Qwen's own
    initializer_range of 0.02 a model this small learns to read its context far slower. texts: what the byte-level BPE is trained on.
    Returns (Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer).
    """
    blank = Qwen2Tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=list(SPECIAL_TOKENS))
    tokenizer = blank.train_new_from_iterator(texts, vocab_size=vocabulary)
    token = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    rotary = width // heads // 2  # pairs of a head; M-RoPE shares them among time, row and column
    row = (rotary - rotary // 4) // 2
    text = dict(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048, initializer_range=initializer_range,
                rope_parameters=dict(rope_type="default", rope_theta=rope_theta, mrope_section=[rotary - 2 * row, row, row]),
                bos_token_id=None, eos_token_id=token["<|im_end|>"], pad_token_id=token["<|endoftext|>"])
    vision = dict(depth=vision_layers, hidden_size=vision_width, intermediate_size=3 * vision_width, num_heads=4, out_hidden_size=width,
                  patch_size=14, spatial_merge_size=2, temporal_patch_size=2, window_size=SIZE, fullatt_block_indexes=[vision_layers - 1],
                  initializer_range=initializer_range)
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, initializer_range=initializer_range,
                              image_token_id=token["<|image_pad|>"], video_token_id=token["<|video_pad|>"],
                              vision_start_token_id=token["<|vision_start|>"], vision_end_token_id=token["<|vision_end|>"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config), tokenizer


def save_student(folder, model, tokenizer):
    """Writes model, tokenizer and image processor as a folder that from_pretrained loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder)


def pack_student(folder, file):
    """A student's folder -> one file: weights in fp16 without the tied head, the folder's JSON files as its metadata."""
    weights = {name: tensor.half() for name, tensor in load_file(Path(folder) / "model.safetensors").items()}
    texts = {path.name: path.read_text() for path in sorted(Path(folder).glob("*.json"))}
    write(file, serialise(weights, metadata={"files": json.dumps(texts)}))


def write_student(folder, file=BASE, sha256=BASE_SHA256):
    """The base student as a folder that from_pretrained loads, from the one file that ships. sha256 None accepts any file.
    Raises ValueError if the file's digest is not `sha256`."""
    content = Path(file).read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if sha256 is not None and digest != sha256:
        raise ValueError(f"{file}: sha256 is {digest}, expected {sha256}: not the base student of this version of demo.py")
    header = int.from_bytes(content[:8], "little")                              # safetensors: length of the JSON header, header, tensors
    texts = json.loads(json.loads(content[8:8 + header])["__metadata__"]["files"])
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float() for name, tensor in deserialise(content).items()}
    write(folder / "model.safetensors", serialise(weights, metadata={"format": "pt"}))
    for name, text in texts.items():
        write(folder / Path(name).name, text)


SIGNS = {"block": ("none", "faint", "strong"), "level": ("none", "low", "high"), "spots": ("none", "few", "many"),
         "rim": ("none", "thin", "wide"), "haze": ("none", "light", "dense")}


def caption(grades):
    """What a film shows in words that name no diagnosis: a sign for each finding, in their order."""
    return "shapes: " + ", ".join(f"{sign} {amounts[g]}" for (sign, amounts), g in zip(SIGNS.items(), grades)) + "."


def train_base(file, films=1500, steps=1100, seed=0, consensus=True):
    """Pre-trains the base student and packs it into `file`; about five minutes on one thread.

    Two things side by side: captions of `films` drawn films, and reading: reports that no film has to do with, and 'what do most
    of them say', answered in three of the teachers' voices and until near the end in a neutral one too, which is learnt faster. At first
    two reports agree and each names the findings in an order of its own, so that only looking a finding up helps; then they become
    seven, and as noisy as `imagine` makes them. consensus False: the answer is one reader's, drawn at random: a base that can read and
    repeat, and was never told to compare. Returns the file's sha256.
    """
    import data
    import student

    torch.set_num_threads(1)
    rng, lookup, ramp, alone = np.random.default_rng([seed, 99]), 250, 150, int(0.85 * steps)  # from `alone` on no neutral answer
    neutral = lambda grades: "overall: " + ", ".join(f"{word} {grade}" for word, grade in named(grades).items()) + "."
    texts = [text for _ in range(400) for text in imagine(rng)[0].values()] + [caption(rng.integers(0, 3, 5)) for _ in range(300)]
    texts += [neutral([0] * 5)] * 50
    texts += [*TASK["prompts"].values(), "describe the shapes", "Reader 1: ", "user\n", "assistant\n"] * 50
    with tempfile.TemporaryDirectory() as folder:
        save_student(folder, *build_student(seed, texts))
        write(Path(folder) / "task.json", json.dumps(TASK))
        encoder, model = data.Encoder(folder, data.load_task(Path(folder) / "task.json")), student.load(folder)
        packed, optimizer = student.PackedStudent(model).train(), torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
        grades, nuisance = rng.choice(3, size=(films, 5), p=PRIOR), draw_nuisance(rng, films)
        drawn = [Image.fromarray(draw_film(g, z, rng)).convert("RGB") for g, z in zip(grades, nuisance)]
        pixels = encoder.image_processor(images=drawn, return_tensors="pt")
        grid = pixels["image_grid_thw"][:1]
        pixel_values = pixels["pixel_values"].view(films, grid[0].prod(), -1)

        def row(film, prompt, responses):
            return {"prefix_ids": encoder.prefix(prompt, grid), "pixel_values": pixel_values[film], "image_grid_thw": grid,
                    "responses": [encoder.response(text) for text in responses]}

        def reading(step):
            noise = min(1.0, max(0.0, (step - lookup) / ramp))
            agreement = None if noise == 1 else rng.uniform(1 - 0.66 * noise, 1, 5)
            readers = rng.choice(TEACHERS, 2 + round(5 * noise), replace=False)
            reports, answers = imagine(rng, agreement, readers, shuffled=step < lookup)
            says = plurality(answers) if consensus else answers[rng.integers(len(answers))]
            prompt = data.compare_prompt(data.Study(str(step), (), {}, reports), encoder.task, int(rng.integers(2**31)))
            voices = [speak(voice, named(says), rng) for voice in rng.choice(TEACHERS, 3, replace=False)]
            return row(rng.integers(films), prompt, [neutral(says)] * (step < alone) + voices)

        for step in tqdm(range(steps), desc="base"):
            cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, 2 * step / steps - 1)))  # over the second half
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 30, cosine + 1e-3)
            batches = [student.pack([reading(step) for _ in range(10)], model),
                       student.pack([row(i, "describe the shapes", [caption(grades[i])]) for i in rng.integers(0, films, 8)], model)]
            compare, captions = packed(*batches)
            loss = -captions.sum() / batches[1]["tokens"].sum()
            # while it is there, the neutral answer counts as much as the voices together
            for part in ([slice(0, 1), slice(1, None)] if step < alone else [slice(None)]):
                loss = loss - compare[:, part].sum() / batches[0]["tokens"][:, part].sum()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        save_student(folder, model, encoder.tokenizer)
        (Path(folder) / "task.json").unlink()
        pack_student(folder, file)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()


# --------------------------------------------------------------------------- what the stages call when no data is named

ANSWER = 96  # tokens at most; the longest report has about 70


def prepare(args, stage):
    """Fills in what `stage` ('spd', 'selfdistill' or 'apo') lacks with the scale model, in the process group that is running: the
    world, the base student, the stages before it. All of it lies in --output_dir (default runs/demo) and is made once."""
    import selfdistill
    import spd

    given = [f"--{name}" for name in ("student", "positives", "task_file") if getattr(args, name, None)]
    if given:
        raise ValueError(f"{given[0]} without --studies: expected the studies too; the scale model makes its own")
    root = Path(args.output_dir or "runs/demo")
    world, base = root / "world", root / "base"
    ranks.say(f"no --studies: the scale model, in {root}")

    def make_inputs():
        if not (world / "task.json").exists():
            make(world, seed=args.seed)
        if not (base / "config.json").exists():
            train_base(root / "base.safetensors") if args.train_base else None
            with checkpoint.whole(base) as temporary:
                write_student(temporary, *((root / "base.safetensors", None) if args.train_base else ()))

    ranks.on_rank_zero(make_inputs)
    inputs = {"studies": world / "studies.jsonl", "images": world, "task_file": world / "task.json", "seed": args.seed}
    done = {"spd": {"student": base, "replay": world / "replay.jsonl", "output_dir": root / "spd"},
            "selfdistill": {"student": root / "spd" / "student", "output_dir": root / "selfdistill"},
            "apo": {"student": root / "spd" / "student", "positives": root / "selfdistill" / "positives.jsonl", "output_dir": root / "apo"}}
    for earlier, module in (("spd", spd), ("selfdistill", selfdistill)):
        if earlier == stage:
            break
        flags = [f"--{key}={value}" for key, value in {**inputs, **done[earlier]}.items()]
        if earlier == "spd" and getattr(args, "max_steps", None):
            flags.append(f"--max_steps={args.max_steps}")  # a short run is short in both training stages
        module.run(module.parse(["--preset", "demo", *flags]))
    for key, value in {**inputs, **done[stage]}.items():
        setattr(args, key, value if key == "seed" else str(value))


def report(args):
    """Prints evaluate's table of the test films after all stages and writes results.json."""
    import evaluate

    root = Path(args.output_dir).parent
    ranks.say("one seed, not a result; EXPERIMENT.md has five, with every control")
    evaluate.run(evaluate.parse([
        "classify", f"--studies={args.studies}", f"--images={args.images}", f"--task_file={args.task_file}", f"--output={root / 'results.json'}",
        f"--student=SPD, all teachers={root / 'spd' / 'student'}", f"--student=SPD, all teachers + APO={root / 'apo' / 'student'}",
        f"--max_new_tokens={ANSWER}", "--batch_size=50", "--mode=parse", "--bootstrap=0"]))


def parse(argv=None):
    parser = argparse.ArgumentParser(description="The scale model of the paper.")
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("make", help="draw a world: films, studies.jsonl, replay.jsonl, task.json")
    p.add_argument("--out", required=True, help="folder to write")
    p.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    p.add_argument("--world", choices=WORLDS, default="nuisance", help="how the teachers err (default: %(default)s)")
    for split, count in (("train", 800), ("validate", 200), ("test", 200)):
        p.add_argument(f"--{split}", type=int, default=count, help="films (default: %(default)s)")
    p.add_argument("--replay", type=int, default=2400, help="rows of replay.jsonl (default: %(default)s)")
    p.add_argument("--drift", type=float, default=0.0, help="radians by which the teachers' blind spots turn (default: %(default)s)")
    p.add_argument("--change", type=float, help="position in [0, 1] of the stream at which they turn at once (default: gradually)")
    p = commands.add_parser("student", help="unpack the base student that ships")
    p.add_argument("--out", required=True, help="folder to write")
    p = commands.add_parser("base", help="train the base student anew; another processor gives other last bits")
    p.add_argument("--out", required=True, help="file to write")
    for name, what in (("ladder", "the experiment: every row in both worlds over seeds, to results.json"),
                       ("beta", "APO at five values of beta on a ladder that stands, to beta.json and beta.svg")):
        p = commands.add_parser(name, help=what, description=what)
        p.add_argument("--out", default="runs/ladder", help="folder of the experiment (default: %(default)s)")
        p.add_argument("--worlds", nargs="+", choices=WORLDS, default=["nuisance", "class"], help="default: %(default)s")
        p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default: %(default)s")
        p.add_argument("--split", choices=("validate", "test"), default="test", help="studies that are scored (default: %(default)s)")
        p.add_argument("--jobs", type=int, default=2, help="processes, a world and seed each (default: %(default)s)")
        p.add_argument("--films", type=int, help="of each split, to try the mechanics (default: 800, 200, 200)")
        p.add_argument("--max_steps", type=int, help="of each training stage, to try the mechanics (default: all)")
        p.add_argument("--base_steps", type=int, help="of the base that is not taught consensus, to try the mechanics (default: 900)")
        p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return parser.parse_args(argv)


def run(args):
    if args.command in ("ladder", "beta"):
        import demo_beta
        import demo_ladder

        results = demo_ladder.ladder(args) if args.command == "ladder" else demo_beta.beta(args)
        if args.json:
            print(json.dumps(results))
        return
    args = vars(args)
    command, out = args.pop("command"), args.pop("out")
    if command == "make":
        make(out, **args)
    elif command == "student":
        write_student(out)
    else:
        require_folder(out)
        print("sha256", train_base(out))


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"demo: {error}") from None


if __name__ == "__main__":
    main()
