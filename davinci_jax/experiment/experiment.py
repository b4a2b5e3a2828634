"""One object describes a run."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError, nearest
from davinci_jax.experiment import checks
from davinci_jax.experiment.curriculum import Stage
from davinci_jax.experiment.data import DataConfig
from davinci_jax.experiment.model import ModelConfig
from davinci_jax.experiment.optimizer import OptimizerConfig
from davinci_jax.experiment.runtime import CheckpointConfig, EvaluationConfig, MeshConfig, RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides what a run computes, and how.

    Attributes:
      run: name, directory, seed, logging.
      model: the architecture.
      data: sources and rows.
      curriculum: the stages, in order.
      optimizer: the update rule.
      mesh: the layout of devices.
      evaluation: held-out evaluation.
      checkpoint: when the state is saved.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    curriculum: tuple[Stage, ...]
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    def __post_init__(self):
        checks.list_of(Stage, "curriculum", self.curriculum)
        if not self.curriculum:
            raise ConfigError("curriculum", (), "has no stage", "name at least one stage")
        if self.data.sequence_length > self.model.max_positions:
            raise ConfigError(
                "data.sequence_length",
                self.data.sequence_length,
                f"is longer than model.max_positions = {self.model.max_positions}",
                "shorten the rows or raise max_positions",
            )
        stages = [stage.name for stage in self.curriculum]
        for name in stages:
            if stages.count(name) > 1:
                raise ConfigError(
                    "curriculum.name", name, "is used by two stages", "give every stage a name of its own"
                )
        for source in self.data.sources:
            for name in source.stages or ():
                if name not in stages:
                    raise ConfigError(
                        f"data.sources[{source.name}].stages",
                        name,
                        "is no stage of the curriculum",
                        nearest(name, stages),
                    )
        for stage in self.curriculum:
            self._check_mixture(stage)

    def _check_mixture(self, stage: Stage) -> None:
        """Every domain that a stage weighs must have a source that the stage may draw from."""
        for domain, share in stage.mixture.items():
            if domain not in self.data.domains:
                raise ConfigError(
                    f"curriculum[{stage.name}].mixture",
                    domain,
                    "is no domain of the sources",
                    nearest(domain, self.data.domains),
                )
            usable = [
                s for s in self.data.sources if s.domain == domain and (s.stages is None or stage.name in s.stages)
            ]
            if share > 0 and not usable:
                raise ConfigError(
                    f"curriculum[{stage.name}].mixture",
                    domain,
                    "has no source in this stage",
                    "add the stage to a source's `stages` or set the share to 0",
                )
