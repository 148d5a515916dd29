"""What a compiled program sends between devices, read from its HLO text."""

import dataclasses
import math
import re
from collections.abc import Iterator

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
BETWEEN_SLICES = "between-slices"

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) .*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?[=:]\{"n":"(\d+)"')
_WHILE = re.compile(r" while\(.*condition=%?([\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One array that one instruction sends between devices.

    Attributes:
      kind: one of `KINDS`, or `BETWEEN_SLICES` for what a TPU slice sends to the others.
      dtype: its element type, as in HLO: f32, bf16, ...
      shape: of the array on one device, before it is scattered or after it is gathered.
      bytes: of that array; not of what travels, which depends on the algorithm.
      devices: how many take part in one group; 0 where the program does not say.
      in_loop: it is repeated by a loop.
      repeats: how often it is done in one run of the program. Loops of unknown length count once;
        a round that the compiler has moved out of a loop may be counted once too often.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    devices: int
    in_loop: bool
    repeats: int


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of `compiled.as_text()`, in the order of the text.

    What TPU's compiler fuses or splits is counted as the one operation that it was.
    """
    computations = dict(_computations(hlo_text))
    loops = _loops(computations)
    found, chains = [], set()
    for name, lines in computations.items():
        if name not in loops:
            continue  # Nothing calls it.
        in_loop, repeats = loops[name]
        for line in lines:
            match = _COLLECTIVE.search(line)
            if match is None:
                found += _between_slices(line, in_loop, repeats)
                continue
            # One that is done in steps, beside other work, stands in the fusion of every step.
            chain = tuple(re.findall(r'channel_id=\d+|chain_id="\d+"', line))
            if len(chain) == 2 and chain in chains:
                continue
            chains.add(chain)
            kind, devices = match[2], _devices(line)
            scattered = kind == "reduce-scatter"
            if "all-reduce-scatter" in name:
                kind = "reduce-scatter"
            for dtype, shape in _results(match[1], kind, started=bool(match[3])):
                size = math.prod(shape) * _bits(dtype) // 8 * (devices if scattered else 1)
                found.append(Collective(kind, dtype, shape, size, devices, in_loop, repeats))
    return found


def array_shapes(hlo_text: str, dtype: str) -> set[tuple[int, ...]]:
    """The shapes of all arrays of a type that occur in a program, those inside fusions too."""
    return {_dimensions(text) for found, text in _SHAPE.findall(hlo_text) if found == dtype}


def _between_slices(line: str, in_loop: bool, repeats: int) -> list[Collective]:
    """What a line hands over to the runtime that connects slices."""
    if " send(" not in line or "megascale" not in line:
        return []
    dtype, text = _SHAPE.findall(line)[0]
    size = math.prod(_dimensions(text)) * _bits(dtype) // 8
    return [Collective(BETWEEN_SLICES, dtype, _dimensions(text), size, 0, in_loop, repeats)]


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each computation's name and lines; that of the entry is ''."""
    name, lines = None, []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header:
            name, lines = "" if line.startswith("ENTRY") else header[1], []
        elif line.rstrip() == "}" and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(re.sub(r"/\*.*?\*/", "", line))


def _loops(computations: dict[str, list[str]]) -> dict[str, tuple[bool, int]]:
    """Of each computation that is reached: whether a loop repeats it, and how often it runs."""
    found = {"": (False, 1)}
    open_ends = [""]
    while open_ends:
        caller = open_ends.pop()
        in_loop, repeats = found[caller]
        for line in computations.get(caller, ()):
            trips = _trips(line, computations)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [("branch", name.strip(" %")) for name in branches.split(",")]
            for role, name in called:
                loop = role in ("body", "condition")
                reached = (in_loop or loop, repeats * (trips if loop else 1))
                if name in computations and found.get(name, (False, 0)) < reached:
                    found[name] = reached
                    open_ends.append(name)
    return found


def _trips(line: str, computations: dict[str, list[str]]) -> int:
    """How often the loop of a line goes round, where it is said or its condition has one bound."""
    if said := _TRIPS.search(line):
        return int(said[1])
    if loop := _WHILE.search(line):
        condition = "".join(computations.get(loop[1], ()))
        bounds = re.findall(r" s32\[\]\S* constant\((\d+)\)", condition)
        if len(bounds) == 1 and "direction=LT" in condition:
            return int(bounds[0])
    return 1


def _results(kind_of_result: str, kind: str, started: bool) -> list[tuple[str, tuple[int, ...]]]:
    """Type and shape of each array that comes out."""
    shapes = [(dtype, _dimensions(text)) for dtype, text in _SHAPE.findall(kind_of_result)]
    if started and kind == "collective-permute":
        return shapes[1:2]
    if started and kind != "all-reduce":
        # What goes in stands before what comes out.
        return shapes[len(shapes) // 2 :]
    return shapes


def _dimensions(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])


def _devices(line: str) -> int:
    """How many devices one group has, in each of the notations of `replica_groups`."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return 1
