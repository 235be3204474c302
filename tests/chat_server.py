"""A real chat-completions server on loopback that behaves, or misbehaves, as a test says."""

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image
from transformers import Qwen2_5_VLProcessor


def completion(text, finish="stop", usage=(100, 10), model="served-model", **message):
    """The body of a good answer; usage: (tokens in, tokens out) or None; message: more keys."""
    reply = {"id": "c", "object": "chat.completion", "model": model,
             "choices": [{"index": 0, "finish_reason": finish,
                          "message": {"role": "assistant", "content": text, **message}}]}
    if usage:
        tokens_in, tokens_out = usage
        reply["usage"] = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out,
                          "total_tokens": sum(usage)}
    return reply


class Chat(ThreadingHTTPServer):
    """A server on a free port.

    answer(chat, body, nth)  -> what to do, nth counting the requests with this body from 0: a dict
        (sent with 200), (status, dict or bytes, headers), or a function of the handler that writes
        to its socket as it likes
    """
    request_queue_size = 256
    daemon_threads = True

    def __init__(self, answer, host="127.0.0.1"):
        super().__init__((host, 0), Handler)
        self.answer, self.lock = answer, threading.Lock()
        self.asked, self.times, self.counts = [], [], {}  # bodies and when they came
        self.in_flight = self.most_in_flight = 0
        self.models = ["served-model"]
        self.url = f"http://{host}:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        pass  # the client may be gone

    def images(self, body):
        """The PIL images in a request."""
        contents = [message["content"] for message in body["messages"]]
        urls = [part["image_url"]["url"] for content in contents if isinstance(content, list)
                for part in content if part["type"] == "image_url"]
        films = []
        for url in urls:
            _, _, pixels = url.partition(",")
            films.append(Image.open(io.BytesIO(base64.b64decode(pixels))))
        return films


class ServersProcessor(Qwen2_5_VLProcessor):
    """transformers' own processor of a student's folder, without videos: these need torchvision.

    ServersProcessor.from_pretrained(folder) reads the files that AutoProcessor reads.
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, None, chat_template)

    def encode(self, messages, images):
        """The tensors of a request: input_ids (1, P), pixel_values, image_grid_thw."""
        text = self.apply_chat_template(messages, add_generation_prompt=True)
        return self(text=[text], images=images, return_tensors="pt")


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send(200, {"object": "list", "data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        chat, raw = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        with chat.lock:
            nth = chat.counts.get((self.path, raw), 0)
            chat.counts[self.path, raw] = nth + 1
            chat.asked.append(json.loads(raw))
            chat.times.append(time.monotonic())
            chat.in_flight += 1
            chat.most_in_flight = max(chat.most_in_flight, chat.in_flight)
        try:
            do = chat.answer(chat, json.loads(raw), nth)
            if callable(do):
                do(self)
            elif isinstance(do, dict):
                self.send(200, do)
            else:
                self.send(*do)
        finally:
            with chat.lock:
                chat.in_flight -= 1

    def send(self, status, content, headers=(), length=None):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if length != "none":
            self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()


@contextlib.contextmanager
def serve(answer, host="127.0.0.1"):
    """A `Chat` that runs while the context does."""
    chat = Chat(answer, host)
    thread = threading.Thread(target=chat.serve_forever, kwargs={"poll_interval": 0.02},
                              daemon=True)
    thread.start()
    try:
        yield chat
    finally:
        chat.shutdown()
        chat.server_close()
        thread.join()


# misbehaviour: of what counts its prompt, then each a function of the handler

def counts_wrong(answer, by=26):
    """An `answer` as of a server whose prompts are longer than the student's by some tokens."""
    def wrong(chat, body, nth):
        reply = answer(chat, body, nth)
        reply["usage"]["prompt_tokens"] += by
        return reply
    return wrong


def never_answers(handler):
    time.sleep(3)


def drips_its_body(handler):
    handler.send(200, b"{", length=1000)
    for _ in range(30):
        time.sleep(0.1)
        handler.wfile.write(b" ")
        handler.wfile.flush()


def drips_its_header(handler):
    for _ in range(30):
        handler.wfile.write(b"H")
        handler.wfile.flush()
        time.sleep(0.1)


def cuts_its_json(handler):
    content = json.dumps(completion("the left lung is clear")).encode()
    handler.send(200, content[:len(content) // 2], length=len(content))


def cuts_its_json_without_a_length(handler):
    content = json.dumps(completion("the left lung is clear")).encode()
    handler.send(200, content[:-20], length="none")


def cuts_its_header(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Le")


def hangs_up(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def resets(handler):
    handler.reset()


def talks_no_http(handler):
    handler.wfile.write(f"{handler.headers.get('Authorization')}\r\n\r\n".encode())
