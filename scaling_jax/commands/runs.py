"""`scaling-jax train` and `evaluate`: one run."""

from pathlib import Path

from scaling_jax import cpu
from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import UserError


def train(config: str, *overrides: Overrides, out: Path | None = None) -> None:
    """Train one run, or go on with it where it was stopped.

    With branch_from=RUN, a run of schedule constant or warmup_stable_decay takes over the steps
    that it shares with another, and ends as if it had been trained alone.

    Args:
      config: a run's YAML, a path or the name of a packaged config.
      out: the run's folder; by default runs/<dataset>-<model>-<hash of the config>.
    """
    cpu.configure()
    from scaling_jax import config as configs
    from scaling_jax.progress import RunBar, describe_budget
    from scaling_jax.terminal import say
    from scaling_jax.training import budget, loop

    run = configs.load(configs.RunConfig, config, overrides)
    name = f"{run.data.dataset}-{run.model.label}-{run.identity}"
    folder = out or Path("runs") / name
    say(describe_budget(budget.plan(run)))
    with RunBar(name) as bar:
        trained = loop.train(run, folder, bar.report)
    if trained.branched_at:
        say(f"the first {trained.branched_at:,} steps were taken over from {run.branch_from}")
    say(f"trained: loss {trained.curve['loss'][-1]:.4f} at the last step; {folder}")


def evaluate(
    run: Path,
    *overrides: Overrides,
    tasks: str | None = None,
    data: Path | None = None,
    only: tuple[str, ...] = (),
    vocabulary: str | None = None,
) -> None:
    """Score a run's newest checkpoint on its validation sets, or on downstream tasks.

    The results of tasks are kept one by one, in the run's evaluations/: the same command goes on
    where it was stopped. Changes to the config are for that of the tasks: tasks.copa.shots=5.

    Args:
      run: the run's folder.
      tasks: gadre2024 (the 46 tasks of Gadre et al. 2024), or a YAML file of your own.
      data: the folder with the tasks' files; by default that of your YAML file.
      only: score these only; names of tasks or of averages, such as average_17.
      vocabulary: bytes, a SentencePiece .model or a tokenizer.json; by default that of the run's
        training data.
    """
    if tasks is None:
        if overrides or data or only or vocabulary:
            raise UserError("data, only, vocabulary and changes are for tasks: give --tasks")
        _evaluate_validation(run)
        return
    cpu.configure()
    from scaling_jax.commands.downstream import evaluate_tasks

    evaluate_tasks(run, tasks, overrides, data, only, vocabulary)


def _evaluate_validation(run: Path) -> None:
    cpu.configure()
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
