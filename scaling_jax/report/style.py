"""Colours, marks and sizes of every figure, chosen so that colour is never the only difference."""

import math
from collections.abc import Callable, Collection

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

# Okabe and Ito's colours, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Numbers in order: light means large. The last tenth of the map is too pale on white.
ORDERED = colormaps["viridis"]
PALEST = 0.9

COMPUTE = "training compute 6ND (FLOPs)"
PANEL_INCHES = 4.2
# A column of a two-column paper, with letters that can be read there.
COLUMN_INCHES = 3.5
LETTERS, SMALL_LETTERS = 8, 7


def panels(
    rows: int, columns: int, inches: tuple[float, float] = (PANEL_INCHES, PANEL_INCHES)
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` panels, each of so many inches (width, height), row by row."""
    size = (inches[0] * columns, inches[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def column_panels(
    rows: int = 1, columns: int = 1, height: float = 2.7
) -> tuple[Figure, list[Axes]]:
    """Panels as wide as a paper's column each, `height` inches high, with small letters."""
    figure, axes = panels(rows, columns, (COLUMN_INCHES, height))
    for panel in axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=SMALL_LETTERS)
        for label in (panel.xaxis.label, panel.yaxis.label):
            label.set_fontsize(LETTERS)
    return figure, axes


def compute_axis(axes: Axes) -> None:
    """Makes x training compute, logarithmic; call it once everything is drawn."""
    axes.set(xscale="log", xlabel=COMPUTE)
    label_between(axes.xaxis, _power_of_ten, within_a_decade=(2, 5))


def label_between(
    axis: Axis, text: Callable[[float], str], *, within_a_decade: Collection[int]
) -> None:
    """Labels ticks between powers of ten, where a logarithmic axis has few of these.

    Under a decade those digits are labelled that `within_a_decade` names, under 2.5 decades the 3s.
    """
    low, high = sorted(axis.get_view_interval())
    digits = within_a_decade if high / low < 10 else (3,) if high / low < 300 else ()

    def label(x: float, _: object) -> str:
        digit = x / 10 ** math.floor(math.log10(x))
        return text(x) if any(abs(digit - wanted) < 0.01 for wanted in digits) else ""

    axis.set_minor_formatter(FuncFormatter(label))


def _power_of_ten(x: float) -> str:
    exponent = math.floor(math.log10(x))
    return rf"$\mathdefault{{{x / 10**exponent:.0f}{{\times}}10^{{{exponent}}}}}$"
