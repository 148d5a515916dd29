"""Figures of a testbed: data and laws, drawn so that colour is never the only difference.

Each function takes the records table and the fitted laws and returns a matplotlib figure. Runs that
laws were fitted to are filled circles, runs held out are open diamonds.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_jax import laws
from scaling_jax.report.panels import multiplier_norm, runs_by_model
from scaling_jax.report.panels import reducible_loss as draw_reducible_loss
from scaling_jax.report.style import PALETTE
from scaling_jax.testbeds.analysis import FittedLaw, in_distribution

PANEL_INCHES = 4.2
SMOOTHING = 0.02  # of a run's length


def reducible_loss(table: pd.DataFrame, fits: Sequence[FittedLaw]) -> Figure:
    """Loss above the law's irreducible loss against training compute, a line a token multiplier.

    Source: Gadre et al. 2024, figure 2: under eq. 4 runs of equal M lie on parallel lines.
    """
    chosen = [fit for fit in fits if fit["law"] == "over_training" and in_distribution(fit)]
    figure, panels = _panels(chosen, "reducible loss (nats/token)")
    norm = multiplier_norm(table["token_multiplier"])
    for axes, fit in zip(panels, chosen, strict=True):
        rows = table[table["dataset"] == fit["dataset"]]
        known = (rows["role"] == "fit").to_numpy()
        form, floor = laws.FORMS[fit["law"]], fit["parameters"]["E"]
        draw_reducible_loss(axes, rows, known, fit["target"], form, fit["parameters"], norm)
        axes.set_title(f"{fit['dataset']}  (E = {floor:.3g} nats)")
        axes.legend(fontsize=7, title="diamonds: held out", title_fontsize=7)
    return figure


def error_against_loss(table: pd.DataFrame, fits: Sequence[FittedLaw]) -> Figure:
    """Error against loss with the fitted error law (Gadre et al. 2024, eq. 5 and figure 3).

    Grey bars are the 95 % bounds of each error, where the records have them.
    """
    by_panel: dict[tuple[str, str, str], list[FittedLaw]] = {}
    for fit in fits:
        if "loss" in fit:
            by_panel.setdefault((fit["dataset"], fit["loss"], fit["target"]), []).append(fit)
    figure, panels = _panels(list(by_panel), "")
    for axes, ((dataset, loss, target), chosen) in zip(panels, by_panel.items(), strict=True):
        rows = table[table["dataset"] == dataset]
        _bounds(axes, rows, loss, target)
        runs_by_model(axes, rows, (rows["role"] == "fit").to_numpy(), loss, target)
        x = np.linspace(*_range(rows[loss], 1.03), 100)
        for fit, style in zip(chosen, itertools.cycle(("-", "--", ":")), strict=False):
            curve = laws.FORMS[fit["law"]].curve(fit["parameters"], loss=x)
            axes.plot(x, curve, style, color="black", linewidth=1, label=f"{fit['law']} law")
        axes.set(xlabel=f"{loss} (nats/token)", ylabel=target, title=dataset)
        axes.legend(fontsize=7)
    return figure


def predicted_against_measured(fits: Sequence[FittedLaw]) -> Figure:
    """Every held-out prediction with its interval beside what was measured, relative to that."""
    rows = [
        (f"{held['run']}\n{fit['target']} · {fit['law']}", held)
        for fit in fits
        if in_distribution(fit)
        for held in fit["held_out"]
    ]
    figure = Figure(figsize=(2 * PANEL_INCHES, 1 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (_, held) in enumerate(rows):
        ends = [100 * (held[key] / held["measured"] - 1) for key in ("low", "predicted", "high")]
        axes.plot([ends[0], ends[2]], [place, place], color=PALETTE[0], linewidth=3, alpha=0.5)
        axes.plot(ends[1], place, "o", color=PALETTE[0])
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=7)
    axes.invert_yaxis()
    level = fits[0]["level"] if fits else 0.9
    axes.set_xlabel(f"prediction relative to measurement (%), bar: {level:.0%} interval")
    axes.grid(axis="x", alpha=0.3)
    return figure


def loss_curves(table: pd.DataFrame, curves: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Smoothed training loss of every run against tokens seen."""
    names = sorted(table["dataset"].unique())
    figure, panels = _panels(names, "training loss (nats/token)")
    models = list(dict.fromkeys(table.sort_values("params")["model"]))
    for axes, name in zip(panels, names, strict=True):
        for _, row in table[table["dataset"] == name].sort_values("params").iterrows():
            curve = curves.get(str(row["run"]))
            if curve is None:
                continue
            colour = PALETTE[models.index(row["model"]) % len(PALETTE)]
            style = "-" if row["role"] == "fit" else "--"
            axes.plot(
                curve["tokens"],
                _smooth(curve["loss"]),
                style,
                color=colour,
                linewidth=1,
                label=row["model"],
            )
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=7, title="model")
        axes.set(xscale="log", xlabel="tokens", title=f"{name}  (dashed: held out)")
    return figure


def _panels(subjects: Sequence[object], ylabel: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each subject, side by side."""
    count = max(1, len(subjects))
    size = (PANEL_INCHES * count, PANEL_INCHES)
    figure = Figure(figsize=size, layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    panels[0].set_ylabel(ylabel)
    if not subjects:
        panels.pop().set_axis_off()
    return figure, panels


def _bounds(axes: Axes, rows: pd.DataFrame, x: str, y: str) -> None:
    """Bars from the low to the high bound of `y`."""
    if f"{y}/low" in rows:
        ends = rows[f"{y}/low"], rows[f"{y}/high"]
        axes.vlines(rows[x], *ends, color="0.75", linewidth=1, zorder=1)


def _range(values: pd.Series, margin: float = 1.0) -> tuple[float, float]:
    return float(values.min()) / margin, float(values.max()) * margin


def _smooth(values: np.ndarray) -> np.ndarray:
    """Exponential moving average over about a fiftieth of the run."""
    return pd.Series(values).ewm(halflife=max(1.0, SMOOTHING * len(values))).mean().to_numpy()
