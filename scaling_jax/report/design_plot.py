"""The figure of a design: what the chosen runs buy, and what every candidate would.

from scaling_jax.report import design_plot
design_plot.figure(laws.next_runs(fit, target=.., budget_flops=1e20)).savefig("next.png")
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from scaling_jax.laws import Design
from scaling_jax.report.style import ORDERED, PALETTE, SMALL_LETTERS, column_panels

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
# Candidates that teach less than this share of the most informative one are drawn alike.
FAINTEST = 1e-4
# A narrowing that is nothing, for a logarithmic scale.
LEAST = 1e-9


def figure(design: Design) -> Figure:
    """Half width of the target's interval against compute spent, and a map of the candidates.

    Left: the chosen runs, cheapest first. Right: candidates by params and tokens, coloured by how
    much each alone would narrow the interval, ln(half width before / after), for every FLOP it
    costs; the chosen ones are ringed and numbered as on the left.
    """
    drawn, (left, right) = column_panels(1, 2, height=3.0)
    _draw_curve(left, design)
    _draw_map(drawn, right, design)
    return drawn


def _draw_curve(axes: Axes, design: Design) -> None:
    spent = design.runs["flops_6nd"].cumsum().to_numpy(float)
    widths = 100 * design.runs["half_width"].to_numpy(float)
    axes.axhline(100 * design.before, color="black", linewidth=1, linestyle=":", label="before")
    axes.plot(spent, widths, "o-", color=PALETTE[0], linewidth=1, markersize=5, label="after")
    for place, (x, y) in enumerate(zip(spent, widths, strict=True), start=1):
        axes.annotate(
            f"{place}",
            (x, y),
            (3, 3),
            textcoords="offset points",
            fontsize=SMALL_LETTERS,
        )
    axes.set(xscale="log", xlabel="compute of the new runs, cumulative 6ND (FLOPs)")
    axes.set_ylabel("expected half width of the interval (%)")
    axes.set_ylim(0, 110 * design.before)
    axes.legend(fontsize=SMALL_LETTERS, frameon=False)


def _draw_map(drawn: Figure, axes: Axes, design: Design) -> None:
    table = design.candidates
    narrowing = np.log(design.before / table["half_width"].to_numpy(float))
    per_flop = np.maximum(narrowing, LEAST) / table["flops_6nd"].to_numpy(float)
    most = per_flop.max()
    norm = LogNorm(max(per_flop.min(), FAINTEST * most), most * 1.0001)
    points = axes.scatter(
        table["params"], table["tokens"], c=per_flop, norm=norm, cmap=ORDERED, s=26, marker="s"
    )
    axes.scatter(
        design.runs["params"],
        design.runs["tokens"],
        s=70,
        facecolors="none",
        edgecolors=PALETTE[5],
        linewidths=1.5,
    )
    for place, (x, y) in enumerate(design.runs[["params", "tokens"]].to_numpy(float), start=1):
        axes.annotate(
            f"{place}", (x, y), (5, -8), textcoords="offset points", fontsize=SMALL_LETTERS
        )
    axes.set(xscale="log", yscale="log", xlabel="params N", ylabel="tokens D")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    bar = drawn.colorbar(points, ax=axes)
    bar.set_label("narrowing per compute, ln(before/after) (1/FLOP)", fontsize=SMALL_LETTERS)
    bar.ax.tick_params(labelsize=SMALL_LETTERS)


def _short(value: float) -> str:
    """A count with a letter for its thousands: 1e9 is 1B."""
    for unit, letter in UNITS:
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"
