"""Prompts as token ids, kept on disk under a hash of all that determines them.

A task is tokenised once for all models that read with the same vocabulary. A file appears whole or
not at all, so that several programs may write at once; one that is damaged is made anew. Whatever
lies there may be deleted at any time.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import tokenizers

from scaling_jax import atomic
from scaling_jax.data.fetch import git_blob
from scaling_jax.data.vocabularies import Vocabulary
from scaling_jax.evaluation import prompts
from scaling_jax.evaluation.prompts import Continuation, Digest, Ids, Prompt
from scaling_jax.evaluation.tasks import TaskConfig

# To be raised when the same settings make other prompts, or a file is laid out in another way.
FORMAT = 1
# What turns text into token ids.
LIBRARIES = [tokenizers.__version__, sentencepiece.__version__]
# Of a task, what says where it belongs and not how it is asked.
NOT_IN_PROMPTS = ("data", "group", "chance", "git_blob")
SHA256_BYTES = 32


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A task's prompts.

    Attributes:
      sha256: of the prompts (scaling_jax.evaluation.prompts.Digest).
      data_git_blob: of the file that they were made from.
    """

    prompts: Sequence[Prompt]
    sha256: str
    data_git_blob: str


def default_folder() -> Path:
    """`scaling_jax/prompts` in the user's cache: $XDG_CACHE_HOME, or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "scaling_jax/prompts"


def prepare(
    task: TaskConfig,
    path: Path,
    vocabulary: Vocabulary,
    max_tokens: int,
    seed: int,
    folder: Path | None,
) -> Prepared:
    """The prompts of every question in the file `path`: from `folder`, or built and kept there.

    Raises:
      UserError: as of scaling_jax.evaluation.prompts.build.
    """
    blob = git_blob(path.read_bytes())
    kept = folder / f"{_key(task, blob, vocabulary, max_tokens, seed)}.prompts" if folder else None
    found = _read(kept) if kept else None
    if found is None:
        built = list(prompts.build(task, path, vocabulary, max_tokens, seed))
        digest = Digest()
        for prompt in built:
            digest.add(prompt)
        found = built, digest.sha256
        if kept:
            _write(kept, *found)
    return Prepared(*found, blob)


def _key(task: TaskConfig, blob: str, vocabulary: Vocabulary, max_tokens: int, seed: int) -> str:
    settings = dataclasses.asdict(task)
    for name in NOT_IN_PROMPTS:
        del settings[name]
    determining = {
        "format": FORMAT,
        "libraries": LIBRARIES,
        "data_git_blob": blob,
        "vocabulary_sha256": vocabulary.sha256,
        "task": settings,
        "max_tokens": max_tokens,
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(determining, sort_keys=True).encode()).hexdigest()


def _write(path: Path, asked: Sequence[Prompt], sha256: str) -> None:
    """Keeps prompts, the sha256 of everything first; a folder that cannot be written is no harm."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **_arrays(asked, sha256))
    content = buffer.getbuffer()
    try:
        with atomic.replacing(path) as temporary, temporary.open("wb") as file:
            file.write(hashlib.sha256(content).digest())
            file.write(content)
    except OSError as error:
        warnings.warn(f"{path.parent}: token ids are not kept there ({error})", stacklevel=2)


def _read(path: Path) -> tuple[list[Prompt], str] | None:
    try:
        content = memoryview(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        warnings.warn(f"{path}: cannot be read ({error})", stacklevel=2)
        return None
    if hashlib.sha256(content[SHA256_BYTES:]).digest() != content[:SHA256_BYTES]:
        warnings.warn(f"{path}: is damaged and made anew", stacklevel=2)
        return None
    with np.load(io.BytesIO(content[SHA256_BYTES:]), allow_pickle=False) as arrays:
        return _prompts(dict(arrays))


def _arrays(asked: Sequence[Prompt], sha256: str) -> dict[str, np.ndarray]:
    """Prompts as few large arrays; ids that the choices of a question share are there once."""
    pieces: list[Ids] = []
    choices, rows, categories = [], [], dict[str, int]()
    for prompt in asked:
        known: dict[bytes, int] = {}
        for choice in prompt.choices:
            numbers = []
            for ids in (choice.context, choice.tokens):
                number = known.setdefault(ids.tobytes(), len(pieces))
                if number == len(pieces):
                    pieces.append(ids)
                numbers.append(number)
            choices.append((*numbers, choice.truncated))
        category = categories.setdefault(prompt.category, len(categories))
        rows.append(
            (category, prompt.index, len(prompt.choices), prompt.gold, prompt.answer_tokens)
        )
    ids = np.concatenate(pieces)
    texts: dict[str, Any] = {
        "sha256": sha256,
        "categories": list(categories),
        "aliases": [prompt.aliases for prompt in asked],
    }
    return {
        "ids": ids.astype(np.uint16) if ids.max() < 1 << 16 else ids,
        "ends": np.cumsum([len(piece) for piece in pieces]),
        "choices": np.array(choices, np.int64),
        "rows": np.array(rows, np.int64),
        "texts": np.frombuffer(json.dumps(texts).encode(), np.uint8),
    }


def _prompts(arrays: dict[str, np.ndarray]) -> tuple[list[Prompt], str]:
    """What `_arrays` was made from."""
    ids = arrays["ids"].astype(np.int32)
    ends = arrays["ends"].tolist()
    pieces = [ids[start:end] for start, end in itertools.pairwise([0, *ends])]
    texts = json.loads(arrays["texts"].tobytes())
    choices = iter(
        Continuation(pieces[context], pieces[tokens], bool(truncated))
        for context, tokens, truncated in arrays["choices"].tolist()
    )
    found = [
        Prompt(
            category=texts["categories"][category],
            index=index,
            choices=tuple(itertools.islice(choices, count)),
            gold=gold,
            aliases=tuple(aliases),
            answer_tokens=answer_tokens,
        )
        for (category, index, count, gold, answer_tokens), aliases in zip(
            arrays["rows"].tolist(), texts["aliases"], strict=True
        )
    ]
    return found, texts["sha256"]
