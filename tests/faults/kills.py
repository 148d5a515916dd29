"""Kills the job of `job` again and again, anywhere, and holds what comes out to an undisturbed one.

    python tests/faults/kills.py --kills 5000 --seed 3

prints kills, resumes and losses: results that differ, or commands that did not go on. There must be
none. Half of the kills come when a file is about to be made, renamed or removed, half some time
after that.
"""

import argparse
import collections
import dataclasses
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import job
import numpy as np
from job import FIT, PREPARE, TESTBED_RUN, Kill, Outcome

LONGEST_AFTER_SECONDS = 0.6
# Compiled programs are kept: most of a child's time would go there.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A command, how often it is killed in a round, and what is taken away before it."""

    arguments: Sequence[str]
    kills: int
    take_away: Callable[[Path], None] = lambda _: None


def _forget_evaluations(folder: Path) -> None:
    for kept in folder.glob("out/runs/*/evaluations"):
        shutil.rmtree(kept)


STAGES = {
    "prepare": Stage(PREPARE, 4),
    "train and evaluate": Stage(TESTBED_RUN, 9),
    "evaluate": Stage(TESTBED_RUN, 3, _forget_evaluations),
    "records, fits, report": Stage(TESTBED_RUN, 3),
    "fit": Stage(FIT, 1),
}


@dataclasses.dataclass
class Count:
    """What happened; a loss is told in words."""

    kills: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    resumes: int = 0
    losses: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        phases = ", ".join(f"{phase} {number}" for phase, number in self.kills.most_common())
        return (
            f"{self.kills.total()} kills ({phases}), {self.resumes} resumes, "
            f"{len(self.losses)} losses"
        )


def results(folder: Path, runs: bool = True) -> dict[str, str]:
    """What the job has made, by name: a digest of each shard, score, table and (of runs) curve."""
    kept = [
        *folder.glob("data/*/*/tokens-*"),
        *folder.glob("data/*/*/index.json"),
        *folder.glob("out/runs/*/evaluations/**/*.json"),
        *(folder / name for name in ("out/records.csv", "out/fits.json", "fit.json")),
    ]
    there = (path for path in kept if path.is_file())
    found = {str(path.relative_to(folder)): _digest(path.read_bytes()) for path in there}
    return found | (job.in_child(lambda: _trained(folder)) if runs else {})


def _trained(folder: Path) -> dict[str, str]:
    """Digests of the curve and of every array of the last checkpoint of each run."""
    import orbax.checkpoint as ocp

    from scaling_jax.training import checkpoint

    found = {}
    for run in sorted(folder.glob("out/runs/*")):
        saved = run / "checkpoints"
        name, step = str(run.relative_to(folder)), checkpoint.latest_step(saved)
        curve = checkpoint.read_curve(saved)
        state = ocp.StandardCheckpointer().restore((saved / str(step) / "state").resolve())
        for part, arrays in (("curve", curve), ("params", state["params"])):
            found[f"{name} {part} of step {step}"] = _digest(_bytes(arrays))
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        same = [line["loss"] for line in lines] == curve["loss"].tolist()
        found[f"{name} metrics"] = "as the curve" if same else "not as the curve"
    return found


def _bytes(arrays: object) -> bytes:
    import jax

    leaves = jax.tree.leaves_with_path(arrays)
    return b"".join(str(path).encode() + np.asarray(leaf).tobytes() for path, leaf in leaves)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def undisturbed(folder: Path) -> tuple[dict[str, str], dict[str, Outcome]]:
    """The results of the job done at one go, and how each stage went."""
    job.write_inputs(folder)
    went = {}
    for name, stage in STAGES.items():
        stage.take_away(folder)
        done = job.run(stage.arguments, folder)
        if done.code:
            raise SystemExit(f"{name} failed undisturbed: {done.output}")
        went[name] = done
    return results(folder), went


def one_round(
    folder: Path,
    expected: dict[str, str],
    went: dict[str, Outcome],
    draw: random.Random,
    count: Count,
    most: int = sys.maxsize,
) -> None:
    """Does the job once, killing each stage some times (`most` kills in all), and compares."""
    _kill_and_resume(folder, went, draw, count, most)
    found = results(folder)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            count.losses.append(f"{name} is {found.get(name)}, not {expected.get(name)}")
    shutil.rmtree(folder)


def _kill_and_resume(
    folder: Path, went: dict[str, Outcome], draw: random.Random, count: Count, most: int
) -> None:
    job.write_inputs(folder)
    for name, stage in STAGES.items():
        stage.take_away(folder)
        killed = False
        for _ in range(stage.kills):
            if count.kills.total() >= most:
                break
            # Each attempt gets some of the way, so that kills fall on all of it.
            event = draw.randint(1, max(went[name].events * 2 // (stage.kills + 1), 1))
            longest = min(went[name].seconds / 2, LONGEST_AFTER_SECONDS)
            after = draw.choice((0.0, draw.uniform(0.001, longest)))
            done = job.run(stage.arguments, folder, Kill(event, after))
            count.resumes += killed
            killed = done.code == -9
            if killed:
                count.kills[done.phase] += 1
            elif done.code:
                count.losses.append(f"{name} ended with {done.code}: {done.output[-2000:]}")
            else:
                break
        done = job.run(stage.arguments, folder)
        count.resumes += killed
        if done.code:
            count.losses.append(f"{name} did not go on: {done.code}: {done.output[-2000:]}")
            return


def main() -> int:
    """Prints what happened; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to work in; by default a temporary one")
    options = parser.parse_args()
    work = options.folder or Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    job.warm_up()
    start = time.monotonic()
    expected, went = undisturbed(work / "undisturbed")
    events = ", ".join(f"{name} {done.events}" for name, done in went.items())
    print(f"undisturbed: {time.monotonic() - start:.0f} s; file events: {events}", flush=True)
    draw, count, start = random.Random(options.seed), Count(), time.monotonic()
    while count.kills.total() < options.kills and len(count.losses) < 10:
        one_round(work / "killed", expected, went, draw, count, options.kills)
        seconds = time.monotonic() - start
        print(f"seed {options.seed}, {seconds:.0f} s: {count}", flush=True)
    for loss in count.losses:
        print(f"LOST: {loss}")
    if options.folder is None:
        shutil.rmtree(work)
    return bool(count.losses)


if __name__ == "__main__":
    sys.exit(main())
