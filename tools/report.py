"""One page of what was measured: a single HTML file that opens without a network, in light and dark, on a wide screen, a phone or paper.

    python tools/report.py results.json --out report.html                 what evaluate.py classify --output wrote; the rest is optional:
        --teachers teachers.json       of evaluate.py teachers --output   findings in their texts, agreement between them
        --drift drift.json             of tools/drift.py --output         the teachers along the stream of studies
        --ladder ladder/results.json   of demo.py ladder                  the ablations, mean and spread over seeds
        --log NAME=RUN/log.jsonl       of spd.py, apo.py                  training curves; may be given several times
        --studies studies.jsonl --images DIR --positives positives.jsonl --answers NAME=answers.jsonl
                                                                          gallery: film, truth, each teacher, t+, the students

positives.jsonl holds {"id", "t_plus"} and answers.jsonl {"id", "text"}, one line a study. What was not given is named on the page, with
the command that writes it. The same inputs give the same bytes.

Names and texts come from models and strangers, so nothing in them may act: `tag` escapes whatever is not Markup, films are decoded
and encoded anew, and the page's own policy forbids scripts and everything from outside. Nothing here needs torch.
"""

import argparse
import base64
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ surrounds the paper's scripts and is no package of its own

from charts import Markup, bars, join, lines, matrix, number, panels, scroll, show, table, tag  # noqa: E402

from paper_tables import FIVE, TABLE_2, TABLE_5  # noqa: E402

FINAL = "SPD, all teachers + APO"  # Table 2's 'Ours'
SHORT = dict(zip(FIVE, ("Con.", "PE", "Pna.", "Pnx.", "Ede.")))
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
REMEDY = {
    "teachers": "no --teachers; evaluate.py teachers --output teachers.json writes it.",
    "drift": "no --drift; tools/drift.py --output drift.json writes it.",
    "ladder": "no --ladder; demo.py ladder writes its results.json.",
    "log": "no --log NAME=RUN/log.jsonl; spd.py and apo.py write it.",
    "studies": "no --studies, with --images, --positives and --answers.",
    "positives": "no --positives; selfdistill.py --split {split} writes t+ of these studies.",
    "answers": 'no --answers NAME=FILE, {{"id", "text"}} a line; results.json keeps scores, not every text.',
}

# ------------------------------------------------------------------------------------------------------- reading the inputs


def read_json(path, what, fits):
    """A JSON object. Raises ValueError naming the file and `what` was expected unless fits(object)."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(value, dict) and fits(value):
            return value
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError):
        pass
    raise ValueError(f"{path}: expected {what}")


def read_jsonl(path, what, fits):
    """The objects of a JSON-lines file. Raises ValueError naming file, line and `what` was expected."""
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
    """{id: text} of a JSON-lines file. Raises ValueError as read_jsonl does, and for a study that comes twice."""
    texts = {}
    for record in read_jsonl(path, f'{{"id": "...", "{key}": "..."}}', lambda r: isinstance(r["id"], str) and isinstance(r[key], str)):
        if record["id"] in texts:
            raise ValueError(f"{path}: study {record['id']!r} comes twice, expected it once")
        texts[record["id"]] = record[key]
    return texts


def named(values, flag):
    """['NAME=FILE', ...] -> {name: file}."""
    pairs = {}
    for value in values or ():
        name, _, path = value.partition("=")
        if not (name and path) or name in pairs:
            raise ValueError(f"{flag} {value}: expected NAME=FILE, with names that differ")
        pairs[name] = path
    return pairs


def is_study(record):
    images = record["image"] if isinstance(record["image"], list) else [record["image"]]
    parts = all(isinstance(record.get(key, {}), dict) for key in ("labels", "trajectories"))
    return isinstance(record["id"], str) and all(isinstance(image, str) for image in images) and parts


def film(path, root, side=448):
    """An image below `root` as a data URI: grey JPEG, at most `side` pixels wide and high. Raises ValueError naming the file."""
    try:
        file = (Path(root) / path).resolve()
        if not file.is_relative_to(Path(root).resolve()):
            raise ValueError("lies outside --images")
        with Image.open(file, formats=("JPEG", "PNG", "TIFF", "BMP", "WEBP")) as image:
            if image.width * image.height > 64_000_000:
                raise ValueError(f"{image.width} x {image.height} pixels, expected at most 64,000,000")
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # convert("L") would cut a 12-bit film at 255
                pixels = np.asarray(image, dtype=np.float32)
                image = Image.fromarray((pixels * (255 / max(pixels.max(), 1))).astype(np.uint8))
            image = image.convert("L")
            image.thumbnail((side, side), Image.Resampling.LANCZOS)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file below --images") from None
    except Exception as error:  # decoders of broken files raise nearly anything
        raise ValueError(f"{path}: no readable image: {error}") from None
    content = io.BytesIO()
    image.save(content, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------- sections

def plain(name):
    """GPT-5 and gpt-5 are one teacher."""
    return "".join(c for c in name.casefold() if c.isalnum())


def greedy(row):
    """A student's row holds a score for each way to answer, any other row is its score."""
    return row.get("greedy", row)


def teachers_of(rows):
    """The rows of results.json that are teachers: neither students nor evaluate's own baselines."""
    return [name for name, row in rows.items() if "greedy" not in row and not name.startswith(("label prior", "vote of the teachers"))]


def all_rows(rows):
    findings = list(dict.fromkeys(finding for row in rows.values() for finding in greedy(row)["accuracy"]))
    body = []
    for name, row in rows.items():
        score, sampled = greedy(row), row.get("sampled") or {}
        figures = [*(score["accuracy"].get(finding) for finding in findings), score.get("mean"), sampled.get("mean"), score.get("unread")]
        body.append([name, *(show(figure, 3) for figure in figures)])
    about = "Top-1 accuracy, answered greedily; the mean is over the findings of the row. Unread: the share of answers without a readable class."
    return join([tag("p", about), table("all rows", ["row", *(SHORT.get(f, f) for f in findings), "mean", "mean, sampled", "unread"], body)])


def beside_paper(title, ours, theirs):
    """A panel for each of the five findings and for their mean, the paper's rows first, in its order. ours: {row: {finding: accuracy}};
    theirs: {row: five figures and the printed average}. Our mean is over the same five, or there is none."""
    mine = {plain(row): accuracy for row, accuracy in ours.items()}
    names = {plain(row): row for row in theirs} | {plain(row): row for row in ours}
    drawn = []
    for column, heading in enumerate([*(f"{finding} ({SHORT[finding]})" for finding in FIVE), "Mean of the five"]):
        rows = []
        for key, name in names.items():
            five = [number(mine.get(key, {}).get(finding)) for finding in FIVE]
            value = five[column] if column < 5 else sum(five) / 5 if None not in five else None
            printed = next((figures for row, figures in theirs.items() if plain(row) == key), [None] * 6)
            rows.append((name, value, printed[column], None))
        drawn.append((heading, bars(f"{title}: {heading}", rows)))
    key = tag("p", tag("span", class_="swatch ours"), " ours ", tag("span", class_="swatch paper"),
              " the paper's, on MS-CXR-T. Top-1 accuracy.", class_="small")
    return join([key, panels(*drawn)])


def ablation(rows):
    ours = {name: greedy(row)["accuracy"] for name, row in rows.items() if "greedy" in row}
    return join([tag("p", "The student after each stage, answering greedily."), beside_paper("Table 5", ours, TABLE_5)])


def teacher_accuracy(rows, teachers):
    """teachers.json knows best; what it lacks comes from results.json."""
    ours = {name: greedy(rows[name])["accuracy"] for name in teachers_of(rows)}
    ours |= {name: row["accuracy"] for name, row in (teachers or {"teachers": {}})["teachers"].items() if row.get("accuracy")}
    ours |= {FINAL: greedy(rows[FINAL])["accuracy"]} if FINAL in rows else {}
    theirs = {(FINAL if name == "Ours" else name): figures for name, figures in TABLE_2.items()}
    return join([tag("p", "Each teacher, and the student that learnt from all of them."), beside_paper("Table 2", ours, theirs)])


def teacher_texts(teachers):
    columns = {"precision": 3, "recall": 3, "f1": 3, "similarity": 3, "length": 1, "refusals": 3}
    body = [[name, *(show(row.get(key), digits) for key, digits in columns.items())] for name, row in teachers["teachers"].items()]
    return table("findings in the teachers' texts", ["teacher", "precision", "recall", "F1", "similarity to the report", "length", "refusals"], body)


def agreement(kappa):
    title = "Agreement between the teachers, Cohen's kappa"
    return join([tag("p", "Cohen's kappa of what two teachers say: 1 is full agreement, 0 what chance gives, negative (outlined) less than chance."),
                 scroll(title, matrix(title, kappa["names"], kappa["matrix"]))])


def stream(drift, order):
    """The statistic at each position, a triangle where a stream that alarms has its largest, and what it names."""
    streams = {**drift["teachers"], **({"jointly": drift["joint"]} if drift.get("joint") else {})}
    curves = {name: list(zip(drift["windows"], s["statistic"])) for name, s in streams.items()}
    marks = {name: [s["where"]] for name, s in streams.items() if s.get("alarm")}
    level = ("alarm above", drift["threshold"]) if number(drift.get("threshold")) is not None else None
    drawn = [(heading, lines(f"Drift, {heading}", part, styles(part, order), "studies before", level, marks, allow_log=False))
             for heading, part in [("all streams", curves), *((name, {name: curve}) for name, curve in curves.items() if name in marks)]]
    body = []
    for name, s in streams.items():
        found = ["\u2013" if s.get(key) is None else s[key] for key in ("where", "id", "finding")]
        body.append([name, "yes" if s.get("alarm") else "no", show(s.get("p"), 4), *found])
    known = lambda key: drift.get(key, "?")
    about = (f"How unlike the studies before a position are to those from it on, in what each teacher says. {known('studies')} studies, "
             f"{known('permutations')} permutations, alarms at level {known('alpha')} for all streams at once; a triangle marks the largest value of "
             "a stream that alarms.")
    return join([tag("p", about), panels(*drawn), table("drift", ["stream", "alarm", "p, corrected", "studies before", "study", "finding"], body)])


def ladder_bars(cells):
    """A panel for each world and way to answer; bars are means over the seeds, whiskers reach from the lowest seed to the highest."""
    found = {}
    for cell in cells:
        for mode in ("greedy", "sampled"):
            if (value := number((cell.get(mode) or {}).get("mean"))) is not None:
                found.setdefault(f"{cell.get('world', 'scale model')}, {mode}", {}).setdefault(cell["row"], []).append(value)
    drawn = []
    for heading, rows in found.items():
        bar = [(f"{name} (n = {len(values)})", sum(values) / len(values), None, (min(values), max(values))) for name, values in rows.items()]
        drawn.append((heading, bars(f"Ladder: {heading}", bar, paper=False)))
    return join([tag("p", "Mean accuracy over n seeds; the whisker reaches from the lowest seed to the highest."), panels(*drawn)])


def styles(names, order):
    """A teacher keeps the number of its place in `order`, 1 to 7 and round again; anything else has 0, 8 or 9."""
    others = [name for name in names if name not in order]
    return {name: order.index(name) % 7 + 1 if name in order else (0, 8, 9)[min(others.index(name), 2)] for name in names}


def training(logs, order):
    """Every key of every log; PART/NAME share a panel, except t+ above every teacher, which is an accuracy among rewards."""
    found = []
    for name, records in logs.items():
        groups = {}
        for key in dict.fromkeys(key for record in records for key in record if key != "step"):
            groups.setdefault("accuracies" if key == "rewards/accuracies" else key.partition("/")[0], []).append(key)
        drawn = []
        for part, keys in groups.items():
            curves = {key.removeprefix(f"{part}/"): [(record["step"], record.get(key)) for record in records] for key in keys}
            drawn.append((keys[0] if len(keys) == 1 else part, lines(f"{name}: {part}", curves, styles(curves, order))))
        found += [tag("h3", name), panels(*drawn)]
    return join(found)


def gallery(studies, images, positives, answers, count):
    """`count` studies: those first for which most texts are there, else in the file's order."""
    own = {"t+": positives, **answers}
    chosen = sorted(studies, key=lambda study: -sum(study["id"] in texts for texts in own.values()))[:max(count, 0)]
    missing = lambda sentence: tag("p", sentence, class_="left-out")
    said = lambda name, text, class_=None: tag("div", tag("h4", name), missing("none for this study") if not isinstance(text, str) else
                                               tag("p", text, dir="auto", class_="said", tabindex=0), class_=class_)
    cards = []
    for study in chosen:
        left = []
        for path in study["image"] if isinstance(study["image"], list) else [study["image"]]:
            try:
                left.append(tag("img", src=film(path, images), alt=f"film of study {study['id']}"))
            except ValueError as error:
                left.append(missing(str(error)))
        labels = study.get("labels") or {}
        truth = [tag("li", f"{finding}: {value}") for finding, value in labels.items()]
        left += [tag("h4", "Truth"), tag("ul", *truth) if truth else missing("no labels")]
        left += [said("Report", study["report"])] if isinstance(study.get("report"), str) else []
        right = [*(said(name, texts.get(study["id"]), "own") for name, texts in own.items() if texts),
                 *(said(name, text) for name, text in (study.get("trajectories") or {}).items())]
        columns = tag("div", tag("div", *left, class_="film"), tag("div", *right, class_="texts"), class_="study")
        cards.append(tag("article", tag("h3", study["id"]), columns, class_="card"))
    return join([tag("p", f"{len(chosen)} of {len(studies)} studies. A bar stands beside what the student wrote."), *cards])


# ---------------------------------------------------------------------------------------------------------------- the page

def page(title, settings, sections, left_out):
    """The file. sections: [(anchor, heading, content)]; left_out: [sentence]."""
    if left_out:
        sections = [*sections, ("left-out", "What this page leaves out", tag("ul", *(tag("li", sentence) for sentence in left_out)))]
    style = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))
    head = tag("head", tag("meta", charset="utf-8"), tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
               tag("meta", name="viewport", content="width=device-width, initial-scale=1"), tag("meta", name="color-scheme", content="light dark"),
               tag("title", title), tag("style", style))
    given = "; ".join(f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in settings.items())
    nav = tag("nav", *(tag("a", heading, href=f"#{anchor}") for anchor, heading, _ in sections), aria_label="sections")
    header = tag("header", tag("h1", title), tag("p", given, class_="small"), nav)
    main = tag("main", *(tag("section", tag("h2", heading, id=anchor), content, aria_labelledby=anchor) for anchor, heading, content in sections))
    return "<!DOCTYPE html>\n" + tag("html", head, tag("body", header, main), lang="en") + "\n"


def parse(argv=None):
    parser = argparse.ArgumentParser(description="One self-contained HTML page of what was measured.")
    parser.add_argument("results", help="results.json of evaluate.py classify --output")
    parser.add_argument("--out", default="report.html", help="file to write (default: %(default)s)")
    parser.add_argument("--title", default="APO: what was measured", help="heading of the page (default: %(default)s)")
    parser.add_argument("--teachers", help="teachers.json of evaluate.py teachers --output")
    parser.add_argument("--drift", help="drift.json of tools/drift.py --output")
    parser.add_argument("--ladder", help="results.json of demo.py ladder")
    parser.add_argument("--log", action="append", help="NAME=RUN/log.jsonl of spd.py or apo.py; may be given several times")
    g = parser.add_argument_group("gallery")
    g.add_argument("--studies", help="studies.jsonl; without it there is no gallery")
    g.add_argument("--images", default=".", help="folder that the image paths are relative to (default: %(default)s)")
    g.add_argument("--split", default="test", help="which studies (default: %(default)s)")
    g.add_argument("--positives", help="positives.jsonl of selfdistill.py on this split")
    g.add_argument("--answers", action="append", help='NAME=FILE, {"id", "text"} a line: what a student answers; may be given several times')
    g.add_argument("--gallery", type=int, default=6, help="studies shown (default: %(default)s)")
    return parser.parse_args(argv)


def run(args):
    """Reads all inputs, then writes --out, whole or not at all. -> [what the page leaves out].
    Raises ValueError or OSError naming a faulty input."""
    results = read_json(args.results, '{"settings": {}, "rows": {name: {"accuracy": {finding: x}, ...}}} as evaluate.py classify --output writes',
                        lambda r: r["rows"] and all(isinstance(greedy(row)["accuracy"], dict) for row in r["rows"].values()))
    teachers = args.teachers and read_json(
        args.teachers, '{"teachers": {name: {"precision", ...}}, "kappa": {"names", "matrix"}} as evaluate.py teachers --output writes',
        lambda t: all(isinstance(row, dict) for row in t["teachers"].values())
        and [len(t["kappa"]["names"])] * len(t["kappa"]["names"]) == [len(row) for row in t["kappa"]["matrix"]])
    drift = args.drift and read_json(
        args.drift, '{"windows": [N, ...], "teachers": {name: {"statistic": [x, ...], ...}}} as tools/drift.py --output writes',
        lambda d: all(len(s["statistic"]) == len(d["windows"]) for s in [*d["teachers"].values(), *([d["joint"]] if d.get("joint") else [])]))
    ladder = args.ladder and read_json(args.ladder, '{"cells": [{"row": "...", "greedy": {"mean": x}, ...}]} as demo.py ladder writes',
                                       lambda c: all(isinstance(cell["row"], str) for cell in c["cells"]))
    logs = {name: read_jsonl(path, '{"step": N, ...} as spd.py and apo.py log', lambda r: number(r["step"]) is not None)
            for name, path in named(args.log, "--log").items()}
    studies = read_jsonl(args.studies, '{"id": "...", "image": "...", ...}, a study', is_study) if args.studies else []
    studies = [study for study in studies if study.get("split") in (None, args.split)]
    if args.studies and not studies:
        raise ValueError(f"{args.studies}: no study of split {args.split!r}, expected at least one")
    positives = read_texts(args.positives, "t_plus") if args.positives else {}
    answers = {name: read_texts(path, "text") for name, path in named(args.answers, "--answers").items()}
    rows, order = results["rows"], teachers_of(results["rows"])

    sections = [("rows", "All rows", all_rows(rows)), ("ablation", "Ablation (Table 5)", ablation(rows)),
                ("teachers", "Teachers (Table 2)", teacher_accuracy(rows, teachers))]
    left_out = []
    for anchor, heading, flag, given, draw in (
            ("texts", "Findings in the teachers' texts", "teachers", teachers, lambda: teacher_texts(teachers)),
            ("agreement", "Agreement between the teachers", "teachers", teachers, lambda: agreement(teachers["kappa"])),
            ("drift", "Drift over the stream", "drift", drift, lambda: stream(drift, order)),
            ("ladder", "Ladder of ablations", "ladder", ladder, lambda: ladder_bars(ladder["cells"])),
            ("training", "Training", "log", logs, lambda: training(logs, order)),
            ("studies", "Studies", "studies", studies, lambda: gallery(studies, args.images, positives, answers, args.gallery))):
        left_out += [] if given else [f"{heading}: {REMEDY[flag]}"]
        sections.append((anchor, heading, draw() if given else tag("p", f"Left out: {REMEDY[flag]}", class_="left-out")))
    for heading, flag, given in (("t+ in the gallery", "positives", positives), ("The students in the gallery", "answers", answers)):
        left_out += [f"{heading}: {REMEDY[flag].format(split=args.split)}"] if studies and not given else []
    settings = {key: value for key, value in (results.get("settings") or {}).items() if key not in ("sha256", "json", "output")}
    content = page(args.title, settings, sections, left_out)
    out = Path(args.out)
    temporary = out.with_name(f".tmp-{out.name}")
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, out)
    print(f"{out}: {len(content.encode()) / 1024:.0f} KiB" + "".join(f"\nleft out: {sentence}" for sentence in left_out))
    return left_out


def main():
    try:
        run(parse())
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
