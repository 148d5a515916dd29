"""How fast a run goes: tokens a second, time left, and share of the hardware's peak (MFU)."""

import functools
import time

import jax
import jax.numpy as jnp

# Dense bfloat16 operations a second of one device, from the vendors' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@functools.cache
def peak_flops() -> float:
    """Peak operations a second of all devices together.

    Of a device that is not in the table (a CPU above all) the peak is what a large float32 matrix
    product reaches; simulated CPU devices share one machine and are measured as one.
    """
    devices = jax.devices()
    known = PEAK_FLOPS.get(devices[0].device_kind)
    return known * len(devices) if known else _measured_peak()


def _measured_peak(size: int = 1024, repeats: int = 3) -> float:
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


class Speedometer:
    """Measures a run's speed from its second reported step on, so that compiling does not count."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None

    def tokens_per_second(self, tokens: int) -> float:
        """Average speed up to now, when `tokens` in all have been trained on; 0 at first."""
        now = time.perf_counter()
        if self._start is None:
            self._start = now, tokens
        start, first = self._start
        return (tokens - first) / (now - start) if tokens > first else 0.0
