"""With Qwen2.5's own vocabulary: prompts, teachers' texts, options and end tokens.

The vocabulary comes with the package dashscope, of which no code runs. All but its weights is as in
the published Qwen2.5-VL.
"""

import base64
import importlib.util
from pathlib import Path

import pytest
import torch
from chat_server import ServersProcessor
from PIL import Image
from test_real import appendix_b, needs_paper
from transformers import AddedToken, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen2_vl

import data
import student
from evaluation import questions
from evaluation.datasets import PROGRESSION

DASHSCOPE = importlib.util.find_spec("dashscope")
pytestmark = pytest.mark.skipif(
    DASHSCOPE is None, reason="dashscope, which has Qwen's vocabulary, is not installed")

# ids 151643 to 151664, as in the published tokenizer_config.json
SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
         "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"]
# what that file gives the tokenizer: a template for text alone
TEXT_ONLY = "{% for m in messages %}{{ m['role'] + '\n' + m['content'] }}{% endfor %}"


class Ranks(TikTokenConverter):
    """Reads a .tiktoken file, a line 'base64 rank' for each token, without the package tiktoken."""

    @staticmethod
    def load_tiktoken_bpe(file):
        lines = (line.split() for line in Path(file).read_bytes().splitlines())
        return {base64.b64decode(token): int(rank) for token, rank in lines}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A folder with Qwen2.5-VL's tokenizer, its text-only template and its image processor."""
    folder = tmp_path_factory.mktemp("qwen")
    ranks = Path(DASHSCOPE.submodule_search_locations[0]) / "resources" / "qwen.tiktoken"
    vocabulary, merges = Ranks().extract_vocab_merges_from_model(ranks)
    vocabulary |= {token: 151643 + i for i, token in enumerate([*SPECIAL, *ADDED])}
    tokenizer = Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>", pad_token=SPECIAL[0],
                               extra_special_tokens=SPECIAL, chat_template=TEXT_ONLY)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ADDED])
    tokenizer.save_pretrained(folder)
    qwen2_vl.Qwen2VLImageProcessorPil().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chest(qwen):
    return student.Processor(qwen, data.CHEST)


@pytest.fixture(scope="module")
def server(chest, tmp_path_factory):
    """A server of a student that was trained from that folder."""
    folder = tmp_path_factory.mktemp("student")
    student.save_processor(chest, folder)
    return ServersProcessor.from_pretrained(folder)


def test_the_ids_are_the_published_ones(chest):
    tokenizer = chest.tokenizer
    assert len(tokenizer) == 151_665
    assert tokenizer.convert_tokens_to_ids([*SPECIAL, *ADDED]) == list(range(151_643, 151_665))
    # the start of every chat of Qwen2.5
    chat = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    assert tokenizer(chat)["input_ids"] == [
        151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198, 151644, 872, 198]


def test_both_end_tokens_of_its_generation_config_end_a_text(chest):
    assert chest.ends == [151645, 151643] and chest.pad == 151643
    assert chest.response("No edema.").tolist()[-1] == 151645
    words = chest.tokens("No edema.")
    assert chest.text([*words, 151643]) == chest.text([*words, 151645]) == "No edema."


@pytest.mark.parametrize("sizes", [[(1000, 600)], [(112, 140), (300, 1200)]])
@pytest.mark.parametrize("system", ["", "You are a helpful assistant.", "Sei kurz.\n"])
def test_a_server_builds_our_prompt_token_for_token(chest, server, monkeypatch, system, sizes):
    monkeypatch.setitem(chest.task.prompts, "system", system)
    films = [Image.new("RGB", size) for size in sizes]
    grid = chest.image_processor(images=films, return_tensors="pt")["image_grid_thw"]
    texts = ("1. Edema;\n\n2. no\u00a0sign", "\u5fc3\u5f71\u589e\u5927\u3002\n", "  ```\n{}\n```")
    readers = dict(zip("abc", texts))
    compare = data.compare_prompt(data.Study("s", (), {}, readers), data.CHEST, 0)
    for text in (data.CHEST.prompts["student"], compare, "\n\n led by blanks", "12,345.6 "):
        content = [*({"type": "image"} for _ in films), {"type": "text", "text": text}]
        chat = [{"role": "system", "content": system}] if system else []
        theirs = server.encode([*chat, {"role": "user", "content": content}], films)
        assert torch.equal(theirs["image_grid_thw"], grid)
        assert theirs["input_ids"][0].tolist() == chest.prefix(text, grid).tolist()


@needs_paper
def test_the_papers_texts_come_back_from_their_tokens(chest, server):
    texts = list(appendix_b().values())
    for text in texts:
        response = chest.response(text)
        assert chest.text(response) == text and 80 < len(response) < len(text) / 2
    study = data.Study("s", (), {}, dict(zip("abcdefg", texts)))
    prompt = data.compare_prompt(study, data.CHEST, 0)
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    system = {"role": "system", "content": data.CHEST.prompts["system"]}
    chat = [system, {"role": "user", "content": content}]
    theirs = server.encode(chat, [Image.new("RGB", (56, 56))])
    ours = chest.prefix(prompt, theirs["image_grid_thw"])
    assert theirs["input_ids"][0].tolist() == ours.tolist()


@pytest.mark.parametrize("task, most", [(data.CHEST, 1), (PROGRESSION, 3)])
def test_the_options_of_closed_questions_are_few_tokens_that_do_not_begin_each_other(
        chest, task, most):
    asked = questions.tokenise(chest, questions.closed_questions(task))
    for _, tokens in asked.values():
        assert {len(ids) for _, ids in tokens} <= set(range(1, most + 1))
        assert len({ids for _, ids in tokens}) == len(tokens)


def test_an_answers_first_token_is_one_of_its_spellings(chest):
    """What a student writes after the prompt must be among what is scored."""
    _, tokens = questions.tokenise(chest, questions.closed_questions(data.CHEST))["Edema"]
    for option in ("yes", "no"):
        first = {ids[0] for of, ids in tokens if of == option}
        for text in (option, f"{option.title()}.", f"{option.title()}, there is", f" {option}\n"):
            assert chest.tokens(text)[0] in first
