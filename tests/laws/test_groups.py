"""Laws of several groups of runs with parameters in common."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError

TRUTHS = {
    "c4": {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13},
    "web": {"E": 1.9, "a": 180.0, "b": 220.0, "eta": 0.13},
}
LARGE: dict[str, Any] = {"params": 6.9e9, "tokens": 138e9}


def runs(noise: float, count: int = 12) -> pd.DataFrame:
    sizes, multipliers = np.meshgrid([1e7, 3e7, 1e8, 3e8], [5.0, 20.0, 80.0])
    parts = []
    for seed, (dataset, truth) in enumerate(TRUTHS.items()):
        params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
        loss = laws.FORMS["over_training"].curve(truth, params=params, tokens=tokens)
        loss = loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(loss)))
        part = pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss})
        parts.append(part.assign(dataset=dataset)[:count])
    return pd.concat(parts, ignore_index=True)


def test_shared_parameters_are_found_again():
    fit = laws.fit_groups("over_training", runs(0.0), target="loss/val", shared=["eta"])
    for group, truth in TRUTHS.items():
        assert fit.parameters(group) == pytest.approx(truth, rel=1e-5)
        expected = laws.FORMS["over_training"].curve(truth, **LARGE)
        assert fit.curve(group, **LARGE) == pytest.approx(expected, rel=1e-8)
    assert not fit.joint.warnings


def test_with_nothing_shared_the_groups_are_fitted_apart():
    table = runs(0.005)
    together = laws.fit_groups("over_training", table, target="loss/val")
    for group in TRUTHS:
        alone = laws.fit("over_training", table[table["dataset"] == group], target="loss/val")
        assert together.parameters(group) == pytest.approx(alone.parameters, rel=1e-5)
        assert together.predict(group, **LARGE).low == pytest.approx(alone.predict(**LARGE).low)


def test_sharing_sharpens_the_delta_interval():
    table = runs(0.005)
    apart, shared = (
        laws.fit_groups("over_training", table, target="loss/val", shared=names)
        for names in ((), ("eta",))
    )
    widths = []
    for fit in (apart, shared):
        prediction = fit.predict("c4", **LARGE, method="delta")
        widths.append(prediction.high - prediction.low)
    assert widths[1] < widths[0]


def test_a_shared_parameter_lets_one_group_influence_another():
    table = runs(0.005)
    other = (table["dataset"] == "web").to_numpy()
    apart, shared = (
        laws.fit_groups("over_training", table, target="loss/val", shared=names)
        for names in ((), ("eta",))
    )
    np.testing.assert_allclose(apart.influence("c4", **LARGE)[other], 0.0, atol=1e-6)
    assert np.abs(shared.influence("c4", **LARGE)[other]).max() > 1e-3


def test_pins_hold_in_every_group():
    fit = laws.fit_groups("over_training", runs(0.005), target="loss/val", pinned={"E": 1.8})
    assert all(fit.parameters(group)["E"] == 1.8 for group in TRUTHS)


def test_unknown_names_are_refused():
    table = runs(0.005)
    with pytest.raises(UserError, match="no parameter 'etta'"):
        laws.fit_groups("over_training", table, target="loss/val", shared=["etta"])
    with pytest.raises(UserError, match="'dataset'"):
        laws.fit_groups("over_training", table, target="loss/val", groups="data_set")
    fit = laws.fit_groups("over_training", table, target="loss/val", shared=["eta"])
    with pytest.raises(UserError, match="no group 'c5'"):
        fit.curve("c5", **LARGE)
