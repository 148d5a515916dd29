"""Whether a run can fit the devices that are here, before anything is put on them."""

import math
import os
from collections.abc import Sequence
from typing import Any

import jax

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.planning import memory
from scaling_jax.planning.slices import GIB
from scaling_jax.training import packed_step, step


def check_fits(run: RunConfig, devices: Sequence[Any] | None = None, slots: int = 1) -> None:
    """Refuses a run whose state and gradients alone are more than a device's memory.

    Args:
      run: its config.
      devices: those of the mesh, by default all.
      slots: how many runs of its shape are trained at a time.

    Raises:
      UserError: it cannot fit, by how much, and what may; or the mesh does not go with the devices
        or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    laid = meshes.make_mesh(run.mesh, devices)
    step.check_batch(laid, run.batch_size, run.microbatches)
    shape = laid.shape
    mesh = MeshConfig(shape["data"], shape["fsdp"], shape["tensor"], shape["slice"])
    needed = memory.estimate(run.model, run.batch_size, run.microbatches, mesh)
    groups = packed_step.group_count(laid, slots)
    # A device keeps the states of all its slots, and makes the gradients of one after another.
    least = needed.least + (slots // groups - 1) * needed.arguments
    mine = [device for device in devices if device in jax.local_devices()]
    limit = memory_bytes(mine[0]) if mine else None
    if limit is not None and least > limit:
        fewer = groups * int((limit - needed.gradients) // needed.arguments)
        what = run.model.label + (f" in {slots} slots" if slots > 1 else "")
        hint = _fewer_slots(fewer) if slots > 1 else _more_devices(mesh, least / limit)
        raise UserError(
            f"{what} cannot fit: parameters, moments and gradients are "
            f"{least / GIB:.1f} GiB a device, which has {limit / GIB:.1f} GiB; {hint}"
        )


def _fewer_slots(fewer: int) -> str:
    return f"slots={fewer} may do" if fewer > 1 else "one at a time, without slots, may do"


def _more_devices(mesh: MeshConfig, times: float) -> str:
    """What may do for a run that needs so many times the memory of a device of `mesh`."""
    enough = math.ceil(times * mesh.fsdp * mesh.tensor)
    if enough <= mesh.data * mesh.fsdp * mesh.tensor:
        return f"mesh.fsdp={mesh.data * mesh.fsdp} may do"
    return f"it takes {enough} such devices or more"


def memory_bytes(device: Any) -> int | None:
    """A device's memory; of a CPU's devices, which share it, a part; None where it is unknown."""
    if device.platform == "cpu":
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole // device.client.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")
