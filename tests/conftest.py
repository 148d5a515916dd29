"""Tests run on eight simulated CPU devices; this must be set before JAX starts.

What they compile is kept: by the parallel workers of one run for each other, and for the next run.
"""

import os
from pathlib import Path

os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache/compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Compiles in two thirds of the time, for programs that hardly run.
        "--xla_cpu_use_fusion_emitters=false",
    ]
)

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import hypothesis
import jax
import numpy as np
import pytest
from golden import Golden
from joined_processes import Job

from scaling_jax.data.prepare import prepare
from scaling_jax.data.shards import DTYPES, INDEX_FILE, Index, ShardEntry, Shards

GOLDEN = Path(__file__).parents[1] / ".." / "shared" / "golden" / "openlm"

MakeShards = Callable[..., Shards]

# A first call compiles: its time says nothing.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing is read from the user's cache folder, or left there."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


def write_split(folder: Path, documents: Iterable[Sequence[int]], shards: int, size: int) -> Shards:
    """Writes documents of given ids as a prepared split, dealt out to the shards in turn."""
    dtype = "u16" if size <= 1 << 16 else "u32"
    documents = list(documents)
    parts = [documents[number::shards] for number in range(shards)]
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, part in enumerate(parts):
        file = f"tokens-{number:05d}-of-{shards:05d}.{dtype}"
        content = np.array([id for ids in part for id in ids], DTYPES[dtype]).tobytes()
        (folder / file).write_bytes(content)
        tokens = sum(map(len, part))
        entries.append(ShardEntry(file, tokens, hashlib.sha256(content).hexdigest(), len(part)))
    index = Index(
        task="made",
        split="train",
        source="test",
        vocabulary="bytes",
        vocabulary_size=size,
        vocabulary_sha256="",
        end_of_text=1,
        dtype=dtype,
        documents=sum(map(len, parts)),
        text_bytes=sum(len(ids) - 1 for part in parts for ids in part),
        shards=tuple(entries),
        entropy_rate=None,
        versions={},
    )
    (folder / INDEX_FILE).write_text(json.dumps(dataclasses.asdict(index)))  # pyright: ignore[reportArgumentType]
    return Shards.open(folder)


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Machine code that is less optimised: the programs of tests run for milliseconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Writes documents of given ids as a prepared split."""

    def make(
        documents: Iterable[Sequence[int]], shards: int = 1, size: int = 259, name: str = "made"
    ) -> Shards:
        return write_split(tmp_path / name, documents, shards, size)

    return make


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`walk`: 900 training tokens and 333 for validation, in 40 ids; each id suggests the next."""
    folder = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for split, count in (("train", 900), ("validation", 333)):
        ids = [2]
        for noise in random.integers(0, 3, count - 2):
            ids.append(2 + (3 * ids[-1] + int(noise)) % 38)
        write_split(folder / "walk" / split, [[*ids, 1]], shards=1, size=40)
    return folder


@pytest.fixture(scope="session")
def write_words() -> Callable[..., Path]:
    """Fills a folder: `words`, a text in bytes; a file of questions a task; the tasks' own.yaml."""

    def write(folder: Path, questions: dict[str, list[dict[str, Any]]], tasks: str) -> Path:
        text = "the cat sat on the mat and the dog sat on the log. " * 30
        for split in ("train", "validation"):
            (folder / "texts" / split).mkdir(parents=True)
            (folder / "texts" / split / "words.txt").write_text(text)
        prepare(str(folder / "texts"), out=folder, overrides=["name=words"])
        for name, asked in questions.items():
            content = "".join(json.dumps(question) + "\n" for question in asked)
            (folder / f"{name}.jsonl").write_text(content)
        (folder / "own.yaml").write_text(tasks)
        return folder

    return write


@pytest.fixture(scope="session", params=["tiny", "deep"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = GOLDEN / f"openlm_{request.param}.npz"
    if not path.is_file():
        pytest.skip(f"the tensors that open_lm computed are not there: {path}")
    return Golden.load(path)


@pytest.fixture
def jobs() -> Iterator[Callable[..., Job]]:
    """Starts commands in several processes; what still runs at the end of the test is killed."""
    started: list[Job] = []

    def make(*arguments: Any, **options: Any) -> Job:
        started.append(Job(*arguments, **options))
        return started[-1]

    yield make
    for job in started:
        job.kill()
