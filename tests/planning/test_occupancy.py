"""How full a machine is: figures worked out apart, and bounds that always hold."""

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from scaling_jax.planning.occupancy import occupancy, slot_counts

# Of one size of Gadre et al. 2024: 0.25 to 32 times 20 tokens a parameter on three datasets.
PAPER = [2.0**power for power in range(-2, 6)] * 3


@pytest.mark.parametrize(
    ("slots", "percent"),
    [
        *((2, 99.9), (4, 99.6), (5, 95.6), (6, 99.6), (7, 85.4), (8, 74.7)),
        *((12, 49.8), (16, 37.4), (24, 24.9)),
    ],
)
def test_the_runs_of_one_size_of_the_paper(slots, percent):
    assert 100 * occupancy(PAPER, slots) == pytest.approx(percent, abs=0.05)


@given(st.lists(st.floats(0.01, 1e12), min_size=1, max_size=30), st.integers(1, 12))
def test_between_a_third_less_than_the_best_and_full(lengths, slots):
    best = max(max(lengths), sum(lengths) / slots)
    found = occupancy(lengths, slots)
    assert found <= 1 + 1e-9
    # Graham 1969: the last one ends at most 4/3 later than in the best order.
    end = sum(lengths) / (slots * found)
    assert end >= best * (1 - 1e-9)
    assert occupancy(lengths, 1) == pytest.approx(1)
    assert math.isfinite(end)


def test_slots_divide_the_chips_and_are_no_more_than_the_runs():
    assert slot_counts(64, 24) == [1, 2, 4, 8, 16]
    assert slot_counts(4, 1) == [1]
