"""The Hopper kernels in the interpreter: what everyday calls need, in one case."""

import hopper_cases
import numpy as np
import pytest

from pallas_kernels.kernels.attention.spec import AttentionSpec

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")


def test_causal_packed_documents_with_grouped_heads():
    """Two tiles of keys, the last in part, and padding at the end of the row; the interpreter compiles every block."""
    segments = np.repeat(np.int32([[0, 2, 3, -1]]), [50, 5, 55, 10], axis=1)
    masks = (segments, segments, None, None)
    hopper_cases.check(AttentionSpec(True, None, None, 0.1), heads=(2, 1), queries=120, masks=masks)
