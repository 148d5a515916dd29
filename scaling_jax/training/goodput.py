"""Where the time of a run goes: how much of it is training, and what the rest was lost to.

Wall time is split into parts, each second counted once, in the innermost part that it falls into.
`goodput.json` in the run's folder holds them for every call, {"calls": [{"started", "seconds"}]},
and is renewed every few seconds, so that a call that is killed loses no more than those.

Goodput is the share of `training` in the sum: steps that a kill made necessary again are counted
once as training, by the call that was killed, and once as `repeated`.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from scaling_jax import atomic
from scaling_jax.training.files import GOODPUT_FILE

PARTS = {
    "training": "training",
    "start_up": "start-up",
    "restore": "restore",
    "compile": "compile",
    "data": "data wait",
    "checkpoint": "checkpoints",
    "evaluation": "evaluation",
    "repeated": "repeated steps",
}
SECONDS_BETWEEN_WRITES = 5.0

Item = TypeVar("Item")


class Clock:
    """Splits the time of one call into parts; it runs from `started` until the block is left.

    Nothing is written before `begin`: a call that finds nothing to do leaves no trace.

    Args:
      folder: of the run; None writes nothing, where another process does.
      part: into which the time falls at first.
      started: when the call began, by `time.perf_counter`; by default now.
    """

    def __init__(self, folder: Path | None, part: str = "start_up", started: float | None = None):
        now = time.perf_counter()
        self._path = folder / GOODPUT_FILE if folder else None
        self._since = now if started is None else started
        begun = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=now - self._since)
        self._began = begun.isoformat(timespec="seconds")
        self._part = part
        self._seconds: dict[str, float] = {}
        self._earlier: list[dict[str, Any]] = []
        self._written: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._count()
        if self._written is not None:
            self._write()

    def begin(self) -> None:
        """From here on the call is kept in the folder."""
        if self._path is not None:
            self._earlier = _read(self._path)
            self._write()

    def enter(self, part: str) -> None:
        """From now on the time falls into `part`."""
        self._count()
        self._part = part
        if self._written is not None and self._since - self._written > SECONDS_BETWEEN_WRITES:
            self._write()

    @contextlib.contextmanager
    def within(self, part: str) -> Iterator[None]:
        """The time of the block falls into `part`."""
        around = self._part
        self.enter(part)
        try:
            yield
        finally:
            self.enter(around)

    def waiting(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, the time that each takes to come falling into `part`."""
        coming = iter(items)
        while True:
            with self.within(part):
                try:
                    item = next(coming)
                except StopIteration:
                    return
            yield item

    def _count(self) -> None:
        now = time.perf_counter()
        self._seconds[self._part] = self._seconds.get(self._part, 0.0) + now - self._since
        self._since = now

    def _write(self) -> None:
        assert self._path is not None  # begin() has made sure
        mine = {part: round(seconds, 3) for part, seconds in self._seconds.items()}
        calls = [*self._earlier, {"started": self._began, "seconds": mine}]
        with contextlib.suppress(OSError):  # a full disk is no reason to stop a run
            atomic.write_text(self._path, json.dumps({"calls": calls}) + "\n")
        self._written = self._since


@contextlib.contextmanager
def spent(folder: Path | None, part: str) -> Iterator[None]:
    """Counts the time of the block as `part` of the run in `folder`."""
    with Clock(folder, part) as clock:
        clock.begin()
        yield


def seconds(folder: Path) -> dict[str, float]:
    """The seconds of all calls of the run in `folder`, by part; empty if nothing is known."""
    return total([call["seconds"] for call in _read(folder / GOODPUT_FILE)])


def total(every: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of the parts."""
    sums: dict[str, float] = {}
    for seconds in every:
        for part, count in seconds.items():
            sums[part] = sums.get(part, 0.0) + count
    return sums


def share(seconds: Mapping[str, float]) -> float:
    """The share of training in `seconds`."""
    return seconds.get("training", 0.0) / (sum(seconds.values()) or 1.0)


def describe(seconds: Mapping[str, float]) -> str:
    """Goodput and what the rest was lost to, most first, in one line."""
    lost = {part: count for part, count in seconds.items() if part != "training"}
    parts = sorted(lost.items(), key=lambda item: -item[1])
    words = ", ".join(f"{PARTS.get(part, part)} {count:.1f} s" for part, count in parts if count)
    whole = f"goodput {share(seconds):.0%} of {sum(seconds.values()):,.1f} s"
    return f"{whole}; lost to {words}" if words else whole


def _read(path: Path) -> list[dict[str, Any]]:
    """The calls in a file; none where it makes no sense, which is no reason to stop a run."""
    try:
        calls = json.loads(path.read_text(encoding="utf-8"))["calls"]
        return [
            {
                "started": str(call["started"]),
                "seconds": {str(part): float(count) for part, count in call["seconds"].items()},
            }
            for call in calls
        ]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
