"""The default prediction interval for losses: wide enough to hold beyond the data.

A mixture of the Bayesian law (bayes.py) and of six point fits (families.py). The point fits have
half of it where there are many runs, and less the fewer runs they have to spare.

    centre   the mean of the mixture
    scale    spread of the Bayesian law, a share of the spread between the point fits, and what the
             gap between the two adds
    rescale  by how well the same recipe did at compute cuts inside the data (empirical Bayes)

Resampling a single law says how well its parameters are known, not how wrong the law is further
out.
"""

import collections
import dataclasses

import numpy as np
from jaxtyping import Float

from scaling_jax.laws import bayes, families
from scaling_jax.laws.predictive import LogStudentT

# Cuts every third of a decade of compute, at least so many runs below one.
CUTS_PER_DECADE, FEWEST_BELOW = 3, 8
FAMILY_SHARE, FAMILY_SPREAD, FAMILY_SPREAD_CAP = 0.5, 0.4, 0.5
PRIOR_DEGREES, PRIOR_SCALE, CUT_DECAY, WORST_CUT = 8.0, 0.85, 0.6, 9.0
REMEMBERED = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """Centre and scale of log loss at m targets, before rescaling, and where they come from."""

    center: Float[np.ndarray, "m"]
    scale: Float[np.ndarray, "m"]
    bayes_scale: Float[np.ndarray, "m"]
    family_scale: Float[np.ndarray, "m"]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """The recipe fitted to one set of runs: ask it for the distribution at any params and tokens.

    Attributes:
      x: params and tokens of the runs; y: their losses.
      posterior: the Bayesian law given the runs.
      curves: the point fits to the runs.
      rescaling: lambda, what the scale is multiplied by.
      degrees: of freedom of Student's t.
      cuts: how many compute cuts inside the data `rescaling` was learnt from.
    """

    x: Float[np.ndarray, "2 n"]
    y: Float[np.ndarray, "n"]
    posterior: bayes.Posterior
    curves: families.Curves
    rescaling: float
    degrees: float
    cuts: int

    def predictive(self, targets: Float[np.ndarray, "2 m"], noise: bool = True) -> LogStudentT:
        """The distribution of the loss at `targets` (params, tokens).

        Of what a run there measures or, without `noise`, of what runs measure on average.
        """
        spread = _spread(self.posterior, self.curves, len(self.y), targets, noise)
        return LogStudentT(spread.center, self.rescaling * spread.scale, self.degrees)

    def bayes_only(self, targets: Float[np.ndarray, "2 m"]) -> LogStudentT:
        """The Bayesian law alone, Gaussian."""
        return LogStudentT(*self.posterior.forecast(targets), np.inf)

    def families_only(self, targets: Float[np.ndarray, "2 m"]) -> LogStudentT:
        """The point fits alone, equally weighted, with the noise of the first one; Gaussian."""
        values, fitted = self.curves.log_loss(targets), self.curves.log_loss(self.x)[0]
        spare = max(1, len(self.y) - families.FREE_PARAMETERS)
        noise = np.sqrt(np.sum((np.log(self.y) - fitted) ** 2) / spare)
        scale = np.sqrt(values.var(axis=0, ddof=1) + noise**2)
        return LogStudentT(values.mean(axis=0), scale, np.inf)

    def spread(self, targets: Float[np.ndarray, "2 m"]) -> Spread:
        """Centre and scale at `targets` (params, tokens), before rescaling."""
        return _spread(self.posterior, self.curves, len(self.y), targets)


def calibrate(x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"]) -> Calibration:
    """The recipe fitted to runs: params and tokens `x`, losses `y`.

    It depends on the runs alone, not on the law that is fitted to them; the latest are remembered,
    so that several laws of one column share it.
    """
    key = (x.tobytes(), y.tobytes())
    if key not in _remembered:
        _remembered[key] = _calibrate(x, y)
        if len(_remembered) > REMEMBERED:
            _remembered.popitem(last=False)
    return _remembered[key]


_remembered: collections.OrderedDict[tuple[bytes, bytes], Calibration] = collections.OrderedDict()


def compute_cuts(flops: Float[np.ndarray, "n"]) -> list[float]:
    """Compute thresholds with runs enough below and a run above, ascending."""
    low, high = np.log10(flops.min()), np.log10(flops.max())
    steps = np.arange(np.floor((high - low) * CUTS_PER_DECADE) + 1)
    cuts, seen = [], set()
    for cut in 10 ** (high - steps[::-1] / CUTS_PER_DECADE):
        count = int((flops < cut).sum())
        if count >= FEWEST_BELOW and count < len(flops) and count not in seen:
            cuts.append(float(cut))
            seen.add(count)
    return cuts


def _calibrate(x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"]) -> Calibration:
    flops = 6.0 * x[0] * x[1]
    below = np.array([flops < cut for cut in compute_cuts(flops)], bool).reshape(-1, len(y))
    curves, by_cut = families.fit(x, y, below)
    squares, weights = [], []
    # The newest cut, nearest to what will be asked, counts most.
    for age, (used, fitted) in enumerate(zip(below[::-1], by_cut[::-1], strict=True)):
        known = bayes.posterior(x[:, used], y[used])
        spread = _spread(known, fitted, int(used.sum()), x[:, ~used])
        score = np.mean(((np.log(y[~used]) - spread.center) / spread.scale) ** 2)
        squares.append(min(score, WORST_CUT))
        weights.append(CUT_DECAY**age * min(1.0, (~used).sum() / 2))
    degrees = PRIOR_DEGREES + sum(weights)
    total = PRIOR_DEGREES * PRIOR_SCALE**2 + np.dot(weights, squares)
    rescaling = float(np.sqrt(total / degrees))
    return Calibration(x, y, bayes.posterior(x, y), curves, rescaling, degrees, len(below))


def _spread(
    posterior: bayes.Posterior,
    curves: families.Curves,
    runs: int,
    targets: np.ndarray,
    noise: bool = True,
) -> Spread:
    center, scale = posterior.forecast(targets, noise)
    values = curves.log_loss(targets)
    values = np.where(np.isfinite(values), values, center)
    family_scale = np.minimum(values.std(axis=0, ddof=1), FAMILY_SPREAD_CAP)
    share = FAMILY_SHARE * max(0, runs - families.FREE_PARAMETERS) / runs
    gap = values.mean(axis=0) - center
    between = (FAMILY_SPREAD * family_scale) ** 2 + share * (1 - share) * gap**2
    total = np.sqrt(scale**2 + between)
    return Spread(center + share * gap, total, scale, family_scale)
