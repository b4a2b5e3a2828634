"""More cases of the Hopper kernels in the interpreter, which takes seconds for each."""

import hopper_cases
import numpy as np
import pytest

from pallas_kernels.kernels.attention.spec import AttentionSpec

pytest.importorskip("absl", reason="Mosaic GPU needs absl-py")
pytestmark = pytest.mark.slow


def test_head_size_128_with_heads_divided_among_blocks():
    spec = AttentionSpec(True, None, None, 0.1)
    hopper_cases.check(spec, heads=(2, 1), head_dim=128, queries=192, dtype="bfloat16", splits=2)


def test_window_and_soft_cap():
    hopper_cases.check(AttentionSpec(True, (70, 0), 5.0, 0.125), queries=140)


def test_positions_out_of_order_and_a_negative_scale():
    positions = np.concatenate([np.arange(64) + 100, np.arange(40)])[None].astype(np.int32)
    masks = (None, None, positions, np.arange(150, dtype=np.int32)[None])
    spec = AttentionSpec(True, (90, -1), None, -0.1)
    hopper_cases.check(spec, head_dim=128, queries=104, keys=150, masks=masks, block_kv=128)


def test_all_keys_of_another_length():
    hopper_cases.check(AttentionSpec(False, None, None, 0.125), queries=64, keys=200)
