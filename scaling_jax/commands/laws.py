"""`scaling-jax fit`, `predict` and `coverage`: from a records table to a law and predictions."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scaling_jax.commands.law_options import ErrorOptions, LawOptions, dataset_names, one_dataset
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.laws import Chained, Fit, Form, Prediction
    from scaling_jax.laws.coverage import Score

LAW, ERRORS = LawOptions(), ErrorOptions()


def fit(
    table: Path,
    *,
    dataset: str | None = None,
    out: Path | None = None,
    plots: Path | None = None,
    options: LawOptions = LAW,
    errors: ErrorOptions = ERRORS,
) -> None:
    """Fit a law to a records table, one fit a dataset; predict the rows in role held_out.

    It also says how often its intervals held on the table itself, as `coverage` measures it.

    Args:
      table: CSV, Parquet or JSON with params, tokens and loss/SET or error/TASK columns.
      dataset: only its rows.
      out: a JSON file for the fits.
      plots: a folder for figures of the law, PLOTS/DATASET/*.png.
    """
    from scaling_jax import laws
    from scaling_jax.report.page import held_out_table, parameter_table
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import analysis

    rows, level = options.read(table, dataset), options.level
    target, error = options.column(rows), dataclasses.asdict(errors)
    fits = analysis.fit_law(rows, options.law, target, level=level, **error)
    print_table(parameter_table(fits), f"parameters, {level:.0%} intervals")
    held_out = held_out_table(fits)
    if not held_out.empty:
        print_table(held_out, f"held-out runs, {level:.0%} intervals")
    for fitted in fits:
        for warning in fitted["warnings"]:
            say(f"warning: {fitted['dataset']}: {warning}")
    for name in dataset_names(rows):
        known, held_out = analysis.split(rows[rows["dataset"] == name])
        say(f"{name}: {_measured_coverage(known, target, options, error)}")
        if plots:
            from scaling_jax.report import gallery

            law = laws.fit(options.law, known, target=target, **error)
            for kind, figure in gallery.figures_of(law, held_out).items():
                say(f"{gallery.save(figure, plots / name / f'{kind}.png')}")
    if out:
        analysis.write(fits, out)
        say(f"{out}")


def predict(
    table: Path,
    *,
    params: float,
    tokens: float,
    unique_tokens: float | None = None,
    dataset: str | None = None,
    method: str = "calibrated",
    influence: bool = False,
    plot: Path | None = None,
    options: LawOptions = LAW,
    errors: ErrorOptions = ERRORS,
) -> None:
    """Predict the loss or error of a run with so many parameters and tokens, with an interval.

    An error is predicted from the loss that law over_training predicts, where --loss is given.

    Args:
      table: as for fit.
      params: N of the run.
      tokens: D of the run.
      unique_tokens: of these, those not repeated; for law data_constrained.
      dataset: only its rows; may be left out where the table has only one.
      method: of the interval: calibrated, delta, pairs, residual, families or bayes.
      influence: also print which runs carry the prediction.
      plot: a figure of the law and its interval up to there, FILE.png, .pdf or .svg.
    """
    from scaling_jax import laws
    from scaling_jax.report import figures, gallery
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import analysis

    def draw(law: "Fit | Chained") -> None:
        if plot:
            until, multipliers = 6 * params * tokens, [tokens / params]
            fan = figures.prediction_fan(
                law, token_multipliers=multipliers, held_out=held_out, until=until
            )
            say(f"{gallery.save(fan, plot)}")

    rows, held_out = analysis.split(one_dataset(options.read(table, dataset), table))
    target = options.column(rows)
    fitted = laws.fit(options.law, rows, target=target, loss=errors.loss, chance=errors.chance)
    if errors.loss is None:
        at = _inputs(fitted.form, params, tokens, unique_tokens)
        found = fitted.predict(level=options.level, method=method, **at)
        _say_prediction(target, found, fitted.warnings)
        if influence:
            print_table(_influences(fitted, at, found.value), "runs that carry it, most first")
        draw(fitted)
        return
    if influence or method != "calibrated":
        raise UserError("predict: --influence and --method are for laws that read no --loss")
    loss = laws.fit("over_training", rows, target=errors.loss)
    at = _inputs(loss.form, params, tokens, unique_tokens)
    chain = laws.chained(loss, fitted)
    found = chain.predict(level=options.level, **at)
    say(f"{errors.loss}: {loss.curve(**at):.5g}")
    _say_prediction(target, found, (*loss.warnings, *fitted.warnings))
    draw(chain)


def coverage(
    table: Path,
    *,
    cuts: Annotated[list[float] | None, Parameter(consume_multiple=True)] = None,
    dataset: str | None = None,
    method: str = "calibrated",
    options: LawOptions = LAW,
    errors: ErrorOptions = ERRORS,
) -> None:
    """How often intervals hold on your own runs: fit the cheap ones, predict the dear ones.

    Args:
      table: as for fit.
      cuts: training compute, 6ND; at each the runs below predict those from there on. By default
        every third of a decade that leaves 8 runs below.
      dataset: only its rows; may be left out where the table has only one.
      method: of the interval, as for predict.
    """
    import pandas as pd

    from scaling_jax import laws
    from scaling_jax.terminal import print_table

    rows = one_dataset(options.read(table, dataset), table)
    target = options.column(rows)
    found = laws.coverage(
        rows,
        options.law,
        target,
        level=options.level,
        cuts=cuts,
        method=method,
        loss=errors.loss,
        chance=errors.chance,
    )
    lines = [
        {"cut_flops": f"{c.flops:.3g}", "fitted": f"{c.runs}", **_score(c)} for c in found.cuts
    ]
    lines.append({"cut_flops": "all", "fitted": "", **_score(found)})
    print_table(
        pd.DataFrame(lines), f"{target}: {found.level:.0%} intervals of runs above each cut"
    )


def _measured_coverage(
    known: "pd.DataFrame", target: str, options: LawOptions, error: dict[str, Any]
) -> str:
    """How often intervals held at compute cuts inside `known`, in a sentence."""
    from scaling_jax import laws

    try:
        found = laws.coverage(known, options.law, target, level=options.level, **error)
    except UserError as reason:
        return f"the intervals could not be measured on these runs ({reason})"
    return (
        f"at {len(found.cuts)} compute cuts inside these runs, {found.level:.0%} intervals held "
        f"{found.covered:.0%} of {found.count} larger runs (median width "
        f"{found.median_relative_width:.1%}, median error {found.median_relative_error:.1%})"
    )


def _score(score: "Score") -> dict[str, float]:
    return {
        "predicted": score.count,
        "covered": score.covered,
        "median_relative_width": score.median_relative_width,
        "median_relative_error": score.median_relative_error,
        "interval_score": score.mean_interval_score,
    }


def _inputs(
    form: "Form", params: float, tokens: float, unique_tokens: float | None
) -> dict[str, float]:
    """What `form` reads of a run; unique tokens always where they are given, right or wrong."""
    run = {"params": params, "tokens": tokens, "flops_6nd": 6 * params * tokens}
    asked = {name: value for name, value in run.items() if name in form.inputs}
    return asked if unique_tokens is None else {**asked, "unique_tokens": unique_tokens}


def _say_prediction(target: str, found: "Prediction", warnings: tuple[str, ...]) -> None:
    from scaling_jax.terminal import say

    interval = f"{found.level:.0%} interval {found.low:.5g} to {found.high:.5g}"
    say(f"{target}: {found.value:.5g}, {interval}")
    for warning in (*warnings, *found.warnings):
        say(f"warning: {warning}")


def _influences(fitted: "Fit", at: dict[str, float], value: float) -> "pd.DataFrame":
    """A row for each fitted run: how far the prediction moves with what was measured there."""
    runs = fitted.observations.table[["run", "params", "tokens", fitted.target]]
    moves = fitted.influence(**at)
    runs = runs.assign(
        moves_per_unit=moves, percent_per_percent=moves * fitted.observations.y / value
    )
    return runs.sort_values("percent_per_percent", key=abs, ascending=False)
