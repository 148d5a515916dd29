"""Two fitted laws side by side: two datasets or recipes, measured by the same loss.

Intervals come from draws of what runs of each law would measure on average. They follow the default
prediction interval (calibrated.py), which holds what a law may get wrong beyond the data. A draw is
one probability, and the curve of that quantile: along it all points move together. Another
dependence would answer the questions here alike. Of curves that fall with compute, a needs at most
r times the compute of b if its loss at that one point is at most b's; and two that cross once have
crossed by some compute if their difference has changed its sign there.

What counts is how far both laws are wrong together, and runs of the same sizes and tokens share
much of that. With the correlation below, nominal 90 % intervals of the ratio of two losses held
91 % of what larger runs of the paper's testbed measured (three pairs of datasets, eight validation
sets, M >= 10, fitted below compute cuts); without it 95 %, a quarter wider. Resampling the laws
instead, with the same runs drawn for both so that their common noise cancels, held 63 %.
"""

import dataclasses

import numpy as np
from jaxtyping import Float
from scipy.special import ndtr, ndtri

from scaling_jax.errors import UserError
from scaling_jax.laws.bayes import lattice
from scaling_jax.laws.fit import Fit
from scaling_jax.laws.optimum import Quantity, check_numbers, quantity
from scaling_jax.laws.predictive import check_level

PAIRED_CORRELATION = 0.4
# Runs whose log params and log tokens differ by less are of the same size and length.
SAME_RUN = 1e-3
# Effective compute is sought up to so many times more or less; crossings by default from the
# median fitted run, since the interval is made for larger runs, to so many times the dearest.
RATIO_RANGE, BEYOND = 1e4, 100.0
DRAWS, POINTS_PER_DECADE = 2048, 20


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Law a against law b at one number of params and tokens.

    Attributes:
      difference: of the losses, a minus b, nats per token; below 0 where a is better.
      compute_ratio: times the compute that a needs, at the same token multiplier, to reach the
        loss of b; below 1 where a is better. Infinite: not with 1e4 times as much; 0: with 1e-4.
      crossing_flops: the compute at which the laws cross along the same token multiplier, the
        nearest one if there are more; NaN if none is within `flops_range`. Its interval is that
        of the draws that cross there.
      crossing_share: of the draws, those that cross within `flops_range`.
      a_better: the share of the draws in which a has the lower loss.
      flops_range: least and most training compute at which a crossing was looked for.
      correlation: with which the draws of a and b were paired.
      level: of the intervals. Values are those of the fitted laws, as in `Prediction`.
      warnings: what speaks against trusting it, in sentences.
    """

    difference: Quantity
    compute_ratio: Quantity
    crossing_flops: Quantity
    crossing_share: float
    a_better: float
    flops_range: tuple[float, float]
    correlation: float
    level: float
    warnings: tuple[str, ...]


def compare(
    a: Fit,
    b: Fit,
    *,
    params: float,
    tokens: float,
    level: float = 0.9,
    flops_range: tuple[float, float] | None = None,
    correlation: float | None = None,
) -> Comparison:
    """Which of two laws is better at `params` and `tokens`, by how much, and from where on.

    Args:
      a, b: loss laws of params and tokens, fitted to the same column of two tables.
      params, tokens: the run in question.
      level: of the intervals.
      flops_range: training compute, 6ND, between which a crossing is looked for; by default from
        the median fitted run to 100 times the dearest, widened to the run in question. Below, the
        interval is wider than what the runs there say.
      correlation: of the errors of the two laws, -1 to 1; by default 0.4 times the share of the
        runs that have a partner of the same params and tokens on the other side.

    Source: effective compute as in Hernandez and Brown 2020 (algorithmic efficiency).

    Raises:
      UserError: other laws, laws of different columns, or a wrong number.
    """
    for fit in (a, b):
        check_numbers(fit, params=params, tokens=tokens)
    check_level(level)
    if a.target != b.target:
        raise UserError(f"compare: one law is of '{a.target}', the other of '{b.target}'")
    flops = 6 * params * tokens
    span = _default_range(a, b, flops) if flops_range is None else flops_range
    if not (len(span) == 2 and 0 < span[0] < span[1] < np.inf):
        raise UserError(f"compare: flops_range is a least and a greater compute, not {span}")
    correlation = _paired(a, b) * PAIRED_CORRELATION if correlation is None else correlation
    if not -1 <= correlation <= 1:
        raise UserError(f"compare: a correlation is between -1 and 1: {correlation}")
    chances = _probabilities(correlation)

    def curves(times: Float[np.ndarray, "points"]) -> tuple[np.ndarray, np.ndarray]:
        points = np.array([[params], [tokens]]) * np.sqrt(times)
        return _curves(a, points, chances[0]), _curves(b, points, chances[1])

    ratios, middle = _ratios()
    log_a, log_b = curves(ratios)
    at_a, at_b = log_a[:, middle], log_b[:, middle]
    path = _path(*span)
    crossings = _crossings(np.log(path), np.subtract(*curves(path / flops)), np.log(flops))
    difference = quantity(np.exp(at_a) - np.exp(at_b), level)
    return Comparison(
        difference=difference,
        compute_ratio=quantity(_first_reached(np.log(ratios), log_a, at_b), level),
        crossing_flops=quantity(crossings, level),
        crossing_share=float(np.isfinite(crossings[1:]).mean()),
        a_better=float((at_a[1:] < at_b[1:]).mean()),
        flops_range=(float(span[0]), float(span[1])),
        correlation=float(correlation),
        level=level,
        warnings=_warnings(a, b, np.array([[params], [tokens]]), difference),
    )


def _default_range(a: Fit, b: Fit, flops: float) -> tuple[float, float]:
    fitted = np.concatenate([a.observations.flops, b.observations.flops])
    return float(min(np.median(fitted), flops)), float(max(BEYOND * fitted.max(), flops))


def _paired(a: Fit, b: Fit) -> float:
    """The share of the runs that have a partner of the same params and tokens."""
    log_a, log_b = np.log(a.observations.x), np.log(b.observations.x)
    same = np.all(np.abs(log_a[:, :, None] - log_b[:, None, :]) < SAME_RUN, axis=0)
    return float(min(np.any(same, axis=1).mean(), np.any(same, axis=0).mean()))


def _probabilities(
    correlation: float,
) -> tuple[Float[np.ndarray, "draws"], Float[np.ndarray, "draws"]]:
    """Evenly spread pairs of probabilities whose normal scores are so correlated."""
    first, other = ndtri(lattice(DRAWS, 2)).T
    second = correlation * first + np.sqrt(1 - correlation**2) * other
    return ndtr(first), ndtr(second)


def _ratios() -> tuple[Float[np.ndarray, "points"], int]:
    """Multiples of the compute to look at, and where among them 1 is."""
    half = round(np.log10(RATIO_RANGE) * POINTS_PER_DECADE)
    return 10 ** (np.arange(-half, half + 1) / POINTS_PER_DECADE), half


def _path(low: float, high: float) -> Float[np.ndarray, "points"]:
    """Compute from `low` to `high`, evenly spread over the decades."""
    return np.geomspace(low, high, 2 + int(np.log10(high / low) * POINTS_PER_DECADE))


def _curves(
    fit: Fit, points: Float[np.ndarray, "2 points"], probabilities: Float[np.ndarray, "draws"]
) -> Float[np.ndarray, "1+draws points"]:
    """Log loss of the fitted law, then of the quantile at each probability."""
    drawn = fit.calibration.predictive(points, noise=False).quantiles(probabilities)
    return np.log(np.concatenate([fit.evaluate(points)[None], drawn]))


def _first_reached(
    log_ratios: Float[np.ndarray, "points"],
    curves: Float[np.ndarray, "curves points"],
    goals: Float[np.ndarray, "curves"],
) -> Float[np.ndarray, "curves"]:
    """The least ratio at which each curve is down at its goal; 0 below the range, inf above."""
    reached = curves <= goals[:, None]
    row, index = np.arange(len(curves)), np.argmax(reached, axis=1)
    before = np.maximum(index - 1, 0)
    fall = curves[row, before] - curves[row, index]
    part = (curves[row, before] - goals) / np.where(fall == 0, 1.0, fall)
    found = log_ratios[before] + part * (log_ratios[index] - log_ratios[before])
    found = np.where(index == 0, 0.0, np.exp(found))
    return np.where(reached.any(axis=1), found, np.inf)


def _crossings(
    log_flops: Float[np.ndarray, "points"],
    gaps: Float[np.ndarray, "curves points"],
    near: float,
) -> Float[np.ndarray, "curves"]:
    """The compute nearest to `near` at which each gap changes its sign; NaN if it never does."""
    left, right = gaps[:, :-1], gaps[:, 1:]
    changes = (left < 0) != (right < 0)
    part = left / np.where(changes, left - right, 1.0)
    places = log_flops[:-1] + part * np.diff(log_flops)
    distance = np.where(changes, np.abs(places - near), np.inf)
    nearest = places[np.arange(len(gaps)), np.argmin(distance, axis=1)]
    return np.where(changes.any(axis=1), np.exp(nearest), np.nan)


def _warnings(a: Fit, b: Fit, x: Float[np.ndarray, "2 1"], difference: Quantity) -> tuple[str, ...]:
    """Those of both laws and of predicting at `x`; said once where they are the same."""
    of_a, of_b = ((*fit.warnings, *fit.cautions(x)) for fit in (a, b))
    both = [text for text in of_a if text in of_b]
    only = [f"{n}: {t}" for n, own in (("a", of_a), ("b", of_b)) for t in own if t not in both]
    if not difference.low <= difference.value <= difference.high:
        only.append("the laws' difference lies outside the interval, which draws on several laws")
    return (*both, *only)
