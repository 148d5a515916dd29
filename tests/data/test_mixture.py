import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data.mixture import Mixture
from scaling_jax.errors import UserError

REDPAJAMA = {
    "common_crawl": 0.67,
    "c4": 0.15,
    "github": 0.045,
    "books": 0.045,
    "arxiv": 0.025,
    "wikipedia": 0.045,
    "stackexchange": 0.02,
}
rates = st.lists(st.integers(1, 300), min_size=1, max_size=9).map(
    lambda numbers: {f"part{number}": float(rate) for number, rate in enumerate(numbers)}
)


@given(rates=rates)
def test_every_prefix_has_its_shares_within_one_sequence(rates):
    mixture = Mixture.of_rates(rates)
    cycle = sum(mixture.weights)
    parts, _ = mixture.draw(np.arange(2 * cycle))
    counts = np.cumsum(parts[:, None] == np.arange(len(rates)), axis=0)
    read = np.arange(1, 2 * cycle + 1)[:, None]
    # In whole numbers: |count - read * weight / cycle| < 1
    assert (np.abs(counts * cycle - read * np.array(mixture.weights)) < cycle).all()


@given(rates=rates, first=st.integers(0, 10**12))
def test_one_place_needs_no_other(rates, first):
    mixture = Mixture.of_rates(rates)
    parts, indices = mixture.draw(first + np.arange(200))
    before = mixture.counts(first)
    for part in range(len(rates)):
        mine = indices[parts == part]
        assert np.array_equal(mine, before[part] + np.arange(len(mine)))
    assert sum(before) == first
    later = mixture.counts(first + 200)
    assert np.array_equal(np.subtract(later, before), np.bincount(parts, minlength=len(rates)))


def test_rates_are_the_decimal_numbers_that_they_are_written_as():
    assert Mixture.of_rates(REDPAJAMA).weights == (134, 30, 9, 9, 5, 9, 4)
    assert Mixture.of_rates({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}).weights == (1, 1, 1)
    assert Mixture.of_rates({"a": 878e9, "b": 175e9, "c": 59e9}).weights == (878, 175, 59)
    assert Mixture.of_rates({"a": 0.1}).weights == (1,)


def test_rates_that_never_come_round_are_refused():
    with pytest.raises(UserError, match="repeat only after") as caught:
        Mixture.of_rates({"a": 0.123456789, "b": 1.0})
    assert "\n" not in str(caught.value)
