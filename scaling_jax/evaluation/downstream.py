"""Tasks scored with a model: from a folder of JSONL files to a report that can be kept."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scaling_jax import sealed
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.evaluation import generation, prompt_cache, results, scoring
from scaling_jax.evaluation import kept as kept_results
from scaling_jax.evaluation.prompts import Prompt
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
    cache: Path | None = None,
    done: Callable[[str, TaskResult], None] = lambda name, result: None,
) -> Report:
    """Scores a model on the tasks that are there.

    Args:
      tasks: the config; its averages are over all its tasks.
      present: those to run (`tasks.locate`), their files in `folder`.
      model: says by its content which model `scorer` is.
      kept: a folder that gets `<task>.json` as soon as a task is done, and REPORT_FILE at the end.
        A task that is kept there, of the same model, settings and file, is not run again, and is
        part of the report even if it is not in `present`.
      cache: a folder for prompts as token ids, of this and other models
        (`prompt_cache.default_folder`).
      done: called after each task of `present`.

    Raises:
      UserError: a file is not what it should be.
    """
    found: dict[str, TaskResult] = {}
    for name, task in ({**tasks.tasks, **present} if kept else present).items():
        path = folder / task.data
        origin = kept_results.made_from(task, path, vocabulary, tasks, model)
        result = kept_results.read(kept / f"{name}.json", origin) if kept else None
        if name in present:
            if result is None:
                result = run(task, path, vocabulary, scorer, tasks, cache)
                if kept:
                    kept_results.write(kept / f"{name}.json", origin, result)
            done(name, result)
        if result is not None:
            found[name] = result
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
        sealed.write(kept / REPORT_FILE, summary(report))
    return report


def run(
    task: TaskConfig,
    path: Path,
    vocabulary: Vocabulary,
    scorer: Scorer,
    tasks: TasksConfig,
    cache: Path | None = None,
) -> TaskResult:
    """Scores a model on one task's file.

    Raises:
      UserError: the file is not what it should be.
    """
    prepared = prompt_cache.prepare(task, path, vocabulary, tasks.max_tokens, tasks.seed, cache)
    asked = prepared.prompts
    if task.type == "question_answering":
        outcomes = list(_answered(task, asked, vocabulary, scorer))
    else:
        scores = scoring.score(asked, scorer)
        outcomes = [results.outcome(task, *both) for both in zip(asked, scores, strict=True)]
    return results.task_result(task, outcomes, prepared.sha256, prepared.data_git_blob)


def summary(report: Report) -> dict[str, Any]:
    """A report as plain mappings and lists, without its questions."""
    short = {name: dataclasses.replace(task, outcomes=()) for name, task in report.tasks.items()}
    plain = dataclasses.asdict(dataclasses.replace(report, tasks=short))
    for task in plain["tasks"].values():
        del task["outcomes"]
    return plain


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
