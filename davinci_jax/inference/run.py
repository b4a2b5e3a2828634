"""Samples of a run's checkpoint, on the terminal and for the report."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from rich.console import Console
from rich.text import Text

from davinci_jax.data.shards import ShardSet
from davinci_jax.data.tokenizer import Tokenizer
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import Experiment
from davinci_jax.files import write_atomically
from davinci_jax.inference.generate import check_prompts, generate_ids
from davinci_jax.inference.sampling import Sampling
from davinci_jax.sharding import make_mesh
from davinci_jax.training.inputs import open_all_rows, open_tokenizer
from davinci_jax.training.load import load_model
from davinci_jax.training.units import printable

# Tokens of a held-out document that a sample continues, unless the document says where its question ends.
PROMPT_TOKENS = 24


def generate_run(
    experiment: Experiment,
    prompts: Sequence[str] | None,
    *,
    step: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    save: bool = False,
) -> list[dict[str, str]]:
    """Continues prompts with a checkpoint, prints them, and returns them as {"prompt", "text"}.

    Args:
      experiment: the run.
      prompts: texts; `None` takes the beginning of a held-out document of each domain.
      step: the checkpoint; `None` takes the newest whole one.
      max_new_tokens: the most tokens added to each.
      temperature, top_k, top_p, seed: as in `Sampling`.
      save: also write samples.json into the run directory.

    Raises:
      UserError: settings that draw nothing, a prompt that cannot be continued, no whole checkpoint, no tokenizer.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    tokenizer = open_tokenizer(experiment)
    room = experiment.model.max_positions - max_new_tokens
    ids = heldout_prompts(experiment, tokenizer, room) if prompts is None else tokenizer.encode_batch(prompts)
    check_prompts(ids, max_new_tokens, experiment.model)
    with jax.set_mesh(make_mesh(experiment.mesh)):
        decoder, step = load_model(experiment, step)
        new = generate_ids(
            decoder, ids, max_new_tokens, eos_id=tokenizer.eos_id, sampling=sampling, vocab_size=tokenizer.vocab_size
        )
    samples = [
        {"prompt": tokenizer.decode(prompt), "text": tokenizer.decode(row)}
        for prompt, row in zip(ids, new, strict=True)
    ]
    console = Console()
    console.print(f"step {step:,} of {experiment.run.path}, temperature {temperature:g}", style="dim", highlight=False)
    for sample in samples:
        console.print(
            Text.assemble((printable(sample["prompt"]), "dim"), ("▸", "cyan"), printable(sample["text"])),
            soft_wrap=True,
        )
        console.rule(style="dim")
    if save:
        file = pathlib.Path(experiment.run.path) / "samples.json"
        text = json.dumps({"step": step, "temperature": temperature, "samples": samples}, indent=2) + "\n"
        if file.exists() and file.read_bytes() != text.encode():
            kept = file.rename(next(name for name in _numbered(file) if not name.exists()))
            console.print(f"the samples that were there are kept as {kept}", highlight=False, soft_wrap=True)
        write_atomically(file, text)
        console.print(f"written to {file}", highlight=False, soft_wrap=True)
    return samples


def _numbered(file: pathlib.Path) -> Iterator[pathlib.Path]:
    return (file.with_stem(f"{file.stem}-{n}") for n in itertools.count(1))


def heldout_prompts(experiment: Experiment, tokenizer: Tokenizer, room: int) -> list[np.ndarray]:
    """Returns the beginning of a held-out document of each domain, at most `room` tokens, int32 [n] each.

    The document is the first of the domain's source that holds out most. A document that begins with a question is
    taken up to its answer, any other up to half of it or `PROMPT_TOKENS`.

    Raises:
      ConfigError: nothing is held out.
    """
    largest: dict[str, ShardSet] = {}
    for reader in open_all_rows(experiment, "heldout", tokenizer):
        if reader is not None:
            domain, shards = experiment.data.sources[reader.source].domain, reader.shards
            if shards.num_tokens > (largest[domain].num_tokens if domain in largest else 0):
                largest[domain] = shards
    if not largest:
        raise ConfigError("--prompt", None, "is missing, and no document is held out to begin with", "give a text")
    return [_beginning(shards)[: max(room, 1)] for shards in largest.values()]


def _beginning(shards: ShardSet) -> np.ndarray:
    """Returns the beginning of the first document of a split."""
    block = shards.read_blocks(np.zeros(1, np.int64))[0]
    length = int(block.starts[1]) if len(block.starts) > 1 else block.num_tokens
    count = min(PROMPT_TOKENS, max(length // 2, 1))
    if len(block.spans) and block.spans[0, 0] == 0 and block.spans[0, 1] < length:
        count = int(block.spans[0, 1])
    return block.tokens[:count].astype(np.int32)
