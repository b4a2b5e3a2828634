"""The daVinci-LLM recipe (arXiv 2603.27164): the data pool of table 2 and the stages of tables 2 and 5.

Where the report leaves a choice open:

- It prints no split of a domain over its sources; sources share a domain in proportion to their tokens.
- Percentages are as printed and get normalised: those of stage 2-2 add up to 100.3.
- Table 5, followed here, keeps stage 2-2 at 3e-5; the ablation of appendix B found a cosine decay to 3e-6 better.
- Repeats follow from the table: the run goes 4.1 times through QA, 1.6 times through Code and up to 1.6 times through
  the sources of Science. Each of them allows it with `max_epochs`; the others are not to be read twice.
- The rows of the pool as printed add up to 7.56 T tokens, of which 0.49 T are in no stage.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from davinci_jax.experiment import Batch, LearningRate, Source, Stage

_S1 = ("1-1", "1-2")
_S2 = ("2-1", "2-2")
_ALL = None
_UNUSED = ()

# fmt: off
_TABLE_2 = (
    # name, domain, billions of tokens, Darwin level, stages, most epochs
    ("nemotron-cc-v1", "General", 4280, "L3", _ALL, 1),  # its non-synthetic part
    ("github-10-stars", "Code", 187, "L3", _ALL, 2),  # crawled by the authors
    ("nemotron-code-v1", "Code", 220, "L3", _ALL, 2),
    ("nemotron-code-v1-synthetic", "Code", 171, "L5", _ALL, 2),
    ("txt360-stack-exchange", "Code", 20, "L2", _ALL, 2),
    ("megamath-web", "Science", 231, "L3", _S1, 2),
    ("megamath-web-pro", "Science", 13, "L4", _ALL, 2),
    ("megamath-refined", "Science", 176, "L4", _S2, 1),
    ("megamath-synth-code", "Science", 5, "L5", _ALL, 2),
    ("nemotron-cc-math-v1-3", "Science", 81, "L4", _S1, 2),
    ("nemotron-cc-math-v1-4plus", "Science", 52, "L4", _S1, 2),
    ("nemotron-cc-math-v1-4plus-mind", "Science", 74, "L5", _ALL, 2),
    ("nemotron-cc-math-v1-3-refined", "Science", 68, "L4", _S2, 1),
    ("nemotron-cc-math-v1-4plus-refined", "Science", 47, "L4", _S2, 1),
    ("darwin-science-book", "Science", 251, "L4", _ALL, 2),
    ("darwin-science-paper", "Science", 215, "L4", _ALL, 2),
    ("darwin-science-paper-gpt", "Science", 290, "L5", _S1, 2),
    ("darwin-science-paper-qwen", "Science", 440, "L5", _S2, 1),
    ("nemotron-sft-v1-code", "QA", 21, "L5", _S2, 5),
    ("nemotron-sft-v1-math", "QA", 138, "L5", _S2, 5),
    ("nemotron-sft-v1-general", "QA", 12, "L5", _S2, 5),
    ("llama-nemotron-code", "QA", 5, "L5", _S2, 5),
    ("llama-nemotron-math-rs", "QA", 10, "L5", _S2, 5),
    ("llama-nemotron-science-rs", "QA", 0.4, "L5", _S2, 5),
    ("megamath-qa-rs", "QA", 9, "L5", _S2, 5),
    ("megascience-rs", "QA", 1, "L5", _S2, 5),
    ("darwin-science-book-qa", "QA", 46, "L5", _S2, 5),
    ("nemotron-cc-v1-synthetic-qa", "QA", 492, "L5", _UNUSED, 1),  # in the pool, and in no stage of the table
)
# fmt: on

POOL: tuple[Source, ...] = tuple(
    Source(name=name, domain=domain, tokens=billions * 1e9, level=level, stages=stages, max_epochs=max_epochs)
    for name, domain, billions, level, stages, max_epochs in _TABLE_2
)

STAGES: tuple[Stage, ...] = (
    Stage(
        name="1-1",
        tokens=4e12,
        batch=(Batch(size=1024, steps=70_000), Batch(size=2048, steps=40_000), Batch(size=4096)),
        learning_rate=LearningRate(peak=3e-4, warmup_steps=2000),
        mixture={"General": 68.2, "Code": 9.53, "Science": 22.27, "QA": 0},
    ),
    Stage(
        name="1-2",
        tokens=2e12,
        batch=(Batch(size=4096),),
        learning_rate=LearningRate(peak=3e-4, shape="cosine", final=3e-5),
        mixture={"General": 55.42, "Code": 11.66, "Science": 32.92, "QA": 0},
    ),
    Stage(
        name="2-1",
        tokens=1e12,
        batch=(Batch(size=4096),),
        learning_rate=LearningRate(peak=3e-5, warmup_steps=2000),
        mixture={"General": 10, "Code": 30, "Science": 30, "QA": 30},
    ),
    Stage(
        name="2-2",
        tokens=1e12,
        batch=(Batch(size=4096),),
        learning_rate=LearningRate(peak=3e-5),
        mixture={"General": 18.84, "Code": 2.61, "Science": 8.85, "QA": 70},
    ),
)


def scaled(
    stages: Sequence[Stage], *, tokens: float, batch: float = 1.0, length: float = 1.0, learning_rate: float = 1.0
) -> tuple[Stage, ...]:
    """Returns the stages with the same shape and mixture at another size.

    Args:
      stages: the stages.
      tokens: factor on every stage's tokens.
      batch: factor on every batch size.
      length: factor on the sequence length; with the two above it decides the steps of the ramp and of the warm-up.
      learning_rate: factor on every learning rate.
    """
    steps = tokens / (batch * length)
    return tuple(
        dataclasses.replace(
            stage,
            tokens=stage.tokens * tokens,
            batch=tuple(_scaled_piece(piece, steps, batch) for piece in stage.batch),
            learning_rate=_scaled_rate(stage.learning_rate, steps, learning_rate),
        )
        for stage in stages
    )


def _scaled_piece(piece: Batch, steps: float, size: float) -> Batch:
    return Batch(size=_whole(piece.size * size), steps=None if piece.steps is None else _whole(piece.steps * steps))


def _scaled_rate(rate: LearningRate, steps: float, factor: float) -> LearningRate:
    warmup_steps = round(rate.warmup_steps * steps)
    return dataclasses.replace(
        rate,
        peak=rate.peak * factor,
        final=None if rate.final is None else rate.final * factor,
        warmup_from=rate.warmup_from * factor if warmup_steps else 0.0,
        warmup_steps=warmup_steps,
    )


def _whole(value: float) -> int:
    return max(1, round(value))
