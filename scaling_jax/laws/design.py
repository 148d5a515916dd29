"""The most informative next runs: those that shrink the interval of a prediction most.

What a run would teach can be said before it is trained. The Bayesian law of the default interval
(bayes.py) gives the covariance between the losses of the candidates and of the targets; to measure
a candidate conditions that Gaussian vector on it, whatever loss is found. The candidates that leave
the least variance at the targets are chosen greedily and by exchange (exchange.py).

A single law, linearised at its optimum, is no substitute: few runs leave the optimum far off, and
what it then calls informative is not; nor does it know that runs far from the target tell little
about it when the law is not quite true.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import ArrayLike, Float

from scaling_jax import records
from scaling_jax.errors import UserError
from scaling_jax.laws import bayes, exchange
from scaling_jax.laws.fit import Fit
from scaling_jax.laws.forms import FORMS
from scaling_jax.laws.observations import check_inputs
from scaling_jax.laws.predictive import student_t_quantile

# Default candidates: sizes from the smallest one up, and token multipliers. Smaller ones are left
# out: such runs lie above the laws (Gadre et al. 2024, figure 9).
SIZES, MULTIPLIERS = 16, (10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
# Without any run, the smallest size as a share of the smallest target's.
SMALLEST_SHARE = 1e-3
# The budget at which candidates start, as a share of what the dearest affordable one costs.
CHEAPEST = 1e-4


@dataclasses.dataclass(frozen=True, eq=False)
class Design:
    """The runs to do next.

    Half widths are relative, of the interval for what a run at the target measures; of several
    targets, their root mean square. It is that of `Fit.predict(method="bayes")`: it holds what is
    unknown of the law, how wrong the law may be that far out, and the noise of a run. The default
    interval also draws on how point fits disagree and on how both did within the data, which
    nobody knows before the runs are measured.

    Attributes:
      runs: the rows of `candidates` to train, cheapest first; `half_width` is the target's once
        this run and those above it are measured.
      flops: what they cost together, 6ND.
      before, after: half width without and with them.
      candidates: the affordable candidates: params, tokens, token_multiplier, flops_6nd, any other
        column they came with, and `half_width`, the target's if this one alone is measured.
    """

    runs: pd.DataFrame
    flops: float
    before: float
    after: float
    candidates: pd.DataFrame


def next_runs(
    fit: Fit,
    *,
    target: Mapping[str, ArrayLike],
    budget_flops: float,
    candidates: pd.DataFrame | None = None,
    count: int | None = None,
    level: float = 0.9,
) -> Design:
    """The affordable runs that make the prediction at `target` most certain, given fitted runs.

    Args:
      fit: of a loss law of params and tokens. Its runs count; whatever its form, the design is for
        the default prediction.
      target: the run to be predicted, {"params": .., "tokens": ..}; arrays are several targets,
        whose mean variance is minimised.
      budget_flops: training compute to spend on new runs, 6ND.
      candidates: params and tokens of the runs to choose from; by default a grid of sizes and
        multipliers within the budget. A candidate may be chosen once.
      count: at most so many runs; by default as many as the budget allows and help.
      level: of the intervals.

    Source: I-optimal design with exchange, e.g. Atkinson, Donev and Tobias 2007, ch. 10-12.

    Raises:
      UserError: another law, a wrong number, or no affordable candidate.
    """
    if fit.form.inputs != ("params", "tokens"):
        raise UserError(f"a design needs a law of params and tokens, not '{fit.form.name}'")
    goals = _goals(target)
    _check(budget_flops, count)
    table = _affordable(candidates, fit.observations.x[0].min(), budget_flops)
    known = bayes.posterior(fit.observations.x, fit.observations.y)
    return _design(known, table, goals, budget_flops, count, level)


def first_runs(
    *,
    target: Mapping[str, ArrayLike],
    budget_flops: float,
    candidates: pd.DataFrame | None = None,
    count: int | None = None,
    level: float = 0.9,
) -> Design:
    """As `next_runs`, where nothing has been trained: from the prior of the Bayesian law alone.

    The cheapest candidate is always among the runs, and `before` is the half width with it alone:
    the prior has no scale, so that its loss, whatever it is, gives the scale and nothing else.

    Args:
      target: the run to be predicted, {"params": .., "tokens": ..}, or several as arrays.
      budget_flops: training compute to spend, 6ND.
      candidates: params and tokens of the runs to choose from; by default a grid of multipliers and
        of sizes from a thousandth of the target's.
      count: at most so many runs; by default as many as the budget allows and help.
      level: of the intervals.

    Raises:
      UserError: a wrong number, or no affordable candidate.
    """
    goals = _goals(target)
    _check(budget_flops, count)
    table = _affordable(candidates, SMALLEST_SHARE * goals[0].min(), budget_flops)
    cheapest = table["flops_6nd"].to_numpy(float).argmin()
    first = table.iloc[[cheapest]]
    rest = table.drop(index=first.index).reset_index(drop=True)
    known = bayes.posterior(_points(first), np.ones(1))
    left = budget_flops - float(first["flops_6nd"].sum())
    more = None if count is None else count - 1
    found = _design(known, rest, goals, left, more, level)
    first = first.assign(half_width=found.before)
    return dataclasses.replace(
        found,
        runs=pd.concat([first, found.runs], ignore_index=True),
        flops=budget_flops - left + found.flops,
        candidates=pd.concat([first, found.candidates], ignore_index=True),
    )


def _design(
    known: bayes.Posterior,
    table: pd.DataFrame,
    goals: Float[np.ndarray, "2 g"],
    budget_flops: float,
    count: int | None,
    level: float,
) -> Design:
    joint = known.covariance(np.concatenate([_points(table), goals], axis=1))
    noise, costs = known.noise_variance, table["flops_6nd"].to_numpy(float)
    chosen = exchange.choose(joint, noise, costs, budget_flops, count)
    variances = np.array(
        [
            exchange.goal_variance(joint, noise, chosen[:some], len(costs))
            for some in range(len(chosen) + 1)
        ]
    )
    alone = variances[0] - exchange.gains(joint, noise, len(costs))
    reach = student_t_quantile(level, np.inf)
    widths, alone_widths = (reach * np.sqrt(part + noise) for part in (variances, alone))
    return Design(
        runs=table.iloc[chosen].assign(half_width=widths[1:]).reset_index(drop=True),
        flops=float(costs[chosen].sum()),
        before=float(widths[0]),
        after=float(widths[-1]),
        candidates=table.assign(half_width=alone_widths),
    )


def _check(budget_flops: float, count: int | None) -> None:
    if not (np.isfinite(budget_flops) and budget_flops > 0):
        raise UserError(f"budget_flops must be finite and positive: {budget_flops}")
    if count is not None and count < 1:
        raise UserError(f"count must be 1 at least: {count}")


def _goals(target: Mapping[str, ArrayLike]) -> Float[np.ndarray, "2 g"]:
    """Params and tokens of the targets."""
    goals, _ = check_inputs(FORMS["over_training"], target)
    if not goals.size:
        raise UserError("a design needs a target, and there is none")
    return goals


def _affordable(
    candidates: pd.DataFrame | None, smallest: float, budget_flops: float
) -> pd.DataFrame:
    """The candidates, checked, that cost no more than the budget."""
    table = _grid(smallest, budget_flops) if candidates is None else records.check(candidates)
    table = table[table["flops_6nd"] <= budget_flops].reset_index(drop=True)
    if table.empty:
        raise UserError(f"no candidate run costs as little as {budget_flops:.3g} FLOPs")
    return table


def _grid(smallest: float, budget_flops: float) -> pd.DataFrame:
    largest = max(np.sqrt(budget_flops / 6 / MULTIPLIERS[0]), smallest)
    sizes = np.unique(np.geomspace(smallest, largest, SIZES).round())
    params, multiplier = (part.ravel() for part in np.meshgrid(sizes, np.array(MULTIPLIERS)))
    flops = 6 * params**2 * multiplier
    columns = {"params": params, "tokens": params * multiplier}
    grid = pd.DataFrame(columns | {"token_multiplier": multiplier, "flops_6nd": flops})
    return grid[grid["flops_6nd"] >= CHEAPEST * budget_flops]


def _points(table: pd.DataFrame) -> Float[np.ndarray, "2 m"]:
    return table[["params", "tokens"]].to_numpy(float).T
