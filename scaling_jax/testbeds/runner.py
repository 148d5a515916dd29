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
from scaling_jax.models import counting
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.training import checkpoint, loop
from scaling_jax.training.checkpoint import Curve
from scaling_jax.training.loop import Progress

RECORDS_FILE = "records.csv"


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is: its newest saved step, and whether its scores are there.

    Its first `branched_at` steps were trained by another run, or will be if it is not started.
    """

    run: PlannedRun
    step: int
    branched_at: int
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
class Cost:
    """Training FLOPs of a testbed as 6 N D, every step counted once that is or will be trained.

    `spent` of `whole` are behind us; the same runs without branches take `separate`.
    """

    spent: float
    whole: float
    separate: float

    @property
    def saved(self) -> float:
        """The part of `separate` that branches save."""
        return 1 - self.whole / self.separate


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
    """Looks up how far `run` is; no state is loaded.

    Raises:
      UserError: the newest checkpoint is damaged.
    """
    folder = run.folder(out) / loop.CHECKPOINT_FOLDER
    step, branched_at = checkpoint.latest_step(folder), run.shared_steps
    if step is not None:
        branched_at = checkpoint.read_meta(folder).get("branched_at", 0)
    return RunStatus(run, step or 0, branched_at, _scores(run, out) is not None)


def cost(found: Sequence[RunStatus]) -> Cost:
    """What the training of all runs of a testbed takes, given how far each is."""

    def flops(status: RunStatus, steps: int) -> float:
        budget = status.run.budget
        return counting.flops_6nd(budget.params, steps * budget.tokens_per_step)

    return Cost(
        spent=sum(flops(each, max(each.step - each.branched_at, 0)) for each in found),
        whole=sum(flops(each, each.run.budget.steps - each.branched_at) for each in found),
        separate=sum(each.run.budget.flops_6nd for each in found),
    )


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

    A branch starts from its trunk's checkpoint, or from step 0 where somebody has removed that.

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

        yield FinishedRun(run, train_and_evaluate(_config(run, out), folder, tell), now=True)


def write_table(runs: Sequence[PlannedRun], out: Path) -> pd.DataFrame:
    """Writes and returns the records of all finished runs.

    Raises:
      UserError: no run is finished.
    """
    finished = ((run, _scores(run, out)) for run in runs)
    rows = [
        record(run, scores) | _repetition(run, out)
        for run, scores in finished
        if scores is not None
    ]
    if not rows:
        raise UserError(f"{out}: none of the testbed's {len(runs)} runs is finished")
    table = pd.DataFrame(rows)
    records.write(table, out / RECORDS_FILE)
    return table


def brief(table: pd.DataFrame) -> pd.DataFrame:
    """The records without what is the same everywhere, bounds and derived columns: for reading."""
    bounds = [name for name in records.measures(table) if name.endswith(("/low", "/high"))]
    constant = [name for name in ("seed",) if table[name].nunique() == 1]
    bits = [name for name in map(str, table.columns) if name.startswith(records.BITS_PER_BYTE)]
    names = [*bounds, *bits, *constant, "step", "tokens", "unique_tokens", "dataset", "model"]
    return table.drop(columns=names, errors="ignore")


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
    alone = [run.config.data for run in runs if not run.config.data.mixture]
    folders = {data.dataset: data.folder for data in alone}
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
        if score.get("bits_per_byte") is not None:
            row[f"{records.BITS_PER_BYTE}{name}"] = score["bits_per_byte"]
    return row


def _repetition(run: PlannedRun, out: Path) -> dict[str, int]:
    """What the run's checkpoint says about repeated data; nothing where there is none any more."""
    folder = run.folder(out) / loop.CHECKPOINT_FOLDER
    if checkpoint.latest_step(folder) is None:
        return {}
    meta = checkpoint.read_meta(folder)
    return {"unique_tokens": meta["unique_tokens"]} if "unique_tokens" in meta else {}


def _config(run: PlannedRun, out: Path) -> RunConfig:
    """The config of `run`, with the folder of its trunk if the steps that they share are there."""
    if run.trunk is None:
        return run.config
    trunk = run.trunk.folder(out)
    if run.shared_steps not in checkpoint.steps(trunk / loop.CHECKPOINT_FOLDER):
        return run.config
    return dataclasses.replace(run.config, branch_from=str(trunk))


def _scores(run: PlannedRun, out: Path) -> validation.Scores | None:
    """What is kept of a run's scores, if every set that its config names is there."""
    scores = validation.read(run.folder(out), run.budget.steps)
    if scores is None or not set(run.config.data.validation) <= set(scores):
        return None
    return {name: scores[name] for name in run.config.data.validation}
