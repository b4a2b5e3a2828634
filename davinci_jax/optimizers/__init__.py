"""Update rules as optax transformations: AdamW and Muon."""

from davinci_jax.optimizers.decoder import build
from davinci_jax.optimizers.muon import MuonState, muon, scale_by_muon, two_dimensional
from davinci_jax.optimizers.newton_schulz import COEFFICIENTS, Matrix, newton_schulz, orthogonalize

__all__ = [
    "COEFFICIENTS",
    "Matrix",
    "MuonState",
    "build",
    "muon",
    "newton_schulz",
    "orthogonalize",
    "scale_by_muon",
    "two_dimensional",
]
