"""Where and how a run executes: mesh, evaluation, checkpoints and the run itself."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are laid out; the product must be the number of devices.

    Attributes:
      replica: data parallel with whole parameters, across slices or nodes.
      fsdp: data parallel with parameters, gradients and moments divided; -1 takes the devices that are left.
    """

    replica: int = 1
    fsdp: int = -1

    def __post_init__(self):
        checks.number("mesh", **dataclasses.asdict(self))
        for name, value in dataclasses.asdict(self).items():
            if value == 0 or value < -1:
                raise ConfigError(
                    f"mesh.{name}",
                    value,
                    "is no axis size",
                    "give a positive number, or -1 for the devices that are left",
                )
        if self.replica == -1 and self.fsdp == -1:
            raise ConfigError("mesh.replica", -1, "and mesh.fsdp = -1 cannot both take what is left", "fix one of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Held-out loss and bits per byte per domain, inside the training loop.

    Attributes:
      every_steps: interval in steps, beside the ends of stages; 0 evaluates at those only, and `None` never: the run
        then reads no held-out rows.
      tokens: tokens per domain of one evaluation; rounded up to whole rows, at most what is held out.
    """

    every_steps: int | None = 5000
    tokens: int = 2_000_000

    def __post_init__(self):
        checks.within("evaluation", 0, float("inf"), every_steps=self.every_steps)
        checks.positive("evaluation", tokens=self.tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and what is kept.

    Attributes:
      every_steps: interval in steps.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: steps divisible by it are kept for ever; `None` keeps none for ever.
    """

    every_steps: int = 1000
    keep_last: int = 3
    keep_every: int | None = 5000

    def __post_init__(self):
        checks.positive("checkpoint", **dataclasses.asdict(self))
        if self.keep_last < 2:
            raise ConfigError(
                "checkpoint.keep_last",
                self.keep_last,
                "would leave none to fall back on when the newest is damaged",
                "keep at least 2",
            )
        if self.keep_every is not None and self.keep_every % self.every_steps:
            raise ConfigError(
                "checkpoint.keep_every",
                self.keep_every,
                f"is no multiple of every_steps = {self.every_steps}, so those steps are never saved",
                "choose a multiple",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The run itself.

    Attributes:
      name: a short name, shown in the display and the report.
      directory: the run directory; `None` means runs/<name>.
      seed: seed of the initialisation and of the data order.
      micro_batch: sequences per device in one forward and backward pass; the global batch is accumulated from them.
      log_every_steps: interval of metrics, in steps.
      tensorboard: also write TensorBoard events.
      peak_flops: peak FLOP/s of one device in the compute dtype, for MFU; `None` looks the device up.
      watchdog_seconds: a step that takes longer ends the process with all stacks and exit code 75; 0 turns it off.
    """

    name: str
    directory: str | None = None
    seed: int = 0
    micro_batch: int = 1
    log_every_steps: int = 10
    tensorboard: bool = True
    peak_flops: float | None = None
    watchdog_seconds: float = 1800.0

    def __post_init__(self):
        checks.positive(
            "run", micro_batch=self.micro_batch, log_every_steps=self.log_every_steps, peak_flops=self.peak_flops
        )
        checks.within("run", 0, float("inf"), watchdog_seconds=self.watchdog_seconds)
        checks.within("run", 0, 2**31 - 1, seed=self.seed)
        checks.text("run", name=self.name)
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError("run.name", self.name, "cannot be a folder name", "use letters, digits, '-' and '_'")

    @property
    def path(self) -> str:
        """The run directory."""
        return self.directory or f"runs/{self.name}"
