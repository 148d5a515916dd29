"""Which downstream tasks can be predicted: those that small runs do better than guessing at.

Source: Gadre et al. 2024, section 3.4 (tasks 10 points above chance count) and figure 8 (other
margins).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from scaling_jax import laws
from scaling_jax.errors import UserError
from scaling_jax.testbeds.analysis import split

# The paper's: 10 points.
MARGIN = 0.10
MARGINS = tuple(percent / 100 for percent in range(-5, 51, 5))
# The mean over the tasks that count, as a column.
MEAN = "error/mean_of_those_that_count"


@dataclasses.dataclass(frozen=True)
class Method:
    """How an error is predicted: over_training for the loss, then `law` for the error.

    Attributes:
      law: of the error, exponential or sigmoid.
      loss: the column that it reads; "" stands for the loss on each dataset itself.
      pinned: whether its asymptote is held at the error of guessing.
      level: of the intervals.
      tolerance: how far off, relative to what is measured, a prediction may be.
    """

    law: str = "exponential"
    loss: str = ""
    pinned: bool = True
    level: float = 0.9
    tolerance: float = 0.1


METHOD = Method()


def above_chance(
    table: pd.DataFrame, chance: Mapping[str, float], margin: float = MARGIN
) -> list[str]:
    """The tasks in which some run of `table` beats guessing by more than `margin`.

    Args:
      table: records of the runs that decide, on any dataset.
      chance: the error of guessing of each task.
    """
    columns = {task: f"error/{task}" for task in chance if f"error/{task}" in table}
    return [
        task for task, column in columns.items() if (table[column] < chance[task] - margin).any()
    ]


def by_task(
    table: pd.DataFrame,
    chance: Mapping[str, float],
    method: Method = METHOD,
    *,
    margin: float = MARGIN,
    model: str | None = None,
) -> pd.DataFrame:
    """A row for each dataset and task, best first: how far above chance, how well its law predicts.

    Laws are fitted to the rows in role `fit` (all, without roles) and predict the held-out run of
    most compute that has the task's error.

    Args:
      table: records.
      chance: the error of guessing of each task.
      method: of prediction.
      margin: that a task has to be above chance.
      model: the size of the runs that decide whether it is; by default the fitted ones.

    Returns:
      dataset, task, chance; best, the lowest error of the deciding runs; above_chance, chance
      minus best; of the prediction: predicted, low, high, measured and off, off_low, off_high (each
      of the first three / measured - 1); and a verdict:
        near chance: not above it by `margin`; no law is fitted then
        predicted: off by no more than the tolerance
        uncertain: off by more, but the interval holds what was measured
        missed: it does not
        not measured: no held-out run has an error of the task
        above chance: no run is held out

    Raises:
      UserError: as `laws.fit`; there is no run that decides, none has an error of these tasks, or
        a dataset has no column of its loss.
    """
    found = []
    for dataset, rows in _datasets(table, model):
        predictor = _Predictor.of(rows, dataset, method)
        deciding = _deciding(rows, model)
        for task, error in chance.items():
            column = f"error/{task}"
            if column not in rows or deciding[column].isna().all():
                continue
            best = float(deciding[column].min())
            row = {"dataset": dataset, "task": task, "chance": error, "best": best}
            row |= {"above_chance": error - best, "verdict": "near chance"}
            if error - best > margin:
                row |= predictor.predict(rows, column, error)
                row["verdict"] = _verdict(row, method.tolerance, predictor.is_tested)
            found.append(row)
    if not found:
        raise UserError(f"records table: no run has an error of these tasks: {', '.join(chance)}")
    table = pd.DataFrame(found)
    return table.sort_values(["dataset", "above_chance"], ascending=[True, False])


def sweep(
    table: pd.DataFrame,
    chance: Mapping[str, float],
    method: Method = METHOD,
    *,
    margins: Sequence[float] = MARGINS,
    model: str | None = None,
) -> pd.DataFrame:
    """A row for each margin and dataset: how well the mean over the tasks above it is predicted.

    Whether a task counts is decided on all datasets together, as in the paper.

    Returns:
      margin, dataset, tasks (how many count), excluded, and the prediction as from `by_task`.

    Raises:
      UserError: as `by_task`.
    """
    datasets = _datasets(table, model)
    predictors = {name: _Predictor.of(rows, name, method) for name, rows in datasets}
    deciding = pd.concat([_deciding(rows, model) for _, rows in datasets])
    found = []
    for margin in margins:
        chosen = above_chance(deciding, chance, margin)
        if not chosen:
            continue
        guessed = sum(chance[task] for task in chosen) / len(chosen)
        for dataset, rows in datasets:
            errors = rows[[f"error/{task}" for task in chosen]]
            rows = rows.assign(**{MEAN: errors.mean(axis=1, skipna=False)})
            row = {"margin": margin, "dataset": dataset, "tasks": len(chosen)}
            row["excluded"] = len(chance) - len(chosen)
            found.append(row | predictors[dataset].predict(rows, MEAN, guessed))
    return pd.DataFrame(found)


@dataclasses.dataclass(frozen=True, eq=False)
class _Predictor:
    """The loss law of one dataset's runs, and whether some are held out."""

    loss: laws.Fit
    is_tested: bool
    method: Method

    @classmethod
    def of(cls, rows: pd.DataFrame, dataset: str, method: Method) -> "_Predictor":
        loss = method.loss or f"loss/{dataset}"
        if loss not in rows and not method.loss:
            raise UserError(
                f"records table: no column '{loss}': it needs columns dataset and loss/DATASET, "
                "the loss on what a run was trained on; or give --loss, the column that laws read"
            )
        known, held_out = split(rows)
        return cls(laws.fit("over_training", known, target=loss), not held_out.empty, method)

    def predict(self, rows: pd.DataFrame, column: str, chance: float) -> dict[str, Any]:
        """The prediction of `column` for the largest held-out run that has it, and how far off."""
        known, held_out = split(rows)
        measured = held_out[held_out[column] > 0].sort_values("flops_6nd")
        if measured.empty:
            return {}
        run = measured.iloc[-1]
        pin = chance if self.method.pinned else None
        error = laws.fit(self.method.law, known, target=column, loss=self.loss.target, chance=pin)
        at = {name: float(run[name]) for name in self.loss.form.inputs}
        found = laws.chained(self.loss, error).predict(level=self.method.level, **at)
        ends = {"predicted": found.value, "low": found.low, "high": found.high}
        off = {"off": found.value, "off_low": found.low, "off_high": found.high}
        relative = {name: value / float(run[column]) - 1 for name, value in off.items()}
        return {**ends, "measured": float(run[column]), **relative}


def _datasets(table: pd.DataFrame, model: str | None) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each dataset that has runs which decide.

    Raises:
      UserError: there is no such run.
    """
    names = sorted(map(str, table["dataset"].unique()))
    parts = [(name, table[table["dataset"] == name]) for name in names]
    found = [(name, rows) for name, rows in parts if len(_deciding(rows, model))]
    if not found:
        raise UserError(f"records table: no run of model '{model}'")
    return found


def _deciding(rows: pd.DataFrame, model: str | None) -> pd.DataFrame:
    """The runs that decide whether a task counts."""
    return split(rows)[0] if model is None else rows[rows["model"] == model]


def _verdict(row: Mapping[str, Any], tolerance: float, is_tested: bool) -> str:
    """What `by_task` says of a task that is above chance."""
    if "measured" not in row:
        return "not measured" if is_tested else "above chance"
    if abs(row["off"]) <= tolerance:
        return "predicted"
    return "uncertain" if row["low"] <= row["measured"] <= row["high"] else "missed"
