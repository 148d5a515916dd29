"""Equations 4 and 5 of Gadre et al. 2024, fitted as the authors fit them, many in one call.

They minimise the plain sum of squares (scipy's curve_fit); so does this, with the package's own
solver.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import ArrayLike, Float

from scaling_jax import laws
from scaling_jax.laws import solver

Numbers = ArrayLike | pd.Series

EQUATION_4 = laws.FORMS["over_training"]
# The authors' asymptote has no upper bound, and for single tasks it does go beyond an error of 1.
EQUATION_5 = dataclasses.replace(
    laws.FORMS["exponential"],
    name="exponential_unbounded",
    parameters=(laws.offset("eps"), *laws.FORMS["exponential"].parameters[1:]),
)
# Runs of one size and multiplier follow a law in compute alone (section 2.1, figure 4).
COMPUTE_ONLY = laws.Form(
    name="compute_only",
    inputs=("flops_6nd",),
    parameters=(laws.offset("E"), laws.factor("c"), laws.exponent("eta", (0.02, 0.5))),
    function=lambda p, x: p["E"] + p["c"] * laws.power(x["flops_6nd"], -p["eta"]),
    source="Gadre et al. 2024, eq. 1 with a power law: E + c C^-eta",
)
# Problems of one call, and observations that they are filled up to: few shapes, few compilations.
CHUNK, OBSERVATIONS_STEP = 64, 8

SMALL_MODELS = ("d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8")
MODEL_1B, MODEL_7B = "open_lm_1b", "open_lm_7b"
SIZES = {
    **dict(zip(SMALL_MODELS, ("0.011B", "0.079B", "0.154B", "0.411B"), strict=True)),
    MODEL_1B: "1.4B",
    MODEL_7B: "6.9B",
}
TRAIN_SETS = {"c4_original": "C4", "rpj": "RedPajama", "rw_original": "RefinedWeb"}


class Problem(NamedTuple):
    """One law to fit: rows of a records table, the column to fit, and the loss that eq. 5 reads."""

    rows: pd.DataFrame
    target: str
    loss: str | None = None


@dataclasses.dataclass(frozen=True)
class FittedCurve:
    """A law with its parameters in natural units: call it at its inputs, which broadcast."""

    form: laws.Form
    parameters: dict[str, float]

    def __call__(self, **inputs: Numbers) -> np.ndarray:
        """The law's values, float64."""
        arrays = {name: np.asarray(values, float) for name, values in inputs.items()}
        return self.form.curve(self.parameters, **arrays)

    def at(self, rows: pd.DataFrame) -> np.ndarray:
        """The law's values for the rows of a records table that has its inputs as columns."""
        return self(**{name: rows[name].to_numpy(float) for name in self.form.inputs})


def fit_many(
    form: laws.Form,
    problems: Sequence[Problem],
    objective: laws.Objective | None = None,
    weights: Sequence[Float[np.ndarray, "n"]] | None = None,
    starts: int = solver.STARTS,
) -> list[FittedCurve]:
    """Fits `form` to every problem, by least squares on plain residuals unless told otherwise.

    `weights` holds those of each problem's rows; by default every run counts alike. `starts` says
    how many starting points each has.
    """
    objective = objective or laws.least_squares("linear")
    found: list[FittedCurve] = []
    longest = max((len(problem.rows) for problem in problems), default=0)
    width = -(-longest // OBSERVATIONS_STEP) * OBSERVATIONS_STEP
    for first in range(0, len(problems), CHUNK):
        chunk = problems[first : first + CHUNK]
        given = None if weights is None else weights[first : first + CHUNK]
        x, y, w = _stack(form, chunk, given, width)
        solution = solver.multistart(form, objective, x, y, w, solver.Box.of(form), starts)
        found += [
            FittedCurve(form, dict(zip(form.names, map(float, values), strict=True)))
            for values in solution.parameters[: len(chunk)]
        ]
    return found


def loss_rows(table: pd.DataFrame, train: str) -> pd.DataFrame:
    """The runs on `train` that eq. 4 is fitted to (table 1): M = 20, and 0.011B at M = 320."""
    return table[in_loss_fit(table) & (table["dataset"] == train)]


def error_rows(table: pd.DataFrame, train: str, with_1b: bool = True) -> pd.DataFrame:
    """The runs that eq. 5 is fitted to (table 1): those of eq. 4 and, or not, 1.4B at M = 20."""
    chosen = in_error_fit(table) if with_1b else in_loss_fit(table)
    return table[chosen & (table["dataset"] == train)]


def in_loss_fit(table: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are among table 1's runs for eq. 4."""
    small, multiplier = table["model"].isin(SMALL_MODELS), table["token_multiplier"]
    return (small & (multiplier == 20)) | (
        (table["model"] == SMALL_MODELS[0]) & (multiplier == 320)
    )


def in_error_fit(table: pd.DataFrame) -> "pd.Series[bool]":
    """Which rows are among table 1's runs for eq. 5."""
    largest = (table["model"] == MODEL_1B) & (table["token_multiplier"] == 20)
    return in_loss_fit(table) | largest


def large_rows(table: pd.DataFrame, train: str) -> pd.DataFrame:
    """The runs on `train` of 1.4B parameters and more, smallest compute first."""
    return table[table["model"].isin([MODEL_1B, MODEL_7B]) & (table["dataset"] == train)]


def percent_off(predicted: Numbers, measured: Numbers) -> np.ndarray:
    """Relative prediction error in percent (section 3.4)."""
    return 100 * np.abs(np.asarray(predicted, float) / np.asarray(measured, float) - 1)


def _stack(
    form: laws.Form,
    problems: Sequence[Problem],
    weights: Sequence[np.ndarray] | None,
    width: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (CHUNK, inputs, width), targets and weights (CHUNK, width).

    Fillers repeat a problem's first row with weight 0, and the first problem.
    """
    x = np.empty((CHUNK, len(form.inputs), width))
    y, w = np.empty((CHUNK, width)), np.zeros((CHUNK, width))
    for lane in range(CHUNK):
        place = lane if lane < len(problems) else 0
        rows, target, loss = problems[place]
        columns = [str(loss) if name == "loss" else name for name in form.inputs]
        pick = np.where(np.arange(width) < len(rows), np.arange(width), 0)
        x[lane] = rows[columns].to_numpy(float).T[:, pick]
        y[lane] = rows[target].to_numpy(float)[pick]
        w[lane, : len(rows)] = 1.0 if weights is None else weights[place]
    return x, y, w
