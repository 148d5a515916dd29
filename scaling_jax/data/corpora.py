"""Three distributions that exist on every machine, so that a first testbed needs no download.

    python_code   source files of the running Python's standard library
    python_docs   their docstrings and Python's help topics: English prose
    zipf_markov   a synthetic language whose entropy rate is known in closed form (`zipf_markov.py`)

A document is in the validation split or in the training split by a hash of its origin alone. A
docstring's origin is its file, so that what is held out of one distribution is not trained on with
the other either. Nothing here imports TensorFlow.
"""

import ast
import functools
import hashlib
import platform
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from scaling_jax.data import zipf_markov
from scaling_jax.errors import UserError, nearest

SPLITS = ("train", "validation")
VALIDATION_SHARE = 0.05
EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "__pycache__"),
    *("test", "tests", "idle_test"),
    # Not code: the help topics, as one string each. They are part of python_docs.
    "pydoc_data",
}
SHORTEST_DOCSTRING = 40


class Document(NamedTuple):
    """A text, the name it is known by, and what decides on which split it is in."""

    identifier: str
    text: str
    origin: str

    @property
    def split(self) -> str:
        """The split the document belongs to: a function of its origin and nothing else."""
        digest = hashlib.sha256(self.origin.encode("utf-8")).digest()
        held_out = int.from_bytes(digest[:8], "big") < VALIDATION_SHARE * 2**64
        return "validation" if held_out else "train"


def documents(corpus: str, split: str) -> Iterator[Document]:
    """The documents of one split of an embedded corpus, always in the same order.

    Raises:
      UserError: there is no such corpus or split, or this Python comes without what it reads.
    """
    if corpus not in CORPORA:
        raise UserError(f"unknown corpus '{corpus}' ({nearest(corpus, CORPORA)})")
    if split not in SPLITS:
        raise UserError(f"unknown split '{split}' ({nearest(split, SPLITS)})")
    found = [document for document in CORPORA[corpus]() if document.split == split]
    if not found:
        raise UserError(
            f"{corpus}: {sysconfig.get_path('stdlib')} holds no document for the {split} split; "
            "a Python with the sources of its standard library is needed"
        )
    yield from found


def version(corpus: str) -> str:
    """Names the content of an embedded corpus: the same version, the same documents."""
    if corpus == "zipf_markov":
        return f"zipf_markov {zipf_markov.VERSION}"
    return f"{platform.python_implementation()} {platform.python_version()}"


@functools.cache
def python_code() -> tuple[Document, ...]:
    """Source files of the standard library, tests left out, by path."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    kept = (name for name in names if EXCLUDED_FOLDERS.isdisjoint(name.split("/")))
    sources = ((name, _read_source(root / name)) for name in kept)
    return tuple(Document(name, text, origin=name) for name, text in sources if text)


@functools.cache
def python_docs() -> tuple[Document, ...]:
    """The topics of Python's help and the standard library's docstrings, each text once.

    A text that stands in several places is the training split's if one of them is: "train" sorts
    before "validation".
    """
    topics = [Document(f"topic:{name}", text, f"topic:{name}") for name, text in _help_topics()]
    docstrings = [
        Document(f"{source.identifier}:{name}", text, source.origin)
        for source in python_code()
        for name, text in _docstrings(source.text)
        if len(text) >= SHORTEST_DOCSTRING
    ]
    first: dict[str, Document] = {}
    for document in sorted(topics + docstrings, key=lambda document: document.split):
        first.setdefault(document.text, document)
    return tuple(first.values())


@functools.cache
def zipf_markov_texts() -> tuple[Document, ...]:
    """The documents of the synthetic language, numbered."""
    return tuple(
        Document(str(number), text, origin=str(number))
        for number, text in enumerate(zipf_markov.texts())
    )


CORPORA = {
    "python_code": python_code,
    "python_docs": python_docs,
    "zipf_markov": zipf_markov_texts,
}


def _read_source(path: Path) -> str:
    """The text of a source file; empty where it is not UTF-8 (Python allows other encodings)."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def _help_topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package Python without it
        return []
    return sorted(topics.items())


def _docstrings(source: str) -> Iterator[tuple[str, str]]:
    """Qualified name (empty for the module's) and text of every docstring in a module."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            module = ast.parse(source)
    except (SyntaxError, ValueError):  # files that are wrong on purpose
        return
    yield from _docstrings_below("", module)


def _docstrings_below(name: str, node: ast.AST) -> Iterator[tuple[str, str]]:
    """Walks statements only: docstrings never stand inside an expression."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        name = f"{name}.{node.name}" if name else node.name
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for block in ("body", "orelse", "handlers", "finalbody"):
        inner = getattr(node, block, None)
        for child in inner if isinstance(inner, list) else ():
            yield from _docstrings_below(name, child)
