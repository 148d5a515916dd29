"""Which downstream tasks there are: settings from YAML, and where their files lie.

    tasks = load("gadre2024", ["tasks.hellaswag.shots=5"])
    present, missing = locate(tasks, Path("icl"))

A task is a JSONL file, one question a line, and how it is asked. A file of one's own:

    tasks:
      my_quiz:
        data: quiz.jsonl
        type: multiple_choice
        shots: 5

Keys of a line, by type: multiple_choice `query`, `choices`, `gold`; schema `context_options`,
`continuation`, `gold`; language_modeling `context`, `continuation`; question_answering `context`,
`answer`, `aliases` (and `chain_of_thought`); and `category` where has_categories is set.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

from scaling_jax import config as configs
from scaling_jax.config import Name
from scaling_jax.errors import UserError, nearest

# Unlike elsewhere in the program strings are not stripped: a delimiter is what it says.
EXACT = ConfigDict(extra="forbid")

TaskType = Literal["multiple_choice", "schema", "language_modeling", "question_answering"]
Share = Annotated[float, Field(ge=0, lt=1)]
GitBlob = Annotated[str, Field(pattern="^([0-9a-f]{40})?$")]


@dataclass(frozen=True, config=EXACT)
class TaskConfig:
    """One task; the keys that LLM Foundry has too have its names and defaults."""

    data: str
    type: TaskType
    # Solved questions of the same file that stand before each question.
    shots: NonNegativeInt = 0
    # Between a question and its answer, and between one solved question and the next.
    continuation_delimiter: str = " "
    example_delimiter: str = "\n"
    # Whether a continuation that begins without a space gets one: not where it goes on in a word.
    continuation_space: bool = True
    # Before everything.
    prompt_string: str = ""
    # Question answering: before each question; between a chain of thought and the answer.
    question_prelimiter: str = ""
    cot_delimiter: str = ""
    # Each category takes its shots from its own lines; the task's score is the categories' mean.
    has_categories: bool = False
    # What the task belongs to in tables.
    group: str = ""
    # Accuracy of guessing; by default 1 / choices, and 0 where there are none.
    chance: Share | None = None
    # Of the released file, as git names its content.
    git_blob: GitBlob = ""


@dataclass(frozen=True, config=EXACT)
class TasksConfig:
    """Tasks that are scored together, and the means that are taken over them."""

    tasks: dict[Name, TaskConfig]
    name: str = ""
    # Longest row; what is longer loses tokens on the left.
    max_tokens: PositiveInt = 2048
    # Of the draw of the shots.
    seed: NonNegativeInt = 1234
    averages: dict[Name, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    # Means over the categories of several tasks.
    pooled: dict[Name, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tasks:
            raise ValueError("tasks names none: at least one is needed")
        if "report" in self.tasks:
            raise ValueError(
                "tasks.report: the file of all results is called so; give the task another name"
            )
        for kind in ("averages", "pooled"):
            for name, members in getattr(self, kind).items():
                if not members:
                    raise ValueError(f"{kind}.{name}: names no task")
                for task in members:
                    if task not in self.tasks:
                        hint = nearest(task, self.tasks)
                        raise ValueError(f"{kind}.{name}: unknown task '{task}' ({hint})")
        for name, task in self.tasks.items():
            if task.cot_delimiter and task.type != "question_answering":
                raise ValueError(f"tasks.{name}: cot_delimiter is for question_answering only")


def load(path: str | Path, overrides: Sequence[str] = ()) -> TasksConfig:
    """Reads tasks from a YAML file: a path, or "gadre2024" for the packaged one of that name.

    A file that gives its tasks no name lends them its own.

    Raises:
      UserError: with file and key, for anything missing, unknown, ill-typed or impossible.
    """
    path = f"evaluations/{path}.yaml" if re.fullmatch(r"\w+", str(path)) else path
    tasks = configs.load(TasksConfig, path, overrides)
    return tasks if tasks.name else dataclasses.replace(tasks, name=Path(path).stem)


def select(tasks: TasksConfig, names: Sequence[str]) -> dict[str, TaskConfig]:
    """The tasks that `names` stand for, in the order of the config; all of them for no name.

    A name is that of a task, an average or a pooled mean.

    Raises:
      UserError: a name is none of these.
    """
    means = {**tasks.averages, **tasks.pooled}
    wanted = set[str]()
    for name in names:
        if name not in tasks.tasks and name not in means:
            raise UserError(f"unknown task '{name}' ({nearest(name, [*tasks.tasks, *means])})")
        wanted |= {name} if name in tasks.tasks else set(means[name])
    return {name: task for name, task in tasks.tasks.items() if not names or name in wanted}


def locate(
    tasks: dict[str, TaskConfig], folder: Path
) -> tuple[dict[str, TaskConfig], dict[str, list[str]]]:
    """Splits `tasks` by whether their file is in `folder`.

    Returns:
      The tasks that can run; and for each missing file the tasks that need it.

    Raises:
      UserError: `folder` is none, or holds no file of any task.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the one that holds the tasks")
    present = {name: task for name, task in tasks.items() if (folder / task.data).is_file()}
    missing: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if name not in present:
            missing.setdefault(task.data, []).append(name)
    if not present:
        raise UserError(f"{folder}: holds no file of any task, such as {next(iter(missing))}")
    return present, missing
