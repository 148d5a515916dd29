#!/usr/bin/env python3
"""Cloud TPU slices through gcloud: make one, run a command on all its hosts, watch, remove.

    launch/tpu_vm.py up      NAME --zone Z --project P --accelerator_type T --runtime_version R
    launch/tpu_vm.py install NAME --zone Z --project P [--bucket B]
    launch/tpu_vm.py run     NAME --zone Z --project P [--copy FILE ...] -- scaling-jax train ...
    launch/tpu_vm.py logs | status | down NAME --zone Z --project P

Every command may be repeated: what is there already is not made again, a slice that was preempted
is replaced. --dry_run prints the commands, one a line, and runs none. Needs Python and gcloud only.
"""

import argparse
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).parent
SUPERVISOR = HERE / "supervise.sh"
SOURCE = "scaling_jax_source"
ENVIRONMENT = "scaling_jax_env"
RUN = "scaling_jax_run"
# What an installation needs of the project.
PARTS = ("scaling_jax", "configs", "setup.cfg", "pyproject.toml", "constraints.txt", "README.md")
POLL_SECONDS = 30.0

# States of a queued resource: these end it, and it has to be deleted before it is asked for again.
ENDED = ("SUSPENDED", "FAILED")

# Claims of other hosts have to be seen at once; a checkpoint is a folder that is renamed.
MOUNT_OPTIONS = ("--implicit-dirs", "--metadata-cache-ttl-secs=0", "--rename-dir-limit=200000")
# What each argument looks like, and an example.
PATTERNS = {
    "name": (r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?", "my-tpu"),
    "zone": (r"[a-z]+-[a-z]+[0-9]+-[a-z]", "us-east5-a"),
    "project": (r"([a-z][a-z0-9.-]{0,60}[a-z0-9]:)?[a-z][a-z0-9-]{4,28}[a-z0-9]", "my-project"),
    "accelerator_type": (r"v[0-9]+[a-z]*-[0-9]+", "v5litepod-16"),
    "runtime_version": (r"[a-z][a-z0-9.-]{0,62}", "v2-alpha-tpuv5-lite"),
    "bucket": (r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "my-bucket"),
}


class LaunchError(Exception):
    """One line and an exit code: 2 for a mistake of the user, otherwise gcloud's own."""

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class Slice:
    """A queued resource of one or more slices, and how to reach it."""

    def __init__(self, name: str, zone: str, project: str, node_count: int, dry_run: bool):
        self.name, self.dry_run = name, dry_run
        self.nodes = [name] if node_count == 1 else [f"{name}-{k}" for k in range(node_count)]
        self._place = [f"--zone={zone}", f"--project={project}"]

    def queued(self, verb: str, *flags: str) -> list[str]:
        """A command on the queued resource."""
        command = ["gcloud", "compute", "tpus", "queued-resources", verb, self.name]
        return [*command, *self._place, *flags]

    def ssh(self, node: str, remote: str, worker: str = "all") -> list[str]:
        """A command that runs a shell command on hosts of a slice."""
        command = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._place]
        return [*command, f"--worker={worker}", f"--command={remote}"]

    def copy(self, node: str, local: Sequence[Path], remote: str) -> list[str]:
        """A command that copies files and folders to all hosts of a slice."""
        # An absolute path is never taken for a host's name or an option.
        ends = [*(str(path.resolve()) for path in local), f"{node}:{remote}"]
        command = ["gcloud", "compute", "tpus", "tpu-vm", "scp", *ends, *self._place]
        return [*command, "--worker=all", "--recurse"]

    def do(self, command: Sequence[str]) -> None:
        """Runs a command, or prints it."""
        if self.dry_run:
            print(shlex.join(command))
            return
        code = subprocess.run(command, check=False).returncode
        if code:
            raise LaunchError(f"{' '.join(command[:5])} ended with exit code {code}", code)

    def state(self) -> str | None:
        """The state of the queued resource; None if there is none."""
        command = self.queued("describe", "--format=value(state.state)")
        if self.dry_run:
            print(shlex.join(command))
            return None
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout.strip()
        if "NOT_FOUND" in done.stderr:
            return None
        lines = done.stderr.strip().splitlines() or ["gcloud says nothing"]
        raise LaunchError(lines[-1], done.returncode)


def up(tpu: Slice, options: argparse.Namespace) -> None:
    """Asks for the slice unless it is there; replaces it, once a call, if it has ended."""
    flags = [f"--accelerator-type={options.accelerator_type}"]
    flags += [f"--runtime-version={options.runtime_version}"]
    if options.node_count == 1:
        flags += [f"--node-id={tpu.name}"]
    else:
        flags += [f"--node-count={options.node_count}", f"--node-prefix={tpu.name}"]
    flags += ["--spot"] if options.spot else []
    flags += ["--reserved"] if options.reserved else []
    asked = False
    while True:
        state = tpu.state()
        if state in ENDED:
            if asked:
                raise LaunchError(f"{tpu.name}: {state} again; gcloud's describe says why", 1)
            print(f"{tpu.name}: {state}; it is replaced")
            tpu.do(tpu.queued("delete", "--force", "--quiet"))
            state = None
        if state is None:
            tpu.do(tpu.queued("create", *flags))
            asked = True
            if tpu.dry_run:
                return
        elif state == "ACTIVE" or not options.wait:
            print(f"{tpu.name}: {state}")
            return
        else:
            time.sleep(POLL_SECONDS)


def install(tpu: Slice, options: argparse.Namespace) -> None:
    """Puts this project and its environment on every host, and mounts the bucket."""
    uv = ["python3", "-m", "uv"]
    packages = ["-c", f"{SOURCE}/constraints.txt", f"{SOURCE}[tpu]"]
    steps = [
        # The images' own Python is older than what the project needs.
        ["python3", "-m", "pip", "install", "--user", "--quiet", "uv"],
        [*uv, "venv", "--allow-existing", "--python", "3.11", ENVIRONMENT],
        [*uv, "pip", "install", "--python", ENVIRONMENT, *packages],
    ]
    remote = " && ".join(shlex.join(step) for step in steps)
    if options.bucket:
        # Without caches: claims of other hosts have to be seen at once.
        mount = ["gcsfuse", *MOUNT_OPTIONS, options.bucket]
        remote += f" && mkdir -p bucket && (mountpoint -q bucket || {shlex.join(mount)} bucket)"
    for node in tpu.nodes:
        tpu.do(tpu.ssh(node, shlex.join(["mkdir", "-p", SOURCE])))
        tpu.do(tpu.copy(node, [HERE.parent / part for part in PARTS], f"{SOURCE}/"))
        tpu.do(tpu.ssh(node, remote))


def run(tpu: Slice, options: argparse.Namespace) -> None:
    """Starts the command on every host, where it goes on without this machine."""
    if not options.command:
        raise LaunchError("run: give the command after --, such as -- scaling-jax train CONFIG")
    for path in options.copy:
        if not path.exists():
            raise LaunchError(f"--copy {path}: no such file or folder")
    path = f'PATH="$HOME/{ENVIRONMENT}/bin:$PATH"'
    words = shlex.join(["sh", SUPERVISOR.name, RUN, *options.command])
    start = f"{path} nohup {words} </dev/null >/dev/null 2>&1 &"
    free = f"mkdir -p {RUN} && flock -n {RUN}/lock true"
    for node in tpu.nodes:
        tpu.do(tpu.copy(node, [SUPERVISOR, *options.copy], ""))
        tpu.do(tpu.ssh(node, f"if {free}; then {start} else echo running already; fi"))


def logs(tpu: Slice, options: argparse.Namespace) -> None:
    """Shows the end of what the command has printed on one host, and what it goes on to print."""
    follow = ["-F"] if options.follow else []
    remote = shlex.join(["tail", "-n", str(options.lines), *follow, f"{RUN}/log"])
    tpu.do(tpu.ssh(tpu.nodes[0], remote, worker=str(options.worker)))


def status(tpu: Slice, _: argparse.Namespace) -> None:
    """Says the state of the slice, and of each host its last line and how its command ended."""
    state = tpu.state()
    if not tpu.dry_run:
        print(f"{tpu.name}: {state or 'there is none'}")
        if state != "ACTIVE":
            return
    ended = f"echo ended with exit code $(cat {RUN}/exit_code)"
    remote = f"tail -n 1 {RUN}/log; if [ -e {RUN}/exit_code ]; then {ended}; fi"
    for node in tpu.nodes:
        tpu.do(tpu.ssh(node, remote))


def down(tpu: Slice, _: argparse.Namespace) -> None:
    """Removes the slice and everything on its disks."""
    if tpu.state() is None and not tpu.dry_run:
        print(f"{tpu.name}: there is none")
        return
    tpu.do(tpu.queued("delete", "--force", "--quiet"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and does what it says; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    options.command = words[cut + 1 :]
    try:
        if options.command and options.function is not run:
            raise LaunchError("only run takes a command after --")
        tpu = Slice(
            options.name, options.zone, options.project, options.node_count, options.dry_run
        )
        options.function(tpu, options)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except FileNotFoundError as error:
        print(f"error: {error.filename}: not installed", file=sys.stderr)
        return 2
    return 0


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("name", type=_checked("name"), help="of the queued resource")
    common.add_argument("--zone", type=_checked("zone"), required=True)
    common.add_argument("--project", type=_checked("project"), required=True)
    common.add_argument("--node_count", type=_count, default=1, help="slices, joined over DCN")
    common.add_argument("--dry_run", action="store_true", help="print the commands only")

    description, _, rest = (__doc__ or "").partition("\n")
    parser = _Parser(
        prog="tpu_vm.py",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="up|install|run|logs|status|down")
    for function in (up, install, run, logs, status, down):
        verb = verbs.add_parser(
            function.__name__, parents=[common], help=function.__doc__, allow_abbrev=False
        )
        verb.set_defaults(function=function)
        if function is up:
            for option in ("accelerator_type", "runtime_version"):
                verb.add_argument(f"--{option}", type=_checked(option), required=True)
            kind = verb.add_mutually_exclusive_group()
            kind.add_argument("--spot", action="store_true", help="cheap, may be preempted")
            kind.add_argument("--reserved", action="store_true", help="from a reservation")
            verb.add_argument("--wait", action="store_true", help="until it is there")
        if function is install:
            verb.add_argument("--bucket", type=_checked("bucket"), help="mounted as ~/bucket")
        if function is run:
            verb.add_argument("--copy", type=Path, nargs="+", default=[], help="into ~ first")
        if function is logs:
            verb.add_argument("--worker", type=int, default=0)
            verb.add_argument("--lines", type=_count, default=50)
            verb.add_argument("--follow", action="store_true")
    return parser


def _checked(kind: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        pattern, example = PATTERNS[kind]
        if not re.fullmatch(pattern, text):
            what = kind.replace("_", " ")
            raise argparse.ArgumentTypeError(f"{text!r} is not a valid {what}, such as {example}")
        return text

    return check


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
