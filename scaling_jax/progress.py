"""How far training is: bars that move on a terminal, plain lines elsewhere."""

import time
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from scaling_jax.claims import Holder
from scaling_jax.models import counting
from scaling_jax.terminal import clock, console, say
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.testbeds.runner import FinishedRun
from scaling_jax.training.budget import Budget
from scaling_jax.training.loop import Progress as RunProgress

PLAIN_LINE_EVERY_SECONDS = 10.0


class _Bars:
    """Bars that are drawn, on a terminal only, while the block is open."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )

    def __enter__(self) -> Self:
        if console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if console.is_terminal:  # elsewhere stopping would print an empty line
            self._bars.stop()


class GridProgress(_Bars):
    """How far a grid of runs is: one bar for all of it, one for each run that is training."""

    def __init__(self, runs: list[PlannedRun]):
        super().__init__()
        self._left = {
            run.name: _work(run) * (1 - run.shared_steps / run.budget.steps) for run in runs
        }
        self._count = len(runs)
        # What the time left is judged by: work done in so many seconds of training. Compiling,
        # evaluating and runs that were done already do not count.
        self._work_done, self._seconds = 0.0, 0.0
        self._work_of: dict[str, float] = {}
        self._last: float | None = None
        self._grid = self._bars.add_task("testbed", total=len(runs), detail="")
        self._tasks: dict[str, TaskID] = {}
        self._waited_for: set[str] = set()

    def report(self, run: PlannedRun, progress: RunProgress) -> None:
        """Hears of every training step."""
        if run.name not in self._tasks:
            self._tasks[run.name] = self._bars.add_task(run.name, total=progress.steps, detail="")
        done = _work(run) * progress.step / progress.steps
        now = time.monotonic()
        before, self._work_of[run.name] = self._work_of.get(run.name), done
        if before is not None and self._last is not None:
            self._work_done += done - before
            self._seconds += now - self._last
        self._last = now
        self._left[run.name] = _work(run) - done
        self._bars.update(self._tasks[run.name], completed=progress.step, detail=describe(progress))
        self._bars.update(self._grid, detail=self._time_left())

    def waiting(self, run: PlannedRun, holder: Holder) -> None:
        """Hears which run of another process is waited for; says so once for each process."""
        if holder.token not in self._waited_for:
            self._waited_for.add(holder.token)
            say(f"waiting for {run.name}: {holder} works on it")

    def finished(self, done: FinishedRun) -> None:
        """Hears of every run that is done."""
        self._end(done.run)
        del self._left[done.run.name]
        count = self._count - len(self._left)
        self._bars.update(self._grid, completed=count)
        state = self._time_left() if done.now else "(was done)"
        say(f"[{count}/{self._count}] {done.run.name}: loss {done.loss:.4f}  {state}".rstrip())

    def given_up(self, run: PlannedRun, reason: str) -> None:
        """Hears of each run that is not trained on."""
        self._end(run)
        self._left.pop(run.name)
        say(f"GIVEN UP: {run.name}: {reason}")

    def trained(self, run: PlannedRun) -> None:
        """Hears of each run that was trained beside others, and is not evaluated yet."""
        self._end(run)
        say(f"{run.name}: trained")

    def _end(self, run: PlannedRun) -> None:
        """Takes the bar of a run away; what happens until the next report is no training."""
        task = self._tasks.pop(run.name, None)
        if task is not None:
            self._bars.remove_task(task)
        self._last = None

    def _time_left(self) -> str:
        if not self._work_done:
            return ""
        return f"{clock(self._seconds * sum(self._left.values()) / self._work_done)} left"


class RunBar(_Bars):
    """How far one run is."""

    def __init__(self, name: str):
        super().__init__()
        self._name = name
        self._task: TaskID | None = None
        self._last_line = time.monotonic()

    def report(self, progress: RunProgress) -> None:
        """Hears of every training step."""
        if self._task is None:
            self._task = self._bars.add_task(self._name, total=progress.steps, detail="")
        self._bars.update(self._task, completed=progress.step, detail=describe(progress))
        now = time.monotonic()
        due = now - self._last_line > PLAIN_LINE_EVERY_SECONDS or progress.step == progress.steps
        if due and not console.is_terminal:
            self._last_line = now
            say(f"step {progress.step}/{progress.steps}  {describe(progress)}")


def describe(progress: RunProgress) -> str:
    """Loss, speed, utilisation and time left of a run, in a few words."""
    return (
        f"loss {progress.loss:.4f}  {progress.tokens_per_second:,.0f} tokens/s  "
        f"MFU {progress.model_flops_utilization:.1%}  {clock(progress.seconds_left)} left"
    )


def describe_budget(budget: Budget) -> str:
    """A run's size in a few words."""
    return (
        f"{budget.params:,} parameters, {budget.steps:,} steps, {budget.tokens:,} tokens "
        f"(M = {budget.token_multiplier:.3g}), {budget.flops_6nd:.3g} FLOPs"
    )


def _work(run: PlannedRun) -> float:
    return run.budget.tokens * counting.flops_model_per_token(run.config.model)
