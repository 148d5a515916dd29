"""Resampled fits: how far parameters and predictions move when the data are drawn again."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from scaling_jax.laws import solver
from scaling_jax.laws.predictive import Draws

if TYPE_CHECKING:
    from scaling_jax.laws.fit import Fit

SEED = 0
ITERATIONS = 100


@dataclasses.dataclass(frozen=True, eq=False)
class Resamples:
    """Refits to resampled data, and the residuals to add as noise.

    Attributes:
      coordinates, parameters: shape (count, p); parameters in natural units.
      residuals: of the original fit, inflated for the parameters it spent.
    """

    coordinates: Float[np.ndarray, "count p"]
    parameters: Float[np.ndarray, "count p"]
    residuals: Float[np.ndarray, "n"]


def resample(fit: "Fit", method: str, count: int) -> Resamples:
    """Refits from the optimum to resampled runs ("pairs") or residuals ("residual")."""
    o, random = fit.observations, np.random.default_rng(SEED)
    n = len(o)
    inflated = fit.residuals * np.sqrt(n / max(1, fit.degrees))
    y = np.broadcast_to(o.y, (count, n))
    weights = np.broadcast_to(o.weights, (count, n))
    if method == "pairs":
        weights = weights * random.multinomial(n, np.full(n, 1 / n), size=count)
    else:
        drawn = random.choice(inflated, size=(count, n))
        fitted = fit.evaluate(o.x)
        y = fitted * np.exp(-drawn) if fit.objective.residual == "log" else fitted - drawn
    found = solver.refit(
        fit.form, fit.objective, o.x, y, weights, fit.box, fit.coordinates, ITERATIONS
    )
    return Resamples(found.coordinates, found.parameters, inflated)


def predictive(fit: "Fit", resamples: Resamples, x: Float[np.ndarray, "inputs m"]) -> Draws:
    """Resampled laws at `x`, each with a residual added."""
    values = solver.evaluate(fit.form, resamples.parameters, x)
    random = np.random.default_rng(SEED + 1)
    noise = random.choice(resamples.residuals, size=values.shape)
    return Draws(values * np.exp(-noise) if fit.objective.residual == "log" else values - noise)
