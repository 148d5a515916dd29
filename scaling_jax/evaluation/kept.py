"""Results of tasks on disk: a file a task, with all that determines the result.

evaluations/<name of the tasks>/step-00000100/<task>-<hash>.json    as soon as each is done
evaluations/<name of the tasks>/step-00000100/report-<hash>.json    when all are

The hash is that of the task's settings, or of all tasks', so that other ones lie beside it. A file
is used only for what was made from the same; one that is damaged is named and not used.
"""

import dataclasses
import functools
import hashlib
import json
import warnings
from pathlib import Path
from typing import Any

import pydantic

from scaling_jax import sealed
from scaling_jax.data.fetch import git_blob
from scaling_jax.evaluation import prompt_cache
from scaling_jax.evaluation.results import TaskResult, Unscorable
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

# To be raised when the same prompts are scored in another way.
FORMAT = 1
DIGITS = 8
# Keys of what a result is made from that the config alone says.
SETTINGS = ("task", "max_tokens", "seed")

MadeFrom = dict[str, Any]

_RESULT = pydantic.TypeAdapter(TaskResult | Unscorable)


def folder(run: Path, tasks: TasksConfig, step: int) -> Path:
    """Where the results of `tasks` after `step` of the run in folder `run` lie."""
    return run / "evaluations" / tasks.name / f"step-{step:08d}"


def file(folder: Path, name: str, origin: MadeFrom) -> Path:
    """The file of the task called `name` among the results in `folder`."""
    return folder / f"{name}-{_digest({key: origin[key] for key in SETTINGS})}.json"


def report_file(folder: Path, tasks: TasksConfig) -> Path:
    """The file that sums up the results in `folder`."""
    return folder / f"report-{_digest(dataclasses.asdict(tasks))}.json"


def made_from(
    task: TaskConfig,
    path: Path,
    tasks: TasksConfig,
    vocabulary_sha256: str | None,
    model: str | None,
) -> MadeFrom:
    """All that determines a task's result, as JSON has it, without what is not known.

    Args:
      path: of the task's file; there may be none.
    """
    blob = None
    if path.is_file():
        status = path.stat()
        blob = _blob(path, status.st_size, status.st_mtime_ns)
    known = {"model": model, "vocabulary_sha256": vocabulary_sha256, "data_git_blob": blob}
    return {
        "format": [prompt_cache.FORMAT, FORMAT],
        "libraries": prompt_cache.LIBRARIES,
        "max_tokens": tasks.max_tokens,
        "seed": tasks.seed,
        "task": dataclasses.asdict(task),
        **{key: value for key, value in known.items() if value is not None},
    }


def is_of(origin: MadeFrom, wanted: MadeFrom) -> bool:
    """Whether what was made from `origin` was made from `wanted`, as far as that says."""
    return origin | wanted == origin


def read(path: Path, wanted: MadeFrom) -> TaskResult | Unscorable | None:
    """The result kept in `path`, if it was made from `wanted`, as far as that says."""
    try:
        content = sealed.read(path)
        if not is_of(content["made_from"], wanted):
            return None
        return _RESULT.validate_python(content["result"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"{path}: damaged and not used: {reason}", stacklevel=2)
        return None


def write(path: Path, origin: MadeFrom, result: TaskResult | Unscorable) -> None:
    """Keeps a result; what an outcome does not have is left out of it."""
    plain = dataclasses.asdict(result)
    if isinstance(result, TaskResult):
        plain["outcomes"] = [
            {key: value for key, value in each.items() if value not in (None, ())}
            for each in plain["outcomes"]
        ]
    sealed.write(path, {"made_from": origin, "result": plain})


@functools.lru_cache(maxsize=1024)
def _blob(path: Path, size: int, modified: int) -> str:
    """Of a file's content, read once while its size and time stay what they are."""
    return git_blob(path.read_bytes())


def _digest(content: MadeFrom) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
