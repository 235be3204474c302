"""The public datasets in their own on-disk formats, as studies that evaluate.py can ask and score.

    ms_cxr_t       MS-CXR-T's csv and MIMIC-CXR-JPG: progression over two films, or presence on
                   the current one
    annotation     MIMIC-CXR reports as R2Gen's annotation.json has them
    mimic_reports  MIMIC-CXR reports as files, cut into sections; split and views from MIMIC-CXR-JPG
    open_i, chestx_ray14, chexpert, chestx_det10    zero-shot classification

The files are read where they are; nothing is downloaded. All columns are found by name, since their
order differs between copies; labels and numbers may be written '1.0'. A malformed file is an error
that names file and line. What is absent (an image, a row, a report) is listed in Benchmark.missing,
and the rest is used.
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
from runtime.records import is_name, printable, read_json

# bytes of one line of a csv: a real one has some hundred, that of a bomb packed as .gz has no end
MAX_LINE = 1_000_000


@dataclass
class Benchmark:
    """A dataset as it is asked and scored.

    name      as it is printed
    task      data.Task whose findings are asked
    images    folder that image paths are relative to
    studies   list of data.Study; their labels are {finding: class of the task}
    headline  the findings whose mean is reported
    missing   one sentence for each thing that is absent
    notes     sentences that count what was left out on purpose
    """
    name: str
    task: data.Task
    images: Path
    studies: list
    headline: tuple = ()
    missing: list = field(default_factory=list)
    notes: list = field(default_factory=list)


def with_images(benchmark):
    """Leaves out the studies without their images.

    benchmark  changed in place: `missing` says which studies those are; images are opened as far as
               their header
    Returns the benchmark. Raises ValueError where two studies have the same id.
    """
    there, seen = [], set()
    for study in benchmark.studies:
        if study.id in seen:
            raise ValueError(f"{benchmark.name}: {printable(study.id)} is there twice, "
                             "expected it once")
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


# ----------------------------------------------------------------------------------- the files

def csv_lines(path):
    """Yields the lines of a .csv or .csv.gz without the empty ones, the head first.

    path  the file
    Yields (line number, [field, ...]). Raises ValueError naming file and line where it is no CSV
    file in UTF-8, or a line does not end.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        reader = csv.reader(decoded_lines(file), strict=True)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except (csv.Error, ValueError, EOFError, zlib.error, gzip.BadGzipFile) as error:
            # only csv.Error comes after its line was counted
            line = reader.line_num + (not isinstance(error, csv.Error))
            raise ValueError(f"{path}:{line}: no line of a CSV file in UTF-8: {error}") from None


def decoded_lines(file):
    """Yields the lines of an open file as text. Raises ValueError for one of MAX_LINE bytes."""
    encoding = "utf-8-sig"
    while line := file.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"expected a line of less than {MAX_LINE:,} bytes")
        yield line.decode(encoding)
        encoding = "utf-8"


def csv_columns(path, *columns):
    """Yields some columns of a .csv or .csv.gz, line by line.

    path     the file
    columns  their names in its head
    Yields (line number, {column: text}). Raises ValueError naming file and line as `csv_lines`
    does, and where a column is absent or there twice, or a line ends before it.
    """
    lines = csv_lines(path)
    _, head = next(lines, (1, []))
    head = [name.strip() for name in head]
    for column in columns:
        if head.count(column) != 1:
            found = ", ".join(map(printable, head)) or "nothing"
            raise ValueError(f"{path}:1: expected one column {column!r}, found {found}")
    place = {column: head.index(column) for column in columns}
    for line, fields in lines:
        if len(fields) <= max(place.values()):
            raise ValueError(f"{path}:{line}: {len(fields)} fields, expected {len(head)}")
        yield line, {column: fields[i].strip() for column, i in place.items()}


def read_text(path):
    """The content of a text file. Raises ValueError naming the file if it is no text in UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no text in UTF-8: {error}") from None


def label(text, where):
    """A label as the datasets write it: '1', '0.0', '-1.0' or '' -> 1, 0, -1 or None.

    text   the field
    where  'file:line', for the message
    Raises ValueError for anything else.
    """
    try:
        value = None if text == "" else float(text)
    except ValueError:
        value = text
    if value not in (None, 1, 0, -1):
        raise ValueError(f"{where}: {text!r}, expected 1, 0, -1 or nothing")
    return None if value is None else int(value)


def number(text, where):
    """MIMIC's number of a subject or study: '50414267' or '50414267.0' -> '50414267'.

    text   the field
    where  'file:line: column', for the message
    Raises ValueError for anything else.
    """
    if not re.fullmatch(r"[0-9]{1,20}(\.0*)?", text):
        raise ValueError(f"{where}: {text!r}, expected a number")
    return text.partition(".")[0]


def subject_and_study(row, where):
    """MIMIC's two numbers in a line that has the columns subject_id and study_id."""
    subject = number(row["subject_id"], f"{where}: subject_id")
    return subject, number(row["study_id"], f"{where}: study_id")


def find(folder, *patterns):
    """The file below a folder that matches the first of the patterns that any file matches.

    folder    where to look
    patterns  as Path.glob takes them
    Returns the first such file in alphabetical order. Raises FileNotFoundError naming the patterns.
    """
    for pattern in patterns:
        if found := sorted(Path(folder).glob(pattern)):
            return found[0]
    raise FileNotFoundError(f"{folder}: no {' or '.join(patterns)}")


def images_below(folder):
    """All images below a folder, however the archives were unpacked.

    Returns {file name: path relative to `folder`}. Raises ValueError where two have the same name.
    """
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            if path.name in found:
                raise ValueError(f"{path}: {found[path.name]} has the same name, "
                                 f"expected each image once below {folder}")
            found[path.name] = str(path.relative_to(folder))
    return found


def binary_task(name, findings):
    """A task of findings that are present (1) or not (0), with the chest task's prompts.

    name      of the task
    findings  their names, in order
    """
    return replace(data.CHEST, name=name, findings=tuple(findings), classes=(1, 0))


# --------------------------------------------------------------------------------------- MS-CXR-T

# finding: its column, without _progression; in the order of the paper's tables
MS_CXR_T = {
    "Consolidation": "consolidation",
    "Pleural Effusion": "pleural_effusion",
    "Pneumonia": "pneumonia",
    "Pneumothorax": "pneumothorax",
    "Edema": "edema",
}

# the words of a radiologist's comparison
_COURSE = {
    "improving": (
        "improving", "improved", "improvement", "better", "decreased", "decreasing", "decrease",
        "smaller", "less extensive", "resolved", "resolving", "resolution", "cleared", "clearing"),
    "stable": (
        "stable", "unchanged", "unaltered", "persistent", "persists", "persisting", "similar",
        "constant", "same"),
    "worsening": (
        "worsening", "worsened", "worse", "increased", "increasing", "increase", "larger",
        "more extensive", "enlarged", "enlarging", "enlargement", "grown", "growing",
        "progressed", "progressing"),
}
# more that is said of one
_MORE = {
    "improving": ["less {finding}", "{finding} * no longer"],
    "stable": [],
    "worsening": ["more {finding}", "new * {finding}", "{finding} * appeared",
                  "{finding} * developed"],
}
# denied, they say that the finding is as it was: "no significant change", "has not improved"
_CHANGE = ("change", "changed", "improvement", "improved", "improving", "worsening", "worsened",
           "worse", "increase", "increased", "decrease", "decreased", "progressed", "progression",
           "resolved", "cleared", "larger", "smaller")


def _phrases(course):
    """The phrases of a course: a word behind the finding, or before it as in "decrease in the size
    of the left effusion", and what is said where a change is denied."""
    phrases = [*_MORE[course]]
    phrases += [phrase for word in _COURSE[course]
                for phrase in (f"{{finding}} * * {word}", f"{word} * * {{finding}}")]
    if course == "stable":
        phrases += [phrase for word in _CHANGE
                    for phrase in (f"no * {word} * {{finding}}", f"{{finding}} * no * {word}",
                                   f"{{finding}} * not * {word}")]
    return phrases


_TWO_FILMS = ("The first chest X-ray is the patient's earlier film, the second is the current one. "
              "Compared with the earlier film,")
PROGRESSION = data.make_task({
    "name": "MS-CXR-T progression",
    "findings": {
        "Consolidation": ["consolidation", "consolidations"],
        "Pneumonia": ["pneumonia"],
        "Edema": ["edema", "oedema"],
        "Pleural Effusion": ["pleural effusion", "pleural effusions", "effusion", "effusions"],
        "Pneumothorax": ["pneumothorax", "pneumothoraces"],
    },
    "classes": {course: _phrases(course) for course in _COURSE},
    "prompts": {
        "system": data.CHEST.prompts["system"],
        "student": f"{_TWO_FILMS} is each of consolidation, pleural effusion, pneumonia, "
                   "pneumothorax and edema improving, stable or worsening?",
        "question": f"{_TWO_FILMS} is the {{finding}} {{options}}?",
        "teacher": "{diseases}",
        "compare": "{readers}",
    },
}, "MS-CXR-T progression")


def mimic_image(root, image, subject, study):
    """The path of a film below the folder of MIMIC-CXR-JPG.

    root     that folder, or its files/
    image    'p10/p10000032/s50414267/<dicom_id>', with or without files/ before it and .jpg behind
             it, or a bare dicom_id
    subject  its number, text
    study    its number, text
    Returns the path relative to `root`.
    """
    image = image.removeprefix("files/").removesuffix(".jpg")
    if "/" not in image:
        image = f"p{subject[:2]}/p{subject}/s{study}/{image}"
    return f"{'files/' if (Path(root) / 'files').is_dir() else ''}{image}.jpg"


def chexpert_labels(path, findings):
    """The labels of MIMIC-CXR's studies.

    path      mimic-cxr-2.0.0-chexpert.csv.gz, its negbio twin, or the hand-labelled test set
    findings  the columns to read
    Returns {study number: {finding: 1, 0, -1 or None}}. Raises ValueError naming file and line.
    """
    labels = {}
    for line, row in csv_columns(path, "study_id", *findings):
        study = number(row["study_id"], f"{path}:{line}: study_id")
        labels[study] = {finding: label(row[finding], f"{path}:{line}: {finding}")
                         for finding in findings}
    return labels


def ms_cxr_t(path, images, task, chexpert=None, blank="exclude"):
    """MS-CXR-T as studies.

    path      MS_CXR_T_temporal_image_classification_v1.0.0.csv
    images    folder of MIMIC-CXR-JPG, or its files/
    task      'progression': two films (earlier, current), classes improving / stable / worsening,
              the file's own labels; 'presence': the current film, classes 1 / 0 of its study. The
              paper does not say which one it reports
    chexpert  mimic-cxr-2.0.0-chexpert.csv.gz, the labels of presence; -1 is left out
    blank     'exclude' leaves out a finding that the report does not mention, 'negative' makes it 0
    Returns a Benchmark. Raises ValueError naming file and line.
    """
    if task == "progression":
        return progression(path, images)
    return presence(path, images, chexpert, blank)


def study_of(films, labels):
    """A study of MS-CXR-T, named by its films."""
    return Study(" ".join(Path(film).stem for film in films), films, labels, {})


def progression(path, images):
    """`ms_cxr_t` for the task 'progression'."""
    courses = {finding: f"{column}_progression" for finding, column in MS_CXR_T.items()}
    columns = ("subject_id", "study_id", "dicom_id", "previous_study_id", "previous_dicom_id")
    studies, seen = [], set()
    for line, row in csv_columns(path, *columns, *courses.values()):
        where = f"{path}:{line}"
        subject, study = subject_and_study(row, where)
        before = number(row["previous_study_id"], f"{where}: previous_study_id")
        films = (mimic_image(images, row["previous_dicom_id"], subject, before),
                 mimic_image(images, row["dicom_id"], subject, study))
        labels = {finding: row[column].lower()
                  for finding, column in courses.items() if row[column]}
        for course in labels.values():
            if course not in PROGRESSION.classes:
                raise ValueError(f"{where}: {course!r}, expected {', '.join(PROGRESSION.classes)} "
                                 "or nothing")
        if films in seen:
            raise ValueError(f"{where}: the pair {printable(' '.join(films))} is there twice, "
                             "expected it once")
        seen.add(films)
        if labels:
            studies.append(study_of(films, labels))
    return Benchmark("MS-CXR-T, progression", PROGRESSION, Path(images), studies, tuple(MS_CXR_T))


def presence(path, images, chexpert, blank):
    """`ms_cxr_t` for the task 'presence'."""
    labels_of = chexpert_labels(chexpert, MS_CXR_T)
    studies, missing, excluded, seen = [], [], 0, set()
    for line, row in csv_columns(path, "subject_id", "study_id", "dicom_id"):
        subject, study = subject_and_study(row, f"{path}:{line}")
        film = mimic_image(images, row["dicom_id"], subject, study)
        if study not in labels_of:
            missing.append(f"study {study}: not in {chexpert}")
            continue
        if film in seen:
            continue  # it is the current film of several pairs
        seen.add(film)
        labels = labels_of[study]
        if blank == "negative":
            labels = {finding: 0 if value is None else value for finding, value in labels.items()}
        excluded += sum(value in (None, -1) for value in labels.values())
        labels = {finding: value for finding, value in labels.items() if value in (0, 1)}
        if labels:
            studies.append(study_of((film,), labels))
    note = f"{excluded} labels left out that are uncertain"
    if blank == "exclude":
        note += " or not mentioned"
    task = binary_task("MS-CXR-T presence", MS_CXR_T)
    return Benchmark("MS-CXR-T, presence", task, Path(images), studies, tuple(MS_CXR_T),
                     list(dict.fromkeys(missing)), [note])


# ------------------------------------------------------------------------------ MIMIC-CXR's reports

def annotation(path, images, split="test"):
    """The reports of R2Gen's annotation.json as studies.

    path    the file: {"train" | "val" | "test": [{"id", "report", "image_path": [...]}]}, one item
            an image, the report its findings section
    images  folder that image_path is relative to
    split   test, train, or validate, which this file calls val
    Returns a Benchmark. Raises ValueError naming the file and the item.
    """
    content, key = read_json(path), {"validate": "val"}.get(split, split)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise ValueError(f'{path}: expected an object with a list "{key}"')
    studies = []
    for at, item in enumerate(content[key]):
        if not is_annotated(item):
            raise ValueError(f'{path}: {key}[{at}]: expected '
                             '{"id": text, "report": text, "image_path": [text, ...]}')
        films = tuple(item["image_path"])
        studies.append(Study(item["id"], films, {}, {}, item["report"], split))
    return Benchmark("MIMIC-CXR reports, annotation.json", data.CHEST, Path(images), studies)


def is_annotated(item):
    """Whether it is an item of annotation.json."""
    if not isinstance(item, dict):
        return False
    paths = item.get("image_path")
    has_paths = isinstance(paths, list) and len(paths) > 0 and all(map(is_name, paths))
    return has_paths and is_name(item.get("id")) and isinstance(item.get("report"), str)


HEADER = re.compile(r"\n ([A-Z ()/,-]+):\s")
# as they are spelled in the reports -> the section that is meant
SECTION_NAMES = {
    **dict.fromkeys(("conclusion", "findings and impression", "findings/impression",
                     "findings/ impression", "impresson", "imprression", "imoression",
                     "impressoin", "imprssion", "impresion", "imperssion", "mpression",
                     "impession"), "impression"),
    **dict.fromkeys(("finding", "findins", "findindgs", "findgings", "findngs", "findnings",
                     "finidngs", "reference findings"), "findings"),
    **dict.fromkeys(("comparision", "comparsion", "comparrison", "comparisions", "reference exam"),
                    "comparison"),
    **dict.fromkeys(("clinical information", "pfi"), "history"),
    **dict.fromkeys(("reason for examination", "reason for exam", "clinical indication",
                     "idication"), "indication"),
    **dict.fromkeys(("exam", "type of examination"), "examination"),
    **dict.fromkeys(("recommendation(s)", "recommendation"), "recommendations"),
    "wetread": "wet read",
}
# A header with one of these describes the whole film, as "CHEST, TWO VIEWS" does; VIEWS, UPRIGHT,
# AP or LATERAL by itself does not.
DESCRIBES_FILM = re.compile(
    r"chest|portable|pa and lateral|lateral and pa|ap and lateral|lateral and ap|frontal and"
    r"|two views|frontal view|pa view|ap view|one view|lateral view|bone window|frontal upright"
    r"|frontal semi-upright|ribs|pa and lat")


def report_sections(text):
    """The sections of a MIMIC-CXR report file.

    text  the file's content
    Returns {name: text}, blanks as the file has them; of two sections with the same name the later
    one counts.

    A header is capitals and a colon behind a line's first blank; the next one is looked for from
    the end of its line on. Names that mean findings or impression are called so; empty ones of
    these two are dropped. Where neither is left, what follows the first empty line of the last
    section is 'last_paragraph'. The conventions are those of the section parser that MIMIC-CXR's
    own labels were made with (github.com/MIT-LCP/mimic-cxr, txt/section_parser.py), without its
    list of 54 reports whose sections were set by hand.
    """
    sections, name, start = [], "preamble", 0
    header = HEADER.search(text)
    while header:
        sections.append((name, text[start:header.start(1)]))
        name, start = header[1].lower().strip(), header.end()
        line_end = text.find("\n", start)
        header = HEADER.search(text, start if line_end < 0 else line_end)
    sections.append((name, text[start:]))

    sections = [(section_name(name), part) for name, part in sections]
    sections = [(name, part) for name, part in sections
                if part.strip() or name not in ("findings", "impression")]
    if sections and not {"findings", "impression"} & {name for name, _ in sections}:
        name, part = sections.pop()
        before, gap, after = part.partition("\n \n")
        sections.append((name, before))
        if gap:
            sections.append(("last_paragraph", after))
    return dict(sections)


def section_name(header):
    """What a header in lower case is called: findings, impression, another known name, itself."""
    if header in SECTION_NAMES:
        return SECTION_NAMES[header]
    for known in ("impression", "findings", "history", "comparison", "addendum"):
        if known in header:
            return known
    return "findings" if DESCRIBES_FILM.search(header) else header


FRONTAL = ("PA", "AP")  # the views of a report's film, the better one first


def mimic_reports(folder, images, split="test", section="findings"):
    """One frontal film (PA before AP, then by dicom_id) and one report of every study of a split.

    folder   mimic-cxr-reports, with files/p10/... or p10/...
    images   MIMIC-CXR-JPG with its split and metadata csv
    split    train, validate or test
    section  findings, impression, or both in this order
    Returns a Benchmark. Raises ValueError naming file and line, FileNotFoundError without the csv
    files.
    """
    folder, images = Path(folder), Path(images)
    metadata = find(images, "mimic-cxr-2.0.0-metadata.csv*")
    views = {row["dicom_id"]: row["ViewPosition"]
             for _, row in csv_columns(metadata, "dicom_id", "ViewPosition")}
    films = films_of_split(images, split)
    root = folder / "files" if (folder / "files").is_dir() else folder
    studies, missing, lateral, silent = [], [], 0, 0
    for (subject, study), dicoms in sorted(films.items()):
        frontal = first_frontal(dicoms, views)
        file = root / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
        if frontal is None:
            lateral += 1
        elif not file.is_file():
            missing.append(f"{file}: no such report")
        elif report := report_of(read_text(file), section):
            film = mimic_image(images, frontal, subject, study)
            studies.append(Study(f"s{study}", (film,), {}, {}, report, split))
        else:
            silent += 1
    notes = [f"{lateral} studies left out without a frontal film, {silent} without {section}"]
    return Benchmark(f"MIMIC-CXR reports, {section}", data.CHEST, images, studies,
                     missing=missing, notes=notes)


def films_of_split(images, split):
    """The films that MIMIC-CXR-JPG's split csv gives to a split, {(subject, study): [dicom_id]}."""
    file, films = find(images, "mimic-cxr-2.0.0-split.csv*"), {}
    for line, row in csv_columns(file, "dicom_id", "study_id", "subject_id", "split"):
        key = subject_and_study(row, f"{file}:{line}")
        if row["split"] == split:
            films.setdefault(key, []).append(row["dicom_id"])
    if not films:
        raise ValueError(f"{file}: no study of split {split!r}, expected train, validate or test")
    return films


def first_frontal(dicoms, views):
    """The frontal film of a study, PA before AP, then by dicom_id; None where it has none."""
    frontal = [dicom for dicom in dicoms if views.get(dicom) in FRONTAL]
    return min(frontal, key=lambda dicom: (FRONTAL.index(views[dicom]), dicom), default=None)


def report_of(text, section):
    """The wanted sections of a report file in one line; '' where it has none of them."""
    sections = report_sections(text)
    wanted = ("findings", "impression") if section == "both" else (section,)
    return " ".join(" ".join(sections[name].split()) for name in wanted if name in sections)


# -------------------------------------------------------------------------------------- zero-shot

OPEN_I = (
    "Atelectasis", "Calcified Granuloma", "Cardiomegaly", "Edema", "Effusion", "Emphysema",
    "Fibrosis", "Fracture", "Granuloma", "Hernia", "Infiltration", "Lesion", "Mass", "Nodule",
    "Opacity", "Pleural_Thickening", "Pneumonia", "Pneumothorax")
OPEN_I_SYNONYMS = {
    "Pleural_Thickening": "pleural thickening",
    "Infiltration": "infiltrate",
    "Atelectasis": "atelectases",
}
# also the order of the label columns in a CheXNet-style test_list.txt
CHESTX_RAY14 = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia",
    "Pneumothorax", "Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening",
    "Hernia")
CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices")
CHEXPERT_FIVE = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
CHESTX_DET10 = (
    "Atelectasis", "Calcification", "Consolidation", "Effusion", "Emphysema", "Fibrosis",
    "Fracture", "Mass", "Nodule", "Pneumothorax")


def open_i(folder):
    """Open-I: all images of all reports, with the 18 labels of the literature.

    folder  NLMCXR_reports.tgz and NLMCXR_png.tgz unpacked anywhere below it
    Returns a Benchmark. Raises FileNotFoundError without reports, ValueError naming one that is no
    XML.
    """
    folder = Path(folder)
    files = sorted(folder.rglob("ecgen-radiology/*.xml")) or sorted(folder.glob("*.xml"))
    images = images_below(folder)
    if not files:
        raise FileNotFoundError(f"{folder}: no ecgen-radiology/*.xml")
    studies, missing, without = [], [], 0
    for file in files:
        report = read_xml(file)
        labels = open_i_labels(report)
        names = [f"{node.get('id')}.png" for node in report.iterfind(".//parentImage")]
        without += not names
        for name in names:
            if name in images:
                studies.append(Study(name, (images[name],), labels, {}))
            else:
                missing.append(f"{name}: of {file.name}, no such image")
    return Benchmark("Open-I", binary_task("Open-I", OPEN_I), folder, studies, OPEN_I, missing,
                     [f"{without} reports have no image"])


def read_xml(file):
    """An XML file as a tree. Raises ValueError naming the file if it is none."""
    try:
        return ElementTree.parse(file)
    # the last two come for an encoding that Python does not know
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{file}: not an XML file: {error}") from None


def open_i_labels(report):
    """The 18 labels of a report, {finding: 1 or 0}: 1 where the finding or its synonym is part of
    the report's automatic MeSH terms, 'Granuloma' also inside 'Calcified Granuloma'."""
    terms = sorted(node.text or "" for node in report.iterfind(".//MeSH/automatic"))
    terms = "|".join(terms).lower()
    labels = {}
    for name in OPEN_I:
        synonym = OPEN_I_SYNONYMS.get(name, name.lower())
        labels[name] = int(name.lower() in terms or synonym in terms)
    return labels


def chestx_ray14(folder):
    """ChestX-ray14's test images.

    folder  has test_list.txt, with Data_Entry_2017*.csv (NIH's, one name a line) or with the labels
            in it (CheXNet's, 'name 0 1 ...'), and the images anywhere below it
    Returns a Benchmark. Raises FileNotFoundError without these files, ValueError naming file and
    line.
    """
    folder = Path(folder)
    listed = find(folder, "test_list.txt", "**/test_list.txt")
    images, studies, missing, entries = images_below(folder), [], [], None
    for line, text in enumerate(read_text(listed).split("\n"), 1):
        if not text.strip():
            continue
        path, *values = text.split()
        name = Path(path).name
        if values:
            if len(values) != len(CHESTX_RAY14):
                raise ValueError(f"{listed}:{line}: {len(values)} labels, "
                                 f"expected {len(CHESTX_RAY14)} or none")
            labels = {finding: label(value, f"{listed}:{line}")
                      for finding, value in zip(CHESTX_RAY14, values)}
        else:
            entries = _data_entries(folder) if entries is None else entries
            labels = entries.get(name)
        if labels is None:
            missing.append(f"{name}: of {listed}, no row in Data_Entry_2017")
        elif name not in images:
            missing.append(f"{name}: of {listed}, no such image")
        else:
            studies.append(Study(name, (images[name],), labels, {}))
    return Benchmark("ChestX-ray14", binary_task("ChestX-ray14", CHESTX_RAY14), folder, studies,
                     CHESTX_RAY14, missing)


def _data_entries(folder):
    """{image name: {finding: 1 or 0}} of NIH's Data_Entry_2017*.csv."""
    file, entries = find(folder, "Data_Entry_2017*.csv*", "**/Data_Entry_2017*.csv*"), {}
    # the headers behind these two have commas inside brackets
    for line, row in csv_columns(file, "Image Index", "Finding Labels"):
        named = row["Finding Labels"].split("|")
        if unknown := set(named) - {*CHESTX_RAY14, "No Finding"}:
            raise ValueError(f"{file}:{line}: unknown finding {sorted(unknown)[0]!r}, "
                             f"expected some of {', '.join(CHESTX_RAY14)} or No Finding")
        entries[row["Image Index"]] = {finding: int(finding in named) for finding in CHESTX_RAY14}
    return entries


def chexpert(folder, labels=None):
    """CheXpert's images; the headline is the mean of the five competition labels.

    folder  the one that holds valid/ or test/
    labels  a file with Path (valid.csv, test_labels.csv; labels per image) or Study
            (groundtruth.csv; labels of all views below that folder); the first part of both names
            the release, which is `folder`. None: the first such file below `folder`. Uncertain and
            blank labels are left out
    Returns a Benchmark; each study's record has "group", its study, for scores per study. Raises
    FileNotFoundError without a label file, ValueError naming file and line.
    """
    folder = Path(folder)
    patterns = ("**/groundtruth.csv", "**/test_labels.csv", "**/valid.csv")
    listed = Path(labels) if labels else find(folder, *patterns)
    _, head = next(csv_lines(listed), (1, []))
    key = "Study" if "Study" in head else "Path"
    studies, missing = [], []
    for line, row in csv_columns(listed, key, *CHEXPERT):
        values = {name: label(row[name], f"{listed}:{line}: {name}") for name in CHEXPERT}
        values = {name: value for name, value in values.items() if value in (0, 1)}
        views = chexpert_views(folder, row[key], key)
        if not views:
            missing.append(f"{row[key]}: of {listed}, no such image")
        for view in views:
            group = {"group": str(Path(view).parent)}
            studies.append(Study(view, (view,), values, {}, record=group))
    return Benchmark("CheXpert", binary_task("CheXpert", CHEXPERT), folder, studies, CHEXPERT_FIVE,
                     missing, [f"labels of {listed.name}"])


def chexpert_views(folder, listed, key):
    """The images of a line of a label file, relative to `folder`; none unless all are there."""
    release, _, inside = listed.partition("/")
    path = inside if release.startswith("CheXpert") else listed
    try:
        place = data.image_path(path, folder)
        views = [path]
        if key == "Study":
            views = [str(Path(path) / film.name) for film in sorted(place.glob("*.jpg"))]
        return views if all((folder / view).is_file() for view in views) else []
    except (ValueError, OSError):  # it leads out of the folder, or is no path at all
        return []


def chestx_det10(folder):
    """ChestX-Det10's test images.

    folder  has test.json, [{"file_name", "syms", "boxes"}], and the images anywhere below it; a sym
            is there once a box, an empty list is no finding
    Returns a Benchmark. Raises FileNotFoundError without test.json, ValueError naming the item.
    """
    folder = Path(folder)
    listed = find(folder, "test.json", "**/test.json")
    images, studies, missing = images_below(folder), [], []
    items = read_json(listed)
    if not isinstance(items, list):
        raise ValueError(f"{listed}: expected a list of objects, found {type(items).__name__}")
    for at, item in enumerate(items):
        if not is_boxed(item):
            raise ValueError(f'{listed}: [{at}]: expected '
                             '{"file_name": text, "syms": [text, ...]}')
        if unknown := set(item["syms"]) - set(CHESTX_DET10):
            raise ValueError(f"{listed}: [{at}]: unknown finding {sorted(unknown)[0]!r}, "
                             f"expected some of {', '.join(CHESTX_DET10)}")
        name = item["file_name"]
        if name in images:
            labels = {finding: int(finding in item["syms"]) for finding in CHESTX_DET10}
            studies.append(Study(name, (images[name],), labels, {}))
        else:
            missing.append(f"{name}: of {listed}, no such image")
    return Benchmark("ChestX-Det10", binary_task("ChestX-Det10", CHESTX_DET10), folder, studies,
                     CHESTX_DET10, missing)


def is_boxed(item):
    """Whether it is an item of ChestX-Det10's test.json."""
    if not isinstance(item, dict):
        return False
    syms = item.get("syms")
    has_syms = isinstance(syms, list) and all(isinstance(sym, str) for sym in syms)
    return has_syms and is_name(item.get("file_name"))
