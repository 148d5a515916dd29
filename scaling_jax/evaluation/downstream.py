"""Tasks scored with a model: from a folder of JSONL files to a report that can be kept."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic

from scaling_jax import sealed
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.errors import Interrupted, UserError
from scaling_jax.evaluation import generation, prompt_cache, results, scoring
from scaling_jax.evaluation import kept as kept_results
from scaling_jax.evaluation.kept import MadeFrom
from scaling_jax.evaluation.prompts import Prompt
from scaling_jax.evaluation.results import Average, Outcome, Pooled, TaskResult, Unscorable
from scaling_jax.evaluation.scoring import Scorer
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig
from scaling_jax.training import agreement, distributed, interrupt

# Answers that are generated together.
GENERATED = 16


@dataclasses.dataclass(frozen=True)
class Report:
    """The results of a set of tasks, and what they were made with.

    Attributes:
      left_out: why tasks that were to be run cannot be scored.
      made_from: of all these tasks (scaling_jax.evaluation.kept).
    """

    name: str
    model: str
    vocabulary_sha256: str
    max_tokens: int
    seed: int
    tasks: dict[str, TaskResult]
    averages: dict[str, Average]
    pooled: dict[str, Pooled]
    left_out: dict[str, str]
    made_from: dict[str, MadeFrom]


_REPORT = pydantic.TypeAdapter(Report)


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
    done: Callable[[str, TaskResult | Unscorable], None] = lambda name, result: None,
) -> Report:
    """Scores a model on the tasks that are there; one whose file cannot be scored is left out.

    Several joined processes do so together, and the first one writes.

    Args:
      tasks: the config; its averages are over all its tasks.
      present: those to run (`tasks.locate`), their files in `folder`.
      model: says by its content which model `scorer` is.
      kept: a folder that gets a file as soon as a task is done, and the report at the end
        (scaling_jax.evaluation.kept). A task that is kept there, of the same model, settings and
        file, is not run again, and is part of the report even if it is not in `present`.
      cache: a folder for prompts as token ids, of this and other models
        (`prompt_cache.default_folder`).
      done: called after each task of `present`.

    Returns:
      In other processes than the first, without what was kept already.

    Raises:
      UserError: another process has other tasks or files.
      Interrupted: between two tasks, where several processes were asked to stop.
    """
    found: dict[str, TaskResult] = {}
    left_out: dict[str, str] = {}
    origins: dict[str, MadeFrom] = {}
    all_tasks = {**tasks.tasks, **present} if kept else dict(present)
    distributed.check_same("choice of tasks", f"{list(all_tasks)} {list(present)}")
    with _requests_to_stop() as check_stop:
        for name, task in all_tasks.items():
            check_stop()
            path = folder / task.data
            origin = kept_results.made_from(task, path, tasks, vocabulary.sha256, model)
            distributed.check_same(f"{name}, or its file", str(origin | {"model": ""}))
            file = kept_results.file(kept, name, origin) if kept else None
            result = kept_results.read(file, origin) if file and distributed.is_first() else None
            (is_known,) = distributed.from_first((result is not None,))
            if name in present and not is_known:
                try:
                    result = run(task, path, vocabulary, scorer, tasks, cache)
                except UserError as error:
                    result = Unscorable(str(error))
                if file and distributed.is_first():
                    kept_results.write(file, origin, result)
            if result is None:
                continue
            origins[name] = origin
            if isinstance(result, TaskResult):
                found[name] = result
            elif name in present:
                left_out[name] = result.reason
            if name in present:
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
        left_out=left_out,
        made_from=origins,
    )
    if kept and distributed.is_first():
        sealed.write(kept_results.report_file(kept, tasks), summary(report))
    return report


@contextlib.contextmanager
def _requests_to_stop() -> Iterator[Callable[[], None]]:
    """Yields what raises Interrupted if any of several processes is to stop; all call it alike.

    A single process stops at once, without asking.
    """
    if not distributed.several():
        yield lambda: None
        return
    with interrupt.noticing() as stop:

        def check() -> None:
            stop.look()
            if stop.asked:
                assert stop.signal is not None
                raise Interrupted("stopped; the tasks that are done are kept", stop.signal)

        yield check


def read(path: Path) -> Report | None:
    """The report kept in `path`, without its questions; None, with a warning, if it is damaged."""
    try:
        return _REPORT.validate_python(sealed.read(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        warnings.warn(f"{path}: damaged and not used: {reason}", stacklevel=2)
        return None


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
    prepared = agreement.together(
        lambda: prompt_cache.prepare(task, path, vocabulary, tasks.max_tokens, tasks.seed, cache),
        kinds=(UserError,),
    )
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
