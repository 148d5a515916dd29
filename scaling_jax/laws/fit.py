"""Fitting a law to a records table, and what a fitted law can say."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import ArrayLike, Float

from scaling_jax.errors import UserError, nearest
from scaling_jax.laws import bootstrap, calibrated, descent, downstream, identification, solver
from scaling_jax.laws.forms import Form, named
from scaling_jax.laws.objectives import Objective, least_squares
from scaling_jax.laws.observations import Observations, check_inputs, gather
from scaling_jax.laws.predictive import LogStudentT, Predictive, student_t_quantile

PREDICTION_METHODS = ("calibrated", "delta", "pairs", "residual", "families", "bayes")
INTERVAL_METHODS = ("delta", "pairs", "residual")
# Beyond so many decades of compute nothing has been measured about the intervals.
FAR_DECADES = 2.0
BOOTSTRAP = 400


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What a law predicts, with an interval for the measurement; scalars where inputs are scalars.

    Attributes:
      value: the law with the fitted parameters.
      low, high: ends of the interval.
      center: the centre of the interval's distribution. It draws on several laws, and was closer
        to larger runs than a single law on the testbeds it was measured on.
      level: the chance that the interval is meant to hold the measurement.
      warnings: what speaks against trusting it, in sentences.
    """

    value: Any
    low: Any
    high: Any
    center: Any
    level: float
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """How the optimisation went.

    Attributes:
      objective: the sum that was minimised.
      gradient_norm: over the free parameters, in the solver's coordinates.
      condition: of the Jacobian with respect to relative changes of the free parameters.
      share_at_optimum: of the starts, those that reached the best optimum.
      points, free_parameters: their numbers.
    """

    objective: float
    gradient_norm: float
    condition: float
    share_at_optimum: float
    points: int
    free_parameters: int


@dataclasses.dataclass(frozen=True, eq=False)
class Fit:
    """A law fitted to observations.

    Attributes:
      form, objective, observations: what was fitted, how, to what.
      box: bounds of the parameters in the solver's coordinates.
      coordinates: the optimum in the solver's coordinates.
      parameters: the optimum in natural units, by name.
      diagnostics: how the optimisation went.
      warnings: what speaks against trusting the fit, in sentences.
    """

    form: Form
    objective: Objective
    observations: Observations
    box: solver.Box
    coordinates: Float[np.ndarray, "p"]
    parameters: dict[str, float]
    diagnostics: Diagnostics
    warnings: tuple[str, ...]

    @property
    def target(self) -> str:
        """The column that was fitted."""
        return self.observations.target

    @property
    def degrees(self) -> int:
        """Degrees of freedom left for the noise: points minus free parameters, not below 0."""
        return max(0, self.diagnostics.points - self.diagnostics.free_parameters)

    def curve(self, **inputs: ArrayLike) -> np.ndarray:
        """The fitted law at `inputs`, which broadcast; float64.

        Raises:
          UserError: an input is missing, unknown or not a finite positive number.
        """
        x, shape = check_inputs(self.form, inputs)
        return self.evaluate(x).reshape(shape)

    def evaluate(self, x: Float[np.ndarray, "inputs m"]) -> Float[np.ndarray, "m"]:
        """The fitted law at an array of inputs, in the order of the form's."""
        return solver.evaluate(self.form, solver.natural(self.form, self.coordinates), x)

    def predict(
        self, *, level: float = 0.9, method: str = "calibrated", **inputs: ArrayLike
    ) -> Prediction:
        """The law at `inputs` with an interval for what a run there will measure.

        Args:
          level: of the interval.
          method: "calibrated", the default, is meant to hold beyond the data (calibrated.py for
            losses of params and tokens, downstream.py for errors; other forms: as "delta"). The
            others are for comparison: "delta", "pairs" and "residual" (bootstraps) suppose that the
            law is true; "families" and "bayes" are the two halves of the default for losses.
          inputs: the form's inputs, params= and tokens= or loss=; they broadcast.

        Raises:
          UserError: an unknown method, or a wrong level or input.
        """
        x, shape = check_inputs(self.form, inputs)
        distribution = self.predictive(x, method)
        low, high = distribution.interval(level)
        value, found = self.evaluate(x), self.cautions(x)
        if ((value < low) | (high < value)).any():
            said = f"the value of '{self.form.name}' lies outside the interval"
            found = (*found, f"{said}, which draws on several laws")
        parts = (_shaped(part, shape) for part in (value, low, high, distribution.center()))
        return Prediction(*parts, level=level, warnings=found)

    def predictive(
        self, x: Float[np.ndarray, "inputs m"], method: str = "calibrated"
    ) -> Predictive:
        """The distribution of a measurement at each of `x`.

        Raises:
          UserError: an unknown method, or one that is not for this form.
        """
        if method not in PREDICTION_METHODS:
            hint = nearest(method, PREDICTION_METHODS)
            raise UserError(f"unknown interval method '{method}' ({hint})")
        is_loss = self.form.inputs == ("params", "tokens")
        if method in ("families", "bayes") and not is_loss:
            raise UserError(f"method '{method}' is for losses of params and tokens only")
        if method == "calibrated" and is_loss:
            return self.calibration.predictive(x)
        if method == "calibrated" and self.form.inputs == ("loss",):
            return self.error_posterior.predictive(x[0])
        if method == "families":
            return self.calibration.families_only(x)
        if method == "bayes":
            return self.calibration.bayes_only(x)
        if method in ("pairs", "residual"):
            return bootstrap.predictive(self, self.resamples(method), x)
        return self._delta(x)

    def intervals(
        self, level: float = 0.9, method: str = "delta"
    ) -> dict[str, tuple[float, float]]:
        """An interval for each parameter, in natural units; a pinned one has no width.

        Args:
          level: of the intervals.
          method: "delta" (Student's t on the linearised law), or by resampling: "pairs" (runs drawn
            with replacement), "residual" (residuals drawn with replacement).

        Raises:
          UserError: an unknown method or a wrong level.
        """
        if method not in INTERVAL_METHODS:
            hint = nearest(method, INTERVAL_METHODS)
            raise UserError(f"unknown interval method '{method}' ({hint})")
        if method == "delta":
            quantile = student_t_quantile(level, self.degrees)
            # Without degrees of freedom nothing is known but the bounds.
            reach = quantile * self.standard_errors if self.degrees else np.inf
            reach = np.where(self._free, reach, 0.0)
            ends = [
                np.clip(self.coordinates + s * reach, self.box.low, self.box.high) for s in (-1, 1)
            ]
            low, high = (solver.natural(self.form, end) for end in ends)
        else:
            parameters = self.resamples(method).parameters
            low, high = np.quantile(parameters, [(1 - level) / 2, (1 + level) / 2], axis=0)
        pairs = zip(low, high, strict=True)
        return {
            name: (float(a), float(b)) for name, (a, b) in zip(self.form.names, pairs, strict=True)
        }

    def influence(self, **inputs: float) -> Float[np.ndarray, "n"]:
        """d prediction / d each observation, one for each row of `observations.table`.

        By implicit differentiation of the optimum: how far `value` at `inputs` moves when one
        measured number moves, per unit. Large ones carry the prediction.

        Raises:
          UserError: an input is missing, unknown or not a finite positive number.
        """
        x, shape = check_inputs(self.form, inputs)
        if shape:
            raise UserError("influence is of one prediction: give numbers, not arrays")
        return self.slopes(x)[0] @ self.sensitivity

    @functools.cached_property
    def calibration(self) -> calibrated.Calibration:
        """The default interval's recipe, fitted to the same runs."""
        return calibrated.calibrate(self.observations.x, self.observations.y)

    @functools.cached_property
    def error_posterior(self) -> downstream.ErrorPosterior:
        """The default interval's recipe for error laws, fitted to the same runs."""
        pinned = "eps" in self.form.names and not self._free[self.form.names.index("eps")]
        chance = self.parameters["eps"] if pinned else None
        return downstream.fit_posterior(self.observations.x[0], self.observations.y, chance)

    @functools.cache  # noqa: B019 (a fit lives as long as its resamples)
    def resamples(self, method: str, count: int = BOOTSTRAP) -> bootstrap.Resamples:
        """The law refitted to resampled runs ("pairs") or residuals ("residual")."""
        return bootstrap.resample(self, method, count)

    @functools.cached_property
    def sensitivity(self) -> Float[np.ndarray, "p n"]:
        """d coordinates / d observations, by implicit differentiation."""
        o = self.observations
        args = (o.x, o.y, o.weights, self.box, self.coordinates)
        return solver.sensitivity(self.form, self.objective, *args)

    def slopes(self, x: Float[np.ndarray, "inputs m"]) -> Float[np.ndarray, "m p"]:
        """d prediction / d coordinates at each of `x`."""
        with solver.float64():
            return np.asarray(_slopes(self.form, self.coordinates, x))

    @functools.cached_property
    def covariance(self) -> Float[np.ndarray, "p p"]:
        """Of the coordinates, from independent noise of the residuals' size; NaN if unknown."""
        if not self.degrees:
            return np.full((len(self.coordinates),) * 2, np.nan)
        noise = self.noise**2 * self._unit_noise(self.observations.y) ** 2
        noise = noise / np.maximum(self.observations.weights, 1e-12)
        return (self.sensitivity * noise) @ self.sensitivity.T

    @property
    def standard_errors(self) -> Float[np.ndarray, "p"]:
        """Of the coordinates; 0 for a pinned parameter or one at its bound, NaN if unknown."""
        return np.sqrt(np.where(self._free, np.diag(self.covariance), 0.0))

    @functools.cached_property
    def noise(self) -> float:
        """Standard deviation of the residuals (log or linear); NaN without degrees of freedom."""
        total = self.observations.weights @ self.residuals**2
        return float(np.sqrt(total / self.degrees)) if self.degrees else np.nan

    @functools.cached_property
    def residuals(self) -> Float[np.ndarray, "n"]:
        """Of the objective, at the observations: positive where the law predicts too much."""
        predicted = self.evaluate(self.observations.x)
        if self.objective.residual == "linear":
            return predicted - self.observations.y
        return np.log(predicted) - np.log(self.observations.y)

    @property
    def _free(self) -> np.ndarray:
        return self.box.low < self.box.high

    def _unit_noise(self, y: np.ndarray) -> np.ndarray:
        """What a residual of one is worth in units of the target."""
        return y if self.objective.residual == "log" else np.ones_like(y)

    def _delta(self, x: Float[np.ndarray, "inputs m"]) -> LogStudentT:
        value, slopes = self.evaluate(x), self.slopes(x)
        variance = np.einsum("mp,pq,mq->m", slopes, np.nan_to_num(self.covariance), slopes)
        noise = np.nan_to_num(self.noise) * self._unit_noise(value)
        scale = np.sqrt(variance + noise**2) / value
        return LogStudentT(np.log(np.maximum(value, 1e-12)), scale, self.degrees)

    def cautions(self, x: Float[np.ndarray, "inputs m"]) -> tuple[str, ...]:
        """Why predictions at `x` deserve less trust, in sentences."""
        seen = {tuple(np.round(np.log(point), 6)) for point in self.observations.x.T}
        found = []
        if any(tuple(np.round(np.log(point), 6)) in seen for point in x.T):
            found.append("a run at this point is among the fitted ones")
        if self.form.inputs[:2] != ("params", "tokens"):
            return tuple(found)
        decades = np.log10(6 * x[0] * x[1]).max() - np.log10(self.observations.flops.max())
        if decades > FAR_DECADES:
            found.append(f"{decades:.1f} decades of compute beyond the largest fitted run")
        fitted, asked = (points[1] / points[0] for points in (self.observations.x, x))
        if asked.max() > fitted.max() * 1.01 or asked.min() < fitted.min() / 1.01:
            found.append(
                f"token multipliers were fitted from {fitted.min():.3g} to {fitted.max():.3g}, "
                f"this asks for {asked.min():.3g} to {asked.max():.3g}"
            )
        return tuple(found)


def fit(
    law: str | Form,
    table: pd.DataFrame,
    *,
    target: str,
    loss: str | None = None,
    chance: float | None = None,
    pinned: Mapping[str, float] | None = None,
    objective: Objective | None = None,
    weights: str | None = None,
    starts: int = solver.STARTS,
) -> Fit:
    """Fits a law to one column of a records table.

    Args:
      law: name of a built-in form, or a form.
      table: records (params, tokens, and the columns that follow).
      target: the column to fit, "loss/<set>" or "error/<task>".
      loss: for error laws, the loss column that is their input.
      chance: for error laws, the error of guessing, to which "eps" is pinned.
      pinned: parameters that are held at a value.
      objective: by default least squares, of log residuals for losses and linear ones for errors.
      weights: column with the weight of each row in the objective.
      starts: how many starting points.

    Raises:
      UserError: unknown law, column or parameter, too few rows, or a fault in the table.
    """
    form = named(law)
    held = _pins(form, chance, pinned)
    observations, found = gather(form, table, target, loss, weights)
    if objective is None:
        objective = least_squares("linear" if "loss" in form.inputs else "log")
    if objective.residual == "log" and not observations.y.all():
        raise UserError(f"law '{form.name}' is fitted to logarithms, and '{target}' is 0 somewhere")
    box = solver.Box.of(form, held)
    return _fit(form, objective, observations, box, found, starts)


def refit(fitted: Fit, observations: Observations) -> Fit:
    """The same law, objective and bounds on other observations."""
    return _fit(fitted.form, fitted.objective, observations, fitted.box, [], solver.STARTS)


def _fit(
    form: Form,
    objective: Objective,
    observations: Observations,
    box: solver.Box,
    found: list[str],
    starts: int,
) -> Fit:
    x, y, w = observations.x, observations.y, observations.weights
    best = solver.multistart(form, objective, x, y[None], w[None], box, starts)
    u, cost, norm = best.coordinates[0], float(best.objective[0]), float(best.gradient_norm[0])
    if not np.isfinite(cost):
        raise UserError(f"law '{form.name}': no start gave a finite objective for '{y[:3]}...'")
    if norm > identification.GRADIENT_TOLERANCE * max(np.sqrt(cost), 1e-6):
        u, cost, norm = solver.polish(form, objective, x, y, w, box, u)
    parameters = dict(zip(form.names, map(float, solver.natural(form, u)), strict=True))
    jacobian = identification.relative_jacobian(form, objective, u, x, y, w, box)
    diagnostics = Diagnostics(
        objective=cost,
        gradient_norm=norm,
        condition=identification.condition(jacobian),
        share_at_optimum=float(best.share[0]),
        points=len(y),
        free_parameters=int((box.low < box.high).sum()),
    )
    found = found + identification.doubts(form, box, u, jacobian, diagnostics.share_at_optimum)
    return Fit(form, objective, observations, box, u, parameters, diagnostics, tuple(found))


def _pins(form: Form, chance: float | None, pinned: Mapping[str, float] | None) -> dict[str, float]:
    held = dict(pinned or {})
    if chance is not None:
        if "eps" not in form.names:
            raise UserError(f"law '{form.name}' has no asymptote 'eps' to pin at chance")
        held["eps"] = chance
    by_name = {parameter.name: parameter for parameter in form.parameters}
    for name, value in held.items():
        if name not in by_name:
            hint = nearest(name, form.names)
            raise UserError(f"law '{form.name}' has no parameter '{name}' ({hint})")
        low, high = by_name[name].low, by_name[name].high
        if not low <= value <= high:
            raise UserError(f"law '{form.name}': {name} is between {low:g} and {high:g}: {value}")
    return held


@functools.partial(jax.jit, static_argnums=0)
def _slopes(form: Form, u: jax.Array, x: jax.Array) -> jax.Array:
    return jax.jacfwd(lambda at: form.evaluate(descent.to_natural(form, at), x))(u)


def _shaped(values: np.ndarray, shape: tuple[int, ...]) -> Any:
    return values.reshape(shape) if shape else float(values[0])
