"""How much smaller than compute-optimal a model can be, and what that costs in training.

A smaller model is cheaper to serve. Trained on more tokens it reaches the same loss, up to a size
below which no number of tokens is enough.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from scaling_jax.errors import UserError
from scaling_jax.laws.fit import Fit
from scaling_jax.laws.optimum import (
    cheapest_at_loss,
    check_numbers,
    compute_optimal_params,
    fitted_and_resampled,
    losses,
    quantity,
    tokens_at_loss,
)
from scaling_jax.laws.predictive import check_level

SHRINK = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1)


def iso_loss(
    fit: Fit,
    *,
    flops: float | None = None,
    loss: float | None = None,
    shrink: Sequence[float] = SHRINK,
    level: float = 0.9,
    method: str = "pairs",
) -> pd.DataFrame:
    """Models of the loss of a compute-optimal one with a share of its params.

    Args:
      fit: of a loss law of params and tokens.
      flops: training compute 6ND of the compute-optimal model; or
      loss: that it reaches, nats per token.
      shrink: the params, as shares of the optimum's.
      level: of the interval, which holds what resampling the runs changes.
      method: "pairs" or "residual", how the runs are resampled.

    Returns:
      A row for each of `shrink`, in the order given:
        params_ratio: params over the optimum's; so too the FLOPs of serving a token, 2N.
        params, tokens, token_multiplier, flops_6nd: of the model.
        training_ratio, and /low and /high: its training FLOPs over the optimum's. Each resampled
          law has its own optimum, so that the interval is that of the price of shrinking.
        break_even_tokens: tokens served from which on the model costs less in all than the
          optimum, training 6ND and serving 2N a token; NaN for the optimum itself, infinite for a
          larger model.
      For a model too small to ever reach the loss (more than 1e16 tokens), tokens and all that
      follow from them are infinite; an infinite /high says that some resampled laws never do.

    Source: the trade-off of Hoffmann et al. 2022, section 3.4 and Sardana et al. 2024, read along
    one curve of equal loss.

    Raises:
      UserError: another law, not one of flops and loss, a wrong number, a loss that the law never
        reaches, or an unknown method.
    """
    factors = np.asarray(shrink, float)
    if not (factors.ndim == 1 and len(factors) and (np.isfinite(factors) & (factors > 0)).all()):
        raise UserError(f"shrink: shares of the optimum's params are finite and positive: {shrink}")
    check_level(level)
    theta, params, tokens, reached = _optima(fit, flops, loss, method)
    smaller = params[:, None] * factors
    needed = tokens_at_loss(fit.form, theta, smaller, reached[:, None])
    trained = 6 * smaller * needed
    ratios = trained / (6 * params * tokens)[:, None]
    prices = [quantity(column, level) for column in ratios.T]
    return pd.DataFrame(
        {
            "params_ratio": factors,
            "params": smaller[0],
            "tokens": needed[0],
            "token_multiplier": needed[0] / smaller[0],
            "flops_6nd": trained[0],
            "training_ratio": [price.value for price in prices],
            "training_ratio/low": [price.low for price in prices],
            "training_ratio/high": [price.high for price in prices],
            "break_even_tokens": _break_even(factors, params[0], trained[0], tokens[0]),
        }
    )


def _optima(
    fit: Fit, flops: float | None, loss: float | None, method: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The laws, fitted one first; and params, tokens and loss of the optimum of each."""
    if flops is not None and loss is None:
        check_numbers(fit, flops=flops)
        theta = fitted_and_resampled(fit, method)
        params = compute_optimal_params(fit.form, theta, flops)
        tokens = flops / (6 * params)
        reached = losses(fit.form, theta, params[:, None], tokens[:, None])[:, 0]
        return theta, params, tokens, reached
    if loss is not None and flops is None:
        check_numbers(fit, loss=loss)
        theta = fitted_and_resampled(fit, method)
        params, tokens = cheapest_at_loss(fit.form, theta, loss)
        able = np.isfinite(tokens)
        return theta[able], params[able], tokens[able], np.full(able.sum(), loss)
    raise UserError("iso_loss: give either flops= or loss=")


def _break_even(
    factors: np.ndarray, params: float, trained: np.ndarray, tokens: float
) -> np.ndarray:
    """Served tokens whose savings, 2 (N* - N) each, make up for the dearer training."""
    saved = 2 * params * (1 - factors)
    extra = trained - 6 * params * tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(factors > 1, np.inf, np.where(factors == 1, np.nan, extra / saved))
