"""One of several processes that train together: reads its share of sixteen batches.

    python one_host.py SHARDS PORT HOSTS HOST OUT

OUT tells as JSON how many rows and blocks it has read, the sum over each whole batch, which takes
all processes to find, and the last batch whole.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from scaling_jax.data import batches as batches_module
from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed
from scaling_jax.data.shards import Shards

LENGTH, BATCH, STEPS, BLOCK_ROWS, LANES = 4, 16, 16, 8, 16


def open_batches(folder: Path) -> Batches:
    """The batches, as if sixteen blocks of eight rows were a window of 2 GiB."""
    batches_module.BLOCK_BYTES = BLOCK_ROWS * (LENGTH + 1) * 2
    batches_module.LANES = LANES
    batches = Batches({"made": Shards.open(folder)}, LENGTH, BATCH, seed=1)
    assert batches._orders[0].lanes == LANES
    return batches


def main(folder: Path, port: int, hosts: int, host: int, out: Path) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", hosts, host, shutdown_timeout_seconds=10)
    asked: list[np.ndarray] = []
    read = Shards.rows

    def noting(self: Shards, indices: np.ndarray, sequence_length: int) -> np.ndarray:
        asked.append(indices)
        return read(self, indices, sequence_length)

    Shards.rows = noting
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    total = jax.jit(lambda rows: rows[:, 0].sum(), out_shardings=everywhere)
    with Feed(open_batches(folder), rows, range(STEPS)) as feed:
        batches = list(feed)
    read_rows = np.concatenate(asked)
    found = {
        "rows": len(read_rows),
        "blocks": len(np.unique(read_rows // BLOCK_ROWS)),
        "sums": [int(total(batch)) for batch in batches],
        "last": multihost_utils.process_allgather(batches[-1], tiled=True).tolist(),
    }
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    port, hosts, host = map(int, sys.argv[2:5])
    main(Path(sys.argv[1]), port, hosts, host, Path(sys.argv[5]))
