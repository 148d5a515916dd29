"""Two laws side by side: closed forms, and how often the intervals hold."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError
from scaling_jax.laws import calibrated
from scaling_jax.testbeds import published

DATA = Path(__file__).parents[2] / ".." / "shared" / "data"
A = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
AT: dict[str, Any] = {"params": 3e9, "tokens": 6e10}


def scaled(factor: float, **changed: float) -> dict[str, float]:
    """Law A with its reducible loss times `factor`."""
    return {**A, "a": factor * A["a"], "b": factor * A["b"], **changed}


def runs(truth: dict[str, float], noise: float = 0.0, seed: int = 0) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid(np.geomspace(1e7, 5e8, 5), [10.0, 20.0, 80.0])
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    loss = laws.FORMS["over_training"].curve(truth, params=params, tokens=tokens)
    loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
    return pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss})


def fitted(truth: dict[str, float], noise: float = 0.0, seed: int = 0) -> laws.Fit:
    return laws.fit("over_training", runs(truth, noise, seed), target="loss/val")


def test_a_better_recipe_is_worth_so_much_compute():
    a, b = fitted(A), fitted(scaled(1.2))
    found = laws.compare(a, b, **AT)
    # The reducible loss is C^-eta times a function of the token multiplier.
    assert found.compute_ratio.value == pytest.approx(1.2 ** (-1 / A["eta"]), rel=1e-3)
    back = laws.compare(b, a, **AT)
    assert back.compute_ratio.value == pytest.approx(1.2 ** (1 / A["eta"]), rel=1e-3)
    expected = [laws.FORMS["over_training"].curve(law, **AT) for law in (A, scaled(1.2))]
    assert found.difference.value == pytest.approx(float(expected[0] - expected[1]), rel=1e-4)
    assert found.difference.low < found.difference.value < found.difference.high < 0
    assert found.a_better > 0.99
    assert back.a_better < 0.01
    assert np.isnan(found.crossing_flops.value)
    assert found.crossing_share < 0.1


def test_where_two_laws_cross():
    # 1.7 + k x = 1.8 + 0.8 k x, x = C^-eta
    other = scaled(0.8, E=1.8)
    k = A["a"] * 20 ** A["eta"] + A["b"] * 20 ** -A["eta"]
    expected = (0.2 * k / 0.1) ** (1 / A["eta"])
    wide = (1e16, 1e26)
    found = laws.compare(fitted(A), fitted(other), **AT, flops_range=wide)
    assert found.crossing_flops.value == pytest.approx(expected, rel=5e-3)
    assert found.crossing_flops.low < expected < found.crossing_flops.high
    assert found.crossing_share > 0.6
    short = (1e16, expected / 3)
    found = laws.compare(fitted(A), fitted(other), **AT, flops_range=short)
    assert np.isnan(found.crossing_flops.value)
    assert found.flops_range == short


def test_a_loss_that_is_never_reached():
    found = laws.compare(fitted(scaled(1.0, E=2.3)), fitted(A), **AT)
    assert found.compute_ratio.value == np.inf
    assert found.compute_ratio.high == np.inf
    assert found.difference.low > 0
    back = laws.compare(fitted(A), fitted(scaled(1.0, E=2.3)), **AT)
    assert 0 < back.compute_ratio.value < 1


def test_runs_in_pairs_make_the_interval_narrower():
    a, b = fitted(A, 0.003, 1), fitted(scaled(1.05), 0.003, 2)
    paired, apart = laws.compare(a, b, **AT), laws.compare(a, b, **AT, correlation=0.0)
    assert paired.correlation == 0.4
    assert paired.difference.value == apart.difference.value
    width, other = (x.difference.high - x.difference.low for x in (paired, apart))
    # The standard deviation of a difference is sqrt(1 - correlation) of that without one.
    assert width == pytest.approx(np.sqrt(0.6) * other, rel=0.1)
    odd = runs(A, 0.003, 1).assign(tokens=lambda table: 1.1 * table["tokens"])
    alone = laws.fit("over_training", odd, target="loss/val")
    assert laws.compare(alone, b, **AT).correlation == 0


def test_a_wider_level_and_the_same_answer_twice():
    a, b = fitted(A, 0.003, 1), fitted(scaled(1.05), 0.003, 2)
    half, most = (laws.compare(a, b, **AT, level=level) for level in (0.5, 0.95))
    for name in ("difference", "compute_ratio"):
        inner, outer = getattr(half, name), getattr(most, name)
        assert outer.low < inner.low < inner.high < outer.high
    assert laws.compare(a, b, **AT, level=0.5).difference == half.difference


@pytest.mark.parametrize("curved", [0.0, pytest.param(0.02, marks=pytest.mark.slow)])
def test_intervals_hold_the_truth(curved):
    """Known laws and noise; with `curved` both bend away from any law that is fitted to them."""
    b = scaled(1.06, E=1.72)

    def true(law: dict[str, float], params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        loss = laws.FORMS["over_training"].curve(law, params=params, tokens=tokens)
        return loss * np.exp(curved * np.log10(params * tokens / 1e17) ** 2 / 10)

    grid = np.geomspace(1e-3, 1e3, 6001)
    params, tokens = AT["params"] * np.sqrt(grid), AT["tokens"] * np.sqrt(grid)
    curves = true(A, params, tokens), true(b, params, tokens)
    difference = curves[0][3000] - curves[1][3000]
    ratio = grid[np.argmax(curves[0] <= curves[1][3000])]
    table = runs(A)
    at = table["params"].to_numpy(), table["tokens"].to_numpy()
    hits = []
    for seed in range(10):
        random = np.random.default_rng(seed)
        fits = []
        for law in (A, b):
            loss = true(law, *at) * np.exp(0.004 * random.standard_normal(len(table)))
            noisy = table.assign(**{"loss/val": loss})
            fits.append(laws.fit("over_training", noisy, target="loss/val"))
        found = laws.compare(*fits, **AT)
        parts = ((found.difference, difference), (found.compute_ratio, ratio))
        hits.append([part.low <= truth <= part.high for part, truth in parts])
    assert (np.mean(hits, axis=0) >= 0.9).all()


@pytest.mark.slow
def test_intervals_hold_what_larger_runs_of_the_papers_testbed_measured():
    if not (DATA / "gadre").is_dir():
        pytest.skip("the testbed 'gadre' is not on this machine")
    table = published.gadre2024(DATA / "gadre")
    table = table[table["token_multiplier"] > 9.5]
    hits = []
    for target in ("loss/c4_val", "loss/paloma_ptb"):
        for cut in calibrated.compute_cuts(table["flops_6nd"].to_numpy())[::3]:
            rows = {str(name): part for name, part in table.groupby("dataset")}
            fits = {
                name: laws.fit("over_training", part[part["flops_6nd"] < cut], target=target)
                for name, part in rows.items()
                if (part["flops_6nd"] < cut).sum() >= calibrated.FEWEST_BELOW
            }
            names = sorted(fits)
            for first, second in zip(names, [*names[1:], *names[:1]], strict=True):
                both = rows[first].merge(rows[second], on=["params", "tokens"])
                for _, run in both[both["flops_6nd_x"] >= cut].iterrows():
                    pair = fits[first], fits[second]
                    found = laws.compare(*pair, params=run["params"], tokens=run["tokens"])
                    part = found.difference
                    measured = run[f"{target}_x"] - run[f"{target}_y"]
                    hits.append(part.low <= measured <= part.high)
    assert len(hits) > 100
    assert 0.8 <= np.mean(hits) <= 0.98


def test_what_cannot_be_compared_is_refused():
    a = fitted(A)
    other = runs(A).rename(columns={"loss/val": "loss/other"})
    with pytest.raises(UserError, match="one law is of 'loss/val', the other of 'loss/other'"):
        laws.compare(a, laws.fit("over_training", other, target="loss/other"), **AT)
    with pytest.raises(UserError, match="tokens must be"):
        laws.compare(a, a, params=1e9, tokens=-1.0)
    with pytest.raises(UserError, match="flops_range"):
        laws.compare(a, a, **AT, flops_range=(1e20, 1e18))
    with pytest.raises(UserError, match="correlation"):
        laws.compare(a, a, **AT, correlation=2.0)
    with pytest.raises(UserError, match="level"):
        laws.compare(a, a, **AT, level=90.0)
    by_compute = dataclasses.replace(a, form=laws.FORMS["broken_power_law"])
    with pytest.raises(UserError, match="law of params and tokens"):
        laws.compare(a, by_compute, **AT)
