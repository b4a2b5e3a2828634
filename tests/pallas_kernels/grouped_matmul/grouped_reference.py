"""Grouped matmul and its gradients in float64 NumPy, group by group; sizes of groups to try."""

import numpy as np

TOLERANCE = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}  # relative to the largest value


def bounds(group_sizes):
    ends = np.cumsum(group_sizes)
    return list(zip(ends - group_sizes, ends, strict=True))


def product(x, w, group_sizes):
    """[M, K], [G, K, N] -> [M, N]."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    y = np.zeros((x.shape[0], w.shape[2]))
    for g, (start, end) in enumerate(bounds(group_sizes)):
        y[start:end] = x[start:end] @ w[g]
    return y


def transposed(x, y, group_sizes):
    """[M, K], [M, N] -> [G, K, N]."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return np.stack([x[start:end].T @ y[start:end] for start, end in bounds(group_sizes)])


def silu(x):
    return x / (1 + np.exp(-x))


def gated(x, gate, up, group_sizes):
    return silu(product(x, gate, group_sizes)) * product(x, up, group_sizes)


def gated_gradients(x, gate, up, group_sizes, dy):
    """Gradients of x, gate and up."""
    a, b = product(x, gate, group_sizes), product(x, up, group_sizes)
    s = 1 / (1 + np.exp(-a))
    da, db = dy * b * s * (1 + a * (1 - s)), dy * a * s
    dx = product(da, np.swapaxes(gate, 1, 2), group_sizes) + product(db, np.swapaxes(up, 1, 2), group_sizes)
    return dx, transposed(x, da, group_sizes), transposed(x, db, group_sizes)


def close(got, expected, dtype="float32"):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    scale = max(np.abs(expected).max(initial=0.0), 1.0)
    np.testing.assert_allclose(got / scale, expected / scale, atol=TOLERANCE[dtype])


def sizes(kind: str, groups: int, rows: int, seed: int = 0) -> np.ndarray:
    """int32 sizes: "random", "some empty", "one" (all rows in one group), "none", or "short" of the rows."""
    rng = np.random.default_rng(seed)
    if kind in ("one", "none"):
        result = np.zeros(groups, np.int32)
        result[groups // 2] = rows if kind == "one" else 0
        return result
    shares = rng.dirichlet(np.ones(groups) * (0.3 if kind == "some empty" else 3))
    return rng.multinomial(rows - rows // 3 if kind == "short" else rows, shares).astype(np.int32)


KINDS = ("random", "some empty", "one", "none", "short")
