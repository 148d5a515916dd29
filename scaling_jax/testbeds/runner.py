"""Runs a testbed: trains and evaluates what is not done yet, and collects the records table.

out/runs/<name>-<hash>/     a run directory each
out/records.csv             one row a finished run
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaling_jax import records
from scaling_jax.config import RunConfig
from scaling_jax.data.shards import Shards
from scaling_jax.errors import UserError
from scaling_jax.evaluation import validation
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.training import checkpoint, loop
from scaling_jax.training.checkpoint import Curve
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


@dataclasses.dataclass(frozen=True)
class FinishedRun:
    """A run with its scores; `now` says whether it was finished by this call."""

    run: PlannedRun
    scores: validation.Scores
    now: bool

    @property
    def loss(self) -> float:
        """On the first validation set; the run's own where it is among them."""
        own = self.run.config.data.dataset
        return self.scores.get(own, next(iter(self.scores.values())))["loss"]


def status(run: PlannedRun, out: Path) -> RunStatus:
    """Looks up how far `run` is; nothing is loaded."""
    step = checkpoint.latest_step(run.folder(out) / loop.CHECKPOINT_FOLDER) or 0
    return RunStatus(run, step, _scores(run, out) is not None)


def train_and_evaluate(
    config: RunConfig, folder: Path, report: Callable[[Progress], None] = lambda _: None
) -> validation.Scores:
    """Brings one run to its end, going on from what is in `folder`, and scores it.

    Raises:
      UserError, NonFiniteLossError, Interrupted: as `training.loop.train`.
    """
    trained = loop.train(config, folder, report)
    scores = validation.evaluate(config, trained.state["params"])
    validation.write(scores, folder, trained.budget.steps)
    return scores


def run_all(
    runs: Sequence[PlannedRun],
    out: Path,
    report: Callable[[PlannedRun, Progress], None] = lambda *_: None,
) -> Iterator[FinishedRun]:
    """Yields each run once it is trained and evaluated; what is done already is not done again.

    Raises:
      UserError, NonFiniteLossError, Interrupted: as `training.loop.train`.
    """
    for run in runs:
        folder = run.folder(out)
        known = _scores(run, out)
        if known is not None:
            yield FinishedRun(run, known, now=False)
            continue

        def tell(progress: Progress, run: PlannedRun = run) -> None:
            report(run, progress)

        yield FinishedRun(run, train_and_evaluate(run.config, folder, tell), now=True)


def write_table(runs: Sequence[PlannedRun], out: Path) -> pd.DataFrame:
    """Writes and returns the records of all finished runs.

    Raises:
      UserError: no run is finished.
    """
    finished = ((run, _scores(run, out)) for run in runs)
    rows = [record(run, scores) for run, scores in finished if scores is not None]
    if not rows:
        raise UserError(f"{out}: none of the testbed's {len(runs)} runs is finished")
    table = pd.DataFrame(rows)
    records.write(table, out / RECORDS_FILE)
    return table


def brief(table: pd.DataFrame) -> pd.DataFrame:
    """The records without what is the same everywhere, bounds and derived columns: for reading."""
    bounds = [name for name in records.measures(table) if name.endswith(("/low", "/high"))]
    constant = [name for name in ("seed",) if table[name].nunique() == 1]
    return table.drop(columns=[*bounds, *constant, "step", "tokens", "dataset", "model"])


def curves(runs: Sequence[PlannedRun], out: Path) -> dict[str, Curve]:
    """The loss curve of each run that has a checkpoint, by the run's name."""
    folders = {run.name: run.folder(out) / loop.CHECKPOINT_FOLDER for run in runs}
    return {
        name: checkpoint.read_curve(folder)
        for name, folder in folders.items()
        if checkpoint.latest_step(folder) is not None
    }


def entropy_rates(runs: Sequence[PlannedRun]) -> dict[str, float]:
    """Nats per token that no model can go below, of the datasets where that is known."""
    folders = {run.config.data.dataset: run.config.data.folder for run in runs}
    rates = {
        name: Shards.open(Path(folder) / name / "validation").entropy_rate
        for name, folder in sorted(folders.items())
    }
    return {name: rate for name, rate in rates.items() if rate is not None}


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
        columns = {f"loss/{name}": "loss", records.next_token_error(name): "error"}
        for column, key in columns.items():
            row[column] = score[key]
            row[f"{column}/low"] = score[f"{key}_low"]
            row[f"{column}/high"] = score[f"{key}_high"]
    return row


def _scores(run: PlannedRun, out: Path) -> validation.Scores | None:
    """What is kept of a run's scores, if every set that its config names is there."""
    scores = validation.read(run.folder(out), run.budget.steps)
    if scores is None or not set(run.config.data.validation) <= set(scores):
        return None
    return {name: scores[name] for name in run.config.data.validation}
