"""The description of a run: frozen, keyword-only dataclasses that check themselves, and nothing but data."""

from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Slurm, Step
from davinci_jax.experiment.curriculum import Batch, LearningRate, Stage
from davinci_jax.experiment.data import DataConfig, Source
from davinci_jax.experiment.experiment import Experiment
from davinci_jax.experiment.identity import fingerprint, identity
from davinci_jax.experiment.load import load_any, load_config
from davinci_jax.experiment.model import ModelConfig, Moe, RopeScaling
from davinci_jax.experiment.optimizer import OptimizerConfig
from davinci_jax.experiment.overrides import apply_overrides
from davinci_jax.experiment.runtime import CheckpointConfig, EvaluationConfig, MeshConfig, RunConfig
from davinci_jax.experiment.serialize import from_json, resolve, to_dict, to_json

__all__ = [
    "Batch",
    "CheckpointConfig",
    "CuratedSource",
    "CurationConfig",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "Input",
    "LearningRate",
    "MeshConfig",
    "ModelConfig",
    "Moe",
    "OptimizerConfig",
    "RopeScaling",
    "RunConfig",
    "Slurm",
    "Source",
    "Stage",
    "Step",
    "apply_overrides",
    "fingerprint",
    "from_json",
    "identity",
    "load_any",
    "load_config",
    "resolve",
    "to_dict",
    "to_json",
]
