"""Figures 1, 2, 3, 9, 13 and 18 of Gadre et al. 2024: runs and the laws through them.

Marks tell sizes apart; runs that laws were fitted to are filled, the others open.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.typing import ColorType

from scaling_jax.report.style import MARKERS, PALETTE, panels
from scaling_jax.testbeds.reproduce.gadre2024_tables import MAIN_LOSS, SPLITS, PaperFits
from scaling_jax.testbeds.reproduce.paper_laws import (
    EQUATION_5,
    SIZES,
    TRAIN_SETS,
    FittedCurve,
    in_error_fit,
    in_loss_fit,
)

MULTIPLIER_COLOURS = colormaps["viridis"].resampled(256)
MULTIPLIER_NORM = LogNorm(5, 1500)
DOWNSTREAM_LOSSES = {
    MAIN_LOSS: "C4 eval",
    "loss/paloma_redpajama": "Paloma RedPajama",
    "loss/paloma_falcon-refinedweb": "Paloma RefinedWeb",
}
SPLIT_LABELS = {SPLITS[0]: "error, mean of 46 tasks", SPLITS[1]: "error, mean of 17 tasks"}


def figure_1(table: pd.DataFrame, fits: PaperFits, train: str = "rpj") -> Figure:
    """The paper's two laws at a glance: loss against compute, error against loss (RedPajama)."""
    figure, (left, right) = panels(1, 2, (5.4, 4.6))
    law = fits.loss[train, MAIN_LOSS]
    rows = table[table["dataset"] == train]
    _draw_reducible_loss(left, rows, law, (20, 320, 640), label=True)
    left.legend(fontsize=8)
    _draw_errors(right, rows, MAIN_LOSS, SPLITS[1], PALETTE[0])
    _draw_error_law(right, rows, fits.error[train, MAIN_LOSS, SPLITS[1]], MAIN_LOSS, PALETTE[0])
    left.set_title(f"loss law, trained on {TRAIN_SETS[train]}")
    right.set_title(f"error law, trained on {TRAIN_SETS[train]}")
    _explain(figure, left)
    return figure


def figure_2(table: pd.DataFrame, fits: PaperFits) -> Figure:
    """Reducible loss against compute: a line for each token multiplier from 10 to 640."""
    return _reducible_losses(table, fits, (10, 20, 40, 80, 160, 320, 640))


def figure_9(table: pd.DataFrame, fits: PaperFits) -> Figure:
    """The same for small token multipliers: at M = 5 runs lie off the trend."""
    return _reducible_losses(table, fits, (5, 10, 20, 40, 80))


def figure_3(table: pd.DataFrame, fits: PaperFits) -> Figure:
    """Error of the 17 tasks against C4 eval loss, a panel for each train set."""
    figure, axes = panels(1, 3)
    for panel, train in zip(axes, TRAIN_SETS, strict=True):
        rows = table[table["dataset"] == train]
        _draw_errors(panel, rows, MAIN_LOSS, SPLITS[1], PALETTE[0])
        _draw_error_law(panel, rows, fits.error[train, MAIN_LOSS, SPLITS[1]], MAIN_LOSS, PALETTE[0])
        panel.set_title(f"trained on {TRAIN_SETS[train]}")
    _explain(figure, axes[0])
    return figure


def figure_13(table: pd.DataFrame) -> Figure:
    """Error against three losses, two splits: whichever the loss, errors fall along one curve."""
    figure, axes = panels(2, 3, (4.2, 3.8))
    cases = [(split, loss) for split in reversed(SPLITS) for loss in DOWNSTREAM_LOSSES]
    for panel, (split, loss) in zip(axes, cases, strict=True):
        for colour, (train, label) in zip(PALETTE, TRAIN_SETS.items(), strict=False):
            _draw_errors(panel, table[table["dataset"] == train], loss, split, colour, label)
    axes[0].legend(fontsize=8, title="trained on")
    _explain(figure, axes[0])
    return figure


def figure_18(table: pd.DataFrame, tasks: pd.DataFrame, laws: pd.DataFrame) -> Figure:
    """Error of each of the 46 tasks against C4 eval loss, and eq. 5 fitted to each alone.

    `laws` comes from `gadre2024_studies.task_study`.
    """
    columns = 6
    figure, axes = panels(-(-len(tasks) // columns), columns, (2.9, 2.3))
    for panel, task in zip(axes, tasks.index, strict=False):
        column = f"error/{task}"
        for colour, train in zip(PALETTE, TRAIN_SETS, strict=False):
            rows = table[table["dataset"] == train]
            _draw_errors(panel, rows, MAIN_LOSS, column, colour, size=9)
            found = laws[(laws["train"] == train) & (laws["task"] == task)].iloc[0]
            theta = {name: float(found[name]) for name in EQUATION_5.names}
            _draw_error_law(panel, rows, FittedCurve(EQUATION_5, theta), MAIN_LOSS, colour)
        panel.axhline(
            float(tasks["chance_error"][task]), color="grey", linewidth=0.8, linestyle=":"
        )
        low, high = table[column].min(), table[column].max()
        panel.set_ylim(low - 0.1 * (high - low) - 0.005, high + 0.1 * (high - low) + 0.005)
        panel.set_title(task, fontsize=7)
        panel.set(xlabel="", ylabel="")
        panel.tick_params(labelsize=6)
    for panel in axes[len(tasks) :]:
        panel.set_axis_off()
    figure.supxlabel("C4 eval loss (nats/token)")
    figure.supylabel("top-1 error (dotted: guessing)")
    handles = [
        Line2D([], [], color=colour, marker="o", label=label)
        for colour, label in zip(PALETTE, TRAIN_SETS.values(), strict=False)
    ]
    axes[-1].legend(handles=handles, title="trained on", loc="center", fontsize=9)
    return figure


def _reducible_losses(table: pd.DataFrame, fits: PaperFits, multipliers: Sequence[int]) -> Figure:
    figure, axes = panels(1, 3)
    for panel, train in zip(axes, TRAIN_SETS, strict=True):
        law = fits.loss[train, MAIN_LOSS]
        _draw_reducible_loss(panel, table[table["dataset"] == train], law, multipliers)
        panel.set_title(f"trained on {TRAIN_SETS[train]} (E = {law.parameters['E']:.2f})")
    colours = ScalarMappable(MULTIPLIER_NORM, MULTIPLIER_COLOURS)
    bar = figure.colorbar(colours, ax=axes, label="token multiplier M = D/N")
    bar.ax.set_yticks(multipliers, [str(m) for m in multipliers])
    bar.ax.minorticks_off()
    bar.ax.set_ylim(min(multipliers), max(multipliers))
    _explain(figure, axes[0])
    return figure


def _draw_reducible_loss(
    panel: Axes,
    rows: pd.DataFrame,
    law: FittedCurve,
    multipliers: Sequence[int],
    label: bool = False,
) -> None:
    floor = law.parameters["E"]
    fitted = in_loss_fit(rows)
    for multiplier in multipliers:
        colour = MULTIPLIER_COLOURS(MULTIPLIER_NORM(multiplier))
        part = rows[rows["token_multiplier"] == multiplier]
        _marks(panel, part, part["flops_6nd"], part[MAIN_LOSS] - floor, colour, fitted, 36)
        flops = np.geomspace(part["flops_6nd"].min() / 2, rows["flops_6nd"].max() * 2, 40)
        params = np.sqrt(flops / (6 * multiplier))
        line = law(params=params, tokens=params * multiplier) - floor
        panel.plot(flops, line, color=colour, linewidth=1, zorder=1)
        if label:
            panel.plot([], [], color=colour, label=f"M = {multiplier}")
    panel.set(xscale="log", yscale="log", xlabel="training compute 6ND (FLOPs)")
    panel.set_ylabel("C4 eval loss above E (nats/token)")
    panel.set_yticks([0.5, 1, 2, 4], ["0.5", "1", "2", "4"])
    panel.minorticks_off()


def _draw_errors(
    panel: Axes,
    rows: pd.DataFrame,
    loss: str,
    error: str,
    colour: str,
    label: str | None = None,
    size: float = 30,
) -> None:
    _marks(panel, rows, rows[loss], rows[error], colour, in_error_fit(rows), size)
    if label:
        panel.plot([], [], "o", color=colour, label=label)
    panel.set_xlabel(f"{DOWNSTREAM_LOSSES[loss]} loss (nats/token)")
    panel.set_ylabel(SPLIT_LABELS.get(error, error))
    if not panel.xaxis_inverted():
        panel.invert_xaxis()


def _draw_error_law(
    panel: Axes, rows: pd.DataFrame, law: FittedCurve, loss: str, colour: str
) -> None:
    x = np.linspace(rows[loss].min() * 0.97, rows[loss].max(), 100)
    panel.plot(x, law(loss=x), color=colour, linewidth=1, zorder=1)


def _marks(
    panel: Axes,
    rows: pd.DataFrame,
    x: pd.Series,
    y: pd.Series,
    colour: ColorType,
    fitted: pd.Series,
    size: float,
) -> None:
    """A mark for each run: its shape tells the size, its filling whether a law was fitted to it."""
    for marker, model in zip(MARKERS, SIZES, strict=False):
        for filled in (True, False):
            pick = (rows["model"] == model) & (fitted[rows.index] == filled)
            panel.scatter(
                x[pick],
                y[pick],
                s=size,
                marker=marker,
                facecolors=colour if filled else "none",
                edgecolors=colour,
                zorder=3,
            )


def _explain(figure: Figure, panel: Axes) -> None:
    """A legend of sizes, and of filled and open, below the panels."""
    handles = [
        Line2D([], [], color="black", linestyle="", marker=marker, fillstyle="none", label=label)
        for marker, label in zip(MARKERS, SIZES.values(), strict=False)
    ]
    handles.append(
        Line2D([], [], color="black", linestyle="", marker="o", label="filled: fitted, open: not")
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
