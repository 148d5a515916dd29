import os

import numpy as np
import pytest

from scaling_jax.cli import app
from scaling_jax.data import verification
from scaling_jax.data.shards import Shards, read_index, write_index
from scaling_jax.errors import UserError

DOCUMENTS = [[2, 3, 4, 5, 6, 7, 1]] * 40


@pytest.fixture
def shards(make_shards, monkeypatch):
    monkeypatch.setattr(verification, "_known", set())
    return make_shards(DOCUMENTS, shards=3)


def shard_file(shards, number):
    return shards.folder / shards.index.shards[number].file


def flip(path, keep_time=False):
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_damaged_shard_is_found_when_its_first_row_is_read(shards):
    flip(shard_file(shards, 1))
    opened = Shards.open(shards.folder)
    assert len(opened.rows(np.array([0, 1]), 6)) == 2  # of the first shard
    with pytest.raises(UserError, match=r"00001-of-00003.*damaged: its sha256 is") as caught:
        opened.rows(np.array([0, 20]), 6)
    assert "\n" not in str(caught.value)


def test_a_row_that_runs_into_a_damaged_shard_is_not_read(shards):
    flip(shard_file(shards, 1))
    across = shards.index.shards[0].tokens // 5
    with pytest.raises(UserError, match="00001-of-00003"):
        Shards.open(shards.folder).rows(np.array([across]), 4)


def test_a_shard_is_read_whole_once_and_again_when_it_changes(shards, monkeypatch):
    looked = []
    real = verification.verify
    monkeypatch.setattr(
        verification, "verify", lambda path, *rest: (looked.append(path.name), real(path, *rest))
    )
    every = np.arange(shards.row_count(6))
    names = [entry.file for entry in shards.index.shards]
    Shards.open(shards.folder).rows(every, 6)
    assert looked == names
    Shards.open(shards.folder).rows(every, 6)
    verification._known.clear()  # as in another process
    Shards.open(shards.folder).rows(every, 6)
    assert looked == names
    flip(shard_file(shards, 2))
    with pytest.raises(UserError, match="00002-of-00003"):
        Shards.open(shards.folder).rows(every, 6)


@pytest.mark.parametrize("stamp", [b"", b"[]", b"{", b"[" * 100_000])
def test_a_damaged_stamp_is_no_proof(shards, stamp):
    Shards.open(shards.folder).rows(np.array([0]), 6)
    (path,) = (shards.folder / verification.STAMPS).iterdir()
    path.write_bytes(stamp)
    verification._known.clear()
    flip(shard_file(shards, 0), keep_time=True)
    with pytest.raises(UserError, match="damaged"):
        Shards.open(shards.folder).rows(np.array([0]), 6)


def test_rot_without_a_write_is_found_on_demand(shards, capsys):
    every = np.arange(shards.row_count(6))
    shards.rows(every, 6)
    flip(shard_file(shards, 1), keep_time=True)
    assert len(Shards.open(shards.folder).rows(every, 6)) == len(every)
    with pytest.raises(UserError, match=r"00001-of-00003.*damaged"):
        app(["data", "inspect", str(shards.folder), "--verify"], exit_on_error=False)


def test_data_that_may_only_be_read_are_verified_by_each_process(shards, monkeypatch):
    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(verification.atomic, "write_text", refuse)
    Shards.open(shards.folder).rows(np.array([0]), 6)
    assert not (shards.folder / verification.STAMPS).exists()


def test_every_flipped_bit_of_an_index_is_found_or_means_the_same(shards):
    write_index(shards.folder, shards.index)
    path = shards.folder / "index.json"
    whole = path.read_bytes()
    _, index = read_index(shards.folder)
    draw = np.random.default_rng(0)
    told = []
    for place in draw.choice(len(whole), 400, replace=False):
        content = bytearray(whole)
        content[place] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        try:
            assert read_index(shards.folder)[1] == index
        except UserError as error:
            told.append(str(error))
    assert len(told) > 250
    assert all(str(path) in line and "\n" not in line for line in told)
