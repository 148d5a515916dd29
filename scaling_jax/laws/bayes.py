"""The Bayesian loss law with a discrepancy: the core of the calibrated prediction interval.

    log L = log(E + A (N/N0)^-alpha + B (D/D0)^-beta) + g + noise

g is what the law gets wrong: a Gaussian process that starts at the smallest N and D of the data and
grows like a random walk in log10 N and log10 D, so that the interval widens with the distance of
extrapolation. The posterior is summed over a grid of (alpha, beta, tau / sigma, sigma), where sigma
is the noise and tau the size of g per decade; E, A and B are Gaussian given those.

Only the sum over the grid is heavy. It is one `jit` whose shapes never change, so that whatever the
number of runs and targets it compiles once.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from scipy.special import ndtr, ndtri

from scaling_jax.laws.solver import float64

EXPONENT_MEAN, EXPONENT_SD, TIE_SD = 0.33, 0.15, 0.10
EXPONENT_RANGE = (0.04, 1.1)
# Means and standard deviations of E / min L, A / L and B / L, L the geometric mean of the losses.
LINEAR_MEAN, LINEAR_SD = np.array([0.5, 0.2, 0.2]), np.array([0.2, 0.4, 0.4])
NOISE_CENTER, DISCREPANCY_SCALE = 0.004, 0.03
RATIOS = np.array([0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0])
SIGMAS = np.geomspace(5e-4, 0.08, 14)
GRID, DRAWS = 28, 1024


@dataclasses.dataclass(frozen=True, eq=False)
class Posterior:
    """Weighted draws of the law and its noise, and of what they leave for g to explain.

    Attributes:
      walk: the process g at the runs.
      middle: log params and log tokens that N and D are measured from.
      share: weights of the draws, which sum to 1.
      linear: E, A and B.
      exponents: alpha and beta.
      ratio: tau / sigma.
      sigma: the noise.
      left: log loss minus the law at the runs, in the coordinates of `walk`.
    """

    walk: "Walk"
    middle: Float[np.ndarray, "2"]
    share: Float[np.ndarray, "draws"]
    linear: Float[np.ndarray, "draws 3"]
    exponents: Float[np.ndarray, "draws 2"]
    ratio: Int[np.ndarray, "draws"]
    sigma: Float[np.ndarray, "draws"]
    left: Float[np.ndarray, "draws n"]

    def forecast(
        self, targets: Float[np.ndarray, "2 m"], noise: bool = True
    ) -> tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
        """Mean and standard deviation of log loss at `targets` (params, tokens).

        Of what a run there measures or, without `noise`, of what runs measure on average.
        """
        log_t = np.log(targets)
        drift, spread = self.walk.conditional(log_t, self.left, self.ratio)
        centers = _log_law(self.linear, self.exponents, log_t - self.middle[:, None]) + drift
        center = self.share @ centers
        variances = (centers - center) ** 2 + self.sigma[:, None] ** 2 * (noise + spread)
        return center, np.sqrt(self.share @ variances)

    def covariance(self, targets: Float[np.ndarray, "2 m"]) -> Float[np.ndarray, "m m"]:
        """Between the log losses that runs at `targets` measure on average."""
        log_t = np.log(targets)
        drift, _ = self.walk.conditional(log_t, self.left, self.ratio)
        centers = _log_law(self.linear, self.exponents, log_t - self.middle[:, None]) + drift
        away = np.sqrt(self.share)[:, None] * (centers - self.share @ centers)
        by_ratio = np.bincount(self.ratio, self.share * self.sigma**2, len(RATIOS))
        return away.T @ away + np.tensordot(by_ratio, self.walk.covariances(log_t), 1)

    @property
    def noise_variance(self) -> float:
        """Mean variance of what one run measures about that average."""
        return float(self.share @ self.sigma**2)


@dataclasses.dataclass(frozen=True, eq=False)
class Walk:
    """g at the runs: random walks away from the smallest params and tokens.

    Its covariance is tau^2 K. In the coordinates of K's eigenvectors the covariance of g and noise
    is diagonal whatever tau and sigma.

    Attributes:
      origin: smallest log params and log tokens.
      log_x: log params and log tokens of the runs.
      values, vectors: the eigenvalues and eigenvectors of K.
    """

    origin: Float[np.ndarray, "2"]
    log_x: Float[np.ndarray, "2 n"]
    values: Float[np.ndarray, "n"]
    vectors: Float[np.ndarray, "n n"]

    @staticmethod
    def of(log_x: Float[np.ndarray, "2 n"]) -> "Walk":
        """The walk through runs at `log_x`."""
        origin = log_x.min(axis=1)
        values, vectors = np.linalg.eigh(_kernel(log_x, log_x, origin))
        return Walk(origin, log_x, np.maximum(values, 0.0), vectors)

    @property
    def variances(self) -> Float[np.ndarray, "k n"]:
        """Of g + noise along the eigenvectors, over sigma^2, at each of RATIOS."""
        return 1 + RATIOS[:, None] ** 2 * self.values

    def conditional(
        self,
        log_t: Float[np.ndarray, "2 m"],
        left: Float[np.ndarray, "draws n"],
        ratio: Int[np.ndarray, "draws"],
    ) -> tuple[Float[np.ndarray, "draws m"], Float[np.ndarray, "draws m"]]:
        """Mean, and variance over sigma^2, of g at `log_t` given g + noise `left` at the runs."""
        cross = _kernel(log_t, self.log_x, self.origin) @ self.vectors
        own = np.abs(log_t - self.origin[:, None]).sum(0) / np.log(10)
        gain = RATIOS[:, None] ** 2 / self.variances
        known = (gain * RATIOS[:, None] ** 2) @ (cross**2).T
        spread = np.maximum(RATIOS[:, None] ** 2 * own - known, 0.0)
        return (left * gain[ratio]) @ cross.T, spread[ratio]

    def covariances(self, log_t: Float[np.ndarray, "2 m"]) -> Float[np.ndarray, "k m m"]:
        """Between values of g at `log_t`, over sigma^2, given the runs, at each of RATIOS."""
        cross = _kernel(log_t, self.log_x, self.origin) @ self.vectors
        squares = RATIOS[:, None] ** 2
        known = (cross * (squares**2 / self.variances)[:, None]) @ cross.T
        return squares[:, None] * _kernel(log_t, log_t, self.origin) - known


def posterior(x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"]) -> Posterior:
    """The law given runs: params and tokens `x`, losses `y`."""
    log_x = np.log(x)
    middle, walk = log_x.mean(axis=1), Walk.of(log_x)
    scales = np.array([y.min(), *[np.exp(np.log(y).mean())] * 2])
    mean, sd = LINEAR_MEAN * scales, LINEAR_SD * scales
    at = log_x - middle[:, None]
    alphas = betas = _midpoints(*EXPONENT_RANGE)
    weight, _ = _weigh(walk, at, y, alphas, betas, mean, sd)
    alphas, betas = _zoom(alphas, weight.sum((1, 2, 3))), _zoom(betas, weight.sum((0, 2, 3)))
    weight, gram = _weigh(walk, at, y, alphas, betas, mean, sd)

    uniform = lattice(DRAWS, 4)
    node = np.searchsorted(np.cumsum(weight), uniform[:, 0] * (1 - 1e-9))
    i, j, k, s = np.unravel_index(np.minimum(node, weight.size - 1), weight.shape)
    sigma = SIGMAS[s]
    column = np.stack([np.ones_like(i), 2 + i, 2 + GRID + j], axis=1)
    among = gram[k[:, None, None], column[:, :, None], column[:, None, :]]
    precision = among / sigma[:, None, None] ** 2 + np.diag(sd**-2)
    moment = gram[k[:, None], 0, column] / sigma[:, None] ** 2 + mean / sd**2
    linear, mass = _truncated(precision, moment, uniform[:, 1:], y.min())
    exponents = np.stack([alphas[i], betas[j]], axis=1)
    left = (np.log(y) - _log_law(linear, exponents, at)) @ walk.vectors
    return Posterior(walk, middle, mass / mass.sum(), linear, exponents, k, sigma, left)


def _kernel(
    first: Float[np.ndarray, "2 a"], second: Float[np.ndarray, "2 b"], origin: np.ndarray
) -> Float[np.ndarray, "a b"]:
    """Covariance, per tau^2, of walks that leave the origin in both directions of both axes."""
    first = (first - origin[:, None])[:, :, None] / np.log(10)
    second = (second - origin[:, None])[:, None, :] / np.log(10)
    nearer = np.minimum(np.abs(first), np.abs(second))
    return np.where(first * second > 0, nearer, 0.0).sum(0)


def _log_law(
    linear: np.ndarray, exponents: np.ndarray, at: Float[np.ndarray, "2 m"]
) -> Float[np.ndarray, "draws m"]:
    total = linear[:, :1]
    for axis in range(2):
        total = total + linear[:, 1 + axis, None] * np.exp(-exponents[:, axis, None] * at[axis])
    return np.log(total)


def _weigh(
    walk: Walk,
    at: Float[np.ndarray, "2 n"],
    y: Float[np.ndarray, "n"],
    alphas: Float[np.ndarray, "grid"],
    betas: Float[np.ndarray, "grid"],
    mean: Float[np.ndarray, "3"],
    sd: Float[np.ndarray, "3"],
) -> tuple[Float[np.ndarray, "grid grid k sigma"], Float[np.ndarray, "k columns columns"]]:
    """Weights of the nodes, which sum to 1, and the inner products they are made of.

    Residuals are f / L - 1, linear in E, A and B. The columns of that regression are ones (what is
    regressed), E, A at each of `alphas`, B at each of `betas`; their inner products are those under
    noise I + k^2 K.
    """
    powers = [
        np.exp(-np.outer(part, power)) for part, power in zip(at, (alphas, betas), strict=True)
    ]
    columns = np.column_stack([y, np.ones_like(y), *powers]) / y[:, None]
    turned = walk.vectors.T @ columns
    gram = np.stack([turned.T @ (turned / v[:, None]) for v in walk.variances])
    log_determinant = np.log(walk.variances).sum(1)
    with float64():
        args = (gram, log_determinant, float(len(y)), alphas, betas, mean, sd)
        log_weight = np.asarray(_log_weight(*args))
    weight = np.exp(log_weight - log_weight.max())
    return weight / weight.sum(), gram


@jax.jit
def _log_weight(
    gram: Float[Array, "k columns columns"],
    log_determinant: Float[Array, "k"],
    count: Float[Array, ""],
    alphas: Float[Array, "grid"],
    betas: Float[Array, "grid"],
    mean: Float[Array, "3"],
    sd: Float[Array, "3"],
) -> Float[Array, "grid grid k sigma"]:
    """Log posterior of the nodes, E, A and B integrated out; one Cholesky factorisation a node."""
    ratios, sigmas = jnp.array(RATIOS)[:, None], jnp.array(SIGMAS)
    # Columns 2.. run along alpha, then beta; axes become alpha, beta, k and below also sigma.
    a, b = slice(2, 2 + GRID), slice(2 + GRID, None)
    products = gram.transpose(1, 2, 0)
    squares = jnp.diagonal(gram, axis1=1, axis2=2).T
    # The lower triangle.
    precision = (
        (products[1, 1],),
        (products[1, a, None], squares[a, None]),
        (products[1, None, b], products[a, b], squares[None, b]),
    )
    moment = (products[0, 1], products[0, a, None], products[0, None, b])
    lower: list[list[Array]] = [[], [], []]
    solved: list[Array] = []
    for i in range(3):
        for j in range(i + 1):
            entry = precision[i][j][..., None] / sigmas**2 + (sd[i] ** -2 if i == j else 0.0)
            entry = entry - sum(lower[i][m] * lower[j][m] for m in range(j))
            lower[i].append(jnp.sqrt(entry) if i == j else entry / lower[j][j])
        right = moment[i][..., None] / sigmas**2 + mean[i] / sd[i] ** 2
        solved.append((right - sum(lower[i][m] * solved[m] for m in range(i))) / lower[i][i])
    misfit = squares[0][:, None] / sigmas**2 - sum(part**2 for part in solved)
    log_likelihood = -(
        misfit / 2
        + jnp.log(lower[0][0] * lower[1][1] * lower[2][2])
        + log_determinant[:, None] / 2
        + count * jnp.log(sigmas)
    )
    of_exponents = ((alphas - EXPONENT_MEAN) / EXPONENT_SD)[:, None] ** 2
    of_exponents = of_exponents + ((betas - EXPONENT_MEAN) / EXPONENT_SD) ** 2
    of_exponents = of_exponents + ((alphas[:, None] - betas) / TIE_SD) ** 2
    # Log-normal sigma; half-normal tau, whose cell on a grid of ratios is sigma k wide.
    of_noise = jnp.log(sigmas / NOISE_CENTER) ** 2 + (ratios * sigmas / DISCREPANCY_SCALE) ** 2
    of_noise = jnp.log(sigmas * jnp.maximum(ratios, 0.35)) - of_noise / 2
    return log_likelihood + of_noise - of_exponents[:, :, None, None] / 2


def _truncated(
    precision: Float[np.ndarray, "draws 3 3"],
    moment: Float[np.ndarray, "draws 3"],
    uniform: Float[np.ndarray, "draws 3"],
    lowest: float,
) -> tuple[Float[np.ndarray, "draws 3"], Float[np.ndarray, "draws"]]:
    """(E, A, B) within 0 < E < min L, 0 < A, 0 < B, and their weights.

    B is drawn first, then A and E, each given those before it from its conditional inside the
    bounds, and weighted by the mass found there.
    """
    lower = np.linalg.cholesky(precision)
    solved = np.linalg.solve(lower, moment[:, :, None])[:, :, 0]
    values, mass = np.zeros_like(moment), np.ones(len(moment))
    for i, highest in ((2, np.inf), (1, np.inf), (0, lowest)):
        sd = 1 / lower[:, i, i]
        mean = sd * (solved[:, i] - (lower[:, :, i] * values).sum(1))
        below, above = ndtr((0.0 - mean) / sd), ndtr((highest - mean) / sd)
        inside = np.maximum(above - below, 1e-300)
        normal = ndtri(np.clip(below + inside * uniform[:, i], 1e-300, 1 - 1e-16))
        # Far tails lose digits in the quantile; the bounds hold all the same.
        values[:, i] = np.clip(mean + sd * normal, 1e-9, highest)
        mass *= inside
    return values, mass


def _midpoints(low: float, high: float) -> Float[np.ndarray, "grid"]:
    return low + (high - low) * (np.arange(GRID) + 0.5) / GRID


def _zoom(cells: Float[np.ndarray, "grid"], marginal: np.ndarray) -> Float[np.ndarray, "grid"]:
    """A finer grid over the cells that hold all but 1e-4 of the marginal."""
    half, below = (cells[1] - cells[0]) / 2, np.cumsum(marginal)
    first, last = np.argmax(below > 0.5e-4), np.argmax(below >= 1 - 0.5e-4)
    return _midpoints(cells[first] - half, cells[last] + half)


def lattice(count: int, dimension: int) -> Float[np.ndarray, "count dimension"]:
    """Evenly spread points of the unit cube: a stratified axis and a Kronecker sequence."""
    index = np.arange(count) + 0.5
    golden = 1.5
    for _ in range(50):
        golden = (1 + golden) ** (1 / dimension)
    steps = golden ** -np.arange(1.0, dimension)
    rest = (0.5 + index[:, None] * steps) % 1.0
    return np.concatenate([index[:, None] / count, rest], axis=1)
