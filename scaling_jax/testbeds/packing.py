"""Which runs of a testbed are trained side by side in one program, and in how many slots.

Runs of one shape (`packed_step.Shape`) make a group. Within it the longest run comes first, so that
no slot is left alone with a long one at the end. A branch is in a later group than its trunk: the
runs of a testbed that have as long a chain of trunks are of similar length, and fill slots well.

Of several joined processes each packs, on the devices of its own host, the runs that it can claim:
nothing is said between hosts, and a host that is done takes what is left.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from scaling_jax import claims
from scaling_jax import mesh as meshes
from scaling_jax.claims import Holder, Timing, Watcher
from scaling_jax.errors import NonFiniteLossError, UserError
from scaling_jax.testbeds import failures, runner
from scaling_jax.testbeds.grid import PlannedRun
from scaling_jax.testbeds.runner import RunStatus
from scaling_jax.training import checkpoint, distributed, packed, packed_step, step
from scaling_jax.training.files import CHECKPOINT_FOLDER
from scaling_jax.training.journal import Progress
from scaling_jax.training.packed import Failure, Job
from scaling_jax.training.packed_step import RUN, Shape

Jobs = dict[Path, tuple[Job, PlannedRun]]

# More slots that are as busy are better: less is said between devices. Fewer than so busy ones are
# worse than all devices on one run.
AS_BUSY = 0.01
BUSY_ENOUGH = 0.75


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that share a program, longest first.

    Each of `hosts` hosts has `slots` slots. `occupancy` is the part of the devices' time that is
    training, if all steps take the same time.
    """

    runs: tuple[PlannedRun, ...]
    hosts: int
    slots: int
    slot_devices: int
    occupancy: float

    def __str__(self) -> str:
        model, names = self.runs[0].config.model.label, ", ".join(run.name for run in self.runs)
        devices = "device" if self.slot_devices == 1 else "devices"
        slots = f"{self.slots} slot" if self.slots == 1 else f"{self.slots} slots"
        where = f", on each of {self.hosts} hosts" if self.hosts > 1 else ""
        return (
            f"packed: {len(self.runs)} runs of {model} in {slots} of {self.slot_devices} {devices}"
            f"{where}, {self.occupancy:.0%} of the time busy: {names}"
        )


@dataclasses.dataclass(frozen=True)
class Alone:
    """A run that is trained by itself, and why."""

    run: PlannedRun
    why: str

    def __str__(self) -> str:
        return f"alone: {self.run.name}: {self.why}"


@dataclasses.dataclass(frozen=True)
class Packing:
    """The groups of a testbed, in the order in which they are trained, and the runs in none."""

    groups: tuple[Group, ...]
    alone: tuple[Alone, ...]


def plan(statuses: Sequence[RunStatus], slots: int | None = None) -> Packing:
    """Groups what is left to train of a testbed, be it held: its process may have ended.

    Args:
      statuses: how far its runs are, trunks before their branches.
      slots: how many runs are trained at a time on a host; by default as many as keep its devices
        busy.

    Raises:
      UserError: a mesh does not fit the devices, or `slots` is impossible.
    """
    if slots is not None and slots < _fewest_slots():
        raise UserError(f"slots={slots}: {_fewest_slots()} or more, of runs trained side by side")
    left = {status.run.name: status for status in statuses if _steps_left(status)}
    names = set(left)
    groups: list[Group] = []
    alone: list[Alone] = []
    packed_names: set[str] = set()
    while left:
        # Trunks that are not to be trained any more, or in an earlier group.
        ready = [status for status in left.values() if _trunk(status) not in left]
        left = {name: status for name, status in left.items() if status not in ready}
        shapes: dict[Shape, list[RunStatus]] = collections.defaultdict(list)
        for status in ready:
            trunk = _trunk(status)
            if trunk in names and trunk not in packed_names:
                alone.append(Alone(status.run, f"its trunk {trunk} is trained alone"))
            else:
                shapes[Shape.of(status.run.config)].append(status)
        for shape, members in shapes.items():
            group = _group(shape, members, slots)
            if isinstance(group, Group):
                groups.append(group)
                packed_names |= {run.name for run in group.runs}
            else:
                alone += [Alone(status.run, group) for status in members]
    return Packing(tuple(groups), tuple(alone))


def train(
    packing: Packing,
    out: Path,
    report: Callable[[PlannedRun, Progress], None] = lambda *_: None,
    trained: Callable[[PlannedRun], None] = lambda _: None,
    waiting: Callable[[PlannedRun, Holder], None] = lambda *_: None,
    timing: Timing = claims.TIMING,
) -> None:
    """Trains the groups one after another; a run whose loss is no number is noted as given up.

    Runs that other processes are seen to work on, and branches whose trunks those train, are passed
    over; those of processes that have ended are taken over.

    Args:
      packing: what is trained together.
      out: the testbed's folder.
      report: hears of every step.
      trained: hears of each run that is at its last step.
      waiting: hears who has a run, while it has to be seen whether that process lives.
      timing: of claims.

    Raises:
      UserError, Interrupted: as `training.packed.train`.
    """
    watcher = Watcher(timing)
    for group in packing.groups:
        found = ((_job(run, out), run) for run in group.runs)
        jobs = {job.folder: (job, run) for job, run in found if job}

        def tell(job: Job, progress: Progress, jobs: Jobs = jobs) -> None:
            report(jobs[job.folder][1], progress)

        def ended(job: Job, failure: Failure | None, jobs: Jobs = jobs) -> None:
            run = jobs[job.folder][1]
            if isinstance(failure, NonFiniteLossError):
                failures.note(job.folder, str(failure))
            elif failure is None:
                trained(run)

        def held(job: Job, holder: Holder, jobs: Jobs = jobs) -> None:
            waiting(jobs[job.folder][1], holder)

        if jobs:
            each = [job for job, _ in jobs.values()]
            packed.train(each, group.slots, watcher, tell, ended, held)


def occupancy(steps: Sequence[int], slots: int, groups: int) -> float:
    """The part of the devices' time that is training.

    Args:
      steps: of each run, in the order in which they get a slot.
      slots: how many runs are trained at a time.
      groups: of devices, to which the slots are dealt out; a group takes its slots in turns.
    """
    waiting, left, time = collections.deque(steps), dict[int, int](), 0
    while waiting or left:
        while waiting and len(left) < slots:
            left[packed_step.next_slot(left, slots, groups)] = waiting.popleft()
        stretch = min(left.values())
        time += stretch * max(packed_step.group_loads(left, slots, groups).values())
        left = {slot: count - stretch for slot, count in left.items() if count > stretch}
    return sum(steps) / (groups * time)


def _group(shape: Shape, members: Sequence[RunStatus], slots: int | None) -> Group | str:
    """The group of runs of one shape, or why each of them is trained alone."""
    if len(members) == 1:
        return "no other run that is left has its shape"
    longest_first = sorted(members, key=_steps_left, reverse=True)
    steps = [_steps_left(status) for status in longest_first]
    hosts = distributed.processes()
    try:
        whole = meshes.make_mesh(shape.mesh, jax.local_devices())
    except UserError as error:
        if hosts == 1:
            raise
        return f"on the devices of one host, {error}"
    found = {}
    for count in [slots] if slots else _candidates(shape, whole, math.ceil(len(steps) / hosts)):
        mesh = packed_step.make_mesh(whole, count)
        try:
            step.check_batch(mesh, shape.batch_size, shape.microbatches)
        except UserError as error:
            raise UserError(f"slots={count}: in each, {error}") from None
        slot_devices = mesh.size // mesh.shape[RUN]
        # Runs go to whichever host has an empty slot, as if all devices were one host's.
        busy = occupancy(steps, hosts * count, hosts * mesh.shape[RUN])
        runs = tuple(status.run for status in longest_first)
        found[count] = Group(runs, hosts, count, slot_devices, busy)
    if not found:
        return f"{whole.size} device{'s' * (whole.size > 1)} cannot be dealt out to runs evenly"
    best = max(group.occupancy for group in found.values())
    if best < BUSY_ENOUGH and not slots and _splits(shape, whole, 1):
        return f"slots would be busy {best:.0%} of the time at most"
    return found[max(n for n, group in found.items() if group.occupancy >= best - AS_BUSY)]


def _candidates(shape: Shape, whole: Mesh, most: int) -> Iterator[int]:
    """Numbers of slots that split the devices evenly, and a batch over those of a slot."""
    for count in range(_fewest_slots(), most + 1):
        if packed_step.group_count(whole, count) == count and _splits(shape, whole, count):
            yield count


def _fewest_slots() -> int:
    """On a host; where there are several, each may train one run at a time."""
    return 1 if distributed.processes() > 1 else 2


def _splits(shape: Shape, whole: Mesh, slots: int) -> bool:
    parts = meshes.batch_parts(packed_step.make_mesh(whole, slots))
    return shape.batch_size % (parts * shape.microbatches) == 0


def _job(run: PlannedRun, out: Path) -> Job | None:
    """What is to be trained; None for a branch whose trunk is not there yet."""
    folder = run.folder(out)
    branches = run.trunk is not None and runner.trunk_is_there(run, out)
    unstarted = checkpoint.latest_step(folder / CHECKPOINT_FOLDER) is None
    if run.trunk is not None and unstarted and not branches:
        return None
    return Job(runner.config_of(run, out, branches), folder)


def _steps_left(status: RunStatus) -> int:
    if status.evaluated or status.given_up:
        return 0
    return status.run.budget.steps - max(status.step, status.branched_at)


def _trunk(status: RunStatus) -> str | None:
    """The run that has to be trained before this one, if it is not yet under way."""
    return status.run.trunk.name if status.run.trunk and not status.step else None
