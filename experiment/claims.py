"""The paper's claims as numbers of the ladder, each with its 95% interval over seeds."""

import math
import statistics
from typing import NamedTuple

from experiment.rows import (
    ALL,
    BEST,
    CONTINUED,
    FULL,
    LORA,
    MERGER,
    MODES,
    NO_REPLAY,
    ONE,
    ORACLE,
    SHUFFLED,
    T_PLUS,
    TUNED,
    U_APO,
    U_T_PLUS,
    mean_accuracy,
)
from scale_model.world import FINDINGS, TEACHERS


class Difference(NamedTuple):
    """A claim about the mean accuracies of two rows.

    claim  in words
    row, minus  the rows; their difference is claimed to be above 0
    paper  the paper's difference, or None
    """
    claim: str
    row: str
    minus: str
    paper: float = None


DIFFERENCES = (
    Difference("more teachers alone gain little (Table 5)", ALL, ONE, 0.02),
    Difference("APO beats SPD (Table 5)", LORA, ALL, 0.10),
    Difference("APO beats SPD continued as long", LORA, CONTINUED),
    Difference("APO beats fine-tuning on t+", LORA, TUNED),
    Difference("APO beats the best teacher (Table 2)", LORA, BEST, 0.03),
    Difference("the content of t+ matters: t+ against shuffled t+", LORA, SHUFFLED),
    Difference("a better t+ helps: oracle vote against t+", ORACLE, LORA),
    Difference("merger-only against SPD", MERGER, ALL),
    Difference("merger-only suffices: merger against LoRA", MERGER, LORA),
    Difference("all parameters against LoRA", FULL, LORA),
    Difference("replay costs nothing: SPD with against without", ALL, NO_REPLAY),
    Difference("taught consensus or not: APO against APO on the untaught base", LORA, U_APO),
)

# the 97.5% point of Student's t with 1 to 9 degrees of freedom
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def answers(cells):
    """What the ladder answers to every claim, paired by seed.

    cells  the "cells" of results.json
    Returns its "claims": [{"world", "claim", "mode", "paper", "mean", "low", "high", "values"}].
    """
    found = []
    for world in dict.fromkeys(cell["world"] for cell in cells):
        chains = rows_of_seeds(cells, world)
        measured = [quantities(rows) for rows in chains]
        for claim in measured[0]:
            values = [of_seed[claim] for of_seed in measured]
            found.append({"world": world, "claim": claim, "mode": None, "paper": None,
                          **interval(values)})
        for claim, row, minus, paper in DIFFERENCES:
            for mode in MODES:
                values = [mean_accuracy(rows[row], mode) - mean_accuracy(rows[minus], mode)
                          for rows in chains]
                found.append({"world": world, "claim": claim, "mode": mode, "paper": paper,
                              **interval(values)})
    return found


def rows_of_seeds(cells, world):
    """The cells of a world, {row: cell} for each seed in order."""
    seeds = sorted({cell["seed"] for cell in cells if cell["world"] == world})
    return [{cell["row"]: cell for cell in cells if (cell["world"], cell["seed"]) == (world, seed)}
            for seed in seeds]


def quantities(rows):
    """The claims that are no difference between two students, of one world and seed.

    rows  {row: cell}
    Returns {claim: number}.
    """
    teachers = [rows[name]["given"] for name in TEACHERS]
    gaps = []
    for finding in FINDINGS:
        accuracies = [teacher["accuracy"][finding] for teacher in teachers]
        gaps.append(max(accuracies) - min(accuracies))
    nearest = max(teacher["agreement_with_vote"] for teacher in teachers)
    t_plus, untaught = (rows[row]["sampled"]["agreement_with_vote"] for row in (T_PLUS, U_T_PLUS))
    spd, apo = rows[ALL]["inherited"], rows[LORA]["inherited"]
    spd_own, apo_own = spd["own"] - spd["others"], apo["own"] - apo["others"]
    return {
        "teachers drift apart (Obs. 1.1): best minus worst teacher per finding":
            statistics.mean(gaps),
        "SPD inherits its teachers' errors (Obs. 1.2): own minus other teachers'": spd_own,
        "APO sheds inherited errors: SPD's own-minus-others less APO's": spd_own - apo_own,
        "SPD repeats the vote where the vote is wrong": spd["vote"],
        "APO repeats the vote where the vote is wrong": apo["vote"],
        "t+ is nearer to the vote than any teacher: t+ minus the nearest": t_plus - nearest,
        "t+ of the untaught base: the same": untaught - nearest,
    }


def interval(values):
    """The mean over seeds with its 95% interval by Student's t.

    values  one number a seed, 10 at most
    Returns {"mean", "low", "high", "values"}; low and high are None for one seed.
    """
    mean, n = statistics.mean(values), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "values": values}
    half = STUDENT_T[n - 2] * statistics.stdev(values) / math.sqrt(n)
    return {"mean": mean, "low": mean - half, "high": mean + half, "values": values}
