"""The reader of a task's phrases, metrics/phrases.py.

test_readings.py holds what the two readers take from many texts, tests/runtime/test_fuzz.py that
any words and phrases compile; here is what these leave open.
"""

import json
import re
import time
from pathlib import Path

import pytest

import data
from metrics.phrases import Phrases

FINDINGS = {"Effusion": ["effusion", "fluid"], "Pericardial": ["pericardial effusion"],
            "Overload": ["fluid overload"]}
CLASSES = {"no": ["no {finding}", "{finding} * absent"], "yes": ["{finding} * present"]}
DOCS = Path(__file__).resolve().parents[2] / "docs" / "data.md"


@pytest.fixture(scope="module")
def read():
    phrases = Phrases(FINDINGS, CLASSES)
    return lambda text: {finding: value for finding, (value, _) in phrases.read(text).items()}


def test_the_example_of_the_docstring():
    phrases = Phrases({"Spots": ["spots"], "Holes": ["holes"]},
                      {"none": ["no {finding}", "{finding} are absent"],
                       "many": ["many {finding}"]})
    assert phrases.read("There are many spots. No holes.") == {
        "Spots": ("many", "There are many spots."), "Holes": ("none", "No holes.")}


@pytest.mark.parametrize("text, expected", [
    ("no effusion", {"Effusion": "no"}),
    ("pericardial effusion present", {"Pericardial": "yes"}),  # another's word that ends alike
    ("fluid overload present", {"Overload": "yes"}),           # one that begins alike
    ("fluid present", {"Effusion": "yes"}),
    ("fluid overloads present", {"Effusion": "yes"}),          # not the other's word, only like it
    ("No pericardial effusion, but effusion present", {"Pericardial": "no", "Effusion": "yes"}),
])
def test_a_word_is_not_found_inside_another_findings_word(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize("end", [".", ";"])
def test_a_phrase_ends_with_its_clause(read, end):
    assert read(f"no{end} effusion") == {}
    assert read(f"effusion{end} all present") == {}


@pytest.mark.parametrize("between", [" ", ", ", ": ", "\n", " - ", " | ", " -> ", " ("])
def test_a_class_beside_its_finding_is_read_over_other_marks(read, between):
    assert read(f"effusion{between}present") == {"Effusion": "yes"}


def test_of_two_mentions_at_one_place_the_shorter_decides(read):
    assert read("effusion present, absent") == {"Effusion": "yes"}
    assert read("effusion absent, present") == {"Effusion": "no"}


def test_a_star_is_at_most_four_words():
    phrases = Phrases({"A": ["spot"]}, {"many": ["many * {finding}"]})
    assert phrases.read("many small round dark brown spot")["A"][0] == "many"
    assert phrases.read("many small round dark brown old spot") == {}


def test_a_phrase_may_name_the_finding_twice_and_a_text_may_hold_any_character():
    phrases = Phrases({"A": ["spot"]}, {"many": ["{finding} beside {finding}"]})
    assert phrases.read("a spot beside a \x000\x00 \x007\x00 spot") == {}
    assert phrases.read("\x00spot\x00 beside spot")["A"][0] == "many"


@pytest.mark.parametrize("text, expected", [
    ("Spots: yes, holes: no", {"Spots": "present", "Holes": "absent"}),
    ('{"Spots": true, "Holes": false}', {"Spots": "present", "Holes": "absent"}),
    ('[{"name": "Spots", "present": true}]', {"Spots": "present"}),
])
def test_yes_and_no_are_the_only_class_that_is_or_is_not_positive(text, expected):
    two = Phrases({"Spots": ["spots"], "Holes": ["holes"]},
                  {"absent": ["{finding} absent"], "present": ["{finding} present"]}, ["present"])
    three = Phrases({"Spots": ["spots"], "Holes": ["holes"]},
                    {"absent": ["{finding} absent"], "few": ["few {finding}"],
                     "many": ["many {finding}"]}, ["few", "many"])
    read = lambda phrases: {finding: value for finding, (value, _) in phrases.read(text).items()}
    assert read(two) == expected
    assert read(three) == {f: value for f, value in expected.items() if value == "absent"}


def rows_of_docs():
    """[(text, what is read)] of the table in docs/data.md."""
    docs = DOCS.read_text(encoding="utf-8").partition("| a text (")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \| .* \|$", docs, re.MULTILINE)
    assert len(rows) == docs.count("\n") - 1
    return [(text.replace("⏎", "\n").replace("\\|", "|"), said) for text, said in rows]


def test_docs_say_what_a_phrase_reaches():
    spec = re.search(r"^    (\{\"name\": \"leaves\",.*?\n)\n", DOCS.read_text(encoding="utf-8"),
                     re.MULTILINE | re.DOTALL)
    task = data.make_task(json.loads(spec[1]), "docs/data.md")
    rows = rows_of_docs()
    assert len(rows) >= 12
    for text, said in rows:
        wanted = dict(pair.split(" ") for pair in said.split(", ")) if said != "-" else {}
        assert data.read_classes(text, task) == wanted, text


@pytest.mark.parametrize("piece", [
    "spots, ", "no spots and ", "spots: many, ", "| spots ", "{", "[[", "many - ", "spots\n",
    "not ", "many spots here, ", "many many ", ", and ", "{'a': ", "{'a': }",
    "spots\na: b\n", "a: b\n"])
def test_reading_takes_time_in_proportion(piece):
    phrases = Phrases(
        {"Spots": ["spots"], "Holes": ["holes"]},
        {"none": ["no * {finding}"], "many": ["many * {finding}", "{finding} * many"]})
    seconds = []
    for size in (20_000, 80_000):
        start = time.process_time()
        phrases.read(piece * (size // len(piece)))
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0] + 0.5
