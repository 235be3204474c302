"""tools/report.py: one self-contained page in which nothing acts, and which names what it lacks."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
sys.path.insert(0, str(TOOLS))

import answers  # noqa: E402
import charts  # noqa: E402
import report  # noqa: E402

import sampling  # noqa: E402

HOSTILE = ('<script>alert(1)</script>"\'><img src=x onerror=alert(2)> `code` | a & b &lt; '
           '</style></title></svg><!-- ]]> http://evil.example javascript:x')
ACCURACY = {"Consolidation": 0.5, "Pleural Effusion": 0.25, "Pneumonia": 0.75, "Pneumothorax": 1.0,
            "Edema": 0.0}
SECTIONS = ["rows", "ablation", "teachers", "texts", "agreement", "drift", "ladder", "training",
            "studies"]


def score(**more):
    return {"accuracy": dict(ACCURACY), "mean": 0.5, "unread": 0.0, **more}


def write_inputs(folder, world, name="gpt-5", text=None):
    """Writes every input, small.

    name  of a teacher, of a log and of a student
    text  is put wherever a model speaks
    Returns the flags that name the inputs.
    """
    dump(folder / "results.json", results_of(name))
    dump(folder / "teachers.json", teachers_of(name))
    dump(folder / "drift.json", drift_of(name))
    dump(folder / "ladder.json", ladder_of(name))
    rng = np.random.default_rng(0)
    dump_lines(folder / "log.jsonl", [
        {"step": step, "loss": float(rng.random()), f"loss/{name}": 1.0 / step,
         "rewards/accuracies": 0.5} for step in range(10, 60, 10)])
    studies = [json.loads(line) for line in (world / "studies.jsonl").read_text().splitlines()]
    test = [study for study in studies if study["split"] == "test"]
    for study in test:
        study["trajectories"] = {name: text or "edema mild", "grok-4": "no edema"}
        study["labels"] = {**study["labels"], f"f {name}": text or "mild"}
    test[0]["report"] = text or "a report"
    dump_lines(folder / "studies.jsonl", test)
    dump_lines(folder / "positives.jsonl",
               [{"id": study["id"], "t_plus": text or "t plus"} for study in test[2:]])
    dump_lines(folder / "answers.jsonl",
               [{"id": study["id"], "text": text or "an answer"} for study in test[3:]])
    before_equals = name.replace("=", ":")
    return [str(folder / "results.json"), "--title", name,
            *(f"--{key}={folder / key}.json" for key in ("teachers", "drift", "ladder")),
            f"--log={before_equals}={folder / 'log.jsonl'}",
            f"--studies={folder / 'studies.jsonl'}", f"--images={world}",
            f"--positives={folder / 'positives.jsonl'}",
            f"--answers={before_equals}={folder / 'answers.jsonl'}", "--gallery=3"]


def dump(file, value):
    file.write_text(json.dumps(value), encoding="utf-8")


def dump_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def results_of(name):
    student = {"greedy": score(), "sampled": score(mean=0.4)}
    rows = {"label prior": score(), name: score(), "grok-4": score(),
            "vote of the teachers": score(), "SPD, all teachers": student, f"a {name}": student}
    return {"settings": {"split": "test", "student": [name]}, "table": "", "rows": rows}


def teachers_of(name):
    figures = {"precision": 0.7, "recall": 0.6, "f1": 0.65, "similarity": None, "words": 30.5,
               "refused": 0.01, "accuracy": ACCURACY}
    wrong = {"observed": 3, "expected": 1.5, "ratio": 2.0, "interval": [1.25, 3.5]}
    given = {"given": "finding", "pairs": 9, "phi": [[1, 0.3], [0.3, 1]], "all": wrong,
             "most": {**wrong, "ratio": None, "interval": None}}
    return {"teachers": {name: figures, "grok-4": figures},
            "kappa": {"names": [name, "grok-4"], "matrix": [[1, -0.2], [-0.2, None]]},
            "against": "labels", "similarity": name, "studies": 8, "uncertain": "negative",
            "errors": {"names": [name, "grok-4"], "given": [given]}}


def drift_of(name):
    still = {"statistic": [0.5, -0.2, 0.1], "p": 0.7, "alarm": False, "where": None, "id": None,
             "finding": None}
    moved = {"statistic": [1.0, 5.0, 2.0], "p": 0.01, "alarm": True, "where": 100,
             "id": f"s {name}", "finding": "Edema"}
    return {"windows": [50, 100, 150], "threshold": 3.5, "alpha": 0.05, "permutations": 99,
            "studies": 200, "teachers": {name: still, "grok-4": moved}, "joint": still}


def ladder_of(name):
    cells = [{"row": f"row {name}", "world": name, "seed": seed,
              "greedy": {"mean": 0.5 + 0.1 * seed}} for seed in range(3)]
    cells.append({"row": "label prior", "world": name, "seed": 0, "given": {"mean": 0.4}})
    claim = {"claim": f"{name} helps", "world": name, "mode": "greedy", "mean": 0.125, "low": None,
             "high": None, "paper": 0.02, "values": [0.125]}
    return {"cells": cells, "claims": [claim]}


def make(folder, *flags):
    left_out = report.run(report.parse([*flags, "--out", str(folder / "report.html")]))
    return (folder / "report.html").read_text(encoding="utf-8"), left_out


class Checked(HTMLParser):
    """Reads a page; fails at a tag that is not closed where it should be.

    tags        in order
    attributes  [(tag, key, value)]
    words       the texts outside <style>
    """

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.words, self.styles = [], [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append(tag)
        self.attributes += [(tag, key, value) for key, value in attrs]
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.styles if self.open and self.open[-1] == "style" else self.words).append(data)

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data}")

    unknown_decl = handle_pi = handle_comment

    def text(self):
        return "\n".join(self.words)

    def values(self, *, key, tag=None):
        """The values of an attribute, of all tags or of one."""
        return [value for of, name, value in self.attributes if name == key and tag in (None, of)]


@pytest.fixture(scope="module")
def full(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("full")
    flags = write_inputs(folder, world)
    page, left_out = make(folder, *flags)
    return folder, flags, page, left_out


def test_every_section_is_there_once_and_linked(full):
    _, _, page, left_out = full
    checked = Checked(page)
    assert checked.values(key="id") == SECTIONS
    assert left_out == [] and "Left out" not in checked.text()
    links = [value for tag, _, value in checked.attributes if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


def test_nothing_in_a_name_or_text_can_act(tmp_path, world):
    harmless, _ = make(tmp_path, *write_inputs(tmp_path, world, "a name", "a text"))
    hostile, _ = make(tmp_path, *write_inputs(tmp_path, world, HOSTILE, HOSTILE))
    expected, checked = Checked(harmless), Checked(hostile)
    keys = lambda page: [(tag, key) for tag, key, _ in page.attributes]
    # the same page, tag by tag
    assert checked.tags == expected.tags and keys(checked) == keys(expected)
    # it is shown, and as references only
    assert HOSTILE in checked.text() and "`" not in hostile and "|" not in hostile
    assert "script" not in checked.tags
    assert not any(key.startswith("on") for _, key in keys(checked))


def test_characters_that_no_html_may_hold_are_replaced(tmp_path, world):
    page, _ = make(tmp_path, *write_inputs(tmp_path, world, text="a\x00b\x1bc\ud800d\x85e\ufffff"))
    assert "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf" in Checked(page).text()


@given(st.text())
def test_escaped_text_reads_back(text):
    read = []
    parser = HTMLParser(convert_charrefs=True)
    parser.handle_data = read.append
    parser.feed(charts.tag("p", text))
    parser.close()
    assert "".join(read) == charts.NO_HTML.sub("\ufffd", text)


def test_nothing_is_fetched(tmp_path, world):
    page, _ = make(tmp_path, *write_inputs(tmp_path, world, HOSTILE, HOSTILE))
    checked = Checked(page)
    for tag, key, value in checked.attributes:
        if key in ("src", "href", "srcset", "data", "action", "xlink:href", "poster"):
            assert value.startswith("data:image/jpeg;base64," if tag == "img" else "#")
        if key in ("style", "fill", "stroke", "d"):
            assert "url" not in value
            assert ":" not in value.replace("min-width:", "").replace("max-width:", "")
    fetching = {"link", "script", "iframe", "object", "embed", "base", "form", "use", "image"}
    assert not fetching & set(checked.tags)
    style = "".join(checked.styles)
    assert not re.search(r"url\(|@import|//|expression|<", style)
    assert style == (TOOLS / "report.css").read_text()
    policy = [value for value in checked.values(key="content") if "default-src" in value]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_the_same_inputs_give_the_same_bytes(full, tmp_path):
    _, flags, page, _ = full
    again, _ = make(tmp_path, *flags)
    assert again == page and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_what_was_not_given_is_named_with_the_command_that_makes_it(full, tmp_path):
    _, (results, *flags), _, _ = full
    page, left_out = make(tmp_path, results)
    checked = Checked(page)
    assert checked.values(key="id") == [*SECTIONS, "left-out"]
    for command in ("evaluate.py teachers --output", "tools/drift.py",
                    "python -m experiment ladder", "--log", "--studies"):
        assert any(command in sentence for sentence in left_out) and command in checked.text()
    of_gallery = [flag for flag in flags if flag.startswith(("--studies", "--images"))]
    _, left_out = make(tmp_path, results, *of_gallery)
    assert any("selfdistill.py --split test" in sentence for sentence in left_out)
    assert any("--answers" in sentence for sentence in left_out)


def test_bars_are_as_long_as_the_figures_and_are_beside_the_papers():
    drawn = Checked(charts.bars("t", [
        ("gpt-5", 0.5, 0.75, None), ("grok-4", None, 1.0, None),
        ("mine", 0.25, None, (0.125, 0.375))]))
    widths = [float(value) for value in drawn.values(tag="rect", key="width")]
    unit = widths[2]
    assert drawn.values(tag="rect", key="class") == ["ours", "paper", "paper", "ours"]
    assert widths == pytest.approx([0.5 * unit, 0.75 * unit, unit, 0.25 * unit], abs=0.01)
    assert "not run" in drawn.words and "not in the paper" in drawn.words
    whisker = re.search(r"M([\d.]+) [\d.]+H([\d.]+)", drawn.values(key="d")[0])
    low, high = map(float, whisker.groups())
    assert (high - low) == pytest.approx(0.25 * unit, abs=0.1)


def panel(page, title):
    return next(svg for svg in re.findall(r"<svg.*?</svg>", page)
                if f"<title>{title}</title>" in svg)


def test_tables_2_and_5_are_beside_ours(full):
    _, _, page, _ = full
    mean = panel(page, "Table 5: Mean of the five")
    assert "SPD, one teacher: ours not run, the paper&#x27;s 0.66;" in mean
    assert "SPD, all teachers: ours 0.50, the paper&#x27;s 0.68;" in mean
    assert "GPT-5" not in page  # its row has our name of it
    effusion = panel(page, "Table 2: Pleural Effusion (PE)")
    assert "gpt-5: ours 0.25, the paper&#x27;s 0.68" in effusion
    assert "Moonshot: ours not run, the paper&#x27;s 0.19" in panel(page, "Table 2: Edema (Ede.)")


def test_a_mean_needs_all_five(full, tmp_path):
    folder, _, _, _ = full
    results = json.loads((folder / "results.json").read_text())
    del results["rows"]["SPD, all teachers"]["greedy"]["accuracy"]["Edema"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    page, _ = make(tmp_path, str(tmp_path / "results.json"))
    assert "SPD, all teachers: ours not run" in panel(page, "Table 5: Mean of the five")
    assert "SPD, all teachers: ours 0.50" in panel(page, "Table 5: Consolidation (Con.)")


def test_options_and_intervals_of_evaluate_are_shown(full, tmp_path):
    folder, _, _, _ = full
    results = json.loads((folder / "results.json").read_text())
    interval = {**dict.fromkeys(ACCURACY, [0.1, 0.9]), "Edema": None, "mean": [0.4, 0.6]}
    options = score(top1={"value": ACCURACY, "interval": interval})
    results["rows"]["SPD, all teachers"] = {"options": options}
    (tmp_path / "results.json").write_text(json.dumps(results))
    page, _ = make(tmp_path, str(tmp_path / "results.json"))
    whiskers = {heading: panel(page, f"Table 5: {heading}").count('"whisker"')
                for heading in ("Consolidation (Con.)", "Edema (Ede.)", "Mean of the five")}
    assert list(whiskers.values()) == [1, 0, 1]


def test_the_alarm_is_marked_and_named(full):
    _, _, page, _ = full
    drawn = panel(page, "Drift, grok-4")
    assert drawn.count('class="alarm"') == 1 and 'class="threshold"' in drawn
    assert "Drift, gpt-5" not in page
    assert panel(page, "Drift, all streams").count('class="alarm"') == 1
    words = Checked(page).words
    at = words.index("p, corrected")
    row = ["grok-4", "yes", "0.0100", "100", "s gpt-5", "Edema"]
    assert words[words.index("grok-4", at):][:6] == row


def test_the_ladder_shows_mean_and_range(full):
    _, _, page, _ = full
    drawn = panel(page, "Ladder: gpt-5, greedy")
    assert "row gpt-5 (n = 3): ours 0.60; label prior (n = 1): ours 0.40" in drawn
    assert drawn.count('"whisker"') == 2
    words = Checked(page).words
    row = ["gpt-5 helps", "gpt-5", "greedy", "0.125", "\u2013", "\u2013", "0.02"]
    assert words[words.index("gpt-5 helps"):][:7] == row


def test_dependence_of_errors_is_shown_where_it_was_measured(full, tmp_path):
    folder, (results, *_), page, _ = full
    words = Checked(page).words
    row = ["all wrong, given the finding", "3", "1.5", "2.00", "1.25 to 3.50"]
    assert words[words.index("all wrong, given the finding"):][:5] == row
    teachers = json.loads((folder / "teachers.json").read_text())
    del teachers["errors"]
    (tmp_path / "teachers.json").write_text(json.dumps(teachers))
    page, _ = make(tmp_path, results, f"--teachers={tmp_path / 'teachers.json'}")
    assert "kappa" in page and "Correlation of errors" not in page


def test_kappa_figures_are_in_the_cells(full):
    _, _, page, _ = full
    drawn = Checked(panel(page, "Agreement between the teachers, Cohen&#x27;s kappa"))
    assert drawn.words.count("\u22120.20") == 2 and "\u2013" in drawn.words
    assert drawn.values(key="class").count("negative") == 2


def test_a_curve_breaks_where_there_is_no_number():
    series = {"a": [(1, 1.0), (2, float("nan")), (3, None), (4, 2.0), (5, 3.0)]}
    path, *_ = Checked(charts.lines("t", series, {"a": 0})).values(key="d")
    assert re.sub(r"[\d. ]+", "", path) == "MML"
    assert "No finite value" in charts.lines("t", {"a": [(1, None)]}, {"a": 0})
    assert "log scale" in charts.lines("t", {"a": [(1, 1), (2, 100)]}, {"a": 0})
    assert "log scale" not in charts.lines("t", {"a": [(1, -1), (2, 100)]}, {"a": 0})


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.booleans())
def test_ticks_are_few_and_inside(low, width, log):
    low = abs(low) + 1e-7 if log else low
    high = low * (11 + width) if log else low + width * max(1, abs(low))
    values = charts.ticks(low, high, log)
    assert 1 <= len(values) <= 6 and values == sorted(set(values))
    margin = 1e-6 * (high - low)
    assert low - 1e-8 * abs(low) - margin <= values[0]
    assert values[-1] <= high + 1e-8 * abs(high) + margin


def test_the_gallery_shows_films_and_every_text(full):
    _, _, page, _ = full
    checked = Checked(page)
    assert page.count("data:image/jpeg;base64,") == 3
    assert [tag for tag in checked.tags if tag == "article"] == ["article"] * 3
    for words in ("3 of 8 studies", "t plus", "an answer", "no edema", "test-00003"):
        assert words in checked.text()
    assert "test-00000" not in checked.text()  # it has neither t+ nor answer, others have


def test_a_film_that_cannot_be_shown_is_named(tmp_path, world):
    results, *_ = write_inputs(tmp_path, world)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG not a picture")
    Image.new("1", (8001, 8000)).save(tmp_path / "large.png")
    deep = np.arange(64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    images = ["../outside.png", "missing.png", "broken.png", "large.png", ["deep.png", "deep.png"]]
    dump_lines(tmp_path / "studies.jsonl",
               [{"id": str(i), "image": image} for i, image in enumerate(images)])
    page, _ = make(tmp_path, results, f"--studies={tmp_path / 'studies.jsonl'}",
                   f"--images={tmp_path}")
    text = Checked(page).text()
    assert "../outside.png: lies outside the image folder" in text
    assert ("large.png: not a readable image: 8001 x 8000 pixels, expected at most 64,000,000"
            in text)
    assert "missing.png: no such image" in text and "broken.png: not a readable image" in text
    assert page.count("data:image/jpeg;base64,") == 2


def test_a_16_bit_film_keeps_its_range(tmp_path):
    deep = np.linspace(0, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    content = base64.b64decode(report.film("deep.png", tmp_path).partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    assert pixels.min() < 10 and pixels.max() > 245 and 100 < pixels.mean() < 155


@pytest.mark.parametrize("file, content, expected", [
    ("results.json", "{", "results.json: not a JSON file"),
    ("teachers.json", "{}", "teachers.json: expected"),
    ("results.json", '{"rows": {"a": {"accuracy": 1}}}', "results.json: expected"),
    ("teachers.json", '{"teachers": {}, "kappa": {"names": ["a"], "matrix": [[1, 2]]}}',
     "teachers.json: expected"),
    ("drift.json", '{"windows": [1, 2], "teachers": {"a": {"statistic": [1]}}}',
     "drift.json: expected"),
    ("ladder.json", '{"cells": [{"seed": 1}]}', "ladder.json: expected"),
    ("log.jsonl", '{"step": 1}\n{"step": 2, "lo\n', "log.jsonl:2: expected"),
    ("log.jsonl", "", "log.jsonl: is empty"),
    ("studies.jsonl", '{"id": "a", "image": "x"}\n{"id": "b"}\n', "studies.jsonl:2: expected"),
    ("studies.jsonl", '{"id": "a", "image": "x", "split": "train"}\n',
     "studies.jsonl: no study of split 'test'"),
    ("positives.jsonl", '{"id": "a", "t_plus": "x"}\n{"id": "a", "t_plus": "y"}\n',
     "study 'a' comes twice"),
    ("answers.jsonl", '{"id": "a", "t_plus": "x"}\n',
     'answers.jsonl:1: expected {"id": "...", "text": "..."}'),
])
def test_a_faulty_input_is_named_and_nothing_is_written(tmp_path, world, file, content, expected):
    flags = write_inputs(tmp_path, world)
    (tmp_path / file).write_text(content)
    (tmp_path / "report.html").write_text("before")
    with pytest.raises(ValueError, match=re.escape(expected)):
        make(tmp_path, *flags)
    assert (tmp_path / "report.html").read_text() == "before"


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


@pytest.mark.parametrize("name", ["results", "teachers", "drift", "ladder"])
def test_whatever_is_in_a_file_gives_a_page_or_an_error_that_names_it(tmp_path, world, name):
    results, *flags = write_inputs(tmp_path, world)
    file = tmp_path / f"{name}.json"
    flags = [flag for flag in flags if flag == f"--{name}={file}"]
    good, junk = file.read_text(), [None, "x", -3, [], {}, True, 10 ** 400, 1e308, [1], {"a": 1}]
    for i, at in list(enumerate(places(json.loads(good))))[::3]:
        whole = inner = {"": json.loads(good)}
        *outer, last = ("", *at)
        for key in outer:
            inner = inner[key]
        inner[last] = junk[i % len(junk)]
        file.write_text(json.dumps(whole[""]))
        try:
            make(tmp_path, results, *flags)
        except ValueError as error:
            assert f"{name}.json: expected" in str(error)


def test_from_the_command_line_without_torch(full, tmp_path):
    _, (results, *_), _, _ = full
    page = tmp_path / "page.html"
    check = "import sys, report; report.main(); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check, results, "--out", str(page)], cwd=TOOLS,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "left out: Training" in done.stdout and page.exists()
    done = subprocess.run([sys.executable, str(TOOLS / "report.py"), "nowhere.json"],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "nowhere.json" in done.stderr and "Traceback" not in done.stderr


def test_every_drawing_says_what_it_shows(full):
    _, _, page, _ = full
    said = re.compile(r'role="img"( style="[^"]*")?><title>[^<]+</title><desc>[^<]+</desc>')
    for svg in re.findall(r"<svg.*?</svg>", page):
        assert 'aria-hidden="true"' in svg or said.search(svg)
    assert all(f'alt="film of study test-{i:05d}"' in page for i in (3, 4, 5))


def test_answers_are_those_of_evaluate(base, world, task, studies, model, processor, tmp_path):
    texts = answers.run(answers.parse([
        f"--student={base}", f"--studies={world / 'studies.jsonl'}", f"--images={world}",
        f"--task_file={world / 'task.json'}", "--limit=3", "--max_new_tokens=8",
        f"--output={tmp_path / 'a.jsonl'}"]))
    test = [study for study in studies if study.split == "test"][:3]
    expected = sampling.answers(model, processor, test, task, 0.0, max_new_tokens=8)
    assert texts == {study.id: text for study, text in zip(test, expected, strict=True)}
    assert report.read_texts(tmp_path / "a.jsonl", "text") == texts


def test_a_study_whose_film_is_broken_is_left_out_of_the_answers_and_said(
        base, world, tmp_path, capsys):
    lines = (world / "studies.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == "test"][:3]
    shutil.copytree(world / "films", tmp_path / "films")
    (tmp_path / records[1]["image"]).write_bytes(b"no film")
    dump_lines(tmp_path / "studies.jsonl", records)
    texts = answers.run(answers.parse([
        f"--student={base}", f"--studies={tmp_path / 'studies.jsonl'}", f"--images={tmp_path}",
        f"--task_file={world / 'task.json'}", "--max_new_tokens=8",
        f"--output={tmp_path / 'a.jsonl'}"]))
    assert list(texts) == [records[0]["id"], records[2]["id"]]
    assert report.read_texts(tmp_path / "a.jsonl", "text") == texts
    said = capsys.readouterr().out
    assert "a.jsonl: 2 answers" in said
    assert f"left out: {records[1]['id']}: {tmp_path / records[1]['image']}: not a readable" in said


def luminance(rgb):
    """Of a colour given as six hex digits."""
    red, green, blue = (int(rgb[i:i + 2], 16) / 255 for i in (0, 2, 4))
    linear = lambda c: c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
    return 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue)


def contrast(a, b):
    darker, lighter = sorted([luminance(a), luminance(b)])
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme):
    """WCAG 2.2: text 4.5, graphics 3, against page and card."""
    style = (TOOLS / "report.css").read_text()
    light, dark = [dict(re.findall(r"--([\w-]+): #(\w{6})", block))
                   for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    colour = light if scheme == "light" else {**light, **dark}
    for behind in ("back", "card"):
        for name in ("text", "muted", "ours"):
            assert contrast(colour[name], colour[behind]) >= 4.5
        for name in ("alarm", *(f"s{i}" for i in range(1, 8))):
            assert contrast(colour[name], colour[behind]) >= 3
    assert contrast(colour["on-deep"], colour["ours"]) >= 4.5
    assert set(dark) == set(light)
