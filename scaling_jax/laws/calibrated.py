"""The default prediction interval for losses: wide enough to hold beyond the data.

    centre   mean of the Bayesian law (bayes.py) and of six least-squares and Huber fits
    scale    spread of the Bayesian law and half the spread between those fits
    rescale  by how well the same recipe did at compute cuts inside the data (empirical Bayes)

Resampling a single law says how well its parameters are known, not how wrong the law is further
out; measured on held-out larger runs such intervals cover half of what they promise.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
from jaxtyping import Bool, Float

from scaling_jax.laws import bayes, solver
from scaling_jax.laws.forms import CHINCHILLA, KAPLAN, OVER_TRAINING, Form
from scaling_jax.laws.objectives import Objective, huber, least_squares
from scaling_jax.laws.predictive import LogStudentT

# Cuts every third of a decade of compute, at least so many runs below one.
CUTS_PER_DECADE, FEWEST_BELOW = 3, 8
FAMILY_STARTS, FAMILY_SPREAD, FAMILY_SPREAD_CAP = 16, 0.5, 0.5
PRIOR_DEGREES, PRIOR_SCALE, CUT_DECAY, WORST_CUT = 8.0, 0.85, 0.6, 9.0


@dataclasses.dataclass(frozen=True)
class Family:
    """One of the point fits whose disagreement measures how far the law's form can be trusted."""

    form: Form
    objective: Objective
    pinned: tuple[tuple[str, float], ...] = ()


FAMILIES = (
    Family(CHINCHILLA, least_squares()),
    Family(CHINCHILLA, huber()),
    Family(CHINCHILLA, least_squares(), (("E", 0.0),)),
    Family(OVER_TRAINING, least_squares()),
    Family(OVER_TRAINING, huber()),
    Family(KAPLAN, least_squares()),
)


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
      rescaling: lambda, what the scale is multiplied by.
      degrees: of freedom of Student's t.
      cuts: how many compute cuts inside the data `rescaling` was learnt from.
    """

    x: Float[np.ndarray, "2 n"]
    y: Float[np.ndarray, "n"]
    rescaling: float
    degrees: float
    cuts: int

    def predictive(self, targets: Float[np.ndarray, "2 m"]) -> LogStudentT:
        """The distribution of the loss at `targets` (params, tokens)."""
        spread = self.spread(targets)
        return LogStudentT(spread.center, self.rescaling * spread.scale, self.degrees)

    def bayes_only(self, targets: Float[np.ndarray, "2 m"]) -> LogStudentT:
        """The Bayesian law alone, Gaussian."""
        everything = np.ones(len(self.y), bool)
        center, scale = _bayes(self.x, self.y, everything, targets)
        return LogStudentT(center, scale, np.inf)

    def families_only(self, targets: Float[np.ndarray, "2 m"]) -> LogStudentT:
        """The point fits alone, equally weighted, with the noise of the first one; Gaussian."""
        values = _family_curves(self._families, targets)
        fitted = _family_curves(self._families[:1], self.x)[0]
        spare = max(1, len(self.y) - len(FAMILIES[0].form.parameters))
        noise = np.sqrt(np.sum((np.log(self.y) - fitted) ** 2) / spare)
        scale = np.sqrt(values.var(axis=0, ddof=1) + noise**2)
        return LogStudentT(values.mean(axis=0), scale, np.inf)

    def spread(self, targets: Float[np.ndarray, "2 m"]) -> Spread:
        """Centre and scale at `targets` (params, tokens), before rescaling."""
        everything = np.ones(len(self.y), bool)
        return _spread(self.x, self.y, everything, targets, self._families)

    @functools.cached_property
    def _families(self) -> list[np.ndarray]:
        return _fit_families(self.x, self.y, np.ones((1, len(self.y)), bool))[0]


def calibrate(x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"]) -> Calibration:
    """Learns the rescaling from compute cuts inside the data: params and tokens `x`, losses `y`."""
    flops = 6.0 * x[0] * x[1]
    below = [flops < cut for cut in compute_cuts(flops)]
    squares, weights = [], []
    if below:
        families = _fit_families(x, y, np.stack(below))
        # The newest cut, nearest to what will be asked, counts most.
        for age, (used, fits) in enumerate(zip(below[::-1], families[::-1], strict=True)):
            spread = _spread(x, y, used, x, fits)
            score = np.mean((((np.log(y) - spread.center) / spread.scale) ** 2)[~used])
            squares.append(min(score, WORST_CUT))
            weights.append(CUT_DECAY**age * min(1.0, (~used).sum() / 2))
    degrees = PRIOR_DEGREES + sum(weights)
    total = PRIOR_DEGREES * PRIOR_SCALE**2 + np.dot(weights, squares)
    return Calibration(x, y, float(np.sqrt(total / degrees)), degrees, len(below))


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


def _fit_families(
    x: Float[np.ndarray, "2 n"], y: Float[np.ndarray, "n"], used: Bool[np.ndarray, "cuts n"]
) -> list[list[np.ndarray]]:
    """Parameters of each family on each subset, shape [cuts][families](p,).

    The whole data are fitted from many starts, the subsets from there.
    """
    by_cut: list[list[np.ndarray]] = [[] for _ in used]
    for form, members in itertools.groupby(FAMILIES, key=lambda family: family.form):
        members = list(members)
        boxes = [solver.Box.of(form, dict(family.pinned)) for family in members]
        box = solver.Box(np.stack([b.low for b in boxes]), np.stack([b.high for b in boxes]))
        delta = np.array([family.objective.delta for family in members], float)
        count, ones = len(members), np.ones((len(members), len(y)))
        whole = solver.multistart(
            form, Objective(delta=delta), x, y * ones, ones, box, FAMILY_STARTS
        )
        found = whole
        if not used.all():
            found = solver.refit(
                form,
                Objective(delta=np.tile(delta, len(used))),
                x,
                np.tile(y * ones, (len(used), 1)),
                np.repeat(used, count, axis=0).astype(float),
                solver.Box(np.tile(box.low, (len(used), 1)), np.tile(box.high, (len(used), 1))),
                np.tile(whole.coordinates, (len(used), 1)),
            )
        for cut in range(len(used)):
            by_cut[cut] += list(found.parameters[cut * count : (cut + 1) * count])
    return by_cut


def _spread(
    x: np.ndarray, y: np.ndarray, used: np.ndarray, targets: np.ndarray, families: list[np.ndarray]
) -> Spread:
    center, scale = _bayes(x, y, used, targets)
    values = _family_curves(families, targets)
    values = np.where(np.isfinite(values), values, center)
    family_scale = np.minimum(values.std(axis=0, ddof=1), FAMILY_SPREAD_CAP)
    if used.sum() >= FEWEST_BELOW:
        center = (center + values.mean(axis=0)) / 2
    total = np.sqrt(scale**2 + (FAMILY_SPREAD * family_scale) ** 2)
    return Spread(center, total, scale, family_scale)


def _family_curves(
    families: list[np.ndarray], targets: Float[np.ndarray, "2 m"]
) -> Float[np.ndarray, "families m"]:
    """Log loss of each family at `targets`."""
    count = targets.shape[1]
    padded = _pad(targets, _bucket(count))
    with solver.float64():
        curves = [
            _curve(family.form, theta, padded)
            for family, theta in zip(FAMILIES, families, strict=False)
        ]
        return np.log(np.stack(curves))[:, :count]


def _bayes(
    x: np.ndarray, y: np.ndarray, used: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centre and scale of the Bayesian law, padded to lengths that few compilations serve."""
    count, length = targets.shape[1], _bucket(len(y))
    size = max(length, _bucket(targets.shape[1]))
    with solver.float64():
        found = _forecast(
            _pad(x, length), _pad(y, length), _pad(used, length, False), _pad(targets, size)
        )
        return np.asarray(found.center)[:count], np.asarray(found.scale)[:count]


_forecast = jax.jit(bayes.forecast)
_curve = jax.jit(Form.evaluate, static_argnums=0)


def _bucket(count: int) -> int:
    return max(8, 1 << (count - 1).bit_length())


def _pad(values: np.ndarray, length: int, fill: bool | None = None) -> np.ndarray:
    """Lengthened along the last axis by its last entry, or by `fill`."""
    extra = [(0, 0)] * (values.ndim - 1) + [(0, length - values.shape[-1])]
    if fill is None:
        return np.pad(values, extra, mode="edge")
    return np.pad(values, extra, constant_values=fill)
