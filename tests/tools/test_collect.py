"""Asking the teachers.

Nothing is lost, nothing asked twice, nothing spent beyond the budget, and the key is nowhere.
"""

import errno
import json
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter

import chat_server
import pytest
from chat_server import completion, serve
from conftest import ROOT
from PIL import Image

import data
from evaluation import teachers
from tools import collect

KEY = "sk-Very/Secret+Key.0123456789"
N = 100
FINDINGS = data.CHEST.findings


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A folder with N films, told apart by their width, and studies.jsonl."""
    folder = tmp_path_factory.mktemp("films")
    with open(folder / "studies.jsonl", "w") as file:
        for i in range(N):
            Image.new("L", (40 + i, 40), i).save(folder / f"{i}.png")
            labels = {FINDINGS[i % 3]: 1, FINDINGS[3 + i % 2]: i % 2, FINDINGS[6]: -1}
            record = {
                "id": f"s{i}", "image": f"{i}.png", "labels": labels,
                "split": "train" if i % 10 else "test", "extra": [i]}
            file.write(json.dumps(record) + "\n")
    return folder


def which(chat, body):
    """The study that a request is about."""
    return chat.images(body)[0].width - 40


def good(chat, body, nth):
    return completion(
        f"{body['model']} on {which(chat, body)}: edema", model=f"{body['model']}-2026")


@pytest.fixture
def start(films, tmp_path, monkeypatch):
    """A function that runs the command: start({"teacher": (chat, fields)}, *flags).

    It returns (exit status, rows of the answers, records of the merged file).
    """
    monkeypatch.setenv("A_TEST_KEY", KEY)
    # a second of backoff is a hundredth here
    monkeypatch.setattr(
        collect.endpoints.random.Random, "uniform",
        lambda self, low, high: 0.01 * (low + (high - low) * self.random()))

    def run(teachers, *flags, studies=films / "studies.jsonl"):
        write_endpoints(tmp_path, teachers)
        status = collect.run(
            collect.parse(list(map(str, flags_of(tmp_path, films, studies) + list(flags)))))
        return status, rows(tmp_path), read(tmp_path / "out.jsonl")
    return run


def write_endpoints(folder, teachers):
    spec = {
        name: {
            "url": chat.url, "model": f"model-{name}", "key_env": "A_TEST_KEY", "timeout": 10,
            **fields}
        for name, (chat, fields) in teachers.items()}
    (folder / "endpoints.json").write_text(json.dumps(spec))


def flags_of(folder, films, studies=None):
    return [
        studies or films / "studies.jsonl", "--endpoints", folder / "endpoints.json", "--images",
        films, "--out", folder / "out.jsonl"]


def read(path):
    if not path.exists():
        return None
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def rows(folder):
    return read(folder / "out.jsonl.answers.jsonl")


def by_status(rows, status="answered"):
    return Counter((row["id"], row["teacher"]) for row in rows if row["status"] == status)


PRICE = {
    "usd_per_million_tokens": {"in": 100, "out": 1000}, "request": {"max_tokens": 20},
    "image_tokens": 100}

# ---------------------------------------------------------------------------------- the whole thing

FAULTS = [
    (429, b"", {"Retry-After": "0"}), (429, b"slow"), (500, b""), (503, b"<html>"), (529, b"{}"),
    (408, b""), (200, b"{"), (200, {"choices": []}), chat_server.never_answers,
    chat_server.cuts_its_json, chat_server.cuts_its_json_without_a_length,
    chat_server.cuts_its_header, chat_server.hangs_up, chat_server.resets,
    chat_server.talks_no_http, lambda handler: handler.send(500, str(handler.headers).encode())]


def faulty(chat, body, nth):
    """One request in ten goes wrong, each fault in its turn.

    The first good answers wait until all 64 are in flight.
    """
    with chat.lock:
        luck = random.Random(f"{body['model']} {which(chat, body)} {nth}").random()
        if luck < 0.1:
            chat.faults = getattr(chat, "faults", 0) + 1
            return FAULTS[chat.faults % len(FAULTS)]
    end = time.monotonic() + 1.5
    while chat.most_in_flight < 64 and time.monotonic() < end:
        time.sleep(0.01)
    return good(chat, body, nth)


def test_64_in_flight_and_a_tenth_faults_lose_nothing_and_double_nothing(
        start, films, tmp_path, capfd):
    names = ["gpt-5", "grok-4"]
    with serve(faulty) as chat:
        status, rows, merged = start(
            {name: (chat, {"concurrency": 32, "timeout": 2}) for name in names})
        assert status == 0
        assert chat.most_in_flight >= 64
        assert chat.faults > len(FAULTS)
        assert len(chat.asked) == 2 * N + chat.faults
        assert by_status(rows) == {(f"s{i}", name): 1 for i in range(N) for name in names}
        assert not by_status(rows, "failed")
        for row in rows:
            if row["status"] == "answered":
                assert row["text"] == f"model-{row['teacher']} on {row['id'][1:]}: edema"
                assert row["model"] == f"model-{row['teacher']}-2026"
                assert row["finish_reason"] == "stop" and row["usage"]["total_tokens"] == 110
        asked = len(chat.asked)
        content = (tmp_path / "out.jsonl").read_bytes()
        status, again, merged = start({name: (chat, {}) for name in names})
        assert status == 0
        assert len(chat.asked) == asked
        assert again == rows
        assert (tmp_path / "out.jsonl").read_bytes() == content
    before = read(films / "studies.jsonl")
    assert merged == [
        {**record, "trajectories": {name: f"model-{name} on {i}: edema" for name in names}}
        for i, record in enumerate(before)]
    assert data.teacher_names(data.read_studies(tmp_path / "out.jsonl", data.CHEST)) == names
    out, err = capfd.readouterr()
    for content in [out, err, *(path.read_text() for path in tmp_path.iterdir())]:
        assert KEY not in content and KEY[3:] not in content


def test_a_teacher_is_asked_appendix_b_with_the_film_and_nothing_else(start, films):
    with serve(good) as chat:
        start(
            {"a": (chat, {"request": {"max_completion_tokens": 9, "temperature": 0.5}})}, "--limit",
            3, "--max_pixels", 500)
    for body in chat.asked:
        image, = chat.images(body)
        i = round(image.width ** 2 * 40 / 500) - 40  # width / height stays
        assert image.format == "JPEG"
        assert 0.9 * 500 < image.width * image.height <= 500
        assert abs(image.width / image.height - (40 + i) / 40) < 0.1
        assert set(body) == {"model", "messages", "max_completion_tokens", "temperature"}
        assert body["model"] == "model-a"
        (message,) = body["messages"]
        assert message["role"] == "user"
        assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    studies = data.read_studies(films / "studies.jsonl", data.CHEST)[:3]
    assert sorted(body["messages"][0]["content"][1]["text"] for body in chat.asked) == sorted(
        data.student_prompt(study, data.CHEST, "teacher") for study in studies)
    assert "has been diagnosed with Cardiomegaly and Enlarged Cardiomediastinum." in json.dumps(
        chat.asked)
    # no id leaves the machine
    assert not any(f'"s{i}"' in json.dumps(chat.asked) for i in range(3))


def test_two_films_are_sent_in_their_order_and_another_task_brings_its_prompt(
        start, films, tmp_path):
    task = {
        "name": "t", "findings": {"Edema": ["edema"]}, "positive": ["yes"],
        "classes": {"no": ["no {finding}"], "yes": ["{finding}"]},
        "prompts": {"student": "s", "teacher": "why {diseases}?", "compare": "{readers}"}}
    (tmp_path / "task.json").write_text(json.dumps(task))
    (tmp_path / "pair.jsonl").write_text(
        json.dumps({"id": "p", "image": ["7.png", "3.png"], "labels": {"Edema": "yes"}}) + "\n")
    with serve(good) as chat:
        status, _, merged = start(
            {"a": (chat, {})}, "--task_file", tmp_path / "task.json",
            studies=tmp_path / "pair.jsonl")
    assert status == 0 and [image.width for image in chat.images(chat.asked[0])] == [47, 43]
    assert chat.asked[0]["messages"][0]["content"][-1]["text"] == "why Edema?"
    assert merged[0]["trajectories"] == {"a": "model-a on 7: edema"}


# ------------------------------------------------------------------------------- who is asked again

def test_an_empty_or_cut_answer_is_kept_but_not_used_and_not_asked_again(start):
    def answer(chat, body, nth):
        faults = [
            completion("cut", "length"), completion(" \n"),
            completion("filtered", "content_filter"), completion("why", None)]
        return (faults + [good(chat, body, nth)])[which(chat, body)]

    with serve(answer) as chat:
        status, rows, merged = start({"a": (chat, {})}, "--limit", 5)
        assert status == 0 and len(chat.asked) == 5
        reasons = {row["id"]: row["reason"] for row in rows if row["status"] == "refused"}
        assert reasons == {
            "s0": "finish_reason is 'length'", "s1": "empty",
            "s2": "finish_reason is 'content_filter'", "s3": "finish_reason is ''"}
        assert next(row for row in rows if row["id"] == "s0")["text"] == "cut"
        said = [record.get("trajectories") for record in merged[:6]]
        assert said == [None] * 4 + [{"a": "model-a on 4: edema"}, None]
        start({"a": (chat, {})}, "--limit", 5)
        assert len(chat.asked) == 5
        chat.answer = good
        status, rows, merged = start({"a": (chat, {})}, "--limit", 5, "--ask_refused_again")
        assert status == 0
        assert len(chat.asked) == 9
        assert all("a" in record["trajectories"] for record in merged[:5])
        start({"a": (chat, {})}, "--limit", 5, "--ask_refused_again")
        assert len(chat.asked) == 9


def test_thinking_is_not_the_answer_and_nothing_of_it_is_lost(start):
    contents = ["<think>Is it edema? No.</think>\n\nPneumonia. ", " Edema.\n", "<think>Edema.",
                "Reasoning\n</think> <answer>No edema.</answer>"]
    finishes = ["stop", "stop", "stop", "length"]

    def answer(chat, body, nth):
        return completion(contents[which(chat, body)], finishes[which(chat, body)])

    with serve(answer) as chat:
        status, rows, merged = start({"a": (chat, {})}, "--limit", 4)
        start({"a": (chat, {})}, "--limit", 4)
    assert status == 0 and len(chat.asked) == 4
    by_id = {row["id"]: row for row in rows}
    assert [by_id[f"s{i}"]["text"] for i in range(4)] == [
        "Pneumonia.", contents[1], "", "No edema."]
    # only what differs from the text is kept beside it
    assert [by_id[f"s{i}"].get("content") for i in range(4)] == [contents[0], None, *contents[2:]]
    assert [by_id[f"s{i}"].get("reason") for i in range(4)] == [
        None, None, "only thinking", "finish_reason is 'length'"]
    assert [by_id[f"s{i}"]["status"] for i in range(4)] == ["answered"] * 2 + ["refused"] * 2
    assert [record.get("trajectories") for record in merged[:4]] == [
        {"a": "Pneumonia."}, {"a": contents[1]}, None, None]


def test_a_refused_request_is_not_repeated_but_the_next_call_asks_again(start):
    refused = (400, {"error": "this film is too dark"})

    def answer(chat, body, nth):
        return refused if which(chat, body) == 1 and nth == 0 else good(chat, body, nth)

    with serve(answer) as chat:
        status, rows, merged = start({"a": (chat, {})}, "--limit", 3)
        assert status == 1 and len(chat.asked) == 3 and "trajectories" not in merged[1]
        assert [row["reason"] for row in rows if row["status"] == "failed"] == [
            "HTTP 400: this film is too dark"]
        status, rows, merged = start({"a": (chat, {})}, "--limit", 3)
        assert status == 0 and len(chat.asked) == 4 and len(by_status(rows)) == 3


def test_what_a_record_holds_already_is_not_asked_and_studies_may_be_completed_in_place(
        start, films, tmp_path):
    records = read(films / "studies.jsonl")[:4]
    records[1]["trajectories"] = {"b": "from elsewhere"}
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with serve(good) as chat:
        status, _, merged = start({"a": (chat, {}), "b": (chat, {})}, studies=path)
        assert status == 0
        assert len(chat.asked) == 7
        assert merged[1]["trajectories"] == {"b": "from elsewhere", "a": "model-a on 1: edema"}
        assert start({"a": (chat, {}), "b": (chat, {})}, studies=path)[2] == merged
        assert len(chat.asked) == 7


def test_split_limit_and_teachers_say_who_is_asked_about_what(start):
    with serve(good) as chat:
        _, rows, merged = start(
            {"a": (chat, {}), "b": (chat, {})}, "--split", "test", "--limit", 4, "--teachers", "b")
    assert by_status(rows) == {(f"s{i}", "b"): 1 for i in (0, 10, 20, 30)} and len(merged) == N


def test_attempts_bound_how_often_a_request_is_made(start):
    with serve(lambda *_: (500, b"")) as chat:
        status, rows, _ = start({"a": (chat, {})}, "--limit", 2, "--attempts", 3)
    assert status == 1
    assert len(chat.asked) == 6
    assert [row["status"] for row in rows] == ["failed"] * 2


@pytest.mark.parametrize(
    "answer, says",
    [
        ((401, {"error": "wrong key"}), "HTTP 401: wrong key"),
        (
            (429, {"error": {"message": "pay", "code": "insufficient_quota"}}),
            "quota or balance is spent"),
        ((400, {"error": "unknown field 'effort'"}), "10 requests in a row failed")])
def test_a_teacher_of_no_use_is_left_alone_and_the_others_go_on(start, answer, says, capsys):
    with serve(good) as chat, serve(lambda *_: answer) as broken:
        status, rows, merged = start({"a": (chat, {}), "b": (broken, {"concurrency": 2})})
    out = capsys.readouterr().out
    assert status == 1 and len(broken.asked) <= 12 and len(by_status(rows)) == N
    assert f"b: 0 answered, 0 refused (empty or cut), {N} open" in out and says in out
    assert all(set(record["trajectories"]) == {"a"} for record in merged)


# ----------------------------------------------------------------------------------- pace and money

def test_requests_per_minute_and_retry_after_hold_for_all_threads_of_a_teacher(start):
    with serve(good) as chat:
        start({"a": (chat, {"requests_per_minute": 1200, "concurrency": 16})}, "--limit", 20)
    assert chat.times[-1] - chat.times[0] >= 19 * 0.05 - 0.03

    def busy_once(chat, body, nth):
        if len(chat.asked) == 8:
            return 429, b"", {"Retry-After": "1"}
        return good(chat, body, nth)

    with serve(busy_once) as chat:
        start({"a": (chat, {"requests_per_minute": 6000, "concurrency": 4})}, "--limit", 30)
    gaps = [later - earlier for earlier, later in zip(chat.times, chat.times[1:])]
    # those whose turn had come are let through
    assert sum(gap > 0.9 for gap in gaps) == 1 and gaps.index(max(gaps)) < 8 + 4


@pytest.mark.parametrize("faults", [False, True])
def test_the_budget_is_never_exceeded_whatever_is_in_flight(start, tmp_path, faults):
    """A request costs 0.01 + 0.01 USD and at most 0.01 + 0.02.

    A film turns out to cost twice the tokens that were estimated.
    """
    billed = []

    def answer(chat, body, nth):
        time.sleep(0.02)
        if faults and which(chat, body) % 5 == 4 and nth == 0:
            billed.append(0.04)  # made, billed, and lost on its way
            return chat_server.cuts_its_json
        billed.append((200 * 100 + 10 * 1000) / 1e6)
        return completion("edema", usage=(200, 10))

    with serve(answer) as chat:
        status, rows, _ = start(
            {name: (chat, {**PRICE, "concurrency": 16}) for name in "ab"}, "--budget", 1)
        assert status == 1
        assert 0.94 <= sum(billed) <= 1
        assert abs(sum(row["cost"] for row in rows) - sum(billed)) < 1e-9
        # the budget is over all calls
        assert start({name: (chat, PRICE) for name in "ab"}, "--budget", 1)[1] == rows
        assert bool(by_status(rows, "lost")) == faults
        status, rows, _ = start({name: (chat, PRICE) for name in "ab"}, "--budget", 20)
        assert status == 0 and len(by_status(rows)) == 2 * N


def test_a_budget_needs_prices_and_a_bound(start):
    with serve(good) as chat:
        for missing in PRICE.keys() - {"image_tokens"}:
            with pytest.raises(ValueError, match="--budget: expected"):
                start(
                    {"a": (chat, {key: value for key, value in PRICE.items() if key != missing})},
                    "--budget", 1)
    assert not chat.asked


def test_without_usage_the_cost_is_what_it_can_have_been_at_most(start):
    with serve(lambda *_: completion("edema", usage=None)) as chat:
        _, rows, _ = start({"a": (chat, PRICE)}, "--limit", 1)
    prompt = chat.asked[0]["messages"][0]["content"][1]["text"]
    assert rows[0]["usage"] is None
    assert rows[0]["cost"] == ((-(-len(prompt) // 3) + 100) * 100 + 20 * 1000) / 1e6


# ----------------------------------------------------------------------- killed, torn, full, shared

class launch:
    """The command in a process of its own, forked so that nothing is imported again.

    Its output goes to a file.
    """

    def __init__(self, tmp_path, films, *flags):
        self.log = tmp_path / "log"
        self.pid = os.fork()
        if self.pid == 0:
            status = 99
            try:
                os.dup2(os.open(self.log, os.O_WRONLY | os.O_CREAT, 0o644), 1)
                os.dup2(1, 2)
                sys.stdout, sys.stderr = (
                    open(file, "w", buffering=1, closefd=False) for file in (1, 2))
                status = collect.run(
                    collect.parse(list(map(str, [*flags_of(tmp_path, films), *flags]))))
            except KeyboardInterrupt:
                status = 98
            finally:
                sys.stdout.flush()
                os._exit(status)

    def wait(self):
        status = os.waitpid(self.pid, 0)[1]
        return os.waitstatus_to_exitcode(status), self.log.read_text()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_after_kill_9_nothing_that_was_answered_is_asked_again(start, films, tmp_path):
    def slow(chat, body, nth):
        time.sleep(random.Random(which(chat, body)).random() * 0.05)
        return good(chat, body, nth)

    with serve(slow) as chat:
        write_endpoints(tmp_path, {"a": (chat, {"concurrency": 8})})
        process = launch(tmp_path, films)
        wait_for(lambda: len(chat.asked) >= 40)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        path = tmp_path / "out.jsonl.answers.jsonl"
        there = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        assert 20 <= len(there) < N and not (tmp_path / "out.jsonl").exists()
        with open(path, "ab") as file:
            # as a full disk or a power cut leaves it
            file.write(b'{"id": "s99", "teacher": "a", "status": "answered", "text": "\xe2\x80')
        asked = len(chat.asked)
        status, rows, merged = start({"a": (chat, {})})
        assert status == 0
        assert rows[:len(there)] == there
        assert len(chat.asked) - asked == N - len(there)
        assert set(by_status(rows).values()) == {1}
        assert len(by_status(rows)) == N and all(record["trajectories"] for record in merged)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_requests_in_flight_end_and_the_same_command_goes_on(
        start, films, tmp_path, number):
    gate = threading.Event()

    def held(chat, body, nth):
        if len(chat.asked) > 20:
            gate.wait(30)
        return good(chat, body, nth)

    with serve(held) as chat:
        write_endpoints(tmp_path, {"a": (chat, {"concurrency": 8, "timeout": 60})})
        process = launch(tmp_path, films, "--json")
        wait_for(lambda: chat.in_flight == 8 and len(chat.asked) > 20)
        os.kill(process.pid, number)
        wait_for(lambda: "finishing 8 requests in flight" in process.log.read_text())
        gate.set()
        status, out = process.wait()
        assert status == 128 + number
        there = rows(tmp_path)
        assert len(there) == len(by_status(there)) == len(chat.asked) and len(there) < N
        assert json.loads(out.splitlines()[-1])["teachers"]["a"]["answered"] == len(there)
        assert sum(
            "trajectories" in record for record in read(tmp_path / "out.jsonl")) == len(there)
        status, final, _ = start({"a": (chat, {})})
        assert status == 0 and len(chat.asked) == N == len(by_status(final))


def test_a_second_signal_ends_at_once(start, films, tmp_path):
    gate = threading.Event()
    with serve(lambda *_: (gate.wait(180), (500, b""))[1]) as chat:
        write_endpoints(tmp_path, {"a": (chat, {"timeout": 180})})
        process = launch(tmp_path, films)
        wait_for(lambda: chat.in_flight == 4)
        os.kill(process.pid, signal.SIGINT)
        wait_for(lambda: "once more to end at once" in process.log.read_text())
        os.kill(process.pid, signal.SIGINT)
        begin = time.monotonic()
        assert process.wait()[0] == 98 and time.monotonic() - begin < 5
        gate.set()
    assert rows(tmp_path) == []


@pytest.mark.parametrize(
    "end, kept",
    [
        (b'{"id": "s0", "teacher": "a", "status": "answered", "text": "x"}', True),
        (b'{"id": "s0", "teacher": "a", "status": "answ', False), (b"\x00\x00", False)])
def test_a_torn_last_line_is_repaired(start, tmp_path, end, kept):
    path = tmp_path / "out.jsonl.answers.jsonl"
    path.write_bytes(b'{"id": "s1", "teacher": "a", "status": "answered", "text": "y"}\n' + end)
    with serve(good) as chat:
        status, rows, _ = start({"a": (chat, {})}, "--limit", 2)
    assert status == 0
    assert len(chat.asked) == (0 if kept else 1)
    assert [row["id"] for row in rows] == ["s1", "s0"]


@pytest.mark.parametrize(
    "line", [b"[]", b"{", b'{"id": "s1"}', b'{"id": "s1", "teacher": "a", "status": "answered"}'])
def test_a_broken_line_elsewhere_is_named(start, tmp_path, line):
    (tmp_path / "out.jsonl.answers.jsonl").write_bytes(b"\n" + line + b"\n")
    with serve(good) as chat, pytest.raises(ValueError, match="answers.jsonl:2: "):
        start({"a": (chat, {})})
    assert not chat.asked


def test_a_full_disk_leaves_whole_lines_and_ends_the_run(start, tmp_path, monkeypatch):
    write, budget = os.write, [3000]

    def full(file, content):
        if budget[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(file, content[:budget[0]])
        budget[0] -= written
        return written

    with serve(good) as chat:
        with monkeypatch.context() as patch:
            patch.setattr(collect.os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                start({"a": (chat, {"concurrency": 8})})
        content = (tmp_path / "out.jsonl.answers.jsonl").read_bytes()
        assert 2000 < len(content) <= 3000
        assert content.endswith(b"\n")
        assert not (tmp_path / "out.jsonl").exists()
        there, asked = len(rows(tmp_path)), len(chat.asked)
        assert asked <= there + 16  # it ended
        status, final, _ = start({"a": (chat, {})})
    assert status == 0 and len(by_status(final)) == N and len(chat.asked) == asked + N - there


def test_a_second_run_on_the_same_output_is_refused(start, films, tmp_path):
    gate = threading.Event()
    with serve(lambda chat, body, nth: (gate.wait(30), good(chat, body, nth))[1]) as chat:
        write_endpoints(tmp_path, {"a": (chat, {})})
        first = launch(tmp_path, films, "--limit", 4)
        wait_for(lambda: chat.in_flight == 4)
        with pytest.raises(ValueError, match="another run writes it"):
            start({"a": (chat, {})})
        gate.set()
        assert first.wait()[0] == 0
    assert len(rows(tmp_path)) == 4


def test_a_file_of_somebody_else_is_not_replaced(start, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")
    with serve(good) as chat, pytest.raises(ValueError, match="was not written by this command"):
        start({"a": (chat, {})})
    assert (tmp_path / "out.jsonl").read_text() == "mine" and not chat.asked


# ------------------------------------------------------------------------- before anything is asked

def test_a_dry_run_prints_a_request_and_what_it_would_cost_and_asks_nobody(
        films, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", KEY)
    with serve(good) as chat:
        # no key is read
        write_endpoints(tmp_path, {"a": (chat, PRICE), "b": (chat, {"key_env": KEY[3:7]})})
        flags = [*flags_of(tmp_path, films), "--dry_run", "--json", "--limit", 10]
        assert collect.run(collect.parse(list(map(str, flags)))) == 0
    out = capsys.readouterr().out
    assert not chat.asked and sorted(path.name for path in tmp_path.iterdir()) == ["endpoints.json"]
    assert f"a: POST {chat.url}/chat/completions" in out
    assert "data:image/jpeg;base64,/9j/" in out
    assert max(map(len, out.splitlines())) < 400
    assert "has been diagnosed with" in out
    assert KEY not in out
    assert KEY[3:7] not in out
    assert "A_TEST_KEY" not in out
    sums = json.loads(out.splitlines()[-1])["teachers"]
    assert sums["a"]["requests"] == 10
    assert sums["a"]["tokens_out"] == 200
    assert 10 * 130 < sums["a"]["tokens_in"] < 10 * 190
    assert sums["a"]["usd"] == pytest.approx((sums["a"]["tokens_in"] * 100 + 200 * 1000) / 1e6)
    assert sums["b"]["tokens_out"] is None is sums["b"]["usd"]


def documented():
    """The endpoints.json of docs/data.md."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    text = text.split("## Ask the teachers", 1)[1].split("\n## ", 1)[0]
    return json.loads(text[text.index('    {"gpt-5"'):].split("\n\n", 1)[0])


def test_a_dry_run_needs_no_permission_and_says_which_hosts_would_get_images(
        films, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: 1 / 0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    # nor is a name server asked
    monkeypatch.setattr(collect.endpoints, "is_loopback", lambda host: host == "localhost")
    (tmp_path / "endpoints.json").write_text(json.dumps(documented()))
    flags = list(map(str, [*flags_of(tmp_path, films), "--split", "train", "--limit", 5]))
    assert collect.run(collect.parse([*flags, "--dry_run"])) == 0
    out = capsys.readouterr().out
    assert ("images would go to api.openai.com (not this machine: needs --i_have_permission), "
            "localhost (this machine)\n") in out
    with pytest.raises(ValueError, match="api.openai.com is not this machine"):
        collect.run(collect.parse(flags))
    for study in (records := read(films / "studies.jsonl")):
        study["trajectories"] = dict.fromkeys(documented(), "said before")
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert collect.run(collect.parse([str(tmp_path / "asked.jsonl"), *flags[1:], "--dry_run"])) == 0
    assert "images would go to nobody\n" in capsys.readouterr().out


def test_the_documentation_has_table_2s_seven_teachers_under_names_that_the_tables_know():
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    text = text.split("## Ask the teachers", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE) == list(teachers.OF_THE_PAPER)
    assert len(teachers.OF_THE_PAPER) == 7


def test_images_stay_on_this_machine_without_permission(films, tmp_path, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", KEY)
    asked = []
    monkeypatch.setattr(
        socket.socket, "connect", lambda self, address: asked.append(address) or 1 / 0)
    spec = {"url": "https://192.0.2.1/v1", "model": "m", "key_env": "A_TEST_KEY"}
    (tmp_path / "endpoints.json").write_text(json.dumps({"gpt-5": spec}))
    with pytest.raises(
            ValueError,
            match="endpoints.json: gpt-5: 192.0.2.1 is not this machine, .* --i_have_permission"):
        collect.run(collect.parse(list(map(str, flags_of(tmp_path, films)))))
    with pytest.raises(ZeroDivisionError):
        collect.run(
            collect.parse(list(map(str, [*flags_of(tmp_path, films), "--i_have_permission"]))))
    assert asked and {address[0] for address in asked} == {"192.0.2.1"}


def test_missing_images_are_named_before_anything_is_asked_and_broken_ones_do_not_stop_the_rest(
        start, films, tmp_path):
    lines = [
        {"id": "whole", "image": "5.png"}, {"id": "broken", "image": "broken.png"},
        {"id": "also whole", "image": "6.png"}]
    (films / "broken.png").write_bytes((films / "5.png").read_bytes()[:60])
    path = tmp_path / "studies.jsonl"
    with serve(good) as chat:
        missing = {"id": "x", "image": "nowhere.png"}
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, missing]))
        with pytest.raises(ValueError, match="1 images are missing, the first is nowhere.png"):
            start({"a": (chat, {})}, studies=path)
        path.write_text(json.dumps({"id": "x", "image": f"{films.name}/5.png"}) + "\n")
        with pytest.raises(
                ValueError,
                match=rf"5.png \(--images ends in {films.name}/ and the path begins with it\)"):
            start({"a": (chat, {})}, studies=path)
        assert not chat.asked
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        status, rows, merged = start({"a": (chat, {})}, studies=path)
    assert status == 1
    assert len(chat.asked) == 2
    assert set(by_status(rows)) == {("whole", "a"), ("also whole", "a")}
    assert "broken.png" in next(row["reason"] for row in rows if row["status"] == "failed")


def test_a_fault_in_the_input_is_one_line_and_not_a_traceback(films, tmp_path, script):
    (tmp_path / "endpoints.json").write_text(
        json.dumps({"a": {"url": "http://localhost", "model": "m", "api_key": KEY}}))
    out = script("tools/collect.py", *flags_of(tmp_path, films), expect=1).stdout
    assert "endpoints.json: a: a key has no place in this file" in out
    assert "Traceback" not in out
    assert KEY not in out
