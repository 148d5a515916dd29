"""From scored choices to questions, tasks, groups of tasks and averages over them."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from scaling_jax.evaluation import proportions
from scaling_jax.evaluation.prompts import Prompt
from scaling_jax.evaluation.proportions import Count
from scaling_jax.evaluation.scoring import ChoiceScore
from scaling_jax.evaluation.tasks import TaskConfig, TasksConfig

# Two choices so near to each other, in nats per token, are a tie: another order of additions, as on
# other hardware, can turn them round.
TIE = 1e-5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one question.

    Attributes:
      prediction: the choice of least nats per token (the first of equals); None without choices.
      margin: how many nats per token the second best choice lies behind it.
      log_probabilities: of each choice (or the one continuation) in nats, summed over its tokens.
      tokens: how many those are.
      truncated: how many of the choices have lost context on the left.
      answer: the generated text, of question answering.
    """

    category: str
    index: int
    gold: int
    correct: bool
    prediction: int | None = None
    margin: float | None = None
    log_probabilities: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    truncated: int = 0
    answer: str | None = None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """A task's score and what it was made from.

    Attributes:
      accuracy: right answers per question; with categories, the unweighted mean over them.
      accuracy_low, accuracy_high: 95 % bounds over questions (scaling_jax.evaluation.proportions).
      centred: (accuracy - chance) / (1 - chance): 0 for guessing, 1 for no mistake.
      categories: accuracy of each, where the task has them.
      nats_per_token: mean over questions of the right continuation's; None of generated answers.
      ties: questions whose margin is no more than `TIE`.
      smallest_margin: of all questions, in nats per token; None without choices.
      truncated: sequences that have lost context on the left.
      prompts_sha256, data_git_blob: content of the prompts and of the file.
      is_released_data: whether the file is the one that the config names by its content; None if
        it names none.
      counts: right answers of each category; of all questions, called "", where there is none.
      outcomes: of every question; none in a report.
    """

    questions: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    chance: float
    centred: float
    categories: dict[str, float]
    nats_per_token: float | None
    ties: int
    smallest_margin: float | None
    truncated: int
    prompts_sha256: str
    data_git_blob: str
    is_released_data: bool | None
    counts: dict[str, Count]
    outcomes: tuple[Outcome, ...] = ()


@dataclasses.dataclass(frozen=True)
class Unscorable:
    """What a task has instead of a result if its file cannot be scored."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Pooled:
    """An unweighted mean over the categories of several tasks, with 95 % bounds."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclasses.dataclass(frozen=True)
class Average:
    """An unweighted mean over tasks; of those that were scored, if some are missing.

    `accuracy_low` and `accuracy_high` are 95 % bounds, from all tasks' questions.
    """

    accuracy: float
    accuracy_low: float
    accuracy_high: float
    chance: float
    centred: float
    tasks: int
    missing: tuple[str, ...]


def outcome(task: TaskConfig, prompt: Prompt, scores: Sequence[ChoiceScore]) -> Outcome:
    """The outcome of a question whose continuations were scored."""
    prediction = margin = None
    if task.type == "language_modeling":
        correct = scores[0].greedy
    else:
        nats = [score.nats_per_token for score in scores]
        prediction = int(np.argmin(nats))
        margin = float(np.diff(np.sort(nats)[:2])[0]) if len(nats) > 1 else None
        correct = prediction == prompt.gold
    return Outcome(
        category=prompt.category,
        index=prompt.index,
        gold=prompt.gold,
        correct=correct,
        prediction=prediction,
        margin=margin,
        log_probabilities=tuple(score.log_probability for score in scores),
        tokens=tuple(len(score.likeliest) for score in scores),
        truncated=prompt.truncated,
    )


def task_result(
    task: TaskConfig, outcomes: Sequence[Outcome], prompts_sha256: str, data_git_blob: str
) -> TaskResult:
    """Sums up the outcomes of all questions of a task (at least one)."""
    counts = _counts(outcomes)
    accuracy, low, high = proportions.mean([list(counts.values())])
    chance = task.chance if task.chance is not None else _mean([_guess(each) for each in outcomes])
    scored = [each for each in outcomes if each.tokens]
    margins = [each.margin for each in outcomes if each.margin is not None]
    nats = [-each.log_probabilities[each.gold] / each.tokens[each.gold] for each in scored]
    return TaskResult(
        questions=len(outcomes),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        chance=chance,
        centred=_centred(accuracy, chance),
        categories={name: count.right / count.questions for name, count in counts.items()}
        if task.has_categories
        else {},
        nats_per_token=_mean(nats) if nats else None,
        ties=sum(margin <= TIE for margin in margins),
        smallest_margin=min(margins, default=None),
        truncated=sum(each.truncated for each in outcomes),
        prompts_sha256=prompts_sha256,
        data_git_blob=data_git_blob,
        is_released_data=data_git_blob == task.git_blob if task.git_blob else None,
        counts=counts,
        outcomes=tuple(outcomes),
    )


def averages(tasks: TasksConfig, results: Mapping[str, TaskResult]) -> dict[str, Average]:
    """The config's averages, and one for each group of its tasks; those without any result are out.

    The means of centred scores and of chance are over the same tasks.
    """
    members: dict[str, Sequence[str]] = dict(tasks.averages)
    for group in dict.fromkeys(task.group for task in tasks.tasks.values() if task.group):
        members[group] = [name for name, task in tasks.tasks.items() if task.group == group]
    found = {}
    for name, names in members.items():
        there = [results[task] for task in names if task in results]
        if there:
            accuracy, low, high = proportions.mean(
                [list(result.counts.values()) for result in there]
            )
            found[name] = Average(
                accuracy=accuracy,
                accuracy_low=low,
                accuracy_high=high,
                chance=_mean([result.chance for result in there]),
                centred=_mean([result.centred for result in there]),
                tasks=len(there),
                missing=tuple(task for task in names if task not in results),
            )
    return found


def pooled(tasks: TasksConfig, results: Mapping[str, TaskResult]) -> dict[str, Pooled]:
    """The config's means over the categories of several tasks; only where all were scored.

    A task without categories counts as one.
    """
    found = {}
    for name, names in tasks.pooled.items():
        if all(task in results for task in names):
            counts = [count for task in names for count in results[task].counts.values()]
            found[name] = Pooled(*proportions.mean([[count] for count in counts]))
    return found


def _counts(outcomes: Sequence[Outcome]) -> dict[str, Count]:
    """Of each category."""
    correct: dict[str, list[bool]] = {}
    for each in outcomes:
        correct.setdefault(each.category, []).append(each.correct)
    return {name: Count(sum(each), len(each)) for name, each in correct.items()}


def _guess(outcome: Outcome) -> float:
    return 0.0 if outcome.prediction is None else 1 / len(outcome.tokens)


def _centred(accuracy: float, chance: float) -> float:
    return (accuracy - chance) / (1 - chance)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
