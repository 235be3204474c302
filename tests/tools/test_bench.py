"""The benchmark runs and compares equal work. Nothing here looks at a time."""

import io
import json
import sys
import tarfile

import bench
import pytest
from test_meteor import write_folder

FIELDS = {"time_vs_separate", "time_vs_trl", "memory_vs_separate", "mfu", "hfu", "peak_gib"}


@pytest.fixture
def bench_output(script):
    """bench_output("step", "--flag", ...) -> what the command prints, and its last line's JSON."""
    def run(*flags):
        *text, last = script("tests/bench.py", *flags, "--json").stdout.splitlines()
        return "\n".join(text), json.loads(last)
    return run


def test_step(bench_output):
    text, report = bench_output("step", "--size", "tiny", "--repeats", "1", "--no_trl")
    assert set(report) == {"mode", "teacher_cost"} and report["teacher_cost"] > 0
    assert set(report["mode"]) == {"full", "lora", "merger"}
    for line in report["mode"].values():
        assert set(line) == FIELDS
        assert line["time_vs_trl"] is line["mfu"] is line["hfu"] is None
        assert min(line["time_vs_separate"], line["memory_vs_separate"], line["peak_gib"]) > 0
    # packed and separate in three modes, packed with one teacher in the first
    assert text.count("log-probs differ by") == 7


def test_step_with_trl(bench_output):
    """DPOTrainer runs on our collator and scores the same log-probs, from the same images."""
    pytest.importorskip("trl")
    text, report = bench_output("step", "--size", "tiny", "--repeats", "1", "--modes", "merger")
    assert report["mode"]["merger"]["time_vs_trl"] > 0
    assert report["mode"]["lora"]["time_vs_separate"] is None
    _, names = zip(*(line.split()[:2] for line in text.splitlines() if "log-probs" in line))
    assert names == ("packed", "separate", "TRL", "one")


def run_with_wrong_places(monkeypatch, *flags):
    """Runs a command while every branch of a packed row has wrong positions."""
    pack = bench.student.pack

    def wrong(*arguments):
        batch = pack(*arguments)
        return batch | {"position_ids": batch["position_ids"] + batch["branch"]}

    monkeypatch.setattr(bench.student, "pack", wrong)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags, "--size", "tiny", "--repeats", "1"])
    bench.main()


def test_step_notices_other_work(monkeypatch):
    """A packed step whose branches are in wrong places is not compared."""
    with pytest.raises(SystemExit, match="separate does other work than packed"):
        run_with_wrong_places(monkeypatch, "step", "--no_trl", "--modes", "merger")


def test_sample(bench_output):
    text, report = bench_output("sample", "--size", "tiny", "--repeats", "1", "--batch", "3")
    assert set(report) == {"time_vs_plain"} and "100.0% the same" in text


def test_metrics(bench_output, tmp_path, monkeypatch):
    """With METEOR's formats in small, no Java, and two reports in Open-I's format.

    One of the two is read as labelled.
    """
    reports = {"CXR1": {"FINDINGS": "No effusion.", "IMPRESSION": "Mild cardiomegaly."},
               "CXR2": {"FINDINGS": "Possible pneumonia.", "IMPRESSION": "Atelectasis."}}
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as tar:
        for name, parts in reports.items():
            texts = "".join(f'<AbstractText Label="{label}">{text}</AbstractText>'
                            for label, text in parts.items())
            content = f'<uId id="{name}"/><Abstract>{texts}</Abstract>'
            content = f"<eCitation>{content}</eCitation>".encode()
            member = tarfile.TarInfo(f"ecgen-radiology/{name}.xml")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    (tmp_path / "openi_gld_std14.csv").write_text(
        "filename,Atelectasis,Cardiomegaly,Effusion,Pneumonia,Pneumothorax,Consolidation,Edema\n"
        "CXR1,0,1,0,0,0,0,0\n"
        "CXR2,0,0,0,1,0,0,0\n")
    meteor = write_folder(tmp_path / "own")
    monkeypatch.setenv("PATH", "")
    text, report = bench_output("metrics", "--reports", 20, "--meteor", meteor,
                                "--openi", tmp_path)
    assert report.pop("openi") == {"precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert report.pop("meteor_jar_pair_ms") is None
    report.pop("text_oracle_s")  # null without pycocoevalcap
    assert set(report) == {"text_s", "meteor_table_s", "meteor_table_mb", "meteor_pair_ms",
                           "meteor_pair_slowest_ms", "findings_s"}
    assert min(report.values()) >= 0 and report["meteor_pair_ms"] > 0
    assert "the jar needs Java" in text and "in 2 reports of Open-I" in text


def test_evaluate(bench_output):
    text, report = bench_output("evaluate", "--size", "tiny", "--repeats", "1")
    assert set(report) == {"time_vs_separate"} and "14 questions" in text


def test_evaluate_notices_other_answers(monkeypatch):
    """Questions whose branches are in wrong places are not compared."""
    with pytest.raises(SystemExit, match="other answers"):
        run_with_wrong_places(monkeypatch, "evaluate")


@pytest.mark.parametrize("train, expected", [("lora", (2, 3, 1)), ("full", (3, 4, 4))])
def test_step_flops(train, expected):
    """The arithmetic for 7B by hand.

    2 * 6.525e9 a token, 4 * 3584 * 28 an attended pair, 2 * 0.545e9 a head token, 5.65e12 an image.
    """
    spec, config = bench.SIZES["7b"], bench.make_config("7b")
    n, prefix = spec["responses"], 1104
    pairs = sum(range(1, prefix + 1)) + sum(sum(range(prefix + 1, prefix + m)) for m in n)
    decoder = 2 * 6.525e9 * (prefix + sum(n) - 8) + 4 * 3584 * 28 * pairs + 2 * 0.545e9 * sum(n)
    model, hardware = bench.step_flops(config, prefix, n, 4096, bench.TRAIN[train])
    forward, recomputed, tower = expected
    assert model == pytest.approx(forward * decoder + max(1, tower - 1) * 5.65e12, rel=2e-3)
    assert hardware == pytest.approx(recomputed * decoder + tower * 5.65e12, rel=2e-3)
