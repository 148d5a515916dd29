"""Measured coverage: fit the cheap runs of a table, predict the dearer ones, count the hits."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pandas as pd

from scaling_jax.errors import UserError
from scaling_jax.laws import calibrated
from scaling_jax.laws.chained import chained
from scaling_jax.laws.fit import fit, refit
from scaling_jax.laws.forms import Form, named
from scaling_jax.laws.observations import FEWEST, gather


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """How intervals did on held-out runs.

    Attributes:
      count: of predictions.
      covered: the share of them whose interval held the measurement, 0 to 1.
      median_relative_width: of the intervals, over the predicted value.
      median_relative_error: of the predicted values.
      mean_interval_score: Winkler's, of log value, lower is better: the width and, for a miss, the
        distance missed by times 2 / (1 - level). It rewards being sharp and right at once.
    """

    count: int
    covered: float
    median_relative_width: float
    median_relative_error: float
    mean_interval_score: float


@dataclasses.dataclass(frozen=True, eq=False)
class CutScore(Score):
    """The score at one compute cut: `runs` below `flops` (6ND) predicted those from there on."""

    flops: float
    runs: int


@dataclasses.dataclass(frozen=True, eq=False)
class Coverage(Score):
    """The score over all cuts: every pair of a cut and a run above it counts once.

    Attributes:
      level: of the intervals.
      cuts: the score at each cut, least compute first.
      predictions: a row for each prediction: cut, run, params, tokens, decades (of compute beyond
        the largest fitted run), measured, value, low, high.
    """

    level: float
    cuts: list[CutScore]
    predictions: pd.DataFrame


def coverage(
    table: pd.DataFrame,
    law: str | Form,
    target: str,
    *,
    level: float = 0.9,
    cuts: Sequence[float] | None = None,
    method: str = "calibrated",
    loss: str | None = None,
    loss_law: str | Form = "over_training",
    chance: float | None = None,
) -> Coverage:
    """How often intervals hold on runs of more compute than those fitted.

    At each cut the law is fitted to the runs below and predicts every run from there on, as if they
    were yet to be trained. Source: rolling-origin evaluation (Tashman 2000); the interval score is
    Gneiting and Raftery 2007, eq. 43.

    Args:
      table: records.
      law: name of a built-in form, or a form.
      target: the column to predict.
      level: of the intervals.
      cuts: training compute (6ND, FLOPs); by default every third of a decade that leaves 8 runs
        below.
      method: of the intervals, as in `Fit.predict`; for error laws always the default one.
      loss: for error laws, the loss that they read, which `loss_law` predicts for the dear runs.
      loss_law: the law of that loss.
      chance: for error laws, the error of guessing.

    Raises:
      UserError: as `fit`, or no cut leaves runs on both sides.
    """
    form = named(law)
    observations, _ = gather(form, table, target, loss)
    table, flops = observations.table, observations.flops
    thresholds = calibrated.compute_cuts(flops) if cuts is None else sorted(map(float, cuts))
    if not thresholds:
        raise UserError(
            f"coverage: {len(table)} rows with '{target}' are too few or too close in compute: "
            f"a cut leaves {calibrated.FEWEST_BELOW} runs below and one above; give cuts="
        )
    whole = None
    parts = []
    for cut in thresholds:
        below = flops < cut
        if below.sum() < FEWEST or below.all():
            raise UserError(
                f"coverage: the cut at {cut:.3g} FLOPs leaves {int(below.sum())} runs below and "
                f"{int((~below).sum())} above; {FEWEST} below and one above at least"
            )
        rows, held_out = table[below], table[~below]
        if loss is None:
            whole = whole or fit(form, table, target=target)
            predictor = refit(whole, observations.only(below))
            given = {name: held_out[name].to_numpy(float) for name in form.inputs}
            found = predictor.predict(level=level, method=method, **given)
        else:
            error = fit(form, rows, target=target, loss=loss, chance=chance)
            chain = chained(fit(loss_law, rows, target=loss), error)
            given = {name: held_out[name].to_numpy(float) for name in chain.loss.form.inputs}
            found = chain.predict(level=level, **given)
        part = held_out[["run", "params", "tokens"]].assign(
            cut=cut,
            runs=int(below.sum()),
            decades=np.log10(flops[~below] / flops[below].max()),
            measured=held_out[target],
            value=found.value,
            low=found.low,
            high=found.high,
        )
        parts.append(part)
    predictions = pd.concat(parts, ignore_index=True)
    by_cut = [
        CutScore(flops=float(cut), runs=int(part["runs"].iloc[0]), **_score(part, level))
        for cut, part in predictions.groupby("cut")
    ]
    return Coverage(level=level, cuts=by_cut, predictions=predictions, **_score(predictions, level))


def _score(predictions: pd.DataFrame, level: float) -> dict[str, int | float]:
    measured, value, low, high = (
        predictions[name].to_numpy(float) for name in ("measured", "value", "low", "high")
    )
    with np.errstate(divide="ignore"):
        log_low, log_high, log_measured = np.log(low), np.log(high), np.log(measured)
        missed = np.maximum(np.maximum(log_low - log_measured, log_measured - log_high), 0.0)
    score = log_high - log_low + 2 / (1 - level) * missed
    return {
        "count": len(predictions),
        "covered": float(np.mean((low <= measured) & (measured <= high))),
        "median_relative_width": float(np.median((high - low) / value)),
        "median_relative_error": float(np.median(np.abs(value / measured - 1))),
        "mean_interval_score": float(np.mean(score)),
    }
