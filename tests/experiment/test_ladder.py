"""The experiment's mechanics on a miniature: every row is made, a stopped ladder goes on, the
arithmetic of claims. No ordering is asserted."""

import argparse
import json
import shutil
import statistics
import textwrap
from pathlib import Path

import numpy as np
import pytest

import data
import evaluate
from evaluation import ablation, tables
from experiment import beta, claims, figures, scoring
from experiment import ladder as of_ladder
from experiment.rows import LORA, MODES, ROWS
from scale_model import world as scale_world


def mini(out, **more):
    settings = {"command": "ladder", "out": str(out), "worlds": ["nuisance"], "seeds": [0],
                "split": "test", "jobs": 1, "films": 16, "max_steps": 2, "base_steps": 2}
    return argparse.Namespace(**{**settings, **more})


@pytest.fixture(scope="module")
def ladder(tmp_path_factory):
    out = tmp_path_factory.mktemp("ladder")
    return out, of_ladder.run(mini(out))


def test_every_row_is_there_once_with_its_modes(ladder):
    out, results = ladder
    assert [cell["row"] for cell in results["cells"]] == list(ROWS)
    for cell in results["cells"]:
        modes = ablation.modes(cell)
        expected = {"given"} if cell["row"] in ROWS[:10] else set(MODES)
        if cell["row"].startswith("t+"):
            expected = {"greedy", "sampled"}
        assert set(modes) == expected, cell["row"]
        for score in modes.values():
            assert set(score["accuracy"]) == set(scale_world.FINDINGS)
            assert all(0 <= value <= 1 for value in score["accuracy"].values())
            assert score["mean"] == pytest.approx(statistics.mean(score["accuracy"].values()))
            assert set(score["n"].values()) == {16}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))


def test_rows_that_go_on_from_pi_st_start_there_and_take_as_many_steps(ladder):
    chain = ladder[0] / "nuisance-0"
    settings_of = lambda cell: json.loads((chain / cell / "args.json").read_text())
    cells = ("spd_continued", "tuned", "apo_lora", "apo_shuffled", "apo_oracle")
    settings = [settings_of(cell) for cell in cells]
    assert {s["student"] for s in settings} == {str(chain / "spd_all" / "student")}
    keys = ("global_batch", "num_epochs", "train", "learning_rate")
    assert {tuple(s[key] for key in keys) for s in settings} == {(4, 1, "lora", 1e-3)}
    assert settings_of("untaught_apo")["student"] == str(chain / "untaught_spd" / "student")


def test_shuffled_positives_are_the_same_texts_of_other_studies_and_the_oracle_is_the_vote(ladder):
    chain = ladder[0] / "nuisance-0"
    t_plus = of_ladder.read_t_plus(chain / "positives" / "positives.jsonl")
    shuffled = of_ladder.read_t_plus(chain / "shuffled.jsonl")
    oracle = of_ladder.read_t_plus(chain / "oracle.jsonl")
    assert sorted(t_plus.values()) == sorted(shuffled.values())
    assert t_plus.keys() == shuffled.keys() and t_plus != shuffled
    task = data.load_task(chain / "world" / "task.json")
    for study in data.read_studies(chain / "world" / "studies.jsonl", task, "train"):
        assert data.read_classes(oracle[study.id], task) == data.vote(study.trajectories, task)


def test_a_stopped_ladder_goes_on_and_ends_the_same(ladder):
    out, results = ladder
    chain = out / "nuisance-0"
    shutil.rmtree(chain / "apo_oracle")
    (chain / "tuned" / "cell.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in chain.glob("*/student/model.safetensors")}
    again = of_ladder.run(mini(out))
    # nothing else was done again
    assert {path: path.stat().st_mtime_ns for path in stamps
            if path.parts[-3] != "apo_oracle"} == stamps
    without_seconds = lambda content: [
        {key: value for key, value in cell.items() if key != "scored_in_cpu_seconds"}
        for cell in content["cells"]]
    assert without_seconds(again) == without_seconds(results)
    assert again["claims"] == results["claims"]


def test_a_chain_that_fails_names_its_log(ladder, tmp_path):
    shutil.copytree(ladder[0], tmp_path / "copy")
    chain = tmp_path / "copy" / "nuisance-0"
    (chain / "world" / "task.json").write_text("{")
    with pytest.raises(ValueError, match=r"nuisance-0: ValueError: .*task\.json.*chain\.log"):
        of_ladder.run(mini(tmp_path / "copy"))
    assert "load_task" in (chain / "chain.log").read_text()


def test_a_chain_that_is_refused_ends_the_command_too(ladder, tmp_path):
    """A stage refuses by SystemExit, which a pool of processes does not hand back."""
    shutil.copytree(ladder[0], tmp_path / "copy")
    with pytest.raises(ValueError, match="was begun with other settings"):
        of_ladder.run(mini(tmp_path / "copy", max_steps=1))


def test_beta_needs_a_ladder_and_draws_a_figure(ladder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="run first: python -m experiment ladder"):
        beta.run(mini(tmp_path))
    out, _ = ladder
    monkeypatch.setattr(beta, "BETAS", (2.0, 0.5))
    options = of_ladder.options_of(mini(out))
    beta.beta_chain(out / "nuisance-0", "nuisance", 0, options)
    cells = of_ladder.read_cells([out / "nuisance-0"], "beta_*/cell.json")
    assert [cell["beta"] for cell in cells] == [0.5, 2.0]
    for cell in cells:
        for key in ("slope", "predicted", "seen", "log_ratio_of_t_plus"):
            assert np.isfinite(cell[key])
    svg = figures.beta_figure(cells)
    assert svg.count("<circle") == 6 and svg.count("<polyline") == 4 and "nan" not in svg
    assert beta.beta_table(cells).count("\n") == 2


def test_the_probe_changes_one_grade_at_a_time(task, studies):
    texts = beta.grade_texts(studies[0], task)
    base = data.vote(studies[0].trajectories, task)
    for i, text in enumerate(texts):
        finding, grade = list(scale_world.FINDINGS)[i // 3], scale_world.GRADES[i % 3]
        assert data.read_classes(text, task) == {**base, finding: grade}


def test_the_interval_is_students():
    found = claims.interval([0.1, 0.2, 0.6])
    half = 4.303 * statistics.stdev([0.1, 0.2, 0.6]) / 3 ** 0.5
    assert found["mean"] == pytest.approx(0.3)
    assert found["high"] - found["mean"] == pytest.approx(half)
    assert claims.interval([0.5])["low"] is None


def test_differences_are_paired_by_seed():
    cells = []
    for seed, shift in ((0, 0.1), (1, 0.3)):
        for row in ROWS:
            mean = 0.5 * seed + (shift if row == LORA else 0)
            score = {"mean": mean, "accuracy": dict.fromkeys(scale_world.FINDINGS, mean),
                     "agreement_with_vote": 0.5}
            cells.append({"world": "class", "seed": seed, "row": row,
                          **dict.fromkeys(("given", *MODES), score),
                          "inherited": {"own": 0.5, "others": 0.4, "vote": 0.1}})
    assert {row for claim in claims.DIFFERENCES for row in (claim.row, claim.minus)} <= set(ROWS)
    found = {(c["claim"], c["mode"]): c for c in claims.answers(cells)}
    beats = found["APO beats SPD (Table 5)", "greedy"]
    assert beats["values"] == pytest.approx([0.1, 0.3])
    assert beats["paper"] == 0.10 and beats["mean"] == pytest.approx(0.2)
    inherits = "SPD inherits its teachers' errors (Obs. 1.2): own minus other teachers'"
    assert found[inherits, None]["mean"] == pytest.approx(0.1)


def test_inherited_errors_are_counted_by_voice(task, studies):
    some = [study for study in studies if study.split == "train"]
    as_its_voice = [data.read_classes(study.trajectories[scoring.voice(study)], task)
                    for study in some]
    said = evaluate.read_teachers(some, task)
    votes = evaluate.votes_of(said, task)
    found = scoring.inherited(as_its_voice, some, said, votes)
    assert found["own"] == 1.0 and 0 < found["others"] < 1
    right = scoring.inherited([study.labels for study in some], some, said, votes)
    assert right == {"own": 0.0, "others": 0.0, "vote": 0.0}
    voted = [data.vote(study.trajectories, task) for study in some]
    assert scoring.inherited(voted, some, said, votes)["vote"] == 1.0


def test_the_ablation_table_prints_ladder_and_paper(ladder, script):
    out, results = ladder
    printed = script("evaluate.py", "ablation", out / "results.json").stdout
    assert all(row in printed for row in ROWS)
    assert "paper: SPD, all teachers + APO" in printed and "paper +0.10" in printed


def test_the_ladders_students_stand_below_table_5(ladder):
    out, results = ladder
    found = tables.collect([out / "results.json"])[5]
    cell = next(cell for cell in results["cells"] if cell["row"] == LORA)
    expected = [*(cell["greedy"]["accuracy"][f] for f in tables.FIVE), cell["greedy"]["mean"]]
    assert found[f"{LORA} [nuisance]"] == pytest.approx(expected)
    assert len(found) == 12
    assert "here: SPD, one teacher [nuisance]" in tables.beside(5, found)


def test_another_file_is_no_ladder(tmp_path):
    (tmp_path / "x.json").write_text('{"cells": 3}')
    message = r"x\.json: not the results\.json of python -m experiment ladder"
    with pytest.raises(ValueError, match=message):
        ablation.read_ladder(tmp_path / "x.json")


def test_the_command_line_ends_with_one_line(script, tmp_path):
    done = script("experiment", "beta", "--out", tmp_path, "--worlds", "class", expect=1)
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"experiment: {tmp_path / 'class-0'}: no finished chain; run first")


def test_the_readme_and_experiment_md_hold_the_committed_results():
    root = Path(of_ladder.__file__).parent.parent
    results = json.loads((root / "experiment/ladder.json").read_text())
    readme = (root / "README.md").read_text()
    rules = (root / "experiment/README.md").read_text()
    whole = ablation.ladder_markdown(results)
    assert whole in rules
    start = readme.index(whole.splitlines()[0])
    # README shows some of the rows, in the same words and figures
    shown = readme[start:].split("\n\n", 1)[0].splitlines()
    assert len(shown) > 10 and [row for row in whole.splitlines() if row in shown] == shown
    assert ablation.claims_markdown(results) in rules
    assert claims.answers(results["cells"]) == results["claims"]
    cells = json.loads((root / "experiment/beta.json").read_text())["cells"]
    assert figures.ladder_figure(results["cells"]) == (root / "docs/ladder.svg").read_text()
    assert figures.beta_figure(cells) == (root / "docs/beta.svg").read_text()
    assert textwrap.indent(beta.beta_table(cells), "    ") in readme
