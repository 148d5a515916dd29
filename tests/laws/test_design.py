"""Designed runs: what they are said to teach is what laws fitted with them learn."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError
from scaling_jax.laws import bayes
from scaling_jax.laws.predictive import student_t_quantile

TRUTH = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
TARGET: dict[str, Any] = {"params": 6.9e9, "tokens": 138e9}
GOAL = np.array([[6.9e9], [138e9]])
NOISE = 0.003


def measured(params: np.ndarray, tokens: np.ndarray, seed: int) -> pd.DataFrame:
    loss = laws.FORMS["over_training"].curve(TRUTH, params=params, tokens=tokens)
    shake = np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(loss)))
    return pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss * shake})


def small_runs(seed: int = 0) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid([1e7, 3e7, 1e8], [10.0, 20.0, 40.0])
    return measured(sizes.ravel(), (sizes * multipliers).ravel(), seed)


def points(table: pd.DataFrame) -> np.ndarray:
    return table[["params", "tokens"]].to_numpy(float).T


@pytest.fixture(scope="module")
def fit() -> laws.Fit:
    return laws.fit("over_training", small_runs(), target="loss/val")


@pytest.fixture(scope="module")
def design(fit) -> laws.Design:
    return laws.next_runs(fit, target=TARGET, budget_flops=1e19)


def test_before_is_the_half_width_of_the_bayesian_interval(fit, design):
    found = fit.predict(**TARGET, method="bayes")
    assert design.before == pytest.approx(np.log(found.high / found.low) / 2, rel=1e-6)


def test_the_covariance_has_the_variances_of_the_forecast(fit):
    known = fit.calibration.posterior
    at = points(small_runs()) * 7
    _, sd = known.forecast(at)
    variances = np.diag(known.covariance(at)) + known.noise_variance
    np.testing.assert_allclose(variances, sd**2, rtol=1e-9)


def test_the_announced_variance_is_the_spread_of_refits(fit, design):
    """Monte Carlo: worlds are drawn from what is known, runs are measured there, and laws refitted.

    The refitted law's error at the target, over worlds, and the width that it claims are both the
    announced ones.
    """
    known = fit.calibration.posterior
    at = np.concatenate([points(design.runs), GOAL], axis=1)
    center, _ = known.forecast(at)
    joint, noise = known.covariance(at), known.noise_variance
    random = np.random.default_rng(0)
    worlds = random.multivariate_normal(center, joint, size=120)
    x = np.concatenate([fit.observations.x, points(design.runs)], axis=1)
    off, claimed = [], []
    for world in worlds:
        shaken = world[:-1] + np.sqrt(noise) * random.standard_normal(len(world) - 1)
        again = bayes.posterior(x, np.concatenate([fit.observations.y, np.exp(shaken)]))
        found, sd = again.forecast(GOAL)
        off.append(found[0] - world[-1])
        claimed.append(sd[0])
    reach = student_t_quantile(0.9, np.inf)
    after = np.sqrt((design.after / reach) ** 2 - noise)
    assert np.std(off) == pytest.approx(after, rel=0.25)
    assert np.sqrt(np.mean(np.square(claimed))) * reach == pytest.approx(design.after, rel=0.25)


def test_designed_runs_teach_more_than_random_ones_of_the_same_cost(fit, design):
    """Refits, to runs that lie on a law, claim narrower intervals with the designed runs."""
    random = np.random.default_rng(0)

    def half_width(extra: pd.DataFrame) -> float:
        more = measured(extra["params"].to_numpy(), extra["tokens"].to_numpy(), 1)
        table = pd.concat([small_runs(), more], ignore_index=True)
        known = bayes.posterior(points(table), table["loss/val"].to_numpy())
        return float(known.forecast(GOAL)[1][0])

    def drawn() -> pd.DataFrame:
        table = design.candidates.sample(frac=1.0, random_state=random.integers(10**6))
        return table[table["flops_6nd"].cumsum() <= design.flops]

    assert half_width(design.runs) < np.median([half_width(drawn()) for _ in range(9)])


def test_the_budget_is_kept_and_every_run_helps(design):
    assert design.flops == pytest.approx(design.runs["flops_6nd"].sum())
    assert design.flops <= 1e19
    assert (np.diff(design.runs["flops_6nd"]) >= 0).all()
    widths = np.concatenate([[design.before], design.runs["half_width"]])
    assert (np.diff(widths) <= 0).all()
    assert design.after == design.runs["half_width"].iloc[-1]
    assert not design.runs.duplicated().any()
    assert (design.candidates["half_width"] <= design.before).all()


def test_given_candidates_are_chosen_from_and_keep_their_columns(fit):
    candidates = pd.DataFrame({"params": [1e7, 1e9], "tokens": [2e8, 2e10], "queue": ["a", "b"]})
    design = laws.next_runs(fit, target=TARGET, budget_flops=1e21, candidates=candidates, count=1)
    assert design.runs["queue"].tolist() == ["b"]


def test_several_targets_share_a_design(fit, design):
    """Half widths are root mean squares, and the design is as good on average as one for each."""
    other = {"params": 1e9, "tokens": 6e11}
    both = {name: np.array([TARGET[name], other[name]]) for name in TARGET}
    found = laws.next_runs(fit, target=both, budget_flops=1e19)
    alone = laws.next_runs(fit, target=other, budget_flops=1e19)
    assert found.before == pytest.approx(np.hypot(design.before, alone.before) / np.sqrt(2))
    at_best = np.hypot(design.after, alone.after) / np.sqrt(2)
    assert at_best * (1 - 1e-3) <= found.after < 1.1 * at_best


def test_three_runs_are_enough_for_a_design():
    fit = laws.fit("over_training", small_runs()[:3], target="loss/val")
    design = laws.next_runs(fit, target=TARGET, budget_flops=1e19)
    assert design.after < design.before


def test_a_first_design_needs_no_run():
    design = laws.first_runs(target=TARGET, budget_flops=1e19)
    assert design.flops <= 1e19
    assert design.flops == pytest.approx(design.runs["flops_6nd"].sum())
    assert design.runs["flops_6nd"].iloc[0] == design.candidates["flops_6nd"].min()
    assert design.after < design.before / 2
    assert design.runs["params"].nunique() > 1
    alone = laws.first_runs(target=TARGET, budget_flops=1e19, count=1)
    assert len(alone.runs) == 1
    assert alone.after == alone.before == design.before


def test_the_first_loss_gives_the_scale_and_nothing_else():
    x = np.array([[1e7], [2e8]])
    at = np.array([[1e8, 1e9], [2e9, 2e10]])
    low, high = (bayes.posterior(x, np.array([loss])).covariance(at) for loss in (0.5, 5.0))
    np.testing.assert_allclose(low, high, rtol=1e-6)


def test_what_cannot_be_is_refused(fit):
    with pytest.raises(UserError, match="no candidate"):
        laws.next_runs(fit, target=TARGET, budget_flops=1.0)
    for budget in (-1.0, np.inf, np.nan):
        with pytest.raises(UserError, match="budget_flops"):
            laws.next_runs(fit, target=TARGET, budget_flops=budget)
    with pytest.raises(UserError, match="'tokens' is missing"):
        laws.next_runs(fit, target={"params": 1e9}, budget_flops=1e20)
    with pytest.raises(UserError, match="count must be 1"):
        laws.first_runs(target=TARGET, budget_flops=1e20, count=0)
    with pytest.raises(UserError, match="there is none"):
        laws.first_runs(target={"params": np.empty(0), "tokens": np.empty(0)}, budget_flops=1e20)
    with pytest.raises(UserError, match="level=2"):
        laws.first_runs(target=TARGET, budget_flops=1e20, level=2)
    errors = small_runs().assign(**{"error/x": np.linspace(0.6, 0.5, 9)})
    chained = laws.fit("exponential", errors, target="error/x", loss="loss/val")
    with pytest.raises(UserError, match="params and tokens"):
        laws.next_runs(chained, target=TARGET, budget_flops=1e20)
