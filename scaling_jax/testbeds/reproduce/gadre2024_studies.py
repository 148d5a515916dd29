"""The studies behind figures 4, 6, 8 and 14 to 18 of Gadre et al. 2024, as numbers."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from scaling_jax.testbeds import published
from scaling_jax.testbeds.reproduce import gadre2024_published as paper
from scaling_jax.testbeds.reproduce.gadre2024_tables import MAIN_LOSS, SPLITS, PaperFits
from scaling_jax.testbeds.reproduce.paper_laws import (
    COMPUTE_ONLY,
    EQUATION_4,
    EQUATION_5,
    MODEL_1B,
    MODEL_7B,
    SMALL_MODELS,
    TRAIN_SETS,
    FittedCurve,
    Problem,
    error_rows,
    fit_many,
    large_rows,
    loss_rows,
    percent_off,
)

SEED = 0
THRESHOLDS_PERCENT = tuple(range(-5, 51, 5))
# Figure 14: windows of so many of the cheapest runs, and subsets drawn from each.
WINDOWS, DRAWS_PER_WINDOW = range(5, 30), 8
BOOTSTRAPS = 256
MULTIPLIERS = (20, 40, 80, 160, 320, 640)
# The four models that the search selected (table 3): topology, sequences a batch, warmup steps.
SELECTED = (
    (SMALL_MODELS[0], 64, 100),
    (SMALL_MODELS[1], 512, 400),
    (SMALL_MODELS[2], 512, 400),
    (SMALL_MODELS[3], 512, 2000),
)


def frontier(grid: pd.DataFrame) -> pd.DataFrame:
    """The models of the grid search that none of as little compute beats, cheapest first."""
    ordered = grid.sort_values(["flops_6nd", "loss/openlm"])
    loss = ordered["loss/openlm"]
    return ordered[loss < loss.cummin().shift(fill_value=np.inf)]


def filtered_frontier(grid: pd.DataFrame) -> pd.DataFrame:
    """The frontier without the range of compute that the paper left out (figure 4)."""
    low, high = paper.GRID_EXCLUDED_FLOPS
    return frontier(grid[(grid["flops_6nd"] < low) | (grid["flops_6nd"] > high)])


def selected(grid: pd.DataFrame) -> pd.DataFrame:
    """The four selected models' rows of the grid search."""
    key = ["model", "batch_sequences", "warmup_steps"]
    return pd.DataFrame(SELECTED, columns=pd.Index(key)).merge(grid, on=key)


def fit_with_bootstrap(
    rows: pd.DataFrame, flops: Float[np.ndarray, "m"]
) -> tuple[FittedCurve, Float[np.ndarray, "m"], Float[np.ndarray, "m"]]:
    """E + c C^-eta fitted to a search's models, and a 95 % pairs-bootstrap band at `flops`.

    Resamples of fewer distinct models than the law has parameters are drawn again.
    """
    random, weights = np.random.default_rng(SEED), []
    while len(weights) < BOOTSTRAPS:
        drawn = np.bincount(random.integers(len(rows), size=len(rows)), minlength=len(rows))
        if np.count_nonzero(drawn) >= len(COMPUTE_ONLY.parameters):
            weights.append(drawn.astype(float))
    problem = Problem(rows, "loss/openlm")
    own = fit_many(COMPUTE_ONLY, [problem])[0]
    resampled = fit_many(COMPUTE_ONLY, [problem] * BOOTSTRAPS, weights=weights)
    theta = {name: np.array([fit.parameters[name] for fit in resampled]) for name in own.parameters}
    curves = theta["E"][:, None] + theta["c"][:, None] * flops ** -theta["eta"][:, None]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return own, low, high


def threshold_study(table: pd.DataFrame, tasks: pd.DataFrame, fits: PaperFits) -> pd.DataFrame:
    """Error at 6.9B, 138B tokens, when tasks need other margins above chance (figure 8)."""
    cases = []
    for percent in THRESHOLDS_PERCENT:
        chosen = published.tasks_above_chance(table, tasks, percent / 100)
        average = table[[f"error/{task}" for task in chosen]].mean(axis=1)
        rows = table.assign(**{"error/chosen": average})
        cases += [(train, percent, len(chosen), rows) for train in TRAIN_SETS if chosen]
    errors = fit_many(
        EQUATION_5,
        [
            Problem(error_rows(rows, train), "error/chosen", MAIN_LOSS)
            for train, _, _, rows in cases
        ],
    )
    found = []
    for (train, percent, count, rows), error in zip(cases, errors, strict=True):
        run = _run(rows, train, MODEL_7B, 20)
        predicted = error(loss=fits.loss[train, MAIN_LOSS].at(run))
        found.append(
            {
                "train": train,
                "threshold_percent": percent,
                "tasks": count,
                "excluded": len(tasks) - count,
                "error_percent": float(percent_off(predicted, run["error/chosen"])[0]),
            }
        )
    return pd.DataFrame(found)


def compute_study(table: pd.DataFrame, fits: PaperFits, train: str = "rpj") -> pd.DataFrame:
    """Relative error against the compute and number of the fitted runs (figures 14, 15 and 16).

    29 runs (0.011B to 0.411B at M = 5 to 320, and 1.4B at M = 20), sorted by compute; for n in 5 to
    29, subsets of 5 to n of the n cheapest, drawn with a fixed seed. Both laws are fitted to each
    subset; targets are 1.4B at M = 640 and 6.9B at M = 20. Row 0 is table 1's choice.
    """
    rows = table[table["dataset"] == train]
    small = rows["model"].isin(SMALL_MODELS) & (rows["token_multiplier"] <= 320)
    largest = (rows["model"] == MODEL_1B) & (rows["token_multiplier"] == 20)
    pool = rows[small | largest].sort_values("flops_6nd")
    random = np.random.default_rng(SEED)
    subsets = [
        pool.iloc[np.sort(random.choice(window, random.integers(5, window + 1), replace=False))]
        for window in WINDOWS
        for _ in range(DRAWS_PER_WINDOW)
    ]
    loss_fits = fit_many(EQUATION_4, [Problem(subset, MAIN_LOSS) for subset in subsets])
    error_fits = fit_many(EQUATION_5, [Problem(s, SPLITS[1], MAIN_LOSS) for s in subsets])
    default = (error_rows(table, train), loss_rows(table, train))
    paper_fits = fits.loss[train, MAIN_LOSS], fits.error[train, MAIN_LOSS, SPLITS[1]]
    found = []
    for target, run in (
        ("1.4B, M = 640", _run(table, train, MODEL_1B, 640)),
        ("6.9B, M = 20", _run(table, train, MODEL_7B, 20)),
    ):
        for loss, error, error_runs, loss_runs, is_default in (
            (*paper_fits, *default, True),
            *(
                (loss, error, subset, subset, False)
                for loss, error, subset in zip(loss_fits, error_fits, subsets, strict=True)
            ),
        ):
            predicted = loss.at(run)
            found.append(
                {
                    "target": target,
                    "default": is_default,
                    "loss_points": len(loss_runs),
                    "loss_flops": loss_runs["flops_6nd"].sum(),
                    "error_flops": error_runs["flops_6nd"].sum(),
                    "loss_percent": float(percent_off(predicted, run[MAIN_LOSS])[0]),
                    "error_percent": float(percent_off(error(loss=predicted), run[SPLITS[1]])[0]),
                }
            )
    return pd.DataFrame(found)


def log_line(x: pd.Series | np.ndarray, percent: pd.Series) -> tuple[float, float]:
    """Slope and intercept of log10 error in x; errors count as 100 % at most."""
    slope, level = np.polyfit(x, np.log10(percent.clip(1e-3, 100.0)), 1)
    return float(slope), float(level)


def compute_trends(study: pd.DataFrame) -> pd.DataFrame:
    """Slope of log relative error against log compute of the fit, by target and quantity.

    Errors count as 100 % at most: a few cheap subsets determine no law at all.
    """
    found = []
    for target, part in study[~study["default"]].groupby("target"):
        for quantity in ("loss", "error"):
            flops, percent = part[f"{quantity}_flops"], part[f"{quantity}_percent"]
            slope, level = log_line(np.log10(flops), percent)
            rank = float(flops.rank().corr(percent.rank()))
            found.append(
                {
                    "target": target,
                    "quantity": quantity,
                    "decades_per_decade": slope,
                    "level": level,
                    "rank_correlation": rank,
                }
            )
    return pd.DataFrame(found)


def exponent_study(table: pd.DataFrame, fits: PaperFits) -> pd.DataFrame:
    """The exponent of C4 eval's reducible loss in compute at each multiplier (figure 17).

    The slope of log(L - E) over the sizes up to 0.411B, E from table 6.
    """
    found = []
    for train in TRAIN_SETS:
        floor = fits.loss[train, MAIN_LOSS].parameters["E"]
        rows = table[(table["dataset"] == train) & table["model"].isin(SMALL_MODELS)]
        for multiplier in MULTIPLIERS:
            part = rows[rows["token_multiplier"] == multiplier]
            slope = np.polyfit(np.log(part["flops_6nd"]), np.log(part[MAIN_LOSS] - floor), 1)[0]
            found.append({"train": train, "token_multiplier": multiplier, "eta": -slope})
    return pd.DataFrame(found)


def exponent_trend(
    study: pd.DataFrame, multipliers: Float[np.ndarray, "m"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line of eta against log M through all train sets, and its 95 % bootstrap band."""
    x, y = np.log(study["token_multiplier"].to_numpy(float)), study["eta"].to_numpy()
    random = np.random.default_rng(SEED)
    lines = []
    for _ in range(1000):
        pick = random.integers(len(x), size=len(x))
        lines.append(np.polyval(np.polyfit(x[pick], y[pick], 1), np.log(multipliers)))
    low, high = np.quantile(lines, [0.025, 0.975], axis=0)
    return np.polyval(np.polyfit(x, y, 1), np.log(multipliers)), low, high


def task_study(table: pd.DataFrame, tasks: pd.DataFrame, fits: PaperFits) -> pd.DataFrame:
    """Eq. 5 for each task alone, from C4 eval: parameters and error at 6.9B (figure 18)."""
    cases = [(train, task) for train in TRAIN_SETS for task in tasks.index]
    errors = fit_many(
        EQUATION_5,
        [Problem(error_rows(table, train), f"error/{task}", MAIN_LOSS) for train, task in cases],
    )
    found = []
    for (train, task), error in zip(cases, errors, strict=True):
        run = large_rows(table, train)
        run = run[run["model"] == MODEL_7B]
        predicted = error(loss=fits.loss[train, MAIN_LOSS].at(run))
        off = float(percent_off(predicted, run[f"error/{task}"])[0])
        found.append({"train": train, "task": task, **error.parameters, "error_percent": off})
    return pd.DataFrame(found)


def off_trend(truth: pd.DataFrame) -> pd.DataFrame:
    """How far runs of each multiplier lie off eq. 4 on C4 eval: small M is off (figure 9)."""
    rows = truth[(truth["loss"] == MAIN_LOSS) & (truth["split"] == SPLITS[0])]
    rows = rows[rows["model"].isin(SMALL_MODELS)]
    signed = 100 * (rows["loss_measured"] / rows["loss_predicted"] - 1)
    return (
        signed.groupby(rows["token_multiplier"])
        .agg(mean_percent="mean", largest_percent=lambda off: off.abs().max())
        .reset_index()
    )


def _run(table: pd.DataFrame, train: str, model: str, multiplier: float) -> pd.DataFrame:
    rows = large_rows(table, train)
    return rows[(rows["model"] == model) & (rows["token_multiplier"] == multiplier)]
