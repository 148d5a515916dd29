import json
import mmap
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scaling_jax.data.shards import Shards
from scaling_jax.errors import UserError

DOCUMENTS = [[*range(3, 3 + length), 1] for length in (40, 7, 90, 1, 200, 33)]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(
    documents=st.lists(st.lists(st.integers(3, 258), max_size=30), min_size=1, max_size=20),
    shards=st.integers(1, 4),
    sequence_length=st.integers(1, 20),
)
def test_rows_are_disjoint_and_only_the_tail_is_lost(
    make_shards, documents, shards, sequence_length
):
    made = make_shards([[*ids, 1] for ids in documents], shards)
    width = sequence_length + 1
    tokens = [id for shard in range(shards) for ids in documents[shard::shards] for id in (*ids, 1)]
    whole = len(tokens) // width * width
    expected = np.reshape(tokens[:whole], (-1, width)).tolist()
    count = made.row_count(sequence_length)
    assert made.rows(np.arange(count), sequence_length).tolist() == expected


def test_rows_come_in_the_order_asked_for(make_shards):
    shards = make_shards(DOCUMENTS, shards=2)
    wanted = np.array([5, 0, 5, 3])
    rows = shards.rows(wanted, 16)
    assert rows.dtype == np.int32
    assert rows.shape == (4, 17)
    everything = shards.rows(np.arange(shards.row_count(16)), 16)
    assert np.array_equal(rows, everything[wanted])
    assert shards.rows(np.array([], np.int64), 16).shape == (0, 17)


@pytest.mark.parametrize("shards", [1, 3, 8])  # of eight, two are empty
def test_rows_read_ahead_are_the_pages_that_hold_them(make_shards, monkeypatch, shards):
    """Noted instead of asked for: from a page's first byte to the last byte of the rows."""

    class Noting(mmap.mmap):
        def madvise(self, option, start, length):
            assert option == mmap.MADV_WILLNEED
            asked.append((self[:], start, length))

    monkeypatch.setattr(mmap, "mmap", Noting)
    documents = [[*random, 1] for random in np.random.default_rng(0).integers(2, 250, (6, 9_999))]
    made = make_shards(documents, shards)
    for first, count in ((0, 1), (700, 255), (0, 3529)):
        asked = []
        made.read_ahead(first, count, 16)
        found = b"".join(content[start : start + length] for content, start, length in asked)
        assert all(start % mmap.PAGESIZE == 0 for _, start, _ in asked)
        wanted = made.rows(np.arange(first, first + count), 16).astype("<u2").tobytes()
        assert wanted in found
        assert len(found) < len(wanted) + mmap.PAGESIZE


@pytest.mark.parametrize("index", [-1, 10_000])
def test_a_row_that_does_not_exist_is_refused(make_shards, index):
    with pytest.raises(IndexError):
        make_shards(DOCUMENTS).rows(np.array([index]), 16)


def test_many_shards_raise_the_limit_of_open_files_or_say_what_it_is(make_shards, monkeypatch):
    limits = {"now": (600, 700)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.update(now=new))
    make_shards(DOCUMENTS, shards=100)
    assert limits["now"] == (612, 700)
    make_shards(DOCUMENTS, shards=10)
    assert limits["now"] == (612, 700)
    with pytest.raises(UserError, match=r"200 shards .* no more than 700 files") as caught:
        make_shards(DOCUMENTS, shards=200)
    assert "\n" not in str(caught.value)


def test_large_vocabularies_take_four_bytes(make_shards):
    shards = make_shards([[65_536, 99_999, 1]], size=100_000)
    assert shards.rows(np.array([0]), 2).tolist() == [[65_536, 99_999, 1]]
    assert (shards.folder / "tokens-00000-of-00001.u32").stat().st_size == 12


def test_counts(make_shards):
    shards = make_shards(DOCUMENTS, shards=3)
    assert shards.token_count == sum(map(len, DOCUMENTS))
    assert shards.index.documents == len(DOCUMENTS)
    assert shards.vocabulary_size == 259
    assert shards.entropy_rate is None


def test_verify_finds_a_flipped_bit(make_shards):
    shards = make_shards(DOCUMENTS)
    shards.verify()
    path = shards.folder / shards.index.shards[0].file
    content = bytearray(path.read_bytes())
    content[100] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="sha256"):
        Shards.open(shards.folder).verify()


def test_a_shard_missing_or_cut_short(make_shards):
    shards = make_shards(DOCUMENTS)
    path = shards.folder / shards.index.shards[0].file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match="bytes long, the index says"):
        Shards.open(shards.folder)
    path.unlink()
    with pytest.raises(UserError, match="missing"):
        Shards.open(shards.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dokuments": 3}, "dokuments: unknown key, did you mean 'documents'"),
        ({"dtype": "u8"}, "dtype: "),
        (
            {"shards": [{"file": "../x", "tokens": 1, "sha256": ""}]},
            "does not lie beside the index",
        ),
        ({"vocabulary_size": 0}, "vocabulary_size: "),
    ],
)
def test_a_malformed_index_names_the_key(make_shards, change, message):
    folder = make_shards(DOCUMENTS).folder
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=message) as caught:
        Shards.open(folder)
    assert "\n" not in str(caught.value)


def test_no_index_and_no_json(tmp_path):
    with pytest.raises(UserError, match="not found; prepare"):
        Shards.open(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        Shards.open(tmp_path)
