#!/usr/bin/env python3
"""Prints what kubectl applies to train on TPU slices of GKE.

    manifest.py run     NAME ... -- scaling-jax train CONFIG --out /bucket/runs/NAME
    manifest.py testbed NAME ... --workers 8 -- scaling-jax testbed run CONFIG --out /bucket/NAME

`run` is a JobSet: all hosts of one or more slices work on one run, and start again together. A
`testbed` is an indexed Job: each worker has a slice of one host and gets --index i/n. Exit codes 1
and 2 end them, every other failure starts them again. The bucket is mounted as /bucket.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import yaml

# Exit codes that no restart mends: a failure that would come again, a mistake of the user.
FINAL_CODES = (1, 2)
RESTARTS = 1000

# Claims of other hosts have to be seen at once; a checkpoint is a folder that is renamed.
MOUNT_OPTIONS = "implicit-dirs,metadata-cache:ttl-secs:0,file-system:rename-dir-limit:200000"
# What each argument looks like, and an example.
PATTERNS = {
    "name": (r"[a-z]([a-z0-9-]{0,50}[a-z0-9])?", "my-run"),
    "image": (r"[a-z0-9][A-Za-z0-9._/:@-]{1,254}", "us-docker.pkg.dev/my-project/my/image:1"),
    "bucket": (r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "my-bucket"),
    "accelerator": (r"tpu[a-z0-9-]{1,40}", "tpu-v5-lite-podslice"),
    "topology": (r"[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}", "4x4"),
    "service_account": (r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "my-account"),
}

Manifest = dict[str, Any]


def run(options: argparse.Namespace) -> Manifest:
    """A JobSet of `slices` slices, placed one to a node pool."""
    hosts = _hosts(options)
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [_on_final_codes("FailJob")]},
        "template": _pod(options, options.command),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": options.name,
            "annotations": {
                "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [
                    {
                        "name": "finalExitCode",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {"name": "slice", "replicas": options.slices, "template": {"spec": job}}
            ],
        },
    }


def testbed(options: argparse.Namespace) -> Manifest:
    """An indexed Job; each worker is restarted for itself."""
    if _hosts(options) > 1:
        raise ValueError(
            f"--topology {options.topology}: a testbed's worker has one host; give a smaller one, "
            "or several runs"
        )
    # Kubernetes counts from 0, --index from 1.
    script = f'exec "$@" --index "$((JOB_COMPLETION_INDEX + 1))/{options.workers}"'
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": options.name},
        "spec": {
            "parallelism": options.workers,
            "completions": options.workers,
            "completionMode": "Indexed",
            "backoffLimitPerIndex": RESTARTS,
            "podFailurePolicy": {
                "rules": [
                    _on_final_codes("FailIndex"),
                    {
                        "action": "Ignore",  # a preempted node: not the worker's fault
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                ]
            },
            "template": _pod(options, ["sh", "-c", script, "sh", *options.command]),
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and prints a manifest; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    options = _parser().parse_args(words[:cut])
    options.command = words[cut + 1 :]
    try:
        if not options.command:
            raise ValueError("give the command after --, such as -- scaling-jax train CONFIG")
        manifest = options.function(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(manifest, sort_keys=False), end="")
    return 0


def _hosts(options: argparse.Namespace) -> int:
    """How many hosts a slice has."""
    chips = math.prod(int(side) for side in options.topology.split("x"))
    hosts, rest = divmod(chips, min(chips, options.chips_per_host))
    if rest:
        raise ValueError(
            f"--topology {options.topology}: {chips} chips are not whole hosts of "
            f"{options.chips_per_host}"
        )
    return hosts


def _pod(options: argparse.Namespace, command: Sequence[str]) -> Manifest:
    chips = math.prod(int(side) for side in options.topology.split("x"))
    selector = {
        "cloud.google.com/gke-tpu-accelerator": options.accelerator,
        "cloud.google.com/gke-tpu-topology": options.topology,
    }
    if options.spot:
        selector["cloud.google.com/gke-spot"] = "true"
    bucket = {"bucketName": options.bucket, "mountOptions": MOUNT_OPTIONS}
    return {
        "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}},
        "spec": {
            "restartPolicy": "Never",
            "serviceAccountName": options.service_account,
            "terminationGracePeriodSeconds": 120,  # to save
            "nodeSelector": selector,
            "containers": [
                {
                    "name": "scaling-jax",
                    "image": options.image,
                    # Kubernetes would fill in $(NAME).
                    "command": [word.replace("$(", "$$(") for word in command],
                    "ports": [{"containerPort": 8471}],  # between hosts of a slice
                    "resources": {"limits": {"google.com/tpu": min(chips, options.chips_per_host)}},
                    "volumeMounts": [{"name": "bucket", "mountPath": "/bucket"}],
                }
            ],
            "volumes": [
                {
                    "name": "bucket",
                    "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": bucket},
                }
            ],
        },
    }


def _on_final_codes(action: str) -> Manifest:
    codes = {"containerName": "scaling-jax", "operator": "In", "values": list(FINAL_CODES)}
    return {"action": action, "onExitCodes": codes}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("name", type=_checked("name"))
    common.add_argument("--image", type=_checked("image"), required=True, help="has the project")
    common.add_argument("--bucket", type=_checked("bucket"), required=True)
    common.add_argument("--accelerator", type=_checked("accelerator"), required=True)
    common.add_argument("--topology", type=_checked("topology"), required=True, help="4x4, 2x2x2")
    common.add_argument("--chips_per_host", type=_count, default=4)
    common.add_argument("--service_account", type=_checked("service_account"), default="default")
    common.add_argument("--spot", action="store_true", help="cheap, may be preempted")
    description, _, rest = (__doc__ or "").partition("\n")
    parser = _Parser(
        prog="manifest.py",
        description=description,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(required=True, metavar="run|testbed")
    for function, count in ((run, "slices"), (testbed, "workers")):
        verb = verbs.add_parser(
            function.__name__, parents=[common], help=function.__doc__, allow_abbrev=False
        )
        verb.add_argument(f"--{count}", type=_count, default=1)
        verb.set_defaults(function=function)
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
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError(f"{text}: give 1 to 10000")
    return number


if __name__ == "__main__":
    sys.exit(main())
