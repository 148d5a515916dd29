import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data.shuffle import RowOrder, permute

BLOCK, LANES = 7, 4
WINDOW = BLOCK * LANES
orders = st.builds(
    RowOrder,
    row_count=st.integers(1, 400),
    block_rows=st.integers(1, 9),
    seed=st.integers(0, 2**32),
    lanes=st.integers(1, 8),
)


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


def check_looks_random(images):
    """Mean displacement and neighbours as of uniform permutations, within five deviations."""
    keys, size = images.shape
    displacement = np.abs(images - np.arange(size)).mean()
    assert displacement == pytest.approx(size / 3, rel=0.02)
    followed = (np.diff(images, axis=1) == 1).sum()  # one a permutation is expected
    assert abs(followed - keys) < 5 * np.sqrt(keys)
    assert len({tuple(image) for image in images}) == keys


def test_permutation_looks_random():
    size = 1000
    check_looks_random(
        np.stack([permute(np.arange(size), size, np.uint64(key)) for key in range(200)])
    )


def test_less_than_a_window_is_shuffled_row_by_row():
    size = 1000  # ten blocks of a hundred
    orders = [RowOrder(size, block_rows=100, seed=seed, lanes=11) for seed in range(200)]
    check_looks_random(np.stack([order.rows(np.arange(size)) for order in orders]))


@given(order=orders, epoch=st.integers(0, 1000))
def test_every_epoch_has_every_row_once(order, epoch):
    places = epoch * order.row_count + np.arange(order.row_count)
    assert np.array_equal(np.sort(order.rows(places)), np.arange(order.row_count))


@given(order=orders, data=st.data())
def test_one_place_needs_no_other(order, data):
    places = np.array(data.draw(st.lists(st.integers(0, 2000), min_size=1, max_size=5)))
    assert order.rows(places).tolist() == [order.rows(place)[0] for place in places[:, None]]


def test_epochs_and_seeds_have_orders_of_their_own():
    places = np.arange(WINDOW * 5)
    first = RowOrder(len(places), BLOCK, seed=0, lanes=LANES)
    second = RowOrder(len(places), BLOCK, seed=1, lanes=LANES)
    found = [first.rows(places), first.rows(places + len(places)), second.rows(places)]
    for one in range(3):
        for other in range(one):
            assert (found[one] == found[other]).mean() < 0.1


def test_a_lane_uses_up_one_block_before_the_next():
    order = RowOrder(WINDOW * 10 + 3, BLOCK, seed=3, lanes=LANES)
    lanes = order.rows(np.arange(WINDOW * 10)).reshape(10 * BLOCK, LANES)
    blocks = lanes // BLOCK
    assert len(np.unique(blocks)) == sum(len(np.unique(lane)) for lane in blocks.T) == 10 * LANES
    changes = np.diff(blocks, axis=0) != 0
    assert changes.sum(axis=0).max() <= 10
    # Never many at once, and the first lane's blocks lie anywhere.
    assert changes.sum(axis=1).max() <= 2
    assert abs(np.diff(blocks[::BLOCK, 0])).min() > 1


def test_blocks_left_over_are_woven_too():
    """Three blocks more than ten windows, and three rows more than those."""
    order = RowOrder(WINDOW * 10 + BLOCK * 3 + 3, BLOCK, seed=3, lanes=LANES)
    depth = BLOCK * 3 // LANES
    rows = order.rows(WINDOW * 10 + np.arange(depth * LANES)).reshape(depth, LANES)
    assert all(len(np.unique(lane // BLOCK)) <= 2 for lane in rows.T)
    last = order.rows(np.arange(order.row_count - 4, order.row_count))
    assert set(range(order.row_count - 3, order.row_count)) <= set(last.tolist())


def test_a_place_in_the_batch_reads_one_block_at_a_time():
    """Of a real size: 300 GB in rows of 2,049 two-byte tokens, 512 a batch, over 64 hosts."""
    order = RowOrder(row_count=73_200_000, block_rows=255, lanes=2048, seed=1)
    steps = np.arange(4 * 255 * 4)  # of four windows
    share = order.rows((steps[:, None] * 512 + np.arange(8)).ravel())  # of the first host
    assert len(np.unique(share)) == len(share)
    blocks = set((share // 255).tolist())
    # Each of 32 lanes begins and ends within a block.
    assert 32 * 4 <= len(blocks) <= 32 * 5
    neighbour = order.rows((steps[:, None] * 512 + 8 + np.arange(8)).ravel())
    assert blocks.isdisjoint((neighbour // 255).tolist())
    begun = np.unique(share // 255, return_index=True)[1] // 8  # in which step
    assert np.bincount(begun[begun > 4]).max() <= 2  # not all in one
    for step in (0, 2000, 100_000):
        assert len(np.unique(order.rows(step * 512 + np.arange(512)) // 255)) == 512
