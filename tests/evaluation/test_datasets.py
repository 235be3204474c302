"""The public datasets as they lie on disk: small files in exactly their formats, with the traps of
the real ones."""

import gzip
import json

import numpy as np
import pytest
from PIL import Image

import data
from evaluation import datasets


def film(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64), dtype=np.uint8)).save(
        path)
    return path


def labels_of(bench):
    return {study.id: study.labels for study in bench.studies}


# ------------------------------------------------------------------------------ MS-CXR-T, MIMIC-CXR

MS_HEAD = ("subject_id,pneumothorax_progression,study_id,dicom_id,previous_study_id,"
           "previous_dicom_id,consolidation_progression,edema_progression,"
           "pleural_effusion_progression,pneumonia_progression,edema_label_quality")
MS_ROWS = ("10002428,,55758034,p10/p10002428/s55758034/3bea0373-a,"
           "50000001,p10/p10002428/s50000001/11112222-b,improving,,Stable,,\n"
           # bare ids, written as floats
           "10000032.0,worsening,50414267.0,02aa804e-c,"
           "50000002.0,1dead000-d,,stable,,,multiple_experts\n"
           "10002428,,55758034,p10/p10002428/s55758034/3bea0373-a,"
           "50000003,p10/p10002428/s50000003/33334444-e,,,improving,,\n")
FILMS = ("p10/p10002428/s55758034/3bea0373-a", "p10/p10002428/s50000001/11112222-b",
         "p10/p10002428/s50000003/33334444-e", "p10/p10000032/s50414267/02aa804e-c",
         "p10/p10000032/s50000002/1dead000-d")
CHEXPERT_HEAD = ("subject_id,study_id,Atelectasis,Cardiomegaly,Consolidation,Edema,"
                 "Enlarged Cardiomediastinum,Fracture,Lung Lesion,Lung Opacity,No Finding,"
                 "Pleural Effusion,Pleural Other,Pneumonia,Pneumothorax,Support Devices")


def write_ms_cxr_t(folder):
    """The csv of MS-CXR-T beside MIMIC-CXR-JPG: two subjects, three pairs, their five films."""
    (folder / "ms.csv").write_text(f"{MS_HEAD}\n{MS_ROWS}")
    with gzip.open(folder / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt") as file:
        file.write(f"{CHEXPERT_HEAD}\n10002428,55758034,,,1.0,0.0,,,,,,-1.0,,,0.0,\n"
                   "10000032,50414267,,,0.0,1.0,,,,,,1.0,,0.0,1.0,\n")
    for seed, name in enumerate(FILMS):
        film(folder / "files" / f"{name}.jpg", seed)
    return ["--ms_cxr_t", folder / "ms.csv", "--chexpert_csv",
            folder / "mimic-cxr-2.0.0-chexpert.csv.gz", "--images", folder]


def test_progression_has_the_earlier_film_first_and_the_files_own_labels(tmp_path):
    write_ms_cxr_t(tmp_path)
    bench = datasets.with_images(datasets.ms_cxr_t(tmp_path / "ms.csv", tmp_path, "progression"))
    assert [study.images for study in bench.studies] == [
        ("files/p10/p10002428/s50000001/11112222-b.jpg",
         "files/p10/p10002428/s55758034/3bea0373-a.jpg"),
        ("files/p10/p10000032/s50000002/1dead000-d.jpg",
         "files/p10/p10000032/s50414267/02aa804e-c.jpg"),
        ("files/p10/p10002428/s50000003/33334444-e.jpg",
         "files/p10/p10002428/s55758034/3bea0373-a.jpg")]
    assert [study.labels for study in bench.studies] == [
        {"Consolidation": "improving", "Pleural Effusion": "stable"},
        {"Pneumothorax": "worsening", "Edema": "stable"}, {"Pleural Effusion": "improving"}]
    assert bench.missing == [] and bench.task.classes == ("improving", "stable", "worsening")


def test_the_folder_may_also_be_files_itself(tmp_path):
    write_ms_cxr_t(tmp_path)
    bench = datasets.with_images(
        datasets.ms_cxr_t(tmp_path / "ms.csv", tmp_path / "files", "progression"))
    assert len(bench.studies) == 3
    assert bench.studies[1].images[1] == "p10/p10000032/s50414267/02aa804e-c.jpg"


@pytest.mark.parametrize("blank, first, left_out", [
    ("exclude", {"Consolidation": 1, "Edema": 0, "Pneumothorax": 0}, 2),
    ("negative", {"Consolidation": 1, "Edema": 0, "Pneumothorax": 0, "Pneumonia": 0}, 1)])
def test_presence_takes_the_studys_chexpert_labels_once_a_film(tmp_path, blank, first, left_out):
    write_ms_cxr_t(tmp_path)
    bench = datasets.ms_cxr_t(tmp_path / "ms.csv", tmp_path, "presence",
                              tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", blank)
    # the film that is in two pairs counts once; -1 never counts
    assert [study.labels for study in bench.studies] == [
        first,
        {"Consolidation": 0, "Edema": 1, "Pleural Effusion": 1, "Pneumonia": 0, "Pneumothorax": 1}]
    assert all(len(study.images) == 1 for study in bench.studies)
    assert bench.notes[0].startswith(f"{left_out} labels left out")


def test_a_study_without_labels_and_a_film_that_is_not_there_are_named(tmp_path):
    write_ms_cxr_t(tmp_path)
    (tmp_path / "files" / f"{FILMS[3]}.jpg").unlink()
    (tmp_path / "chexpert.csv").write_text(
        f"{CHEXPERT_HEAD}\n10000032,50414267,,,0.0,1.0,,,,,,1.0,,0.0,1.0,\n")
    bench = datasets.with_images(
        datasets.ms_cxr_t(tmp_path / "ms.csv", tmp_path, "presence", tmp_path / "chexpert.csv"))
    assert bench.studies == [] and len(bench.missing) == 2
    assert bench.missing[0].startswith("study 55758034: not in")
    assert "02aa804e-c.jpg: no such image" in bench.missing[1]


@pytest.mark.parametrize("change, message", [
    (("improving", "better"),
     r"ms.csv:2: 'better', expected improving, stable, worsening or nothing"),
    (("10000032.0", "p10000032"), r"ms.csv:3: subject_id: 'p10000032', expected a number"),
    (("edema_progression", "Edema"),
     r"ms.csv:1: expected one column 'edema_progression', found subject_id, "),
    (("previous_dicom_id", "dicom_id"), r"ms.csv:1: expected one column 'dicom_id'"),
    (("50000003,p10/p10002428/s50000003/33334444-e", "50000001,p10/p10002428/s50000001/11112222-b"),
     r"ms.csv:4: the pair .* is there twice")])
def test_a_malformed_ms_cxr_t_names_file_and_line(tmp_path, change, message):
    write_ms_cxr_t(tmp_path)
    path = tmp_path / "ms.csv"
    path.write_text(path.read_text().replace(*change))
    with pytest.raises(ValueError, match=message):
        datasets.ms_cxr_t(path, tmp_path, "progression")


@pytest.mark.parametrize("text, course",
                         [("The edema has improved.", {"Edema": "improving"}),
                          ("Stable small pleural effusions", {"Pleural Effusion": "stable"}),
                          ("Pneumothorax: worsening. Consolidation: stable.",
                           {"Pneumothorax": "worsening", "Consolidation": "stable"}),
                          ("Increased left effusion; pneumonia is unchanged",
                           {"Pleural Effusion": "worsening", "Pneumonia": "stable"}),
                          ("No change.", {})])
def test_the_course_is_read_from_a_text(text, course):
    assert data.read_classes(text, datasets.PROGRESSION) == course


REPORT = ("                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n \n"
          " INDICATION:  ___ year old woman with cough, NOTE: not a header\n \n"
          " TECHNIQUE:  Chest PA and lateral\n \n COMPARISON:  None.\n \n"
          " FINDINGS: \n \n The lungs are clear.\n No effusion.\n \n"
          " IMPRESSION: \n \n No acute process.\n")


def test_a_report_is_cut_at_its_headers():
    parts = datasets.report_sections(REPORT)
    assert list(parts) == ["preamble", "examination", "indication", "technique", "comparison",
                           "findings", "impression"]
    assert parts["findings"].split() == "The lungs are clear. No effusion.".split()
    assert parts["impression"].strip() == "No acute process."
    assert parts["comparison"].strip() == "None." and "NOTE: not a header" in parts["indication"]


@pytest.mark.parametrize("text, section, expected", [
    ("\n CONCLUSION: \n \n Normal.\n", "impression", "Normal."),
    ("\n FINDINGS AND IMPRESSION: \n Clear.\n", "impression", "Clear."),
    ("\n PORTABLE CHEST: \n Clear lungs.\n", "findings", "Clear lungs."),
    ("\n CHEST, TWO VIEWS: \n Clear lungs.\n", "findings", "Clear lungs."),
    # the later one counts
    ("\n FINDINGS: first\n \n IMPRESSION: one\n \n IMPRESSION: two\n", "impression", "two"),
    ("\n FINDINGS: \n \n IMPRESSION: Clear.\n", "impression", "Clear."),
    ("\n COMPARISON:  ___.\n \n The heart is large.\n \n Else normal.\n", "last_paragraph",
     "The heart is large.\n \n Else normal."),
    (" WET READ\n \n Lungs are clear.\n", "last_paragraph", "Lungs are clear.")])
def test_sections_by_other_names(text, section, expected):
    assert datasets.report_sections(text)[section].strip() == expected


@pytest.mark.parametrize("header, name", [
    ("FINDING", "findings"), ("FINDNGS", "findings"), ("FINIDNGS", "findings"),
    ("RIBS", "findings"), ("LEFT RIBS AND CHEST", "findings"), ("BONE WINDOWS", "findings"),
    ("TWO VIEWS", "findings"), ("AP VIEW", "findings"), ("PA AND LAT", "findings"),
    ("FRONTAL UPRIGHT", "findings"), ("REFERENCE FINDINGS", "findings"),
    ("VIEWS", "views"), ("UPRIGHT", "upright"), ("AP", "ap"), ("LATERAL", "lateral"),
    ("RADIOGRAPH", "radiograph"), ("PA", "pa"),
    ("IMPRESSON", "impression"), ("FINDINGS/IMPRESSION", "impression"), ("MPRESSION", "impression"),
    ("COMPARISIONS", "comparison"), ("PRIOR COMPARISON FILM", "comparison"),
    ("REASON FOR EXAM", "indication"), ("CLINICAL HISTORY", "history"), ("WETREAD", "wet read"),
    ("TYPE OF EXAMINATION", "examination"), ("RECOMMENDATION(S)", "recommendations"),
    ("SUMMARY", "summary"), ("TECHNIQUE", "technique")])
def test_headers_are_called_as_the_reference_parser_calls_them(header, name):
    assert name in datasets.report_sections(f"\n {header}: \n said\n")


def test_an_empty_findings_section_is_none():
    assert "findings" not in datasets.report_sections("\n FINDINGS: \n \n IMPRESSION: Clear.\n")


def write_mimic_reports(folder):
    """MIMIC-CXR-JPG with split, metadata and films, and the report files: four test studies, one of
    them lateral only, one silent."""
    studies = {("10000032", "50414267"): [("bbbb", "PA"), ("aaaa", "AP"), ("cccc", "LATERAL")],
               ("10000032", "53189527"): [("dddd", "LATERAL")],
               ("10000764", "57375967"): [("eeee", "AP")],
               ("10000898", "50771383"): [("ffff", "PA")],
               ("11000000", "50000000"): [("gggg", "PA")]}
    split = ["dicom_id,study_id,subject_id,split"]
    metadata = ["dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition"]
    for (subject, study), films in studies.items():
        for dicom, view in films:
            split.append(f"{dicom},{study},{subject},{'train' if dicom == 'gggg' else 'test'}")
            metadata.append(f'{dicom},{subject},{study},"CHEST (PA, LAT)",{view}')
            film(folder / f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg", ord(dicom[0]))
    for name, lines in (("split", split), ("metadata", metadata)):
        with gzip.open(folder / f"mimic-cxr-2.0.0-{name}.csv.gz", "wt") as file:
            file.write("\n".join(lines) + "\n")
    for path, text in (("p10/p10000032/s50414267", REPORT),
                       ("p10/p10000764/s57375967", " FINAL REPORT\n IMPRESSION:  Pneumonia.\n")):
        file = folder / f"reports/files/{path}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return ["--reports", folder / "reports", "--images", folder]


def test_report_files_give_one_frontal_film_a_study_and_their_findings(tmp_path):
    write_mimic_reports(tmp_path)
    bench = datasets.with_images(datasets.mimic_reports(tmp_path / "reports", tmp_path))
    (study,) = bench.studies
    assert study.id == "s50414267" and study.report == "The lungs are clear. No effusion."
    assert study.images == ("files/p10/p10000032/s50414267/bbbb.jpg",)  # PA before AP
    assert len(bench.missing) == 1 and "s50771383.txt: no such report" in bench.missing[0]
    assert bench.notes == ["1 studies left out without a frontal film, 1 without findings"]
    both = datasets.mimic_reports(tmp_path / "reports", tmp_path, section="both").studies
    assert [s.report for s in both] == ["The lungs are clear. No effusion. No acute process.",
                                        "Pneumonia."]


def write_annotation(folder):
    reports = ("The heart is mildly enlarged. No effusion.",
               "1. Clear lungs.\n 2. No pneumothorax.", "Left basal pneumonia.")
    items = [{"id": f"dicom-{i}", "study_id": 50414267 + i, "subject_id": 10000032, "report": text,
              "split": "test", "image_path": [f"p10/p10000032/s{50414267 + i}/dicom-{i}.jpg"]}
             for i, text in enumerate(reports)]
    (folder / "annotation.json").write_text(
        json.dumps({"train": [], "val": items[:1], "test": items}))
    for seed, item in enumerate(items):
        film(folder / "files" / item["image_path"][0], seed)
    return ["--annotation", folder / "annotation.json", "--images", folder / "files"]


def test_r2gens_annotation_calls_validate_val(tmp_path):
    write_annotation(tmp_path)
    path = tmp_path / "annotation.json"
    (validate,) = datasets.annotation(path, ".", "validate").studies
    assert validate.report == "The heart is mildly enlarged. No effusion."
    tested = datasets.annotation(path, ".").studies
    assert [study.id for study in tested] == ["dicom-0", "dicom-1", "dicom-2"]
    path.write_text(path.read_text().replace(
        '"image_path": ["p10/p10000032/s50414268/dicom-1.jpg"]', '"image_path": "x.jpg"'))
    with pytest.raises(ValueError, match=r"annotation.json: test\[1\]: expected"):
        datasets.annotation(path, ".")


# ---------------------------------------------------------------------------------------- zero-shot

def write_open_i(folder):
    """Two reports with images, the second with an image that is not there, and one without."""
    def report(number, automatic, images):
        terms = "".join(f"<automatic>{term}</automatic>" for term in automatic)
        parents = "".join(f'<parentImage id="{name}"><figureId>F1</figureId></parentImage>'
                          for name in images)
        return (f'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><meta type="rr"/>'
                f'<uId id="CXR{number}"/><MedlineCitation><Article><Abstract>'
                '<AbstractText Label="FINDINGS"/><AbstractText Label="IMPRESSION">x</AbstractText>'
                "</Abstract></Article></MedlineCitation>"
                f"<MeSH><major>Pneumonia/lung</major>{terms}</MeSH>{parents}</eCitation>")
    (folder / "ecgen-radiology").mkdir(parents=True)
    reports = (
        (1, ["granuloma, calcified", "Calcified Granuloma"],
         ["CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"]),
        (2, ["atelectases", "Pleural Thickening", "infiltrates"],
         ["CXR2_IM-0652-1001", "CXR2_IM-0652-2001"]),
        (3, [], []))
    for number, automatic, images in reports:
        (folder / "ecgen-radiology" / f"{number}.xml").write_text(report(number, automatic, images))
    there = ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001", "CXR2_IM-0652-1001")
    for seed, name in enumerate(there):
        film(folder / "NLMCXR_png" / f"{name}.png", seed)
    return folder


def test_open_i_labels_are_substrings_of_the_automatic_terms(tmp_path):
    bench = datasets.open_i(write_open_i(tmp_path))
    positive = {key: [name for name, value in labels.items() if value]
                for key, labels in labels_of(bench).items()}
    assert positive == {  # 'Pneumonia' is major, not automatic
        "CXR1_1_IM-0001-3001.png": ["Calcified Granuloma", "Granuloma"],
        "CXR1_1_IM-0001-4001.png": ["Calcified Granuloma", "Granuloma"],
        "CXR2_IM-0652-1001.png": ["Atelectasis", "Infiltration", "Pleural_Thickening"]}
    assert bench.missing == ["CXR2_IM-0652-2001.png: of 2.xml, no such image"]
    assert bench.notes == ["1 reports have no image"]
    (tmp_path / "ecgen-radiology" / "4.xml").write_text("<eCitation>")
    with pytest.raises(ValueError, match="4.xml: not an XML file"):
        datasets.open_i(tmp_path)


def write_chestx_ray14(folder):
    (folder / "Data_Entry_2017.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
        "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],\n"
        "00000001_000.png,Cardiomegaly|Emphysema,000,1,058Y,M,PA,2682,2749,0.143,0.143,\n"
        "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,\n"
        "00000003_000.png,Pleural_Thickening,0,3,81,F,PA,2500,2048,0.171,0.171,\n")
    (folder / "test_list.txt").write_text(
        "00000001_000.png\n00000002_000.png\n00000009_000.png\n00000003_000.png")
    there = ("images_001/images/00000001_000.png", "images_002/images/00000002_000.png")
    for seed, name in enumerate(there):
        film(folder / name, seed)
    return folder


def test_chestx_ray14_reads_past_headers_with_commas_in_brackets(tmp_path):
    bench = datasets.chestx_ray14(write_chestx_ray14(tmp_path))
    assert [[name for name, value in labels.items() if value]
            for labels in labels_of(bench).values()] == [["Cardiomegaly", "Emphysema"], []]
    assert bench.studies[1].images == ("images_002/images/00000002_000.png",)
    first, second = bench.missing
    assert first.startswith("00000009_000.png:") and second.startswith("00000003_000.png:")
    assert "no row in Data_Entry_2017" in first and "no such image" in second
    table = tmp_path / "Data_Entry_2017.csv"
    table.write_text(table.read_text().replace("|Emphysema", "|Emphysem"))
    with pytest.raises(ValueError, match="Data_Entry_2017.csv:2: unknown finding 'Emphysem'"):
        datasets.chestx_ray14(tmp_path)


def test_a_test_list_with_labels_in_it_needs_no_csv(tmp_path):
    (tmp_path / "test_list.txt").write_text("images/00000001_000.png 0 1 0 0 0 0 0 0 0 0 0 0 1 0\n")
    film(tmp_path / "images" / "00000001_000.png")
    (study,) = datasets.chestx_ray14(tmp_path).studies
    positive = [name for name, value in study.labels.items() if value]
    assert positive == ["Cardiomegaly", "Pleural_Thickening"]
    assert len(study.labels) == 14
    (tmp_path / "test_list.txt").write_text("00000001_000.png 0 1 0\n")
    with pytest.raises(ValueError, match="test_list.txt:1: 3 labels, expected 14 or none"):
        datasets.chestx_ray14(tmp_path)


def write_chexpert(folder, per_study=False):
    """valid.csv, per image, or the test set's groundtruth.csv, per study; three studies, the second
    with two views."""
    values = {"patient64541/study1": "1.0,0.0,0.0,1.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0",
              "patient64542/study1": "0,0,1,0,0,0,1,0,1,0,0,0,0,1",
              "patient64543/study1": "0,0,0,0,0,-1,,0,0,0,0,0,0,0"}
    names = ",".join(datasets.CHEXPERT)
    split = "test" if per_study else "valid"
    views = {study: ["view1_frontal.jpg"] for study in values}
    views["patient64542/study1"] = ["view1_frontal.jpg", "view2_lateral.jpg"]
    if per_study:
        lines = [f"Study,{names}"]
        lines += [f"CheXpert-v1.0/test/{study},{text}" for study, text in values.items()]
    else:
        lines = [f"Path,Sex,Age,Frontal/Lateral,AP/PA,{names}"]
        lines += [f"CheXpert-v1.0-small/valid/{study}/{view},Male,68,Frontal,AP,{text}"
                  for study, text in values.items() for view in views[study]]
    folder.mkdir(exist_ok=True)
    (folder / ("groundtruth.csv" if per_study else "valid.csv")).write_text("\n".join(lines) + "\n")
    for seed, (study, some) in enumerate(views.items()):
        for view in some:
            film(folder / split / study / view, seed)
    return folder


@pytest.mark.parametrize("per_study", [False, True])
def test_chexpert_labels_are_per_image_or_per_study(tmp_path, per_study):
    bench = datasets.chexpert(write_chexpert(tmp_path / "CheXpert-v1.0-small", per_study))
    split = "test" if per_study else "valid"
    assert [study.id for study in bench.studies] == [
        f"{split}/{view}"
        for view in ("patient64541/study1/view1_frontal.jpg",
                     "patient64542/study1/view1_frontal.jpg",
                     "patient64542/study1/view2_lateral.jpg",
                     "patient64543/study1/view1_frontal.jpg")]
    groups = ["patient64541/study1", "patient64542/study1", "patient64542/study1",
              "patient64543/study1"]
    groups = [f"{split}/{group}" for group in groups]
    assert [study.record["group"] for study in bench.studies] == groups
    assert bench.studies[1].labels == bench.studies[2].labels
    assert bench.studies[1].labels["Consolidation"] == 1
    # -1 and blank
    assert {"Edema", "Consolidation"} & set(bench.studies[3].labels) == set()
    assert bench.missing == []
    (tmp_path / "CheXpert-v1.0-small" / split / "patient64541/study1/view1_frontal.jpg").unlink()
    assert "patient64541/study1" in datasets.chexpert(tmp_path / "CheXpert-v1.0-small").missing[0]


def write_chestx_det10(folder):
    (folder / "test_data").mkdir(parents=True)
    (folder / "test.json").write_text(json.dumps([
        {"file_name": "36302.png", "syms": ["Effusion", "Effusion", "Mass"],
         "boxes": [[799, 666, 937, 761], [1, 2, 3, 4], [5, 6, 7, 8]]},
        {"file_name": "36303.png", "syms": [], "boxes": []},
        {"file_name": "36304.png", "syms": ["Nodule"], "boxes": [[1, 2, 3, 4]]}]))
    for seed, name in enumerate(("36302.png", "36303.png")):
        film(folder / "test_data" / name, seed)
    return folder


def test_chestx_det10_counts_a_finding_once_and_none_as_negative(tmp_path):
    bench = datasets.chestx_det10(write_chestx_det10(tmp_path))
    assert [[name for name, value in labels.items() if value]
            for labels in labels_of(bench).values()] == [["Effusion", "Mass"], []]
    assert len(bench.missing) == 1 and bench.missing[0].startswith("36304.png")
    film(tmp_path / "train_data" / "36302.png")
    with pytest.raises(ValueError, match="36302.png has the same name"):
        datasets.chestx_det10(tmp_path)


# --------------------------------------------------------------------------------------- the reader

def test_columns_are_found_by_name_in_a_file_with_a_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufeffb,a\r\n1,\"x, y\"\r\n\r\n2,z\r\n".encode())
    assert list(datasets.csv_columns(path, "a", "b")) == [
        (2, {"a": "x, y", "b": "1"}), (4, {"a": "z", "b": "2"})]
    path.write_text("a,b\n1\n")
    with pytest.raises(ValueError, match="a.csv:2: 1 fields, expected 2"):
        list(datasets.csv_columns(path, "a", "b"))
    path.write_text("")
    with pytest.raises(ValueError, match="a.csv:1: expected one column 'a', found nothing"):
        list(datasets.csv_columns(path, "a"))


@pytest.mark.parametrize("text, value", [("1.0", 1), ("0", 0), ("-1.0", -1), ("", None)])
def test_labels_may_be_written_as_floats(text, value):
    assert datasets.label(text, "x") == value and type(datasets.label(text, "x")) is type(value)


@pytest.mark.parametrize("text", ["2", "nan", "yes", "0.5"])
def test_no_other_label_is_taken(text):
    with pytest.raises(ValueError, match=r"x.csv:3: .*expected 1, 0, -1 or nothing"):
        datasets.label(text, "x.csv:3")


def test_an_image_that_is_no_image_is_missing_and_a_study_there_twice_is_an_error(tmp_path):
    film(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("<html>404</html>")
    bench = datasets.Benchmark("x", data.CHEST, tmp_path,
                               [data.Study(name, (f"{name}.png",), {}, {}) for name in "ab"])
    assert [study.id for study in datasets.with_images(bench).studies] == ["a"]
    assert "b.png: not a readable image" in bench.missing[0]
    bench.studies *= 2
    with pytest.raises(ValueError, match="a is there twice"):
        datasets.with_images(bench)
