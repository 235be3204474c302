"""Whatever is in a file or a text: a result of the documented shape or the documented error, within
a bounded time.

Valid files are mutated (bytes flipped, cut, inserted, lines doubled, values replaced by other
JSON); texts are made of the words and marks that the rules look for. The same examples every time;
FUZZ_EXAMPLES=5000 looks at more of them.
"""

import contextlib
import gzip
import importlib
import json
import math
import os
import re
import signal
import sys
import time

import check
import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import GOOD_TASK, RECORD
from test_datasets import (
    write_chestx_det10,
    write_chestx_ray14,
    write_chexpert,
    write_ms_cxr_t,
    write_open_i,
)

import data
import selfdistill
from evaluation import ablation, datasets, tables
from metrics import __main__ as metrics_command
from metrics import findings, findings_text, meteor, scores, text
from runtime import endpoint, records

sys.path.insert(0, str(ROOT / "tools"))
convert, prepare_mimic, charts = map(
    importlib.import_module, ("convert", "prepare_mimic", "charts"))

fuzz = settings(
    derandomize=True, database=None, deadline=None,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", 100)),
    suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])


class TooSlow(BaseException):
    """No Exception: a reader that turns those into its own error must not swallow it."""


@contextlib.contextmanager
def within(seconds, asleep=False):
    """Fails what takes longer.

    seconds  of this process, so that a busy machine changes nothing
    asleep   they are seconds of the clock
    """
    def stop(*_):
        raise TooSlow

    if asleep:
        number, timer = signal.SIGALRM, signal.ITIMER_REAL
    else:
        number, timer = signal.SIGPROF, signal.ITIMER_PROF
    before = signal.signal(number, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    except TooSlow:
        raise AssertionError(f"takes more than {seconds} s") from None
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, before)


def test_what_hangs_is_found():
    with pytest.raises(AssertionError, match="takes more than 0.2 s"), within(0.2):
        re.match("(a*)*b", "a" * 100)


# ---------------------------------------------------------------------------------------- mutations

ODD = [
    b"\0", b"\xef\xbb\xbf", b'"\\ud800"', b"\\udfff", b"1" * 5000, b"NaN", b"-Infinity", b"1e999",
    b"[" * 100_000, b'{"a":' * 3000, b"[" * 900 + b"]" * 900, "\u2028".encode(), b"\r", b"\r\n",
    b"\n", b'"', b"'", b",", b":", b"\\", b"\xff", b"\xc3", b"\x1b[2J", b"../", b"/", b"null",
    b"true", b"{}", b"[]", b'""', b"-0.0", b"0" * 30, "\u00b2".encode(), "\u0663".encode(),
    "\u202e".encode(), b"<", b"&", b"]]>", b"<!--", b"&#27;", b" " * 3000, b"{finding}", b"*", b"(",
    b"a" * 140_000, "x.png".encode("utf-16")]
ODD_VALUES = [10 ** 400, 1e308, "1", "\x1b[2J", "../x", "\ud800", "\u00b2", "a" * 5000, {"": 0},
              [[]], ["x.png"]]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(ODD_VALUES),
    lambda inner: (st.lists(inner, max_size=3)
                   | st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5)


def places(value, at=()):
    """The path to every value inside a JSON value."""
    yield at
    inside = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, inner in inside:
        yield from places(inner, (*at, key))


@st.composite
def other_value(draw, content):
    """A JSON text (or one a line) in which a value is another one, or a key is."""
    one_a_line = content.count(b"\n}\n") == 0 and content.strip().count(b"\n")
    lines = content.decode().split("\n") if one_a_line else [content.decode()]
    lines = [line for line in lines if line.strip()]
    which = draw(st.integers(0, len(lines) - 1))
    whole = {"": json.loads(lines[which])}
    at = ("", *draw(st.sampled_from(list(places(whole[""])))))
    inner = whole
    for key in at[:-1]:
        inner = inner[key]
    if isinstance(inner, dict) and len(at) > 1 and draw(st.integers(0, 3)) == 0:
        inner[draw(st.text(max_size=4))] = inner.pop(at[-1])
    else:
        inner[at[-1]] = draw(VALUES)
    lines[which] = json.dumps(whole[""])
    return "\n".join(lines).encode() + b"\n"


@st.composite
def mutated(draw, *valid):
    """One of the valid contents with one to three changes, or any bytes."""
    content = draw(st.sampled_from(valid))
    how = draw(st.integers(0, 7))
    if how == 0:
        return draw(st.binary(max_size=200))
    if how < 4 and content.lstrip()[:1] in (b"{", b"["):
        return draw(other_value(content))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(content)))
        to = min(len(content), at + draw(st.integers(0, 20)))
        change = draw(st.integers(0, 6))
        if change == 0:
            content = content[:at] + bytes([draw(st.integers(0, 255))]) + content[at + 1:]
        elif change == 1:
            content = content[:at] if draw(st.booleans()) else content[:at] + content[to:]
        elif change == 2:
            content = content[:at] + draw(st.sampled_from(ODD)) + content[at:]
        elif change == 3:
            content = content[:at] + draw(st.sampled_from(ODD)) + content[to:]
        elif change == 4:
            content = draw(st.sampled_from([
                b"\xef\xbb\xbf" + content, content.replace(b"\n", b"\r\n"),
                content.replace(b"\n", b"\r"), content.replace(b"\n", b"\n\n"), content * 2]))
        elif lines := content.splitlines(True):
            line = lines[min(len(lines) - 1, at * len(lines) // (len(content) + 1))]
            content = content.replace(line, line * 2 if change == 5 else b"", 1)
    return content


def holds(path, content, read, shape, names=None):
    """A file of any content is read, or refused with a message.

    read()  gives what `shape` accepts, or raises a ValueError with nothing in it that a terminal
            would obey
    names   regular expression of what the ValueError names; None: the file's path
    """
    path.write_bytes(content)
    with within(2):
        try:
            result = read()
        except ValueError as error:
            message = str(error)
            assert re.search(names or re.escape(str(path)), message), message[:500]
            assert not records.CONTROL.search(message.replace("\n", "")), ascii(message)[:500]
            return
    shape(result)


def is_json(value):
    assert json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8")) == value


# ------------------------------------------------------------------------------------------ records

def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CHEST_RECORD = {
    "id": "a", "image": ["a.png", "b/c.png"], "labels": {"Edema": 1, "Fracture": -1},
    "split": "train", "report": "No edema.",
    "trajectories": {"gpt-5": "Edema is seen.", "grok-4": "I cannot help with that."}}
STUDIES = [
    lines(CHEST_RECORD, {**CHEST_RECORD, "id": "b", "image": "b.png", "when": [1, {"x": None}]}),
    lines(RECORD, {**RECORD, "id": "b"})]
POSITIVES = lines(
    {"id": "a", "t_plus": "Edema.", "seed": "0 a 0", "tokens": 3, "finish": "stop"},
    {"id": "b", "t_plus": "No edema."})
TWO = data.make_task(GOOD_TASK, "task.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@fuzz
@given(content=mutated(*STUDIES, POSITIVES))
def test_json_lines(folder, content):
    path = folder / "lines.jsonl"

    def shape(found):
        for number, record in found:
            assert type(number) is int and isinstance(record, dict)
            is_json(record)

    holds(
        path, content, lambda: list(records.read_jsonl(path)), shape,
        rf"^{re.escape(str(path))}:\d+: ")


def test_what_is_read_can_be_written_by_who_is_called_from_further_down():
    """Where Python gives up on nested JSON depends on the depth of the call."""
    def write(record, below=60):
        return write(record, below - 1) if below else records.line_of(record)

    for depth in (1, 50, 99, 101, *range(300, 1000, 10), 100_000):
        line = b'{"id": ' + b"[" * depth + b"]" * depth + b"}\n"
        if depth < 100:
            assert write(records.parse_line(line)) == line
        else:
            why = "not a JSON object in UTF-8: (nested deeper than 100|maximum recursion)"
            with pytest.raises(ValueError, match=why):
                write(records.parse_line(line))


@pytest.mark.parametrize("task", [data.CHEST, TWO], ids=["chest", "two"])
@fuzz
@given(content=mutated(*STUDIES))
# an id is printed by whoever stumbles over its study
@example(content=lines({**RECORD, "id": "\x1b]0;title\x07"}))
@example(content=lines({**RECORD, "image": "films/\x9b2Jx.png"}))
@example(content=lines({**RECORD, "trajectories": {"gpt\r5": "x"}}))
@example(content=lines({**RECORD, "id": "a\nb: image missing"}))
def test_studies(folder, task, content):
    path = folder / "studies.jsonl"

    def shape(studies):
        assert studies and len({study.id for study in studies}) == len(studies)
        for study in studies:
            assert all(map(records.is_name, [study.id, *study.images, *study.trajectories]))
            assert 1 <= len(study.images) <= 2
            assert all(finding in task.findings and value in task.classes
                       for finding, value in study.labels.items())
            assert all(isinstance(said, str) and said.strip()
                       for said in study.trajectories.values())
            assert all(value is None or isinstance(value, str)
                       for value in (study.report, study.split, study.t_plus))
            is_json(study.record)

    holds(path, content, lambda: data.read_studies(path, task), shape)


@fuzz
@given(content=mutated(POSITIVES))
def test_positives(folder, content):
    path = folder / "positives.jsonl"

    def shape(chosen):
        assert chosen and all(isinstance(study.t_plus, str) and study.t_plus for study in chosen)

    studies = lambda: [data.Study(name, ("x.png",), {}, {}) for name in "ab"]
    holds(path, content, lambda: data.read_positives(path, studies()), shape)


@fuzz
@given(content=mutated(*STUDIES[:1]))
def test_what_check_calls_good_is_what_the_stages_read(folder, content):
    path, good = folder / "check.jsonl", folder / "good.jsonl"

    def shape(found):
        kept, left = (path.read_bytes().split(b"\n")[:-1]
                      for path in (good, folder / "rejected.jsonl"))
        assert found["records"] == len(kept) + len(left)
        assert found["good"] == len(kept)
        assert set(found["kinds"]) <= set(check.KINDS)
        keys = {"line", "faults", "record"}, {"line", "faults", "text"}
        assert all(set(json.loads(line)) in keys for line in left)
        if kept:
            assert len(data.read_studies(good, data.CHEST)) == len(kept)

    args = check.parse([str(path), "--skip_images", "--out", str(good), "--allow", "refusal"])
    holds(path, content, lambda: check.check(args), shape)


@fuzz
@given(name=st.text(max_size=30), printed=st.text(max_size=30))
def test_what_check_prints_obeys_nobody(folder, name, printed):
    record = {
        **CHEST_RECORD, "id": name, "image": printed, "trajectories": {printed: name},
        "labels": {name: printed}}
    for sentence in data.record_faults(record, data.CHEST):
        assert not records.CONTROL.search(sentence), ascii(sentence)


# ----------------------------------------------------------------------------------------- the task

@fuzz
@given(content=mutated(json.dumps(GOOD_TASK).encode()))
@example(content=json.dumps({**GOOD_TASK, "name": ["x"]}).encode())
@example(content=json.dumps({**GOOD_TASK, "findings": {"\x1b[2J": ["edema"]}}).encode())
def test_task_files(folder, content):
    path = folder / "task.json"

    def shape(task):
        assert isinstance(task.name, str)
        assert all(map(records.is_name, [*task.findings, *task.classes]))
        assert set(task.positive) <= set(task.classes)
        assert {"system", "student", "teacher", "compare"} <= set(task.prompts)
        assert all(isinstance(said, str) for said in task.refusals)
        assert set(data.read_classes("no effusion, edema mild", task).values()) <= set(task.classes)

    holds(path, content, lambda: data.load_task(path), shape)


MARKS = "ab .*+?()[]{}|\\^$#-&~:;\u00e9\u0130\u00df\n1"
MARKED = st.text(st.sampled_from(MARKS), min_size=1, max_size=6).filter(str.strip)
WORDS = MARKED | st.sampled_from([
    "edema", "pleural effusion", "effusion", "pericardial effusion", "{finding}", "*", "\\b",
    "(?i)", "x" * 200, "a" * 50 + "*"])
PHRASES = st.lists(WORDS | st.sampled_from(["*", "no", "{finding}"]), max_size=4).map(
    lambda said: " ".join(["{finding}", *said]))
TASKS = st.fixed_dictionaries({
    "findings": st.dictionaries(
        st.sampled_from(["A", "B", "Edema", "Pleural Effusion"]),
        st.lists(WORDS, min_size=1, max_size=3), min_size=1),
    "classes": st.dictionaries(
        st.sampled_from(["no", "mild", "severe"]), st.lists(PHRASES, min_size=1, max_size=3),
        min_size=1),
    "prompts": st.just(GOOD_TASK["prompts"]), "refusals": st.lists(WORDS, max_size=2)})


@fuzz
@given(
    spec=TASKS,
    said=st.lists(WORDS | st.sampled_from([" ", "\n", "a ", "edema ", "no "]), max_size=12),
    times=st.sampled_from([1, 1, 300]))
@example(spec={**GOOD_TASK, "findings": {"A": ["a"]},
               "classes": {"x": ["{finding} " + "* " * 30 + "z"]}}, said=["a "], times=300)
def test_a_text_is_read_whatever_words_and_phrases_a_task_has(spec, said, times):
    with within(2):
        try:
            task = data.make_task(spec, "task.json")
        except ValueError as error:
            assert str(error).startswith("task.json: expected at most three *")
            return
        read = data.read_classes("".join(said) * times, task)
        assert all(finding in task.findings and value in task.classes
                   for finding, value in read.items())
        assert isinstance(data.is_refusal("".join(said), task), bool)
        assert selfdistill.fault("".join(said), "stop", task) in (
            None, "empty", "refuses", "quotes its readers", "holds a chat marker")


def test_a_metacharacter_in_a_task_is_that_character():
    spec = {
        **GOOD_TASK, "positive": [], "findings": {"A": ["c++ (old)", "a.b"]},
        "classes": {"x": ["no {finding}"], "y": ["{finding} [sic] here"]}}
    task = data.make_task(spec, "task.json")
    assert data.read_classes("No a.b", task) == {"A": "x"}
    assert data.read_classes("no axb", task) == {}
    assert data.read_classes("a.b [sic] here", task) == {"A": "y"}
    assert data.read_classes("a.b s here", task) == {}


# ----------------------------------------------------------------------------------------- datasets

def shape_of_benchmark(bench):
    assert all(isinstance(sentence, str) for sentence in bench.missing + bench.notes)
    for study in bench.studies:
        assert set(study.labels) <= set(bench.task.findings)
        assert set(study.labels.values()) <= set(bench.task.classes)
        assert all(data.image_path(path, bench.images).is_file() for path in study.images)


def write_annotation(folder):
    folder.mkdir()
    Image.new("L", (20, 20)).save(folder / "x.jpg")
    item = {
        "id": "x", "study_id": 1, "report": "No edema .", "image_path": ["x.jpg"], "split": "test"}
    (folder / "annotation.json").write_text(
        json.dumps({"test": [item, {**item, "id": "y"}], "train": []}))


def write_nih(folder):
    folder.mkdir()
    write_chestx_ray14(folder)


def write_ms(folder):
    folder.mkdir()
    write_ms_cxr_t(folder)
    (folder / "chexpert.csv").write_bytes(
        gzip.decompress((folder / "mimic-cxr-2.0.0-chexpert.csv.gz").read_bytes()))


READS = {  # what makes the folder, the file in it that is mutated, the reader
    "MS-CXR-T": (write_ms, "ms.csv", lambda f: datasets.ms_cxr_t(f / "ms.csv", f, "progression")),
    "MS-CXR-T, presence": (
        write_ms, "chexpert.csv",
        lambda f: datasets.ms_cxr_t(f / "ms.csv", f, "presence", f / "chexpert.csv")),
    "annotation": (
        write_annotation, "annotation.json",
        lambda f: datasets.annotation(f / "annotation.json", f)),
    "Open-I": (write_open_i, "ecgen-radiology/1.xml", datasets.open_i),
    "ChestX-ray14, list": (write_nih, "test_list.txt", datasets.chestx_ray14),
    "ChestX-ray14, entries": (write_nih, "Data_Entry_2017.csv", datasets.chestx_ray14),
    "CheXpert, images": (write_chexpert, "valid.csv", datasets.chexpert),
    "CheXpert, studies": (lambda f: write_chexpert(f, True), "groundtruth.csv", datasets.chexpert),
    "ChestX-Det10": (write_chestx_det10, "test.json", datasets.chestx_det10),
}


@pytest.fixture(scope="module", params=READS)
def dataset(request, tmp_path_factory):
    write, file, read = READS[request.param]
    place = tmp_path_factory.mktemp("dataset") / "x"
    write(place)
    return place, file, read


def test_datasets(dataset):
    place, file, read = dataset
    valid = (place / file).read_bytes()

    @fuzz
    @given(content=mutated(valid))
    def run(content):
        holds(place / file, content, lambda: datasets.with_images(read(place)), shape_of_benchmark,
              rf"{re.escape(str(place / file))}(:\d+|: \w*\[\d+\])?: |is there twice" + (
                  "|no study of split" if "list" in file else ""))

    run()


# each once ended in another exception, in an error without its file, or in none at all
PINNED = {
    "CSV, a pair with a NUL twice": (
        "MS-CXR-T",
        lambda c: (lambda line: c + line + line)(
            c.split(b"\n")[1].replace(b"3bea", b"\0bea") + b"\n"),
        r"ms.csv:6: the pair .*\\x00bea0373-a.jpg is there twice"),
    "CSV, no UTF-8": (
        "CheXpert, images", lambda c: c.replace(b"Male", b"M\xe4le", 1),
        r"valid.csv:2: no line of a CSV file in UTF-8"),
    "CSV, a quote without end": (
        "CheXpert, images", lambda c: c.replace(b",Male", b',"Male', 1),
        r"valid.csv:\d: no line of a CSV file"),
    "CSV, a field of 140,000": (
        "CheXpert, images", lambda c: c.replace(b"Male", b"a" * 140_000, 1),
        r"valid.csv:2: no line .*field limit"),
    "CSV, a line without end": (
        "CheXpert, images", lambda c: c + b"a" * 1_100_000,
        r"valid.csv:6: .*a line of less than 1,000,000"),
    "list, no UTF-8": (
        "ChestX-ray14, list", lambda c: c + b"\xff", "test_list.txt: no text in UTF-8"),
    "list, U+2028 ends no line": (
        "ChestX-ray14, list", lambda c: "a.png\u2028b.png\n".encode() * 2 + b"c.png 0 1",
        "test_list.txt:1: 1 labels"),
    "JSON, deep": ("annotation", lambda c: b"[" * 100_000, "annotation.json: not a JSON file"),
    "JSON, a number": ("ChestX-Det10", lambda c: b"5", "test.json: expected a list"),
    "JSON, an object for a name": (
        "ChestX-Det10", lambda c: b'[{"file_name": "x", "syms": [{}]}]',
        r"test.json: \[0\]: expected"),
    "JSON, a number beside a name": (
        "ChestX-Det10", lambda c: b'[{"file_name": "x", "syms": ["x", 1]}]',
        r"test.json: \[0\]: expected"),
    "XML, an encoding of no one": (
        "Open-I", lambda c: c.replace(b"utf-8", b"utf-99"), "1.xml: not an XML file"),
    "XML, an encoding of many bytes": (
        "Open-I", lambda c: c.replace(b"utf-8", b"big5"), "1.xml: not an XML file"),
}


@pytest.mark.parametrize("case", PINNED)
def test_a_fault_that_was_found_stays_an_error_that_names_its_file(tmp_path, case):
    name, change, message = PINNED[case]
    write, file, read = READS[name]
    write(tmp_path / "x")
    path = tmp_path / "x" / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x")


@pytest.mark.parametrize("damage", [
    lambda c: c[:len(c) // 2], lambda c: c[:-6] + b"\0" * 6, lambda c: b"no gzip",
    lambda c: c[:20] + b"\xff" * 9 + c[29:]])
def test_a_damaged_gz_is_an_error_that_names_its_file(tmp_path, damage):
    path = tmp_path / "x.csv.gz"
    path.write_bytes(damage(gzip.compress(b"a,b\n" + b"".join(b"%d,2\n" % i for i in range(2000)))))
    with pytest.raises(ValueError, match=r"x.csv.gz:\d+: no line of a CSV file in UTF-8"):
        list(datasets.csv_columns(path, "a"))


@fuzz
@given(content=mutated(b'a,"b, c",d\n1,2,3\n4,"5\n""x""",6\n'))
def test_tables(folder, content):
    path = folder / "table.csv"
    holds(
        path, content, lambda: list(datasets.csv_columns(path, "a", "d")),
        lambda rows: [{"a": "", "d": ""} | row for _, row in rows],
        rf"^{re.escape(str(path))}:\d+: ")


def write_mimic(root):
    """The three tables of MIMIC-CXR-JPG."""
    root.mkdir()
    tables = {
        "metadata": ("dicom_id,subject_id,study_id,ViewPosition", "a-pa,10000032,50000001,PA",
                     "b-ap,11000011,50000004.0,AP"),
        "split": ("dicom_id,study_id,subject_id,split", "a-pa,50000001,10000032,train",
                  "b-ap,50000004,11000011.0,test"),
        "chexpert": (f"subject_id,study_id,{','.join(data.CHEST.findings)}",
                     f"10000032,50000001{',1.0' * 14}", f"11000011,50000004{',' * 14}")}
    for name, rows in tables.items():
        (root / f"mimic-cxr-2.0.0-{name}.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("name", ["metadata", "split", "chexpert"])
def test_the_tables_of_mimic(tmp_path, name):
    write_mimic(tmp_path / "x")
    path = tmp_path / "x" / f"mimic-cxr-2.0.0-{name}.csv"

    def read():
        root = tmp_path / "x"
        return prepare_mimic.films(root), prepare_mimic.labels(root, "chexpert")

    def shape(found):
        films, labels = found
        for (subject, study), (split, dicom) in films.items():
            assert re.fullmatch("[0-9]+", subject + study)
            assert split in prepare_mimic.SPLITS
            assert dicom is None or re.fullmatch(r"[\w.-]+", dicom)
        assert all(value in (1, 0, -1) for row in labels.values() for value in row.values())

    @fuzz
    @given(content=mutated(path.read_bytes()))
    def run(content):
        holds(path, content, read, shape)

    run()
    (tmp_path / "p10" / "p10000032").mkdir(parents=True)
    report = tmp_path / "p10" / "p10000032" / "s1.txt"
    report.write_bytes(b" FINDINGS:\n r\xf6ntgen\n")
    with pytest.raises(ValueError, match="s1.txt: no text in UTF-8"):
        prepare_mimic.read_report(tmp_path, "10000032", "1", "findings")


@pytest.mark.parametrize("dicom", ["a\nhttp://127.0.0.1/x", "../../x", "/etc/x", "a b", "\x1b[2J"])
def test_a_film_of_mimic_is_no_path_and_no_line_of_the_list_to_fetch(tmp_path, dicom):
    write_mimic(tmp_path / "x")
    for name in ("metadata", "split"):
        path = tmp_path / "x" / f"mimic-cxr-2.0.0-{name}.csv"
        path.write_text(path.read_text().replace("a-pa", f'"{dicom}"'))
    message = r"split.csv:\d: dicom_id '.*', expected letters, digits and hyphens"
    with pytest.raises(ValueError, match=message):
        prepare_mimic.films(tmp_path / "x")


@pytest.mark.parametrize("read", [
    records.read_json, lambda path: list(records.read_jsonl(path)), data.load_task,
    datasets.chestx_det10, convert.read_mapping, endpoint.read_endpoints,
    lambda path: tables.collect([path])])
@pytest.mark.parametrize("content, message", [
    ('{"a": 1, "a": 2}', "the same key twice"), ('[{"a": {"b": NaN}}]', "NaN is not JSON"),
    ('{"a": "\\ud800"}', "surrogate")])
def test_no_json_reader_guesses(tmp_path, read, content, message):
    path = tmp_path / "test.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}:.*{message}"):
        read(tmp_path if read is datasets.chestx_det10 else path)


# ----------------------------------------------------------------------------- files from elsewhere

SAID = [{"by": "a", "text": "Edema."}]
FOREIGN = {
    "x.csv": b'image,said,by\ns1.png,Edema.,a\ns1.png,"No edema,\nsaid",b\n',
    "x.json": json.dumps([{"id": 7, "image": "x.png", "labels": {"Edema": "positive"},
                           "said": SAID}]).encode(),
    "x.jsonl": lines({"id": "7", "image": "x.png", "labels": {"Edema": 1}, "said": SAID})}
JSON_MAPPING = {"id": "id", "image": "image", "labels": "labels", "classes": {"positive": 1},
                "trajectories": {"teacher": "said.0.by", "text": "said.0.text"}}
CSV_MAPPING = {
    "id": {"field": "image", "match": "s[0-9]"}, "image": "image",
    "trajectories": {"teacher": "by", "text": "said"}}


@pytest.mark.parametrize("name", FOREIGN)
@fuzz
@given(data=st.data())
def test_records_from_elsewhere(folder, name, data):
    mapping, out = folder / "mapping.json", folder / "converted.jsonl"
    mapping.write_text(json.dumps(CSV_MAPPING if name == "x.csv" else JSON_MAPPING))
    out.unlink(missing_ok=True)

    def shape(report):
        assert report["studies"] == len(datasets.data.read_studies(out, datasets.data.CHEST))

    args = convert.parse(
        ["studies", str(folder / name), "--mapping", str(mapping), "--out", str(out)])
    holds(folder / name, data.draw(mutated(FOREIGN[name])), lambda: convert.studies(args), shape)


@fuzz
@given(content=mutated(*(json.dumps(mapping).encode() for mapping in (JSON_MAPPING, CSV_MAPPING))))
# a digit that is no number
@example(content=json.dumps({**JSON_MAPPING, "image": "said.\u00b2"}).encode())
# a list is no teacher
@example(content=json.dumps(
    {**JSON_MAPPING, "trajectories": {"teacher": "said", "text": "id"}}).encode())
def test_mappings(folder, content):
    mapping, out = folder / "mapping.json", folder / "converted.jsonl"
    (folder / "x.json").write_bytes(FOREIGN["x.json"])
    args = convert.parse(
        ["studies", str(folder / "x.json"), "--mapping", str(mapping), "--out", str(out)])
    holds(
        mapping, content, lambda: convert.studies(args), is_json,
        rf"{re.escape(str(folder))}/(mapping|x).json")


ENDPOINTS = {
    "gpt-5": {
        "url": "http://localhost:9/v1", "model": "m", "request": {"max_completion_tokens": 4096},
        "timeout": 300, "concurrency": 16, "requests_per_minute": 500,
        "usd_per_million_tokens": {"in": 0.05, "out": 0.4}, "image_tokens": 1100}}


@fuzz
@given(content=mutated(json.dumps(ENDPOINTS).encode()))
@example(content=b"\xff")
# no clock waits so long
@example(content=json.dumps(ENDPOINTS).replace("300", "1" + "0" * 400).encode())
@example(content=b'{"a": {"url": "http://localhost", "model": "m", "request": '
                 + b'{"a":' * 700 + b"0" + b"}" * 702)
def test_endpoints(folder, content):
    path = folder / "endpoints.json"

    def shape(found):
        for name, (server, spec) in found.items():
            assert records.is_name(name)
            assert server.url.startswith("http")
            assert isinstance(server.model, str)
            assert 0 < server.timeout <= 1e9
            json.dumps(endpoint.request(server, []))

    holds(path, content, lambda: endpoint.read_endpoints(path, with_keys=False), shape)


SCORE = {"accuracy": dict.fromkeys(tables.FIVE, 0.5), "mean": 0.5, "unread": 0.0,
         "agreement_with_vote": 0.5, "n": {}}
RESULTS = [
    {"settings": {"command": "classify", "task": None, "studies": "x/studies.jsonl"},
     "rows": {"gpt-5": SCORE, "SPD, all teachers": {"greedy": SCORE}}},
    {"settings": {"command": "classify", "task": "presence", "studies": None},
     "rows": {"S": {"options": SCORE}}},
    {"settings": {"command": "reports"}, "rows": {"S": dict.fromkeys(tables.TEXT_METRICS, 0.1)}},
    {"settings": {"command": "zeroshot"}, "rows": {"S": {"Open-I": {"macro": 0.7}}}}]
CELL = {"world": "w", "row": "SPD", "seed": 0,
        **dict.fromkeys(("greedy", "voiced", "sampled"), SCORE)}
CLAIM = {"claim": "c", "mode": "greedy", "world": "w", "mean": 0.1, "low": 0.0, "high": 0.2,
         "paper": None}
LADDER = {"cells": [CELL], "experiment": {"split": "test"}, "claims": [CLAIM]}


@fuzz
@given(content=mutated(*(json.dumps(content).encode() for content in (*RESULTS, LADDER))))
@example(content=b"[]")
@example(content=b'{"settings": {"command": "reports"}, "rows": {"\\u001b[2J": {"BLEU-1": 0.5}}}')
@example(content=b'{"settings": {"command": "reports"}, "rows": {"a": {"BLEU-1": "x"}}}')
@example(content=b'{"settings": {"command": "classify"}, "rows": {"a": {}}}')
@example(content=b'{"settings": {"command": "reports"}, "rows": {"a": {"BLEU-1": 1'
                 + b"0" * 400 + b"}}}")
def test_results_in_the_papers_tables(folder, content):
    path = folder / "results.json"

    def shape(found):
        page = "\n".join(tables.beside(number, rows) for number, rows in found.items())
        assert not records.CONTROL.search(page.replace("\n", ""))

    holds(path, content, lambda: tables.collect([path]), shape)


@fuzz
@given(content=mutated(json.dumps(LADDER).encode()))
@example(content=b"[" * 100_000)
def test_the_ladders_results(folder, content):
    path = folder / "ladder.json"
    holds(path, content, lambda: ablation.read_ladder(path), lambda found: found[1] + "")


@fuzz
@given(
    content=mutated(b'{"s1": ["no edema ."], "s2": ["edema ."]}'),
    suffix=st.sampled_from(["json", "txt"]))
def test_texts_to_be_scored(folder, content, suffix):
    path, other = folder / f"hypotheses.{suffix}", folder / f"references.{suffix}"
    other.write_bytes(
        b'{"s1": ["no edema ."], "s2": ["edema ."]}' if suffix == "json"
        else b"no edema .\nedema .\n")
    holds(
        path, content, lambda: metrics_command.read_both(path, other),
        lambda pair: text.bleu(*pair))


# -------------------------------------------------------------------------------------------- texts

PIECES = [
    "no ", "No ", "edema", "effusion", "pneumothorax ", "heart ", "enlarged", "is ", "are ",
    "cannot be ", "excluded", "may ", "or ", "and ", "but ", ", ", ". ", ": ", "; ", "? ", "! ",
    "\n", "\n\n", "\r\n", " ", "- ", "* ", "**", "#", "| ", "(", ")", "1. ", "2. ", '"', "'",
    "```json\n", "```", '{"edema": ', "true", "}", "[", "]", "FINDINGS: ", "IMPRESSION:",
    "\n IMPRESSION: ", "\n FINDINGS: \n", "\n \n", "left: ", "right: ", "yes", "Yes.", "As an AI, ",
    "I cannot ", "the reader ", "reader 2 ", "description 3 ", "history of ", "normal", "clear",
    "___", "...", "\u2028", "\x85", "\u00e9", "\u0130", "\U0001f600", "\u200b", "\ud800", "\x00",
    "<|im_end|>", "effusion is a ", "not significant ", "n't ", "\u2713", "\u2014", "0.5", "10%"]
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(fuzz, max_examples=4 * fuzz.max_examples)
@given(said=TEXTS)
def test_a_text_is_read(said):
    with within(2):
        read = findings.read_findings(said)
        assert set(read) <= set(findings.FINDINGS) and read == findings.read_findings(said)
        assert all(reading.value in (1, 0, -1) and isinstance(reading.sentence, str)
                   for reading in read.values())
        if "No Finding" in read:
            assert read["No Finding"].value == 1
            assert all(reading.value == 0 for name, reading in read.items()
                       if name not in ("No Finding", "Support Devices"))
        assert data.read_classes(said, data.CHEST) == {
            name: reading.value for name, reading in read.items()}
        assert not (findings.is_refusal(said) and read)
        assert set(data.read_classes(said, datasets.PROGRESSION).values()) <= set(
            datasets.PROGRESSION.classes)
        assert selfdistill.fault(said, "stop", data.CHEST) in (
            None, "empty", "refuses", "quotes its readers", "holds a chat marker")
        assert selfdistill.fault(said, "length") == "unfinished"
        assert said.strip() or selfdistill.fault(said, "stop") == "empty"


@fuzz
@given(said=TEXTS)
def test_a_report_is_cleaned_and_cut(said):
    with within(2):
        cleaned = text.clean_r2gen(said)
        assert cleaned == " ".join(cleaned.split())
        assert cleaned.endswith(".")
        assert not set(cleaned) & set("\n\"/\\',?;*!%^&_+(){}:<=>@[]")
        sections = datasets.report_sections(said)
        assert all(isinstance(name, str) and part in said for name, part in sections.items())


@pytest.fixture(scope="module")
def scorer():
    pytest.importorskip(
        "pycocoevalcap",
        reason="METEOR's word lists come with pycocoevalcap; it is in tests/requirements.txt")
    return meteor.Meteor()


@fuzz
@given(
    pairs=st.lists(
        st.tuples(TEXTS, st.lists(TEXTS, min_size=1, max_size=3)), min_size=1, max_size=4))
def test_texts_are_scored(scorer, pairs):
    hypotheses = {i: [ours] for i, (ours, _) in enumerate(pairs)}
    references = {i: theirs for i, (_, theirs) in enumerate(pairs)}
    with within(2):
        most_of = {text.bleu: 1, text.rouge_l: 1, text.cider: 10, text.similarity: 1}
        for metric, most in most_of.items():
            score = metric(hypotheses, references)
            assert set(score.items) == set(hypotheses)
            for value in (score.corpus, *score.items.values()):
                for one in value if isinstance(value, tuple) else (value,):
                    assert 0 <= one <= most + 1e-6
        for ours, theirs in pairs:
            score = scorer.compare(scorer.normalise(ours), scorer.normalise(theirs[0]), {}).score
            assert 0 <= score <= 1 + 1e-9


@fuzz
@given(
    rows=st.lists(
        st.tuples(st.sampled_from([0, 1]), st.floats(allow_nan=False)), min_size=1, max_size=20),
    seed=st.integers(0, 9))
def test_answers_are_scored(rows, seed):
    labels, predicted = map(list, zip(*rows))
    with within(2):
        area = scores.auc(labels, predicted)
        assert (area is None) == (len(set(labels)) < 2) and (area is None or 0 <= area <= 1)
        assert area is None or math.isclose(
            area + scores.auc(labels, [-score for score in predicted]), 1)
        assert 0 <= scores.accuracy(labels, predicted) <= 1
        assert 0 <= scores.macro_accuracy(labels, predicted) <= 1
        kappa = scores.cohen_kappa(labels, predicted)
        assert kappa is None or -1 <= kappa <= 1
        low, high = scores.bootstrap_interval(
            scores.accuracy, labels, predicted, samples=20, seed=seed)
        assert 0 <= low <= high <= 1


# --------------------------------------------------------------------------- long runs of one thing

def patterns():
    """{name: compiled expression} of everything at the top of a module."""
    found = {}
    for module in (data, datasets, selfdistill, endpoint, records, findings, findings_text, text,
                   meteor, charts):
        for name, value in vars(module).items():
            for i, entry in enumerate(value if isinstance(value, (list, tuple)) else [value]):
                expression = entry[0] if isinstance(entry, tuple) and entry else entry
                if isinstance(expression, re.Pattern):
                    found[f"{module.__name__}.{name}[{i}]"] = expression
    return found


FULLMATCHED = ("_NO_ANSWER", "NAMES_A_KEY")  # never searched for
REPEATED = [
    " ", "\n", "a", "1", "_", ".", "!", "-", "*", "#", '"', "'", "(", "[", ":", ",", "A", "\n ",
    "\n A", "\n A (", "a ", "no ", "! ", '!"', ". ", "1. ", "not significant ", "cannot be ",
    "collapse of the ", "collapse of a ", "signs of a ", "when a ", "is a ", "effusion (", " (a",
    "left: ", "left : a, ", "reader ", "description 1", "report #1 ", "i do not see a ",
    "a normal chest ", "- ", "1,", "a,,", "''", "\u00e9", "a--", "<|", "\x1b[", "insufficient ",
    "per "]


def test_no_expression_of_the_project_takes_more_than_linear_time():
    """30,000 characters, at each of which a search might begin and go through all the rest."""
    found = patterns()
    assert len(found) > 40
    assert {
        "selfdistill.QUOTES_A_READER[0]", "evaluation.datasets.HEADER[0]",
        "metrics.findings._PHRASE[0]"} <= set(found)
    texts = [piece * (30_000 // len(piece)) + "|" for piece in REPEATED]
    for name, expression in found.items():
        count = lambda said, e=expression: sum(1 for _ in e.finditer(said))
        search = expression.fullmatch if any(part in name for part in FULLMATCHED) else count
        for said in texts:
            with within(1.5):
                search(said)


LONG = [
    "!", '!"', "?!", "effusion (\r\n", "better ", "\n A (", "reader ", "\n FINDINGS: ", "edema no "]


@pytest.mark.parametrize("piece", LONG)
def test_50_kb_of_one_thing_are_read_cleaned_and_cut(piece):
    said = piece * (50_000 // len(piece)) + "|"
    for read in (lambda: findings.read_findings(said),
                 lambda: selfdistill.fault(said, "stop", data.CHEST),
                 lambda: text.clean_r2gen(said), lambda: datasets.report_sections(said),
                 lambda: data.read_classes(said, datasets.PROGRESSION),
                 lambda: data.read_classes(said, TWO)):
        with within(4):
            read()


def seconds(read, said):
    before = time.process_time()
    read(said)
    return time.process_time() - before


GROWING = [
    "edema or ", "edema, or ", "edema versus ", "edema, pneumonia, ", "no edema, and ", "no ", "a",
    "1 ", "(", "[", '{"a": ', "{'a': [1, ", "| edema | no ", "- edema\n", "**", "<think>", "\n",
    "\u6c34 ", "1, ", "1; ", "x: : "]


@pytest.mark.parametrize("piece", GROWING)
def test_eight_times_the_text_takes_no_more_than_twice_eight_times_the_time(piece):
    """20,000 characters: where the time grows with their square, it is 64 times as much."""
    tasks = data.CHEST, datasets.PROGRESSION
    for task in tasks:
        read = lambda said, task=task: data.read_classes(said, task)
        short, long = (piece * (n // len(piece)) + " x}" for n in (2_500, 20_000))
        least = max(0.02, min(seconds(read, short) for _ in range(3)))
        assert min(seconds(read, long) for _ in range(2)) < 16 * least


def test_a_phrase_of_many_words_is_read_in_linear_time():
    phrase = "{finding} " + "a " * 18 + "z"
    task = data.make_task({**GOOD_TASK, "findings": {"A": ["spots"]}, "positive": [],
                           "classes": {"x": [phrase]}}, "task.json")
    with within(2):
        assert data.read_classes("spots: " + "a " * 5000, task) == {}
    assert data.read_classes("spots: " + "a b " * 18 + "z", task) == {"A": "x"}


def test_50_kb_of_one_thing_are_normalised(scorer):
    for piece in REPEATED:
        with within(3):
            meteor.stem.__wrapped__((piece.strip() or "a") * (20_000 // len(piece)))
            scorer.normalise(piece * (50_000 // len(piece)))
