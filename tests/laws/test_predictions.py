"""Predictions, their intervals, influence and chaining."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_jax import laws
from scaling_jax.errors import UserError

TRUTH = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
LARGE: dict[str, Any] = {"params": 6.9e9, "tokens": 138e9}
GRID_SIZES, GRID_MULTIPLIERS = [1e7, 3e7, 1e8, 3e8], [5.0, 20.0, 80.0]
METHODS = ("calibrated", "delta", "pairs", "residual", "families", "bayes")


def runs(seed: int, count: int = 12, noise: float = 0.004) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid(GRID_SIZES, GRID_MULTIPLIERS)
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    loss = laws.FORMS["over_training"].curve(TRUTH, params=params, tokens=tokens)
    shake = np.exp(noise * np.random.default_rng(seed).standard_normal(len(params)))
    table = pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss * shake})
    table["error/task"] = 0.75 - 2.2 * np.exp(-0.75 * table["loss/val"])
    return table.iloc[np.linspace(0, 11, count).astype(int)]


@pytest.fixture(scope="module")
def fit() -> laws.Fit:
    return laws.fit("over_training", runs(0), target="loss/val")


@pytest.mark.parametrize("method", METHODS)
def test_intervals_widen_with_level_and_distance(fit, method):
    near = fit.predict(params=3e8, tokens=2e10, level=0.5, method=method)
    far = fit.predict(params=3e10, tokens=2e12, level=0.5, method=method)
    surer = fit.predict(params=3e8, tokens=2e10, level=0.95, method=method)
    assert near.low < near.center < near.high
    assert surer.low < near.low
    assert near.high < surer.high
    assert far.high / far.low > near.high / near.low


def test_arrays_broadcast_and_scalars_stay_scalars(fit):
    one = fit.predict(**LARGE)
    many = fit.predict(params=[1e9, 6.9e9], tokens=[[138e9], [2e11]])
    assert isinstance(one.value, float)
    assert many.low.shape == (2, 2)
    assert many.value[0, 1] == pytest.approx(one.value)
    assert many.low[0, 1] == pytest.approx(one.low, rel=1e-9)


@pytest.mark.parametrize("count", [5, 6])
def test_few_runs_still_give_an_interval(count):
    table = runs(1, count)
    prediction = laws.fit("over_training", table, target="loss/val").predict(**LARGE)
    truth = laws.FORMS["over_training"].curve(TRUTH, **LARGE)
    assert prediction.low < truth < prediction.high
    assert prediction.high / prediction.low < 1.5


def test_the_calibrated_interval_covers_where_the_law_is_wrong():
    """Runs whose loss goes on falling: a pairs bootstrap of the wrong law is sure and wrong."""

    def bend(params):
        return 1 - 0.01 * np.log10(params / 1e7) ** 2

    table = pd.concat([runs(seed, noise=0.001) for seed in range(4)], ignore_index=True)
    bent = table["loss/val"] * bend(table["params"])
    fit = laws.fit("over_training", table.assign(**{"loss/val": bent}), target="loss/val")
    large: dict[str, Any] = {"params": 2e9, "tokens": 8e10}
    truth = laws.FORMS["over_training"].curve(TRUTH, **large).item() * bend(large["params"])
    assert fit.predict(**large).low < truth < fit.predict(**large).high
    assert fit.predict(**large, method="pairs").low > truth


def test_cautions_name_what_is_asked_too_much(fit):
    assert "decades" in fit.predict(params=1e12, tokens=2e13).warnings[0]
    assert any("multipliers" in w for w in fit.predict(params=1e9, tokens=1e12).warnings)
    assert any("among the fitted" in w for w in fit.predict(params=1e7, tokens=5e7).warnings)


def test_as_many_runs_as_parameters_leave_the_delta_method_no_interval():
    few = laws.fit("over_training", runs(0, 4), target="loss/val")
    found = few.predict(params=np.array([1e9, 2e9]), tokens=2e10, method="delta")
    assert found.low.tolist() == [0, 0]
    assert found.high.tolist() == [np.inf, np.inf]


def test_a_law_that_the_interval_leaves_out_is_said():
    # Kaplan's law has no irreducible loss.
    kaplan = laws.fit("kaplan", runs(0), target="loss/val").predict(**LARGE)
    assert kaplan.value < kaplan.low
    assert any("outside the interval" in warning for warning in kaplan.warnings)


def test_what_runs_measure_on_average_is_surer_than_what_one_measures(fit):
    x = np.array([[1e8, 6.9e9], [2e9, 138e9]])
    one, average = (fit.calibration.predictive(x, noise=noise) for noise in (True, False))
    np.testing.assert_array_equal(one.mean, average.mean)
    assert (average.scale < one.scale).all()
    # Near the data noise is most of what is unknown, far away it is not.
    assert (average.scale / one.scale)[0] < (average.scale / one.scale)[1]


@pytest.mark.parametrize(
    ("objective", "close"), [(laws.least_squares(), 1e-6), (laws.pseudo_huber(0.002), 1e-4)]
)
def test_influence_is_what_refits_show(objective, close):
    table = runs(0)
    fit = laws.fit("over_training", table, target="loss/val", objective=objective)
    influence = fit.influence(**LARGE)
    for row in range(len(table)):
        moved = []
        for step in (1e-4, -1e-4):
            loss = table["loss/val"].to_numpy() + step * (np.arange(len(table)) == row)
            changed = table.assign(**{"loss/val": loss})
            again = laws.fit("over_training", changed, target="loss/val", objective=objective)
            moved.append(again.predict(**LARGE, method="delta").value)
        slope = (moved[0] - moved[1]) / 2e-4
        assert slope == pytest.approx(influence[row], rel=close, abs=close / 10)


@settings(max_examples=10, deadline=None)
@given(st.floats(1.1, 5.0))
def test_predictions_scale_with_the_unit_of_loss(factor):
    """Measuring in other units scales every log-residual fit and its delta interval alike."""
    table = runs(2)
    scaled = table.assign(**{"loss/val": table["loss/val"] * factor})
    first, second = (
        laws.fit("over_training", t, target="loss/val").predict(**LARGE, method="delta")
        for t in (table, scaled)
    )
    assert second.value == pytest.approx(factor * first.value, rel=1e-5)
    assert second.high == pytest.approx(factor * first.high, rel=1e-4)


@pytest.mark.parametrize("law", ["exponential", "sigmoid"])
def test_chained_errors_carry_the_uncertainty_of_the_loss(fit, law):
    table = runs(0)
    error = laws.fit(law, table, target="error/task", loss="loss/val", chance=0.75)
    assert error.parameters["eps"] == 0.75
    chain = laws.chained(fit, error).predict(**LARGE, level=0.95)
    sure = error.predict(loss=fit.predict(**LARGE).center, level=0.95)
    assert chain.high - chain.low > sure.high - sure.low
    truth = 0.75 - 2.2 * np.exp(-0.75 * laws.FORMS["over_training"].curve(TRUTH, **LARGE))
    assert chain.low < truth < chain.high
    assert 0 <= chain.low < chain.high <= 1


def test_laws_that_do_not_chain_are_refused(fit):
    error = laws.fit(
        "exponential",
        runs(0).assign(**{"loss/b": 3.0 + runs(0)["loss/val"]}),
        target="error/task",
        loss="loss/b",
    )
    with pytest.raises(UserError, match="reads 'loss/b'"):
        laws.chained(fit, error)
    with pytest.raises(UserError, match="no error law"):
        laws.chained(fit, fit)


@pytest.mark.parametrize("arguments", [{"level": 1.2}, {"method": "magic"}, {"tokens": -1.0}])
def test_impossible_questions_are_refused(fit, arguments):
    with pytest.raises(UserError):
        fit.predict(**(LARGE | arguments))


@pytest.mark.parametrize("method", ["delta", "pairs", "residual"])
def test_parameter_intervals_hold_the_truth(fit, method):
    for name, (low, high) in fit.intervals(0.99, method).items():
        assert low < TRUTH[name] < high
