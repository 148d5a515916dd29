import io
import json

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile, MemoryFileSystem

from scaling_jax.data import files, remote
from scaling_jax.errors import OutageError, UserError


class Outage(Exception):  # noqa: N818
    """What a bucket's library raises: no OSError."""


@pytest.fixture
def waits(monkeypatch):
    """The seconds waited; none are."""
    waited = []
    monkeypatch.setattr(remote.time, "sleep", waited.append)
    return waited


@pytest.fixture
def bucket():
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pipe("/corpus/a.jsonl", json.dumps({"text": "x" * 500_000}).encode())
    yield "memory://corpus"
    system.store.clear()


def failing(monkeypatch, owner, name, times, error=Outage):
    """Lets a method fail so many times."""
    real, left = getattr(owner, name), [times]

    def method(*args, **options):
        if left[0]:
            left[0] -= 1
            raise error("503 try later\nwith more lines")
        return real(*args, **options)

    monkeypatch.setattr(owner, name, method)


@pytest.mark.parametrize("times", [1, 3, 6])
def test_an_outage_that_ends_is_waited_for(bucket, waits, monkeypatch, times, caplog):
    failing(monkeypatch, MemoryFileSystem, "glob", times)
    assert list(files.found(bucket, "*.jsonl")) == ["memory:///corpus/a.jsonl"]
    assert waits == list(remote.WAITS_SECONDS[:times])
    assert caplog.text.count("503 try later; trying again") == times


@pytest.mark.parametrize("name", ["read", "seek"])
def test_reading_goes_on_where_it_was(bucket, waits, monkeypatch, name):
    whole = fsspec.filesystem("memory").cat("/corpus/a.jsonl")
    with files.opened("memory://corpus/a.jsonl") as (_, content):
        assert content.read(300_000) == whole[:300_000]
        failing(monkeypatch, MemoryFile, "read", 2)
        if name == "seek":
            content.seek(-400_000, io.SEEK_END)
            assert content.read() == whole[-400_000:]
        else:
            assert content.read() == whole[300_000:]
    assert waits == [1, 2]


@pytest.mark.parametrize("owner", [MemoryFileSystem, MemoryFile])
def test_an_outage_that_does_not_end_is_one_line(bucket, waits, monkeypatch, owner):
    failing(monkeypatch, owner, "glob" if owner is MemoryFileSystem else "read", 99)

    def use():
        if owner is MemoryFileSystem:
            return files.found(bucket, "*.jsonl")
        with files.opened("memory://corpus/a.jsonl") as (_, content):
            return content.read()

    with pytest.raises(
        OutageError, match=r"cannot be reached \(503 try later\), tried 7"
    ) as caught:
        use()
    assert "\n" not in str(caught.value)
    assert sum(waits) == 63


def test_an_answer_is_not_asked_for_again(bucket, waits):
    with pytest.raises(UserError, match="cannot be opened"), files.opened("memory://corpus/no"):
        pass
    with pytest.raises(UserError, match="no file is called"):
        files.found(bucket, "*.parquet")
    with pytest.raises(UserError, match="cannot be opened"), files.opened("nosuch://x"):
        pass
    assert waits == []
