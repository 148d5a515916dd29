"""Descent to one local optimum, many at once: Levenberg-Marquardt within bounds.

There are no line searches: under `vmap` every lane would pay for the slowest. Parameters are in the
solver's coordinates, logarithms where they are positive.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.laws.forms import Form
from scaling_jax.laws.objectives import Objective

# A descent ends when it expects to lower the objective by less than this, relatively.
CONVERGED = 1e-18
ROUNDING = 1e-14


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


@functools.partial(jax.jit, static_argnums=0)
def descend_all(
    form: Form,
    iterations: Array,
    start: Array,
    objective: Objective,
    x: Array,
    y: Array,
    weights: Array,
    low: Array,
    high: Array,
) -> tuple[Array, Array, Array]:
    """Coordinates, objective and gradient norm after a descent from each of `start`.

    Each lane has its own start, thresholds of the objective, observations, weights and bounds, and
    the inputs if `x` has an axis for them. All lanes run until the last one stops.
    """
    descend = functools.partial(_descend, form, iterations)
    axes = (0, 0, 0 if x.ndim == 3 else None, 0, 0, 0, 0)
    return jax.vmap(descend, in_axes=axes)(start, objective, x, y, weights, low, high)


def _descend(
    form: Form,
    iterations: Array,
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

    def with_residuals(u: Array) -> tuple[Array, Array]:
        r = residuals(form, objective, u, x, y)
        return r, r

    def quadratic(u: Array) -> tuple[Array, Array, Array]:
        jacobian, r = jax.jacfwd(with_residuals, has_aux=True)(u)
        cost = jnp.sum(weights * objective.costs(r))
        gradient = jacobian.T @ (weights * objective.slopes(r))
        hessian = (jacobian.T * (weights * objective.curvatures(r))) @ jacobian
        held = ((u <= low) & (gradient >= 0)) | ((u >= high) & (gradient <= 0)) | (low == high)
        return (
            jnp.where(jnp.isfinite(cost), cost, jnp.inf),
            jnp.where(held, 0.0, gradient),
            jnp.where(held[:, None] | held, 0.0, hessian),
        )

    def step(state: Any) -> Any:
        count, u, damping, _, (cost, gradient, hessian) = state
        diagonal = jnp.diagonal(hessian)
        root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))
        scaled = hessian / root[:, None] / root + (damping + 1e-300) * jnp.eye(len(u))
        move = -_solve(scaled, gradient / root) / root
        trial = jnp.clip(u + jnp.clip(move, -5.0, 5.0), low, high)
        tried = quadratic(trial)
        # Near the optimum rounding hides what a step gains; the gradient still knows the way.
        better = tried[0] <= cost * (1 + ROUNDING)
        expected = -gradient @ move
        done = (expected <= CONVERGED * cost + 1e-30) & jnp.isfinite(cost) | (damping > 1e12)
        damping = jnp.where(better, jnp.maximum(damping / 8, 1e-14), damping * 4)
        pick = functools.partial(jnp.where, better)
        model = jax.tree.map(pick, tried, (cost, gradient, hessian))
        return count + 1, pick(trial, u), damping, done, model

    def unfinished(state: Any) -> Array:
        return (state[0] < iterations) & ~state[3]

    # Before the first step, which stays at the start and is accepted, nothing is known.
    size = len(start)
    unknown = (jnp.array(jnp.inf), jnp.zeros(size), jnp.zeros((size, size)))
    first = (jnp.array(0), start, jnp.array(1e-2), jnp.array(False), unknown)
    _, u, _, _, (cost, gradient, _) = jax.lax.while_loop(unfinished, step, first)
    return u, cost, jnp.linalg.norm(gradient)


def _solve(matrix: Float[Array, "p p"], vector: Float[Array, "p"]) -> Float[Array, "p"]:
    """Solves a positive definite system by Gauss-Jordan elimination.

    Unlike the library's factorisations it runs on all lanes of a batch at once.
    """

    def eliminate(_: Array, rows: Array) -> Array:
        # Rows and columns move round, so that the pivot is always the first.
        pivot = rows[0] / rows[0, 0]
        rest = rows[1:] - rows[1:, :1] * pivot
        return jnp.roll(jnp.concatenate([rest, pivot[None]]), -1, axis=1)

    augmented = jnp.concatenate([matrix, vector[:, None]], axis=1)
    return jax.lax.fori_loop(0, len(vector), eliminate, augmented)[:, 0]
