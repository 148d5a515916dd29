"""Runs that training has given up, noted in their folders so that nobody trains them again."""

import logging
from pathlib import Path

from scaling_jax import sealed

FAILED_FILE = "failed.json"

logger = logging.getLogger(__name__)


def note(folder: Path, reason: str) -> None:
    """Notes that the run in `folder` is given up; removing the file lets it be tried again."""
    sealed.write(folder / FAILED_FILE, {"reason": reason})


def reason(folder: Path) -> str | None:
    """Why the run in `folder` was given up; None if it was not, or if nobody can read why."""
    path = folder / FAILED_FILE
    try:
        return str(sealed.read(path)["reason"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as error:
        logger.warning("%s: damaged and not used: %s", path, error)
        return None
