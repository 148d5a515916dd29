"""What the command line turns into one line and an exit code, and the hint for unknown words."""

import difflib
import signal
from collections.abc import Iterable

TRY_AGAIN = 75  # exit code: EX_TEMPFAIL of sysexits.h


class UserError(Exception):
    """A mistake in what the user gave: one line that says what, where, and what would be right.

    The command line prints the line and exits with code 2; nothing has been written by then.
    """


class NonFiniteLossError(Exception):
    """The loss of a training step was not a number; the last checkpoint before it is kept."""


class Interrupted(Exception):  # noqa: N818 - it is a wish, not an error
    """Somebody asked a run to stop, by `signal`; it was saved where it stood."""

    def __init__(self, message: str, signal: int = signal.SIGTERM):
        super().__init__(message)
        self.signal = signal


class HeldError(Exception):
    """Another process works on the run; the command line exits with code 75: try again later."""


class PeerError(Exception):
    """Another process of the same run did not come, or is gone; exit code 75: try again."""


class OutageError(Exception):
    """The storage or the network does not answer; nothing is lost; exit code 75: try again."""


def first_line(error: Exception, most: int = 200) -> str:
    """What an error says, in one line of so many characters; libraries say it in many."""
    return (str(error).splitlines() or [type(error).__name__])[0][:most]


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint to append to an error about an unknown word: the closest known one, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(choices)}"
