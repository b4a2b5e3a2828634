"""The optimizer, as numbers; the learning rate belongs to the stages."""

from __future__ import annotations

import dataclasses

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import checks


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for the matrices with AdamW for the rest.

    Attributes:
      name: "adamw" or "muon".
      beta1: decay of the first moment.
      beta2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled decay, on matrices only: no norms, no biases.
      clip_norm: largest global norm of the gradient; `None` does not clip.
      muon_momentum: decay of Muon's momentum (Nesterov).
      muon_steps: Newton-Schulz iterations.
      muon_rms: root mean square that an orthogonalised update is scaled to, so that one learning rate serves
        AdamW and Muon (Liu et al. 2025, arXiv 2502.16982).
    """

    name: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    muon_momentum: float = 0.95
    muon_steps: int = 5
    muon_rms: float = 0.2

    def __post_init__(self):
        checks.one_of("optimizer", ("adamw", "muon"), name=self.name)
        checks.within("optimizer", 0, 1, beta1=self.beta1, beta2=self.beta2, muon_momentum=self.muon_momentum)
        for name in ("beta1", "beta2", "muon_momentum"):
            if getattr(self, name) == 1:
                raise ConfigError(f"optimizer.{name}", 1, "never takes anything in", "give a number below 1")
        checks.within("optimizer", 0, 10, weight_decay=self.weight_decay)
        checks.positive(
            "optimizer", eps=self.eps, clip_norm=self.clip_norm, muon_steps=self.muon_steps, muon_rms=self.muon_rms
        )
