"""Colours and marks of every figure, chosen so that colour is never the only difference."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which people with any colour vision can tell apart.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

PANEL_INCHES = 4.2


def panels(
    rows: int, columns: int, inches: tuple[float, float] = (PANEL_INCHES, PANEL_INCHES)
) -> tuple[Figure, list[Axes]]:
    """A figure of `rows` x `columns` panels, each of so many inches (width, height), row by row."""
    size = (inches[0] * columns, inches[1] * rows)
    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())
