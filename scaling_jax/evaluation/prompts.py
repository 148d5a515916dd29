"""Questions to token ids, as composer 0.17.2 makes them for LLM Foundry 0.4.0.

A prompt is three pieces, each tokenised by itself and never the joined text: the preamble (solved
questions), the question, and the continuation that is scored. Which questions are solved, and in
which order, follows from one stream of Python's random numbers through all of a category's
questions and from the order in which CPython walks through a set of integers.
"""

import dataclasses
import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32

from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import questions
from scaling_jax.evaluation.questions import Question
from scaling_jax.evaluation.tasks import TaskConfig

# Questions that are tokenised together.
CHUNK = 256
# Room beyond the longest answer where a chain of thought comes first.
THOUGHT_BUFFER = 10

Ids = Int32[np.ndarray, "tokens"]


@dataclasses.dataclass(frozen=True, eq=False)
class Continuation:
    """Tokens to be scored and those before them, together not longer than a row.

    Choices of one question share the memory of their context.
    """

    context: Int32[np.ndarray, "context"]
    tokens: Int32[np.ndarray, "tokens"]
    # Whether the context has lost tokens on the left.
    truncated: bool


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """One question as a model sees it.

    Attributes:
      category, index: which question; the index counts within the category.
      choices: one a choice; in question answering one, without tokens to score.
      gold: the right choice's number.
      aliases: texts that a generated answer may begin with.
      answer_tokens: how many tokens an answer may have; 0 where none is generated.
    """

    category: str
    index: int
    choices: tuple[Continuation, ...]
    gold: int
    aliases: tuple[str, ...] = ()
    answer_tokens: int = 0

    @property
    def truncated(self) -> int:
        """How many choices have lost tokens on the left."""
        return sum(choice.truncated for choice in self.choices)


def build(
    task: TaskConfig, path: Path, vocabulary: Vocabulary, max_tokens: int, seed: int
) -> Iterator[Prompt]:
    """The prompts of every question in the file `path`, category by category, in order.

    Raises:
      UserError: the file is not what it should be; a continuation is empty, does not fit into
        `max_tokens` or has nothing before it.
    """
    by_category = questions.read(task, path)
    answer_tokens = 0
    if task.type == "question_answering":
        everything = [question for each in by_category.values() for question in each]
        answer_tokens = _longest_answer(task, everything, vocabulary)
    space = " " if task.continuation_space and needs_space(vocabulary) else ""
    for category, pool in by_category.items():
        texts = iter(_texts(task, pool, space, seed))
        index = itertools.count()
        while chunk := list(itertools.islice(texts, CHUNK)):
            for rows, question in _tokenize(chunk, vocabulary):
                number = next(index)
                where = f"{path}: question {number}" + (f" of '{category}'" if category else "")
                choices = [
                    _fit(context, continuation, answer_tokens, max_tokens, where)
                    for context, continuation in rows
                ]
                yield Prompt(
                    category, number, tuple(choices), question.gold, question.aliases, answer_tokens
                )


def needs_space(vocabulary: Vocabulary) -> bool:
    """Whether a continuation has to bring the space before it.

    Not where the vocabulary puts one before every text itself, as Llama's does. Composer asks
    whether " a" is one token: the same answer for both, but a wrong one for bytes.
    """
    return vocabulary.decode(vocabulary.encode("a") * 2) == "aa"


class Digest:
    """sha256 over context ids, continuation ids and gold of prompts, to compare two programs."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, prompt: Prompt) -> None:
        """Takes in one more prompt."""
        pairs = [[choice.context.tolist(), choice.tokens.tolist()] for choice in prompt.choices]
        self._hash.update(json.dumps([pairs, prompt.gold], separators=(",", ":")).encode())

    @property
    def sha256(self) -> str:
        """Of all prompts so far, as hexadecimal digits."""
        return self._hash.hexdigest()


@dataclasses.dataclass(frozen=True)
class _Texts:
    """The pieces of a question: one preamble, and each option's question and continuation."""

    preamble: str
    options: tuple[tuple[str, str], ...]
    question: Question


def _texts(task: TaskConfig, pool: Sequence[Question], space: str, seed: int) -> Iterator[_Texts]:
    generator = random.Random(seed)
    for index, question in enumerate(pool):
        preamble = task.prompt_string
        for shot in _shots(len(pool), task.shots, index, generator):
            context, continuation = pool[shot].options[pool[shot].gold]
            between = task.example_delimiter if preamble else ""
            preamble += between + context + task.continuation_delimiter + continuation
        before = task.example_delimiter if preamble else ""
        after = task.continuation_delimiter.rstrip()
        # A schema without shots is asked as it stands.
        if task.type == "schema" and not preamble:
            after = ""
        options = []
        for context, continuation in question.options:
            lead = "" if continuation.startswith(" ") else space
            scored = "" if task.type == "question_answering" else lead + continuation
            options.append((before + context + after, scored))
        yield _Texts(preamble, tuple(options), question)


def _shots(count: int, shots: int, index: int, generator: random.Random) -> set[int]:
    """Which other questions are solved before question `index`; their order is that of the set."""
    if shots == 0:
        return set()
    shots = min(count - 1, shots)
    chosen = set(generator.sample(range(count), shots))
    if index in chosen:
        chosen.remove(index)
        if len(chosen) >= count - 1:
            return chosen
        another = index
        while another in chosen or another == index:
            another = generator.choice(range(count))
        chosen.add(another)
    return chosen


def _tokenize(
    chunk: Sequence[_Texts], vocabulary: Vocabulary
) -> Iterator[tuple[list[tuple[Ids, Ids]], Question]]:
    """Context and continuation ids of each option of each question; no text is encoded twice."""
    pieces = dict.fromkeys(
        piece
        for texts in chunk
        for piece in (texts.preamble, *itertools.chain.from_iterable(texts.options))
    )
    ids = dict(zip(pieces, vocabulary.encode_batch(list(pieces)), strict=True))
    for texts in chunk:
        preamble = ids[texts.preamble]
        contexts = {
            context: np.array(preamble + ids[context], np.int32) for context, _ in texts.options
        }
        rows = [
            (contexts[context], np.array(ids[scored], np.int32))
            for context, scored in texts.options
        ]
        yield rows, texts.question


def _fit(
    context: Ids, tokens: Ids, answer_tokens: int, max_tokens: int, where: str
) -> Continuation:
    """Cuts the context on the left, so that what follows it still fits into the row."""
    following = answer_tokens or len(tokens)
    if not following:
        raise UserError(f"{where}: a choice has no token")
    if following >= max_tokens:
        raise UserError(
            f"{where}: {following} tokens to score leave no room for a context in "
            f"max_tokens={max_tokens}"
        )
    if not len(context):
        raise UserError(f"{where}: nothing stands before what is to be scored")
    kept = context[-(max_tokens - following) :]
    return Continuation(kept, tokens, len(kept) < len(context))


def _longest_answer(task: TaskConfig, pool: Sequence[Question], vocabulary: Vocabulary) -> int:
    """Tokens of the longest answer under any of its names, with the chain of thought before it."""
    texts = [question.thought + alias for question in pool for alias in question.aliases]
    longest = max(len(ids) for ids in vocabulary.encode_batch(texts))
    return longest + (THOUGHT_BUFFER if task.cot_delimiter else 0)
