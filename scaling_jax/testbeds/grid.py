"""From a testbed's config to its runs, every one planned before the first is started."""

import dataclasses
import itertools
from pathlib import Path

from scaling_jax import config as configs
from scaling_jax.config import RunConfig, TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.training import budget as budgets
from scaling_jax.training.budget import Budget


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """One run of a testbed: `role` says whether laws are fitted to it or predict it."""

    name: str
    role: str
    token_multiplier: float
    config: RunConfig
    budget: Budget

    def folder(self, out: Path) -> Path:
        """Where the run lives; the name carries the content hash of its config."""
        return out / "runs" / f"{self.name}-{self.config.identity}"


def expand(testbed: TestbedConfig, source: str = "testbed") -> list[PlannedRun]:
    """Every run of `testbed`, smallest training compute first.

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
    return sorted(runs, key=lambda run: run.budget.flops_6nd)


def datasets(runs: list[PlannedRun]) -> list[str]:
    """Every dataset that some run trains or is evaluated on, in a stable order."""
    trained = [run.config.data.dataset for run in runs]
    evaluated = [name for run in runs for name in run.config.data.validation]
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
    content = configs.merge(configs.merge(testbed.run, testbed.sizes[size]), chosen)
    config = configs.build(RunConfig, content, source=f"{source}, run {name}")
    try:
        budget = budgets.plan(config)
    except UserError as error:
        raise UserError(f"{source}, run {name}: {error}") from None
    return PlannedRun(name, role, token_multiplier, config, budget)
