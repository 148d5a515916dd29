"""Figures 4, 6, 8 and 14 to 17 of Gadre et al. 2024, our predictions, and designed sets of runs."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_jax.report.style import MARKERS, PALETTE, compute_axis, panels
from scaling_jax.testbeds.reproduce import gadre2024_design as designs
from scaling_jax.testbeds.reproduce import gadre2024_published as paper
from scaling_jax.testbeds.reproduce import gadre2024_studies as studies
from scaling_jax.testbeds.reproduce.gadre2024_tables import MAIN_LOSS, SPLITS
from scaling_jax.testbeds.reproduce.paper_laws import SIZES, TRAIN_SETS

COMPUTE = "training compute 6ND (FLOPs)"
SEQUENCE_LENGTH = 2048


def figure_4(grid: pd.DataFrame) -> Figure:
    """Search, filter, fit: the grid search, its frontier, and laws through frontier and selected.

    Bands are 95 % pairs bootstraps.
    """
    figure, axes = panels(1, 3)
    for panel in axes:
        panel.set(xscale="log", yscale="log", xlabel=COMPUTE)
        panel.set_yticks([2, 3, 4, 5, 6], ["2", "3", "4", "5", "6"])
        panel.minorticks_off()
    axes[0].set_ylabel("OpenLM eval loss (nats/token)")
    best = studies.filtered_frontier(grid)
    chosen = studies.selected(grid)
    axes[0].scatter(grid["flops_6nd"], grid["loss/openlm"], s=8, color=PALETTE[0])
    axes[0].set_title(f"search: {len(grid)} models")
    _band(axes[1])
    edge = studies.frontier(grid)
    left_out = edge[~edge["run"].isin(best["run"])]
    axes[1].scatter(
        left_out["flops_6nd"], left_out["loss/openlm"], s=18, marker="x", color=PALETTE[5]
    )
    axes[1].scatter(best["flops_6nd"], best["loss/openlm"], s=18, color=PALETTE[0])
    axes[1].set_title("filter: the frontier (crosses: left out)")
    flops = np.geomspace(1e16, 1e22, 60)
    for rows, colour, style, label in (
        (best, PALETTE[0], "-", "frontier"),
        (chosen, PALETTE[1], "--", "four selected models"),
    ):
        law, low, high = studies.fit_with_bootstrap(rows, flops)
        axes[2].fill_between(flops, low, high, color=colour, alpha=0.25, linewidth=0)
        axes[2].plot(flops, law(flops_6nd=flops), style, color=colour, label=label)
    axes[2].scatter(
        chosen["flops_6nd"], chosen["loss/openlm"], marker="*", s=90, color=PALETTE[1], zorder=3
    )
    axes[2].legend(fontsize=8)
    axes[2].set_title("fit: E + c C$^{-\\eta}$")
    return figure


def figure_6(grid: pd.DataFrame) -> Figure:
    """The grid search by number of optimisation steps: all models, and the frontier."""
    figure, axes = panels(1, 2, (5.0, 4.0))
    steps = grid["tokens"] / (grid["batch_sequences"] * SEQUENCE_LENGTH)
    for panel, rows, title in (
        (axes[0], grid, "all models"),
        (axes[1], studies.frontier(grid), "frontier"),
    ):
        _band(panel)
        drawn = panel.scatter(
            rows["flops_6nd"],
            rows["loss/openlm"],
            c=steps[rows.index],
            s=16,
            cmap="viridis",
            vmin=0,
            vmax=steps.max(),
        )
        panel.set(xscale="log", yscale="log", xlabel=COMPUTE, title=title)
        panel.set_yticks([3, 4, 5], ["3", "4", "5"])
        panel.minorticks_off()
    axes[0].set_ylabel("OpenLM eval loss (nats/token)")
    figure.colorbar(drawn, ax=axes, label="optimisation steps")
    return figure


def figure_8(study: pd.DataFrame) -> Figure:
    """Error at 6.9B, 138B tokens, against the margin above chance that tasks need."""
    figure, axes = panels(1, 2, (4.6, 3.8))
    for panel, column, label in (
        (axes[0], "threshold_percent", "margin above chance needed at 0.154B (points)"),
        (axes[1], "excluded", "tasks left out (of 46)"),
    ):
        for place, (train, name) in enumerate(TRAIN_SETS.items()):
            rows = study[study["train"] == train]
            panel.plot(
                rows[column],
                rows["error_percent"],
                marker=MARKERS[place],
                color=PALETTE[place],
                label=name,
            )
        panel.set(yscale="log", xlabel=label)
        panel.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
        panel.grid(alpha=0.3)
    axes[0].set_ylabel("relative error (%)")
    axes[0].legend(fontsize=8, title="trained on")
    return figure


def figure_14(study: pd.DataFrame) -> Figure:
    """C4 eval loss at 1.4B, M = 640: error against compute and number of the fitted runs."""
    figure, axes = panels(1, 2, (4.6, 3.8))
    rows = study[study["target"] == "1.4B, M = 640"]
    _draw_study(axes[0], rows, "loss_flops", "loss_percent", logarithmic=True)
    _draw_study(axes[1], rows, "loss_points", "loss_percent", logarithmic=False)
    axes[0].set(xlabel="compute of the fitted runs (FLOPs)", ylabel="relative error, loss (%)")
    axes[1].set(xlabel="number of fitted runs")
    axes[0].legend(fontsize=8)
    return figure


def figure_15(study: pd.DataFrame) -> Figure:
    """Loss and 17-task error at 1.4B, M = 640, against the compute of the fitted runs."""
    return _loss_and_error(study, "1.4B, M = 640")


def figure_16(study: pd.DataFrame) -> Figure:
    """Loss and 17-task error at 6.9B, M = 20, against the compute of the fitted runs."""
    return _loss_and_error(study, "6.9B, M = 20")


def figure_17(study: pd.DataFrame) -> Figure:
    """The exponent of the reducible loss in compute against the token multiplier."""
    figure, (panel,) = panels(1, 1, (5.2, 4.0))
    for place, (train, name) in enumerate(TRAIN_SETS.items()):
        rows = study[study["train"] == train]
        panel.scatter(
            rows["token_multiplier"],
            rows["eta"],
            marker=MARKERS[place],
            color=PALETTE[place],
            label=name,
        )
    x = np.geomspace(20, 640, 40)
    trend, low, high = studies.exponent_trend(study, x)
    panel.plot(x, trend, color="black", linewidth=1, label="trend, 95 % bootstrap")
    panel.fill_between(x, low, high, color="grey", alpha=0.3, linewidth=0)
    panel.set(xscale="log", xlabel="token multiplier M", ylabel="scaling exponent η")
    panel.set_xticks(studies.MULTIPLIERS, [str(m) for m in studies.MULTIPLIERS])
    panel.minorticks_off()
    panel.set_ylim(paper.EXPONENT_RANGE)
    panel.legend(fontsize=8)
    return figure


def beyond(held_out: pd.DataFrame, level: float) -> Figure:
    """Our predictions with intervals and the paper's, relative to what was measured.

    `held_out` comes from `gadre2024_beyond.held_out_table`.
    """
    figure, axes = panels(1, 3, (4.6, 4.4))
    rows = held_out[held_out["loss"] == MAIN_LOSS]
    cases = (
        ("loss", SPLITS[0], "C4 eval loss"),
        ("error", SPLITS[0], "error, 46 tasks"),
        ("error", SPLITS[1], "error, 17 tasks"),
    )
    for panel, (kind, split, title) in zip(axes, cases, strict=True):
        part = rows[rows["split"] == split]
        if kind == "error":
            part = part[~part["in_error_fit"]]
        measured = part[f"{kind}_measured"]
        place = np.arange(len(part))
        low, high, ours, theirs = (
            100 * (part[f"{kind}_{name}"] / measured - 1)
            for name in ("ours_low", "ours_high", "ours", "paper")
        )
        panel.hlines(place, low, high, color=PALETTE[0], linewidth=4, alpha=0.35)
        panel.plot(ours, place, "o", color=PALETTE[0], label=f"ours, {level:.0%} interval")
        panel.plot(theirs, place, "D", color=PALETTE[5], fillstyle="none", label="the paper's")
        panel.axvline(0, color="black", linewidth=1)
        labels = [
            f"{TRAIN_SETS[row['train']]}, {SIZES[row['model']]}, M={row['token_multiplier']:.0f}"
            for _, row in part.iterrows()
        ]
        panel.set_yticks(place, labels, fontsize=7)
        panel.invert_yaxis()
        panel.set(xlabel="prediction relative to measurement (%)", title=title)
        panel.grid(axis="x", alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    return figure


def design(of_loss: pd.DataFrame, of_error: pd.DataFrame) -> Figure:
    """Error of designed, the paper's and random sets against what they cost.

    `of_loss` comes from `gadre2024_design.curves`, `of_error` from `gadre2024_design.error_study`.
    """
    figure, axes = panels(1, 3, (4.2, 3.8))
    losses = of_loss[of_loss["targets"] == designs.MAIN_TARGETS]
    theirs = losses[(losses["chosen_by"] == designs.PAPER) & (losses["law"] == designs.LAW)]
    for panel, law in zip(axes, (designs.LAW, designs.BAYES), strict=False):
        part = losses[losses["law"] == law].sort_values("flops")
        random = part[part["chosen_by"] == designs.RANDOM]
        panel.fill_between(
            random["flops"],
            random["low"],
            random["high"],
            color=PALETTE[1],
            alpha=0.3,
            linewidth=0,
            label="random sets, quartiles",
        )
        panel.plot(random["flops"], random["percent"], "--", color=PALETTE[1], label="median")
        _draw_sets(panel, part, theirs)
        panel.set_title(f"C4 eval loss, {law}")
    ours = of_error["recipe"] == "ours"
    _draw_sets(axes[2], of_error[ours], of_error[~ours])
    axes[2].set_title("46-task error")
    axes[0].set_ylabel("mean relative error, large runs (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
    return figure


def _draw_sets(panel: Axes, rows: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Designed sets and the paper's under one law, and a line at what the paper itself reached."""
    for chosen_by, style, colour, label in (
        (designs.DESIGNED, "o-", PALETTE[0], "designed sets"),
        (designs.PAPER, "D", PALETTE[5], "the paper's set"),
    ):
        part = rows[rows["chosen_by"] == chosen_by]
        panel.plot(part["flops"], part["percent"], style, color=colour, label=label)
    reached, cost = float(theirs["percent"].iloc[0]), float(theirs["flops"].iloc[0])
    panel.axhline(reached, color="black", linewidth=1, linestyle=":", label="the paper's error")
    panel.axvline(cost / 2, color="grey", linewidth=1, linestyle="-.", label="half its compute")
    compute_axis(panel)
    panel.set(yscale="log", xlabel="compute of the fitted runs 6ND (FLOPs)")
    panel.set_ylim(1, 25)
    panel.set_yticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    panel.set_yticks([], minor=True)


def _loss_and_error(study: pd.DataFrame, target: str) -> Figure:
    figure, axes = panels(1, 2, (4.6, 3.8))
    rows = study[study["target"] == target]
    for panel, kind, label in ((axes[0], "loss", "C4 eval loss"), (axes[1], "error", "17 tasks")):
        _draw_study(panel, rows, f"{kind}_flops", f"{kind}_percent", logarithmic=True)
        panel.set(
            xlabel="compute of the fitted runs (FLOPs)",
            ylabel=f"relative error, {label} (%)",
            title=f"RedPajama, {target}",
        )
    axes[0].legend(fontsize=8)
    return figure


def _draw_study(panel: Axes, rows: pd.DataFrame, x: str, y: str, *, logarithmic: bool) -> None:
    drawn, default = rows[~rows["default"]], rows[rows["default"]]
    inside = drawn[drawn[y] <= 100]
    panel.scatter(inside[x], inside[y], s=12, color=PALETTE[5], alpha=0.6, label="subsets")
    panel.scatter(
        default[x],
        default[y],
        s=130,
        marker="*",
        color=PALETTE[0],
        zorder=3,
        label="table 1's runs",
    )
    ends = np.array([drawn[x].min(), drawn[x].max()])
    if logarithmic:
        slope, level = studies.log_line(np.log10(drawn[x]), drawn[y])
        line = 10 ** (level + slope * np.log10(ends))
        panel.set_xscale("log")
    else:
        slope, level = studies.log_line(drawn[x], drawn[y])
        line = 10 ** (level + slope * ends)
    panel.plot(ends, line, color="black", linewidth=1, label="trend")
    panel.set_yscale("log")
    panel.set_ylim(0.01, 120)
    panel.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])


def _band(panel: Axes) -> None:
    """Marks the range of compute that the paper left out of the search."""
    panel.axvspan(*paper.GRID_EXCLUDED_FLOPS, color="grey", alpha=0.2, linewidth=0)
