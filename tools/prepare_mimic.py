"""studies.jsonl from MIMIC-CXR-JPG (2.0.0 or 2.1.0, https://physionet.org/content/mimic-cxr-jpg/): labels, split, one film a study.

    python tools/prepare_mimic.py --root mimic-cxr-jpg --ms_cxr_t MS_CXR_T_temporal_image_classification_v1.0.0.csv --sample 24426 --list_only
    python tools/prepare_mimic.py --root mimic-cxr-jpg --ms_cxr_t MS_CXR_T_temporal_image_classification_v1.0.0.csv --sample 24426
    python tools/prepare_mimic.py --root mimic-cxr-jpg --keep_ms_cxr_t --reports mimic-cxr-reports

reads   ROOT/files, mimic-cxr-2.0.0-{chexpert or negbio, split, metadata}.csv.gz, and the reports if they are named
writes  --out: {"id": "s50414267", "image": "files/p10/...jpg", "labels", "split", "subject", "report"}, by subject and study;
        OUT.images.txt beside it (studies.images.txt), before any film is looked for: every film that is needed, those of the records
        and, with --ms_cxr_t, those of its pairs; one path a line, relative to --root (for wget -i or rsync --files-from)

The film of a study is the first PA one, without any the first AP one, by dicom_id; ViewPosition of the metadata says which they are.
Studies without either are left out and counted. A label is 1, 0 or -1 (uncertain); findings that are not mentioned have none.

--sample draws N training studies by the order of sha256("SEED STUDY"), so that it depends on the seed and on nothing else and a
smaller sample is part of a larger one. The paper's own list of 24,426 is not published. MS-CXR-T, which the paper tests on, is made of
MIMIC-CXR's films: its patients are left out of the training split, with or without a sample, unless --keep_ms_cxr_t.
"""

import argparse
import hashlib
import json
import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
from evaluation.datasets import chexpert_labels, csv_columns, find, mimic_image, number, read_text, report_sections  # noqa: E402
from runtime.records import atomic, line_of  # noqa: E402

SPLITS = ("train", "validate", "test")
VIEWS = ("PA", "AP")  # in the order of preference


def films(root):
    """-> {(subject, study): (split, dicom_id of its film or None)}. Raises ValueError where a patient is in two splits."""
    table = find(root, "mimic-cxr-2.0.0-metadata.csv*")
    views = {row["dicom_id"]: row["ViewPosition"] for _, row in csv_columns(table, "dicom_id", "ViewPosition")}
    table, studies, split_of = find(root, "mimic-cxr-2.0.0-split.csv*"), {}, {}
    for line, row in csv_columns(table, "dicom_id", "study_id", "subject_id", "split"):
        where, split = f"{table}:{line}", row["split"]
        subject, study = number(row["subject_id"], f"{where}: subject_id"), number(row["study_id"], f"{where}: study_id")
        if split not in SPLITS:
            raise ValueError(f"{where}: split {split!r}, expected {', '.join(SPLITS)}")
        if split_of.setdefault(subject, split) != split:
            raise ValueError(f"{where}: subject {subject} is in {split_of[subject]} and in {split}, expected one split for each patient")
        found = studies.setdefault((subject, study), (split, []))[1]
        if not re.fullmatch(r"[\w.-]+", row["dicom_id"]):  # it becomes a path, and a line of OUT.images.txt
            raise ValueError(f"{where}: dicom_id {row['dicom_id']!r}, expected letters, digits and hyphens")
        if views.get(row["dicom_id"]) in VIEWS:
            found.append((VIEWS.index(views[row["dicom_id"]]), row["dicom_id"]))
    return {key: (split, min(found)[1] if found else None) for key, (split, found) in sorted(studies.items())}


def tested_films(table):
    """MS-CXR-T's csv -> ({subject}, {film of one of its pairs, current or previous, as a path below --root})."""
    subjects, paths = set(), set()
    for line, row in csv_columns(table, "subject_id", "study_id", "dicom_id", "previous_study_id", "previous_dicom_id"):
        where, subject = f"{table}:{line}", number(row["subject_id"], f"{table}:{line}: subject_id")
        for which in ("", "previous_"):
            path = below_files(row[f"{which}dicom_id"], subject, number(row[f"{which}study_id"], f"{where}: {which}study_id"))
            if not re.fullmatch(r"files/p[0-9]{2}/p[0-9]+/s[0-9]+/[\w-][\w.-]*\.jpg", path):  # it becomes a line of OUT.images.txt
                raise ValueError(f"{where}: {which}dicom_id {row[f'{which}dicom_id']!r}, expected p10/p10000032/s50414267/DICOM_ID or DICOM_ID")
            paths.add(path)
        subjects.add(subject)
    return subjects, paths


def below_files(dicom, subject, study):
    """The path of a film relative to --root, also where only the tables have been fetched yet."""
    return f"files/{mimic_image('.', dicom, subject, study).removeprefix('files/')}"


def labels(root, labeller, test_labels=None):
    """-> {study: {finding: 1, 0 or -1}}; the radiologists' labels of release 2.1.0 replace the labeller's where they are given."""
    all_labels = chexpert_labels(find(root, f"mimic-cxr-2.0.0-{labeller}.csv*"), data.CHEST.findings)
    if test_labels:  # this file says Airspace Opacity for Lung Opacity
        names = ["Airspace Opacity" if finding == "Lung Opacity" else finding for finding in data.CHEST.findings]
        for study, row in chexpert_labels(test_labels, names).items():
            all_labels[study] = dict(zip(data.CHEST.findings, row.values()))
    return {study: {f: value for f, value in row.items() if value is not None} for study, row in all_labels.items()}


def read_report(folder, subject, study, section):
    """The wanted section's text with single blanks, '' where the report has none, None where there is no report."""
    file = folder / f"p{subject[:2]}" / f"p{subject}" / f"s{study}.txt"
    if not file.is_file():
        return None
    sections = report_sections(read_text(file))
    wanted = ("findings", "impression") if section == "both" else (section,)
    return " ".join(" ".join(sections[name].split()) for name in wanted if name in sections)


def prepare(args):
    """Writes what the flags ask for; returns the figures that --json prints."""
    root, counts = Path(args.root), Counter()
    studies, label_of = films(root), labels(root, args.labels, args.test_labels)
    counts["studies"] = len(studies)
    counts["without a frontal film"] = sum(dicom is None for _, dicom in studies.values())
    studies = {key: value for key, value in studies.items() if value[1] is not None}

    of_pairs = set()
    if args.ms_cxr_t:
        tested, of_pairs = tested_films(args.ms_cxr_t)
        overlap = {key for key, (split, _) in studies.items() if split == "train" and key[0] in tested}
        counts["patients of MS-CXR-T"] = len(tested)
        counts["of them in the training split"] = len({subject for subject, _ in overlap})
        counts[f"training studies of these, {'kept' if args.keep_ms_cxr_t else 'left out'}"] = len(overlap)
        if not args.keep_ms_cxr_t:
            studies = {key: value for key, value in studies.items() if key not in overlap}

    if args.sample:
        training = [key for key, (split, _) in studies.items() if split == "train"]
        if args.sample > len(training):
            raise ValueError(f"--sample {args.sample}: expected at most the {len(training)} training studies that are left")
        training.sort(key=lambda key: hashlib.sha256(f"{args.seed} {key[1]}".encode()).digest())
        left_out = set(training[args.sample:])
        studies = {key: value for key, value in studies.items() if key not in left_out}

    image_of = {key: below_files(dicom, *key) for key, (_, dicom) in studies.items()}
    needed, listed = sorted({*image_of.values(), *of_pairs}), Path(args.out).with_suffix(".images.txt")
    with atomic(listed) as temporary, open(temporary, "wb") as file:
        file.writelines(f"{path}\n".encode() for path in needed)
    counts["films listed"], counts["of them in pairs of MS-CXR-T"] = len(needed), len(of_pairs)
    print(f"{listed}: the {len(needed)} films that are needed")
    if args.list_only:
        counts.update(split for split, _ in studies.values())
        return dict(counts)

    missing = {path for path in tqdm(needed, desc="films", disable=None) if not (root / path).is_file()}
    if missing and not args.skip_missing:
        raise ValueError(f"{len(missing)} of the {len(needed)} films that {listed} names are missing in {root}, the first {min(missing)}; "
                         "fetch that list, or leave their studies out with --skip_missing")
    counts["films missing in pairs of MS-CXR-T"] = len(missing & of_pairs)
    counts["films missing, studies left out"] = sum(image in missing for image in image_of.values())
    studies = {key: value for key, value in studies.items() if image_of[key] not in missing}
    if not studies:
        raise ValueError(f"{root}: no study is left, expected films of {', '.join(SPLITS)} below files/")

    folder = Path(args.reports) / "files" if args.reports and (Path(args.reports) / "files").is_dir() else Path(args.reports or ".")
    with atomic(args.out) as temporary, open(temporary, "wb") as file:
        for (subject, study), (split, _) in tqdm(studies.items(), desc="studies", disable=None):
            record = {"id": f"s{study}", "image": image_of[subject, study], "labels": label_of.get(study, {}), "split": split, "subject": subject}
            counts["without labels"] += study not in label_of
            if args.reports:
                report = read_report(folder, subject, study, args.report_section)
                counts["without a report"] += report is None
                counts[f"reports without {args.report_section}"] += report == ""
                if report:
                    record["report"] = report
            file.write(line_of(record))
            counts[split] += 1
        if args.reports and counts["without a report"] == len(studies):
            raise ValueError(f"--reports {args.reports}: holds none of the {len(studies)} reports, expected p10/p10000032/s50414267.txt "
                             "in it or in its files/")
    return dict(counts)


def parse(argv=None):
    text, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder of MIMIC-CXR-JPG, with files/ and the csv.gz tables; --images of the stages")
    parser.add_argument("--out", default="studies.jsonl", help="default: %(default)s")
    parser.add_argument("--labels", choices=("chexpert", "negbio"), default="chexpert", help="whose (default: %(default)s)")
    parser.add_argument("--test_labels", help="mimic-cxr-2.1.0-test-set-labeled.csv: radiologists' labels in place of these")
    parser.add_argument("--sample", type=int, help="training studies to draw; the paper has 24426 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument("--ms_cxr_t", help="MS_CXR_T_temporal_image_classification_v1.0.0.csv: its patients leave training, its films are listed")
    parser.add_argument("--keep_ms_cxr_t", action="store_true", help="train on patients of MS-CXR-T too: its test set then leaks")
    parser.add_argument("--reports", help="folder of MIMIC-CXR's reports, with files/p10/... or p10/... (default: no reports)")
    parser.add_argument("--report_section", choices=("findings", "impression", "both"), default="findings", help="default: %(default)s")
    parser.add_argument("--list_only", action="store_true", help="write the list of the films that are needed, look for none, and end")
    parser.add_argument("--skip_missing", action="store_true", help="leave out studies whose film is not on the disk, instead of stopping")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args(argv)
    if not (args.ms_cxr_t or args.keep_ms_cxr_t):
        parser.error("expected --ms_cxr_t FILE, to leave its patients out of training, or --keep_ms_cxr_t to train on the test set's patients")
    return args


def main():
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
