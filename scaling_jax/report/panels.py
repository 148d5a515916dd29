"""Single panels that several figures share: each draws into axes that it is given.

Runs that a law was fitted to are filled, runs that it never saw are open.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from scaling_jax import records
from scaling_jax.laws import Form
from scaling_jax.report.style import (
    MARKERS,
    ORDERED,
    PALEST,
    PALETTE,
    compute_axis,
    label_between,
)

# More token multipliers than this are put together before they are drawn.
MOST_GROUPS = 8


def reducible_loss(
    axes: Axes,
    rows: pd.DataFrame,
    known: Bool[np.ndarray, "n"],
    target: str,
    form: Form,
    parameters: Mapping[str, float],
    norm: Normalize,
) -> None:
    """Loss above the law's E against compute, a line a token multiplier; `known`: fitted rows.

    Source: Gadre et al. 2024, figure 2: under eq. 4 runs of equal M lie on parallel lines.
    """
    floor = parameters["E"]
    flops = np.geomspace(rows["flops_6nd"].min() / 1.3, rows["flops_6nd"].max() * 1.3, 50)
    groups = together(rows["token_multiplier"].to_numpy(float))
    for multiplier in np.unique(groups):
        part = rows[groups == multiplier]
        fitted = known[groups == multiplier]
        colour = ORDERED(PALEST * norm(multiplier))
        params = np.sqrt(flops / (6 * multiplier))
        line = form.curve(parameters, params=params, tokens=flops / (6 * params)) - floor
        axes.plot(flops, line, color=colour, linewidth=1, label=f"M = {multiplier:g}")
        above = part[target] - floor
        axes.scatter(part["flops_6nd"][fitted], above[fitted], color=colour, s=22, zorder=3)
        axes.scatter(
            part["flops_6nd"][~fitted],
            above[~fitted],
            facecolors="white",
            edgecolors=[colour],
            linewidths=1.4,
            marker="D",
            s=22,
            zorder=3,
        )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    label_between(axes.yaxis, "{:.3g}".format, within_a_decade=range(1, 10))
    compute_axis(axes)


def multiplier_norm(multipliers: "pd.Series[float]") -> LogNorm:
    """Where token multipliers lie on the ordered colours."""
    low, high = float(multipliers.min()), float(multipliers.max())
    return LogNorm(low, high if high > low else 2 * low)


def runs_by_model(
    axes: Axes, rows: pd.DataFrame, known: Bool[np.ndarray, "n"], x: str, y: str
) -> None:
    """Runs with a mark for each model size; `known` says which rows a law was fitted to."""
    models = list(dict.fromkeys(rows.sort_values("params")["model"]))
    for place, model in enumerate(models):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        of_model = (rows["model"] == model).to_numpy()
        fitted, other = rows[of_model & known], rows[of_model & ~known]
        if len(fitted):
            axes.scatter(
                fitted[x], fitted[y], color=colour, marker=marker, s=26, zorder=3, label=str(model)
            )
        axes.scatter(
            other[x],
            other[y],
            facecolors="none",
            edgecolors=colour,
            marker=marker,
            s=42,
            zorder=3,
            label=None if len(fitted) else f"{model} (held out)",
        )


def error_map(
    axes: Axes,
    cells: Float[np.ndarray, "rows columns"],
    boxed: Bool[np.ndarray, "rows columns"],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    scale: ScalarMappable,
    *,
    text: str = "{:.1f}",
    letters: float = 8,
) -> None:
    """A heat map of relative errors in percent, the first row on top; NaN is left empty.

    The colour is of the size, the number has the sign if `text` shows it; `boxed` cells are framed.
    """
    largest = scale.get_clim()[1] or 1.0
    for (y, x), value in np.ndenumerate(cells):
        if np.isnan(value):
            continue
        colour = scale.to_rgba(abs(value))
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
        ink = "white" if abs(value) > 0.6 * largest else "black"
        # + 0.0 turns a rounded -0.0 into 0.0; a minus sign is longer than a hyphen.
        shown = text.format(round(value, 1) + 0.0).replace("-", "−")
        axes.text(x, y, shown, ha="center", va="center", color=ink, fontsize=letters)
        if boxed[y, x]:
            box = Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False)
            box.set(edgecolor=PALETTE[1], linewidth=2, zorder=3)
            axes.add_patch(box)
    axes.set_xlim(-0.5, len(column_labels) - 0.5)
    axes.set_ylim(len(row_labels) - 0.5, -0.5)
    axes.set_xticks(range(len(column_labels)), column_labels)
    axes.set_yticks(range(len(row_labels)), row_labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def error_scale(largest: float) -> ScalarMappable:
    """Colours for relative errors from 0 to `largest` percent."""
    return ScalarMappable(Normalize(0, largest), colormaps["Blues"])


def together(values: Float[np.ndarray, "n"], most: int = MOST_GROUPS) -> Float[np.ndarray, "n"]:
    """Each value's group, named by a value: to 2 digits, or `most` equal steps of the logarithm."""
    rounded = np.array([float(f"{value:.2g}") for value in values])
    if len(np.unique(rounded)) <= most:
        return rounded
    low, high = np.log(values.min()), np.log(values.max())
    place = np.minimum((most * (np.log(values) - low) / (high - low)).astype(int), most - 1)
    centre = np.exp(low + (place + 0.5) * (high - low) / most)
    return np.array([float(f"{value:.2g}") for value in centre])


def held_out_rows(
    held_out: pd.DataFrame | None, known: pd.DataFrame, columns: list[str]
) -> pd.DataFrame:
    """The held-out runs that have `columns`; none is an empty table like `known`."""
    if held_out is None or held_out.empty:
        return known[:0]
    rows = records.check(held_out, source="held-out runs")
    records.require(rows, columns, source="held-out runs")
    return rows.dropna(subset=columns)


def labelled(column: str) -> str:
    """A column with its unit: nats per token for losses; an error is a share."""
    unit = " (nats/token)" if column.startswith("loss/") else ""
    return column + unit
