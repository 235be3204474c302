"""One question to an OpenAI-compatible chat endpoint: posted, and what comes back classified.

    answer = complete(Endpoint("http://localhost:8000/v1", "runs/spd/student"), messages, temperature=1.0, seed=7)

Either there is an `Answer`, or a `Failure` that says whether to ask again. `ask` does so, by Retry-After or else by a jittered
backoff. tools/collect.py asks the teachers through it, selfdistill.py --server the student.

Standard library only. The key comes from an environment variable and goes into the Authorization header, nowhere else: what a
server says is cleaned of it before anybody sees it, and no message here quotes a header, an exception's text or a status line.
Neither proxies nor redirects are followed, so that an image goes to the host that was named.
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

from runtime.records import is_name, read_json, shown, too_deep

MAX_ANSWER_BYTES = 16 << 20
MAX_WAIT = 3600  # seconds; an endpoint that asks for more has nothing to give today
# a spent balance or daily quota comes as 429 too, and asking again does not help. The vendors' words for it; Gemini's "exceeded your
# current quota" is not among them, since it says so of its limits per minute as well
SPENT = re.compile(r"insufficient_quota|exceeded_current_quota|(usage|spend|spending)[ _]limit|credit[ _]balance|available credits"
                   r"|insufficient[ _](balance|funds|credits?)|billing_(hard_limit|not_active)|\"1113\"|arrear|per[ _]?day|limit: 0,", re.IGNORECASE)

A_KEY = re.compile(r"bearer |sk-|xai-|aiza|gsk_", re.IGNORECASE)
NAMES_A_KEY = re.compile(r"(x[-_])?(api[-_]?)?(key|token)|access[-_]token|authorization|secret|password|headers?", re.IGNORECASE)
NO_KEY_HERE = 'a key has no place in this file; "key_env" names the environment variable that holds it'


@dataclass(frozen=True)
class Endpoint:
    """Where to ask. Raises ValueError for a URL that is none, and for a key that would travel unencrypted to another machine."""
    url: str                                    # up to /chat/completions; without a path it gets /v1
    model: str = ""
    key: str = field(default=None, repr=False)
    fields: dict = field(default_factory=dict)  # into every request
    timeout: float = 300.0                      # seconds for the whole exchange
    only_loopback: bool = True                  # the connection's other end must be this machine

    def __post_init__(self):
        try:
            parts = urlsplit(self.url)
            whole = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
        except ValueError:
            whole = False
        if not whole or re.search(r"[^\x21-\x7e]|[@?#]", self.url):
            raise ValueError("the URL: expected http(s)://HOST[:PORT][/PATH] with no user, key or query in it")  # which might be the key
        if self.only_loopback and not is_loopback(parts.hostname):
            raise ValueError(f"{parts.hostname} is not this machine, and images are not sent to others without --i_have_permission")
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise ValueError(f"{parts.hostname}: expected https, the key would travel unencrypted")
        object.__setattr__(self, "url", f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}")  # frozen, so not by name


@dataclass(frozen=True)
class Answer:
    text: str
    model: str     # as the server names it
    finish: str    # 'stop', 'length', ... as the server names it
    usage: dict    # as the server counts, or None


class Failure(Exception):
    """No answer. kind: 'again' (ask again, after `wait` seconds if the server says so), 'never' (this request is refused), 'stop' (the
    endpoint is of no use: wrong key, unknown model, quota spent). lost: an answer may have been made, and billed, that did not arrive."""

    def __init__(self, kind, what, wait=None, lost=False):
        super().__init__(what)
        self.kind, self.wait, self.lost = kind, wait, lost


def read_key(name):
    """The key in environment variable `name`. Raises ValueError, without name or value: a key may stand in the wrong place."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("the key: expected the name of an environment variable that holds it")
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!#-\[\]-~]{8,}", key):
        raise ValueError("the key: the environment variable named for it is not set, or holds no key of at least 8 printable characters; "
                         "leave it out for a server that wants none")
    return key


def read_endpoints(path, chosen=None, only_loopback=True, with_keys=True):
    """The teachers of an endpoints.json, or those of `chosen` ('NAME,...') -> {teacher: (Endpoint, its entry)}. All but url and model
    may be left out:

        {"gpt-5": {"url": "https://api.openai.com/v1", "model": "gpt-5-nano", "key_env": "OPENAI_API_KEY",
                   "request": {"max_completion_tokens": 4096, "reasoning_effort": "low"}, "timeout": 300, "concurrency": 16,
                   "requests_per_minute": 500, "usd_per_million_tokens": {"in": 0.05, "out": 0.4}, "image_tokens": 1100}}

    key_env names the environment variable that holds the key; "request" goes into every request as it is; timeout is in seconds;
    image_tokens is what an image costs, for estimates. Raises ValueError naming the file, the teacher and what was expected, and never
    a value: a key may stand in the wrong place. A file that holds a key is refused."""
    specs = read_json(path)
    if not isinstance(specs, dict) or not specs or not all(is_name(name) and isinstance(spec, dict) for name, spec in specs.items()):
        raise ValueError(f'{path}: expected an object {{teacher: {{"url": ..., "model": ...}}}}')
    if unknown := [name for name in chosen.split(",") if name not in specs] if chosen else []:
        raise ValueError(f"--teachers {','.join(unknown)}: expected some of {', '.join(specs)}")

    number = lambda value, least=1e-9: type(value) in (int, float) and least <= value <= 1e9
    checks = {
        "url": ("a string", lambda v: isinstance(v, str)),
        "model": ("a name", lambda v: isinstance(v, str) and v.strip()),
        "key_env": ("the name of an environment variable that holds the key", lambda v: isinstance(v, str)),
        "request": ("an object of fields without model, messages, stream and n; max_tokens and max_completion_tokens whole numbers",
                    lambda v: isinstance(v, dict) and not {"model", "messages", "stream", "n"} & set(v)
                    and all(type(v.get(name, 1)) is int for name in ("max_tokens", "max_completion_tokens"))),
        "timeout": ("seconds", number),
        "concurrency": ("a whole number from 1 to 256", lambda v: type(v) is int and 1 <= v <= 256),
        "requests_per_minute": ("a number above 0", number),
        "usd_per_million_tokens": ('{"in": USD, "out": USD}', lambda v: isinstance(v, dict) and set(v) == {"in", "out"}
                                   and all(number(price, 0) for price in v.values())),
        "image_tokens": ("a whole number above 0", lambda v: type(v) is int and v > 0),
    }
    found = {}
    for name, spec in specs.items():
        try:
            if _holds_a_key(spec):
                raise ValueError(NO_KEY_HERE)
            if not set(spec) <= set(checks):
                raise ValueError(f"an unknown field, expected some of {', '.join(checks)}")
            for key in ("url", "model", *spec):
                what, good = checks[key]
                if key not in spec or not good(spec[key]):
                    raise ValueError(f'"{key}": expected {what}')
            if chosen and name not in chosen.split(","):
                continue
            secret = read_key(spec["key_env"]) if with_keys and "key_env" in spec else None
            if secret and secret in json.dumps(specs, ensure_ascii=False):
                raise ValueError(NO_KEY_HERE)
            found[name] = Endpoint(spec["url"], spec["model"], secret, spec.get("request", {}), spec.get("timeout", 300), only_loopback), spec
        except ValueError as error:
            raise ValueError(f"{path}: {name}: {error}") from None
    return found


def _holds_a_key(value):
    if isinstance(value, dict):
        return any(NAMES_A_KEY.fullmatch(name) or _holds_a_key(inner) for name, inner in value.items())
    if isinstance(value, list):
        return any(map(_holds_a_key, value))
    return isinstance(value, str) and A_KEY.match(value) is not None


def is_loopback(host):
    """True if every address of `host` is this machine's own: localhost, 127.0.0.0/8, ::1."""
    try:
        addresses = [ipaddress.ip_address(info[4][0].split("%")[0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, ValueError):
        return False
    return all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses)


def image_part(image, format="JPEG"):
    """A PIL image as a part of a message's content. The pixels only: comments and EXIF stay behind."""
    image, buffer = image.copy(), io.BytesIO()
    image.info = {}
    image.save(buffer, format, quality=95)
    url = f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


@functools.cache
def _tls():
    return ssl.create_default_context()


def _exchange(endpoint, method, path, body=None):
    """One request on a connection of its own -> (status, headers, bytes). Raises Failure."""
    parts = urlsplit(endpoint.url)
    timeout = endpoint.timeout
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=min(timeout, 30), context=_tls())
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=min(timeout, 30))
    headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "apo", "Connection": "close"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    late, sent = threading.Event(), False

    def cut(sock):  # a timeout of the socket would begin anew with every byte that drips in
        late.set()
        try:
            socket.socket.shutdown(sock, socket.SHUT_RDWR)
        except OSError:
            pass

    timer = None
    try:
        connection.connect()
        if endpoint.only_loopback and not is_loopback(connection.sock.getpeername()[0]):
            raise Failure("stop", f"{parts.hostname} is not this machine any more; nothing was sent")
        connection.sock.settimeout(timeout)
        timer = threading.Timer(timeout, cut, [connection.sock])
        timer.daemon = True
        timer.start()
        connection.request(method, parts.path + path, body, headers)
        sent = True
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES)
        if late.is_set():
            raise TimeoutError
        return response.status, response.headers, content
    except ssl.SSLCertVerificationError:
        raise Failure("stop", f"{parts.hostname}: its certificate does not verify") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        slow = late.is_set() or isinstance(error, TimeoutError)
        what = f"no answer within {timeout:g} s" if slow and sent else f"connection failed: {type(error).__name__}"
        raise Failure("again", what, lost=sent) from None
    finally:
        if timer:
            timer.cancel()
        connection.close()


def _parse(content, key):
    """A JSON value without the key in any of its strings; ValueError for anything else, lone surrogates included."""
    try:
        value = json.loads(content.decode("utf-8"), parse_constant=lambda name: float("x"))  # NaN is not JSON
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
    """Seconds that the server asks to wait: Retry-After in seconds or as a date, or Gemini's retryDelay; else None."""
    value = headers.get("Retry-After") or (re.search(r'"retryDelay": ?"([\d.]+)s"', text) or [None, ""])[1]
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _refusal(status, headers, reply):
    """The Failure that an HTTP status (or an error inside a 200) stands for. reply: the parsed body, or None."""
    text = json.dumps(reply, ensure_ascii=False)
    while isinstance(reply, list) and reply:  # Gemini wraps its errors
        reply = reply[0]
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    words = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    what = f"HTTP {status}" + (f": {shown(' '.join(str(words).split())[:300])}" if words else "")
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


def _call(endpoint, method, path, body=None):
    """-> the JSON object of a 200. Raises Failure."""
    status, headers, content = _exchange(endpoint, method, path, body)
    try:
        reply = _parse(content, endpoint.key)
    except ValueError:
        reply = None
    if status != 200:
        raise _refusal(status, headers, reply)
    if not isinstance(reply, dict):
        raise Failure("again", "HTTP 200 with cut or broken JSON", lost=True)
    if reply.get("error"):
        code = reply["error"].get("code") if isinstance(reply["error"], dict) else None
        raise _refusal(code if type(code) is int and code >= 400 else 500, headers, reply)
    return reply


def count(usage):
    """(tokens in, tokens out with hidden reasoning) of a usage, None if it does not tell."""
    n, out, total = ((usage or {}).get(key) for key in ("prompt_tokens", "completion_tokens", "total_tokens"))
    known = lambda tokens: type(tokens) is int and 0 <= tokens < 1 << 53  # beyond that it is no count, and no float
    if not (known(n) and known(out)):
        return None
    return n, max(out, total - n) if known(total) else out


def models(endpoint):
    """The names of the models that the server has."""
    listed = _call(endpoint, "GET", "/models").get("data")
    return [model["id"] for model in listed if isinstance(model, dict) and isinstance(model.get("id"), str)] if isinstance(listed, list) else []


def request(endpoint, messages, **fields):
    """The JSON object that `complete` posts."""
    return {"model": endpoint.model, "messages": messages, **endpoint.fields, **fields}


def complete(endpoint, messages, **fields):
    """Posts one chat completion -> Answer, whatever its text and finish are. Raises Failure."""
    reply = _call(endpoint, "POST", "/chat/completions", json.dumps(request(endpoint, messages, **fields)).encode())
    try:
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""  # a teacher that declines has answered
        if isinstance(text, list):
            text = "".join(part.get("text") or "" for part in text)
        if not isinstance(text, str):
            raise TypeError
    except (KeyError, IndexError, TypeError, AttributeError):
        raise Failure("again", "HTTP 200 without a completion in it", lost=True) from None
    usage = reply.get("usage")
    return Answer(text, str(reply.get("model") or ""), str(finish or "").lower(), usage if isinstance(usage, dict) else None)


def ask(endpoint, messages, jitter, attempts=6, before=lambda failure, wait: time.sleep(wait), **fields):
    """`complete`, asked again while that may help -> Answer. Raises the last Failure. `before(failure, wait)` is called before each
    attempt with the failure of the one before (None at first), and waits; `jitter` seeds the backoff's."""
    failure, wait = None, 0.0
    for attempt in range(attempts):
        before(failure, wait)
        try:
            return complete(endpoint, messages, **fields)
        except Failure as error:
            if error.kind != "again":
                raise
            failure = error
            wait = error.wait if error.wait is not None else min(60, 2 ** attempt) * random.Random(f"{jitter} {attempt}").uniform(0.5, 1.5)
    raise failure
