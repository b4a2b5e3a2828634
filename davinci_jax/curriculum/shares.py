"""From a stage's mixture over domains to shares of sources."""

from __future__ import annotations

from collections.abc import Sequence

from davinci_jax.experiment import Experiment, Source, Stage


def source_shares(stage: Stage, sources: Sequence[Source]) -> tuple[float, ...]:
    """Returns each source's share of the stage's sequences, in the order of `sources`; they add up to 1.

    The mixture is normalised, so percentages may be written as printed. A domain's share is split over the sources
    that admit the stage in proportion to `weight` where given, else to `tokens`; the others have 0.
    """
    total = sum(stage.mixture.values())
    admitted = [source.stages is None or stage.name in source.stages for source in sources]
    weights = [
        (source.tokens if source.weight is None else source.weight) if used else 0.0
        for source, used in zip(sources, admitted, strict=True)
    ]
    domain_weight: dict[str, float] = {}
    for source, weight in zip(sources, weights, strict=True):
        domain_weight[source.domain] = domain_weight.get(source.domain, 0.0) + weight
    return tuple(
        stage.mixture.get(source.domain, 0.0) / total * weight / domain_weight[source.domain] if weight else 0.0
        for source, weight in zip(sources, weights, strict=True)
    )


def domain_shares(stage: Stage) -> dict[str, float]:
    """Returns the stage's mixture, normalised to add up to 1."""
    total = sum(stage.mixture.values())
    return {domain: share / total for domain, share in stage.mixture.items()}


def stage_shares(experiment: Experiment) -> tuple[tuple[float, ...], ...]:
    """Returns `source_shares` of every stage, in order."""
    return tuple(source_shares(stage, experiment.data.sources) for stage in experiment.curriculum)
