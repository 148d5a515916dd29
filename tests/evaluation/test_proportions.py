import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from scaling_jax.evaluation import proportions
from scaling_jax.evaluation.proportions import Count


@given(st.integers(1, 3000), st.data())
def test_one_share_has_the_score_interval_of_scipy(questions, data):
    right = data.draw(st.integers(0, questions))
    found = proportions.mean([[Count(right, questions)]])
    wanted = binomtest(right, questions).proportion_ci(method="wilson")
    assert found.value == right / questions
    assert found.low == pytest.approx(wanted.low, abs=1e-9)
    assert found.high == pytest.approx(wanted.high, abs=1e-9)
    assert 0 <= found.low <= found.value <= found.high <= 1


@pytest.mark.parametrize("questions", [20, 32, 100, 1000])
def test_a_share_is_covered_as_often_as_said(questions):
    """Exactly, by summing up the binomial; averaged over true shares, since counts are whole."""
    bounds = [proportions.mean([[Count(right, questions)]]) for right in range(questions + 1)]
    truths = np.linspace(0.01, 0.99, 197)
    inside = np.array([[each.low <= truth <= each.high for each in bounds] for truth in truths])
    weights = binom.pmf(np.arange(questions + 1), questions, truths[:, None])
    coverage = (inside * weights).sum(axis=1)
    assert coverage.mean() == pytest.approx(0.95, abs=0.01)
    assert coverage.min() > 0.8


def simulate(truths, sizes):
    """How often the mean of `truths` lies in its interval, below it and above it."""
    random = np.random.default_rng(0)
    drawn = random.binomial(sizes, truths, (3000, len(truths)))
    found = [
        proportions.mean([[Count(int(k), int(n))] for k, n in zip(row, sizes, strict=True)])
        for row in drawn
    ]
    truth = np.mean(truths)
    low, high = np.array([[each.low, each.high] for each in found]).T
    return np.mean((low <= truth) & (truth <= high)), np.mean(truth < low), np.mean(truth > high)


@pytest.mark.parametrize(
    ("truths", "sizes"),
    [
        # As the 17 tasks: different sizes, language modelling near 0, choices around chance.
        (np.linspace(0.02, 0.8, 17), np.geomspace(32, 10_000, 17).astype(int)),
        (np.linspace(0.8, 0.02, 17), np.geomspace(32, 10_000, 17).astype(int)),
        (np.full(5, 0.3), np.full(5, 20)),
        (np.array([0.05, 0.5, 0.95]), np.array([60, 32, 100])),
        (np.full(40, 0.02), np.full(40, 50)),
        (np.full(4, 0.005), np.full(4, 100)),
    ],
)
def test_a_mean_over_tasks_is_covered_as_often_as_said(truths, sizes):
    inside, above, below = simulate(truths, sizes)
    # 3000 draws: a standard error of 0.004.
    assert 0.935 < inside < 0.97
    assert max(above, below) < 0.06


def test_a_mean_has_the_width_that_a_bootstrap_of_every_parts_questions_has():
    random = np.random.default_rng(1)
    parts = [random.random(size) < truth for size, truth in ((3000, 0.4), (800, 0.7), (500, 0.3))]
    counts = [Count(int(each.sum()), len(each)) for each in parts]
    found = proportions.mean([[counts[0]], counts[1:]])
    first, second, third = (random.choice(each, (4000, len(each))).mean(axis=1) for each in parts)
    low, high = np.quantile((first + (second + third) / 2) / 2, (0.025, 0.975))
    assert found.value == pytest.approx(
        (parts[0].mean() + (parts[1].mean() + parts[2].mean()) / 2) / 2
    )
    assert found.low == pytest.approx(low, abs=0.001)
    assert found.high == pytest.approx(high, abs=0.001)


def test_a_mean_of_certain_answers_is_not_certain():
    alike = proportions.mean([[Count(0, 10)], [Count(0, 10)]])
    assert alike == pytest.approx(proportions.mean([[Count(0, 20)]]))
    apart = proportions.mean([[Count(0, 1)], [Count(1, 1)]])
    assert apart.low < 0.3
    assert apart.high > 0.7
