"""The command line: puts the commands together and turns errors into one line and an exit code.

A user's mistake is one line on stderr and exit code 2. A run stopped by Ctrl-C or SIGTERM has saved
itself and exits with 128 + the signal's number; the same command goes on from there. A run that
another process works on is left to it, and one that has lost one of its processes ends: exit code
75, try again. Heavy imports happen inside the commands, so that --help is there at once.
"""

import logging
import signal
import sys
import threading
import traceback
import warnings
from importlib.metadata import version

import cyclopts
from cyclopts import Parameter

from scaling_jax import cpu, storage
from scaling_jax.commands import (
    convert,
    data,
    decisions,
    generate,
    laws,
    plan,
    predictable,
    reproduce,
    runs,
    testbeds,
)
from scaling_jax.errors import (
    TRY_AGAIN,
    HeldError,
    Interrupted,
    NonFiniteLossError,
    OutageError,
    PeerError,
    UserError,
)

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
app.command(plan.plan)
for command in (laws.fit, laws.predict, laws.coverage, decisions.optimum, decisions.compare):
    app.command(command)
app.command(decisions.suggest_next, name="next")
app.command(predictable.predictable)


def main() -> None:
    """Entry point of the `scaling-jax` script."""
    cpu.pass_over_absent_tpu()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Orbax logs what it raises, and leaves tasks behind that it has given up: one line is enough.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    sys.unraisablehook, threading.excepthook = _show_unraisable, _show_in_thread
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _stop)
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except (UserError, cyclopts.CycloptsError) as error:
        _exit(f"error: {_one_line(error)}", 2)
    except TimeoutError as error:
        _exit(f"error: {_one_line(error)}", TRY_AGAIN)
    except NonFiniteLossError as error:
        _exit(f"error: {error}", 1)
    except (HeldError, PeerError, OutageError) as error:
        _exit(f"error: {error}", TRY_AGAIN)
    except Interrupted as error:
        _exit(f"{error}; the same command goes on from there", 128 + error.signal)
    except KeyboardInterrupt as error:
        number = error.args[0] if error.args else signal.SIGINT
        _exit("stopped; the same command goes on from what is finished", 128 + number)
    except Exception as error:
        code = storage.fault(error)
        if code is not None:
            where = getattr(error, "filename", None) or "the storage"
            passing = code in storage.PASSING
            _exit(f"error: {where}: {storage.in_words(code)}", TRY_AGAIN if passing else 2)
        if not _several_processes():
            raise
        _exit(traceback.format_exc().rstrip(), 1)


def _stop(number: int, _: object) -> None:
    """Ends a command as Ctrl-C does, so that it cleans up: it gives its claims back."""
    raise KeyboardInterrupt(number)


def _show_unraisable(found: "sys.UnraisableHookArgs") -> None:
    if not _is_aftermath(found.exc_value):
        sys.__unraisablehook__(found)


def _show_in_thread(found: threading.ExceptHookArgs) -> None:
    if not _is_aftermath(found.exc_value):
        threading.__excepthook__(found)


def _is_aftermath(error: BaseException | None) -> bool:
    """Whether a library's thread or exit meets what has ended the command already."""
    if error is None:
        return False
    closed = ("Event loop is closed", "handle is closed")
    return str(error) in closed or storage.fault(error) is not None


def _show_warning(message: Warning | str, *_: object) -> None:
    if "was never awaited" in str(message):  # by a library that an error has stopped half-way
        return
    print(f"warning: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _exit(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    if _several_processes():  # as usual would be to wait for the others
        from scaling_jax.training import distributed

        distributed.leave(code)
    sys.exit(code)


def _several_processes() -> bool:
    """Whether this is one of several processes of a run."""
    distributed = sys.modules.get("scaling_jax.training.distributed")
    return distributed is not None and distributed.several()


if __name__ == "__main__":
    main()
