"""The ladder: every row in both worlds over seeds. experiment/README.md has the rows and the rules.

    python -m experiment ladder --jobs 2
        every row in both worlds, seeds 0-4 -> runs/ladder/results.json
    python -m experiment beta --jobs 2
        APO at five values of beta, after it: beta.py
    python evaluate.py ablation runs/ladder/results.json
        the ladder beside the paper's Table 5

A world and seed is a chain of run folders, OUT/WORLD-SEED/CELL, each a stage's own. Where a row is
scored, its folder also has a cell.json (scoring.py). What is finished is not done again, so a
ladder that was stopped goes on with the same command.
"""

import contextlib
import json
import multiprocessing
import random
import time
import traceback
from pathlib import Path

import numpy as np
from tqdm import tqdm

import apo
import data
import selfdistill
import spd
from evaluation import ablation
from experiment import claims
from experiment.figures import ladder_figure
from experiment.rows import (
    ALL,
    CONTINUED,
    FULL,
    LORA,
    MERGER,
    NO_REPLAY,
    ONE,
    ORACLE,
    ROWS,
    SHUFFLED,
    T_PLUS,
    TUNED,
    U_ALL,
    U_APO,
    U_T_PLUS,
)
from experiment.scoring import baselines, student_scores, text_scores
from runtime import ranks
from runtime.records import atomic, write_jsonl, write_text
from runtime.run_folder import environment
from scale_model.base import train_base, write_student
from scale_model.world import FINDINGS, TEACHERS, make, speak

# The settings that differ from the presets 'demo'. Rows that go on from pi_st see each study once,
# four a step, like APO.
AFTER = dict(train="lora", learning_rate=1e-3, num_epochs=1, warmup_steps=0, global_batch=4,
             trajectories_per_study=0)
CRITIQUE = {"LoRA": dict(train="lora", learning_rate=1e-3),
            "merger": dict(train="merger", learning_rate=1e-3),
            "full": dict(train="decoder,merger,vision", learning_rate=3e-4)}


# ------------------------------------------------------------------- the runs of a world and seed

class Chain:
    """The films of one world and seed, and the runs on them.

    folder   of the chain: FOLDER/world has the films, FOLDER/CELL is a run
    world, seed  which one it is
    options  what `options_of` returns
    `task` is the data.Task; `train`, `validate` and `scored` are the studies of three splits.
    """

    def __init__(self, folder, world, seed, options):
        self.folder, self.world, self.seed, self.options = folder, world, seed, options
        self.images = folder / "world"
        self.task = data.load_task(self.images / "task.json")
        studies = data.read_studies(self.images / "studies.jsonl", self.task)
        of_split = lambda split: [study for study in studies if study.split == split]
        self.train, self.validate = of_split("train"), of_split("validate")
        self.scored = of_split(options["split"])

    def run(self, stage, cell, start, **flags):
        """Runs a stage in FOLDER/CELL, unless it is finished.

        stage  spd, selfdistill or apo
        cell   name of its folder
        start  folder of the student that it starts from
        flags  those that differ from the preset 'demo'
        Returns the path of what it made: the student's folder, of selfdistill positives.jsonl.
        """
        given = {"studies": self.images / "studies.jsonl", "images": self.images,
                 "task_file": self.images / "task.json", "seed": self.seed, "student": start,
                 "output_dir": self.folder / cell, **flags}
        if self.options["max_steps"] and stage is not selfdistill:
            given["max_steps"] = self.options["max_steps"]
        argv = [f"--{name}={value}" for name, value in given.items()]
        made = stage.run(stage.parse(["--preset=demo", *argv]))
        return made["positives"] if stage is selfdistill else made["student"]

    def score(self, cell, row, student=None, texts=None):
        """Writes the cell.json of a row, unless it is there.

        cell     name of its folder
        row      one of ROWS
        student  folder of a student that answers; None: `texts` are scored
        texts    {mode: {study id: text}}
        """
        if (self.folder / cell / "cell.json").exists():
            return
        start = time.process_time()
        if student:
            result = student_scores(student, self.scored, self.task, self.images, self.seed)
        else:
            result = text_scores(texts, self.scored, self.task)
        seconds = time.process_time() - start
        self.write_cell(cell, row=row, **result, scored_in_cpu_seconds=seconds)

    def write_cell(self, cell, **content):
        """Writes FOLDER/CELL/cell.json: {"world", "seed", ...}."""
        record = {"world": self.world, "seed": self.seed, **content}
        (self.folder / cell).mkdir(parents=True, exist_ok=True)
        write_text(self.folder / cell / "cell.json", json.dumps(record) + "\n")

    def write_records(self, name, records):
        """Writes FOLDER/NAME once, since a stage refuses to go on with records that have changed.

        Returns its path.
        """
        file = self.folder / name
        if not file.exists():
            write_jsonl(file, records)
        return file


def ladder_chain(folder, world, seed, options):
    """All cells of one world and seed, from the films to the last row; arguments as of Chain."""
    if not (folder / "world" / "studies.jsonl").exists():  # `make` writes it last
        count = options["films"]
        counts = dict.fromkeys(("train", "validate", "test"), count) if count else {}
        make(folder / "world", seed, world, **counts)
    chain = Chain(folder, world, seed, options)
    base, untaught = options["bases"]
    given = baselines(chain.scored, chain.train, chain.validate, chain.task)
    for row, result in given.items():
        chain.write_cell(f"given/{row.replace(' ', '_')}", row=row, given=result)
    pi_st = learn_rows(chain, base)
    positives = compare_rows(chain, pi_st)
    critique_rows(chain, pi_st, positives)
    untaught_rows(chain, untaught)


def learn_rows(chain, base):
    """The rows of stage 1 from the base student. Returns the folder of pi_st."""
    replay = chain.images / "replay.jsonl"
    one = chain.run(spd, "spd_one", base, replay=replay, teachers="gpt-5")
    chain.score("spd_one", ONE, one)
    pi_st = chain.run(spd, "spd_all", base, replay=replay)
    chain.score("spd_all", ALL, pi_st)
    chain.score("spd_no_replay", NO_REPLAY, chain.run(spd, "spd_no_replay", base))
    chain.score("spd_continued", CONTINUED, chain.run(spd, "spd_continued", pi_st, **AFTER))
    return pi_st


def compare_rows(chain, pi_st):
    """The rows of stage 2, and fine-tuning on t+. Returns the path of positives.jsonl."""
    positives = chain.run(selfdistill, "positives", pi_st)
    score_t_plus(chain, "t_plus", T_PLUS, pi_st)
    t_plus = read_t_plus(positives)
    studies = chain.write_records("t_plus_studies.jsonl", [
        {**study.record, "trajectories": {"t+": t_plus[study.id]}}
        for study in chain.train if study.id in t_plus])
    chain.score("tuned", TUNED, chain.run(spd, "tuned", pi_st, **AFTER, studies=studies))
    return positives


def critique_rows(chain, pi_st, positives):
    """The rows of stage 3: what trains, and which t+ it gets."""
    for name, row in (("LoRA", LORA), ("merger", MERGER), ("full", FULL)):
        cell = f"apo_{name.lower()}"
        critiqued = chain.run(apo, cell, pi_st, positives=positives, **CRITIQUE[name])
        chain.score(cell, row, critiqued)
    others = (("apo_shuffled", SHUFFLED, shuffled_positives(chain, positives)),
              ("apo_oracle", ORACLE, oracle_positives(chain)))
    for cell, row, file in others:
        critiqued = chain.run(apo, cell, pi_st, positives=file, **CRITIQUE["LoRA"])
        chain.score(cell, row, critiqued)


def untaught_rows(chain, untaught):
    """The rows of all stages from a base student that was not taught consensus."""
    pi_st = chain.run(spd, "untaught_spd", untaught)
    chain.score("untaught_spd", U_ALL, pi_st)
    positives = chain.run(selfdistill, "untaught_positives", pi_st)
    score_t_plus(chain, "untaught_t_plus", U_T_PLUS, pi_st)
    critiqued = chain.run(apo, "untaught_apo", pi_st, positives=positives, **CRITIQUE["LoRA"])
    chain.score("untaught_apo", U_APO, critiqued)


def score_t_plus(chain, cell, row, pi_st):
    """Scores t+ itself on the studies that are scored, sampled as in stage 2 and greedily."""
    texts = {}
    for mode, temperature in (("sampled", 1.0), ("greedy", 0.0)):
        positives = chain.run(selfdistill, f"{cell}_{mode}", pi_st, split=chain.options["split"],
                              temperature=temperature)
        texts[mode] = read_t_plus(positives)
    chain.score(cell, row, texts=texts)


def read_t_plus(positives):
    """{study id: t+} of a positives.jsonl."""
    return {record["id"]: record["t_plus"] for _, record in data.read_jsonl(positives)}


def shuffled_positives(chain, positives):
    """A positives.jsonl with the same texts, each at a random study. Returns its path."""
    t_plus = read_t_plus(positives)
    texts = list(t_plus.values())
    random.Random(f"{chain.seed} shuffle").shuffle(texts)
    return chain.write_records("shuffled.jsonl", [
        {"id": name, "t_plus": text} for name, text in zip(t_plus, texts)])


def oracle_positives(chain):
    """A positives.jsonl with the vote itself, in the voice of a teacher. Returns its path.

    It is what t+ is meant to be, without an error of reading.
    """
    rng, records = np.random.default_rng([chain.seed, 5]), []
    for study in chain.train:
        teacher = rng.choice(TEACHERS)
        vote = data.vote(study.trajectories, chain.task)
        said = {FINDINGS[finding]: value for finding, value in vote.items()}
        records.append({"id": study.id, "t_plus": speak(teacher, said, rng)})
    return chain.write_records("oracle.jsonl", records)


# ----------------------------------------------------------------------- many worlds and seeds

def run_chains(chain_of, args, options):
    """Runs a chain for every world and seed in processes of their own, with a progress bar.

    chain_of  function of (folder, world, seed, options)
    args      out, worlds, seeds, jobs (processes at a time)
    options   what `options_of` returns
    Returns the chains' folders. Raises ValueError with the log's name where a chain fails.
    """
    chains = {Path(args.out) / f"{world}-{seed}": (world, seed)
              for world in args.worlds for seed in args.seeds}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["experiment.ladder"])  # its imports take seconds, once
    with processes.Pool(args.jobs, maxtasksperchild=1) as pool:
        waiting = {folder: pool.apply_async(run_chain, (chain_of, folder, *chain, options))
                   for folder, chain in chains.items()}
        with tqdm(total=len(chains), desc="worlds and seeds") as bar:
            while waiting:
                time.sleep(0.5)
                for folder in [folder for folder, result in waiting.items() if result.ready()]:
                    seconds = seconds_of(folder, waiting.pop(folder))
                    world, seed = chains[folder]
                    bar.update()
                    bar.write(f"{world}, seed {seed}: {seconds:.0f} CPU seconds")
    return list(chains)


def run_chain(chain_of, folder, world, seed, options):
    """One chain in this process; what the stages print goes to chain.log in its folder.

    Returns its CPU seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks.init()
    start = time.process_time()
    with (open(folder / "chain.log", "a", buffering=1) as log,
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        try:
            chain_of(folder, world, seed, options)
        except BaseException as error:
            traceback.print_exc()  # the command itself ends with one line
            if isinstance(error, SystemExit):  # a pool would wait for the answer for ever
                raise ValueError(str(error)) from None
            raise
    return time.process_time() - start


def seconds_of(folder, result):
    """What `run_chain` returned. Raises ValueError with the log's name where it failed."""
    try:
        return result.get()
    except BaseException as error:
        raise ValueError(f"{folder}: {type(error).__name__}: {error}; "
                         f"see {folder / 'chain.log'}") from error


def options_of(args, bases=None):
    """What a chain needs to know.

    args   films (of each split; None: all), split (that is scored), max_steps (None: all)
    bases  folders of the base student and of the one that was not taught consensus
    """
    return {"films": args.films, "split": args.split, "max_steps": args.max_steps, "bases": bases}


def read_cells(folders, pattern):
    """The cell.json files below some folders that match a pattern."""
    return [json.loads(path.read_text())
            for folder in folders for path in sorted(folder.glob(pattern))]


# ------------------------------------------------------------------------------------- the ladder

def run(args):
    """Makes all cells of the ladder, then its results.

    args  what experiment.__main__.parse returns
    Writes OUT/results.json, {"experiment", "claims", "cells"}, ladder.svg, and in tables.md the two
    tables of experiment/README.md; prints the ladder. Returns what results.json holds.
    """
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    folders = run_chains(ladder_chain, args, options_of(args, make_bases(out, args.base_steps)))
    found = read_cells(folders, "given/*/cell.json") + read_cells(folders, "*/cell.json")
    cells = [cell for cell in found if "row" in cell]  # those of beta.py have none
    cells.sort(key=lambda cell: (
        args.worlds.index(cell["world"]), cell["seed"], ROWS.index(cell["row"])))
    content = {"experiment": settings_of(args), "claims": claims.answers(cells), "cells": cells}
    markdown = ablation.ladder_markdown(content), ablation.claims_markdown(content)
    write_text(out / "results.json", json.dumps(content) + "\n")
    write_text(out / "ladder.svg", ladder_figure(cells))
    write_text(out / "tables.md", "\n".join(markdown))
    print(ablation.ladder_table(content))
    return content


def make_bases(out, steps=None):
    """Makes the base student and one that was not taught consensus, unless they are there.

    out    folder that they lie in
    steps  of the second, to try the mechanics; None: as many as the first had
    Returns their two folders.
    """
    base, untaught, packed = out / "base", out / "base_untaught", out / "untaught.safetensors"
    if not untaught.exists():
        write_student(base)
        fewer = {"steps": steps, "films": 16} if steps else {}
        train_base(packed, **fewer, consensus=False)
        with atomic(untaught) as temporary:
            write_student(temporary, packed, None)
    return base, untaught


def settings_of(args):
    """What results.json says of itself: settings, versions, commit."""
    return {"command": f"python -m experiment {args.command}", "split": args.split,
            "worlds": args.worlds, "seeds": args.seeds, "films": args.films,
            "max_steps": args.max_steps, "after": AFTER, "critique": CRITIQUE,
            "learn": spd.PRESETS["demo"], "apo": apo.PRESETS["demo"],
            "compare": selfdistill.PRESETS["demo"], "environment": environment()}
