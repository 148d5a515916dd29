"""The command line: puts the commands together and turns errors into one line and an exit code.

A user's mistake is one line on stderr and exit code 2. A run stopped by Ctrl-C or SIGTERM has saved
itself and exits with 128 + the signal's number; the same command goes on from there. Heavy imports
happen inside the commands, so that --help is there at once.
"""

import logging
import sys
import warnings
from importlib.metadata import version

import cyclopts
from cyclopts import Parameter

from scaling_jax.commands import convert, data, decisions, generate, laws, reproduce, runs, testbeds
from scaling_jax.errors import Interrupted, NonFiniteLossError, UserError

app = cyclopts.App(
    name="scaling-jax",
    help="Train small runs, fit scaling laws, predict big over-trained language models.",
    version=lambda: version("scaling_jax"),
    default_parameter=Parameter(negative=(), name_transform=lambda name: name),
    suppress_keyboard_interrupt=False,
)
for group in (data.app, testbeds.app, convert.app, reproduce.app):
    app.command(group)
for command in (testbeds.quickstart, runs.train, runs.evaluate, generate.generate):
    app.command(command)
for command in (laws.fit, laws.predict, laws.coverage, decisions.optimum, decisions.compare):
    app.command(command)
app.command(decisions.suggest_next, name="next")


def main() -> None:
    """Entry point of the `scaling-jax` script."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.showwarning = _show_warning
    try:
        app(exit_on_error=False, print_error=False)
    except (UserError, cyclopts.CycloptsError) as error:
        _exit(f"error: {_one_line(error)}", 2)
    except NonFiniteLossError as error:
        _exit(f"error: {error}", 1)
    except Interrupted as error:
        _exit(f"{error}; the same command goes on from there", 128 + error.signal)
    except KeyboardInterrupt:
        _exit("stopped; the same command goes on from what is finished", 130)


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
