"""The lines of a task's JSONL file, read, checked and brought to one shape.

Whatever the type, a question is a list of options, each a context and what follows it:
multiple choice has one context and several continuations, a schema several contexts and one
continuation, language modelling and question answering one of each.
"""

import dataclasses
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_jax.errors import UserError, nearest
from scaling_jax.evaluation.answers import normalize
from scaling_jax.evaluation.tasks import TaskConfig

# Keys whose value is text; the others hold a list of texts, or the number of the right one.
TEXTS = {"query", "context", "continuation", "answer", "chain_of_thought", "category"}
LISTS = {"choices", "context_options", "aliases"}
KEYS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
    "question_answering": ("context", "answer"),
}


@dataclasses.dataclass(frozen=True)
class Question:
    """One line.

    Attributes:
      options: (context, continuation) of each choice.
      gold: the right one's number.
      category: "" where the task has none.
      thought: what stands before the answer, delimiter included; of question answering only.
      aliases: texts that an answer may begin with; of question answering only.
    """

    options: tuple[tuple[str, str], ...]
    gold: int
    category: str = ""
    thought: str = ""
    aliases: tuple[str, ...] = ()


def read(task: TaskConfig, path: Path) -> dict[str, list[Question]]:
    """The questions of each category, categories by name, questions as in the file.

    Spaces around texts are removed, those around choices are not (as composer does). A task
    without categories has one, called "".

    Raises:
      UserError: the file cannot be read, holds no question, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    found: dict[str, list[Question]] = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            question = _question(task, _parse(task, line, f"{path}, line {number}"))
            found.setdefault(question.category, []).append(question)
    if not found:
        raise UserError(f"{path}: holds no question")
    return dict(sorted(found.items()))


def _question(task: TaskConfig, row: Mapping[str, Any]) -> Question:
    category = row["category"] if task.has_categories else ""
    if task.type == "multiple_choice":
        options = tuple((row["query"], choice) for choice in row["choices"])
        return Question(options, row["gold"], category)
    if task.type == "schema":
        options = tuple((context, row["continuation"]) for context in row["context_options"])
        return Question(options, row["gold"], category)
    if task.type == "language_modeling":
        return Question(((row["context"], row["continuation"]),), 0, category)
    aliases = tuple(dict.fromkeys([row["answer"], *row.get("aliases", [])]))
    thought = row["chain_of_thought"] + task.cot_delimiter if task.cot_delimiter else ""
    context = task.question_prelimiter + row["context"]
    return Question(((context, thought + row["answer"]),), 0, category, thought, aliases)


def _parse(task: TaskConfig, line: str, where: str) -> dict[str, Any]:
    """A line's keys and values, checked; texts are stripped."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: is no JSON object")
    needed = [*KEYS[task.type], *(["category"] if task.has_categories else [])]
    needed += ["chain_of_thought"] if task.cot_delimiter else []
    for key in needed:
        if key not in row:
            raise UserError(f"{where}: a {task.type} question needs '{key}' ({nearest(key, row)})")
    for key in row.keys() & {*needed, "aliases"}:
        _check(row, key, where)
    if task.type == "question_answering":
        for name in (row["answer"], *row.get("aliases", [])):
            if not normalize(name):
                warnings.warn(
                    f"{where}: answer '{name.strip()}' is nothing once articles and punctuation "
                    "are removed: any answer counts",
                    stacklevel=2,
                )
    return {key: _stripped(value) if key in TEXTS else value for key, value in row.items()}


def _stripped(value: Any) -> Any:
    """A text without space around it; what the task does not need may be something else."""
    return value.strip() if isinstance(value, str) else value


def _check(row: Mapping[str, Any], key: str, where: str) -> None:
    value = row[key]
    if key in TEXTS and not isinstance(value, str):
        raise UserError(f"{where}: '{key}' must be text, not {value!r}")
    if key in LISTS and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise UserError(f"{where}: '{key}' must be a list of texts")
    if key == "gold":
        count = len(row.get("choices") or row.get("context_options") or ())
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            raise UserError(f"{where}: 'gold' must be the number of a choice from 0, not {value!r}")
