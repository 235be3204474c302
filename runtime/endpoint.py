"""One question to an OpenAI-compatible chat endpoint: posted, and what comes back classified.

    server = Endpoint("http://localhost:8000/v1", "runs/spd/student")
    answer = complete(server, messages, temperature=1.0, seed=7)

Either there is an `Answer`, or a `Failure` that says whether to ask again. `ask` asks again where
that may help, after the seconds of Retry-After or else after a jittered backoff. tools/collect.py
asks the teachers through it, selfdistill.py --server the student.

Standard library only. The key comes from an environment variable and goes into the Authorization
header, nowhere else: what a server says is cleaned of it before anybody sees it, and no message
here quotes a header, an exception's text or a status line. Neither proxies nor redirects are
followed, so that an image goes to the host that was named.
"""

import base64
import email.utils
import functools
import http.client
import io
import ipaddress
import json
import math
import os
import random
import re
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from runtime.records import is_name, printable, read_json, too_deep

# Of any body. That is 349,525 letters even where each is spelled \uXXXX. A body of nothing but
# small values takes nearly 60 times as much memory when it is read.
MAX_ANSWER_BYTES = 2 << 20
MAX_WAIT = 3600  # seconds; an endpoint that asks for more has nothing to give today
# A spent balance or daily quota comes as 429 too, and asking again does not help. These are the
# vendors' words for it; Gemini's "exceeded your current quota" is not among them, since it says so
# of its limits per minute as well.
SPENT = re.compile(
    r"insufficient_quota|exceeded_current_quota|(usage|spend|spending)[ _]limit|credit[ _]balance"
    r"|available credits|insufficient[ _](balance|funds|credits?)|billing_(hard_limit|not_active)"
    r"|\"1113\"|arrear|per[ _]?day|limit: 0,", re.IGNORECASE)

A_KEY = re.compile(r"bearer |sk-|xai-|aiza|gsk_", re.IGNORECASE)
NAMES_A_KEY = re.compile(
    r"(x[-_])?(api[-_]?)?(key|token)|access[-_]token|authorization|secret|password|headers?",
    re.IGNORECASE)
NO_KEY_HERE = ('a key has no place in this file; "key_env" names the environment variable that '
               'holds it')


# ------------------------------------------------------------------------------ where to ask

@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    url            up to /chat/completions; without a path it gets /v1
    model          the name that the server has for it
    key            goes into the Authorization header; None: no such header
    fields         fields of every request
    timeout        seconds for the whole exchange
    only_loopback  whether the connection's other end must be this machine
    Raises ValueError for a URL that is none, for another machine where only this one is allowed,
    and for a key that would travel unencrypted to another machine.
    """
    url: str
    model: str = ""
    key: str = field(default=None, repr=False)
    fields: dict = field(default_factory=dict)
    timeout: float = 300.0
    only_loopback: bool = True

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            # reading the port raises for one that is none
            is_url = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            is_url = False
        # the URL is not quoted: what is wrong with it might be the key
        if not is_url or re.search(r"[^\x21-\x7e]|[@?#]", self.url):
            raise ValueError("the URL: expected http(s)://HOST[:PORT][/PATH] with no user, key or "
                             "query in it")
        if self.only_loopback and not is_loopback(parts.hostname):
            raise ValueError(f"{parts.hostname} is not this machine, and images are not sent to "
                             "others without --i_have_permission")
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError(f"{parts.hostname}: expected https, the key would travel unencrypted")
        path = parts.path.rstrip("/") or "/v1"
        # the dataclass is frozen, so its attribute cannot be set by name
        object.__setattr__(self, "url", f"{parts.scheme}://{parts.netloc}{path}")


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    text    the answer, '' where there is none
    model   as the server names it
    finish  'stop', 'length', ... as the server names it
    usage   as the server counts tokens; None where it does not
    """
    text: str
    model: str
    finish: str
    usage: dict


class Failure(Exception):
    """There is no answer.

    kind  'again': ask again; 'never': this request is refused; 'stop': the endpoint is of no use
          (wrong key, unknown model, quota spent)
    what  the message
    wait  seconds after which the server wants to be asked again; None where it does not say
    lost  whether an answer may have been made, and billed, that did not arrive
    """

    def __init__(self, kind, what, wait=None, lost=False):
        super().__init__(what)
        self.kind, self.wait, self.lost = kind, wait, lost


def read_key(name):
    """The key in environment variable `name`.

    Raises ValueError that holds neither name nor value, since somebody may give the key in place of
    the name.
    """
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("the key: expected the name of an environment variable that holds it")
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!#-\[\]-~]{8,}", key):
        raise ValueError("the key: the environment variable named for it is not set, or holds no "
                         "key of at least 8 printable characters; leave it out for a server that "
                         "wants none")
    return key


def is_loopback(host):
    """Whether every address of `host` is this machine's own: localhost, 127.0.0.0/8, ::1."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        # an IPv6 address may end in %SCOPE
        addresses = [ipaddress.ip_address(address.split("%")[0])
                     for _, _, _, _, (address, *_) in found]
    except (OSError, ValueError):
        return False
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback
               for address in addresses)


# --------------------------------------------------------------------------- endpoints.json

def is_number(value, least=1e-9):
    """Whether it is a number from `least` to 1e9, True and False not among them."""
    return type(value) in (int, float) and least <= value <= 1e9


def is_request(value):
    """Whether it is an object of fields that may go into every request."""
    limits = ("max_tokens", "max_completion_tokens")
    return (isinstance(value, dict) and not {"model", "messages", "stream", "n"} & set(value)
            and all(type(value.get(name, 1)) is int for name in limits))


def is_price(value):
    """Whether it is {"in": USD, "out": USD} with prices of 0 or more."""
    return (isinstance(value, dict) and set(value) == {"in", "out"}
            and all(is_number(price, 0) for price in value.values()))


# what an entry may hold: {field: (what is expected, whether a value is that)}
ENTRY_FIELDS = {
    "url": ("a string", lambda v: isinstance(v, str)),
    "model": ("a name", lambda v: isinstance(v, str) and v.strip()),
    "key_env": ("the name of an environment variable that holds the key",
                lambda v: isinstance(v, str)),
    "request": ("an object of fields without model, messages, stream and n; max_tokens and "
                "max_completion_tokens whole numbers", is_request),
    "timeout": ("seconds", is_number),
    "concurrency": ("a whole number from 1 to 256", lambda v: type(v) is int and 1 <= v <= 256),
    "requests_per_minute": ("a number above 0", is_number),
    "usd_per_million_tokens": ('{"in": USD, "out": USD}', is_price),
    "image_tokens": ("a whole number above 0", lambda v: type(v) is int and v > 0),
}


def read_endpoints(path, chosen=None, only_loopback=True, with_keys=True):
    """The teachers of an endpoints.json:

        {"gpt-5": {"url": "https://api.openai.com/v1", "model": "gpt-5-nano",
                   "key_env": "OPENAI_API_KEY",
                   "request": {"max_completion_tokens": 4096, "reasoning_effort": "low"},
                   "timeout": 300, "concurrency": 16, "requests_per_minute": 500,
                   "usd_per_million_tokens": {"in": 0.05, "out": 0.4}, "image_tokens": 1100}}

    All but url and model may be left out. key_env names the environment variable that holds the
    key; "request" goes into every request as it is; timeout is in seconds; image_tokens is what an
    image costs, for estimates.

    path           the file
    chosen         'NAME,...': only these teachers; None: all
    only_loopback  whether their servers must be on this machine
    with_keys      whether the environment variables that hold the keys are read
    Returns {teacher: (Endpoint, its entry)}. Raises ValueError naming the file, the teacher and
    what was expected, and never a value, since a key may be in the wrong place. A file that holds
    a key is refused.
    """
    entries = read_json(path)
    if not isinstance(entries, dict) or not entries or not all(
            is_name(name) and isinstance(entry, dict) for name, entry in entries.items()):
        raise ValueError(f'{path}: expected an object {{teacher: {{"url": ..., "model": ...}}}}')
    wanted = chosen.split(",") if chosen else list(entries)
    if unknown := [name for name in wanted if name not in entries]:
        raise ValueError(f"--teachers {','.join(unknown)}: expected some of {', '.join(entries)}")
    everything = json.dumps(entries, ensure_ascii=False)
    found = {}
    for name, entry in entries.items():
        try:
            _check_entry(entry)
            if name in wanted:
                key = read_key(entry["key_env"]) if with_keys and "key_env" in entry else None
                if key and key in everything:
                    raise ValueError(NO_KEY_HERE)
                server = Endpoint(entry["url"], entry["model"], key, entry.get("request", {}),
                                  entry.get("timeout", 300), only_loopback)
                found[name] = server, entry
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return found


def _check_entry(entry):
    """Raises ValueError for the first thing in which an entry is not as ENTRY_FIELDS has it."""
    if _holds_a_key(entry):
        raise ValueError(NO_KEY_HERE)
    if not set(entry) <= set(ENTRY_FIELDS):
        raise ValueError(f"an unknown field, expected some of {', '.join(ENTRY_FIELDS)}")
    for name in ("url", "model", *entry):
        expected, is_good = ENTRY_FIELDS[name]
        if name not in entry or not is_good(entry[name]):
            raise ValueError(f'"{name}": expected {expected}')


def _holds_a_key(value):
    """Whether a name or a text inside a JSON value looks like that of a key."""
    if isinstance(value, dict):
        return any(NAMES_A_KEY.fullmatch(name) or _holds_a_key(inner)
                   for name, inner in value.items())
    if isinstance(value, list):
        return any(map(_holds_a_key, value))
    return isinstance(value, str) and A_KEY.match(value) is not None


# ------------------------------------------------------------------------------ one exchange

@functools.cache
def _tls():
    """The settings of TLS, made once."""
    return ssl.create_default_context()


def _connection(parts, timeout):
    """A connection that is not open yet, to the host of a split URL; timeout in seconds."""
    host, port = parts.hostname, parts.port
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, port, timeout=timeout, context=_tls())
    return http.client.HTTPConnection(host, port, timeout=timeout)


class _Deadline:
    """Shuts a socket after some seconds; the socket's own timeout would begin anew with every byte
    that arrives."""

    def __init__(self):
        self.passed, self.timer = threading.Event(), None

    def start(self, seconds, sock):
        self.timer = threading.Timer(seconds, self._cut, [sock])
        self.timer.daemon = True
        self.timer.start()

    def cancel(self):
        if self.timer:
            self.timer.cancel()

    def _cut(self, sock):
        self.passed.set()
        try:
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass


def _exchange(endpoint, method, path, body=None):
    """One request on a connection of its own -> (status, headers, bytes). Raises Failure."""
    parts, timeout = urlsplit(endpoint.url), endpoint.timeout
    connection = _connection(parts, min(timeout, 30))
    headers = {"Content-Type": "application/json", "Accept": "application/json",
               "User-Agent": "apo", "Connection": "close"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    deadline, sent = _Deadline(), False
    try:
        connection.connect()
        address, *_ = connection.sock.getpeername()
        if endpoint.only_loopback and not is_loopback(address):
            raise Failure("stop", f"{parts.hostname} is not this machine any more; nothing was "
                          "sent")
        connection.sock.settimeout(timeout)
        deadline.start(timeout, connection.sock)
        connection.request(method, parts.path + path, body, headers)
        sent = True
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES + 1)
        if deadline.passed.is_set():
            raise TimeoutError
        return response.status, response.headers, content
    except ssl.SSLCertVerificationError:
        raise Failure("stop", f"{parts.hostname}: its certificate does not verify") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        slow = deadline.passed.is_set() or isinstance(error, TimeoutError)
        what = (f"no answer within {timeout:g} s" if slow and sent
                else f"connection failed: {type(error).__name__}")
        raise Failure("again", what, lost=sent) from None
    finally:
        deadline.cancel()
        connection.close()


def _parse(content, key):
    """The JSON value of a body, without the key in any of its strings. Raises ValueError for
    anything that is not JSON, NaN and lone surrogates included."""
    try:
        # float("x") raises ValueError: NaN is not JSON
        value = json.loads(content.decode("utf-8"), parse_constant=lambda name: float("x"))
        if too_deep(value):
            raise RecursionError
        text = json.dumps(value, ensure_ascii=False)
        text.encode("utf-8")
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if key:  # its characters are the same inside JSON, see read_key
        text = re.sub(re.escape(key), "[key]", text, flags=re.IGNORECASE)
    return json.loads(text)


def _wait(headers, text):
    """Seconds that the server asks to wait, or None: Retry-After, in seconds or as a date, or
    Gemini's retryDelay in its body."""
    in_body = re.search(r'"retryDelay": ?"([\d.]+)s"', text)
    value = headers.get("Retry-After") or (in_body.group(1) if in_body else "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _refusal(status, headers, reply):
    """The Failure that an HTTP status, or an error inside a 200, means.

    reply  the parsed body, or None
    """
    text = json.dumps(reply, ensure_ascii=False)
    what = f"HTTP {status}"
    if words := _words_of(reply):
        what += f": {printable(' '.join(str(words).split())[:300])}"
    if status == 402 or 400 <= status < 500 and SPENT.search(text):
        return Failure("stop", f"quota or balance is spent; {what}")
    if status in (401, 404):
        return Failure("stop", what)
    if status in (408, 429) or status >= 500:
        wait = _wait(headers, text)
        if wait is not None and wait > MAX_WAIT:
            return Failure("stop", f"asks to wait {wait:.0f} s; {what}")
        return Failure("again", what, wait)
    if 300 <= status < 400:
        return Failure("stop", f"HTTP {status}: redirects are not followed, expected the final URL")
    return Failure("never", what)


def _words_of(reply):
    """What an error's body says in words, wherever the vendors put it; None where it has none."""
    while isinstance(reply, list) and reply:  # Gemini wraps its errors
        reply = reply[0]
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    return error.get("message") or error.get("detail") if isinstance(error, dict) else error


def _call(endpoint, method, path, body=None):
    """The JSON object of a 200. Raises Failure."""
    status, headers, content = _exchange(endpoint, method, path, body)
    if status == 200 and len(content) > MAX_ANSWER_BYTES:
        raise Failure("again", f"HTTP 200 with a body beyond {MAX_ANSWER_BYTES >> 20} MiB",
                      lost=True)
    try:
        reply = _parse(content[:MAX_ANSWER_BYTES], endpoint.key)
    except ValueError:
        reply = None
    if status != 200:
        raise _refusal(status, headers, reply)
    if not isinstance(reply, dict):
        raise Failure("again", "HTTP 200 with cut or broken JSON", lost=True)
    if error := reply.get("error"):
        code = error.get("code") if isinstance(error, dict) else None
        raise _refusal(code if type(code) is int and code >= 400 else 500, headers, reply)
    return reply


# ---------------------------------------------------------------------------------- asking

def image_part(image, format="JPEG"):
    """A PIL image as a part of a message's content; only pixels, without comments and EXIF."""
    image, buffer = image.copy(), io.BytesIO()
    image.info = {}
    image.save(buffer, format, quality=95)
    content = base64.b64encode(buffer.getvalue()).decode()
    url = f"data:image/{format.lower()};base64,{content}"
    return {"type": "image_url", "image_url": {"url": url}}


def count(usage):
    """(tokens in, tokens out with hidden reasoning) of a usage; None if it does not tell."""
    known = lambda tokens: type(tokens) is int and 0 <= tokens < 1 << 53  # a float holds no more
    tokens_in, tokens_out, total = ((usage or {}).get(key) for key in (
        "prompt_tokens", "completion_tokens", "total_tokens"))
    if not (known(tokens_in) and known(tokens_out)):
        return None
    return tokens_in, max(tokens_out, total - tokens_in) if known(total) else tokens_out


def models(endpoint):
    """The names of the models that the server has. Raises Failure."""
    listed = _call(endpoint, "GET", "/models").get("data")
    if not isinstance(listed, list):
        return []
    return [model["id"] for model in listed
            if isinstance(model, dict) and isinstance(model.get("id"), str)]


def request(endpoint, messages, **fields):
    """The JSON object that `complete` posts.

    messages  the chat so far, as the API takes it: [{"role", "content"}]
    fields    of this request: temperature, seed, ...; they go before the endpoint's
    """
    return {"model": endpoint.model, "messages": messages, **endpoint.fields, **fields}


def complete(endpoint, messages, **fields):
    """Posts one chat completion.

    messages, fields  as `request` takes them
    Returns the Answer, whatever its text and finish are. Raises Failure.
    """
    body = json.dumps(request(endpoint, messages, **fields)).encode()
    reply = _call(endpoint, "POST", "/chat/completions", body)
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        # a teacher that declines has answered
        text = message.get("content") or message.get("refusal") or ""
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Failure("again", "HTTP 200 without a completion in it", lost=True) from None
    usage = reply.get("usage")
    return Answer(text, str(reply.get("model") or ""), str(finish or "").lower(),
                  usage if isinstance(usage, dict) else None)


def ask(endpoint, messages, jitter, attempts=6, before=lambda failure, wait: time.sleep(wait),
        **fields):
    """`complete`, asked again while that may help.

    messages, fields  as `request` takes them
    jitter    seeds the random part of the backoff
    attempts  requests at most
    before    called before each attempt as before(failure, wait), with the failure of the attempt
              before (None at first) and the seconds to wait; it does the waiting
    Returns the Answer. Raises the last Failure.
    """
    failure, wait = None, 0.0
    for attempt in range(attempts):
        before(failure, wait)
        try:
            return complete(endpoint, messages, **fields)
        except Failure as error:
            if error.kind != "again":
                raise
            failure, wait = error, error.wait
        if wait is None:
            wait = min(60, 2 ** attempt) * random.Random(f"{jitter} {attempt}").uniform(0.5, 1.5)
    raise failure
