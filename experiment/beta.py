"""beta as an inverse guidance scale, predicted and seen on the scale model (README, 'beta').

    python -m experiment beta --jobs 2
        in the folder of a finished `python -m experiment ladder`
        -> runs/ladder/beta.json, beta.svg

Where pi_st is the teachers' mixture p- and t+ ~ p+, the optimum of Eq. 11 is
p-^(1 - 1/beta) p+^(1/beta). 'SPD + fine-tuning on t+' aims at p+ itself. So
log pi_beta - log pi_st should be 1/beta times log pi_tuned - log pi_st.
"""

import json
import statistics
from pathlib import Path

import numpy as np
import torch

import apo
import data
import student
from experiment.figures import beta_figure
from experiment.ladder import CRITIQUE, Chain, options_of, read_cells, run_chains, settings_of
from experiment.rows import MODES
from experiment.scoring import student_scores
from runtime.records import write_text
from scale_model.world import FINDINGS, GRADES, speak

BETAS = (2.0, 1.0, 0.5, 0.25, 0.1)


def beta_chain(folder, world, seed, options):
    """APO (LoRA) at every beta on a finished chain of the ladder; arguments as of ladder.Chain.

    Writes FOLDER/beta_BETA/cell.json: {"world", "seed", "beta", what student_scores returns,
        "log_ratio_of_t_plus"  log pi_beta(t+) - log pi_st(t+), mean over 200 training studies
        "slope"                by how much log pi_tuned - log pi_st is multiplied in
                               log pi_beta - log pi_st, by least squares over the grades of each
                               finding on each film; 1/beta is predicted
        "predicted", "seen"    probability of the true grade: of the distribution that the formula
                               gives, and of the student}
    """
    chain = Chain(folder, world, seed, options)
    positives, pi_st = folder / "positives" / "positives.jsonl", folder / "spd_all" / "student"
    chosen = data.read_positives(positives, chain.train)[:200]
    processor = student.Processor(pi_st, chain.task, chain.images)
    truth = torch.tensor([[GRADES.index(study.labels[finding]) for finding in FINDINGS]
                          for study in chain.scored])                                     # (n, 5)
    before, t_plus_before = probe(pi_st, processor, chain.scored, chosen)
    tuned, _ = probe(folder / "tuned" / "student", processor, chain.scored, chosen)
    for beta in BETAS:
        cell = f"beta_{beta}"
        if (folder / cell / "cell.json").exists():
            continue
        critiqued = chain.run(apo, cell, pi_st, positives=positives, **CRITIQUE["LoRA"], beta=beta)
        after, t_plus_after = probe(critiqued, processor, chain.scored, chosen)
        predicted = (before + (tuned - before) / beta).softmax(-1)
        chain.write_cell(
            cell, beta=beta,
            **student_scores(critiqued, chain.scored, chain.task, chain.images, seed),
            log_ratio_of_t_plus=(t_plus_after - t_plus_before).mean().item(),
            slope=slope(after - before, tuned - before), predicted=mean_at(predicted, truth),
            seen=mean_at(after.exp(), truth))


def probe(folder, processor, scored, chosen):
    """Log-probabilities of a student, without sampling.

    folder     of the student
    processor  student.Processor
    scored     n studies
    chosen     m studies with t+
    Returns log pi of the grades (n, 5, 3), each normalised over the three, and log pi(t+) (m,).
    """
    packed = student.PackedStudent(student.load(folder)).eval()
    task = processor.task
    with torch.no_grad():
        grades = [logps_of(packed, processor, study, grade_texts(study, task)) for study in scored]
        t_plus = [logps_of(packed, processor, study, [study.t_plus]) for study in chosen]
    shape = len(scored), len(FINDINGS), len(GRADES)
    return torch.stack(grades).view(shape).log_softmax(-1), torch.cat(t_plus)


def logps_of(packed, processor, study, texts):
    """log pi of K texts on the student's prompt, (K,)."""
    example = processor(study, data.student_prompt(study, processor.task), texts)
    (logps,) = packed.logps(student.pack([example], packed.model))
    return logps


def grade_texts(study, task):
    """Fifteen texts in one plain voice: the vote's reading with each finding set to each grade."""
    vote = data.vote(study.trajectories, task)
    reading = {word: vote.get(finding, GRADES[0]) for finding, word in FINDINGS.items()}
    return [speak("qwen-vl-max", {**reading, word: grade}, np.random.default_rng(0))
            for word in FINDINGS.values() for grade in GRADES]


def slope(moved, direction):
    """The least-squares factor between two differences of log-probabilities (n, 5, 3).

    Both are centred over the three grades.
    """
    moved, direction = (x - x.mean(-1, keepdim=True) for x in (moved, direction))
    return ((moved * direction).sum() / direction.square().sum()).item()


def mean_at(probabilities, truth):
    """The mean probability of the true grades. probabilities (n, 5, 3), truth (n, 5)."""
    return probabilities.gather(-1, truth[..., None]).mean().item()


# ------------------------------------------------------------------------------------ the results

def run(args):
    """APO at every beta on a finished ladder, then its results.

    args  what experiment.__main__.parse returns
    Writes OUT/beta.json, {"experiment", "cells"}, and beta.svg; prints the means. Returns what
    beta.json holds. Raises ValueError where a chain of the ladder is missing.
    """
    out = Path(args.out)
    for folder in (out / f"{world}-{seed}" for world in args.worlds for seed in args.seeds):
        if not (folder / "tuned" / "student").exists():
            raise ValueError(f"{folder}: no finished chain; "
                             f"run first: python -m experiment ladder --out {out}")
    folders = run_chains(beta_chain, args, options_of(args))
    cells = read_cells(folders, "beta_*/cell.json")
    content = {"experiment": {**settings_of(args), "betas": BETAS}, "cells": cells}
    write_text(out / "beta.json", json.dumps(content) + "\n")
    write_text(out / "beta.svg", beta_figure(cells))
    print(beta_table(cells))
    return content


def beta_table(cells):
    """Means over worlds and seeds as text, one line for each beta."""
    columns = list(figures_of(cells[0]))
    lines = [f"{'1/beta':>8}" + "".join(f"{column:>12}" for column in columns)]
    for beta in sorted({cell["beta"] for cell in cells}, reverse=True):
        figures = [figures_of(cell) for cell in cells if cell["beta"] == beta]
        means = [statistics.mean(of[column] for of in figures) for column in columns]
        lines.append(f"{1 / beta:>8.2f}" + "".join(f"{mean:>12.3f}" for mean in means))
    return "\n".join(lines)


def figures_of(cell):
    """{column of `beta_table`: number} of a cell."""
    return {"slope": cell["slope"], "predicted": cell["predicted"], "seen": cell["seen"],
            **{mode: cell[mode]["mean"] for mode in MODES},
            "unread": cell["sampled"]["unread"], "nats of t+": cell["log_ratio_of_t_plus"]}
