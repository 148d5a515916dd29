"""Tasks scored with a model: from a folder of JSONL files to a report that can be kept."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from scaling_jax import atomic
from scaling_jax.data.fetch import git_blob
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.evaluation import generation, prompts, results, scoring
from scaling_jax.evaluation.prompts import Digest, Prompt
from scaling_jax.evaluation.results import Average, Outcome, TaskResult
from scaling_jax.evaluation.scoring import Scorer
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

# Answers that are generated together.
GENERATED = 16
REPORT_FILE = "report.json"


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a set of tasks, and what they were made with."""

    name: str
    model: str
    vocabulary_sha256: str
    max_tokens: int
    seed: int
    tasks: dict[str, TaskResult]
    averages: dict[str, Average]
    pooled: dict[str, float]


def evaluate(
    tasks: TasksConfig,
    present: Mapping[str, TaskConfig],
    folder: Path,
    vocabulary: Vocabulary,
    scorer: Scorer,
    *,
    model: str = "",
    kept: Path | None = None,
    done: Callable[[str, TaskResult], None] = lambda name, result: None,
) -> Report:
    """Scores a model on the tasks that are there.

    Args:
      tasks: the config; its averages are over all its tasks.
      present: those to run (`tasks.locate`), their files in `folder`.
      model: says by its content which model `scorer` is.
      kept: a folder that gets `<task>.json` as soon as a task is done, and REPORT_FILE at the end.
        A task that is kept there, of the same model, settings and file, is not run again.
      done: called after each task.

    Raises:
      UserError: a file is not what it should be.
    """
    found: dict[str, TaskResult] = {}
    for name, task in present.items():
        made_from = _made_from(task, folder / task.data, vocabulary, tasks, model)
        result = _read(kept / f"{name}.json", made_from) if kept else None
        if result is None:
            result = run(task, folder / task.data, vocabulary, scorer, tasks)
            if kept:
                content = {"made_from": made_from, "result": _plain(result)}
                _write(kept / f"{name}.json", content)
        found[name] = result
        done(name, result)
    report = Report(
        name=tasks.name,
        model=model,
        vocabulary_sha256=vocabulary.sha256,
        max_tokens=tasks.max_tokens,
        seed=tasks.seed,
        tasks=found,
        averages=results.averages(tasks, found),
        pooled=results.pooled(tasks, found),
    )
    if kept:
        _write(kept / REPORT_FILE, summary(report))
    return report


def run(
    task: TaskConfig, path: Path, vocabulary: Vocabulary, scorer: Scorer, tasks: TasksConfig
) -> TaskResult:
    """Scores a model on one task's file.

    Raises:
      UserError: the file is not what it should be.
    """
    asked = list(prompts.build(task, path, vocabulary, tasks.max_tokens, tasks.seed))
    digest = Digest()
    for prompt in asked:
        digest.add(prompt)
    if task.type == "question_answering":
        outcomes = list(_answered(task, asked, vocabulary, scorer))
    else:
        scores = scoring.score(asked, scorer)
        outcomes = [results.outcome(task, *both) for both in zip(asked, scores, strict=True)]
    return results.task_result(task, outcomes, digest.sha256, git_blob(path.read_bytes()))


def summary(report: Report) -> dict[str, Any]:
    """A report as plain mappings and lists, without its questions."""
    short = {name: dataclasses.replace(task, outcomes=()) for name, task in report.tasks.items()}
    plain = dataclasses.asdict(dataclasses.replace(report, tasks=short))
    for task in plain["tasks"].values():
        del task["outcomes"]
    return plain


def _made_from(
    task: TaskConfig, path: Path, vocabulary: Vocabulary, tasks: TasksConfig, model: str
) -> dict[str, Any]:
    """All that determines a task's result, as JSON has it."""
    return {
        "model": model,
        "vocabulary_sha256": vocabulary.sha256,
        "data_git_blob": git_blob(path.read_bytes()),
        "max_tokens": tasks.max_tokens,
        "seed": tasks.seed,
        "task": dataclasses.asdict(task),
    }


def _plain(result: TaskResult) -> dict[str, Any]:
    """A result as plain mappings and lists; what an outcome does not have is left out of it."""
    plain = dataclasses.asdict(result)
    plain["outcomes"] = [
        {key: value for key, value in each.items() if value not in (None, ())}
        for each in plain["outcomes"]
    ]
    return plain


def _read(path: Path, made_from: dict[str, Any]) -> TaskResult | None:
    """The result kept in `path`, if it was made from the same."""
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["made_from"] != made_from:
        return None
    return pydantic.TypeAdapter(TaskResult).validate_python(content["result"])


def _write(path: Path, content: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(content) + "\n")


def _answered(
    task: TaskConfig, asked: Sequence[Prompt], vocabulary: Vocabulary, scorer: Scorer
) -> Iterator[Outcome]:
    """Outcomes of questions whose answers are generated."""
    for start in range(0, len(asked), GENERATED):
        group = asked[start : start + GENERATED]
        contexts = [prompt.choices[0].context for prompt in group]
        rows = generation.generate(contexts, scorer, group[0].answer_tokens, vocabulary.end_of_text)
        for prompt, answer in zip(group, vocabulary.decode_batch(rows), strict=True):
            yield Outcome(
                category=prompt.category,
                index=prompt.index,
                gold=prompt.gold,
                correct=generation.is_right(answer, prompt.aliases, task.cot_delimiter),
                truncated=prompt.truncated,
                answer=answer,
            )
