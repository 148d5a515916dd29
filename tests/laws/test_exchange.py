"""Chosen observations: exchange is never worse than greedy, and finds what is best of all."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_jax.laws import exchange

NOISE = 0.1


def problem(seed: int, candidates: int = 9, goals: int = 2) -> tuple[np.ndarray, np.ndarray, float]:
    """A covariance of candidates and goals, costs over three decades, and a budget."""
    random = np.random.default_rng(seed)
    factors = random.standard_normal((candidates + goals, 4))
    costs = 10 ** random.uniform(0, 3, candidates)
    return factors @ factors.T, costs, float(costs.sum() * random.uniform(0.2, 0.7))


def exhaustive(joint: np.ndarray, costs: np.ndarray, budget: float) -> float:
    subsets = (
        subset
        for size in range(len(costs) + 1)
        for subset in itertools.combinations(range(len(costs)), size)
        if costs[list(subset)].sum() <= budget
    )
    return min(exchange.goal_variance(joint, NOISE, subset, len(costs)) for subset in subsets)


def both_greedy(joint: np.ndarray, costs: np.ndarray, budget: float) -> list[list[int]]:
    return [
        exchange.greedy(joint, NOISE, costs, budget, per_cost=per_cost)
        for per_cost in (True, False)
    ]


def test_what_is_left_is_the_conditional_covariance():
    """Against the inverse of a block of the precision, another way to the same."""
    joint, _, _ = problem(0)
    chosen, others = [1, 4], [0, 2, 3, *range(5, 11)]
    noisy = joint + np.diag([NOISE if row in chosen else 1e-12 for row in range(11)])
    expected = np.linalg.inv(np.linalg.inv(noisy)[np.ix_(others, others)])
    found = exchange.observed(joint, NOISE, chosen)[np.ix_(others, others)]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    variance = exchange.goal_variance(joint, NOISE, chosen, 9)
    assert variance == pytest.approx(np.diag(expected)[-2:].mean(), rel=1e-3)


def test_a_gain_is_the_difference_that_one_observation_makes():
    joint, costs, _ = problem(1)
    before = exchange.goal_variance(joint, NOISE, [], len(costs))
    after = [exchange.goal_variance(joint, NOISE, [row], len(costs)) for row in range(len(costs))]
    np.testing.assert_allclose(exchange.gains(joint, NOISE, len(costs)), before - np.array(after))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_exchange_is_never_worse_than_greedy_and_keeps_the_budget(seed):
    joint, costs, budget = problem(seed)
    chosen = exchange.choose(joint, NOISE, costs, budget)
    assert costs[chosen].sum() <= budget
    assert len(set(chosen)) == len(chosen)
    assert (np.diff(costs[chosen]) >= 0).all()
    variance = exchange.goal_variance(joint, NOISE, chosen, len(costs))
    for greedy in both_greedy(joint, costs, budget):
        assert variance <= exchange.goal_variance(joint, NOISE, greedy, len(costs)) * (1 + 1e-9)


@pytest.mark.parametrize("seed", [14, 21])
def test_exchange_finds_the_best_set_where_greedy_does_not(seed):
    joint, costs, budget = problem(seed)
    best = exhaustive(joint, costs, budget)
    for greedy in both_greedy(joint, costs, budget):
        assert exchange.goal_variance(joint, NOISE, greedy, len(costs)) > 1.05 * best
    chosen = exchange.choose(joint, NOISE, costs, budget)
    variance = exchange.goal_variance(joint, NOISE, chosen, len(costs))
    assert variance == pytest.approx(best, rel=1e-9)


def test_no_more_are_chosen_than_asked_for():
    joint, costs, budget = problem(2)
    for most in (0, 1, 2):
        assert len(exchange.choose(joint, NOISE, costs, budget, most)) <= most


def test_without_candidates_nothing_is_chosen():
    assert exchange.choose(np.ones((1, 1)), NOISE, np.empty(0), 1.0) == []
