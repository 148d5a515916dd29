"""Designed runs: what they are said to teach is what refits learn."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError

TRUTH = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
TARGET: dict[str, Any] = {"params": 6.9e9, "tokens": 138e9}
NOISE = 0.003


def measured(params: np.ndarray, tokens: np.ndarray, seed: int) -> pd.DataFrame:
    loss = laws.FORMS["over_training"].curve(TRUTH, params=params, tokens=tokens)
    shake = np.exp(NOISE * np.random.default_rng(seed).standard_normal(len(loss)))
    return pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss * shake})


def first_runs(seed: int = 0) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid([1e7, 3e7, 1e8], [10.0, 20.0, 40.0])
    return measured(sizes.ravel(), (sizes * multipliers).ravel(), seed)


@pytest.fixture(scope="module")
def fit() -> laws.Fit:
    return laws.fit("over_training", first_runs(), target="loss/val")


def spread_of_refits(extra: pd.DataFrame, seeds: range) -> float:
    """Standard deviation, over noise, of the prediction of a law fitted with the extra runs."""
    values = []
    for seed in seeds:
        more = measured(extra["params"].to_numpy(), extra["tokens"].to_numpy(), seed + 1000)
        table = pd.concat([first_runs(seed), more], ignore_index=True)
        refitted = laws.fit("over_training", table, target="loss/val")
        values.append(refitted.predict(**TARGET, method="delta").value)
    return float(np.std(np.log(values)))


def test_the_chosen_run_shrinks_the_prediction_more_than_the_average_candidate(fit):
    design = laws.next_runs(fit, target=TARGET, budget_flops=3e18, count=1, prefer="most")
    assert len(design.runs) == 1
    assert design.after < design.before
    seeds = range(20)
    chosen = spread_of_refits(design.runs, seeds)
    every = design.candidates.iloc[:: max(1, len(design.candidates) // 4)]
    others = [spread_of_refits(every.iloc[[row]], seeds) for row in range(len(every))]
    assert chosen < np.mean(others)


def test_the_expected_interval_is_that_of_a_fit_with_the_run(fit):
    """With the new loss on the curve the refit's delta interval is the announced one."""
    design = laws.next_runs(fit, target=TARGET, budget_flops=1e19, count=2, prefer="most")
    added = design.runs[["params", "tokens"]]
    at = {name: added[name].to_numpy() for name in ("params", "tokens")}
    table = pd.concat([first_runs(), added.assign(**{"loss/val": fit.curve(**at)})])
    again = laws.fit("over_training", table, target="loss/val")
    relative = again.slopes(np.array([[6.9e9], [138e9]])) / again.predict(**TARGET).value
    sd = np.sqrt(relative @ again.covariance @ relative.T).item() / again.noise
    before = np.sqrt(relative @ fit.covariance @ relative.T).item() / fit.noise
    assert design.after / design.before == pytest.approx(sd / before, rel=0.1)


def test_the_budget_is_kept(fit):
    design = laws.next_runs(fit, target=TARGET, budget_flops=1e19)
    assert design.flops == pytest.approx(design.runs["flops_6nd"].sum())
    assert design.flops <= 1e19
    assert (np.diff(design.runs["half_width"]) <= 0).all()
    assert not design.runs.duplicated().any()


def test_given_candidates_are_chosen_from(fit):
    candidates = pd.DataFrame({"params": [1e7, 1e9], "tokens": [2e8, 2e10]})
    design = laws.next_runs(
        fit, target=TARGET, budget_flops=1e21, candidates=candidates, prefer="most", count=1
    )
    assert design.runs["params"].tolist() == [1e9]


def test_too_few_runs_to_measure_noise_still_give_a_design():
    fit = laws.fit("over_training", first_runs()[:4], target="loss/val")
    design = laws.next_runs(fit, target=TARGET, budget_flops=1e19)
    assert design.after < design.before


def test_what_cannot_be_is_refused(fit):
    with pytest.raises(UserError, match="no candidate"):
        laws.next_runs(fit, target=TARGET, budget_flops=1.0)
    with pytest.raises(UserError, match="budget_flops"):
        laws.next_runs(fit, target=TARGET, budget_flops=-1.0)
    with pytest.raises(UserError, match="'tokens' is missing"):
        laws.next_runs(fit, target={"params": 1e9}, budget_flops=1e20)
