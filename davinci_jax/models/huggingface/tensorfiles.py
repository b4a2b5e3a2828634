"""The tensors of a folder of safetensors files, checked by their headers and read slice by slice."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re

import ml_dtypes
import numpy as np
import safetensors

from davinci_jax.errors import CheckpointError
from davinci_jax.models.huggingface import layout

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Constants that transformers once stored with Llama weights; they follow from the config.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: file, first byte, dtype name of safetensors, shape."""

    file: pathlib.Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def view(self) -> np.ndarray:
        """The tensor as a read-only view of the file: only the parts that are copied out are read.

        The file is mapped anew for every view, so pages already read are released with the view and the memory of
        the process does not grow to a second copy of the model.
        """
        return np.memmap(self.file, DTYPES[self.dtype], "r", self.offset, self.shape)


def find(folder: str | pathlib.Path) -> dict[str, StoredTensor]:
    """Finds the tensors of model.safetensors or of the files that model.safetensors.index.json lists.

    Raises:
      CheckpointError: no such files, a damaged file, or an index that does not fit its files.
    """
    folder = pathlib.Path(folder)
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    if not (folder / INDEX).is_file():
        remedy = "convert pickled weights (*.bin) to safetensors with transformers first; pickle is never loaded"
        raise CheckpointError(str(folder), None, f"holds neither {SINGLE} nor {INDEX}", remedy)
    where = _index(folder / INDEX)
    missing = sorted({file for file in where.values() if not (folder / file).is_file()})
    if missing:
        problem = f"lists files that are missing: {_shown(missing)}"
        raise CheckpointError(str(folder / INDEX), None, problem, "download them again")
    headers = {file: _header(folder / file) for file in sorted(set(where.values()))}
    lost = [f"{name} in {file}" for name, file in where.items() if name not in headers[file]]
    twice = [name for file, header in headers.items() for name in header if where.get(name) != file]
    if lost or twice:
        parts = [f"{kind}: {_shown(names)}" for kind, names in (("not there", lost), ("not listed", twice)) if names]
        problem = f"does not fit its files ({'; '.join(parts)})"
        raise CheckpointError(str(folder / INDEX), None, problem, "download the folder again")
    return {name: headers[file][name] for name, file in where.items()}


def check(found: dict[str, StoredTensor], wanted: list[layout.Entry], folder: str | pathlib.Path) -> None:
    """Raises one `CheckpointError` that lists missing, unexpected and misshapen tensors and wrong dtypes, if any.

    A second copy of tied embeddings (`lm_head.weight`) passes if it equals the embedding.
    """
    shapes = {entry.name: entry.shape for entry in wanted}
    extra = [name for name in found if name not in shapes and not _DERIVED.fullmatch(name)]
    tied = layout.HEAD not in shapes and layout.HEAD in extra
    if tied:
        extra.remove(layout.HEAD)
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    used = [name for name in (*shapes, layout.HEAD) if name in found]
    dtypes = [f"{name} {found[name].dtype}" for name in used if found[name].dtype not in DTYPES]
    troubles = {
        "missing": [name for name in shapes if name not in found],
        "unexpected": extra,
        "wrong shape": wrong,
        f"dtype other than {', '.join(DTYPES)}": dtypes,
    }
    told = [f"{len(names)} {kind}: {_shown(names)}" for kind, names in troubles.items() if names]
    if told:
        remedy = "use the config.json that belongs to these weights"
        raise CheckpointError(str(folder), None, f"the tensors do not fit config.json ({'; '.join(told)})", remedy)
    if tied and not _equal(found[layout.HEAD], found["model.embed_tokens.weight"]):
        problem = "differs from model.embed_tokens.weight, but config.json ties them"
        remedy = "set tie_word_embeddings to false in config.json if the head is its own"
        raise CheckpointError(f"{folder}: {layout.HEAD}", None, problem, remedy)


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    # By bytes, so that a NaN equals itself, and in blocks, so that memory stays small.
    x, y = a.view().view(np.uint8), b.view().view(np.uint8)
    return all(np.array_equal(x[i : i + rows], y[i : i + rows]) for i in range(0, a.shape[0], rows))


def _header(file: pathlib.Path) -> dict[str, StoredTensor]:
    try:
        with safetensors.safe_open(file, framework="np"):  # checks that header, offsets and length of the file agree
            pass
        with open(file, "rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        problem = f"is damaged or no safetensors file ({error})"
        raise CheckpointError(str(file), None, problem, "download it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + size + info["data_offsets"][0], info["dtype"], tuple(info["shape"]))
        for name, info in header.items()
    }


def _index(path: pathlib.Path) -> dict[str, str]:
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        problem = 'is no JSON object with a "weight_map"'
        raise CheckpointError(str(path), None, problem, "download it again") from None
    # A file name is data from a download; it must not lead out of the folder.
    outside = sorted({file for file in entries.values() if pathlib.PurePath(file).name != file or file in ("", "..")})
    if outside:
        problem = f"names files outside its folder: {_shown(outside)}"
        raise CheckpointError(str(path), None, problem, "do not use this folder")
    return entries


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
