import dataclasses
import json

import numpy as np
import pytest

from scaling_jax.config import DataConfig, ModelConfig, RunConfig
from scaling_jax.data.batches import Batches
from scaling_jax.data.mixture import Mixture
from scaling_jax.errors import UserError

LENGTH = 4


@pytest.fixture
def shards(make_shards):
    """100 rows, each recognised by its first token."""
    return make_shards([[row, 2, 2, 2, 1] for row in range(3, 103)], shards=3)


@pytest.fixture
def two_parts(make_shards, tmp_path):
    """`a`, 100 rows that begin with 3 to 102, and `b`, 10 rows that begin with 200 to 209."""
    for name, first, last in (("a", 3, 103), ("b", 200, 210)):
        make_shards([[row, 2, 2, 2, 1] for row in range(first, last)], name=f"{name}/train")
    return RunConfig(
        model=ModelConfig(width=16, layers=1, heads=2, vocabulary_size=259, sequence_length=LENGTH),
        data=DataConfig(
            dataset="both", validation=("a",), mixture={"b": 1.0, "a": 3.0}, folder=str(tmp_path)
        ),
        batch_size=8,
        tokens=1000,
    )


def batch(batches, step):
    return batches.read(step * batches.batch_size + np.arange(batches.batch_size))


def test_an_epoch_has_every_row_once_and_the_next_another_order(shards):
    batches = Batches({"made": shards}, LENGTH, batch_size=10, seed=0)
    epochs = [
        np.concatenate([batch(batches, step)[:, 0] for step in range(start, start + 10)])
        for start in (0, 10)
    ]
    assert all(np.array_equal(np.sort(epoch), np.arange(3, 103)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_repeats_are_counted(shards):
    batches = Batches({"made": shards}, LENGTH, batch_size=10, seed=0)
    assert batches.epochs(5) == {"made": 0.5}
    assert batches.epochs(15) == {"made": 1.5}
    assert batches.unique_tokens(5) == 50 * LENGTH
    assert batches.unique_tokens(15) == 100 * LENGTH


def test_a_batch_may_span_two_epochs(shards):
    batches = Batches({"made": shards}, LENGTH, batch_size=64, seed=3)
    stream = np.concatenate([batch(batches, step)[:, 0] for step in range(25)])
    for epoch in range(16):
        assert np.array_equal(np.sort(stream[100 * epoch : 100 * (epoch + 1)]), np.arange(3, 103))


def test_seed_and_step_decide_everything(shards):
    first, again = (Batches({"made": shards}, LENGTH, batch_size=8, seed=5) for _ in range(2))
    assert np.array_equal(batch(first, 7), batch(again, 7))
    other = Batches({"made": shards}, LENGTH, batch_size=8, seed=6)
    assert not np.array_equal(batch(first, 7), batch(other, 7))


def test_any_step_is_reached_at_once(shards):
    batches = Batches({"made": shards}, LENGTH, batch_size=8, seed=5)
    assert batch(batches, 10**12).shape == (8, LENGTH + 1)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_read_the_same_batch(two_parts, hosts):
    batches = Batches.open(two_parts)
    places = 9 * 8 + np.arange(8)
    parts = [batches.read(share) for share in np.split(places, hosts)]
    assert np.array_equal(np.concatenate(parts), batch(batches, 9))


def test_a_mixture_has_exact_shares_and_repeats_its_small_part(two_parts):
    batches = Batches.open(two_parts)
    assert list(batches.parts) == ["a", "b"]
    for steps in (1, 3, 10, 30):
        first = np.concatenate([batch(batches, step)[:, 0] for step in range(steps)])
        small = first[first >= 200]
        assert len(small) == 2 * steps  # a quarter of eight
        counts = np.bincount(small - 200, minlength=10)
        assert counts.max() - counts.min() <= 1  # no row once more before all are read
        large = first[first < 200]
        assert len(np.unique(large)) == min(6 * steps, 100)
    assert batches.epochs(10) == {"a": 0.6, "b": 2.0}
    assert batches.unique_tokens(10) == (60 + 10) * LENGTH


def test_the_order_in_which_parts_are_named_does_not_matter(two_parts):
    data = dataclasses.replace(two_parts.data, mixture={"a": 0.75, "b": 0.25})
    other = dataclasses.replace(two_parts, data=data)
    first, second = Batches.open(two_parts), Batches.open(other)
    assert np.array_equal(batch(first, 3), batch(second, 3))
    assert first.sha256 == second.sha256


def test_one_part_alone_is_named_by_its_index(shards, two_parts):
    assert Batches({"made": shards}, LENGTH, 8, 0).sha256 == shards.index_sha256
    parts = Batches.open(two_parts).parts
    both = Batches(parts, LENGTH, 8, 0, Mixture((1, 1))).sha256
    assert both not in {part.index_sha256 for part in parts.values()}


def test_parts_of_different_vocabularies_cannot_be_mixed(two_parts, tmp_path):
    index = tmp_path / "b" / "train" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"vocabulary_sha256": "other"}))
    with pytest.raises(UserError, match=r"they cannot be mixed") as caught:
        Batches.open(two_parts)
    assert "\n" not in str(caught.value)


def test_a_part_that_is_missing(two_parts):
    data = dataclasses.replace(two_parts.data, mixture={"a": 1.0, "c": 1.0})
    with pytest.raises(UserError, match=r"c/train/index\.json: not found; prepare"):
        Batches.open(dataclasses.replace(two_parts, data=data))


def test_too_little_data_for_one_row(shards):
    with pytest.raises(UserError, match="500 tokens hold no row of sequence_length=500"):
        Batches({"made": shards}, sequence_length=500, batch_size=1, seed=0)
