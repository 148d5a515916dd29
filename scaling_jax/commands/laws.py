"""`scaling-jax fit`, `predict`, `optimum` and `next`: from a records table to answers."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.laws import Fit


def fit(
    table: Path,
    *,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    loss: str | None = None,
    chance: float | None = None,
    level: float = 0.9,
    out: Path | None = None,
) -> None:
    """Fit a law to a records table, one fit a dataset; predict the rows in role held_out.

    Args:
      table: CSV, Parquet or JSON with params, tokens and loss/<set> or error/<task> columns.
      law: its name.
      target: the column to fit; may be left out where the table has only one.
      dataset: only its rows.
      loss: for error laws, the loss column that is their input.
      chance: for error laws, the error of guessing, to which the asymptote is pinned.
      level: of the intervals.
      out: a JSON file for the fits.
    """
    from scaling_jax.report.page import held_out_table, parameter_table
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import analysis

    rows = _rows(table, dataset)
    fits = analysis.fit_law(rows, law, _target(rows, target), loss=loss, chance=chance, level=level)
    print_table(parameter_table(fits), f"parameters, {level:.0%} intervals")
    held_out = held_out_table(fits)
    if not held_out.empty:
        print_table(held_out, f"held-out runs, {level:.0%} intervals")
    for fitted in fits:
        for warning in fitted["warnings"]:
            say(f"warning: {fitted['dataset']}: {warning}")
    if out:
        analysis.write(fits, out)
        say(f"{out}")


def predict(
    table: Path,
    *,
    params: float,
    tokens: float,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    level: float = 0.9,
    method: str = "calibrated",
) -> None:
    """Predict the loss of a run with so many parameters and tokens, with an interval.

    Args:
      table: as for fit.
      params: N of the run.
      tokens: D of the run.
      law: its name.
      target: the column to predict; may be left out where the table has only one.
      dataset: only its rows; may be left out where the table has only one.
      level: of the interval.
      method: of the interval.
    """
    from scaling_jax.terminal import say

    fitted = _fitted(table, law, target, dataset)
    found = fitted.predict(params=params, tokens=tokens, level=level, method=method)
    interval = f"{level:.0%} interval {found.low:.4f} to {found.high:.4f}"
    say(f"{fitted.target}: {found.value:.4f}, {interval}")
    for warning in (*fitted.warnings, *found.warnings):
        say(f"warning: {warning}")


def optimum(
    table: Path,
    *,
    flops: float | None = None,
    loss: float | None = None,
    inference_tokens: float = 0.0,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    level: float = 0.9,
) -> None:
    """The best params and tokens for a training budget, or for a loss and the tokens to be served.

    Args:
      table: as for fit.
      flops: training compute 6ND to spend: the lowest loss for it.
      loss: to be reached: the lowest cost of training and serving for it.
      inference_tokens: with loss, tokens to be served over the model's life.
      law: its name.
      target: the loss column; may be left out where the table has only one.
      dataset: only its rows; may be left out where the table has only one.
      level: of the intervals.
    """
    import pandas as pd

    from scaling_jax import laws
    from scaling_jax.terminal import print_table

    if (flops is None) == (loss is None):
        raise UserError("optimum: give either --flops or --loss")
    fitted = _fitted(table, law, target, dataset)
    if flops is not None:
        found = laws.optimum(fitted, flops=flops, level=level)
    else:
        assert loss is not None
        found = laws.inference_optimum(
            fitted, loss=loss, inference_tokens=inference_tokens, level=level
        )
    names = [field.name for field in dataclasses.fields(found) if field.name != "level"]
    rows = [{"quantity": name, **dataclasses.asdict(getattr(found, name))} for name in names]
    print_table(pd.DataFrame(rows), f"{fitted.target}: optimum, {level:.0%} intervals")


def suggest_next(
    table: Path,
    *,
    params: float,
    tokens: float,
    budget_flops: float,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    level: float = 0.9,
) -> None:
    """The next runs to train, within a budget, to be surer of a prediction.

    Args:
      table: as for fit.
      params: N of the run to be predicted.
      tokens: D of the run to be predicted.
      budget_flops: training compute 6ND for the new runs together.
      law: its name.
      target: the loss column; may be left out where the table has only one.
      dataset: only its rows; may be left out where the table has only one.
      level: of the interval.
    """
    from scaling_jax import laws
    from scaling_jax.terminal import print_table, say

    fitted = _fitted(table, law, target, dataset)
    goal = {"params": params, "tokens": tokens}
    found = laws.next_runs(fitted, target=goal, budget_flops=budget_flops, level=level)
    print_table(found.runs, "runs to train, in this order")
    say(
        f"{fitted.target}: half width of the law's {level:.0%} interval "
        f"{found.before:.2%} now, {found.after:.2%} with these runs ({found.flops:.3g} FLOPs)"
    )


def _rows(table: Path, dataset: str | None) -> "pd.DataFrame":
    """The rows of a records table, of one dataset if it is given."""
    from scaling_jax import records
    from scaling_jax.errors import nearest

    rows = records.read(table)
    if dataset is None:
        return rows
    names = sorted(map(str, rows["dataset"].unique()))
    if dataset not in names:
        raise UserError(f"{table}: no dataset '{dataset}' ({nearest(dataset, names)})")
    return rows[rows["dataset"] == dataset]


def _fitted(table: Path, law: str, target: str | None, dataset: str | None) -> "Fit":
    """A law fitted to the rows in role `fit` of a table's one dataset."""
    from scaling_jax import laws
    from scaling_jax.testbeds import analysis

    rows = _rows(table, dataset)
    names = sorted(map(str, rows["dataset"].unique()))
    if len(names) > 1:
        raise UserError(f"{table}: has several datasets, give --dataset: {', '.join(names)}")
    return laws.fit(law, analysis.split(rows)[0], target=_target(rows, target))


def _target(rows: "pd.DataFrame", target: str | None) -> str:
    """The column to fit: the one given, or the only one there is."""
    from scaling_jax import records

    found = records.targets(rows)
    if target is None and len(found) != 1:
        raise UserError(f"give --target: one of {', '.join(found) or 'none (no loss/ column)'}")
    return target or found[0]
