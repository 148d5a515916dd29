"""Whether the data determine the parameters of a law, and what to say when they do not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.laws import descent, solver
from scaling_jax.laws.forms import Form
from scaling_jax.laws.objectives import Objective

# Gradient over the square root of the objective above which the optimum is polished.
GRADIENT_TOLERANCE = 1e-7
# Relative changes of parameters that the data see this much less than others are flat.
FLAT = 1e6
AT_BOUND = 1e-9
LOW_SHARE = 0.1


def relative_jacobian(
    form: Form,
    objective: Objective,
    u: Float[np.ndarray, "p"],
    x: Float[np.ndarray, "inputs n"],
    y: Float[np.ndarray, "n"],
    weights: Float[np.ndarray, "n"],
    box: solver.Box,
) -> Float[np.ndarray, "n free"]:
    """d residuals / d log parameter, for the free parameters."""
    count, length = len(y), solver.bucket(len(y))
    with solver.float64():
        points = (solver.lengthened(x, length), solver.lengthened(y, length))
        jacobian = np.asarray(_jacobian(form, objective, u, *points))[:count]
    positive = np.array([parameter.positive for parameter in form.parameters])
    scaled = jacobian * np.where(positive, 1.0, u) * np.sqrt(weights)[:, None]
    return scaled[:, box.low < box.high]


def condition(jacobian: Float[np.ndarray, "n free"]) -> float:
    """Largest over smallest singular value; infinite with fewer points than parameters."""
    if not jacobian.size:
        return 1.0
    singular = np.linalg.svd(jacobian, compute_uv=False)
    short = jacobian.shape[0] < jacobian.shape[1] or singular[-1] == 0
    return float("inf") if short else float(singular[0] / singular[-1])


def doubts(
    form: Form,
    box: solver.Box,
    u: Float[np.ndarray, "p"],
    jacobian: Float[np.ndarray, "n free"],
    share: float,
) -> list[str]:
    """What makes the fit doubtful, in sentences."""
    points, free = jacobian.shape
    found = []
    if points < free:
        found.append(f"not identified: {points} points for {free} parameters")
    elif points == free:
        found.append(f"{points} points for {free} parameters: nothing is left to measure the noise")
    is_free = box.low < box.high
    stuck = is_free & ((u <= box.low + AT_BOUND) | (u >= box.high - AT_BOUND))
    for index in np.flatnonzero(stuck):
        value = np.exp(u[index]) if form.parameters[index].positive else u[index]
        found.append(f"{form.names[index]} is at its bound of {value:.4g}")
    if points >= free and condition(jacobian[:, ~stuck[is_free]]) > FLAT:
        _, _, directions = np.linalg.svd(jacobian, full_matrices=False)
        names = np.array(form.names)[is_free]
        moving = names[np.abs(directions[-1]) > 0.3]
        found.append(f"not identified: the data hardly see {', '.join(moving)} (flat direction)")
    if share < LOW_SHARE:
        found.append(f"only {share:.0%} of the starts reached the best optimum")
    return found


@functools.partial(jax.jit, static_argnums=0)
def _jacobian(form: Form, objective: Objective, u: Array, x: Array, y: Array) -> Array:
    return jax.jacfwd(lambda at: descent.residuals(form, objective, at, x, y))(jnp.asarray(u))
