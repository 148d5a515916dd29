"""Makes JAX fast on CPU; everything here is done before JAX starts and touches no other platform.

Three things slow small models down on a CPU. The kernel maps and zeroes every fresh buffer page by
page, again at each step: glibc is told to keep the memory it has. In pages of 4 KB that is more
addresses than a processor remembers: the heap gets large ones where the system has them. And small
operations do not split over cores: the batch does, so each core becomes a device of its own.
"""

import contextlib
import ctypes
import importlib.util
import mmap
import os
from collections.abc import MutableMapping
from pathlib import Path

MAX_DEVICES = 8

# Address space to begin with, not memory: a page is used once something is written there. Below the
# threshold from which glibc would give it back.
HEAP, HUGE_PAGE = 1536 << 20, 2 << 20

# glibc's mallopt(3): parameter numbers from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX, M_ARENA_MAX = -1, -2, -4, -8


def configure() -> None:
    """Call once, before the first use of JAX. Settings the user has made are left alone."""
    _arrange_heap()
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


def _arrange_heap() -> None:
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TOP_PAD, 64 << 20)
        libc.mallopt(M_ARENA_MAX, 1)
        _use_huge_pages(libc)


def _use_huge_pages(libc: ctypes.CDLL) -> None:
    """Asks for pages of 2 MB for the first part of the heap; refused, it stays as it is."""
    libc.malloc.restype = ctypes.c_void_p
    start = libc.malloc(ctypes.c_size_t(HEAP))
    if not start:
        return
    first = -(-start // HUGE_PAGE) * HUGE_PAGE
    size = ctypes.c_size_t(HEAP - HUGE_PAGE)
    libc.madvise(ctypes.c_void_p(first), size, mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(start))
