"""The downstream tasks that a run's config asks for: scored, kept in its folder, as columns."""

import dataclasses
import functools
import warnings
from pathlib import Path

from scaling_jax import mesh as meshes
from scaling_jax import records
from scaling_jax.config import DownstreamConfig, RunConfig
from scaling_jax.data import shards
from scaling_jax.data.run_vocabulary import run_vocabulary
from scaling_jax.evaluation import downstream, kept, prompt_cache, results
from scaling_jax.evaluation import tasks as task_configs
from scaling_jax.evaluation.model_scorer import TransformerScorer
from scaling_jax.evaluation.results import Average, TaskResult
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig
from scaling_jax.models.transformer import Params
from scaling_jax.training import checkpoint
from scaling_jax.training.files import CHECKPOINT_FOLDER


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a run's config asks for and is there: tasks, and means over all their tasks."""

    tasks: dict[str, TaskResult]
    averages: dict[str, Average]


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
    tasks = _tasks(config, chosen)
    folder = _folder(config, chosen)
    present, missing = task_configs.locate(task_configs.select(tasks, chosen.only), folder)
    for file, names in missing.items():
        warnings.warn(f"{folder / file} is not there: without {', '.join(names)}", stacklevel=2)
    return Asked(tasks, present, folder)


def evaluate(
    asked: Asked, config: RunConfig, run: Path, step: int, params: Params, model: str
) -> None:
    """Scores `params`, those of the run in folder `run` after `step`, and keeps the results.

    A task that is kept there already, of the same model, settings and file, is not scored again.
    One whose file cannot be scored is warned of and left out.

    Args:
      model: says by its content which parameters these are.

    Raises:
      UserError: the vocabulary is not what it should be.
    """
    mesh = meshes.make_mesh(config.mesh)
    report = downstream.evaluate(
        asked.config,
        asked.present,
        asked.folder,
        run_vocabulary(config, None),
        TransformerScorer(config.model, params, mesh),
        model=model,
        kept=kept.folder(run, asked.config, step),
        cache=prompt_cache.default_folder(),
    )
    for name, reason in report.left_out.items():
        warnings.warn(f"left out: {name}: {reason}", stacklevel=2)


def read(config: RunConfig, run: Path, step: int) -> Kept | None:
    """What is kept of the tasks' results after `step`; nothing where the config asks for none.

    A result counts that was made from what is there now: checkpoint, vocabulary, settings and file.
    What is not there any more is taken for unchanged.

    Returns:
      None if a task that could be scored is not.

    Raises:
      UserError: there is no such config or task, or the checkpoint is damaged.
    """
    chosen = config.evaluation.tasks
    if chosen is None:
        return Kept({}, {})
    tasks, folder = _tasks(config, chosen), _folder(config, chosen)
    report = downstream.read(kept.report_file(kept.folder(run, tasks, step), tasks))
    if report is None:
        return None
    vocabulary, model = _vocabulary(config), _model(run, step)
    found: dict[str, TaskResult] = {}
    for name, task in task_configs.select(tasks, chosen.only).items():
        path = folder / task.data
        origin = kept.made_from(task, path, tasks, vocabulary, model)
        if not kept.is_of(report.made_from.get(name, {}), origin):
            if path.is_file():
                return None
        elif name in report.tasks:
            found[name] = report.tasks[name]
    means = results.averages(tasks, found)
    # A mean over fewer tasks than the config says would pass for another one.
    whole = [name for name in tasks.averages if name in means and not means[name].missing]
    return Kept(found, {name: means[name] for name in whole})


def columns(found: Kept) -> dict[str, float]:
    """error/<task> and error/<average> with 95 % bounds; chance/<task>, the error of guessing."""
    row: dict[str, float] = {}
    for name, score in {**found.tasks, **found.averages}.items():
        row[f"error/{name}"] = 1 - score.accuracy
        row[f"error/{name}/low"] = 1 - score.accuracy_high
        row[f"error/{name}/high"] = 1 - score.accuracy_low
    guessed = {name: 1 - score.chance for name, score in found.tasks.items()}
    return row | {f"{records.CHANCE}{name}": error for name, error in guessed.items()}


def _tasks(config: RunConfig, chosen: DownstreamConfig) -> TasksConfig:
    tasks = _load(chosen.config)
    # What the model reads at once; longer rows lose tokens on the left.
    longest = min(tasks.max_tokens, config.model.sequence_length)
    return dataclasses.replace(tasks, max_tokens=longest)


@functools.cache
def _load(name: str) -> TasksConfig:
    return task_configs.load(name)


def _folder(config: RunConfig, chosen: DownstreamConfig) -> Path:
    return Path(chosen.folder or config.data.folder)


def _model(run: Path, step: int) -> str | None:
    """The content of the run's checkpoint of `step`; None if that is not its newest one."""
    folder = run / CHECKPOINT_FOLDER
    if checkpoint.latest_step(folder) != step:
        return None
    return checkpoint.content(checkpoint.read_meta(folder))


def _vocabulary(config: RunConfig) -> str | None:
    """The sha256 of the vocabulary that the run reads with; None if its data are not there."""
    folder = Path(config.data.folder) / next(iter(config.data.parts)) / "train"
    if not (folder / shards.INDEX_FILE).is_file():
        return None
    _, index = shards.read_index(folder)
    return index.vocabulary_sha256
