"""`scaling-jax evaluate RUN --tasks`: a run on downstream tasks."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.evaluation.downstream import Report
    from scaling_jax.evaluation.results import TaskResult, Unscorable
    from scaling_jax.evaluation.tasks import TasksConfig


def evaluate_tasks(
    run: Path,
    tasks: str,
    overrides: Sequence[str],
    data: Path | None,
    only: Sequence[str],
    vocabulary: str | None,
    cache: Path | None = None,
) -> dict[str, str]:
    """Scores a run's newest checkpoint on tasks, prints a table and keeps the results.

    Returns:
      Why tasks that were to be scored are left out, by their names.

    Raises:
      UserError: the tasks, the run or its vocabulary are not what they should be.
    """
    from scaling_jax import mesh as meshes
    from scaling_jax.data.run_vocabulary import run_vocabulary
    from scaling_jax.evaluation import downstream, prompt_cache
    from scaling_jax.evaluation import kept as kept_results
    from scaling_jax.evaluation import tasks as task_configs
    from scaling_jax.evaluation.model_scorer import TransformerScorer
    from scaling_jax.terminal import print_table, say
    from scaling_jax.training import checkpoint, loop
    from scaling_jax.training.files import read_config

    asked = task_configs.load(tasks, overrides)
    folder = _data_folder(tasks, data)
    present, missing = task_configs.locate(task_configs.select(asked, only), folder)
    config = read_config(run)
    words = run_vocabulary(config, vocabulary)
    restored = loop.restore(config, run)
    for file, names in missing.items():
        say(f"left out: {', '.join(names)}: {folder / file} is not there")
    if config.model.sequence_length < asked.max_tokens:
        asked = dataclasses.replace(asked, max_tokens=config.model.sequence_length)
        say(f"max_tokens={asked.max_tokens}, the model's sequence length: longer rows are cut")
    step = int(restored.state["step"])
    kept = kept_results.folder(run, asked, step)
    mesh = meshes.make_mesh(config.mesh)
    report = downstream.evaluate(
        asked,
        present,
        folder,
        words,
        TransformerScorer(config.model, restored.state["params"], mesh),
        model=checkpoint.content(restored.meta),
        kept=kept,
        cache=cache or prompt_cache.default_folder(),
        done=lambda name, result: say(describe(name, result)),
    )
    if report.tasks:
        print_table(task_table(report, asked), f"{asked.name}, step {step}")
    say("")
    for line in describe_means(report):
        say(line)
    say(f"{kept_results.report_file(kept, asked)}")
    return report.left_out


def describe(name: str, result: "TaskResult | Unscorable") -> str:
    """A line on the task called `name`: its accuracy, or why it has none."""
    from scaling_jax.evaluation.results import Unscorable

    if isinstance(result, Unscorable):
        return f"left out: {name}: {result.reason}"
    return f"{name}: {result.accuracy:.4f}"


def task_table(report: "Report", tasks: "TasksConfig") -> "pd.DataFrame":
    """A row a task: what was scored, how well with 95 % bounds, how sure single answers are."""
    import pandas as pd

    return pd.DataFrame(
        {
            "task": name,
            "shots": tasks.tasks[name].shots,
            "questions": result.questions,
            "accuracy": result.accuracy,
            "low": result.accuracy_low,
            "high": result.accuracy_high,
            "chance": result.chance,
            "centred": result.centred,
            "nats_per_token": "" if result.nats_per_token is None else result.nats_per_token,
            "ties": result.ties,
            "cut": result.truncated,
            "data": {True: "as released", False: "not as released", None: ""}[
                result.is_released_data
            ],
        }
        for name, result in report.tasks.items()
    )


def describe_means(report: "Report") -> list[str]:
    """A line a mean; one that lacks tasks says so."""
    lines = []
    for name, mean in report.averages.items():
        whole = mean.tasks + len(mean.missing)
        count = f"{mean.tasks} tasks" if not mean.missing else f"ONLY {mean.tasks} of {whole} tasks"
        lines.append(
            f"{name}: accuracy {mean.accuracy:.4f} "
            f"({mean.accuracy_low:.4f} to {mean.accuracy_high:.4f}), chance {mean.chance:.4f}, "
            f"centred {mean.centred:.4f} ({count})"
        )
    for name, mean in report.pooled.items():
        bounds = f"({mean.accuracy_low:.4f} to {mean.accuracy_high:.4f})"
        lines.append(f"{name}: accuracy {mean.accuracy:.4f} {bounds}")
    return lines


def _data_folder(tasks: str, data: Path | None) -> Path:
    """Where the tasks' files are: as given, or beside a config of the user's own."""
    if data is not None:
        return data
    if Path(tasks).is_file():
        return Path(tasks).parent
    raise UserError(
        f"tasks {tasks}: give --data, the folder that holds their files; data fetch icl gets those "
        "of gadre2024"
    )
