"""An OpenAI-compatible server around a decoder: /v1/models, /v1/completions, /v1/chat/completions."""

from __future__ import annotations

import dataclasses
import http.server
import json
import queue
import signal
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from davinci_jax.data.tokenizer import Tokenizer
from davinci_jax.errors import ConfigError, UserError
from davinci_jax.experiment import Experiment
from davinci_jax.inference.generate import check_prompts, generate_ids
from davinci_jax.inference.sampling import Sampling
from davinci_jax.models.decoder import Decoder
from davinci_jax.sharding import make_mesh
from davinci_jax.training.inputs import open_tokenizer
from davinci_jax.training.load import load_model

_MOST_BYTES = 16 << 20
# New tokens of a request that does not say; the programs for other counts are those of the next power of 2.
_NEW_TOKENS = 256
# What a request may say and this server does not do: better refused than ignored.
_UNSUPPORTED = ("stream", "n", "best_of", "logprobs", "tools", "functions", "response_format", "echo", "suffix")


class _Refusal(Exception):
    """A request that cannot be served, with its HTTP status."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class _Request:
    """A prompt int32 [T] with all that decides its continuation."""

    prompt: np.ndarray
    max_new_tokens: int
    sampling: Sampling
    done: Future = dataclasses.field(default_factory=Future, compare=False)


class ModelServer:
    """Serves one model to many clients; one thread computes, requests wait in line.

    Greedy requests that wait together are computed together, at most `batch` at a time. A request that samples is
    computed alone, because random numbers belong to a place in the batch: the same request gives the same answer.

    Args:
      decoder: the model.
      tokenizer: its tokenizer.
      mesh: where it lies.
      name: what clients call it.
      host, port: where to listen; port 0 takes a free one.
      batch: the most requests computed together; a power of 2.
    """

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, mesh: Mesh, *, name: str, host: str = "127.0.0.1",
        port: int = 0, batch: int = 8,
    ):  # fmt: skip
        if batch < 1 or batch & (batch - 1):
            raise ConfigError("batch", batch, "is no power of 2", "give 1, 2, 4, 8, ...")
        self.decoder, self.tokenizer, self.mesh, self.name, self.batch = decoder, tokenizer, mesh, name, batch
        self._waiting: queue.Queue[_Request | None] = queue.Queue()
        handler = type("Handler", (_Handler,), {"model": self})
        try:
            self._http = http.server.ThreadingHTTPServer((host, port), handler)
        except OSError as error:
            problem = f"cannot be listened on at {host} ({error.strerror})"
            raise ConfigError("--port", port, problem, "give another, or 0 for a free one") from error
        self._http.daemon_threads = True
        self._threads: list[threading.Thread] = []

    @property
    def url(self) -> str:
        """Its address, without "/v1"."""
        return f"http://{self._http.server_address[0]}:{self._http.server_port}"

    def __enter__(self) -> ModelServer:
        for target in (self._compute, self._http.serve_forever):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()
        return self

    def __exit__(self, *_) -> None:
        self._http.shutdown()
        self._waiting.put(None)
        for thread in self._threads:
            thread.join()
        self._http.server_close()

    def wait(self) -> None:
        """Returns when it has been shut down."""
        for thread in self._threads:
            thread.join()

    def complete(self, body: Mapping[str, Any], prompt: str) -> dict[str, Any]:
        """Returns text, finish_reason and usage for a prompt with the settings of a request.

        Raises:
          _Refusal: settings or a prompt that cannot be served.
        """
        request = self._request(body, prompt)
        self._waiting.put(request)
        new = request.done.result()
        text, finish = self.tokenizer.decode(new), "length" if len(new) == request.max_new_tokens else "stop"
        for stop in _stops(body):
            if stop in text:
                text, finish = text[: text.index(stop)], "stop"
        usage = {"prompt_tokens": len(request.prompt), "completion_tokens": len(new)}
        return {"text": text, "finish_reason": finish, "usage": usage | {"total_tokens": sum(usage.values())}}

    def _request(self, body: Mapping[str, Any], prompt: str) -> _Request:
        for name in _UNSUPPORTED:
            value = body.get(name)
            if value is True or value not in (None, False, 1, []):
                raise _Refusal(400, f"{name!r} is not supported")
        if body.get("model", self.name) != self.name:
            raise _Refusal(404, f"the model {body['model']!r} is not served here, but {self.name!r}")
        count = _number(body, "max_completion_tokens", _number(body, "max_tokens", _NEW_TOKENS, int), int)
        try:
            sampling = Sampling(
                temperature=_number(body, "temperature", 1.0, float), top_p=_number(body, "top_p", 1.0, float),
                seed=_number(body, "seed", 0, int) % 2**32,
            )  # fmt: skip
            tokens = self.tokenizer.encode(prompt)
            check_prompts([tokens], count, self.decoder.config)
        except UserError as error:
            raise _Refusal(400, str(error)) from error
        return _Request(tokens, count, sampling)

    def _compute(self) -> None:
        """Computes what waits, in the order of arrival, until there is a `None`."""
        with jax.set_mesh(self.mesh):
            while True:
                batch = self._next_batch()
                if not batch:
                    return
                try:
                    for request, new in zip(batch, self._generate(batch), strict=True):
                        request.done.set_result(new)
                except Exception as error:  # out of memory, say: these requests fail, the next ones may not
                    for request in batch:
                        request.done.set_exception(error)

    def _next_batch(self) -> list[_Request]:
        """Returns requests that can be computed together; none once the server ends."""
        first = self._waiting.get()
        if first is None:
            return []
        batch = [first]
        while first.sampling.temperature == 0 and len(batch) < self.batch:
            try:
                other = self._waiting.queue[0]  # looked at before it is taken: one thread takes
            except IndexError:
                break
            if other is None or other.sampling != first.sampling or other.max_new_tokens != first.max_new_tokens:
                break
            batch.append(self._waiting.get())
        return batch

    def _generate(self, batch: Sequence[_Request]) -> list[np.ndarray]:
        first = batch[0]
        room = self.decoder.config.max_positions - max(len(request.prompt) for request in batch)
        count = min(1 << (first.max_new_tokens - 1).bit_length(), room)
        size = 1 << (len(batch) - 1).bit_length()
        prompts = [request.prompt for request in batch] + [first.prompt] * (size - len(batch))
        new = generate_ids(
            self.decoder, prompts, count, eos_id=self.tokenizer.eos_id, sampling=first.sampling,
            vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip
        return [row[: first.max_new_tokens] for row in new[: len(batch)]]


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    model: ModelServer

    def log_message(self, *_) -> None:
        """The terminal is for the address."""

    def do_GET(self) -> None:
        if self.path.rstrip("/") == "/v1/models":
            data = [{"id": self.model.name, "object": "model", "owned_by": "davinci"}]
            self._send(200, {"object": "list", "data": data})
        else:
            self._send(404, _error(404, f"there is no {self.path}"))

    def do_POST(self) -> None:
        try:
            chat = {"/v1/chat/completions": True, "/v1/completions": False}.get(self.path.rstrip("/"))
            body = self._body()
            if chat is None:
                raise _Refusal(404, f"there is no {self.path}")
            self._send(200, self._completion(body, chat))
        except _Refusal as refusal:
            self._send(refusal.status, _error(refusal.status, str(refusal)))
        except Exception as error:
            self._send(500, _error(500, f"{type(error).__name__}: {error}"))

    def _completion(self, body: Mapping[str, Any], chat: bool) -> dict[str, Any]:
        done = self.model.complete(body, _chat_prompt(body) if chat else _prompt(body))
        said = {"message": {"role": "assistant", "content": done["text"]}} if chat else {"text": done["text"]}
        return {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.model.name,
            "choices": [{"index": 0, "finish_reason": done["finish_reason"], **said}],
            "usage": done["usage"],
        }

    def _body(self) -> Mapping[str, Any]:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError as error:
            raise _Refusal(411, "Content-Length is missing") from error
        if not 0 <= length <= _MOST_BYTES:
            self.close_connection = True
            raise _Refusal(413, f"a request of {length} bytes is above {_MOST_BYTES}")
        try:
            body = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise _Refusal(400, f"the request is not JSON ({error})") from error
        if not isinstance(body, dict):
            raise _Refusal(400, "the request is no JSON object")
        return body

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        content = json.dumps(body).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except ConnectionError:
            self.close_connection = True  # the client has gone


def serve_run(
    experiment: Experiment, *, step: int | None = None, host: str = "127.0.0.1", port: int = 8000, batch: int = 8
) -> None:
    """Serves a checkpoint of a run until Ctrl-C or SIGTERM; prints its address. Belongs in the main thread.

    Requests that wait are still answered; a second signal ends it at once.

    Args:
      experiment: the run.
      step: the checkpoint; `None` takes the newest whole one.
      host, port, batch: as in `ModelServer`.

    Raises:
      UserError: no whole checkpoint, no tokenizer, a port that is taken.
    """
    tokenizer, mesh = open_tokenizer(experiment), make_mesh(experiment.mesh)
    with jax.set_mesh(mesh):
        decoder, step = load_model(experiment, step)
    with ModelServer(
        decoder, tokenizer, mesh, name=experiment.run.name, host=host, port=port, batch=batch
    ) as server:  # fmt: skip
        # Started with `&` by a script it never gets Ctrl-C; orchestrators send SIGTERM alone.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        print(f"step {step:,} of {experiment.run.path} as {experiment.run.name!r} at {server.url}/v1", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print("stopped")
        finally:
            signal.signal(signal.SIGTERM, before)


def _chat_prompt(body: Mapping[str, Any]) -> str:
    """Returns messages as one text. Models of this project are not tuned to chat: contents, blank lines between."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Refusal(400, "'messages' is no list of messages")
    contents = [message.get("content") if isinstance(message, dict) else None for message in messages]
    if not all(isinstance(content, str) for content in contents):
        raise _Refusal(400, "a message has no text in 'content'")
    return "\n\n".join(contents)


def _prompt(body: Mapping[str, Any]) -> str:
    if not isinstance(body.get("prompt"), str):
        raise _Refusal(400, "'prompt' is no text")
    return body["prompt"]


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(item, str) and item for item in stops):
        raise _Refusal(400, "'stop' is no list of texts")
    return stops


def _number(body: Mapping[str, Any], name: str, default: Any, kind: type) -> Any:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or kind(value) != value:
        raise _Refusal(400, f"{name!r} is no {'integer' if kind is int else 'number'}")
    return kind(value)


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}
