"""One page of what was measured: a single HTML file that opens without a network.

It is made for light and dark, for a wide screen, a phone and paper.

    python tools/report.py results.json --out report.html

results.json is what evaluate.py classify --output wrote; the rest is optional:

    --teachers teachers.json    of evaluate.py teachers --output: findings in their texts, agreement
                                between them
    --drift drift.json          of tools/drift.py --output: the teachers along the stream of studies
    --ladder ladder/results.json
                                of python -m experiment ladder: the ablations, mean and range over
                                seeds
    --log NAME=RUN/log.jsonl    of spd.py, apo.py: training curves; may be given several times
    --studies studies.jsonl --images DIR --positives positives.jsonl --answers NAME=answers.jsonl
                                gallery: film, truth, each teacher, t+, the students

positives.jsonl is selfdistill.py's, answers.jsonl that of tools/answers.py. What was not given is
named on the page, with the command that writes it. The same inputs give the same bytes.

Names and texts come from models and strangers, so nothing in them may act: `tag` escapes whatever
is not Markup, films are decoded and encoded anew, and the page's own policy forbids scripts and
everything from outside. Nothing here needs torch.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path
from typing import NamedTuple

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

from charts import (  # noqa: E402
    Markup,
    bars,
    join,
    lines,
    matrix,
    number,
    panels,
    scroll,
    show,
    table,
    tag,
)

import data  # noqa: E402
from evaluation.tables import FIVE, TABLE_2, TABLE_5, short  # noqa: E402
from runtime.records import write_text  # noqa: E402

FINAL = "SPD, all teachers + APO"  # Table 2's 'Ours'
SHORT = {finding: short(finding) for finding in FIVE}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# what each file is expected to be
WHAT = {
    "results": '{"settings": {...}, "rows": {name: {"accuracy": {finding: x}, ...}}} as '
               "evaluate.py classify --output writes",
    "teachers": '{"teachers": {name: {"precision", ...}}, "kappa": {"names", "matrix"}} as '
                "evaluate.py teachers --output writes",
    "drift": '{"windows": [N, ...], "teachers": {name: {"statistic": [x, ...], ...}}} as '
             "tools/drift.py --output writes",
    "ladder": '{"cells": [{"world": "...", "seed": N, "row": "...", ...}]} as '
              "python -m experiment ladder writes",
}
# what is said of a file that was not given
REMEDY = {
    "teachers": "no --teachers; evaluate.py teachers --output teachers.json writes it.",
    "drift": "no --drift; tools/drift.py --output drift.json writes it.",
    "ladder": "no --ladder; python -m experiment ladder writes its results.json.",
    "log": "no --log NAME=RUN/log.jsonl; spd.py and apo.py write it.",
    "studies": "no --studies, with --images, --positives and --answers.",
    "positives": "no --positives; selfdistill.py --split {split} writes t+ of these studies.",
    "answers": "no --answers NAME=FILE; tools/answers.py --student FOLDER --split {split} "
               "--output FILE writes it.",
}


# ------------------------------------------------------------------------------- reading the inputs

def read_json(path):
    """The value of a JSON file. Raises ValueError naming the file."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def checked(path, what, draw):
    """Draws a section from a file.

    path  the file
    what  was expected of it
    draw  a function without arguments
    Returns draw(). Raises ValueError that names the file where `draw` fails on the file's shape.
    """
    try:
        return draw()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: expected {what}; {type(error).__name__}: {error}") from error


def read_jsonl(path, what, fits):
    """The objects of a JSON-lines file.

    path  the file
    what  is expected of each line, for the messages of errors
    fits  fits(record) says whether a record is that; it may also raise an error where it is not
    Returns a list of at least one dict. Raises ValueError naming file and line.
    """
    records = []
    with open(path, "rb") as file:
        for line, content in enumerate(file, 1):
            try:
                record = json.loads(content.decode("utf-8")) if content.strip() else None
                wrong = record is not None and not (isinstance(record, dict) and fits(record))
            except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
                wrong = True
            if wrong:
                raise ValueError(f"{path}:{line}: expected {what}")
            records += [record] if record is not None else []
    if not records:
        raise ValueError(f"{path}: is empty, expected {what} on each line")
    return records


def read_texts(path, key):
    """Reads a JSON-lines file of one text a study.

    path  the file
    key   of the text
    Returns {id: text}. Raises ValueError as `read_jsonl` does, and for a study that comes twice.
    """
    fits = lambda record: isinstance(record["id"], str) and isinstance(record[key], str)
    texts = {}
    for record in read_jsonl(path, f'{{"id": "...", "{key}": "..."}}', fits):
        if record["id"] in texts:
            raise ValueError(f"{path}: study {record['id']!r} comes twice, expected it once")
        texts[record["id"]] = record[key]
    return texts


def named(values, flag):
    """{name: file} of ['NAME=FILE', ...]; `flag` is named in the ValueError of a value that is
    something else."""
    pairs = {}
    for value in values or ():
        name, _, path = value.partition("=")
        if not (name and path) or name in pairs:
            raise ValueError(f"{flag} {value}: expected NAME=FILE, with names that differ")
        pairs[name] = path
    return pairs


def images_of(record):
    """The images of a study, a list."""
    return record["image"] if isinstance(record["image"], list) else [record["image"]]


def is_study(record):
    """Whether a record has what the gallery shows of a study."""
    parts = all(isinstance(record.get(key, {}), dict) for key in ("labels", "trajectories"))
    paths = all(isinstance(image, str) for image in images_of(record))
    return isinstance(record["id"], str) and paths and parts


def has_step(record):
    """Whether a record is a line of a log."""
    return number(record["step"]) is not None


def film(path, root, side=448):
    """An image as a data URI: a grey JPEG.

    path  as a record gives it
    root  the folder of the images, in which it must lie
    side  pixels of its width and height at most
    Returns a str. Raises data.ImageError naming the file.
    """
    image = data.load_image(path, root).convert("L")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# ------------------------------------------------------------------ sections: rows beside the paper

def plain(name):
    """A name without case and signs: gpt-5 and GPT-5-nano are Table 2's GPT-5."""
    return "".join(c for c in name.casefold() if c.isalnum())


def is_student(row):
    """Whether a row of results.json is a student's."""
    return "options" in row or "greedy" in row


def main_score(row):
    """The score of a row that the page shows: a student has several, by how it was asked."""
    return row.get("options") or row.get("greedy") or row


def teachers_of(rows):
    """The rows of results.json that are teachers: neither students nor evaluate's baselines."""
    baselines = ("label prior", "vote of the teachers", "always no")
    return [name for name, row in rows.items()
            if not is_student(row) and not name.startswith(baselines)]


def all_rows(rows):
    """A table of all rows of results.json."""
    findings = list(dict.fromkeys(
        finding for row in rows.values() for finding in main_score(row)["accuracy"]))
    body = []
    for name, row in rows.items():
        score, sampled = main_score(row), row.get("sampled") or {}
        figures = [*(score["accuracy"].get(finding) for finding in findings),
                   score.get("mean"), sampled.get("mean"), score.get("unread")]
        body.append([name, *(show(figure, 3) for figure in figures)])
    about = ("Top-1 accuracy; the mean is over the findings of the row. Sampled: the same student "
             "at temperature 1. Unread: the share of answers without a readable class.")
    head = ["row", *(SHORT.get(f, f) for f in findings), "mean", "mean, sampled", "unread"]
    return join([tag("p", about), table("all rows", head, body)])


def beside_paper(title, ours, theirs):
    """A panel for each of the five findings and for their mean; the paper's rows first, in its
    order.

    title   of the table in the paper
    ours    {row: score}
    theirs  {row: the five figures and the printed average}
    Our mean is over the same five findings, or there is none; whiskers are evaluate's intervals,
    where it made them.
    """
    headings = {finding: f"{finding} ({SHORT[finding]})" for finding in FIVE}
    headings["mean"] = "Mean of the five"
    printed = {name: dict(zip(headings, figures)) for name, figures in theirs.items()}
    drawn = []
    for column, heading in headings.items():
        rows = []
        for name in dict.fromkeys([*theirs, *ours]):
            value, interval = figure_and_interval(ours.get(name, {"accuracy": {}}), column)
            rows.append((name, value, printed.get(name, {}).get(column), interval))
        drawn.append((heading, bars(f"{title}: {heading}", rows)))
    key = tag("p", tag("span", class_="swatch ours"), " ours ", tag("span", class_="swatch paper"),
              " the paper's, on MS-CXR-T. Top-1 accuracy. A whisker is the 95% interval.",
              class_="small")
    return join([key, panels(*drawn)])


def figure_and_interval(score, column):
    """What a panel shows of a score.

    score   of a row of results.json
    column  a finding, or 'mean', of the five findings
    Returns (accuracy or None, (low, high) or None); the mean has an interval only where the row has
    no other findings.
    """
    accuracy = score["accuracy"]
    intervals = (score.get("top1") or {}).get("interval") or {}
    five = [number(accuracy.get(finding)) for finding in FIVE]
    if column != "mean":
        return number(accuracy.get(column)), intervals.get(column)
    mean = sum(five) / 5 if None not in five else None
    return mean, intervals.get("mean") if set(accuracy) == set(FIVE) else None


def ablation(rows):
    """The students of results.json beside Table 5."""
    ours = {name: main_score(row) for name, row in rows.items() if is_student(row)}
    return join([tag("p", "The student after each stage."),
                 beside_paper("Table 5", ours, TABLE_5)])


def teacher_accuracy(rows, teachers):
    """The teachers, and the last student, beside Table 2.

    rows      of results.json
    teachers  teachers.json or None; what it lacks comes from `rows`
    """
    ours = {name: main_score(rows[name]) for name in teachers_of(rows)}
    if teachers:
        ours |= {name: row for name, row in teachers["teachers"].items() if row.get("accuracy")}
    if FINAL in rows:
        ours[FINAL] = main_score(rows[FINAL])
    theirs = {}
    for row, figures in TABLE_2.items():
        same = [FINAL] if row == "Ours" else [name for name in ours if plain(row) in plain(name)]
        theirs |= dict.fromkeys(same or [row], figures)
    return join([tag("p", "Each teacher, and the student that learnt from all of them."),
                 beside_paper("Table 2", ours, theirs)])


# -------------------------------------------------------------------- sections: the teachers' texts

def teacher_texts(teachers):
    """The findings in the teachers' texts, a table; teachers is teachers.json."""
    digits_of = {"texts": 0, "precision": 3, "recall": 3, "f1": 3, "similarity": 3, "words": 1,
                 "refused": 3}
    body = [[name, *(show(row.get(key), digits) for key, digits in digits_of.items())]
            for name, row in teachers["teachers"].items()]
    known = lambda key: teachers.get(key) or "?"
    about = (f"{known('studies')} studies, against: {known('against')}; an uncertain finding "
             f"counts as {known('uncertain')}; similarity to the report: {known('similarity')}. "
             "Words: mean length of a text. Refused: the share that declines.")
    head = ["teacher", "texts", "precision", "recall", "F1", "similarity", "words", "refused"]
    return join([tag("p", about), table("findings in the teachers' texts", head, body)])


def agreement(kappa, errors):
    """The kappa matrix; and the correlations of the errors, of which Eq. 3-4 assume none.

    kappa   of teachers.json
    errors  of teachers.json, {} where they were not measured; each has its ratios
    """
    drawn = [("Cohen's kappa", matrix("Agreement between the teachers, Cohen's kappa",
                                      kappa["names"], kappa["matrix"]))]
    body = []
    for one in errors.get("given", ()):
        heading = f"Correlation of errors, given the {one['given']}"
        drawn.append((heading, matrix(heading, errors["names"], one["phi"])))
        for many in ("all", "most"):
            wrong = one[many]
            low, high = wrong["interval"] or (None, None)
            body.append([f"{many} wrong, given the {one['given']}", wrong["observed"],
                         show(wrong["expected"], 1), show(wrong["ratio"]),
                         f"{show(low)} to {show(high)}"])
    about = ("What two teachers say: kappa 1 is full agreement, 0 what chance gives. Their errors: "
             "correlation 0 and ratio 1 if the teachers were independent. Negative figures are "
             "outlined.")
    head = ["pairs of study and finding", "observed", "if independent", "ratio", "95% interval"]
    ratios = table("dependence of errors", head, body) if body else None
    scrolling = [(heading, scroll(heading, drawing)) for heading, drawing in drawn]
    return join([tag("p", about), panels(*scrolling), ratios])


# ------------------------------------------------------------------ sections: drift, ladder, curves

def stream(drift, order):
    """The statistic of drift.json at each position, with a triangle at its largest value in a
    stream that alarms; and what each alarm names.

    drift  drift.json
    order  names of the teachers, for `styles`
    Raises ValueError where a position is no number.
    """
    positions = [number(position) for position in drift["windows"]]
    if None in positions:
        raise ValueError("a position is no number")
    streams = dict(drift["teachers"])
    if drift.get("joint"):
        streams["jointly"] = drift["joint"]
    curves = {name: list(zip(positions, one["statistic"], strict=True))
              for name, one in streams.items()}
    marks = {name: [one["where"]] for name, one in streams.items() if one.get("alarm")}
    level = None
    if number(drift.get("threshold")) is not None:
        level = ("alarm above", drift["threshold"])
    parts = [("all streams", curves)]
    parts += [(name, {name: curve}) for name, curve in curves.items() if name in marks]
    drawn = [(heading, lines(f"Drift, {heading}", part, styles(part, order), "studies before",
                             level, marks, allow_log=False))
             for heading, part in parts]
    body = []
    for name, one in streams.items():
        found = ["\u2013" if one.get(key) is None else one[key]
                 for key in ("where", "id", "finding")]
        body.append([name, "yes" if one.get("alarm") else "no", show(one.get("p"), 4), *found])
    known = lambda key: drift.get(key, "?")
    about = (f"How unlike the studies before a position are to those from it on, in what each "
             f"teacher says: {known('compared')}, on {known('on')}. {known('studies')} studies, "
             f"{known('permutations')} permutations, alarms at level {known('alpha')} for all "
             "streams together; a triangle marks the largest value of a stream that alarms.")
    head = ["stream", "alarm", "p, corrected", "studies before", "study", "finding"]
    return join([tag("p", about), panels(*drawn), table("drift", head, body)])


def ladder_bars(ladder):
    """A panel for each world and way to answer; rows that are no student's ('given') are in each.
    Then the claims, paired by seed. ladder: results.json of the ladder."""
    found = {}
    for world in dict.fromkeys(cell["world"] for cell in ladder["cells"]):
        for mode in ("greedy", "sampled", "voiced"):
            for cell in ladder["cells"]:
                value = number((cell.get(mode) or cell.get("given") or {}).get("mean"))
                if cell["world"] == world and value is not None:
                    rows = found.setdefault(f"{world}, {mode}", {})
                    rows.setdefault(cell["row"], []).append(value)
    drawn = []
    for heading, rows in found.items():
        means = [(f"{name} (n = {len(values)})", sum(values) / len(values), None,
                  (min(values), max(values))) for name, values in rows.items()]
        drawn.append((heading, bars(f"Ladder: {heading}", means, paper=False)))
    body = [[claim["claim"], claim["world"], claim.get("mode") or "\u2013",
             *(show(claim.get(key), 3) for key in ("mean", "low", "high")),
             show(claim.get("paper"))] for claim in ladder.get("claims") or ()]
    head = ["claim", "world", "answers", "mean", "95% from", "to", "paper"]
    claims = table("claims", head, body) if body else None
    about = ("Mean accuracy over n seeds; the whisker reaches from the lowest seed to the highest. "
             "Voiced: greedy, behind the opening words of one teacher after another.")
    return join([tag("p", about), panels(*drawn), claims])


def styles(names, order):
    """The style of each curve, {name: 0..9}: a teacher keeps the number of its place in `order`, 1
    to 7 and round again; anything else has 0, 8 or 9."""
    others = [name for name in names if name not in order]
    of_others = dict(zip(others, [0, 8, *[9] * len(others)]))
    return {name: order.index(name) % 7 + 1 if name in order else of_others[name]
            for name in names}


def training(logs, order):
    """Every key of every log. PART/NAME share a panel, except t+ above every teacher, which is an
    accuracy among rewards.

    logs   {name: lines of its log.jsonl}
    order  names of the teachers, for `styles`
    """
    found = []
    for name, records in logs.items():
        groups = {}
        for key in dict.fromkeys(key for record in records for key in record if key != "step"):
            part = "accuracies" if key == "rewards/accuracies" else key.partition("/")[0]
            groups.setdefault(part, []).append(key)
        drawn = []
        for part, keys in groups.items():
            curves = {key.removeprefix(f"{part}/"): [(record["step"], record.get(key))
                                                     for record in records] for key in keys}
            heading = part if len(keys) > 1 else keys[0]
            drawn.append((heading, lines(f"{name}: {part}", curves, styles(curves, order))))
        found += [tag("h3", name), panels(*drawn)]
    return join(found)


# ----------------------------------------------------------------------------- section: the gallery

def gallery(studies, images, positives, answers, count):
    """Some studies with film, truth and all texts.

    studies    records of studies.jsonl
    images     folder that image paths are relative to
    positives  {id: t+}
    answers    {student: {id: text}}
    count      how many are shown: those first for which most texts are there, else in the file's
               order
    """
    own = {"t+": positives, **answers}
    most_first = sorted(studies, key=lambda study: -sum(study["id"] in texts
                                                        for texts in own.values()))
    cards = [card(study, images, own) for study in most_first[:max(count, 0)]]
    about = f"{len(cards)} of {len(studies)} studies. A bar stands beside what the student wrote."
    return join([tag("p", about), *cards])


def card(study, images, own):
    """One study of the gallery; own: {name: {id: text}} of t+ and of each student."""
    left = []
    for path in images_of(study):
        try:
            alt = f"film of study {study['id']}"
            left.append(tag("img", src=film(path, images), alt=alt))
        except ValueError as error:
            left.append(left_out_note(str(error)))
    labels = study.get("labels") or {}
    truth = [tag("li", f"{finding}: {value}") for finding, value in labels.items()]
    left += [tag("h4", "Truth"), tag("ul", *truth) if truth else left_out_note("no labels")]
    if isinstance(study.get("report"), str):
        left.append(said("Report", study["report"]))
    right = [said(name, texts.get(study["id"]), "own") for name, texts in own.items() if texts]
    right += [said(name, text) for name, text in (study.get("trajectories") or {}).items()]
    columns = tag("div", tag("div", *left, class_="film"), tag("div", *right, class_="texts"),
                  class_="study")
    return tag("article", tag("h3", study["id"]), columns, class_="card")


def said(name, text, class_=None):
    """What somebody said of a study, with the name above it; `text` is None if there is none."""
    if isinstance(text, str):
        shown = tag("p", text, dir="auto", class_="said", tabindex=0)
    else:
        shown = left_out_note("none for this study")
    return tag("div", tag("h4", name), shown, class_=class_)


def left_out_note(sentence):
    """A sentence in the place of what is missing."""
    return tag("p", sentence, class_="left-out")


# ----------------------------------------------------------------------------------------- the page

def page(title, settings, sections, left_out):
    """The whole file, a str.

    title     heading of the page
    settings  {flag: value} of the evaluation
    sections  [(anchor, heading, content)]
    left_out  sentences on what the page leaves out
    """
    if left_out:
        note = tag("ul", *(tag("li", sentence) for sentence in left_out))
        sections = [*sections, ("left-out", "What this page leaves out", note)]
    style = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", style))
    given = []
    for key, value in settings.items():
        words = ", ".join(map(str, value)) if isinstance(value, list) else value
        given.append(f"{key} {words}")
    links = (tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections)
    header = tag("header", tag("h1", title), tag("p", "; ".join(given), class_="small"),
                 tag("nav", *links, aria_label="sections"))
    main = tag("main", *(
        tag("section", tag("h2", heading, id=anchor), content, aria_labelledby=anchor)
        for anchor, heading, content in sections))
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", header, main), lang="en") + "\n"


class Inputs(NamedTuple):
    """All that is read; None, or empty, where a flag is not given."""
    results: dict
    teachers: dict
    drift: dict
    ladder: dict
    logs: dict        # {name: [line of log.jsonl]}
    studies: list
    positives: dict   # {id: t+}
    answers: dict     # {student: {id: text}}


def read_inputs(args):
    """Reads all inputs.

    args  the flags of `parse`
    Returns Inputs. Raises ValueError or OSError naming a faulty one.
    """
    results = read_json(args.results)
    teachers, drift, ladder = (
        path and read_json(path) for path in (args.teachers, args.drift, args.ladder))
    logs = {name: read_jsonl(path, '{"step": N, ...} as spd.py and apo.py log', has_step)
            for name, path in named(args.log, "--log").items()}
    studies = []
    if args.studies:
        what = '{"id": "...", "image": "...", ...}, a study'
        studies = [study for study in read_jsonl(args.studies, what, is_study)
                   if study.get("split") in (None, args.split)]
        if not studies:
            raise ValueError(f"{args.studies}: no study of split {args.split!r}, expected at least "
                             "one")
    positives = read_texts(args.positives, "t_plus") if args.positives else {}
    answers = {name: read_texts(path, "text")
               for name, path in named(args.answers, "--answers").items()}
    return Inputs(results, teachers, drift, ladder, logs, studies, positives, answers)


def draw_sections(args, given):
    """Draws the sections of the page.

    args   the flags of `parse`
    given  Inputs
    Returns ([(anchor, heading, content)], [what the page leaves out]). Raises ValueError naming a
    file of another shape.
    """
    results, teachers = given.results, given.teachers
    order = checked(args.results, WHAT["results"], lambda: teachers_of(results["rows"]))
    # anchor, heading, the flag that it needs, what draws it
    plan = (
        ("rows", "All rows", "results",
         lambda: all_rows(results["rows"])),
        ("ablation", "Ablation (Table 5)", "results",
         lambda: ablation(results["rows"])),
        ("teachers", "Teachers (Table 2)", "teachers" if teachers else "results",
         lambda: teacher_accuracy(results["rows"], teachers)),
        ("texts", "Findings in the teachers' texts", "teachers",
         lambda: teacher_texts(teachers)),
        ("agreement", "Agreement between the teachers", "teachers",
         lambda: agreement(teachers["kappa"], teachers.get("errors") or {})),
        ("drift", "Drift over the stream", "drift",
         lambda: stream(given.drift, order)),
        ("ladder", "Ladder of ablations", "ladder",
         lambda: ladder_bars(given.ladder)),
        ("training", "Training", "log",
         lambda: training(given.logs, order)),
        ("studies", "Studies", "studies",
         lambda: gallery(given.studies, args.images, given.positives, given.answers,
                         args.gallery)))
    sections, left_out = [], []
    for anchor, heading, flag, draw in plan:
        path = getattr(args, flag)
        if not path:
            content = left_out_note(f"Left out: {REMEDY[flag]}")
            left_out.append(f"{heading}: {REMEDY[flag]}")
        else:
            content = checked(path, WHAT[flag], draw) if flag in WHAT else draw()
        sections.append((anchor, heading, content))
    for heading, flag, texts in (("t+ in the gallery", "positives", given.positives),
                                 ("The students in the gallery", "answers", given.answers)):
        if given.studies and not texts:
            left_out.append(f"{heading}: {REMEDY[flag].format(split=args.split)}")
    return sections, left_out


# -------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line."""
    parser = argparse.ArgumentParser(
        description="One self-contained HTML page of what was measured.")
    parser.add_argument(
        "results",
        help="results.json of evaluate.py classify --output")
    parser.add_argument(
        "--out", default="report.html",
        help="file to write (default: %(default)s)")
    parser.add_argument(
        "--title", default="APO: what was measured",
        help="heading of the page (default: %(default)s)")
    parser.add_argument(
        "--teachers",
        help="teachers.json of evaluate.py teachers --output")
    parser.add_argument(
        "--drift",
        help="drift.json of tools/drift.py --output")
    parser.add_argument(
        "--ladder",
        help="results.json of python -m experiment ladder")
    parser.add_argument(
        "--log", action="append",
        help="NAME=RUN/log.jsonl of spd.py or apo.py; may be given several times")
    g = parser.add_argument_group("gallery")
    g.add_argument(
        "--studies",
        help="studies.jsonl; without it there is no gallery")
    g.add_argument(
        "--images", default=".",
        help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument(
        "--split", default="test",
        help="which studies (default: %(default)s)")
    g.add_argument(
        "--positives",
        help="positives.jsonl of selfdistill.py on this split")
    g.add_argument(
        "--answers", action="append",
        help='NAME=FILE, {"id", "text"} a line: what a student answers; may be given several times')
    g.add_argument(
        "--gallery", type=int, default=6,
        help="studies shown (default: %(default)s)")
    return parser.parse_args(argv)


def run(args):
    """Reads all inputs, then writes args.out, whole or not at all.

    args  the flags of `parse`
    Returns [what the page leaves out]. Raises ValueError or OSError naming a faulty input.
    """
    given = read_inputs(args)
    sections, left_out = draw_sections(args, given)
    settings = given.results.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    settings = {key: value for key, value in settings.items()
                if value is not None and key not in ("sha256", "json", "output")}
    content = page(args.title, settings, sections, left_out)
    write_text(args.out, content)
    print(f"{args.out}: {len(content.encode()) / 1024:.0f} KiB"
          + "".join(f"\nleft out: {sentence}" for sentence in left_out))
    return left_out


def main():
    """Runs the command."""
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"report: {error}") from None


if __name__ == "__main__":
    main()
