"""Stage 2: sampling that belongs to a study and to nothing else.

And the stage: it writes the same file however it is run.
"""

import json
import math
import shutil
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

import data
import sampling
import selfdistill
import student
from runtime.shared import read_parts

# --- what is no t+


@pytest.mark.parametrize("text", [
    "Reader 1 sees an effusion.",
    "As reader 3 says, the heart is large.",
    "readers 2 and 4 agree on edema",
    "Description 2 is wrong.",
    "In report #1 it is absent.",
    "The readers agree that the heart is large.",
    "Most readers see edema.",
    "All readers describe an effusion.",
    "Unlike the other readers, I see none.",
    "Both readers are right.",
    "several Readers mention a tube",
    "The reader describes edema.",
])
def test_a_text_that_quotes_its_readers_is_no_positive(text):
    assert selfdistill.fault(text, "stop") == "quotes its readers"


@pytest.mark.parametrize("text", [
    "The effusion is small and edema is absent.",
    "Clinical correlation is advised; a report follows.",
    "Fracture of rib 4.",
    "2 lesions, 1 mass.",
    "An experienced reader would call this normal.",
    "Misreader1 is a word.",
    "The description fits edema; 3 cm mass.",
    "Unreadable at 2 places.",
])
def test_a_text_about_the_film_is_a_positive(text):
    assert selfdistill.fault(text, "stop") is None


@pytest.mark.parametrize("text, finish, reason", [
    ("edema", "length", "unfinished"),
    ("Reader 1", "length", "unfinished"),
    ("", "stop", "empty"),
    (" \n\t", "stop", "empty"),
    ("no edema<|im_start|>user\nedema", "stop", "holds a chat marker"),
    ("<|image_pad|>", "stop", "holds a chat marker"),
    ("edema <|vision_start|>", "length", "unfinished"),
])
def test_a_text_that_is_empty_or_does_not_end_is_no_positive(text, finish, reason):
    assert selfdistill.fault(text, finish) == reason


def test_a_refusal_is_no_positive_unless_refusals_are_kept():
    text = "I'm sorry, I cannot help with medical images."
    assert selfdistill.fault(text, "stop", data.CHEST) == "refuses"
    assert selfdistill.fault(text, "stop") is None
    hedges = "I cannot give a diagnosis, but there is a small effusion."
    assert selfdistill.fault(hedges, "stop", data.CHEST) is None


# --- the next token

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.5, -math.inf, 0.0, 2.0])


def draws(rows, steps, temperature, top_p):
    """rows x steps tokens out of the same logits, each row from its own stream."""
    processor = sampling.SeededSampling([f"seed {i}" for i in range(rows)], temperature, top_p)
    scores = [processor(None, LOGITS.expand(rows, -1)) for _ in range(steps)]
    assert all(torch.isfinite(s).sum(-1).eq(1).all() for s in scores)  # one token is left possible
    return torch.stack([s.argmax(-1) for s in scores], 1)


# over the streams, and along a stream
@pytest.mark.parametrize("rows, steps", [(4000, 1), (4, 1000)])
@pytest.mark.parametrize("temperature, top_p, kept", [
    (1.0, 1.0, [3, 4, 7, 0, 2, 6, 1]),
    (0.5, 1.0, [3, 4, 7, 0, 2, 6, 1]),
    (2.0, 1.0, [3, 4, 7, 0, 2, 6, 1]),
    (1.0, 0.8, [3, 4, 7]),  # .43 + .26 = .69 falls short, .85 does not
    (1.0, 0.5, [3, 4]),
    (0.3, 0.5, [3]),
])
def test_tokens_come_as_often_as_their_probabilities_say(rows, steps, temperature, top_p, kept):
    counts = torch.bincount(draws(rows, steps, temperature, top_p).flatten(), minlength=len(LOGITS))
    weights = torch.zeros(len(LOGITS), dtype=torch.float64)
    weights[kept] = (LOGITS[kept].double() / temperature).exp()
    expected = weights / weights.sum() * rows * steps
    assert counts[expected == 0].sum() == 0
    frequent = expected >= 5
    chi_square = ((counts - expected) ** 2 / expected)[frequent].sum().item()
    assert chi_square < 27  # six degrees of freedom at most: exceeded once in 7,000 times


def test_a_stream_of_random_numbers_is_not_shared_between_rows():
    tokens = draws(2, 60, 1.0, 1.0)
    assert not torch.equal(tokens[0], tokens[1])
    alone = sampling.SeededSampling(["seed 1"], 1.0, 1.0)
    assert [int(alone(None, LOGITS[None]).argmax()) for _ in range(60)] == tokens[1].tolist()


# --- whole responses

@pytest.fixture
def speaker(talker):
    return student.load(talker)


@pytest.fixture(scope="module")
def examples(processor, studies, task):
    """Six encoded studies whose prefixes differ in length; one is short and one has two films."""
    some = [processor(s, data.compare_prompt(s, task, 0)) for s in studies[:4]]
    some.append(processor(studies[4], data.student_prompt(studies[4], task)))
    pair = data.Study("pair", (studies[5].images[0], studies[6].images[0]), {}, {})
    some.append(processor(pair, data.student_prompt(pair, task)))
    assert len({len(example["prefix_ids"]) for example in some}) == 6
    return some


SEEDS = [f"0 study-{i} 0" for i in range(6)]


def responses(
        model, processor, examples, seeds=SEEDS, temperature=1.0, top_p=1.0, max_new_tokens=24):
    sampled = sampling.sample(
        model, processor, examples, seeds, temperature, top_p, max_new_tokens)
    return [(ids.tolist(), finish) for ids, finish in sampled]


def test_a_response_ends_with_its_only_end_token_or_is_marked_as_cut(speaker, processor, examples):
    out = responses(speaker, processor, examples * 4, [f"{i}" for i in range(24)])
    assert "stop" in {finish for _, finish in out}
    longer = next(i for i, (ids, _) in enumerate(out) if len(ids) > 1)
    (cut,) = responses(
        speaker, processor, [(examples * 4)[longer]], [f"{longer}"], max_new_tokens=1)
    assert cut == (out[longer][0][:1], "length")
    for ids, finish in out:
        if finish == "stop":
            assert ids[-1] == processor.end and ids.count(processor.end) == 1 and len(ids) <= 24
        else:
            assert processor.end not in ids and len(ids) == 24


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_a_study_samples_the_same_alone_in_company_and_in_any_order(
        speaker, processor, examples, temperature, top_p):
    together = responses(speaker, processor, examples, SEEDS, temperature, top_p)
    backwards = responses(
        speaker, processor, examples[::-1], SEEDS[::-1], temperature, top_p)
    assert backwards == together[::-1]
    for example, seed, expected in zip(examples, SEEDS, together):
        assert responses(speaker, processor, [example], [seed], temperature, top_p) == [expected]


def test_a_response_ends_at_either_end_token(speaker, processor, examples):
    with torch.no_grad():
        speaker.lm_head.weight[processor.pad] = speaker.lm_head.weight[processor.end] * 0.98
    seeds = [f"{i}" for i in range(24)]
    out = responses(speaker, processor, examples * 4, seeds)
    stopped = [ids for ids, finish in out if finish == "stop"]
    assert {ids[-1] for ids in stopped} == set(processor.ends)
    assert not any(set(ids[:-1]) & set(processor.ends) for ids, _ in out)
    assert not any(set(ids) & set(processor.ends) for ids, finish in out if finish != "stop")
    assert out == [responses(speaker, processor, [example], [seed])[0]
                   for example, seed in zip(examples * 4, seeds)]


def test_another_seed_is_another_sample_and_torchs_own_seed_has_no_say(model, processor, examples):
    torch.manual_seed(1)
    first = responses(model, processor, examples)
    torch.manual_seed(2)
    assert responses(model, processor, examples) == first
    others = responses(model, processor, examples, [f"other {i}" for i in range(6)])
    assert all(a != b for a, b in zip(first, others))


@torch.no_grad()
def decode_greedily(model, processor, example, steps):
    """One study, no cache, no padding, no batch: the argmax of a whole forward for each token."""
    ids = example["prefix_ids"][None]
    for _ in range(steps):
        logits = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=example["pixel_values"],
            image_grid_thw=example["image_grid_thw"],
            mm_token_type_ids=(ids == processor.image_pad).long(),
            use_cache=False,
        ).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == processor.end:
            break
    return ids[0, len(example["prefix_ids"]):].tolist()


@pytest.mark.parametrize("folder", ["base", "talker"])
def test_temperature_zero_is_argmax_decoding_token_by_token(folder, processor, examples, request):
    model = student.load(request.getfixturevalue(folder))
    with torch.no_grad():
        # else it may write the image's own token, which a whole forward takes for a film
        model.lm_head.weight[processor.image_pad] = 0
    expected = [decode_greedily(model, processor, example, 12) for example in examples]
    assert len(set(map(tuple, expected))) > 1
    sampled = responses(model, processor, examples, temperature=0.0, max_new_tokens=12)
    assert [ids for ids, _ in sampled] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_students_own_generation_settings_do_not_leak_into_sampling(
        model, processor, examples, temperature):
    expected = responses(model, processor, examples, temperature=temperature)
    # the keys of Qwen2.5-VL's own file; its repetition_penalty of 1.05 and its temperature of
    # 1e-6 made large enough to be seen
    model.generation_config = GenerationConfig(
        do_sample=True, repetition_penalty=9.0, temperature=5.0, bos_token_id=processor.pad,
        pad_token_id=processor.pad, eos_token_id=[processor.end, processor.pad])
    assert responses(model, processor, examples, temperature=temperature) == expected
    ids = examples[4]["prefix_ids"][None]
    penalised = model.generate(
        input_ids=ids, max_new_tokens=24, do_sample=False,
        pixel_values=examples[4]["pixel_values"],
        image_grid_thw=examples[4]["image_grid_thw"],
        mm_token_type_ids=(ids == processor.image_pad).long())
    greedy = responses(model, processor, examples, temperature=0.0)[4][0]
    # transformers' own way takes them over, so they are there to leak
    assert penalised[0, ids.shape[1]:].tolist() != greedy


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_folded_attention_gives_the_tokens_of_sdpa(
        speaker, processor, examples, temperature, monkeypatch):
    folded = responses(speaker, processor, examples, temperature=temperature)
    calls = Counter()

    def plain(module, query, key, value, attention_mask, **kwargs):
        calls[query.shape[2] > 1] += 1
        return sampling.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(sampling.AttentionInterface._global_mapping, "folded", plain)
    assert responses(speaker, processor, examples, temperature=temperature) == folded
    assert calls[False] > calls[True] > 0  # and it was in use, in prefill and in decoding


@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 3, 8)])
def test_prompts_without_their_padding_equal_masked_attention_where_tokens_are(pads):
    B, H, K, S, D = 3, 6, 2, 9, 8
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, heads, S, D, generator=g) for heads in (H, K, K))
    i = torch.arange(S)
    pad = torch.tensor(pads)
    sees = (i[:, None] >= i) & (i >= pad[:, None])[:, None]  # (B, S, S)
    out, _ = sampling.folded_attention(None, query, key, value, sees[:, None], scaling=0.3)
    scores = 0.3 * query @ key.repeat_interleave(H // K, 1).mT
    probabilities = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1)
    expected = probabilities @ value.repeat_interleave(H // K, 1)
    there = i >= pad[:, None]
    assert torch.allclose(out[there], expected.transpose(1, 2)[there], atol=1e-6)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("padded", [False, True])
def test_folded_attention_equals_grouped_query_attention_written_out(padded):
    B, H, G, S, D = 3, 4, 2, 7, 8  # G key-value heads
    torch.manual_seed(0)
    query, key, value = torch.randn(B, H, 1, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)
    sees = torch.ones(B, S, dtype=torch.bool)
    if padded:
        sees = torch.arange(S) >= torch.tensor([0, 3, 6])[:, None]
    mask = sees[:, None, None] if padded else None
    out, _ = sampling.folded_attention(None, query, key, value, mask, scaling=0.3)
    for b in range(B):
        for h in range(H):
            k, v = key[b, h // (H // G)][sees[b]], value[b, h // (H // G)][sees[b]]
            torch.testing.assert_close(out[b, 0, h], torch.softmax(0.3 * k @ query[b, h, 0], 0) @ v)


def test_sampling_leaves_the_model_as_it_was(speaker, processor, examples):
    config = speaker.model.language_model.config
    before = config._attn_implementation
    speaker.train()
    responses(speaker, processor, examples[:1], SEEDS[:1], max_new_tokens=2)
    with pytest.raises(TypeError):
        responses(speaker, processor, examples[:1], [object()])
    assert speaker.training and config._attn_implementation == before != "folded"
    assert all(p.grad is None and p.requires_grad for p in speaker.parameters())


# --- attempts

class Script:
    """A sampler of fixed texts: what each study says at each attempt, which seeds were asked."""

    def __init__(self, says):
        self.says, self.asked = says, []

    def sample(self, examples, seeds):
        self.asked.append(seeds)
        before = [seed.split()[1] for call in self.asked[:-1] for seed in call]
        said = [self.says[name][before.count(name)] for name in examples]
        return [(" ".join(words), len(words), finish) for words, finish in said]


def test_only_failed_samples_are_drawn_again_and_the_first_good_one_stays():
    good, cut = (["effusion", "mild", "."], "stop"), (["effusion"], "length")
    quote, empty = (["Reader 1", "."], "stop"), ([], "stop")
    declines = (["I'm sorry,", "I cannot interpret medical images."], "stop")
    script = Script({"a": [good, quote], "b": [cut, declines, good, cut], "c": [empty, cut, quote]})
    args = selfdistill.parse(
        ["--studies", "s", "--seed", "5", "--attempts", "3", "--refusals", "drop"])
    studies = [data.Study(name, (), {}, {}) for name in "abc"]
    records = selfdistill.sample_batch(script, studies, list("abc"), data.CHEST, args)
    positive = {"t_plus": "effusion mild .", "tokens": 3, "finish": "stop"}
    assert records == [
        {"id": "a", "seed": "5 a 0", **positive},
        {"id": "b", "seed": "5 b 2", **positive},
        {"id": "c", "dropped": "quotes its readers"}]
    assert script.asked == [["5 a 0", "5 b 0", "5 c 0"], ["5 b 1", "5 c 1"], ["5 b 2", "5 c 2"]]


def test_what_a_student_thinks_is_no_part_of_its_reading():
    thinks = (["<think>Reader 1 says edema.</think>\n", "effusion mild ."], "stop")
    script = Script({"a": [thinks], "b": [(["<think>effusion."], "stop"), (["edema"], "stop")]})
    args = selfdistill.parse(["--studies", "s", "--attempts", "2"])
    studies = [data.Study(name, (), {}, {}) for name in "ab"]
    records = selfdistill.sample_batch(script, studies, list("ab"), data.CHEST, args)
    assert [(record["t_plus"], record["seed"]) for record in records] == [
        ("effusion mild .", "0 a 0"), ("edema", "0 b 1")]


# --- the stage

@pytest.fixture(scope="module")
def flags(world, talker):
    """Small batches of the tiny world.

    About one sample in three does not end in time, and some studies never do.
    """
    return ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world,
            "--task_file", world / "task.json", "--student", talker, "--max_new_tokens", "10",
            "--batch_size", "5", "--attempts", "2", "--no-bf16"]


def stage(flags, folder):
    selfdistill.run(selfdistill.parse([str(flag) for flag in [*flags, "--output_dir", folder]]))
    return contents(folder)


def contents(folder):
    names = ("positives.jsonl", "dropped.jsonl", "stats.json", "finished.json")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def done(flags, tmp_path_factory):
    """An uninterrupted run on one rank: its folder, what it wrote, the part file it worked in."""
    folder, keep = tmp_path_factory.mktemp("done") / "positives", []
    statistics = selfdistill.statistics

    def keeping(*args):
        keep.append((folder / "part-0.jsonl").read_bytes())
        return statistics(*args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfdistill, "statistics", keeping)
        written = stage(flags, folder)
    return folder, written, keep[0]


def lines(content):
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def test_every_study_ends_up_in_one_of_the_two_files_and_is_counted(done, studies, processor):
    _, written, _ = done
    positives, dropped = lines(written["positives.jsonl"]), lines(written["dropped.jsonl"])
    stats = json.loads(written["stats.json"])
    train = [s.id for s in studies if s.split == "train"]
    assert positives and dropped and sorted(r["id"] for r in positives + dropped) == sorted(train)
    order = {id: at for at, id in enumerate(train)}
    for records in (positives, dropped):
        assert [order[r["id"]] for r in records] == sorted(order[r["id"]] for r in records)
    assert stats["studies"] == len(train) and stats["positives"] == len(positives)
    assert stats["dropped"] == Counter(r["dropped"] for r in dropped)
    assert sum(stats["dropped"].values()) == len(dropped)
    for record in positives:
        assert set(record) == {"id", "t_plus", "seed", "tokens", "finish"}
        assert record["finish"] == "stop" and record["tokens"] <= 10
        assert record["t_plus"].strip()
        assert record["seed"] in (f"0 {record['id']} 0", f"0 {record['id']} 1")
    second = sum(record["seed"].endswith(" 1") for record in positives)
    assert stats["sampled_again"] == second + len(dropped) and stats["refusals_left_out"] == 0
    # some came with the second attempt
    assert {record["seed"].split()[-1] for record in positives} == {"0", "1"}


def test_a_positive_is_what_its_seed_samples_alone(done, speaker, processor, studies, task):
    for record in lines(done[1]["positives.jsonl"])[:3]:
        s = next(s for s in studies if s.id == record["id"])
        example = processor(s, data.compare_prompt(s, task, 0))
        (sampled,) = sampling.sample(
            speaker, processor, [example], [record["seed"]], 1.0, 1.0, 10)
        ids, finish = sampled
        there = record["t_plus"], record["tokens"], record["finish"]
        assert (processor.text(ids), len(ids), finish) == there


def test_stage_3_reads_what_stage_2_writes(done, world, task):
    folder, written, _ = done
    train = data.read_studies(world / "studies.jsonl", task, "train")
    chosen = data.read_positives(folder / "positives.jsonl", train)
    positives = lines(written["positives.jsonl"])
    assert {s.id: s.t_plus for s in chosen} == {r["id"]: r["t_plus"] for r in positives}


def test_four_ranks_write_the_bytes_of_one(done, flags, script, tmp_path):
    script("selfdistill.py", *flags, "--output_dir", tmp_path / "four", ranks=4)
    assert contents(tmp_path / "four") == done[1]
    assert not list((tmp_path / "four").glob("part-*"))


TORN = b'["train-00003", {"id": "train-00003", "t_plus": "\xe2\x80'  # inside a character


@pytest.mark.parametrize("share, torn", [
    (0, TORN), (0.3, b""), (0.5, TORN), (0.7, b"cut"), (1, TORN), (1, b"")])
def test_a_killed_run_goes_on_to_the_same_file(done, flags, tmp_path, monkeypatch, share, torn):
    folder, _, part = tmp_path / "torn", *done[1:]
    folder.mkdir()
    (folder / "args.json").write_bytes((done[0] / "args.json").read_bytes())
    cut = part.rindex(b"\n", 0, int(share * len(part)) + 1) + 1 if share else 0
    if torn == b"cut":
        cut, torn = int(share * len(part)), b""  # wherever that is
    name = "part-1.jsonl" if share == 0.5 else "part-0.jsonl"
    (folder / name).write_bytes(part[:cut] + torn)
    asked, sample = [], sampling.sample

    def listen(model, processor, examples, seeds, *rest):
        asked.append(seeds)
        return sample(model, processor, examples, seeds, *rest)

    monkeypatch.setattr(sampling, "sample", listen)
    assert stage(flags, folder) == done[1]
    ids = [json.loads(line)[0] for line in part.split(b"\n") if line]
    batches = [ids[at:at + 5] for at in range(0, len(ids), 5)]
    on_disk = {json.loads(line)[0] for line in part[:cut].split(b"\n")[:-1] if line}
    # what is not there is drawn in the batches of the uninterrupted run, whole
    assert [seeds for seeds in asked if seeds[0].endswith(" 0")] == [
        [f"0 {id} 0" for id in batch] for batch in batches if set(batch) - on_disk]


def test_a_line_that_a_kill_tore_is_closed_before_the_next_one(done, flags, tmp_path, monkeypatch):
    """Killed twice: the first run's torn end must not swallow the first record of the second."""
    folder = tmp_path / "torn"
    folder.mkdir()
    shutil.copy(done[0] / "args.json", folder)
    (folder / "part-0.jsonl").write_bytes(TORN)
    with monkeypatch.context() as patch:
        patch.setattr(selfdistill, "statistics", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage(flags, folder)
    records = read_parts(folder)
    assert len(records) == 24
    monkeypatch.setattr(sampling, "sample", lambda *args: pytest.fail("everything was on disk"))
    assert stage(flags, folder) == done[1]


def test_a_finished_stage_says_so_and_touches_nothing(done, flags, monkeypatch, capsys):
    folder, written, _ = done
    state = lambda: {
        path.name: (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.iterdir() if path.name != ".lock"}
    before = state()
    no_load = lambda *args: pytest.fail("a finished stage loads nothing")
    monkeypatch.setattr(student, "load", no_load)
    stage(flags, folder)
    assert state() == before and "finished" in capsys.readouterr().out
    # a stage of other settings is not this one
    with pytest.raises(SystemExit, match="top_p: 1.0 there, 0.9 here"):
        stage([*flags, "--top_p", "0.9"], folder)
    assert state() == before


def test_other_settings_do_not_continue_a_begun_run(done, flags, tmp_path):
    folder, _, part = tmp_path / "begun", *done[1:]
    folder.mkdir()
    (folder / "args.json").write_bytes((done[0] / "args.json").read_bytes())
    (folder / "part-0.jsonl").write_bytes(part)
    with pytest.raises(SystemExit, match="temperature: 1.0 there, 0.5 here"):
        stage([*flags, "--temperature", "0.5"], folder)
    assert (folder / "part-0.jsonl").read_bytes() == part
    assert not (folder / "positives.jsonl").exists()
    other = stage([*flags, "--temperature", "0.5", "--resume", "never"], folder)
    assert other["positives.jsonl"] != done[1]["positives.jsonl"]


def test_many_studies_without_a_positive_are_warned_of(flags, tmp_path, monkeypatch, capsys):
    cut = lambda model, processor, examples, *rest: [([5], "length")] * len(examples)
    monkeypatch.setattr(sampling, "sample", cut)
    assert lines(stage(flags, tmp_path / "cut")["positives.jsonl"]) == []
    warning = "warning: more than a fifth of the studies have no t+; dropped.jsonl says why"
    assert warning in capsys.readouterr().out


def test_statistics_count_agreement_and_truth_by_hand(task):
    labels = {"Edema": "mild", "Pneumonia": "absent"}
    studies = [
        data.Study("a", (), labels, {"u": "edema mild, pneumonia severe", "v": "edema mild"}),
        data.Study("b", (), {"Edema": "severe"}, {"u": "edema absent"}),
        data.Study("c", (), {}, {"u": "edema mild"})]
    records = {
        "a": {"t_plus": "edema mild; pneumonia absent"},
        "b": {"t_plus": "nothing to read"},
        "c": {"dropped": "empty"}}
    # votes: a says edema mild (agrees) and pneumonia severe (does not), b edema absent (unread)
    assert selfdistill.statistics(studies, records, task) == {
        "studies": 3, "positives": 2, "dropped": {"empty": 1},
        "agreement_with_vote": 1 / 3,
        "accuracy": 2 / 3, "unread": 1 / 3, "unread_texts": 1 / 2, "agree_with_nothing": 1 / 2}
    del records["b"], records["c"]
    none = selfdistill.statistics(studies[:1], {"a": {"dropped": "empty"}}, task)
    assert none["unread_texts"] is none["agree_with_nothing"] is None


READ, VAGUE = "edema mild", "it looks fine"


@pytest.mark.parametrize("texts, says", [
    ([READ, READ, VAGUE, VAGUE], None),  # half of them is not most
    ([READ, VAGUE, VAGUE, VAGUE], "WARNING: NOTHING COULD BE READ IN 75% OF THE T+"),
    ([READ, "edema severe", "edema severe", VAGUE],
     "WARNING: 75% OF THE T+ AGREE WITH THE TEACHERS' VOTE ON NO FINDING"),
    ([], None)])
def test_the_last_line_warns_where_most_positives_say_nothing(
        flags, tmp_path, monkeypatch, capsys, texts, says):
    def scripted(sampler, studies, examples, task, args):
        return [{"id": study.id, "t_plus": texts[int(study.id[-5:]) % len(texts)], "tokens": 2,
                 "seed": f"0 {study.id} 0", "finish": "stop"} if texts
                else {"id": study.id, "dropped": "empty"} for study in studies]

    monkeypatch.setattr(selfdistill, "sample_batch", scripted)
    monkeypatch.setattr(selfdistill.data, "vote", lambda trajectories, task: {"Edema": "mild"})
    stage(flags, tmp_path / "positives")
    *_, last = capsys.readouterr().out.splitlines()
    if says is None:
        assert "WARNING" not in last
    else:
        assert last.startswith(says)
        assert f"python tools/check.py {flags[3]} --task_file {flags[7]} --show 10" in last
        assert "--task_file" in last
