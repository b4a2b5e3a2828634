"""What operations by a language model have in common: where the model is, how it is asked, what becomes of answers."""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation import prompts
from davinci_jax.curation.generation.client import Client, Endpoint, Generation, RequestFailed
from davinci_jax.curation.generation.store import GenerationStore
from davinci_jax.curation.pipeline import Reject
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks

# Asks the server: payload, label -> answer. Reads an answer: what it says, and what is wrong with it or `None`.
Ask = Callable[[dict[str, Any], str], Awaitable[Generation]]
Read = Callable[[Generation], tuple[Any, str | None]]
# Fields that say where and how fast, and cannot change a result.
_TRANSPORT = ("endpoint", "store", "key_variable", "timeout", "retries", "delay", "patience", "concurrency")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generative(abc.ABC):
    """An operation that asks a language model.

    Attributes:
      endpoint: address of an OpenAI-compatible server, with or without "/v1"; "replay" asks nobody and takes the
        generations that are kept.
      model: the model as the server knows it.
      prompt: name of a prompt of the project, or path of a text file.
      chat: ask for chat completions; a model without a chat template needs `False`.
      temperature, top_p, max_tokens: as the server takes them.
      seed: of the first attempt; every further attempt or sample of one request counts on from it, so that no two
        of them are the same request.
      attempts: how often a request is put before its unusable answers are given up.
      retry_temperature: the least temperature of every attempt after the first. A server that takes the likeliest
        token each time heeds no seed: at temperature 0 it would sell the same unusable answer again.
      store: folder of raw generations; by default a folder of the source that outlives edits of the recipe.
      key_variable: environment variable that holds the key of the server.
      timeout, retries, delay, patience: see `Endpoint`.
      concurrency: requests under way at once in one task.
    """

    endpoint: str
    model: str
    prompt: str
    chat: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 2048
    seed: int = 0
    attempts: int = 2
    retry_temperature: float = 0.7
    store: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 600.0
    retries: int = 5
    delay: float = 1.0
    patience: float = 30.0
    concurrency: int = 32
    batch = 64

    def __post_init__(self):
        checks.positive(self.name, max_tokens=self.max_tokens, attempts=self.attempts, concurrency=self.concurrency)
        checks.within(self.name, 0, 10, temperature=self.temperature, retry_temperature=self.retry_temperature)
        checks.within(self.name, 0, 1, top_p=self.top_p)
        if not self.model:
            raise ConfigError(f"{self.name}.model", self.model, "is empty", "name the model as the server knows it")
        self._endpoint()
        self.words()

    def words(self) -> prompts.Prompt:
        """The fixed words of its requests."""
        return prompts.load(self.prompt)

    def parameters(self) -> dict[str, Any]:
        fields = {key: value for key, value in dataclasses.asdict(self).items() if key not in _TRANSPORT}
        return {**fields, "prompt": self.words().record}

    def bind(self, folder: pathlib.Path) -> Generative:
        """Returns the operation with its raw generations in a folder of the source.

        All tasks share it: a document that another cut of the source brings to another task is not paid again.
        """
        bound = self if self.store else dataclasses.replace(self, store=str(folder))
        bound._open_store().refresh()
        return bound

    def apply(self, documents: Iterator[Document], reject: Reject) -> Iterator[Document]:
        documents = list(documents)
        results, _ = self.results(documents)
        for document, result in zip(documents, results, strict=True):
            made = str(result) if isinstance(result, Exception) else self.finish(document, result)
            if isinstance(made, str):
                reject(document, made)
            else:
                yield from made

    def results(self, documents: Sequence[Document]) -> tuple[list[Any], int]:
        """Returns (the result of each rollout, or the `RolloutError` in its place; generations that they used)."""
        from davinci_jax.curation.generation import engine

        client = Client(self._endpoint(), self._open_store())
        return engine.run(client, documents, self.rollout, self.model, self.concurrency), client.asked

    @abc.abstractmethod
    async def rollout(self, document: Document, ask: Ask) -> Any:
        """Asks all that a document needs, many documents at a time; returns what `finish` takes."""

    @abc.abstractmethod
    def finish(self, document: Document, result: Any) -> Sequence[Document] | str:
        """Returns the documents made of the result, or why there are none."""

    async def put(
        self,
        ask: Ask,
        sections: Sequence[tuple[str, str]],
        label: str,
        attempt: int = 0,
        words: prompts.Prompt | None = None,
        temperature: float | None = None,
    ) -> Generation:
        """Asks for one generation.

        Args:
          ask: as `rollout` got it.
          sections: (title, text) of the material.
          label: for what it is asked, to find it again among the raw generations.
          attempt: tells repetitions and samples of one request apart, by their seed.
          words: the prompt, if it is another than the operation's.
          temperature: if it is another than the operation's.

        Raises:
          RequestFailed: there is no answer.
        """
        payload = (words or self.words()).payload(sections, self.chat)
        temperature = self.temperature if temperature is None else temperature
        settings = {"temperature": temperature, "top_p": self.top_p, "max_tokens": self.max_tokens}
        return await ask({**payload, **settings, "seed": self.seed + attempt}, label)

    def temperature_of(self, attempt: int) -> float:
        """Returns the temperature of an attempt at a request whose answers so far were of no use."""
        return max(self.temperature, self.retry_temperature) if attempt else self.temperature

    async def first_good(
        self, ask: Ask, sections: Sequence[tuple[str, str]], label: str, read: Read, turn: int = 0
    ) -> tuple[Any, str]:
        """Puts a request until its answer is of use, at most `attempts` times.

        Args:
          ask, sections, label: as in `put`.
          read: answer -> (what it says, what is wrong with it or `None`).
          turn: how often that many attempts have been made before.

        Returns:
          (what the first good answer says, ""), or (`None`, what was wrong with the last).
        """
        trouble = ""
        for attempt in range(turn * self.attempts, (turn + 1) * self.attempts):
            try:
                temperature = self.temperature_of(attempt)
                answer = await self.put(ask, sections, f"{label}@{attempt}", attempt, temperature=temperature)
                said, trouble = read(answer)
            except RequestFailed as error:
                said, trouble = None, f"no answer: {error}"
            if trouble is None:
                return said, ""
        return None, trouble

    def _endpoint(self) -> Endpoint:
        return Endpoint(
            url=self.endpoint, chat=self.chat, key_variable=self.key_variable, timeout=self.timeout,
            retries=self.retries, delay=self.delay, patience=self.patience,
        )  # fmt: skip

    def _open_store(self) -> GenerationStore:
        """Opens the folder for this model, prompt and way of sampling; what is decided after an answer is not in it."""
        names = ("model", "chat", "temperature", "top_p", "max_tokens", "seed")
        settings = {name: getattr(self, name) for name in names} | {"prompt": self.words().record}
        if self.store is None:
            raise ConfigError(f"{self.name}.store", None, "is not set", "name a folder for the raw generations")
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        folder = os.path.join(self.store, f"{self.name}-{digest}")
        os.makedirs(self.store, exist_ok=True)
        return _opened(folder, json.dumps({"operation": self.name, **settings}), os.stat(self.store).st_ino)


@functools.lru_cache(maxsize=16)
def _opened(folder: str, settings: str, inode: int) -> GenerationStore:
    """Opens a store once a process: reading its index anew for each batch would take longer with every batch."""
    return GenerationStore(folder, json.loads(settings))
