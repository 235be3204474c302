"""The public datasets in their own on-disk formats, as studies that evaluate.py can ask and score. Reads; downloads nothing.

    ms_cxr_t       MS-CXR-T's csv and MIMIC-CXR-JPG: progression over two films, or presence on the current one
    annotation     MIMIC-CXR reports as R2Gen's annotation.json has them
    mimic_reports  MIMIC-CXR reports as files, cut into sections; split and views from MIMIC-CXR-JPG
    open_i, chestx_ray14, chexpert, chestx_det10    zero-shot classification

All columns are found by name, since their order differs between copies; labels and numbers may be written '1.0'. A malformed file is an
error that names file and line; what is absent (an image, a row, a report) is listed in Benchmark.missing and the rest is used.
"""

import csv
import gzip
import re
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import data
from data import Study
from runtime.records import is_name, read_json, shown

MAX_LINE = 1_000_000  # bytes of a table's line; a real one has some hundred, one of a bomb that was packed as .gz has no end


@dataclass
class Benchmark:
    """Studies with labels {class: 1 or 0} (or a task's classes), images relative to `images`; `headline`: the classes of the reported mean;
    `missing`: one sentence for each thing that is absent; `notes`: counts of what was left out on purpose."""
    name: str
    task: data.Task
    images: Path
    studies: list
    headline: tuple = ()
    missing: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def with_images(benchmark):
    """Leaves out the studies without their images and says which those are; images are opened as far as their header."""
    there, seen = [], set()
    for study in benchmark.studies:
        if study.id in seen:
            raise ValueError(f"{benchmark.name}: {shown(study.id)} stands there twice, expected it once")
        seen.add(study.id)
        try:
            for path in study.images:
                with data.open_image(path, benchmark.images):
                    pass
            there.append(study)
        except ValueError as error:
            benchmark.missing.append(f"{study.id}: {error}")
    benchmark.studies = there
    return benchmark


# ------------------------------------------------------------------------------------------------------------- the files

def table(path):
    """Yields (line, [field, ...]) of a .csv or .csv.gz, the head first, without empty lines. Raises ValueError naming file and line where
    it is no table in UTF-8, or a line does not end."""
    opened = gzip.open if str(path).endswith(".gz") else open

    def lines(file):
        encoding = "utf-8-sig"
        while line := file.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise ValueError(f"expected a line of less than {MAX_LINE:,} bytes")
            yield line.decode(encoding)
            encoding = "utf-8"

    with opened(path, "rb") as file:
        reader = csv.reader(lines(file), strict=True)
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except (csv.Error, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            line = reader.line_num + (not isinstance(error, csv.Error))  # the others stop before it is counted
            raise ValueError(f"{path}:{line}: no line of a CSV file in UTF-8: {error}") from None


def rows(path, *columns):
    """Yields (line, {column: text}) of a `table`. Raises ValueError naming file and line if a column is absent or there twice, or a row ends
    before it."""
    lines = table(path)
    head = [name.strip() for name in next(lines, (1, []))[1]]
    for column in columns:
        if head.count(column) != 1:
            raise ValueError(f"{path}:1: expected one column {column!r}, found {', '.join(map(shown, head)) or 'nothing'}")
    at = {column: head.index(column) for column in columns}
    for line, row in lines:
        if len(row) <= max(at.values()):
            raise ValueError(f"{path}:{line}: {len(row)} fields, expected {len(head)}")
        yield line, {column: row[i].strip() for column, i in at.items()}


def read_text(path):
    """Raises ValueError naming the file if it is no text in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8: {error}") from None


def label(text, where):
    """'1', '0.0', '-1.0' or '' -> 1, 0, -1 or None."""
    try:
        value = None if text == "" else float(text)
    except ValueError:
        value = text
    if value not in (None, 1, 0, -1):
        raise ValueError(f"{where}: {text!r}, expected 1, 0, -1 or nothing")
    return None if value is None else int(value)


def number(text, where):
    """'50414267' or '50414267.0' -> '50414267', MIMIC's numbers of subjects and studies."""
    if not re.fullmatch(r"[0-9]{1,20}(\.0*)?", text):
        raise ValueError(f"{where}: {text!r}, expected a number")
    return text.partition(".")[0]


def find(folder, *patterns):
    """The first file below `folder` that matches the first pattern that any does. Raises FileNotFoundError naming what was looked for."""
    for pattern in patterns:
        if found := sorted(Path(folder).glob(pattern)):
            return found[0]
    raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)}")


def images_below(folder):
    """{file name: path relative to `folder`} of all images below it, however the archives were unpacked. Raises ValueError where two have
    the same name."""
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            if path.name in found:
                raise ValueError(f"{path}: {found[path.name]} has the same name, expected each image once below {folder}")
            found[path.name] = str(path.relative_to(folder))
    return found


def binary_task(name, classes):
    """A task whose classes are asked one by one, with the chest task's prompts."""
    return replace(data.CHEST, name=name, findings=tuple(classes), classes=(1, 0))


# ------------------------------------------------------------------------------------------------- MS-CXR-T, MIMIC-CXR

MS_CXR_T = {"Consolidation": "consolidation", "Pleural Effusion": "pleural_effusion", "Pneumonia": "pneumonia", "Pneumothorax": "pneumothorax",
            "Edema": "edema"}  # finding: its column, without _progression; in the order of the paper's tables

_COURSE = {  # words of a radiologist's comparison; * stands for up to four words between
    "improving": "improving improved improvement better decreased decreasing decrease smaller resolved resolving resolution cleared clearing",
    "stable": "stable unchanged persistent similar constant",
    "worsening": "worsening worsened worse increased increasing increase larger enlarged enlarging progressed progressing"}

_TWO_FILMS = "The first chest X-ray is the patient's earlier film, the second is the current one. Compared with the earlier film,"
PROGRESSION = data.make_task({
    "name": "MS-CXR-T progression",
    "findings": {"Consolidation": ["consolidation", "consolidations"], "Pneumonia": ["pneumonia"], "Edema": ["edema", "oedema"],
                 "Pleural Effusion": ["pleural effusion", "pleural effusions", "effusion", "effusions"],
                 "Pneumothorax": ["pneumothorax", "pneumothoraces"]},
    "classes": {value: [phrase for word in words.split() for phrase in (f"{{finding}} * {word}", f"{word} * {{finding}}")]
                for value, words in _COURSE.items()},
    "prompts": {"system": data.CHEST.prompts["system"],
                "student": f"{_TWO_FILMS} is each of consolidation, pleural effusion, pneumonia, pneumothorax and edema improving, stable or "
                           "worsening?",
                "question": f"{_TWO_FILMS} is the {{finding}} {{options}}?",
                "teacher": "{diseases}", "compare": "{readers}"}}, "MS-CXR-T progression")


def mimic_image(root, image, subject, study):
    """The path of a film below `root`, the folder of MIMIC-CXR-JPG or its files/. image: 'p10/p10000032/s50414267/<dicom_id>', with or without
    files/ before and .jpg behind, or a bare dicom_id."""
    image = image.removeprefix("files/").removesuffix(".jpg")
    if "/" not in image:
        image = f"p{subject[:2]}/p{subject}/s{study}/{image}"
    return f"{'files/' if (Path(root) / 'files').is_dir() else ''}{image}.jpg"


def chexpert_labels(path, findings):
    """{study number: {finding: 1, 0, -1 or None}} of mimic-cxr-2.0.0-chexpert.csv.gz, its negbio twin, or the hand-labelled test set."""
    return {number(row["study_id"], f"{path}:{line}: study_id"): {f: label(row[f], f"{path}:{line}: {f}") for f in findings}
            for line, row in rows(path, "study_id", *findings)}


def ms_cxr_t(path, images, task, chexpert=None, blank="exclude"):
    """MS_CXR_T_temporal_image_classification_v1.0.0.csv as studies.

    task 'progression': two films (earlier, current), classes improving / stable / worsening, the file's own labels.
    task 'presence': the current film, classes 1 / 0 of its study in `chexpert`; -1 is left out, and so is a finding not mentioned unless
    blank='negative'. The paper does not say which one it reports.
    """
    courses = {finding: f"{column}_progression" for finding, column in MS_CXR_T.items()}
    columns = ["subject_id", "study_id", "dicom_id"]
    if task == "progression":
        columns += ["previous_study_id", "previous_dicom_id", *courses.values()]
    present = chexpert_labels(chexpert, MS_CXR_T) if task == "presence" else {}
    studies, missing, excluded, seen = [], [], 0, set()
    for line, row in rows(path, *columns):
        where = f"{path}:{line}"
        subject, study = number(row["subject_id"], f"{where}: subject_id"), number(row["study_id"], f"{where}: study_id")
        film = mimic_image(images, row["dicom_id"], subject, study)
        if task == "progression":
            before = mimic_image(images, row["previous_dicom_id"], subject, number(row["previous_study_id"], f"{where}: previous_study_id"))
            labels = {finding: row[column].lower() for finding, column in courses.items() if row[column]}
            if wrong := [text for text in labels.values() if text not in PROGRESSION.classes]:
                raise ValueError(f"{where}: {wrong[0]!r}, expected {', '.join(PROGRESSION.classes)} or nothing")
            films = (before, film)
        elif study not in present:
            missing.append(f"study {study}: not in {chexpert}")
            continue
        else:
            labels, films = {f: 0 if value is None and blank == "negative" else value for f, value in present[study].items()}, (film,)
            excluded += sum(value in (None, -1) for value in labels.values()) if films not in seen else 0
            labels = {f: value for f, value in labels.items() if value in (0, 1)}
        if films in seen:
            if task == "progression":
                raise ValueError(f"{where}: the pair {shown(' '.join(films))} stands there twice, expected it once")
            continue  # a film that is the current one of several pairs
        seen.add(films)
        if labels:
            studies.append(Study(" ".join(Path(film).stem for film in films), films, labels, {}))
    notes = [f"{excluded} labels left out that are uncertain" + (" or not mentioned" if blank == "exclude" else "")] if task == "presence" else []
    asked = PROGRESSION if task == "progression" else binary_task("MS-CXR-T presence", MS_CXR_T)
    return Benchmark(f"MS-CXR-T, {task}", asked, Path(images), studies, tuple(MS_CXR_T), list(dict.fromkeys(missing)), notes)


def annotation(path, images, split="test"):
    """R2Gen's annotation.json: {"train" | "val" | "test": [{"id", "report", "image_path": [...]}]}, one item an image, the report its findings
    section. `split`: test, train, or validate, which this file calls val."""
    content, key = read_json(path), {"validate": "val"}.get(split, split)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f'{path}: expected an object with a list "{key}"')
    studies = []
    for at, item in enumerate(content[key]):
        fits = isinstance(item, dict) and is_name(item.get("id")) and isinstance(item.get("report"), str) \
            and isinstance(item.get("image_path"), list) and item["image_path"] and all(map(is_name, item["image_path"]))
        if not fits:
            raise ValueError(f'{path}: {key}[{at}]: expected {{"id": text, "report": text, "image_path": [text, ...]}}')
        studies.append(Study(item["id"], tuple(item["image_path"]), {}, {}, item["report"], split))
    return Benchmark("MIMIC-CXR reports, annotation.json", data.CHEST, Path(images), studies)


HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
SECTION_NAMES = {"conclusion": "impression", "conclusions": "impression", "findings and impression": "impression", "opinion": "impression",
                 "interpretation": "impression", "summary": "impression"}
VIEW = re.compile(r"\b(pa and lateral|ap and lateral|pa/lateral|ap|pa|lateral|portable|upright|view|views|chest|radiograph|radiographs)\b")


def report_sections(text):
    """A MIMIC-CXR report file's sections, {name: text}, blanks as they stand in it; of two sections with the same name the later counts.

    A header is capitals and a colon behind a line's first blank; after one the next is looked for from its line's end on. Names that mean
    findings or impression are called so; empty ones of these two are dropped. Where neither is left, what follows the first empty line
    of the last section is 'last_paragraph'. The conventions are those of the section parser that MIMIC-CXR's own labels were made with,
    but for its list of 54 reports whose sections were set by hand.
    """
    sections, name, start = [], "preamble", 0
    header = HEADER.search(text)
    while header:
        sections.append((name, text[start:header.start(1)]))
        name, start = header[1].lower().strip(), header.end()
        line_end = text.find("\n", start)
        header = HEADER.search(text, start if line_end < 0 else line_end)
    sections.append((name, text[start:]))

    def canonical(name):
        if name in SECTION_NAMES:
            return SECTION_NAMES[name]
        for known in ("impression", "findings", "history", "comparison", "addendum"):
            if known in name:
                return known
        return "findings" if VIEW.search(name) else name

    named = [(canonical(name), part) for name, part in sections]
    named = [(name, part) for name, part in named if part.strip() or name not in ("findings", "impression")]
    if named and not {"findings", "impression"} & {name for name, _ in named}:
        name, part = named.pop()
        before, gap, after = part.partition("\n \n")
        named += [(name, before), *([("last_paragraph", after)] if gap else [])]
    return dict(named)


def mimic_reports(folder, images, split="test", section="findings"):
    """One frontal film (PA before AP, then by dicom_id) and one report of every study of a split. folder: mimic-cxr-reports, with files/p10/...
    or p10/...; images: MIMIC-CXR-JPG with its split and metadata csv. section: findings, impression, or both in this order."""
    folder, images = Path(folder), Path(images)
    table = find(images, "mimic-cxr-2.0.0-metadata.csv*")
    views = {row["dicom_id"]: row["ViewPosition"] for _, row in rows(table, "dicom_id", "ViewPosition")}
    table, films = find(images, "mimic-cxr-2.0.0-split.csv*"), {}
    for line, row in rows(table, "dicom_id", "study_id", "subject_id", "split"):
        key = tuple(number(row[column], f"{table}:{line}: {column}") for column in ("subject_id", "study_id"))
        if row["split"] == split:
            films.setdefault(key, []).append(row["dicom_id"])
    if not films:
        raise ValueError(f"{table}: no study of split {split!r}, expected train, validate or test")
    root, studies, missing, lateral, silent = folder / "files" if (folder / "files").is_dir() else folder, [], [], 0, 0
    for (subject, study), dicoms in sorted(films.items()):
        frontal = sorted((("PA", "AP").index(views[dicom]), dicom) for dicom in dicoms if views.get(dicom) in ("PA", "AP"))
        file = root / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        if not frontal:
            lateral += 1
        elif not file.is_file():
            missing.append(f"{file}: no such report")
        else:
            parts = report_sections(read_text(file))
            wanted = ("findings", "impression") if section == "both" else (section,)
            report = " ".join(" ".join(parts[name].split()) for name in wanted if name in parts)
            silent += not report
            if report:
                studies.append(Study(f"s{study}", (mimic_image(images, frontal[0][1], subject, study),), {}, {}, report, split))
    notes = [f"{lateral} studies left out without a frontal film, {silent} without {section}"]
    return Benchmark(f"MIMIC-CXR reports, {section}", data.CHEST, images, studies, (), missing, notes)


# -------------------------------------------------------------------------------------------------------------- zero-shot

OPEN_I = ("Atelectasis", "Calcified Granuloma", "Cardiomegaly", "Edema", "Effusion", "Emphysema", "Fibrosis", "Fracture", "Granuloma", "Hernia",
          "Infiltration", "Lesion", "Mass", "Nodule", "Opacity", "Pleural_Thickening", "Pneumonia", "Pneumothorax")
OPEN_I_SYNONYMS = {"Pleural_Thickening": "pleural thickening", "Infiltration": "infiltrate", "Atelectasis": "atelectases"}
CHESTX_RAY14 = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax", "Consolidation", "Edema",
                "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia")  # also the order of the label columns in a CheXNet-style test_list.txt
CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia",
            "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")
CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHESTX_DET10 = ("Atelectasis", "Calcification", "Consolidation", "Effusion", "Emphysema", "Fibrosis", "Fracture", "Mass", "Nodule", "Pneumothorax")


def open_i(folder):
    """Open-I, NLMCXR_reports.tgz and NLMCXR_png.tgz unpacked anywhere below `folder`: all images of all reports. A label counts where it, or
    its synonym, is part of the report's automatic MeSH terms, 'Granuloma' also inside 'Calcified Granuloma': the 18 labels of the literature."""
    folder = Path(folder)
    files, images = sorted(folder.rglob("ecgen-radiology/*.xml")) or sorted(folder.glob("*.xml")), images_below(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: no ecgen-radiology/*.xml")
    studies, missing, without = [], [], 0
    for file in files:
        try:
            report = ElementTree.parse(file)
        except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two for an encoding that Python does not know
            raise ValueError(f"{file}: not an XML file: {error}") from None
        terms = "|".join(sorted(node.text or "" for node in report.iterfind(".//MeSH/automatic"))).lower()
        labels = {name: int(name.lower() in terms or OPEN_I_SYNONYMS.get(name, name.lower()) in terms) for name in OPEN_I}
        names = [f"{node.get('id')}.png" for node in report.iterfind(".//parentImage")]
        without += not names
        missing += [f"{name}: of {file.name}, no such image" for name in names if name not in images]
        studies += [Study(name, (images[name],), labels, {}) for name in names if name in images]
    return Benchmark("Open-I", binary_task("Open-I", OPEN_I), folder, studies, OPEN_I, missing, [f"{without} reports have no image"])


def chestx_ray14(folder):
    """ChestX-ray14: test_list.txt, with Data_Entry_2017*.csv (NIH's, one name a line) or with the labels in it (CheXNet's, 'name 0 1 ...'), and
    the images anywhere below `folder`."""
    folder = Path(folder)
    listed, images, studies, missing, entries = find(folder, "test_list.txt", "**/test_list.txt"), images_below(folder), [], [], None
    for line, text in enumerate(read_text(listed).split("\n"), 1):
        if not text.strip():
            continue
        path, *values = text.split()
        name = Path(path).name
        if values:
            if len(values) != len(CHESTX_RAY14):
                raise ValueError(f"{listed}:{line}: {len(values)} labels, expected {len(CHESTX_RAY14)} or none")
            labels = {finding: label(value, f"{listed}:{line}") for finding, value in zip(CHESTX_RAY14, values)}
        else:
            entries = _data_entries(folder) if entries is None else entries
            labels = entries.get(name)
        if labels is None:
            missing.append(f"{name}: of {listed}, no row in Data_Entry_2017")
        elif name not in images:
            missing.append(f"{name}: of {listed}, no such image")
        else:
            studies.append(Study(name, (images[name],), labels, {}))
    return Benchmark("ChestX-ray14", binary_task("ChestX-ray14", CHESTX_RAY14), folder, studies, CHESTX_RAY14, missing)


def _data_entries(folder):
    table, entries = find(folder, "Data_Entry_2017*.csv*", "**/Data_Entry_2017*.csv*"), {}
    for line, row in rows(table, "Image Index", "Finding Labels"):  # behind them stand headers with commas inside brackets
        named = row["Finding Labels"].split("|")
        if unknown := set(named) - {*CHESTX_RAY14, "No Finding"}:
            raise ValueError(f"{table}:{line}: unknown finding {sorted(unknown)[0]!r}, expected some of {', '.join(CHESTX_RAY14)} or No Finding")
        entries[row["Image Index"]] = {finding: int(finding in named) for finding in CHESTX_RAY14}
    return entries


def chexpert(folder, labels=None):
    """CheXpert: a label file with Path (valid.csv, test_labels.csv; per image) or Study (groundtruth.csv; all views below that folder), the
    first part of which names the release and stands for `folder`. Uncertain and blank labels are left out. Each study's record has "group",
    its study, for scores per study. The headline is the mean of the five competition labels."""
    folder = Path(folder)
    listed = Path(labels) if labels else find(folder, "**/groundtruth.csv", "**/test_labels.csv", "**/valid.csv")
    key = "Study" if "Study" in next(table(listed), (1, []))[1] else "Path"
    studies, missing = [], []
    for line, row in rows(listed, key, *CHEXPERT):
        values = {name: label(row[name], f"{listed}:{line}: {name}") for name in CHEXPERT}
        values = {name: value for name, value in values.items() if value in (0, 1)}
        first, _, inside = row[key].partition("/")
        path = inside if first.startswith("CheXpert") else row[key]
        try:
            place = data.image_path(path, folder)
            views = [path] if key == "Path" else [str(Path(path) / film.name) for film in sorted(place.glob("*.jpg"))]
            there = bool(views) and all((folder / view).is_file() for view in views)
        except (ValueError, OSError):  # it leads out of the folder, or is no path at all
            there = False
        if not there:
            missing.append(f"{row[key]}: of {listed}, no such image")
            continue
        studies += [Study(view, (view,), values, {}, record={"group": str(Path(view).parent)}) for view in views]
    return Benchmark("CheXpert", binary_task("CheXpert", CHEXPERT), folder, studies, CHEXPERT_FIVE, missing, [f"labels of {listed.name}"])


def chestx_det10(folder):
    """ChestX-Det10: test.json, [{"file_name", "syms", "boxes"}]; a sym stands there once a box, none is no finding."""
    folder = Path(folder)
    listed, images, studies, missing = find(folder, "test.json", "**/test.json"), images_below(folder), [], []
    items = read_json(listed)
    if not isinstance(items, list):
        raise ValueError(f"{listed}: expected a list of objects, found {type(items).__name__}")
    for at, item in enumerate(items):
        fits = isinstance(item, dict) and is_name(item.get("file_name")) and isinstance(item.get("syms"), list)
        if not fits or not all(isinstance(sym, str) for sym in item["syms"]):
            raise ValueError(f'{listed}: [{at}]: expected {{"file_name": text, "syms": [text, ...]}}')
        if unknown := set(item["syms"]) - set(CHESTX_DET10):
            raise ValueError(f"{listed}: [{at}]: unknown finding {sorted(unknown)[0]!r}, expected some of {', '.join(CHESTX_DET10)}")
        name = item["file_name"]
        if name in images:
            studies.append(Study(name, (images[name],), {finding: int(finding in item["syms"]) for finding in CHESTX_DET10}, {}))
        else:
            missing.append(f"{name}: of {listed}, no such image")
    return Benchmark("ChestX-Det10", binary_task("ChestX-Det10", CHESTX_DET10), folder, studies, CHESTX_DET10, missing)
