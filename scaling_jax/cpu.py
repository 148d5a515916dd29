"""Makes JAX fast on CPU; everything here is done before JAX starts and touches no other platform.

Two things slow small models down on a CPU. Every fresh buffer is mapped and zeroed page by page by
the kernel, again at each step: glibc is told to keep the memory it has. And small operations do not
split over cores: the batch does, so each core becomes a device of its own.
"""

import contextlib
import ctypes
import os

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
