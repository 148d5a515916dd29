"""Damages a file of the finished job of `job`, gives the commands again, and looks what they say.

    python tests/faults/damages.py --cases 500 --seed 3

A file is changed by a bit, cut short, emptied, removed or replaced by another one of its kind. Each
command must end well, with the results of an undisturbed job, or with one line that names what is
damaged; prints how often which, and failures. There must be none.
"""

import argparse
import collections
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import job
from job import FIT, PREPARE, TESTBED_RUN, Outcome
from kills import ENVIRONMENT, results, undisturbed

GIVEN = ("texts", "testbed.yaml", "tasks.yaml", "go_on.jsonl")


def flip(path: Path, draw: random.Random) -> None:
    """Changes one bit."""
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(path: Path, draw: random.Random) -> None:
    """Keeps the beginning."""
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def empty(path: Path, draw: random.Random) -> None:
    """Keeps nothing."""
    del draw
    path.write_bytes(b"")


def remove(path: Path, draw: random.Random) -> None:
    """Removes it."""
    del draw
    path.unlink()


def replace(path: Path, draw: random.Random) -> None:
    """Puts another file of the job in its place, one of the same ending if there is one."""
    others = [other for other in path.parents[1].rglob("*") if other.is_file() and other != path]
    alike = [other for other in others if other.suffix == path.suffix]
    if others:
        path.write_bytes(draw.choice(alike or others).read_bytes())


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (
    flip,
    flip,
    cut,
    empty,
    remove,
    replace,
)


def one_case(folder: Path, expected: dict[str, str], draw: random.Random) -> tuple[str, str | None]:
    """Damages something; returns what the commands did, and what is wrong with that."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path.relative_to(folder).parts[0] not in GIVEN]
    # A file of every kind as often, though most are those of checkpoints.
    kinds = collections.defaultdict(list)
    for path in files:
        kinds[job.phase_of(str(path.relative_to(folder)))].append(path)
    path = draw.choice(kinds[draw.choice(sorted(kinds))])
    damage = draw.choice(DAMAGES)
    what = f"{damage.__name__} {path.relative_to(folder)}"
    damage(path, draw)
    if draw.random() < 0.5 and "runs" in path.parts:  # else nobody restores its checkpoint
        run = folder.joinpath(*path.relative_to(folder).parts[:3])
        shutil.rmtree(run / "evaluations", ignore_errors=True)
    commands = [FIT, TESTBED_RUN, FIT]
    if "data" in path.relative_to(folder).parts and draw.random() < 0.5:
        commands.insert(0, PREPARE)
    warned = False
    for command in commands:
        done = job.run(command, folder)
        fault = _fault(done, path, folder)
        if fault:
            return "failed", f"{what}: {command[0]}: {fault}"
        if done.code:
            return "said what is damaged", None
        warned |= path.name in done.output and "warning" in done.output.lower()
        if command == FIT and not warned and _differs(results_of_fit(folder), expected):
            return "failed", f"{what}: fit gave another result without a word"
    left = str(path.relative_to(folder))  # data that no command has read again stay damaged
    found = {name: digest for name, digest in results(folder).items() if name != left}
    wrong = _differs(found, expected)
    return ("failed", f"{what}: then {wrong}") if wrong else ("gave the same results", None)


def results_of_fit(folder: Path) -> dict[str, str]:
    """Of what the fit alone has made."""
    return {
        name: digest for name, digest in results(folder, runs=False).items() if name == "fit.json"
    }


def _differs(found: dict[str, str], expected: dict[str, str]) -> str | None:
    wrong = [name for name, digest in found.items() if expected.get(name) != digest]
    return f"differs in {', '.join(wrong)}" if wrong else None


def _fault(done: Outcome, path: Path, folder: Path) -> str | None:
    """What is wrong with how a command ended; None if it ended well or named the damage."""
    if "Traceback" in done.output or done.code not in (0, 2):
        return f"exit code {done.code}: {done.output[-3000:]}"
    if done.code == 0:
        return None
    line = done.output.strip().splitlines()[-1]
    parents = {path.name, *path.relative_to(folder).parts[1:-1]}
    if not line.startswith("error: ") or not any(name in line for name in parents):
        return f"does not name it: {line}"
    return None


def main() -> int:
    """Prints what happened; 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cases", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to work in; by default a temporary one")
    options = parser.parse_args()
    work = options.folder or Path(tempfile.mkdtemp(prefix="damages-"))
    os.environ |= ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(work / "compiled")}
    job.warm_up()
    expected, _ = undisturbed(work / "undisturbed")
    draw, start = random.Random(options.seed), time.monotonic()
    count: collections.Counter[str] = collections.Counter()
    failures = []
    for _ in range(options.cases):
        folder = work / "damaged"
        shutil.copytree(work / "undisturbed", folder)
        outcome, failure = one_case(folder, expected, draw)
        count[outcome] += 1
        if failure:
            failures.append(failure)
            print(f"FAILED: {failure}", flush=True)
        shutil.rmtree(folder)
    told = ", ".join(f"{number} {outcome}" for outcome, number in count.most_common())
    seconds = time.monotonic() - start
    print(f"seed {options.seed}, {seconds:.0f} s, {options.cases} cases: {told}")
    if options.folder is None:
        shutil.rmtree(work)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
