"""`scaling-jax train` and `evaluate`: one run."""

import contextlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax import claims, compilation, cpu
from scaling_jax.commands.cluster import ClusterOptions
from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    from scaling_jax.config import RunConfig
    from scaling_jax.training.profiling import Window

CLUSTER = ClusterOptions()


def train(
    config: str,
    *overrides: Overrides,
    out: Path | None = None,
    profile: str | None = None,
    cluster: ClusterOptions = CLUSTER,
) -> None:
    """Train one run, or go on with it where it was stopped.

    With branch_from=RUN, a run of schedule constant or warmup_stable_decay takes over the steps
    that it shares with another, and ends as if it had been trained alone.

    Args:
      config: a run's YAML, a path or the name of a packaged config.
      out: the run's folder; by default runs/<dataset>-<model>-<hash of the config>.
      profile: START:COUNT, steps to trace for TensorBoard with the plugin xprof.
    """
    started = time.perf_counter()
    cpu.configure()
    from scaling_jax import config as configs
    from scaling_jax.training.profiling import Window

    run = configs.load(configs.RunConfig, config, overrides)
    window = None if profile is None else Window.parse(profile)
    name = f"{run.data.dataset}-{run.model.label}-{run.identity}"
    with cluster.joined():
        compilation.keep()
        _train(run, out or Path("runs") / name, name, window, started)


def _train(
    run: "RunConfig", folder: Path, name: str, profile: "Window | None", started: float
) -> None:
    from scaling_jax.planning import devices
    from scaling_jax.progress import RunBar, describe_budget
    from scaling_jax.terminal import say
    from scaling_jax.training import budget, distributed, goodput, loop

    def wait(holder: claims.Holder) -> None:
        say(f"{folder}: {holder} has it; looking whether it is alive")

    say(describe_budget(budget.plan(run)))
    devices.check_fits(run)
    with contextlib.ExitStack() as stack:
        # One claim for all processes of the run: the first one makes it.
        claim = stack.enter_context(claims.held(folder, wait)) if distributed.is_first() else None
        bar = stack.enter_context(RunBar(name))
        check = claim.check if claim else lambda: None
        trained = loop.train(run, folder, bar.report, check, profile, started)
    if trained.branched_at:
        say(f"the first {trained.branched_at:,} steps were taken over from {run.branch_from}")
    spent = goodput.seconds(folder)
    if spent:
        say(goodput.describe(spent))
    say(f"trained: loss {trained.curve['loss'][-1]:.4f} at the last step; {folder}")


def evaluate(
    run: Path,
    *overrides: Overrides,
    tasks: str | None = None,
    data: Path | None = None,
    only: tuple[str, ...] = (),
    vocabulary: str | None = None,
    cache: Path | None = None,
    cluster: ClusterOptions = CLUSTER,
) -> None:
    """Score a run's newest checkpoint on its validation sets, or on downstream tasks.

    The results of tasks are kept one by one, in the run's evaluations/: the same command goes on
    where it was stopped. Changes to the config are for that of the tasks: tasks.copa.shots=5.

    Args:
      run: the run's folder.
      tasks: gadre2024 (the 46 tasks of Gadre et al. 2024), or a YAML file of your own.
      data: the folder with the tasks' files; by default that of your YAML file.
      only: score these only, tasks or averages, such as average_17; given once for each.
      vocabulary: bytes, a SentencePiece .model or a tokenizer.json; by default that of the run's
        training data.
      cache: where the tasks' token ids are kept for the next model; by default scaling_jax/prompts
        in $XDG_CACHE_HOME or ~/.cache.
    """
    if tasks is None and (overrides or data or only or vocabulary or cache):
        raise UserError("data, only, vocabulary, cache and changes are for tasks: give --tasks")
    cpu.configure()
    from scaling_jax.commands.downstream import evaluate_tasks
    from scaling_jax.training import distributed

    left_out: dict[str, str] = {}
    with cluster.joined():
        compilation.keep()
        if tasks is None:
            _evaluate_validation(run)
        else:
            left_out = evaluate_tasks(run, tasks, overrides, data, only, vocabulary, cache)
        (incomplete,) = distributed.from_first((bool(left_out),))
    if incomplete:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise UserError(f"left out: {reasons}")


def _evaluate_validation(run: Path) -> None:
    import pandas as pd

    from scaling_jax.evaluation import validation
    from scaling_jax.terminal import print_table, say
    from scaling_jax.training import distributed, goodput, loop
    from scaling_jax.training.files import read_config

    config = read_config(run)
    mine = run if distributed.is_first() else None
    with goodput.spent(mine, "restore"):
        restored = loop.restore(config, run)
    step = int(restored.state["step"])
    with goodput.spent(mine, "evaluation"):
        scores = validation.evaluate(config, restored.state["params"])
    if mine is None:
        return
    validation.write(scores, mine, step)
    table = pd.DataFrame(scores).T.rename_axis("set").reset_index()
    print_table(table, f"step {step}")
    say(f"{validation.path(run, step)}")
