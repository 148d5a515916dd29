"""Which rows each step trains on: a pure function of the shards, the seed and the step.

The rows are shuffled anew in each epoch by a permutation that is computed index by index, so any
step can be reached at once, on any number of hosts, and the only state is the step.
"""

import dataclasses

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Int, Int32, UInt64

from scaling_jax.data.shards import Shards
from scaling_jax.errors import UserError

FEISTEL_ROUNDS = 6


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run."""

    shards: Shards
    sequence_length: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.shards.row_count(self.sequence_length) == 0:
            raise UserError(
                f"{self.shards.folder}: {self.shards.token_count:,} tokens hold no row of "
                f"sequence_length={self.sequence_length}"
            )

    def row_indices(self, step: int, rows: slice = slice(None)) -> Int[np.ndarray, "rows"]:
        """Which of the shards' rows are the `rows` of the batch of `step`."""
        places = step * self.batch_size + np.arange(self.batch_size, dtype=np.int64)[rows]
        row_count = self.shards.row_count(self.sequence_length)
        epochs, offsets = np.divmod(places, row_count)
        return permute(offsets, row_count, key=_keys(self.seed, epochs))

    def host_rows(self, step: int, rows: slice = slice(None)) -> Int32[np.ndarray, "rows length+1"]:
        """The tokens of the `rows` of the batch of `step`."""
        return self.shards.rows(self.row_indices(step, rows), self.sequence_length)

    def global_batch(self, step: int, sharding: NamedSharding) -> jax.Array:
        """The batch of `step` on the devices: int32, (batch_size, sequence_length + 1).

        Each host reads only the rows that its own devices need.
        """

        def read(index: tuple[slice, ...] | None) -> Int32[np.ndarray, "rows columns"]:
            rows, columns = index or (slice(None), slice(None))
            return self.host_rows(step, rows)[:, columns]

        shape = (self.batch_size, self.sequence_length + 1)
        return jax.make_array_from_callback(shape, sharding, read)

    def epochs(self, steps: int) -> float:
        """How many times `steps` steps go through the data; above 1, rows are repeated."""
        return steps * self.batch_size / self.shards.row_count(self.sequence_length)


def permute(
    indices: Int[np.ndarray, "n"], size: int, key: UInt64[np.ndarray, "n"] | np.uint64
) -> Int[np.ndarray, "n"]:
    """Where the pseudo-random permutation of range(size) that `key` chooses sends each index.

    A Feistel network permutes the numbers of the smallest even count of bits that holds `size`;
    what it sends outside the range is sent on until it falls inside again, less than four times
    on average (cycle walking; Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    half = np.uint64(max(((size - 1).bit_length() + 1) // 2, 1))
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = indices.astype(np.uint64)
    keys = np.broadcast_to(key, result.shape)
    outside = np.ones(result.shape, bool)
    while outside.any():
        left, right = result[outside] >> half, result[outside] & mask
        for turn in range(FEISTEL_ROUNDS):
            left, right = right, left ^ (_mix(right + keys[outside] + np.uint64(turn)) & mask)
        result[outside] = (left << half) | right
        outside = result >= size
    return result.astype(np.int64)


def _keys(seed: int, epochs: Int[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A key for each epoch of a run."""
    return _mix(_mix(np.full(epochs.shape, seed, np.uint64)) + epochs.astype(np.uint64))


def _mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Scrambles 64-bit integers: a step of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
