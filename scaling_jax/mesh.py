"""Where arrays live: the device mesh, and the one table from logical axis names to mesh axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_jax.config import MeshConfig
from scaling_jax.errors import UserError

# Along `slice` data crosses the data-centre network, along the others the links between chips.
AXES = ("slice", "data", "fsdp", "tensor")

# Parameters and activations name what their axes mean; this table alone says where that goes.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("slice", "data", "fsdp"),
    "length": None,
    "layer": None,
    "qkv": None,
    "gate_up": None,
    "gain": None,
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "activation": None,
}


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh of `config` over `devices` (all of them by default), neighbours next to each other.

    Raises:
      UserError: the axes do not multiply to the number of devices, or `slices` is not that of
        the devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [config.slices, config.data, config.fsdp, config.tensor]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size > 0)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        named = zip(("slices", *AXES[1:]), sizes, strict=True)
        wanted = ", ".join(f"{axis}={size}" for axis, size in named if axis != "slices" or size > 1)
        raise UserError(
            f"mesh: {wanted} makes {math.prod(sizes)} devices, but there are {len(devices)}"
        )
    placed = np.stack(
        [
            mesh_utils.create_device_mesh(sizes[1:], group, allow_split_physical_axes=True)
            for group in _by_slice(devices, config.slices)
        ]
    )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: Sequence[str]) -> PartitionSpec:
    """The partition of an array whose axes are called `names`.

    Raises:
      KeyError: a name is not in the table.
      ValueError: two axes of the array would go to the same mesh axis.
    """
    placed = [RULES[name] for name in names]
    used = [axis for axes in placed if axes for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"axes {tuple(names)} would use a mesh axis twice: {placed}")
    return PartitionSpec(*placed)


def sharding(mesh: Mesh, names: Sequence[str]) -> NamedSharding:
    """How an array whose axes are called `names` is spread over `mesh`."""
    return NamedSharding(mesh, spec(names))


def constrain(x: jax.Array, *names: str) -> jax.Array:
    """Tells the compiler how to spread an activation; without a mesh in force, does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _free(mesh) or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _within(_free(mesh), names))


def free_axes(name: str) -> tuple[str, ...]:
    """The mesh axes that split axis `name` here, other than those already split by hand.

    Raises:
      KeyError: the name is not in the table.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in RULES[name] or () if axis in _free(mesh) and mesh.shape[axis] > 1)


def free_parts(name: str) -> int:
    """Into how many parts the `free_axes` split axis `name`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in free_axes(name))


def on_each_device(
    function: Callable[..., Any], inputs: Sequence[Sequence[str]], outputs: Any
) -> Callable[..., Any]:
    """`function` run by every device on its own part; as it is where nothing is split.

    `inputs` and `outputs` name the axes of each array, as for `spec`; outputs that no axis splits
    must be equal on all devices. Within the function, sums over devices are its own business.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = _free(mesh)
    if not free or mesh.size == 1:
        return function
    return jax.shard_map(
        function,
        in_specs=tuple(_within(free, names) for names in inputs),
        out_specs=jax.tree.map(lambda names: _within(free, names), outputs, is_leaf=_is_names),
        axis_names=free,
        check_vma=False,
    )


def mean_over_copies(
    function: Callable[..., Any], inputs: Sequence[Sequence[str]]
) -> Callable[..., Any]:
    """The mean of what `function` gives for each copy of the parameters, made once it is done.

    Devices that share a copy work together as the compiler sees fit. `inputs` name the axes of each
    array, or of all arrays of a tree, as for `spec`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sharing = {axis for name, axes in RULES.items() if name != "batch" for axis in axes or ()}
    copies = {axis for axis in free_axes("batch") if axis not in sharing}
    if not copies:
        return function

    def local(*arrays: Any) -> Any:
        return jax.lax.pmean(function(*arrays), tuple(copies))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=tuple(_within(copies, names) for names in inputs),
        out_specs=PartitionSpec(),
        axis_names=copies,
        check_vma=False,
    )


def splits(mesh: Mesh, name: str) -> dict[str, int]:
    """The mesh axes that split an axis called `name`, and into how many parts each.

    A single slice is left out: what has one needs no word on it.
    """
    sizes = {axis: mesh.shape[axis] for axis in RULES[name] or ()}
    return {axis: size for axis, size in sizes.items() if axis != "slice" or size > 1}


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(splits(mesh, "batch").values())


def check_divisible(mesh: Mesh, what: str, size: int, name: str) -> None:
    """Raises a UserError if an axis of length `size`, called `name`, cannot be split evenly."""
    parts = splits(mesh, name)
    if size % math.prod(parts.values()):
        axes = " x ".join(f"{axis}={count}" for axis, count in parts.items())
        raise UserError(f"{what}={size} cannot be split evenly over the mesh ({axes})")


def _by_slice(devices: list[Any], slices: int) -> list[list[Any]]:
    """`devices` in equal groups, those of a TPU slice together."""
    groups: dict[int, list[Any]] = {}
    for device in devices:
        groups.setdefault(getattr(device, "slice_index", 0) or 0, []).append(device)
    if len(groups) == slices:
        if len({len(group) for group in groups.values()}) > 1:
            counts = ", ".join(str(len(groups[index])) for index in sorted(groups))
            raise UserError(f"mesh: slices of unequal size ({counts} devices) make no mesh")
        return [groups[index] for index in sorted(groups)]
    if len(groups) > 1 and devices[0].platform == "tpu":
        raise UserError(f"mesh: slices={slices}, but the devices lie in {len(groups)} slices")
    size = len(devices) // slices
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _free(mesh: AbstractMesh) -> set[str]:
    """The axes of `mesh` that are left to the compiler."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {axis for axis, kind in kinds if kind == AxisType.Auto}


def _within(axes: set[str], names: Sequence[str]) -> PartitionSpec:
    """`spec`, of these mesh axes alone."""
    spec(names)
    return PartitionSpec(
        *(tuple(axis for axis in RULES[name] or () if axis in axes) or None for name in names)
    )


def _is_names(node: Any) -> bool:
    return isinstance(node, tuple) and all(isinstance(name, str) for name in node)
