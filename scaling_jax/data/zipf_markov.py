"""A synthetic language whose entropy rate is known: what a perfect model would still lose.

It is a Markov chain of order 2 over printable characters. After any two symbols the next one is
drawn by its rank from one Zipf distribution; which symbol has which rank is a permutation of the
context's own, so every context is equally uncertain, but each has to be learned for itself. A
document ends after each symbol with a constant probability and holds one symbol at least.
"""

import functools
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

# Raised whenever a constant or the generation changes: prepared data carry it.
VERSION = "1.0.0"
ALPHABET = "".join(chr(code) for code in range(ord("!"), ord("!") + 64))
ZIPF_EXPONENT = 1.8
# How much of a symbol's rank is common to all contexts, goes by the last symbol, goes by the last
# two. The common part makes some contexts far more frequent than others.
SCORE_WEIGHTS = (1.0, 1.0, 1.0)
END_PROBABILITY = 1 / 800
DOCUMENTS = 15_000
TABLE_SEED, TEXT_SEED = 1, 2


def texts() -> Iterator[str]:
    """Every document of the language, always the same ones."""
    ranked = ranked_symbols()
    # The last entry is left out: a draw beyond all others has the last rank, rounding or not.
    cumulative = np.cumsum(rank_probabilities())[:-1]
    generator = np.random.default_rng(TEXT_SEED)
    lengths = generator.geometric(END_PROBABILITY, DOCUMENTS)
    order = np.argsort(-lengths, kind="stable")
    symbols = np.zeros((DOCUMENTS, lengths.max()), np.uint8)
    before = last = np.zeros(DOCUMENTS, np.int64)
    # All documents grow by one symbol at a time; the longest come first, so that those still
    # growing are always the first ones.
    growing_at = DOCUMENTS - np.searchsorted(
        lengths[order][::-1], np.arange(lengths.max()), "right"
    )
    for position, growing in enumerate(growing_at):
        rank = np.searchsorted(cumulative, generator.random(growing), side="right")
        symbol = ranked[before[:growing], last[:growing], rank]
        symbols[:growing, position] = symbol
        before, last = last[:growing], symbol
    characters = np.frombuffer(ALPHABET.encode("ascii"), np.uint8)
    for row, length in zip(np.argsort(order), lengths, strict=True):
        yield characters[symbols[row, :length]].tobytes().decode("ascii")


def entropy_rate() -> float:
    """Nats per token, with one token a symbol and one for the end of a document.

    With H the entropy of the Zipf distribution and q the probability to end, a document has 1/q
    symbols on average. Each symbol costs H, whatever its context; after each one, whether the
    document ends costs h(q) = -q ln q - (1 - q) ln(1 - q); the end is a token of its own. So

        rate = (H / q + h(q) / q) / (1 / q + 1) = (H + h(q)) / (1 + q).

    A model that reads rows cut anywhere loses a little more: it cannot see what came before a row.
    """
    probabilities = rank_probabilities()
    symbol = float(-(probabilities * np.log(probabilities)).sum())
    q = END_PROBABILITY
    end = -q * math.log(q) - (1 - q) * math.log1p(-q)
    return (symbol + end) / (1 + q)


@functools.cache
def rank_probabilities() -> Float[np.ndarray, "rank"]:
    """Probability of each rank: a Zipf distribution, the same in every context."""
    weights = np.arange(1, len(ALPHABET) + 1, dtype=np.float64) ** -ZIPF_EXPONENT
    return weights / weights.sum()


@functools.cache
def ranked_symbols() -> Int[np.ndarray, "before last rank"]:
    """The symbols in order of rank, for each context; the first two are preceded by symbol 0.

    Each context sorts its symbols by a score with a part common to all contexts, one that depends
    on the last symbol and one on both, so that a model gets better as it learns to use more of the
    context.
    """
    generator = np.random.default_rng(TABLE_SEED)
    size = len(ALPHABET)
    shapes = ((1, 1, size), (1, size, size), (size, size, size))
    score = sum(
        weight * generator.normal(size=shape)
        for weight, shape in zip(SCORE_WEIGHTS, shapes, strict=True)
    )
    return np.argsort(score, axis=-1).astype(np.int64)
