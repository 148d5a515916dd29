"""From a testbed's config to its runs, every one planned before the first is started.

Runs that differ in their length only, and whose schedule is constant or warmup_stable_decay, are
branches of one trunk: each takes over the steps before the decay from the one before it, carries
them on, and decays. Such a column costs its longest run and one decay more for each other run.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from scaling_jax import config as configs
from scaling_jax import config_files
from scaling_jax.config import RunConfig, TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.training import budget as budgets
from scaling_jax.training.budget import Budget


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a testbed: `role` says whether laws are fitted to it or predict it.

    `trunk` is the run, if there is one, whose steps before its decay are the first of this one.
    """

    name: str
    role: str
    token_multiplier: float
    config: RunConfig
    budget: Budget
    trunk: "PlannedRun | None" = None

    @property
    def shared_steps(self) -> int:
        """How many of the first steps the trunk has trained."""
        return self.trunk.budget.decay_start if self.trunk else 0

    def folder(self, out: Path) -> Path:
        """Where the run lives; the name carries the content hash of its config."""
        return out / "runs" / f"{self.name}-{self.config.identity}"


def expand(testbed: TestbedConfig, source: str = "testbed") -> list[PlannedRun]:
    """Every run of `testbed`, smallest training compute first, so that trunks precede branches.

    Raises:
      UserError: naming `source`, if a run's config is faulty, one run stands in the grid twice, or
        there is no run in it.
    """
    runs = [
        _plan_run(testbed, source, block.role, *choice)
        for block in testbed.grid
        for choice in itertools.product(
            block.datasets, block.sizes, block.token_multipliers, block.seeds
        )
    ]
    if not runs:
        raise UserError(f"{source}: its grid holds no run")
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{source}: run {name} stands in the grid {names.count(name)} times")
    return _branched(sorted(runs, key=lambda run: run.budget.flops_6nd))


def datasets(runs: list[PlannedRun]) -> list[str]:
    """Every dataset that some run trains or is evaluated on, in a stable order."""
    trained = [name for run in runs for name in run.config.data.parts]
    sets = [name for run in runs for name in run.config.data.validation]
    evaluated = [name.partition("/")[0] for name in sets]
    return sorted({*trained, *evaluated})


def _plan_run(
    testbed: TestbedConfig,
    source: str,
    role: str,
    dataset: str,
    size: str,
    token_multiplier: float,
    seed: int,
) -> PlannedRun:
    name = f"{dataset}-{size}-m{token_multiplier:g}" + (f"-s{seed}" if seed else "")
    chosen = {
        "model": {"name": size},
        "data": {"dataset": dataset},
        "token_multiplier": token_multiplier,
        "seed": seed,
    }
    content = config_files.merge(config_files.merge(testbed.run, testbed.sizes[size]), chosen)
    config = configs.build(RunConfig, content, source=f"{source}, run {name}")
    try:
        budget = budgets.plan(config)
    except UserError as error:
        raise UserError(f"{source}, run {name}: {error}") from None
    return PlannedRun(name, role, token_multiplier, config, budget)


def _branched(runs: list[PlannedRun]) -> list[PlannedRun]:
    """The same runs, each with the earlier one as its trunk that shares most steps with it."""
    branched: list[PlannedRun] = []
    columns: dict[str, list[PlannedRun]] = {}
    for run in runs:
        column = columns.setdefault(json.dumps(run.config.first_steps), [])
        most = run.budget.decay_start
        shorter = [other for other in column if 0 < other.budget.decay_start <= most]
        trunk = max(shorter, key=lambda other: other.budget.decay_start, default=None)
        column.append(dataclasses.replace(run, trunk=trunk))
        branched.append(column[-1])
    return branched
