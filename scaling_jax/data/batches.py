"""Which rows each step trains on: a pure function of the shards, the seed and the step.

A run is one long sequence of rows, the batch of step i those at the places from i * batch_size on.
Place by place it is computed which part of a mixture is read (`mixture`) and which of its rows
(`shuffle`), so any step can be reached at once, on any number of hosts, and the only state is the
step.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32

from scaling_jax.config import RunConfig
from scaling_jax.data.mixture import ONE_PART, Mixture
from scaling_jax.data.shards import Shards
from scaling_jax.data.shuffle import BLOCK_BYTES, LANES, RowOrder
from scaling_jax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run: `parts` by name, in the proportions of `mixture`."""

    parts: Mapping[str, Shards]
    sequence_length: int
    batch_size: int
    seed: int
    mixture: Mixture = ONE_PART

    def __post_init__(self) -> None:
        for shards in self.parts.values():
            if shards.row_count(self.sequence_length) == 0:
                raise UserError(
                    f"{shards.folder}: {shards.token_count:,} tokens hold no row of "
                    f"sequence_length={self.sequence_length}"
                )

    @classmethod
    def open(cls, config: RunConfig) -> "Batches":
        """The training data of `config`.

        Raises:
          UserError: a part is missing, too small, or of another vocabulary than the model or the
            other parts; or the rates of the mixture are impossible.
        """
        rates = config.data.parts
        parts = {name: Shards.open(Path(config.data.folder) / name / "train") for name in rates}
        first = next(iter(parts.values()))
        for shards in parts.values():
            shards.check_vocabulary(config.model.vocabulary_size)
            if shards.index.vocabulary_sha256 != first.index.vocabulary_sha256:
                raise UserError(
                    f"{shards.folder}: prepared with vocabulary {shards.index.vocabulary}, "
                    f"{first.folder} with {first.index.vocabulary}: they cannot be mixed"
                )
        mixture = Mixture.of_rates(rates)
        return cls(parts, config.model.sequence_length, config.batch_size, config.seed, mixture)

    @property
    def sha256(self) -> str:
        """Names the content of all parts: the same digits, the same tokens."""
        digests = [shards.index_sha256 for shards in self.parts.values()]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def draw(
        self, places: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
        """The part and the row in it at each of these places of the run."""
        parts, places = self.mixture.draw(places)
        rows = np.empty_like(places)
        for part, order in enumerate(self._orders):
            mine = parts == part
            rows[mine] = order.rows(places[mine])
        return parts, rows

    def read(self, places: Int[np.ndarray, "n"]) -> Int32[np.ndarray, "n length+1"]:
        """The tokens at these places of the run."""
        parts, numbers = self.draw(places)
        rows = np.empty((len(places), self.sequence_length + 1), np.int32)
        for part, shards in enumerate(self.parts.values()):
            mine = parts == part
            if self._orders[part].woven:
                for block in np.unique(numbers[mine] // self._orders[part].block_rows).tolist():
                    self._ask_for(part, block)
            rows[mine] = shards.rows(numbers[mine], self.sequence_length)
        return rows

    def epochs(self, steps: int) -> dict[str, float]:
        """How many times `steps` steps go through each part; above 1, rows are repeated."""
        return {
            name: read / order.row_count
            for name, read, order in zip(
                self.parts, self._read_counts(steps), self._orders, strict=True
            )
        }

    def unique_tokens(self, steps: int) -> int:
        """Of the tokens trained on in `steps` steps, those that are no repetition of a row."""
        counts = zip(self._read_counts(steps), self._orders, strict=True)
        rows = sum(min(read, order.row_count) for read, order in counts)
        return rows * self.sequence_length

    def _read_counts(self, steps: int) -> list[int]:
        """How many rows of each part `steps` steps read."""
        return self.mixture.counts(steps * self.batch_size)

    @functools.cached_property
    def _ask_for(self) -> Callable[[int, int], None]:
        """Has a block of a part read ahead, once: what is remembered is what is read in turns."""
        shards = list(self.parts.values())

        @functools.lru_cache(maxsize=2 * LANES * len(shards))
        def ask_for(part: int, block: int) -> None:
            order = self._orders[part]
            first = block * order.block_rows
            count = min(order.block_rows, order.row_count - first)
            shards[part].read_ahead(first, count, self.sequence_length)

        return ask_for

    @functools.cached_property
    def _orders(self) -> tuple[RowOrder, ...]:
        """The order of each part's rows."""
        orders = []
        for shards in self.parts.values():
            block_rows = max(BLOCK_BYTES // ((self.sequence_length + 1) * shards.token_bytes), 1)
            row_count = shards.row_count(self.sequence_length)
            orders.append(RowOrder(row_count, block_rows, LANES, self.seed))
        return tuple(orders)
