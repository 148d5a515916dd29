import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from scaling_jax.data import batches as batches_module
from scaling_jax.data import feed as feeds
from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed
from scaling_jax.errors import UserError

LENGTH, BATCH = 4, 16
ONE_HOST = Path(__file__).with_name("one_host.py")


@pytest.fixture
def batches(make_shards):
    """100 rows in three shards."""
    shards = make_shards([[row, 2, 2, 2, 1] for row in range(3, 103)], shards=3)
    return Batches({"made": shards}, LENGTH, BATCH, seed=1)


@pytest.fixture
def sharding():
    return NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))


def expected(batches, step):
    return batches.read(step * BATCH + np.arange(BATCH))


@pytest.mark.parametrize("read_bytes", [1, 1000, 1 << 18])
@pytest.mark.parametrize("steps", [range(0), range(1), range(5, 6), range(3, 40)])
def test_every_batch_comes_once_and_in_order(batches, sharding, monkeypatch, read_bytes, steps):
    monkeypatch.setattr(feeds, "READ_BYTES", read_bytes)
    with Feed(batches, sharding, steps) as feed:
        found = list(feed)
    assert len(found) == len(steps)
    for batch, step in zip(found, steps, strict=True):
        assert np.array_equal(batch, expected(batches, step))


@pytest.mark.parametrize(
    "spec",
    [
        PartitionSpec(("data", "fsdp")),
        PartitionSpec("fsdp", None),
        PartitionSpec(),
    ],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_batch_is_the_same_on_any_number_of_devices(batches, shape, spec):
    devices = jax.devices()[: np.prod(shape)]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), devices=devices)
    with Feed(batches, NamedSharding(mesh, spec), range(3, 4)) as feed:
        (batch,) = feed
    assert batch.dtype == np.int32
    assert batch.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)
    assert np.array_equal(batch, expected(batches, 3))


def test_reading_goes_on_while_the_caller_works(batches, sharding, monkeypatch):
    """Reads of 20 ms are hidden behind steps of 40 ms; the first alone is waited for."""
    monkeypatch.setattr(feeds, "READ_BYTES", 1)
    read = Batches.read

    def slowly(self, places):
        time.sleep(0.02)
        return read(self, places)

    monkeypatch.setattr(Batches, "read", slowly)
    with Feed(batches, sharding, range(6)) as feed:
        for _ in feed:
            time.sleep(0.04)
    assert 0.01 < feed.seconds_waited < 0.06


def test_what_goes_wrong_in_the_thread_is_heard_of(batches, sharding, monkeypatch):
    def fail(*_):
        raise UserError("the disk is gone")

    monkeypatch.setattr(Batches, "read", fail)
    with Feed(batches, sharding, range(6)) as feed, pytest.raises(UserError, match="disk is gone"):
        next(iter(feed))


def test_leaving_early_ends_the_thread(batches, sharding):
    before = threading.active_count()
    with Feed(batches, sharding, range(10**9)) as feed:
        next(iter(feed))
    assert threading.active_count() == before


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_each_of_several_processes_reads_its_own_rows_and_blocks_only(
    make_shards, tmp_path, monkeypatch, hosts
):
    """Sixteen batches of sixteen rows, each row from a lane of its own, in blocks of eight rows."""
    shards = make_shards([[3 + row % 256, 2, 2, 2, 1] for row in range(4096)])
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={8 // hosts}"
    outs = [tmp_path / f"{host}.json" for host in range(hosts)]
    processes = [
        subprocess.Popen(
            [sys.executable, ONE_HOST, shards.folder, str(port), str(hosts), str(host), out],
            env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags),
        )
        for host, out in enumerate(outs)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0] * hosts

    # As the processes do.
    monkeypatch.setattr(batches_module, "BLOCK_BYTES", 8 * (LENGTH + 1) * 2)
    monkeypatch.setattr(batches_module, "LANES", 16)
    batches = Batches({"made": shards}, LENGTH, BATCH, seed=1)
    whole = np.stack([expected(batches, step) for step in range(16)])
    _, rows = batches.draw(np.arange(16 * BATCH))
    told = [json.loads(out.read_text()) for out in outs]
    assert sum(found["blocks"] for found in told) == len(np.unique(rows // 8))  # shared by none
    for found in told:
        assert found["rows"] == 16 * BATCH // hosts
        assert found["sums"] == whole[:, :, 0].sum(axis=1).tolist()
        assert found["last"] == whole[-1].tolist()
