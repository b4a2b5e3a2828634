"""What ptxas says of a Mosaic GPU kernel, and what its PTX holds."""

import contextlib
import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

_DUMP = "MOSAIC_GPU_DUMP_TO"
_HASH = re.compile(r'custom_call_target="mosaic_gpu_v2".*?\bkernel_hash = "((?:[^"\\]|\\.)*)"')


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One Mosaic GPU kernel.

    Attributes:
      name: of the entry function.
      registers: of each thread at launch. A warpgroup that calls `set_max_registers` changes its own share.
      spill_stores: bytes stored to local memory for want of registers.
      spill_loads: bytes loaded back.
      stack: bytes of the stack frame.
      static_shared_memory: bytes; the dynamic part, which holds the buffers of the kernel, is asked for at launch.
      barriers: named barriers.
      wgmma: `wgmma.mma_async` instructions in the PTX (of the code, not of a run).
      warnings: lines of ptxas that are neither information nor measurements, for example that wgmma was serialised.
    """

    name: str
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared_memory: int
    barriers: int
    wgmma: int
    warnings: tuple[str, ...]

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "KernelReport":
        """The report of what `dataclasses.asdict` made of one."""
        return cls(**fields | {"warnings": tuple(fields["warnings"])})


@contextlib.contextmanager
def collect() -> Iterator[list[KernelReport]]:
    """Yields a list that holds, after the block, the reports of the kernels that were compiled within it."""
    reports: list[KernelReport] = []
    before = os.environ.get(_DUMP)
    with tempfile.TemporaryDirectory(prefix="pallas_kernels_") as folder:
        os.environ[_DUMP] = folder
        try:
            yield reports
        finally:
            os.environ.pop(_DUMP) if before is None else os.environ.update({_DUMP: before})
        reports.extend(parse(file.read_text(), file.with_suffix(".ptx").read_text()) for file in _ordered(folder))


def parse(ptxas: str, ptx: str) -> KernelReport:
    """The report of one kernel, from what ptxas printed for it and from its PTX."""

    def number(pattern: str) -> int:
        found = re.search(pattern, ptxas)
        return int(found.group(1)) if found else 0

    name = re.search(r"Compiling entry function '(\w+)'", ptxas)
    return KernelReport(
        name=name.group(1) if name else "",
        registers=number(r"Used (\d+) registers"),
        spill_stores=number(r"(\d+) bytes spill stores"),
        spill_loads=number(r"(\d+) bytes spill loads"),
        stack=number(r"(\d+) bytes stack frame"),
        static_shared_memory=number(r"(\d+) bytes smem"),
        barriers=number(r"used (\d+) barriers"),
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        warnings=tuple(
            line.strip()
            for line in ptxas.splitlines()
            if line.strip() and not re.match(r"ptxas info\s+: (?!\(C)|\s+\d+ bytes stack", line)
        ),
    )


def of_program(text: str, compiled: Sequence[KernelReport], known: dict[str, KernelReport]) -> tuple[KernelReport, ...]:
    """The reports of all kernels of a program, of those too that jax had compiled before: it dumps a kernel only once.

    Args:
      text: the optimised HLO, whose calls of kernels come in the order in which they are compiled.
      compiled: the reports of the kernels that were compiled for this program.
      known: reports by the kernel's hash, to which these are added.

    Raises:
      LookupError: the process has compiled one of the kernels without `collect`.
    """
    hashes = list(dict.fromkeys(_HASH.findall(text)))
    new = [each for each in hashes if each not in known]
    if len(new) != len(compiled):
        problem = f"{len(new) - len(compiled)} of {len(hashes)} kernels were compiled earlier in this process, unseen"
        raise LookupError(f"{problem}; compile this program in another")
    known.update(zip(new, compiled, strict=True))
    return tuple(known[each] for each in hashes)


def _ordered(folder: str) -> list[pathlib.Path]:
    return sorted(pathlib.Path(folder).glob("*.ptxas"), key=lambda file: file.stat().st_mtime_ns)
