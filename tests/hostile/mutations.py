"""Hypothesis strategies that damage a good file: its bytes, or any place of its content."""

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# What parsers stumble over: types in the wrong place, numbers at the edge, names that lead away.
HOSTILE_TEXT = st.sampled_from(
    [
        "",
        "../../../etc/passwd",
        "/etc/passwd",
        "<script>alert(1)</script>",
        "!!python/object/apply:os.system [true]",
        "${HOME}",
        "a\x00b",
        "\ud800",
        "nan",
        "1e999",
        "__class__",
        "x" * 500,
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=True)
    | st.text(max_size=8)
    | HOSTILE_TEXT
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
DELETED = object()


def bytes_like(content: bytes) -> st.SearchStrategy[bytes]:
    """`content` cut short, with bytes changed, with a part doubled, or something else."""
    place = st.integers(0, max(len(content) - 1, 0))
    return (
        place.map(lambda end: content[:end])
        | st.tuples(place, st.binary(min_size=1, max_size=8)).map(
            lambda pair: content[: pair[0]] + pair[1] + content[pair[0] + len(pair[1]) :]
        )
        | st.tuples(place, place).map(lambda pair: content[: max(pair)] + content[min(pair) :])
        | st.binary(max_size=200)
        | st.sampled_from([b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\x00" * 64])
    )


def content_like(content: Any) -> st.SearchStrategy[Any]:
    """JSON content with one value, anywhere in it, replaced or left out."""
    paths = list(_paths(content))
    return st.tuples(st.sampled_from(paths), VALUES | st.just(DELETED)).map(
        lambda change: _changed(content, *change)
    )


def json_like(content: Any) -> st.SearchStrategy[bytes]:
    """The JSON of damaged content, or damaged JSON."""
    whole = json.dumps(content).encode()
    return content_like(content).map(lambda found: json.dumps(found).encode()) | bytes_like(whole)


def _paths(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(content, dict):
        for key, below in content.items():
            yield from _paths(below, (*path, key))
    elif isinstance(content, list):
        for index, below in enumerate(content):
            yield from _paths(below, (*path, index))


def _changed(content: Any, path: tuple[Any, ...], value: Any) -> Any:
    if not path:
        return None if value is DELETED else value
    changed = copy.deepcopy(content)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    if value is DELETED:
        del holder[path[-1]]
    else:
        holder[path[-1]] = value
    return changed
