"""JSON that says by itself whether it is what was written: a sha256 of the content stands in it.

A flipped bit in a digit still makes a number; only a checksum tells. It is that of the content's
canonical form, so that spaces and the order of keys do not matter.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaling_jax import atomic

KEY = "sha256"


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` with its checksum under KEY."""
    return {**content, KEY: _digest(content)}


def unseal(content: Any) -> dict[str, Any]:
    """What was sealed, without the checksum.

    Raises:
      ValueError: `content` is no mapping, has no checksum or not the right one.
    """
    if not isinstance(content, dict) or KEY not in content:
        raise ValueError(f"it has no {KEY}")
    inner = {key: value for key, value in content.items() if key != KEY}
    if content[KEY] != _digest(inner):
        raise ValueError(f"its {KEY} is not that of its content")
    return inner


def write(path: Path, content: Mapping[str, Any], indent: int | None = None) -> None:
    """Seals `content` and writes it as JSON, atomically."""
    atomic.write_text(path, json.dumps(seal(content), indent=indent) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The content of a file that `write` has written.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, saying how.
    """
    return parse(path.read_bytes())


def parse(text: bytes) -> dict[str, Any]:
    """The content of such a file, given the file's.

    Raises:
      ValueError: it is damaged, saying how.
    """
    try:
        return unseal(json.loads(text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _digest(content: Mapping[str, Any]) -> str:
    # Written and read once more: tuples become lists and every key a string, as in a file.
    plain = json.loads(json.dumps(content))
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
