"""tools/convert.py: what a mapping file can reach, and pairs that the real TRL loads, tokenises and
trains on as we would."""

import csv
import importlib
import json
import sys

import pytest
import torch
from conftest import ROOT

import data
import student

sys.path.insert(0, str(ROOT / "tools"))
convert = importlib.import_module("convert")

# Qwen2.5-VL's template for what is used here: images and texts, no default system message
TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n"
            "{% for part in message.content %}{% if part.type == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>"
            "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
EXAMPLE = ROOT / "tools" / "cxr_max_mapping.json"


def run(command, *flags):
    args = convert.parse([command, *map(str, flags)])
    return args.run(args)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def write_lines(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def records(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ----------------------------------------------------------------------------------- from CXR-MAX

WIDE = [
    {"study_id": 50414267, "image_path": "a.jpg", "split": "train", "findings": "Clear.",
     "labels": {"edema": "positive", "pleural_effusion": None},
     "responses": {"gpt5": "Edema.", "gemini": None, "grok4": "No edema."}},
    {"study_id": 50414268, "image_path": "b.jpg", "labels": {"edema": "uncertain"},
     "responses": {"gemini": "Perhaps edema.\u2028"}}]
STUDIES = [
    {"id": "50414267", "image": "a.jpg", "split": "train", "report": "Clear.",
     "labels": {"Edema": 1}, "trajectories": {"gpt-5": "Edema.", "grok-4": "No edema."}},
    {"id": "50414268", "image": "b.jpg", "labels": {"Edema": -1},
     "trajectories": {"gemini-2.5": "Perhaps edema.\u2028"}}]


@pytest.mark.parametrize("form", ["jsonl", "json"])
def test_the_example_mapping_reads_one_row_a_study(tmp_path, form):
    rows = WIDE if form == "json" else "".join(json.dumps(row) + "\n" for row in WIDE)
    path, file = write(tmp_path / f"cxr_max.{form}", rows), tmp_path / "s.jsonl"
    out = run("studies", path, "--mapping", EXAMPLE, "--out", file)
    *lines, after_the_last = file.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines] == STUDIES and after_the_last == b""
    assert out == {"studies": 2, "trajectories": {"gpt-5": 1, "grok-4": 1, "gemini-2.5": 1}}
    assert [s.id for s in data.read_studies(file, data.CHEST)] == ["50414267", "50414268"]


LONG = {"id": {"field": "image", "match": "s[0-9]{8}"}, "image": "image", "labels": "labels",
        "trajectories": {"teacher": "model", "text": "messages.1.content"}}


def answer(image, model, text, **more):
    messages = [{"role": "user"}, {"role": "assistant", "content": text}]
    return {"image": f"p10/{image}/x.jpg", "model": model, "messages": messages, **more}


def convert_rows(folder, rows, mapping=LONG, *flags):
    """Converts rows with a mapping to s.jsonl of the folder, or to what the flags say."""
    return run("studies", write(folder / "x.json", rows),
               "--mapping", write(folder / "m.json", mapping), "--out", folder / "s.jsonl", *flags)


def test_rows_of_one_answer_each_are_put_together(tmp_path):
    convert_rows(tmp_path, [
        answer("s50414267", "a", "Edema.", labels={"Edema": 1}),
        answer("s50414268", "b", "Clear."),
        answer("s50414267", "b", "No edema.", labels={"Edema": 1})])
    assert records(tmp_path / "s.jsonl") == [
        {"id": "s50414267", "image": "p10/s50414267/x.jpg", "labels": {"Edema": 1},
         "trajectories": {"a": "Edema.", "b": "No edema."}},
        {"id": "s50414268", "image": "p10/s50414268/x.jpg", "labels": {},
         "trajectories": {"b": "Clear."}}]


def test_a_csv_is_read_by_its_column_names(tmp_path):
    with open(tmp_path / "x.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([
            ["text", "id", "image", "edema", "model"],
            ["Edema,\n\"seen\".", "1", "a.jpg", "1.0", "a"],
            ["Clear.", "2", "b.jpg", "", "b"]])
    mapping = {"id": "id", "image": "image", "labels": {"Edema": "edema"}, "classes": {"1.0": 1},
               "trajectories": {"teacher": "model", "text": "text"}}
    run("studies", tmp_path / "x.csv", "--mapping", write(tmp_path / "m.json", mapping),
        "--out", tmp_path / "s.jsonl")
    found = records(tmp_path / "s.jsonl")
    assert [r["trajectories"] for r in found] == [{"a": 'Edema,\n"seen".'}, {"b": "Clear."}]
    assert [r["labels"] for r in found] == [{"Edema": 1}, {}]


PREPARED = [
    {"id": "s50414267", "image": "files/p10/x.jpg", "labels": {"Edema": -1}, "split": "train",
     "subject": "10000032", "trajectories": {"gpt-5": "asked before"}},
    {"id": "s50414269", "image": "files/p10/y.jpg", "labels": {}, "split": "train"},
    {"id": "s50414270", "image": "files/p10/z.jpg", "labels": {}, "split": "test"}]


# 'perhaps' is no class of ours, but the labels are not taken
@pytest.mark.parametrize("labels", [{"edema": "positive"}, {"edema": "perhaps"}])
def test_trajectories_go_into_prepared_records_and_nothing_else_does(tmp_path, capsys, labels):
    """s50414268, a patient of MS-CXR-T say, was left out by prepare_mimic and stays out."""
    first, *others = WIDE
    path = write(tmp_path / "cxr_max.json", [{**first, "labels": labels}, *others])
    into = write_lines(tmp_path / "studies.jsonl", PREPARED)
    before = into.read_bytes()
    file = tmp_path / "with_teachers.jsonl"
    out = run("studies", path, "--mapping", EXAMPLE, "--into", into, "--out", file)
    prepared, *others = PREPARED
    texts = {"gpt-5": "asked before", "grok-4": "No edema."}
    assert records(file) == [{**prepared, "trajectories": texts}, *others]
    assert into.read_bytes() == before
    assert out == {"studies": 3, "trajectories": {"gpt-5": 1, "grok-4": 1}, "without a record": 1,
                   "without a row": 2, "of the training split": 1}
    said = capsys.readouterr().out
    assert (f"1 studies of {path} have no record in {into} and are left out; 2 records got "
            "nothing, 1 of them of the training split") in said
    assert "warning" not in said
    args = convert.parse(["studies", "x", "--mapping", "m", "--into", "s"])
    assert args.out == "with_teachers.jsonl"


def test_without_prepared_records_it_warns_of_the_test_sets_patients(tmp_path, capsys, world):
    run("studies", write(tmp_path / "x.json", WIDE), "--mapping", EXAMPLE,
        "--out", tmp_path / "s.jsonl")
    assert "warning: " in capsys.readouterr().out
    # another domain has no MS-CXR-T
    convert_rows(tmp_path, [answer("s50414267", "a", "x")], LONG,
                 "--task_file", world / "task.json")
    assert "warning" not in capsys.readouterr().out


def test_into_needs_no_image_and_an_id_that_both_files_have_goes_by_itself(tmp_path):
    rows = [{"id": "50414267", "by": "a", "says": "x"}, {"id": "s50414267", "by": "b", "says": "y"},
            {"id": "50414269", "by": "a", "says": "z"}]
    mapping = {"id": "id", "trajectories": {"teacher": "by", "text": "says"}}
    into = write_lines(tmp_path / "studies.jsonl", PREPARED)
    out = convert_rows(tmp_path, rows, mapping, "--into", into, "--out", into)
    assert [r.get("trajectories") for r in records(into)] == [
        {"b": "y", "gpt-5": "asked before"}, {"a": "z"}, None]
    assert out["without a record"] == 1


@pytest.mark.parametrize("rows, message", [
    ([answer("s50414267", "a", "x"), answer("s50414267", "a", "y")],
     r"x.json\[1\]: a second text of a for study 's50414267'"),
    ([answer("s50414267", "a", "x"), answer("s50414267", "b", "y", labels={"Edema": 1})],
     r"x.json\[1\]: labels of study 's50414267' differ"),
    ([answer("s5041426", "a", "x")], r'x.json\[0\]: "id": expected a non-empty string'),
    ([answer("s50414267", None, "x")], r'x.json\[0\]: "trajectories": the teacher is None'),
    ([answer("s50414267", "a", "x", labels={"Edema": 2}), answer("s50414268", "a", "")],
     r"(?s)Edema is 2.*x.json\[1\]: .*'a' is empty"),
    ([{"image": "s50414267"}, "text"], r'(?s)the teacher is None.*x.json\[1\]: "id"'),
    ([], "no row"),
    ({"data": []}, "expected a list of objects"),
])
def test_every_fault_is_named_with_its_place_and_nothing_is_written(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        convert_rows(tmp_path, rows)
    assert not list(tmp_path.glob("*s.jsonl*"))


@pytest.mark.parametrize("change, message", [
    ({"image": None}, '"image": the path of a field'),
    ({"id": {"field": "x", "match": "("}}, "no regular expression"),
    ({"labels": 3}, '"labels": a field'),
    ({"trajectories": {}}, '"trajectories": {teacher: field}'),
    ({"picture": "x"}, "only id, image"),
    ({"classes": []}, '"classes"'),
])
def test_a_mapping_says_what_is_wrong_with_it(tmp_path, change, message):
    file = write(tmp_path / "m.json", LONG | change)
    with pytest.raises(ValueError) as caught:
        run("studies", "x.jsonl", "--mapping", file, "--out", tmp_path / "s.jsonl")
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)


# ----------------------------------------------------------------------------------------- to TRL

@pytest.fixture(scope="module")
def pairs(tmp_path_factory, world, studies):
    """preferences.jsonl of three studies with a t+, one of them with two teachers only.

    Returns (the studies' records, the file, what the command returned).
    """
    folder = tmp_path_factory.mktemp("pairs")
    chosen = [s.record for s in studies if s.split == "train"][:3]
    chosen[1] = chosen[1] | {"trajectories": dict(list(chosen[1]["trajectories"].items())[:2])}
    write_lines(folder / "studies.jsonl", chosen)
    write_lines(folder / "positives.jsonl",
                [{"id": r["id"], "t_plus": f"edema mild, by {r['id']}"} for r in chosen])
    file = folder / "preferences.jsonl"
    out = run("trl", "--studies", folder / "studies.jsonl",
              "--positives", folder / "positives.jsonl", "--images", world,
              "--task_file", world / "task.json", "--out", file)
    return chosen, file, out


def content(messages):
    """The text of one message."""
    (message,) = messages
    return message["content"]


def test_a_study_becomes_as_many_pairs_as_it_has_teachers(pairs, world, task):
    chosen, path, out = pairs
    rows = records(path)
    assert out == {"studies": 3, "rows": 7 + 2 + 7} and len(rows) == 16
    expected = [(r["id"], teacher, text) for r in chosen
                for teacher, text in r["trajectories"].items()]
    assert [(row["study"], row["teacher"], content(row["rejected"])) for row in rows] == expected
    first, *_ = rows  # this task has no system message
    assert first["prompt"] == [{"role": "user", "content": task.prompts["student"]}]
    t_plus = f"edema mild, by {chosen[0]['id']}"
    assert first["chosen"] == [{"role": "assistant", "content": t_plus}]
    assert first["images"] == [str(world / chosen[0]["image"])]


def test_it_says_that_the_weights_are_lost_and_names_a_missing_film(
        script, pairs, world, tmp_path):
    chosen, path, _ = pairs
    flags = ["--studies", path.with_name("studies.jsonl"),
             "--positives", path.with_name("positives.jsonl"),
             "--task_file", world / "task.json", "--out", tmp_path / "p.jsonl"]
    out = script("tools/convert.py", "trl", *flags, "--images", world, "--json").stdout
    assert "weights w_u are lost" in out
    assert json.loads(out.splitlines()[-1]) == {"studies": 3, "rows": 16}
    (tmp_path / "p.jsonl").unlink()
    with pytest.raises(ValueError, match=f"{tmp_path / chosen[0]['image']}: no such image"):
        run("trl", *flags, "--images", tmp_path)
    assert not list(tmp_path.iterdir())


def real_processor(transformers, ours):
    """The real class of a processor; its video part alone is missing, since it needs torchvision.

    ours  student.Processor, whose tokenizer and image processor it gets
    """
    theirs = object.__new__(transformers.Qwen2_5_VLProcessor)
    theirs.image_processor, theirs.tokenizer = ours.image_processor, ours.tokenizer
    theirs.chat_template = TEMPLATE
    theirs.image_token, theirs.image_token_id = "<|image_pad|>", ours.image_pad
    theirs.video_token, theirs.video_token_id = "<|video_pad|>", -1
    return theirs


def test_the_real_trl_trains_on_the_pairs_and_scores_them_as_we_do(
        pairs, base, processor, studies, task, model, tmp_path):
    """DPOTrainer with its own collator and `real_processor`."""
    trl, datasets, transformers = (
        pytest.importorskip(name) for name in ("trl", "datasets", "transformers"))
    _, path, _ = pairs
    rows = datasets.load_dataset("json", data_files=str(path), split="train",
                                 cache_dir=str(tmp_path / "cache"))
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    theirs = real_processor(transformers, processor)
    settings = trl.DPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=1,
        max_length=None, bf16=False, use_cpu=True, learning_rate=1e-6, logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True, seed=0)
    seen = []

    class Collator(trl.trainer.dpo_trainer.DataCollatorForVisionPreference):
        def torch_call(self, examples):
            keys = [(content(e["chosen"]), content(e["rejected"])) for e in examples]
            batch = super().torch_call(examples)
            seen.append((keys, {key: value.clone() for key, value in batch.items()}))
            return batch

    trainer = trl.DPOTrainer(
        model=model, ref_model=student.load(base), args=settings, train_dataset=rows,
        processing_class=theirs, data_collator=Collator(theirs))
    trainer.train()
    assert trainer.state.global_step == 1

    by_id = {study.id: study for study in studies}
    study_of = {(content(row["chosen"]), content(row["rejected"])): by_id[row["study"]]
                for row in records(path)}
    (keys, batch), *_ = seen
    examples = [processor(study_of[texts], data.student_prompt(study_of[texts], task), texts)
                for texts in keys]
    for at, example in enumerate(examples):
        # the chosen ones come first, then the rejected ones
        for row, response in zip((at, len(keys) + at), example["responses"], strict=True):
            # the template ends with a newline behind the end token
            ids = torch.cat([example["prefix_ids"], response])
            assert batch["input_ids"][row][:len(ids)].tolist() == ids.tolist()
        patches = len(example["pixel_values"])
        pixels = batch["pixel_values"][at * patches:(at + 1) * patches]
        assert torch.equal(pixels, example["pixel_values"])

    # what DPOTrainer logs, with the newline that its template scores as well
    newline = torch.tensor(processor.tokens("\n"))
    for example in examples:
        example["responses"] = [torch.cat([response, newline])
                                for response in example["responses"]]
    ours = student.load(base)
    with torch.no_grad():
        (logps,) = student.PackedStudent(ours)(student.pack(examples, ours))
    chosen, rejected = logps.mean(0).tolist()
    log, *_ = trainer.state.log_history
    assert log["logps/chosen"] == pytest.approx(chosen, rel=1e-4)
    assert log["logps/rejected"] == pytest.approx(rejected, rel=1e-4)
