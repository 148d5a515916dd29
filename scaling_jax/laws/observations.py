"""From a records table to the numbers a law is fitted to, and what is odd about them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import ArrayLike, Float

from scaling_jax import records
from scaling_jax.errors import UserError, nearest
from scaling_jax.laws.forms import GROUP, Form

FEWEST = 3
# Runs closer than this (relative) are the same point.
SAME_POINT = 1e-6


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """What one law is fitted to.

    Attributes:
      target: column that is fitted.
      loss: column that the input "loss" of an error law is read from.
      table: the rows used, checked.
      x: shape (inputs, n), in the order of the form's inputs.
      y, weights: shape (n,).
    """

    target: str
    loss: str | None
    table: pd.DataFrame
    x: Float[np.ndarray, "inputs n"]
    y: Float[np.ndarray, "n"]
    weights: Float[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.y)

    @property
    def flops(self) -> Float[np.ndarray, "n"]:
        """Training compute of each run, 6ND."""
        return self.table["flops_6nd"].to_numpy(float)

    def only(self, rows: np.ndarray) -> "Observations":
        """The observations at `rows` (a mask or indices)."""
        table = self.table[rows] if rows.dtype == bool else self.table.iloc[rows]
        return dataclasses.replace(
            self,
            table=table.reset_index(drop=True),
            x=self.x[:, rows],
            y=self.y[rows],
            weights=self.weights[rows],
        )


def gather(
    form: Form,
    table: pd.DataFrame,
    target: str,
    loss: str | None = None,
    weights: str | None = None,
) -> tuple[Observations, list[str]]:
    """The rows of `table` that have `target` and every input of `form`, and warnings about them.

    Raises:
      UserError: a fault that `records.check` finds, an unknown column, or too few rows.
    """
    if ("loss" in form.inputs) != (loss is not None):
        needs = "needs loss=, the" if loss is None else "reads no"
        raise UserError(f"law '{form.name}' {needs} loss column")
    table = records.check(table)
    columns = [str(loss) if name == "loss" else name for name in form.inputs]
    wanted = [target, *columns, *([weights] if weights else [])]
    records.require(table, wanted)
    if not target.startswith(records.MEASURE_PREFIXES):
        known = ", ".join(records.targets(table)) or "none"
        raise UserError(f"'{target}' is no loss/ or error/ column to fit; those here: {known}")
    for name in wanted:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"records table: column '{name}' is not a column of numbers")
    complete = table[wanted].notna().all(axis=1)
    found = []
    if not complete.all():
        found.append(f"{int((~complete).sum())} of {len(table)} rows lack {target} or an input")
    table = table[complete].reset_index(drop=True)
    if len(table) < FEWEST:
        raise UserError(
            f"law '{form.name}': {len(table)} rows with '{target}' are too few; {FEWEST} at least"
        )
    x = table[columns].to_numpy(float).T
    if (different := len(np.unique(x, axis=1).T)) < FEWEST:
        raise UserError(
            f"law '{form.name}': {len(table)} rows with '{target}' have {different} different "
            f"{', '.join(columns)}, which are too few; {FEWEST} at least"
        )
    w = table[weights].to_numpy(float) if weights else np.ones(len(table))
    if not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise UserError(f"records table: column '{weights}': weights must be finite and positive")
    observations = Observations(target, loss, table, x, table[target].to_numpy(float), w)
    return observations, found + _oddities(form, observations)


def check_inputs(form: Form, given: Mapping[str, ArrayLike]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Inputs to predict at as an array (inputs, m), and the shape they broadcast to.

    Raises:
      UserError: an input is missing, unknown or not a finite positive number.
    """
    for name in given:
        if name not in form.inputs:
            hint = nearest(name, form.inputs)
            raise UserError(f"law '{form.name}' has no input '{name}' ({hint})")
    for name in form.inputs:
        if name not in given:
            raise UserError(f"law '{form.name}': input '{name}' is missing")
        values = np.asarray(given[name], float)
        if not (np.isfinite(values) & (values > 0)).all():
            raise UserError(f"law '{form.name}': {name} must be finite and positive, not {values}")
    arrays = np.broadcast_arrays(*(np.asarray(given[name], float) for name in form.inputs))
    return np.stack([array.ravel() for array in arrays]), arrays[0].shape


def _oddities(form: Form, observations: Observations) -> list[str]:
    """What makes a fit to these rows doubtful, in sentences."""
    found = []
    table, y, target = observations.table, observations.y, observations.target
    for name, values in zip(form.inputs, observations.x, strict=True):
        if np.ptp(np.log(values)) < SAME_POINT:
            found.append(f"all rows have {name} {values[0]:.4g}: its effect cannot be seen")
    numbers = pd.DataFrame(np.vstack([observations.x, y]).T)
    repeated = numbers.duplicated()
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        found.append(f"{int(repeated.sum())} rows repeat another one, number {row + 1} the first")
    if target.startswith("error/") and y.max() > 1:
        found.append(
            f"{target} is up to {y.max():.4g}: an error is a share, 0 to 1, not a percentage"
        )
    if "loss" not in form.inputs and GROUP not in form.inputs:
        rank = pd.Series(observations.flops).rank().corr(pd.Series(y).rank())
        if rank > 0:
            found.append(f"{target} rises with compute (rank correlation {rank:.2f})")
        datasets = sorted(map(str, table["dataset"].unique()))
        if len(datasets) > 1:
            found.append(f"runs on {len(datasets)} datasets ({', '.join(datasets)}) share one law")
    return found
