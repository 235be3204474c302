"""Bad input: every message that a command can end with, what it says, with which status, and that
nothing was touched.

A case is files, a command and the end of what it prints on stderr. `test_every_message_has_a_case`
finds the messages in the sources and asks of each that a case reached it, or that ELSEWHERE names
the test that does.
"""

import ast
import contextlib
import fcntl
import functools
import gc
import gzip
import importlib
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
import sys
import traceback
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import test_datasets as dataset_files
import test_meteor
import test_prepare_mimic
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file

import apo
import data
import student
import training
from evaluation import datasets
from metrics import findings, scores, text
from runtime import ranks
from scale_model import world as scale_world

sys.path.insert(0, str(ROOT / "tools"))

# command -> (module, the name that its messages begin with)
COMMANDS = {
    "spd.py": ("spd", "learn"), "selfdistill.py": ("selfdistill", "compare"),
    "apo.py": ("apo", "critique"), "evaluate.py": ("evaluate", "evaluate"),
    "scale_model": ("scale_model.__main__", "scale_model"),
    "experiment": ("experiment.__main__", "experiment"),
    "metrics": ("metrics.__main__", "metrics"), "tools/check.py": ("check", "check"),
    "tools/answers.py": ("answers", "answers"), "tools/collect.py": ("collect", "collect"),
    "tools/convert.py": ("convert", "convert"), "tools/drift.py": ("drift", "drift"),
    "tools/prepare_mimic.py": ("prepare_mimic", "prepare_mimic"),
    "tools/report.py": ("report", "report"),
}

# whose start takes seconds, since they import torch; of these apo.py alone is started by python
SLOW = ("spd.py", "selfdistill.py", "evaluate.py", "scale_model", "experiment", "tools/answers.py",
        "tools/drift.py")


@dataclass
class Case:
    """A command, what it is given and what it says of that.

    command  run in a folder of its own
    says     the end of stderr; '...' is anything, {here} the folder
    files    what is in the folder beside GOOD: bytes, text, an object as JSON, a list of lines,
             None for a file that is not there, or a function that makes it
    status   the exit status
    """
    command: str
    says: str
    files: dict = field(default_factory=dict)
    status: int = 1


# a stage's claim on its folder, which it makes when it has read all records; a folder with no more
# than this was not begun
CLAIM = {"out", "out/.lock", "out/args.json", "out/env.json", "out/too_long.jsonl",
         "out/broken.jsonl"}


@dataclass
class Outcome:
    """What a case did.

    status         the exit status
    sites          (file, line) of the project's lines in the tracebacks of its exceptions
    before, after  what `snapshot` says of the folder `here`
    """
    status: object
    stderr: str
    stdout: str
    sites: frozenset
    before: dict
    after: dict
    here: Path


# --------------------------------------------------------------------------------------- the folder

TASK = {
    "name": "two", "findings": {"Effusion": ["effusion"], "Edema": ["edema"]}, "positive": ["mild"],
    "classes": {"absent": ["no {finding}"], "mild": ["mild {finding}"]},
    "prompts": {
        "student": "describe", "teacher": "why {diseases}?", "compare": "{readers}\ncompare"},
    "refusals": ["i cannot"]}


def record(id, /, **changes):
    """A line of studies.jsonl without a fault; None takes a key away."""
    good = {
        "id": id, "image": "film.png", "labels": {"Effusion": "mild"},
        "trajectories": {"u": f"mild effusion, {id}", "w": "no edema"}, "report": "mild effusion",
        "split": "train", **changes}
    return {key: value for key, value in good.items() if value is not None}


def films(path):
    Image.effect_noise((56, 56), 60).save(path, "PNG")


def truncated(path):
    """A film whose header can be read, and no more."""
    films(path)
    path.write_bytes(path.read_bytes()[:-200])


HELD = []


def locked(path):
    """A file that another run holds: to flock, each opening of a file is another one."""
    path.touch()
    HELD.append(open(path))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)


def a_link(path):
    """A link to the student, which is to stay as it is."""
    path.symlink_to(path.parent.with_name("student"))


def student_without_a_weight(path):
    shutil.copytree(path.with_name("student"), path)
    weights = load_file(path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


def broken_student(path):
    """A copy of the student, of whose weights the end is missing."""
    shutil.copytree(path.with_name("student"), path)
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def prepared(folder):
    """MIMIC-CXR-JPG with its films."""
    test_prepare_mimic.tables(folder, test_prepare_mimic.STUDIES)
    for subject, study, _, images, _ in test_prepare_mimic.STUDIES:
        for dicom, _ in images:
            dataset_files.film(
                folder / f"files/p{str(subject)[:2]}/p{subject}/s{study}/{dicom}.jpg")


GOOD = {
    "task.json": TASK,
    "studies.jsonl": [*(record(id) for id in "abcd"), record("e", split="test")],
    "positives.jsonl": [{"id": id, "t_plus": "mild effusion"} for id in "abcd"],
    "film.png": films,
}


def as_line(content):
    """A line of a file: bytes as they are, a text or an object as JSON with a line's end."""
    if isinstance(content, bytes):
        return content
    return (content if isinstance(content, str) else json.dumps(content)).encode() + b"\n"


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.unlink(missing_ok=True)
        elif callable(content):
            content(path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, list):
            path.write_bytes(b"".join(map(as_line, content)))
        else:
            path.write_text(json.dumps(content))


def lay(folder, base, case):
    """What a case finds in its folder."""
    (folder / "student").symlink_to(base)
    write(folder, GOOD | case.files)


def snapshot(folder):
    """{name: (bytes, mtime)} of every file, None for a folder; not of what is in the student's."""
    content = lambda path: (path.read_bytes(), path.lstat().st_mtime_ns) if path.is_file() else None
    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob("*"))}


def sites_of(error):
    """(file, line) of the project's lines in the tracebacks of an exception and of those that it
    replaced."""
    found, seen = set(), set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for frame, line in traceback.walk_tb(error.__traceback__):
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(ROOT):
                found.add((str(path.relative_to(ROOT)), line))
        error = error.__cause__ or error.__context__
    return found


def call(command):
    """main() of a command in this process and in this folder -> (status, stdout, stderr, sites)."""
    script, *flags = shlex.split(command)
    module, sites, status = importlib.import_module(COMMANDS[script][0]), set(), 0
    out, err = io.StringIO(), io.StringIO()
    with (mock.patch.object(sys, "argv", [script, *flags]), contextlib.redirect_stdout(out),
          contextlib.redirect_stderr(err)):
        try:
            module.main()
        except SystemExit as end:
            sites = sites_of(end)
            status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
    return status, out.getvalue(), err.getvalue(), sites


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    """run(case) -> its Outcome; a case runs once."""
    done = {}

    def outcome(case):
        if id(case) not in done:
            here = tmp_path_factory.mktemp("case")
            lay(here, base, case)
            before = snapshot(here)
            with contextlib.chdir(here):
                status, out, err, sites = call(case.command)
            done[id(case)] = case, Outcome(
                status, err, out, frozenset(sites), before, snapshot(here), here)
        return done[id(case)][1]

    with mock.patch.dict(os.environ, A_TEST_KEY="a-test-key-0"):
        # a stage collects what its run leaves, and need not look through all libraries each time
        gc.freeze()
        yield outcome
        gc.unfreeze()


def as_expression(says, here):
    """A case's message as a regular expression."""
    return ".*".join(map(re.escape, says.replace("{here}", str(here)).split("...")))


def is_said(case, done):
    """Whether stderr ends with the case's message, behind the command's name, or behind argparse's
    usage."""
    _, name = COMMANDS[case.command.split()[0]]
    behind_name, behind_usage = rf"(?:\A|\n){re.escape(name)}: ", r"\A(?:.*\n)?usage: .*: error: "
    begin = behind_usage if case.status == 2 else behind_name
    message = as_expression(case.says, done.here)
    return re.search(rf"{begin}{message}\n\Z", done.stderr, re.DOTALL) is not None


# ---------------------------------------------------------------------------------------- the cases

class Table(dict):
    """{name: case}, where no case takes the place of another."""

    def __setitem__(self, name, case):
        assert name not in self, name
        super().__setitem__(name, case)


CASES = Table()

RECORDS = "--studies studies.jsonl --task_file task.json"
STAGE = f"{RECORDS} --student student --output_dir out"
EVALUATE = "--student student --no-bf16"


def add(name, command, table):
    """table: {what: (flags, files, message)} or (files, message), for one command line."""
    for what, (*flags, files, says) in table.items():
        CASES[f"{name}: {what}"] = Case(" ".join([command, *flags]), says, files)


def index(content):
    """Files of a student with such an index of its weights."""
    return {"other/config.json": {"model_type": "qwen2_5_vl"},
            "other/model.safetensors.index.json": json.dumps(content)}


def studies(*lines):
    """Files whose studies.jsonl has a good first line and these below."""
    return {"studies.jsonl": [record("a"), *lines]}


def task(**changes):
    return {"task.json": {**TASK, **changes}}


# case 16 of a robust reader, and what else is no line of JSON: bytes of the second line, what is
# said of it behind FILE:2
BAD_LINES = {
    "truncated": (
        b'{"id": "b", "image": "film.p', "not a JSON object in UTF-8: Unterminated string..."),
    "byte-order mark": (
        b'\xef\xbb\xbf{"id": "b", "image": "film.png"}',
        "not a JSON object in UTF-8: ... (a UTF-8 byte-order mark; save the file without it)"),
    "latin-1": (
        b'{"id": "r\xf6ntgen"}',
        "not a JSON object in UTF-8: 'utf-8' codec can't decode byte 0xf6 ..."),
    "NaN": (b'{"id": NaN}', "not a JSON object in UTF-8: NaN is not JSON"),
    "deep nesting": (b'{"id": ' + b"[" * 100_000, "not a JSON object in UTF-8: ..."),
    "nested 102 deep": (
        b'{"id": ' + b"[" * 101 + b"]" * 101 + b"}",
        "not a JSON object in UTF-8: nested deeper than 100"),
    "5,000 digits": (
        b'{"id": ' + b"1" * 5000 + b"}",
        "not a JSON object in UTF-8: Exceeds the limit (4300 digits)..."),
    "lone surrogate": (
        rb'{"id": "\ud800"}', "not a JSON object in UTF-8: ...surrogates not allowed"),
    "the same key twice": (
        b'{"id": "b", "id": "c"}', "not a JSON object in UTF-8: the same key twice in one object"),
    "a list": (b"[1]", "expected a JSON object, found list"),
}
# case 17: tools/check.py's kind, the second line, what is said of it
BAD_RECORDS = {
    "no id": (
        "field", record("b", id=None),
        '"id": expected a non-empty string without control characters'),
    "no path of an image": (
        "field", record("b", image=None),
        '"image": expected a path or a list of two paths, without control characters'),
    "three images": (
        "field", record("b", image=["film.png"] * 3),
        '"image": expected a path or a list of two paths, without control characters'),
    "labels as a list": (
        "label", record("b", labels=["Edema"]), '"labels": expected an object {finding: class}'),
    "unknown finding": (
        "label", record("b", labels={"Oedema": "mild"}),
        "\"labels\": unknown finding 'Oedema', expected one of Effusion, Edema"),
    "unknown class": (
        "label", record("b", labels={"Edema": 1}),
        "\"labels\": Edema is 1, expected one of 'absent', 'mild'"),
    "trajectories as a list": (
        "trajectory", record("b", trajectories=["x"]),
        '"trajectories": expected an object {teacher: text}'),
    "empty teacher": (
        "trajectory", record("b", trajectories={"u": " "}),
        "\"trajectories\": 'u' is empty or no text, expected words"),
    "report as a number": ("field", record("b", report=1), '"report": expected a string'),
    "split as a list": ("field", record("b", split=["train"]), '"split": expected a string'),
    "t+ as an object": ("field", record("b", t_plus={}), '"t_plus": expected a string'),
    "the same id twice": (
        "duplicate", record("a"), "\"id\": 'a' is in line 1 already, expected it once"),
    "a name that rings the bell": (
        "trajectory", record("b", trajectories={"u\a": "x"}),
        "\"trajectories\": 'u\\x07': expected a name without control characters"),
}
# every command that reads studies.jsonl
READERS = {
    "spd.py": f"spd.py {STAGE}", "selfdistill.py": f"selfdistill.py {STAGE}",
    "apo.py": f"apo.py {STAGE} --positives positives.jsonl",
    "spd.py --dry_run": f"spd.py {STAGE} --dry_run",
    "evaluate.py classify": f"evaluate.py classify {RECORDS} {EVALUATE} --output out.json",
    "evaluate.py teachers": f"evaluate.py teachers {RECORDS} --output out.json",
    "tools/answers.py": f"tools/answers.py {RECORDS} --student student --output out.jsonl",
    "tools/collect.py": "tools/collect.py studies.jsonl --endpoints endpoints.json "
                        "--task_file task.json --out out.jsonl",
    "tools/convert.py trl": f"tools/convert.py trl {RECORDS} --positives positives.jsonl "
                            "--out out.jsonl",
    "tools/drift.py": f"tools/drift.py {RECORDS} --output out.json",
}
ENDPOINTS = {"endpoints.json": {"u": {"url": "http://127.0.0.1:9", "model": "m"}}}

for reader, command in READERS.items():
    for what, (line, says) in BAD_LINES.items():
        CASES[f"{reader}: {what}"] = Case(
            command, f"studies.jsonl:2: {says}", studies(line) | ENDPOINTS)
    for what, (_, line, says) in BAD_RECORDS.items():
        CASES[f"{reader}: {what}"] = Case(
            command, f"studies.jsonl:2: {says}", studies(line) | ENDPOINTS)
    CASES[f"{reader}: U+2028 is no line end"] = Case(
        command, 'studies.jsonl:3: "id": expected a non-empty string without control characters',
        studies(
            json.dumps(record("b", report="one\u2028two\x85three"), ensure_ascii=False),
            {"image": "film.png"}) | ENDPOINTS)
    CASES[f"{reader}: twenty faults and more"] = Case(
        command, 'studies.jsonl:2: "id": expected a non-empty string without control characters\n'
                 '...\n... and 5 more',
        studies(*[record("b", id=None)] * 25) | ENDPOINTS)
    CASES[f"{reader}: an empty file"] = Case(
        command, "studies.jsonl: no study..., expected at least one",
        {"studies.jsonl": ""} | ENDPOINTS)
for command in (READERS["apo.py"], READERS["tools/convert.py trl"]):
    for what, (line, says) in BAD_LINES.items():
        files = {"positives.jsonl": [{"id": "a", "t_plus": "x"}, line]}
        CASES[f"{command.split()[0]}: positives, {what}"] = Case(
            command, f"positives.jsonl:2: {says}", files)

add("spd.py", READERS["spd.py"], {
    "no task file": (
        "--task_file none.json", {}, "[Errno 2] No such file or directory: 'none.json'"),
    "task, no JSON": ({"task.json": "{"}, "task.json: not a JSON file: Expecting property name..."),
    "task, a list": ({"task.json": "[]"}, "task.json: expected a JSON object"),
    "task, no findings": (
        task(findings={}), 'task.json: expected "findings": an object of lists of words'),
    "task, a finding without words": (
        task(findings={"Edema": []}),
        'task.json: expected "findings": an object of lists of words'),
    "task, a name of no letters": (task(name=3), 'task.json: expected "name": a name'),
    "task, a finding that rings the bell": (
        task(findings={"Edema\a": ["edema"]}),
        'task.json: expected names without control characters in "findings"'),
    "task, too many gaps": (
        task(classes={"mild": ["* * * * {finding}"]}),
        'task.json: expected at most three * in a phrase of "classes"'),
    "task, a phrase of 21 words": (
        task(classes={"mild": ["{finding} " * 21]}),
        'task.json: expected at most 20 words in a phrase of "classes"'),
    "task, no classes": (
        task(classes=None), 'task.json: expected "classes": an object of lists of words'),
    "task, no prompts": (
        task(prompts=None),
        'task.json: expected "prompts": an object with the texts "student", "teacher", "compare"'),
    "task, teachers not told": (
        task(prompts={**TASK["prompts"], "teacher": "why?"}),
        'task.json: expected "{diseases}" in prompts.teacher'),
    "task, nothing to compare": (
        task(prompts={**TASK["prompts"], "compare": "x"}),
        'task.json: expected "{readers}" in prompts.compare'),
    "task, a question about nothing": (
        task(prompts={**TASK["prompts"], "question": "x"}),
        "task.json: expected a text with {finding} as prompts.question"),
    "task, a phrase without its finding": (
        task(classes={"mild": ["mild"]}),
        'task.json: expected every phrase of "classes" to contain the word {finding}'),
    "task, positive as a number": (
        task(positive=1), 'task.json: expected "positive": a list of words'),
    "task, refusals as a text": (
        task(refusals="no"), 'task.json: expected "refusals": a list of words'),
    "task, an unknown positive class": (
        task(positive=["huge"]), 'task.json: expected "positive": some of the classes'),
    "no studies": (
        "--studies none.jsonl", {},
        "--studies none.jsonl: missing; one JSON object a line, see data.py"),
    "no student": (
        "--student none", {},
        "--student none: missing; name a Qwen2.5-VL folder or hub id, such as "
        "Qwen/Qwen2.5-VL-7B-Instruct"),
    "another family": (
        "--student other", {"other/config.json": {"model_type": "llama"}},
        "--student other is a llama, expected a Qwen2.5-VL (qwen2_5_vl) of any size. For another "
        "family ..."),
    "a student whose config is no object": (
        "--student other", {"other/config.json": "[]"},
        "--student other: its config.json is no JSON object or is nested too deeply, expected that "
        "of a Qwen2.5-VL"),
    "a student whose config is nested without an end": (
        "--student other", {"other/config.json": "[" * 9999},
        "--student other: its config.json is no JSON object or is nested too deeply, expected that "
        "of a Qwen2.5-VL"),
    "an index without anything": (
        "--student other", index({}),
        'other/model.safetensors.index.json: "metadata": expected an object, as in the index of a '
        "saved model"),
    "an index that is a list": (
        "--student other", index([[]]),
        'other/model.safetensors.index.json: "metadata": expected an object, as in the index of a '
        "saved model"),
    "an index without metadata": (
        "--student other", index({"weight_map": {"a": "a.safetensors"}}),
        'other/model.safetensors.index.json: "metadata": expected an object, as in the index of a '
        "saved model"),
    "an index whose map is none": (
        "--student other", index({"metadata": {}, "weight_map": ["a.safetensors"]}),
        'other/model.safetensors.index.json: "weight_map": expected an object, as in the index of '
        "a saved model"),
    "an index without a weight": (
        "--student other", index({"metadata": {}, "weight_map": {}}),
        'other/model.safetensors.index.json: "weight_map" is empty, expected {tensor: its file}'),
    "an index that leads out of its folder": (
        "--student other", index({"metadata": {}, "weight_map": {"a": "../a.safetensors"}}),
        "other/model.safetensors.index.json: names '../a.safetensors', expected files in its own "
        "folder"),
    "a quantised student": (
        "--student other", {"other/config.json": {
            "model_type": "qwen2_5_vl", "quantization_config": {"quant_method": "awq"}}},
        "--student other is quantised (awq), expected the folder or hub id of the same model "
        "unquantised, whose config.json has no quantization_config"),
    "a folder without a model": ("--student other", {"other/x": ""},
            "--student other is a model without a model_type, expected a Qwen2.5-VL (qwen2_5_vl) "
            "of any size. For another family ..."),
    "a config that is no JSON": (
        "--student other", {"other/config.json": "{"},
        "--student other: expected the folder or hub id of a Qwen2.5-VL: ...other/config.json' is "
        "not a valid JSON file."),
    "no study of the split": (
        "--split validate", {},
        "studies.jsonl: no study of split 'validate', expected at least one"),
    "an unknown teacher": ("--teachers u,x", {}, "--teachers x: expected some of u, w"),
    "an unknown part": (
        "--train all", {},
        "--train all: expected some of lora, merger, decoder, vision, and not both lora and "
        "decoder"),
    "parts that exclude each other": (
        "--train lora,decoder", {},
        "--train lora,decoder: expected some of lora, merger, decoder, vision, and not both lora "
        "and decoder"),
    "a batch that does not divide": (
        "--global_batch 3 --micro_batch 2", {},
        "--global_batch 3: expected a multiple of 1 ranks x --micro_batch 2"),
    "fewer studies than a batch": (
        "--global_batch 5", {}, "4 studies: expected at least one --global_batch of 5"),
    "nothing but refusals": (
        "--refusals drop",
        {"studies.jsonl": [record(i, trajectories={"u": "I cannot say"}) for i in "abcd"]},
        "studies.jsonl: no study has trajectories, expected the teachers' texts"),
    "no study that fits": (
        "--max_tokens 9", {}, "0 studies: expected at least one --global_batch of 4"),
    "no room for a response beside image and prompt": (
        "--max_length 9", {}, "0 studies: expected at least one --global_batch of 4"),
    "a replay with two texts of a study": (
        "--replay replay.jsonl",
        {"replay.jsonl": [*(record(id, trajectories={"u": "x"}) for id in "abc"), record("d")]},
        "replay.jsonl: expected one trajectory in each record, and at least --replay_rows 3 "
        "records"),
    "a replay without a text": (
        "--replay replay.jsonl",
        {"replay.jsonl": [record(id, trajectories=None) for id in "abc"]},
        "replay.jsonl: expected one trajectory in each record, and at least --replay_rows 3 "
        "records"),
    "a replay of too few records": (
        "--replay replay.jsonl",
        {"replay.jsonl": [record(id, trajectories={"u": "x"}) for id in "ab"]},
        "replay.jsonl: expected one trajectory in each record, and at least --replay_rows 3 "
        "records"),
    "a replay that is no file": (
        "--replay none.jsonl", {}, "[Errno 2] No such file or directory: 'none.jsonl'"),
    "another run": (
        {"out/.lock": locked},
        "out: another run holds out/.lock; wait for it or choose another --output_dir"),
    "a lock that is a link": (
        {"out/.lock": a_link}, "out/.lock: found a link, expected a regular file"),
    "a lock that is a pipe": (
        {"out/.lock": os.mkfifo}, "out/.lock: found a pipe, expected a regular file"),
    "a student that is a link": (
        {"out/student": a_link},
        "out/student: found a link, expected a folder that a run has written; remove it, or choose "
        "another --output_dir"),
    "a log that is a pipe": (
        "--resume never", {"out/log.jsonl": os.mkfifo},
        "out/log.jsonl: found a pipe, expected a regular file that a run has written; remove it, "
        "or choose another --output_dir"),
    "a student of somebody else": (
        "--resume never", {"out/student/model.safetensors": "x"},
        "out/student: is there, but out has no args.json of a run that wrote it; expected another "
        "--output_dir"),
    "a student that lacks a weight": (
        "--student broken", {"broken": student_without_a_weight},
        "--student broken: expected the weights that its config.json describes, found that "
        "model.language_model.norm.weight is missing"),
    "a run of other settings": (
        {"out/args.json": {"seed": 1}, "out/step-000001/x": ""},
        "out: was begun with other settings, choose another --output_dir:\n...\n  seed: 1 there, 0 "
        "here\n..."),
    "a run of another batch": (
        {"out/args.json": "{", "out/step-000001/x": ""}, "out/args.json: not a JSON file: ..."),
    "a student whose weights end": (
        "--student broken", {"broken": broken_student},
        "--student broken: expected its weights as safetensors: Error while deserializing header: "
        "..."),
    "a student without weights": (
        "--student broken", {"broken": broken_student, "broken/model.safetensors": None},
        "--student broken: expected its weights as safetensors: ...no file named "
        "model.safetensors..."),
    "a student without a tokenizer": (
        "--student broken", {"broken": broken_student, "broken/tokenizer.json": "{"},
        "--student broken: expected the tokenizer and image processor of a Qwen2.5-VL: ..."),
})
CASES["spd.py: an empty path"] = Case(
    f"{READERS['spd.py']} --replay ''", "--replay: empty, expected a text, such as a path",
    status=2)
CASES["spd.py: --micro_batch -1"] = Case(
    f"{READERS['spd.py']} --micro_batch=-1",
    "argument --micro_batch: '-1', expected a whole number, 0 or more", status=2)
CASES["spd.py: --learning_rate 0"] = Case(
    f"{READERS['spd.py']} --learning_rate 0",
    "argument --learning_rate: '0', expected a number above 0", status=2)
CASES["spd.py: two warm-ups"] = Case(
    f"{READERS['spd.py']} --warmup_ratio 0.05",
    "--warmup_steps 20 with --warmup_ratio 0.05: expected one of them, and 0 for the other where "
    "--preset paper sets it", status=2)
CASES["spd.py: --seed -1"] = Case(
    f"{READERS['spd.py']} --seed=-1",
    "argument --seed: '-1', expected a whole number from 0 to 2**63 - 1", status=2)
CASES["spd.py: a cosine upwards"] = Case(
    f"{READERS['spd.py']} --learning_rate 1e-5 --min_learning_rate 2e-5",
    "--min_learning_rate 2e-05: expected at most --learning_rate 1e-05, where the cosine begins",
    status=2)
for flag in ("logging_steps", "save_steps", "lora_r", "max_tokens", "max_length", "max_steps"):
    CASES[f"spd.py: --{flag} 0"] = Case(
        f"{READERS['spd.py']} --{flag} 0",
        f"argument --{flag}: '0', expected a whole number of at least 1", status=2)
REPLAYED = {"replay.jsonl": [record(i, trajectories={"u": "x " * 200}) for i in "pqr"]}
add("spd.py", f"{READERS['spd.py']} --replay replay.jsonl", {
    "a long row to replay": (
        "--max_tokens 200", REPLAYED,
        "replay.jsonl: 'p' takes ... tokens, expected at most --max_tokens 200"),
    "a long sequence to replay": (
        "--max_length 200 --truncate", REPLAYED,
        "replay.jsonl: 'p' takes ... tokens, expected at most --max_length 200"),
    "a row to replay without its film": (
        {"replay.jsonl": [record(i, trajectories={"u": "x"}, image=f"{i}.png") for i in "pqr"],
         "p.png": films, "q.png": films},
        "{here}/r.png: no such image" + training.WAY_ON),
    "too few rows left to replay": (
        "--skip_broken", {"replay.jsonl": [
            record(i, trajectories={"u": "x"}, image=f"{i}.png") for i in "pqr"],
            "p.png": films, "q.png": truncated, "r.png": films},
        "replay.jsonl: 2 records with images that can be read, expected at least --replay_rows 3"),
})
add("spd.py", f"spd.py {RECORDS} --student student", {
    "no output": ({}, "--output_dir: missing; name the run's folder"),
})
add("apo.py", READERS["apo.py"], {
    "no positives": (
        "--positives none.jsonl", {},
        "--positives none.jsonl: missing; stage 2 makes them: selfdistill.py --studies ... "
        "--student runs/spd/student --output_dir runs/positives"),
    "a positive without t+": (
        {"positives.jsonl": ["", {"id": "a"}]},
        'positives.jsonl:2: expected {"id": "...", "t_plus": "..."}'),
    "a second t+": (
        {"positives.jsonl": [{"id": "a", "t_plus": "x"}] * 2},
        "positives.jsonl:2: a second t+ for study 'a', expected one"),
    "positives of other studies": (
        {"positives.jsonl": [{"id": "z", "t_plus": "x"}]},
        "positives.jsonl: holds t+ for none of the 4 studies, expected the positives of these "
        "studies"),
    "a weight below 0": (
        "--teacher_weights u=-1", {},
        "--teacher_weights u=-1: expected NAME=W with W >= 0 and NAME one of u, w"),
    "a weight of nobody": (
        "--teacher_weights u=2,x=1", {},
        "--teacher_weights x=1: expected NAME=W with W >= 0 and NAME one of u, w"),
    "a weight that is no number": (
        "--teacher_weights u=a", {},
        "--teacher_weights u=a: expected NAME=W with W >= 0 and NAME one of u, w"),
})
ELSEWHERE_HOST = "http://192.0.2.1/v1"
for flag in ("attempts", "batch_size", "max_new_tokens", "server_concurrency"):
    CASES[f"selfdistill.py: --{flag} 0"] = Case(
        f"{READERS['selfdistill.py']} --{flag} 0",
        f"argument --{flag}: '0', expected a whole number of at least 1", status=2)
add("selfdistill.py", f"selfdistill.py {STAGE}", {
    "no trajectories": ({"studies.jsonl": [record("a", trajectories=None)]},
                        "studies.jsonl: no study has trajectories, expected the teachers' texts"),
    "no student": (
        "--student none", {},
        "--student none: missing; stage 1 makes pi_st: spd.py --studies ... --output_dir runs/spd, "
        "in runs/spd/student"),
    "a URL that is none": (
        "--server ftp://x", {},
        "the URL: expected http(s)://HOST[:PORT][/PATH] with no user, key or query in it"),
    "another machine": (
        f"--server {ELSEWHERE_HOST}", {},
        "192.0.2.1 is not this machine, and images are not sent to others without "
        "--i_have_permission"),
    "a key over http": (
        f"--server {ELSEWHERE_HOST} --i_have_permission --server_key_env A_TEST_KEY", {},
        "192.0.2.1: expected https, the key would travel unencrypted"),
    "a key in place of its name": (
        "--server http://127.0.0.1:9 --server_key_env sk-1", {},
        "the key: expected the name of an environment variable that holds it"),
    "a key that is not set": (
        "--server http://127.0.0.1:9 --server_key_env NO_SUCH_KEY", {},
        "the key: the environment variable named for it is not set, or holds no key of at least 8 "
        "printable characters; leave it out for a server that wants none"),
})

# flags of the chain and of a stage alone that do not go together: command, its flags, what is said
WITHOUT_STUDIES = "without --studies: expected the studies too; the scale model makes its own"
TWO_BEGINNINGS = ("--base with --student: --base walks all stages from that model, --student is "
                  "where this stage alone starts; expected one of them")
NOTHING_TO_SAMPLE = ("--positives without --student: expected pi_st, which sampled them, too; or "
                     "--base alone, which makes both")
COMBINATIONS = (
    *((stage, f"--{flag} student", f"--{flag} {WITHOUT_STUDIES}")
      for stage in ("spd.py", "selfdistill.py", "apo.py")
      for flag in ("student", "task_file", "base")),
    ("apo.py", "--positives positives.jsonl", f"--positives {WITHOUT_STUDIES}"),
    *((stage, f"{STAGE} --base student", TWO_BEGINNINGS)
      for stage in ("spd.py", "selfdistill.py", "apo.py")),
    ("selfdistill.py", f"{RECORDS} --base student --server http://127.0.0.1:9",
     "--base with --server: the server is pi_st; expected --server alone, after spd.py"),
    ("apo.py", f"{RECORDS} --positives positives.jsonl", NOTHING_TO_SAMPLE),
    ("apo.py", f"{RECORDS} --positives positives.jsonl --base student", NOTHING_TO_SAMPLE),
    ("apo.py", f"{RECORDS} --base student --dry_run",
     "--dry_run with --base: this stage needs what the others make; expected spd.py --dry_run, or "
     "--student and --positives"),
)
for stage, flags, says in COMBINATIONS:
    CASES[f"{stage}: {flags}"] = Case(f"{stage} {flags}", says, status=2)

# -------------------------------------------------------------------------------------- evaluate.py

def edit(old, new):
    """Replaces a text in a file that is there, gzipped or not."""
    def change(path):
        opened = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt") as file:
            content = file.read()
        assert old in content
        with opened(path, "wt") as file:
            file.write(content.replace(old, new))
    return change


def bench(write_files, *changes):
    """The folder `in` as test_datasets.py lays a dataset out; changes: (file in it, content)."""
    def make(path):
        path.mkdir()
        write_files(path)
    return {"in": make, **{f"in/{name}": content for name, content in changes}}


MS = bench(dataset_files.write_ms_cxr_t)
CHEXPERT_CSV = "in/mimic-cxr-2.0.0-chexpert.csv.gz"
IN = f"--images in {EVALUATE} --output out.json"
PROGRESSION = f"evaluate.py classify --task progression --ms_cxr_t in/ms.csv {IN}"
PRESENCE = ("evaluate.py classify --task presence --ms_cxr_t in/ms.csv "
            f"--chexpert_csv {CHEXPERT_CSV} {IN}")


def ms_cxr_t(old, new, name="ms.csv"):
    """MS-CXR-T with a text of one of its files replaced."""
    return bench(dataset_files.write_ms_cxr_t, (name, edit(old, new)))


add("evaluate.py progression", PROGRESSION, {
    "a word for a course": (
        ms_cxr_t("improving,,Stable", "better,,Stable"),
        "in/ms.csv:2: 'better', expected improving, stable, worsening or nothing"),
    "a subject that is no number": (
        ms_cxr_t("10000032.0", "p10000032"),
        "in/ms.csv:3: subject_id: 'p10000032', expected a number"),
    "a column that is not there": (
        ms_cxr_t("edema_progression", "Edema"),
        "in/ms.csv:1: expected one column 'edema_progression', found subject_id, ..."),
    "a row that ends": (
        ms_cxr_t(dataset_files.MS_ROWS.splitlines()[1], "1,2"),
        "in/ms.csv:3: 2 fields, expected 11"),
    "a pair twice": (
        ms_cxr_t("50000003,p10/p10002428/s50000003/33334444-e",
                 "50000001,p10/p10002428/s50000001/11112222-b"),
        "in/ms.csv:4: the pair ... is there twice, expected it once"),
    "no file": ("--ms_cxr_t none.csv", {}, "[Errno 2] No such file or directory: 'none.csv'"),
    "a csv in Latin-1": (
        {**MS, "in/ms.csv": dataset_files.MS_HEAD.encode() + b"\n\xe9,2\n"},
        "in/ms.csv:2: no line of a CSV file in UTF-8: 'utf-8' codec can't decode byte 0xe9 ..."),
    "a csv with a line without end": (
        {**MS, "in/ms.csv": "x" * 1_000_000},
        "in/ms.csv:1: no line of a CSV file in UTF-8: expected a line of less than 1,000,000 "
        "bytes"),
    "a csv with a field without end": (
        {**MS, "in/ms.csv": dataset_files.MS_HEAD + '\n"' + "x" * 200_000 + '"\n'},
        "in/ms.csv:2: no line of a CSV file in UTF-8: field larger than field limit..."),
    "no film": (
        MS | {f"in/files/{name}.jpg": None for name in dataset_files.FILMS},
        "MS-CXR-T, progression: no study has both labels and images; ...: no such image; ..."),
})
add("evaluate.py presence", PRESENCE, {
    "a label that is none": (
        ms_cxr_t("1.0,0.0,,", "2.0,0.0,,", "mimic-cxr-2.0.0-chexpert.csv.gz"),
        f"{CHEXPERT_CSV}:2: Consolidation: '2.0', expected 1, 0, -1 or nothing"),
    "no gzip": (
        {**MS, CHEXPERT_CSV: "x"},
        f"{CHEXPERT_CSV}:1: no line of a CSV file in UTF-8: Not a gzipped file (b'x')"),
    "a gzip that ends": (
        {**MS, CHEXPERT_CSV: gzip.compress(dataset_files.CHEXPERT_HEAD.encode() + b"\n")[:-9]},
        f"{CHEXPERT_CSV}:2: no line of a CSV file in UTF-8: Compressed file ended before the "
        "end-of-stream marker was reached"),
})
add("evaluate.py classify", READERS["evaluate.py classify"] + " --split train", {
    "no labels": (
        {"studies.jsonl": [record("a", labels=None)]},
        "studies.jsonl: no study of split 'train' has labels, expected some to score against"),
    "two students with a name": (
        "--student x=student --student x=y", {},
        "--student x=y: a second student named 'x', expected NAME=FOLDER with names that differ"),
    "a student with a teacher's name": (
        "--student u=student", {},
        "--student u: names another row of the table, expected a name of its own"),
    "no student": (
        "--student none", {}, "--student none: expected the folder or hub id of a Qwen2.5-VL: ..."),
    "no image": (
        {"film.png": None},
        "studies.jsonl: no study has both labels and images; a: {here}/film.png: no such image; "
        "..."),
    "images, truncated": (
        {"film.png": truncated},
        "no image could be read, the first: {here}/film.png: not a readable image: ..."),
    "images, truncated, parsed": (
        "--mode parse", {"film.png": truncated},
        "no image could be read, the first: {here}/film.png: not a readable image: ..."),
    "answers that begin alike": (
        task(classes={"mild": ["mild {finding}"], "mild to severe": ["severe {finding}"]}),
        "Effusion: the tokens of option 'mild' begin those of 'mild to severe', expected options "
        "that differ from the start"),
    "an output that is none of ours": (
        {"out.json": "[1, 2]"},
        "out.json: exists and was not written by evaluate.py, expected another --output"),
    "an output that is no JSON": (
        {"out.json": "{"},
        "out.json: exists and was not written by evaluate.py, expected another --output"),
})
OWN_REPORTS = (f"evaluate.py reports --studies studies.jsonl {EVALUATE} --output out.json "
       "--split train")
add("evaluate.py reports --studies", OWN_REPORTS, {
    "a label of the chest's": (
        {},
        "studies.jsonl:1: \"labels\": unknown finding 'Effusion', expected one of "
        "Atelectasis, ..."),
    "no report": (
        {"studies.jsonl": [record("a", labels=None, report=None)]},
        "studies.jsonl: no study has both a report and its image"),
    "images, truncated": (
        {"studies.jsonl": [record("a", labels=None)], "film.png": truncated},
        "no image could be read, the first: {here}/film.png: not a readable image: ..."),
    "no image": (
        {"studies.jsonl": [record("a", labels=None)], "film.png": None},
        "studies.jsonl: no study has both a report and its image; a: {here}/film.png: no "
        "such image"),
    "damaged METEOR": (
        "--meteor own",
        {"studies.jsonl": [record("a", labels=None)], "own/meteor-1.5.jar": "x",
         "own/data/paraphrase-en.gz": "x"},
        "own/meteor-1.5.jar is not METEOR 1.5's: File is not a zip file"),
})
ANNOTATED = ("evaluate.py reports --annotation in/annotation.json --images in/files "
             f"{EVALUATE} --output out.json")
add("evaluate.py reports --annotation", ANNOTATED, {
    "no JSON": ({"in/annotation.json": "{"}, "in/annotation.json: not a JSON file: ..."),
    "deep nesting": (
        {"in/annotation.json": "[" * 100_000}, "in/annotation.json: not a JSON file: ..."),
    "no list": (
        {"in/annotation.json": {"train": []}},
        'in/annotation.json: expected an object with a list "test"'),
    "an image as a text": (
        {"in/annotation.json": {"test": [{"id": "a", "report": "x", "image_path": "x.jpg"}]}},
        'in/annotation.json: test[0]: expected {"id": text, "report": text, "image_path": [text, '
        '...]}'),
    "a study twice": (
        bench(dataset_files.write_annotation, ("annotation.json", edit('"dicom-1"', '"dicom-0"'))),
        "MIMIC-CXR reports, annotation.json: dicom-0 is there twice, expected it once"),
})
MIMIC = bench(dataset_files.write_mimic_reports)
add("evaluate.py reports --reports", f"evaluate.py reports --reports in/reports {IN}", {
    "no tables": ({"in/x": ""}, "in: no mimic-cxr-2.0.0-metadata.csv*"),
    "no study of the split": (
        "--split validate", MIMIC,
        "in/mimic-cxr-2.0.0-split.csv.gz: no study of split 'validate', expected train, "
        "validate or test"),
    "a report in Latin-1": (
        {**MIMIC, "in/reports/files/p10/p10000032/s50414267.txt": b"FINDINGS: caf\xe9"},
        "in/reports/files/p10/p10000032/s50414267.txt: no text in UTF-8: ..."),
})
ZERO = f"evaluate.py zeroshot {EVALUATE} --output out.json"
RAY, DET = bench(dataset_files.write_chestx_ray14), bench(dataset_files.write_chestx_det10)
add("evaluate.py zeroshot", ZERO, {
    "no dataset": ("", {}, "expected some of --open_i, --chestx_ray14, --chexpert, --chestx_det10"),
    "a dataset that is not there": (
        "--chestx_det10 in", {"in/x": ""}, "in: no test.json or **/test.json"),
    "Open-I, no reports": ("--open_i in", {"in/x": ""}, "in: no ecgen-radiology/*.xml"),
    "Open-I, no XML": (
        "--open_i in", {"in/1.xml": "<eCitation>"},
        "in/1.xml: not an XML file: no element found: line 1, column 11"),
    "ChestX-ray14, too few labels": (
        "--chestx_ray14 in", {**RAY, "in/test_list.txt": "a.png 0 1\n"},
        "in/test_list.txt:1: 2 labels, expected 14 or none"),
    "ChestX-ray14, in Latin-1": (
        "--chestx_ray14 in", {**RAY, "in/test_list.txt": b"\xe9.png\n"},
        "in/test_list.txt: no text in UTF-8: ..."),
    "ChestX-ray14, a label that is none": (
        "--chestx_ray14 in", {**RAY, "in/test_list.txt": "a.png " + "x " * 14},
        "in/test_list.txt:1: 'x', expected 1, 0, -1 or nothing"),
    "ChestX-ray14, an unknown finding": (
        "--chestx_ray14 in", {**RAY, "in/Data_Entry_2017.csv": edit("|Emphysema", "|Emphysem")},
        "in/Data_Entry_2017.csv:2: unknown finding 'Emphysem', expected some of Atelectasis, ... "
        "or No Finding"),
    "ChestX-Det10, no JSON": (
        "--chestx_det10 in", {**DET, "in/test.json": "["}, "in/test.json: not a JSON file: ..."),
    "ChestX-Det10, an object": (
        "--chestx_det10 in", {**DET, "in/test.json": "3"},
        "in/test.json: expected a list of objects, found int"),
    "ChestX-Det10, no syms": (
        "--chestx_det10 in", {**DET, "in/test.json": '[{"file_name": "x.png"}]'},
        'in/test.json: [0]: expected {"file_name": text, "syms": [text, ...]}'),
    "ChestX-Det10, syms of numbers": (
        "--chestx_det10 in", {**DET, "in/test.json": '[{"file_name": "x.png", "syms": [[1]]}]'},
        'in/test.json: [0]: expected {"file_name": text, "syms": [text, ...]}'),
    "ChestX-Det10, an unknown finding": (
        "--chestx_det10 in", {**DET, "in/test.json": edit("Nodule", "Nodules")},
        "in/test.json: [2]: unknown finding 'Nodules', expected some of Atelectasis, ..."),
    "ChestX-Det10, an image twice": (
        "--chestx_det10 in", {**DET, "in/train_data/36302.png": films},
        "in/train_data/36302.png: test_data/36302.png has the same name, expected each image once "
        "below in"),
    "CheXpert, no column": (
        "--chexpert in --chexpert_labels labels.csv", {**DET, "labels.csv": "Path,Edema\n"},
        "labels.csv:1: expected one column 'No Finding', found Path, Edema"),
    "CheXpert, a label that is none": (
        "--chexpert in",
        bench(dataset_files.write_chexpert, ("valid.csv", edit("AP,1.0", "AP,1.5"))),
        "in/valid.csv:2: No Finding: '1.5', expected 1, 0, -1 or nothing"),
})
add("evaluate.py tables", "evaluate.py tables results.json", {
    "no JSON": ({"results.json": "{"}, "results.json: not a JSON file: ..."),
    "a list": (
        {"results.json": "[]"},
        "results.json: expected the --output of classify, reports or zeroshot, or results.json of "
        "python -m experiment ladder; AttributeError: 'list' object has no attribute 'get'"),
    "a figure that is no number": (
        {"results.json": {"settings": {"command": "zeroshot"},
                          "rows": {"x": {"Open-I": {"macro": "0.8"}}}}},
        "results.json: expected ... of python -m experiment ladder; ValueError: 'x': a figure that "
        "is no number"),
    "rows that are none": (
        {"results.json": {"settings": {"command": "classify"}, "rows": {"x": 1}}},
        "results.json: expected the --output of classify, reports or zeroshot, or results.json of "
        "python -m experiment ladder..."),
    "another file": (
        {"results.json": {}},
        "results.json: expected the --output of classify, reports or zeroshot, or results.json of "
        "python -m experiment ladder; ValueError: it is none of them"),
})
add("evaluate.py ablation", "evaluate.py ablation results.json", {
    "another file": (
        {"results.json": {}},
        "results.json: not the results.json of python -m experiment ladder: KeyError('cells')"),
    "no JSON": ({"results.json": "{"}, "results.json: not a JSON file: ..."),
})
add("evaluate.py teachers", READERS["evaluate.py teachers"], {
    "no samples": ("--samples 0", {}, "--samples 0: expected at least 1"),
    "no trajectories": ({"studies.jsonl": [record("a", trajectories=None)]},
                        "studies.jsonl: no study has trajectories, expected the teachers' texts"),
    "no reports": ("--against report", {"studies.jsonl": [record("a", report=None)]},
                   "studies.jsonl: no study has report, expected some for --against report"),
    "an unknown teacher": ("--teachers x", {}, "--teachers x: expected some of u, w"),
})
for what, flags, says in (
        ("neither studies nor task", "", "classify: expected one of --studies and --task"),
        ("both studies and task", "--studies x --task presence",
         "classify: expected one of --studies and --task"),
        ("progression without its file", "--task progression",
         "--task progression: expected --ms_cxr_t"),
        ("presence without labels", "--task presence --ms_cxr_t x",
         "--task presence: expected --ms_cxr_t and --chexpert_csv"),
        ("a prompt that names the labels", "--task progression --ms_cxr_t x --prompt teacher",
         "--prompt teacher names the labels, expected only with --studies"),
        ("a split of MS-CXR-T", "--task progression --ms_cxr_t x --split train",
         "--task progression: MS-CXR-T has no splits and its own findings, expected --split and "
         "--task_file only with --studies")):
    CASES[f"evaluate.py: {what}"] = Case(
        f"evaluate.py classify --student x {flags}", says, status=2)

# ----------------------------------------------------------------------------------- tools/check.py

CHECK = "tools/check.py studies.jsonl --task_file task.json --out good.jsonl"
add("tools/check.py", CHECK, {
    "no file": ({"studies.jsonl": None}, "[Errno 2] No such file or directory: 'studies.jsonl'"),
    "no record": (
        {"studies.jsonl": "\n\n"}, "studies.jsonl: no record, expected one JSON object a line"),
    "a task file": ({"task.json": "[]"}, "task.json: expected a JSON object"),
    "no folder for what is good": (
        "--out none/good.jsonl", {},
        "none/good.jsonl could not be written: [Errno 2] No such file or directory: "
        "'none/.tmp-good.jsonl'"),
    "a student without a tokenizer": (
        "--student other --skip_images", {"other/x": ""},
        "other/tokenizer.json: expected the student's tokenizer: No such file or directory (os "
        "error 2)"),
    "a tokenizer that is none": (
        "--student other --skip_images", {"other/tokenizer.json": "{"},
        "other/tokenizer.json: expected the student's tokenizer: EOF while parsing..."),
})
add("tools/check.py", "tools/check.py studies.jsonl --show 5", {
    "nothing to show": (
        {"studies.jsonl": [record("a", trajectories=None), "{"]},
        "studies.jsonl: no record with an id has trajectories, expected the teachers' texts"),
})
for what, flags, says in (
        ("no text to show", "--show 0", "--show 0: expected at least 1"),
        ("a look and a check", "--show 5",
         "--show: checks nothing, expected neither --out nor --json with it"),
        ("an unknown kind", "--allow refusal,typo",
         "--allow typo: expected some of json, field, label, ..."),
        ("its own input", "--out studies.jsonl",
         "--out studies.jsonl: expected another name than the input's and rejected.jsonl"),
        ("the name of the rejected", "--out rejected.jsonl",
         "--out rejected.jsonl: expected another name than the input's and rejected.jsonl")):
    CASES[f"tools/check.py: {what}"] = Case(f"{CHECK} {flags}", says, status=2)

# -------------------------------------------------------------------------------------------- tools

MAPPING = {"id": "id", "image": "image", "labels": "labels", "trajectories": {"u": "u", "w": "w"}}
ROWS = [{"id": "a", "image": "film.png", "labels": {"Edema": "mild"}, "u": "mild edema",
         "w": "no edema"}]


def mapping(**changes):
    """Files of tools/convert.py whose mapping is MAPPING with changes; None takes a key away."""
    changed = {key: value for key, value in {**MAPPING, **changes}.items() if value is not None}
    return {"rows.jsonl": ROWS, "map.json": changed}


MAPPED = "--mapping map.json --task_file task.json --out out.jsonl"
LONG = mapping(trajectories={"teacher": "by", "text": "says"})
answer = lambda **changes: {
    "id": "a", "image": "film.png", "labels": {}, "by": "u", "says": "x", **changes}
add("tools/convert.py studies", f"tools/convert.py studies rows.jsonl {MAPPED}", {
    "mapping, no JSON": ({"map.json": "{"}, "map.json: not a JSON file: ..."),
    "mapping, no image": (
        mapping(image=None), "map.json: expected an object with id, image, trajectories"),
    "mapping, an unknown key": (
        mapping(typo="x"),
        "map.json: expected only id, image, split, report, labels, classes and trajectories"),
    "mapping, a field that is none": (
        mapping(id=3), 'map.json: expected "id": the path of a field, or {"field", "match"}'),
    "mapping, labels": (
        mapping(labels=3), 'map.json: expected "labels": a field, or {finding: field}'),
    "mapping, classes": (
        mapping(classes=[]),
        'map.json: expected "classes": {word in the file: class of the task}'),
    "mapping, trajectories": (
        mapping(trajectories={}),
        'map.json: expected "trajectories": {teacher: field}, or {"teacher": field, "text": '
        'field}'),
    "mapping, no regular expression": (
        mapping(id={"field": "id", "match": "("}),
        "map.json: '(': no regular expression: missing )..."),
    "mapping, no id, into": (
        "--into studies.jsonl", mapping(id=None, image=None),
        "map.json: expected an object with id, trajectories"),
    "into, no study that is there": (
        "--into studies.jsonl", mapping() | {"rows.jsonl": [{**ROWS[0], "id": "7"}]},
        "rows.jsonl: none of its 1 studies is in studies.jsonl, expected ids such as a, found "
        "7"),
    "into, a broken line": (
        "--into studies.jsonl", mapping() | studies("{"),
        "studies.jsonl:2: not a JSON object in UTF-8: ..."),
    "into, an empty text": (
        "--into studies.jsonl", mapping() | {"rows.jsonl": [{**ROWS[0], "u": " "}]},
        "rows.jsonl:1: \"trajectories\": 'u' is empty or no text, expected words"),
    "a broken line": (
        mapping() | {"rows.jsonl": [*ROWS, "{"]},
        "rows.jsonl:2: not a JSON object in UTF-8: ..."),
    "no row": (mapping() | {"rows.jsonl": ""}, "rows.jsonl: no row, expected at least one"),
    "a fault": (
        mapping() | {"rows.jsonl": [{**ROWS[0], "labels": {"Edema": 3}}]},
        "rows.jsonl:1: \"labels\": Edema is 3, expected one of 'absent', 'mild'"),
    "twenty faults and more": (
        mapping() | {"rows.jsonl": [{}] * 25},
        'rows.jsonl:1: "id": expected a non-empty string without control characters\n'
        '...\n... and 30 more'),
    "an id twice": (
        mapping() | {"rows.jsonl": ROWS * 2},
        "rows.jsonl:2: \"id\": 'a' is there twice, expected one row a study"),
    "long, a second text": (
        LONG | {"rows.jsonl": [answer(), answer()]},
        "rows.jsonl:2: a second text of u for study 'a', expected one"),
    "long, another image": (
        LONG | {"rows.jsonl": [answer(), answer(by="w", image="x.png")]},
        "rows.jsonl:2: image of study 'a' differ from an earlier row, expected the same"),
    "long, nobody": (
        LONG | {"rows.jsonl": [answer(by=None)]},
        "rows.jsonl:1: \"trajectories\": the teacher is None, expected a name"),
    "long, somebody without a name": (
        LONG | {"rows.jsonl": [answer(by=["u"])]},
        "rows.jsonl:1: \"trajectories\": the teacher is None, expected a name"),
})
add("tools/convert.py studies, .json", f"tools/convert.py studies rows.json {MAPPED}", {
    "no JSON": (mapping() | {"rows.json": "{"}, "rows.json: not a JSON file: ..."),
    "an object": (
        mapping() | {"rows.json": "{}"}, "rows.json: expected a list of objects, found dict"),
    "a row that is none": (
        mapping() | {"rows.json": "[1]"},
        'rows.json[0]: "id": expected a non-empty string without control characters\n'
        'rows.json[0]: ...'),
})
add("tools/convert.py studies, .csv", f"tools/convert.py studies rows.csv {MAPPED}", {
    "csv, a field too many": (
        mapping() | {"rows.csv": "id,image\na,film.png,x\n"}, "rows.csv:2: expected 2 fields"),
    "csv, a column twice": (
        mapping() | {"rows.csv": "id,id\n"},
        "rows.csv:1: expected each column once, found 'id', 'id'"),
    "csv, in Latin-1": (
        mapping() | {"rows.csv": b"id,image\n\xe9,x\n"},
        "rows.csv:2: no line of a CSV file in UTF-8: 'utf-8' codec can't decode byte 0xe9 "
        "..."),
})
add("tools/convert.py trl", READERS["tools/convert.py trl"], {
    "no image": ({"film.png": None}, "{here}/film.png: no such image"),
    "no positives": (
        "--positives none.jsonl", {}, "[Errno 2] No such file or directory: 'none.jsonl'"),
})
MIMIC_FLAGS = "tools/prepare_mimic.py --root in --out out.jsonl"
PREPARED = bench(prepared)
PAIRS = "subject_id,study_id,dicom_id,previous_study_id,previous_dicom_id"
SPLIT_CSV = "in/mimic-cxr-2.0.0-split.csv.gz"
add("tools/prepare_mimic.py", f"{MIMIC_FLAGS} --keep_ms_cxr_t", {
    "no tables": ({"in/x": ""}, "in: no mimic-cxr-2.0.0-metadata.csv*"),
    "an unknown split": (
        {**PREPARED, SPLIT_CSV: edit("validate", "dev")},
        f"{SPLIT_CSV}:...: split 'dev', expected train, validate, test"),
    "a film's name that is a path": (
        {**PREPARED, SPLIT_CSV: edit("v-pa", "../v")},
        f"{SPLIT_CSV}:...: dicom_id '../v', expected letters, digits and hyphens"),
    "a patient in two splits": (
        {**PREPARED, SPLIT_CSV: edit("50000001,10000032,train", "50000001,10000032,test")},
        f"{SPLIT_CSV}:...: subject 10000032 is in t... and in t..., expected one split for each "
        "patient"),
    "too large a sample": (
        "--sample 99", PREPARED,
        "--sample 99: expected at most the 3 training studies that are left"),
    "films that are not there": (
        PREPARED | {"in/files": shutil.rmtree},
        "5 of the 5 films that out.images.txt names are missing in in, the first files/p10/...jpg; "
        "fetch that list, or leave ... with --skip_missing"),
    "a film of MS-CXR-T that leads out": (
        "--ms_cxr_t t.csv", PREPARED | {"t.csv": f"{PAIRS}\n10000032,2,../../x,3,y\n"},
        "t.csv:2: dicom_id '../../x', expected p10/p10000032/s50414267/DICOM_ID or DICOM_ID"),
    "no previous film in MS-CXR-T": (
        "--ms_cxr_t t.csv", PREPARED | {"t.csv": f"{PAIRS}\n10000032,2,x,3,\n"},
        "t.csv:2: previous_dicom_id '', expected p10/p10000032/s50414267/DICOM_ID or DICOM_ID"),
    "no column of MS-CXR-T": ("--ms_cxr_t t.csv", PREPARED | {"t.csv": "subject_id\n1\n"},
                              "t.csv:1: expected one column 'study_id', found subject_id"),
    "no film at all": (
        "--skip_missing", PREPARED | {"in/files": shutil.rmtree},
        "in: no study is left, expected films of train, validate, test below files/"),
    "no report": (
        "--reports empty", {**PREPARED, "empty/x": ""},
        "--reports empty: holds none of the 5 reports, expected p10/p10000032/s50414267.txt in it "
        "or in its files/"),
    "no labels": ("--labels negbio", PREPARED, "in: no mimic-cxr-2.0.0-negbio.csv*"),
})
CASES["prepare_mimic: the test set's patients"] = Case(
    MIMIC_FLAGS,
    "expected --ms_cxr_t FILE, to leave its patients out of training, or --keep_ms_cxr_t to train "
    "on the test set's patients",
    status=2)

spec = lambda **changes: {
    "endpoints.json": {"u": {"url": "http://127.0.0.1:9", "model": "m", **changes}}}
NEW = {"studies.jsonl": [record("a", trajectories=None)]}
CASES["tools/collect.py: --budget nan"] = Case(
    f"{READERS['tools/collect.py']} --budget nan", "--budget nan: expected a number above 0",
    spec(), status=2)
add("tools/collect.py", READERS["tools/collect.py"], {
    "no attempts": ("--attempts 0", spec(), "--attempts: expected at least 1"),
    "endpoints, no JSON": ({"endpoints.json": "{"}, "endpoints.json: not a JSON file: ..."),
    "endpoints, a list": (
        {"endpoints.json": "[]"},
        'endpoints.json: expected an object {teacher: {"url": ..., "model": ...}}'),
    "endpoints, an unknown teacher": ("--teachers x", spec(), "--teachers x: expected some of u"),
    "endpoints, a key": (
        spec(api_key="x"),
        'endpoints.json: u: a key has no place in this file; "key_env" names the environment '
        'variable that holds it'),
    "endpoints, an unknown field": (
        spec(typo=1), "endpoints.json: u: an unknown field, expected some of url, model, ..."),
    "endpoints, a field of the wrong kind": (
        spec(timeout="x"), 'endpoints.json: u: "timeout": expected seconds'),
    "endpoints, a URL that is none": (
        spec(url="x"),
        "endpoints.json: u: the URL: expected http(s)://HOST[:PORT][/PATH] with no user, key or "
        "query in it"),
    "endpoints, another machine": (
        spec(url=ELSEWHERE_HOST),
        "endpoints.json: u: 192.0.2.1 is not this machine, and images are not sent to others "
        "without --i_have_permission"),
    "endpoints, the key itself": (
        spec(key_env="A_TEST_KEY", model="a-test-key-0"),
        'endpoints.json: u: a key has no place in this file; ...'),
    "a budget without prices": (
        "--budget 1", spec(),
        '--budget: expected "usd_per_million_tokens" and a max_tokens or max_completion_tokens in '
        '"request" of u'),
    "no image": (
        spec() | NEW | {"film.png": None}, ".: 1 images are missing, the first is film.png"),
    "an output of somebody else": (
        spec() | NEW | {"out.jsonl": "x"},
        "out.jsonl: exists and was not written by this command, expected another --out"),
    "answers that are none": (
        spec() | NEW | {"out.jsonl.answers.jsonl": ['{"id": "a"}']},
        'out.jsonl.answers.jsonl:1: expected "id", "teacher", "status" and, if answered, "text"'),
    "answers that are none, a dry run": (
        "--dry_run", spec() | NEW | {"out.jsonl.answers.jsonl": ['{"id": "a"}']},
        'out.jsonl.answers.jsonl:1: expected "id", "teacher", "status" and, if answered, "text"'),
    "a second run": (
        spec() | NEW | {"out.jsonl.answers.jsonl": locked},
        "out.jsonl.answers.jsonl: another run writes it; wait for it or choose another --out"),
})
add("tools/drift.py", READERS["tools/drift.py"], {
    "no trajectories": ({"studies.jsonl": [record("a", trajectories=None)]},
                        "studies.jsonl: no study has trajectories, expected the teachers' texts"),
    "an order that a study has not": (
        "--order_by when", {"studies.jsonl": [record("a", when=1), record("b")]},
        "studies.jsonl: study 'b' has 'when': None, expected a number or a text to order by"),
    "an order of texts and numbers": (
        "--order_by when", {"studies.jsonl": [record("a", when=1), record("b", when="2")]},
        "studies.jsonl: 'when' is a text in one of the studies 'a' and 'b' and a number in the "
        "other, expected one of them in all"),
    "a window that the step does not divide": (
        "--window 3 --step 2", {},
        "--window 3 --step 2: expected a window that is a multiple of the step"),
    "too few studies": ("--window 9", {}, "5 studies: expected at least 18 for two windows of 9"),
    "one study": (
        {"studies.jsonl": [record("a")]}, "1 studies: expected at least 2 for two windows of 1"),
    "texts that never differ": (
        {"studies.jsonl": [record(i, labels=None, trajectories={"u": "x"}) for i in "abcd"]},
        "studies.jsonl: the texts never differ in findings, expected texts in which findings can "
        "be read"),
    "texts that never differ from the labels": (
        "--on errors", {"studies.jsonl": [record(i, labels=None) for i in "abcd"]},
        "studies.jsonl: the texts never differ in errors, expected labels of findings"),
    "no student": (
        "--student none", {}, "--student none: expected the folder or hub id of a Qwen2.5-VL: ..."),
})
for what, flags, says in (
        ("no window", "--window 0", "--window 0: expected at least 1"),
        ("an alpha too small", "--alpha 0.001 --permutations 99",
         "--alpha 0.001: expected 1 / (1 + permutations) = 0.0100 or more, and less than 1")):
    CASES[f"drift: {what}"] = Case(f"{READERS['tools/drift.py']} {flags}", says, status=2)

PRIOR = {"accuracy": {"Edema": 0.5}, "mean": 0.5}
RESULTS = {"results.json": {"settings": {}, "rows": {"label prior": PRIOR}}}
TEXTS = [{"id": "a", "t_plus": "x", "text": "x"}]
add("tools/report.py", "tools/report.py results.json --out out.html", {
    "no file": ({}, "[Errno 2] No such file or directory: 'results.json'"),
    "no JSON": ({"results.json": "{"}, "results.json: not a JSON file: ..."),
    "no results": (
        {"results.json": "[]"},
        'results.json: expected {"settings": {...}, "rows": ...} as evaluate.py classify --output '
        'writes; ...'),
    "no teachers": (
        "--teachers t.json", RESULTS | {"t.json": "{}"},
        't.json: expected {"teachers": ...} as evaluate.py teachers --output writes; '
        "KeyError: 'teachers'"),
    "a drift without a position": (
        "--drift d.json", RESULTS | {"d.json": {"windows": ["x"], "teachers": {}}},
        'd.json: expected {"windows": [N, ...], ...} as tools/drift.py --output writes; '
        'ValueError: a position is no number'),
    "no ladder": (
        "--ladder l.json", RESULTS | {"l.json": "{}"},
        'l.json: expected {"cells": ...} as python -m experiment ladder writes; '
        "KeyError: 'cells'"),
    "a log without a name": (
        "--log x.jsonl", RESULTS, "--log x.jsonl: expected NAME=FILE, with names that differ"),
    "no log": ("--log x=x.jsonl", RESULTS | {"x.jsonl": ['{"step": 1}', '{"loss": 1}']},
               'x.jsonl:2: expected {"step": N, ...} as spd.py and apo.py log'),
    "an empty log": (
        "--log x=x.jsonl", RESULTS | {"x.jsonl": ""},
        'x.jsonl: is empty, expected {"step": N, ...} as spd.py and apo.py log on each line'),
    "no study of the split": (
        "--studies studies.jsonl --split x", RESULTS,
        "studies.jsonl: no study of split 'x', expected at least one"),
    "a study that is none": ("--studies s.jsonl", RESULTS | {"s.jsonl": ['{"id": "a"}']},
                             's.jsonl:1: expected {"id": "...", "image": "...", ...}, a study'),
    "a positive that is none": (
        "--studies studies.jsonl --positives p.jsonl", RESULTS | {"p.jsonl": ['{"id": "a"}']},
        'p.jsonl:1: expected {"id": "...", "t_plus": "..."}'),
    "a positive twice": (
        "--studies studies.jsonl --positives p.jsonl", RESULTS | {"p.jsonl": TEXTS * 2},
        "p.jsonl: study 'a' comes twice, expected it once"),
    "an answer twice": (
        "--studies studies.jsonl --answers x=p.jsonl", RESULTS | {"p.jsonl": TEXTS * 2},
        "p.jsonl: study 'a' comes twice, expected it once"),
})
add("tools/answers.py", READERS["tools/answers.py"], {
    "no student": (
        "--student none", {}, "--student none: expected the folder or hub id of a Qwen2.5-VL: ..."),
    "an image that ends": (
        "--split train", {"film.png": truncated},
        "no image could be read, the first: {here}/film.png: not a readable image: ..."),
    "a folder in the place of its output": (
        "--output films", {"films/x": ""}, "films: expected a file in a folder that is there"),
    "no folder to write to": (
        "--output none/out.jsonl", {}, "none/out.jsonl: expected a file in a folder that is there"),
})

# ------------------------------------------------------------------------ the scale model, metrics

CASES["scale_model: drift in another world"] = Case(
    "scale_model make --out out --world class --drift 1",
    "drift is 1.0 in world 'class', expected 0: only the blind spots of 'nuisance' have a "
    "direction to turn")
CASES["experiment: beta without a ladder"] = Case(
    "experiment beta --out out",
    "out/nuisance-0: no finished chain; run first: python -m experiment ladder --out out")
CASES["scale_model: a file in the place of the folder"] = Case(
    "scale_model student --out film.png", "[Errno 17] File exists: 'film.png'")
PAIR = {"hyp.json": {"a": ["x"]}, "ref.json": {"a": ["x"]}}
add("metrics", "metrics hyp.json ref.json", {
    "no file": ({}, "[Errno 2] No such file or directory: 'hyp.json'"),
    "not UTF-8": (PAIR | {"hyp.json": b'{"a":\n["\xe9"]}'}, "hyp.json:2: not UTF-8 (byte 0xe9)"),
    "empty": (
        PAIR | {"ref.json": " "},
        "ref.json: empty, expected a text a line, or {id: [texts]} in a .json"),
    "an id twice": (
        PAIR | {"hyp.json": '{"a": ["x"], "a": ["y"]}'},
        "hyp.json: not JSON of the form {id: [texts]}: the id 'a' is there twice"),
    "no JSON": (PAIR | {"hyp.json": "{"}, "hyp.json: not JSON of the form {id: [texts]}: ..."),
    "a list": (PAIR | {"hyp.json": "[1]"}, "hyp.json: not JSON of the form {id: [texts]}"),
    "other ids": (
        PAIR | {"ref.json": {"b": ["x"]}},
        "hyp.json and ref.json: 1 ids without reference, the first is 'a'"),
    "a text in place of a list": (
        PAIR | {"hyp.json": {"a": "x"}},
        "hyp.json and ref.json: 'a': the hypothesis must be a list of strings"),
    "two hypotheses": (
        PAIR | {"hyp.json": {"a": ["x", "y"]}},
        "hyp.json and ref.json: 'a' has 2 hypotheses instead of one"),
    "no reference": (PAIR | {"ref.json": {"a": []}}, "hyp.json and ref.json: 'a' has no reference"),
    "no METEOR in the folder": (
        "--meteor none", PAIR,
        "...pip install pycocoevalcap... Missing in none: meteor-1.5.jar, data/paraphrase-en.gz"),
    "no jar": ("--meteor own", PAIR | {"own/meteor-1.5.jar": "x", "own/data/paraphrase-en.gz": "x"},
               "own/meteor-1.5.jar is not METEOR 1.5's: File is not a zip file"),
    "a damaged table": (
        "--meteor own", PAIR | {"own": test_meteor.write_folder, "own/data/paraphrase-en.gz": b"x"},
        "own/data/paraphrase-en.gz is damaged: Not a gzipped file (b'x')"),
})
add("metrics", "metrics hyp.txt ref.txt", {
    "other lines": (
        {"hyp.txt": "x\ny\n", "ref.txt": "x\n"},
        "hyp.txt has 2 lines, ref.txt has 1, expected line i against line i"),
})
CASES["metrics: a text beside JSON"] = Case(
    "metrics hyp.txt ref.json", "hyp.txt and ref.json: either both are .json or both are text",
    PAIR)

# ------------------------------------------------------------------------------------------- images

def png(width, height):
    """The header of a film of that size, behind which nothing comes."""
    number = lambda value: struct.pack(">I", value)
    chunk = lambda kind, content: (
        number(len(content)) + kind + content + number(zlib.crc32(kind + content)))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"")


def film_at(path, link=None):
    """Files whose records all show the film at that path; link: (name of a link, its target)."""
    files = {"studies.jsonl": [record(id, image=path) for id in "abcd"]}
    if link:
        name, target = link
        files[name] = lambda here: here.symlink_to(target)
    return files


# case 18: what is no film; 19: bombs; 20: paths that lead out of the folder; 21: too long a film
# -> files, what is said, tools/check.py's kind
BAD_IMAGES = {
    "missing": ({"film.png": None}, "{here}/film.png: no such image", "missing"),
    "empty": (
        {"film.png": b""}, "{here}/film.png: not a readable image: cannot identify image file...",
        "unreadable"),
    "HTML": (
        {"film.png": "<html>404</html>"},
        "{here}/film.png: not a readable image: cannot identify image file...", "unreadable"),
    "truncated": (
        {"film.png": truncated}, "{here}/film.png: not a readable image: ...", "unreadable"),
    "20000 x 20000": (
        {"film.png": png(20_000, 20_000)},
        "{here}/film.png: not a readable image: ...decompression bomb...", "too large"),
    "10000 x 10000": (
        {"film.png": png(10_000, 10_000)},
        "{here}/film.png: not a readable image: 10000 x 10000 pixels, expected at most 64,000,000",
        "too large"),
    "201 times as long": (
        {"film.png": png(1, 201)},
        "{here}/film.png: not a readable image: 1 x 201 pixels, expected an aspect ratio of at "
        "most 200",
        "too large"),
    "../": (film_at("../film.png"), "../film.png: lies outside the image folder {here}", "outside"),
    "absolute": (
        film_at("/etc/hostname"), "/etc/hostname: lies outside the image folder {here}", "outside"),
    "a link that leads out": (
        film_at("link.png", ("link.png", "/etc/hostname")),
        "link.png: lies outside the image folder {here}", "outside"),
    "a name that begins alike": (
        film_at("../films_secret/film.png") | {"films/x": "", "films_secret/film.png": films},
        "../films_secret/film.png: lies outside the image folder {here}/films", "outside"),
    "the folder's name twice": (
        film_at("films/gone.png") | {"films/x": ""},
        "{here}/films/films/gone.png: no such image (--images ends in films/ and the path begins "
        "with it)",
        "missing"),
    "a folder": (
        film_at("films") | {"films/y": ""}, "{here}/films: not a readable image: no regular file",
        "unreadable"),
    "a NUL": (
        {"studies.jsonl": [record("a", image="a\0b.png")]},
        '"image": expected a path or a list of two paths, without control characters', "field"),
}
for what, (files, says, _) in BAD_IMAGES.items():
    root = " --images films" if "films/x" in files else ""
    for reader in ("spd.py", "spd.py --dry_run", "apo.py", "selfdistill.py", "tools/answers.py",
                   "tools/convert.py trl"):
        if what == "truncated" and "convert" in reader:
            continue  # it reads headers only
        split = " --split train" if "answers" in reader else ""
        line = "studies.jsonl:1: " if what == "a NUL" else ""
        way_on = "" if "tools/" in reader or what == "a NUL" else training.WAY_ON
        if "answers" in reader and what != "a NUL":  # it leaves out what it cannot read
            line = "no image could be read, the first: "
        CASES[f"{reader}: image, {what}"] = Case(
            READERS[reader] + split + root, line + says + way_on, files)
    # evaluate.py lists what it cannot read, and goes on where anything is left
    if what not in ("truncated", "a NUL"):
        CASES[f"evaluate.py classify: image, {what}"] = Case(
            f"{READERS['evaluate.py classify']} --split train{root}",
            f"studies.jsonl: no study has both labels and images; a: {says}; b: ...", files)
CASES["spd.py: image, truncated, in a worker"] = Case(
    f"{READERS['spd.py']} --dry_run --num_workers 1", BAD_IMAGES["truncated"][1] + training.WAY_ON,
    {"film.png": truncated})
for reader in ("spd.py", "spd.py --dry_run", "apo.py", "selfdistill.py"):
    CASES[f"{reader}: nothing but broken images"] = Case(
        f"{READERS[reader]} --skip_broken",
        "--skip_broken: 4 studies left out, which leaves none; the first image: "
        "{here}/film.png: not a readable image: ...",
        {"film.png": truncated})


pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_its_message_and_touches_nothing(run, name):
    case = CASES[name]
    done = run(case)
    assert done.status == case.status, done.stderr
    assert is_said(case, done), f"{done.stderr}instead of {case.says}"
    assert "Traceback" not in done.stderr
    changed = {
        path for path in done.before.keys() | done.after
        if done.before.get(path) != done.after.get(path)}
    if "--dry_run" in case.command:
        assert changed == set()
    if "prepare_mimic" in case.command:
        changed.discard("out.images.txt")  # the films to fetch, listed before they are looked for
    # what shows when a film is decoded comes amid the work
    assert changed <= CLAIM or "truncated" in name and not changed & done.before.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_itself_ends_so_too(run, base, tmp_path, script, monkeypatch, name):
    case = next(case for case in CASES.values() if case.command.split()[0] == name)
    lay(tmp_path, base, case)
    start = "fork" if name in SLOW else "python"
    with monkeypatch.context() as there:
        there.chdir(tmp_path)
        done = script(name, *shlex.split(case.command)[1:], expect=case.status, start=start)
    assert done.stdout == run(case).stderr


def test_a_dry_run_writes_nothing(run):
    tight = Case(f"{READERS['spd.py']} --dry_run --max_tokens 9", "")
    assert "see too_long.jsonl" in run(tight).stdout
    assert run(tight).after == run(tight).before
    for command in (f"{READERS['spd.py']} --dry_run", f"{READERS['apo.py']} --dry_run"):
        done = run(Case(f"{command} --no-bf16", ""))
        assert done.status == 0, done.stderr
        assert "one step of the longest studies" in done.stdout
        assert done.after == done.before


def test_resume_must_ends_with_2_where_nothing_was_begun(run):
    for command, says in ((READERS["spd.py"], "there is no valid checkpoint"),
                          (READERS["selfdistill.py"], "nothing is written there")):
        done = run(Case(f"{command} --resume must --no-bf16", ""))
        assert done.status == 2
        assert f"out: --resume must, but {says}" in done.stdout
        assert "Traceback" not in done.stderr


def test_resume_never_takes_away_what_a_run_wrote_and_nothing_else(run):
    mine = {
        "studies.jsonl": [record(id) for id in "abcd"], "notes.json": "{}", "mine.safetensors": "x"}
    old = {
        "out/args.json": {"seed": 7, "train": "lora"}, "out/step-000009/x": "",
        "out/log.jsonl": '{"step": 9}', "out/reference.safetensors": "x"}
    flags = STAGE.replace("studies.jsonl", "out/studies.jsonl").replace(
        "--task_file", "--positives out/positives.jsonl --task_file")
    files = {f"out/{name}": content for name, content in mine.items()} | {
        "out/positives.jsonl": GOOD["positives.jsonl"]} | old
    done = run(Case(f"apo.py {flags} --resume never --max_steps 1 --no-bf16", "", files))
    assert done.status == 0, done.stderr
    assert all(
        done.after[f"out/{name}"] == done.before[f"out/{name}"]
        for name in [*mine, "positives.jsonl"])
    assert "out/step-000009" not in done.after
    assert all(done.after.get(name) != done.before[name] for name in old)


def of_another_key(path):
    """A cached reference of other input."""
    save_file({"logps": torch.zeros(4, 3)}, path, metadata={"key": "of other input"})


def test_a_stage_says_what_it_works_on_and_what_it_made(run):
    refuses = record("a", trajectories={"u": "I cannot say", "w": "no edema"})
    files = {"studies.jsonl": [refuses, *(record(id) for id in "bcd")],
             "out/args.json": {"train": "lora"}, "out/reference.safetensors": of_another_key}
    plan = "4 studies, 1 steps of 4 = 1 ranks x 4 micro-batches x 1 studies"
    one_step = "--refusals drop --max_steps 1 --no-bf16"
    for command, lines in {
        f"{READERS['spd.py']} {one_step}": (
            f"learn: {plan}; teachers u, w; 1 refusals dropped",
            "the student after supervised pre-distillation (Eq. 6) is out/student",
            "learn: out is finished"),
        f"{READERS['spd.py']} {one_step} --no-merge": (
            "the student after supervised pre-distillation (Eq. 6) is the adapter in out/adapter "
            "on student; --merge writes student/",),
        f"{READERS['selfdistill.py']} --refusals drop --no-bf16 --max_new_tokens 3": (
            "compare: 4 studies, 1 refusals left out",),
        f"{READERS['apo.py']} {one_step}": (
            f"critique: {plan}; u, w; 1 refusals dropped",
            "critique: the cached reference belongs to other input, computing it again",
            "the student after preference optimisation (Eq. 11) is out/student"),
    }.items():
        done = run(Case(command, "", files))
        assert done.status == 0, done.stderr
        assert set(lines) <= set(done.stdout.splitlines())


# what tools/check.py prints of a record that is not good, behind FILE:LINE, and with which status
CHECKED = {
    f"image, {what}": Case(
        f"{CHECK} --images {'films' if 'films/x' in files else '.'}",
        f"studies.jsonl:1: {kind if kind == 'field' else f'image {kind}'}: {says}", files)
    for what, (files, says, kind) in BAD_IMAGES.items()}
CHECKED |= {
    what: Case(CHECK, f"studies.jsonl:2: json: {says}", studies(line))
    for what, (line, says) in BAD_LINES.items()}
CHECKED |= {
    what: Case(
        CHECK,
        f"studies.jsonl:2: {kind}: " + says.removeprefix('"id": ' if kind == "duplicate" else ""),
        studies(line))
    for what, (kind, line, says) in BAD_RECORDS.items()}
CHECKED |= {
    "two teachers with one text": Case(
        CHECK,
        "studies.jsonl:2: same text: 'u' and 'w' say the same, expected a text of each teacher's "
        "own",
        studies(record("b", trajectories={"u": "x", "w": "X "}))),
    "a refusal": Case(
        CHECK, "studies.jsonl:2: refusal: 'u' declines: 'I cannot say'",
        studies(record("b", trajectories={"u": "I cannot say"}))),
    "thinking without an answer": Case(
        CHECK, "studies.jsonl:2: refusal: 'u' only thinks",
        studies(record("b", trajectories={"u": "<think>no edema</think>"}))),
    "a mark of a chat template": Case(
        CHECK,
        "studies.jsonl:2: chat marker: 'u' says '<|im_end|>', expected the answer without marks of "
        "a chat template",
        studies(record("b", trajectories={"u": "no edema<|im_end|>"}))),
    "a loop": Case(
        CHECK,
        "studies.jsonl:2: loop: 'u' says 'mild edema' 5 times or more, expected it once",
        studies(record("b", trajectories={"u": "mild edema, " * 5}))),
    "nobody asked yet": Case(
        CHECK,
        "warning: there is nothing to train on before tools/collect.py or tools/convert.py studies "
        "--into has put trajectories in",
        {"studies.jsonl": [record("a", trajectories=None), "{"]}),
    "a prompt with the diagnosis": Case(
        f"{CHECK} --prompt teacher",
        "studies.jsonl:1: leak: the student is asked 'why Effusion?', expected no diagnosis"),
    "a prompt with a finding": Case(
        CHECK,
        "studies.jsonl:1: leak: the student's prompt says Effusion, as this study's labels do, "
        "expected no diagnosis",
        task(prompts={**TASK["prompts"], "student": "why mild effusion?"})),
    "too long": Case(
        f"{CHECK} --student student --max_tokens 9",
        "studies.jsonl:1: length: ... tokens, expected at most --max_tokens 9"),
    "too long, without images": Case(
        f"{CHECK} --student student --max_tokens 9 --skip_images",
        "studies.jsonl:1: length: ... tokens, expected at most --max_tokens 9"),
}


@pytest.mark.parametrize("name", CHECKED)
def test_check_names_it_with_its_kind_and_ends_with_1(run, name):
    case = CHECKED[name]
    done = run(case)
    assert done.status == 1 and not done.stderr.strip().startswith("tools/check.py:"), done.stderr
    line = rf"^{as_expression(case.says, done.here)}$"
    assert re.search(line, done.stdout, re.MULTILINE), f"{done.stdout}instead of {case.says}"
    assert set(done.after) - set(done.before) == {"good.jsonl", "rejected.jsonl"}
    assert all(done.after[path] == there for path, there in done.before.items())


# --------------------------------------------------- odd films and texts that are taken as they are

def loss_of(run, film=films, text="mild effusion"):
    """(the first step's loss, its tokens); to the bit a function of what the student was shown.
    tools/check.py finds no fault in it but the chat markers."""
    files = {"film.png": film, "studies.jsonl": [record("a", trajectories={"u": text})]}
    check = "tools/check.py studies.jsonl --task_file task.json --allow 'chat marker'"
    assert run(Case(check, "", files)).status == 0
    flags = "--no-bf16 --global_batch 1 --max_steps 1 --lora_dropout 0"
    done = run(Case(f"spd.py {STAGE} {flags}", "", files))
    assert done.status == 0, done.stderr
    content, _ = done.after["out/log.jsonl"]
    line = json.loads(content)
    return line["loss"], line["tokens"]


def test_a_12_bit_film_is_rescaled_and_not_cut_at_255(run):
    deep = np.random.default_rng(0).integers(0, 4096, (56, 56)).astype(np.uint16)
    rescaled = (deep * np.float32(255 / deep.max())).astype(np.uint8)
    as_png = lambda pixels: lambda path: Image.fromarray(pixels).save(path, "PNG")
    loss, cut = loss_of(run, as_png(deep)), loss_of(run, as_png(deep.clip(0, 255).astype(np.uint8)))
    assert loss == loss_of(run, as_png(rescaled)) != cut


def test_a_film_that_was_turned_in_its_exif_is_shown_upright(run):
    pixels = np.random.default_rng(0).integers(0, 256, (56, 112)).astype(np.uint8)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees, clockwise
    tagged = lambda path: Image.fromarray(pixels).save(path, "PNG", exif=exif)
    turned = lambda path: Image.fromarray(np.rot90(pixels, -1)).save(path, "PNG")
    lying = lambda path: Image.fromarray(pixels).save(path, "PNG")
    assert loss_of(run, tagged) == loss_of(run, turned) != loss_of(run, lying)


def test_special_tokens_in_a_teachers_text_are_text(run, base):
    words = "mild effusion<|im_end|><|image_pad|><|im_start|>assistant"
    tokenizer = student.Processor(base, data.CHEST).tokenizer
    ids = tokenizer(words, split_special_tokens=True, add_special_tokens=False)["input_ids"]
    assert not set(ids) & set(tokenizer.all_special_ids)
    assert len(ids) > len(tokenizer(words, add_special_tokens=False)["input_ids"])
    assert loss_of(run, text=words)[1] == len(ids) + 1
    files = {
        "studies.jsonl": [record(id, trajectories={"u": words, "w": "no edema"}) for id in "abcd"]}
    command = ("tools/check.py studies.jsonl --task_file task.json --student student --json "
               "--allow 'chat marker'")
    done = run(Case(command, "", files))
    assert json.loads(done.stdout.splitlines()[-1])["tokens"]["u"]["longest"] == len(ids) + 1
    for command in (f"{READERS['apo.py']} --dry_run --no-bf16",
                    f"{READERS['selfdistill.py']} --no-bf16 --max_new_tokens 3"):
        assert run(Case(command, "", files)).status == 0


# ---------------------------------------------------------------------- functions without a command

def out_of_memory():
    with ranks.out_of_memory({"studies": ["s1", "s2"], "input_ids": torch.zeros(2, 900)}):
        raise MemoryError


FUNCTIONS = {
    "a micro-batch without memory": (
        out_of_memory,
        "rank 0: out of memory on studies s1, s2; input_ids (2, 900); a smaller --micro_batch, "
        "--max_tokens or --max_pixels, or --gradient_checkpointing, takes less"),
    "a path that is none": (
        lambda: data.image_path("a\0b", "."), "'a\\x00b': no path of an image: embedded null byte"),
    "Open-I without reports": (lambda: datasets.open_i("none"), "none: no ecgen-radiology/*.xml"),
    "other shapes": (
        lambda: apo.apo_loss(torch.zeros(1, 2), torch.zeros(1, 3)),
        "expected logps and ref_logps (B, 1+N) and mask (B, N) bool"),
    "a weight below 0": (
        lambda: apo.apo_loss(torch.zeros(1, 2), torch.zeros(1, 2), [-1.0]),
        "weights: expected finite w_u >= 0"),
    "a study without teachers": (
        lambda: apo.apo_loss(torch.zeros(1, 2), torch.zeros(1, 2), mask=torch.tensor([[False]])),
        "mask: expected at least one teacher in every row"),
    "an unknown world": (
        lambda: scale_world.Teachers(0, "mars"),
        "world is 'mars', expected one of nuisance, class, independent"),
    "texts and references": (
        lambda: findings.finding_scores([{}], []), "1 predicted texts but 0 reference texts"),
    "no texts": (lambda: findings.finding_scores([], []), "no texts to score"),
    "a policy": (
        lambda: findings.finding_scores([{}], [{}], "maybe"),
        "uncertain must be negative, positive or ignore, not 'maybe'"),
    "a finding": (
        lambda: findings.finding_scores([{"Gout": 1}], [{}]),
        "'Gout': 1 is not one of the 14 findings with value 1, 0 or -1"),
    "labels and predictions": (lambda: scores.accuracy([1], []), "unequal lengths: 1 and 0"),
    "no labels": (lambda: scores.accuracy([], []), "empty input"),
    "a label": (lambda: scores.auc([2], [0.0]), "labels must be 0 or 1"),
    "a score": (lambda: scores.auc([1], [math.nan]), "a score is NaN"),
    "classes": (
        lambda: scores.macro_auc({"a": [1]}, {"b": [1.0]}),
        "labels have the classes ['a'], scores ['b']"),
    "a class's labels": (
        lambda: scores.macro_auc({"a": [2]}, {"a": [1.0]}), "a: labels must be 0 or 1"),
    "nothing to draw": (lambda: scores.bootstrap_interval(len), "no column to resample"),
    "a level": (
        lambda: scores.bootstrap_interval(len, [1], level=2),
        "level must lie between 0 and 1 and samples be at least 1, not 2 and 1000"),
    "a statistic": (
        lambda: scores.bootstrap_interval(lambda drawn: None, [1]),
        "the statistic is undefined in every resample"),
    "nothing to compare": (lambda: text.bleu({}, {}), "empty input"),
}


@functools.cache
def outcome_of(name):
    """The exception of a function of the table."""
    function, _ = FUNCTIONS[name]
    try:
        return function()
    except (ValueError, OSError, SystemExit) as error:
        return error


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_refuses_with_its_message(name):
    _, says = FUNCTIONS[name]
    assert str(outcome_of(name)) == says


# ------------------------------------------------------------------------------------- completeness

# messages that take a server, a checkpoint or a fault of the machine: file, words of the message
# -> the test that brings it about
ELSEWHERE = {
    ("sampling.py", "the prompt has {prompt_tokens} tokens"):
        "test_server.py::test_a_server_that_sees_another_prompt_is_found_at_its_first_answer",
    ("data.py", "pixels in tiles of"):
        "runtime/test_security.py::"
        "test_an_image_that_costs_far_more_than_its_pixels_is_refused",
    ("data.py", "a JPEG of"):
        "runtime/test_security.py::"
        "test_an_image_that_costs_far_more_than_its_pixels_is_refused",
    ("student.py", "expected numbers of pixels"):
        "test_student.py::test_nothing_in_a_folder_turns_max_pixels_off",
    ("student.py", "enlarges an image to"):
        "test_student.py::test_a_folder_that_enlarges_an_image_above_max_pixels_is_refused",
    ("student.py", "{key} is {found!r}"):
        "test_student.py::test_nothing_in_a_folder_turns_max_pixels_off",
    ("student.py", "--max_pixels {max_pixels}: {config}"):
        "test_student.py::"
        "test_more_pixels_than_the_folder_allows_are_refused_and_none_given_are_as_many",
    ("student.py", "SystemExit(f'transformers"):
        "test_student.py::test_an_older_transformers_is_refused",
    ("student.py", "expected 5.5.4 to 5.24"):
        "test_student.py::test_an_older_transformers_is_refused",
    ("training.py", "a student that is trained from it"):
        "test_training.py::test_what_could_not_be_saved_is_said_before_the_first_step",
    ("apo.py", "with it the first loss of study"):
        "test_reference.py::"
        "test_a_cached_reference_of_other_films_is_told_by_the_first_loss_and_made_again",
    ("apo.py", "its first loss is"):
        "test_reference.py::test_a_reference_that_is_off_again_ends_the_run",
    ("runtime/adapter.py", ": expected {expected}, found"):
        "test_adapter.py::test_a_config_that_means_something_else_is_refused",
    ("runtime/adapter.py", "expected a JSON object"):
        "test_adapter.py::test_a_config_that_is_no_object_is_refused",
    ("runtime/adapter.py", "not another adapter"):
        "test_adapter.py::test_a_folder_without_its_weights_or_with_two_meanings_is_refused",
    ("student.py", "--student: empty"):
        "runtime/test_claims.py::test_a_name_without_a_student_is_refused",
    ("student.py", "has the shape"):
        "test_student.py::test_weights_that_are_not_those_of_the_config_are_refused_by_name",
    ("runtime/ranks.py", "expected the same on all ranks"):
        "runtime/test_nodes.py::test_ranks_with_other_inputs_stop_before_the_first_step",
    ("student.py", "expected one of them"):
        "test_adapter.py::test_a_folder_without_its_weights_or_with_two_meanings_is_refused",
    ("student.py", "expected the adapter's weights"):
        "test_adapter.py::test_a_folder_without_its_weights_or_with_two_meanings_is_refused",
    ("student.py", "is no linear layer of the decoder"):
        "test_adapter.py::test_weights_that_do_not_fit_the_base_are_refused",
    ("student.py", "holds no LoRA weights"):
        "test_adapter.py::test_weights_that_do_not_fit_the_base_are_refused",
    ("student.py", "the config's modules_to_save"):
        "test_adapter.py::test_weights_that_do_not_fit_the_base_are_refused",
    ("student.py", "is an adapter, expected"):
        "test_adapter.py::test_what_cannot_train_on_an_adapter_is_refused_before_any_work",
    ("student.py", "goes on with this adapter"):
        "test_adapter.py::test_what_cannot_train_on_an_adapter_is_refused_before_any_work",
    ("training.py", "has lost a part of what was learnt"):
        "test_adapter.py::test_the_end_of_a_lora_run_says_what_merging_lost",
    ("apo.py", "warning: {warning}"):
        "test_reference.py::test_the_log_warns_of_the_style_shortcut_and_of_a_falling_t_plus",
    ("runtime/checkpoint.py", "holds other parameters"):
        "runtime/test_checkpoint.py::test_a_checkpoint_of_other_parameters_is_refused",
    ("runtime/checkpoint.py", "falling back"):
        "runtime/test_checkpoint.py::test_a_damaged_checkpoint_falls_back_to_the_one_before",
    ("runtime/checkpoint.py", "its own sha256 in it"):
        "runtime/test_checkpoint.py::"
        "test_a_bit_of_the_manifest_that_flips_falls_back_to_the_checkpoint_before",
    ("runtime/run_folder.py", "nothing keeps a second run out"):
        "runtime/test_checkpoint.py::test_a_disk_without_locks_is_warned_of",
    ("selfdistill.py", "more than a fifth"):
        "test_selfdistill.py::test_many_studies_without_a_positive_are_warned_of",
    ("runtime/log.py", "of the step is"):
        "runtime/test_faults.py::test_a_loss_that_is_not_finite_stops_all_ranks_before_the_step",
    ("scale_model/base.py", "not the base student"):
        "experiment/test_scale_model.py::test_another_base_is_refused",
    ("experiment/ladder.py", "ValueError(str(error))"):
        "experiment/test_ladder.py::test_a_chain_that_is_refused_ends_the_command_too",
    ("experiment/ladder.py", "chain.log"):
        "experiment/test_ladder.py::test_a_chain_that_fails_names_its_log",
    ("runtime/endpoint.py", "_refusal("): "runtime/test_endpoint.py::test_every_fault_has_its_kind",
    ("runtime/endpoint.py", "with a body beyond"):
        "runtime/test_endpoint.py::"
        "test_an_answer_beyond_the_bound_is_named_and_one_within_it_is_taken",
    ("runtime/endpoint.py", "cut or broken JSON"):
        "runtime/test_endpoint.py::test_every_fault_has_its_kind",
    ("runtime/endpoint.py", "without a completion"):
        "runtime/test_endpoint.py::test_every_fault_has_its_kind",
    ("runtime/endpoint.py", "lost=sent"):
        "runtime/test_endpoint.py::"
        "test_a_server_that_is_not_there_is_asked_again_and_bills_nothing",
    ("runtime/endpoint.py", "nested too deeply"):
        "runtime/test_endpoint.py::test_every_fault_has_its_kind",
    ("runtime/endpoint.py", "any more; nothing was sent"):
        "runtime/test_endpoint.py::"
        "test_a_name_that_resolves_elsewhere_between_check_and_connection_gets_nothing",
    ("runtime/endpoint.py", "its certificate"):
        "runtime/test_endpoint.py::"
        "test_a_certificate_that_does_not_verify_stops_and_nothing_is_sent",
    ("runtime/endpoint.py", "redirects are not followed"):
        "runtime/test_endpoint.py::test_neither_redirects_nor_proxies_are_followed",
    ("data.py", "several pages or frames"):
        "test_data.py::test_each_kind_of_film_is_shown_as_it_is_or_refused",
    ("data.py", "bits a colour"):
        "test_data.py::test_each_kind_of_film_is_shown_as_it_is_or_refused",
    ("data.py", "expected finite ones"):
        "test_data.py::test_each_kind_of_film_is_shown_as_it_is_or_refused",
    ("data.py", "only its alpha channel"):
        "test_data.py::test_each_kind_of_film_is_shown_as_it_is_or_refused",
    ("student.py", "expected .safetensors files only"):
        "runtime/test_security.py::test_nothing_in_a_students_folder_is_unpickled",
    ("sampling.py", "serves"): "test_server.py::test_the_model_is_the_servers_only_one_or_named",
    ("selfdistill.py", "what is written stays"):
        "test_server.py::test_the_command_says_in_one_line_that_the_server_is_gone",
    ("sampling.py", "endpoint.Failure(failure.kind"):
        "test_server.py::test_the_command_says_in_one_line_that_the_server_is_gone",
    ("tools/convert.py", "patients of MS-CXR-T too"):
        "tools/test_convert.py::test_without_prepared_records_it_warns_of_the_test_sets_patients",
    ("training.py", "gradient norm"):
        "test_training.py::test_a_gradient_that_is_not_finite_moves_nothing",
    ("apo.py", "is damaged"):
        "test_reference.py::"
        "test_the_reference_is_the_students_and_its_cache_is_used_for_the_same_key_alone",
}


CALLS = ("parser.error", "expect", "_refuse")  # of a message, without a `raise`


def has_words(node):
    """Whether there is a text somewhere in the node of a syntax tree."""
    return any(isinstance(inner, ast.Constant) and isinstance(inner.value, str)
               for inner in ast.walk(node))


def raises_words(node):
    """Whether the node raises an exception that says something."""
    if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call) or not node.exc.args:
        return False
    return has_words(node) or ast.unparse(node.exc.func) != "SystemExit"


def called_by(node):
    """The name of the function that a node calls, else ''."""
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def raised_in(tree):
    """Yields the nodes that end a command with a message."""
    for node in ast.walk(tree):
        if raises_words(node) or called_by(node) in CALLS:
            yield node


def printed_in(tree):
    """Yields (node, regular expression) of the texts with 'expected' or 'warning' elsewhere."""
    inside = set()  # messages that are raised, docstrings, the flags' help, parts of a longer text
    for node in ast.walk(tree):
        called = called_by(node)
        documents = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        raised = isinstance(node, ast.Raise) or called in CALLS
        if raised or documents or called.endswith("add_argument"):
            inside.update(map(id, ast.walk(node)))
        if isinstance(node, ast.JoinedStr):
            inside.update(map(id, node.values))
    for node in ast.walk(tree):
        if id(node) in inside or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [part.value if isinstance(part, ast.Constant) else "" for part in parts]
        if any(isinstance(said, str) and re.search(r"\bexpected |\bwarning: ", said)
               for said in texts):
            yield node, ".*".join(map(re.escape, texts))


def messages():
    """The project's messages, found in its sources.

    Returns (raised, printed):
    raised   [(file, first line, last line, source)] of each exception that is raised with words,
             each call of parser.error or of a reader's own `expect`
    printed  [(file, regular expression, source)] of the sentences with 'expected' or 'warning' that
             are printed or collected without being raised
    """
    raised, printed = [], []
    in_folders = (path for path in ROOT.glob("*/*.py") if path.parent.name != "tests")
    for path in sorted([*ROOT.glob("*.py"), *in_folders]):
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        raised += [(name, node.lineno, node.end_lineno, ast.unparse(node))
                   for node in raised_in(tree)]
        printed += [(name, expression, ast.unparse(node)) for node, expression in printed_in(tree)]
    return raised, printed


def test_every_message_has_a_case(run):
    outcomes = [run(case) for case in [*CASES.values(), *CHECKED.values()]]
    reached = set().union(*(done.sites for done in outcomes),
                          *(sites_of(outcome_of(name)) for name in FUNCTIONS))
    said = "\n".join(done.stderr + done.stdout for done in outcomes)
    raised, printed = messages()
    left = [(name, source) for name, first, last, source in raised
            if not any((name, line) in reached for line in range(first, last + 1))]
    left += [(name, source) for name, expression, source in printed
             if not re.search(expression, said)]
    elsewhere = {(name, source): test for name, source in left
                 for (file, words), test in ELSEWHERE.items() if file == name and words in source}
    assert [message for message in left if message not in elsewhere] == []
    used = set(elsewhere.values())
    assert used == set(ELSEWHERE.values()), "no longer needed in ELSEWHERE"
    for test in used:
        file, _, function = test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test
