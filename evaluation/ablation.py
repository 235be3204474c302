"""The scale model's ladder beside the paper's Table 5, as `python -m experiment ladder` wrote it.

    results.json    {"experiment": {"split", ...},
                     "cells": [{"world", "seed", "row", and a score for each way it was read}],
                     "claims": [{"world", "claim", "mode", "mean", "low", "high", "paper", ...}]}

A student is read in three ways: 'greedy', 'voiced' (greedy behind a teacher's opening words) and
'sampled'; texts and labels that are read as they are have 'given' in their place.
"""

import json
import statistics

from evaluation.tables import FIVE, SHORT, TABLE_5
from runtime import ranks
from runtime.records import printable, read_json


def modes(cell):
    """The scores of a cell, {mode: score}."""
    return {mode: cell[mode] for mode in ("greedy", "voiced", "sampled", "given") if mode in cell}


def scores_of(cells, world, row):
    """What `modes` gives of each seed of a row in a world."""
    return [modes(cell) for cell in cells if (cell["world"], cell["row"]) == (world, row)]


def means(seeds, mode):
    """Mean accuracies of a row in a mode, one a seed.

    seeds  what `modes` gives, of each seed
    mode   greedy, voiced or sampled; what is read as it is given counts as greedy
    Returns the means; an empty list where the row has none in this mode.
    """
    found = [scores[mode]["mean"] for scores in seeds if mode in scores]
    if not found and mode == "greedy":
        found = [scores["given"]["mean"] for scores in seeds if "given" in scores]
    return found


def mean_and_deviation(values):
    """'0.654 ± 0.012' over seeds, or the one value."""
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


# ----------------------------------------------------------------------------------------- as text

def read_ladder(path):
    """Reads the ladder's results.json.

    Returns its content and its `ladder_table`. Raises ValueError if the file is none.
    """
    content = read_json(path)
    try:
        return content, ladder_table(content)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not the results.json of python -m experiment ladder: "
                         f"{printable(repr(error))}") from None


def ladder_table(content):
    """The ladder as text.

    content  of its results.json
    Returns for each world mean and standard deviation over seeds, the paper's Table 5 below, then
    the paired differences that answer its claims.
    """
    cells, lines = content["cells"], []
    columns = [finding for finding in FIVE if any(
        finding in score["accuracy"] for cell in cells for score in modes(cell).values())]
    for world in dict.fromkeys(cell["world"] for cell in cells):
        seeds = sorted({cell["seed"] for cell in cells if cell["world"] == world})
        lines.append(f"world '{world}', {content['experiment']['split']} split, "
                     f"seeds {', '.join(map(str, seeds))}: accuracy, mean +- sd over seeds")
        lines.append(f"{'':34}" + "".join(f"{SHORT[finding]:>7}" for finding in columns)
                     + f"{'greedy':>15}{'voiced':>15}{'sampled':>15}{'unread':>8}{'= vote':>8}")
        for row in dict.fromkeys(cell["row"] for cell in cells if cell["world"] == world):
            lines.append(ladder_row(row, scores_of(cells, world, row), columns))
        for name, (*five, average) in TABLE_5.items():
            figures = "".join(f"{figure:>7.2f}" for figure in five)
            lines.append(f"{'paper: ' + name:34}{figures}{average:>8.2f}")
        lines.append("")
        lines += [claim_line(claim) for claim in content["claims"] if claim["world"] == world]
        lines.append("")
    return "\n".join(lines)


def ladder_row(row, seeds, columns):
    """One line of `ladder_table`.

    row      its name
    seeds    what `modes` gives, of each seed
    columns  the findings
    Findings, unread and agreement are of the sampled answers, or of texts that are read as they
    are.
    """
    sampled = [scores.get("sampled", scores.get("given")) for scores in seeds]
    line = f"{row:34}"
    for finding in columns:
        line += f"{statistics.mean(score['accuracy'][finding] for score in sampled):>7.3f}"
    for mode in ("greedy", "voiced", "sampled"):
        values = means(seeds, mode)
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        line += f"{statistics.mean(values):>8.3f} +-{deviation:>4.3f}" if values else f"{'':15}"
    for key in ("unread", "agreement_with_vote"):
        line += f"{statistics.mean(score[key] for score in sampled):>8.3f}"
    return line


def claim_line(claim):
    """A claim with its figure, interval and what the paper has."""
    answers = f", {claim['mode']}" if claim["mode"] else ""
    paper = "" if claim["paper"] is None else f"   paper {claim['paper']:+.2f}"
    return f"  {claim['claim']}{answers}: {with_interval(claim)}{paper}"


def with_interval(claim):
    """'+0.051 [+0.020, +0.082]', without the interval where there is one seed."""
    between = "" if claim["low"] is None else f" [{claim['low']:+.3f}, {claim['high']:+.3f}]"
    return f"{claim['mean']:+.3f}{between}"


# ----------------------------------------------------------------------------------- as Markdown

def ladder_markdown(content):
    """experiment/README.md's table of the ladder, of which README has some rows.

    content  of its results.json
    Returns mean and standard deviation over seeds in each world, as Markdown.
    """
    cells = content["cells"]
    worlds = list(dict.fromkeys(cell["world"] for cell in cells))
    heads = " | ".join(f"{world}: sampled | voiced | greedy" for world in worlds)
    lines = [f"| | {heads} |", "| --- |" + " --- | --- | --- |" * len(worlds)]
    for row in dict.fromkeys(cell["row"] for cell in cells):
        figures = []
        for world in worlds:
            seeds = scores_of(cells, world, row)
            for mode in ("sampled", "voiced", "greedy"):
                values = means(seeds, mode)
                figures.append(mean_and_deviation(values) if values else "")
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def claims_markdown(content):
    """experiment/README.md's table of the claims.

    content  of the ladder's results.json
    Returns mean and 95% interval over seeds in each world, as Markdown.
    """
    claims = content["claims"]
    worlds = list(dict.fromkeys(claim["world"] for claim in claims))
    lines = ["| claim | answers | paper | " + " | ".join(worlds) + " |",
             "| --- | --- | --- |" + " --- |" * len(worlds)]
    for claim, mode, paper in dict.fromkeys((c["claim"], c["mode"], c["paper"]) for c in claims):
        # one a world; of two with the same world the later one counts
        of = {c["world"]: c for c in claims if (c["claim"], c["mode"]) == (claim, mode)}
        figures = " | ".join(map(with_interval, of.values()))
        printed = "" if paper is None else f"{paper:+.2f}"
        lines.append(f"| {claim} | {mode or ''} | {printed} | {figures} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------ the command

def add_arguments(parser):
    """Adds the flags of `evaluate.py ablation`."""
    parser.add_argument("results", help="results.json of python -m experiment ladder")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")


def run(args):
    """Prints the ladder with its claims. Returns the content of its results.json."""
    content, text = read_ladder(args.results)
    ranks.print_once(text)
    if args.json:
        ranks.print_once(json.dumps(content))
    return content
