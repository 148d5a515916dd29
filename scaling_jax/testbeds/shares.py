"""Dividing a testbed among workers: the same for all of them, without a word between them."""

import dataclasses
from collections.abc import Sequence

from scaling_jax.testbeds.grid import PlannedRun


@dataclasses.dataclass(frozen=True)
class Part:
    """Worker `index`, from 0, of `count`."""

    index: int
    count: int


def share(runs: Sequence[PlannedRun], part: Part) -> list[PlannedRun]:
    """The runs of one worker, in the order of `runs`; together the shares are all runs, each once.

    A trunk and its branches stay together, since each waits for the one before it. The columns are
    dealt out by falling FLOPs, each to the worker that has least so far (longest processing time
    first: Graham 1969), so that the busiest worker has at most 4/3 of what the best division gives.
    """
    columns: dict[str, list[PlannedRun]] = {}
    first: dict[str, str] = {}
    for run in runs:
        first[run.name] = first[run.trunk.name] if run.trunk else run.name
        columns.setdefault(first[run.name], []).append(run)
    loads, owner = [0.0] * part.count, {}
    for name, column in sorted(columns.items(), key=lambda item: (-_flops(item[1]), item[0])):
        owner[name] = loads.index(min(loads))
        loads[owner[name]] += _flops(column)
    return [run for run in runs if owner[first[run.name]] == part.index]


def _flops(column: Sequence[PlannedRun]) -> float:
    """What training a column takes, its shared steps once."""
    return sum(run.budget.flops_6nd * (1 - run.shared_steps / run.budget.steps) for run in column)
