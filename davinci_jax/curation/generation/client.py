"""Requests to an OpenAI-compatible server: asked once, asked again when it fails, never paid twice.

A document goes on without an answer only where it is to blame itself: the server must answer the same request about
next to nothing (`prompts.shortened`) before and after it has failed this one, or anything while it refused it. Else
the run stops, since what is rejected because a server was down would stay rejected when that is mended.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import functools
import hashlib
import os
import time
from collections.abc import Mapping
from typing import Any

from davinci_jax.curation.generation import prompts
from davinci_jax.curation.generation.store import GenerationStore, request_key
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment import checks

# An endpoint that stands for the generations that are kept: nothing is sent, what was never asked fails.
REPLAY = "replay"
# This many documents in a row with a request that failed after all its repetitions: it is not the documents, even if
# the server still answers about next to nothing.
FAILURES_IN_A_ROW = 16
_REFUSED = {
    401: "the key is missing or wrong",
    402: "the account is empty",
    403: "the key may not use it",
    404: "it has no such path or model",
}
_BUSY = 429
_AGAIN = frozenset({408, 409, 425, _BUSY})
_PROBES = 2  # times that a request about next to nothing is put


class RequestFailed(Exception):
    """A request that has no usable answer; the document that asked goes on without it."""


class _RequestRefused(RequestFailed):
    """A request that the server would refuse again."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer of a model.

    Attributes:
      text: what it wrote.
      finish_reason: "stop" where it ended by itself, "length" where it was cut off.
      reasoning: what it thought first, where the server tells.
      prompt_tokens, completion_tokens: as the server counts them; 0 where it does not.
    """

    text: str
    finish_reason: str = "stop"
    reasoning: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server and how to treat it; nothing in here changes an answer.

    Attributes:
      url: "http://host:port", with or without "/v1"; `REPLAY` sends nothing.
      chat: ask /v1/chat/completions instead of /v1/completions.
      key_variable: environment variable that holds the key, if the server wants one.
      timeout: seconds for one request.
      retries: repetitions of a request that failed on the way, with 429 or on the server's side.
      delay: seconds before the first repetition; doubled for each further one, at most a minute. A server's
        Retry-After comes before it.
      patience: seconds that the server may take to come up.
    """

    url: str
    chat: bool = True
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 600.0
    retries: int = 5
    delay: float = 1.0
    patience: float = 30.0

    def __post_init__(self):
        checks.positive("endpoint", timeout=self.timeout, delay=self.delay, patience=self.patience)
        checks.within("endpoint", 0, 100, retries=self.retries)
        if self.url != REPLAY and not self.url.startswith(("http://", "https://")):
            raise ConfigError(
                "endpoint", self.url, "is no address of a server", f"write http://host:port, or {REPLAY!r}"
            )

    @property
    def base(self) -> str:
        """The address without "/v1" and slashes at its end."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")


class Client:
    """Asks a server and keeps every answer before anyone uses it.

    Args:
      endpoint: the server.
      store: where answers are kept; a request that it knows is not sent.
    """

    def __init__(self, endpoint: Endpoint, store: GenerationStore):
        self.endpoint, self.store = endpoint, store
        self.asked = 0  # generations asked for, whether they were kept or had to be bought
        self.trouble = ""  # why the server was not up when it was last asked
        self._waiting: dict[str, asyncio.Future] = {}
        self._failed = _failed_documents(endpoint.url, str(store.folder))
        self._answers = 0  # of the server itself
        self._probing = asyncio.Lock()
        self._http = None

    async def __aenter__(self) -> Client:
        import httpx

        key = os.environ.get(self.endpoint.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            headers=headers, timeout=self.endpoint.timeout, limits=httpx.Limits(max_connections=None)
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._http.aclose()

    async def is_up(self) -> bool:
        """Whether the server answers at all; one without a list of models counts too."""
        import httpx

        if self.endpoint.url == REPLAY:
            return True
        try:
            response = await self._http.get(f"{self.endpoint.base}/v1/models", timeout=5.0)
        except httpx.HTTPError as error:
            self.trouble = _why(error)
            return False
        self.trouble = f"status {response.status_code}"
        return response.status_code < 500

    async def complete(self, payload: Mapping[str, Any], label: str, document: str = "") -> Generation:
        """Returns the answer to a request: the one that is kept, else the server's.

        Two tasks that ask the same at the same time send one request.

        Args:
          payload: of the request.
          label: for what it is asked, see `GenerationStore.put`.
          document: id of the one that it is about.

        Raises:
          RequestFailed: the server has no usable answer to this request, but it has to others.
          DataError: the server is down or refuses, or the answer cannot be kept.
        """
        self.asked += 1
        key = request_key({"chat": self.endpoint.chat, **payload})
        while key in self._waiting:
            await asyncio.wait([self._waiting[key]])
        kept = self.store.get(key)
        if kept is None:
            self._waiting[key] = done = asyncio.get_running_loop().create_future()
            try:
                kept = await self._ask(payload, document)
                self.store.put(key, label, _recorded(payload), kept)
            finally:
                del self._waiting[key]
                done.set_result(None)
        return Generation(**kept)

    async def _ask(self, payload: Mapping[str, Any], document: str) -> dict[str, Any]:
        """Sends a request until it is answered; returns the fields of its `Generation`."""
        if self.endpoint.url == REPLAY:
            raise RequestFailed("no generation is kept for it, and nothing is sent in a replay")
        before = self._answers
        try:
            answer, trouble = await self._try(payload, self.endpoint.retries + 1)
            if answer is None:
                await self._check(payload, trouble)
                answer, trouble = await self._try(payload, 1)  # it may have been down until now
        except _RequestRefused as error:
            async with self._probing:
                if self._answers == before:
                    await self._check(payload, str(error))
            raise
        if answer is None:
            await self._check(payload, trouble)
            self._fails(document, trouble)
            raise RequestFailed(f"{trouble}, after {self.endpoint.retries + 2} attempts")
        self._answers += 1
        self._failed.clear()
        return answer

    async def _try(self, payload: Mapping[str, Any], times: int) -> tuple[dict[str, Any] | None, str]:
        """Sends a request at most so often; returns (the answer or `None`, what was wrong with the last attempt).

        Raises:
          _RequestRefused: the server would refuse it again.
          DataError: nobody is there, or too much is asked of it: no document is to blame for that.
        """
        for attempt in range(times):
            answer, trouble, pause, is_general = await self._send(payload)
            if answer is not None:
                return answer, ""
            if attempt + 1 < times:
                await asyncio.sleep(min(60.0, pause or self.endpoint.delay * 2**attempt))
        if is_general:
            raise self._down(trouble)
        return None, trouble

    async def _check(self, payload: Mapping[str, Any], trouble: str) -> None:
        """Asks the same about next to nothing.

        Raises:
          DataError: that is not answered either, so that the document is not to blame for the trouble.
        """
        try:
            answer, why = await self._try(prompts.shortened(payload), _PROBES)
        except _RequestRefused as error:
            answer, why = None, str(error)
        if answer is None:
            raise self._down(trouble if trouble == why else f"{trouble}; the same about one word: {why}")
        self._answers += 1

    def _fails(self, document: str, trouble: str) -> None:
        """Takes note that a document has a request that fails.

        Raises:
          DataError: so have many in a row.
        """
        self._failed.add(document)
        if len(self._failed) >= FAILURES_IN_A_ROW:
            self._failed.clear()
            raise self._down(f"{trouble}, for {FAILURES_IN_A_ROW} documents in a row")

    async def _send(self, payload: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str, float | None, bool]:
        """Sends once; returns (answer or `None`, trouble, seconds to wait or `None`, whether others fail as well)."""
        import httpx

        path = "/v1/chat/completions" if self.endpoint.chat else "/v1/completions"
        try:
            response = await self._http.post(self.endpoint.base + path, json=dict(payload))
        except httpx.ConnectError as error:
            return None, f"no connection: {_why(error)}", None, True
        except httpx.TimeoutException:
            return None, f"no answer in {self.endpoint.timeout:g} s", None, False
        except httpx.HTTPError as error:
            return None, f"the answer broke off ({error})", None, False
        if response.status_code in _REFUSED:
            raise self._down(f"status {response.status_code}: {_REFUSED[response.status_code]}")
        if response.status_code in _AGAIN or response.status_code >= 500:
            pause = _retry_after(response.headers.get("Retry-After"))
            return None, f"status {response.status_code}", pause, response.status_code == _BUSY
        if response.status_code != 200:
            said = " ".join(response.text.split())[:200]
            raise _RequestRefused(f"status {response.status_code}: {said}")
        try:
            return _answer(response.json(), self.endpoint.chat), "", None, False
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            return None, f"the answer is no completion ({type(error).__name__}: {error})", None, False

    def _down(self, trouble: str) -> DataError:
        remedy = "mend it, or what the step asks of it (model, max_tokens, chat, timeout, concurrency)"
        return DataError(
            "endpoint",
            self.endpoint.url,
            f"does not serve ({trouble})",
            f"{remedy}, and start the same command again: every answer so far is kept",
        )


@functools.lru_cache(maxsize=64)
def _failed_documents(url: str, folder: str) -> set[str]:
    """Returns the documents of an operation that have failed since the last answer: of a process, as it outlives tasks.

    A task may have too few documents to tell a server that fails them all.
    """
    return set()


def _recorded(value: Any) -> Any:
    """Returns a request as it is kept: a picture by its digest, since it lies with the documents already."""
    if isinstance(value, Mapping):
        return {key: _recorded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_recorded(item) for item in value]
    if isinstance(value, str) and value.startswith("data:"):
        return f"sha256:{hashlib.sha256(value.encode()).hexdigest()}"
    return value


def _answer(body: Any, chat: bool) -> dict[str, Any]:
    """Returns the fields of a `Generation` from the JSON of a completion."""
    choice = body["choices"][0]
    message = choice["message"] if chat else choice
    text = message.get("content" if chat else "text")
    usage = body.get("usage") or {}
    return {
        "text": _str(text or ""),
        "finish_reason": _str(choice.get("finish_reason") or "stop"),
        "reasoning": _str(message.get("reasoning") or message.get("reasoning_content") or ""),
        "prompt_tokens": int(usage.get("prompt_tokens") or 0),
        "completion_tokens": int(usage.get("completion_tokens") or 0),
    }


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"text expected, not {type(value).__name__}")
    return value


def _why(error: BaseException) -> str:
    """Returns what the system says of a connection that failed: httpx itself says no more than that it did."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    number = error.errno if isinstance(error, OSError) else None
    return (os.strerror(number).lower() if number and number > 0 else str(error)) or type(error).__name__


def _retry_after(header: str | None) -> float | None:
    """Returns the seconds of a Retry-After header, which gives seconds or a date."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
