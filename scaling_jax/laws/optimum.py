"""Compute-optimal and inference-aware optima of a loss law, with intervals.

Training costs 6ND FLOPs, serving D_inf tokens 2N D_inf. For laws of the form E + A N^-alpha +
B D^-beta the compute optimum has a closed form, and others are searched along the curve of equal
compute or equal loss.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Float

from scaling_jax.errors import UserError, nearest
from scaling_jax.laws import solver
from scaling_jax.laws.fit import Fit
from scaling_jax.laws.forms import Form
from scaling_jax.laws.predictive import check_level

INPUTS = ("params", "tokens")
RESAMPLING_METHODS = ("pairs", "residual")
# Params or tokens are searched for over this range, in rounds that each zoom in on the best point.
RANGE = (1e3, 1e16)
POINTS, ROUNDS, BISECTIONS = 64, 5, 50


@dataclasses.dataclass(frozen=True)
class Quantity:
    """A number derived from a law, and its interval from resampled fits."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Optimum:
    """The best model under a law.

    Attributes:
      params, tokens, token_multiplier: N, D and M = D / N.
      loss: that the law predicts for it.
      training_flops: 6ND.
      inference_flops: 2N D_inf, 0 if no tokens are to be served.
      level: of the intervals, which hold what resampling the runs changes, not what the law
        itself may get wrong.
    """

    params: Quantity
    tokens: Quantity
    token_multiplier: Quantity
    loss: Quantity
    training_flops: Quantity
    inference_flops: Quantity
    level: float


def optimum(fit: Fit, *, flops: float, level: float = 0.9, method: str = "pairs") -> Optimum:
    """The params and tokens of the lowest loss among runs of `flops` training FLOPs, C = 6ND.

    Args:
      fit: of a loss law of params and tokens.
      flops: training compute.
      level: of the intervals.
      method: "pairs" or "residual", how the runs are resampled.

    Source: Hoffmann et al. 2022, eq. 4 (closed form); Gadre et al. 2024, eq. 9-10 (M*).

    Raises:
      UserError: another law, a wrong number, or an unknown method.
    """
    check_numbers(fit, flops=flops)
    theta = fitted_and_resampled(fit, method)
    params = compute_optimal_params(fit.form, theta, flops)
    return _optimum(fit.form, theta, params, flops / (6 * params), 0.0, level)


def inference_optimum(
    fit: Fit, *, loss: float, inference_tokens: float, level: float = 0.9, method: str = "pairs"
) -> Optimum:
    """The params and tokens that reach `loss` at the least lifetime cost, 6ND + 2N D_inf.

    Args:
      fit: of a loss law of params and tokens.
      loss: to be reached, nats per token.
      inference_tokens: D_inf, tokens served over the model's life; 0 for training alone.
      level: of the intervals.
      method: "pairs" or "residual", how the runs are resampled.

    Source: Sardana et al. 2024, eq. 2.

    Raises:
      UserError: another law, a wrong number, a loss that the law never reaches, or an unknown
        method.
    """
    check_numbers(fit, loss=loss)
    if not (np.isfinite(inference_tokens) and inference_tokens >= 0):
        raise UserError(f"inference_tokens must be finite and not negative: {inference_tokens}")
    theta = fitted_and_resampled(fit, method)
    params, tokens = cheapest_at_loss(fit.form, theta, loss, inference_tokens)
    reached = np.isfinite(tokens)
    return _optimum(
        fit.form, theta[reached], params[reached], tokens[reached], inference_tokens, level
    )


def optimal_token_multiplier(fit: Fit, *, flops: float = 1e21) -> float:
    """M* = D / N of the compute optimum; it depends on `flops` unless the exponents are tied.

    Source: Gadre et al. 2024, eq. 10: M* = (b / a)^(1 / 2 eta).

    Raises:
      UserError: another law, or a wrong number.
    """
    check_numbers(fit, flops=flops)
    theta = solver.natural(fit.form, fit.coordinates)[None]
    params = compute_optimal_params(fit.form, theta, flops)
    return float(flops / (6 * params[0] ** 2))


def compute_optimal_params(
    form: Form, theta: Float[np.ndarray, "fits p"], flops: float
) -> Float[np.ndarray, "fits"]:
    """N of the lowest loss at `flops` = 6ND: closed form where there is one, else a search."""
    values = dict(zip(form.names, theta.T, strict=True))
    if form.name == "over_training":
        return np.sqrt(flops / 6) * (values["a"] / values["b"]) ** (1 / (4 * values["eta"]))
    if form.name == "chinchilla":
        alpha, beta = values["alpha"], values["beta"]
        ratio = alpha * values["A"] / (beta * values["B"])
        return ratio ** (1 / (alpha + beta)) * (flops / 6) ** (beta / (alpha + beta))
    return searched_params(form, theta, flops)


def searched_params(
    form: Form, theta: Float[np.ndarray, "fits p"], flops: float
) -> Float[np.ndarray, "fits"]:
    """N of the lowest loss at `flops` = 6ND, by search."""

    def loss(log_params: Float[np.ndarray, "fits points"]) -> np.ndarray:
        params = np.exp(log_params)
        return losses(form, theta, params, flops / (6 * params))

    return np.exp(_search(loss, len(theta)))


def cheapest_at_loss(
    form: Form, theta: Float[np.ndarray, "fits p"], loss: float, inference_tokens: float = 0.0
) -> tuple[Float[np.ndarray, "fits"], Float[np.ndarray, "fits"]]:
    """N and D that reach `loss` at the least 6ND + 2N D_inf, by search; infinite D if none do.

    Raises:
      UserError: the first fit reaches no such loss.
    """

    def tokens_for(log_params: Float[np.ndarray, "fits points"]) -> np.ndarray:
        return tokens_at_loss(form, theta, np.exp(log_params), loss)

    def cost(log_params: Float[np.ndarray, "fits points"]) -> np.ndarray:
        return log_params + np.log(6 * tokens_for(log_params) + 2 * inference_tokens)

    log_params = _search(cost, len(theta))
    tokens = tokens_for(log_params[:, None])[:, 0]
    if not np.isfinite(tokens[0]):
        raise UserError(f"the law reaches no loss of {loss:g}, whatever the params and tokens")
    return np.exp(log_params), tokens


def tokens_at_loss(
    form: Form,
    theta: Float[np.ndarray, "fits p"],
    params: Float[np.ndarray, "fits points"],
    loss: float | Float[np.ndarray, "fits 1"],
) -> Float[np.ndarray, "fits points"]:
    """D at which the law with `params` reaches `loss`, by bisection; infinite if never in RANGE."""
    low, high = (np.full(params.shape, np.log(end)) for end in RANGE)
    reached = losses(form, theta, params, np.exp(high)) <= loss
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        enough = losses(form, theta, params, np.exp(middle)) <= loss
        low, high = np.where(enough, low, middle), np.where(enough, middle, high)
    return np.where(reached, np.exp(high), np.inf)


def losses(
    form: Form,
    theta: Float[np.ndarray, "fits p"],
    params: Float[np.ndarray, "fits points"],
    tokens: Float[np.ndarray, "fits points"],
) -> Float[np.ndarray, "fits points"]:
    """Each fit's law at its own row of params and tokens."""
    with solver.float64():
        return np.asarray(_by_row(form, theta, np.stack([params, tokens], axis=1)))


def fitted_and_resampled(fit: Fit, method: str) -> Float[np.ndarray, "fits p"]:
    """The fitted parameters, then those of the resamples ("pairs" or "residual")."""
    if method not in RESAMPLING_METHODS:
        hint = nearest(method, RESAMPLING_METHODS)
        raise UserError(f"unknown resampling method '{method}' ({hint})")
    fitted = solver.natural(fit.form, fit.coordinates)
    return np.concatenate([fitted[None], fit.resamples(method).parameters])


def quantity(values: Float[np.ndarray, "fits"], level: float) -> Quantity:
    """The first of `values`, and the interval of the others that are numbers (or infinite)."""
    drawn = values[1:][~np.isnan(values[1:])]
    if not len(drawn):
        return Quantity(float(values[0]), np.nan, np.nan)
    # A quantile that is one of the values may be infinite; between two it would be no number.
    ends = [(1 - level) / 2, (1 + level) / 2]
    low, high = np.quantile(drawn, ends, method="inverted_cdf")
    return Quantity(float(values[0]), float(low), float(high))


def check_numbers(fit: Fit, **numbers: float) -> None:
    """Raises a UserError if `fit` is not of params and tokens, or a number is not positive."""
    if fit.form.inputs != INPUTS:
        raise UserError(f"this needs a law of params and tokens, not '{fit.form.name}'")
    for name, value in numbers.items():
        if not (np.isfinite(value) and value > 0):
            raise UserError(f"{name} must be finite and positive: {value}")


@functools.partial(jax.jit, static_argnums=0)
def _by_row(form: Form, theta: Array, x: Float[Array, "fits 2 points"]) -> Array:
    return jax.vmap(form.evaluate)(theta, x)


def _search(
    function: Callable[[Float[np.ndarray, "fits points"]], np.ndarray], fits: int
) -> Float[np.ndarray, "fits"]:
    """The log params at which `function` is least, for each fit: grids that zoom in."""
    low, high = (np.full(fits, np.log(end)) for end in RANGE)
    unit = np.linspace(0, 1, POINTS)
    for _ in range(ROUNDS):
        points = low[:, None] + (high - low)[:, None] * unit
        values = function(points)
        best = np.argmin(np.where(np.isnan(values), np.inf, values), axis=1)
        step = (high - low) / (POINTS - 1)
        center = points[np.arange(fits), best]
        low, high = center - step, center + step
    return (low + high) / 2


def _optimum(
    form: Form,
    theta: Float[np.ndarray, "fits p"],
    params: Float[np.ndarray, "fits"],
    tokens: Float[np.ndarray, "fits"],
    inference_tokens: float,
    level: float,
) -> Optimum:
    check_level(level)
    return Optimum(
        params=quantity(params, level),
        tokens=quantity(tokens, level),
        token_multiplier=quantity(tokens / params, level),
        loss=quantity(losses(form, theta, params[:, None], tokens[:, None])[:, 0], level),
        training_flops=quantity(6 * params * tokens, level),
        inference_flops=quantity(2 * params * inference_tokens, level),
        level=level,
    )
