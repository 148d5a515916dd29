"""Hours of small runs: killed at random, and one after the other in a process that goes on.

    python benchmarks/soak.py --minutes 60 --seed 0

Half of the time the job of tests/faults is killed and goes on, again and again; half of the time
one process trains and evaluates tiny runs in sequence. Prints kills, resumes and losses, and what
the long-lived process holds: resident memory, open files and threads, and how much they grow with
its runs. The first quarter of them, in which caches fill, does not count.
"""

import argparse
import dataclasses
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np

FAULTS = Path(__file__).parents[1] / "tests" / "faults"
MEGABYTE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Held:
    """What a process holds after some runs."""

    seconds: float
    runs: int
    resident_mb: float
    open_files: int
    threads: int


def killing(minutes: float, seed: int, work: Path) -> bool:
    """Kills the job for some minutes; whether nothing was lost."""
    sys.path.insert(0, str(FAULTS))
    import kills  # pyright: ignore[reportMissingImports]

    os.environ |= kills.ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    kills.job.warm_up()
    end = time.monotonic() + 60 * minutes
    expected, went = kills.undisturbed(work / "undisturbed")
    draw, count = random.Random(seed), kills.Count()
    while time.monotonic() < end and not count.losses:
        kills.one_round(work / "killed", expected, went, draw, count)
        print(f"killing: {count}; {_held(0.0, 0)}", flush=True)
    for loss in count.losses:
        print(f"LOST: {loss}")
    return not count.losses


def training(minutes: float, work: Path) -> None:
    """Trains and evaluates tiny runs in this process for some minutes; says what it holds."""
    import yaml

    from scaling_jax import config as configs
    from scaling_jax.config import TestbedConfig
    from scaling_jax.testbeds import grid, runner

    os.chdir(work / "undisturbed")
    content = yaml.safe_load(Path("testbed.yaml").read_text(encoding="utf-8"))
    content["run"]["evaluation"].pop("tasks")
    runs = grid.expand(configs.build(TestbedConfig, content, source="testbed.yaml"))
    warnings.simplefilter("ignore")
    start, held, done = time.monotonic(), [], 0
    while (seconds := time.monotonic() - start) < 60 * minutes:
        out = work / "trained"
        done += sum(1 for _ in runner.run_all(runs, out))
        runner.write_table(runs, out)
        shutil.rmtree(out)
        held.append(_held(seconds, done))
        print(f"training: {held[-1]}", flush=True)
    _say_growth(held)


def _held(seconds: float, runs: int) -> Held:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return Held(
        seconds=round(seconds, 1),
        runs=runs,
        resident_mb=round(pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE, 1),
        open_files=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - of a process that changes
        threads=len(os.listdir("/proc/self/task")),  # noqa: PTH208
    )


def _say_growth(held: list[Held]) -> None:
    """The slopes of least squares, once caches are full."""
    rest = held[len(held) // 4 :]
    if len(rest) < 3:
        print("too short to say what grows")
        return
    runs = np.array([each.runs for each in rest], float)
    for name in ("resident_mb", "open_files", "threads"):
        values = np.array([getattr(each, name) for each in rest], float)
        slope = np.polyfit(runs, values, 1)[0]
        print(f"{name}: {values[0]:g} to {values[-1]:g}, {100 * slope:+.3f} per 100 runs")


def main() -> int:
    """Prints what happened; 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        work = Path(folder)
        whole = killing(options.minutes / 2, options.seed, work)
        # Last: from here on JAX has started, and no child can be forked that uses it.
        training(options.minutes / 2, work)
        os.chdir("/")
    return not whole


if __name__ == "__main__":
    sys.exit(main())
