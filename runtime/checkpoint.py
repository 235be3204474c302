"""The run folder: claimed for one command, logged to, saved and continued, finished.

    args.json     the settings            env.json      versions, GPUs, git commit
    log.jsonl     one line per interval   speed.jsonl   the same for timings, which are never the same twice
    step-N/       checkpoint: what trains, the optimiser's shards, a manifest with sha256 sums
    student/      the finished student    adapter/      its LoRA weights in PEFT's format
    finished.json, too_long.jsonl, and of stage 3 reference.safetensors with reference.parts/ while it is made

Nothing is half-written: files get a temporary name, are flushed to disk and renamed. Nothing random is saved, since a run is a
function of its settings and its step (training.py); everything is safetensors or JSON.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import student as students
import training
from runtime import ranks
from runtime.records import read_json


def fingerprint(path):
    """sha256 of a file, or of the weights, config and tokenizer of a student's folder; a hub id is its own fingerprint."""
    path = Path(path)
    if not path.exists():
        return str(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.*")) if path.is_dir() else [path]:
        if file == path or file.is_file() and file.suffix in (".json", ".jsonl", ".safetensors", ".txt"):
            digest.update(f"{file.name} {_sha256(file)}".encode())
    return digest.hexdigest()


def _sha256(file):
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fsync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _temporary(path):
    return path.with_name(f".tmp-{path.name}")


@contextlib.contextmanager
def whole(path):
    """A temporary name for a file or folder, which becomes `path` when all of it is on disk. If that fails nothing is left behind.
    Raises OSError where writing fails, as on a full disk."""
    path = Path(path)
    temporary = _temporary(path)
    _remove(temporary)
    try:
        yield temporary
        for file in [*temporary.rglob("*"), temporary]:
            _fsync(file)
        if path.is_dir() and temporary.is_dir():  # a file does not take a folder's place
            _remove(path)
        os.replace(temporary, path)
        _fsync(path.parent)
    except BaseException as error:
        _remove(temporary)
        if isinstance(error, (OSError, SafetensorError)):
            raise OSError(f"{path} could not be written: {error}") from None
        raise


def write_text(path, text):
    """Writes whole or not at all."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


NOT_SETTINGS = ("output_dir", "resume", "resume_anyway", "merge", "logging_steps", "save_steps", "save_total_limit", "num_workers", "dry_run",
                "server", "server_key_env", "server_concurrency", "i_have_permission")  # a server may move; which model it serves is a setting

# all that a run writes into its folder, and what --resume never takes away; other files may lie there too
OF_A_RUN = ("args.json", "env.json", "log.jsonl", "speed.jsonl", "too_long.jsonl", "finished.json", "positives.jsonl", "dropped.jsonl", "stats.json",
            "part-*.jsonl", "step-*", "reference.safetensors", "reference.parts", "student", "adapter")

SAME_STEPS = {"world_size", "micro_batch", "gradient_checkpointing"}  # the same studies in each step whatever these are


def open_run(args, inputs):
    """Claims the run folder for this command: locks it, writes args.json and env.json, refuses a folder that another command began.
    inputs: {name: path} whose contents count as settings. Returns the lock, to be kept until the end."""
    if getattr(args, "dry_run", False):
        args.output_dir = tempfile.mkdtemp(prefix="dry-run-") if ranks.rank() == 0 else None
        args.output_dir = ranks.gather(args.output_dir)[0]
        atexit.register(shutil.rmtree, args.output_dir, ignore_errors=True)
    folder = Path(args.output_dir)
    settings = {key: value for key, value in sorted(vars(args).items()) if key not in NOT_SETTINGS}

    def claim():
        if hasattr(args, "train"):  # dropout and rounding depend on it; what stage 2 samples does not
            settings["world_size"] = ranks.world()
        settings.update(**{f"{name}_sha256": fingerprint(path) for name, path in inputs.items() if path})
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
        except BlockingIOError:
            raise SystemExit(f"{folder}: another run holds {folder / '.lock'}; wait for it or choose another --output_dir") from None
        except OSError as error:  # some shared disks have no locks
            ranks.say(f"warning: {folder}: {error}; nothing keeps a second run out of this folder")
        if args.resume == "never":
            for old in [old for pattern in OF_A_RUN for old in folder.glob(pattern)]:
                if old.resolve() not in (Path(path).resolve() for path in inputs.values() if path):
                    _remove(old)
        for old in folder.glob(".tmp-*"):  # what a kill left half-written
            _remove(old)
        if (folder / "args.json").exists():
            before, now = read_json(folder / "args.json"), json.loads(json.dumps(settings))
            if finished(args):
                before["world_size"] = now.get("world_size")  # it matters only while the run goes on
            moved = {"images", *inputs}  # where they lie; of the inputs the contents count, of the images nothing but the paths in the records
            differ = [key for key in sorted({*before, *now} - moved) if before.get(key) != now.get(key)]
            listed = "".join(f"\n  {key}: {before.get(key)!r} there, {now.get(key)!r} here" for key in differ)
            sharded = ranks.world() > 1 and "decoder" in getattr(args, "train", "")  # a shard of the optimiser belongs to its rank
            safe = SAME_STEPS - {"world_size"} if sharded else SAME_STEPS
            if not differ:
                return lock
            begun = [*folder.glob("step-*"), *folder.glob("finished*"), *(part for part in folder.glob("part-*") if part.stat().st_size)]
            if begun and not (getattr(args, "resume_anyway", False) and safe.issuperset(differ)):
                raise SystemExit(f"{folder}: was begun with other settings, choose another --output_dir"
                                 + (" or --resume_anyway" if safe.issuperset(differ) else "") + ":" + listed)
            if begun:
                ranks.say(f"{folder}: goes on with other settings:{listed}")
        write_text(folder / "args.json", json.dumps(settings, indent=2) + "\n")
        write_text(folder / "env.json", json.dumps(environment(), indent=2) + "\n")
        return lock

    return ranks.on_rank_zero(claim)


def report_long(args, long):
    """Says which studies do not fit into --max_tokens, before training, and lists them in OUTPUT_DIR/too_long.jsonl."""
    if long:
        cut = sum(study["cut"] for study in long)
        ranks.say(f"{len(long)} studies exceed --max_tokens {args.max_tokens}: {cut} are cut, {len(long) - cut} left out; see too_long.jsonl")
        write = lambda: write_text(Path(args.output_dir) / "too_long.jsonl", "".join(json.dumps(study) + "\n" for study in long))
        ranks.on_rank_zero(write)


def environment():
    commit = ""
    if shutil.which("git"):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout.strip()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
            "commit": commit, "command": sys.argv, "devices": gpus or [platform.processor() or "cpu"]}


def save_checkpoint(folder, step, parameters, optimizer, extra, keep):
    """step-N/ with what trains (safetensors), each rank's optimiser shard, and a manifest written last; renamed into place whole.
    Keeps the newest `keep` of them. Where it fails (a full disk) its folder goes, the checkpoints before stay."""
    folder, final = Path(folder), Path(folder) / f"step-{step:06d}"
    first = ranks.rank() == 0
    with whole(final) if first else contextlib.nullcontext(_temporary(final)) as temporary:
        if first:
            temporary.mkdir()
        ranks.barrier()
        local = getattr(optimizer, "optim", optimizer)
        if first or local is not optimizer:
            state = {f"{name}:{key}": value.cpu().contiguous() for name, p in parameters.items() for key, value in local.state.get(p, {}).items()}
            save_file(state, temporary / f"optimizer-{ranks.rank()}.safetensors")
        ranks.barrier()
        if first:
            save_file({name: p.detach().cpu().contiguous() for name, p in parameters.items()}, temporary / "trainable.safetensors")
            digests = {file.name: _sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps({"step": step, "sha256": digests, **extra}) + "\n")
            for log in folder.glob("*.jsonl"):  # its lines up to here are not written again
                _fsync(log)
    if first:
        steps = sorted(folder.glob("step-*"))
        at = steps.index(final) + 1
        for old in [*steps[:max(0, at - keep)], *steps[at:]]:  # one that is ahead was found damaged when this run went back behind it
            shutil.rmtree(old)


def newest_checkpoint(folder):
    """The newest step-N/ whose files are what its manifest says, with that manifest; (None, None) if there is none."""
    for path in sorted(Path(folder).glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if all(_sha256(path / name) == digest for name, digest in manifest["sha256"].items()):
                return path, manifest
            reason = "its files do not match its manifest"
        except (OSError, ValueError, KeyError) as error:
            reason = str(error)
        ranks.say(f"warning: {path} is damaged ({reason}); falling back to the one before")
    return None, None


def load_checkpoint(path, parameters, optimizer):
    """Puts a checkpoint's weights and optimiser state back, masters and moments in fp32 as they were."""
    weights = load_file(path / "trainable.safetensors")
    if set(weights) != set(parameters):
        raise ValueError(f"{path}: holds other parameters than --train makes trainable")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(weights[name])
    local = getattr(optimizer, "optim", optimizer)
    shard = path / f"optimizer-{ranks.rank() if local is not optimizer else 0}.safetensors"
    with safe_open(shard, "pt") as file:
        for key in file.keys():
            name, _, part = key.rpartition(":")
            p = parameters[name]
            value = file.get_tensor(key)
            local.state[p][part] = value if part == "step" else value.to(p.device)


def resume(args, parameters, optimizer):
    """Goes on from the newest valid checkpoint of the run folder: returns (step, the log's open interval), (0, None) for a new run.
    Exits with status 2 if --resume must finds none."""
    path, manifest = newest_checkpoint(args.output_dir)
    if path is None:
        if args.resume == "must":
            ranks.say(f"{args.output_dir}: --resume must, but there is no valid checkpoint")
            raise SystemExit(2)
        return 0, None
    load_checkpoint(path, parameters, optimizer)
    ranks.say(f"continuing from {path}")
    return manifest["step"], manifest["log"]


class Log:
    """Means over an interval, one JSON line each. add(name, sum, count) locally; `reduce` sums one step over the ranks in one
    all-reduce together with the stop flag. On resume the file is cut back to the step of the checkpoint."""

    def __init__(self, folder, names, device, step=0, sums=None):
        self.path, self.names, self.device = Path(folder) / "log.jsonl", list(names), device
        self.sums = dict(sums) if sums else {name: [0.0, 0.0] for name in self.names}
        self.begin_step()
        self.clock, self.flops = time.perf_counter(), [0.0, 0.0]
        if ranks.rank() == 0:
            for path in (self.path, self.path.with_name("speed.jsonl")):
                lines = path.read_text().splitlines() if path.exists() else []
                kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
                write_text(path, "".join(line + "\n" for line in kept))

    def begin_step(self):
        self.now = torch.zeros(len(self.names) + 1, 2, dtype=torch.float64)

    def add(self, name, total, count=1):
        self.now[self.names.index(name)] += torch.tensor([float(total), float(count)], dtype=torch.float64)

    def add_flops(self, model, batch, train, checkpointing):
        """Counts a packed batch for MFU and HFU, on CUDA only."""
        if self.device.type == "cuda":
            self.flops = [a + b for a, b in zip(self.flops, students.batch_flops(model, batch, train, checkpointing))]

    def reduce(self, stop=False):
        """Adds this step, over all ranks, to the interval; returns whether any rank was asked to stop. All ranks raise FloatingPointError
        together where a sum is not finite: a loss can be that while its gradients are finite."""
        self.now[-1, 0] = float(stop)
        total = ranks.all_reduce(self.now.to(self.device)).cpu()
        step = {name: (float(s), float(c)) for name, (s, c) in zip(self.names, total.tolist())}
        if wrong := [name for name, (s, _) in step.items() if not math.isfinite(s)]:
            raise FloatingPointError(f"{wrong[0]} of the step is {step[wrong[0]][0]}; nothing was updated. The studies are named above")
        for name, (s, c) in step.items():
            self.sums[name] = [self.sums[name][0] + s, self.sums[name][1] + c]
        self.begin_step()
        return bool(total[-1, 0])

    def write(self, step, **more):
        """Writes the line of the interval that ends after `step` steps and returns it."""
        line = {"step": step, **{name: s / c for name, (s, c) in self.sums.items() if c}, **more}
        seconds = time.perf_counter() - self.clock
        speed = {"step": step, "seconds": seconds}
        if "tokens" in self.sums:
            speed["tokens_per_second"] = self.sums["tokens"][0] / seconds
        if self.device.type == "cuda":  # per GPU; rank 0 speaks for all. MFU leaves out what is computed twice, HFU counts it
            name = torch.cuda.get_device_name(self.device)
            peak = next((peak for gpu, peak in training.PEAK_FLOPS.items() if gpu in name), None)
            if peak:
                speed["mfu"], speed["hfu"] = (flops / seconds / peak for flops in self.flops)
            speed["peak_gib"] = ranks.peak_gib(self.device)
            self.flops = [0.0, 0.0]
        if ranks.rank() == 0:
            for path, record in ((self.path, line), (self.path.with_name("speed.jsonl"), speed)):
                with open(path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        self.sums = {name: [0.0, 0.0] for name in self.names}
        self.clock = time.perf_counter()
        return line


def finish(args, model, encoder, parameters, stage):
    """Writes adapter/ (LoRA) and student/ (merged, as transformers loads it), each whole or not at all; finished.json marks the end."""
    folder, lora = Path(args.output_dir), "lora" in args.train.split(",")

    def write():
        if lora:
            with whole(folder / "adapter") as temporary:
                students.save_adapter(model, temporary, args.student, args.lora_r, args.lora_alpha, args.lora_dropout)
        if args.merge or not lora:
            students.merge_lora(model)
            card = (f"---\nbase_model: {args.student}\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: other\n---\n"
                    f"Student after {stage} (trained: {args.train}). For research; not a medical device.\n")
            with whole(folder / "student") as temporary:
                students.save(model, encoder, temporary, card)
        write_text(folder / "finished.json", json.dumps({"stage": stage, "train": args.train}) + "\n")

    ranks.on_rank_zero(write)


def result(args):
    """What `finish` wrote, in words."""
    folder = Path(args.output_dir)
    return folder / "student" if (folder / "student").exists() else f"the adapter in {folder / 'adapter'} on {args.student}; --merge writes student/"


def finished(args):
    """Whether all is there that the command asks for: after --no-merge, --merge still has student/ to write, from the last checkpoint."""
    folder = Path(args.output_dir)
    wanted = "student" if getattr(args, "merge", False) else "finished.json"
    return (folder / "finished.json").exists() and (folder / wanted).exists()
