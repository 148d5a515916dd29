"""Fitting: batched multistart, variable projection, Levenberg-Marquardt; jaxopt to polish.

Everything is float64, whatever the caller's setting, and nothing global is changed. One problem is
(inputs, observations, weights); a batch of problems (resamples, cuts, targets) is one `jit` call.
There are no line searches: under `vmap` every lane would pay for the slowest.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.laws.forms import Form
from scaling_jax.laws.objectives import Objective

STARTS = 64
ITERATIONS = 200
# A start has reached the optimum if its objective is within this relative distance of the best.
SAME_OPTIMUM = 1e-6


def float64() -> Any:
    """A context in which JAX computes in float64."""
    return jax.enable_x64(True)


@dataclasses.dataclass(frozen=True)
class Box:
    """Bounds of the parameters in the solver's coordinates (logarithms where `positive`).

    Shape (p,), or (problems, p) where each problem has its own.
    """

    low: np.ndarray
    high: np.ndarray

    @staticmethod
    def of(form: Form, pinned: Mapping[str, float] | None = None) -> "Box":
        """The bounds of `form`; a pinned parameter has equal bounds."""
        pinned = pinned or {}
        low, high = (
            np.array([pinned.get(one.name, getattr(one, side)) for one in form.parameters], float)
            for side in ("low", "high")
        )
        positive = np.array([one.positive for one in form.parameters])
        return Box(*(np.where(positive, np.log(np.maximum(b, 1e-300)), b) for b in (low, high)))

    def inside(self, coordinates: np.ndarray) -> np.ndarray:
        """Which coordinates are free and not at a bound."""
        return (coordinates > self.low) & (coordinates < self.high)


@dataclasses.dataclass(frozen=True)
class Solution:
    """Optima of a batch of problems.

    Attributes:
      coordinates, parameters: shape (problems, p); parameters are in natural units.
      objective, gradient_norm: shape (problems,); the norm is over the free coordinates.
      share: shape (problems,): the share of the starts that reached the optimum.
    """

    coordinates: np.ndarray
    parameters: np.ndarray
    objective: np.ndarray
    gradient_norm: np.ndarray
    share: np.ndarray


def multistart(
    form: Form,
    objective: Objective,
    x: Float[np.ndarray, "*problems inputs n"],
    y: Float[np.ndarray, "problems n"],
    weights: Float[np.ndarray, "problems n"],
    box: Box,
    starts: int = STARTS,
) -> Solution:
    """The best of `starts` local optima of each problem.

    The starts spread evenly over the ranges of the nonlinear parameters; the linear ones are solved
    for at each. `x`, `box` and the thresholds of `objective` may be common to all problems.
    """
    with float64():
        problems = _problems(form, objective, x, y, weights, box)
        return _solution(form, _multistart(form, *problems, _spread(form, starts)), len(y))


def refit(
    form: Form,
    objective: Objective,
    x: Float[np.ndarray, "*problems inputs n"],
    y: Float[np.ndarray, "problems n"],
    weights: Float[np.ndarray, "problems n"],
    box: Box,
    start: Float[np.ndarray, "*problems p"],
    iterations: int = ITERATIONS,
) -> Solution:
    """The optimum of each problem downhill from `start` (solver coordinates): for resamples."""
    with float64():
        problems = _problems(form, objective, x, y, weights, box)
        length = len(problems[2])
        start = np.broadcast_to(start, (len(y), len(form.parameters)))
        start = start[np.minimum(np.arange(length), len(y) - 1)]
        return _solution(form, _refit(form, iterations, start, *problems), len(y))


def polish(
    form: Form,
    objective: Objective,
    x: Float[np.ndarray, "inputs n"],
    y: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "n"],
    box: Box,
    start: Float[np.ndarray, "p"],
) -> tuple[np.ndarray, float, float]:
    """Coordinates, objective and gradient norm after L-BFGS from `start`.

    It moves the parameters that are free and not at a bound, in coordinates in which the
    Gauss-Newton Hessian at `start` is the identity; a worse result is thrown away.
    """
    with float64():
        args = (objective, x, y, weights, box.low, box.high, start, box.inside(start))
        coordinates, cost, norm = _polish(form, *args)
        return np.asarray(coordinates), float(cost), float(norm)


def sensitivity(
    form: Form,
    objective: Objective,
    x: Float[np.ndarray, "inputs n"],
    y: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "n"],
    box: Box,
    optimum: Float[np.ndarray, "p"],
) -> Float[np.ndarray, "p n"]:
    """d optimum / d y (solver coordinates), by implicit differentiation of "the gradient is zero".

    Parameters at a bound, or pinned, do not move. jaxopt's default linear solver (conjugate
    gradients) is silently wrong at the condition numbers of these laws; a direct solve is exact.
    """
    with float64():
        args = (objective, x, y, weights, optimum, box.inside(optimum))
        return np.asarray(_sensitivity(form, *args))


def to_natural(form: Form, coordinates: Array) -> Array:
    """Parameters in natural units, along the last axis."""
    positive = np.array([parameter.positive for parameter in form.parameters])
    # The inner where keeps derivatives finite for parameters that are not logarithms.
    return jnp.where(positive, jnp.exp(jnp.where(positive, coordinates, 0.0)), coordinates)


def residuals(form: Form, objective: Objective, u: Array, x: Array, y: Array) -> Float[Array, "n"]:
    """Residuals at coordinates `u`."""
    return objective.residuals(form.evaluate(to_natural(form, u), x), y)


def total_cost(
    form: Form, objective: Objective, u: Array, x: Array, y: Array, weights: Array
) -> Float[Array, ""]:
    """The objective at coordinates `u`: the weighted sum of the costs of the residuals."""
    return jnp.sum(weights * objective.costs(residuals(form, objective, u, x, y)))


def _spread(form: Form, count: int) -> Float[np.ndarray, "count p"]:
    """Evenly spread starting values in natural units (a Kronecker sequence); 0 where linear."""
    nonlinear = [parameter for parameter in form.parameters if parameter.starts]
    # The generalised golden ratio, the root of g^(d+1) = g + 1 (Roberts 2018).
    golden = 1.5
    for _ in range(50):
        golden = (1 + golden) ** (1 / (len(nonlinear) + 1))
    points = np.zeros((count, len(form.parameters)))
    for j, parameter in enumerate(nonlinear, start=1):
        assert parameter.starts is not None
        unit = (0.5 + np.arange(1, count + 1) * golden**-j) % 1.0
        low, high = parameter.starts
        values = low * (high / low) ** unit if parameter.positive else low + (high - low) * unit
        points[:, form.names.index(parameter.name)] = values
    return points


def _problems(
    form: Form,
    objective: Objective,
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    box: Box,
) -> tuple[Any, ...]:
    """The batch with every part given its problem axis, filled to a length that compiles once."""
    count = len(y)
    # Few lengths, so that single fits, families and small batches share a compilation.
    length = max(4, 1 << (count - 1).bit_length()) if count <= 64 else count
    pick = np.minimum(np.arange(length), count - 1)

    def batch(part: Any, rank: int) -> np.ndarray:
        part = np.asarray(part, float)
        if part.ndim == rank:
            part = np.broadcast_to(part, (count, *part.shape))
        return part[pick]

    objective = dataclasses.replace(
        objective, delta=batch(objective.delta, 0), below=batch(objective.below, 0)
    )
    if x.ndim == 3:
        x = x[pick]
    return objective, x, y[pick], weights[pick], batch(box.low, 1), batch(box.high, 1)


def _solution(form: Form, found: tuple[Array, ...], count: int) -> Solution:
    u, cost, gradient_norm, share = found
    parts = (u, to_natural(form, u), cost, gradient_norm, share)
    return Solution(*(np.asarray(part)[:count] for part in parts))


@functools.partial(jax.jit, static_argnums=0)
def _multistart(
    form: Form,
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
    points: Array,
) -> tuple[Array, ...]:
    def one(*problem: Any) -> tuple[Array, ...]:
        starts = jax.vmap(lambda point: _project(form, point, *problem))(points)
        u, cost, norm = jax.vmap(lambda start: _descend(form, ITERATIONS, start, *problem))(starts)
        best = jnp.argmin(jnp.where(jnp.isfinite(cost), cost, jnp.inf))
        reached = cost <= cost[best] * (1 + SAME_OPTIMUM) + 1e-20
        return u[best], cost[best], norm[best], reached.mean()

    axes = (0, 0 if x.ndim == 3 else None, 0, 0, 0, 0)
    return jax.vmap(one, in_axes=axes)(objective, x, y, weights, low, high)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _refit(
    form: Form,
    iterations: int,
    start: Array,
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
) -> tuple[Array, ...]:
    def one(start: Array, *problem: Any) -> tuple[Array, ...]:
        return *_descend(form, iterations, start, *problem), jnp.ones(())

    axes = (0, 0, 0 if x.ndim == 3 else None, 0, 0, 0, 0)
    return jax.vmap(one, in_axes=axes)(start, objective, x, y, weights, low, high)


def _project(
    form: Form,
    point: Float[Array, "p"],
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
) -> Float[Array, "p"]:
    """Solver coordinates of a start: linear parameters by bounded least squares, given the rest."""
    positive = np.array([parameter.positive for parameter in form.parameters])
    lows, highs = (jnp.where(positive, jnp.exp(bound), bound) for bound in (low, high))
    is_linear = np.array([parameter.starts is None for parameter in form.parameters])
    columns = np.flatnonzero(is_linear)
    point = jnp.where(is_linear, 0.0, jnp.clip(point, lows, highs))
    if columns.size:
        # The law is affine in these, so its Jacobian anywhere is the regression matrix.
        constant = form.evaluate(point, x)
        slopes = jax.jacfwd(lambda c: form.evaluate(point.at[columns].set(c), x))
        matrix = slopes(jnp.zeros(columns.size))
        scale = weights / (y**2 if objective.residual == "log" else jnp.ones_like(y))
        gram = matrix.T @ (scale[:, None] * matrix)
        moment = matrix.T @ (scale * (y - constant))
        solved = _bounded_least_squares(gram, moment, lows[columns], highs[columns])
        point = point.at[columns].set(solved)
    return jnp.clip(jnp.where(positive, jnp.log(jnp.maximum(point, 1e-12)), point), low, high)


def _bounded_least_squares(gram: Array, moment: Array, low: Array, high: Array) -> Array:
    """Minimises c'Gc/2 - m'c within the bounds, by cyclic coordinate descent."""
    unit = jnp.sqrt(jnp.diagonal(gram)) + 1e-300
    gram, moment, low, high = gram / unit[:, None] / unit, moment / unit, low * unit, high * unit
    size = len(moment)
    start = _solve(gram + 1e-10 * jnp.eye(size), moment)

    def improve(count: Array, c: Array) -> Array:
        j = count % size
        return c.at[j].set(jnp.clip(c[j] + moment[j] - gram[j] @ c, low[j], high[j]))

    return jax.lax.fori_loop(0, 50 * size, improve, jnp.clip(start, low, high)) / unit


def _solve(matrix: Float[Array, "p p"], vector: Float[Array, "p"]) -> Float[Array, "p"]:
    """Solves a positive definite system by Gauss-Jordan elimination.

    Unlike the library's factorisations it runs on all lanes of a batch at once.
    """

    def eliminate(k: Array, rows: Array) -> Array:
        pivot = rows[k] / rows[k, k]
        return (rows - rows[:, k][:, None] * pivot).at[k].set(pivot)

    augmented = jnp.concatenate([matrix, vector[:, None]], axis=1)
    return jax.lax.fori_loop(0, len(vector), eliminate, augmented)[:, -1]


def _descend(
    form: Form,
    iterations: int,
    start: Float[Array, "p"],
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
) -> tuple[Array, Array, Array]:
    """Levenberg-Marquardt on the quadratic that touches the cost from above.

    A step that would leave the box stops at its face; a coordinate at a face stays there while the
    gradient pushes outwards.
    """

    def quadratic(u: Array) -> tuple[Array, Array, Array]:
        r = residuals(form, objective, u, x, y)
        jacobian = jax.jacfwd(lambda at: residuals(form, objective, at, x, y))(u)
        cost = jnp.sum(weights * objective.costs(r))
        gradient = jacobian.T @ (weights * objective.slopes(r))
        hessian = (jacobian.T * (weights * objective.curvatures(r))) @ jacobian
        held = ((u <= low) & (gradient >= 0)) | ((u >= high) & (gradient <= 0)) | (low == high)
        return (
            jnp.where(jnp.isfinite(cost), cost, jnp.inf),
            jnp.where(held, 0.0, gradient),
            jnp.where(held[:, None] | held, 0.0, hessian),
        )

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        count, u, damping, _, (cost, gradient, hessian) = state
        diagonal = jnp.diagonal(hessian)
        root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        scaled = hessian / root[:, None] / root + (damping + 1e-300) * jnp.eye(len(u))
        move = -_solve(scaled, gradient / root) / root
        trial = jnp.clip(u + jnp.clip(move, -5.0, 5.0), low, high)
        tried = quadratic(trial)
        better = tried[0] < cost
        expected = -gradient @ move
        done = (expected <= 1e-14 * cost + 1e-30) & jnp.isfinite(cost) | (damping > 1e12)
        damping = jnp.where(better, jnp.maximum(damping / 8, 1e-14), damping * 4)
        pick = functools.partial(jnp.where, better)
        model = jax.tree.map(pick, tried, (cost, gradient, hessian))
        return count + 1, pick(trial, u), damping, done, model

    def unfinished(state: tuple[Array, ...]) -> Array:
        return (state[0] < iterations) & ~state[3]

    # Before the first step, which stays at the start and is accepted, nothing is known.
    size = len(start)
    unknown = (jnp.array(jnp.inf), jnp.zeros(size), jnp.zeros((size, size)))
    first = (jnp.array(0), start, jnp.array(1e-2), jnp.array(False), unknown)
    _, u, _, _, (cost, gradient, _) = jax.lax.while_loop(unfinished, step, first)
    return u, cost, jnp.linalg.norm(gradient)


def _jaxopt() -> Any:
    """jaxopt, imported when first needed; at import it announces that it is not maintained."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="JAXopt is no longer maintained")
        import jaxopt
    return jaxopt


@functools.partial(jax.jit, static_argnums=0)
def _polish(
    form: Form,
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
    start: Array,
    inside: Array,
) -> tuple[Array, Array, Array]:
    r = residuals(form, objective, start, x, y)
    jacobian = jax.jacfwd(lambda at: residuals(form, objective, at, x, y))(start) * inside
    hessian = (jacobian.T * (weights * objective.curvatures(r))) @ jacobian
    values, vectors = jnp.linalg.eigh(hessian)
    usable = values > 1e-12 * values[-1]
    whiten = jnp.where(usable, vectors / jnp.sqrt(jnp.where(usable, values, 1.0)), 0.0)
    whiten = whiten * inside[:, None]
    first = total_cost(form, objective, start, x, y, weights)

    def cost(z: Array) -> Array:
        u = jnp.clip(start + whiten @ z, low, high)
        return total_cost(form, objective, u, x, y, weights) / jnp.maximum(first, 1e-30)

    nowhere = jnp.zeros_like(start)
    found = _jaxopt().LBFGS(cost, maxiter=100, tol=1e-10).run(nowhere).params
    found = jnp.where(cost(found) < cost(nowhere), found, nowhere)
    u = jnp.clip(start + whiten @ found, low, high)
    last, gradient = jax.value_and_grad(total_cost, 2)(form, objective, u, x, y, weights)
    return u, last, jnp.linalg.norm(gradient * inside)


@functools.partial(jax.jit, static_argnums=0)
def _sensitivity(
    form: Form,
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    optimum: Array,
    inside: Array,
) -> Array:
    jaxopt = _jaxopt()

    def stationarity(u: Array, y: Array) -> Array:
        gradient = jax.grad(total_cost, 2)(form, objective, u, x, y, weights)
        return jnp.where(inside, gradient, u - optimum)

    solve = jaxopt.linear_solve.solve_lu
    root = jaxopt.implicit_diff.custom_root(stationarity, solve=solve)(lambda _, y: optimum)
    return jax.jacrev(lambda y: root(optimum, y))(y)
