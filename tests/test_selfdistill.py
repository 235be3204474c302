"""Stage 2: sampling that belongs to a study and to nothing else, and a stage that writes the same file however it is run."""

import json
import math
from collections import Counter

import pytest
import torch
from transformers import GenerationConfig

import data
import selfdistill
import student
from evaluation import results

# --------------------------------------------------------------------------------------------------- what is no t+


@pytest.mark.parametrize("text", [
    "Reader 1 sees an effusion.", "As reader 3 says, the heart is large.", "readers 2 and 4 agree on edema", "Description 2 is wrong.",
    "In report #1 it is absent.", "The readers agree that the heart is large.", "Most readers see edema.", "All readers describe an effusion.",
    "Unlike the other readers, I see none.", "Both readers are right.", "several Readers mention a tube", "The reader describes edema.",
])
def test_a_text_that_quotes_its_readers_is_no_positive(text):
    assert selfdistill.fault(text, "stop") == "quotes its readers"


@pytest.mark.parametrize("text", [
    "The effusion is small and edema is absent.", "Clinical correlation is advised; a report follows.", "Fracture of rib 4.", "2 lesions, 1 mass.",
    "An experienced reader would call this normal.", "Misreader1 is a word.", "The description fits edema; 3 cm mass.", "Unreadable at 2 places.",
])
def test_a_text_about_the_film_is_a_positive(text):
    assert selfdistill.fault(text, "stop") is None


@pytest.mark.parametrize("text, finish, reason", [("edema", "length", "unfinished"), ("Reader 1", "length", "unfinished"), ("", "stop", "empty"),
                                                  (" \n\t", "stop", "empty")])
def test_a_text_that_is_empty_or_does_not_end_is_no_positive(text, finish, reason):
    assert selfdistill.fault(text, finish) == reason


def test_a_refusal_is_no_positive_unless_refusals_are_kept():
    text = "I'm sorry, I cannot help with medical images."
    assert selfdistill.fault(text, "stop", data.CHEST) == "refuses" and selfdistill.fault(text, "stop") is None
    assert selfdistill.fault("I cannot give a diagnosis, but there is a small effusion.", "stop", data.CHEST) is None


# ---------------------------------------------------------------------------------------------------- the next token

LOGITS = torch.tensor([1.0, -2.0, 0.5, 3.0, 2.5, -math.inf, 0.0, 2.0])


def draws(rows, steps, temperature, top_p):
    """rows x steps tokens out of the same logits, each row from its own stream."""
    processor = student.SeededSampling([f"seed {i}" for i in range(rows)], temperature, top_p)
    scores = [processor(None, LOGITS.expand(rows, -1)) for _ in range(steps)]
    assert all(torch.isfinite(s).sum(-1).eq(1).all() for s in scores)  # one token is left possible
    return torch.stack([s.argmax(-1) for s in scores], 1)


@pytest.mark.parametrize("rows, steps", [(4000, 1), (4, 1000)])  # over the streams, and along a stream
@pytest.mark.parametrize("temperature, top_p, kept", [
    (1.0, 1.0, [3, 4, 7, 0, 2, 6, 1]), (0.5, 1.0, [3, 4, 7, 0, 2, 6, 1]), (2.0, 1.0, [3, 4, 7, 0, 2, 6, 1]),
    (1.0, 0.8, [3, 4, 7]),  # .43 + .26 = .69 falls short, .85 does not
    (1.0, 0.5, [3, 4]), (0.3, 0.5, [3]),
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
    alone = student.SeededSampling(["seed 1"], 1.0, 1.0)
    assert [int(alone(None, LOGITS[None]).argmax()) for _ in range(60)] == tokens[1].tolist()


# --------------------------------------------------------------------------------------------------- whole responses

@pytest.fixture
def speaker(talker):
    return student.load(talker)


@pytest.fixture(scope="module")
def examples(encoder, studies, task):
    """Six encoded studies whose prefixes differ in length, one of them short and one with two films."""
    some = [encoder(s, data.compare_prompt(s, task, 0)) for s in studies[:4]]
    some.append(encoder(studies[4], data.student_prompt(studies[4], task)))
    pair = data.Study("pair", (studies[5].images[0], studies[6].images[0]), {}, {})
    some.append(encoder(pair, data.student_prompt(pair, task)))
    assert len({len(example["prefix_ids"]) for example in some}) == 6
    return some


SEEDS = [f"0 study-{i} 0" for i in range(6)]


def responses(model, encoder, examples, seeds=SEEDS, temperature=1.0, top_p=1.0, max_new_tokens=24):
    return [(ids.tolist(), finish) for ids, finish in student.sample(model, encoder, examples, seeds, temperature, top_p, max_new_tokens)]


def test_a_response_ends_with_its_only_end_token_or_is_marked_as_cut(speaker, encoder, examples):
    out = responses(speaker, encoder, examples * 4, [f"{i}" for i in range(24)])
    assert "stop" in {finish for _, finish in out}
    longer = next(i for i, (ids, _) in enumerate(out) if len(ids) > 1)
    assert responses(speaker, encoder, [(examples * 4)[longer]], [f"{longer}"], max_new_tokens=1) == [(out[longer][0][:1], "length")]
    for ids, finish in out:
        if finish == "stop":
            assert ids[-1] == encoder.end and ids.count(encoder.end) == 1 and len(ids) <= 24
        else:
            assert encoder.end not in ids and len(ids) == 24


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 0.9), (0.0, 1.0)])
def test_a_study_samples_the_same_alone_in_company_and_in_any_order(speaker, encoder, examples, temperature, top_p):
    together = responses(speaker, encoder, examples, SEEDS, temperature, top_p)
    assert responses(speaker, encoder, examples[::-1], SEEDS[::-1], temperature, top_p) == together[::-1]
    for example, seed, expected in zip(examples, SEEDS, together):
        assert responses(speaker, encoder, [example], [seed], temperature, top_p) == [expected]


def test_another_seed_is_another_sample_and_torchs_own_seed_has_no_say(model, encoder, examples):
    torch.manual_seed(1)
    first = responses(model, encoder, examples)
    torch.manual_seed(2)
    assert responses(model, encoder, examples) == first
    assert all(a != b for a, b in zip(first, responses(model, encoder, examples, [f"other {i}" for i in range(6)])))


@torch.no_grad()
def decode_greedily(model, encoder, example, steps):
    """One study, no cache, no padding, no batch: the argmax of a whole forward for each token."""
    ids = example["prefix_ids"][None]
    for _ in range(steps):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=example["pixel_values"],
                       image_grid_thw=example["image_grid_thw"], mm_token_type_ids=(ids == encoder.image_pad).long(), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        if ids[0, -1] == encoder.end:
            break
    return ids[0, len(example["prefix_ids"]):].tolist()


@pytest.mark.parametrize("folder", ["base", "talker"])
def test_temperature_zero_is_argmax_decoding_token_by_token(folder, encoder, examples, request):
    model = student.load(request.getfixturevalue(folder))
    with torch.no_grad():
        model.lm_head.weight[encoder.image_pad] = 0  # else it may write the image's own token, which a whole forward takes for a film
    expected = [decode_greedily(model, encoder, example, 12) for example in examples]
    assert len(set(map(tuple, expected))) > 1
    assert [ids for ids, _ in responses(model, encoder, examples, temperature=0.0, max_new_tokens=12)] == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_students_own_generation_settings_do_not_leak_into_sampling(model, encoder, examples, temperature):
    expected = responses(model, encoder, examples, temperature=temperature)
    # the keys of Qwen2.5-VL's own file; its repetition_penalty of 1.05 and its temperature of 1e-6 made large enough to be seen
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=9.0, temperature=5.0, bos_token_id=encoder.pad,
                                               pad_token_id=encoder.pad, eos_token_id=[encoder.end, encoder.pad])
    assert responses(model, encoder, examples, temperature=temperature) == expected
    ids = examples[4]["prefix_ids"][None]
    penalised = model.generate(input_ids=ids, max_new_tokens=24, do_sample=False, pixel_values=examples[4]["pixel_values"],
                               image_grid_thw=examples[4]["image_grid_thw"], mm_token_type_ids=(ids == encoder.image_pad).long())
    greedy = responses(model, encoder, examples, temperature=0.0)[4][0]
    assert penalised[0, ids.shape[1]:].tolist() != greedy  # transformers' own way takes them over, so they are there to leak


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_folded_attention_gives_the_tokens_of_sdpa(speaker, encoder, examples, temperature, monkeypatch):
    folded = responses(speaker, encoder, examples, temperature=temperature)
    calls = Counter()

    def plain(module, query, key, value, attention_mask, **kwargs):
        calls[query.shape[2] > 1] += 1
        return student.sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(student.AttentionInterface._global_mapping, "folded", plain)
    assert responses(speaker, encoder, examples, temperature=temperature) == folded
    assert calls[False] > calls[True] > 0  # and it was in use, in prefill and in decoding


@pytest.mark.parametrize("pads", [(0, 0, 0), (0, 3, 8)])
def test_prompts_without_their_padding_equal_masked_attention_where_tokens_are(pads):
    B, H, K, S, D = 3, 6, 2, 9, 8
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(B, heads, S, D, generator=g) for heads in (H, K, K))
    i = torch.arange(S)
    pad = torch.tensor(pads)
    sees = (i[:, None] >= i) & (i >= pad[:, None])[:, None]  # (B, S, S)
    out, _ = student._folded_attention(None, query, key, value, sees[:, None], scaling=0.3)
    scores = 0.3 * query @ key.repeat_interleave(H // K, 1).mT
    expected = scores.masked_fill(~sees[:, None], -math.inf).softmax(-1) @ value.repeat_interleave(H // K, 1)
    there = i >= pad[:, None]
    assert torch.allclose(out[there], expected.transpose(1, 2)[there], atol=1e-6) and torch.isfinite(out).all()


@pytest.mark.parametrize("padded", [False, True])
def test_folded_attention_equals_grouped_query_attention_written_out(padded):
    B, H, G, S, D = 3, 4, 2, 7, 8  # G key-value heads
    torch.manual_seed(0)
    query, key, value = torch.randn(B, H, 1, D), torch.randn(B, G, S, D), torch.randn(B, G, S, D)
    sees = torch.arange(S) >= torch.tensor([0, 3, 6])[:, None] if padded else torch.ones(B, S, dtype=torch.bool)
    out, _ = student._folded_attention(None, query, key, value, sees[:, None, None] if padded else None, scaling=0.3)
    for b in range(B):
        for h in range(H):
            k, v = key[b, h // (H // G)][sees[b]], value[b, h // (H // G)][sees[b]]
            torch.testing.assert_close(out[b, 0, h], torch.softmax(0.3 * k @ query[b, h, 0], 0) @ v)


def test_sampling_leaves_the_model_as_it_was(speaker, encoder, examples):
    config = speaker.model.language_model.config
    before = config._attn_implementation
    speaker.train()
    responses(speaker, encoder, examples[:1], SEEDS[:1], max_new_tokens=2)
    with pytest.raises(TypeError):
        responses(speaker, encoder, examples[:1], [object()])
    assert speaker.training and config._attn_implementation == before != "folded"
    assert all(p.grad is None and p.requires_grad for p in speaker.parameters())


# ---------------------------------------------------------------------------------------------------------- attempts

class Script:
    """Stands in for a sampler: what each study says at each attempt, and which seeds it was asked with."""

    def __init__(self, says):
        self.says, self.asked = says, []

    def __call__(self, examples, seeds):
        self.asked.append(seeds)
        said = [self.says[name][sum(s.split()[1] == name for call in self.asked[:-1] for s in call)] for name in examples]
        return [(" ".join(words), len(words), finish) for words, finish in said]


def test_only_failed_samples_are_drawn_again_and_the_first_good_one_stays():
    good, cut, quote, empty = (["effusion", "mild", "."], "stop"), (["effusion"], "length"), (["Reader 1", "."], "stop"), ([], "stop")
    declines = (["I'm sorry,", "I cannot interpret medical images."], "stop")
    script = Script({"a": [good, quote], "b": [cut, declines, good, cut], "c": [empty, cut, quote]})
    args = selfdistill.parse(["--studies", "s", "--seed", "5", "--attempts", "3", "--refusals", "drop"])
    records = selfdistill.sample_batch(script, [(data.Study(name, (), {}, {}), name) for name in "abc"], data.CHEST, args)
    positive = {"t_plus": "effusion mild .", "tokens": 3, "finish": "stop"}
    assert records == [{"id": "a", "seed": "5 a 0", **positive}, {"id": "b", "seed": "5 b 2", **positive},
                       {"id": "c", "dropped": "quotes its readers"}]
    assert script.asked == [["5 a 0", "5 b 0", "5 c 0"], ["5 b 1", "5 c 1"], ["5 b 2", "5 c 2"]]


# --------------------------------------------------------------------------------------------------------- the stage

@pytest.fixture(scope="module")
def flags(world, talker):
    """Small batches of the tiny world; about one sample in three does not end in time, and some studies never do."""
    return ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world, "--task_file", world / "task.json", "--student", talker,
            "--max_new_tokens", "10", "--batch_size", "5", "--attempts", "2", "--no-bf16"]


def stage(flags, folder):
    selfdistill.run(selfdistill.parse([str(flag) for flag in [*flags, "--output_dir", folder]]))
    return contents(folder)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in ("positives.jsonl", "dropped.jsonl", "stats.json", "finished.json")}


@pytest.fixture(scope="module")
def done(flags, tmp_path_factory):
    """An uninterrupted run on one rank: its folder, what it wrote, and the part file that it worked in."""
    folder, keep = tmp_path_factory.mktemp("done") / "positives", []
    statistics = selfdistill.statistics
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selfdistill, "statistics", lambda *args: (keep.append((folder / "part-0.jsonl").read_bytes()), statistics(*args))[1])
        written = stage(flags, folder)
    return folder, written, keep[0]


def lines(content):
    return [json.loads(line) for line in content.decode().split("\n")[:-1]]


def test_every_study_ends_up_in_one_of_the_two_files_and_is_counted(done, studies, encoder):
    _, written, _ = done
    positives, dropped, stats = lines(written["positives.jsonl"]), lines(written["dropped.jsonl"]), json.loads(written["stats.json"])
    train = [s.id for s in studies if s.split == "train"]
    assert positives and dropped and sorted(r["id"] for r in positives + dropped) == sorted(train)
    order = {id: at for at, id in enumerate(train)}
    for records in (positives, dropped):
        assert [order[r["id"]] for r in records] == sorted(order[r["id"]] for r in records)
    assert stats["studies"] == len(train) and stats["positives"] == len(positives)
    assert stats["dropped"] == Counter(r["dropped"] for r in dropped) and sum(stats["dropped"].values()) == len(dropped)
    for record in positives:
        assert set(record) == {"id", "t_plus", "seed", "tokens", "finish"} and record["finish"] == "stop" and record["tokens"] <= 10
        assert record["t_plus"].strip() and record["seed"] in (f"0 {record['id']} 0", f"0 {record['id']} 1")
    assert stats["sampled_again"] == sum(record["seed"].endswith(" 1") for record in positives) + len(dropped) and stats["refusals_left_out"] == 0
    assert {record["seed"].split()[-1] for record in positives} == {"0", "1"}  # some came with the second attempt


def test_a_positive_is_what_its_seed_samples_alone(done, speaker, encoder, studies, task):
    for record in lines(done[1]["positives.jsonl"])[:3]:
        s = next(s for s in studies if s.id == record["id"])
        ids, finish = student.sample(speaker, encoder, [encoder(s, data.compare_prompt(s, task, 0))], [record["seed"]], 1.0, 1.0, 10)[0]
        assert (encoder.text(ids), len(ids), finish) == (record["t_plus"], record["tokens"], record["finish"])


def test_stage_3_reads_what_stage_2_writes(done, world, task):
    folder, written, _ = done
    chosen = data.read_positives(folder / "positives.jsonl", data.read_studies(world / "studies.jsonl", task, "train"))
    assert {s.id: s.t_plus for s in chosen} == {r["id"]: r["t_plus"] for r in lines(written["positives.jsonl"])}


def test_four_ranks_write_the_bytes_of_one(done, flags, script, tmp_path):
    script("selfdistill.py", *flags, "--output_dir", tmp_path / "four", ranks=4)
    assert contents(tmp_path / "four") == done[1]
    assert not list((tmp_path / "four").glob("part-*"))


TORN = b'["train-00003", {"id": "train-00003", "t_plus": "\xe2\x80'  # inside a character


@pytest.mark.parametrize("share, torn", [(0, TORN), (0.3, b""), (0.5, TORN), (0.7, b"cut"), (1, TORN), (1, b"")])
def test_a_killed_run_goes_on_to_the_same_file(done, flags, tmp_path, monkeypatch, share, torn):
    folder, _, part = tmp_path / "torn", *done[1:]
    folder.mkdir()
    (folder / "args.json").write_bytes((done[0] / "args.json").read_bytes())
    cut = part.rindex(b"\n", 0, int(share * len(part)) + 1) + 1 if share else 0
    if torn == b"cut":
        cut, torn = int(share * len(part)), b""  # wherever that is
    (folder / "part-1.jsonl" if share == 0.5 else folder / "part-0.jsonl").write_bytes(part[:cut] + torn)
    asked, sample = [], student.sample

    def listen(model, encoder, examples, seeds, *rest):
        asked.append(seeds)
        return sample(model, encoder, examples, seeds, *rest)

    monkeypatch.setattr(student, "sample", listen)
    assert stage(flags, folder) == done[1]
    ids = [json.loads(line)[0] for line in part.split(b"\n") if line]
    batches = [ids[at:at + 5] for at in range(0, len(ids), 5)]
    on_disk = {json.loads(line)[0] for line in part[:cut].split(b"\n")[:-1] if line}
    # what is not there is drawn in the batches of the uninterrupted run, whole
    assert [seeds for seeds in asked if seeds[0].endswith(" 0")] == [[f"0 {id} 0" for id in batch] for batch in batches if set(batch) - on_disk]


def test_a_line_that_a_kill_tore_is_closed_before_the_next_one(done, flags, tmp_path, monkeypatch):
    """Killed twice: the torn end of the first run must not swallow the first record of the second."""
    folder = tmp_path / "torn"
    folder.mkdir()
    (folder / "part-0.jsonl").write_bytes(TORN)
    with monkeypatch.context() as patch:
        patch.setattr(selfdistill, "statistics", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage(flags, folder)
    records = results.read_parts(folder)
    assert len(records) == 24
    monkeypatch.setattr(student, "sample", lambda *args: pytest.fail("everything was on disk"))
    assert stage(flags, folder) == done[1]


def test_a_finished_stage_says_so_and_touches_nothing(done, flags, monkeypatch, capsys):
    folder, written, _ = done
    state = lambda: {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.name != ".lock"}
    before = state()
    monkeypatch.setattr(student, "load", lambda *args: pytest.fail("a finished stage loads nothing"))
    stage(flags, folder)
    assert state() == before and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="top_p: 1.0 there, 0.9 here"):  # a stage of other settings is not this one
        stage([*flags, "--top_p", "0.9"], folder)
    assert state() == before


def test_other_settings_do_not_continue_a_begun_run(done, flags, tmp_path):
    folder, _, part = tmp_path / "begun", *done[1:]
    folder.mkdir()
    (folder / "args.json").write_bytes((done[0] / "args.json").read_bytes())
    (folder / "part-0.jsonl").write_bytes(part)
    with pytest.raises(SystemExit, match="temperature: 1.0 there, 0.5 here"):
        stage([*flags, "--temperature", "0.5"], folder)
    assert (folder / "part-0.jsonl").read_bytes() == part and not (folder / "positives.jsonl").exists()
    other = stage([*flags, "--temperature", "0.5", "--resume", "never"], folder)
    assert other["positives.jsonl"] != done[1]["positives.jsonl"]


def test_many_studies_without_a_positive_are_warned_of(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(student, "sample", lambda model, encoder, examples, *rest: [([5], "length")] * len(examples))
    assert lines(stage(flags, tmp_path / "cut")["positives.jsonl"]) == []
    assert "warning: more than a fifth of the studies have no t+; dropped.jsonl says why" in capsys.readouterr().out


def test_statistics_count_agreement_and_truth_by_hand(task):
    studies = [data.Study("a", (), {"Edema": "mild", "Pneumonia": "absent"}, {"u": "edema mild, pneumonia severe", "v": "edema mild"}),
               data.Study("b", (), {"Edema": "severe"}, {"u": "edema absent"}), data.Study("c", (), {}, {"u": "edema mild"})]
    records = {"a": {"t_plus": "edema mild; pneumonia absent"}, "b": {"t_plus": "nothing to read"}, "c": {"dropped": "empty"}}
    assert selfdistill.statistics(studies, records, task) == {
        "studies": 3, "positives": 2, "dropped": {"empty": 1},
        "agreement_with_vote": 1 / 3,  # votes: a says edema mild (agrees) and pneumonia severe (does not), b edema absent (unread)
        "accuracy": 2 / 3, "unread": 1 / 3}
