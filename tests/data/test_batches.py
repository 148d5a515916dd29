import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from scaling_jax.data.batches import Batches, permute
from scaling_jax.errors import UserError

LENGTH = 4


@pytest.fixture
def shards(make_shards):
    """100 rows, each recognised by its first token."""
    return make_shards([[row, 2, 2, 2, 1] for row in range(3, 103)], shards=3)


@given(size=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(size, key):
    image = permute(np.arange(size), size, np.uint64(key))
    assert np.array_equal(np.sort(image), np.arange(size))


@given(size=st.integers(1, 2**40), key=st.integers(0, 2**64 - 1), data=st.data())
def test_one_index_needs_no_other(size, key, data):
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5)))
    together = permute(indices, size, np.uint64(key))
    alone = [permute(indices[[place]], size, np.uint64(key))[0] for place in range(len(indices))]
    assert together.tolist() == alone
    assert together.min() >= 0
    assert together.max() < size


def test_permutation_looks_random():
    """Mean displacement and neighbours as of a uniform permutation, within five deviations."""
    size, keys = 1000, range(200)
    images = np.stack([permute(np.arange(size), size, np.uint64(key)) for key in keys])
    displacement = np.abs(images - np.arange(size)).mean()
    assert displacement == pytest.approx(size / 3, rel=0.02)
    followed = (np.diff(images, axis=1) == 1).sum()  # one a permutation is expected
    assert abs(followed - len(keys)) < 5 * np.sqrt(len(keys))
    assert len({tuple(image) for image in images}) == len(keys)


def test_an_epoch_has_every_row_once_and_the_next_another_order(shards):
    batches = Batches(shards, LENGTH, batch_size=10, seed=0)
    epochs = [
        np.concatenate([batches.row_indices(step) for step in range(start, start + 10)])
        for start in (0, 10)
    ]
    assert all(np.array_equal(np.sort(epoch), np.arange(100)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert batches.epochs(15) == 1.5


def test_a_batch_may_span_two_epochs(shards):
    batches = Batches(shards, LENGTH, batch_size=64, seed=3)
    stream = np.concatenate([batches.row_indices(step) for step in range(25)])
    for epoch in range(16):
        assert np.array_equal(np.sort(stream[100 * epoch : 100 * (epoch + 1)]), np.arange(100))


def test_seed_and_step_decide_everything(shards):
    first, again = (Batches(shards, LENGTH, batch_size=8, seed=5) for _ in range(2))
    assert np.array_equal(first.host_rows(7), again.host_rows(7))
    other = Batches(shards, LENGTH, batch_size=8, seed=6)
    assert not np.array_equal(first.row_indices(7), other.row_indices(7))


def test_any_step_is_reached_at_once(shards):
    batches = Batches(shards, LENGTH, batch_size=8, seed=5)
    assert batches.host_rows(10**12).shape == (8, LENGTH + 1)


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_read_the_same_batch(shards, hosts):
    batches = Batches(shards, LENGTH, batch_size=16, seed=1)
    share = 16 // hosts
    parts = [batches.host_rows(9, slice(host * share, (host + 1) * share)) for host in range(hosts)]
    assert np.array_equal(np.concatenate(parts), batches.host_rows(9))


@pytest.mark.parametrize(
    "spec", [PartitionSpec("data"), PartitionSpec(), PartitionSpec("data", None)]
)
@pytest.mark.parametrize("devices", [1, 2, 8])
def test_batch_is_the_same_on_any_number_of_devices(shards, devices, spec):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, spec)
    batches = Batches(shards, LENGTH, batch_size=16, seed=1)
    batch = batches.global_batch(3, sharding)
    assert batch.dtype == np.int32
    assert batch.sharding.is_equivalent_to(sharding, 2)
    assert np.array_equal(batch, batches.host_rows(3))


def test_too_little_data_for_one_row(shards):
    with pytest.raises(UserError, match="500 tokens hold no row of sequence_length=500"):
        Batches(shards, sequence_length=500, batch_size=1, seed=0)
