"""Every figure that suits a fitted law, and figures as files."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from scaling_jax import atomic
from scaling_jax.errors import UserError
from scaling_jax.laws import Fit
from scaling_jax.report import figures

SUFFIXES = (".png", ".pdf", ".svg")
DOTS_PER_INCH = 300
# How much more compute than the largest fitted run the influence is drawn for.
AHEAD = 10.0


def figures_of(fit: Fit, held_out: pd.DataFrame | None = None) -> dict[str, Figure]:
    """The figures of `scaling_jax.report.figures` that suit a law, by name.

    The influence is of the largest held-out run or, without any, of ten times the compute of the
    largest fitted one.

    Raises:
      UserError: a fault in `held_out`.
    """
    inputs = fit.form.inputs
    drawn = {
        "relative_error": figures.relative_error_map(fit, held_out=held_out),
        "influence": figures.influence_bars(fit, **_ahead(fit, held_out)),
    }
    if inputs == ("loss",):
        drawn["error_against_loss"] = figures.error_against_loss(fit, held_out=held_out)
    if set(inputs) <= {"params", "tokens", "flops_6nd"}:
        drawn["prediction"] = figures.prediction_fan(fit, held_out=held_out)
    if inputs == ("params", "tokens") and "E" in fit.parameters:
        drawn["reducible_loss"] = figures.reducible_loss(fit, held_out=held_out)
    return drawn


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure, atomically, in the format that the suffix of `path` names; returns `path`.

    Raises:
      UserError: another suffix than .png, .pdf or .svg.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a figure's name ends in one of {', '.join(SUFFIXES)}")
    with atomic.replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DOTS_PER_INCH)
    return path


def _ahead(fit: Fit, held_out: pd.DataFrame | None) -> dict[str, Any]:
    """Where a prediction is asked of the law: beyond the runs that it was fitted to."""
    columns = figures.input_columns(fit)
    beyond = (
        fit.observations.table[:0]
        if held_out is None
        else held_out.dropna(subset=list(columns.values()))
    )
    rows = fit.observations.table if beyond.empty else beyond
    point = rows.sort_values("flops_6nd").iloc[-1]
    at = {name: float(point[column]) for name, column in columns.items()}
    if not beyond.empty:
        return at
    growth = {"loss": 1.0, "flops_6nd": AHEAD}
    return {name: value * growth.get(name, math.sqrt(AHEAD)) for name, value in at.items()}
