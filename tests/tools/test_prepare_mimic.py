"""tools/prepare_mimic.py on folders laid out and written as MIMIC-CXR-JPG, MIMIC-CXR's reports and
MS-CXR-T are."""

import csv
import gzip
import importlib
import json
import random
import sys

import pytest
from conftest import ROOT
from PIL import Image

import data
from evaluation import datasets

sys.path.insert(0, str(ROOT / "tools"))
prepare_mimic = importlib.import_module("prepare_mimic")

FINDINGS = list(data.CHEST.findings)
# subject, study, split, films (dicom, ViewPosition), labels as they are in the file
STUDIES = [
    (10000032, 50000001, "train", [("b-pa", "PA"), ("a-pa", "PA"), ("0-ap", "AP")],
     {"Edema": "1.0", "Pneumonia": "-1.0", "Fracture": "0.0"}),
    (10000032, 50000002, "train", [("lat", "LATERAL"), ("z-ap", "AP")], {"No Finding": "1"}),
    (10000048, 50000003, "train", [("only-lateral", "LL"), ("blank", "")], {"Edema": "0"}),
    (11000011, 50000004, "train", [("m-ap", "AP")], {}),
    (12000012, 50000005, "validate", [("v-pa", "PA")], {"Lung Opacity": "1.0"}),
    (13000013, 50000006, "test", [("t-pa", "PA")], {"Lung Opacity": "1.0", "Edema": "1.0"}),
]


# of the MS-CXR-T below, current and previous; one is of a training study that is left out for them
FILMS_OF_PAIRS = {f"files/{path}.jpg" for path in (
    "p11/p11000011/s50000004/m-ap", "p11/p11000011/s50000009/before",
    "p11/p11000011/s50000010/later", "p19/p19999999/s999/x", "p19/p19999999/s998/w")}
PAIRS = """\
study_id,subject_id,dicom_id,previous_study_id,previous_dicom_id
50000004,11000011,p11/p11000011/s50000004/m-ap,50000009.0,p11/p11000011/s50000009/before
50000010,11000011,later,50000004,p11/p11000011/s50000004/m-ap
999,19999999,x,998,w
"""


def table(path, columns, lines):
    with gzip.open(path, "wt", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(lines)


def tables(root, studies, shuffle=0):
    """The three tables, columns and rows in an order by `shuffle`; in every other row numbers are
    written as '1.0'."""
    rng = random.Random(shuffle)
    as_written = lambda i, value: f"{value}.0" if i % 2 else value
    findings = rng.sample(FINDINGS, len(FINDINGS))
    labels = [[as_written(i, p), as_written(i, s), *(said.get(f, "") for f in findings)]
              for i, (p, s, _, _, said) in enumerate(studies)]
    films = [(dicom, view, p, s, split)
             for p, s, split, images, _ in studies for dicom, view in images]
    rng.shuffle(films)
    rng.shuffle(labels)
    table(root / "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *findings], labels)
    table(root / "mimic-cxr-2.0.0-split.csv.gz", ["dicom_id", "study_id", "subject_id", "split"],
          [(d, as_written(i, s), as_written(i, p), split)
           for i, (d, _, p, s, split) in enumerate(films)])
    table(root / "mimic-cxr-2.0.0-metadata.csv.gz",
          ["dicom_id", "subject_id", "study_id", "ViewPosition", "Rows"],
          [(d, p, s, view, 3056) for d, view, p, s, _ in films])


BEFORE_FINDINGS = ("                                 FINAL REPORT\n"
                   " EXAMINATION:  CHEST (PA AND LAT)\n \n INDICATION:  ___ year old\n \n")
REPORT = (BEFORE_FINDINGS + " FINDINGS: \n \n The lungs are\n clear.\n \n"
          " IMPRESSION: \n \n No acute process.\n")
IMPRESSION = BEFORE_FINDINGS + " IMPRESSION: \n \n Tube in place.\n"


@pytest.fixture
def mimic(tmp_path):
    root = tmp_path / "mimic"
    root.mkdir()
    tables(root, STUDIES)
    for subject, study, _, films, _ in STUDIES:
        folder = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}"
        folder.mkdir(parents=True)
        for dicom, _ in films:
            Image.new("L", (40, 40)).save(folder / f"{dicom}.jpg")
    reports = tmp_path / "reports" / "files" / "p10" / "p10000032"
    reports.mkdir(parents=True)
    (reports / "s50000001.txt").write_text(REPORT)
    (reports / "s50000002.txt").write_text(IMPRESSION)
    (tmp_path / "ms_cxr_t.csv").write_text(PAIRS)
    for film in FILMS_OF_PAIRS:
        (root / film).parent.mkdir(parents=True, exist_ok=True)
        (root / film).touch()
    return root


def listed(mimic):
    return (mimic.parent / "studies.images.txt").read_text().splitlines()


def prepare(mimic, *flags):
    """Returns ({id: record} in the file's order, counts)."""
    out = mimic.parent / "studies.jsonl"
    args = prepare_mimic.parse(["--root", str(mimic), "--out", str(out), *map(str, flags)])
    counts = prepare_mimic.prepare(args)
    records = map(json.loads, out.read_text().splitlines())
    return {record["id"]: record for record in records}, counts


def test_a_study_has_its_labels_its_split_and_its_first_frontal_film(mimic):
    records, counts = prepare(mimic, "--keep_ms_cxr_t")
    assert records["s50000001"] == {
        "id": "s50000001", "image": "files/p10/p10000032/s50000001/a-pa.jpg", "split": "train",
        "subject": "10000032", "labels": {"Edema": 1, "Pneumonia": -1, "Fracture": 0}}
    assert records["s50000002"]["image"].endswith("/z-ap.jpg")
    assert records["s50000002"]["labels"] == {"No Finding": 1}
    assert {id: r["split"] for id, r in records.items()} == {
        "s50000001": "train", "s50000002": "train", "s50000004": "train",
        "s50000005": "validate", "s50000006": "test"}
    assert counts["without a frontal film"] == 1
    assert (counts["train"], counts["validate"], counts["test"]) == (3, 1, 1)
    (study,) = data.read_studies(mimic.parent / "studies.jsonl", data.CHEST, "validate")
    assert study.id == "s50000005" and all((mimic / image).is_file() for image in study.images)


def test_columns_and_rows_may_be_in_any_order(mimic):
    before, _ = prepare(mimic, "--keep_ms_cxr_t")
    tables(mimic, STUDIES, shuffle=1)
    after, _ = prepare(mimic, "--keep_ms_cxr_t")
    assert after == before


def test_patients_of_ms_cxr_t_are_left_out_of_training_and_counted(mimic):
    csv_file = mimic.parent / "ms_cxr_t.csv"
    records, counts = prepare(mimic, "--ms_cxr_t", csv_file)
    assert "s50000004" not in records and len(records) == 4
    assert counts["patients of MS-CXR-T"] == 2 and counts["of them in the training split"] == 1
    assert counts["training studies of these, left out"] == 1
    records, counts = prepare(mimic, "--ms_cxr_t", csv_file, "--keep_ms_cxr_t")
    assert "s50000004" in records and counts["training studies of these, kept"] == 1
    with pytest.raises(SystemExit):  # neither said
        prepare_mimic.parse(["--root", str(mimic)])


def many(n):
    """n training studies, two a patient, and a study of each other split."""
    training = [(10000000 + i // 2, 51000000 + i, "train", [(f"d{i}", "PA")], {})
                for i in range(n)]
    return training + STUDIES[4:]


def test_the_sample_is_drawn_by_seed_alone_listed_and_nested(mimic, monkeypatch):
    monkeypatch.setattr(prepare_mimic.Path, "is_file", lambda path: True)
    studies = many(60)
    tables(mimic, studies)
    (mimic.parent / "ms_cxr_t.csv").write_text(
        "subject_id,study_id,dicom_id,previous_study_id,previous_dicom_id\n"
        "10000000,51000001,d1,51000000,d0\n")
    flags = ["--ms_cxr_t", mimic.parent / "ms_cxr_t.csv"]

    def drawn(n, seed):
        records, _ = prepare(mimic, *flags, "--sample", n, "--seed", seed)
        return [id for id, record in records.items() if record["split"] == "train"]

    twenty = drawn(20, 0)
    records, counts = prepare(mimic, *flags, "--sample", 20)
    pair = [f"files/p10/p10000000/s5100000{i}/d{i}.jpg" for i in (0, 1)]
    assert listed(mimic) == sorted([r["image"] for r in records.values()] + pair)
    assert len(listed(mimic)) == 20 + 2 + 2
    assert counts["train"] == 20 and counts["validate"] == counts["test"] == 1
    assert not {"s51000000", "s51000001"} & set(drawn(58, 0))
    tables(mimic, studies, shuffle=2)
    assert drawn(20, 0) == twenty != drawn(20, 1)
    assert set(drawn(10, 0)) < set(twenty)
    with pytest.raises(ValueError, match="--sample 59: expected at most the 58"):
        drawn(59, 0)


def test_the_list_is_there_before_the_films_are_and_is_all_that_has_to_be_fetched(mimic, script):
    """The tables are fetched first, the films are listed, and only those are fetched: those of all
    splits and of MS-CXR-T's pairs."""
    (mimic / "files").rename(mimic.parent / "elsewhere")
    studies, pairs = mimic.parent / "studies.jsonl", mimic.parent / "ms_cxr_t.csv"
    flags = ["--ms_cxr_t", pairs, "--sample", 1]
    out = script("tools/prepare_mimic.py", "--root", mimic, "--out", studies, *flags,
                 "--list_only", "--json").stdout
    counts, there = json.loads(out.splitlines()[-1]), listed(mimic)
    assert (counts["train"], counts["validate"], counts["test"]) == (1, 1, 1)
    assert not studies.exists()
    assert counts["films listed"] == len(there) == 8
    assert counts["of them in pairs of MS-CXR-T"] == 5 and FILMS_OF_PAIRS < set(there)
    (mimic.parent / "studies.images.txt").unlink()
    message = (r"8 of the 8 films that \S+/studies.images.txt names are missing in \S+/mimic, the "
               "first files/p10/")
    with pytest.raises(ValueError, match=message):
        prepare(mimic, *flags)
    assert listed(mimic) == there
    for film in there:
        (mimic / film).parent.mkdir(parents=True, exist_ok=True)
        (mimic.parent / "elsewhere" / film.removeprefix("files/")).rename(mimic / film)
    records, counts = prepare(mimic, *flags)
    assert {r["image"] for r in records.values()} == set(there) - FILMS_OF_PAIRS
    assert counts["films missing, studies left out"] == 0
    # as evaluate.py finds them
    rows = datasets.csv_columns(pairs, "subject_id", "study_id", "dicom_id")
    assert {datasets.mimic_image(mimic, row["dicom_id"], row["subject_id"], row["study_id"])
            for _, row in rows} < set(there)


def test_a_missing_film_of_ms_cxr_t_stops_and_skip_missing_counts_it(mimic):
    flags = ["--ms_cxr_t", mimic.parent / "ms_cxr_t.csv"]
    (mimic / "files/p11/p11000011/s50000009/before.jpg").unlink()
    message = (r"1 of the 9 films .* the first files/p11/p11000011/s50000009/before.jpg; fetch "
               "that list")
    with pytest.raises(ValueError, match=message):
        prepare(mimic, *flags)
    records, counts = prepare(mimic, *flags, "--skip_missing")
    assert len(records) == 4 and counts["films missing in pairs of MS-CXR-T"] == 1
    assert counts["films missing, studies left out"] == 0


def test_reports_come_by_section(mimic):
    reports = mimic.parent / "reports"
    records, counts = prepare(mimic, "--keep_ms_cxr_t", "--reports", reports)
    assert records["s50000001"]["report"] == "The lungs are clear."
    assert "report" not in records["s50000002"]
    assert counts["without a report"] == 3 and counts["reports without findings"] == 1
    both, _ = prepare(mimic, "--keep_ms_cxr_t", "--reports", reports / "files",
                      "--report_section", "both")
    assert both["s50000001"]["report"] == "The lungs are clear. No acute process."
    assert both["s50000002"]["report"] == "Tube in place."
    with pytest.raises(ValueError, match="holds none of the 5 reports"):
        prepare(mimic, "--keep_ms_cxr_t", "--reports", mimic)


def test_the_radiologists_test_labels_replace_the_labellers(mimic):
    names = ["Airspace Opacity" if f == "Lung Opacity" else f for f in FINDINGS]
    values = ["1.0" if name == "Airspace Opacity" else "0.0" for name in names]
    path = mimic / "mimic-cxr-2.1.0-test-set-labeled.csv"
    path.write_text(f"study_id,{','.join(names)}\n50000006,{','.join(values)}\n")
    records, _ = prepare(mimic, "--keep_ms_cxr_t", "--test_labels", path)
    assert records["s50000006"]["labels"] == {f: int(f == "Lung Opacity") for f in FINDINGS}
    assert records["s50000005"]["labels"] == {"Lung Opacity": 1}


def test_a_missing_film_stops_before_anything_is_written_or_is_left_out_and_counted(mimic):
    (mimic / "files/p12/p12000012/s50000005/v-pa.jpg").unlink()
    message = "1 of the 5 films .* the first files/.*s50000005/v-pa.jpg"
    with pytest.raises(ValueError, match=message):
        prepare(mimic, "--keep_ms_cxr_t")
    assert not (mimic.parent / "studies.jsonl").exists()
    records, counts = prepare(mimic, "--keep_ms_cxr_t", "--skip_missing")
    assert "s50000005" not in records and counts["films missing, studies left out"] == 1


@pytest.mark.parametrize("study, message", [
    ((10000032, 50000009, "test", [("x", "PA")], {}),
     "subject 10000032 is in (train and in test|test and in train)"),
    ((10000099, 50000009, "val", [("x", "PA")], {}),
     r"split.csv.gz:\d+: split 'val', expected train, validate, test"),
    ((10000099, 50000009, "test", [("x", "PA")], {"Edema": "2"}),
     r"chexpert.csv.gz:\d+: Edema: '2', expected 1, 0, -1 or nothing"),
    (("p1", 50000009, "test", [("x", "PA")], {}), r":\d+: s.*expected a number"),
])
def test_a_wrong_table_is_named_with_its_line(mimic, study, message):
    tables(mimic, [*STUDIES, study])
    with pytest.raises(ValueError, match=message):
        prepare(mimic, "--keep_ms_cxr_t")
    assert not (mimic.parent / "studies.jsonl").exists()


def test_the_command_prints_its_counts_and_says_what_is_not_there(script, mimic, tmp_path):
    out = script("tools/prepare_mimic.py", "--root", mimic, "--ms_cxr_t", tmp_path / "ms_cxr_t.csv",
                 "--sample", 2, "--out", tmp_path / "s.jsonl", "--json").stdout
    assert json.loads(out.splitlines()[-1])["train"] == 2
    assert "1 training studies of these, left out" in out and "s.images.txt: the 9 films" in out
    out = script("tools/prepare_mimic.py", "--root", tmp_path, "--keep_ms_cxr_t", expect=1).stdout
    assert "no mimic-cxr-2.0.0-metadata.csv*" in out and "Traceback" not in out
