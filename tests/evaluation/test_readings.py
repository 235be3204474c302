"""What is read in the small texts that teachers and radiologists write, and in every layout.

tests/data/readings.jsonl has a case a line: {"kind", "task", "text", "expect": {finding: class,
null where nothing is said, or a list of what may be read}}. The layouts are made here: every
assignment of classes to the findings of a task, in every form in which models answer.
"""

import itertools
import json
from pathlib import Path

import pytest

import data
from evaluation.datasets import PROGRESSION

FOLDER = Path(__file__).resolve().parents[1] / "data"
LEAVES = {
    "name": "leaves",
    "findings": {"Spots": ["spots", "speckles"], "Holes": ["holes"]},
    "classes": {"none": ["no {finding}", "{finding} are absent"],
                "few": ["few {finding}", "{finding} are rare"],
                "many": ["many {finding}", "{finding} are frequent"]},
    "positive": ["few", "many"],
    "prompts": {"student": "What?", "teacher": "{diseases}", "compare": "{readers}"}}
TASKS = {"chest": data.CHEST, "progression": PROGRESSION,
         "leaves": data.make_task(LEAVES, "leaves.json"),
         "retina": data.load_task(FOLDER / "retina.json")}
CASES = [json.loads(line)
         for line in (FOLDER / "readings.jsonl").read_text(encoding="utf-8").splitlines()]


KINDS = list(dict.fromkeys(case["kind"] for case in CASES))


def test_there_are_many_cases_of_every_kind():
    kinds = [case["kind"] for case in CASES]
    assert len(KINDS) == 14 and len(CASES) > 900 and min(map(kinds.count, KINDS)) >= 25


@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_every_kind_are_read_right(kind):
    wrong = []
    for case in (case for case in CASES if case["kind"] == kind):
        read = data.read_classes(case["text"], TASKS[case["task"]])
        for finding, value in case["expect"].items():
            if read.get(finding) not in (value if isinstance(value, list) else [value]):
                wrong.append((case["text"], finding, read.get(finding), value))
    assert not wrong


# ------------------------------------------------------------------------------------- layouts

def as_lines(pairs):
    """Layouts of [(finding, class)] with a finding a line or an item."""
    numbered = list(enumerate(pairs, 1))
    return {
        "lines": "\n".join(f"{f}: {c}" for f, c in pairs),
        "commas": ", ".join(f"{f}: {c}" for f, c in pairs),
        "semicolons": "; ".join(f"{f.lower()}: {c}" for f, c in pairs) + ".",
        "bullets": "\n".join(f"- **{f}**: {c}" for f, c in pairs),
        "bold labels": "\n".join(f"* **{f}:** {c.capitalize()}." for f, c in pairs),
        "numbered": "\n".join(f"{i}. {f} - {c}" for i, (f, c) in numbered),
        "numbered )": "\n".join(f"{i}) {f} – {c}" for i, (f, c) in numbered),
        "headings": "\n\n".join(f"## {f}\n{c.capitalize()}, as the image shows." for f, c in pairs),
        "bold headings": "\n\n".join(f"**{f}**\n\n{c}" for f, c in pairs),
        "blocks": "\n\n".join(f"### {f}\n- Where: center\n- Grade: {c}" for f, c in pairs),
        "named blocks": "\n\n".join(f"Finding: {f}\nGrade: {c}" for f, c in pairs),
        "arrows": "\n".join(f"{f} -> {c}" for f, c in pairs),
        "equals": "\n".join(f"{f} = {c}" for f, c in pairs)}


def as_objects(pairs):
    """JSON layouts of [(finding, class)]."""
    dump = json.dumps
    return {
        "object": dump(dict(pairs)),
        "lower case": dump({f.lower(): c for f, c in pairs}),
        "list": dump([{"finding": f, "grade": c} for f, c in pairs]),
        "with confidence": dump([{"label": f, "severity": c, "confidence": .7} for f, c in pairs]),
        "nested": dump({"findings": {f: {"grade": c, "where": "center"} for f, c in pairs}}),
        "fenced": f"Here you are:\n```json\n{dump(dict(pairs), indent=1)}\n```\nI hope this helps.",
        "object a line": "\n".join(dump({"name": f, "status": c}) for f, c in pairs),
        "a comma a line": "\n".join(f'"{f}": "{c}",' for f, c in pairs),
        "single quotes": str(dict(pairs))}


def as_tables(pairs):
    """Table layouts of [(finding, class)]."""
    rows = "\n".join(f"| {f} | {c} |" for f, c in pairs)
    return {
        "rows": f"| Finding | Grade |\n|---|---|\n{rows}",
        "with evidence": "| Finding | Grade | Evidence |\n|:--|:-:|--:|\n" + "\n".join(
            f"| **{f}** | {c} | seen in the center |" for f, c in pairs),
        "empty cells": "\n".join(f"| {f} | | {c} |" for f, c in pairs),
        "numbered rows": "| # | Finding | Grade |\n|---|---|---|\n" + "\n".join(
            f"| {i} | {f} | {c} |" for i, (f, c) in enumerate(pairs, 1)),
        "columns": "".join(f"| {' | '.join(row)} |\n" for row in (
            [f for f, _ in pairs], ["---"] * len(pairs), [c for _, c in pairs])),
        "no outer bars": "Finding | Grade\n--- | ---\n" + "\n".join(f"{f} | {c}" for f, c in pairs)}


def as_classes(pairs, classes):
    """Layouts of [(finding, class)] in which the class comes first, or is ticked."""
    of = {c: [f for f, value in pairs if value == c] for c in classes}
    said = {c: names for c, names in of.items() if names}
    ticks = "\n".join(f"| {f} | " + " | ".join("x" * (c == value) for c in classes) + " |"
                      for f, value in pairs)
    return {
        "class first": "\n".join(f"{c.capitalize()}: {f.lower()}" for f, c in pairs),
        "class object": json.dumps(said),
        "class sentences": " ".join(f"{c.capitalize()}: {', '.join(fs)}."
                                    for c, fs in said.items()),
        "class lists": "\n".join(f"{c.capitalize()}:\n" + "\n".join(f"- {f}" for f in fs)
                                 for c, fs in said.items()),
        "ticks": f"| Finding | {' | '.join(classes)} |\n|---|---|\n{ticks}"}


def as_prose(pairs, phrases):
    """Sentences of [(finding, class)]; phrases: {class: text with {f}}."""
    parts = [phrases[c].format(f=f.lower()) for f, c in pairs]
    return {
        "beside": ", ".join(f"{f} {c}" for f, c in pairs),
        "in brackets": ", ".join(f"{f} ({c})" for f, c in pairs),
        "brackets and": " and ".join(f"{f} ({c})" for f, c in pairs),
        "prose, commas": f"The image shows {', '.join(parts)}.",
        "prose, and": f"{' and '.join(parts)}.",
        "prose, comma and": f"{', '.join(parts[:-1])}, and {parts[-1]}.",
        "prose, sentences": " ".join(f"{part.capitalize()}." for part in parts),
        "prose, while": f"{parts[0].capitalize()}, while {' and '.join(parts[1:])}.",
        "prose, but": f"{parts[0].capitalize()}, but {' but '.join(parts[1:])}.",
        "prose, semicolons": "; ".join(parts),
        "prose, lines": "\n".join(parts)}


@pytest.mark.parametrize("name, findings", [
    ("leaves", {"Spots": "Spots", "Holes": "Holes"}),
    ("retina", {"Hemorrhages": "Hemorrhage", "Exudates": "Exudate", "Drusen": "Drusen"})])
def test_a_task_is_read_in_every_layout(name, findings):
    task, wrong = TASKS[name], []
    before = {"none": "no {f}", **{c: f"{c} {{f}}" for c in task.classes[1:]}}
    behind = {"leaves": {"none": "{f} are absent", "few": "{f} are rare",
                         "many": "{f} are frequent"},
              "retina": {"none": "{f} are absent", "mild": "{f} are mild",
                         "severe": "{f} look severe"}}[name]
    for classes in itertools.product(task.classes, repeat=len(findings)):
        pairs = list(zip(findings, classes))
        expected = {findings[f]: c for f, c in pairs}
        for layout, text in itertools.chain(
                as_lines(pairs).items(), as_objects(pairs).items(), as_tables(pairs).items(),
                as_classes(pairs, task.classes).items(), as_prose(pairs, before).items(),
                as_prose(pairs, behind).items()):
            if (read := data.read_classes(text, task)) != expected:
                wrong.append((layout, text, read))
    assert not wrong


ANSWERS = [("yes", "no"), ("present", "absent"), ("positive", "negative"),
           ("Present", "Not present"), ("true", "false"), ("seen", "not seen")]


@pytest.mark.parametrize("yes, no", ANSWERS)
def test_the_chest_task_is_read_in_every_layout(yes, no):
    wrong = []
    for values in itertools.product((1, 0), repeat=3):
        expected = dict(zip(("Edema", "Pneumothorax", "Pleural Effusion"), values))
        pairs = [(f, yes if value else no) for f, value in expected.items()]
        layouts = {**as_lines(pairs), **as_objects(pairs), **as_tables(pairs)}
        if yes in ("present", "positive"):
            layouts["in brackets"] = ", ".join(f"{f} ({c})" for f, c in pairs)
            layouts["ticks"] = as_classes(pairs, (yes, no))["ticks"]
        for layout, text in layouts.items():
            read = data.read_classes(text, data.CHEST)
            if any(read.get(f) != value for f, value in expected.items()):
                wrong.append((layout, text, read))
    assert not wrong


@pytest.mark.parametrize("name", ["finding", "label", "name", "diagnosis", "condition",
                                  "finding_name", "Disease"])
@pytest.mark.parametrize("state", ["present", "is_present", "detected", "isDetected", "status",
                                   "value", "found", "verdict", "observed", "positive"])
def test_json_is_read_whatever_its_keys_are_called(name, state):
    values = {"Edema": True, "Pneumothorax": False, "Pleural Effusion": True}
    for text in (json.dumps([{name: f, state: value} for f, value in values.items()]),
                 json.dumps({"findings": [{name: f, state: "yes" if value else "no", "score": 0.8}
                                          for f, value in values.items()]})):
        read = data.read_classes(text, data.CHEST)
        assert {f: read.get(f) for f in values} == {f: int(value) for f, value in values.items()}


@pytest.mark.parametrize("text, answer", [
    ("<think>Is there edema?</think>No edema.", "No edema."),
    ("<think>\nA\n</think>\n\nNo edema.\n", "No edema."),
    ("Is it edema? Maybe.</think> No edema.", "No edema."),
    ("<think>Is it edema? And then it was cut", ""),
    ("<THINKING>x</THINKING> No edema.", "No edema."),
    ("◁think▷x◁/think▷No edema.", "No edema."),
    ("[THINK]x[/THINK]No edema.", "No edema."),
    ("<think>a</think>First. <think>b</think>Second.", "First. Second."),
    ("<|begin_of_box|>No edema.<|end_of_box|>", "No edema."),
    ("<think>x</think><answer>No edema.</answer>", "No edema."),
    ("<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>No edema.",
     "No edema."),
    ("<think></think>", ""),
    ("No edema.<|end|>", "No edema.<|end|>"),  # an end token, which check.py names
    (" Pressure < 5 [1]. No edema. ", " Pressure < 5 [1]. No edema. "),
])
def test_thinking_is_not_the_answer(text, answer):
    assert data.answer_of(text) == answer
    assert data.is_refusal(text, data.CHEST) is (not answer)
    assert data.read_classes(text, data.CHEST).get("Edema") == (0 if "edema." in answer else None)


def test_what_decided_is_named():
    read = data.read_with_words("Spots: many. The leaf has no holes, I think.", TASKS["leaves"])
    assert read == {"Spots": ("many", "Spots: many. The leaf has no holes, I think."),
                    "Holes": ("none", "The leaf has no holes, I think.")}
    read = data.read_with_words("Lungs are clear. No effusion.", data.CHEST)
    assert read["Pleural Effusion"] == (0, "No effusion.")
