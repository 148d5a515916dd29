"""The order in which a run reads rows: shuffled anew in each epoch, computed index by index.

A data set of less than a window (LANES blocks, 2 GiB) is shuffled row by row. A larger one is
woven, so that it can be read in large pieces and each host reads only its own:

    blocks    runs of neighbouring rows, about BLOCK_BYTES long, in shuffled order
    lanes     LANES blocks side by side, each shuffled inside; the order takes one row of every
              lane in turn, and a lane whose block is used up takes the next one

So the rows of a batch come from as many far-apart places as it has rows, up to LANES, and a place
in the batch stays with its own blocks, one after the other, if the batch size divides LANES.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

BLOCK_BYTES = 1 << 20
LANES = 2048
FEISTEL_ROUNDS = 6


class Region(NamedTuple):
    """Part of an epoch: `lanes` runs of `depth` rows side by side, perhaps several times over."""

    start: int
    stop: int
    lanes: int
    depth: int


@dataclasses.dataclass(frozen=True)
class RowOrder:
    """The order of `row_count` rows that `seed` chooses.

    `block_rows` neighbours make a block, `lanes` blocks a window.
    """

    row_count: int
    block_rows: int
    lanes: int
    seed: int

    def rows(self, places: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
        """Which rows stand at these places of the endless sequence of epochs."""
        epochs, offsets = np.divmod(places, self.row_count)
        keys = _keys(self.seed, epochs)
        rows = np.empty_like(offsets)
        for region in self.regions:
            inside = (offsets >= region.start) & (offsets < region.stop)
            if inside.all():
                rows = _weave(offsets, region, keys)
                break
            if inside.any():
                rows[inside] = _weave(offsets[inside], region, keys[inside])
        return self._move_blocks(rows, keys) if self.woven else rows

    @property
    def woven(self) -> bool:
        """Whether there is a whole window, so that blocks are read one after the other."""
        return self._blocks >= self.lanes

    @functools.cached_property
    def regions(self) -> tuple[Region, ...]:
        """Whole windows; one of shorter lanes made of the blocks left over; the last few rows."""
        windows, blocks_left = divmod(self._blocks, self.lanes)
        if windows == 0:
            return (Region(0, self.row_count, 1, self.row_count),)
        whole = windows * self.lanes * self.block_rows
        depth = blocks_left * self.block_rows // self.lanes
        woven = whole + self.lanes * depth
        regions = (
            Region(0, whole, self.lanes, self.block_rows),
            Region(whole, woven, self.lanes, depth),
            Region(woven, self.row_count, 1, self.row_count - woven),
        )
        return tuple(region for region in regions if region.start < region.stop)

    @property
    def _blocks(self) -> int:
        """How many whole blocks there are; what is left over is less than one more."""
        return self.row_count // self.block_rows

    def _move_blocks(
        self, rows: Int[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"]
    ) -> Int[np.ndarray, "n"]:
        """Shuffles whole blocks; the rows after the last of them stay where they are."""
        blocks, within = np.divmod(rows, self.block_rows)
        whole = blocks < self._blocks
        moved = rows.copy()
        places = permute(blocks[whole], self._blocks, keys[whole])
        moved[whole] = places * self.block_rows + within[whole]
        return moved


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


def _weave(
    offsets: Int[np.ndarray, "n"], region: Region, keys: UInt64[np.ndarray, "n"]
) -> Int[np.ndarray, "n"]:
    """One row of every lane in turn, each lane shuffled inside by a key of its own."""
    turns, lanes = np.divmod(offsets - region.start, region.lanes)
    # Neighbouring lanes begin in the middle, at places spread evenly by the golden ratio: otherwise
    # all would come to the end of their blocks, and need the next ones, in the same step.
    head_start = lanes * round(0.618 * region.depth) % region.depth
    turns = (turns + head_start) % ((region.stop - region.start) // region.lanes)
    windows, within = np.divmod(turns, region.depth)
    first = region.start + (windows * region.lanes + lanes) * region.depth
    # An odd multiplier: different lanes never share a key.
    lane_keys = keys + first.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return first + permute(within, region.depth, lane_keys)


def _keys(seed: int, epochs: Int[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """A key for each epoch of a run."""
    return _mix(_mix(np.full(epochs.shape, seed, np.uint64)) + epochs.astype(np.uint64))


def _mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """Scrambles 64-bit integers: a step of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
