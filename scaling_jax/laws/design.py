"""The most informative next runs: those that shrink the variance of a prediction most.

A law is linear in its parameters near the fit, so what a new run would teach can be said before it
is trained: a measurement with noise of the fit's size updates the parameters' covariance as in
Bayesian linear regression. Runs are added greedily (I-optimal design with one target), each the one
that reduces the variance most per FLOP or, if asked, outright.
"""

import dataclasses
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from scaling_jax import records
from scaling_jax.errors import UserError
from scaling_jax.laws.fit import Fit
from scaling_jax.laws.observations import check_inputs
from scaling_jax.laws.predictive import student_t_quantile

# Default candidates: sizes from the smallest fitted one up, and token multipliers.
SIZES, MULTIPLIERS = 16, (5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
# The budget at which candidates start, as a share of what the dearest affordable one costs.
CHEAPEST = 1e-4
# How far, at one standard deviation, a parameter may be off before anything was measured: in
# logarithms for positive ones, else relative to its value and at least this.
PRIOR_SD = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """The runs to do next.

    Attributes:
      runs: a row for each, in the order chosen: params, tokens, token_multiplier, flops_6nd, and
        the relative half width of the target's interval once it is measured.
      flops: what they cost together, 6ND.
      before, after: relative half width of the law's interval at the target without and with the
        runs. It holds what is unknown of the parameters, not the noise of the target's own run.
      candidates: every candidate, with the half width if it alone were added.
    """

    runs: pd.DataFrame
    flops: float
    before: float
    after: float
    candidates: pd.DataFrame


def next_runs(
    fit: Fit,
    *,
    target: dict[str, float],
    budget_flops: float,
    candidates: pd.DataFrame | None = None,
    count: int | None = None,
    prefer: Literal["per_flop", "most"] = "per_flop",
    level: float = 0.9,
) -> Design:
    """The affordable runs that make the prediction at `target` most certain.

    Args:
      fit: of a loss law of params and tokens.
      target: the run to be predicted, {"params": .., "tokens": ..}.
      budget_flops: training compute to spend on new runs, 6ND.
      candidates: params and tokens of the runs to choose from; by default a grid of sizes and
        multipliers within the budget. A candidate may be chosen once.
      count: at most so many runs; by default as many as the budget allows, or help.
      prefer: "per_flop" weighs what a run teaches by its cost; "most" does not.
      level: of the intervals.

    Source: greedy I-optimal design, e.g. Atkinson, Donev and Tobias 2007, ch. 10-12.

    Raises:
      UserError: another law, a wrong number, or no affordable candidate.
    """
    if fit.form.inputs != ("params", "tokens"):
        raise UserError(f"a design needs a law of params and tokens, not '{fit.form.name}'")
    if not (np.isfinite(budget_flops) and budget_flops > 0):
        raise UserError(f"budget_flops must be finite and positive: {budget_flops}")
    if prefer not in ("per_flop", "most"):
        raise UserError(f"prefer is 'per_flop' or 'most', not '{prefer}'")
    asked, shape = check_inputs(fit.form, target)
    if shape:
        raise UserError("a design is for one target: give numbers, not arrays")
    table = _grid(fit, budget_flops) if candidates is None else records.check(candidates)
    table = table[table["flops_6nd"] <= budget_flops].reset_index(drop=True)
    if table.empty:
        raise UserError(f"no candidate run costs as little as {budget_flops:.3g} FLOPs")
    rows = _rows(fit, table[["params", "tokens"]].to_numpy(float).T)
    goal = _rows(fit, asked)[0]
    covariance = _covariance(fit)
    reach = student_t_quantile(level, max(1, fit.degrees)) * _noise(fit)

    def width(covariance: np.ndarray) -> float:
        return float(reach * np.sqrt(goal @ covariance @ goal))

    before, flops = width(covariance), table["flops_6nd"].to_numpy(float)
    alone = np.sqrt(np.maximum(goal @ covariance @ goal - _gains(covariance, rows, goal), 0.0))
    described = table.assign(half_width=reach * alone)
    left, chosen, widths = budget_flops, [], []
    free = np.ones(len(table), bool)
    while (free & (flops <= left)).any() and (count is None or len(chosen) < count):
        gains = np.where(free & (flops <= left), _gains(covariance, rows, goal), -1.0)
        index = int(np.argmax(gains / flops if prefer == "per_flop" else gains))
        if gains[index] <= 1e-3 * (goal @ covariance @ goal) and chosen:
            break
        row = covariance @ rows[index]
        covariance = covariance - np.outer(row, row) / (1 + rows[index] @ row)
        chosen.append(index)
        widths.append(width(covariance))
        free[index] = False
        left -= flops[index]
    columns = ["params", "tokens", "token_multiplier", "flops_6nd"]
    runs = table.loc[chosen, columns].assign(half_width=widths).reset_index(drop=True)
    return Design(runs, float(budget_flops - left), before, width(covariance), described)


def _gains(
    covariance: Float[np.ndarray, "p p"],
    rows: Float[np.ndarray, "m p"],
    goal: Float[np.ndarray, "p"],
) -> Float[np.ndarray, "m"]:
    """By how much each candidate alone lowers the variance at the goal."""
    moved = rows @ covariance
    return (moved @ goal) ** 2 / (1 + (moved * rows).sum(1))


def _rows(fit: Fit, x: Float[np.ndarray, "2 m"]) -> Float[np.ndarray, "m p"]:
    """d log prediction / d coordinates at each of `x`, 0 for parameters that do not move."""
    free = fit.box.inside(fit.coordinates)
    return fit.slopes(x) / fit.evaluate(x)[:, None] * free


def _covariance(fit: Fit) -> Float[np.ndarray, "p p"]:
    """Of the coordinates, over the squared noise, given the fitted runs and a weak prior."""
    rows = _rows(fit, fit.observations.x)
    positive = np.array([parameter.positive for parameter in fit.form.parameters])
    sd = PRIOR_SD * np.where(positive, 1.0, np.maximum(np.abs(fit.coordinates), 0.1))
    precision = (rows.T * fit.observations.weights) @ rows + np.diag(_noise(fit) ** 2 / sd**2)
    return np.linalg.inv(precision)


def _noise(fit: Fit) -> float:
    """Relative noise of a run: that of the residuals or, without any, of the Bayesian law."""
    if fit.degrees and fit.objective.residual == "log":
        return max(fit.noise, 1e-6)
    if fit.degrees:
        return max(fit.noise / float(np.mean(fit.observations.y)), 1e-6)
    posterior = fit.calibration.posterior
    return float(posterior.share @ posterior.sigma)


def _grid(fit: Fit, budget_flops: float) -> pd.DataFrame:
    smallest = fit.observations.x[0].min()
    largest = max(np.sqrt(budget_flops / 6 / MULTIPLIERS[0]), smallest)
    params, multiplier = (
        part.ravel()
        for part in np.meshgrid(np.geomspace(smallest, largest, SIZES), np.array(MULTIPLIERS))
    )
    grid: dict[str, Any] = {"params": params, "tokens": params * multiplier}
    table = records.check(pd.DataFrame(grid))
    return table[table["flops_6nd"] >= CHEAPEST * budget_flops]
