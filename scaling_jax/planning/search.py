"""The fastest way to spread a run over TPU chips among those that fit into their memory.

Searched are, where they are left free, the mesh axes data, fsdp and tensor, the microbatches and
the remat policy: none of them changes a run's result. What fits is decided by `memory`, what is
fast by `estimate`.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from scaling_jax.config import MeshConfig, ModelConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.planning import estimate, memory
from scaling_jax.planning.estimate import StepTime
from scaling_jax.planning.memory import Memory
from scaling_jax.planning.slices import GIB, SLICES, Chip, Slice

# The rest of a chip's memory is for what the formulas leave out, up to 9 % where it was measured.
USABLE = 0.9
REMATS = ("none", "dots", "block")


@dataclasses.dataclass(frozen=True)
class Machine:
    """`slices` TPU slices of equal size with `chips` each, and what a user calls them."""

    name: str
    chip: Chip
    chips: int
    slices: int = 1

    @classmethod
    def of(cls, one: Slice, count: int = 1) -> "Machine":
        """`count` slices like `one`."""
        return cls(f"{count} x {one.name}" if count > 1 else one.name, one.chip, one.chips, count)


@dataclasses.dataclass(frozen=True)
class Free:
    """What is searched; the rest stays as the config has it."""

    mesh: bool = True
    microbatches: bool = True
    remat: bool = True

    @classmethod
    def unstated(cls, content: Mapping[str, Any]) -> "Free":
        """What a run's config, as it was written, does not say."""
        model, mesh = content.get("model"), content.get("mesh") or {}
        return cls(
            mesh=not set(mesh) - {"slices"},
            microbatches="microbatches" not in content,
            remat=not (isinstance(model, Mapping) and "remat" in model),
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way to spread a run: its settings, its memory on one chip, and the time of a step."""

    model: ModelConfig
    batch_size: int
    microbatches: int
    mesh: MeshConfig
    memory: Memory
    time: StepTime

    @property
    def settings(self) -> dict[str, int | str]:
        """What to give `train` to have it: setting -> value."""
        mesh = {f"mesh.{axis}": size for axis, size in dataclasses.asdict(self.mesh).items()}
        if self.mesh.slices == 1:
            del mesh["mesh.slices"]
        return mesh | {"microbatches": self.microbatches, "model.remat": self.model.remat}


def search(run: RunConfig, machine: Machine, free: Free, mfu: float) -> list[Layout]:
    """Every layout of `run` that fits `machine`, fastest first.

    Raises:
      UserError: the mesh or the batch does not go with the chips; or nothing fits: by how much,
        and what would.
    """
    layouts = list(_layouts(run, machine, free, mfu))
    fitting = [layout for layout in layouts if _fits(layout, machine.chip)]
    if not fitting:
        raise UserError(_what_is_missing(run, machine, free, layouts, mfu))
    return sorted(fitting, key=_rank)


def _layouts(run: RunConfig, machine: Machine, free: Free, mfu: float) -> Iterator[Layout]:
    """All layouts that divide evenly, whether they fit or not.

    Raises:
      UserError: there is none.
    """
    meshes = list(_meshes(machine)) if free.mesh else [resolve(run.mesh, machine)]
    parts = _divisors(run.batch_size) if free.microbatches else [run.microbatches]
    fault, found = None, False
    for mesh, microbatches in itertools.product(meshes, parts):
        reason = _unevenness(run.model, run.batch_size, microbatches, mesh)
        if reason:
            fault = fault or reason
            continue
        found = True
        for remat in REMATS if free.remat else (run.model.remat,):
            model = dataclasses.replace(run.model, remat=remat)
            settings = (model, run.batch_size, microbatches, mesh)
            yield Layout(
                *settings,
                memory.estimate(*settings),
                estimate.step_time(*settings, chip=machine.chip, mfu=mfu),
            )
    if not found:
        chips = machine.chips * machine.slices
        hint = ": a smaller slice or a larger batch would do" if free.mesh else ""
        raise UserError(f"{run.model.label} on the {chips} chips of {machine.name}: {fault}{hint}")


def resolve(mesh: MeshConfig, machine: Machine) -> MeshConfig:
    """`mesh` with its -1, if it has one, filled in for the chips of `machine`.

    Raises:
      UserError: the axes do not multiply to the number of chips.
    """
    sizes = {"data": mesh.data, "fsdp": mesh.fsdp, "tensor": mesh.tensor}
    known = 1
    for size in sizes.values():
        known *= max(size, 1)
    sizes = {axis: machine.chips // known if size < 0 else size for axis, size in sizes.items()}
    product = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    if product != machine.chips:
        wanted = ", ".join(f"{axis}={size}" for axis, size in dataclasses.asdict(mesh).items())
        raise UserError(
            f"mesh: {wanted} cannot be laid on {machine.name}, which has {machine.chips} chips"
            + (" a slice" if machine.slices > 1 else "")
        )
    return MeshConfig(**sizes, slices=machine.slices)


def _meshes(machine: Machine) -> Iterator[MeshConfig]:
    for fsdp in _divisors(machine.chips):
        for tensor in _divisors(machine.chips // fsdp):
            yield MeshConfig(machine.chips // (fsdp * tensor), fsdp, tensor, machine.slices)


def _unevenness(
    model: ModelConfig, batch_size: int, microbatches: int, mesh: MeshConfig
) -> str | None:
    """The first thing that the mesh cannot split evenly, in words; None where there is none."""
    parts = mesh.slices * mesh.data * mesh.fsdp
    if batch_size % (parts * microbatches):
        return (
            f"batch_size={batch_size} cannot be split evenly into {parts} parts (data x fsdp) "
            f"of {microbatches} microbatches"
        )
    for what, size, axis, devices in (
        ("width", model.width, "fsdp", mesh.fsdp),
        ("heads", model.heads, "tensor", mesh.tensor),
        ("hidden width", model.hidden_width, "tensor", mesh.tensor),
        ("vocabulary_size", model.vocabulary_size, "tensor", mesh.tensor),
    ):
        if size % devices:
            return f"{what}={size} cannot be split evenly over {axis}={devices}"
    return None


def _fits(layout: Layout, chip: Chip) -> bool:
    return layout.memory.peak <= USABLE * chip.hbm_bytes


def _rank(layout: Layout) -> tuple[float, int, float]:
    """Time first; of equals the simpler, then the smaller."""
    return layout.time.total, layout.microbatches, layout.memory.peak


def _what_is_missing(
    run: RunConfig, machine: Machine, free: Free, layouts: list[Layout], mfu: float
) -> str:
    """One line: by how much the smallest layout is too large, and the nearest thing that fits."""
    smallest = min(layouts, key=lambda layout: layout.memory.peak)
    most = USABLE * machine.chip.hbm_bytes
    line = (
        f"{run.model.label} does not fit {machine.name}: {smallest.memory.peak / GIB:.1f} GiB a "
        f"chip at the least, {(smallest.memory.peak - most) / GIB:.1f} GiB more than "
        f"{USABLE:.0%} of its {machine.chip.hbm_bytes / GIB:.0f} GiB"
    )
    return f"{line}; {_what_would_fit(run, machine, free, mfu)}"


def _what_would_fit(run: RunConfig, machine: Machine, free: Free, mfu: float) -> str:
    everything = Free()
    if free != everything and (fitting := _fitting(run, machine, everything, mfu)):
        changed = {
            name: value
            for name, value in min(fitting, key=_rank).settings.items()
            if value != _current(run, name)
        }
        return "what fits: " + " ".join(f"{name}={value}" for name, value in changed.items())
    same = sorted(SLICES.values(), key=lambda each: (each.chip != machine.chip, each.chips))
    for other in same:
        if other.chip == machine.chip and other.chips <= machine.chips:
            continue
        if _fitting(run, Machine.of(other, machine.slices), everything, mfu):
            return f"{other.name} would fit"
    return "no slice would fit"


def _fitting(run: RunConfig, machine: Machine, free: Free, mfu: float) -> list[Layout]:
    try:
        layouts = list(_layouts(run, machine, free, mfu))
    except UserError:
        return []
    return [layout for layout in layouts if _fits(layout, machine.chip)]


def _current(run: RunConfig, name: str) -> Any:
    value: Any = run
    for key in name.split("."):
        value = getattr(value, key)
    return value


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
