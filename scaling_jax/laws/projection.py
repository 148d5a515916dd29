"""Starting points: nonlinear parameters spread out, linear ones solved for."""

import functools

import jax
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.laws.forms import Form
from scaling_jax.laws.objectives import Objective

SWEEPS = 50


def spread(form: Form, count: int) -> Float[np.ndarray, "count p"]:
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


def project(
    form: Form,
    objective: Objective,
    points: Float[np.ndarray, "starts p"],
    x: Float[np.ndarray, "*problems inputs n"],
    y: Float[np.ndarray, "problems n"],
    weights: Float[np.ndarray, "problems n"],
    low: Float[np.ndarray, "problems p"],
    high: Float[np.ndarray, "problems p"],
) -> Float[np.ndarray, "problems starts p"]:
    """Solver coordinates of the starts in each problem, within its bounds.

    The linear parameters are those of the bounded least squares, given the others.
    """
    positive = np.array([parameter.positive for parameter in form.parameters])
    linear = np.array([parameter.starts is None for parameter in form.parameters])
    with np.errstate(over="ignore"):
        lows, highs = (np.where(positive, np.exp(side), side)[:, None] for side in (low, high))
    start = np.where(linear, 0.0, np.clip(points, lows, highs))
    if linear.any():
        # The law is affine in these: constant + matrix @ linear parameters.
        units = np.eye(len(linear))[np.flatnonzero(linear)]
        corners = np.stack([start, *(start + unit for unit in units)], axis=2)
        flat = corners.reshape(len(start), -1, len(linear))
        with jax.enable_x64(True):
            values = np.asarray(_evaluate(form, flat, x)).reshape(*corners.shape[:3], -1)
        constant, matrix = values[:, :, 0], values[:, :, 1:] - values[:, :, :1]
        scale = weights / (y**2 if objective.residual == "log" else np.ones_like(y))
        scaled = matrix * scale[:, None, None, :]
        gram = np.einsum("bscn,bsdn->bscd", scaled, matrix)
        moment = np.einsum("bscn,bsn->bsc", scaled, y[:, None] - constant)
        bounds = (lows[..., linear], highs[..., linear])
        start[..., linear] = _bounded_least_squares(gram, moment, *bounds)
    with np.errstate(divide="ignore", invalid="ignore"):
        start = np.where(positive, np.log(np.maximum(start, 1e-12)), start)
    return np.clip(start, low[:, None], high[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _evaluate(form: Form, parameters: Float[Array, "problems many p"], x: Array) -> Array:
    """The law at inputs of one or of each problem; (problems, many, n)."""
    by_parameters = jax.vmap(form.evaluate, in_axes=(0, None))
    axes = (0, 0 if x.ndim == 3 else None)
    return jax.vmap(by_parameters, in_axes=axes)(parameters, x)


def _bounded_least_squares(
    gram: Float[np.ndarray, "*many c c"],
    moment: Float[np.ndarray, "*many c"],
    low: Float[np.ndarray, "*many c"],
    high: Float[np.ndarray, "*many c"],
) -> Float[np.ndarray, "*many c"]:
    """Minimises c'Gc/2 - m'c within the bounds, by cyclic coordinate descent."""
    unit = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)) + 1e-300
    gram, moment = gram / unit[..., :, None] / unit[..., None, :], moment / unit
    low, high = low * unit, high * unit
    size = moment.shape[-1]
    start = np.linalg.solve(gram + 1e-10 * np.eye(size), moment[..., None])[..., 0]
    c = np.clip(start, low, high)
    if np.array_equal(c, start):
        return c / unit
    for sweep in range(SWEEPS * size):
        j = sweep % size
        step = moment[..., j] - (gram[..., j, :] * c).sum(-1)
        c[..., j] = np.clip(c[..., j] + step, low[..., j], high[..., j])
    return c / unit
