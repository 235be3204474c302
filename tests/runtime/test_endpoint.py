"""The client: what every kind of answer, fault and server counts as, and that the key and the
images go where they may."""

import base64
import email.utils
import io
import json
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback

import chat_server
import pytest
from chat_server import completion, serve
from PIL import Image

from runtime import endpoint
from runtime.endpoint import Endpoint, Failure

KEY = "sk-Very/Secret+Key.0123456789"
MESSAGES = [{"role": "user", "content": "why?"}]


def ask(answer, key=KEY, timeout=5, **fields):
    with serve(lambda *_: answer) as chat:
        return endpoint.complete(Endpoint(chat.url, "m", key, timeout=timeout), MESSAGES, **fields)


def failure(answer, **more):
    with pytest.raises(Failure) as caught:
        ask(answer, **more)
    assert KEY not in "".join(traceback.format_exception(caught.value))
    assert KEY not in repr(caught.value)
    return caught.value


# -------------------------------------------------------------------------------- what is an answer

def test_a_completion_is_an_answer_with_what_the_server_says_of_it():
    answer = ask(completion("edema", usage=(7, 3)))
    assert (answer.text, answer.finish, answer.model) == ("edema", "stop", "served-model")
    assert endpoint.count(answer.usage) == (7, 3)
    assert answer.usage == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}


def test_the_request_holds_model_messages_and_the_fields_and_the_key_in_its_header():
    seen = []

    def answer(chat, body, nth):
        seen.append(body)
        return listen

    def listen(handler):
        seen.append((handler.path, dict(handler.headers)))
        handler.send(200, completion("x"))

    with serve(answer) as chat:
        fields = {"top_p": 0.5, "reasoning_effort": "low"}
        server = Endpoint(chat.url + "/", "m", KEY, fields)
        endpoint.complete(server, MESSAGES, top_p=0.9, seed=3)
    body, (path, headers) = seen
    assert body == {
        "model": "m", "messages": MESSAGES, "top_p": 0.9, "reasoning_effort": "low", "seed": 3}
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("usage, tokens", [
    # hidden reasoning counts where only the total shows it
    ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 40}, (10, 30)),
    ({"prompt_tokens": 10, "completion_tokens": 5}, (10, 5)), ({"prompt_tokens": 10}, None),
    ({"prompt_tokens": -1, "completion_tokens": 5}, None),
    ({"prompt_tokens": "10", "completion_tokens": 5}, None), ("many", None), (None, None),
])
def test_tokens_are_counted_as_billed_or_not_at_all(usage, tokens):
    assert endpoint.count(ask({**completion("x", usage=None), "usage": usage}).usage) == tokens


@pytest.mark.parametrize("message, text", [
    ({"content": None, "refusal": "I cannot help."}, "I cannot help."), ({"content": None}, ""),
    ({"content": ""}, ""), ({}, ""),
    ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
    ({"content": " ünï\u2028x "}, " ünï\u2028x "),
])
def test_the_text_is_found_where_servers_put_it(message, text):
    assert ask({"choices": [{"message": message, "finish_reason": "stop"}]}).text == text


@pytest.mark.parametrize("finish, known", [
    ("length", "length"), ("content_filter", "content_filter"), ("STOP", "stop"), (None, "")])
def test_every_finish_reason_is_handed_on(finish, known):
    assert ask(completion("x", finish)).finish == known


# ---------------------------------------------------------------------------------- what is a fault

QUOTA = "You exceeded your current quota"
error = lambda message, **more: {"error": {"message": message, **more}}
of_gemini = lambda quota: [error(QUOTA, status="RESOURCE_EXHAUSTED", details=[
    {"violations": [{"quotaId": quota}]}, {"retryDelay": "20s"}])]


@pytest.mark.parametrize("answer, kind, lost", [
    ((400, error("bad field")), "never", False), ((403, error("not this content")), "never", False),
    ((422, error("x")), "never", False),
    ((413, b"<html>"), "never", False),
    ((401, error("wrong key")), "stop", False), ((404, error("no such model")), "stop", False),
    ((402, error("pay")), "stop", False),
    ((408, b""), "again", False), ((429, error("slow down")), "again", False),
    ((500, b"<html>oops"), "again", False),
    ((502, b""), "again", False), ((503, error("loading")), "again", False),
    ((504, b""), "again", False), ((529, error("busy")), "again", False),
    ((301, b"", {"Location": "http://127.0.0.1:9/"}), "stop", False), ((307, b""), "stop", False),
    # the vendors' words for a spent balance
    ((429, error(QUOTA, type="insufficient_quota", code="credit_balance_exhausted")),
     "stop", False),
    ((429, error(QUOTA, type="exceeded_current_quota_error")), "stop", False),
    ((429, error("x", details={"error_code": "enforced_spend_limit_reached"})), "stop", False),
    ((429, error("余额不足", code="1113")), "stop", False),
    ((429, error("used all available credits or reached its monthly spending limit")),
     "stop", False),
    ((400, error("Your credit balance is too low")), "stop", False),
    ((429, of_gemini("GenerateRequestsPerDayPerProjectPerModel")), "stop", False),
    # Gemini says the same of its limit per minute
    ((429, of_gemini("GenerateRequestsPerMinutePerProjectPerModel")), "again", False),
    # an answer may have been made, and billed
    ((200, b""), "again", True), ((200, b"<html>hello"), "again", True),
    ((200, b"[]"), "again", True), ((200, b"{}"), "again", True),
    ((200, {"choices": []}), "again", True),
    ((200, {"choices": [{"message": None}]}), "again", True),
    ((200, {"choices": [[]]}), "again", True),
    ((200, {"choices": [{"message": {"content": 5}}]}), "again", True),
    ((200, {"choices": [{"message": {"content": [5]}}]}), "again", True),
    ((200, b'{"choices": [{"message": {"content": "\xff"}}]}'), "again", True),
    ((200, b'{"choices": [{"message": {"content": "\\ud800"}}]}'), "again", True),
    ((200, b'{"choices": [{"message": {"content": NaN}}]}'), "again", True),
    ((200, b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "again", True),
    ((200, b'{"a": ' + b"1" * 5000 + b"}"), "again", True),
    (chat_server.cuts_its_json, "again", True),
    (chat_server.cuts_its_json_without_a_length, "again", True),
    (chat_server.cuts_its_header, "again", True), (chat_server.hangs_up, "again", True),
    (chat_server.resets, "again", True),
    (chat_server.talks_no_http, "again", True),
    # errors inside a 200
    ((200, {"error": {"code": 429, "message": "slow"}}), "again", False),
    ((200, {"error": {"code": 400, "message": "bad"}}), "never", False),
    ((200, {"error": "internal"}), "again", False),
])
def test_every_fault_has_its_kind(answer, kind, lost):
    caught = failure(answer)
    assert (caught.kind, caught.lost) == (kind, lost), str(caught)


def test_an_answer_beyond_the_bound_is_named_and_one_within_it_is_taken():
    text = "\u80ba" * (endpoint.MAX_ANSWER_BYTES // 6 - 100)  # six bytes each where it is spelled
    assert ask((200, completion(text))).text == text
    error = failure((200, completion(text + "a" * 700)))
    assert (error.kind, error.lost) == ("again", True)
    assert str(error) == "HTTP 200 with a body beyond 2 MiB"


@pytest.mark.parametrize("slow", [
    chat_server.never_answers, chat_server.drips_its_body, chat_server.drips_its_header])
def test_the_time_limit_is_for_the_whole_exchange(slow):
    start = time.monotonic()
    caught = failure(slow, timeout=0.5)
    assert (caught.kind, caught.lost, str(caught)) == ("again", True, "no answer within 0.5 s")
    assert time.monotonic() - start < 2


def test_a_server_that_is_not_there_is_asked_again_and_bills_nothing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Failure) as caught:
            _, port = free.getsockname()
            endpoint.complete(Endpoint(f"http://127.0.0.1:{port}", "m"), MESSAGES)
    assert (caught.value.kind, caught.value.lost) == ("again", False)


def test_a_certificate_that_does_not_verify_stops_and_nothing_is_sent(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self_signed(tmp_path))

        def accept():
            try:
                context.wrap_socket(listener.accept()[0], server_side=True).recv(10)
            except OSError:
                pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        with pytest.raises(Failure) as caught:
            _, port = listener.getsockname()
            endpoint.complete(Endpoint(f"https://127.0.0.1:{port}/v1", "m", KEY), MESSAGES)
        thread.join()
    assert caught.value.kind == "stop" and "certificate" in str(caught.value)


def self_signed(folder):
    """A certificate and key in one PEM file, of nobody's authority."""
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the test's certificate")
    key, certificate, both = (folder / name for name in ("k.pem", "c.pem", "both.pem"))
    subprocess.run([
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
        "-nodes", "-subj", "/CN=localhost", "-days", "2", "-keyout", key, "-out", certificate],
        check=True, capture_output=True)
    both.write_bytes(key.read_bytes() + certificate.read_bytes())
    return both


# ------------------------------------------------------------------------------------- asking again

@pytest.mark.parametrize("headers, content, wait", [
    ({"Retry-After": "7"}, b"", 7), ({"Retry-After": "0.25"}, b"", 0.25),
    ({"Retry-After": "-3"}, b"", 0), ({"Retry-After": "soon"}, b"", None),
    ({"Retry-After": "nan"}, b"", None), ({"Retry-After": ""}, b"", None), ({}, b"", None),
    ({}, error("x", details=[{"retryDelay": "34.5s"}]), 34.5),
])
def test_the_servers_wish_to_wait_is_read(headers, content, wait):
    assert failure((429, content, headers)).wait == wait


def test_retry_after_may_be_a_date_and_a_day_is_too_long():
    date = email.utils.formatdate(time.time() + 100, usegmt=True)
    assert failure((503, b"", {"Retry-After": date})).wait == pytest.approx(100, abs=3)
    assert failure((429, b"", {"Retry-After": "86400"})).kind == "stop"


def test_what_may_pass_is_asked_again_by_a_seeded_backoff():
    def waits(seed, status=500, headers=()):
        seen = []
        with serve(lambda *_: (status, b"", headers)) as chat, pytest.raises(Failure):
            endpoint.ask(Endpoint(chat.url, "m"), MESSAGES, seed, attempts=5,
                         before=lambda failure, wait: seen.append(wait))
        assert len(chat.asked) == (5 if status in (429, 500) else 1)
        return seen

    first = waits("a")
    assert first[0] == 0
    assert all(0.5 * 2 ** n <= wait <= 1.5 * 2 ** n for n, wait in enumerate(first[1:]))
    assert waits("a") == first != waits("b")
    assert waits("a", 429, {"Retry-After": "3"}) == [0, 3, 3, 3, 3]
    assert waits("a", 400) == waits("a", 401) == [0]


def test_the_answer_after_faults_is_the_answer():
    faults = [(500, b""), chat_server.cuts_its_json, (429, b"", {"Retry-After": "0"})]
    with serve(lambda chat, body, nth: faults[nth] if nth < 3 else completion("at last")) as chat:
        told = []
        answer = endpoint.ask(
            Endpoint(chat.url, "m"), MESSAGES, 0,
            before=lambda failure, wait: told.append(failure and str(failure)))
    assert answer.text == "at last"
    assert told == [None, "HTTP 500", "HTTP 200 with cut or broken JSON", "HTTP 429"]


# ------------------------------------------------------------------------------------------ the key

@pytest.mark.parametrize("echo", [
    lambda key: (400, error(f"your header was Authorization: Bearer {key}!")),
    lambda key: (401, {"detail": key}),
    lambda key: (500, {"message": key}),
    lambda key: (429, [{"error": {"message": "x" * 290 + key}}]), lambda key: (400, {"error": key}),
    lambda key: (400, {key: key}),
    lambda key: (400, json.dumps(error(key.lower())).replace("/", "\\/").encode()),
    lambda key: (503, key.encode()),
    lambda key: (302, b"", {"Location": f"http://127.0.0.1:9/{key}"}),
    lambda key: (200, {"error": {"code": 400, "message": key}}),
    lambda key: (429, b"", {"Retry-After": key}), lambda key: chat_server.talks_no_http,
    lambda key: lambda handler: handler.wfile.write(
        f"HTTP/1.1 400 {key}\r\n{key}: {key}\r\n\r\n{key}".encode()),
    lambda key: lambda handler: handler.wfile.write(f"HTTP/1.1 {key}\r\n\r\n".encode()),
    lambda key: lambda handler: handler.send(200, b"x", {"Content-Encoding": key}, length=key),
], ids=range(15))
def test_no_message_repeats_a_key_that_the_server_echoes(echo):
    caught = failure(echo(KEY))
    for end in range(8, len(KEY)):  # nor a part of it
        assert KEY[:end] not in str(caught) and KEY[-end:] not in str(caught)
    assert KEY.lower() not in str(caught).lower()


def test_an_answer_is_cleaned_of_the_key():
    answer = ask({**completion(f"my key is {KEY}, really", model=KEY), "usage": {KEY: 1}})
    assert answer.text == "my key is [key], really"
    assert KEY not in repr(answer)
    assert KEY not in repr(Endpoint("http://localhost/v1", "m", KEY))


@pytest.mark.parametrize("value", [
    None, "", "short", "has a blank in it", "line\nbreak-in-it", "qu\"ote-in-it",
    "back\\slash-in-it", "ümlaut-in-it"])
def test_a_key_that_cannot_be_one_is_refused_without_being_shown(value, monkeypatch):
    monkeypatch.delenv("A_TEST_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("A_TEST_KEY", value)
    with pytest.raises(ValueError, match="the key: ") as caught:
        endpoint.read_key("A_TEST_KEY")
    assert not value or value not in str(caught.value)
    with pytest.raises(ValueError) as caught:
        endpoint.read_key(KEY)  # the key where its name should be
    assert KEY not in str(caught.value)


# ------------------------------------------------------------------------------ where images may go

@pytest.mark.parametrize("host, ours", [
    ("localhost", True), ("127.0.0.1", True), ("127.8.9.10", True), ("::1", True),
    ("::ffff:127.0.0.1", True), ("192.0.2.1", False), ("10.0.0.1", False), ("0.0.0.0", False),
    ("2001:db8::1", False), ("::ffff:192.0.2.1", False), ("nowhere.invalid", False),
    ("127.0.0.1.nowhere.invalid", False)])
def test_loopback_is_what_the_name_resolves_to(host, ours):
    assert endpoint.is_loopback(host) == ours


@pytest.mark.parametrize("url", [
    "http://192.0.2.1:8000/v1", "https://api.example.invalid/v1",
    "http://localhost@192.0.2.1/v1", "http://localhost.example.invalid"])
def test_another_machine_needs_permission(url):
    with pytest.raises(ValueError, match="i_have_permission|no user"):
        Endpoint(url, "m")


def test_a_key_does_not_travel_unencrypted():
    with pytest.raises(ValueError, match="unencrypted"):
        Endpoint("http://192.0.2.1/v1", "m", KEY, only_loopback=False)
    Endpoint("http://192.0.2.1/v1", "m", only_loopback=False)


@pytest.mark.parametrize("url", [
    "", "localhost:8000", "ftp://localhost", "http://", "http://[::1", "http://localhost:99999",
    f"http://localhost/v1?key={KEY}", f"http://{KEY}@localhost/v1", "http://local host/",
    "http://localhost/v1#x", "file:///etc/passwd"])
def test_a_url_that_is_none_or_holds_a_key_is_refused_without_being_shown(url):
    with pytest.raises(ValueError, match="the URL: expected") as caught:
        Endpoint(url, "m")
    assert not url or url not in str(caught.value)


def own_address():
    """An address of this machine that is not loopback, or None."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address = probe.getsockname()[0]
    return None if endpoint.is_loopback(address) else address


def test_a_name_that_resolves_elsewhere_between_check_and_connection_gets_nothing(monkeypatch):
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address but loopback")
    with serve(lambda *_: completion("x"), host=address) as chat:
        server = Endpoint(f"http://localhost:{chat.server_address[1]}", "m")
        resolve = socket.getaddrinfo

        def elsewhere(host, *rest, **more):
            return resolve(address if host == "localhost" else host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", elsewhere)
        with pytest.raises(Failure, match="nothing was sent"):
            endpoint.complete(server, MESSAGES)
    assert not chat.asked


def test_neither_redirects_nor_proxies_are_followed(monkeypatch):
    with serve(lambda *_: completion("stolen")) as elsewhere:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url)
        for status in (301, 302, 303, 307, 308):
            redirect = status, b"", {"Location": f"{elsewhere.url}/chat/completions"}
            assert failure(redirect).kind == "stop"
        assert ask(completion("mine")).text == "mine"
    assert not elsewhere.asked


def test_only_pixels_are_sent():
    film, buffer = Image.new("RGB", (40, 30), (9, 99, 199)), io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "Jane Doe"
    film.save(buffer, "JPEG", comment=b"Jane Doe", exif=exif)
    film = Image.open(io.BytesIO(buffer.getvalue()))
    assert b"Jane Doe" in buffer.getvalue() and film.info
    for kind in ("JPEG", "PNG"):
        url = endpoint.image_part(film, kind)["image_url"]["url"]
        head, content = url.split(",", 1)
        content = base64.b64decode(content)
        assert head == f"data:image/{kind.lower()};base64" and b"Jane" not in content
        pixel = Image.open(io.BytesIO(content)).convert("RGB").getpixel((20, 15))
        assert pixel == pytest.approx((9, 99, 199), abs=4)
    assert film.info  # the caller's image is as it was


# ------------------------------------------------------------------------------ the endpoints' file

GOOD = {"url": "http://localhost:9/v1", "model": "m"}


def written(tmp_path, content):
    path = tmp_path / "endpoints.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_entry_is_read_with_its_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", KEY)
    more = {**GOOD, "key_env": "A_TEST_KEY", "request": {"max_tokens": 5}, "timeout": 7}
    path = written(tmp_path, {"a": GOOD, "b": more})
    assert endpoint.read_endpoints(path) == {
        "a": (Endpoint(GOOD["url"], "m"), GOOD),
        "b": (Endpoint(GOOD["url"], "m", KEY, {"max_tokens": 5}, 7), more)}
    assert list(endpoint.read_endpoints(path)) == ["a", "b"]
    assert list(endpoint.read_endpoints(path, "b")) == ["b"]
    monkeypatch.delenv("A_TEST_KEY")
    server, _ = endpoint.read_endpoints(path, with_keys=False)["b"]
    assert server.key is None


@pytest.mark.parametrize("entry", [
    {"key": KEY}, {"api_key": KEY}, {"api-key": "x"}, {"Authorization": "x"}, {"token": "x"},
    {"request": {"apikey": "x"}}, {"request": {"extra": [{"secret": "x"}]}},
    {"request": {"user": KEY}}, {"headers": {}}, {"model": "Bearer abc"}, {"key_env": KEY},
    {"key_env": "A_TEST_KEY", "request": {"user": "hidden-key-of-no-known-form"}}])
def test_a_key_in_the_file_is_refused_and_not_shown(tmp_path, entry, monkeypatch):
    monkeypatch.setenv("A_TEST_KEY", "hidden-key-of-no-known-form")
    with pytest.raises(ValueError, match="endpoints.json: a: .*(has no place|key)") as caught:
        endpoint.read_endpoints(written(tmp_path, {"a": {**GOOD, **entry}}))
    assert KEY not in str(caught.value) and "hidden-key" not in str(caught.value)


@pytest.mark.parametrize("content, says", [
    ("{", "not a JSON file"), ("[]", "expected an object"), ({}, "expected an object"),
    ({"a": 5}, "expected an object"),
    ({"a": {"url": "http://localhost"}}, '"model"'),
    ({"a": {"model": "m"}}, '"url"'), ({"a": {**GOOD, "url": "localhost"}}, "the URL"),
    ({"a": {**GOOD, "model": " "}}, '"model"'),
    ({"a": {**GOOD, "key_env": 5}}, '"key_env"'),
    ({"a": {**GOOD, "key_env": "NOT_SET_ANYWHERE"}}, "the key: "),
    ({"a": {**GOOD, "rpm": 5}}, "unknown field"),
    *(({"a": {**GOOD, key: value}}, f'"{key}": expected') for key, value in [
        ("request", []), ("request", {"stream": True}), ("request", {"n": 2}),
        ("request", {"model": "x"}), ("request", {"messages": []}),
        ("request", {"max_tokens": "many"}), ("requests_per_minute", 0),
        ("requests_per_minute", "x"), ("concurrency", 0), ("concurrency", 2.5),
        ("concurrency", True), ("timeout", -1), ("timeout", True), ("usd_per_million_tokens", 5),
        ("usd_per_million_tokens", {"in": 1}),
        ("usd_per_million_tokens", {"in": 1, "out": -1}), ("image_tokens", 0)]),
    ({"a": {**GOOD, "url": "https://192.0.2.1/v1"}}, "--i_have_permission"),
])
def test_a_fault_in_the_file_names_file_teacher_and_expectation(tmp_path, content, says):
    with pytest.raises(ValueError) as caught:
        endpoint.read_endpoints(written(tmp_path, content))
    assert "endpoints.json: " in str(caught.value) and says in str(caught.value)


def test_an_unknown_teacher_is_named(tmp_path):
    with pytest.raises(ValueError, match="--teachers c: expected some of a"):
        endpoint.read_endpoints(written(tmp_path, {"a": GOOD}), "a,c")
