"""Kills training runs by SIGKILL at random moments, again and again until they finish.

Each is then compared with a run that was never touched.

    python tests/soak.py --kills 36 --json

The runs are apo.py with LoRA, the merger and the decoder, and spd.py with the decoder, each on 1,
2 and 4 ranks: 12 steps of 8 studies with accumulation and dropout, saved every 3. A kill hits all
ranks or one of them (the others then have to notice), anywhere from the start of the processes to
the end of the run; about one in three comes at a drawn place inside a save (tests/faults.py). Only
kills that ended a running rank are counted. A run is identical if log.jsonl and
student/model.safetensors are, to the byte, those of the same command that torchrun (plain python
for one rank) ran to its end. The exit status is 1 if one is not, or if a lost rank leaves others
running for a minute.
"""

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import ROOT, write_positives
from faults import Job
from tqdm import tqdm

import data
from scale_model import base as scale_base
from scale_model import world as scale_world

STEPS, SAVE = 12, 3
STUDENTS = (("apo.py", "lora"), ("apo.py", "merger"), ("apo.py", "decoder"), ("spd.py", "decoder"))
CELLS = [(stage, train, ranks) for stage, train in STUDENTS for ranks in (1, 2, 4)]


def make_inputs(folder):
    """Makes a world of 24 training films, a random student, positives.

    -> flags(stage, train, output_dir)
    """
    world = folder / "world"
    scale_world.make(world, seed=0, train=24, validate=1, test=1, replay=12)
    studies = data.read_studies(world / "studies.jsonl", data.load_task(world / "task.json"))
    texts = [text for study in studies for text in study.trajectories.values()]
    scale_base.save_student(folder / "base", *scale_base.build_student(0, texts))
    training = [study for study in studies if study.split == "train"]
    write_positives(folder / "positives.jsonl", training)

    def flags(stage, train, out):
        if stage == "apo.py":
            own = {"positives": folder / "positives.jsonl"}
        else:
            own = {"replay": world / "replay.jsonl"}
        settings = {
            "preset": "demo",
            "studies": world / "studies.jsonl",
            "images": world,
            "task_file": world / "task.json",
            "student": folder / "base",
            "train": train,
            "lora_dropout": 0.1,
            "global_batch": 8,
            "micro_batch": 1,
            "num_epochs": 4,
            "max_steps": STEPS,
            "save_steps": SAVE,
            "logging_steps": 1,
            **own,
        }
        return [f"--{key}={value}" for key, value in settings.items()] + ["--output_dir", str(out)]

    return flags


def digests(run):
    files = ("log.jsonl", "student/model.safetensors")
    return {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}


def untouched(stage, flags, ranks):
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    start = [sys.executable] if ranks == 1 else [sys.executable, *torchrun]
    subprocess.run(
        [*start, ROOT / stage, *flags],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=600)


def draw_fault(draw, ranks, train, saved):
    """A kill inside a save that is still to come, for tests/faults.py."""
    place = draw.choice(("shard", "fsync", "rename", "renamed", "removing"))
    step = draw.randrange(saved + SAVE, STEPS + 1, SAVE)
    if place == "removing":
        step = max(step, 3 * SAVE)  # two checkpoints are kept
    rank = draw.randrange(ranks) if place == "shard" and train == "decoder" else 0
    return f"kill_save:rank={rank},step={step},at={place},count={draw.randint(1, 5)}", [rank]


def one_start(draw, stage, train, ranks, flags, run, output):
    """Starts the command and kills it once.

    -> (where the kill landed, or None if the run ended before; whether it went on from a save)
    """
    saved = max((int(path.name[5:]) for path in run.glob("step-*")), default=0)
    ways = ("save", "step", "any moment")
    way = draw.choices(ways, (3, 4, 3))[0] if saved < STEPS else "any moment"
    fault, hit = "none", list(range(ranks))
    if way == "save":
        fault, hit = draw_fault(draw, ranks, train, saved)
    if way == "step" and draw.random() < 0.4:
        hit = [draw.randrange(ranks)]
    with Job(stage, flags, output, ranks, fault) as job:
        if way == "step":
            target = draw.randint(saved + 1, STEPS)
            while all(process.exitcode is None for process in job.ranks) and job.logged() < target:
                time.sleep(0.002)
        if way != "save":
            time.sleep(draw.uniform(0, 0.4 if way == "step" else 6))
            trains, logged = job.trains(), job.logged()
            job.signal(signal.SIGKILL, hit)
        codes = job.wait(120 if way == "save" else 60)
        resumed = "continuing from" in job.text()
        if not all(codes[rank] == -signal.SIGKILL for rank in hit):
            if codes != [0] * ranks:
                raise SystemExit(
                    f"{stage} --train {train}, {ranks} ranks, {fault}: ended with {codes}\n"
                    f"{job.text()[-3000:]}")
            return None, resumed
    if way == "save" or trains and any(run.glob(".tmp-step-*")):
        return "save", resumed
    return ("start-up" if not trains else "step" if logged < STEPS else "end"), resumed


def main():
    parser = argparse.ArgumentParser(description=(
        "Kills training runs at random until they finish, and compares them with runs never "
        "touched."))
    parser.add_argument(
        "--kills", type=int, default=36,
        help="kills in all, shared over the 12 kinds of run (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments and places (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    began, landed, resumes, runs, identical = time.time(), Counter(), 0, 0, 0
    with tempfile.TemporaryDirectory() as folder, tqdm(total=args.kills, desc="kills") as bar:
        folder = Path(folder)
        flags = make_inputs(folder)
        for cell, (stage, train, ranks) in enumerate(CELLS):
            quota = args.kills // len(CELLS) + (cell < args.kills % len(CELLS))
            here, same = Counter(), []
            if not quota:
                continue
            draw = random.Random(f"{args.seed} {stage} {train} {ranks}")
            run, output = folder / "run", folder / "output"
            untouched(stage, flags(stage, train, folder / "whole"), ranks)
            while sum(here.values()) < quota or run.exists():
                where = None
                if sum(here.values()) < quota:
                    where, resumed = one_start(
                        draw, stage, train, ranks, flags(stage, train, run), run, output)
                else:
                    with Job(stage, flags(stage, train, run), output, ranks) as job:
                        if job.wait(300) != [0] * ranks:
                            raise SystemExit(
                                f"{stage} --train {train}, {ranks} ranks: did not go on\n"
                                f"{job.text()[-3000:]}")
                        resumed = "continuing from" in job.text()
                resumes += resumed
                if where:
                    here[where] += 1
                    bar.update()
                else:  # it came to its end
                    same.append(digests(run) == digests(folder / "whole"))
                    shutil.rmtree(run)
            shutil.rmtree(folder / "whole")
            landed, runs, identical = landed + here, runs + len(same), identical + sum(same)
            where = ", ".join(f"{n} in {place}" for place, n in sorted(here.items()))
            bar.write(
                f"{stage} --train {train:8} {ranks} ranks: {quota} kills ({where}), "
                f"{sum(same)} of {len(same)} runs identical")
    result = {
        "kills": landed.total(), "resumes": resumes, "runs": runs, "identical": identical,
        "killed_in": dict(sorted(landed.items())), "seconds": round(time.time() - began)}
    print(json.dumps(result) if args.json else (
        f"{landed.total()} kills, {resumes} resumes: {identical} of {runs} runs identical"))
    if identical != runs:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
