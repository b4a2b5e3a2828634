"""Rotary position embeddings, in the rotate-half layout of Llama and Qwen2."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import rope as apply_rope

__all__ = ["apply_rope", "rope_frequencies", "rope_table"]


def rope_frequencies(
    head_size: int,
    base: float,
    *,
    factor: float | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_max_positions: int = 8192,
) -> np.ndarray:
    """Angular frequencies, radians per position: base^(-2i / head_size) (Su et al. 2021, arXiv 2104.09864).

    With `factor`, frequencies are stretched as in Llama 3.1 (Grattafiori et al. 2024, arXiv 2407.21783): a wave
    longer than original_max_positions / low_freq_factor turns `factor` times slower, one shorter than
    original_max_positions / high_freq_factor stays, and between the two the frequency is interpolated linearly in
    original_max_positions / wavelength.

    Args:
      head_size: width of a head, even.
      base: base of the geometric series.
      factor: how many times longer the context becomes; `None` leaves the series as it is.
      low_freq_factor: see above.
      high_freq_factor: see above.
      original_max_positions: context length before stretching, in positions.

    Returns:
      [head_size / 2] float32.
    """
    frequencies = base ** -(np.arange(0, head_size, 2, dtype=np.float64) / head_size)
    if factor is not None:
        waves = original_max_positions * frequencies / (2 * np.pi)
        kept = np.clip((waves - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
        frequencies = frequencies * (kept + (1 - kept) / factor)
    return frequencies.astype(np.float32)


def rope_table(positions: jax.Array, frequencies: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of position x frequency.

    Args:
      positions: [...] int.
      frequencies: [K / 2], from `rope_frequencies`.

    Returns:
      (cos, sin), each [..., K / 2] float32.
    """
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)
