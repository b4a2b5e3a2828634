"""The nested regions of a kernel's schedule, from the text that libtpu writes of it."""

import dataclasses
import re

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+|0)\s+(?:[LPC][HBEFT])?\s*:\s*[> ]*\{", re.MULTILINE)
_EVENT = re.compile(r"(Start/End empty region|Start region|End region) (\d+)")
_BRANCH = re.compile(r"sbr\.rel (\(\S+?\) )?target = \$region(\d+)")
_EXIT = re.compile(r"(%p\S+) = scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test \*/")
_CYCLES = re.compile(r"^ordinal=(\d+) before=\d+ after=(\d+)", re.MULTILINE)
_MATMUL = re.compile(r"= vmatmul\S*")
# The compiler moves instructions of a branch up beside the jump over it, and a jump takes some bundles to act.
_SLACK = 16


@dataclasses.dataclass(frozen=True)
class Region:
    """A stretch of the schedule; regions nest.

    Attributes:
      ordinal: libtpu's number of the region.
      cycles: once through, inner regions included, each once.
      parent: ordinal of the smallest region around it; None for the outermost.
      loop: ends in a branch back to its start.
      trips: how often a loop's body runs each time the loop is entered, where its bound is a constant, counted from 0.
        Pallas runs the loop over a grid twice more than there are steps, to wait for its last copies.
      conditional: may be jumped over.
      matmuls: matrix-multiplication instructions in it, inner regions included.
    """

    ordinal: int
    cycles: int
    parent: int | None
    loop: bool
    trips: int | None
    conditional: bool
    matmuls: int


def regions(bundles: str, expansion: str) -> tuple[Region, ...]:
    """The regions of a kernel in the order of its program.

    Args:
      bundles: the text of its final bundles.
      expansion: the text that gives cycles by region; a region that is not in it takes one cycle a bundle.
    """
    texts = _bundle_texts(bundles)
    extents = _extents(texts)
    cycles = {int(ordinal): int(after) for ordinal, after in _CYCLES.findall(expansion)}
    matmuls = [len(_MATMUL.findall(text)) for text in texts]
    parents = _parents(extents)
    loops, skipped = _branches(texts, extents, parents)
    found = []
    for ordinal, (start, end) in extents.items():
        found.append(
            Region(
                ordinal=ordinal,
                cycles=cycles.get(ordinal, end - start + 1),
                parent=parents[ordinal],
                loop=ordinal in loops,
                trips=loops.get(ordinal),
                conditional=ordinal in skipped,
                matmuls=sum(matmuls[start : end + 1]),
            )
        )
    return tuple(found)


def _bundle_texts(bundles: str) -> list[str]:
    starts = [match.start() for match in _BUNDLE.finditer(bundles)]
    return [bundles[start:end] for start, end in zip(starts, [*starts[1:], len(bundles)], strict=True)]


def _extents(texts: list[str]) -> dict[int, tuple[int, int]]:
    """First and last bundle of each region, outer before inner; the outermost is 0."""
    starts, ends = {0: 0}, {0: len(texts) - 1}
    for index, text in enumerate(texts):
        for event, ordinal in _EVENT.findall(text):
            if event != "End region":
                starts.setdefault(int(ordinal), index)
            if event != "Start region":
                ends[int(ordinal)] = index
    return {ordinal: (start, ends.get(ordinal, start)) for ordinal, start in starts.items()}


def _branches(
    texts: list[str], extents: dict[int, tuple[int, int]], parents: dict[int, int | None]
) -> tuple[dict[int, int | None], set[int]]:
    """Loops with their constant trips, and regions that a conditional jump leaves out."""
    loops: dict[int, int | None] = {}
    skipped: set[int] = set()
    bounds = {predicate: int(bound) for text in texts for predicate, bound in _EXIT.findall(text)}
    for index, text in enumerate(texts):
        for condition, target in _BRANCH.findall(text):
            to = extents.get(int(target), (None, None))[0]
            if to is None:
                continue
            if to <= index:
                loops[int(target)] = bounds.get(condition.strip("(!) "))
            elif condition:
                inside = {ordinal for ordinal, extent in extents.items() if _jumped_over(extent, index, to)}
                skipped.update(ordinal for ordinal in inside if parents[ordinal] not in inside)
    return loops, skipped


def _jumped_over(extent: tuple[int, int], jump: int, to: int) -> bool:
    start, end = extent
    return jump - _SLACK <= start and jump < end < to and end - max(start, jump) >= (end - start) / 2


def _parents(extents: dict[int, tuple[int, int]]) -> dict[int, int | None]:
    """The smallest region around each; of two with the same extent the one started first is around the other."""
    order = {ordinal: index for index, ordinal in enumerate(extents)}
    longest_first = sorted(extents, key=lambda o: (extents[o][0] - extents[o][1], order[o]))
    parents: dict[int, int | None] = {}
    for index, ordinal in enumerate(longest_first):
        start, end = extents[ordinal]
        around = (o for o in reversed(longest_first[:index]) if extents[o][0] <= start and end <= extents[o][1])
        parents[ordinal] = next(around, None)
    return parents
