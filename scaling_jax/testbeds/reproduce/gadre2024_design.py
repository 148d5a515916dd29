"""In retrospect: would fewer, better chosen runs have predicted the large ones as well?

Candidates are the paper's runs of up to 0.411B parameters. Half of a budget goes to the runs of
`laws.first_runs`, which knows no loss; the rest run by run, each the cheapest of what
`laws.next_runs` would do, given the losses of the runs already chosen and no others. Beside these
stand the paper's own choice and random sets. All of them predict the two large runs of each train
set that no law was fitted to.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from scaling_jax import laws
from scaling_jax.laws import bayes, calibrated
from scaling_jax.testbeds.reproduce.gadre2024_tables import LOSSES, MAIN_LOSS, SPLITS
from scaling_jax.testbeds.reproduce.paper_laws import (
    EQUATION_4,
    EQUATION_5,
    SMALL_MODELS,
    TRAIN_SETS,
    Problem,
    error_rows,
    fit_many,
    in_error_fit,
    large_rows,
    loss_rows,
    percent_off,
)

# Budgets, as shares of what the paper's runs cost; all losses are gone through at these alone.
SHARES, SHARES_OF_ALL_LOSSES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0, 2.0), (1 / 2, 1.0)
ERROR_SHARES = (1 / 8, 1 / 4, 1 / 2)
HALF = 1 / 2
# At smaller multipliers the paper's own runs lie off every law (figure 9).
SMALLEST_MULTIPLIER = 10
FIRST_SHARE = 1 / 2
DRAWS, DRAWS_OF_ALL_LOSSES, RUNS_DRAWN = 30, 8, (5, 12)
STARTS = 16
SEED = 0
DESIGNED, PAPER, RANDOM = "designed", "paper's", "random"
LAW, BAYES, DEFAULT = "eq. 4, least squares", "Bayesian law", "default centre"
MAIN_TARGETS, ALL_TARGETS = "c4_val", "all 8 losses"


class Case(NamedTuple):
    """Runs chosen to predict one loss of the large runs of a train set."""

    chosen_by: str
    draw: int
    share: float
    train: str
    loss: str
    rows: pd.DataFrame


Large = Mapping[str, pd.DataFrame]
Predict = Callable[[Large, Sequence[Case]], list[np.ndarray]]


def study(table: pd.DataFrame) -> pd.DataFrame:
    """Relative errors of the large runs' losses in percent: a row a case, law and large run."""
    cases = [*_paper_cases(table), *_designed_cases(table), *_random_cases(table)]
    few = [case for case in cases if case.chosen_by != RANDOM]
    large = {train: held_out(table, train) for train in TRAIN_SETS}
    parts = [
        _errors(large, cases, LAW, _by_law),
        _errors(large, cases, BAYES, _by_bayes),
        _errors(large, few, DEFAULT, _by_default),
    ]
    return pd.concat(parts, ignore_index=True)


def curves(found: pd.DataFrame) -> pd.DataFrame:
    """Mean relative error against compute, by targets, law, who chose the runs, and budget.

    `found` comes from `study`. `flops` and `runs` are means over the train sets; `percent` is the
    mean over the large runs and `largest` the largest; of random sets these, and the quartiles
    `low` and `high`, are over draws: medians.
    """
    rows = []
    for targets, part in (
        (MAIN_TARGETS, found[found["loss"] == MAIN_LOSS]),
        (ALL_TARGETS, _with_every_loss(found)),
    ):
        for (law, chosen_by, share), case in part.groupby(["law", "chosen_by", "share"]):
            by_draw = case.groupby("draw")
            means, largest = by_draw["percent"].mean(), by_draw["percent"].max()
            rows.append(
                {
                    "targets": targets,
                    "law": law,
                    "chosen_by": chosen_by,
                    "share_of_paper": share,
                    "flops": case["flops"].mean(),
                    "runs": case["runs"].mean(),
                    "percent": means.median(),
                    "low": means.quantile(0.25),
                    "high": means.quantile(0.75),
                    "largest": largest.median(),
                    "draws": len(means),
                }
            )
    return pd.DataFrame(rows)


def error_study(table: pd.DataFrame, chance: float) -> pd.DataFrame:
    """Relative error of the large runs' 46-task error in percent: a row a set of runs and recipe.

    Designed sets cost up to shares of what the paper's six runs cost. The loss is the Bayesian
    law's on C4 eval, the error is eq. 5 with its asymptote at `chance`, the error of guessing,
    fitted to the same runs; the paper's recipe is eq. 4 and eq. 5 with the asymptote free.
    """
    cost = {train: error_rows(table, train)["flops_6nd"].sum() for train in TRAIN_SETS}
    large = {train: held_out(table, train) for train in TRAIN_SETS}
    sets: list[tuple[str, str, float, list[pd.DataFrame], list[pd.DataFrame]]] = []
    for share in ERROR_SHARES:
        rows = [designed_runs(table, t, MAIN_LOSS, share * cost[t]) for t in TRAIN_SETS]
        sets.append((DESIGNED, "ours", share, rows, rows))
    of_loss = [loss_rows(table, train) for train in TRAIN_SETS]
    of_error = [error_rows(table, train) for train in TRAIN_SETS]
    sets.append((PAPER, "ours", 1.0, of_error, of_error))
    sets.append((PAPER, "paper's", 1.0, of_loss, of_error))
    found = []
    for chosen_by, recipe, share, loss_sets, error_sets in sets:
        ours = recipe == "ours"
        form = _pinned(EQUATION_5, "eps", chance) if ours else EQUATION_5
        fits = fit_many(form, [Problem(rows, SPLITS[0], MAIN_LOSS) for rows in error_sets])
        cases = [
            Case(chosen_by, 0, share, train, MAIN_LOSS, rows)
            for train, rows in zip(TRAIN_SETS, loss_sets, strict=True)
        ]
        losses = (_by_bayes if ours else _by_law)(large, cases)
        off = [
            percent_off(fit(loss=loss), large[train][SPLITS[0]])
            for fit, loss, train in zip(fits, losses, TRAIN_SETS, strict=True)
        ]
        found.append(
            {
                "chosen_by": chosen_by,
                "recipe": recipe,
                "share_of_paper": share,
                "flops": float(np.mean([rows["flops_6nd"].sum() for rows in error_sets])),
                "runs": float(np.mean([len(rows) for rows in error_sets])),
                "percent": float(np.mean(off)),
                "largest": float(np.max(off)),
            }
        )
    return pd.DataFrame(found)


def verdict(of_loss: pd.DataFrame, of_error: pd.DataFrame) -> list[str]:
    """What the curves say of the claim that half of the compute is enough, in sentences.

    `of_loss` comes from `curves`, `of_error` from `error_study`.
    """
    said = []
    for targets, part in of_loss.groupby("targets", sort=False):
        paper = _at(part, PAPER, LAW, 1.0)
        for law in (LAW, BAYES, DEFAULT):
            half = _at(part, DESIGNED, law, HALF)
            reached = part[
                (part["chosen_by"] == DESIGNED) & (part["law"] == law) & (part["percent"] <= paper)
            ]["share_of_paper"]
            when = (
                f"reached with {reached.min():.3g} of the compute"
                if len(reached)
                else "not reached at any budget here"
            )
            random = part[(part["chosen_by"] == RANDOM) & (part["law"] == law)]
            beside = (
                f", random sets' median {_at(part, RANDOM, law, HALF):.2f} %" if len(random) else ""
            )
            said.append(
                f"{targets}, {law}: with half of the compute designed sets err {half:.2f} %"
                f"{beside}; the paper's {paper:.2f} % is {when}"
            )
    paper = float(of_error[of_error["recipe"] == "paper's"]["percent"].iloc[0])
    designed = of_error[of_error["chosen_by"] == DESIGNED]
    said += [
        f"46-task error: designed sets of {row['share_of_paper']:.3g} of the compute err "
        f"{row['percent']:.2f} %, the paper's {paper:.2f} %"
        for _, row in designed.iterrows()
    ]
    return said


def designed_runs(table: pd.DataFrame, train: str, loss: str, budget: float) -> pd.DataFrame:
    """The runs that a design chooses within `budget` FLOPs, to predict `loss` of the large runs.

    Of runs not yet chosen only params and tokens are looked at.
    """
    runs, large = candidates(table, train), held_out(table, train)
    goal = {name: large[name].to_numpy(float) for name in EQUATION_4.inputs}
    plan = runs[["run", *EQUATION_4.inputs]]
    first = laws.first_runs(target=goal, budget_flops=FIRST_SHARE * budget, candidates=plan)
    known = list(first.runs["run"])
    while True:
        seen = runs["run"].isin(known)
        left = budget - runs["flops_6nd"][seen].sum()
        if not (runs["flops_6nd"][~seen] <= left).any():
            return runs[seen]
        measured = runs.loc[seen, [*plan.columns, loss]]
        fit = laws.fit(EQUATION_4, measured, target=loss, starts=STARTS)
        more = laws.next_runs(fit, target=goal, budget_flops=left, candidates=plan[~seen]).runs
        if more.empty:
            return runs[seen]
        known.append(more["run"].iloc[0])


def random_runs(runs: pd.DataFrame, budget: float, random: np.random.Generator) -> pd.DataFrame:
    """5 to 12 runs in random order, each if it still fits into `budget` FLOPs."""
    count, left, chosen = random.integers(RUNS_DRAWN[0], RUNS_DRAWN[1] + 1), budget, []
    for row in random.permutation(len(runs)):
        cost = runs["flops_6nd"].iloc[row]
        if cost <= left and len(chosen) < count:
            chosen.append(row)
            left -= cost
    return runs.iloc[np.sort(chosen)]


def candidates(table: pd.DataFrame, train: str) -> pd.DataFrame:
    """The runs on `train` to choose from, cheapest first."""
    chosen = (table["dataset"] == train) & table["model"].isin(SMALL_MODELS)
    large_enough = table["token_multiplier"].round() >= SMALLEST_MULTIPLIER
    return table[chosen & large_enough].sort_values("flops_6nd")


def held_out(table: pd.DataFrame, train: str) -> pd.DataFrame:
    """The two large runs on `train` that no law was fitted to."""
    rows = large_rows(table, train)
    return rows[~in_error_fit(rows)]


def _paper_cases(table: pd.DataFrame) -> Iterable[Case]:
    for train in TRAIN_SETS:
        for loss in LOSSES:
            yield Case(PAPER, 0, 1.0, train, loss, loss_rows(table, train))


def _designed_cases(table: pd.DataFrame) -> Iterable[Case]:
    for train in TRAIN_SETS:
        cost = loss_rows(table, train)["flops_6nd"].sum()
        for share in SHARES:
            for loss in LOSSES if share in SHARES_OF_ALL_LOSSES else [MAIN_LOSS]:
                rows = designed_runs(table, train, loss, share * cost)
                yield Case(DESIGNED, 0, share, train, loss, rows)


def _random_cases(table: pd.DataFrame) -> Iterable[Case]:
    random = np.random.default_rng(SEED)
    for train in TRAIN_SETS:
        runs, cost = candidates(table, train), loss_rows(table, train)["flops_6nd"].sum()
        for share in SHARES:
            for draw in range(DRAWS):
                rows = random_runs(runs, share * cost, random)
                every = share == HALF and draw < DRAWS_OF_ALL_LOSSES
                for loss in LOSSES if every else [MAIN_LOSS]:
                    yield Case(RANDOM, draw, share, train, loss, rows)


def _errors(large: Large, cases: Sequence[Case], law: str, predict: Predict) -> pd.DataFrame:
    rows = []
    for case, predicted in zip(cases, predict(large, cases), strict=True):
        known = case._asdict() | {
            "law": law,
            "flops": case.rows["flops_6nd"].sum(),
            "runs": len(case.rows),
        }
        del known["rows"]
        targets = large[case.train]
        off = percent_off(predicted, targets[case.loss])
        rows += [
            known | {"run": run, "percent": one}
            for run, one in zip(targets["run"], off, strict=True)
        ]
    return pd.DataFrame(rows)


def _by_law(large: Large, cases: Sequence[Case]) -> list[np.ndarray]:
    problems = [Problem(case.rows, case.loss) for case in cases]
    fits = fit_many(EQUATION_4, problems, starts=STARTS)
    return [fit.at(large[case.train]) for fit, case in zip(fits, cases, strict=True)]


def _by_bayes(large: Large, cases: Sequence[Case]) -> list[np.ndarray]:
    def predict(case: Case) -> np.ndarray:
        known = bayes.posterior(_points(case.rows), case.rows[case.loss].to_numpy(float))
        return np.exp(known.forecast(_points(large[case.train]))[0])

    return [predict(case) for case in cases]


def _by_default(large: Large, cases: Sequence[Case]) -> list[np.ndarray]:
    def predict(case: Case) -> np.ndarray:
        known = calibrated.calibrate(_points(case.rows), case.rows[case.loss].to_numpy(float))
        return known.predictive(_points(large[case.train])).center()

    return [predict(case) for case in cases]


def _with_every_loss(found: pd.DataFrame) -> pd.DataFrame:
    """The rows of cases that were gone through for all losses."""
    key = ["law", "chosen_by", "share", "draw"]
    return found[found.groupby(key)["loss"].transform("nunique") == len(LOSSES)]


def _at(part: pd.DataFrame, chosen_by: str, law: str, share: float) -> float:
    rows = part[
        (part["chosen_by"] == chosen_by) & (part["law"] == law) & (part["share_of_paper"] == share)
    ]
    return float(rows["percent"].iloc[0])


def _pinned(form: laws.Form, name: str, value: float) -> laws.Form:
    """`form` with one parameter held at a value."""
    held = tuple(
        dataclasses.replace(one, low=value, high=value) if one.name == name else one
        for one in form.parameters
    )
    return dataclasses.replace(form, name=f"{form.name}_pinned", parameters=held)


def _points(rows: pd.DataFrame) -> Float[np.ndarray, "2 n"]:
    return rows[list(EQUATION_4.inputs)].to_numpy(float).T
