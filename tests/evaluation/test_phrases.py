"""The reader of a task's phrases, metrics/phrases.py.

tests/test_data.py holds what a whole task.json reads in a text, tests/runtime/test_fuzz.py that any
words and phrases compile; here is what these leave open.
"""

import pytest

from metrics.phrases import compile_phrases, read_phrases

FINDINGS = {"Effusion": ["effusion", "fluid"], "Pericardial": ["pericardial effusion"],
            "Overload": ["fluid overload"]}
CLASSES = {"no": ["no {finding}", "{finding} * absent"], "yes": ["{finding} * present"]}


@pytest.fixture(scope="module")
def compiled():
    return compile_phrases(FINDINGS, CLASSES)


def test_the_example_of_the_docstring():
    compiled = compile_phrases({"Holes": ["holes"]},
                               {"none": ["no {finding}"], "many": ["many {finding}"]})
    assert read_phrases("Many holes.", compiled) == {"Holes": "many"}


def test_findings_classes_and_phrases_keep_their_order(compiled):
    assert [(finding, value) for finding, value, _ in compiled] == [
        (finding, value) for finding in FINDINGS for value in ("no", "no", "yes")]


@pytest.mark.parametrize("text, expected", [
    ("no effusion", {"Effusion": "no"}),
    ("pericardial effusion present", {"Pericardial": "yes"}),  # another's word that ends alike
    ("fluid overload present", {"Overload": "yes"}),           # one that begins alike
    ("fluid present", {"Effusion": "yes"}),
    ("fluid overloads present", {"Effusion": "yes"}),          # not the other's word, only like it
    ("No pericardial effusion, but effusion present", {"Pericardial": "no", "Effusion": "yes"}),
])
def test_a_word_is_not_found_inside_another_findings_word(compiled, text, expected):
    assert read_phrases(text, compiled) == expected


@pytest.mark.parametrize("end", [".", ";", "|"])
def test_a_phrase_ends_with_its_clause(compiled, end):
    assert read_phrases(f"no{end} effusion", compiled) == {}
    assert read_phrases(f"effusion{end} all present", compiled) == {}


@pytest.mark.parametrize("between", [" ", ", ", ": ", "\n", " - "])
def test_a_phrase_goes_on_over_other_marks(compiled, between):
    assert read_phrases(f"effusion{between}present", compiled) == {"Effusion": "yes"}


def test_of_two_mentions_at_one_place_the_shorter_decides(compiled):
    assert read_phrases("effusion present, absent", compiled) == {"Effusion": "yes"}
    assert read_phrases("effusion absent, present", compiled) == {"Effusion": "no"}


def test_a_task_of_one_finding_has_no_others():
    compiled = compile_phrases({"A": ["spot"]}, {"many": ["many * {finding}"]})
    assert read_phrases("many small round spot", compiled) == {"A": "many"}
