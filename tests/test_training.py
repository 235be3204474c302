"""The schedule, the plan of an epoch, the optimiser, the flags, broken images."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch

import apo
import data
import selfdistill
import spd
import student
import training
from runtime import ranks


def test_the_schedule_warms_up_linearly_and_falls_as_a_cosine():
    rates = [training.schedule(step, 101, 1e-4, 1e-7, 20) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4 / 20) and rates[9] == pytest.approx(5e-5)
    assert rates[19] == pytest.approx(1e-4) and rates[20] == pytest.approx(1e-4)
    assert rates[60] == pytest.approx((1e-4 + 1e-7) / 2) and rates[100] == pytest.approx(1e-7)
    assert all(a >= b for a, b in zip(rates[20:], rates[21:]))
    assert training.schedule(0, 10, 2e-5, 1e-7, 0) == 2e-5


def settings(**flags):
    return argparse.Namespace(**{"seed": 0, "global_batch": 4, "micro_batch": 1, "num_epochs": 2,
                                 "max_steps": None, **flags})


@pytest.mark.parametrize("count, micro", [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_each_step_takes_the_same_studies_however_they_are_shared(monkeypatch, count, micro):
    def steps(count, micro):
        taken = []
        for rank in range(count):
            monkeypatch.setattr(ranks, "world", lambda: count)
            monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
            plan = training.Plan([1] * 11, settings(micro_batch=micro))
            batches = plan.micro_batches()
            per_step = [batches[s * plan.accumulation:(s + 1) * plan.accumulation]
                        for s in range(plan.steps)]
            taken.append([sum(step, []) for step in per_step])
        return [sorted(sum(step, [])) for step in zip(*taken)]

    assert steps(count, micro) == steps(1, 1)
    assert all(len(set(step)) == 4 for step in steps(count, micro))
    assert len(steps(count, micro)) == 4  # 2 epochs x (11 // 4)


@pytest.mark.parametrize("count, micro", [(1, 1), (2, 2), (4, 1)])
def test_the_micro_batches_of_all_ranks_are_the_order_of_the_epoch_cut_in_pieces(
        monkeypatch, count, micro):
    """The reference pass cuts the order like this.

    So its rows are those of the first epoch, and the first rewards are exactly 0.
    """
    batches = []
    for rank in range(count):
        monkeypatch.setattr(ranks, "world", lambda: count)
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        plan = training.Plan([1] * 11, settings(micro_batch=micro))
        batches += plan.micro_batches()[:plan.steps_per_epoch * plan.accumulation]
    order = plan.order(0)
    starts = range(0, plan.steps_per_epoch * 4, micro)
    pieces = [[(0, index) for index in order[at:at + micro]] for at in starts]
    assert sorted(batches) == sorted(pieces)


def test_the_longest_micro_batch_is_the_one_with_the_longest_study():
    plan = training.Plan([100 - index for index in range(11)], settings(micro_batch=2))
    longest = min(index for batch in plan.micro_batches() for _, index in batch)
    assert longest in [index for _, index in plan.longest()]


def test_something_is_due_every_so_many_steps_and_at_the_end():
    plan = training.Plan([1] * 11, settings())
    assert [plan.due(done, 3) for done in range(1, 5)] == [False, False, True, True]


def a_fit(processor, studies, task, limit, truncate):
    """drop_long on a folder that keeps what is written there -> (kept, tokens, too_long)."""
    class Folder:
        long = []

        def write_lines(self, name, records):
            assert name == "too_long.jsonl"
            self.long = records

    folder, args = Folder(), argparse.Namespace(max_tokens=limit, truncate=truncate)
    prompt = lambda study: data.student_prompt(study, task)
    texts = lambda study: study.trajectories.values()
    return *training.drop_long(processor, studies, prompt, texts, args, folder), folder.long


def test_a_study_that_does_not_fit_is_reported_left_out_or_cut(base, task, world, studies, capsys):
    texts = lambda study: list(study.trajectories.values())
    prompt = lambda study: data.student_prompt(study, task)
    processor = student.Processor(base, task, world)
    sizes = [sum(lengths) + prefix
             for prefix, lengths in (processor.lengths(s, prompt(s), texts(s)) for s in studies)]
    limit = sorted(sizes)[len(sizes) // 2]
    kept, tokens, long = a_fit(processor, studies, task, limit, truncate=False)
    assert [s.id for s in kept] == [s.id for s, n in zip(studies, sizes) if n <= limit]
    assert tokens == [n for n in sizes if n <= limit]
    assert [(row["id"], row["tokens"], row["cut"]) for row in long] == [
        (s.id, n, False) for s, n in zip(studies, sizes) if n > limit]
    counts = f"{len(long)} studies exceed --max_tokens {limit}: 0 are cut, {len(long)} left out"
    assert counts in capsys.readouterr().out

    kept, tokens, long = a_fit(processor, studies, task, limit, truncate=True)
    assert kept == studies and all(row["cut"] for row in long) and max(tokens) == limit
    cutter = student.Processor(base, task, world, max_tokens=limit)
    for study, size in zip(studies, sizes):
        example = cutter(study, prompt(study), texts(study))
        whole = processor(study, prompt(study), texts(study))
        assert sum(map(len, example["responses"])) + len(example["prefix_ids"]) == min(size, limit)
        # neither image nor prompt is cut
        assert torch.equal(example["prefix_ids"], whole["prefix_ids"])
        pairs = zip(example["responses"], whole["responses"])
        assert all(torch.equal(r, w[:len(r)]) for r, w in pairs)


def test_no_room_beside_the_image_is_no_study(processor, studies, task):
    kept, _, long = a_fit(processor, studies[:1], task, 30, truncate=True)
    assert kept == [] and long[0]["cut"] is False


def test_a_resumed_plan_is_the_tail_of_the_whole_plan():
    plan = training.Plan([1] * 11, settings())
    assert plan.micro_batches(3) == plan.micro_batches()[3 * plan.accumulation:]


@pytest.mark.parametrize("flags, message", [({"global_batch": 6, "micro_batch": 4}, "multiple of"),
                                            ({"global_batch": 12, "micro_batch": 1}, "11 studies")])
def test_numbers_that_do_not_divide_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        training.Plan([1] * 11, settings(**flags))


def test_fp32_updates_equal_torchs_adamw():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimisers = [cls(m.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0.05)
                  for cls, m in ((training.MasterAdamW, ours), (torch.optim.AdamW, theirs))]
    for _ in range(5):
        x = torch.randn(4, 5)
        for m, optimiser in zip((ours, theirs), optimisers):
            optimiser.zero_grad()
            m(x).square().sum().backward()
            optimiser.step()
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-6)
    assert torch.allclose(ours.bias, theirs.bias, rtol=1e-6)


def test_a_bf16_weight_moves_through_its_fp32_master():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    ours = training.MasterAdamW([weight], lr=2e-5, weight_decay=0.0)
    theirs = torch.optim.AdamW([plain], lr=2e-5, weight_decay=0.0)
    for _ in range(300):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        ours.step()
        theirs.step()
    assert ours.state[weight]["master"].item() == pytest.approx(1 - 300 * 2e-5, rel=1e-4)
    assert weight.item() == pytest.approx(1 - 300 * 2e-5, rel=4e-3) and weight.item() < 1
    assert plain.item() == 1  # what the master is for


def test_a_gradient_that_is_not_finite_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(2))
    optimiser = training.MasterAdamW([weight], lr=0.1)
    weight.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(FloatingPointError):
        training.update({"w": weight}, optimiser, 0.1, 1.0)
    assert weight.tolist() == [1, 1]


def test_clipping_is_by_the_global_norm():
    weights = {name: torch.nn.Parameter(torch.zeros(1)) for name in "ab"}
    optimiser = torch.optim.SGD(weights.values(), lr=1.0)
    weights["a"].grad, weights["b"].grad = torch.tensor([3.0]), torch.tensor([4.0])
    assert training.update(weights, optimiser, 1.0, 1.0) == pytest.approx(5.0)
    assert weights["a"].item() == pytest.approx(-0.6, rel=1e-4)
    assert weights["b"].item() == pytest.approx(-0.8, rel=1e-4)


def test_presets_are_defaults_that_flags_override():
    assert spd.parse([]).preset == "demo" and spd.parse([]).global_batch == 16
    paper = spd.parse(["--studies", "x"])
    assert (paper.preset, paper.train, paper.learning_rate) == ("paper", "lora", 1e-4)
    assert (paper.lora_dropout, paper.warmup_steps) == (0.1, 20)
    assert spd.parse(["--studies", "x", "--learning_rate", "3e-5"]).learning_rate == 3e-5
    assert set(spd.PRESETS) >= {"paper", "released", "demo"}


def test_a_missing_input_names_the_command_that_makes_it(script, world, tmp_path):
    common = ["--studies", world / "studies.jsonl", "--output_dir", tmp_path]
    out = script("apo.py", *common, "--student", world, expect=1).stdout
    assert "--positives: missing; stage 2 makes them: selfdistill.py" in out
    nowhere = "runs/nowhere/student"
    out = script("selfdistill.py", *common, "--student", nowhere, expect=1).stdout
    assert "--student runs/nowhere/student: missing; stage 1 makes pi_st: spd.py" in out


def test_the_presets_of_the_three_stages_agree_and_help_shows_them(capsys):
    for name in ("paper", "released"):
        flags = ["--studies", "x", "--preset", name]
        stages = [stage.parse(flags) for stage in (spd, selfdistill, apo)]
        assert {args.refusals for args in stages} == {"keep"}, name
    assert apo.parse(["--studies=x"]).train == "merger"
    assert apo.parse(["--studies", "x", "--beta", "0.3"]).beta == 0.3
    with pytest.raises(SystemExit):
        apo.parse(["--studies", "x", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "what trains: lora,merger,decoder,vision (default: merger)" in shown
    assert "decline to answer (default: keep)" in shown


def test_a_flag_cut_short_is_refused_since_the_preset_hangs_on_it():
    for flags in (["--studie", "x"], ["--studies", "x", "--pre", "released"]):
        with pytest.raises(SystemExit):
            apo.parse(flags)


def test_a_norm_of_0_clips_nothing():
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.tensor([30.0])
    optimiser = torch.optim.SGD([weight], lr=1.0)
    assert training.update({"w": weight}, optimiser, 1.0, 0.0) == 30.0 and weight.item() == -30.0


# --------------------------------------------------------------------------------- broken images

@pytest.fixture
def torn(world, tmp_path):
    """A copy of the world in which two films end too early and a third one is gone."""
    folder = tmp_path / "torn"
    shutil.copytree(world, folder)
    for name in TORN:
        film = folder / "films" / name
        film.write_bytes(film.read_bytes()[:-100])
    (folder / "films" / GONE).unlink()
    return folder


TORN, GONE = ("train-00003.png", "train-00017.png"), "train-00009.png"
LEFT_OUT = "--skip_broken: 3 studies left out, for 3 images that cannot be read; see broken.jsonl"


def flags_of(stage, folder, base, positives, out):
    """A short run of a stage on the films of a folder, with --skip_broken."""
    shared = ["--preset", "demo", "--studies", folder / "studies.jsonl", "--images", folder,
              "--task_file", folder / "task.json", "--student", base, "--skip_broken",
              "--output_dir", out]
    training_flags = ["--global_batch", 4, "--max_steps", 2, "--save_steps", 1]
    return shared + {
        spd: training_flags, selfdistill: ["--max_new_tokens", 4, "--batch_size", 8],
        apo: [*training_flags, "--positives", positives]}[stage]


def written(folder):
    """What broken.jsonl lists, without the path in front of a reason."""
    lines = [json.loads(line) for line in (folder / "broken.jsonl").read_text().splitlines()]
    return [(line["id"], line["image"], line["reason"].rpartition("films/")[2]) for line in lines]


def run(stage, flags, capsys):
    """Runs a stage in this process and returns what it printed."""
    stage.run(stage.parse([str(word) for word in flags]))
    return capsys.readouterr().out


@pytest.mark.parametrize("stage, count, left", [
    (spd, 1, 21), (spd, 2, 21), (selfdistill, 1, 21), (apo, 1, 20)])
def test_studies_with_broken_images_are_left_out_on_all_ranks(
        script, torn, base, positives, tmp_path, capsys, stage, count, left):
    flags = flags_of(stage, torn, base, positives, tmp_path / "out")
    if count == 1:
        said = run(stage, flags, capsys)
    else:
        said = script(f"{stage.__name__}.py", *flags, ranks=count).stdout
    assert LEFT_OUT in said and f"{left} studies" in said
    found = written(tmp_path / "out")
    assert [(id, image) for id, image, _ in found] == [
        (film.removesuffix(".png"), f"films/{film}") for film in sorted([*TORN, GONE])]
    assert [reason.split(": ", 2)[:2] for _, _, reason in found] == [
        ["train-00003.png", "not a readable image"], ["train-00009.png", "no such image"],
        ["train-00017.png", "not a readable image"]]


def test_a_run_that_goes_on_keeps_its_studies(torn, world, base, positives, tmp_path, capsys):
    """Also where the films were mended meanwhile. The first run is taken back to its first step."""
    out = tmp_path / "out"
    flags = flags_of(spd, torn, base, positives, out)
    assert "21 studies, 2 steps" in run(spd, flags, capsys)
    before = (out / "student" / "model.safetensors").read_bytes()
    listed = (out / "broken.jsonl").read_bytes()
    shutil.rmtree(out / "student")
    shutil.rmtree(max(out.glob("step-*")))
    (out / "finished.json").unlink()
    shutil.copytree(world / "films", torn / "films", dirs_exist_ok=True)
    said = run(spd, flags, capsys)
    assert LEFT_OUT in said and "continuing from" in said
    assert (out / "student" / "model.safetensors").read_bytes() == before
    assert (out / "broken.jsonl").read_bytes() == listed
    # another beginning looks at the films again
    said = run(spd, [*flags, "--resume", "never"], capsys)
    assert "--skip_broken: 0 studies left out" in said and "24 studies" in said
    assert (out / "broken.jsonl").read_bytes() == b""


def test_without_skip_broken_nothing_is_opened_before_its_step(torn, tmp_path):
    args = argparse.Namespace(skip_broken=False, images=torn, num_workers=0)
    assert training.drop_broken(None, args, ["a study"], []) == (["a study"], [])


def test_a_broken_image_names_the_file_and_the_way_on_once():
    @training.naming_the_way_on()
    def run(message, deeper):
        if deeper:
            return run(message, deeper - 1)
        raise (data.ImageError if "films" in message else ValueError)(message)

    said = "/films/x.png: not a readable image: image file is truncated"
    in_worker = f"Caught ImageError in DataLoader worker process 0.\ndata.ImageError: {said}\n"
    for message, deeper in ((said, 0), (said, 2), (in_worker, 1)):
        with pytest.raises(ValueError) as caught:
            run(message, deeper)
        assert str(caught.value) == said + training.WAY_ON
    with pytest.raises(ValueError, match="^no study$"):
        run("no study", 1)


# ---------------------------------------------------- what can fail at the end is tried first

@pytest.fixture
def copied(base, tmp_path):
    """copied(name) is a copy of the student's folder."""
    return lambda name: Path(shutil.copytree(base, tmp_path / name))


@pytest.mark.parametrize("stage", [spd, apo])
def test_an_invalid_generation_config_neither_ends_a_run_nor_keeps_it_from_going_on(
        copied, world, positives, tmp_path, capsys, stage):
    folder, out = copied("before"), tmp_path / "out"
    said = folder / "generation_config.json"
    said.write_text(json.dumps({"do_sample": False, "temperature": 0.7}))
    flags = flags_of(stage, world, folder, positives, out)
    run(stage, flags, capsys)
    first = (out / "student" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "student")
    shutil.rmtree(max(out.glob("step-*")))
    (out / "finished.json").unlink()
    said.unlink()
    (folder / "README.md").write_text("another card")
    assert "continuing from" in run(stage, flags, capsys)
    assert (out / "student" / "model.safetensors").read_bytes() == first
    saved = json.loads((out / "student" / "generation_config.json").read_text())
    assert "temperature" not in saved and len(saved["eos_token_id"]) == 2


@pytest.mark.parametrize("stage", [spd, apo])
def test_what_could_not_be_saved_is_said_before_the_first_step(
        base, world, positives, tmp_path, capsys, stage, monkeypatch):
    def fails(processor, folder):
        raise TypeError("no JSON:\nset")

    monkeypatch.setattr(student, "save_processor", fails)
    out = tmp_path / "out"
    flags = flags_of(stage, world, base, positives, out)
    for more in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match=f"^--student {base}: a student that is trained from "
                           r"it could not be saved: no JSON:\\nset$"):
            run(stage, [*flags, *more], capsys)
    assert {path.name for path in out.iterdir()} <= {".lock", "args.json", "env.json",
                                                     "broken.jsonl"}


def test_trying_to_save_leaves_nothing(copied, task, tmp_path):
    args = argparse.Namespace(
        student=str(copied("before")), bf16=False, gradient_checkpointing=False)
    processor = student.Processor(args.student, task)
    before = sorted(tmp_path.rglob("*"))
    training.open_student(args, processor, argparse.Namespace(path=tmp_path), "cpu")
    assert sorted(tmp_path.rglob("*")) == before
    full = argparse.Namespace(path=tmp_path / "gone")
    with pytest.raises(OSError):  # the disk's faults keep their own words
        training.open_student(args, processor, full, "cpu")
