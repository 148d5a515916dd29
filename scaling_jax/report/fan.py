"""The fan chart of a law: its line against compute, and intervals that widen beyond the runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from scaling_jax.errors import UserError
from scaling_jax.laws import Chained, Fit
from scaling_jax.report import panels
from scaling_jax.report.style import (
    COLUMN_INCHES,
    LETTERS,
    PALETTE,
    SMALL_LETTERS,
    column_panels,
    compute_axis,
)

LEVELS = (0.5, 0.8, 0.9)
LAW, HELD_OUT, OTHERS = PALETTE[0], PALETTE[5], "#AAAAAA"
FAN_ALPHA = 0.2
# Runs within this factor of a token multiplier belong to it.
SAME_MULTIPLIER = 1.3
MOST_FANS = 2


def prediction_fan(
    fit: Fit | Chained,
    *,
    token_multipliers: Sequence[float] | None = None,
    levels: Sequence[float] = LEVELS,
    held_out: pd.DataFrame | None = None,
    until: float | None = None,
) -> Figure:
    """The law against compute with its intervals beyond the fitted runs, a panel a multiplier.

    The fan opens where the fitted runs of about that multiplier end; without any, it is everywhere.

    Args:
      fit: a law of params and tokens or of flops_6nd, or a chain from these to an error.
      token_multipliers: D/N of the panels; by default the 2 that most held-out runs have
        or, without any, the one that most fitted runs have.
      levels: of the intervals, each a shade.
      held_out: records of runs that the law was not fitted to, with the fitted column.
      until: training compute (6ND, FLOPs) that the figure ends at; by default beyond all runs.

    Raises:
      UserError: a law of other inputs, a wrong level or multiplier, or a fault in `held_out`.
    """
    law, last = (fit.loss, fit.error) if isinstance(fit, Chained) else (fit, fit)
    known, target = last.observations.table, last.target
    if not set(law.form.inputs) <= {"params", "tokens", "flops_6nd"}:
        raise UserError(
            f"prediction_fan: needs a law of params and tokens; '{law.form.name}' reads "
            f"{', '.join(law.form.inputs)}"
        )
    beyond = panels.held_out_rows(held_out, known, [target])
    end = until or 2 * max(5 * known["flops_6nd"].max(), *beyond["flops_6nd"], 0.0)
    start = known["flops_6nd"].min() / 2
    chosen = list(token_multipliers or _main_multipliers(known, beyond))
    if not all(multiplier > 0 for multiplier in chosen):
        raise UserError(f"prediction_fan: token multipliers are positive, not {chosen}")
    figure, axes = column_panels(1, len(chosen))
    for panel, multiplier in zip(axes, chosen, strict=True):
        own, others = _at_multiplier(known, multiplier)
        opens = own["flops_6nd"].max() if len(own) else start
        _draw_law(panel, fit, multiplier, (start, opens, end), levels)
        for rows, colour, size, label in (
            (others, OTHERS, 9, "fitted runs, other M"),
            (own, LAW, 20, "fitted runs"),
        ):
            if len(rows):
                x, y = rows["flops_6nd"], rows[target]
                panel.scatter(x, y, color=colour, s=size, zorder=3, label=label)
        _diamonds(panel, _at_multiplier(beyond, multiplier)[0], target)
        compute_axis(panel)
        panel.set_title(f"M = D/N = {multiplier:g}", fontsize=LETTERS)
    _share_y(axes)
    axes[0].set_ylabel(panels.labelled(target))
    shades = [
        Patch(color=LAW, alpha=1 - (1 - FAN_ALPHA) ** place, linewidth=0, label=f"{level:.0%}")
        for place, level in enumerate(sorted(levels, reverse=True), start=1)
    ]
    _legend_below(figure, axes, shades[::-1])
    return figure


def _draw_law(
    axes: Axes,
    fit: Fit | Chained,
    multiplier: float,
    flops: tuple[float, float, float],
    levels: Sequence[float],
) -> None:
    """The law from the first to the last of `flops`, its fan from the second on."""
    start, opens, end = flops
    law = fit.loss if isinstance(fit, Chained) else fit
    ahead = np.geomspace(opens, end, 60)
    for level in sorted(levels, reverse=True):
        found = fit.predict(level=level, **_inputs(law, ahead, multiplier))
        axes.fill_between(ahead, found.low, found.high, color=LAW, alpha=FAN_ALPHA, linewidth=0)
    whole = np.geomspace(start, end, 80)
    line = fit.predict(**_inputs(law, whole, multiplier)).value
    axes.plot(whole, line, color=LAW, linewidth=1.2, label="law")


def _inputs(law: Fit, flops: Float[np.ndarray, "m"], multiplier: float) -> dict[str, Any]:
    """What `law` reads at runs of such compute and token multiplier."""
    params = np.sqrt(flops / (6 * multiplier))
    known = {"params": params, "tokens": params * multiplier, "flops_6nd": flops}
    return {name: known[name] for name in law.form.inputs}


def _main_multipliers(known: pd.DataFrame, beyond: pd.DataFrame) -> list[float]:
    """The token multipliers that most runs have, smallest first."""
    rows, most = (beyond, MOST_FANS) if len(beyond) else (known, 1)
    groups, counts = np.unique(
        panels.together(rows["token_multiplier"].to_numpy(float)), return_counts=True
    )
    return sorted(map(float, groups[np.argsort(-counts, kind="stable")[:most]]))


def _at_multiplier(rows: pd.DataFrame, multiplier: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows at a token multiplier, and the others."""
    distance = np.abs(np.log(rows["token_multiplier"].to_numpy(float) / multiplier))
    own = distance <= np.log(SAME_MULTIPLIER)
    return rows[own], rows[~own]


def _diamonds(axes: Axes, rows: pd.DataFrame, target: str) -> None:
    if len(rows):
        axes.scatter(
            rows["flops_6nd"],
            rows[target],
            facecolors="white",
            edgecolors=HELD_OUT,
            linewidths=1.4,
            marker="D",
            s=26,
            zorder=4,
            label="held-out runs, measured",
        )


def _share_y(axes: Sequence[Axes]) -> None:
    limits = [panel.get_ylim() for panel in axes]
    for panel in axes:
        panel.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))


def _legend_below(figure: Figure, axes: Sequence[Axes], more: Sequence[Patch]) -> None:
    found = {
        label: handle
        for panel in axes
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    handles = [*found.values(), *more]
    labels = [*found, *(f"{patch.get_label()} interval" for patch in more)]
    columns = 2 if figure.get_figwidth() <= COLUMN_INCHES else 4
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=SMALL_LETTERS,
        frameon=False,
    )
