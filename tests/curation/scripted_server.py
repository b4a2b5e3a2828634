"""An OpenAI-compatible server whose every answer a test decides, faults included."""

import contextlib
import dataclasses
import http.server
import json
import re
import socket
import threading
import time

FENCE = re.compile(
    r"\[\[(?P<title>[A-Z0-9 ]+?) (?P<code>[0-9a-f]{16})\]\]\n(?P<text>.*?)\n\[\[END (?P=code)\]\]", re.DOTALL
)


@dataclasses.dataclass
class Reply:
    """What goes out: a completion with `text`, or whatever else a server may do."""

    text: str | None = ""
    status: int = 200
    finish: str = "stop"
    headers: dict = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    delay: float = 0.0
    broken: bool = False  # half of the body, then the connection is closed


class Server(http.server.ThreadingHTTPServer):
    """Answers with `script(payload, times)`, where `times` counts how often this very payload has come before."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock = script, threading.Lock()
        self.payloads, self.headers_seen, self.paid = [], [], []
        self.at_once = self.most_at_once = 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that is gone is part of some tests."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def do_GET(self):
        self.send(200, json.dumps({"data": [{"id": "scripted"}]}).encode())

    def do_POST(self):
        server = self.server
        payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            times = server.payloads.count(payload)
            server.payloads.append(payload)
            server.headers_seen.append(dict(self.headers))
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            reply = server.script(payload, times)
            reply = Reply(reply) if isinstance(reply, str) else reply
            time.sleep(reply.delay)
            body = reply.body if reply.body is not None else self.completion(reply)
            with server.lock:
                if reply.status == 200 and not reply.broken:
                    server.paid.append(payload)
            self.send(reply.status, body, reply.headers, reply.broken)
        finally:
            with server.lock:
                server.at_once -= 1

    def completion(self, reply):
        chat = self.path.endswith("/chat/completions")
        said = {"message": {"role": "assistant", "content": reply.text}} if chat else {"text": reply.text}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        return json.dumps({"choices": [{"index": 0, "finish_reason": reply.finish, **said}], "usage": usage}).encode()

    def send(self, status, body, headers=None, broken=False):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if broken else body)
        if broken:
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


@contextlib.contextmanager
def serve(script):
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def material(payload, title="TEXT"):
    """The fenced texts of a request that have a title, in order."""
    text = payload["messages"][-1]["content"] if "messages" in payload else payload["prompt"]
    return [found["text"] for found in FENCE.finditer(text) if found["title"] == title]


def prefix(payload):
    """The words of a request before its first fence."""
    if "messages" in payload:
        return payload["messages"][0]["content"]
    return payload["prompt"][: FENCE.search(payload["prompt"]).start()]
