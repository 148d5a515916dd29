"""The Bayesian loss law with a discrepancy: the core of the calibrated prediction interval.

    log L = log(E + A (N/N0)^-alpha + B (D/D0)^-beta) + g + noise

g is what the law gets wrong: a Gaussian process that starts at the smallest N and D of the data and
grows like a random walk in log10 N and log10 D, so that the interval widens with the distance of
extrapolation. The posterior is summed over a grid of (alpha, beta, tau / sigma, sigma), where sigma
is the noise and tau the size of g per decade; E, A and B are Gaussian given those.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Bool, Float

EXPONENT_MEAN, EXPONENT_SD, TIE_SD = 0.35, 0.15, 0.15
EXPONENT_RANGE = (0.04, 1.1)
# Means and standard deviations of E / min L, A / L and B / L, L the geometric mean of the losses.
LINEAR_MEAN, LINEAR_SD = (0.5, 0.2, 0.2), (0.2, 0.4, 0.4)
NOISE_CENTER, DISCREPANCY_SCALE = 0.004, 0.03
RATIOS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
COARSE, FINE, NOISES, DRAWS = 24, 28, 14, 1024


class Forecast(NamedTuple):
    """Posterior predictive of log loss at each target: mean, standard deviation.

    `discrepancy` is the posterior mean of tau: the drift of g over a decade of N or D.
    """

    center: Float[Array, "targets"]
    scale: Float[Array, "targets"]
    discrepancy: Float[Array, ""]


class _Whitened(NamedTuple):
    """Regression of ones on (1, x^-alpha, x^-beta) / L under noise I + k^2 K, for each k.

    `gram` holds the inner products of the whitened columns: ones, E, A at each alpha, B at each
    beta.
    """

    gram: Float[Array, "k columns columns"]
    log_determinant: Float[Array, "k"]
    factor: Float[Array, "k n n"]


class _Grid(NamedTuple):
    """Log weights of the nodes, and mean and Cholesky factor of (E, A, B) at each."""

    log_weight: Float[Array, "alpha beta k sigma"]
    mean: tuple[Array, ...]
    covariance: tuple[tuple[Array, ...], ...]


def forecast(
    x: Float[Array, "2 n"],
    y: Float[Array, "n"],
    used: Bool[Array, "n"],
    targets: Float[Array, "2 targets"],
) -> Forecast:
    """Mean and standard deviation of log loss at `targets`, from the observations `used`.

    `x` and `targets` hold params and tokens. Call it in float64.
    """
    log_x, log_t = jnp.log(x), jnp.log(targets)
    share = used / used.sum()
    middle = log_x @ share
    level = jnp.exp(jnp.log(y) @ share)
    lowest = jnp.min(jnp.where(used, y, jnp.inf))
    origin = jnp.min(jnp.where(used, log_x, jnp.inf), axis=1)
    walk, cross, own = (
        _walk(first - origin[:, None], second - origin[:, None])
        for first, second in ((log_x, log_x), (log_t, log_x), (log_t, log_t))
    )
    walk = jnp.where(used & used[:, None], walk, 0.0)
    cross = jnp.where(used, cross, 0.0)
    log_x, log_t = log_x - middle[:, None], log_t - middle[:, None]

    mean = jnp.array(LINEAR_MEAN) * jnp.stack([lowest, level, level])
    sd = jnp.array(LINEAR_SD) * jnp.stack([lowest, level, level])
    ratios, sigmas = jnp.array(RATIOS), jnp.geomspace(5e-4, 0.08, NOISES)
    factor = jax.vmap(lambda k: jnp.linalg.cholesky(jnp.eye(len(y)) + k**2 * walk))(ratios)

    def grid(alphas: Array, betas: Array) -> _Grid:
        whitened = _whiten(factor, log_x, y, used, alphas, betas)
        return _posterior(whitened, used.sum(), alphas, betas, ratios, sigmas, mean, sd)

    coarse = _midpoints(*EXPONENT_RANGE, COARSE)
    weight = _normalised(grid(coarse, coarse).log_weight)
    alphas = _zoom(coarse, weight.sum((1, 2, 3)))
    betas = _zoom(coarse, weight.sum((0, 2, 3)))
    fine = grid(alphas, betas)
    weight = _normalised(fine.log_weight)

    uniform = lattice(DRAWS, 4)
    node = jnp.searchsorted(jnp.cumsum(weight.ravel()), uniform[:, 0] * (1 - 1e-12))
    node = jnp.minimum(node, weight.size - 1)
    theta, log_mass = _truncated(fine, node, uniform[:, 1:], lowest)
    alpha, beta, k, sigma = jnp.unravel_index(node, weight.shape)

    def law(at: Float[Array, "2 m"]) -> Float[Array, "draws m"]:
        by_params = theta[1][:, None] * jnp.exp(-alphas[alpha][:, None] * at[0])
        by_tokens = theta[2][:, None] * jnp.exp(-betas[beta][:, None] * at[1])
        return jnp.log(theta[0][:, None] + by_params + by_tokens)

    off = jnp.where(used, jnp.log(y) - law(log_x), 0.0)

    def discrepancy(ratio: Array, factor: Array) -> tuple[Array, Array]:
        """Mean given the residuals of each draw, and variance / sigma^2, of g at the targets."""
        half = jax.scipy.linalg.solve_triangular(factor, ratio**2 * cross.T, lower=True)
        gain = jax.scipy.linalg.solve_triangular(factor.T, half, lower=False)
        return off @ gain, ratio**2 * jnp.diagonal(own) - jnp.sum(half**2, axis=0)

    drift, spread = jax.vmap(discrepancy)(ratios, factor)
    centers = law(log_t) + jnp.take_along_axis(drift, k[None, :, None], axis=0)[0]
    variances = sigmas[sigma][:, None] ** 2 * (1 + spread[k])
    share = jax.nn.softmax(log_mass)[:, None]
    average = (share * centers).sum(0)
    variance = (share * ((centers - average) ** 2 + variances)).sum(0)
    tau = (weight * ratios[:, None] * sigmas).sum()
    return Forecast(average, jnp.sqrt(variance), tau)


def _walk(first: Float[Array, "2 a"], second: Float[Array, "2 b"]) -> Float[Array, "a b"]:
    """Covariance, per tau^2, of walks that leave the origin in both directions of both axes."""
    first, second = first[:, :, None] / jnp.log(10), second[:, None, :] / jnp.log(10)
    same_side = first * second > 0
    nearer = jnp.minimum(jnp.abs(first), jnp.abs(second))
    return jnp.where(same_side, nearer, 0.0).sum(0)


def _whiten(
    factor: Array, log_x: Array, y: Array, used: Array, alphas: Array, betas: Array
) -> _Whitened:
    by_params = jnp.exp(-alphas * log_x[0][:, None])
    by_tokens = jnp.exp(-betas * log_x[1][:, None])
    ones = jnp.ones((len(y), 1))
    columns = jnp.concatenate([y[:, None] * ones, ones, by_params, by_tokens], axis=1)
    columns = jnp.where(used[:, None], columns / y[:, None], 0.0)
    whitened = jax.vmap(lambda f: jax.scipy.linalg.solve_triangular(f, columns, lower=True))(factor)
    gram = jnp.einsum("knc,knd->kcd", whitened, whitened)
    diagonal = jnp.diagonal(factor, axis1=1, axis2=2)
    return _Whitened(gram, 2 * jnp.log(diagonal).sum(1), factor)


def _posterior(
    whitened: _Whitened,
    count: Array,
    alphas: Array,
    betas: Array,
    ratios: Array,
    sigmas: Array,
    mean: Array,
    sd: Array,
) -> _Grid:
    """Weights of the nodes, with E, A and B integrated out."""
    gram, a, b = whitened.gram, len(alphas), len(betas)
    # Axes: alpha, beta, k, sigma.
    of_e = slice(1, 2)
    of_a = slice(2, 2 + a)
    of_b = slice(2 + a, 2 + a + b)

    def product(first: slice, second: slice, order: str) -> Array:
        return jnp.einsum(order, gram[:, first, second])[..., None] / sigmas**2

    # "kij" is (k, rows, columns): rows of A run along alpha, rows of B along beta.
    def scalar(first: slice, second: slice) -> Array:
        return product(first, second, "kij->ijk")

    def along_alpha(column: slice) -> Array:
        return product(of_a, column, "kij->ijk")

    def along_beta(column: slice) -> Array:
        return product(column, of_b, "kij->ijk")

    precision = [
        [scalar(of_e, of_e), along_alpha(of_e), along_beta(of_e)],
        [None, _diagonal(gram, of_a, sigmas)[:, None], product(of_a, of_b, "kij->ijk")],
        [None, None, _diagonal(gram, of_b, sigmas)[None]],
    ]
    one = slice(0, 1)
    moment = [scalar(of_e, one), along_alpha(one), along_beta(one)]
    shape = (a, b, len(ratios), len(sigmas))
    full = [
        [
            jnp.broadcast_to(precision[min(i, j)][max(i, j)], shape)
            + (1 / sd[i] ** 2 if i == j else 0.0)
            for j in range(3)
        ]
        for i in range(3)
    ]
    right = [jnp.broadcast_to(moment[i], shape) + mean[i] / sd[i] ** 2 for i in range(3)]
    lower = _cholesky(full)
    covariance = _inverse(lower)
    center = tuple(sum(covariance[i][j] * right[j] for j in range(3)) for i in range(3))

    fitted = sum(right[i] * center[i] for i in range(3))
    squares = gram[:, 0, 0][:, None] / sigmas**2 - fitted
    log_sigma = jnp.log(sigmas)
    evidence = (
        -count * log_sigma
        - whitened.log_determinant[:, None] / 2
        - squares / 2
        - sum(jnp.log(lower[i][i]) for i in range(3))
    )
    alpha, beta = alphas[:, None], betas
    exponents = ((alpha - EXPONENT_MEAN) / EXPONENT_SD) ** 2
    exponents = exponents + ((beta - EXPONENT_MEAN) / EXPONENT_SD) ** 2
    exponents = exponents + ((alpha - beta) / TIE_SD) ** 2
    tau = ratios[:, None] * sigmas
    # Half-normal tau on a grid of ratios: the density carries the width of a cell, sigma k.
    noise = (
        -((log_sigma - jnp.log(NOISE_CENTER)) ** 2) / 2
        - (tau / DISCREPANCY_SCALE) ** 2 / 2
        + jnp.log(sigmas * jnp.maximum(ratios, 0.35)[:, None])
    )
    return _Grid(evidence + noise - exponents[:, :, None, None] / 2, center, covariance)


def _diagonal(gram: Array, columns: slice, sigmas: Array) -> Array:
    """Squared lengths of the columns over sigma^2, shape (columns, k, sigma)."""
    lengths = jnp.diagonal(gram[:, columns, columns], axis1=1, axis2=2)
    return lengths.T[:, :, None] / sigmas**2


def _cholesky(matrix: list[list[Array]]) -> list[list[Array]]:
    """Cholesky factors of many small matrices, given entry by entry as arrays."""
    size = len(matrix)
    lower = [[jnp.zeros(())] * size for _ in range(size)]
    for i in range(size):
        for j in range(i + 1):
            rest = matrix[i][j] - sum(lower[i][m] * lower[j][m] for m in range(j))
            lower[i][j] = jnp.sqrt(rest) if i == j else rest / lower[j][j]
    return lower


def _inverse(lower: list[list[Array]]) -> tuple[tuple[Array, ...], ...]:
    """The inverse of L L^T, entry by entry."""
    size = len(lower)
    inverse = [[jnp.zeros(())] * size for _ in range(size)]
    for i in range(size):
        inverse[i][i] = 1 / lower[i][i]
        for j in range(i):
            total = sum(lower[i][m] * inverse[m][j] for m in range(j, i))
            inverse[i][j] = -total / lower[i][i]
    return tuple(
        tuple(
            sum(inverse[m][i] * inverse[m][j] for m in range(max(i, j), size)) for j in range(size)
        )
        for i in range(size)
    )


def _truncated(
    grid: _Grid, node: Array, uniform: Float[Array, "draws 3"], lowest: Array
) -> tuple[tuple[Array, ...], Float[Array, "draws"]]:
    """(E, A, B) at the drawn nodes within 0 < E < min L, 0 < A, 0 < B; their log weights.

    Each is drawn from its conditional inside the bounds, and weighted by the mass found there.
    """
    center = [part.ravel()[node] for part in grid.mean]
    matrix = [[part.ravel()[node] for part in row] for row in grid.covariance]
    lower = _cholesky(matrix)
    bounds = ((0.0, lowest), (0.0, jnp.inf), (0.0, jnp.inf))
    values: list[Array] = []
    normals: list[Array] = []
    log_mass = jnp.zeros(len(node))
    for i, (low, high) in enumerate(bounds):
        mean = center[i] + sum(lower[i][m] * normals[m] for m in range(i))
        below, above = ndtr((low - mean) / lower[i][i]), ndtr((high - mean) / lower[i][i])
        mass = jnp.maximum(above - below, 1e-300)
        normal = ndtri(jnp.clip(below + mass * uniform[:, i], 1e-300, 1 - 1e-16))
        # Far tails lose digits in the quantile; the bounds hold all the same.
        value = jnp.clip(mean + lower[i][i] * normal, 1e-9, high)
        normals.append((value - mean) / lower[i][i])
        values.append(value)
        log_mass = log_mass + jnp.log(mass)
    return tuple(values), log_mass


def _midpoints(low: float, high: float, count: int) -> Float[Array, "count"]:
    return low + (high - low) * (jnp.arange(count) + 0.5) / count


def _zoom(cells: Array, marginal: Array) -> Float[Array, "fine"]:
    """A finer grid over the cells that hold all but 1e-4 of the marginal."""
    width = cells[1] - cells[0]
    below = jnp.cumsum(marginal)
    first = cells[jnp.argmax(below > 0.5e-4)] - width / 2
    last = cells[jnp.argmax(below >= 1 - 0.5e-4)] + width / 2
    return first + (last - first) * (jnp.arange(FINE) + 0.5) / FINE


def _normalised(log_weight: Array) -> Array:
    weight = jnp.exp(log_weight - log_weight.max())
    return weight / weight.sum()


def lattice(count: int, dimension: int) -> Float[Array, "count dimension"]:
    """Evenly spread points of the unit cube: a stratified axis and a Kronecker sequence."""
    index = jnp.arange(count) + 0.5
    golden = 1.5
    for _ in range(50):
        golden = (1 + golden) ** (1 / dimension)
    steps = golden ** -jnp.arange(1.0, dimension)
    rest = (0.5 + index[:, None] * steps) % 1.0
    return jnp.concatenate([index[:, None] / count, rest], axis=1)
