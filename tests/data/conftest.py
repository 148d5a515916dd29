from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from scaling_jax.data import prepare
from scaling_jax.data.shards import Index, Shards

MakeShards = Callable[..., Shards]


@pytest.fixture
def make_shards(tmp_path: Path) -> MakeShards:
    """Writes documents of given ids as a prepared split, through the writer that `prepare` uses."""

    def make(documents: Iterable[Sequence[int]], shards: int = 1, size: int = 259) -> Shards:
        draft = Index(
            task="made",
            split="train",
            source="test",
            vocabulary="bytes",
            vocabulary_size=size,
            vocabulary_sha256="",
            end_of_text=1,
            dtype="u16" if size <= 1 << 16 else "u32",
            documents=0,
            text_bytes=0,
            shards=(),
            entropy_rate=None,
            versions={},
        )
        tokens = (prepare.Tokens(np.asarray(ids), len(ids) - 1) for ids in documents)
        prepare._write(tokens, tmp_path / "made", draft, shards)
        return Shards.open(tmp_path / "made")

    return make
