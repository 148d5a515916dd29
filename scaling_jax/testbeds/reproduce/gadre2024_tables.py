"""The tables of Gadre et al. 2024, computed from the released runs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import gadre2024_published as paper
from scaling_jax.testbeds.reproduce.paper_laws import (
    EQUATION_4,
    EQUATION_5,
    MODEL_7B,
    SIZES,
    TRAIN_SETS,
    FittedCurve,
    Problem,
    error_rows,
    fit_many,
    in_error_fit,
    in_loss_fit,
    loss_rows,
    percent_off,
)

LOSSES = tuple(f"loss/{name}" for name in published.VALIDATION_SETS.values())
MAIN_LOSS = "loss/c4_val"
SPLITS = published.AVERAGES


@dataclasses.dataclass(frozen=True)
class PaperFits:
    """The 24 + 48 fits of the paper: train set x validation loss, and x split.

    Attributes:
      loss: eq. 4 by (train set, loss column).
      error: eq. 5 by (train set, loss column, error column).
    """

    loss: Mapping[tuple[str, str], FittedCurve]
    error: Mapping[tuple[str, str, str], FittedCurve]


def fit_paper(table: pd.DataFrame) -> PaperFits:
    """Eq. 4 and eq. 5 fitted to table 1's runs, for every train set, validation loss and split."""
    loss_keys = [(train, loss) for train in TRAIN_SETS for loss in LOSSES]
    losses = fit_many(EQUATION_4, [Problem(loss_rows(table, t), loss) for t, loss in loss_keys])
    error_keys = [(train, loss, split) for train, loss in loss_keys for split in SPLITS]
    errors = fit_many(
        EQUATION_5, [Problem(error_rows(table, t), split, loss) for t, loss, split in error_keys]
    )
    return PaperFits(
        dict(zip(loss_keys, losses, strict=True)), dict(zip(error_keys, errors, strict=True))
    )


def ground_truth(table: pd.DataFrame, fits: PaperFits) -> pd.DataFrame:
    """Every run x validation loss x split: measured, predicted, relative errors (percent).

    `error_from_true_loss_percent` is the error of eq. 5 alone, given the measured loss.
    """
    parts = []
    fitted = {"in_loss_fit": in_loss_fit(table), "in_error_fit": in_error_fit(table)}
    for (train, loss, split), error in fits.error.items():
        rows = table[table["dataset"] == train]
        predicted = fits.loss[train, loss].at(rows)
        measured, error_measured = rows[loss].to_numpy(), rows[split].to_numpy()
        parts.append(
            pd.DataFrame(
                {
                    "train": train,
                    "loss": loss,
                    "split": split,
                    **{name: rows[name] for name in ("run", "model", "params", "tokens")},
                    "token_multiplier": rows["token_multiplier"],
                    **{name: mask[rows.index] for name, mask in fitted.items()},
                    "loss_measured": measured,
                    "loss_predicted": predicted,
                    "loss_percent": percent_off(predicted, measured),
                    "error_measured": error_measured,
                    "error_predicted": error(loss=predicted),
                    "error_percent": percent_off(error(loss=predicted), error_measured),
                    "error_from_true_loss_percent": percent_off(
                        error(loss=measured), error_measured
                    ),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def table1(table: pd.DataFrame) -> pd.DataFrame:
    """The fitted runs' compute, beside the paper's; the mean over the three train sets."""
    found = {
        name: np.mean([rows(table, train)["flops_6nd"].sum() for train in TRAIN_SETS])
        for name, rows in (("loss_law", loss_rows), ("error_law", error_rows))
    }
    return pd.DataFrame(
        [{"fit": k, "flops": v, "paper": paper.TABLE1_FLOPS[k]} for k, v in found.items()]
    )


def table2(table: pd.DataFrame, fits: PaperFits) -> dict[str, dict[str, dict[str, float]]]:
    """Tables 2 and 7: train set -> with_1b / without_1b -> column -> relative error in percent.

    Of the 6.9B run on 138B tokens, from eq. 4 on C4 eval chained with eq. 5 of each column.
    """
    cases = [
        (train, name, column)
        for train, rows in paper.TABLE2.items()
        for name in rows
        for column in paper.Downstream._fields
    ]
    errors = fit_many(
        EQUATION_5,
        [
            Problem(error_rows(table, train, name == "with_1b"), f"error/{column}", MAIN_LOSS)
            for train, name, column in cases
        ],
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for (train, name, column), error in zip(cases, errors, strict=True):
        run = table[(table["dataset"] == train) & (table["model"] == MODEL_7B)]
        predicted = error(loss=fits.loss[train, MAIN_LOSS].at(run))
        off = float(percent_off(predicted, run[f"error/{column}"])[0])
        found.setdefault(train, {}).setdefault(name, {})[column] = off
    return found


def table4(grid: pd.DataFrame) -> dict[str, int]:
    """How many topologies and configurations the grid search has."""
    return {"topologies": grid["model"].nunique(), "configurations": len(grid)}


def table6(fits: PaperFits) -> dict[str, dict[str, float]]:
    """Train set -> parameters of eq. 4 on C4 eval and of eq. 5 on the 17-task split."""
    return {
        train: {
            **fits.loss[train, MAIN_LOSS].parameters,
            **fits.error[train, MAIN_LOSS, SPLITS[1]].parameters,
        }
        for train in TRAIN_SETS
    }


def table8(fits: PaperFits, train: str = "rpj") -> pd.DataFrame:
    """Public models' token multipliers, and what eq. 4 says that over-training costs them.

    The loss is above that of the best model of the same compute, on C4 eval, by
    (a M^eta + b M^-eta - 2 sqrt(a b)) C^-eta nats, under the law of runs on `train`.
    """
    law = fits.loss[train, MAIN_LOSS].parameters
    best = optimal_multiplier(law)

    def loss(flops: float, multiplier: float) -> float:
        params = np.sqrt(flops / (6 * multiplier))
        return float(EQUATION_4.curve(law, params=params, tokens=params * multiplier))

    rows = []
    for model in paper.TABLE8:
        params, tokens = model.params * 1e9, model.tokens * 1e9
        multiplier, flops = tokens / params, 6 * params * tokens
        above = loss(flops, multiplier) - loss(flops, best)
        rows.append(
            {
                "model": model.name,
                "params": params,
                "tokens": tokens,
                "token_multiplier": multiplier,
                "paper": model.token_multiplier,
                "times_optimal": multiplier / best,
                "loss_above_compute_optimal_nats": above,
            }
        )
    return pd.DataFrame(rows)


def optimal_multiplier(law: Mapping[str, float]) -> float:
    """M* = (b / a)^(1 / 2 eta), the compute-optimal token multiplier (eq. 10)."""
    return (law["b"] / law["a"]) ** (1 / (2 * law["eta"]))


def rank_correlation(truth: pd.DataFrame) -> dict[str, float]:
    """Rank correlation of predicted and measured 17-task error of the 9 runs of 1.4B and more."""
    chosen = truth[
        (truth["params"] > 1e9) & (truth["loss"] == MAIN_LOSS) & (truth["split"] == SPLITS[1])
    ]
    predicted, measured = chosen["error_predicted"], chosen["error_measured"]
    return {
        "runs": len(chosen),
        "spearman": float(predicted.rank().corr(measured.rank())),
        "kendall": _kendall(predicted.to_numpy(), measured.to_numpy()),
    }


def heat_map_cells(truth: pd.DataFrame) -> pd.DataFrame:
    """The large runs' cells of figures 5, 7, 10, 11 and 12, beside what is printed in them."""
    rows = [
        {**cell._asdict(), "ours": heat_map_value(truth, cell), "paper": cell.percent}
        for cell in paper.HEAT_MAP_CELLS
    ]
    return pd.DataFrame(rows).drop(columns="percent")


def heat_map_value(truth: pd.DataFrame, cell: paper.Cell) -> float:
    """The relative error in percent that stands in a cell of a heat map."""
    is_loss = cell.target.startswith("loss/")
    chosen = truth[
        (truth["train"] == cell.train)
        & (truth["loss"] == (cell.target if is_loss else MAIN_LOSS))
        & (truth["split"] == (SPLITS[0] if is_loss else cell.target))
        & (truth["model"].map(SIZES) == cell.params)
        & (truth["token_multiplier"] == cell.token_multiplier)
    ]
    return float(chosen["loss_percent" if is_loss else "error_percent"].iloc[0])


def differences(ours: Any, theirs: Any) -> Any:
    """`ours` - `theirs`, of two nested mappings, where both have a number."""
    if isinstance(ours, Mapping):
        return {key: differences(ours[key], theirs[key]) for key in ours if key in theirs}
    return ours - theirs


def _kendall(x: np.ndarray, y: np.ndarray) -> float:
    """Concordant minus discordant pairs, over all pairs (tau-a; no ties here)."""
    upper = np.triu_indices(len(x), 1)
    same = np.sign(np.subtract.outer(x, x)[upper]) * np.sign(np.subtract.outer(y, y)[upper])
    return float(same.mean())
