"""The experiment on the scale model: which of the paper's claims hold there? experiment/README.md has the question, the rows and the rules.

    python -m experiment ladder --jobs 2                        every row in both worlds, seeds 0-4 -> runs/ladder/results.json
    python -m experiment beta --jobs 2                          APO at five values of beta, after it: beta.py
    python evaluate.py ablation runs/ladder/results.json  the ladder beside the paper's Table 5

A world and seed is a chain of run folders, OUT/WORLD-SEED/CELL, each a stage's own; scored students leave a cell.json there. What
is finished is not done again, so a ladder that was stopped goes on with the same command.

A student is scored in three ways: greedy; sampled at temperature 1; and 'voiced', greedy behind the opening words of one teacher, each
film another one's in turn, since which voice a greedy answer locks onto is chance and decides its accuracy.
"""

import contextlib
import json
import math
import multiprocessing
import random
import statistics
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import apo
import data
import evaluate
import selfdistill
import spd
import student
from evaluation import tables
from runtime import checkpoint, ranks
from scale_model.base import train_base, write_student
from scale_model.world import FINDINGS, TEACHERS, VOICES, make, speak, write_jsonl

ANSWER = 96                                # tokens at most; the longest report has about 70
MODES = ("sampled", "voiced", "greedy")

# The settings that differ from the presets 'demo'. Rows that go on from pi_st see each study once, four a step, like APO.
AFTER = dict(train="lora", learning_rate=1e-3, num_epochs=1, warmup_steps=0, global_batch=4, trajectories_per_study=0)
CRITIQUE = {"LoRA": dict(train="lora", learning_rate=1e-3), "merger": dict(train="merger", learning_rate=1e-3),
            "full": dict(train="decoder,merger,vision", learning_rate=3e-4)}

BEST, VOTE, T_PLUS = "best teacher", "vote of the teachers", "t+ itself"
ONE, ALL, NO_REPLAY, CONTINUED = "SPD, one teacher", "SPD, all teachers", "SPD, all, without replay", "SPD, all, continued"
TUNED, LORA, MERGER, FULL = "SPD, all + fine-tuning on t+", "SPD, all + APO (LoRA)", "SPD, all + APO (merger)", "SPD, all + APO (full)"
SHUFFLED, ORACLE = "APO (LoRA), t+ shuffled", "APO (LoRA), t+ an oracle vote"
U_T_PLUS, U_ALL, U_APO = "t+ itself, base untaught", "SPD, all, base untaught", "SPD, all + APO, base untaught"
ROWS = ("label prior", *TEACHERS, BEST, VOTE, T_PLUS, ONE, ALL, NO_REPLAY, CONTINUED, TUNED, LORA, MERGER, FULL, SHUFFLED, ORACLE,
        U_T_PLUS, U_ALL, U_APO)


# ------------------------------------------------------------------------------------------------- one world and seed

def chain(folder, world, seed, options):
    """All cells of one world and seed in `folder`, from the films to the last row. options: films, split, max_steps, bases."""
    films = dict.fromkeys(("train", "validate", "test"), options["films"]) if options["films"] else {}
    if not (folder / "world" / "task.json").exists():
        make(folder / "world", seed, world, **films)
    task = data.load_task(folder / "world" / "task.json")
    every = data.read_studies(folder / "world" / "studies.jsonl", task)
    train, test = ([study for study in every if study.split == split] for split in ("train", options["split"]))
    replay, base, untaught = folder / "world" / "replay.jsonl", *options["bases"]

    inputs = inputs_of(folder, seed)

    def run(stage, cell, start, **flags):
        flags = {**inputs, "student": start, "output_dir": folder / cell, **flags}
        if options["max_steps"] and stage is not selfdistill:
            flags["max_steps"] = options["max_steps"]
        stage.run(stage.parse(["--preset=demo", *(f"--{key}={value}" for key, value in flags.items())]))
        return folder / cell / ("positives.jsonl" if stage is selfdistill else "student")

    def score(cell, row, model=None, texts=None):
        """A cell.json: how a student answers, or how texts given per mode read."""
        if not (folder / cell / "cell.json").exists():
            start = time.process_time()
            result = student_scores(model, test, task, folder / "world", seed) if model else text_scores(texts, test, task)
            seconds = time.process_time() - start
            write_cell(folder / cell, {"world": world, "seed": seed, "row": row, **result, "scored_in_cpu_seconds": seconds})

    def t_plus(cell, row, start):
        """t+ for the studies that are scored, sampled as in stage 2 and greedily."""
        texts = {}
        for mode, temperature in (("sampled", 1.0), ("greedy", 0.0)):
            positives = run(selfdistill, f"{cell}_{mode}", start, split=options["split"], temperature=temperature)
            texts[mode] = {record["id"]: record["t_plus"] for _, record in data.read_jsonl(positives)}
        score(cell, row, texts=texts)

    for row, result in baselines(test, train, [s for s in every if s.split == "validate"], task).items():
        write_cell(folder / "given" / row.replace(" ", "_"), {"world": world, "seed": seed, "row": row, "given": result})

    score("spd_one", ONE, run(spd, "spd_one", base, replay=replay, teachers="gpt-5"))                       # learn
    pi_st = run(spd, "spd_all", base, replay=replay)
    score("spd_all", ALL, pi_st)
    score("spd_no_replay", NO_REPLAY, run(spd, "spd_no_replay", base))
    score("spd_continued", CONTINUED, run(spd, "spd_continued", pi_st, **AFTER))

    positives = run(selfdistill, "positives", pi_st)                                                        # compare
    t_plus("t_plus", T_PLUS, pi_st)
    of_study = {record["id"]: record["t_plus"] for _, record in data.read_jsonl(positives)}
    only = write_records(folder / "t_plus_studies.jsonl", [
        {**study.record, "trajectories": {"t+": of_study[study.id]}} for study in train if study.id in of_study])
    score("tuned", TUNED, run(spd, "tuned", pi_st, **AFTER, studies=only))

    for name, row in (("LoRA", LORA), ("merger", MERGER), ("full", FULL)):                                 # critique
        cell = f"apo_{name.lower()}"
        score(cell, row, run(apo, cell, pi_st, positives=positives, **CRITIQUE[name]))
    rng, texts = random.Random(f"{seed} shuffle"), list(of_study.values())
    rng.shuffle(texts)
    shuffled = write_records(folder / "shuffled.jsonl", [{"id": key, "t_plus": text} for key, text in zip(of_study, texts)])
    score("apo_shuffled", SHUFFLED, run(apo, "apo_shuffled", pi_st, positives=shuffled, **CRITIQUE["LoRA"]))
    rng = np.random.default_rng([seed, 5])  # the vote without a reading error, in the teachers' voices, as t+ should be
    oracle = write_records(folder / "oracle.jsonl", [
        {"id": study.id, "t_plus": speak(rng.choice(TEACHERS), in_words(data.vote(study.trajectories, task)), rng)} for study in train])
    score("apo_oracle", ORACLE, run(apo, "apo_oracle", pi_st, positives=oracle, **CRITIQUE["LoRA"]))

    pi_st = run(spd, "untaught_spd", untaught)                                                              # a base that was not taught consensus
    score("untaught_spd", U_ALL, pi_st)
    positives = run(selfdistill, "untaught_positives", pi_st)
    t_plus("untaught_t_plus", U_T_PLUS, pi_st)
    score("untaught_apo", U_APO, run(apo, "untaught_apo", pi_st, positives=positives, **CRITIQUE["LoRA"]))


def in_words(reading):
    """{finding: class} -> {its word in a text: class}."""
    return {FINDINGS[finding]: value for finding, value in reading.items()}


def inputs_of(folder, seed):
    return {"studies": folder / "world" / "studies.jsonl", "images": folder / "world", "task_file": folder / "world" / "task.json", "seed": seed}


def write_cell(folder, record):
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_text(folder / "cell.json", json.dumps(record) + "\n")


def write_records(file, rows):
    """Written once: a stage refuses to go on with records that have changed."""
    if not file.exists():
        write_jsonl(file, rows)
    return file


# ------------------------------------------------------------------------------------------------------------ scoring

class VoicedEncoder(data.Encoder):
    """Puts the opening words of a teacher behind the prompt, each study another teacher's in turn (`voice`)."""

    def __call__(self, study, prompt, responses=()):
        example = super().__call__(study, prompt, responses)
        opening = self.tokens(VOICES[voice(study)]["opening"])
        return {**example, "prefix_ids": torch.cat([example["prefix_ids"], torch.tensor(opening)])}


def voice(study):
    return TEACHERS[int(study.id.rpartition("-")[2]) % len(TEACHERS)]


def student_scores(folder, studies, task, images, seed):
    """{mode: evaluate.score} of a student's answers, and what it has inherited (`inherited`)."""
    model, result = student.load(folder), {}
    for mode in MODES:
        encoder = (VoicedEncoder if mode == "voiced" else data.Encoder)(folder, task, images)
        temperature = 1.0 if mode == "sampled" else 0.0
        texts = evaluate.answers(model, encoder, studies, task, temperature, seed, 50, ANSWER, desc=f"{folder.parent.name}, {mode}")
        readings = [data.read_classes(text, task) for text in texts]
        result[mode] = evaluate.score(readings, studies, task)
        if mode == "voiced":
            result["inherited"] = inherited(readings, studies, task)
        else:
            result[mode]["styles"] = evaluate.styles(texts, studies)
    return result


def text_scores(texts, studies, task):
    """texts: {mode: {id: text}} -> {mode: evaluate.score}; a study without a text counts as unread."""
    return {mode: evaluate.score([data.read_classes(of.get(study.id, ""), task) for study in studies], studies, task) for mode, of in texts.items()}


def inherited(readings, studies, task):
    """How much of a teacher's error comes with its voice (Obs. 1.2). readings: of 'voiced' answers.

    own: where the teacher whose voice it is errs, how often the student gives that same wrong class; others: the same for the six
    teachers whose voice it is not; vote: where the plurality errs, how often the student gives that wrong class.
    """
    counts = {"own": [0, 0], "others": [0, 0], "vote": [0, 0]}
    for reading, study in zip(readings, studies):
        given = {name: data.read_classes(text, task) for name, text in study.trajectories.items()} | {"vote": data.vote(study.trajectories, task)}
        for name, classes in given.items():
            kind = name if name == "vote" else "own" if name == voice(study) else "others"
            for finding, truth in study.labels.items():
                if classes.get(finding) not in (None, truth):
                    counts[kind][0] += reading.get(finding) == classes[finding]
                    counts[kind][1] += 1
    return {kind: same / n if n else None for kind, (same, n) in counts.items()}


def baselines(test, train, validate, task):
    """Label prior, teachers, the teacher that is best on the validation films, and the vote, scored on `test`: {row: score}."""
    rows = evaluate.baselines(test, train, task)
    on_validate = evaluate.baselines(validate, train, task)
    return {**rows, BEST: rows[max(TEACHERS, key=lambda name: on_validate[name]["mean"])]}


# --------------------------------------------------------------------------------------------------------- the claims

# What the paper claims as a difference of mean accuracies: (claim, row, minus row, the paper's difference or None)
DIFFERENCES = (
    ("more teachers alone gain little (Table 5)", ALL, ONE, 0.02),
    ("APO beats SPD (Table 5)", LORA, ALL, 0.10),
    ("APO beats SPD continued as long", LORA, CONTINUED, None),
    ("APO beats fine-tuning on t+", LORA, TUNED, None),
    ("APO beats the best teacher (Table 2)", LORA, BEST, 0.03),
    ("the content of t+ matters: t+ against shuffled t+", LORA, SHUFFLED, None),
    ("a better t+ helps: oracle vote against t+", ORACLE, LORA, None),
    ("merger-only against SPD", MERGER, ALL, None),
    ("merger-only suffices: merger against LoRA", MERGER, LORA, None),
    ("all parameters against LoRA", FULL, LORA, None),
    ("replay costs nothing: SPD with against without", ALL, NO_REPLAY, None),
    ("taught consensus or not: APO against APO on the untaught base", LORA, U_APO, None),
)


def quantities(row):
    """What is claimed and is no difference between two students, of one chain. row: {row: cell}. -> {claim: number}."""
    teachers = [row[name]["given"] for name in TEACHERS]
    gaps = [max(t["accuracy"][f] for t in teachers) - min(t["accuracy"][f] for t in teachers) for f in FINDINGS]
    nearest = max(t["agreement_with_vote"] for t in teachers)
    own = lambda name: row[name]["inherited"]["own"] - row[name]["inherited"]["others"]
    return {
        "teachers drift apart (Obs. 1.1): best minus worst teacher per finding": statistics.mean(gaps),
        "SPD inherits its teachers' errors (Obs. 1.2): own minus other teachers'": own(ALL),
        "APO sheds inherited errors: SPD's own-minus-others less APO's": own(ALL) - own(LORA),
        "SPD repeats the vote where the vote is wrong": row[ALL]["inherited"]["vote"],
        "APO repeats the vote where the vote is wrong": row[LORA]["inherited"]["vote"],
        "t+ is nearer to the vote than any teacher: t+ minus the nearest": row[T_PLUS]["sampled"]["agreement_with_vote"] - nearest,
        "t+ of the untaught base: the same": row[U_T_PLUS]["sampled"]["agreement_with_vote"] - nearest,
    }


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5% point, 1 to 9 degrees of freedom


def interval(values):
    """Mean over seeds with its 95% interval (Student's t): {"mean", "low", "high", "values"}; low and high None for one seed."""
    mean, n = statistics.mean(values), len(values)
    half = STUDENT_T[n - 2] * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return {"mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half, "values": values}


def claims(cells):
    """-> [{"world", "claim", "mode", "mean", "low", "high", "values", "paper"}], paired by seed."""
    found = []
    for world in dict.fromkeys(cell["world"] for cell in cells):
        chains = [{c["row"]: c for c in cells if (c["world"], c["seed"]) == (world, seed)}
                  for seed in sorted({c["seed"] for c in cells if c["world"] == world})]
        for claim in quantities(chains[0]):
            found.append({"world": world, "claim": claim, "mode": None, "paper": None, **interval([quantities(c)[claim] for c in chains])})
        for claim, a, b, paper in DIFFERENCES:
            for mode in MODES:
                values = [mean_accuracy(c[a], mode) - mean_accuracy(c[b], mode) for c in chains]
                found.append({"world": world, "claim": claim, "mode": mode, "paper": paper, **interval(values)})
    return found


def mean_accuracy(cell, mode):
    """Of a student's answers in that mode, or of texts that are read as they are."""
    return cell.get(mode, cell.get("given"))["mean"]


# ------------------------------------------------------------------------------------------------------------ running

def work(job):
    """One chain in a process of its own; what the stages print goes to chain.log in its folder."""
    chain_of, folder, world, seed, options = job
    folder.mkdir(parents=True, exist_ok=True)
    ranks.init()
    start = time.process_time()
    with open(folder / "chain.log", "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            chain_of(folder, world, seed, options)
        except BaseException as error:
            traceback.print_exc()  # the command itself ends with one line
            if isinstance(error, SystemExit):  # a pool of processes would wait for its answer for ever
                raise ValueError(str(error)) from None
            raise
    return world, seed, time.process_time() - start


def run_chains(chain_of, args, options):
    """Every world and seed in --jobs processes, a bar over the cells. A chain that fails stops the command with its log's name."""
    jobs = [(chain_of, Path(args.out) / f"{world}-{seed}", world, seed, options) for world in args.worlds for seed in args.seeds]
    with multiprocessing.get_context("spawn").Pool(args.jobs, maxtasksperchild=1) as pool:
        waiting = {pool.apply_async(work, (job,)): job for job in jobs}
        with tqdm(total=len(jobs), desc="worlds and seeds") as bar:
            while waiting:
                time.sleep(0.5)
                for result in [result for result in waiting if result.ready()]:
                    folder = waiting.pop(result)[1]
                    try:
                        world, seed, seconds = result.get()
                    except BaseException as error:
                        pool.terminate()
                        raise ValueError(f"{folder}: {type(error).__name__}: {error}; see {folder / 'chain.log'}") from error
                    bar.update()
                    bar.write(f"{world}, seed {seed}: {seconds:.0f} CPU seconds")
    return [folder for _, folder, *_ in jobs]


def read_cells(folders, pattern):
    return [json.loads(path.read_text()) for folder in folders for path in sorted(folder.glob(pattern))]


STYLE = ("svg{--ink:#333;--line:#1f6f8b;background:#fff} text{fill:var(--ink)} .axis{stroke:var(--ink);fill:none} "
         ".mean{stroke:var(--line);fill:none;stroke-width:2} .dash{stroke-dasharray:5 4} circle{fill:var(--line);opacity:.45} "
         "@media(prefers-color-scheme:dark){svg{--ink:#ddd;--line:#6fc3df;background:#1b1d20}}")
SHOWN = ("best teacher", "vote of the teachers", "t+ itself", "SPD, one teacher", "SPD, all teachers", "SPD, all, continued",
         "SPD, all + fine-tuning on t+", "SPD, all + APO (merger)", LORA)


def ladder_figure(cells):
    """README's picture: for some rows and each world a dot for each seed and a stroke at their mean: accuracy of answers sampled at
    temperature 1, or of texts as they are given. -> SVG text."""
    height, worlds = 26, list(dict.fromkeys(cell["world"] for cell in cells))
    size = f'viewBox="0 0 860 {90 + height * len(SHOWN)}" role="img" font-family="sans-serif" font-size="13"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
             f"<title>The scale model: accuracy of every seed, sampled answers</title><style>{STYLE}</style>"]
    for i, row in enumerate(SHOWN):
        parts.append(f'<text x="210" y="{50 + height * i}" text-anchor="end">{row}</text>')
    for left, world in zip((225, 550), worlds):
        x = lambda value, left=left: left + 290 * (value - 0.5) / 0.35  # from .50 to .85
        parts.append(f'<text x="{left}" y="20" font-weight="bold">world \'{world}\'</text>')
        for tick in (0.5, 0.6, 0.7, 0.8):
            parts += [f'<path class="axis" opacity=".25" d="M{x(tick):.1f} 32V{40 + height * len(SHOWN)}"/>',
                      f'<text x="{x(tick):.1f}" y="{58 + height * len(SHOWN)}" text-anchor="middle">{tick:g}</text>']
        for i, row in enumerate(SHOWN):
            y, values = 45 + height * i, [score_of(cell) for cell in cells if (cell["world"], cell["row"]) == (world, row)]
            parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="3.5"/>' for value in values]
            parts += [f'<path class="mean" d="M{x(statistics.mean(values)):.1f} {y - 8}v16"/>'] if values else []
    below = "accuracy on 200 drawn test films, five findings; a dot a seed, the stroke their mean"
    parts.append(f'<text x="225" y="{82 + height * len(SHOWN)}">{below}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def score_of(cell):
    """Accuracy of a cell's sampled answers, or of texts as they are given."""
    return cell.get("sampled", cell.get("given"))["mean"]


def options_of(args, bases=None):
    return {"films": args.films, "split": args.split, "max_steps": args.max_steps, "bases": bases}


def ladder(args):
    """All cells, then results.json: {"experiment", "cells", "claims"}, and its tables for README.md and experiment/README.md."""
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    bases = out / "base", out / "base_untaught"
    if not bases[1].exists():
        write_student(bases[0])
        train_base(out / "untaught.safetensors", **({"steps": args.base_steps, "films": 16} if args.base_steps else {}), consensus=False)
        write_student(bases[1], out / "untaught.safetensors", None)
    folders = run_chains(chain, args, options_of(args, bases))
    cells = [cell for folder in folders for cell in read_cells([folder], "given/*/cell.json") + read_cells([folder], "*/cell.json") if "row" in cell]
    cells.sort(key=lambda cell: (args.worlds.index(cell["world"]), cell["seed"], ROWS.index(cell["row"])))
    results = {"experiment": experiment(args), "claims": claims(cells), "cells": cells}
    checkpoint.write_text(out / "results.json", json.dumps(results) + "\n")
    checkpoint.write_text(out / "ladder.svg", ladder_figure(cells))
    checkpoint.write_text(out / "tables.md", tables.ladder_markdown(results) + "\n" + tables.claims_markdown(results))
    print(tables.ladder_table(results))
    return results


def experiment(args):
    """What results.json says of itself: settings, versions, commit."""
    return {"command": f"python demo.py {args.command}", "split": args.split, "worlds": args.worlds, "seeds": args.seeds, "films": args.films,
            "max_steps": args.max_steps, "after": AFTER, "critique": CRITIQUE,
            "learn": spd.PRESETS["demo"], "apo": apo.PRESETS["demo"], "compare": selfdistill.PRESETS["demo"], "environment": checkpoint.environment()}
