"""Files that appear whole or not at all: written under a temporary name, flushed, renamed."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it takes the place of `path`.

    If the block raises, the temporary file is removed and `path` stays as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which on success becomes `path`; none may be there.

    If the block raises, the folder is removed, and so are those that were made to hold it.
    """
    target = Path(path)
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary)
        with contextlib.suppress(OSError):  # somebody else put something there
            for parent in made:
                parent.rmdir()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` in UTF-8, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _beside(target: Path) -> Path:
    """A temporary name that nobody else uses, hidden, in the folder of `target`."""
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
