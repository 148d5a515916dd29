"""Batches on their way to the devices: a thread reads them ahead, each host only its own rows."""

import collections
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int, Int32

from scaling_jax.data.batches import Batches

# Small batches are read many at a time: what a read costs besides its bytes is shared.
READ_BYTES = 1 << 18
READS_AHEAD = 2


class Feed:
    """Yields the batches of `steps`: int32 (batch_size, sequence_length + 1), placed as `sharding`.

    The batches are the same for any number of hosts and devices. Use it in a `with` block.

    Attributes:
      seconds_waited: how long the caller has waited for batches that were not there yet.
    """

    def __init__(self, batches: Batches, sharding: NamedSharding, steps: range):
        self.seconds_waited = 0.0
        self._batches, self._sharding, self._steps = batches, sharding, steps
        self._shape = (batches.batch_size, batches.sequence_length + 1)
        self._positions = local_positions(sharding, self._shape)
        row_bytes = self._shape[1] * np.dtype(np.int32).itemsize
        self._steps_a_read = max(READ_BYTES // (len(self._positions) * row_bytes), 1)
        self._reader = ThreadPoolExecutor(1, "feed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[jax.Array]:
        reads = (
            self._steps[first : first + self._steps_a_read]
            for first in range(0, len(self._steps), self._steps_a_read)
        )
        coming: collections.deque[Future[list[jax.Array]]] = collections.deque()
        for steps in reads:
            coming.append(self._reader.submit(self._read, steps))
            if len(coming) > READS_AHEAD:
                yield from self._wait(coming.popleft())
        while coming:
            yield from self._wait(coming.popleft())

    def _wait(self, read: Future[list[jax.Array]]) -> list[jax.Array]:
        start = time.perf_counter()
        batches = read.result()
        self.seconds_waited += time.perf_counter() - start
        return batches

    def _read(self, steps: range) -> list[jax.Array]:
        """The batches of `steps`, on the devices."""
        first = np.array(steps)[:, None] * self._shape[0]
        rows = self._batches.read((first + self._positions).ravel())
        shape = (len(steps), len(self._positions), self._shape[1])
        return [self._place(batch) for batch in rows.reshape(shape)]

    def _place(self, rows: Int32[np.ndarray, "positions length+1"]) -> jax.Array:
        """The global batch, of which this host has read `rows`."""

        def part(index: tuple[slice, ...] | None) -> Int32[np.ndarray, "rows columns"]:
            wanted, columns = index or (slice(None), slice(None))
            start, stop, _ = wanted.indices(self._shape[0])
            offset = int(np.searchsorted(self._positions, start))
            return rows[offset : offset + stop - start, columns]

        return jax.make_array_from_callback(self._shape, self._sharding, part)


def local_positions(sharding: NamedSharding, shape: tuple[int, int]) -> Int[np.ndarray, "n"]:
    """Which rows of a global batch of `shape` the devices of this host need, in rising order."""
    indices = sharding.addressable_devices_indices_map(shape).values()
    needed = np.zeros(shape[0], bool)
    for index in indices:
        needed[(index or (slice(None),))[0]] = True
    return np.flatnonzero(needed)
