"""Root mean square normalisation."""

from pallas_kernels import rms_norm

__all__ = ["rms_norm"]
