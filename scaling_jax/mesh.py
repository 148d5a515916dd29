"""Where arrays live: the device mesh, and the one table from logical axis names to mesh axes."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from scaling_jax.config import MeshConfig
from scaling_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Parameters and activations name what their axes mean; this table alone says where that goes.
RULES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
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
    """The mesh of `config` over `devices` (all of them by default).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in AXES]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size > 0)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise UserError(
            f"mesh: {wanted} makes {math.prod(sizes)} devices, but there are {len(devices)}"
        )
    return Mesh(np.array(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


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
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def check_divisible(mesh: Mesh, what: str, size: int, name: str) -> None:
    """Raises a UserError if an axis of length `size`, called `name`, cannot be split evenly."""
    parts = math.prod(mesh.shape[axis] for axis in RULES[name] or ())
    if size % parts:
        axes = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in RULES[name] or ())
        raise UserError(f"{what}={size} cannot be split evenly over the mesh ({axes})")
