"""Intervals of shares of right answers, and of means over such shares, in closed form.

A share k/n has Wilson's score interval, which covers well for few questions and for shares near 0
and 1, where a bootstrap of the questions has no width at all. A mean over tasks, each a mean over
categories, has the sum of its parts' variances, as a bootstrap within every part would have, and
gets Wilson's interval for as many questions as would give one share that variance.

What varies are the questions: other ones of the same kind. The solved questions in the prompts are
fixed, and so is the model. Tasks that ask the same questions in two ways are taken for independent.

Source: Wilson 1927; for weighted means, Korn and Graubard 1998 (effective sample size).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

# Standard deviations to either side: of 95 %.
Z = 1.959963984540054


class Count(NamedTuple):
    """Right answers of a task, or of one of its categories, out of at least one question."""

    right: int
    questions: int


class Share(NamedTuple):
    """A mean share of right answers with 95 % bounds."""

    value: float
    low: float
    high: float


def mean(tasks: Sequence[Sequence[Count]]) -> Share:
    """The unweighted mean over tasks of the unweighted mean over a task's categories.

    A category's variance is that of its share drawn towards the whole mean by one question: few
    questions that all went well are not without doubt.
    """
    parts = [
        (1 / len(tasks) / len(categories), count) for categories in tasks for count in categories
    ]
    value = math.fsum(weight * count.right / count.questions for weight, count in parts)
    value = min(value, 1.0)
    variance = equal = 0.0
    for weight, count in parts:
        near = (count.right + value) / (count.questions + 1)
        variance += weight**2 * near * (1 - near) / count.questions
        equal += weight**2 / count.questions
    # Where all is wrong, or all right, nothing tells the parts apart.
    questions = value * (1 - value) / variance if variance and 0 < value < 1 else 1 / equal
    return Share(value, *_wilson(value, questions))


def _wilson(value: float, questions: float) -> tuple[float, float]:
    spread = Z * math.sqrt(value * (1 - value) * questions + Z**2 / 4)
    middle = value * questions + Z**2 / 2
    low, high = ((middle + side * spread) / (questions + Z**2) for side in (-1, 1))
    # Rounding must not put a bound beyond what it bounds.
    return min(max(low, 0.0), value), max(min(high, 1.0), value)
