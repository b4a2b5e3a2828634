"""The gated activation of the MLP."""

from pallas_kernels import swiglu

__all__ = ["swiglu"]
