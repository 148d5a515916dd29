"""Greedy answers in words, and whether they are right: for question answering."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from scaling_jax.evaluation.answers import normalize
from scaling_jax.evaluation.scoring import LENGTHS, Scorer, at_least


def generate(
    contexts: Sequence[Int32[np.ndarray, "context"]], scorer: Scorer, count: int, end_of_text: int
) -> list[list[int]]:
    """The `count` likeliest tokens after each context, one by one; fewer where the text ends.

    Every token reads its row anew, which any model can; rows are padded to one of `LENGTHS`.
    """
    longest = at_least(max(map(len, contexts)) + count - 1, LENGTHS)
    tokens = np.zeros((len(contexts), longest), np.int32)
    ends = np.array([[len(context)] for context in contexts], np.int32)
    for row, context in enumerate(contexts):
        tokens[row, : len(context)] = context
    found = np.zeros((len(contexts), count), np.int32)
    for step in range(count):
        found[:, step : step + 1] = scorer(tokens, ends - 1, np.zeros_like(ends)).likeliest
        if step + 1 < count:
            np.put_along_axis(tokens, ends, found[:, step : step + 1], axis=1)
            ends += 1
    answers = (row.tolist() for row in found)
    return [row[: row.index(end_of_text)] if end_of_text in row else row for row in answers]


def is_right(answer: str, aliases: Sequence[str], cot_delimiter: str = "") -> bool:
    """Whether an answer, after its chain of thought, begins with one of the names of the right one.

    Source: composer 0.17.2, InContextLearningQAAccuracy; normalised as TriviaQA's own script does.
    """
    if cot_delimiter:
        answer = answer.split(cot_delimiter)[-1]
    return normalize(answer).startswith(tuple(map(normalize, aliases)))
