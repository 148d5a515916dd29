"""Runs a testbed: trains and evaluates what is not done yet, and collects the records table.

out/runs/<name>-<hash>/     a run directory each
out/records.csv             one row a finished run

Any number of processes may run one testbed: each run belongs to the one that has claimed it.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from scaling_jax import claims, records
from scaling_jax.claims import Holder, Timing, Watcher
from scaling_jax.config import LawsConfig, RunConfig
from scaling_jax.data.shards import Shards
from scaling_jax.errors import NonFiniteLossError, UserError
from scaling_jax.evaluation import run_tasks, validation
from scaling_jax.models import counting
from scaling_jax.testbeds import failures
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.training import checkpoint, distributed, goodput, loop
from scaling_jax.training.checkpoint import Curve
from scaling_jax.training.files import CHECKPOINT_FOLDER
from scaling_jax.training.loop import Progress

RECORDS_FILE = "records.csv"
# What the first process says to the others instead of a run's number.
ALL_DONE = -1


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """How far a run is: its newest step that can be gone on from, and whether its scores are there.

    Its first `branched_at` steps were trained by another run, or will be if it is not started.
    `given_up` says that its loss was no number; `holder` is the process that works on it now.
    """

    run: PlannedRun
    step: int
    branched_at: int
    evaluated: bool
    given_up: bool
    holder: Holder | None

    @property
    def word(self) -> str:
        """`done`, `failed`, `trained`, `started` or `waiting`."""
        if self.evaluated:
            return "done"
        if self.given_up:
            return "failed"
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
    """Looks up how far `run` is; no state is loaded. Of a damaged checkpoint it warns."""
    meta = checkpoint.newest_whole_meta(run.folder(out) / CHECKPOINT_FOLDER)
    step, branched_at = 0, run.shared_steps
    if meta is not None:
        step, branched_at = meta["step"], meta.get("branched_at", 0)
    evaluated = _scores(run, out) is not None
    given_up, holder = bool(failures.reason(run.folder(out))), claims.holder(run.folder(out))
    return RunStatus(run, step, branched_at, evaluated, given_up, holder)


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
    config: RunConfig,
    folder: Path,
    report: Callable[[Progress], None] = lambda _: None,
    check: Callable[[], None] = lambda: None,
) -> validation.Scores:
    """Brings one run to its end, going on from what is in `folder`, and scores it.

    Raises:
      UserError, NonFiniteLossError, Interrupted: as `training.loop.train`.
      UserError: a downstream task that the config asks for is not what it should be.
    """
    tasks = run_tasks.find(config)
    trained = loop.train(config, folder, report, check)
    mine = folder if distributed.is_first() else None
    with goodput.spent(mine, "evaluation"):
        scores = validation.evaluate(config, trained.state["params"])
    check()
    step, params = trained.budget.steps, trained.state["params"]
    if mine is not None:
        validation.write(scores, mine, step)
    if tasks is not None:
        saved = folder / CHECKPOINT_FOLDER
        model = "" if mine is None else checkpoint.content(checkpoint.read_meta(saved))
        run_tasks.evaluate(tasks, config, folder, step, params, model)
    return scores


def run_all(
    runs: Sequence[PlannedRun],
    out: Path,
    report: Callable[[PlannedRun, Progress], None] = lambda *_: None,
    waiting: Callable[[PlannedRun, Holder], None] = lambda *_: None,
    given_up: Callable[[PlannedRun, str], None] = lambda *_: None,
    timing: Timing = claims.TIMING,
) -> Iterator[FinishedRun]:
    """Yields each run once it is trained and evaluated; what is done already is not done again.

    Runs that other processes work on come last: when nothing else is left, they are waited for,
    and taken over if their process has ended. A branch starts from its trunk's checkpoint, or from
    step 0 where somebody has removed that.

    Args:
      runs: in this order; a trunk precedes its branches.
      out: the testbed's folder.
      report: hears of every step that is trained here.
      waiting: hears which run is waited for, and who has it.
      given_up: hears of each run whose loss is no number, and why; the others go on without it.
      timing: of claims.

    Raises:
      UserError, Interrupted: as `training.loop.train`.
      NonFiniteLossError: once all others are finished, naming the runs that were given up.
      HeldError: this process stood still for so long that another one has taken over its run.
    """
    numbers = {run.name: number for number, run in enumerate(runs)}
    watcher, left = Watcher(timing), list(runs)
    reasons: dict[str, str] = {}
    while left:
        before = len(left)
        for run in tuple(left):
            try:
                finished = _finish(run, numbers[run.name], out, watcher, left, report)
            except NonFiniteLossError as error:
                reasons[run.name] = str(error)
                left.remove(run)
                given_up(run, str(error))
                continue
            if finished is not None:
                left.remove(run)
                yield finished
        if len(left) == before:
            found = claims.holder(left[0].folder(out))
            if found is not None:
                waiting(left[0], found)
            time.sleep(timing.look)
    distributed.from_first((ALL_DONE, 0))
    if reasons:
        raise NonFiniteLossError("; ".join(f"{name}: {why}" for name, why in reasons.items()))


def follow(runs: Sequence[PlannedRun], out: Path) -> None:
    """What the other processes of several do while the first one is in `run_all`.

    They train and score with it the runs that it has claimed, and give up those that it gives up.

    Raises:
      UserError, Interrupted: as `training.loop.train`.
    """
    while True:
        number, branches = distributed.from_first((ALL_DONE, 0))
        if number == ALL_DONE:
            return
        run = runs[number]
        with contextlib.suppress(NonFiniteLossError):
            train_and_evaluate(config_of(run, out, bool(branches)), run.folder(out))


def write_table(runs: Sequence[PlannedRun], out: Path) -> pd.DataFrame:
    """Writes and returns the records of all finished runs.

    Raises:
      UserError: no run is finished.
    """
    finished = ((run, _scores(run, out)) for run in runs)
    rows = [
        record(run, scores) | _errors(run, out) | _training(run, out)
        for run, scores in finished
        if scores is not None
    ]
    if not rows:
        raise UserError(f"{out}: none of the testbed's {len(runs)} runs is finished")
    table = pd.DataFrame(rows)
    records.unsign(out / RECORDS_FILE)
    records.write(table, out / RECORDS_FILE)
    records.sign(out / RECORDS_FILE)
    return table


def brief(table: pd.DataFrame, laws: LawsConfig) -> pd.DataFrame:
    """The records for reading: losses, the errors that laws are fitted to, and what differs."""
    fitted = {column for name in table["dataset"] for column in laws.error_columns(str(name))}
    losses = {name for name in records.targets(table) if name.startswith("loss/")}
    numbers = (*records.MEASURE_PREFIXES, records.CHANCE)
    others = [
        name
        for name in map(str, table.columns)
        if name.startswith(numbers) and name not in fitted | losses
    ]
    constant = [name for name in ("seed", records.HEALTH) if _same_everywhere(table, name)]
    names = [*others, *constant, "step", "tokens", "unique_tokens", "dataset", "model"]
    return table.drop(columns=names, errors="ignore")


def _same_everywhere(table: pd.DataFrame, column: str) -> bool:
    return column in table and table[column].nunique(dropna=False) == 1


def curves(runs: Sequence[PlannedRun], out: Path) -> dict[str, Curve]:
    """The loss curve of each run that has a checkpoint, by the run's name."""
    folders = {run.name: run.folder(out) / CHECKPOINT_FOLDER for run in runs}
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


def config_of(run: PlannedRun, out: Path, branches: bool) -> RunConfig:
    """The config of `run`, with the folder of its trunk if it begins with that one's steps."""
    if not branches:
        return run.config
    assert run.trunk is not None
    return dataclasses.replace(run.config, branch_from=str(run.trunk.folder(out)))


def trunk_is_there(run: PlannedRun, out: Path) -> bool:
    """Whether the steps that `run` shares with its trunk are saved there."""
    assert run.trunk is not None
    return run.shared_steps in checkpoint.steps(run.trunk.folder(out) / CHECKPOINT_FOLDER)


def _finish(
    run: PlannedRun,
    number: int,
    out: Path,
    watcher: Watcher,
    left: Sequence[PlannedRun],
    report: Callable[[PlannedRun, Progress], None],
) -> FinishedRun | None:
    """Brings a run to its end; None if another process has it, or has the trunk it waits for.

    Raises:
      NonFiniteLossError: it is given up, now or by an earlier call.
    """
    known = _scores(run, out)
    if known is not None:
        return FinishedRun(run, known, now=False)
    folder = run.folder(out)
    if reason := failures.reason(folder):
        raise NonFiniteLossError(reason)
    unstarted = checkpoint.latest_step(folder / CHECKPOINT_FOLDER) is None
    if unstarted and run.trunk in left and not trunk_is_there(run, out):
        return None
    claim = watcher.take(folder)
    if claim is None:
        return None
    try:
        known = _scores(run, out)  # somebody may just have finished it
        if known is not None:
            return FinishedRun(run, known, now=False)
        branches = run.trunk is not None and trunk_is_there(run, out)
        distributed.from_first((number, int(branches)))
        config = config_of(run, out, branches)
        scores = train_and_evaluate(
            config, folder, lambda progress: report(run, progress), claim.check
        )
        return FinishedRun(run, scores, now=True)
    except NonFiniteLossError as error:
        failures.note(folder, str(error))
        raise
    finally:
        claim.release()


def _errors(run: PlannedRun, out: Path) -> dict[str, float]:
    """The columns of a finished run's downstream tasks."""
    kept = run_tasks.read(run.config, run.folder(out), run.budget.steps)
    return run_tasks.columns(kept) if kept else {}


def _training(run: PlannedRun, out: Path) -> dict[str, int | str]:
    """What the run's checkpoint says of its training; nothing where there is none any more."""
    folder = run.folder(out) / CHECKPOINT_FOLDER
    if checkpoint.latest_step(folder) is None:
        return {}
    meta = checkpoint.read_meta(folder)
    if meta["step"] != run.budget.steps:  # the last one was damaged or removed
        return {}
    return {name: meta[name] for name in ("unique_tokens", "health") if name in meta}


def _scores(run: PlannedRun, out: Path) -> validation.Scores | None:
    """What is kept of a run's scores, if every set and task that its config names is there."""
    scores = validation.read(run.folder(out), run.budget.steps)
    if scores is None or not set(run.config.data.validation) <= set(scores):
        return None
    if run_tasks.read(run.config, run.folder(out), run.budget.steps) is None:
        return None
    return {name: scores[name] for name in run.config.data.validation}
