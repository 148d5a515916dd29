"""`scaling-jax testbed` and `quickstart`: grids of runs, from a config to a report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cyclopts

from scaling_jax import cpu
from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    from scaling_jax.config import TestbedConfig
    from scaling_jax.testbeds.grid import PlannedRun
    from scaling_jax.testbeds.runner import Cost, RunStatus

QUICKSTART_CONFIG = "testbeds/quickstart.yaml"
QUICKSTART_MARK = ".quickstart"

app = cyclopts.App(name="testbed", help="Run a grid of training runs.")


def quickstart(
    *overrides: Overrides,
    out: Path = Path("quickstart"),
    config: str = QUICKSTART_CONFIG,
    fresh: bool = False,
) -> None:
    """Train a small testbed here, fit laws, predict held-out runs, write the report.

    A second call goes on where the first one was, and reuses all that is finished.

    Args:
      out: folder for everything that is made.
      config: the testbed.
      fresh: remove what is in the folder from an earlier quickstart, and start anew.
    """
    cpu.configure()
    from scaling_jax.data.prepare import prepare_apart
    from scaling_jax.testbeds import grid

    testbed, runs = _testbed(config, [*overrides, f"run.data.folder={out / 'data'}"])
    if fresh and out.exists():
        if not (out / QUICKSTART_MARK).exists():
            raise UserError(f"{out}: not a folder of quickstart; --fresh will not remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / QUICKSTART_MARK).touch()
    prepare_apart(grid.datasets(runs), out=out / "data", vocabulary=runs[0].config.data.vocabulary)
    _run(testbed, runs, out)
    _report(testbed, runs, out)


@app.command(name="run")
def run_testbed(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Train and evaluate every run of a testbed that is not done; write records and report.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    cpu.configure()
    testbed, runs = _testbed(config, overrides)
    folder = out or _default_folder(testbed)
    _run(testbed, runs, folder)
    _report(testbed, runs, folder)


@app.command(name="status")
def show_testbed_status(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Say how far each run of a testbed is, and what it asks for; needs no data.

    Tokens and FLOPs are those asked for; a run trains on the whole steps that they hold. A branch
    takes the first of its steps over from another run.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    import pandas as pd

    from scaling_jax.terminal import print_table
    from scaling_jax.testbeds import runner

    testbed, runs = _testbed(config, overrides)
    folder = out or _default_folder(testbed)
    statuses = [runner.status(run, folder) for run in runs]
    branches = any(found.branched_at for found in statuses)
    rows = [
        {
            "run": found.run.name,
            "role": found.run.role,
            "state": found.word,
            "step": found.step,
            "steps": found.run.budget.steps,
            **(_origin(found) if branches else {}),
            "params": found.run.budget.params,
            "tokens_asked": found.run.budget.tokens_asked,
            "flops_asked": found.run.budget.flops_asked,
        }
        for found in statuses
    ]
    print_table(pd.DataFrame(rows), f"{testbed.name} in {folder}")
    _say_cost(runner.cost(statuses))


@app.command(name="table")
def write_testbed_table(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Write and print the records of the runs that are done.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import runner

    testbed, runs = _testbed(config, overrides)
    folder = out or _default_folder(testbed)
    print_table(runner.brief(runner.write_table(runs, folder)), "records")
    say(f"{folder / runner.RECORDS_FILE}")


def _testbed(config: str, overrides: Sequence[str]) -> tuple["TestbedConfig", list["PlannedRun"]]:
    from scaling_jax import config as configs
    from scaling_jax.testbeds import grid

    testbed = configs.load(configs.TestbedConfig, config, overrides)
    return testbed, grid.expand(testbed, source=config)


def _default_folder(testbed: "TestbedConfig") -> Path:
    return Path("testbeds") / testbed.name


def _run(testbed: "TestbedConfig", runs: list["PlannedRun"], out: Path) -> None:
    """Brings every run to its end and prints the records."""
    from scaling_jax.progress import GridProgress
    from scaling_jax.terminal import print_table
    from scaling_jax.testbeds import runner

    with GridProgress(runs) as progress:
        for done in runner.run_all(runs, out, progress.report):
            progress.finished(done)
    print_table(runner.brief(runner.write_table(runs, out)), f"{testbed.name}: records")
    _say_cost(runner.cost([runner.status(run, out) for run in runs]))


def _origin(found: "RunStatus") -> dict[str, str | int]:
    """How many steps a run takes over, and from which."""
    trunk = found.run.trunk if found.branched_at else None
    return {"taken_over": found.branched_at, "from": trunk.name if trunk else ""}


def _say_cost(cost: "Cost") -> None:
    """Says what training takes, and what branches save of it if there are any."""
    from scaling_jax.terminal import say

    line = f"training: {cost.spent:.3g} of {cost.whole:.3g} FLOPs (6 N D) done"
    if cost.saved:
        line += f"; separate runs would take {cost.separate:.3g}: branches save {cost.saved:.0%}"
    say(line)


def _report(testbed: "TestbedConfig", runs: list["PlannedRun"], out: Path) -> None:
    """Fits the testbed's laws, prints them and writes fits.json and the report."""
    from scaling_jax import records
    from scaling_jax.report import page
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import analysis, runner

    table = records.read(out / runner.RECORDS_FILE)
    fits = analysis.fit_all(table, testbed.laws)
    analysis.write(fits, out / analysis.FITS_FILE)
    own = [fitted for fitted in fits if analysis.in_distribution(fitted)]
    level = f"{testbed.laws.level:.0%} intervals"
    print_table(page.parameter_table(own), f"laws, {level}")
    print_table(page.held_out_table(own), f"held-out runs: predicted and measured, {level}")
    report = page.write(
        out,
        title=f"Testbed {testbed.name}",
        table=table,
        fits=fits,
        curves=runner.curves(runs, out),
        entropy_rates=runner.entropy_rates(runs),
    )
    say(f"\nrecords: {out / runner.RECORDS_FILE}")
    say(f"fits:    {out / analysis.FITS_FILE}")
    say(f"report:  {report}")
