"""The command line: each command reads its arguments, calls the package, prints.

A user's mistake is one line on stderr and exit code 2. A run stopped by Ctrl-C or SIGTERM has saved
itself and exits with 128 + the signal's number; the same command goes on from there.
"""

import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cyclopts
from cyclopts import Parameter

from scaling_jax.errors import Interrupted, NonFiniteLossError, UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.config import TestbedConfig
    from scaling_jax.testbeds.grid import PlannedRun

# Heavy imports happen inside the commands, so that --help is there at once.

QUICKSTART_CONFIG = "testbeds/quickstart.yaml"
QUICKSTART_MARK = ".quickstart"

app = cyclopts.App(
    name="scaling-jax",
    help="Train small runs, fit scaling laws, predict big over-trained language models.",
    version=lambda: version("scaling_jax"),
    name_transform=lambda name: name,
    default_parameter=Parameter(negative=()),
    suppress_keyboard_interrupt=False,
)
data_app = cyclopts.App(name="data", help="Prepare and inspect token shards.")
testbed_app = cyclopts.App(name="testbed", help="Run a grid of training runs.")
reproduce_app = cyclopts.App(name="reproduce", help="Reproduce papers from what they released.")
app.command(data_app)
app.command(testbed_app)
app.command(reproduce_app)

Overrides = Annotated[str, Parameter(help="Changes to the config: section.key=value")]


@app.command
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
    _prepare_cpu()
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


@data_app.command(name="prepare")
def prepare_data(
    *tasks: str,
    out: Path = Path("data"),
    vocabulary: str = "bytes",
    shards: int = 1,
    data_dir: Path | None = None,
) -> None:
    """Turn corpora into token shards: OUT/<task>/train and OUT/<task>/validation.

    Args:
      tasks: python_code, python_docs, zipf_markov, or paths to your own .txt or .jsonl text.
      out: folder for the shards.
      vocabulary: bytes, a SentencePiece file.model or a Hugging Face tokenizer.json.
      shards: how many files a split is spread over.
      data_dir: where tensorflow-datasets keeps what it builds.
    """
    from scaling_jax.data import prepare

    if not tasks:
        raise UserError("data prepare: name at least one task")
    for task in tasks:
        prepare.prepare(
            task,
            out=out,
            vocabulary=vocabulary,
            shards=shards,
            data_dir=data_dir,
            progress=prepare.print_finished,
        )


@data_app.command(name="inspect")
def inspect_data(folder: Path, *, sequence_length: int = 256, samples: int = 3) -> None:
    """Look into a prepared split: sizes, document lengths, duplicates, decoded rows.

    Args:
      folder: of the split, such as data/python_code/train.
      sequence_length: of the rows.
      samples: how many rows to decode.
    """
    from scaling_jax.data.inspect import inspect
    from scaling_jax.terminal import say

    found = inspect(folder, sequence_length, samples)
    lengths = ", ".join(f"{q:.0%}: {n:,}" for q, n in found.document_lengths.items())
    say(f"{found.task} {found.split}: {found.documents:,} documents, {found.tokens:,} tokens")
    say(f"bytes per token: {found.bytes_per_token:.3f}")
    say(f"document lengths in tokens, by quantile: {lengths}")
    say(f"rows of {sequence_length}: {found.rows:,}, duplicates {found.duplicate_rows:.2%}")
    if found.entropy_rate is not None:
        say(f"entropy rate: {found.entropy_rate:.4f} nats per token")
    for sample in found.samples:
        say(f"--- row\n{sample}")


@app.command
def train(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Train one run, or go on with it where it was stopped.

    Args:
      config: a run's YAML, a path or the name of a packaged config.
      out: the run's folder; by default runs/<dataset>-<model>-<hash of the config>.
    """
    _prepare_cpu()
    from scaling_jax import config as configs
    from scaling_jax.terminal import RunBar, describe_budget, say
    from scaling_jax.training import budget, loop

    run = configs.load(configs.RunConfig, config, overrides)
    name = f"{run.data.dataset}-{run.model.label}-{run.identity}"
    folder = out or Path("runs") / name
    say(describe_budget(budget.plan(run)))
    with RunBar(name) as bar:
        trained = loop.train(run, folder, bar.report)
    say(f"trained: loss {trained.curve['loss'][-1]:.4f} at the last step; {folder}")


@app.command
def evaluate(run: Path) -> None:
    """Score a run's newest checkpoint on its validation sets.

    Args:
      run: the run's folder.
    """
    _prepare_cpu()
    import pandas as pd

    from scaling_jax import config as configs
    from scaling_jax.evaluation import validation
    from scaling_jax.terminal import print_table, say
    from scaling_jax.training import loop

    config = configs.load(configs.RunConfig, run / loop.CONFIG_FILE)
    restored = loop.restore(config, run)
    step = int(restored.state["step"])
    scores = validation.evaluate(config, restored.state["params"])
    validation.write(scores, run, step)
    table = pd.DataFrame(scores).T.rename_axis("set").reset_index()
    print_table(table, f"step {step}")
    say(f"{validation.path(run, step)}")


@testbed_app.command(name="run")
def run_testbed(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Train and evaluate every run of a testbed that is not done; write records and report.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    _prepare_cpu()
    testbed, runs = _testbed(config, overrides)
    folder = out or Path("testbeds") / testbed.name
    _run(testbed, runs, folder)
    _report(testbed, runs, folder)


@testbed_app.command(name="status")
def show_testbed_status(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Say how far each run of a testbed is.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    import pandas as pd

    from scaling_jax.terminal import print_table
    from scaling_jax.testbeds import runner

    testbed, runs = _testbed(config, overrides)
    folder = out or Path("testbeds") / testbed.name
    rows = [
        {
            "run": found.run.name,
            "role": found.run.role,
            "state": found.word,
            "step": found.step,
            "steps": found.run.budget.steps,
            "tokens": found.run.budget.tokens,
            "flops_6nd": found.run.budget.flops_6nd,
        }
        for found in (runner.status(run, folder) for run in runs)
    ]
    print_table(pd.DataFrame(rows), f"{testbed.name} in {folder}")


@testbed_app.command(name="table")
def write_testbed_table(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Write and print the records of the runs that are done.

    Args:
      config: a testbed's YAML.
      out: its folder; by default testbeds/<name>.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import runner

    testbed, runs = _testbed(config, overrides)
    folder = out or Path("testbeds") / testbed.name
    print_table(runner.brief(runner.write_table(runs, folder)), "records")
    say(f"{folder / runner.RECORDS_FILE}")


@app.command
def fit(
    table: Path,
    *,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    loss: str | None = None,
    chance: float | None = None,
    level: float = 0.9,
    out: Path | None = None,
) -> None:
    """Fit a law to a records table, one fit a dataset; predict the rows in role held_out.

    Args:
      table: CSV, Parquet or JSON with params, tokens and loss/<set> or error/<task> columns.
      law: its name.
      target: the column to fit; may be left out where the table has only one.
      dataset: only its rows.
      loss: for error laws, the loss column that is their input.
      chance: for error laws, the error of guessing, to which the asymptote is pinned.
      level: of the intervals.
      out: a JSON file for the fits.
    """
    from scaling_jax.report.page import held_out_table, parameter_table
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import analysis

    rows = _rows(table, dataset)
    fits = analysis.fit_law(rows, law, _target(rows, target), loss=loss, chance=chance, level=level)
    print_table(parameter_table(fits), f"parameters, {level:.0%} intervals")
    held_out = held_out_table(fits)
    if not held_out.empty:
        print_table(held_out, f"held-out runs, {level:.0%} intervals")
    for fitted in fits:
        for warning in fitted["warnings"]:
            say(f"warning: {fitted['dataset']}: {warning}")
    if out:
        analysis.write(fits, out)
        say(f"{out}")


@app.command
def predict(
    table: Path,
    *,
    params: float,
    tokens: float,
    law: str = "over_training",
    target: str | None = None,
    dataset: str | None = None,
    level: float = 0.9,
    method: str = "calibrated",
) -> None:
    """Predict the loss of a run with so many parameters and tokens, with an interval.

    Args:
      table: as for fit.
      params: N of the run.
      tokens: D of the run.
      law: its name.
      target: the column to predict; may be left out where the table has only one.
      dataset: only its rows; may be left out where the table has only one.
      level: of the interval.
      method: of the interval.
    """
    from scaling_jax import laws
    from scaling_jax.terminal import say
    from scaling_jax.testbeds import analysis

    rows = _rows(table, dataset)
    names = sorted(map(str, rows["dataset"].unique()))
    if len(names) > 1:
        raise UserError(f"{table}: has runs of several datasets, give one: {', '.join(names)}")
    column = _target(rows, target)
    fitted = laws.fit(law, analysis.split(rows)[0], target=column)
    found = fitted.predict(params=params, tokens=tokens, level=level, method=method)
    say(f"{column}: {found.value:.4f}, {level:.0%} interval {found.low:.4f} to {found.high:.4f}")
    for warning in (*fitted.warnings, *found.warnings):
        say(f"warning: {warning}")


@reproduce_app.command(name="gadre2024")
def reproduce_gadre2024(*, data: Path, out: Path = Path("reproduce/gadre2024")) -> None:
    """Every table and figure of Gadre et al. 2024 from its released testbed, and beyond.

    Args:
      data: exp_data of github.com/mlfoundations/scaling, or the folder that holds it.
      out: folder for results.json, tables, plots and report.html.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds.reproduce import gadre2024, gadre2024_page

    found = gadre2024.run(data, out, say)
    print_table(gadre2024_page.summary(found.results), "largest differences from the paper")
    print_table(found.tables["beyond_losses"], "held-out runs: relative error of losses, percent")
    print_table(
        found.tables["beyond_errors"], "error of the held-out runs: relative error, percent"
    )
    say(f"{out / gadre2024.REPORT_FILE}")


@reproduce_app.command(name="chinchilla")
def reproduce_chinchilla(*, data: Path, out: Path = Path("reproduce/chinchilla")) -> None:
    """The Chinchilla law as Besiroglu et al. 2024 fit it, from their digitised points.

    Args:
      data: folder of svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla.
      out: folder for results.json, parameters.csv, points.png and report.html.
    """
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds.reproduce import chinchilla

    print_table(chinchilla.run(data, out, say), "parameters and standard errors")
    say(f"{out / chinchilla.REPORT_FILE}")


def main() -> None:
    """Entry point of the `scaling-jax` script."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    try:
        app(exit_on_error=False, print_error=False)
    except (UserError, cyclopts.CycloptsError) as error:
        _exit(f"error: {_one_line(error)}", 2)
    except NonFiniteLossError as error:
        _exit(f"error: {error}", 1)
    except Interrupted as error:
        _exit(f"{error}; the same command goes on from there", 128 + error.signal)
    except KeyboardInterrupt:
        _exit("stopped; the same command goes on from what is finished", 130)


def _prepare_cpu() -> None:
    from scaling_jax import cpu

    cpu.configure()


def _testbed(config: str, overrides: Sequence[str]) -> tuple["TestbedConfig", list["PlannedRun"]]:
    from scaling_jax import config as configs
    from scaling_jax.testbeds import grid

    testbed = configs.load(configs.TestbedConfig, config, overrides)
    return testbed, grid.expand(testbed, source=config)


def _run(testbed: "TestbedConfig", runs: list["PlannedRun"], out: Path) -> None:
    """Brings every run to its end and prints the records."""
    from scaling_jax.terminal import GridProgress, print_table
    from scaling_jax.testbeds import runner

    with GridProgress(runs) as progress:
        for done in runner.run_all(runs, out, progress.report):
            progress.finished(done)
    print_table(runner.brief(runner.write_table(runs, out)), f"{testbed.name}: records")


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


def _rows(table: Path, dataset: str | None) -> "pd.DataFrame":
    """The rows of a records table, of one dataset if it is given."""
    from scaling_jax import records
    from scaling_jax.errors import nearest

    rows = records.read(table)
    if dataset is None:
        return rows
    names = sorted(map(str, rows["dataset"].unique()))
    if dataset not in names:
        raise UserError(f"{table}: no dataset '{dataset}' ({nearest(dataset, names)})")
    return rows[rows["dataset"] == dataset]


def _target(rows: "pd.DataFrame", target: str | None) -> str:
    """The column to fit: the one given, or the only one there is."""
    from scaling_jax import records

    found = records.targets(rows)
    if target is None and len(found) != 1:
        raise UserError(f"give --target: one of {', '.join(found) or 'none (no loss/ column)'}")
    return target or found[0]


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)
