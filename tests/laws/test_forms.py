"""The forms: known values, limits, and fits that find them again."""

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws

# Muennighoff et al. 2023, released code: log A, log B, log E, alpha = beta, R_D*, R_N*.
DATABLATIONS = {
    "E": np.exp(0.6254804),
    "A": np.exp(6.255414),
    "B": np.exp(7.3049974),
    "alpha": 0.3526596,
    "beta": 0.3526596,
    "R_D": 15.387756,
    "R_N": 5.309743,
}
CONSTRAINED = laws.FORMS["data_constrained"]
CHINCHILLA = laws.FORMS["chinchilla"]
BASE = {name: DATABLATIONS[name] for name in ("E", "A", "B", "alpha", "beta")}


def test_unrepeated_tokens_follow_the_chinchilla_law():
    at = {"params": 1e9, "tokens": 2e10}
    expected = CHINCHILLA.curve(BASE, **at)
    for unique in (2e10, 1e12):
        loss = CONSTRAINED.curve(DATABLATIONS, **at, unique_tokens=unique)
        assert loss == pytest.approx(expected, rel=1e-12)


def test_repetition_is_worth_what_the_paper_says():
    """Up to 4 epochs are almost as good as new data; after 16 R_D* new epochs add nothing."""
    unique, params = 1e10, 1e8

    def loss(epochs: float) -> float:
        at = {"params": params, "tokens": epochs * unique, "unique_tokens": unique}
        return CONSTRAINED.curve(DATABLATIONS, **at).item()

    fresh = CHINCHILLA.curve(BASE, params=params, tokens=4 * unique).item()
    assert loss(4) - fresh < 0.02 * (loss(1) - fresh) + 0.005
    most = unique * (1 + DATABLATIONS["R_D"])
    limit = CHINCHILLA.curve(BASE, params=params, tokens=most)
    assert loss(16 * DATABLATIONS["R_D"]) == pytest.approx(limit, rel=1e-6)


def test_excess_parameters_count_less():
    """Eq. 7: N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)), U_N optimal for the unique tokens."""
    unique = 1e9
    optimal = (DATABLATIONS["A"] / DATABLATIONS["B"]) ** (1 / DATABLATIONS["alpha"]) * unique
    params = 9 * optimal
    decay = DATABLATIONS["R_N"]
    worth = optimal * (1 + decay * (1 - np.exp(-8 / decay)))
    loss = CONSTRAINED.curve(DATABLATIONS, params=params, tokens=unique, unique_tokens=unique)
    assert loss == pytest.approx(CHINCHILLA.curve(BASE, params=worth, tokens=unique), rel=1e-12)


def test_the_data_constrained_law_is_found_again():
    params, unique, epochs = (
        part.ravel()
        for part in np.meshgrid([1e7, 3e7, 1e8, 1e9], [1e8, 1e9, 1e10], [1.0, 3.0, 10.0, 40.0])
    )
    table = pd.DataFrame({"params": params, "tokens": unique * epochs, "unique_tokens": unique})
    at = {name: table[name].to_numpy() for name in CONSTRAINED.inputs}
    table["loss/val"] = CONSTRAINED.curve(DATABLATIONS, **at)
    fit = laws.fit("data_constrained", table, target="loss/val")
    assert fit.parameters == pytest.approx(DATABLATIONS, rel=1e-4)
    larger = fit.predict(params=3e9, tokens=1e11, unique_tokens=2e10)
    assert larger.low < larger.value < larger.high


BROKEN = {"a": 1.5, "b": 3e3, "c0": 0.2, "c1": 0.15, "d1": 1e19, "f1": 0.4}


def test_a_broken_power_law_changes_its_slope_at_the_break():
    form = laws.FORMS["broken_power_law"]
    for flops, slope in ((1e12, 0.2), (1e26, 0.35)):
        near, far = (form.curve(BROKEN, flops_6nd=flops * step) - 1.5 for step in (1.0, 10.0))
        assert np.log10(near / far) == pytest.approx(slope, rel=1e-6)


@pytest.mark.slow
def test_a_broken_power_law_is_found_again():
    flops = np.geomspace(1e16, 1e22, 40)
    params = np.sqrt(flops / 120)
    table = pd.DataFrame({"params": params, "tokens": 20 * params})
    table["loss/val"] = laws.FORMS["broken_power_law"].curve(BROKEN, flops_6nd=flops)
    fit = laws.fit("broken_power_law", table, target="loss/val")
    assert fit.parameters == pytest.approx(BROKEN, rel=1e-3)
    truth = laws.FORMS["broken_power_law"].curve(BROKEN, flops_6nd=1e23)
    assert fit.predict(flops_6nd=1e23).value == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("law", ["exponential", "sigmoid"])
def test_error_laws_are_found_again_with_the_asymptote_free_or_pinned(law):
    truth = {
        "exponential": {"eps": 0.85, "k": 2.1, "gamma": 0.75},
        "sigmoid": {"eps": 0.75, "l0": 2.2, "q": 0.6},
    }[law]
    loss = np.linspace(2.2, 4.5, 12)
    table = pd.DataFrame({"params": np.geomspace(1e9, 1e7, 12), "tokens": 1e10, "loss/val": loss})
    table["error/task"] = laws.FORMS[law].curve(truth, loss=loss)
    free = laws.fit(law, table, target="error/task", loss="loss/val")
    pinned = laws.fit(law, table, target="error/task", loss="loss/val", chance=truth["eps"])
    assert free.parameters == pytest.approx(truth, rel=1e-5)
    assert pinned.parameters == pytest.approx(truth, rel=1e-6)
