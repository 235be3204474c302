"""tools/check.py: every fault of every line at once, and a file that the stages then read."""

import json
import os
import subprocess
import sys
import time

import check
import numpy as np
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
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(folder / "nan.tif")
    Image.new("L", (64, 64)).save(
        folder / "pages.tif", save_all=True, append_images=[Image.new("L", (64, 64), 9)])
    Image.merge("LA", [Image.new("L", (64, 64)), Image.linear_gradient("L").resize((64, 64))]).save(
        folder / "alpha.png")
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
    "NaN": (record("x", "nan.tif"), ["image unreadable"]),
    "two pages": (record("x", "pages.tif"), ["image unreadable"]),
    "a film in its alpha channel": (record("x", "alpha.png"), ["image unreadable"]),
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
    "only thinking": (
        record("x", trajectories={"c": "<think>Edema?</think>", "d": "<think>Edema.", **SAYS}),
        ["refusal", "refusal"]),
    "same text but for the thinking": (
        record("x", trajectories={"a": "<think>Hm.</think> No edema.", "b": "no edema."}),
        ["same text"]),
    "chat markers": (
        record("x", trajectories={"a": "No edema.<|im_end|>", "b": "<s>[INST] No edema."}),
        ["chat marker", "chat marker"]),
    "a loop": (
        record("x", trajectories={"a": "The lungs are clear. " * 5, "b": SAYS["b"]}), ["loop"]),
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


@pytest.mark.parametrize("mark", [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<|User|>",
    "<｜end▁of▁sentence｜>", "<start_of_turn>", "<end_of_turn>",
    "<end_of_utterance>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "<bos>", "<eos>", "<pad>",
    "<image>", "<|END_OF_TURN_TOKEN|>"])
def test_a_chat_templates_own_marks_are_none_of_the_answer(mark):
    assert data.CHAT_MARKER.search(f"No edema.{mark}\n")[0] == mark


@pytest.mark.parametrize("text", [
    "A nodule <3 mm> or > 2 cm; |a| < b | c > d.", "| Edema | no |\n|---|---|", "[1] Edema [x]",
    "<b>Edema</b>: <sup>1</sup> no <br/>", "Start of turn; [INSTITUTION] [instead]", "<- left"])
def test_other_signs_are_no_marks_of_a_chat_template(text):
    assert not data.CHAT_MARKER.search(text)


def test_marks_around_an_answer_and_its_thinking_are_looked_through(films, capsys):
    says = {"a": "<think>x<|im_end|></think><|begin_of_box|>No edema.<|end_of_box|>", "b": "Edema."}
    found, _, _ = run(films, [record("x", trajectories=says)], capsys=capsys)
    assert found["kinds"] == {}


CLEAR = "The lungs are clear."
CYCLE = " ".join(f"word{i}" for i in range(30))
LOOPS = {  # a text -> what it repeats
    "a sentence in a row": (CLEAR * 1 + f" {CLEAR}" * 4, "the lungs are clear"),
    "a sentence between others": (
        "".join(f"{CLEAR} The film number {i} is good.\n" for i in range(5)),
        "the lungs are clear"),
    "a line": ("the lungs are clear\n" * 5, "the lungs are clear"),
    "items": ("".join(f"{i}. {CLEAR}\n" for i in range(1, 6)), "the lungs are clear"),
    "in other letters": (f"{CLEAR} {CLEAR.upper()} " * 3, "the lungs are clear"),
    "one word": ("There is edema" + " and" * 5, "and"),
    "a phrase, cut in the middle": (
        "Seen: " + "left, then right, " * 5 + "left", "then right left"),
    "thirty words": ("A film. " + f"{CYCLE} " * 5, CYCLE),
    "a row": ("| Finding | |\n" + "| Edema | no |\n" * 5, "| edema | no |"),
    "another script": ("肺部清晰。" * 5, "肺部清晰"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_a_sentence_five_times_or_an_end_that_repeats(name):
    text, repeated = LOOPS[name]
    assert check.loop(text) == repeated


@pytest.mark.parametrize("text", [
    "",
    f"{CLEAR} " * 4,
    "No edema. " * 4 + "No fracture. No edema.",
    "Yes. No. " * 2 + "very " * 9 + "large",  # not the end of the text
    f"{CYCLE} more " * 5,  # 31 words
    "\n".join(f"{finding}\nNot seen in this image.\n" for finding in data.CHEST.findings),
    "\n".join(f"{i}. **{finding}**: no\n   - Basis: not seen in this image."
              for i, finding in enumerate(data.CHEST.findings)),
    json.dumps([{"finding": finding, "present": False, "basis": "Not seen in this image."}
                for finding in data.CHEST.findings], indent=1),
    "| Edema | Pneumonia | Fracture | a | b | c |\n|-|-|-|-|-|-|\n| no | no | no | no | no | no |"])
def test_what_is_said_of_each_finding_is_no_loop(text):
    assert check.loop(text) is None


def test_long_texts_are_looked_through_for_loops_and_marks_in_linear_time():
    for text in ("a" * 500_000, "| " * 200_000, "\n| " * 200_000, "word " * 100_000 + "x",
                 "<|" * 200_000, "<start_of_" * 50_000, ". " * 200_000, "a b c. " * 80_000):
        begin = time.monotonic()
        check.loop(text)
        data.CHAT_MARKER.search(text)
        assert time.monotonic() - begin < 5


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
    lines = [record("much", labels={"rust": "much"}), record("none", labels={"rust": "none"})]
    for prompt, leaks in ((task["prompts"]["student"], {1: ["leak"]}),
                          ("Why is there rust everywhere?", {1: ["leak"]}),
                          ("Is there rust everywhere?", {})):
        task["prompts"]["student"] = prompt
        (tmp_path / "task.json").write_text(json.dumps(task))
        _, by_line, _ = run(films, lines, "--task_file", tmp_path / "task.json", capsys=capsys)
        assert by_line == leaks


def test_what_is_allowed_is_counted_and_rejects_nothing(films, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    lines = [record("r", trajectories={"a": NO_HELP}), record("m", "gone.png"), record("g")]
    lines[2]["trajectories"] = {"a": "No edema.<|im_end|>", "b": f"{CLEAR} " * 5}
    allowed = "refusal,chat marker,loop"
    found, by_line, _ = run(films, lines, "--allow", allowed, "--out", good, capsys=capsys)
    assert by_line == {1: ["refusal"], 2: ["image missing"], 3: ["chat marker", "loop"]}
    assert found["good"] == 2 and found["kinds"] == {
        "image missing": 1, "refusal": 1, "chat marker": 1, "loop": 1}
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


def test_thinking_has_no_tokens_of_the_answer(films, base):
    says = {"a": "<think>Is it edema, or is it pneumonia?</think>No edema.", "b": "No edema."}
    found, _, _ = run(films, [record("s", trajectories=says)], "--student", base, "--skip_images")
    assert found["tokens"]["a"] == found["tokens"]["b"]


UNREAD = "It looks \x1b[2J fine to me, " + "so it does, " * 9
FEW = [
    record("s0", trajectories={"a": SAYS["a"], "b": NO_HELP}),
    record("s1", trajectories={"a": f"\n<think>Edema?</think> {UNREAD}", "b": "<think>Edema."}),
    record("s2", trajectories={"a": "Good.", "b": SAYS["b"]}),
    record("s3", labels={"Flu": 1}, trajectories={"a": "Fine."}),
    record("s4", trajectories={"a": " ", "c": "Edema."})]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_share_of_texts_that_could_not_be_read_is_told_for_each_teacher(films, workers):
    found, _, _ = run(films, FEW, "--num_workers", workers)
    assert found["unread"] == {
        "a": {"texts": 4, "unread": 3, "share": 0.75,
              "example": {"id": "s1", "text": UNREAD[:80].replace("\x1b", "\\x1b")}},
        "b": {"texts": 3, "unread": 0, "share": 0.0, "example": None}}  # refusals are none of them


# ------------------------------------------------------------------------------------------- --show

def shown(path, *flags, capsys):
    """What --show prints, as {(id, teacher): lines}."""
    capsys.readouterr()
    check.show(check.parse([str(path), *map(str, flags)]))
    blocks = capsys.readouterr().out.removesuffix("\n\n").split("\n\n")
    return {tuple(block.split("\n")[0].split(", ")): block.split("\n")[1:] for block in blocks}


def test_show_prints_a_text_and_below_it_what_was_read_and_the_words_that_decided(films, capsys):
    odd = "No edema.\r\nThe heart is large.\u2028"
    run(films, [*FEW, record("s5", "gone.png", trajectories={"c": odd})])
    blocks = shown(films.parent / "studies.jsonl", "--show", 100, capsys=capsys)
    assert list(blocks) == [("s0", "a"), ("s0", "b"), ("s1", "a"), ("s1", "b"), ("s2", "a"),
                            ("s2", "b"), ("s3", "a"), ("s5", "c")]
    assert blocks["s0", "a"] == ["    Small left pleural effusion.",
                                 "  Pleural Effusion: 1   <- Small left pleural effusion."]
    assert blocks["s0", "b"] == [f"    {NO_HELP}", "  declines"]
    assert blocks["s1", "a"] == ["    " + UNREAD.strip().replace("\x1b", "\\x1b"),
                                 "  nothing was read"]
    assert blocks["s1", "b"] == ["    (only thinking)", "  declines"]
    assert blocks["s5", "c"] == [
        "    No edema.\\r", "    The heart is large.\\u2028",
        "  Cardiomegaly: 1   <- The heart is large.", "  Edema: 0   <- No edema."]


def test_show_chooses_evenly_over_the_file_and_the_teachers(films, capsys):
    lines = [record(f"s{i}", trajectories={"a": "Edema.", "b": "No edema.", "c": f"Film {i}."})
             for i in range(300)]
    lines[100]["trajectories"]["rare"] = "Edema."
    run(films, lines[:1])
    path = films.parent / "studies.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = list(shown(path, "--show", 21, capsys=capsys))
    assert list(shown(path, "--show", 21, capsys=capsys)) == chosen and len(set(chosen)) == 21
    at = [int(name[1:]) for name, _ in chosen]
    for teacher, number in {"a": 7, "b": 7, "c": 6, "rare": 1}.items():
        of = [i for i, (_, name) in zip(at, chosen) if name == teacher]
        assert len(of) == number
        if number > 1:
            gaps = [later - earlier for earlier, later in zip(of, of[1:])]
            assert of[0] < 60 and of[-1] > 240 and max(gaps) - min(gaps) <= 1
    assert len(set(at)) > 15
    assert len({teacher for _, teacher in shown(path, "--show", 3, capsys=capsys)}) == 3


def test_show_leaves_out_the_middle_of_a_long_text_and_of_the_words_that_decided(films, capsys):
    words = "and again " * 1000
    run(films, [record("s", trajectories={"a": f"Edema {words} is seen <|im_end|>"})])
    text, *read = shown(films.parent / "studies.jsonl", "--show", 1, capsys=capsys)["s", "a"]
    assert 1200 < len(text) < 1300 and text.endswith("<|im_end|>") and "    Edema and" in text
    assert "[... 8,825 characters ...]" in text
    assert read and all(line.startswith("  Edema: 1   <- Edema and") and len(line) < 300
                        for line in read)


def test_show_reads_by_the_task_file_and_ends_with_status_0_whatever_else_is_wrong(tmp_path, world):
    lines = ["{torn", json.dumps(record("", trajectories=SAYS)),
             json.dumps(record("s", "gone.png", {"Flu": 1}, {"a": "edema mild"}))]
    (tmp_path / "studies.jsonl").write_text("\n".join(lines))
    done = main(tmp_path / "studies.jsonl", "--show", 5, "--task_file", world / "task.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert "s, a\n    edema mild\n  Edema: mild   <- edema mild\n" in done.stdout
    (tmp_path / "studies.jsonl").write_text(json.dumps(record("s", trajectories={})))
    done = main(tmp_path / "studies.jsonl", "--show", 5)
    assert done.returncode == 1 and done.stderr.endswith(
        "studies.jsonl: no record with an id has trajectories, expected the teachers' texts\n")
    for flags in (["--show", "0"], ["--show", "5", "--json"], ["--show", "5", "--out", "x.jsonl"]):
        with pytest.raises(SystemExit):
            check.parse(["studies.jsonl", *flags])


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
    lines = [json.dumps(record("s0", "good.png")),
             json.dumps(record("s1", "gone.png", trajectories={**SAYS, "b": "Good."}))]
    (tmp_path / "studies.jsonl").write_text("\n".join(lines))
    done = main(tmp_path / "studies.jsonl", "--images", films, "--json")
    assert done.returncode == 1
    assert "1 records: image missing" in done.stdout and "1 of 2 records are good" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "records": 2, "good": 1, "training": 1, "with trajectories": 1,
        "kinds": {"image missing": 1}, "tokens": {},
        "unread": {"a": {"texts": 2, "unread": 0, "share": 0.0, "example": None},
                   "b": {"texts": 2, "unread": 1, "share": 0.5,
                         "example": {"id": "s1", "text": "Good."}}}}
    told = f'{"b":24}{2:>9} texts, nothing was read in 1 (50.0%), as in s1: "Good."\n'
    assert told in done.stdout
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
                        "trajectories": {"a": "edema mild", "b": "x"}, "report": "x" * 3000}
                file.write(json.dumps(line) + "\n")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                              text=True, check=True, env={**os.environ, "PYTHONPATH": path})
        peaks.append(int(done.stdout))
    few, many = peaks
    assert few < 100_000 and many - few < 12_000  # KiB; the lines themselves are 54,000 more
