"""Optima: closed forms against searches, and inference-aware ones against calculus."""

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.errors import UserError
from scaling_jax.laws.optimum import compute_optimal_params, searched_params

# Gadre et al. 2024, table 6, and M* there: 3.36, 7.42, 5.85.
TABLE_6 = {
    "C4": ({"E": 1.51, "a": 141.0, "b": 190.0, "eta": 0.121}, 3.36),
    "RedPajama": ({"E": 1.84, "a": 212.0, "b": 367.0, "eta": 0.136}, 7.42),
    "RefinedWeb": ({"E": 1.73, "a": 157.0, "b": 246.0, "eta": 0.127}, 5.85),
}
HOFFMANN = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}


def fitted(law: str, truth: dict[str, float], noise: float = 0.0) -> laws.Fit:
    sizes, multipliers = np.meshgrid(np.geomspace(1e7, 1e9, 5), [5.0, 20.0, 80.0])
    params, tokens = sizes.ravel(), (sizes * multipliers).ravel()
    loss = laws.FORMS[law].curve(truth, params=params, tokens=tokens)
    loss = loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(loss)))
    table = pd.DataFrame({"params": params, "tokens": tokens, "loss/val": loss})
    return laws.fit(law, table, target="loss/val")


@pytest.mark.parametrize("dataset", TABLE_6)
def test_the_papers_optimal_multipliers(dataset):
    truth, published = TABLE_6[dataset]
    fit = fitted("over_training", truth)
    # Table 6 is rounded to three digits, and M* is (b / a)^(1 / 2 eta).
    assert laws.optimal_token_multiplier(fit) == pytest.approx(published, rel=0.03)
    exact = (truth["b"] / truth["a"]) ** (1 / (2 * truth["eta"]))
    assert laws.optimal_token_multiplier(fit) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize(
    ("law", "truth"), [("over_training", TABLE_6["C4"][0]), ("chinchilla", HOFFMANN)]
)
def test_closed_forms_are_what_a_search_finds(law, truth):
    form = laws.FORMS[law]
    theta = np.array([[truth[name] for name in form.names]])
    for flops in (1e19, 1e24):
        closed = compute_optimal_params(form, theta, flops)
        np.testing.assert_allclose(searched_params(form, theta, flops), closed, rtol=1e-5)


def test_the_optimum_and_its_intervals():
    fit = fitted("chinchilla", HOFFMANN, 0.003)
    found = laws.optimum(fit, flops=5.76e23)
    assert found.training_flops.value == pytest.approx(5.76e23)
    assert found.training_flops.low == pytest.approx(found.training_flops.high)
    for part in (found.params, found.tokens, found.token_multiplier, found.loss):
        assert part.low < part.value < part.high
    true = HOFFMANN["alpha"] * HOFFMANN["A"] / (HOFFMANN["beta"] * HOFFMANN["B"])
    total = HOFFMANN["alpha"] + HOFFMANN["beta"]
    params = true ** (1 / total) * (5.76e23 / 6) ** (HOFFMANN["beta"] / total)
    assert found.params.low < params < found.params.high


def test_serving_tokens_makes_the_best_model_smaller():
    fit = fitted("chinchilla", HOFFMANN)
    compute = laws.optimum(fit, flops=1e22)
    loss = compute.loss.value
    none = laws.inference_optimum(fit, loss=loss, inference_tokens=0)
    assert none.params.value == pytest.approx(compute.params.value, rel=1e-3)
    assert none.training_flops.value == pytest.approx(1e22, rel=1e-6)
    many = laws.inference_optimum(fit, loss=loss, inference_tokens=1e13)
    assert many.params.value < none.params.value
    assert many.token_multiplier.value > none.token_multiplier.value
    assert many.loss.value == pytest.approx(loss, rel=1e-9)
    # At the optimum moving along the curve of equal loss changes the cost nothing.
    costs = []
    for step in (0.99, 1.0, 1.01):
        params = step * many.params.value
        by_params = HOFFMANN["A"] * params ** -HOFFMANN["alpha"]
        rest = loss - HOFFMANN["E"] - by_params
        tokens = (HOFFMANN["B"] / rest) ** (1 / HOFFMANN["beta"])
        costs.append(6 * params * tokens + 2 * params * 1e13)
    assert costs[1] < min(costs[0], costs[2])
    assert many.training_flops.value + many.inference_flops.value == pytest.approx(costs[1])


def test_what_cannot_be_is_refused():
    fit = fitted("chinchilla", HOFFMANN)
    with pytest.raises(UserError, match=r"reaches no loss of 1\.5"):
        laws.inference_optimum(fit, loss=1.5, inference_tokens=1e12)
    with pytest.raises(UserError, match="flops must be"):
        laws.optimum(fit, flops=-1)
    with pytest.raises(UserError, match="inference_tokens"):
        laws.inference_optimum(fit, loss=2.5, inference_tokens=-1.0)
    with pytest.raises(UserError, match="level"):
        laws.optimum(fit, flops=1e20, level=2.0)
