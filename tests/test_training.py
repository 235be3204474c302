"""The schedule, the plan of an epoch, the optimiser, the flags, broken images."""

import argparse
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import ROOT
from torch.testing._internal.distributed.fake_pg import FakeStore

import apo
import data
import selfdistill
import spd
import student
import training
from runtime import checkpoint, ranks


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


def a_fit(processor, studies, task, limit, truncate=False, max_length=None):
    """drop_long on a folder that keeps what is written there -> (kept, tokens, too_long)."""
    class Folder:
        long = []

        def write_lines(self, name, records):
            assert name == "too_long.jsonl"
            self.long = records

    folder, args = Folder(), argparse.Namespace(
        max_tokens=limit, truncate=truncate, max_length=max_length)
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
    assert long == [{"id": s.id, "tokens": n, "cut": 0}
                    for s, n in zip(studies, sizes) if n > limit]
    counts = (f"{len(long)} studies exceed --max_tokens {limit}: 0 responses of 0 of them are cut, "
              f"{len(long)} left out; see too_long.jsonl")
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
    assert kept == [] and long[0]["cut"] == 0


def test_a_sequence_beyond_max_length_loses_its_end_and_is_counted(
        base, task, world, studies, capsys):
    """As in the authors' scripts: image, prompt and one response, cut for itself."""
    texts = lambda study: list(study.trajectories.values())
    prompt = lambda study: data.student_prompt(study, task)
    whole = student.Processor(base, task, world)
    sizes = {s.id: whole.lengths(s, prompt(s), texts(s)) for s in studies}
    longest = sorted(max(lengths) + prefix for prefix, lengths in sizes.values())
    limit = longest[len(longest) // 2]
    kept, tokens, long = a_fit(whole, studies, task, 8192, max_length=limit)
    beyond = {id: sum(n + prefix > limit for n in lengths) for id, (prefix, lengths)
              in sizes.items()}
    beyond = {id: count for id, count in beyond.items() if count}
    assert kept == studies and 0 < len(beyond) < len(studies)
    assert long == [{"id": id, "tokens": sizes[id][0] + sum(sizes[id][1]), "cut": count}
                    for id, count in beyond.items()]
    assert (f"{len(beyond)} studies exceed --max_tokens 8192 or --max_length {limit}: "
            f"{sum(beyond.values())} responses of {len(beyond)} of them are cut, 0 left out; see "
            "too_long.jsonl") in capsys.readouterr().out

    cutter = student.Processor(base, task, world, max_length=limit)
    for study, row in zip(studies, tokens):
        example, before = (p(study, prompt(study), [None, *texts(study)]) for p in (cutter, whole))
        room = limit - len(before["prefix_ids"])
        assert torch.equal(example["prefix_ids"], before["prefix_ids"])
        assert example["responses"][0] is None
        pairs = list(zip(example["responses"], before["responses"]))[1:]
        assert all(torch.equal(r, w[:room]) for r, w in pairs)
        # a response that is cut has no end token, any other one has it
        assert all((r[-1] == cutter.end) == (len(w) <= room) for r, w in pairs)
        assert row == len(before["prefix_ids"]) + sum(len(r) for r, _ in pairs)


@pytest.mark.parametrize("stage", [spd, apo])
def test_a_stage_trains_on_sequences_that_are_cut(
        base, world, positives, processor, studies, task, tmp_path, capsys, stage):
    prefix, _ = processor.lengths(studies[0], data.student_prompt(studies[0], task), [])
    flags = flags_of(stage, world, base, positives, tmp_path / "out")
    bound = ["--max_length", prefix + 20, "--logging_steps", 1]
    said = run(stage, [*flags, *bound], capsys)
    assert re.search(r"or --max_length \d+: \d+ responses of \d+ of them are cut, 0 left", said)
    out = tmp_path / "out"
    long = [json.loads(line) for line in (out / "too_long.jsonl").read_text().splitlines()]
    assert all(line["cut"] for line in long)
    first = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    most = 20 * 4 * (8 if stage is apo else 4)  # of 4 studies; the demo draws 4 of 7 teachers
    assert most / 2 < first["tokens"] <= most
    # the reference is cut at the same places
    assert stage is spd or first["loss"] == torch.tensor(8.0).log().item()


@pytest.mark.parametrize("bounds, fit", [
    ({}, [40, 60, 5]), ({"max_length": 150}, [40, 50, 5]), ({"max_length": 116}, [16, 16, 5]),
    ({"max_length": 115}, None), ({"max_length": 90}, None),
    # what --max_length leaves must fit in the row
    ({"max_length": 150, "max_tokens": 195}, [40, 50, 5]),
    ({"max_length": 150, "max_tokens": 194}, None),
    ({"max_length": 130, "max_tokens": 155, "truncate": True}, [25, 25, 5]),
    ({"max_tokens": 136, "truncate": True}, None),
    ({"max_tokens": 137, "truncate": True}, [16, 16, 5]), ({"max_tokens": 204}, None)])
def test_a_response_that_is_cut_keeps_16_tokens_or_its_study_is_left_out(bounds, fit):
    args = argparse.Namespace(**{
        "max_length": None, "max_tokens": 8192, "truncate": False, **bounds})
    assert training.fitted(100, [40, 60, 5], args) == fit


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


def updated(size, dtype, monkeypatch, seeds=range(5)):
    """(weights, their optimiser) after an update per seed, in slices of `size` elements."""
    monkeypatch.setattr(training, "SLICE", size)
    torch.manual_seed(0)
    weights = {str(shape): torch.nn.Parameter(torch.randn(shape).to(dtype))
               for shape in ((1543, 131), (7,), ())}
    optimiser = training.MasterAdamW(weights.values(), lr=1e-2, betas=(0.9, 0.98))
    take_steps(weights, optimiser, seeds)
    return weights, optimiser


def take_steps(weights, optimiser, seeds):
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        for weight in weights.values():
            weight.grad = (torch.randn(weight.shape, generator=g) / 10**seed).to(weight.dtype)
        optimiser.step()


def bits_of(weights, state):
    """All of the weights and their state, in their order."""
    return [weights[name] for name in weights] + [
        state[weights[name]][key] for name in weights for key in sorted(state[weights[name]])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_in_slices_is_that_of_the_whole_to_the_bit(dtype, monkeypatch):
    whole, optimiser = updated(2**24, dtype, monkeypatch)
    want = bits_of(whole, optimiser.state)
    assert optimiser.state[whole["(7,)"]]["step"] == 5
    for size in (1000, 4096):
        sliced, in_slices = updated(size, dtype, monkeypatch)
        for a, b in zip(bits_of(sliced, in_slices.state), want, strict=True):
            assert a.shape == b.shape and torch.equal(a, b)


@pytest.fixture
def alone():
    """A process group of one rank, in which an optimiser can be sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_a_sharded_optimiser_goes_on_in_slices_from_a_checkpoint_of_whole_weights(
        alone, tmp_path, monkeypatch):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    whole, optimiser = updated(2**24, torch.bfloat16, monkeypatch)
    monkeypatch.setattr(training, "SLICE", 1000)
    sharded = lambda weights: ZeroRedundancyOptimizer(
        weights.values(), optimizer_class=training.MasterAdamW, lr=1e-2, betas=(0.9, 0.98))
    weights, _ = updated(1000, torch.bfloat16, monkeypatch, seeds=())
    first = sharded(weights)
    take_steps(weights, first, range(3))
    checkpoint.save_checkpoint(tmp_path, 3, weights, first, {}, 1)
    weights, _ = updated(1000, torch.bfloat16, monkeypatch, seeds=())
    second = sharded(weights)
    checkpoint.load_checkpoint(tmp_path / "step-000003", weights, second)
    take_steps(weights, second, range(3, 5))
    want = bits_of(whole, optimiser.state)
    for a, b in zip(bits_of(weights, second.optim.state), want, strict=True):
        assert torch.equal(a, b)


def most_allocated(work):
    """How many bytes more than before are allocated on the CPU at most while work() runs."""
    with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


@pytest.mark.parametrize("size", [2**20, 2**24])  # slices of the embedding; it is one slice
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_that_a_dry_run_sums_up_is_what_an_update_takes(dtype, size, monkeypatch):
    monkeypatch.setattr(training, "SLICE", size)
    model = torch.nn.Sequential(torch.nn.Embedding(152_064, 64), torch.nn.Linear(64, 64)).to(dtype)
    frozen = model[1].weight.requires_grad_(False)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = training.MasterAdamW(parameters.values(), lr=1e-3)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    update = lambda: training.update(parameters, optimiser, 1e-3, 1.0)
    at_first = most_allocated(update)  # which makes the state
    held, gradients, states, temporaries = (
        gib * 2**30 for gib in training.memory(model, list(parameters.values()), optimiser))
    count, bytes_each = sum(p.numel() for p in parameters.values()), dtype.itemsize
    assert (held, gradients) == ((count + frozen.numel()) * bytes_each, count * bytes_each)
    assert states == count * (8 if dtype == torch.float32 else 12)
    assert at_first == pytest.approx(states + temporaries, rel=1e-3)
    assert most_allocated(update) == pytest.approx(temporaries, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_the_memory_of_the_7b_decoder_on_four_gpus_is_what_the_docs_say(monkeypatch):
    """On tensors without contents and ranks that only this process pretends to."""
    monkeypatch.setattr(ranks, "gather", lambda value: [value])
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16,
                  out_hidden_size=3584)
    text = dict(vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
                num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=False)
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config).bfloat16()
    parameters = student.set_trainable(model, ["decoder"])
    for p in parameters.values():
        p.grad = torch.empty_like(p)
    args = argparse.Namespace(learning_rate=1.0, adam_beta1=0.9, adam_beta2=0.98, weight_decay=0.0)
    shares = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        optimiser = training.make_optimizer(parameters, args, shard=True)
        optimiser.optim.step()
        shares.append(training.memory(model, list(parameters.values()), optimiser))
        dist.destroy_process_group()
    parts = max(shares, key=sum)
    page = (ROOT / "docs" / "reproduce.md").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = (line for line in page.splitlines() if line.startswith("| GPU memory, `--train dec"))
    in_all = [float(gib) for gib in re.findall(r"(\d+\.\d) GiB", row)]
    assert in_all == [round(gib, 1) for gib in (*parts, sum(parts))]
    assert f"about {sum(parts):.0f} GiB per GPU" in readme


def test_a_dry_run_measures_beside_the_optimisers_state_and_takes_the_largest_share(
        monkeypatch, capsys):
    model = torch.nn.Linear(2**13, 2**12, bias=False)
    parameters = dict(model.named_parameters())
    model.weight.grad = torch.zeros_like(model.weight)
    model.device = torch.device("cpu")
    optimiser, states = training.MasterAdamW(parameters.values(), lr=1.0), []
    packed = argparse.Namespace(model=model)

    def warm_up(*given):
        assert given == (packed, plan, "encode", model)
        states.append(dict(optimiser.state))
        return 3.0

    # another rank has 0.5 GiB more than this one, of states and at the peak
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value + 0.5])
    monkeypatch.setattr(ranks, "peak_gib", lambda device: 7.0)
    monkeypatch.setattr(training, "warm_up", warm_up)
    before = model.weight.detach().clone()
    plan = training.Plan([1] * 11, settings())
    training.report_dry_run(plan, packed, "encode", parameters, optimiser, 10)
    said = capsys.readouterr().out
    assert ("weights 0.12, gradients 0.12, moments 0.75, the update's temporaries 0.12, in all "
            "1.12 before activations") in said
    assert "peak memory 7.50 GiB" in said
    # four passes of 3 s and the update
    assert 12 <= float(re.search(r"one step of the longest studies: ([\d.]+) s", said)[1])
    assert [list(state) for state in states] == [[model.weight]]
    assert torch.equal(model.weight, before)


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


@pytest.mark.parametrize("stage, length, K", [(spd, 2304, 7), (apo, 4096, 8)])
def test_released_follows_the_authors_scripts_and_help_says_what_32_are_here(
        stage, length, K, capsys):
    args = stage.parse(["--studies", "x", "--preset", "released"])
    assert (args.warmup_steps, args.warmup_ratio) == (0, 0.05)
    assert (args.global_batch, args.max_length) == (4, length)
    # seven sequences that are no longer than --max_length are never too long a row
    fit = training.fitted(2000, [length - 2000] * K, args)
    assert fit == [length - 2000] * K
    with pytest.raises(SystemExit):
        stage.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"is cut at {length:,} tokens. Its 32" in said
    assert "a step are 4 studies of seven teachers here, 28: 5 would be 35" in said
    for other in ("paper", "demo"):
        args = stage.parse(["--studies", "x", "--preset", other])
        assert (args.warmup_ratio, args.max_length) == (0, None)


def test_the_warm_up_is_a_number_of_steps_or_a_share_of_them_rounded_up():
    rates = {"learning_rate": 1.0, "min_learning_rate": 0.0}
    plan = lambda **flags: training.Plan([1] * 1004, settings(num_epochs=1, **rates, **flags))
    share = plan(warmup_steps=0, warmup_ratio=0.05)  # of 251 steps: 12.55
    assert [share.learning_rate(step) for step in (0, 11, 12, 13)] == [1 / 13, 12 / 13, 1.0, 1.0]
    same = plan(warmup_steps=13, warmup_ratio=0.0)
    assert [same.learning_rate(s) for s in range(251)] == [
        share.learning_rate(s) for s in range(251)]
    assert plan(warmup_steps=0, warmup_ratio=0.0).learning_rate(0) == 1.0


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
