"""Writes the recorded trajectories of torch's optimizers that the default tests compare with.

Usage: python tests/references/make_optimizer_references.py   (needs the extra `parity`; written with torch 2.13.0)

Each file holds float32 arrays: `start/<name>`, `gradient/<step>/<name>` and `result/<step>/<name>`, the parameters
after that step. Muon is recorded twice: as published, with a bfloat16 iteration, and in float64 throughout.
"""

from __future__ import annotations

import contextlib
import pathlib
from unittest import mock

import numpy as np
import torch
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent / "optimizers"
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MUON = {"lr": 1e-2, "momentum": 0.95, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
STEPS = 4


def trajectory(make, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Returns start, gradients and results of `STEPS` steps of the optimizer `make(parameters)`."""
    draw = np.random.default_rng(0)
    parameters = {name: torch.tensor(draw.normal(size=shape), dtype=dtype) for name, shape in shapes.items()}
    record = {f"start/{name}": value.numpy().astype(np.float32) for name, value in parameters.items()}
    parameters = {name: torch.tensor(record[f"start/{name}"], dtype=dtype) for name in shapes}
    optimizer = make(list(parameters.values()))
    for step in range(STEPS):
        for name, value in parameters.items():
            record[f"gradient/{step}/{name}"] = draw.normal(size=shapes[name]).astype(np.float32)
            value.grad = torch.tensor(record[f"gradient/{step}/{name}"], dtype=dtype)
        optimizer.step()
        for name, value in parameters.items():
            record[f"result/{step}/{name}"] = value.numpy().astype(np.float32)
    return record


def adamw() -> dict[str, np.ndarray]:
    """A trajectory of torch.optim.AdamW in float64, matrices decayed, the vector not."""
    shapes = {"kernel": (6, 4), "norm": (5,)}

    def make(parameters):
        return torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "weight_decay": 0.0}], **ADAMW)

    return trajectory(make, shapes, torch.float64)


def muon(float64: bool) -> dict[str, np.ndarray]:
    """A trajectory of torch.optim.Muon on a wide, a tall and a square matrix."""
    shapes = {"wide": (6, 20), "tall": (20, 6), "square": (8, 8)}
    exact = mock.patch.object(torch.Tensor, "bfloat16", lambda self: self.clone())
    with exact if float64 else contextlib.nullcontext():
        return trajectory(
            lambda parameters: torch.optim.Muon(parameters, **MUON), shapes, torch.float64 if float64 else torch.float32
        )


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    save_file(adamw(), FOLDER / "adamw.safetensors")
    save_file(muon(float64=True), FOLDER / "muon_float64.safetensors")
    save_file(muon(float64=False), FOLDER / "muon_bfloat16.safetensors")
