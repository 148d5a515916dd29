"""The downstream tasks that a run's config asks for: scored, kept in its folder, as columns.

evaluations/<name of the tasks>/step-00000100/<task>.json   as soon as each is done
evaluations/<name of the tasks>/step-00000100/report.json   when all are
"""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

from scaling_jax import mesh as meshes
from scaling_jax import records, sealed
from scaling_jax.config import DownstreamConfig, RunConfig
from scaling_jax.data.run_vocabulary import run_vocabulary
from scaling_jax.evaluation import downstream, prompt_cache
from scaling_jax.evaluation import tasks as task_configs
from scaling_jax.evaluation.model_scorer import TransformerScorer
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig
from scaling_jax.models.transformer import Params

# A kept report, as `downstream.summary` has it.
Kept = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Asked:
    """The tasks that a run is scored on: those of the config whose files are in `folder`."""

    config: TasksConfig
    present: dict[str, TaskConfig]
    folder: Path


def find(config: RunConfig) -> Asked | None:
    """The tasks that `config` asks for; None if it asks for none. What lacks its file is warned of.

    Raises:
      UserError: there is no such config, task or folder, or no file of any task.
    """
    chosen = config.evaluation.tasks
    if chosen is None:
        return None
    tasks = _load(chosen.config)
    folder = _folder(config, chosen)
    present, missing = task_configs.locate(task_configs.select(tasks, chosen.only), folder)
    for file, names in missing.items():
        warnings.warn(f"{folder / file} is not there: without {', '.join(names)}", stacklevel=2)
    # What the model reads at once; longer rows lose tokens on the left.
    longest = min(tasks.max_tokens, config.model.sequence_length)
    return Asked(dataclasses.replace(tasks, max_tokens=longest), present, folder)


def evaluate(
    asked: Asked, config: RunConfig, run: Path, step: int, params: Params, model: str
) -> None:
    """Scores `params`, those of the run in folder `run` after `step`, and keeps the results.

    A task that is kept there already, of the same model, settings and file, is not scored again.

    Args:
      model: says by its content which parameters these are.

    Raises:
      UserError: a task's file or the vocabulary is not what it should be.
    """
    mesh = meshes.make_mesh(config.mesh)
    downstream.evaluate(
        asked.config,
        asked.present,
        asked.folder,
        run_vocabulary(config, None),
        TransformerScorer(config.model, params, mesh),
        model=model,
        kept=_kept_in(asked.config, run, step),
        cache=prompt_cache.default_folder(),
    )


def read(config: RunConfig, run: Path, step: int) -> Kept | None:
    """What is kept of the tasks' results after `step`; nothing where the config asks for none.

    Returns:
      None if a task that could be scored is not.

    Raises:
      UserError: there is no such config or task.
    """
    chosen = config.evaluation.tasks
    if chosen is None:
        return {"tasks": {}, "averages": {}}
    tasks = _load(chosen.config)
    file = _kept_in(tasks, run, step) / downstream.REPORT_FILE
    try:
        kept: Kept = sealed.read(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        warnings.warn(f"{file}: damaged and not used: {error}", stacklevel=2)
        return None
    folder = _folder(config, chosen)
    wanted = task_configs.select(tasks, chosen.only)
    lacking = [name for name in wanted if name not in kept["tasks"]]
    if any((folder / wanted[name].data).is_file() for name in lacking):
        return None
    averages = {name: kept["averages"].get(name) for name in tasks.averages}
    # A mean over fewer tasks than the config says would pass for another one.
    whole = {name: mean for name, mean in averages.items() if mean and not mean["missing"]}
    return {"tasks": kept["tasks"], "averages": whole}


def columns(kept: Kept) -> dict[str, float]:
    """error/<task> and error/<average> with 95 % bounds; chance/<task>, the error of guessing."""
    row: dict[str, float] = {}
    for name, score in (kept["tasks"] | kept["averages"]).items():
        row[f"error/{name}"] = 1 - score["accuracy"]
        row[f"error/{name}/low"] = 1 - score["accuracy_high"]
        row[f"error/{name}/high"] = 1 - score["accuracy_low"]
    guessed = {name: 1 - score["chance"] for name, score in kept["tasks"].items()}
    return row | {f"{records.CHANCE}{name}": error for name, error in guessed.items()}


@functools.cache
def _load(name: str) -> TasksConfig:
    return task_configs.load(name)


def _folder(config: RunConfig, chosen: DownstreamConfig) -> Path:
    return Path(chosen.folder or config.data.folder)


def _kept_in(tasks: TasksConfig, run: Path, step: int) -> Path:
    return run / "evaluations" / tasks.name / f"step-{step:08d}"
