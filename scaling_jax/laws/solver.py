"""Fitting: batched multistart, variable projection, Levenberg-Marquardt; jaxopt to polish.

Everything is float64, whatever the caller's setting, and nothing global is changed. One problem is
(inputs, observations, weights); a batch of problems (resamples, cuts, targets) is one `jit` call.
"""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from scaling_jax.laws import descent, projection
from scaling_jax.laws.forms import Form
from scaling_jax.laws.objectives import Objective

STARTS = 64
ITERATIONS = 200
# Descents that run side by side.
LANES = 64
# A start has reached the optimum if its objective is within this relative distance of the best.
SAME_OPTIMUM = 1e-6
ROUNDING = 1e-12


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """A context in which JAX computes in float64, on the host: fits are small, TPUs have none."""
    with jax.enable_x64(True), jax.default_device(_host()):
        yield


@functools.cache
def _host() -> Any:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told not to have this platform
        return None


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
    count = len(y)
    objective, x, y, weights, box = _batch(objective, x, y, weights, box)
    points = projection.spread(form, starts)
    start = projection.project(form, objective, points, x, y, weights, box.low, box.high)
    lane = np.repeat(np.arange(count), starts)
    found = _lanes(
        form, ITERATIONS, start.reshape(len(lane), -1), lane, objective, x, y, weights, box
    )
    u, cost, norm = (part.reshape(count, starts, *part.shape[1:]) for part in found)
    cost = np.where(np.isfinite(cost), cost, np.inf)
    lowest = cost.min(axis=1, keepdims=True)
    # Of starts whose costs differ by rounding alone, the one where the gradient is smallest.
    equal = cost <= lowest * (1 + ROUNDING)
    best = (np.arange(count), np.argmin(np.where(equal, norm, np.inf), axis=1))
    reached = cost <= lowest * (1 + SAME_OPTIMUM) + 1e-20
    return _solution(form, u[best], cost[best], norm[best], reached.mean(axis=1))


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
    count = len(y)
    start = np.broadcast_to(start, (count, len(form.parameters)))
    batch = _batch(objective, x, y, weights, box)
    found = _lanes(form, iterations, start, np.arange(count), *batch)
    return _solution(form, *found, np.ones(count))


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


def evaluate(
    form: Form, parameters: Float[np.ndarray, "*many p"], x: Float[np.ndarray, "inputs m"]
) -> Float[np.ndarray, "*many m"]:
    """The law with each of `parameters` (natural units) at `x`."""
    many, count = parameters.shape[:-1], x.shape[1]
    flat = parameters.reshape(-1, parameters.shape[-1])
    with float64():
        values = np.asarray(_evaluate(form, flat, lengthened(x, bucket(count))))
    return values[:, :count].reshape(*many, count)


def natural(form: Form, coordinates: Float[np.ndarray, "*many p"]) -> np.ndarray:
    """`descent.to_natural` without JAX."""
    positive = np.array([parameter.positive for parameter in form.parameters])
    with np.errstate(over="ignore"):
        return np.where(positive, np.exp(coordinates), coordinates)


def bucket(count: int) -> int:
    """A length that few compilations serve: the next power of two, 64 at least."""
    return max(64, 1 << (count - 1).bit_length())


def lengthened(values: np.ndarray, length: int, fill: float | None = None) -> np.ndarray:
    """`values` made longer along the last axis by `fill`, or by their last entries."""
    extra = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    return (
        np.pad(values, extra, mode="edge")
        if fill is None
        else np.pad(values, extra, constant_values=fill)
    )


def _batch(
    objective: Objective, x: np.ndarray, y: np.ndarray, weights: np.ndarray, box: Box
) -> tuple[Objective, np.ndarray, np.ndarray, np.ndarray, Box]:
    """The problems with thresholds and bounds given their axis, filled up by points of no weight.

    So that fits to 9 and to 16 points share a compilation.
    """
    count, length = y.shape[0], bucket(y.shape[1])
    sides = (np.broadcast_to(side, (count, side.shape[-1])) for side in (box.low, box.high))
    delta, below = (
        np.broadcast_to(np.asarray(part, float), (count,))
        for part in (objective.delta, objective.below)
    )
    objective = dataclasses.replace(objective, delta=delta, below=below)
    x, y = lengthened(np.asarray(x, float), length), lengthened(np.asarray(y, float), length)
    weights = lengthened(np.asarray(weights, float), length, 0.0)
    return objective, x, y, weights, Box(*sides)


def _lanes(
    form: Form,
    iterations: int,
    start: Float[np.ndarray, "lanes p"],
    problem: Int[np.ndarray, "lanes"],
    objective: Objective,
    x: np.ndarray,
    y: np.ndarray,
    weights: np.ndarray,
    box: Box,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descends from each start in its problem, LANES at a time: they all run until the last stops.

    One compilation serves single fits, resamples and families alike.
    """
    found = []
    with float64():
        for first in range(0, len(problem), LANES):
            lanes = np.minimum(np.arange(first, first + LANES), len(problem) - 1)
            own = problem[lanes]
            parts = (y[own], weights[own], box.low[own], box.high[own])
            thresholds = jax.tree.map(lambda part, own=own: part[own], objective)
            at = x[own] if x.ndim == 3 else x
            found.append(
                descent.descend_all(form, iterations, start[lanes], thresholds, at, *parts)
            )
    joined = (np.concatenate(parts)[: len(problem)] for parts in zip(*found, strict=True))
    u, cost, norm = joined
    return u, cost, norm


def _solution(
    form: Form, u: np.ndarray, cost: np.ndarray, norm: np.ndarray, share: np.ndarray
) -> Solution:
    return Solution(u, natural(form, u), cost, norm, share)


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(form: Form, parameters: Array, x: Array) -> Array:
    return jax.vmap(form.evaluate, in_axes=(0, None))(parameters, x)


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
    r = descent.residuals(form, objective, start, x, y)
    jacobian = jax.jacfwd(lambda at: descent.residuals(form, objective, at, x, y))(start) * inside
    hessian = (jacobian.T * (weights * objective.curvatures(r))) @ jacobian
    values, vectors = jnp.linalg.eigh(hessian)
    usable = values > 1e-12 * values[-1]
    whiten = jnp.where(usable, vectors / jnp.sqrt(jnp.where(usable, values, 1.0)), 0.0)
    whiten = whiten * inside[:, None]
    first = descent.total_cost(form, objective, start, x, y, weights)

    def cost(z: Array) -> Array:
        u = jnp.clip(start + whiten @ z, low, high)
        return descent.total_cost(form, objective, u, x, y, weights) / jnp.maximum(first, 1e-30)

    nowhere = jnp.zeros_like(start)
    found = _jaxopt().LBFGS(cost, maxiter=100, tol=1e-10).run(nowhere).params
    found = jnp.where(cost(found) < cost(nowhere), found, nowhere)
    u = jnp.clip(start + whiten @ found, low, high)
    last, gradient = jax.value_and_grad(descent.total_cost, 2)(form, objective, u, x, y, weights)
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
        gradient = jax.grad(descent.total_cost, 2)(form, objective, u, x, y, weights)
        return jnp.where(inside, gradient, u - optimum)

    solve = jaxopt.linear_solve.solve_lu
    root = jaxopt.implicit_diff.custom_root(stationarity, solve=solve)(lambda _, y: optimum)
    return jax.jacrev(lambda y: root(optimum, y))(y)
