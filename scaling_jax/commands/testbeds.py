"""`scaling-jax testbed` and `quickstart`: grids of runs, from a config to a report."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cyclopts

from scaling_jax import claims, compilation, cpu
from scaling_jax.commands import parts
from scaling_jax.commands.cluster import ClusterOptions
from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import Interrupted, NonFiniteLossError, OutageError, UserError

if TYPE_CHECKING:
    from scaling_jax.config import TestbedConfig
    from scaling_jax.testbeds.grid import PlannedRun
    from scaling_jax.testbeds.packing import Packing
    from scaling_jax.testbeds.runner import Cost, RunStatus

CLUSTER = ClusterOptions()
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
        for folder in (out, *out.glob("runs/*")):
            if found := claims.holder(folder):
                raise UserError(f"{folder}: {found} works on it; --fresh will not remove it")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / QUICKSTART_MARK).touch()
    compilation.keep()
    prepare_apart(grid.datasets(runs), out=out / "data", vocabulary=runs[0].config.data.vocabulary)
    failure = _run(runs, out)
    _conclude(testbed, runs, out)
    if failure:
        raise failure


@app.command(name="run")
def run_testbed(
    config: str,
    *overrides: Overrides,
    out: Path | None = None,
    index: str = "1/1",
    only_share: bool = False,
    pack: bool = False,
    slots: int | None = None,
    cluster: ClusterOptions = CLUSTER,
) -> None:
    """Train and evaluate every run of a testbed that is not done; write records and report.

    Any number of processes, on any machines, may do this in one folder at the same time: a run
    that another one works on is left to it, and taken over if that one has ended.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
      index: i/n, for worker i of n: it does its share of the FLOPs first, then what is left of the
        others'. The first worker writes the report.
      only_share: leave the others' runs to them.
      pack: train runs of one shape side by side in one program; results are those of runs alone up
        to rounding. Of several processes that are joined each does so on the devices of its host.
      slots: with --pack, how many at a time on a host; by default as many as keep its devices busy.
    """
    cpu.configure()
    from scaling_jax.terminal import say
    from scaling_jax.testbeds import runner, shares
    from scaling_jax.training import agreement, distributed

    if slots is not None and not pack:
        raise UserError(f"slots={slots}: only with --pack")
    part = shares.Part(*parts.parse(index, "index"))
    testbed, runs = _testbed(config, overrides)
    folder = _folder(out, testbed)
    share = shares.share(runs, part)
    others = [] if only_share else [run for run in runs if run not in share]
    if part.count > 1:
        say(f"worker {index}: a share of {len(share)} of {len(runs)} runs")
    with cluster.joined():
        compilation.keep()
        mine = [*share, *others]
        statuses = [runner.status(run, folder) for run in mine]
        _check_fit(statuses)
        if pack:
            # Made before any process trains: they all see the same state, and plan the same.
            packed = agreement.together(lambda: _pack(statuses, slots), kinds=(UserError,))
            agreement.apart(
                lambda: _train_packed(packed, mine, folder),
                kinds=(UserError, OutageError, Interrupted),
            )
        if not distributed.is_first():
            runner.follow(mine, folder)
            return
        failure = _run(mine, folder)
    unfinished = sum(runner.status(run, folder).word not in ("done", "failed") for run in runs)
    if unfinished:
        say(f"{unfinished} of {len(runs)} runs are not done yet; when they are, the same command")
        say("without --only_share writes the report")
    elif part.index:
        say(f"all {len(runs)} runs are done; worker 1/{part.count} writes the report")
    else:
        _conclude(testbed, runs, folder)
    if failure:
        raise failure


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

    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import runner
    from scaling_jax.training import goodput

    testbed, runs = _testbed(config, overrides)
    folder = _folder(out, testbed)
    statuses = [runner.status(run, folder) for run in runs]
    branches = any(found.branched_at for found in statuses)
    held = any(found.holder for found in statuses)
    times = [goodput.seconds(found.run.folder(folder)) for found in statuses]
    rows = [
        {
            "run": found.run.name,
            "role": found.run.role,
            "state": found.word,
            "step": found.step,
            "steps": found.run.budget.steps,
            **(_origin(found) if branches else {}),
            **({"held_by": str(found.holder or "")} if held else {}),
            **({"goodput": f"{goodput.share(time):.0%}" if time else ""} if any(times) else {}),
            "params": found.run.budget.params,
            "tokens_asked": found.run.budget.tokens_asked,
            "flops_asked": found.run.budget.flops_asked,
        }
        for found, time in zip(statuses, times, strict=True)
    ]
    print_table(pd.DataFrame(rows), f"{testbed.name} in {folder}")
    _say_cost(runner.cost(statuses))
    if any(times):
        say(f"all runs: {goodput.describe(goodput.total(times))}")


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
    folder = _folder(out, testbed)
    table = runner.brief(runner.write_table(runs, folder), testbed.laws)
    print_table(table, "records")
    say(f"{folder / runner.RECORDS_FILE}")


def _testbed(config: str, overrides: Sequence[str]) -> tuple["TestbedConfig", list["PlannedRun"]]:
    from scaling_jax import config as configs
    from scaling_jax.testbeds import grid

    testbed = configs.load(configs.TestbedConfig, config, overrides)
    return testbed, grid.expand(testbed, source=config)


def _folder(out: Path | None, testbed: "TestbedConfig") -> Path:
    """Of the testbed; raises a UserError if it cannot be one."""
    folder = out or Path("testbeds") / testbed.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give another one")
    return folder


def _check_fit(statuses: list["RunStatus"]) -> None:
    """Refuses runs that are to be trained and cannot fit, before the first one is."""
    from scaling_jax.planning import devices

    for found in statuses:
        if found.word != "done":
            devices.check_fits(found.run.config)


def _pack(statuses: list["RunStatus"], slots: int | None) -> "Packing":
    """What is to be trained side by side, and what cannot be; said to the user."""
    import jax

    from scaling_jax.planning import devices
    from scaling_jax.terminal import say
    from scaling_jax.testbeds import packing

    packed = packing.plan(statuses, slots)
    for group in packed.groups:
        devices.check_fits(group.runs[0].config, jax.local_devices(), group.slots)
    for part in (*packed.groups, *packed.alone):
        say(str(part))
    return packed


def _train_packed(packed: "Packing", runs: list["PlannedRun"], out: Path) -> None:
    """Trains side by side what can be."""
    from scaling_jax.progress import GridProgress
    from scaling_jax.testbeds import packing

    with GridProgress(runs) as progress:
        packing.train(packed, out, progress.report, progress.trained, progress.waiting)


def _run(runs: list["PlannedRun"], out: Path) -> NonFiniteLossError | None:
    """Brings every run to its end; what went wrong in those that were given up."""
    from scaling_jax.progress import GridProgress
    from scaling_jax.testbeds import runner

    with GridProgress(runs) as progress:
        heard = (progress.report, progress.waiting, progress.given_up)
        try:
            for done in runner.run_all(runs, out, *heard):
                progress.finished(done)
        except NonFiniteLossError as failure:
            return failure
    return None


def _conclude(testbed: "TestbedConfig", runs: list["PlannedRun"], out: Path) -> None:
    """Prints and writes the records, the laws and the report; one process at a time."""
    from scaling_jax.terminal import print_table
    from scaling_jax.testbeds import runner

    with claims.held(out, patient=True):
        table = runner.brief(runner.write_table(runs, out), testbed.laws)
        print_table(table, f"{testbed.name}: records")
        _say_cost(runner.cost([runner.status(run, out) for run in runs]))
        _report(testbed, runs, out)


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

    table = records.read(out / runner.RECORDS_FILE, unhealthy=testbed.laws.unhealthy)
    fits = analysis.fit_all(table, testbed.laws)
    analysis.write(fits, out / analysis.FITS_FILE)
    own = [fitted for fitted in fits if analysis.in_distribution(fitted)]
    level = f"{testbed.laws.level:.0%} intervals"
    print_table(page.parameter_table(own), f"laws, {level}")
    held_out = page.held_out_table(own)
    if not held_out.empty:
        print_table(held_out, f"held-out runs: predicted and measured, {level}")
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
