"""The paper's own figures, as printed: Tables 1-5 and 7, all rows; None is the paper's '-'.

`beside` and `accuracy_table` print ours with them.

The paper disagrees with itself: its text gives 0.76 where Table 1 has 0.78, and 'Ours' differs
between Tables 3 and 7. The averages are its own too; they are not always the mean of the figures
beside them. Ours below them is the mean over the same five findings, `mean_of_five`; the mean over
all findings of a task has a column of its own, 'mean all'.
"""

import statistics
from pathlib import Path

from runtime.records import printable, read_json

# the columns of Tables 1, 2 and 5, before 'Avg.'
FIVE = ("Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax", "Edema")
# of Tables 3 and 7; CIDEr is in their captions only
TEXT_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")
ZERO_SHOT = ("Open-I", "ChestX-ray14", "CheXpert", "ChestX-Det10")

TABLE_1 = {
    "CTrans": (0.44, 0.61, 0.45, 0.32, 0.66, 0.49),
    "CheXRelNet": (0.47, 0.47, 0.47, 0.36, 0.49, 0.45),
    "BioViL": (0.56, 0.63, 0.60, 0.43, 0.68, 0.58),
    "BioViL-T": (0.61, 0.67, 0.62, 0.43, 0.69, 0.60),
    "Med-ST": (0.61, 0.67, 0.59, 0.65, 0.54, 0.61),
    "TempA-VLP": (0.65, 0.59, 0.73, 0.43, 0.77, 0.64),
    "CoCa-CXR": (0.70, 0.70, 0.61, 0.73, 0.72, 0.69),
    "Ours": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78),
}

TABLE_2 = {
    "GPT-5": (0.75, 0.68, 0.89, 0.90, 0.52, 0.75),
    "Gemini-2.5": (0.28, 0.61, 0.40, 0.94, 0.42, 0.53),
    "Sonnet-4": (0.89, 0.69, 0.48, 0.15, 0.15, 0.47),
    "Qwen-VL-Max": (0.54, 0.65, 0.40, 0.95, 0.64, 0.64),
    "Grok-4": (0.43, 0.41, 0.36, 0.97, 0.61, 0.56),
    "GLM-4.5V": (0.59, 0.67, 0.52, 0.96, 0.72, 0.69),
    "Moonshot": (0.13, 0.46, 0.77, 0.88, 0.19, 0.48),
    "Ours": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78),
}

TABLE_3 = {
    "METransformer": (0.386, 0.250, 0.169, 0.124, 0.291, 0.152),
    "R2GenGPT": (0.408, 0.256, 0.174, 0.125, 0.285, 0.167),
    "PromptMRG": (0.398, None, None, 0.112, 0.268, 0.157),
    "BtspLLM": (0.402, 0.262, 0.180, 0.128, 0.291, 0.175),
    "MambaXray": (0.422, 0.268, 0.184, 0.133, 0.289, 0.167),
    "Ours": (0.463, 0.272, 0.210, 0.152, 0.298, 0.213),
}

TABLE_4 = {
    "BioViL": (0.70, 0.73, 0.79, 0.71),
    "CheXzero": (0.76, 0.73, 0.88, 0.71),
    "MedKLIP": (0.76, 0.73, 0.88, 0.71),
    "KAD": (0.81, 0.79, 0.91, 0.74),
    "CARZero": (0.84, 0.81, 0.92, 0.80),
    "Ours": (0.85, 0.83, 0.92, 0.81),
}

TABLE_5 = {
    "SPD, one teacher": (0.78, 0.58, 0.70, 0.95, 0.31, 0.66),
    "SPD, all teachers": (0.77, 0.49, 0.69, 0.94, 0.51, 0.68),
    "SPD, all teachers + APO": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78),
}

TABLE_7 = {
    "METransformer": (0.386, 0.250, 0.169, 0.124, 0.291, 0.152),
    "R2GenGPT": (0.408, 0.256, 0.174, 0.125, 0.285, 0.167),
    "BtspLLM": (0.402, 0.262, 0.180, 0.128, 0.291, 0.175),
    "MambaXray": (0.422, 0.268, 0.184, 0.133, 0.289, 0.167),
    "CounterfactRFT": (0.426, 0.288, 0.186, 0.155, 0.421, 0.286),
    "Ours": (0.563, 0.372, 0.270, 0.192, 0.298, 0.213),
}

SHORT = {
    "Atelectasis": "Ate.",
    "Cardiomegaly": "Car.",
    "Consolidation": "Con.",
    "Edema": "Ede.",
    "Enlarged Cardiomediastinum": "ECM",
    "Fracture": "Fra.",
    "Lung Lesion": "LL",
    "Lung Opacity": "LO",
    "No Finding": "NF",
    "Pleural Effusion": "PE",
    "Pleural Other": "PO",
    "Pneumonia": "Pna.",
    "Pneumothorax": "Pnx.",
    "Support Devices": "SD",
}
CLASSIFICATION = ("Con.", "PE", "Pna.", "Pnx.", "Ede.", "Avg.")

# number: (title, columns, the paper's rows)
TABLES = {
    1: ("MS-CXR-T, top-1 accuracy", CLASSIFICATION, TABLE_1),
    2: ("MS-CXR-T, top-1 accuracy of the teachers", CLASSIFICATION, TABLE_2),
    3: ("MIMIC-CXR, report generation", TEXT_METRICS, TABLE_3),
    4: ("zero-shot AUC, macro", ZERO_SHOT, TABLE_4),
    5: ("ablation, MS-CXR-T, top-1 accuracy", CLASSIFICATION, TABLE_5),
    7: ("MIMIC-CXR, report generation", TEXT_METRICS, TABLE_7),
}


# --------------------------------------------------------------------------- columns and figures

def five_first(findings):
    """The order of a table's columns: the paper's five findings, then the others."""
    return [*(f for f in FIVE if f in findings), *(f for f in findings if f not in FIVE)]


def short(finding):
    """The heading of a finding's column."""
    return SHORT.get(finding, finding[:6])


def mean_of_five(accuracy):
    """What the paper's 'Avg.' is compared with.

    accuracy  {finding: share}
    Returns the unweighted mean over the paper's five findings; None if one of them is missing.
    """
    five = [accuracy.get(finding) for finding in FIVE]
    return None if None in five else sum(five) / len(five)


def means_of(scores, beside_paper=True):
    """The columns of means for some scores.

    scores        of each row what evaluate.score returns, or {"accuracy": {finding: share}, "mean"}
    beside_paper  whether anything of the paper's is printed with them
    Returns {heading: score -> mean}, first the column in which the paper's average is printed, and
    the lines that say why a mean is missing. There is one column 'mean' where nothing of the
    paper's is beside, or all scores are of just its five findings.
    """
    scores = [score for score in scores if score["accuracy"]]
    if not beside_paper or all(set(score["accuracy"]) == set(FIVE) for score in scores):
        return {"mean": lambda score: score["mean"]}, []
    means = {"mean 5": lambda score: mean_of_five(score["accuracy"]),
             "mean all": lambda score: score["mean"]}
    missing = [finding for finding in FIVE
               if any(finding not in score["accuracy"] for score in scores)]
    if not missing:
        return means, []
    return means, ["no mean 5 where one of the paper's five findings has no figure: "
                   + ", ".join(missing)]


def cell(value, width=7, digits=3, absent="-"):
    """A figure at the right end of a column; None is printed as `absent`."""
    return f"{absent:>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def paper_cells(figures, columns):
    """A row of Table 1, 2 or 5 below these columns of findings, and its average behind them."""
    *five, average = figures
    of = dict(zip(FIVE, five))
    cells = [cell(of.get(finding), digits=2, absent="") for finding in columns]
    return "".join(cells) + cell(average, digits=2)


# ------------------------------------------------------------------- a table of the paper and ours

def beside(number, ours):
    """A table of the paper as text: its rows, then ours below the same columns.

    number  of the table
    ours    {row: figures}, a figure None where it was not measured; empty: one row 'not run'. One
            figure more than the paper has columns is the mean over all findings of a task that has
            others than the paper's five
    """
    title, columns, paper = TABLES[number]
    digits = 3 if columns is TEXT_METRICS else 2
    headings = columns
    if any(len(figures) > len(columns) for figures in ours.values()):
        headings = (*columns, "mean all")
    width = max([44, *(len(f"here: {name}") for name in ours)])
    lines = [f"Table {number}. {title}",
             f"{'':{width}}" + "".join(f"{heading:>14}" for heading in headings)]
    for name, figures in paper.items():
        cells = "".join(cell(figure, 14, digits) for figure in figures)
        lines.append(f"{'paper: ' + name:{width}}{cells}")
    for name, figures in (ours or {"": [None] * len(headings)}).items():
        absent = "-" if columns is CLASSIFICATION and name else "not run"
        cells = "".join(cell(figure, 14, absent=absent) for figure in figures)
        lines.append(f"{('here: ' + name).rstrip(': '):{width}}{cells}")
        missing = [column for column, figure in zip(CLASSIFICATION, figures)
                   if figure is None and column != "Avg."]
        if absent == "-" and missing:
            lines.append(f"    no Avg. of {name}: no figure for {', '.join(missing)}")
    return "\n".join(lines)


# ---------------------------------------------------------------- what the commands print of a run

def plain(row):
    """The scores of a row that a table shows: a student has several, by how it was asked."""
    return row.get("options") or row.get("greedy") or row


def accuracy_table(rows, findings, paper=None):
    """The accuracies of `evaluate.py classify` as text, one line a row.

    rows      {name: score, or {"options": score}, or {"greedy": score, "sampled": score}}
    findings  of the task; those that no row has get no column
    paper     {name: figures}, printed below, if any of its five findings is there; None: nothing is
    Behind the findings are the means, 'sampled' (the first of the means, for sampled answers) and
    the unread rate.
    """
    scores = [plain(row) for row in rows.values()]
    columns = five_first([f for f in findings if any(f in score["accuracy"] for score in scores)])
    paper = paper if set(columns) & set(FIVE) else None
    means, notes = means_of(scores, paper)
    first, *others = means
    heads = [f"{short(finding):>7}" for finding in columns]
    heads += [f"{first:>7}{'sampled':>9}", *(f"{head:>9}" for head in others), f"{'unread':>8}"]
    lines = [f"{'':34}" + "".join(heads)]
    lines += [accuracy_line(name, row, columns, means) for name, row in rows.items()]
    for name, figures in (paper or {}).items():
        lines.append(f"{'paper: ' + name:34}{paper_cells(figures, columns)}")
    return "\n".join([*lines, *notes])


def accuracy_line(name, row, columns, means):
    """One line of `accuracy_table`; means: {heading: score -> mean}."""
    score = plain(row)
    mean, *others = means.values()
    sampled = cell(mean(row["sampled"]), 9) if "sampled" in row else f"{'':9}"
    cells = [cell(score["accuracy"].get(finding)) for finding in columns]
    cells += [cell(mean(score)), sampled, *(cell(other(score), 9) for other in others)]
    return f"{name:34}" + "".join(cells) + f"{score['unread']:>8.3f}"


def prevalence_lines(share):
    """The classes of the labels as text, a line a finding.

    share  {finding: {"n": how many labels, class: share of them}}
    """
    lines = []
    for finding, shares in share.items():
        parts = [f"{value} {figure}" if value == "n" else f"{value} {figure:.3f}"
                 for value, figure in shares.items()]
        lines.append(f"{finding}: {', '.join(parts)}")
    return lines


def student_lines(name, row):
    """The lines of one student below the table.

    name  of the student
    row   what evaluate.classify returns
    Returns top-1 and macro accuracy with their intervals, if it has them, and whose voices it
    speaks in.
    """
    lines = []
    for mode, score in row.items():
        for key, title in (("top1", "top-1 accuracy"), ("macro", "macro accuracy")):
            if key in score:
                figures = ", ".join(interval_cells(score, key))
                lines.append(f"{name}, {mode}, {title} [95%]: {figures}")
    if "greedy" in row:
        lines.append(f"{name}: voices, greedy {row['greedy']['styles']}, "
                     f"sampled {row['sampled']['styles']}")
    return lines


def interval_cells(score, key):
    """'Con. 0.810 [0.700, 0.900]' of each finding and mean; key: top1 or macro."""
    values, bounds = score[key]["value"], score[key]["interval"]
    means, _ = means_of([score], set(values) & set(FIVE))
    *_, last = means  # what the mean over all findings is called
    for name, value in values.items():
        heading = last if name == "mean" else SHORT.get(name, name)
        low, high = bounds[name]
        yield f"{heading} {value:.3f} [{low:.3f}, {high:.3f}]"


def _rate(value):
    """A rate that may be undefined."""
    return " none" if value is None else f"{value:.3f}"


def report_lines(rows, how):
    """Tables 3 and 7 with ours, how they were scored, and what has no column there.

    rows  {name: what evaluation.reports.score_reports returns}
    how   that line
    """
    ours = {name: [row.get(key) for key in TEXT_METRICS] for name, row in rows.items()}
    lines = [beside(3, ours), beside(7, ours), how]
    for name, row in rows.items():
        found = row["findings"]
        precision, recall, f1 = (_rate(found[key]) for key in ("precision", "recall", "f1"))
        lines.append(f"{name}: CIDEr {row['CIDEr']:.3f}, "
                     f"findings P {precision} R {recall} F1 {f1}, "
                     f"words {row['words']:.1f} (references {row['reference_words']:.1f})")
    return lines


def auc_lines(name, figures):
    """The AUCs of one student on one dataset as lines: the mean, then a class a line.

    name     of the student and the dataset
    figures  what evaluation.zeroshot.aucs returns
    """
    head = (f"{name}: {figures['n']} images, macro AUC {_rate(figures['macro'])} "
            f"over {figures['classes']} classes, {figures['left_out']} left out")
    if "per_study" in figures:
        head += (f"; per study, {figures['views']} over views: {_rate(figures['per_study'])} "
                 f"over {figures['studies']} studies")
    lines = [head]
    for finding, value in figures["auc"].items():
        lines.append(f"    {finding:28}{_rate(value)}  "
                     f"{figures['positive'][finding]} of {figures['labels'][finding]} positive")
    return lines


# ------------------------------------------------------------------- all tables, from results files

def collect(paths):
    """What results files hold for the tables of the paper.

    paths  --output of classify, reports and zeroshot, results.json of `python -m experiment ladder`
    Returns {table number: {row: figures}}, as `beside` takes them. Students on MS-CXR-T are below
    Table 1, all rows of a studies.jsonl below Table 2; students with the names of Table 5's rows
    are also below that, as are those of the ladder. A row that two files have with different
    figures has the file's name in the second. Raises ValueError naming a file that is none of
    these.
    """
    ours = {number: {} for number in TABLES}
    for path in paths:
        content = read_json(path)
        try:
            for number, name, figures in rows_of(content):
                if not all(map(is_figure, figures)):
                    raise ValueError(f"{name!r}: a figure that is no number")
                name = printable(name)
                if ours[number].get(name, figures) != figures:
                    name = f"{name} ({printable(path)})"
                ours[number][name] = figures
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: expected the --output of classify, reports or zeroshot, or "
                             "results.json of python -m experiment ladder; "
                             f"{type(error).__name__}: {printable(error)}") from None
    ours[7] = ours[3]
    return ours


def is_figure(value):
    """Whether it can be printed in a table: None, or a number that is neither huge nor NaN."""
    return value is None or type(value) in (int, float) and abs(value) < 1e9


def rows_of(content):
    """Yields (table number, row, figures) of a results file. Raises ValueError for another file."""
    settings, rows = content.get("settings", {}), content.get("rows", {})
    command = settings.get("command")
    if command == "classify":
        yield from classified_rows(settings, rows)
    elif command == "reports":
        for name, row in rows.items():
            yield 3, name, [row.get(key) for key in TEXT_METRICS]
    elif command == "zeroshot":
        for name, row in rows.items():
            yield 4, name, [row.get(dataset, {}).get("macro") for dataset in ZERO_SHOT]
    elif "claims" in content:
        yield from ladder_rows(content["cells"])
    else:
        raise ValueError("it is none of them")


def classified_rows(settings, rows):
    """`rows_of` the --output of classify."""
    task = settings["task"]
    for name, row in rows.items():
        where = f"MS-CXR-T {task}" if task else Path(settings["studies"]).name
        if task == "presence" and settings.get("blank") == "negative":
            where += ", blank negative"
        score = plain(row)
        is_student = score is not row
        figures = [*(score["accuracy"].get(finding) for finding in FIVE),
                   mean_of_five(score["accuracy"])]
        if set(score["accuracy"]) != set(FIVE):
            figures.append(score["mean"])
        if is_student or not task:
            yield 1 if task else 2, f"{name} [{where}]", figures
        # Table 5 is measured on MS-CXR-T; a studies.jsonl gives the same ablation on other films
        if is_student and name in TABLE_5:
            yield 5, f"{name} [{where}]", figures


def ladder_rows(cells):
    """`rows_of` the ladder: its students' greedy answers, the mean over seeds."""
    students = dict.fromkeys((one["world"], one["row"]) for one in cells
                             if "greedy" in one and "voiced" in one)
    for world, row in students:
        seeds = [one["greedy"] for one in cells if (one["world"], one["row"]) == (world, row)]
        figures = [statistics.mean(score["accuracy"][finding] for score in seeds)
                   for finding in FIVE]
        average = statistics.mean(score["mean"] for score in seeds)
        yield 5, f"{row} [{world}]", [*figures, average]
