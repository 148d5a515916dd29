"""Prompts to log-probabilities, with any model that can score rows of tokens.

A model is one function (`Scorer`). Rows come to it in few shapes: padded on the right to one of
`LENGTHS`, in batches of few sizes and with few numbers of scored positions, so that nothing is
compiled twice and only scored positions have to be unembedded. Choices that read the same tokens
share a row: of a question whose choices are single tokens, all of them.

A model that can read branches (`BranchScorer`) gets what all choices of a question begin with once:
[prefix | rest of choice 1 | rest of choice 2 | ...], where a rest sees the prefix and itself.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, Int32

from scaling_jax.evaluation.prompts import Ids, Prompt

LENGTHS = (32, 64, 128, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048)
# Powers of four; few shapes matter more than full ones.
POSITIONS = tuple(4**power for power in range(1, 8))
# Of a last batch.
ROWS = tuple(4**power for power in range(8))


class TargetScores(NamedTuple):
    """Of each asked position: log-probability of its target in nats, and the likeliest token."""

    log_probability: Float[np.ndarray, "rows asked"]
    likeliest: Int[np.ndarray, "rows asked"]


class Scorer(Protocol):
    """A language model, as far as scoring needs it."""

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """How likely `targets[r, i]` is right after `tokens[r, :positions[r, i] + 1]`.

        The model must be causal: rows are padded on the right.
        """
        ...


@runtime_checkable
class BranchScorer(Protocol):
    """A scorer whose rows may branch."""

    def __call__(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """As `Scorer`."""
        ...

    def score_branches(
        self,
        tokens: Int32[np.ndarray, "rows length"],
        places: Int32[np.ndarray, "rows length"],
        branches: Int32[np.ndarray, "rows length"],
        positions: Int32[np.ndarray, "rows asked"],
        targets: Int32[np.ndarray, "rows asked"],
    ) -> TargetScores:
        """As `Scorer`, of rows in which a token sees those before it of branch 0 and of its own.

        `places` says which position of its text a token has: in every branch they go on from those
        of the prefix.
        """
        ...


@dataclasses.dataclass(frozen=True)
class ChoiceScore:
    """How a model sees one continuation.

    Attributes:
      log_probability: of all its tokens together, in nats.
      likeliest: the model's own token at each of its positions, given the true ones before.
      greedy: whether those are the continuation's tokens, all of them.
    """

    log_probability: float
    likeliest: tuple[int, ...]
    greedy: bool

    @property
    def nats_per_token(self) -> float:
        """Mean negative log-probability, by which choices are compared."""
        return -self.log_probability / len(self.likeliest)


Logits = Callable[[Int32[np.ndarray, "rows length"]], Float[np.ndarray, "rows length vocabulary"]]


def from_logits(logits: Logits) -> Scorer:
    """A scorer from a function of token rows to logits (or log-probabilities) at every position."""

    def score(tokens: np.ndarray, positions: np.ndarray, targets: np.ndarray) -> TargetScores:
        every = np.asarray(logits(tokens), np.float32)
        asked = np.take_along_axis(every, positions[..., None], axis=1)
        top = asked.max(axis=-1, keepdims=True)
        normalizer = top[..., 0] + np.log(np.exp(asked - top).sum(axis=-1))
        chosen = np.take_along_axis(asked, targets[..., None], axis=-1)[..., 0]
        return TargetScores(chosen - normalizer, asked.argmax(axis=-1))

    return score


def score(
    prompts: Sequence[Prompt], scorer: Scorer | BranchScorer, tokens_per_batch: int = 16384
) -> list[tuple[ChoiceScore, ...]]:
    """The scores of each prompt's choices, in the order of the prompts.

    Args:
      tokens_per_batch: rows x padded length of one call; at least one row goes into each.
    """
    by_shape: dict[tuple[int, int], list[_Row]] = {}
    for number, prompt in enumerate(prompts):
        for row in _rows(number, prompt, branching=isinstance(scorer, BranchScorer)):
            shape = at_least(len(row.tokens), LENGTHS), at_least(len(row.targets), POSITIONS)
            by_shape.setdefault(shape, []).append(row)
    found: dict[tuple[int, int], ChoiceScore] = {}
    for shape, rows in sorted(by_shape.items()):
        largest = max(1, tokens_per_batch // shape[0])
        for start in range(0, len(rows), largest):
            batch = rows[start : start + largest]
            size = min(at_least(len(batch), ROWS), largest)
            found.update(_run(batch, shape, size, scorer))
    return [
        tuple(found[number, choice] for choice in range(len(prompt.choices)))
        for number, prompt in enumerate(prompts)
    ]


def at_least(size: int, steps: tuple[int, ...]) -> int:
    """The smallest step that holds `size`; beyond the last one, the next multiple of it."""
    return next((step for step in steps if step >= size), -(-size // steps[-1]) * steps[-1])


@dataclasses.dataclass(frozen=True, eq=False)
class _Row:
    """Tokens that are read once, and what is scored from them.

    `counts` has how many of the targets, in order, are those of which choice of the prompt.
    """

    prompt: int
    tokens: Ids
    places: Ids
    branches: Ids
    positions: Ids
    targets: Ids
    counts: tuple[tuple[int, int], ...]


def _rows(number: int, prompt: Prompt, branching: bool) -> Iterator[_Row]:
    """One row for all choices if that is possible and shorter, else one for each."""
    # The last token is only predicted.
    inputs = [np.concatenate([choice.context, choice.tokens[:-1]]) for choice in prompt.choices]
    if branching:
        row = _branched(number, prompt, inputs, range(len(inputs)))
        if len(row.tokens) <= LENGTHS[-1] and len(row.tokens) < sum(map(len, inputs)):
            yield row
            return
    same: dict[bytes, list[int]] = {}
    for choice, tokens in enumerate(inputs):
        same.setdefault(tokens.tobytes(), []).append(choice)
    for choices in same.values():
        yield _branched(number, prompt, inputs, choices)


def _branched(number: int, prompt: Prompt, inputs: list[Ids], choices: Sequence[int]) -> _Row:
    """The row that reads what `choices` begin with once, and then the rest of each."""
    shared = _shared([inputs[choice] for choice in choices])
    parts, branches, places, positions = [inputs[choices[0]][:shared]], [0] * shared, [], []
    for branch, choice in enumerate(choices, 1):
        rest = inputs[choice][shared:]
        start = len(branches) - shared
        asked = np.arange(len(prompt.choices[choice].context) - 1, len(inputs[choice]))
        positions.append(np.where(asked < shared, asked, asked + start))
        places.append(np.arange(shared, len(inputs[choice])))
        branches += [branch] * len(rest)
        parts.append(rest)
    return _Row(
        number,
        np.concatenate(parts),
        np.concatenate([np.arange(shared), *places]).astype(np.int32),
        np.array(branches, np.int32),
        np.concatenate(positions).astype(np.int32),
        np.concatenate([prompt.choices[choice].tokens for choice in choices]),
        tuple((choice, len(prompt.choices[choice].tokens)) for choice in choices),
    )


def _shared(rows: Sequence[Ids]) -> int:
    """With how many equal tokens all rows begin."""
    shared = min(map(len, rows))
    for row in rows[1:]:
        differing = np.flatnonzero(row[:shared] != rows[0][:shared])
        shared = int(differing[0]) if len(differing) else shared
    return shared


def _run(
    rows: list[_Row], shape: tuple[int, int], size: int, scorer: Scorer | BranchScorer
) -> Iterator[tuple[tuple[int, int], ChoiceScore]]:
    """Scores rows as one batch of `size`; what is filled up is zeros and is not read."""
    length, asked = shape
    tokens = _filled([row.tokens for row in rows], size, length)
    positions = _filled([row.positions for row in rows], size, asked)
    targets = _filled([row.targets for row in rows], size, asked)
    if isinstance(scorer, BranchScorer):
        places = _filled([row.places for row in rows], size, length)
        branches = _filled([row.branches for row in rows], size, length)
        scores = scorer.score_branches(tokens, places, branches, positions, targets)
    else:
        scores = scorer(tokens, positions, targets)
    for place, row in enumerate(rows):
        end = 0
        for choice, count in row.counts:
            start, end = end, end + count
            likeliest = np.asarray(scores.likeliest[place, start:end])
            total = np.sum(scores.log_probability[place, start:end], dtype=np.float64)
            greedy = bool((likeliest == row.targets[start:end]).all())
            key = row.prompt, choice
            yield key, ChoiceScore(float(total), tuple(likeliest.tolist()), greedy)


def _filled(rows: Sequence[Ids], size: int, width: int) -> Int32[np.ndarray, "size width"]:
    array = np.zeros((size, width), np.int32)
    for place, row in enumerate(rows):
        array[place, : len(row)] = row
    return array
