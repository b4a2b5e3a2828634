"""The Hopper kernels in the interpreter: what everyday calls need, in one case."""

import hopper_cases
import numpy as np
import pytest

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")


@pytest.mark.slow
def test_causal_packed_documents_with_grouped_heads():
    """Two tiles of keys, the last in part, documents without tokens, and padding at the end of the row."""
    segments = np.repeat(np.int32([[0, 2, 3, -1]]), [50, 5, 55, 10], axis=1)
    hopper_cases.check(heads=(2, 1), queries=120, masks=(segments, None, None, None))
