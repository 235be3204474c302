"""A real vLLM serves the student: greedy positives, log-probs and LoRA are those of our own.

    VLLM_PYTHON=path/to/python python -m pytest -s tests/test_vllm.py

The python is that of an environment of its own, in which vLLM for CPUs is installed (docs/data.md,
"Let a server sample"). vLLM's attention for CPUs has no heads below 32, and those of the scale
model's base have 24: it is padded, which changes nothing but rounding. -s shows the figures.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import time
import urllib.request

import pytest
import torch
import torch.nn.functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

import data
import sampling
import selfdistill
import student
from scale_model import base as scale_base

VLLM_PYTHON = os.environ.get("VLLM_PYTHON")
needs_vllm = pytest.mark.skipif(
    not VLLM_PYTHON, reason="VLLM_PYTHON is not set to the python of an environment with vLLM")
HEAD = 32  # size of a head after padding
START_SECONDS = 400  # most of a start is imports
CONTEXT = 2048  # tokens of a prompt with its answer, and of the prompts that a step computes
FILES = ("positives.jsonl", "dropped.jsonl", "stats.json", "finished.json")


# ------------------------------------------------------------------ the student, padded

def pad_heads(weight, dim, head):
    """Zeros behind both halves of each head, since RoPE turns pairs of one unit from each half.

    weight  with heads * head units along `dim`
    Returns it with heads * HEAD units.
    """
    halves = weight.movedim(dim, -1).unflatten(-1, (-1, head // 2))
    return F.pad(halves, (0, (HEAD - head) // 2)).flatten(-2).movedim(-1, dim)


def pad_tensor(name, weight, shape, head):
    """A tensor of the student with zeros behind, scaled so that all other values stay.

    shape  that it has in the padded student
    head   size of a head before
    """
    layer = name.split(".")[-2]
    if layer in ("q_proj", "k_proj", "v_proj"):
        weight = pad_heads(weight, 0, head)
    if layer == "o_proj":
        weight = pad_heads(weight, 1, head)
    if layer == "q_proj":  # attention divides its scores by the root of a head's size
        weight = weight * math.sqrt(HEAD / head)
    if "language_model" in name and "norm" in layer:  # it divides by the root mean square
        weight = weight * math.sqrt(head / HEAD)
    behind = [n for old, new in zip(weight.shape, shape) for n in (new - old, 0)]
    return F.pad(weight, behind[::-1])


def pad_student(model):
    """A student whose heads have HEAD units, with the logits of `model`.

    The rows of zeros keep the added units at 0. The rotary frequencies of the others are base **
    (-2 i / head), so the base grows where the head does.
    """
    config, text = model.config, model.config.text_config
    head = text.hidden_size // text.num_attention_heads
    text.hidden_size = config.vision_config.out_hidden_size = HEAD * text.num_attention_heads
    text.rms_norm_eps *= head / HEAD
    text.rope_parameters["rope_theta"] **= HEAD / head
    text.rope_parameters["mrope_section"][2] += (HEAD - head) // 2
    padded = Qwen2_5_VLForConditionalGeneration(config)
    shapes = {name: weight.shape for name, weight in padded.state_dict().items()}
    padded.load_state_dict({name: pad_tensor(name, weight, shapes[name], head)
                            for name, weight in model.state_dict().items()})
    return padded.eval()


@torch.no_grad()
def logits(model, example, response):
    """What predicts each token of a response (n,), (n, V)."""
    ids = torch.cat([example["prefix_ids"], response])[None]
    out = model(
        input_ids=ids, mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=example["pixel_values"], image_grid_thw=example["image_grid_thw"])
    return out.logits[0, -len(response) - 1:-1]


@pytest.fixture(scope="module")
def folders(world, task, tmp_path_factory):
    """{"small": the base, "pi_st": it padded, "adapter": LoRA on that, "merged": both in one}."""
    parent = tmp_path_factory.mktemp("students")
    folders = {name: parent / name for name in ("small", "pi_st", "adapter", "merged")}
    scale_base.write_student(folders["small"])
    processor = student.Processor(folders["small"], task, world)
    model = pad_student(student.load(folders["small"]))
    student.save_student(model, processor, folders["pi_st"], "card")
    model = student.load(folders["pi_st"])
    student.set_trainable(model, ["lora"])
    torch.manual_seed(0)
    for layer in student.lora_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.01)
    student.save_adapter(model, folders["adapter"], folders["pi_st"], ["lora"])
    student.merge_lora(model)
    student.save_student(model, processor, folders["merged"], "card")
    return folders


@pytest.fixture(scope="module")
def padded_processor(folders, task, world):
    return student.Processor(folders["pi_st"], task, world)


@pytest.fixture(scope="module")
def examples(padded_processor, task, studies):
    """Six studies with the prompt of stage 2 and two teachers' texts as responses."""
    return [padded_processor(study, data.compare_prompt(study, task, 0),
                             list(study.trajectories.values())[:2]) for study in studies[:6]]


def largest_difference(folders, one, other, examples):
    """Of two students' logits for the responses, as a part of the largest logit."""
    models = [student.load(folders[name]) for name in (one, other)]
    differences = [0.0]
    for example in examples:
        for response in example["responses"]:
            before, after = (logits(model, example, response) for model in models)
            differences.append(((after - before).abs().max() / before.abs().max()).item())
    return max(differences)


def test_the_padded_student_has_the_logits_of_the_small_one(folders, examples):
    difference = largest_difference(folders, "small", "pi_st", examples)
    print(f"padding: largest difference of a logit, as a part of the largest: {difference:.1e}")
    assert difference < 1e-5
    # and the adapter is another student
    assert largest_difference(folders, "pi_st", "merged", examples) > 0.01


# ------------------------------------------------------------------ the server

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folders, port, log):
    """The process of a server of pi_st and of the adapter; it writes all that it says to `log`."""
    command = [
        VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1",
        "--port", port, "--model", folders["pi_st"], "--served-model-name", "pi_st",
        "--enable-lora", "--lora-modules", f"adapter={folders['adapter']}",
        "--generation-config", "vllm", "--dtype", "float32", "--max-model-len", CONTEXT,
        "--max-num-batched-tokens", CONTEXT, "--no-enable-chunked-prefill",
        "--limit-mm-per-prompt", '{"image": 2}', "--enforce-eager"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
           "VLLM_NO_USAGE_STATS": "1", "VLLM_CACHE_ROOT": str(log.parent / "cache")}
    env.pop("PYTHONPATH", None)
    # in its own session, so that its children can be stopped with it, and in a folder whose
    # modules it cannot take for its own
    with open(log, "w") as out:
        return subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT,
                                cwd=log.parent, env=env, start_new_session=True)


def wait_until_healthy(process, url, log):
    """Fails with the last lines of the server's log where it ends, or does not begin in time."""
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"{url}/health", timeout=10):
                return
        time.sleep(0.5)
    ended = "is not ready" if process.poll() is None else f"ended with {process.returncode}"
    pytest.fail(f"vLLM {ended}, expected {url}/health to answer within {START_SECONDS} s; its last "
                f"lines:\n{last_lines(log)}", pytrace=False)


def last_lines(log):
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def stop(process):
    """Ends a server and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def url(folders, tmp_path_factory):
    """The address of a vLLM that serves pi_st and the adapter."""
    log, port = tmp_path_factory.mktemp("vllm") / "server.log", free_port()
    process = start(folders, port, log)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def test_a_server_that_does_not_start_shows_its_last_lines(tmp_path):
    log = tmp_path / "server.log"
    log.write_text("the reason\n")
    process = subprocess.Popen(["sh", "-c", "exit 3"], start_new_session=True)
    with pytest.raises(pytest.fail.Exception, match="(?s)vLLM ended with 3, .*the reason"):
        wait_until_healthy(process, f"http://127.0.0.1:{free_port()}", log)
    stop(process)


def test_a_server_is_stopped_with_its_children():
    """This one has a child that takes no notice of SIGTERM."""
    process = subprocess.Popen(["sh", "-c", "(trap '' TERM; echo up; sleep 60) & wait"],
                               stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline() == b"up\n"
    stop(process)
    process.communicate(timeout=10)  # raises as long as somebody can still write


# ------------------------------------------------------------------ what it gives

@pytest.fixture
def compare(world, tmp_path):
    """compare("there", *flags) runs stage 2 on the tiny world; it returns {file: bytes}."""
    def run(name, *flags):
        inputs = ["--preset", "demo", "--studies", world / "studies.jsonl", "--images", world,
                  "--task_file", world / "task.json", "--output_dir", tmp_path / name]
        selfdistill.run(selfdistill.parse([str(flag) for flag in [*inputs, *flags]]))
        return {file: (tmp_path / name / file).read_bytes() for file in FILES}
    return run


# the name that vLLM has for it -> the student that is loaded here
PAIRS = {"pi_st": "pi_st", "adapter": "merged"}


@needs_vllm
@pytest.mark.parametrize("served", PAIRS)
def test_greedy_positives_are_the_same_bytes(url, folders, compare, served):
    here = compare("here", "--student", folders[PAIRS[served]], "--temperature", 0, "--no-bf16")
    there = compare("there", "--student", folders[served], "--temperature", 0, "--server", url,
                    "--server_model", served)
    assert there == here
    assert here["positives.jsonl"].count(b"\n") == 24


@needs_vllm
def test_seeded_samples_of_more_prompts_than_a_step_takes(url, folders, compare):
    """Without --no-enable-chunked-prefill vLLM's engine for CPUs ends here."""
    there = compare("there", "--student", folders["pi_st"], "--server", url,
                    "--server_model", "pi_st", "--server_concurrency", 24)
    assert there["positives.jsonl"].count(b"\n") + there["dropped.jsonl"].count(b"\n") == 24


@pytest.fixture
def ask(url, task, world):
    """ask("adapter", study, **fields) is vLLM's first choice for the prompt of stage 2."""
    client = sampling.ServedStudent(
        server=None, path=None, task=task, images=world, max_pixels=1024 * 28 * 28, seed=0,
        temperature=0, top_p=1.0, max_new_tokens=96)

    def run(served, study, **fields):
        _, messages = client.encode(study)
        body = {"model": served, "messages": messages, "temperature": 0, "max_tokens": 96,
                "skip_special_tokens": False, **fields}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=100) as answer:
            return json.load(answer)["choices"][0]
    return run


@needs_vllm
@pytest.mark.parametrize("served", PAIRS)
def test_the_log_prob_of_every_token_is_the_same(
        ask, folders, padded_processor, examples, studies, served):
    model, difference = student.load(folders[PAIRS[served]]), 0.0
    for study, example in zip(studies, examples):
        choice = ask(served, study, logprobs=True, return_token_ids=True)
        (ids, _), = sampling.sample(model, padded_processor, [example], [0], 0.0, 1.0, 96)
        assert choice["token_ids"] == ids.tolist()
        theirs = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
        ours = -F.cross_entropy(logits(model, example, ids), ids, reduction="none")
        difference = max(difference, (theirs - ours).abs().max().item())
    print(f"{served}: largest difference of a token's log-prob: {difference:.1e}")
    assert difference < 1e-4


@needs_vllm
def test_either_end_token_ends_a_text(ask, padded_processor, studies):
    for end in padded_processor.ends:
        choice = ask("pi_st", studies[0], logit_bias={end: 100}, return_token_ids=True)
        assert choice["token_ids"] == [end] and choice["finish_reason"] == "stop"
        assert choice["message"]["content"] == ""
