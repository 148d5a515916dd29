"""Questions about what is held out of the embedded corpora, which tiny models can answer.

    DATA/<corpus>/questions/cloze.jsonl    how a text goes on: {"context", "continuation"}
    DATA/<corpus>/questions/choice.jsonl   which of four continuations is the text's own: {"query",
                                           "choices", "gold"}; the others stand elsewhere

`configs/evaluations/quickstart.yaml` asks them.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaling_jax import atomic
from scaling_jax.data import corpora

# Characters of a text with its continuation: what a model of the quickstart reads at once.
WINDOW = 16
CLOZE_LENGTH, CHOICE_LENGTH = 2, 3
CHOICES = 4
# Between the beginnings of texts: these may overlap, what is asked of them does not.
STRIDE = 8
# Of each kind, if the corpus has as many.
QUESTIONS = 1000
SEED = 0


def write(corpus: str, out: Path) -> Path:
    """Writes the questions of an embedded corpus, always the same ones; returns their folder.

    Raises:
      UserError: as `corpora.documents`.
    """
    folder = out / corpus / "questions"
    for name, questions in (("cloze", cloze(corpus)), ("choice", choice(corpus))):
        lines = [json.dumps(question) + "\n" for question in questions]
        atomic.write_text(folder / f"{name}.jsonl", "".join(lines))
    return folder


def cloze(corpus: str) -> Iterator[dict[str, Any]]:
    """Texts and the CLOZE_LENGTH characters that follow."""
    for context, continuation in _texts(corpus, CLOZE_LENGTH):
        yield {"context": context, "continuation": continuation}


def choice(corpus: str) -> Iterator[dict[str, Any]]:
    """Texts with CHOICES different continuations of CHOICE_LENGTH characters, in random order."""
    generator = random.Random(SEED)
    texts = _texts(corpus, CHOICE_LENGTH)
    for context, continuation in texts:
        choices = [continuation]
        while len(choices) < CHOICES:
            _, other = generator.choice(texts)
            choices += [other] if other not in choices else []
        generator.shuffle(choices)
        yield {"query": context, "choices": choices, "gold": choices.index(continuation)}


def _texts(corpus: str, length: int) -> list[tuple[str, str]]:
    """QUESTIONS texts of the validation split, each cut in two: `length` characters are asked.

    Neither part begins or ends in a space, which an evaluation may strip, and each character is one
    byte, so that rows of bytes are of one length.
    """
    found = dict.fromkeys(
        (document.text[start : start + WINDOW - length], document.text[stop - length : stop])
        for document in corpora.documents(corpus, "validation")
        for start in range(0, len(document.text) - WINDOW + 1, STRIDE)
        for stop in [start + WINDOW]
    )
    whole = [parts for parts in found if all(p.isascii() and p == p.strip() for p in parts)]
    return random.Random(SEED).sample(whole, min(QUESTIONS, len(whole)))
