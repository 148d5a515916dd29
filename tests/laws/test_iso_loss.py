"""The price of smaller models: closed forms of the laws that have one."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError

TIED = {"E": 1.7, "a": 150.0, "b": 200.0, "eta": 0.13}
HOFFMANN = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def fitted(law: str, truth: dict[str, float], noise: float = 0.0) -> laws.Fit:
    sizes, multipliers = np.meshgrid(np.geomspace(1e7, 1e9, 5), [5.0, 20.0, 80.0])
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    loss = laws.FORMS[law].curve(truth, params=params, tokens=tokens)
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    table = pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss})
    return laws.fit(law, table, target="loss/val")


@pytest.mark.parametrize(
    ("law", "truth", "alpha", "beta"),
    [
        ("over_training", TIED, 2 * TIED["eta"], 2 * TIED["eta"]),
        ("chinchilla", HOFFMANN, HOFFMANN["alpha"], HOFFMANN["beta"]),
    ],
)
def test_the_price_is_the_closed_form(law, truth, alpha, beta):
    found = laws.iso_loss(fitted(law, truth), flops=1e22, shrink=(1.0, 0.7, 0.4, 0.2, 0.01, 2.0))
    k = found["params_ratio"].to_numpy()
    # At the optimum alpha A N^-alpha = beta B D^-beta; with k N params the term of the tokens is
    # to shrink to 1 + beta / alpha (1 - k^-alpha) of what it was.
    left = 1 + beta / alpha * (1 - k**-alpha)
    expected = np.where(left > 0, k * np.abs(left) ** (-1 / beta), np.inf)
    assert expected[4] == np.inf
    np.testing.assert_allclose(found["training_ratio"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["flops_6nd"], 1e22 * expected, rtol=1e-4)
    np.testing.assert_allclose(found["params"], k * found["params"][0])
    possible = found[np.isfinite(expected)]
    at: dict[str, Any] = {name: possible[name].to_numpy() for name in ("params", "tokens")}
    loss = laws.FORMS[law].curve(truth, **at)
    np.testing.assert_allclose(loss, loss[0], rtol=1e-6)
    np.testing.assert_allclose(possible["token_multiplier"], at["tokens"] / at["params"])


def test_from_a_loss_or_from_compute_it_is_one_table():
    fit = fitted("chinchilla", HOFFMANN, 0.002)
    by_flops = laws.iso_loss(fit, flops=1e22)
    loss = laws.optimum(fit, flops=1e22).loss.value
    pd.testing.assert_frame_equal(
        laws.iso_loss(fit, loss=loss).drop(columns=["training_ratio/low", "training_ratio/high"]),
        by_flops.drop(columns=["training_ratio/low", "training_ratio/high"]),
        rtol=1e-4,
    )


def test_served_tokens_that_pay_for_the_longer_training():
    found = laws.iso_loss(fitted("over_training", TIED), flops=1e22, shrink=(1.0, 0.5, 0.01, 1.5))
    best, small = found.iloc[0], found.iloc[1]
    served = small["break_even_tokens"]
    lifetime = [row["flops_6nd"] + 2 * row["params"] * served for row in (best, small)]
    assert lifetime[0] == pytest.approx(lifetime[1])
    assert np.isnan(best["break_even_tokens"])
    assert found["break_even_tokens"][2] == found["break_even_tokens"][3] == np.inf


def test_the_interval_holds_the_true_price_and_says_where_some_laws_never_get():
    shrink = (0.5, 0.1, 0.075)
    noisy, exact = fitted("over_training", TIED, 0.004), fitted("over_training", TIED)
    found = laws.iso_loss(noisy, flops=1e22, shrink=shrink)
    true = laws.iso_loss(exact, flops=1e22, shrink=shrink)
    low, high = found["training_ratio/low"], found["training_ratio/high"]
    assert (low <= true["training_ratio"]).all()
    assert (true["training_ratio"] <= high).all()
    assert (low < high).all()
    assert np.isfinite(high[0])
    assert high[2] == np.inf


def test_what_cannot_be_is_refused():
    fit = fitted("chinchilla", HOFFMANN)
    for flops, loss in ((None, None), (1e22, 2.2)):
        with pytest.raises(UserError, match="either flops= or loss="):
            laws.iso_loss(fit, flops=flops, loss=loss)
    with pytest.raises(UserError, match=r"reaches no loss of 1\.5"):
        laws.iso_loss(fit, loss=1.5)
    with pytest.raises(UserError, match="finite and positive"):
        laws.iso_loss(fit, flops=1e22, shrink=(0.5, -1.0))
    with pytest.raises(UserError, match="flops must be"):
        laws.iso_loss(fit, flops=float("nan"))
    with pytest.raises(UserError, match="did you mean 'pairs'"):
        laws.iso_loss(fit, flops=1e22, method="pair")
    with pytest.raises(UserError, match="level"):
        laws.iso_loss(fit, flops=1e22, level=90.0)
