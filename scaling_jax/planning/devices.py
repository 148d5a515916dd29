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
from scaling_jax.training import step


def check_fits(run: RunConfig, devices: Sequence[Any] | None = None) -> None:
    """Refuses a run whose state and gradients alone are more than a device's memory.

    Args:
      run: its config.
      devices: those of the mesh, by default all.

    Raises:
      UserError: it cannot fit, by how much, and what may; or the mesh does not go with the devices
        or the batch.
    """
    devices = list(jax.devices() if devices is None else devices)
    laid = meshes.make_mesh(run.mesh, devices)
    step.check_batch(laid, run.batch_size, run.microbatches)
    shape = laid.shape
    mesh = MeshConfig(shape["data"], shape["fsdp"], shape["tensor"], shape["slice"])
    least = memory.estimate(run.model, run.batch_size, run.microbatches, mesh).least
    mine = [device for device in devices if device.process_index == jax.process_index()]
    limit = memory_bytes(mine[0]) if mine else None
    if limit is not None and least > limit:
        split, most = mesh.fsdp * mesh.tensor, len(devices) // mesh.slices
        enough = math.ceil(least * split / limit)
        hint = (
            f"mesh.fsdp={most // mesh.tensor} may do"
            if enough <= most
            else f"it takes {enough} such devices or more"
        )
        raise UserError(
            f"{run.model.label} cannot fit: parameters, moments and gradients are "
            f"{least / GIB:.1f} GiB a device, which has {limit / GIB:.1f} GiB; {hint}"
        )


def memory_bytes(device: Any) -> int | None:
    """A device's memory; of a CPU's devices, which share it, a part; None where it is unknown."""
    if device.platform == "cpu":
        whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return whole // device.client.local_device_count()
    return (device.memory_stats() or {}).get("bytes_limit")
