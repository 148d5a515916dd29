"""How fast batches come, how much a host of a pod reads, how long a real run waits for data.

    python benchmarks/batches.py [--gigabytes 2.6]

Reading: random two-byte tokens in rows of 2,049, as files that the page cache holds, in batches of
512 rows onto the devices; from 2.2 gigabytes on the order is woven (`data.shuffle`).
A pod: what one of 64 hosts reads of a whole window, with nothing in the page cache (Linux).
Waiting: the training loop itself on two models, from its own metrics, the first steps left out.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from scaling_jax import config as configs
from scaling_jax import cpu
from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, RunConfig
from scaling_jax.data import shards
from scaling_jax.data.batches import Batches
from scaling_jax.data.feed import Feed
from scaling_jax.training import loop
from scaling_jax.training.files import METRICS_FILE

LENGTH, BATCH, SHARDS, IDS, HOSTS = 2048, 512, 8, 50_277, 64
READ_STEPS, REPEATS, LEFT_OUT = 40, 3, 20
RUNS: dict[str, dict[str, Any]] = {
    "the quickstart's smallest": {
        "model": {"width": 16, "layers": 1, "heads": 2, "vocabulary_size": 264},
        "length": 16,
        "batch_size": 16,
        "steps": 3000,
    },
    "rows of 512 tokens": {
        "model": {"width": 64, "layers": 2, "heads": 2, "vocabulary_size": 264},
        "length": 512,
        "batch_size": 8,
        "steps": 60,
    },
}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description="How fast batches come.")
    parser.add_argument("--gigabytes", type=float, default=2.6, help="of tokens to read from")
    gigabytes = parser.parse_args().gigabytes
    cpu.configure()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {jax.devices()[0].device_kind}")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        write_split(data / "large" / "train", round(gigabytes * 1e9 / 2), IDS)
        _print(pd.DataFrame([reading(data / "large" / "train") for _ in range(REPEATS)]))
        if Path("/proc/self/io").exists():
            _print(pd.DataFrame([share_of_a_pod(data / "large" / "train")]))
        write_split(data / "small" / "train", 10_000_000, 259)
        rows = [waiting(name, data, Path(folder) / "runs" / name) for name in RUNS]
        _print(pd.DataFrame(rows))


def reading(folder: Path) -> dict[str, float]:
    """Tokens a second of batches that nobody works on: their order, their rows, on the devices."""
    batches = Batches({"large": shards.Shards.open(folder)}, LENGTH, BATCH, seed=0)
    places = np.arange(READ_STEPS * BATCH).reshape(READ_STEPS, BATCH)
    tokens = READ_STEPS * BATCH * LENGTH

    start = time.perf_counter()
    for step in places:
        batches.draw(step)
    drawn = time.perf_counter()
    for step in places:
        batches.read(step)
    read = time.perf_counter()
    rows = meshes.sharding(meshes.make_mesh(MeshConfig()), ("batch", "length"))
    with Feed(batches, rows, range(READ_STEPS)) as feed:
        for batch in feed:
            batch.block_until_ready()
    fed = time.perf_counter()
    return {
        "rows": batches.parts["large"].row_count(LENGTH),
        "order Mtok/s": tokens / (drawn - start) / 1e6,
        "order + rows Mtok/s": tokens / (read - drawn) / 1e6,
        "on the devices Mtok/s": tokens / (fed - read) / 1e6,
    }


def share_of_a_pod(folder: Path) -> dict[str, float]:
    """What the first of 64 hosts reads from the disk for a window of batches, and in what time."""
    batches = Batches({"large": shards.Shards.open(folder)}, LENGTH, BATCH, seed=0)
    (order,) = batches._orders
    steps = order.lanes * order.block_rows // BATCH
    for file in folder.glob("tokens-*"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    read, start = _bytes_read(), time.perf_counter()
    for step in range(steps):
        batches.read(step * BATCH + np.arange(BATCH // HOSTS))
    useful = steps * BATCH // HOSTS * (LENGTH + 1) * 2
    return {
        "steps": steps,
        "rows a step": BATCH // HOSTS,
        "ms a step": 1e3 * (time.perf_counter() - start) / steps,
        "MB needed": useful / 1e6,
        "MB from the disk": (_bytes_read() - read) / 1e6,
    }


def waiting(name: str, data: Path, folder: Path) -> dict[str, Any]:
    """Trains a model and says which share of the time the loop has waited for data."""
    told = RUNS[name]
    content = {
        "model": told["model"] | {"sequence_length": told["length"]},
        "data": {"dataset": "small", "validation": ["small"], "folder": str(data)},
        "batch_size": told["batch_size"],
        "tokens": told["steps"] * told["batch_size"] * told["length"],
        "optimizer": {"warmup_steps": 10},
    }
    loop.train(configs.build(RunConfig, content, source=name), folder)
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    first, last = json.loads(lines[LEFT_OUT]), json.loads(lines[-1])
    seconds = last["time"] - first["time"]
    waited = last["seconds_waited_for_data"] - first["seconds_waited_for_data"]
    return {
        "run": name,
        "steps": len(lines) - 1 - LEFT_OUT,
        "ms a step": 1e3 * seconds / (len(lines) - 1 - LEFT_OUT),
        "waiting for data, %": 100 * waited / seconds,
    }


def write_split(folder: Path, tokens: int, ids: int) -> None:
    """Prepares random tokens in eight shards."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)
    entries = []
    for number in range(SHARDS):
        file = f"tokens-{number:05d}-of-{SHARDS:05d}.u16"
        content = random.integers(0, ids, tokens // SHARDS, dtype=np.uint16).tobytes()
        (folder / file).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        entries.append(shards.ShardEntry(file, tokens // SHARDS, digest))
    index = shards.Index(
        task="random",
        split="train",
        source="random",
        vocabulary="bytes",
        vocabulary_size=ids,
        vocabulary_sha256="",
        end_of_text=0,
        dtype="u16",
        documents=0,
        text_bytes=0,
        shards=tuple(entries),
        entropy_rate=None,
        versions={},
    )
    (folder / shards.INDEX_FILE).write_text(json.dumps(dataclasses.asdict(index)))


def _bytes_read() -> int:
    """From the disk, by this process."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _print(table: pd.DataFrame) -> None:
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))


if __name__ == "__main__":
    main()
