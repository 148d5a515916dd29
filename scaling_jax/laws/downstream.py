"""The default interval for downstream error: a Bayesian sigmoid of the loss with a discrepancy.

    error = eps sigmoid((L - l0) / q) exp(g + noise)

As in bayes.py, g is a Gaussian process that grows like a random walk away from the data, here in
the loss below the largest fitted one. The sigmoid stays between 0 and eps where an exponential law
fitted near chance goes far below 0. Losses may be uncertain: every draw of the posterior then has
its own loss.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy.special import expit, ndtri

from scaling_jax.laws.bayes import RATIOS, lattice
from scaling_jax.laws.predictive import Draws

# Asymptote: around chance, or around the largest error seen where chance is not known.
CHANCE_SD, UNKNOWN_CHANCE_SD = 0.01, 0.1
MIDDLE_MEAN, MIDDLE_SD = 2.0, 1.2
WIDTH_CENTER, WIDTH_LOG_SD = 0.9, 0.6
NOISE_CENTER, DISCREPANCY_SCALE = 0.006, 0.02
SIGMAS = np.geomspace(5e-4, 0.15, 12)
GRID, DRAWS = 48, 2048
# Steps of Kronecker sequences that are unlike each other, for draws of unrelated quantities.
LOSS_STEP, NOISE_STEP = 0.6180339887498949, 0.7548776662466927


@dataclasses.dataclass(frozen=True, eq=False)
class ErrorPosterior:
    """Equally likely draws of the law, its noise and what they leave for g to explain.

    Attributes:
      loss: of the runs.
      values, vectors: eigenvalues and eigenvectors of the covariance of g at the runs, per tau^2.
      eps, l0, q, sigma, ratio: of each draw; ratio counts RATIOS, tau / sigma.
      left: log error minus the law at the runs, in the coordinates of `vectors`.
    """

    loss: Float[np.ndarray, "n"]
    values: Float[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n n"]
    eps: Float[np.ndarray, "draws"]
    l0: Float[np.ndarray, "draws"]
    q: Float[np.ndarray, "draws"]
    sigma: Float[np.ndarray, "draws"]
    ratio: Int[np.ndarray, "draws"]
    left: Float[np.ndarray, "draws n"]

    def predictive(self, loss: Float[np.ndarray, "m"]) -> Draws:
        """The distribution of the error at each loss."""
        return self.predictive_of_draws(np.broadcast_to(loss, (DRAWS, len(loss))))

    def predictive_of_draws(self, loss: Float[np.ndarray, "draws m"]) -> Draws:
        """The same for uncertain losses: DRAWS equally likely values of each."""
        normal = ndtri(shocks(NOISE_STEP))
        return Draws(np.stack([self._errors(column, normal) for column in loss.T], axis=1))

    def _errors(
        self, loss: Float[np.ndarray, "draws"], normal: Float[np.ndarray, "draws"]
    ) -> Float[np.ndarray, "draws"]:
        """A draw of the error for each draw of the posterior and the loss that goes with it."""
        law = self.eps * expit((loss - self.l0) / self.q)
        below, fitted = self.loss.max() - loss, self.loss.max() - self.loss
        # Losses above the fitted ones lie on the other, independent side of the walk.
        cross = np.where(below[:, None] > 0, np.minimum(below[:, None], fitted), 0.0) @ self.vectors
        square = RATIOS[self.ratio][:, None] ** 2
        gain = square / (1 + square * self.values)
        mean = (cross * gain * self.left).sum(1)
        spread = square[:, 0] * (np.abs(below) - (cross**2 * gain).sum(1))
        change = mean + self.sigma * np.sqrt(1 + np.maximum(spread, 0.0)) * normal
        return np.clip(law * np.exp(change), 0.0, 1.0)


def fit_posterior(
    loss: Float[np.ndarray, "n"], error: Float[np.ndarray, "n"], chance: float | None
) -> ErrorPosterior:
    """The posterior given runs; `chance` is the error of guessing, if known."""
    mean, sd = (error.max(), UNKNOWN_CHANCE_SD) if chance is None else (chance, CHANCE_SD)
    error, below = np.maximum(error, 1e-6), loss.max() - loss
    values, vectors = np.linalg.eigh(np.minimum(below[:, None], below))
    variances = 1 + RATIOS[:, None] ** 2 * np.maximum(values, 0.0)
    l0 = MIDDLE_MEAN + MIDDLE_SD * np.linspace(-4, 4, GRID)
    log_q = np.log(WIDTH_CENTER) + WIDTH_LOG_SD * np.linspace(-4, 4, GRID)
    log_weight = _log_weight(loss, error, vectors, variances, l0, log_q, mean, sd)

    unit = lattice(DRAWS, 4)
    weight = np.cumsum(np.exp(log_weight - log_weight.max()))
    node = np.searchsorted(weight, weight[-1] * unit[:, 0])
    i, j, k, s = np.unravel_index(np.minimum(node, weight.size - 1), log_weight.shape)
    # Spread the draws over their cells, so that predictions are not a comb.
    middle = l0[i] + (l0[1] - l0[0]) * (unit[:, 1] - 0.5)
    q = np.exp(log_q[j] + (log_q[1] - log_q[0]) * (unit[:, 2] - 0.5))
    sigma = SIGMAS[s]
    shape = expit((loss - middle[:, None]) / q[:, None]) / error
    turned, ones = shape @ vectors, vectors.sum(0)
    precision = (turned**2 / variances[k]).sum(1) / sigma**2 + 1 / sd**2
    moment = (turned * ones / variances[k]).sum(1) / sigma**2 + mean / sd**2
    eps = np.clip(moment / precision + ndtri(unit[:, 3]) / np.sqrt(precision), 1e-3, 1.0)
    left = -np.log(eps[:, None] * shape) @ vectors
    return ErrorPosterior(loss, np.maximum(values, 0.0), vectors, eps, middle, q, sigma, k, left)


def shocks(step: float = LOSS_STEP) -> Float[np.ndarray, "draws"]:
    """Probabilities for draws of a quantity that is uncertain on its own, in shuffled order."""
    return (0.5 + np.arange(1, DRAWS + 1) * step) % 1.0


def _log_weight(
    loss: Float[np.ndarray, "n"],
    error: Float[np.ndarray, "n"],
    vectors: Float[np.ndarray, "n n"],
    variances: Float[np.ndarray, "k n"],
    l0: Float[np.ndarray, "grid"],
    log_q: Float[np.ndarray, "grid"],
    mean: float,
    sd: float,
) -> Float[np.ndarray, "grid grid k sigma"]:
    """Log posterior of the nodes. The asymptote is Gaussian given these: 1 = eps shape + noise."""
    shape = expit((loss - l0[:, None, None]) / np.exp(log_q)[:, None]) / error
    turned, ones = shape @ vectors, vectors.sum(0)
    precision = (turned**2 @ (1 / variances).T)[..., None] / SIGMAS**2 + 1 / sd**2
    moment = (turned @ (ones / variances).T)[..., None] / SIGMAS**2 + mean / sd**2
    misfit = (ones**2 / variances).sum(1)[:, None] / SIGMAS**2
    tau = RATIOS[:, None] * SIGMAS
    of_noise = (
        -len(loss) * np.log(SIGMAS)
        - np.log(variances).sum(1)[:, None] / 2
        - misfit / 2
        - np.log(SIGMAS / NOISE_CENTER) ** 2 / 2
        - (tau / DISCREPANCY_SCALE) ** 2 / 2
        + np.log(SIGMAS * np.maximum(RATIOS, 0.35)[:, None])
    )
    of_shape = ((l0 - MIDDLE_MEAN) / MIDDLE_SD)[:, None] ** 2
    of_shape = of_shape + ((log_q - np.log(WIDTH_CENTER)) / WIDTH_LOG_SD) ** 2
    fitted = moment**2 / precision - np.log(precision)
    return fitted / 2 + of_noise - of_shape[:, :, None, None] / 2
