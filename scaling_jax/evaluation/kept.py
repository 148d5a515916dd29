"""Results of tasks on disk: a file a task, with all that determines the result.

A file is used only for what was made from the same; one that is damaged is named and not used.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pydantic

from scaling_jax import sealed
from scaling_jax.data.fetch import git_blob
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.evaluation.results import TaskResult
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

MadeFrom = dict[str, Any]


def made_from(
    task: TaskConfig, path: Path, vocabulary: Vocabulary, tasks: TasksConfig, model: str
) -> MadeFrom:
    """All that determines a task's result, as JSON has it; no blob if there is no file `path`."""
    found = {
        "model": model,
        "vocabulary_sha256": vocabulary.sha256,
        "max_tokens": tasks.max_tokens,
        "seed": tasks.seed,
        "task": dataclasses.asdict(task),
    }
    return found | ({"data_git_blob": git_blob(path.read_bytes())} if path.is_file() else {})


def read(path: Path, wanted: MadeFrom) -> TaskResult | None:
    """The result kept in `path`, if it was made from `wanted`, as far as that says."""
    try:
        content = sealed.read(path)
        if content["made_from"] | wanted != content["made_from"]:
            return None
        return pydantic.TypeAdapter(TaskResult).validate_python(content["result"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"{path}: damaged and not used: {reason}", stacklevel=2)
        return None


def write(path: Path, origin: MadeFrom, result: TaskResult) -> None:
    """Keeps a result; what an outcome does not have is left out of it."""
    plain = dataclasses.asdict(result)
    plain["outcomes"] = [
        {key: value for key, value in each.items() if value not in (None, ())}
        for each in plain["outcomes"]
    ]
    sealed.write(path, {"made_from": origin, "result": plain})
