"""tools/check.py: every fault of every line at once, and a file that the stages then read."""

import json
import os
import subprocess
import sys

import check
import pytest
from conftest import ROOT
from PIL import Image
from test_data import png_of_size

import data
import student

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

SAYS = {"a": "Small left pleural effusion.", "b": "The heart is enlarged."}


@pytest.fixture
def films(tmp_path):
    """An image folder with a good film and one of each bad kind, and a file outside it."""
    folder = tmp_path / "films"
    folder.mkdir()
    Image.new("L", (64, 64), 90).save(folder / "good.png")
    whole = (folder / "good.png").read_bytes()
    (folder / "torn.png").write_bytes(whole[:len(whole) // 2])
    (folder / "page.jpg").write_text("<html>please log in</html>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "bomb.png").write_bytes(png_of_size(20_000, 20_000))
    (folder / "large.png").write_bytes(png_of_size(10_000, 10_000))
    (folder / "strip.png").write_bytes(png_of_size(20_000, 20))
    Image.new("L", (64, 64)).save(tmp_path / "outside.png")
    return folder


def record(id, image="good.png", labels=None, trajectories=SAYS, **more):
    return {"id": id, "image": image, "labels": labels or {}, "trajectories": trajectories, **more}


def run(folder, lines, *flags, capsys=None):
    """Runs check.check on a file of these lines: dicts, or texts that are written as they are.

    Returns (figures, {line: [kinds]}, what was printed).
    """
    path = folder.parent / "studies.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    found = check.check(check.parse([str(path), "--images", str(folder), *map(str, flags)]))
    out = capsys.readouterr().out if capsys else ""
    kinds = {}
    for line in out.splitlines():
        place, kind, _ = line.removeprefix(f"{path}:").split(": ", 2)
        kinds.setdefault(int(place), []).append(kind)
    return found, kinds, out


NO_HELP = "I'm sorry, I cannot help with medical images."
BAD = {  # what a line holds -> its kinds
    "json": ('{"id": "x", "image": ', ["json"]),
    "not a number": ('{"id": "x", "image": "good.png", "labels": {"Edema": NaN}}', ["json"]),
    "list": ("[1, 2]", ["json"]),
    "no id": ({"image": "good.png"}, ["field"]),
    "no image, wrong label": ({"id": "x", "labels": {"Edema": 3}}, ["field", "label"]),
    "unknown finding, empty text": (
        record("x", labels={"Flu": 1}, trajectories={"a": " "}), ["label", "trajectory"]),
    "class of another type": (
        record("x", labels={"Edema": True, "Pneumonia": "1"}), ["label", "label"]),
    "missing": (record("x", "gone.png"), ["image missing"]),
    "torn": (record("x", "torn.png"), ["image unreadable"]),
    "a page of HTML": (record("x", "page.jpg"), ["image unreadable"]),
    "empty file": (record("x", "empty.png"), ["image unreadable"]),
    "bomb": (record("x", "bomb.png"), ["image too large"]),
    "large": (record("x", "large.png"), ["image too large"]),
    "strip": (record("x", "strip.png"), ["image too large"]),
    "outside": (record("x", "../outside.png"), ["image outside"]),
    "absolute": (record("x", "/etc/hostname"), ["image outside"]),
    "two of two": (record("x", ["gone.png", "torn.png"]), ["image missing", "image unreadable"]),
    "same text": (
        record("x", trajectories={"a": "Edema is  seen.", "b": "edema is seen.", "c": "No edema."}),
        ["same text"]),
    "refusal": (record("x", trajectories={"a": NO_HELP, "b": SAYS["b"]}), ["refusal"]),
    "everything": (
        record("x", "gone.png", {"Flu": 1},
               {"a": "I'm sorry, but I cannot interpret medical images."}),
        ["label", "image missing", "refusal"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_fault_is_named_with_its_line_and_kind(films, capsys, name):
    line, kinds = BAD[name]
    found, by_line, _ = run(films, [record("first"), line, record("last")], capsys=capsys)
    assert by_line == {2: kinds}
    assert found["records"] == 3 and found["good"] == 2
    assert found["kinds"] == dict.fromkeys(kinds, 1)


def test_all_faults_of_a_file_come_at_once_and_are_counted_by_record(films, capsys):
    lines = [line for line, _ in BAD.values()]
    for at, line in enumerate(lines):
        if isinstance(line, dict) and "id" in line:
            line["id"] = f"x{at}"
    found, by_line, _ = run(films, lines, capsys=capsys)
    assert by_line == {at: kinds for at, (_, kinds) in enumerate(BAD.values(), 1)}
    expected = {kind: sum(kind in kinds for _, kinds in BAD.values()) for kind in check.KINDS}
    assert found["good"] == 0 and found["kinds"] == {kind: n for kind, n in expected.items() if n}


def test_the_second_of_two_equal_ids_is_the_fault(films, capsys):
    lines = [record("a"), record("b"), "", record("a", "gone.png"), record("a")]
    found, by_line, out = run(films, lines, capsys=capsys)
    assert by_line == {4: ["image missing", "duplicate"], 5: ["duplicate"]} and found["good"] == 2
    assert "'a' is in line 1 already" in out


def test_a_diagnosis_in_the_students_prompt_is_a_leak(films, tmp_path, capsys):
    sick, healthy = record("s", labels={"Edema": 1}), record("h", labels={"Edema": 0})
    lines = [sick, healthy, record("without labels")]
    found, _, _ = run(films, lines)
    assert found["kinds"] == {}
    _, by_line, out = run(films, lines, "--prompt", "teacher", capsys=capsys)
    assert by_line == {1: ["leak"], 2: ["leak"]}
    assert "diagnosed with Edema" in out and "No Finding" in out
    task = {
        "findings": {"rust": ["rust"]},
        "classes": {"none": ["no {finding}"], "much": ["{finding} everywhere"]},
        "positive": ["much"],
        "prompts": {"student": "There is rust everywhere. Describe it.",
                    "teacher": "{diseases}", "compare": "{readers}"}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    lines = [record("much", labels={"rust": "much"}), record("none", labels={"rust": "none"})]
    _, by_line, _ = run(films, lines, "--task_file", tmp_path / "task.json", capsys=capsys)
    assert by_line == {1: ["leak"]}


def test_what_is_allowed_is_counted_and_rejects_nothing(films, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    lines = [record("r", trajectories={"a": NO_HELP}), record("m", "gone.png"), record("g")]
    found, by_line, _ = run(films, lines, "--allow", "refusal", "--out", good, capsys=capsys)
    assert by_line == {1: ["refusal"], 2: ["image missing"]}
    assert found["good"] == 2 and found["kinds"] == {"refusal": 1, "image missing": 1}
    assert [json.loads(line)["id"] for line in good.read_text().splitlines()] == ["r", "g"]
    with pytest.raises(SystemExit):
        check.parse(["studies.jsonl", "--allow", "refusals"])


def test_good_records_are_written_as_they_are_and_the_others_with_their_reasons(films, tmp_path):
    odd = '{"id":"odd" ,  "image": "good.png", "note": "U+2028 \u2028 inside", "z": 1e3}'
    lines = [odd, record("r", "gone.png"), "{torn", record("odd")]
    run(films, lines, "--out", tmp_path / "good.jsonl")
    assert (tmp_path / "good.jsonl").read_text(encoding="utf-8") == odd + "\n"
    rejected = [json.loads(line)
                for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [r["line"] for r in rejected] == [2, 3, 4]
    assert rejected[0]["record"] == lines[1] and rejected[1]["text"] == "{torn"
    assert rejected[0]["faults"] == [f"image missing: {films / 'gone.png'}: no such image"]
    assert rejected[2]["faults"][0].startswith("duplicate: ")
    assert [s.id for s in data.read_studies(tmp_path / "good.jsonl", data.CHEST)] == ["odd"]


def test_nothing_is_half_written_and_the_input_is_never_overwritten(films, tmp_path, monkeypatch):
    (tmp_path / "good.jsonl").write_text("before")
    monkeypatch.setattr(data, "is_refusal", lambda text, task: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(films, [record("a")], "--out", tmp_path / "good.jsonl")
    assert (tmp_path / "good.jsonl").read_text() == "before"
    there = sorted(p.name for p in tmp_path.iterdir())
    assert there == ["films", "good.jsonl", "outside.png", "studies.jsonl"]
    for name in ("studies.jsonl", "rejected.jsonl"):
        with pytest.raises(SystemExit):
            check.parse([str(tmp_path / "studies.jsonl"), "--out", str(tmp_path / name)])


def test_lengths_are_those_that_a_stage_sees(films, base, world, studies, task):
    flags = ["--student", base, "--task_file", world / "task.json"]
    processor = student.Processor(base, task, world)
    lengths = {s.id: processor.lengths(s, data.student_prompt(s, task), s.trajectories.values())
               for s in studies}
    totals = sorted(p + sum(n) for p, n in lengths.values())
    limit = totals[len(totals) // 2]
    lines = [s.record for s in studies]
    found, _, _ = run(films, lines, *flags, "--images", world, "--max_tokens", limit)
    assert found["kinds"] == {"length": sum(total > limit for total in totals)}
    of_teacher = {name: [] for name in data.teacher_names(studies)}
    for s in studies:
        _, of_study = lengths[s.id]
        for name, n in zip(s.trajectories, of_study):
            of_teacher[name].append(n)
    for name, tokens in of_teacher.items():
        row = found["tokens"][name]
        assert row["n"] == len(tokens) and row["longest"] == max(tokens)
        assert row["mean"] == pytest.approx(sum(tokens) / len(tokens))
        assert row["95%"] == next(t for t in sorted(tokens)
                                  if sum(u <= t for u in tokens) >= 0.95 * len(tokens))
    without, _, _ = run(films, lines, *flags, "--skip_images")  # the texts alone, by another route
    assert without["tokens"] == found["tokens"] and without["kinds"] == {}


def test_special_tokens_in_a_text_are_counted_as_text(base, task, processor):
    text = "edema <|im_end|> mild<|image_pad|>, no\nfracture \u00e9"
    _, lengths = check.TextLengths(base, task).lengths(None, "", [text])
    assert lengths == [len(processor.tokens(text)) + 1]


def test_workers_find_what_one_process_finds(films, capsys):
    lines = [record(f"s{i}", "gone.png" if i % 7 == 0 else "good.png") for i in range(300)]
    lines.append(record("s5"))
    alone, by_line, out = run(films, lines, capsys=capsys)
    assert (alone, by_line, out) == run(films, lines, "--num_workers", 2, capsys=capsys)
    assert alone["good"] == 257


def main(*flags):
    return subprocess.run([sys.executable, ROOT / "tools" / "check.py", *map(str, flags)],
                          capture_output=True, text=True, check=False)


def test_the_command_prints_counts_and_its_status_says_whether_all_is_well(films, tmp_path):
    lines = [json.dumps(record("s0", "good.png")), json.dumps(record("s1", "gone.png"))]
    (tmp_path / "studies.jsonl").write_text("\n".join(lines))
    done = main(tmp_path / "studies.jsonl", "--images", films, "--json")
    assert done.returncode == 1
    assert "1 records: image missing" in done.stdout and "1 of 2 records are good" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "records": 2, "good": 1, "training": 1, "with trajectories": 1,
        "kinds": {"image missing": 1}, "tokens": {}}
    assert main(tmp_path / "studies.jsonl", "--skip_images").returncode == 0
    (tmp_path / "nothing.jsonl").write_text("\n")
    for name, what in (("nothing.jsonl", "no record"), ("gone.jsonl", "No such file")):
        done = main(tmp_path / name)
        assert done.returncode == 1 and what in done.stderr and "Traceback" not in done.stderr


def test_it_says_how_many_records_can_be_trained_on_and_warns_of_none(films, tmp_path):
    def said(*lines):
        (tmp_path / "studies.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = main(tmp_path / "studies.jsonl", "--images", films, "--json")
        return done.returncode, done.stdout, json.loads(done.stdout.splitlines()[-1])

    status, out, found = said(
        record("a", split="train"), record("b"), record("c", trajectories={}),
        record("d", split="test"), record("e", "gone.png"))
    assert status == 1 and (found["training"], found["with trajectories"]) == (3, 2)
    assert "warning" not in out
    assert "2 of the 3 good ones of the training split have trajectories" in out
    not_asked = [record("a", trajectories={}, split="train"), record("b", trajectories={})]
    status, out, found = said(*not_asked, record("c", split="validate"))
    assert status == 0 and found["kinds"] == {} and found["good"] == 3
    assert "0 of the 2 good ones" in out
    assert "warning: there is nothing to train on before tools/collect.py" in out
    assert "tools/convert.py studies --into" in out
    _, out, _ = said(record("c", split="validate"))
    assert "warning" not in out


def test_memory_does_not_grow_with_the_records(tmp_path, world):
    """Peak memory over 2,000 and 20,000 lines of 3 KB, without torch.

    What may grow is the digests of the ids, about 0.1 KB each. The peak is not getrusage's, which
    begins with the memory of the process that forked.
    """
    code = f"""if True:
        import sys
        import check
        flags = ["studies.jsonl", "--skip_images", "--task_file", {str(world / "task.json")!r}]
        check.check(check.parse(flags))
        assert "torch" not in sys.modules
        with open("/proc/self/status") as lines:
            print(next(line.split()[1] for line in lines if line.startswith("VmHWM")))"""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    peaks = []
    for count in (2_000, 20_000):
        with open(tmp_path / "studies.jsonl", "w") as file:
            for i in range(count):
                line = {"id": f"s{i}", "image": f"{i}.png",
                        "trajectories": {"a": "edema mild, " * 250}}
                file.write(json.dumps(line) + "\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                              text=True, check=True, env={**os.environ, "PYTHONPATH": path})
        peaks.append(int(done.stdout))
    few, many = peaks
    assert few < 100_000 and many - few < 12_000  # KiB; the lines themselves are 54,000 more
