"""How well the mean over the tasks that count is predicted, for every margin above chance."""

import pandas as pd
from matplotlib.figure import Figure

from scaling_jax.report.style import MARKERS, PALETTE, SMALL_LETTERS, column_panels


def margin_plot(swept: pd.DataFrame) -> Figure:
    """Left the law's relative error and the interval (bar), right how many tasks count.

    Source: Gadre et al. 2024, figure 8. `swept` comes from `predictability.sweep`.
    """
    figure, (left, right) = column_panels(1, 2)
    datasets = swept["dataset"].nunique()
    for place, (dataset, rows) in enumerate(swept.groupby("dataset", sort=True)):
        colour, marker = PALETTE[place % len(PALETTE)], MARKERS[place % len(MARKERS)]
        if "off" in rows:
            # Side by side, so that no interval hides another one.
            x = 100 * rows["margin"] + 0.7 * (place - (datasets - 1) / 2)
            left.vlines(x, 100 * rows["off_low"], 100 * rows["off_high"], color=colour, alpha=0.5)
            left.plot(x, 100 * rows["off"], marker, color=colour, ms=4, label=str(dataset))
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="margin above chance (points)", ylabel="predicted / measured − 1 (%)")
    if "off" in swept:
        figure.legend(loc="outside upper left", ncols=4, fontsize=SMALL_LETTERS, frameon=False)
    counts = swept.drop_duplicates("margin")
    right.step(100 * counts["margin"], counts["tasks"], where="mid", color=PALETTE[0])
    right.plot(100 * counts["margin"], counts["tasks"], "o", ms=4, color=PALETTE[0])
    right.set(xlabel="margin above chance (points)", ylabel="tasks that count", ylim=(0, None))
    return figure
