"""Each command line against gcloud's documented syntax, by a gcloud that only writes them down.

SYNTAX is the synopsis of each command as `gcloud ... --help` gives it (Google Cloud SDK 528).
"""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
PLACE = ("--zone", "us-east5-a", "--project", "my-project")
KIND = ("--accelerator_type", "v5litepod-16", "--runtime_version", "v2-alpha-tpuv5-lite")

# positional arguments at least and at most; flags that take a value; flags that take none;
# groups of flags of which exactly one has to be there
SYNTAX = {
    "queued-resources create": (
        (1, 1),
        {"zone", "project", "accelerator-type", "runtime-version", "node-id"}
        | {"node-count", "node-prefix"},
        {"spot", "reserved", "async", "quiet"},
        [{"node-id", "node-count"}, {"accelerator-type", "topology"}, {"runtime-version"}],
    ),
    "queued-resources describe": ((1, 1), {"zone", "project", "format"}, {"quiet"}, []),
    "queued-resources delete": ((1, 1), {"zone", "project"}, {"async", "force", "quiet"}, []),
    "tpu-vm ssh": ((1, 1), {"zone", "project", "worker", "command"}, {"quiet"}, []),
    "tpu-vm scp": ((2, 99), {"zone", "project", "worker"}, {"recurse", "compress", "quiet"}, []),
}

FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys
folder = pathlib.Path(os.environ["FAKE_GCLOUD"])
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
states = folder / "states"
verb = sys.argv[4]
if verb == "describe":
    left = json.loads(states.read_text())
    state = left.pop(0) if len(left) > 1 else left[0]
    states.write_text(json.dumps(left))
    if state == "DENIED":
        sys.exit("ERROR: (gcloud.compute.tpus) PERMISSION_DENIED: no access to my-project")
    if state is None:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource")
    print(state)
if verb == "ssh" and (folder / "ssh_code").exists():
    sys.exit(int((folder / "ssh_code").read_text()))
"""


def check_syntax(words: list[str]) -> None:
    assert words[:2] == ["compute", "tpus"]
    (least, most), valued, bare, one_of = SYNTAX[" ".join(words[2:4])]
    positional, given = 0, []
    for word in words[4:]:
        if not word.startswith("-"):
            positional += 1
            continue
        name, equals, value = word.removeprefix("--").partition("=")
        assert name in (valued if equals else bare), word
        assert value or not equals, word
        given.append(name)
    assert least <= positional <= most
    assert len(given) == len(set(given))
    for group in one_of:
        assert len(group & set(given)) == 1, (group, words)
    assert not {"spot", "reserved"} <= set(given)
    assert "node-prefix" not in given or "node-count" in given


@pytest.fixture
def gcloud(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "gcloud").write_text(FAKE)
    (folder / "gcloud").chmod(0o755)

    def call(*words: str, states=(None,), code: int = 0, path: str = ""):
        (folder / "states").write_text(json.dumps(states))
        (folder / "calls").unlink(missing_ok=True)
        done = subprocess.run(
            [sys.executable, str(LAUNCH / "tpu_vm.py"), *words],
            env=os.environ
            | {"PATH": path or f"{folder}{os.pathsep}{os.environ['PATH']}"}
            | {"FAKE_GCLOUD": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        calls = (folder / "calls").read_text() if (folder / "calls").exists() else ""
        lines = [json.loads(line) for line in calls.splitlines()]
        for line in lines:
            check_syntax(line)
        return lines, done.stdout + done.stderr

    return call


def verbs(calls):
    return [call[3] for call in calls]


def test_up_asks_for_a_slice_that_is_not_there(gcloud):
    calls, _ = gcloud("up", "my-tpu", *PLACE, *KIND, "--spot", states=[None, "PROVISIONING"])
    assert verbs(calls) == ["describe", "create", "describe"]
    assert sorted(calls[1][4:]) == sorted(
        [
            "my-tpu",
            "--zone=us-east5-a",
            "--project=my-project",
            "--accelerator-type=v5litepod-16",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--node-id=my-tpu",
            "--spot",
        ]
    )


def test_up_leaves_alone_what_is_there(gcloud):
    for state in ("ACTIVE", "WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "ACCEPTED"):
        calls, text = gcloud("up", "my-tpu", *PLACE, *KIND, states=[state])
        assert verbs(calls) == ["describe"]
        assert f"my-tpu: {state}" in text


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_up_replaces_what_was_preempted_or_has_failed(gcloud, state):
    calls, text = gcloud("up", "my-tpu", *PLACE, *KIND, states=[state, "ACCEPTED"])
    assert verbs(calls) == ["describe", "delete", "create", "describe"]
    assert "--force" in calls[1]
    assert f"{state}; it is replaced" in text


def test_up_does_not_ask_for_ever_for_what_fails_at_once(gcloud):
    calls, text = gcloud("up", "my-tpu", *PLACE, *KIND, "--wait", states=["FAILED"], code=1)
    assert verbs(calls).count("create") == 1
    assert text.splitlines()[-1].startswith("error: my-tpu: FAILED again")


def test_several_slices_are_asked_for_together_and_reached_one_by_one(gcloud, tmp_path):
    config = tmp_path / "a config; rm -rf $HOME.yaml"
    config.touch()
    calls, _ = gcloud(
        "up", "big", *PLACE, *KIND, "--node_count", "2", "--reserved", states=[None, "ACTIVE"]
    )
    assert {"--node-count=2", "--node-prefix=big", "--reserved"} <= set(calls[1])
    more = ("--node_count", "2", "--copy", str(config), "--", "scaling-jax", "train", config.name)
    calls, _ = gcloud("run", "big", *PLACE, *more)
    assert [(call[3], call[4]) for call in calls if call[3] == "ssh"] == [
        ("ssh", "big-0"),
        ("ssh", "big-1"),
    ]
    copies = [call for call in calls if call[3] == "scp"]
    assert [str(config) in call for call in copies] == [True, True]
    assert all("--worker=all" in call for call in calls)


def remote(call: list[str]) -> str:
    (command,) = (word for word in call if word.startswith("--command="))
    return command.removeprefix("--command=")


NASTY = ["echo", "$HOME", "a b", "`id`", "; touch x", "--flag=$(id)", "'", '"', "&&", "*", "\n"]


def test_a_command_reaches_the_hosts_word_by_word_and_no_shell_reads_it(gcloud, tmp_path):
    """What a host would do is done here, with a supervisor that writes down what it was given."""
    calls, _ = gcloud("run", "my-tpu", *PLACE, "--", *NASTY)
    (tmp_path / "supervise.sh").write_text('for word do printf "%s\\0" "$word"; done >got')
    command = remote(calls[-1]).replace("&\n", "\n").replace("2>&1 & else", "2>&1; else")
    subprocess.run(["sh", "-c", command], cwd=tmp_path, check=True, timeout=30)
    got = (tmp_path / "got").read_text().split("\0")[:-1]
    assert got == ["scaling_jax_run", *NASTY]
    assert not (tmp_path / "x").exists()


def test_what_the_hosts_are_told_is_good_shell(gcloud):
    for words in (["run", "--", "scaling-jax", "train", "x"], ["install", "--bucket", "my-bucket"]):
        verb, *more = words
        calls, _ = gcloud(verb, "my-tpu", *PLACE, *more)
        for call in calls:
            if call[3] == "ssh":
                subprocess.run(["sh", "-n", "-c", remote(call)], check=True)


def test_status_down_and_logs(gcloud):
    calls, text = gcloud("status", "my-tpu", *PLACE, states=["ACTIVE"])
    assert verbs(calls) == ["describe", "ssh"]
    assert "my-tpu: ACTIVE" in text
    calls, text = gcloud("status", "my-tpu", *PLACE)
    assert verbs(calls) == ["describe"]
    assert "there is none" in text
    calls, _ = gcloud("down", "my-tpu", *PLACE, states=["SUSPENDED"])
    assert verbs(calls) == ["describe", "delete"]
    assert {"--force", "--quiet"} <= set(calls[1])
    calls, _ = gcloud("down", "my-tpu", *PLACE)
    assert verbs(calls) == ["describe"]
    calls, _ = gcloud("logs", "my-tpu", *PLACE, "--worker", "3", "--follow")
    assert "--worker=3" in calls[0]
    assert remote(calls[0]) == "tail -n 50 -F scaling_jax_run/log"


COMMANDS = [
    ["up", "my-tpu", *PLACE, *KIND, "--spot"],
    ["up", "my-tpu", *PLACE, *KIND, "--node_count", "4", "--reserved"],
    ["install", "my-tpu", *PLACE, "--bucket", "my-bucket"],
    ["run", "my-tpu", *PLACE, "--", "scaling-jax", "train", "a b"],
    ["logs", "my-tpu", *PLACE],
    ["status", "my-tpu", *PLACE, "--node_count", "2"],
    ["down", "my-tpu", *PLACE],
]


def dry(gcloud, words):
    cut = words.index("--") if "--" in words else len(words)
    calls, text = gcloud(*words[:cut], "--dry_run", *words[cut:])
    assert calls == []
    return text.splitlines()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_dry_run_prints_each_command_and_runs_none(gcloud, words):
    lines = dry(gcloud, words)
    assert lines
    for line in lines:
        program, *rest = shlex.split(line)
        assert program == "gcloud"
        check_syntax(rest)
    calls, _ = gcloud(*words, states=["ACTIVE"] if words[0] in ("status", "down") else [None, "X"])
    ran = [shlex.join(["gcloud", *call]) for call in calls]
    assert ran[: len(lines)] == lines


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_gcloud_itself_accepts_each_command(gcloud, tmp_path, words):
    real = shutil.which("gcloud")
    if real is None:
        pytest.skip("gcloud is not installed")
    for line in dry(gcloud, words):
        done = subprocess.run(
            [real, "meta", "lint-gcloud-commands", f"--command-string={line}", "--format=json"],
            env=os.environ
            | {"CLOUDSDK_CONFIG": str(tmp_path), "CLOUDSDK_CORE_DISABLE_PROMPTS": "1"},
            capture_output=True,
            text=True,
            check=True,
        )
        (found,), _ = json.JSONDecoder().raw_decode(done.stdout)
        assert found["success"], found["error_message"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["up", *PLACE, *KIND], "required: name"),
        (["up", "My-Tpu", *PLACE, *KIND], "'My-Tpu' is not a valid name"),
        (["up", "a;rm -rf /", *PLACE, *KIND], "is not a valid name"),
        (["up", "a\nb", *PLACE, *KIND], "is not a valid name"),
        (["up", "my-tpu\n", *PLACE, *KIND], "is not a valid name"),
        (["down", "my-tpu", "--zone", "$(id)", "--project", "my-project"], "is not a valid zone"),
        (["down", "my-tpu", "--zone", "us-east5-a", "--project", "--flags-file=x"], "project"),
        (["up", "my-tpu", *PLACE, *KIND[:2], "--runtime_version", "v2 --x"], "runtime version"),
        (["up", "my-tpu", *PLACE, *KIND, "--accelerator_type", "v5"], "accelerator type"),
        (["up", "my-tpu", *PLACE, *KIND, "--spot", "--reserved"], "not allowed with"),
        (["up", "my-tpu", *PLACE, *KIND, "--node_count", "0"], "give 1 or more"),
        (["install", "my-tpu", *PLACE, "--bucket", "gs://b"], "is not a valid bucket"),
        (["run", "my-tpu", *PLACE], "give the command after --"),
        (["run", "my-tpu", *PLACE, "--copy", "absent.yaml", "--", "true"], "absent.yaml"),
        (["down", "my-tpu", *PLACE, "--", "true"], "only run takes a command"),
        (["delete", "my-tpu", *PLACE], "invalid choice"),
    ],
)
def test_a_mistake_is_named_and_nothing_is_run(gcloud, words, said):
    calls, text = gcloud(*words, code=2)
    assert calls == []
    assert said in text.splitlines()[-1]


def test_what_gcloud_says_is_passed_on(gcloud, tmp_path):
    calls, text = gcloud("up", "my-tpu", *PLACE, *KIND, states=["DENIED"], code=1)
    assert verbs(calls) == ["describe"]
    assert "PERMISSION_DENIED" in text
    (tmp_path / "bin" / "ssh_code").write_text("255")
    _, text = gcloud("logs", "my-tpu", *PLACE, code=255)
    assert "exit code 255" in text


def test_without_gcloud_it_says_so(gcloud, tmp_path):
    _, text = gcloud("down", "my-tpu", *PLACE, path=str(tmp_path), code=2)
    assert text == "error: gcloud: not installed\n"


def supervise(folder: Path, script: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["sh", str(LAUNCH / "supervise.sh"), str(folder), "sh", "-c", script],
        env=os.environ | {"RESTART_SECONDS": "0", "STATE": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


COUNTING = 'echo x >>"$STATE/starts"; [ $(wc -l <"$STATE/starts") -gt 2 ] && exit 0; '


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 1), (2, 1), (75, 3), (134, 3), (143, 3)])
def test_the_supervisor_restarts_what_was_preempted_and_nothing_else(tmp_path, code, starts):
    done = supervise(tmp_path, f"{COUNTING} exit {code}")
    last = code if starts == 1 else 0
    assert done.returncode == last
    assert (tmp_path / "exit_code").read_text() == f"{last}\n"
    assert len((tmp_path / "starts").read_text().splitlines()) == starts
    assert (tmp_path / "log").read_text().count(f"exit code {code}: started again") == starts - 1


def test_the_supervisor_restarts_what_was_killed(tmp_path):
    supervise(tmp_path, f"{COUNTING} kill -9 $$")
    assert "exit code 137: started again" in (tmp_path / "log").read_text()


def test_a_second_supervisor_leaves_the_first_alone(tmp_path):
    script = f'sh {LAUNCH}/supervise.sh "$STATE" true; exit 2'
    assert supervise(tmp_path, script).returncode == 2
    assert "running already" in (tmp_path / "log").read_text()


def test_it_can_be_called_by_its_name():
    assert (LAUNCH / "tpu_vm.py").stat().st_mode & stat.S_IXUSR
