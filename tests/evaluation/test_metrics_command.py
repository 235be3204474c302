"""`python -m metrics`, as a user runs it: from a copy of the folder alone, without any package."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_meteor import write_folder

from metrics.meteor import Meteor
from metrics.text import bleu, cider, clean_r2gen, rouge_l

HYPOTHESES = ["The heart is normal.", "1. No effusion. 2. No pneumothorax.", "", "Größe normal."]
REFERENCES = ["Heart size is normal.", "There is no pleural effusion. No pneumothorax.",
              "Lungs are clear.", "Die Größe ist normal."]
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A folder with a copy of metrics/ and, in `own`, METEOR's files with word lists of our own."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(ROOT / "metrics", folder / "metrics",
                    ignore=shutil.ignore_patterns("__pycache__"))
    write_folder(folder / "own")
    return folder


def python(folder, *command):
    """Runs Python in the folder with the standard library alone, without site-packages (-S)."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-S", *map(str, command)], cwd=folder,
                          env=env | {"PYTHONIOENCODING": "utf-8"}, capture_output=True,
                          encoding="utf-8", timeout=60, check=False)


def run_metrics(folder, *arguments):
    """`python -m metrics` with --json: the process and the {name: value} that it gave, or None."""
    done = python(folder, "-m", "metrics", *arguments, "--json")
    return done, json.loads(done.stdout.splitlines()[-1]) if done.stdout else None


def write(folder, hypotheses, references):
    """The paths of two files; lists become lines, dictionaries JSON, bytes remain as they are."""
    paths = []
    for name, texts in (("hyp", hypotheses), ("ref", references)):
        paths.append(folder / f"{name}.{'json' if isinstance(texts, dict) else 'txt'}")
        if not isinstance(texts, bytes):
            lines = json.dumps(texts) if isinstance(texts, dict) else "\n".join([*texts, ""])
            texts = lines.encode()
        paths[-1].write_bytes(texts)
    return paths


def test_every_file_of_the_copied_folder_works_without_any_package(copied):
    code = """if True:
        import sys
        from metrics import findings, meteor, phrases, scores, text
        assert findings.read_findings("No effusion.")["Pleural Effusion"].value == 0
        assert scores.accuracy([1], [1]) == 1
        assert text.bleu({1: ["x"]}, {1: ["x"]})
        assert meteor.Meteor("own").score({1: ["x"]}, {1: ["x"]}).corpus == 1
        holes = phrases.Phrases({"Holes": ["holes"]}, {"none": ["no {finding}"]})
        assert holes.read("No holes.") == {"Holes": ("none", "No holes.")}
        others = ("numpy", "torch", "data", "student")
        print(sorted(name for name in sys.modules if name.split(".")[0] in others))"""
    done = python(copied, "-c", code)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("clean, cleaned", [("r2gen", clean_r2gen), ("none", str)])
def test_text_files(copied, tmp_path, clean, cleaned):
    paths = write(tmp_path, HYPOTHESES, REFERENCES)
    done, values = run_metrics(copied, *paths, "--clean", clean, "--meteor", "own")
    assert done.returncode == 0, done.stderr
    hypotheses = {i: [cleaned(text)] for i, text in enumerate(HYPOTHESES)}
    references = {i: [cleaned(text)] for i, text in enumerate(REFERENCES)}
    expected = [*bleu(hypotheses, references).corpus,
                Meteor(copied / "own").score(hypotheses, references).corpus,
                rouge_l(hypotheses, references).corpus, cider(hypotheses, references).corpus]
    assert list(values) == NAMES and list(values.values()) == expected
    head, _, *rows, _ = done.stdout.splitlines()
    assert head.startswith("4 items, 4 references; ") and ("R2Gen" in head) == (clean == "r2gen")
    printed = [[name, f"{value:.4f}"] for name, value in zip(NAMES, expected)]
    assert [line.split() for line in rows] == printed


def test_cleaning_is_r2gens_unless_told_otherwise(copied, tmp_path):
    paths = write(tmp_path, ["THE HEART, IS NORMAL"], ["the heart is normal"])
    _, values = run_metrics(copied, *paths)
    assert values["ROUGE_L"] == pytest.approx(1)
    _, values = run_metrics(copied, *paths, "--clean", "none")
    assert values["ROUGE_L"] == 0


def test_json_files_with_several_references_in_another_order(copied, tmp_path):
    hypotheses = {"a": ["heart normal"], "b": ["no effusion"]}
    references = {"b": ["no pleural effusion", "no effusion"], "a": ["heart normal"]}
    done, values = run_metrics(copied, *write(tmp_path, hypotheses, references))
    assert "2 items, 3 references" in done.stdout and values["Bleu_1"] == pytest.approx(1)


def test_without_meteors_files_the_others_are_printed_and_meteor_is_refused(copied, tmp_path):
    done, values = run_metrics(copied, *write(tmp_path, HYPOTHESES, REFERENCES))
    assert done.returncode == 0 and list(values) == NAMES
    assert values["METEOR"] is None and values["ROUGE_L"] > 0
    for said in ("METEOR   not computed", "pip install pycocoevalcap", "--meteor FOLDER"):
        assert said in done.stdout


def test_a_last_line_without_line_end_crlf_and_a_byte_order_mark(copied, tmp_path):
    paths = write(tmp_path, "\ufeffheart normal\r\n\r\nclear lungs".encode(),
                  b"heart normal\n\nclear lungs\n")
    done, values = run_metrics(copied, *paths, "--clean", "none")
    assert "3 items" in done.stdout and values["Bleu_4"] < 1
    assert values["Bleu_1"] == pytest.approx(1)


@pytest.mark.parametrize("hypotheses, references, message", [
    (["x", "y"], ["x"], "hyp.txt has 2 lines, {}ref.txt has 1, expected line i against line i"),
    ({"a": ["x"]}, {"b": ["x"]},
     "hyp.json and {}ref.json: 1 ids without reference, the first is 'a'"),
    ({"a": ["x"]}, {"a": ["x"], "b": ["x"]},
     "hyp.json and {}ref.json: 1 ids without hypothesis, the first is 'b'"),
    ({"a": ["x", "y"]}, {"a": ["x"]},
     "hyp.json and {}ref.json: 'a' has 2 hypotheses instead of one"),
    ({"a": ["x"]}, {"a": []}, "hyp.json and {}ref.json: 'a' has no reference"),
    ({"a": "x"}, {"a": ["x"]},
     "hyp.json and {}ref.json: 'a': the hypothesis must be a list of strings"),
    ({"a": ["x"]}, ["x"],
     "hyp.json and {}ref.txt: either both are .json or both are text"),
    ({}, {"a": ["x"]}, "hyp.json: not JSON of the form {{id: [texts]}}"),
    (["x"], [], "ref.txt: empty, expected a text a line, or {{id: [texts]}} in a .json"),
    (["x"], b" \n\n", "ref.txt: empty, expected a text a line, or {{id: [texts]}} in a .json"),
    (["x", "y"], b"fine\nna\xefve\n", "ref.txt:2: not UTF-8 (byte 0xef)"),
])
def test_bad_input_is_named(copied, tmp_path, hypotheses, references, message):
    done, _ = run_metrics(copied, *write(tmp_path, hypotheses, references))
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"metrics: {tmp_path}/{message.format(f'{tmp_path}/')}\n"


@pytest.mark.parametrize("content, message", [
    (b'{"a": ["x"],}', "not JSON of the form {id: [texts]}: "),
    (b'[["x"]]', "not JSON of the form {id: [texts]}"),
    (b'{"a": ["x"], "a": ["y"]}', "the id 'a' is there twice"),
    (b"[" * 100_000, "not JSON of the form {id: [texts]}: "),
])
def test_bad_json_is_named(copied, tmp_path, content, message):
    (tmp_path / "hyp.json").write_bytes(content)
    (tmp_path / "ref.json").write_text('{"a": ["x"]}')
    done = python(copied, "-m", "metrics", tmp_path / "hyp.json", tmp_path / "ref.json")
    assert done.returncode == 1 and message in done.stderr
    assert done.stderr.startswith(f"metrics: {tmp_path}/hyp.json: ")
    assert done.stderr.count("\n") == 1


def test_a_missing_file_and_a_named_folder_without_meteor_are_errors(copied, tmp_path):
    paths = write(tmp_path, ["x"], ["x"])
    done = python(copied, "-m", "metrics", tmp_path / "none.txt", paths[1])
    assert done.returncode == 1 and "none.txt" in done.stderr and "Traceback" not in done.stderr
    done = python(copied, "-m", "metrics", *paths, "--meteor", tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert "pip install pycocoevalcap" in done.stderr
    assert f"Missing in {tmp_path}: meteor-1.5.jar" in done.stderr


def test_help_names_every_flag(copied):
    done = python(copied, "-m", "metrics", "--help")
    for flag in ("--clean {none,r2gen}", "--meteor FOLDER", "--json"):
        assert flag in done.stdout
