"""Gadre et al. 2024 reproduced from the released testbed: every table and figure, and beyond.

out/results.json    the numbers, the paper's, and the differences
out/tables/*.csv    the same as tables; ground_truth.csv has all 104 runs x 8 losses x 2 splits
out/plots/*.png     the figures
out/report.html     one page with all of it
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from scaling_jax import atomic
from scaling_jax.errors import UserError
from scaling_jax.report import markup
from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import gadre2024_beyond as beyond
from scaling_jax.testbeds.reproduce import gadre2024_design as design
from scaling_jax.testbeds.reproduce import gadre2024_maps as maps
from scaling_jax.testbeds.reproduce import gadre2024_page as page
from scaling_jax.testbeds.reproduce import gadre2024_plots as plots
from scaling_jax.testbeds.reproduce import gadre2024_published as paper
from scaling_jax.testbeds.reproduce import gadre2024_studies as studies
from scaling_jax.testbeds.reproduce import gadre2024_tables as tables
from scaling_jax.testbeds.reproduce import gadre2024_trends as trends
from scaling_jax.testbeds.reproduce.paper_laws import SIZES, TRAIN_SETS

RESULTS_FILE, REPORT_FILE = "results.json", "report.html"
# Runs of each train set in the release (section 3.2); C4 has too few tokens for one of them.
RUNS = {"c4_original": 34, "rpj": 35, "rw_original": 35}


@dataclasses.dataclass(frozen=True)
class Reproduction:
    """Everything that was computed.

    Attributes:
      results: the content of results.json: `table1` to `table8`, `optimal_multiplier`,
        `rank_correlation`; under `paper` and `difference` the same keys; `held_out`, `figures`,
        `beyond`, `not_improved`, `design`.
      tables: by file name, without suffix.
      figures: by file name, without suffix.
    """

    results: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    figures: dict[str, Figure]


def run(data: Path, out: Path, progress: Callable[[str], None] = lambda _: None) -> Reproduction:
    """Reproduces the paper from the release in `data` and writes everything to `out`.

    Args:
      data: the release's exp_data, or the folder that holds it.
      out: gets results.json, tables/, plots/ and report.html.
      progress: is told what is being done.

    Raises:
      UserError: something is missing in the release, or is not what it should be.
    """
    found = reproduce(data, progress)
    progress("writing")
    images = {name: markup.png(figure) for name, figure in found.figures.items()}
    for name, table in found.tables.items():
        with atomic.replacing(out / "tables" / f"{name}.csv") as temporary:
            table.to_csv(temporary, index=False)
    for name, image in images.items():
        with atomic.replacing(out / "plots" / f"{name}.png") as temporary:
            temporary.write_bytes(image)
    atomic.write_text(out / RESULTS_FILE, json.dumps(found.results, indent=1) + "\n")
    html = page.compose(found.results, found.tables, images)
    atomic.write_text(out / REPORT_FILE, html)
    return found


def reproduce(data: Path, progress: Callable[[str], None] = lambda _: None) -> Reproduction:
    """Computes every table and figure, without writing anything.

    Raises:
      UserError: as `run`.
    """
    table, tasks = published.gadre2024(data), published.gadre2024_tasks(data)
    grid = published.gadre2024_grid(data)
    _check_complete(table, data)
    progress(f"{len(table)} runs; fitting the paper's laws")
    fits = tables.fit_paper(table)
    truth = tables.ground_truth(table, fits)
    numbers = _numbers(table, grid, tasks, fits, truth)
    progress("the studies behind the figures")
    subsets = studies.compute_study(table, fits)
    of_figures = {
        "figure_08_thresholds": studies.threshold_study(table, tasks, fits),
        "figure_09_off_trend": studies.off_trend(truth),
        "figure_14_to_16_subsets": subsets,
        "figure_14_to_16_trends": studies.compute_trends(subsets),
        "figure_17_exponents": studies.exponent_study(table, fits),
        "figure_18_tasks": studies.task_study(table, tasks, fits),
    }
    progress("our predictions, with intervals (the longest part)")
    of_beyond, held_out = _beyond(table, tasks, truth)
    progress("fewer, designed runs in place of the paper's")
    of_design = {
        "design_losses": design.curves(design.study(table)),
        "design_errors": design.error_study(
            table, beyond.chance_errors(table, tasks)[tables.SPLITS[0]]
        ),
    }
    every = {
        "ground_truth": truth,
        "held_out": held_out,
        "table1": tables.table1(table),
        "table2": _beside(numbers["table2"], numbers["paper"]["table2"]),
        "table6": _beside(numbers["table6"], numbers["paper"]["table6"]),
        "table8": tables.table8(fits),
        "heat_map_cells": tables.heat_map_cells(truth),
        **of_figures,
        **of_beyond,
        **of_design,
    }
    progress("figures")
    figures = {
        "figure_01": trends.figure_1(table, fits),
        "figure_02": trends.figure_2(table, fits),
        "figure_03": trends.figure_3(table, fits),
        "figure_04": plots.figure_4(grid),
        "figure_05": maps.figure_5(truth),
        "figure_06": plots.figure_6(grid),
        "figure_07": maps.figure_7(truth),
        "figure_08": plots.figure_8(every["figure_08_thresholds"]),
        "figure_09": trends.figure_9(table, fits),
        "figure_10": maps.figure_10(truth),
        "figure_11": maps.figure_11(truth),
        "figure_12": maps.figure_12(truth),
        "figure_13": trends.figure_13(table),
        "figure_14": plots.figure_14(subsets),
        "figure_15": plots.figure_15(subsets),
        "figure_16": plots.figure_16(subsets),
        "figure_17": plots.figure_17(every["figure_17_exponents"]),
        "figure_18": trends.figure_18(table, tasks, every["figure_18_tasks"]),
        "beyond": plots.beyond(held_out, beyond.LEVEL),
        "design": plots.design(every["design_losses"], every["design_errors"]),
    }
    results = numbers | {
        "table1": _rows(every["table1"]),
        "table8": _rows(every["table8"]),
        "heat_map_cells": _rows(every["heat_map_cells"]),
        "held_out": _rows(held_out),
        "figures": {name: _rows(rows) for name, rows in of_figures.items()},
        "beyond": {name: _rows(rows) for name, rows in of_beyond.items()},
        "not_improved": beyond.not_improved(of_beyond["beyond_losses"], of_beyond["beyond_errors"]),
        "level": beyond.LEVEL,
        "design": {
            **{name.removeprefix("design_"): _rows(rows) for name, rows in of_design.items()},
            "verdict": design.verdict(every["design_losses"], every["design_errors"]),
        },
    }
    return Reproduction(results, every, figures)


def _check_complete(table: pd.DataFrame, data: Path) -> None:
    """Raises a UserError if the release is not the one that the paper describes."""
    found = table["dataset"].value_counts().to_dict()
    for train, count in RUNS.items():
        if found.get(train, 0) != count:
            raise UserError(f"{data}: {found.get(train, 0)} runs on {train}, the paper has {count}")
    unknown = sorted(set(map(str, table["model"])) - set(SIZES))
    if unknown:
        raise UserError(f"{data}: model {unknown[0]} is not in the paper's testbed")


def _numbers(
    table: pd.DataFrame,
    grid: pd.DataFrame,
    tasks: pd.DataFrame,
    fits: tables.PaperFits,
    truth: pd.DataFrame,
) -> dict[str, Any]:
    """Tables and single numbers, the paper's under `paper`, ours - theirs under `difference`."""
    table6 = tables.table6(fits)
    ours = {
        "table2": tables.table2(table, fits),
        "table4": tables.table4(grid),
        "table5": {"tasks": len(tasks)},
        "table6": table6,
        "optimal_multiplier": {
            train: tables.optimal_multiplier(table6[train]) for train in TRAIN_SETS
        },
        "rank_correlation": tables.rank_correlation(truth),
    }
    theirs = {
        "table2": {
            train: {name: row._asdict() for name, row in rows.items()}
            for train, rows in paper.TABLE2.items()
        },
        "table4": paper.TABLE4,
        "table5": paper.TABLE5,
        "table6": paper.TABLE6,
        "optimal_multiplier": paper.OPTIMAL_MULTIPLIER,
        "rank_correlation": {"spearman": paper.RANK_CORRELATION},
    }
    return ours | {"paper": theirs, "difference": tables.differences(ours, theirs)}


def _beyond(
    table: pd.DataFrame, tasks: pd.DataFrame, truth: pd.DataFrame
) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Our predictions: comparisons of recipes and coverage, and the table of held-out runs."""
    fits = beyond.fit_losses(table)
    losses = beyond.predict_losses(table, fits)
    chance = beyond.chance_errors(table, tasks)
    errors = pd.concat(
        [
            beyond.predict_errors(table, fits, losses, chance, "with_1b"),
            beyond.predict_errors(table, fits, losses, chance, "without_1b", [tables.MAIN_LOSS]),
        ],
        ignore_index=True,
    )
    found = {
        "beyond_losses": beyond.compare_losses(table, losses),
        "beyond_errors": beyond.compare_errors(truth, errors, table),
        "beyond_coverage": beyond.coverage(losses, errors, table),
        "beyond_error_predictions": errors,
        "beyond_tasks": beyond.predict_tasks(table, tasks),
    }
    return found, beyond.held_out_table(truth, losses, errors)


def _beside(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> pd.DataFrame:
    """Nested numbers as rows: their keys, ours, the paper's, the difference."""

    def walk(keys: tuple[str, ...], a: Any, b: Any) -> list[dict[str, Any]]:
        if isinstance(a, Mapping):
            return [row for key in a for row in walk((*keys, key), a[key], b[key])]
        named = {f"key {place}": key for place, key in enumerate(keys, start=1)}
        return [{**named, "ours": a, "paper": b, "difference": a - b}]

    return pd.DataFrame(walk((), ours, theirs))


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table as JSON rows."""
    return json.loads(table.to_json(orient="records", double_precision=12))
