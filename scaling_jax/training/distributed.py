"""Several processes, one run: how they meet, and how all of them end when one does.

JAX brings them together, on Cloud TPU, GKE and SLURM by what it finds there, elsewhere by what it
is told. From then on every process runs the same program on the same global arrays; only the first
writes and prints. For a while they may work `apart`, each as if it were alone.

When one process dies the others would wait for it in a collective, on some hardware for ever.
Three things end them, all with one line and exit code 75, upon which a launcher starts all anew:
  1. Each keeps a connection to the first process, which the system closes when either dies. One
     that ends on a mistake says so first, and all end with its exit code: none is started anew.
  2. A process that stands still, or whose host is gone, sends no heartbeat to JAX's service.
  3. A collective fails with an error.
"""

import contextlib
import ctypes
import itertools
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the service's address and barriers
from jax._src import xla_bridge

from scaling_jax.errors import TRY_AGAIN, PeerError, UserError, first_line

HEARTBEAT_SECONDS = 10
JOIN_SECONDS = 120
SHUTDOWN_SECONDS = 60
# How long a process that ends on an error waits for the others to come to the same end.
LEAVE_SECONDS = 5
# What is waited for in this way comes, or its process is missed.
LONGEST_WAIT_MS = 7 * 24 * 3600 * 1000

_ADDRESS = re.compile(r"[^\s:]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
_GOODBYE = b"goodbye\n"
_kept: list[Any] = []  # what C calls must not be collected
_lifelines: list["_Lifeline"] = []
# While this process works apart: the key under which any of them asks all to stop.
_stop_keys: list[str] = []
# All processes count alike: each number is one message or one meeting of all.
_numbers = itertools.count()


@contextlib.contextmanager
def joined(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    patience: int = JOIN_SECONDS,
) -> Iterator[None]:
    """Within the block this process is one of several, or alone where nothing says otherwise.

    Call it before anything asks JAX for devices. After an exception the processes stay joined:
    `leave` ends this one.

    Args:
      coordinator: HOST:PORT where process 0 listens; None: as JAX finds it in the environment.
      processes: how many there are; 1: alone, whatever the environment says.
      process_id: which this is, from 0.
      patience: seconds to wait for all to come.

    Raises:
      UserError: the three do not fit together.
      PeerError: another process did not come, or is gone.
    """
    _check(coordinator, processes, process_id, patience)
    if processes == 1 or not _initialize(coordinator, processes, process_id, patience):
        yield
        return
    _lifelines.append(_Lifeline())
    try:
        with contextlib.nullcontext() if is_first() else _silence():
            yield
    except jax.errors.JaxRuntimeError as error:
        if not _of_peers(error):
            raise
        raise PeerError(f"lost another process of this run ({first_line(error)})") from error
    _let_go()
    jax.distributed.shutdown()


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return not several() or jax.process_index() == 0


def several() -> bool:
    """Whether this process is one of several that are joined, and do not work apart now."""
    return processes() > 1 and not is_apart()


def processes() -> int:
    """How many processes are joined, even if they work apart now; 1 where none are."""
    return jax_distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Within the block one of several processes is alone to all that asks, Orbax among them."""
    _stop_keys.append(f"scaling_jax/stop/{next(_numbers)}")
    asked = jax.process_count, jax.process_index
    # Orbax would wait for the other processes, and leave the writing to the first one.
    jax.process_count, jax.process_index = (lambda: 1), (lambda: 0)
    try:
        yield
    finally:
        jax.process_count, jax.process_index = asked
        _stop_keys.pop()


def is_apart() -> bool:
    """Whether this process works apart from others that it is joined with."""
    return bool(_stop_keys)


def stop_all() -> None:
    """Asks all processes that work apart to stop and save."""
    for key in _stop_keys:
        mark(key)


def is_to_stop() -> bool:
    """Whether one of the processes that work apart has asked all to stop."""
    return any(marks(key) for key in _stop_keys)


def mark(key: str) -> None:
    """Leaves the mark of this process at `key`; doing so again changes nothing."""
    mine = f"{key}/{jax_distributed.global_state.process_id}"
    service().key_value_set(mine, "here", allow_overwrite=True)


def marks(key: str) -> int:
    """How many processes have left their mark at `key`."""
    return len(service().key_value_dir_get(key))


def from_first(values: tuple[int, ...]) -> tuple[int, ...]:
    """The numbers that the first process gives, in every process; they are waited for."""
    if not several():
        return values
    return tuple(json.loads(_from_first(json.dumps(values))))


def check_same(what: str, text: str) -> None:
    """Raises a UserError in each process in which `text` is not what it is in the first."""
    if several() and _from_first(text) != text:
        raise UserError(
            f"process {jax.process_index()}: its {what} is not that of process 0: start all "
            "processes with the same command, on the same files"
        )


def together(program: jax.stages.Wrapped) -> Callable[..., Any]:
    """`program`, which no process starts before all have compiled it for arrays of these shapes.

    Some collectives give up after 30 s; on a machine with much to do compilers are further apart.
    """
    ready: set[tuple[Any, ...]] = set()

    def run(*arguments: Any) -> Any:
        if several():
            shapes = tuple(jax.numpy.shape(leaf) for leaf in jax.tree.leaves(arguments))
            if shapes not in ready:
                program.lower(*arguments).compile()  # which the call below finds done
                service().wait_at_barrier(f"compiled {next(_numbers)}", LONGEST_WAIT_MS)
                ready.add(shapes)
        return program(*arguments)

    return run


def leave(code: int) -> None:
    """Ends this process, one of several, at once and with exit code `code`.

    Those that come to the same end within LEAVE_SECONDS end together; the others learn that this
    one is gone, and end with its code where starting again would not help. Leaving as usual would
    wait for them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code != TRY_AGAIN:
        try:
            service().wait_at_barrier("leaving", LEAVE_SECONDS * 1000)
            _let_go()
            if is_first():  # the service that the others talk to ends with this process
                time.sleep(0.5)
        except Exception:  # the others are busy
            for lifeline in _lifelines if code in (1, 2) else ():
                lifeline.give_up(code)
    os._exit(code)


def service() -> Any:
    """JAX's service, where processes meet without asking devices."""
    assert jax_distributed.global_state.client is not None  # only where several are joined
    return jax_distributed.global_state.client


def _from_first(text: str) -> str:
    """What the first process says, in every process."""
    key = f"scaling_jax/{next(_numbers)}"
    if is_first():
        service().key_value_set(key, text)
        return text
    return service().blocking_key_value_get(key, LONGEST_WAIT_MS)


def _check(
    coordinator: str | None, processes: int | None, process_id: int | None, patience: int
) -> None:
    if patience < 1:
        raise UserError(f"patience {patience}: give seconds, 1 or more")
    if processes == 1 and coordinator is None and not process_id:
        return
    given = (coordinator, processes, process_id)
    if all(value is None for value in given):
        return
    if coordinator is None or processes is None or process_id is None:
        raise UserError(
            "several processes: give coordinator (HOST:PORT of process 0), processes and "
            "process_id together, or none of them where JAX finds them out"
        )
    if not _ADDRESS.fullmatch(coordinator) or int(coordinator.rpartition(":")[2]) > 65535:
        raise UserError(f"coordinator '{coordinator}': give HOST:PORT of process 0")
    if processes < 1 or not 0 <= process_id < processes:
        raise UserError(
            f"process_id {process_id} of processes {processes}: ids go from 0 to processes - 1"
        )


def _initialize(
    coordinator: str | None, processes: int | None, process_id: int | None, patience: int
) -> bool:
    """Whether this process is one of several, which are all there by now."""
    if coordinator is None and xla_bridge.backends_are_initialized():
        return False  # too late to look for others, and nobody has asked for it
    if coordinator and process_id == 0:
        _check_free(int(coordinator.rpartition(":")[2]))
    missing = f"not all processes of this run came within {patience} s"
    # JAX's own waiting ends in abort(), with a page of text.
    alarm = threading.Timer(patience, _end_now, [missing])
    alarm.daemon = True
    alarm.start()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of environments that JAX cannot look into
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                cluster_detection_method="deactivate" if coordinator else None,
                initialization_timeout=2 * patience,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            )
    except ValueError:  # JAX has found no cluster
        return False
    except RuntimeError as error:
        raise PeerError(f"the processes of this run do not meet ({first_line(error)})") from error
    finally:
        alarm.cancel()
    if several():
        _explain_aborts()
    else:  # a cluster of one: JAX's preemption service, which catches SIGTERM, is not asked
        signal.signal(signal.SIGTERM, on_sigterm)
    return several()


def _check_free(port: int) -> None:
    """Raises a UserError if somebody listens on `port` of this machine; JAX would crash."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        with socket.create_server(("", port), family=family, dualstack_ipv6=both):
            pass
    except OSError as error:
        raise UserError(f"coordinator: port {port} of this machine: {error.strerror}") from None


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing that the program prints within the block is seen; errors are."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,  # noqa: PTH123 - a device
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _let_go() -> None:
    for lifeline in _lifelines:
        lifeline.let_go()


class _Lifeline:
    """A connection of each process with the first; whoever is cut off ends at once.

    Where a firewall does not let it through, JAX's heartbeat is what is left.
    """

    def __init__(self) -> None:
        self._over = threading.Event()
        self._sockets: dict[int, socket.socket] = {}
        # By which the first process knows the others from anybody else who connects.
        secret = secrets.randbits(62)
        if is_first():
            server = socket.create_server(("", 0), backlog=processes())
            from_first((server.getsockname()[1], secret))
            self._start(self._accept, server, secret)
        else:
            port, secret = from_first((0, 0))
            host = str(jax_distributed.global_state.coordinator_address).rpartition(":")[0]
            with contextlib.suppress(OSError):
                to_first = socket.create_connection((host.strip("[]"), port), timeout=30)
                to_first.settimeout(None)
                to_first.sendall(f"{jax.process_index()} {secret}\n".encode())
                self._sockets[0] = to_first
                self._start(self._watch, 0, to_first.makefile("rb"))

    def let_go(self) -> None:
        """Tells the others that this process ends as it should."""
        self._over.set()
        for one in self._sockets.values():
            with contextlib.suppress(OSError):
                one.sendall(_GOODBYE)

    def give_up(self, code: int) -> None:
        """Tells the others that this process ends with `code`, and that they should."""
        self._over.set()
        self._tell(f"{code} process {jax.process_index()} has ended with exit code {code}")

    def _tell(self, last: str) -> None:
        for one in self._sockets.values():
            with contextlib.suppress(OSError):
                one.sendall(last.encode() + b"\n")

    def _start(self, work: Any, *arguments: Any) -> None:
        threading.Thread(target=work, args=arguments, daemon=True, name="lifeline").start()

    def _accept(self, server: socket.socket, secret: int) -> None:
        with server:
            while len(self._sockets) < processes() - 1:
                one, _ = server.accept()
                one.settimeout(HEARTBEAT_SECONDS)
                lines = one.makefile("rb")
                with contextlib.suppress(OSError, ValueError):
                    number, known = map(int, lines.readline(100).split())
                    if known == secret and 0 < number < processes():
                        one.settimeout(None)
                        self._sockets[number] = one
                        self._start(self._watch, number, lines)
                        continue
                one.close()

    def _watch(self, number: int, lines: Any) -> None:
        """Waits for the end of a connection; what comes before it says how the other one ended."""
        last = f"{TRY_AGAIN} lost process {number} of this run"
        with contextlib.suppress(OSError):
            for line in lines:
                if line == _GOODBYE:
                    return
                last = line.decode(errors="replace").strip()
        if not self._over.is_set():
            self._over.set()
            self._tell(last)
            code, _, why = last.partition(" ")
            _end_now(why, int(code))


def _explain_aborts() -> None:
    """JAX ends a process by abort() when heartbeats fail; a last line then says what it means."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def ended(_: int) -> None:
        _end_now("JAX has ended this process: another one of this run stands still or is gone")

    _kept.append(ended)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ended)


def _end_now(line: str, code: int = TRY_AGAIN) -> None:
    """Ends the process from whatever thread; what it has written is flushed line by line."""
    hint = "; the same command goes on from the last checkpoint" if code == TRY_AGAIN else ""
    os.write(2, f"error: {line}{hint}\n".encode())
    os._exit(code)


def _of_peers(error: Exception) -> bool:
    """Whether JAX says that another process is gone."""
    return re.search(r"Gloo|gloo|coordination|UNAVAILABLE|DEADLINE|ABORTED", str(error)) is not None
