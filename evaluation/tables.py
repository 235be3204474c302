"""The paper's own figures, as printed: Tables 1-5 and 7, all rows; None is the paper's '-'. `beside` and `table` print ours with them.

The paper disagrees with itself: its text gives 0.76 where Table 1 has 0.78, and 'Ours' differs between Tables 3 and 7. The averages are
its own too; they are not always the mean of the figures beside them. Ours below them is the mean over the same five findings, `mean_of_five`;
the mean over all findings of a task stands apart, as 'mean all'.
"""

import statistics
from pathlib import Path

from runtime.records import read_json, shown

FIVE = ("Consolidation", "Pleural Effusion", "Pneumonia", "Pneumothorax", "Edema")  # the columns of Tables 1, 2 and 5, before 'Avg.'
TEXT_METRICS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "METEOR")  # of Tables 3 and 7; CIDEr is in their captions only
ZERO_SHOT = ("Open-I", "ChestX-ray14", "CheXpert", "ChestX-Det10")

TABLE_1 = {"CTrans": (0.44, 0.61, 0.45, 0.32, 0.66, 0.49), "CheXRelNet": (0.47, 0.47, 0.47, 0.36, 0.49, 0.45),
           "BioViL": (0.56, 0.63, 0.60, 0.43, 0.68, 0.58), "BioViL-T": (0.61, 0.67, 0.62, 0.43, 0.69, 0.60),
           "Med-ST": (0.61, 0.67, 0.59, 0.65, 0.54, 0.61), "TempA-VLP": (0.65, 0.59, 0.73, 0.43, 0.77, 0.64),
           "CoCa-CXR": (0.70, 0.70, 0.61, 0.73, 0.72, 0.69), "Ours": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78)}

TABLE_2 = {"GPT-5": (0.75, 0.68, 0.89, 0.90, 0.52, 0.75), "Gemini-2.5": (0.28, 0.61, 0.40, 0.94, 0.42, 0.53),
           "Sonnet-4": (0.89, 0.69, 0.48, 0.15, 0.15, 0.47), "Qwen-VL-Max": (0.54, 0.65, 0.40, 0.95, 0.64, 0.64),
           "Grok-4": (0.43, 0.41, 0.36, 0.97, 0.61, 0.56), "GLM-4.5V": (0.59, 0.67, 0.52, 0.96, 0.72, 0.69),
           "Moonshot": (0.13, 0.46, 0.77, 0.88, 0.19, 0.48), "Ours": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78)}

TABLE_3 = {"METransformer": (0.386, 0.250, 0.169, 0.124, 0.291, 0.152), "R2GenGPT": (0.408, 0.256, 0.174, 0.125, 0.285, 0.167),
           "PromptMRG": (0.398, None, None, 0.112, 0.268, 0.157), "BtspLLM": (0.402, 0.262, 0.180, 0.128, 0.291, 0.175),
           "MambaXray": (0.422, 0.268, 0.184, 0.133, 0.289, 0.167), "Ours": (0.463, 0.272, 0.210, 0.152, 0.298, 0.213)}

TABLE_4 = {"BioViL": (0.70, 0.73, 0.79, 0.71), "CheXzero": (0.76, 0.73, 0.88, 0.71), "MedKLIP": (0.76, 0.73, 0.88, 0.71),
           "KAD": (0.81, 0.79, 0.91, 0.74), "CARZero": (0.84, 0.81, 0.92, 0.80), "Ours": (0.85, 0.83, 0.92, 0.81)}

TABLE_5 = {"SPD, one teacher": (0.78, 0.58, 0.70, 0.95, 0.31, 0.66), "SPD, all teachers": (0.77, 0.49, 0.69, 0.94, 0.51, 0.68),
           "SPD, all teachers + APO": (0.84, 0.67, 0.78, 0.96, 0.65, 0.78)}

TABLE_7 = {"METransformer": (0.386, 0.250, 0.169, 0.124, 0.291, 0.152), "R2GenGPT": (0.408, 0.256, 0.174, 0.125, 0.285, 0.167),
           "BtspLLM": (0.402, 0.262, 0.180, 0.128, 0.291, 0.175), "MambaXray": (0.422, 0.268, 0.184, 0.133, 0.289, 0.167),
           "CounterfactRFT": (0.426, 0.288, 0.186, 0.155, 0.421, 0.286), "Ours": (0.563, 0.372, 0.270, 0.192, 0.298, 0.213)}

SHORT = {"Atelectasis": "Ate.", "Cardiomegaly": "Car.", "Consolidation": "Con.", "Edema": "Ede.", "Enlarged Cardiomediastinum": "ECM",
         "Fracture": "Fra.", "Lung Lesion": "LL", "Lung Opacity": "LO", "No Finding": "NF", "Pleural Effusion": "PE", "Pleural Other": "PO",
         "Pneumonia": "Pna.", "Pneumothorax": "Pnx.", "Support Devices": "SD"}
CLASSIFICATION = ("Con.", "PE", "Pna.", "Pnx.", "Ede.", "Avg.")
TABLES = {1: ("MS-CXR-T, top-1 accuracy", CLASSIFICATION, TABLE_1),
          2: ("MS-CXR-T, top-1 accuracy of the teachers", CLASSIFICATION, TABLE_2),
          3: ("MIMIC-CXR, report generation", TEXT_METRICS, TABLE_3),
          4: ("zero-shot AUC, macro", ZERO_SHOT, TABLE_4),
          5: ("ablation, MS-CXR-T, top-1 accuracy", CLASSIFICATION, TABLE_5),
          7: ("MIMIC-CXR, report generation", TEXT_METRICS, TABLE_7)}


def five_first(findings):
    """The order of a table's columns: the paper's five, then the others."""
    return [*(f for f in FIVE if f in findings), *(f for f in findings if f not in FIVE)]


def mean_of_five(accuracy):
    """accuracy: {finding: share} -> what the paper's 'Avg.' is compared with: the unweighted mean over its five findings; None if one is missing."""
    five = [accuracy.get(finding) for finding in FIVE]
    return None if None in five else sum(five) / len(five)


def means_of(scores, beside_paper=True):
    """The columns of means for these scores, {heading: score -> mean}, first the one that a paper's average stands below, and the lines that
    say why a mean is missing. One column 'mean' where nothing of the paper's is beside, or all scores are of just its five findings."""
    scores = [s for s in scores if s["accuracy"]]
    if not beside_paper or all(set(s["accuracy"]) == set(FIVE) for s in scores):
        return {"mean": lambda s: s["mean"]}, []
    missing = [finding for finding in FIVE if any(finding not in s["accuracy"] for s in scores)]
    return ({"mean 5": lambda s: mean_of_five(s["accuracy"]), "mean all": lambda s: s["mean"]},
            [f"no mean 5 where one of the paper's five findings has no figure: {', '.join(missing)}"] if missing else [])


def beside(number, ours):
    """Table `number` as text: the paper's rows, then ours below the same columns.

    ours: {row: figures}, a figure None where it was not measured; empty: one row 'not run'. One figure more than the paper has columns is
    the mean over all findings of a task that has others than the paper's five."""
    title, columns, paper = TABLES[number]
    digits, classified = 3 if columns is TEXT_METRICS else 2, columns is CLASSIFICATION
    if any(len(figures) > len(columns) for figures in ours.values()):
        columns = (*columns, "mean all")
    width = max([44, *(len(f"here: {name}") for name in ours)])
    lines = [f"Table {number}. {title}", f"{'':{width}}" + "".join(f"{column:>14}" for column in columns)]
    lines += [f"{'paper: ' + name:{width}}" + "".join(cell(figure, 14, digits) for figure in figures) for name, figures in paper.items()]
    for name, figures in (ours or {"": [None] * len(columns)}).items():
        absent = "-" if classified and any(figure is not None for figure in figures) else "not run"
        lines.append(f"{('here: ' + name).rstrip(': '):{width}}" + "".join(cell(figure, 14, absent=absent) for figure in figures))
        missing = [column for column, figure in zip(CLASSIFICATION, figures) if figure is None and column != "Avg."]
        if absent == "-" and missing:
            lines.append(f"    no Avg. of {name}: no figure for {', '.join(missing)}")
    return "\n".join(lines)


def cell(value, width=7, digits=3, absent="-"):
    return f"{absent:>{width}}" if value is None else f"{value:>{width}.{digits}f}"


def table(rows, findings, paper=None):
    """rows: {name: score, or {"greedy": score, "sampled": score}} -> text, one line a row; paper: {name: figures} printed below, if any of
    its five findings is there. 'sampled' is the first of the means, for sampled answers."""
    columns = five_first([f for f in findings if any(f in s["accuracy"] for s in map(plain, rows.values()))])
    paper = paper if set(columns) & set(FIVE) else None
    means, notes = means_of(map(plain, rows.values()), paper)
    (first, mean), *others = means.items()
    lines = [f"{'':34}" + "".join(f"{SHORT.get(f, f[:6]):>7}" for f in columns) + f"{first:>7}{'sampled':>9}"
             + "".join(f"{head:>9}" for head, _ in others) + f"{'unread':>8}"]
    for name, row in rows.items():
        s = plain(row)
        lines.append(f"{name:34}" + "".join(f"{s['accuracy'].get(f, float('nan')):>7.3f}" for f in columns) + cell(mean(s))
                     + (cell(mean(row["sampled"]), 9) if "sampled" in row else f"{'':9}")
                     + "".join(cell(other(s), 9) for _, other in others) + f"{s['unread']:>8.3f}")
    for name, figures in (paper or {}).items():
        of = dict(zip(FIVE, figures))
        lines.append(f"{'paper: ' + name:34}" + "".join(f"{of[f]:>7.2f}" if f in of else f"{'':7}" for f in columns) + f"{figures[-1]:>7.2f}")
    return "\n".join([*lines, *notes])


def plain(row):
    """The scores of a row that stand in a table: a student has several, by how it was asked."""
    return row.get("options") or row.get("greedy") or row


def prevalence_lines(share):
    """share: {finding: {"n": labels, class: share of them}} -> a line a finding."""
    return [f"{finding}: " + ", ".join(f"{value} {figure}" if value == "n" else f"{value} {figure:.3f}" for value, figure in shares.items())
            for finding, shares in share.items()]


def student_lines(name, row):
    """The lines of one student below the table: top-1 and macro accuracy with their intervals, if it has them; whose voices it speaks in."""
    lines = []
    for mode, result in row.items():
        for key, title in (("top1", "top-1 accuracy"), ("macro", "macro accuracy")):
            if key in result:
                values, bounds = result[key]["value"], result[key]["interval"]
                *_, mean = means_of([result], set(values) & set(FIVE))[0]
                figures = {SHORT.get(f, mean if f == "mean" else f): (value, *bounds[f]) for f, value in values.items()}
                lines.append(f"{name}, {mode}, {title} [95%]: "
                             + ", ".join(f"{head} {value:.3f} [{low:.3f}, {high:.3f}]" for head, (value, low, high) in figures.items()))
    if "greedy" in row:
        lines.append(f"{name}: voices, greedy {row['greedy']['styles']}, sampled {row['sampled']['styles']}")
    return lines


def _rate(value):
    return " none" if value is None else f"{value:.3f}"


def report_lines(rows, how):
    """rows: {name: what evaluate.score_reports returns} -> Tables 3 and 7 with them, `how` they were scored, and what has no column there."""
    ours = {name: [row.get(key) for key in TEXT_METRICS] for name, row in rows.items()}
    lines = [beside(3, ours), beside(7, ours), how]
    for name, row in rows.items():
        precision, recall, f1 = (_rate(row["findings"][key]) for key in ("precision", "recall", "f1"))
        lines.append(f"{name}: CIDEr {row['CIDEr']:.3f}, findings P {precision} R {recall} F1 {f1}, "
                     f"words {row['words']:.1f} (references {row['reference_words']:.1f})")
    return lines


def auc_lines(name, figures):
    """What evaluate.aucs returns, as lines: the mean, then a class a line."""
    head = f"{name}: {figures['n']} images, macro AUC {_rate(figures['macro'])} over {figures['classes']} classes, {figures['left_out']} left out"
    if "per_study" in figures:
        head += f"; per study, {figures['views']} over views: {_rate(figures['per_study'])} over {figures['studies']} studies"
    return [head, *(f"    {finding:28}{_rate(value)}  {figures['positive'][finding]} of {figures['labels'][finding]} positive"
                    for finding, value in figures["auc"].items())]


def collect(paths):
    """Results files of classify, reports and zeroshot -> {table number: {row: figures}}, as `beside` takes them. Students on MS-CXR-T stand
    below Table 1, all rows of a studies.jsonl below Table 2; students with the names of its rows also below Table 5, as do those of
    `python -m experiment ladder`. A row that stands in two files with other figures has the file's name in the second. Raises ValueError naming a
    file that is none of these."""
    ours = {number: {} for number in TABLES}
    for path in paths:
        content = read_json(path)
        try:
            for number, name, figures in rows_of(content):
                if not all(figure is None or type(figure) in (int, float) and abs(figure) < 1e9 for figure in figures):
                    raise ValueError(f"{name!r}: a figure that is no number")
                name = shown(name)
                ours[number][name if ours[number].get(name, figures) == figures else f"{name} ({shown(path)})"] = figures
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path}: expected the --output of classify, reports or zeroshot, or results.json of python -m experiment ladder; "
                             f"{type(error).__name__}: {shown(error)}") from None
    ours[7] = ours[3]
    return ours


def rows_of(content):
    """Yields (table number, row, figures) of one results file."""
    settings, rows = content.get("settings", {}), content.get("rows", {})
    if settings.get("command") == "classify":
        for name, row in rows.items():
            s, where = plain(row), f"MS-CXR-T {settings['task']}" if settings["task"] else Path(settings["studies"]).name
            if settings["task"] == "presence" and settings.get("blank") == "negative":
                where += ", blank negative"
            figures, asked = [*(s["accuracy"].get(finding) for finding in FIVE), mean_of_five(s["accuracy"])], s is not row
            if set(s["accuracy"]) != set(FIVE):
                figures.append(s["mean"])
            if asked or not settings["task"]:
                yield 1 if settings["task"] else 2, f"{name} [{where}]", figures
            if asked and name in TABLE_5:  # which is measured on MS-CXR-T; of a studies.jsonl it is the same ablation on other films
                yield 5, f"{name} [{where}]", figures
    elif settings.get("command") == "reports":
        for name, row in rows.items():
            yield 3, name, [row.get(key) for key in TEXT_METRICS]
    elif settings.get("command") == "zeroshot":
        for name, row in rows.items():
            yield 4, name, [row.get(dataset, {}).get("macro") for dataset in ZERO_SHOT]
    elif "claims" in content:  # the ladder's students, greedy, mean over seeds
        for world, row in dict.fromkeys((cell["world"], cell["row"]) for cell in content["cells"] if "greedy" in cell and "voiced" in cell):
            seeds = [cell["greedy"] for cell in content["cells"] if (cell["world"], cell["row"]) == (world, row)]
            yield 5, f"{row} [{world}]", [statistics.mean(s["accuracy"][f] for s in seeds) for f in FIVE] + [
                statistics.mean(s["mean"] for s in seeds)]
    else:
        raise ValueError("it is none of them")


def read_ladder(path):
    """The results.json of `python -m experiment ladder` and its `ladder_table`. Raises ValueError if the file is none."""
    results = read_json(path)
    try:
        return results, ladder_table(results)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: not the results.json of python -m experiment ladder: {shown(repr(error))}") from None


def ladder_table(results):
    """The results.json of `python -m experiment ladder` as text: for each world mean and standard deviation over seeds, the paper's Table 5 below,
    then the paired differences that answer its claims."""
    cells, lines = results["cells"], []
    columns = [f for f in FIVE if any(f in score["accuracy"] for cell in cells for score in modes(cell).values())]
    for world in dict.fromkeys(cell["world"] for cell in cells):
        seeds = sorted({cell["seed"] for cell in cells if cell["world"] == world})
        lines += [f"world '{world}', {results['experiment']['split']} split, seeds {', '.join(map(str, seeds))}: accuracy, mean +- sd over seeds",
                  f"{'':34}" + "".join(f"{SHORT[f]:>7}" for f in columns)
                  + f"{'greedy':>15}{'voiced':>15}{'sampled':>15}{'unread':>8}{'= vote':>8}"]
        for row in dict.fromkeys(cell["row"] for cell in cells if cell["world"] == world):
            lines.append(ladder_row(row, [modes(cell) for cell in cells if (cell["world"], cell["row"]) == (world, row)], columns))
        lines += [f"{'paper: ' + name:34}" + "".join(f"{x:>7.2f}" for x in figures[:5]) + f"{figures[5]:>8.2f}" for name, figures in TABLE_5.items()]
        lines.append("")
        for claim in (c for c in results["claims"] if c["world"] == world):
            between = "" if claim["low"] is None else f" [{claim['low']:+.3f}, {claim['high']:+.3f}]"
            paper = "" if claim["paper"] is None else f"   paper {claim['paper']:+.2f}"
            lines.append(f"  {claim['claim']}{', ' + claim['mode'] if claim['mode'] else ''}: {claim['mean']:+.3f}{between}{paper}")
        lines.append("")
    return "\n".join(lines)


def ladder_row(row, seeds, columns):
    """seeds: {mode: score} of each. Findings, unread and agreement are of the sampled answers, or of texts read as they are."""
    first = [of.get("sampled", of.get("given")) for of in seeds]
    line = f"{row:34}" + "".join(f"{statistics.mean(score['accuracy'][f] for score in first):>7.3f}" for f in columns)
    for mode in ("greedy", "voiced", "sampled"):
        values = means(seeds, mode)
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        line += f"{statistics.mean(values):>8.3f} +-{spread:>4.3f}" if values else f"{'':15}"
    return line + "".join(f"{statistics.mean(score[key] for score in first):>8.3f}" for key in ("unread", "agreement_with_vote"))


def ladder_markdown(results):
    """experiment/README.md's table of the ladder, of which README has some rows: mean and standard deviation over seeds in each world."""
    worlds = list(dict.fromkeys(cell["world"] for cell in results["cells"]))
    lines = ["| | " + " | ".join(f"{world}: sampled | voiced | greedy" for world in worlds) + " |", "| --- |" + " --- | --- | --- |" * len(worlds)]
    for row in dict.fromkeys(cell["row"] for cell in results["cells"]):
        columns = []
        for world in worlds:
            seeds = [modes(cell) for cell in results["cells"] if (cell["world"], cell["row"]) == (world, row)]
            for mode in ("sampled", "voiced", "greedy"):
                values = means(seeds, mode)
                columns.append(spread(values) if values else "")
        lines.append(f"| {row} | " + " | ".join(columns) + " |")
    return "\n".join(lines) + "\n"


def claims_markdown(results):
    """experiment/README.md's table of the claims: mean and 95% interval over seeds in each world."""
    worlds = list(dict.fromkeys(claim["world"] for claim in results["claims"]))
    lines = ["| claim | answers | paper | " + " | ".join(worlds) + " |", "| --- | --- | --- |" + " --- |" * len(worlds)]
    for claim, mode, paper in dict.fromkeys((c["claim"], c["mode"], c["paper"]) for c in results["claims"]):
        of = {c["world"]: c for c in results["claims"] if (c["claim"], c["mode"]) == (claim, mode)}
        figures = [f"{c['mean']:+.3f}" + ("" if c["low"] is None else f" [{c['low']:+.3f}, {c['high']:+.3f}]") for c in of.values()]
        lines.append(f"| {claim} | {mode or ''} | {'' if paper is None else f'{paper:+.2f}'} | " + " | ".join(figures) + " |")
    return "\n".join(lines) + "\n"


def means(seeds, mode):
    """Mean accuracies of a row in that mode, one a seed; what is read as it is given stands in the greedy column."""
    return [of[mode]["mean"] for of in seeds if mode in of] or [of["given"]["mean"] for of in seeds if mode == "greedy" and "given" in of]


def spread(values):
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def modes(cell):
    """{mode: score} of a cell of the ladder; 'given' where texts or labels are read as they are."""
    return {mode: cell[mode] for mode in ("greedy", "voiced", "sampled", "given") if mode in cell}
