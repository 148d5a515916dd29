"""Makes JAX fast on CPU; everything here is done before JAX starts and touches no other platform.

Two things slow small models down on a CPU. Every fresh buffer is mapped and zeroed page by page by
the kernel, again at each step: glibc is told to keep the memory it has. And small operations do not
split over cores: the batch does, so each core becomes a device of its own.
"""

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

MAX_DEVICES = 8

# glibc's mallopt(3): parameter numbers from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def configure() -> None:
    """Call once, before the first use of JAX. Settings the user has made are left alone."""
    _keep_freed_memory()
    if _user_chose_devices():
        return
    import jax

    jax.config.update("jax_num_cpu_devices", _devices_for(os.cpu_count() or 1))


def pass_over_absent_tpu(
    environment: MutableMapping[str, str] = os.environ, devices: Path = Path("/dev")
) -> None:
    """Keeps JAX from starting libtpu, installed to compile for TPUs elsewhere, where none is.

    It would look for chips, and complain at length that it finds none. Call it before JAX is
    imported; where the user has chosen platforms or an accelerator of another kind may be, it does
    nothing.
    """
    if "JAX_PLATFORMS" in environment or not importlib.util.find_spec("libtpu"):
        return
    chips = any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))
    if not chips and not importlib.util.find_spec("jax_plugins"):
        environment["JAX_PLATFORMS"] = "cpu"


def _devices_for(cores: int) -> int:
    """The largest power of two above neither the cores nor what batches split into."""
    return min(1 << (cores.bit_length() - 1), MAX_DEVICES)


def _user_chose_devices() -> bool:
    return (
        "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or "JAX_NUM_CPU_DEVICES" in os.environ
    )


def _keep_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 << 20)
        mallopt(M_ARENA_MAX, 1)
