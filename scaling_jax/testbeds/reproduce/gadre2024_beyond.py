"""Our predictions from the very runs that Gadre et al. 2024 fit, with intervals.

The fits see no held-out run. The loss is the centre of the package's default interval; the error is
eq. 5 with its asymptote pinned at the error of guessing, read at that loss; its interval carries
both laws' uncertainty. Other recipes are listed beside it for comparison.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from scaling_jax import laws
from scaling_jax.testbeds import predictability, published
from scaling_jax.testbeds.reproduce.gadre2024_tables import LOSSES, MAIN_LOSS, SPLITS
from scaling_jax.testbeds.reproduce.paper_laws import (
    EQUATION_4,
    EQUATION_5,
    MODEL_7B,
    TRAIN_SETS,
    Problem,
    error_rows,
    fit_many,
    in_error_fit,
    in_loss_fit,
    large_rows,
    loss_rows,
    percent_off,
)

LEVEL = 0.9
OURS, PAPER = "ours", "paper"
FIT_SETS = {"with_1b": True, "without_1b": False}
LossFits = Mapping[tuple[str, str], laws.Fit]


def predict_tasks(table: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    """Each task alone at 6.9B, from table 1's runs and the 1.4B one: `predictability.by_task`."""
    role = np.where(table["model"] == MODEL_7B, "held_out", "spare")
    rows = table.assign(role=np.where(in_error_fit(table), "fit", role))
    chance = {str(task): float(error) for task, error in tasks["chance_error"].items()}
    method = predictability.Method(loss=MAIN_LOSS, level=LEVEL)
    return predictability.by_task(rows, chance, method, model=published.SPLIT_MODEL)


def chance_errors(table: pd.DataFrame, tasks: pd.DataFrame) -> dict[str, float]:
    """The error of guessing on each split: the mean over its tasks."""
    split = published.tasks_above_chance(table, tasks)
    chance = tasks["chance_error"]
    return {SPLITS[0]: float(chance.mean()), SPLITS[1]: float(chance[split].mean())}


def fit_losses(table: pd.DataFrame) -> LossFits:
    """The package's default fit of eq. 4 to table 1's runs, by train set and validation loss."""
    return {
        (train, loss): laws.fit("over_training", loss_rows(table, train), target=loss)
        for train in TRAIN_SETS
        for loss in LOSSES
    }


def predict_losses(table: pd.DataFrame, fits: LossFits, level: float = LEVEL) -> pd.DataFrame:
    """Every run of 1.4B parameters and more x validation loss: predicted, low, high, measured.

    Also `law`, the fitted law without the calibrated centre. `fits` comes from `fit_losses`.
    """
    parts = []
    for (train, loss), fit in fits.items():
        rows = large_rows(table, train)
        params, tokens = (rows[name].to_numpy(float) for name in EQUATION_4.inputs)
        found = fit.predict(params=params, tokens=tokens, level=level)
        parts.append(
            _identity(rows, train).assign(
                loss=loss,
                predicted=found.center,
                low=found.low,
                high=found.high,
                law=found.value,
                measured=rows[loss],
            )
        )
    return pd.concat(parts, ignore_index=True)


def predict_errors(
    table: pd.DataFrame,
    fits: LossFits,
    losses: pd.DataFrame,
    chance: Mapping[str, float],
    fit_set: str = "with_1b",
    columns: Sequence[str] = LOSSES,
    level: float = LEVEL,
) -> pd.DataFrame:
    """Every run of 1.4B parameters and more x validation loss x split: predicted error, interval.

    Args:
      table: the testbed.
      fits: from `fit_losses`.
      losses: from `predict_losses`.
      chance: from `chance_errors`.
      fit_set: "with_1b" (table 1's runs for eq. 5) or "without_1b" (those for eq. 4).
      columns: the losses to go through.
      level: of the intervals.

    Returns:
      One row each. For comparison, `center` is the centre of the interval, `law` reads the loss
      off the fitted law, not the calibrated centre; `sigmoid` is the pinned sigmoid law and `free`
      eq. 5 with a free asymptote, both at our loss.
    """
    parts = []
    for train in TRAIN_SETS:
        rows, fitted = large_rows(table, train), error_rows(table, train, FIT_SETS[fit_set])
        params, tokens = (rows[name].to_numpy(float) for name in EQUATION_4.inputs)
        for loss in columns:
            ours = losses[(losses["train"] == train) & (losses["loss"] == loss)]
            at = ours["predicted"].to_numpy()
            for split in SPLITS:
                pinned, sigmoid = (
                    laws.fit(law, fitted, target=split, loss=loss, chance=chance[split])
                    for law in ("exponential", "sigmoid")
                )
                free = fit_many(EQUATION_5, [Problem(fitted, split, loss)])[0]
                found = laws.chained(fits[train, loss], pinned).predict(
                    params=params, tokens=tokens, level=level
                )
                parts.append(
                    _identity(rows, train).assign(
                        loss=loss,
                        split=split,
                        fit_set=fit_set,
                        predicted=pinned.curve(loss=at),
                        low=found.low,
                        high=found.high,
                        center=found.center,
                        law=found.value,
                        sigmoid=sigmoid.curve(loss=at),
                        free=free(loss=at),
                        measured=rows[split],
                    )
                )
    return pd.concat(parts, ignore_index=True)


def compare_losses(table: pd.DataFrame, losses: pd.DataFrame) -> pd.DataFrame:
    """Recipes for the loss of the 6 held-out runs: relative errors in percent, and bias."""
    held_out = _held_out(table)
    recipes = {
        PAPER: _own_exponents(table, laws.least_squares("linear")),
        OURS: losses.set_index(["train", "loss", "run"])["predicted"],
        "least squares of logs": losses.set_index(["train", "loss", "run"])["law"],
        "Huber of logs": _own_exponents(table, laws.huber()),
        "Huber of logs, one exponent for all train sets": _shared_exponent(table, laws.huber()),
        "least squares of logs, one exponent for all train sets": _shared_exponent(
            table, laws.least_squares()
        ),
    }
    rows = []
    for targets, columns in (("c4_val", [MAIN_LOSS]), ("all 8 losses", list(LOSSES))):
        keys = [
            (train, loss, run)
            for train, runs in held_out.items()
            for loss in columns
            for run in runs["run"]
        ]
        by_run = table.set_index("run")
        measured = np.array([by_run.loc[run, loss] for _, loss, run in keys], float)
        for recipe, predicted in recipes.items():
            off = predicted.loc[keys].to_numpy(float) / measured - 1
            rows.append({"targets": targets, "recipe": recipe, **_summary(off)})
    return pd.DataFrame(rows)


def compare_errors(truth: pd.DataFrame, errors: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Recipes for the errors of the 6 held-out runs from C4 eval: relative errors in percent.

    Args:
      truth: the paper's predictions, from `gadre2024_tables.ground_truth`.
      errors: from `predict_errors`, for each fit set.
      table: the testbed.
    """
    runs = pd.concat(_held_out(table).values())["run"]
    paper = _paper_errors(truth, table)
    columns = {
        OURS: "predicted",
        "sigmoid in place of eq. 5": "sigmoid",
        "asymptote free": "free",
        "loss from the fitted law": "law",
        "centre of the interval": "center",
    }
    rows = []
    for fit_set in FIT_SETS:
        for split in SPLITS:
            chosen = errors[
                (errors["fit_set"] == fit_set)
                & (errors["split"] == split)
                & (errors["loss"] == MAIN_LOSS)
            ].set_index("run")
            recipes = {PAPER: paper[fit_set, split]} | {
                recipe: chosen[column] for recipe, column in columns.items()
            }
            measured = chosen.loc[runs, "measured"].to_numpy()
            for recipe, predicted in recipes.items():
                off = predicted.loc[runs].to_numpy() / measured - 1
                case = {"split": split, "fit_set": fit_set, "recipe": recipe}
                rows.append(case | _summary(off))
    return pd.DataFrame(rows)


def coverage(losses: pd.DataFrame, errors: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """How many held-out numbers lie in our intervals, and how wide those are.

    Losses: the 9 large runs but those at 1.4B, M = 20, x 8 sets. Errors: from C4 eval.
    """
    runs = set(pd.concat(_held_out(table).values())["run"])
    cases = [("losses, c4_val", losses[losses["loss"] == MAIN_LOSS]), ("losses, all 8", losses)]
    for fit_set in FIT_SETS:
        for split in SPLITS:
            chosen = (errors["fit_set"] == fit_set) & (errors["split"] == split)
            through = errors["loss"] == MAIN_LOSS
            cases.append((f"{split}, {fit_set}", errors[chosen & through]))
    rows = []
    for name, part in cases:
        part = part[part["run"].isin(runs)]
        inside = (part["low"] <= part["measured"]) & (part["measured"] <= part["high"])
        width = 100 * (part["high"] - part["low"]) / part["measured"]
        rows.append(
            {
                "predictions": name,
                "count": len(part),
                "covered": int(inside.sum()),
                "median width, percent": float(width.median()),
            }
        )
    return pd.DataFrame(rows)


def held_out_table(truth: pd.DataFrame, losses: pd.DataFrame, errors: pd.DataFrame) -> pd.DataFrame:
    """Every large run x validation loss x split: measured, the paper's prediction, ours, interval.

    Relative errors are in percent. 1.4B at M = 20 is held out of eq. 4 alone: `in_error_fit`.
    """
    key = ["train", "run", "loss"]
    table = truth[truth["run"].isin(losses["run"])].rename(
        columns={
            "loss_predicted": "loss_paper",
            "loss_percent": "loss_paper_percent",
            "error_predicted": "error_paper",
            "error_percent": "error_paper_percent",
        }
    )
    columns = {"predicted": "ours", "low": "ours_low", "high": "ours_high"}
    for name, part, on in (
        ("loss", losses, key),
        ("error", errors[errors["fit_set"] == "with_1b"], [*key, "split"]),
    ):
        renamed = part.rename(columns={k: f"{name}_{v}" for k, v in columns.items()})
        table = table.merge(renamed[[*on, *(f"{name}_{v}" for v in columns.values())]], on=on)
        off = percent_off(table[f"{name}_ours"], table[f"{name}_measured"])
        table[f"{name}_ours_percent"] = off
    return table.drop(columns="error_from_true_loss_percent")


def not_improved(loss_comparison: pd.DataFrame, error_comparison: pd.DataFrame) -> list[str]:
    """Where our recipe is no better than the paper's, in sentences made from the numbers."""
    found = []
    named = error_comparison.assign(
        targets=error_comparison["split"].str.removeprefix("error/").str.replace("_", " of ")
        + " tasks, "
        + error_comparison["fit_set"].str.replace("_", " ").str.replace("1b", "the 1.4B run")
    )
    for targets, part in pd.concat([loss_comparison, named]).groupby("targets", sort=False):
        by_recipe = part.set_index("recipe")
        for measure in ("mean", "max"):
            ours, paper = by_recipe[measure][OURS], by_recipe[measure][PAPER]
            if ours >= paper:
                found.append(
                    f"{targets}: {measure} relative error {ours:.2f} %, the paper's {paper:.2f} %"
                )
    return found


def _held_out(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """By train set, the two runs that neither law was fitted to."""
    return {t: rows[~in_error_fit(rows)] for t in TRAIN_SETS for rows in [large_rows(table, t)]}


def _own_exponents(table: pd.DataFrame, objective: laws.Objective) -> pd.Series:
    keys = [(train, loss) for train in TRAIN_SETS for loss in LOSSES]
    problems = [Problem(loss_rows(table, train), loss) for train, loss in keys]
    fits = fit_many(EQUATION_4, problems, objective)
    parts = {}
    for (train, loss), fit in zip(keys, fits, strict=True):
        rows = large_rows(table, train)
        keyed = ((train, loss, run) for run in rows["run"])
        parts |= dict(zip(keyed, fit.at(rows), strict=True))
    return pd.Series(parts)


def _shared_exponent(table: pd.DataFrame, objective: laws.Objective) -> pd.Series:
    fitted, parts = table[in_loss_fit(table)], {}
    for loss in LOSSES:
        fit = laws.fit_groups(EQUATION_4, fitted, target=loss, shared=["eta"], objective=objective)
        for train in TRAIN_SETS:
            rows = large_rows(table, train)
            params, tokens = (rows[name].to_numpy(float) for name in EQUATION_4.inputs)
            values = fit.curve(train, params=params, tokens=tokens)
            parts |= dict(zip(((train, loss, run) for run in rows["run"]), values, strict=True))
    return pd.Series(parts)


def _paper_errors(truth: pd.DataFrame, table: pd.DataFrame) -> dict[tuple[str, str], pd.Series]:
    """The paper's predictions of each fit set and split, by run: eq. 5 with a free asymptote."""
    chosen = truth[truth["loss"] == MAIN_LOSS]
    found = {
        ("with_1b", split): chosen[chosen["split"] == split].set_index("run")["error_predicted"]
        for split in SPLITS
    }
    keys = [(train, split) for train in TRAIN_SETS for split in SPLITS]
    fits = fit_many(
        EQUATION_5,
        [Problem(error_rows(table, train, False), split, MAIN_LOSS) for train, split in keys],
    )
    for split in SPLITS:
        parts = []
        for (train, fitted_split), fit in zip(keys, fits, strict=True):
            if fitted_split == split:
                rows = chosen[(chosen["train"] == train) & (chosen["split"] == split)]
                parts.append(pd.Series(fit(loss=rows["loss_predicted"]), rows["run"]))
        found["without_1b", split] = pd.concat(parts)
    return found


def _identity(rows: pd.DataFrame, train: str) -> pd.DataFrame:
    names = ["run", "model", "params", "tokens", "token_multiplier"]
    return rows[names].assign(train=train, in_error_fit=in_error_fit(rows))


def _summary(off: np.ndarray) -> dict[str, float]:
    """Of signed relative errors: mean and largest size, and bias, in percent."""
    size = 100 * np.abs(off)
    return {
        "mean": float(size.mean()),
        "median": float(np.median(size)),
        "max": float(size.max()),
        "bias": float(100 * off.mean()),
    }
