"""The one error a user's mistake raises, and the hint that goes with it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where, and what would be right.

    The command line prints the line and exits with code 2; nothing has been written by then.
    """


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown word: the closest known one, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}"
