"""beta as an inverse guidance scale, predicted and seen on the scale model (README, 'beta').

    python -m experiment beta --jobs 2        on the folder of a finished `python -m experiment ladder` -> runs/ladder/beta.json, beta.svg
"""

import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

import apo
import data
import student
from experiment import ladder
from runtime import checkpoint
from scale_model.world import FINDINGS, GRADES, speak

BETAS = (2.0, 1.0, 0.5, 0.25, 0.1)


def beta_chain(folder, world, seed, options):
    """APO (LoRA) at every beta, on a finished chain of the ladder, and what theory predicts from pi_st and fine-tuning on t+.

    With pi_st the teachers' mixture p- and t+ ~ p+, the optimum of Eq. 11 is p-^(1 - 1/beta) p+^(1/beta). 'SPD + fine-tuning on t+'
    aims at p+ itself, so log pi_beta - log pi_st should be 1/beta times log pi_tuned - log pi_st: `slope` is what it is, by least
    squares over the grades of each finding on each film; `predicted` the accuracy of the distribution that the formula gives.
    """
    task = data.load_task(folder / "world" / "task.json")
    every = data.read_studies(folder / "world" / "studies.jsonl", task)
    test = [study for study in every if study.split == options["split"]]
    chosen = data.read_positives(folder / "positives" / "positives.jsonl", [study for study in every if study.split == "train"])[:200]
    encoder = data.Encoder(folder / "spd_all" / "student", task, folder / "world")
    truth = torch.tensor([[GRADES.index(study.labels[f]) for f in FINDINGS] for study in test])

    def probe(model):
        """log pi of the grades, (n, 5, 3), each normalised over the three, and log pi(t+) of `chosen`, (n,)."""
        packed, grades, positives = student.PackedStudent(student.load(model)).eval(), [], []
        with torch.no_grad():
            for study in test:
                grades.append(packed.logps(student.pack([encoder(study, data.student_prompt(study, task), grade_texts(study, task))], packed.model)))
            for study in chosen:
                positives.append(packed.logps(student.pack([encoder(study, data.student_prompt(study, task), [study.t_plus])], packed.model)))
        return torch.cat(grades).view(len(test), len(FINDINGS), len(GRADES)).log_softmax(-1), torch.cat(positives)[:, 0]

    pi_st, of_t_plus = probe(folder / "spd_all" / "student")
    direction = probe(folder / "tuned" / "student")[0] - pi_st
    centred = lambda x: x - x.mean(-1, keepdim=True)
    for beta in BETAS:
        cell = folder / f"beta_{beta}"
        if (cell / "cell.json").exists():
            continue
        flags = {**ladder.inputs_of(folder, seed), "student": folder / "spd_all" / "student", "output_dir": cell,
                 "positives": folder / "positives" / "positives.jsonl", **ladder.CRITIQUE["LoRA"], "beta": beta}
        if options["max_steps"]:
            flags["max_steps"] = options["max_steps"]
        apo.run(apo.parse(["--preset=demo", *(f"--{key}={value}" for key, value in flags.items())]))
        grades, after = probe(cell / "student")
        predicted = (pi_st + direction / beta).softmax(-1).gather(-1, truth[..., None]).mean().item()
        seen = grades.exp().gather(-1, truth[..., None]).mean().item()
        slope = (centred(grades - pi_st) * centred(direction)).sum() / centred(direction).square().sum()
        scores = ladder.student_scores(cell / "student", test, task, folder / "world", seed)
        ladder.write_cell(cell, {"world": world, "seed": seed, "beta": beta, **scores,
                                      "log_ratio_of_t_plus": (after - of_t_plus).mean().item(), "slope": slope.item(),
                                      "predicted": predicted, "seen": seen})


def grade_texts(study, task):
    """Fifteen texts in one plain voice: for each finding the vote's reading with that finding's grade set to each of the three."""
    reading = {word: data.vote(study.trajectories, task).get(finding, GRADES[0]) for finding, word in FINDINGS.items()}
    return [speak("qwen-vl-max", {**reading, word: grade}, np.random.default_rng(0)) for word in FINDINGS.values() for grade in GRADES]


def beta_figure(cells):
    """Three panels against 1/beta, a dot for each seed and a line through the means: accuracy (sampled; dashed: predicted), unread
    rate of sampled answers, log pi_theta(t+) - log pi_st(t+). -> SVG text."""
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 270" role="img" font-family="sans-serif" font-size="12">',
        f"<title>APO on the scale model against 1/beta</title><style>{ladder.STYLE}</style>",
        *panel(cells, 55, "accuracy, sampled (dashed: predicted)", lambda cell: cell["sampled"]["mean"], lambda cell: cell["predicted"]),
        *panel(cells, 355, "unread, sampled", lambda cell: cell["sampled"]["unread"]),
        *panel(cells, 655, "log-ratio of t+, nats", lambda cell: cell["log_ratio_of_t_plus"]), "</svg>"]) + "\n"


def panel(cells, left, title, value, dashed=None, width=225, top=35, height=180):
    """One panel of `beta_figure`, its lower left corner at `left` (pixels): value(cell) as dots and mean line, dashed(cell) as a line."""
    betas = sorted({cell["beta"] for cell in cells}, reverse=True)
    values = [f(cell) for cell in cells for f in (value, dashed) if f]
    margin = 0.05 * (max(values) - min(values) or 1)
    low, high = min(values) - margin, max(values) + margin
    steps = math.log2(betas[0] / betas[-1]) or 1
    x = lambda beta: left + 12 + (width - 24) * math.log2(betas[0] / beta) / steps
    y = lambda v: top + height * (high - v) / (high - low)
    mean = lambda f, beta: statistics.mean(f(cell) for cell in cells if cell["beta"] == beta)
    line = lambda f: " ".join(f"{x(beta):.1f},{y(mean(f, beta)):.1f}" for beta in betas)
    return [f'<text x="{left}" y="20" font-weight="bold">{title}</text><path class="axis" d="M{left} {top}V{top + height}H{left + width}"/>',
            *(f'<text x="{x(beta):.1f}" y="{top + height + 18}" text-anchor="middle">{1 / beta:g}</text>' for beta in betas),
            *(f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v:.2f}</text>' for v in (low, (low + high) / 2, high)),
            f'<text x="{left + width / 2}" y="{top + height + 38}" text-anchor="middle">1/beta</text>',
            *(f'<circle cx="{x(cell["beta"]):.1f}" cy="{y(value(cell)):.1f}" r="3.5"/>' for cell in cells),
            f'<polyline class="mean" points="{line(value)}"/>',
            *([f'<polyline class="mean dash" points="{line(dashed)}"/>'] if dashed else [])]


def beta(args):
    """All values of beta on a ladder that stands, then beta.json and beta.svg."""
    out = Path(args.out)
    for world in args.worlds:
        for seed in args.seeds:
            if not (out / f"{world}-{seed}" / "tuned" / "student").exists():
                raise ValueError(f"{out / f'{world}-{seed}'}: no finished chain; run first: python -m experiment ladder --out {out}")
    cells = ladder.read_cells(ladder.run_chains(beta_chain, args, ladder.options_of(args)), "beta_*/cell.json")
    results = {"experiment": {**ladder.experiment(args), "betas": BETAS}, "cells": cells}
    checkpoint.write_text(out / "beta.json", json.dumps(results) + "\n")
    checkpoint.write_text(out / "beta.svg", beta_figure(cells))
    print(beta_table(cells))
    return results


def beta_table(cells):
    """Means over worlds and seeds, one line for each beta."""
    columns = {"slope": lambda c: c["slope"], "predicted": lambda c: c["predicted"], "seen": lambda c: c["seen"],
               **{mode: lambda c, mode=mode: c[mode]["mean"] for mode in ladder.MODES},
               "unread": lambda c: c["sampled"]["unread"], "nats of t+": lambda c: c["log_ratio_of_t_plus"]}
    lines = [f"{'1/beta':>8}" + "".join(f"{name:>12}" for name in columns)]
    for value in sorted({cell["beta"] for cell in cells}, reverse=True):
        of = [cell for cell in cells if cell["beta"] == value]
        lines.append(f"{1 / value:>8.2f}" + "".join(f"{statistics.mean(map(f, of)):>12.3f}" for f in columns.values()))
    return "\n".join(lines)
