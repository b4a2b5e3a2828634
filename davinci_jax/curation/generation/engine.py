"""Documents through datatrove's `InferenceRunner`, with the guarantees that it does not give by itself.

The runner (0.10.1) drives rollouts concurrently against a server. What it does not do, and is done here instead:

- Its replay cache knows a request by document and payload before model and default parameters are merged, hands an
  answer on before it is written, and is deleted when a run ends well. `GenerationStore` takes its place: its key is
  the whole payload, an answer is written before it is used, and nothing is ever deleted.
- On plain HTTP it has no timeout, fails a request at 429, ends the task at 500 and reads a half answer as an error
  without repetition. `Client` sends the requests.
- One exception in a rollout ends the task. Here it becomes the result of its document.
- Its checkpoints replay a line that a kill cut short, and its output comes in the order of completion. Here it writes
  none: results are held for one batch and come in the order of the documents.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from datatrove.data import Document as Record
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import InferenceServer
from datatrove.pipeline.inference.types import InferenceError, ServerError
from loguru import logger

from davinci_jax.curation.documents import Document
from davinci_jax.curation.generation.client import Client, Generation, RequestFailed
from davinci_jax.errors import DataError, UserError

Rollout = Callable[[Document, Callable[[dict[str, Any], str], Awaitable[Generation]]], Awaitable[Any]]
# Label and document travel in the payload as far as the client, through a runner that passes nothing else on.
_NOTE = "davinci_note"


class RolloutError(Exception):
    """What went wrong in a rollout, in place of its result."""


def run(client: Client, documents: Sequence[Document], rollout: Rollout, model: str, concurrency: int) -> list[Any]:
    """Runs a rollout for each document; returns their results in the order of the documents.

    Args:
      client: sends the requests of the model.
      documents: as many as may be at work together.
      rollout: called with a document and `ask(payload, label)`, which may raise `RequestFailed`. Whatever it raises
        becomes a `RolloutError` in its place.
      model: as the server knows it; joins every payload.
      concurrency: requests under way at once.

    Raises:
      UserError: the server is down or refuses, or something is missing for all; the answers so far are kept.
    """
    results: dict[int, Any] = {}
    runner = _Runner(client, functools.partial(_guarded, documents, rollout, results), model, concurrency)
    logger.disable("datatrove.pipeline.inference")  # a table of metrics a batch, and a warning a second of waiting
    try:
        asyncio.run(runner.run_async([Record(text="", id=str(n)) for n in range(len(documents))]))
    except ServerError as error:
        raise _cause(error, client) from error
    finally:
        logger.enable("datatrove.pipeline.inference")
    return [results[n] for n in range(len(documents))]


async def _guarded(documents: Sequence[Document], rollout: Rollout, results: dict, record: Record, generate) -> bool:
    """A rollout in datatrove's form, which never raises on account of a document."""

    document = documents[int(record.id)]

    async def ask(payload: dict[str, Any], label: str) -> Generation:
        try:
            result = await generate({**payload, _NOTE: (label, document.id)})
        except InferenceError as error:
            raise RequestFailed(str(error.error)) from error
        return result.usage["generation"]

    try:
        results[int(record.id)] = await rollout(document, ask)
    except (ServerError, asyncio.CancelledError):
        raise
    except UserError as error:  # a package or file that is missing is missing for every document
        raise ServerError(error) from error
    except Exception as error:  # a document must not end the task that others are in
        results[int(record.id)] = RolloutError(f"{type(error).__name__}: {error}")
    return True


class _Runner(InferenceRunner):
    def __init__(self, client: Client, rollout: Callable, model: str, concurrency: int):
        config = InferenceConfig(
            server_type="endpoint", endpoint_url=client.endpoint.base, model_name_or_path=model,
            use_chat=client.endpoint.chat, max_concurrent_generations=concurrency,
            # Requests are what is limited; a document waits for its own with no harm.
            max_concurrent_documents=max(concurrency, 1), metric_interval=3600, server_start_max_retries=0,
            server_start_timeout_sec=client.endpoint.patience + 10,
            server_ready_max_attempts=max(1, round(client.endpoint.patience / 0.5)), server_ready_delay_sec=0.5,
        )  # fmt: skip
        super().__init__(rollout, config, output_writer=_Nowhere())
        self._client = client

    def _init_server(self, rank: int) -> InferenceServer:
        return _Server(self.config, rank, self._client)


class _Server(InferenceServer):
    """The client in the place of a server that datatrove would talk to."""

    def __init__(self, config: InferenceConfig, rank: int, client: Client):
        super().__init__(config, rank)
        self._client = client

    async def __aenter__(self):
        await self._client.__aenter__()
        return await super().__aenter__()

    async def __aexit__(self, *error):
        await super().__aexit__(*error)
        await self._client.__aexit__(*error)

    async def start_server(self) -> None:
        """Someone else has started it."""

    async def monitor_health(self) -> None:
        """Requests tell how it is; waits until cancelled."""
        await asyncio.Future()

    async def is_ready(self) -> bool:
        return await self._client.is_up()

    async def _make_request(self, payload: dict[str, Any]) -> dict[str, Any]:
        label, document = payload.pop(_NOTE)
        try:
            generation = await self._client.complete(payload, label, document)
        except RequestFailed as error:
            raise InferenceError(None, str(error)) from error
        except DataError as error:
            raise ServerError(error) from error
        choice = {"message": {"content": generation.text}, "text": generation.text}
        usage = {
            "prompt_tokens": generation.prompt_tokens,
            "completion_tokens": generation.completion_tokens,
            "generation": generation,
        }
        return {"choices": [{**choice, "finish_reason": generation.finish_reason}], "usage": usage}


class _Nowhere:
    """In the place of datatrove's writer: rollouts hand their results over themselves."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def write(self, document: Record, **names: Any) -> None:
        """Nothing to write."""


def _cause(error: ServerError, client: Client) -> UserError:
    """Returns the error a user can mend that datatrove has wrapped; otherwise it waited for the server in vain."""
    cause: BaseException | Any = error
    while isinstance(cause, ServerError):
        cause = cause.error
    if isinstance(cause, UserError):
        return cause
    why = f" ({client.trouble})" if client.trouble else ""
    problem = f"does not answer within {client.endpoint.patience:g} s{why}"
    return DataError("endpoint", client.endpoint.url, problem, "start it, or give its address")
