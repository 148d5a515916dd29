"""Text of the user's own, named by a path: a .txt or .jsonl file, or a folder of those.

Each .txt file is a document, and so is the "text" of each line of a .jsonl file. A folder that has
both a train/ and a validation/ folder is split that way; otherwise a hash of each document's name
draws the validation split. Empty documents are left out. Nothing here imports TensorFlow.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from scaling_jax.data.corpora import CORPORA, SPLITS, Document
from scaling_jax.errors import UserError, nearest

SUFFIXES = (".txt", ".jsonl")


def dataset_name(path: Path) -> str:
    """What data prepared from `path` are called: its last part, without the suffix of a file.

    Raises:
      UserError: `path` is no source of text, or its name cannot be that of a dataset.
    """
    if not path.exists():
        raise UserError(
            f"'{path}' is neither an embedded corpus ({nearest(str(path), CORPORA)}) nor a path"
        )
    if path.is_file() and path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a file of text ends in one of {', '.join(SUFFIXES)}")
    name = path.stem if path.is_file() else path.resolve().name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.=-]*", name) or name in CORPORA:
        raise UserError(
            f"{path}: '{name}' cannot be the name of a dataset; use letters, digits and _ . = -, "
            f"and none of {', '.join(CORPORA)}"
        )
    return name


def documents(path: Path, split: str) -> Iterator[Document]:
    """The documents of one split, by file name and line.

    Raises:
      UserError: a file is not UTF-8, or a line is not a JSON object with a "text".
    """
    return (document for given, document in _documents(path) if given == split)


def version(path: Path) -> str:
    """Names the content of the texts at `path`: a hash of their names, splits and words.

    Raises:
      UserError: as `documents`, or a split has no document.
    """
    total = hashlib.sha256()
    missing = set(SPLITS)
    for split, document in _documents(path):
        missing.discard(split)
        for part in (split, document.identifier, document.text):
            total.update(hashlib.sha256(part.encode("utf-8")).digest())
    if missing:
        raise UserError(
            f"{path}: no document falls into the {min(missing)} split; give more documents, or "
            f"folders {path.name}/train and {path.name}/validation"
        )
    return f"sha256 {total.hexdigest()}"


def _documents(path: Path) -> Iterator[tuple[str, Document]]:
    """Every document, and the split it is in."""
    if path.is_dir() and all((path / split).is_dir() for split in SPLITS):
        for split in SPLITS:
            yield from ((split, document) for document in _below(path / split))
    else:
        yield from ((document.split, document) for document in _below(path))


def _below(path: Path) -> Iterator[Document]:
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file() and file.suffix in SUFFIXES:
            name = file.relative_to(path.parent).as_posix()
            yield from (document for document in _file_documents(file, name) if document.text)


def _file_documents(file: Path, name: str) -> Iterator[Document]:
    try:
        if file.suffix == ".txt":
            yield Document(name, file.read_text(encoding="utf-8"), origin=name)
        else:
            with file.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        identifier = f"{name}:{number}"
                        yield Document(identifier, _line_text(line, file, number), identifier)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8 ({error.reason} {error.object[error.start]:#x})"
        ) from None


def _line_text(line: str, file: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'{file}: line {number} is not a JSON object with a "text"') from None
    return text
