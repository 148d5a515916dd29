"""The reproduction of Besiroglu et al. 2024."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import chinchilla
from scaling_jax.testbeds.reproduce import chinchilla_published as paper

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "chinchilla_besiroglu"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the digitised points are not here")


def test_the_scale_is_the_likeliest_one():
    residuals = 0.01 * np.random.default_rng(0).standard_t(3, 200)
    scale = chinchilla.likeliest_scale(residuals)

    def cost(s: float) -> float:
        size = np.abs(residuals) / s
        huber = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4))
        return float(huber.sum() + len(residuals) * np.log(s))

    assert cost(scale) < min(cost(scale * 1.01), cost(scale / 1.01))


def test_the_density_integrates_to_one():
    points = np.array([0.003])
    scale = chinchilla.likeliest_scale(points)
    grid = np.linspace(-60 * scale / 1e-3, 60 * scale / 1e-3, 2_000_001)
    size = np.abs(grid) / scale
    huber = np.where(size <= 1e-3, size**2 / 2, 1e-3 * (size - 5e-4))
    size = points[0] / scale
    at_point = 1e-3 * (size - 5e-4)
    density = np.exp(-huber + at_point + chinchilla.log_likelihood(points))
    assert np.trapezoid(density, grid) == pytest.approx(1.0, abs=1e-4)


def test_the_best_fit_has_the_least_absolute_residuals():
    """On made-up points with outliers, no nearby law has a smaller sum of absolute residuals."""
    random = np.random.default_rng(1)
    params = np.repeat(np.geomspace(5e7, 1e10, 6), 6)
    tokens = np.tile(np.geomspace(1e9, 3e11, 6), 6)
    truth = {"E": 1.8, "A": 480.0, "B": 2000.0, "alpha": 0.35, "beta": 0.37}
    loss = laws.FORMS["chinchilla"].curve(truth, params=params, tokens=tokens)
    loss = loss * np.exp(0.005 * random.standard_t(2, len(loss)))
    table = pd.DataFrame({"params": params, "tokens": tokens, "loss/train": loss})
    found = chinchilla.reproduce(table, bootstraps=8)

    def size(theta: dict[str, float]) -> float:
        curve = laws.FORMS["chinchilla"].curve(theta, params=params, tokens=tokens)
        return float(np.abs(np.log(curve / loss)).sum())

    best = size(found.parameters)
    assert best <= size(found.huber) + 1e-9
    for name, value in found.parameters.items():
        for factor in (0.999, 1.001):
            assert best <= size({**found.parameters, name: value * factor}) + 1e-9
    assert found.resampled.shape == (8, 5)


@needs_data
@pytest.mark.slow
def test_the_paper_is_reproduced(tmp_path):
    compared = chinchilla.run(DATA, tmp_path).set_index("parameter")
    results = json.loads((tmp_path / "results.json").read_text())
    for name, value in paper.PARAMETERS.items():
        assert compared["value"][name] == pytest.approx(value, rel=2e-5)
        assert compared["standard error"][name] == pytest.approx(
            paper.STANDARD_ERRORS[name], rel=0.01
        )
    assert results["log_likelihood"] == pytest.approx(paper.LOG_LIKELIHOOD, abs=0.006)
    assert results["likelihood_ratio"]["statistic"] == pytest.approx(84.00, abs=0.006)
    assert results["likelihood_ratio"]["p"] == pytest.approx(1.2e-16, rel=0.05)
    assert results["allocation"]["a"] == pytest.approx(0.513, abs=5e-4)
    assert results["allocation"]["standard_error"] == pytest.approx(0.020, abs=5e-4)
    assert results["allocation"]["width_80"] == pytest.approx(0.051, abs=5e-4)
    assert (tmp_path / "points.png").stat().st_size > 10_000
    assert "240 runs" in (tmp_path / "report.html").read_text()


@needs_data
def test_the_plain_huber_optimum_is_another_point():
    table = published.chinchilla(DATA)
    found = chinchilla.reproduce(table, bootstraps=8)
    assert found.huber["A"] == pytest.approx(477.83, abs=0.02)
    assert found.parameters["A"] == pytest.approx(482.006, abs=0.005)
