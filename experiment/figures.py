"""The figures of the experiment as SVG text: the ladder, and APO against 1/beta."""

import math
import statistics

from experiment.rows import (
    ALL,
    BEST,
    CONTINUED,
    LORA,
    MERGER,
    ONE,
    T_PLUS,
    TUNED,
    VOTE,
    mean_accuracy,
)

STYLE = (
    "svg{--ink:#333;--line:#1f6f8b;background:#fff} text{fill:var(--ink)} "
    ".axis{stroke:var(--ink);fill:none} .mean{stroke:var(--line);fill:none;stroke-width:2} "
    ".dash{stroke-dasharray:5 4} circle{fill:var(--line);opacity:.45} "
    "@media(prefers-color-scheme:dark){svg{--ink:#ddd;--line:#6fc3df;background:#1b1d20}}")


# ----------------------------------------------------------------------------------- the ladder

SHOWN = (BEST, VOTE, T_PLUS, ONE, ALL, CONTINUED, TUNED, MERGER, LORA)
ROW_HEIGHT = 26  # pixels


def ladder_figure(cells):
    """README's picture of some rows of the ladder.

    cells  the "cells" of results.json
    Returns SVG: for each row and world a dot for each seed and a stroke at their mean, of the
    accuracy of answers sampled at temperature 1, or of texts as they are given.
    """
    bottom = ROW_HEIGHT * len(SHOWN)
    size = f'viewBox="0 0 860 {90 + bottom}" role="img" font-family="sans-serif" font-size="13"'
    title = "The scale model: accuracy of every seed, sampled answers"
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
             f"<title>{title}</title><style>{STYLE}</style>"]
    for i, row in enumerate(SHOWN):
        parts.append(f'<text x="210" y="{50 + ROW_HEIGHT * i}" text-anchor="end">{row}</text>')
    for left, world in zip((225, 550), dict.fromkeys(cell["world"] for cell in cells)):
        parts += ladder_panel([cell for cell in cells if cell["world"] == world], world, left)
    below = "accuracy on 200 drawn test films, five findings; a dot a seed, the stroke their mean"
    parts.append(f'<text x="225" y="{82 + bottom}">{below}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def ladder_panel(cells, world, left):
    """The elements of one world in `ladder_figure`; its left edge is at `left` (pixels)."""
    bottom = ROW_HEIGHT * len(SHOWN)
    x = lambda accuracy: left + 290 * (accuracy - 0.5) / 0.35  # from .50 to .85
    parts = [f'<text x="{left}" y="20" font-weight="bold">world \'{world}\'</text>']
    for tick in (0.5, 0.6, 0.7, 0.8):
        parts += [f'<path class="axis" opacity=".25" d="M{x(tick):.1f} 32V{40 + bottom}"/>',
                  f'<text x="{x(tick):.1f}" y="{58 + bottom}" text-anchor="middle">{tick:g}</text>']
    for i, row in enumerate(SHOWN):
        y = 45 + ROW_HEIGHT * i
        values = [mean_accuracy(cell, "sampled") for cell in cells if cell["row"] == row]
        parts += [f'<circle cx="{x(value):.1f}" cy="{y}" r="3.5"/>' for value in values]
        if values:
            mean = x(statistics.mean(values))
            parts.append(f'<path class="mean" d="M{mean:.1f} {y - 8}v16"/>')
    return parts


# ----------------------------------------------------------------------------------------- beta

WIDTH, TOP, HEIGHT = 225, 35, 180  # of a panel, in pixels


def beta_figure(cells):
    """README's picture of APO against 1/beta.

    cells  the "cells" of beta.json
    Returns SVG with three panels, a dot for each seed and a line through the means: accuracy
    (sampled; dashed: predicted), unread rate of sampled answers, log pi_theta(t+) - log pi_st(t+).
    """
    size = 'viewBox="0 0 900 270" role="img" font-family="sans-serif" font-size="12"'
    accuracy = beta_panel(cells, 55, "accuracy, sampled (dashed: predicted)",
                          lambda cell: cell["sampled"]["mean"], lambda cell: cell["predicted"])
    unread = beta_panel(cells, 355, "unread, sampled", lambda cell: cell["sampled"]["unread"])
    log_ratio = beta_panel(cells, 655, "log-ratio of t+, nats",
                           lambda cell: cell["log_ratio_of_t_plus"])
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        f"<title>APO on the scale model against 1/beta</title><style>{STYLE}</style>",
        *accuracy, *unread, *log_ratio, "</svg>"]) + "\n"


def beta_panel(cells, left, title, value, dashed=None):
    """The elements of one panel of `beta_figure`.

    cells   the "cells" of beta.json
    left    its left edge, in pixels
    title   above it
    value   cell -> number, drawn as dots and a line through the means
    dashed  cell -> number, drawn as a dashed line; None: there is none
    """
    betas = sorted({cell["beta"] for cell in cells}, reverse=True)
    values = [of(cell) for cell in cells for of in (value, dashed) if of]
    margin = 0.05 * (max(values) - min(values) or 1)
    low, high = min(values) - margin, max(values) + margin
    doublings = math.log2(betas[0] / betas[-1]) or 1
    x = lambda beta: left + 12 + (WIDTH - 24) * math.log2(betas[0] / beta) / doublings
    y = lambda number: TOP + HEIGHT * (high - number) / (high - low)
    bottom = TOP + HEIGHT
    parts = [f'<text x="{left}" y="20" font-weight="bold">{title}</text>'
             f'<path class="axis" d="M{left} {TOP}V{bottom}H{left + WIDTH}"/>']
    for beta in betas:
        parts.append(f'<text x="{x(beta):.1f}" y="{bottom + 18}" text-anchor="middle">'
                     f'{1 / beta:g}</text>')
    for tick in (low, (low + high) / 2, high):
        parts.append(f'<text x="{left - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">'
                     f'{tick:.2f}</text>')
    parts.append(f'<text x="{left + WIDTH / 2}" y="{bottom + 38}" text-anchor="middle">'
                 '1/beta</text>')
    for cell in cells:
        parts.append(f'<circle cx="{x(cell["beta"]):.1f}" cy="{y(value(cell)):.1f}" r="3.5"/>')
    for of, style in ((value, "mean"), (dashed, "mean dash")):
        if of:
            points = " ".join(f"{x(beta):.1f},{y(mean_at(cells, beta, of)):.1f}" for beta in betas)
            parts.append(f'<polyline class="{style}" points="{points}"/>')
    return parts


def mean_at(cells, beta, value):
    """The mean of value(cell) over the cells of a beta."""
    return statistics.mean(value(cell) for cell in cells if cell["beta"] == beta)
