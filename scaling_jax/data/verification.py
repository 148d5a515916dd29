"""Token shards held to their sha256: once, until the file changes.

What has been found right is remembered in the process, and for later ones in `.verified/` beside
the shards: by the file's size and time of change, so that a shard is read as a whole only once on
its way into training. A disk that changes bits without a write is found by `data inspect --verify`.
"""

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
from jaxtyping import Int

from scaling_jax import atomic
from scaling_jax.errors import UserError

STAMPS = ".verified"
_known: set[tuple[str, int, int, str]] = set()


def verify_once(path: Path, content: Int[np.ndarray, "tokens"], sha256: str) -> None:
    """Raises a UserError unless `content`, that of the file `path`, is what was written."""
    status = path.stat()
    state = (str(path.resolve()), status.st_size, status.st_mtime_ns, sha256)
    stamp = path.parent / STAMPS / f"{path.name}.json"
    facts = {"bytes": state[1], "changed_ns": state[2], "sha256": sha256}
    if state in _known or _read(stamp) == facts:
        return
    verify(path, content, sha256)
    _known.add(state)
    with contextlib.suppress(OSError):  # data that may only be read are verified by each process
        atomic.write_text(stamp, json.dumps(facts) + "\n")


def verify(path: Path, content: Int[np.ndarray, "tokens"], sha256: str) -> None:
    """As `verify_once`, whatever is known already."""
    found = hashlib.sha256(content.data).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path}: the shard is damaged: its sha256 is {found}, the index says {sha256}; "
            "`scaling-jax data prepare` makes it again"
        )


def _read(stamp: Path) -> object:
    try:
        return json.loads(stamp.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
