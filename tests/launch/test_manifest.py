"""What goes to Kubernetes, against the fields that batch/v1 and JobSet v1alpha2 document."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

MANIFEST = Path(__file__).parents[2] / "launch" / "gke" / "manifest.py"
PLACE = (
    "--image",
    "europe-docker.pkg.dev/mine/images/scaling_jax:1",
    "--bucket",
    "my-bucket",
)
SLICE = ("--accelerator", "tpu-v5-lite-podslice", "--topology")

# Every field that may stand in an object, and what it holds: a type, or the fields of an object.
CODES = {"containerName": str, "operator": {"In", "NotIn"}, "values": [int]}
POD = {
    "metadata": {"annotations": {}},
    "spec": {
        "restartPolicy": {"Never"},  # the only one that podFailurePolicy allows
        "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
        "nodeSelector": {},
        "containers": [
            {
                "name": str,
                "image": str,
                "command": [str],
                "ports": [{"containerPort": int}],
                "resources": {"limits": {}},
                "volumeMounts": [{"name": str, "mountPath": str}],
            }
        ],
        "volumes": [{"name": str, "csi": {"driver": str, "volumeAttributes": {}}}],
    },
}
JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "backoffLimitPerIndex": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob", "FailIndex", "Ignore", "Count"},
                "onExitCodes": CODES,
                "onPodConditions": [{"type": str, "status": str}],
            }
        ]
    },
    "template": POD,
}
META = {"name": str, "annotations": {}}
FIELDS = {
    "Job": {"apiVersion": {"batch/v1"}, "kind": str, "metadata": META, "spec": JOB},
    "JobSet": {
        "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
        "kind": str,
        "metadata": META,
        "spec": {
            "failurePolicy": {
                "maxRestarts": int,
                "rules": [
                    {
                        "name": str,
                        "action": {"FailJobSet", "RestartJobSet"},
                        "onJobFailureReasons": [str],
                    }
                ],
            },
            "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
        },
    },
}


def check(value, fields, where="") -> None:
    if isinstance(fields, type):
        assert type(value) is fields, where
    elif isinstance(fields, set):
        assert value in fields, where
    elif isinstance(fields, list):
        for number, part in enumerate(value):
            check(part, fields[0], f"{where}[{number}]")
    elif fields:
        for key, part in value.items():
            assert key in fields, f"{where}.{key}"
            check(part, fields[key], f"{where}.{key}")
    else:  # labels and the like: text, or numbers of chips
        assert all(type(part) in (str, int) for part in value.values()), where


def call(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(MANIFEST), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


def make(verb: str, topology: str, *more: str) -> dict:
    found = yaml.safe_load(call(verb, "my-run", *PLACE, *SLICE, topology, *more))
    check(found, FIELDS[found["kind"]], found["kind"])
    return found


def pod(job: dict) -> dict:
    return job["template"]["spec"]


def test_a_run_on_slices_of_several_hosts():
    found = make("run", "4x8", "--slices", "2", "--spot", "--", "scaling-jax", "train", "x y")
    (slices,) = found["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 8, 8)
    assert pod(job)["containers"][0]["command"] == ["scaling-jax", "train", "x y"]
    assert pod(job)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod(job)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_mistakes_end_it_and_everything_else_restarts_it():
    found = make("run", "4x4", "--", "true")["spec"]
    job = found["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [1, 2])
    assert rule["onExitCodes"]["containerName"] == pod(job)["containers"][0]["name"]
    (policy,) = found["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert job["backoffLimit"] == 0
    assert found["failurePolicy"]["maxRestarts"] > 100
    job = make("testbed", "2x2", "--", "true")["spec"]
    assert [rule["action"] for rule in job["podFailurePolicy"]["rules"]] == ["FailIndex", "Ignore"]
    assert job["backoffLimitPerIndex"] > 100


@pytest.mark.parametrize("index", [0, 7])
def test_each_worker_of_a_testbed_gets_its_share_and_no_word_is_changed(index):
    words = ["printf", "%s\n", "$HOME", "$(id)", "`id`", "a b", ";", "'"]
    job = make("testbed", "2x2", "--workers", "8", "--", *words)["spec"]
    assert (job["completions"], job["parallelism"], job["completionMode"]) == (8, 8, "Indexed")
    # Kubernetes makes $(NAME) of $$(NAME).
    command = [word.replace("$$(", "$(") for word in pod(job)["containers"][0]["command"]]
    done = subprocess.run(
        command,
        env={"JOB_COMPLETION_INDEX": str(index), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [*words[2:], "--index", f"{index + 1}/8"]
    assert "$$(id)" in pod(job)["containers"][0]["command"]


def test_the_bucket_is_mounted_without_caches():
    job = make("testbed", "1x1", "--", "true")["spec"]
    (volume,) = pod(job)["volumes"]
    assert volume["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"
    assert "metadata-cache:ttl-secs:0" in volume["csi"]["volumeAttributes"]["mountOptions"]
    assert pod(job)["containers"][0]["volumeMounts"][0]["name"] == volume["name"]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod(job)["containers"][0]["resources"]["limits"] == {"google.com/tpu": 1}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "my-run", *PLACE, *SLICE, "4x4"], "give the command after --"),
        (["run", "My_Run", *PLACE, *SLICE, "4x4", "--", "true"], "'My_Run' is not a valid name"),
        (["run", "a", *PLACE, *SLICE, "4by4", "--", "true"], "is not a valid topology"),
        (["run", "a", *PLACE, *SLICE, "3x3", "--", "true"], "9 chips are not whole hosts of 4"),
        (["run", "a", *PLACE, *SLICE, "4x4", "--slices", "0", "--", "true"], "give 1 to"),
        (["testbed", "a", *PLACE, *SLICE, "4x4", "--", "true"], "a testbed's worker has one host"),
        (["run", "a", *PLACE[:2], *SLICE, "4x4", "--", "true"], "--bucket"),
        (["run", "a", "--image", "x; rm", *PLACE[2:], *SLICE, "2x2", "--", "a"], "a valid image"),
        (["run", "a", *PLACE, "--accelerator", "tpu\nx: y", *SLICE[2:], "2x2"], "accelerator"),
    ],
)
def test_a_mistake_is_named(words, said):
    assert said in call(*words, code=2).splitlines()[-1]
