"""One page of what was measured: a single HTML file that opens without a network, in light and dark, on a wide screen, a phone or paper.

    python tools/report.py results.json --out report.html                 what evaluate.py classify --output wrote; the rest is optional:
        --teachers teachers.json       of evaluate.py teachers --output   findings in their texts, agreement between them
        --drift drift.json             of tools/drift.py --output         the teachers along the stream of studies
        --ladder ladder/results.json   of python -m experiment ladder                  the ablations, mean and spread over seeds
        --log NAME=RUN/log.jsonl       of spd.py, apo.py                  training curves; may be given several times
        --studies studies.jsonl --images DIR --positives positives.jsonl --answers NAME=answers.jsonl
                                                                          gallery: film, truth, each teacher, t+, the students

positives.jsonl is selfdistill.py's, answers.jsonl that of tools/answers.py. What was not given is named on the page, with the command
that writes it. The same inputs give the same bytes.

Names and texts come from models and strangers, so nothing in them may act: `tag` escapes whatever is not Markup, films are decoded
and encoded anew, and the page's own policy forbids scripts and everything from outside. Nothing here needs torch.
"""

import argparse
import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ surrounds the paper's scripts and is no package of its own

from charts import Markup, bars, join, lines, matrix, number, panels, scroll, show, table, tag  # noqa: E402

from evaluation.tables import FIVE, TABLE_2, TABLE_5  # noqa: E402
from runtime.records import writing  # noqa: E402

FINAL = "SPD, all teachers + APO"  # Table 2's 'Ours'
SHORT = dict(zip(FIVE, ("Con.", "PE", "Pna.", "Pnx.", "Ede.")))
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
WHAT = {
    "results": '{"settings": {...}, "rows": {name: {"accuracy": {finding: x}, ...}}} as evaluate.py classify --output writes',
    "teachers": '{"teachers": {name: {"precision", ...}}, "kappa": {"names", "matrix"}} as evaluate.py teachers --output writes',
    "drift": '{"windows": [N, ...], "teachers": {name: {"statistic": [x, ...], ...}}} as tools/drift.py --output writes',
    "ladder": '{"cells": [{"world": "...", "seed": N, "row": "...", ...}]} as python -m experiment ladder writes',
}
REMEDY = {
    "teachers": "no --teachers; evaluate.py teachers --output teachers.json writes it.",
    "drift": "no --drift; tools/drift.py --output drift.json writes it.",
    "ladder": "no --ladder; python -m experiment ladder writes its results.json.",
    "log": "no --log NAME=RUN/log.jsonl; spd.py and apo.py write it.",
    "studies": "no --studies, with --images, --positives and --answers.",
    "positives": "no --positives; selfdistill.py --split {split} writes t+ of these studies.",
    "answers": "no --answers NAME=FILE; tools/answers.py --student FOLDER --split {split} --output FILE writes it.",
}

# ------------------------------------------------------------------------------------------------------- reading the inputs


def read_json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None


def checked(path, what, draw):
    """draw(); where it stumbles over the shape of a file, a ValueError that names the file and what was expected."""
    try:
        return draw()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: expected {what}; {type(error).__name__}: {error}") from error


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
        if file.exists() and not file.is_file():  # a pipe would keep who opens it waiting for ever
            raise ValueError("no regular file")
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
    """gpt-5 and GPT-5-nano are Table 2's GPT-5."""
    return "".join(c for c in name.casefold() if c.isalnum())


def is_student(row):
    return "options" in row or "greedy" in row


def main_score(row):
    """The score of a row that the page shows: a student has several, by how it was asked."""
    return row.get("options") or row.get("greedy") or row


def teachers_of(rows):
    """The rows of results.json that are teachers: neither students nor evaluate's own baselines."""
    return [name for name, row in rows.items() if not is_student(row) and not name.startswith(("label prior", "vote of the teachers", "always no"))]


def all_rows(rows):
    findings = list(dict.fromkeys(finding for row in rows.values() for finding in main_score(row)["accuracy"]))
    body = []
    for name, row in rows.items():
        score, sampled = main_score(row), row.get("sampled") or {}
        figures = [*(score["accuracy"].get(finding) for finding in findings), score.get("mean"), sampled.get("mean"), score.get("unread")]
        body.append([name, *(show(figure, 3) for figure in figures)])
    about = ("Top-1 accuracy; the mean is over the findings of the row. Sampled: the same student at temperature 1. "
             "Unread: the share of answers without a readable class.")
    return join([tag("p", about), table("all rows", ["row", *(SHORT.get(f, f) for f in findings), "mean", "mean, sampled", "unread"], body)])


def beside_paper(title, ours, theirs):
    """A panel for each of the five findings and for their mean, the paper's rows first, in its order. ours: {row: score}; theirs: {row: five
    figures and the printed average}. Our mean is over the same five, or there is none; whiskers are evaluate's intervals, where it made them."""
    drawn = []
    for column, heading in enumerate([*(f"{finding} ({SHORT[finding]})" for finding in FIVE), "Mean of the five"]):
        rows = []
        for name in [*theirs, *(name for name in ours if name not in theirs)]:
            score = ours.get(name, {"accuracy": {}})
            five = [number(score["accuracy"].get(finding)) for finding in FIVE]
            value = five[column] if column < 5 else sum(five) / 5 if None not in five else None
            intervals = (score.get("top1") or {}).get("interval") or {}
            interval = intervals.get(FIVE[column]) if column < 5 else intervals.get("mean") if set(score["accuracy"]) == set(FIVE) else None
            rows.append((name, value, theirs[name][column] if name in theirs else None, interval))
        drawn.append((heading, bars(f"{title}: {heading}", rows)))
    key = tag("p", tag("span", class_="swatch ours"), " ours ", tag("span", class_="swatch paper"),
              " the paper's, on MS-CXR-T. Top-1 accuracy. A whisker is the 95% interval.", class_="small")
    return join([key, panels(*drawn)])


def ablation(rows):
    ours = {name: main_score(row) for name, row in rows.items() if is_student(row)}
    return join([tag("p", "The student after each stage."), beside_paper("Table 5", ours, TABLE_5)])


def teacher_accuracy(rows, teachers):
    """teachers.json knows best; what it lacks comes from results.json."""
    ours = {name: main_score(rows[name]) for name in teachers_of(rows)}
    ours |= {name: row for name, row in (teachers or {"teachers": {}})["teachers"].items() if row.get("accuracy")}
    ours |= {FINAL: main_score(rows[FINAL])} if FINAL in rows else {}
    theirs = {}
    for row, figures in TABLE_2.items():
        same = [FINAL] if row == "Ours" else [name for name in ours if plain(row) in plain(name)]
        theirs |= dict.fromkeys(same or [row], figures)
    return join([tag("p", "Each teacher, and the student that learnt from all of them."), beside_paper("Table 2", ours, theirs)])


def teacher_texts(teachers):
    columns = {"texts": 0, "precision": 3, "recall": 3, "f1": 3, "similarity": 3, "words": 1, "refused": 3}
    body = [[name, *(show(row.get(key), digits) for key, digits in columns.items())] for name, row in teachers["teachers"].items()]
    known = lambda key: teachers.get(key) or "?"
    about = (f"{known('studies')} studies, against: {known('against')}; an uncertain finding counts as {known('uncertain')}; similarity to the "
             f"report: {known('similarity')}. Words: mean length of a text. Refused: the share that declines.")
    head = ["teacher", "texts", "precision", "recall", "F1", "similarity", "words", "refused"]
    return join([tag("p", about), table("findings in the teachers' texts", head, body)])


def agreement(kappa, errors):
    """The kappa matrix; where teachers.json has them, the correlations of the errors, of which Eq. 3-4 assume none, each with its ratios."""
    drawn = [("Cohen's kappa", matrix("Agreement between the teachers, Cohen's kappa", kappa["names"], kappa["matrix"]))]
    body = []
    for one in errors.get("given", ()):
        heading = f"Correlation of errors, given the {one['given']}"
        drawn.append((heading, matrix(heading, errors["names"], one["phi"])))
        for many in ("all", "most"):
            low, high = one[many]["interval"] or (None, None)
            body.append([f"{many} wrong, given the {one['given']}", one[many]["observed"], show(one[many]["expected"], 1), show(one[many]["ratio"]),
                         f"{show(low)} to {show(high)}"])
    about = ("What two teachers say: kappa 1 is full agreement, 0 what chance gives. Their errors: correlation 0 and ratio 1 if the teachers were "
             "independent. Negative figures are outlined.")
    head = ["pairs of study and finding", "observed", "if independent", "ratio", "95% interval"]
    ratios = table("dependence of errors", head, body) if body else None
    return join([tag("p", about), panels(*((heading, scroll(heading, drawing)) for heading, drawing in drawn)), ratios])


def stream(drift, order):
    """The statistic at each position, a triangle where a stream that alarms has its largest, and what it names."""
    positions = [number(position) for position in drift["windows"]]
    if None in positions:
        raise ValueError("a position is no number")
    streams = {**drift["teachers"], **({"jointly": drift["joint"]} if drift.get("joint") else {})}
    curves = {name: list(zip(positions, s["statistic"], strict=True)) for name, s in streams.items()}
    marks = {name: [s["where"]] for name, s in streams.items() if s.get("alarm")}
    level = ("alarm above", drift["threshold"]) if number(drift.get("threshold")) is not None else None
    drawn = [(heading, lines(f"Drift, {heading}", part, styles(part, order), "studies before", level, marks, allow_log=False))
             for heading, part in [("all streams", curves), *((name, {name: curve}) for name, curve in curves.items() if name in marks)]]
    body = []
    for name, s in streams.items():
        found = ["\u2013" if s.get(key) is None else s[key] for key in ("where", "id", "finding")]
        body.append([name, "yes" if s.get("alarm") else "no", show(s.get("p"), 4), *found])
    known = lambda key: drift.get(key, "?")
    about = (f"How unlike the studies before a position are to those from it on, in what each teacher says: {known('compared')}, on {known('on')}. "
             f"{known('studies')} studies, {known('permutations')} permutations, alarms at level {known('alpha')} for all streams together; a "
             "triangle marks the largest value of a stream that alarms.")
    return join([tag("p", about), panels(*drawn), table("drift", ["stream", "alarm", "p, corrected", "studies before", "study", "finding"], body)])


def ladder_bars(ladder):
    """A panel for each world and way to answer; rows that are no student's ('given') stand in each. Then the claims, paired by seed."""
    found = {}
    for world in dict.fromkeys(cell["world"] for cell in ladder["cells"]):
        for mode in ("greedy", "sampled", "voiced"):
            for cell in ladder["cells"]:
                value = number((cell.get(mode) or cell.get("given") or {}).get("mean"))
                if cell["world"] == world and value is not None:
                    found.setdefault(f"{world}, {mode}", {}).setdefault(cell["row"], []).append(value)
    drawn = []
    for heading, rows in found.items():
        bar = [(f"{name} (n = {len(values)})", sum(values) / len(values), None, (min(values), max(values))) for name, values in rows.items()]
        drawn.append((heading, bars(f"Ladder: {heading}", bar, paper=False)))
    body = [[claim["claim"], claim["world"], claim.get("mode") or "\u2013", *(show(claim.get(key), 3) for key in ("mean", "low", "high")),
             show(claim.get("paper"))] for claim in ladder.get("claims") or ()]
    claims = table("claims", ["claim", "world", "answers", "mean", "95% from", "to", "paper"], body) if body else None
    about = ("Mean accuracy over n seeds; the whisker reaches from the lowest seed to the highest. Voiced: greedy, behind the opening words of "
             "one teacher after another.")
    return join([tag("p", about), panels(*drawn), claims])


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
    parser.add_argument("--ladder", help="results.json of python -m experiment ladder")
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
    results = read_json(args.results)
    teachers, drift, ladder = (path and read_json(path) for path in (args.teachers, args.drift, args.ladder))
    logs = {name: read_jsonl(path, '{"step": N, ...} as spd.py and apo.py log', lambda r: number(r["step"]) is not None)
            for name, path in named(args.log, "--log").items()}
    studies = read_jsonl(args.studies, '{"id": "...", "image": "...", ...}, a study', is_study) if args.studies else []
    studies = [study for study in studies if study.get("split") in (None, args.split)]
    if args.studies and not studies:
        raise ValueError(f"{args.studies}: no study of split {args.split!r}, expected at least one")
    positives = read_texts(args.positives, "t_plus") if args.positives else {}
    answers = {name: read_texts(path, "text") for name, path in named(args.answers, "--answers").items()}
    order = checked(args.results, WHAT["results"], lambda: teachers_of(results["rows"]))
    sections, left_out = [], []
    for anchor, heading, flag, draw in (
            ("rows", "All rows", "results", lambda: all_rows(results["rows"])),
            ("ablation", "Ablation (Table 5)", "results", lambda: ablation(results["rows"])),
            ("teachers", "Teachers (Table 2)", "teachers" if teachers else "results", lambda: teacher_accuracy(results["rows"], teachers)),
            ("texts", "Findings in the teachers' texts", "teachers", lambda: teacher_texts(teachers)),
            ("agreement", "Agreement between the teachers", "teachers", lambda: agreement(teachers["kappa"], teachers.get("errors") or {})),
            ("drift", "Drift over the stream", "drift", lambda: stream(drift, order)),
            ("ladder", "Ladder of ablations", "ladder", lambda: ladder_bars(ladder)),
            ("training", "Training", "log", lambda: training(logs, order)),
            ("studies", "Studies", "studies", lambda: gallery(studies, args.images, positives, answers, args.gallery))):
        if not getattr(args, flag):
            content = tag("p", f"Left out: {REMEDY[flag]}", class_="left-out")
            left_out.append(f"{heading}: {REMEDY[flag]}")
        else:
            content = checked(getattr(args, flag), WHAT[flag], draw) if flag in WHAT else draw()
        sections.append((anchor, heading, content))
    for heading, flag, given in (("t+ in the gallery", "positives", positives), ("The students in the gallery", "answers", answers)):
        left_out += [f"{heading}: {REMEDY[flag].format(split=args.split)}"] if studies and not given else []
    settings = results.get("settings") if isinstance(results.get("settings"), dict) else {}
    settings = {key: value for key, value in settings.items() if value is not None and key not in ("sha256", "json", "output")}
    content = page(args.title, settings, sections, left_out)
    with writing(args.out) as file:
        file.write(content.encode("utf-8"))
    print(f"{args.out}: {len(content.encode()) / 1024:.0f} KiB" + "".join(f"\nleft out: {sentence}" for sentence in left_out))
    return left_out


def main():
    args = parse()
    try:
        run(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"report: {error}") from None


if __name__ == "__main__":
    main()
