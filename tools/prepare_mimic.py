"""studies.jsonl from MIMIC-CXR-JPG: labels, split, one film a study.

    python tools/prepare_mimic.py --root mimic-cxr-jpg --sample 24426 \\
        --ms_cxr_t MS_CXR_T_temporal_image_classification_v1.0.0.csv [--list_only]
    python tools/prepare_mimic.py --root mimic-cxr-jpg --keep_ms_cxr_t \\
        --reports mimic-cxr-reports

reads   ROOT (release 2.0.0 or 2.1.0, https://physionet.org/content/mimic-cxr-jpg/): files/ and
        mimic-cxr-2.0.0-{chexpert or negbio, split, metadata}.csv.gz; and the reports if they are
        named
writes  --out: {"id": "s50414267", "image": "files/p10/...jpg", "labels", "split", "subject",
        "report"}, by subject and study;
        OUT.images.txt beside it (studies.images.txt), before any film is looked for: every film
        that is needed, those of the records and, with --ms_cxr_t, those of its pairs; one path a
        line, relative to --root (for wget -i or rsync --files-from)

The film of a study is the first PA one, without any the first AP one, by dicom_id; ViewPosition of
the metadata says which they are. Studies without either are left out and counted. A label is 1, 0
or -1 (uncertain); findings that are not mentioned have none.

--sample draws N training studies by the order of sha256("SEED STUDY"), so that it depends on the
seed and on nothing else and a smaller sample is part of a larger one. The paper's own list of
24,426 is not published. MS-CXR-T, which the paper tests on, is made of MIMIC-CXR's films: its
patients are left out of the training split, with or without a sample, unless --keep_ms_cxr_t.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # tools/ is no package of its own

import data  # noqa: E402
from evaluation import datasets  # noqa: E402
from runtime.records import atomic, line_of  # noqa: E402

SPLITS = ("train", "validate", "test")


# --------------------------------------------------------------------------------------- the tables

def films(root):
    """The studies of MIMIC-CXR-JPG and their films.

    root  the folder of the tables
    Returns {(subject, study): (split, dicom_id of its film or None)}. Raises ValueError naming file
    and line, also where a patient is in two splits.
    """
    table = datasets.find(root, "mimic-cxr-2.0.0-metadata.csv*")
    views = {row["dicom_id"]: row["ViewPosition"]
             for _, row in datasets.csv_columns(table, "dicom_id", "ViewPosition")}
    table = datasets.find(root, "mimic-cxr-2.0.0-split.csv*")
    dicoms, split_of = {}, {}
    for line, row in datasets.csv_columns(table, "dicom_id", "study_id", "subject_id", "split"):
        where, split = f"{table}:{line}", row["split"]
        subject, study = datasets.subject_and_study(row, where)
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r}, expected {', '.join(SPLITS)}")
        if split_of.setdefault(subject, split) != split:
            raise ValueError(f"{where}: subject {subject} is in {split_of[subject]} and in {split},"
                             " expected one split for each patient")
        if not re.fullmatch(r"[\w.-]+", row["dicom_id"]):
            # it becomes a path, and a line of OUT.images.txt
            raise ValueError(f"{where}: dicom_id {row['dicom_id']!r}, expected letters, digits and "
                             "hyphens")
        dicoms.setdefault((subject, study), []).append(row["dicom_id"])
    return {(subject, study): (split_of[subject],
                               datasets.first_frontal(dicoms[subject, study], views))
            for subject, study in sorted(dicoms)}


def tested_films(table):
    """The patients and films of MS-CXR-T.

    table  its csv
    Returns ({subject}, {film of one of its pairs, current or previous, as a path below --root}).
    Raises ValueError naming file and line.
    """
    subjects, paths = set(), set()
    columns = ("subject_id", "study_id", "dicom_id", "previous_study_id", "previous_dicom_id")
    for line, row in datasets.csv_columns(table, *columns):
        where = f"{table}:{line}"
        subject = datasets.number(row["subject_id"], f"{where}: subject_id")
        for which in ("", "previous_"):
            dicom = row[f"{which}dicom_id"]
            study = datasets.number(row[f"{which}study_id"], f"{where}: {which}study_id")
            path = below_files(dicom, subject, study)
            # it becomes a line of OUT.images.txt
            if not re.fullmatch(r"files/p[0-9]{2}/p[0-9]+/s[0-9]+/[\w-][\w.-]*\.jpg", path):
                raise ValueError(f"{where}: {which}dicom_id {dicom!r}, expected "
                                 "p10/p10000032/s50414267/DICOM_ID or DICOM_ID")
            paths.add(path)
        subjects.add(subject)
    return subjects, paths


def below_files(dicom, subject, study):
    """The path of a film relative to --root, also where only the tables have been fetched yet.

    dicom           dicom_id, or a path as `datasets.mimic_image` takes it
    subject, study  numbers, texts
    """
    return f"files/{datasets.mimic_image('.', dicom, subject, study).removeprefix('files/')}"


def labels(root, labeller, test_labels=None):
    """The labels of the studies.

    root         the folder of the tables
    labeller     'chexpert' or 'negbio'
    test_labels  csv of the radiologists' labels of release 2.1.0, which replace the labeller's;
                 None: it is not used
    Returns {study: {finding: 1, 0 or -1}}. Raises ValueError naming file and line.
    """
    findings = data.CHEST.findings
    table = datasets.find(root, f"mimic-cxr-2.0.0-{labeller}.csv*")
    label_of = datasets.chexpert_labels(table, findings)
    if test_labels:  # this file says Airspace Opacity for Lung Opacity
        names = ["Airspace Opacity" if finding == "Lung Opacity" else finding
                 for finding in findings]
        for study, row in datasets.chexpert_labels(test_labels, names).items():
            label_of[study] = dict(zip(findings, row.values()))
    return {study: {finding: value for finding, value in row.items() if value is not None}
            for study, row in label_of.items()}


def read_report(folder, subject, study, section):
    """The wanted section of a report, in one line.

    folder          has p10/p10000032/s50414267.txt
    subject, study  numbers, texts
    section         'findings', 'impression' or 'both'
    Returns '' where the report has no such section, None where there is no report.
    """
    file = folder / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
    return datasets.report_of(datasets.read_text(file), section) if file.is_file() else None


# ---------------------------------------------------------------------------------- what is written

def prepare(args):
    """Writes what the flags ask for.

    args  the flags of `parse`
    Returns the figures that --json prints, {what: count}. Raises ValueError where a table is faulty
    or a film is missing.
    """
    root, counts = Path(args.root), Counter()
    studies, label_of = films(root), labels(root, args.labels, args.test_labels)
    counts["studies"] = len(studies)
    frontal = {key: (split, dicom) for key, (split, dicom) in studies.items() if dicom is not None}
    counts["without a frontal film"] = len(studies) - len(frontal)
    split_of = {key: split for key, (split, _) in frontal.items()}
    image_of = {key: below_files(dicom, *key) for key, (_, dicom) in frontal.items()}

    of_pairs = set()
    if args.ms_cxr_t:
        tested, of_pairs = tested_films(args.ms_cxr_t)
        split_of = without_tested(split_of, tested, args.keep_ms_cxr_t, counts)
    if args.sample:
        split_of = draw(split_of, args.sample, args.seed)

    needed = sorted({*(image_of[key] for key in split_of), *of_pairs})
    listed = Path(args.out).with_suffix(".images.txt")
    with atomic(listed) as temporary, open(temporary, "wb") as file:
        file.writelines(f"{path}\n".encode() for path in needed)
    counts["films listed"], counts["of them in pairs of MS-CXR-T"] = len(needed), len(of_pairs)
    print(f"{listed}: the {len(needed)} films that are needed")
    if args.list_only:
        counts.update(split_of.values())
        return dict(counts)

    missing = {path for path in tqdm(needed, desc="films", disable=None)
               if not (root / path).is_file()}
    if missing and not args.skip_missing:
        raise ValueError(f"{len(missing)} of the {len(needed)} films that {listed} names are "
                         f"missing in {root}, the first {min(missing)}; fetch that list, or leave "
                         "their studies out with --skip_missing")
    there = {key: split for key, split in split_of.items() if image_of[key] not in missing}
    counts["films missing in pairs of MS-CXR-T"] = len(missing & of_pairs)
    counts["films missing, studies left out"] = len(split_of) - len(there)
    if not there:
        raise ValueError(f"{root}: no study is left, expected films of {', '.join(SPLITS)} below "
                         "files/")
    write_records(args, there, image_of, label_of, counts)
    return dict(counts)


def without_tested(split_of, tested, keep, counts):
    """Leaves out the training studies of MS-CXR-T's patients.

    split_of  {(subject, study): split}
    tested    {subject} of MS-CXR-T
    keep      whether the studies are only counted
    counts    Counter, to which figures are added
    Returns {(subject, study): split}.
    """
    overlap = {(subject, study) for (subject, study), split in split_of.items()
               if split == "train" and subject in tested}
    counts["patients of MS-CXR-T"] = len(tested)
    counts["of them in the training split"] = len({subject for subject, _ in overlap})
    counts[f"training studies of these, {'kept' if keep else 'left out'}"] = len(overlap)
    if keep:
        return split_of
    return {key: split for key, split in split_of.items() if key not in overlap}


def draw(split_of, sample, seed):
    """Draws a sample of the training studies; the other splits stay whole.

    split_of  {(subject, study): split}
    sample    how many training studies are drawn
    seed      of the sample
    Returns {(subject, study): split}. Raises ValueError where there are too few.
    """
    training = [key for key, split in split_of.items() if split == "train"]
    if sample > len(training):
        raise ValueError(f"--sample {sample}: expected at most the {len(training)} training "
                         "studies that are left")

    def place(key):
        """A study's place in the order of drawing."""
        _, study = key
        return hashlib.sha256(f"{seed} {study}".encode()).digest()

    left_out = set(sorted(training, key=place)[sample:])
    return {key: split for key, split in split_of.items() if key not in left_out}


def write_records(args, split_of, image_of, label_of, counts):
    """Writes args.out.

    args      the flags of `parse`
    split_of  {(subject, study): split}
    image_of  {(subject, study): path of its film}
    label_of  {study: {finding: class}}
    counts    Counter, to which figures are added
    Raises ValueError where --reports holds none of the reports.
    """
    folder = Path(args.reports or ".")
    if args.reports and (folder / "files").is_dir():
        folder /= "files"
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        for (subject, study), split in tqdm(split_of.items(), desc="studies", disable=None):
            record = {"id": f"s{study}", "image": image_of[subject, study],
                      "labels": label_of.get(study, {}), "split": split, "subject": subject}
            counts["without labels"] += study not in label_of
            if args.reports:
                report = read_report(folder, subject, study, args.report_section)
                counts["without a report"] += report is None
                counts[f"reports without {args.report_section}"] += report == ""
                if report:
                    record["report"] = report
            file.write(line_of(record))
            counts[split] += 1
        if args.reports and counts["without a report"] == len(split_of):
            raise ValueError(f"--reports {args.reports}: holds none of the {len(split_of)} "
                             "reports, expected p10/p10000032/s50414267.txt in it or in its files/")


# -------------------------------------------------------------------------------------- the command

def parse(argv=None):
    """The flags of a list of words; None: of the command line. Exits with status 2 where nothing is
    said of MS-CXR-T."""
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--root", required=True,
        help="folder of MIMIC-CXR-JPG, with files/ and the csv.gz tables; --images of the stages")
    parser.add_argument(
        "--out", default="studies.jsonl",
        help="default: %(default)s")
    parser.add_argument(
        "--labels", choices=("chexpert", "negbio"), default="chexpert",
        help="whose (default: %(default)s)")
    parser.add_argument(
        "--test_labels",
        help="mimic-cxr-2.1.0-test-set-labeled.csv: radiologists' labels in place of these")
    parser.add_argument(
        "--sample", type=int,
        help="training studies to draw; the paper has 24426 (default: all)")
    parser.add_argument(
        "--seed", type=int, default=0,
        help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--ms_cxr_t",
        help="MS_CXR_T_temporal_image_classification_v1.0.0.csv: its patients leave training, its "
             "films are listed")
    parser.add_argument(
        "--keep_ms_cxr_t", action="store_true",
        help="train on patients of MS-CXR-T too: its test set then leaks")
    parser.add_argument(
        "--reports",
        help="folder of MIMIC-CXR's reports, with files/p10/... or p10/... (default: no reports)")
    parser.add_argument(
        "--report_section", choices=("findings", "impression", "both"), default="findings",
        help="default: %(default)s")
    parser.add_argument(
        "--list_only", action="store_true",
        help="write the list of the films that are needed, look for none, and end")
    parser.add_argument(
        "--skip_missing", action="store_true",
        help="leave out studies whose film is not on the disk, instead of stopping")
    parser.add_argument(
        "--json", action="store_true",
        help="end with one line of JSON")
    args = parser.parse_args(argv)
    if not (args.ms_cxr_t or args.keep_ms_cxr_t):
        parser.error("expected --ms_cxr_t FILE, to leave its patients out of training, or "
                     "--keep_ms_cxr_t to train on the test set's patients")
    return args


def main():
    """Runs the command."""
    args = parse()
    try:
        counts = prepare(args)
    except (ValueError, OSError) as error:
        raise SystemExit(f"prepare_mimic: {error}") from None
    for name, count in counts.items():
        print(f"{count:>9,} {name}")
    if args.json:
        print(json.dumps(counts))


if __name__ == "__main__":
    main()
