"""Cycles of TPU kernels without a TPU: read from the instruction schedule that libtpu made.

A TPU core issues one bundle of instructions a cycle, in an order fixed by the compiler, so that the length of a
kernel's schedule is its time, as long as memory keeps up. libtpu writes out the schedule as nested regions, each with
its cycles once through; how often a region runs is known where the grid is static, and is the caller's to say where
it hangs on data (a list of blocks): see `KernelReport.model`.
"""

import collections
import contextlib
import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pallas_kernels.compiler import libtpu, schedule


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one jax device of a family.

    Attributes:
      clock: in hertz, as fits published timings of these kernels; that of tpu7x is assumed.
      bandwidth: of its memory, bytes per second.
      flops: peak of bfloat16 multiplications and additions per second.
      cores: that share one program.
    """

    clock: float
    bandwidth: float
    flops: float
    cores: int = 1


CHIPS = {
    "v5e": Chip(1.5e9, 819e9, 197e12),
    "v5p": Chip(1.75e9, 2765e9, 459e12, cores=2),
    "v6e": Chip(1.75e9, 1640e9, 918e12),
    "tpu7x": Chip(1.9e9, 3690e9, 1153e12),
}


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """One fusion or Pallas kernel of a TPU program.

    Attributes:
      name: of the HLO instruction.
      pallas: is a Pallas kernel.
      regions: of its schedule, in the order of the program.
      slots: used and available instruction slots by unit, over the whole schedule, each instruction counted once.
      spills: vector registers stored to VMEM for want of registers (instructions, not executions).
      fills: and loaded back.
      bytes: of operands and results, which is the least that goes through memory.
      cores: that run it: 2 where its grid is divided over the cores of v5p.
    """

    name: str
    pallas: bool
    regions: tuple[schedule.Region, ...]
    slots: Mapping[str, tuple[int, int]]
    spills: int
    fills: int
    bytes: int
    cores: int

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "KernelReport":
        """The report of what `dataclasses.asdict` made of one."""
        slots = {unit: tuple(counts) for unit, counts in fields["slots"].items()}
        regions = tuple(schedule.Region(**region) for region in fields["regions"])
        return cls(**fields | {"slots": slots, "regions": regions})

    def region(self, ordinal: int) -> schedule.Region:
        """The region of that number."""
        return self._by_ordinal[ordinal]

    @property
    def grid(self) -> schedule.Region:
        """The loop over the grid: the longest of the loops that are in no other; the whole where there is none."""
        loops = [region for region in self.regions if region.loop and not self._loops_around(region)]
        return max(loops, key=lambda loop: loop.cycles, default=self.regions[0])

    @property
    def body(self) -> schedule.Region | None:
        """The part of the grid's loop that runs once a step, where the schedule shows one."""
        conditional = [region for region in self.branches(self.grid) if region.cycles > self.grid.cycles / 2]
        return conditional[0] if self.grid.loop and conditional else None

    @property
    def steps(self) -> int | None:
        """Steps of the grid on one core; None where they depend on data."""
        if self.grid.trips is None:
            return None
        return self.grid.trips - (2 if self.body else 0)

    def branches(self, loop: schedule.Region, share: float = 0.02) -> list[schedule.Region]:
        """Conditional regions of a loop in the order of the program, not those within others.

        Args:
          loop: the loop they are in, for example `grid`.
          share: leaves out those that take a smaller part of the loop's cycles, which start copies for example.
        """
        return [
            region
            for region in self.regions
            if region.conditional
            and region.cycles >= share * loop.cycles
            and self._closest(region, lambda other: other.loop or other.conditional) == loop.ordinal
        ]

    def loops(self, around: schedule.Region) -> list[schedule.Region]:
        """Loops directly within a region: not those within its loops."""
        return [
            region
            for region in self.regions
            if region.loop
            and around.ordinal in self._around(region)
            and self._closest(region, lambda other: other.loop or other == around) == around.ordinal
        ]

    def model(self, runs: Mapping[int, float] | None = None) -> float:
        """Cycles on one core.

        Args:
          runs: from the ordinal of a region to how many times it runs in the whole call. Of those left out, a loop
            with constant trips runs that often each time, the body of the grid once a step, and anything else as
            often as the region around it.

        Raises:
          LookupError: a loop whose trips are not in the schedule is not in `runs`.
        """
        count = self._counts(runs or {})
        return sum(count[region.ordinal] * own for region, own in self._own_cycles())

    def mxu(self, runs: Mapping[int, float] | None = None) -> float:
        """The part of `model(runs)` during which the matrix units multiply, the mean over the units."""
        total = self.regions[0].matmuls
        if not total:
            return 0.0
        count = self._counts(runs or {})
        inner = collections.Counter()
        for region in self.regions:
            inner[region.parent] += region.matmuls
        executed = sum(count[region.ordinal] * (region.matmuls - inner[region.ordinal]) for region in self.regions)
        busy = _share(self.slots, r"MXU_\d+ matmul") * self.regions[0].cycles / total
        return executed * busy / self.model(runs)

    def _counts(self, runs: Mapping[int, float]) -> dict[int | None, float]:
        body = self.body
        count: dict[int | None, float] = {None: 1.0}
        for region in sorted(self.regions, key=lambda region: len(self._around(region))):
            if region.ordinal in runs:
                count[region.ordinal] = runs[region.ordinal]
            elif region.loop and region.trips is None:
                raise LookupError(f"{self.name}: the trips of loop {region.ordinal} hang on data: give them")
            elif region.loop:
                count[region.ordinal] = count[region.parent] * region.trips
            elif body and region == body and body.parent == self.grid.ordinal and self.steps is not None:
                count[region.ordinal] = self.steps
            else:
                count[region.ordinal] = count[region.parent]
        return count

    def _own_cycles(self) -> Iterator[tuple[schedule.Region, int]]:
        """Regions with the cycles that are in none of their inner regions."""
        inner = collections.Counter()
        for region in self.regions:
            inner[region.parent] += region.cycles
        return ((region, region.cycles - inner[region.ordinal]) for region in self.regions)

    def _around(self, region: schedule.Region) -> list[int]:
        """Ordinals of the regions around one, the closest first."""
        found = []
        while region.parent is not None:
            found.append(region.parent)
            region = self._by_ordinal[region.parent]
        return found

    @functools.cached_property
    def _by_ordinal(self) -> dict[int, schedule.Region]:
        return {region.ordinal: region for region in self.regions}

    def _closest(self, region: schedule.Region, accept: Callable[[schedule.Region], bool]) -> int | None:
        return next((ordinal for ordinal in self._around(region) if accept(self.region(ordinal))), None)

    def _loops_around(self, region: schedule.Region) -> list[int]:
        return [ordinal for ordinal in self._around(region) if self.region(ordinal).loop]


@contextlib.contextmanager
def collect(cores: int) -> Iterator[list[KernelReport]]:
    """Yields a list that holds, after the block, the reports of the kernels that were compiled within it.

    Args:
      cores: that share a program on the device.

    Raises:
      RuntimeError: libtpu had been loaded before this package could ask for its schedules.
    """
    libtpu.clear_dumps()
    reports: list[KernelReport] = []
    yield reports
    files = list(libtpu.dumps().iterdir())
    if not files:
        raise RuntimeError(
            "libtpu wrote no schedule: something loaded it before pallas_kernels.compiler did; compile in a process "
            "that has not asked jax for TPUs, with JAX_PLATFORMS=cpu for example"
        )
    reports.extend(_read(files, cores))
    libtpu.clear_dumps()


def seconds(family: str, cycles: float, moved: float = 0) -> float:
    """The time of a kernel: of its cycles on one core, or of moving its bytes where that takes longer.

    Args:
      family: a key of `CHIPS`.
      cycles: on one core.
      moved: bytes between memory and the chip.
    """
    chip = CHIPS[family]
    return max(cycles / chip.clock, moved / chip.bandwidth)


def _read(files: list[pathlib.Path], cores: int) -> Iterator[KernelReport]:
    """Reports in the order of compilation, of the fusions and kernels that have a schedule."""
    types = _types("".join(file.read_text() for file in files if file.name.endswith("-TLP-hlo.txt")))
    profiles = "\n\n".join(file.read_text() for file in files if file.name.endswith("hlo-static-bundle-profile.txt"))
    expansions = {_kernel(file): file for file in files if file.name.endswith("-region-expansion.txt")}
    bundles = {_kernel(file): file for file in files if re.search(r"-\d\d-final_bundles", file.name)}
    for section in profiles.split("\n\n"):
        head = re.match(r"HLO: %(\S+) = (.*?[\])}]) ([\w-]+)\((.*?)\)(.*)", section)
        if not head or head.group(1) not in bundles:
            continue
        name, result, _, operands, attributes = head.groups()
        text = bundles[name].read_text()
        slots = {
            unit: (int(used), int(available))
            for unit, used, available in re.findall(r"^ - (.+?): \((\d+)/(\d+)\)", section, re.MULTILINE)
        }
        operand_types = [types.get(operand, "") for operand in re.findall(r"%([\w.\-]+)", operands)]
        yield KernelReport(
            name=name,
            pallas="tpu_custom_call" in attributes,
            regions=schedule.regions(text, expansions[name].read_text() if name in expansions else ""),
            slots=slots,
            spills=slots.get("VMEM_SPILL_COUNT", (0, 0))[0],
            fills=slots.get("VMEM_FILL_COUNT", (0, 0))[0],
            bytes=sum(_bytes(type_) for type_ in (result, *operand_types)),
            cores=1 if _first_core_only(text) else cores,
        )


def _kernel(file: pathlib.Path) -> str:
    """The instruction's name in `1795271970259452714-NAME-02-region-expansion.txt`."""
    return re.match(r"\d+-(.*)-\d\d-", file.name).group(1)


def _types(hlo: str) -> dict[str, str]:
    return dict(re.findall(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?[\])}]) [\w-]+\(", hlo, re.MULTILINE))


def _bytes(hlo_type: str) -> int:
    """Bytes of an array or a tuple of them, as `bf16[8,128]{1,0:T(8,128)}` writes it."""
    total = 0
    for name, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", hlo_type):
        bits = int((re.search(r"\d+", name) or ["8"])[0])
        total += math.prod(int(size) for size in shape.split(",") if size) * bits // 8
    return total


def _first_core_only(bundles: str) -> bool:
    """Whether the program begins by leaving all but core 0 idle."""
    core = re.search(r"(%s\S+) = sld \[smem:\S+\] /\* core id \*/", bundles)
    return bool(core) and f"scmp.ne.s32.totalorder {core.group(1)}, 0" in bundles


def _share(slots: Mapping[str, tuple[int, int]], pattern: str) -> float:
    """Used by available time over the units whose names match; kinds of instruction of one unit add up."""
    units = collections.defaultdict(float)
    for name, (used, available) in slots.items():
        if re.match(pattern, name) and available:
            units[name.split()[0]] += used / available
    return sum(units.values()) / len(units) if units else 0.0
