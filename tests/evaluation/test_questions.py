"""Closed questions: all of a study's in one packed row, equal to each asked alone; long work that
continues where it stopped."""

import json
import math

import pytest
import torch

import apo
import data
import student
from evaluation import questions
from runtime.shared import shared_map


@pytest.fixture(scope="module")
def chest(base, world):
    return student.Processor(base, data.CHEST, world)


def alone(model, processor, study, text, spelling):
    """log P(spelling | image, question) by a plain forward over one unpacked sequence."""
    pixel_values, grid = processor.pixels(study)
    prefix, option = processor.prefix(text, grid), torch.tensor(processor.tokens(spelling))
    ids = torch.cat([prefix, option])[None]
    labels = torch.cat([torch.full_like(prefix, -100), option])[None]
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixel_values, image_grid_thw=grid,
                       use_cache=False,
                       mm_token_type_ids=(ids == model.config.image_token_id).long()).logits
    return apo.response_logps(logits, labels).item()


def test_packed_questions_equal_separate_forwards(model, chest, studies):
    """14 yes/no questions and three of several options, whose spellings take one to several tokens;
    one image and two."""
    asked = questions.closed_questions(data.CHEST)
    asked |= {
        "course": ("Is the edema better or worse?", {"improving": 0, "stable": 1, "worsening": 2}),
        "grade": ("How much?", {"absent": 0, "mild": 1})}
    tokens = {len(chest.tokens(spelling)) for _, options in asked.values() for option in options
              for spelling in questions.spellings(option)}
    assert len(tokens) > 2
    pair = data.Study("pair", (*studies[0].images, *studies[1].images), {}, {})
    for study in (studies[0], pair):
        example = questions.encode(chest, study, questions.tokenise(chest, asked))
        together = questions.option_logps(model, example)
        assert list(together) == list(asked)
        # each question is in the row once
        assert sum(branch.parent is None for branch in example["branches"]) == len(asked)
        for key, (text, options) in asked.items():
            for option in options:
                each = [alone(model, chest, study, text, spelling)
                        for spelling in questions.spellings(option)]
                expected = math.log(sum(map(math.exp, each)))
                assert together[key][option] == pytest.approx(expected, abs=1e-5), (key, option)


def test_an_answer_does_not_depend_on_the_other_questions(model, chest, studies):
    asked = questions.closed_questions(data.CHEST)
    one = {"Edema": asked["Edema"]}

    def ask(some):
        example = questions.encode(chest, studies[0], questions.tokenise(chest, some))
        return questions.option_logps(model, example)

    assert ask(one)["Edema"] == pytest.approx(ask(asked)["Edema"], abs=1e-5)


def test_a_student_that_was_taught_an_answer_gives_it(base, chest, studies):
    """Trained on 'yes' to one question and 'no' to another, through the training path: the same
    prefix and the same answer tokens."""
    model = student.load(base)
    asked = {f: q for f, q in questions.closed_questions(data.CHEST).items()
             if f in ("Edema", "Fracture")}
    truth = {"Edema": "yes", "Fracture": "no"}
    parameters = student.set_trainable(model, ["decoder", "merger"])
    optimizer = torch.optim.AdamW(parameters.values(), lr=3e-3)
    model.train()
    examples = [chest(study, asked[f][0], [truth[f]]) for f in truth for study in studies[:2]]
    for _ in range(25):
        loss = -student.PackedStudent(model)(student.pack(examples, model))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    out = questions.ask(model, chest, studies[:2], asked)
    assert all(max(answer[f], key=answer[f].get) == truth[f] for answer in out.values()
               for f in truth)


def test_questions_of_the_chest_task_offer_yes_and_no_and_of_others_their_classes(task):
    chest = questions.closed_questions(data.CHEST)
    assert len(chest) == 14
    assert chest["Pneumothorax"] == ("Does this chest X-ray show a pneumothorax?",
                                     {"yes": 1, "no": 0})
    text, options = questions.closed_questions(task)["Edema"]
    assert text == "Is the edema in this image absent, mild or severe?"
    assert options == {"absent": "absent", "mild": "mild", "severe": "severe"}


def test_options_of_which_one_begins_another_are_refused(chest):
    with pytest.raises(ValueError,
                       match="size: the tokens of option 'no' begin those of 'no change'"):
        questions.tokenise(chest, {"size": ("?", ["no", "no change"])})


def test_spellings_are_summed_once(chest):
    assert list(questions.spellings("yes")) == ["yes", "Yes", " yes", " Yes"]
    assert list(questions.spellings("3")) == ["3", " 3"]


# ------------------------------------------------------------------------------ long work, in parts

def work(log):
    def run(keys, examples):
        log.append(keys)
        return [len(example["text"]) for example in examples]
    return run


def encode(key):
    if key == "broken":
        raise ValueError("broken: no image")
    return {"text": key}


def test_work_goes_on_where_it_stopped(tmp_path):
    keys, log = ["a", "bb", "ccc", "dddd", "eeeee"], []
    stopping = work(log)

    def stops(some, examples):
        if "ccc" in some:
            raise KeyboardInterrupt
        return stopping(some, examples)

    with pytest.raises(KeyboardInterrupt):
        shared_map(keys, encode, stops, 2, tmp_path)
    assert log == [["a", "bb"]]
    part = tmp_path / "part-0.jsonl"
    part.write_bytes(part.read_bytes() + b'["ccc", 999')  # the kill came while a line was written
    found = shared_map(keys, encode, work(log), 2, tmp_path)
    assert found == {"a": 1, "bb": 2, "ccc": 3, "dddd": 4, "eeeee": 5}
    # nothing twice, and the batches stay what they were
    assert log == [["a", "bb"], ["ccc", "dddd"], ["eeeee"]]
    assert shared_map(keys, encode, work(log), 2, tmp_path)["ccc"] == 3 and len(log) == 3


def test_what_cannot_be_read_is_named_and_tried_again(tmp_path):
    failed = {}
    assert shared_map(["a", "broken"], encode, work([]), 2, tmp_path, failed=failed) == {"a": 1}
    assert failed == {"broken": "broken: no image"}
    with pytest.raises(ValueError, match="broken: no image"):
        shared_map(["broken"], encode, work([]))
    mended = shared_map(["a", "broken"], lambda key: {"text": key}, work([]), 2, tmp_path,
                        failed=(failed := {}))
    assert mended == {"a": 1, "broken": 6} and not failed
    assert json.loads((tmp_path / "part-0.jsonl").read_text().splitlines()[1]) == ["a", 1]


def test_questions_survive_a_stop_bit_for_bit(model, chest, studies, tmp_path):
    asked = {"Edema": questions.closed_questions(data.CHEST)["Edema"]}
    whole = questions.ask(model, chest, studies[:3], asked)
    questions.ask(model, chest, studies[:1], asked, tmp_path)
    # the first came from disk
    assert questions.ask(model, chest, studies[:3], asked, tmp_path) == whole
    assert len({answer["Edema"]["yes"] for answer in whole.values()}) == 3
