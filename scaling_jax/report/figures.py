"""Figures of a fitted law that a paper could print: as wide as its column, labelled with units.

    from scaling_jax.report import figures
    figures.prediction_fan(fit, held_out=larger_runs).savefig("fan.pdf")

Each function takes fits and records tables and returns a matplotlib figure. Runs that the law was
fitted to are filled circles, runs that it never saw are open diamonds.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from scaling_jax import records
from scaling_jax.errors import UserError
from scaling_jax.laws import Coverage, Fit
from scaling_jax.report import panels
from scaling_jax.report.fan import prediction_fan
from scaling_jax.report.style import (
    LETTERS,
    PALETTE,
    SMALL_LETTERS,
    column_panels,
)

__all__ = [
    "coverage_by_distance",
    "error_against_loss",
    "influence_bars",
    "input_columns",
    "prediction_fan",
    "reducible_loss",
    "relative_error_map",
]

LAW, AGAINST = PALETTE[0], PALETTE[5]
MOST_BARS = 15
MOST_CELLS = 9
# Decades of compute beyond the fitted runs.
DISTANCES = (0.0, 0.5, 1.0, 2.0, np.inf)


def reducible_loss(fit: Fit, *, held_out: pd.DataFrame | None = None) -> Figure:
    """Loss above the fitted E against compute: a line and a colour for each token multiplier.

    Args:
      fit: a law of params and tokens with an irreducible loss E.
      held_out: records of runs that the law was not fitted to.

    Raises:
      UserError: another law, or a fault in `held_out`.
    """
    if fit.form.inputs != ("params", "tokens") or "E" not in fit.parameters:
        raise UserError(f"reducible_loss: '{fit.form.name}' is no law of params and tokens with E")
    known = fit.observations.table
    rows = pd.concat(
        [known, panels.held_out_rows(held_out, known, [fit.target])], ignore_index=True
    )
    # Only in a logarithm can nothing lie at or below the floor.
    rows = rows[rows[fit.target] > fit.parameters["E"]]
    figure, (panel,) = column_panels(height=2.9)
    panels.reducible_loss(
        panel,
        rows,
        (rows.index < len(known)),
        fit.target,
        fit.form,
        fit.parameters,
        panels.multiplier_norm(rows["token_multiplier"]),
    )
    panel.set_ylabel(f"{fit.target} − E (nats/token)")
    panel.set_title(f"E = {fit.parameters['E']:.3g} nats/token", fontsize=LETTERS)
    title = "M = D/N; open: held out" if len(rows) > len(known) else "M = D/N"
    panel.legend(fontsize=6, title=title, title_fontsize=6, ncols=2, frameon=False)
    return figure


def error_against_loss(
    fit: Fit, *, held_out: pd.DataFrame | None = None, level: float = 0.9
) -> Figure:
    """Error against loss: the fitted error law with an interval for what a run will measure.

    Args:
      fit: a law of the loss.
      held_out: records of runs that the law was not fitted to.
      level: of the interval.

    Raises:
      UserError: another law, a wrong level, or a fault in `held_out`.
    """
    loss = fit.observations.loss
    if loss is None:
        raise UserError(f"error_against_loss: '{fit.form.name}' is no law of the loss")
    known = fit.observations.table
    rows = pd.concat(
        [known, panels.held_out_rows(held_out, known, [loss, fit.target])], ignore_index=True
    )
    figure, (panel,) = column_panels(height=2.9)
    x = np.linspace(0.97 * rows[loss].min(), 1.03 * rows[loss].max(), 100)
    found = fit.predict(loss=x, level=level)
    panel.fill_between(
        x,
        found.low,
        found.high,
        color="grey",
        alpha=0.25,
        linewidth=0,
        label=f"{level:.0%} interval",
    )
    panel.plot(x, found.value, color="black", linewidth=1, label=f"{fit.form.name} law")
    panels.runs_by_model(panel, rows, rows.index < len(known), loss, fit.target)
    panel.set(xlabel=panels.labelled(loss), ylabel=panels.labelled(fit.target))
    title = "open: held out" if len(rows) > len(known) else None
    panel.legend(fontsize=6, title=title, title_fontsize=6, frameon=False)
    return figure


def relative_error_map(
    runs: Fit | pd.DataFrame, *, held_out: pd.DataFrame | None = None, largest: float = 10.0
) -> Figure:
    """A heat map of relative error over params and token multiplier; fitted cells are framed.

    Runs of about the same size and multiplier share a cell: it shows their mean error, and the sign
    says whether the law predicts too much (+) or too little.

    Args:
      runs: a law of params and tokens, or a table with params, token_multiplier, relative_error
        (predicted / measured - 1) and fitted (true or false).
      held_out: with a law, records of runs that it was not fitted to.
      largest: percent from which on colours are the same.

    Raises:
      UserError: another law, a missing column, or a fault in `held_out`.
    """
    rows = _errors(runs, held_out) if isinstance(runs, Fit) else runs
    records.require(rows, ["params", "token_multiplier", "relative_error", "fitted"])
    cells = pd.DataFrame(
        {
            "size": panels.together(rows["params"].to_numpy(float), MOST_CELLS),
            "multiplier": panels.together(rows["token_multiplier"].to_numpy(float), MOST_CELLS),
            "params": rows["params"].to_numpy(float),
            "percent": 100 * rows["relative_error"].to_numpy(float),
            "fitted": rows["fitted"].to_numpy(bool),
        }
    )
    params = cells.groupby("size")["params"].mean()
    grid = cells.pivot_table(
        index="size", columns="multiplier", aggfunc={"percent": "mean", "fitted": "max"}
    )
    percent = grid["percent"].to_numpy(float)
    fitted = (grid["fitted"] == 1).to_numpy()
    figure, (panel,) = column_panels(height=1.0 + 0.27 * len(percent))
    scale = panels.error_scale(largest)
    panels.error_map(
        panel,
        percent,
        fitted,
        [_count(float(size)) for size in params],
        [f"{multiplier:g}" for multiplier in grid["percent"].columns],
        scale,
        text="{:+.1f}",
        letters=min(7.0, 48 / percent.shape[1]),
    )
    panel.set(xlabel="token multiplier M = D/N", ylabel="parameters N")
    bar = figure.colorbar(scale, ax=panel, extend="max", pad=0.02, aspect=25)
    bar.set_label("size of relative error (%)", fontsize=SMALL_LETTERS)
    bar.ax.tick_params(labelsize=SMALL_LETTERS)
    if isinstance(runs, Fit):
        panel.set_title(f"{runs.target}; framed: fitted", fontsize=LETTERS)
    return figure


def influence_bars(fit: Fit, *, most: int = MOST_BARS, **inputs: float) -> Figure:
    """Which runs a prediction hangs on: d prediction / d each measurement, the largest on top.

    Args:
      fit: any law.
      most: bars at most.
      inputs: of the prediction: params= and tokens=, or loss=.

    Raises:
      UserError: an input is missing, unknown or not a finite positive number.
    """
    slopes = fit.influence(**inputs)
    order = np.argsort(-np.abs(slopes), kind="stable")[:most]
    names = [str(fit.observations.table["run"].iloc[row]) for row in order]
    figure, (panel,) = column_panels(height=0.8 + 0.17 * len(order))
    colours = [LAW if slopes[row] >= 0 else AGAINST for row in order]
    panel.barh(range(len(order)), slopes[order], color=colours, height=0.7)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(range(len(order)), names, fontsize=6)
    panel.invert_yaxis()
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="x", alpha=0.3)
    panel.set_axisbelow(True)
    at = ", ".join(f"{_short(name)} = {_count(value)}" for name, value in inputs.items())
    figure.suptitle(f"{fit.target} at {at}", fontsize=LETTERS)
    shown = "" if len(order) == len(slopes) else f" ({len(order)} of {len(slopes)} runs)"
    figure.supxlabel(f"d prediction / d measurement{shown}", fontsize=LETTERS)
    return figure


def coverage_by_distance(coverage: Coverage, *, distances: Sequence[float] = DISTANCES) -> Figure:
    """How intervals did on larger runs: each miss and hit, and the share held, by decades beyond.

    Args:
      coverage: what `laws.coverage` found.
      distances: edges of the bins, decades of compute beyond the largest fitted run.
    """
    rows = coverage.predictions
    hit = ((rows["low"] <= rows["measured"]) & (rows["measured"] <= rows["high"])).to_numpy(bool)
    off = 100 * (rows["value"] / rows["measured"] - 1)
    figure, (above, below) = column_panels(2, 1, height=1.8)
    decades = rows["decades"]
    above.axhline(0, color="black", linewidth=0.8)
    above.scatter(decades[hit], off[hit], s=9, color=LAW, label="interval holds the measurement")
    above.scatter(decades[~hit], off[~hit], s=14, marker="x", color=AGAINST, label="it does not")
    above.set_ylabel("prediction relative to\nmeasurement (%)")
    above.legend(fontsize=6, frameon=False, loc="best")
    reach = float(decades.max()) * 1.03
    for low, high in itertools.pairwise(distances):
        inside = ((decades >= low) & (decades < high)).to_numpy(bool)
        if not inside.any():
            continue
        end = min(high, reach)
        share, count = hit[inside].mean(), int(inside.sum())
        below.bar(
            low, share, width=end - low, align="edge", color=LAW, alpha=0.5, edgecolor="white"
        )
        below.text(
            (low + end) / 2, 0.04, f"{share:.0%}\nof {count}", ha="center", fontsize=SMALL_LETTERS
        )
    below.axhline(coverage.level, color="black", linewidth=1, linestyle="--")
    below.set(ylim=(0, 1.05), xlabel="decades beyond the largest fitted run")
    below.set_ylabel(f"held by {coverage.level:.0%}\nintervals")
    below.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.tick_params(labelbottom=False)
    for panel in (above, below):
        panel.set_xlim(0, reach)
    return figure


def input_columns(fit: Fit) -> dict[str, str]:
    """The column that each input of a law is read from."""
    loss = fit.observations.loss or "loss"
    return {name: loss if name == "loss" else name for name in fit.form.inputs}


def _errors(fit: Fit, held_out: pd.DataFrame | None) -> pd.DataFrame:
    """Each run's relative error, and whether it was fitted."""
    known = fit.observations.table
    columns = list(input_columns(fit).values())
    beyond = panels.held_out_rows(held_out, known, [fit.target, *columns])
    rows = pd.concat([known, beyond], ignore_index=True)
    value = fit.evaluate(rows[columns].to_numpy(float).T)
    measured = rows[fit.target].to_numpy(float)
    return rows.assign(relative_error=value / measured - 1, fitted=rows.index < len(known))


def _short(name: str) -> str:
    return {"params": "N", "tokens": "D", "flops_6nd": "C", "loss": "L"}.get(name, name)


def _count(number: float) -> str:
    """A number of parameters or tokens with its thousands: 6.9B, 138B, 22K."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
