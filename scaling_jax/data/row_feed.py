"""The batches of a run, read ahead by a thread and left on the host."""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int32

from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed


class RowFeed(Feed):
    """As `Feed`, but whole batches as NumPy arrays, for whoever places several runs' at once."""

    def __init__(self, batches: Batches, mesh: jax.sharding.Mesh, steps: range):
        # Replicated: every host reads all rows.
        super().__init__(batches, NamedSharding(mesh, PartitionSpec()), steps)

    def _place(self, rows: Int32[np.ndarray, "positions length+1"]) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        return rows
