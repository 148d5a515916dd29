"""A run as a model of lm-evaluation-harness: that program's tasks, over the scorer of this one.

    import lm_eval
    import scaling_jax.evaluation.lm_eval_adapter
    found = lm_eval.simple_evaluate("scaling_jax", {"run": "runs/RUN"}, tasks=["arc_easy"])

or the harness's own command line, with all that it can do:

    python -m scaling_jax.evaluation.lm_eval_adapter run --model scaling_jax \\
        --model_args run=runs/RUN --tasks arc_easy --num_fewshot 5

Prompts, and how a context and its continuation become token ids, are the harness's. This needs the
extra `lm_eval`.
"""

import dataclasses
import itertools
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from lm_eval.utils import (  # pyright: ignore[reportMissingImports]
    get_rolling_token_windows,
    make_disjoint_window,
)

from scaling_jax import mesh as meshes
from scaling_jax.data.run_vocabulary import run_vocabulary
from scaling_jax.errors import UserError
from scaling_jax.evaluation import scoring
from scaling_jax.evaluation.model_scorer import TransformerScorer
from scaling_jax.evaluation.prompts import Continuation, Prompt
from scaling_jax.evaluation.scoring import ChoiceScore
from scaling_jax.models import decoding
from scaling_jax.models.decoding import Sampling
from scaling_jax.training import loop
from scaling_jax.training.files import read_config

# Rows that are generated together; one more sets their length.
GENERATED = 15
# Tokens that are generated before it is looked whether a row has come to its end.
ROUND = 32
# Of an answer, unless the task says otherwise and as far as half a row holds it.
USUAL_TOKENS = 256
# What different programs call the number of tokens to generate.
COUNTS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")

Pair = tuple[Sequence[int], Sequence[int]]


@register_model("scaling_jax")
class RunLM(TemplateLM):
    """The newest checkpoint of a run, in float32 over all devices.

    Args:
      run: the run's folder.
      vocabulary: bytes, a SentencePiece .model or a tokenizer.json; by default that of the run's
        training data.
      batch_size, max_batch_size, device: given by the harness and of no effect: batches have a
        fixed number of tokens, and JAX's devices are all used.

    Raises:
      UserError: the run or its vocabulary is not what it should be.
    """

    def __init__(
        self,
        run: str,
        vocabulary: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        folder = Path(run)
        config = read_config(folder)
        self._vocabulary = run_vocabulary(config, vocabulary)
        self._model = dataclasses.replace(config.model, compute_dtype="float32")
        self._params = loop.restore(config, folder).state["params"]
        self._scorer = TransformerScorer(config.model, self._params, meshes.make_mesh(config.mesh))

    @property
    def eot_token_id(self) -> int:
        """The id that stands after every document, and before a text without context."""
        return self._vocabulary.end_of_text

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at once."""
        return self._model.sequence_length

    @property
    def tokenizer_name(self) -> str:
        """Of the vocabulary, by its content."""
        return self._vocabulary.sha256

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Ids of a text; there are no special ones."""
        return self._vocabulary.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        **_: object,
    ) -> list[tuple[float, bool]]:
        """What the harness's own `loglikelihood` calls, with token ids."""
        scores = self._score([(context, tokens) for _, context, tokens in requests])
        found = [(score.log_probability, score.greedy) for score in scores]
        for (texts, *_ids), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability in nats of each whole text, cut into rows of the model's length.

        Each token is predicted once, from an end of text and what stands before it in its row; the
        last row reaches back to be full.
        """
        owners, pairs = [], []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.eot_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                owners.append(number)
                pairs.append(make_disjoint_window(window))
        scores = [score.log_probability for score in self._score(pairs)]
        found = np.bincount(np.array(owners, int), scores, len(requests)).tolist()
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to one of its stops, an end of text or enough tokens.

        Raises:
          UserError: a task asks for a way to generate that there is not.
        """
        found = [""] * len(requests)
        plans = [self._plan(request.args[1]) for request in requests]
        contexts = [self.tok_encode(request.args[0]) for request in requests]
        # Rows of about one length, generated in one way, together.
        order = sorted(
            range(len(requests)), key=lambda number: (str(plans[number]), len(contexts[number]))
        )
        for plan, numbers in itertools.groupby(order, lambda number: plans[number]):
            for group in _parts(list(numbers), GENERATED):
                answers = self._generate([contexts[number] for number in group], *plan)
                for number, answer in zip(group, answers, strict=True):
                    found[number] = answer
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return found

    def _score(self, pairs: Sequence[Pair]) -> list[ChoiceScore]:
        """Scores each (context, continuation); neighbours with one context share its row."""
        choices = [self._continuation(*pair) for pair in pairs]
        cut = sum(choice.truncated for choice in choices)
        if cut:
            warnings.warn(
                f"{cut} of {len(choices)} contexts are longer than the model's "
                f"{self.max_length} tokens: they are cut on the left",
                stacklevel=2,
            )
        # Of no token nothing can be scored; it is as likely as can be.
        some = [choice for choice in choices if len(choice.tokens)]
        groups = itertools.groupby(some, lambda choice: choice.context.tobytes())
        asked = [Prompt("", 0, tuple(group), 0) for _, group in groups]
        scores = itertools.chain.from_iterable(scoring.score(asked, self._scorer))
        return [
            next(scores) if len(choice.tokens) else ChoiceScore(0.0, (), True) for choice in choices
        ]

    def _continuation(self, context: Sequence[int], tokens: Sequence[int]) -> Continuation:
        """The end of the context that fits before the continuation; its last token is not read."""
        room = self.max_length + 1 - len(tokens)
        if room < 1:
            raise UserError(
                f"a continuation of {len(tokens)} tokens is longer than the model's "
                f"{self.max_length}"
            )
        kept = np.array(context[-room:], np.int32)
        return Continuation(kept, np.array(tokens, np.int32), len(kept) < len(context))

    def _plan(self, given: Mapping[str, Any]) -> tuple[int, tuple[str, ...], Sampling]:
        """How many tokens, up to which texts, and how they are chosen."""
        known = {"until", "do_sample", "temperature", "top_k", "top_p", *COUNTS}
        if unknown := sorted(given.keys() - known):
            raise UserError(f"generation_kwargs: {unknown[0]} is not supported")
        usual = min(USUAL_TOKENS, self.max_length // 2)
        count = next((given[name] for name in COUNTS if given.get(name)), usual)
        if not 1 <= count < self.max_length:
            raise UserError(
                f"generation_kwargs: {count} tokens to generate, while the model reads "
                f"{self.max_length}: give max_gen_toks below that"
            )
        until = given.get("until") or ()
        stops = (until,) if isinstance(until, str) else tuple(until)
        temperature = given.get("temperature")
        temperature = 1.0 if temperature is None else temperature
        is_sampled = given.get("do_sample", "temperature" in given)
        return (
            count,
            tuple(filter(None, stops)),
            Sampling(
                float(temperature) if is_sampled else 0.0,
                given.get("top_k") or None,
                float(given.get("top_p") or 1.0),
            ),
        )

    def _generate(
        self, contexts: Sequence[list[int]], count: int, stops: Sequence[str], sampling: Sampling
    ) -> Iterator[str]:
        """Answers to up to `GENERATED` contexts."""
        before = [context[count - self.max_length :] or [self.eot_token_id] for context in contexts]
        answers: list[list[int]] = [[] for _ in before]
        going = list(range(len(before)))
        for start in range(0, count, ROUND):
            if not going:
                break
            step = min(ROUND, count - start)
            rows = self._decode([before[n] + answers[n] for n in going], step, sampling, start)
            for number, row in zip(going, rows, strict=True):
                answers[number] += row
            going = [
                number
                for number, row in zip(going, rows, strict=True)
                if len(row) == step
                and not _ends(self._text(before[number], answers[number]), stops)
            ]
        for ids, answer in zip(before, answers, strict=True):
            text = self._text(ids, answer)
            yield text[: min((text.find(stop) for stop in stops if stop in text), default=None)]

    def _decode(
        self, rows: list[list[int]], count: int, sampling: Sampling, seed: int
    ) -> list[list[int]]:
        """The next tokens of each row; rows that fill up let lengths and numbers be few."""
        longest = min(
            scoring.at_least(max(map(len, rows)), scoring.LENGTHS), self.max_length + 1 - count
        )
        size = scoring.at_least(len(rows) + 1, (4, GENERATED + 1))
        filled = [*rows, *[[self.eot_token_id] * longest] * (size - len(rows))]
        with jax.default_matmul_precision("float32"):
            new = decoding.generate(
                self._model,
                self._params,
                filled,
                max_tokens=count,
                sampling=sampling,
                seed=seed,
                end_of_text=self.eot_token_id,
                vocabulary_size=self._vocabulary.size,
            )
        return new[: len(rows)]

    def _text(self, context: Sequence[int], answer: Sequence[int]) -> str:
        """Decoded with its context: the space before a word may be there only then."""
        return self._vocabulary.decode([*context, *answer])[len(self._vocabulary.decode(context)) :]


def _ends(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def _parts(numbers: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
