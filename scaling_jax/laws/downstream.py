"""The default interval for downstream error: a Bayesian sigmoid of the loss with a discrepancy.

    error = eps sigmoid((L - l0) / q) exp(g + noise)

As in bayes.py, g is a Gaussian process that grows like a random walk away from the data, here in
the loss below the largest fitted one. The sigmoid stays between 0 and eps where an exponential law
fitted near chance goes far below 0. Losses may be uncertain: every draw of the posterior then has
its own loss.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.laws.bayes import RATIOS, lattice
from scaling_jax.laws.predictive import Draws
from scaling_jax.laws.solver import float64

# Asymptote: around chance, or around the largest error seen where chance is not known.
CHANCE_SD, UNKNOWN_CHANCE_SD = 0.01, 0.1
MIDDLE_MEAN, MIDDLE_SD = 2.0, 1.2
WIDTH_CENTER, WIDTH_LOG_SD = 0.9, 0.6
NOISE_CENTER, DISCREPANCY_SCALE = 0.006, 0.02
GRID, NOISES, DRAWS = 48, 12, 2048


class _Posterior(NamedTuple):
    """Draws: law parameters, noise, discrepancy ratio k and the weights that g is made of."""

    eps: Float[Array, "draws"]
    l0: Float[Array, "draws"]
    q: Float[Array, "draws"]
    sigma: Float[Array, "draws"]
    ratio: Float[Array, "draws"]
    # k^2 (I + k^2 K)^-1 residuals of each draw; the inverse itself for each k.
    drift: Float[Array, "draws n"]
    inverse: Float[Array, "k n n"]
    index: Float[Array, "draws"]


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorPosterior:
    """The posterior given losses and errors of runs: ask it for the error at any loss."""

    loss: Float[np.ndarray, "n"]
    posterior: _Posterior

    def predictive(self, loss: Float[np.ndarray, "m"]) -> Draws:
        """The distribution of the error at each loss."""
        return self.predictive_of_draws(np.broadcast_to(loss, (DRAWS, len(loss))))

    def predictive_of_draws(self, loss: Float[np.ndarray, "draws m"]) -> Draws:
        """The same for uncertain losses: DRAWS equally likely values of each."""
        with float64():
            values = [_errors(self.posterior, self.loss, column) for column in loss.T]
            return Draws(np.stack(values, axis=1))


def fit_posterior(
    loss: Float[np.ndarray, "n"], error: Float[np.ndarray, "n"], chance: float | None
) -> ErrorPosterior:
    """The posterior given runs; `chance` is the error of guessing, if known."""
    mean, sd = (error.max(), UNKNOWN_CHANCE_SD) if chance is None else (chance, CHANCE_SD)
    with float64():
        return ErrorPosterior(loss, _fit(loss, np.maximum(error, 1e-6), mean, sd))


def shocks() -> Float[np.ndarray, "draws"]:
    """Probabilities for draws of a quantity that is uncertain on its own, in shuffled order."""
    return np.asarray((0.5 + np.arange(1, DRAWS + 1) * 0.6180339887498949) % 1.0)


@jax.jit
def _fit(loss: Array, error: Array, mean: Array, sd: Array) -> _Posterior:
    count = len(loss)
    below = loss.max() - loss
    walk = jnp.minimum(below[:, None], below)
    ratios, sigmas = jnp.array(RATIOS), jnp.geomspace(5e-4, 0.15, NOISES)
    covariance = jnp.eye(count) + ratios[:, None, None] ** 2 * walk
    inverse = jnp.linalg.inv(covariance)
    log_determinant = jnp.linalg.slogdet(covariance)[1]

    l0 = jnp.linspace(MIDDLE_MEAN - 4 * MIDDLE_SD, MIDDLE_MEAN + 4 * MIDDLE_SD, GRID)
    log_q = jnp.log(WIDTH_CENTER) + WIDTH_LOG_SD * jnp.linspace(-4, 4, GRID)
    shape = jax.nn.sigmoid((loss - l0[:, None, None]) / jnp.exp(log_q)[:, None]) / error
    # Axes: l0, q, k, sigma. The asymptote is Gaussian given these: 1 = eps shape + noise.
    solved = jnp.einsum("abn,knm->abkm", shape, inverse)
    precision = jnp.einsum("abkm,abm->abk", solved, shape)[..., None] / sigmas**2 + 1 / sd**2
    moment = solved.sum(-1)[..., None] / sigmas**2 + mean / sd**2
    squares = inverse.sum((1, 2))[:, None] / sigmas**2
    log_sigma, tau = jnp.log(sigmas), ratios[:, None] * sigmas
    log_weight = (
        -count * log_sigma
        - log_determinant[:, None] / 2
        - (squares - moment**2 / precision) / 2
        - jnp.log(precision) / 2
        - (((l0 - MIDDLE_MEAN) / MIDDLE_SD) ** 2 / 2)[:, None, None, None]
        - (((log_q - jnp.log(WIDTH_CENTER)) / WIDTH_LOG_SD) ** 2 / 2)[:, None, None]
        - (log_sigma - jnp.log(NOISE_CENTER)) ** 2 / 2
        - (tau / DISCREPANCY_SCALE) ** 2 / 2
        + jnp.log(sigmas * jnp.maximum(ratios, 0.35)[:, None])
    )
    weight = jnp.exp(log_weight - log_weight.max()).ravel()
    below_node = jnp.cumsum(weight) / weight.sum()
    unit = lattice(DRAWS, 4)
    node = jnp.minimum(jnp.searchsorted(below_node, unit[:, 0]), weight.size - 1)
    a, b, k, s = jnp.unravel_index(node, log_weight.shape)
    # Spread the draws over their cells, so that predictions are not a comb.
    l0s = l0[a] + (l0[1] - l0[0]) * (unit[:, 1] - 0.5)
    qs = jnp.exp(log_q[b] + (log_q[1] - log_q[0]) * (unit[:, 2] - 0.5))
    at = jax.nn.sigmoid((loss - l0s[:, None]) / qs[:, None]) / error
    solved = jnp.einsum("sn,snm->sm", at, inverse[k])
    precision = (solved * at).sum(1) / sigmas[s] ** 2 + 1 / sd**2
    center = (solved.sum(1) / sigmas[s] ** 2 + mean / sd**2) / precision
    eps = center + jax.scipy.special.ndtri(unit[:, 3]) / jnp.sqrt(precision)
    eps = jnp.clip(eps, 1e-3, 1.0)
    off = -jnp.log(eps[:, None] * at)
    drift = ratios[k][:, None] ** 2 * jnp.einsum("sn,snm->sm", off, inverse[k])
    return _Posterior(eps, l0s, qs, sigmas[s], ratios[k], drift, inverse, k)


@jax.jit
def _errors(posterior: _Posterior, fitted: Array, loss: Float[Array, "draws"]) -> Array:
    """A draw of the error for each draw of the posterior and the loss that goes with it."""
    p = posterior
    law = p.eps * jax.nn.sigmoid((loss - p.l0) / p.q)
    below, fitted = fitted.max() - loss, fitted.max() - fitted
    # Losses above the fitted ones lie on the other, independent side of the walk.
    cross = jnp.where(below[:, None] > 0, jnp.minimum(below[:, None], fitted), 0.0)
    mean = (cross * p.drift).sum(1)
    known = jnp.einsum("sn,snm,sm->s", cross, p.inverse[p.index], cross)
    spread = p.ratio**2 * (jnp.abs(below) - p.ratio**2 * known)
    normal = jax.scipy.special.ndtri(_shuffled())
    change = mean + p.sigma * jnp.sqrt(1 + jnp.maximum(spread, 0.0)) * normal
    return jnp.clip(law * jnp.exp(change), 0.0, 1.0)


@functools.cache
def _shuffled() -> np.ndarray:
    return np.asarray((0.5 + np.arange(1, DRAWS + 1) * 0.7548776662466927) % 1.0)
