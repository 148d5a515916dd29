"""How far a preparation is: a bar on a terminal, a line now and then elsewhere."""

import time
from typing import Self

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from scaling_jax.data.prepare import Todo
from scaling_jax.data.workers import Work
from scaling_jax.terminal import clock, console, say

LINE_EVERY_SECONDS = 10.0


class Meter:
    """Draws a bar while the block is open, if there is something to do."""

    def __init__(self, name: str):
        self._name = name
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[detail]}"),
            console=console,
        )
        self._todo = Todo(0, 0, 0)
        self._done = Work()
        self._start = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar.tasks:
            self._bar.stop()

    def begin(self, todo: Todo) -> None:
        """Hears what is to be done."""
        self._todo = todo
        self._start = self._last_line = time.monotonic()
        if todo.kept and todo.shards:
            say(f"{self._name}: shards that are there: {todo.kept:,}, to be made: {todo.shards:,}")
        if todo.shards and console.is_terminal:
            self._bar.add_task(self._name, total=todo.source_bytes, detail="")
            self._bar.start()

    def report(self, work: Work) -> None:
        """Hears of the work that has been done."""
        self._done = Work(*(sum(pair) for pair in zip(self._done, work, strict=True)))
        now = time.monotonic()
        if self._bar.tasks:
            bar = self._bar.tasks[0].id
            self._bar.update(bar, completed=self._done.source_bytes, detail=self._detail(now))
        elif now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            share = self._done.source_bytes / max(self._todo.source_bytes, 1)
            say(f"{self._name}: {share:.1%}  {self._detail(now)}")

    def _detail(self, now: float) -> str:
        seconds = max(now - self._start, 1e-9)
        done, left = self._done, self._todo.source_bytes - self._done.source_bytes
        seconds_left = seconds * left / done.source_bytes if done.source_bytes else float("inf")
        return (
            f"{done.text_bytes / 1e6:,.1f} MB of text  "
            f"{done.documents / seconds:,.0f} documents/s  "
            f"{done.tokens / seconds:,.0f} tokens/s  {clock(seconds_left)} left"
        )
