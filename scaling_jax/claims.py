"""Claims: one process at a time works on a run, on whatever machine it is.

A run's folder holds claims/000001.json, 000002.json, ...: the newest one counts. Each number is
created once, by one process, exclusively: whoever creates the next one has the run, and nobody
else can. So taking over is as atomic as taking, and numbers that are never removed tell a process
that was frozen meanwhile that the run is no longer its own. A claim ends when its process releases
it; when that process is dead, which only its own host can see; or when it is stale: nobody has
seen a heartbeat for `Timing.stale` seconds. An observer counts those seconds itself while it
watches, so that no clock has to agree with another one.

All that is asked of the file system is that creating a file exclusively is atomic, and that other
hosts see a change in less than `Timing.stale`. Local disks, NFS and Lustre promise both, and
gcsfuse decides at the close, by the object's generation; there switch the metadata cache off.
"""

import contextlib
import dataclasses
import datetime
import errno
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

from scaling_jax import atomic
from scaling_jax.errors import HeldError, UserError

CLAIMS_FOLDER = "claims"
_FILE = re.compile(r"(\d{6,})\.json")


@dataclasses.dataclass(frozen=True)
class Timing:
    """In seconds: between heartbeats, between looks at others' claims, until one is stale."""

    beat: float = 10.0
    look: float = 5.0
    stale: float = 180.0


TIMING = Timing()
# A mounted bucket is asked so often whether the run is still ours, not at every step.
SECONDS_BETWEEN_CHECKS = 1.0


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that made a claim; `place` is where its `pid` means anything.

    `process_started` tells it from a later process of the same pid, `beat` counts heartbeats.
    """

    host: str
    pid: int
    place: str
    process_started: str
    since: str
    token: str
    beat: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> Self:
        """This process, with a token that no other claim has."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            place=_place(),
            process_started=_process_started(os.getpid()) or "",
            since=f"{now:%Y-%m-%d %H:%M:%S} UTC",
            token=secrets.token_hex(16),
        )


UNKNOWN = Holder("a host that is not known yet", 0, "", "", "a moment ago", "")


def holder(folder: Path) -> Holder | None:
    """Who has the run in `folder`; None if nobody has, as far as one look can say."""
    claim = _newest(folder)
    return claim.holder if claim and not claim.ended else None


class Claim:
    """A run that this process has; a thread keeps the heartbeat until it is released."""

    def __init__(
        self, folder: Path, number: int, holder: Holder, timing: Timing, made: Sequence[Path]
    ):
        self._folder, self._number, self._holder, self._timing = folder, number, holder, timing
        self._made = made
        self._looked = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Call before writing to the run.

        Raises:
          HeldError: the run was taken over while this process stood still.
        """
        now = time.monotonic()
        if now - self._looked < SECONDS_BETWEEN_CHECKS:
            return
        self._looked = now
        if self._lost():
            raise HeldError(
                f"{self._folder}: this process stood still and lost the run to "
                f"{holder(self._folder) or 'another one, which has ended'}"
            )

    def release(self) -> None:
        """Lets others have the run. What was lost already is left alone.

        If nothing was written beside the first claim, as where the config is faulty, it is removed
        and so are the folders that were made for it.
        """
        self._done.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # the process ends anyway, or the claim becomes stale
            if self._lost():
                return
            own = _path(self._folder, self._number)
            if [*self._folder.iterdir()] == [own.parent] and [*own.parent.iterdir()] == [own]:
                own.unlink()
                for folder in self._made:
                    folder.rmdir()
            else:
                self._write(dataclasses.replace(self._holder, released=True))

    def _keep_beating(self) -> None:
        while not self._done.wait(self._timing.beat):
            with contextlib.suppress(OSError):  # a full disk: the next beat tries again
                if self._lost():
                    return
                self._holder = dataclasses.replace(self._holder, beat=self._holder.beat + 1)
                self._write(self._holder)

    def _lost(self) -> bool:
        """Whether another process has made the next claim, or the folder was removed."""
        if _path(self._folder, self._number + 1).exists():
            return True
        own = _read(_path(self._folder, self._number))
        return own is None or own.token != self._holder.token

    def _write(self, holder: Holder) -> None:
        atomic.write_text(_path(self._folder, self._number), _text(holder))


class Watcher:
    """Takes runs that nobody has. It judges what is stale by what it has seen itself."""

    def __init__(self, timing: Timing = TIMING):
        self.timing = timing
        self._sights: dict[Path, _Sight] = {}

    def take(self, folder: Path) -> Claim | None:
        """Claims the run in `folder`; None if another process has it or was faster."""
        newest = _newest(folder)
        if newest and not newest.ended and not self._stale(folder, newest):
            return None
        self._sights.pop(folder, None)
        number, me = (newest.number if newest else 0) + 1, Holder.here()
        parts = (folder / CLAIMS_FOLDER, folder, *folder.parents)
        made = [part for part in parts if not part.exists()]
        if not _create(_path(folder, number), me):
            return None
        return Claim(folder, number, me, self.timing, made)

    def alive(self, folder: Path) -> bool:
        """Whether the claim that is there now was seen to beat."""
        return folder in self._sights and self._sights[folder].alive

    def _stale(self, folder: Path, newest: "_Numbered") -> bool:
        now, sight = time.monotonic(), self._sights.get(folder)
        if sight is None or sight.claim.holder.token != newest.holder.token:
            self._sights[folder] = _Sight(newest, now)
        elif sight.claim != newest:
            self._sights[folder] = _Sight(newest, now, alive=True)
        else:
            # Between two looks this machine may have slept, or trained another run: no matter how
            # long that took, nobody was watching.
            sight.quiet += min(now - sight.looked, 2 * self.timing.look)
            sight.looked = now
            return sight.quiet >= self.timing.stale
        return False


@contextlib.contextmanager
def held(
    folder: Path,
    waiting: Callable[[Holder], None] = lambda _: None,
    patient: bool = False,
    timing: Timing = TIMING,
) -> Iterator[Claim]:
    """Has the run in `folder` while the block is open; takes over what is stale.

    Args:
      folder: of the run; made if it is not there.
      waiting: hears who has the run, if it has to be seen whether that process lives.
      patient: wait until a living process releases it.
      timing: of the looks and the heartbeat.

    Raises:
      HeldError: another process has the run and was seen to be alive, and we are not patient.
      UserError: `folder` cannot be a folder.
    """
    watcher = Watcher(timing)
    told = False
    while (claim := watcher.take(folder)) is None:
        found = holder(folder)
        if found and watcher.alive(folder) and not patient:
            raise HeldError(f"{folder}: is worked on by {found}")
        if found and not told:
            waiting(found)
            told = True
        time.sleep(watcher.timing.look)
    try:
        yield claim
    finally:
        claim.release()


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A claim as it was found."""

    number: int
    holder: Holder

    @property
    def ended(self) -> bool:
        """Whether it was released, or its process is known to be dead."""
        return self.holder.released or _dead(self.holder)


@dataclasses.dataclass
class _Sight:
    """What a watcher has seen of a claim, and for how long it has not changed."""

    claim: _Numbered
    looked: float
    alive: bool = False
    quiet: float = 0.0


def _path(folder: Path, number: int) -> Path:
    return folder / CLAIMS_FOLDER / f"{number:06d}.json"


def _newest(folder: Path) -> _Numbered | None:
    try:
        names = [path.name for path in (folder / CLAIMS_FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return None
    numbers = [int(match[1]) for match in map(_FILE.fullmatch, names) if match]
    if not numbers:
        return None
    # Just created, it may be empty still: then somebody has it, and it is not known who.
    return _Numbered(max(numbers), _read(_path(folder, max(numbers))) or UNKNOWN)


def _create(path: Path, holder: Holder) -> bool:
    """Writes a claim unless somebody else has made it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path.parents[1]}: not a folder; give another one") from None
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(_text(holder))
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                path.unlink(missing_ok=True)  # nobody holds it
                raise
    except (FileExistsError, FileNotFoundError):  # or somebody is removing the folder just now
        return False
    except OSError as error:
        if error.errno == errno.ESTALE:  # gcsfuse: another host has closed its file first
            return False
        raise
    written = _read(path)
    return written is not None and written.token == holder.token


def _text(holder: Holder) -> str:
    return json.dumps(dataclasses.asdict(holder), indent=1) + "\n"


def _read(path: Path) -> Holder | None:
    """The claim in a file; None where none is or it makes no sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = Holder(**content)
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None
    kinds = {field.name: field.type for field in dataclasses.fields(Holder)}
    return found if all(type(value) is kinds[key] for key, value in content.items()) else None


def _dead(holder: Holder) -> bool:
    """Whether the process is known to have ended; of other hosts nothing is known."""
    if not holder.place or holder.place != _place():
        return False
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    started = _process_started(holder.pid)
    return bool(holder.process_started) and started != holder.process_started


def _place() -> str:
    """Names this boot of this machine and, in a container, its own numbering of processes."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()  # not Linux: there are no containers with processes of ours


def _process_started(pid: int) -> str | None:
    """When a process was started, in clock ticks since the boot; None if it has ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name of the program stands in brackets, and may hold anything.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]
