"""Runs a testbed: trains and evaluates what is not done yet, and collects the records table.

    out/runs/<name>-<hash>/     a run directory each
    out/records.csv             one row a finished run
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaling_jax.config import RunConfig
from scaling_jax.evaluation import validation
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.training import checkpoint, loop
from scaling_jax.training.loop import Progress

RECORDS_FILE = "records.csv"


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is: its newest saved step, and whether its scores are there."""

    run: PlannedRun
    step: int
    evaluated: bool

    @property
    def word(self) -> str:
        """`done`, `trained`, `started` or `waiting`."""
        if self.evaluated:
            return "done"
        if self.step == self.run.budget.steps:
            return "trained"
        return "started" if self.step else "waiting"


def status(run: PlannedRun, out: Path) -> RunStatus:
    """Looks up how far `run` is; nothing is loaded."""
    folder = run.folder(out)
    step = checkpoint.latest_step(folder / "checkpoints") or 0
    return RunStatus(run, step, validation.path(folder, run.budget.steps).exists())


def train_and_evaluate(
    config: RunConfig, folder: Path, report: Callable[[Progress], None] = lambda _: None
) -> validation.Scores:
    """Brings one run to its end and scores it; both are kept in `folder` and not done twice.

    Raises:
      UserError, NonFiniteLossError, Interrupted: as `training.loop.train`.
    """
    trained = loop.train(config, folder, report)
    known = validation.read(folder, trained.budget.steps)
    if known is not None and set(known) == set(config.data.validation):
        return known
    scores = validation.evaluate(config, trained.state["params"])
    validation.write(scores, folder, trained.budget.steps)
    return scores


def run_all(
    runs: Sequence[PlannedRun],
    out: Path,
    report: Callable[[PlannedRun, Progress], None] = lambda *_: None,
) -> Iterator[tuple[PlannedRun, dict[str, Any]]]:
    """Yields each run with its record, after training and evaluating it where that is not done.

    Raises:
      UserError, NonFiniteLossError, Interrupted: as `training.loop.train`.
    """
    for run in runs:
        folder = run.folder(out)
        scores = validation.read(folder, run.budget.steps)
        if scores is None:

            def tell(progress: Progress, run: PlannedRun = run) -> None:
                report(run, progress)

            scores = train_and_evaluate(run.config, folder, tell)
        yield run, record(run, scores)


def table(runs: Sequence[PlannedRun], out: Path) -> pd.DataFrame:
    """The records of all finished runs; empty if there are none."""
    finished = ((run, validation.read(run.folder(out), run.budget.steps)) for run in runs)
    return pd.DataFrame([record(run, scores) for run, scores in finished if scores is not None])


def record(run: PlannedRun, scores: validation.Scores) -> dict[str, Any]:
    """One row of the records table (`scaling_jax.records`)."""
    row: dict[str, Any] = {
        "run": run.name,
        "role": run.role,
        "dataset": run.config.data.dataset,
        "model": run.config.model.label,
        "params": run.budget.params,
        "tokens": run.budget.tokens,
        "token_multiplier": run.budget.token_multiplier,
        "flops_6nd": run.budget.flops_6nd,
        "seed": run.config.seed,
        "step": run.budget.steps,
    }
    for name, score in scores.items():
        columns = {f"loss/{name}": "loss", error_column(name): "error"}
        for column, key in columns.items():
            row[column] = score[key]
            row[f"{column}/low"] = score[f"{key}_low"]
            row[f"{column}/high"] = score[f"{key}_high"]
    return row


def error_column(validation_set: str) -> str:
    """The column of the top-1 next-token error on a validation set."""
    return f"error/next_token_{validation_set}"
