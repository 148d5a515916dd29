"""`scaling-jax plan` as a user calls it."""

import json
import subprocess
import sys

import pytest

from scaling_jax import cli
from scaling_jax.planning import ahead_of_time
from scaling_jax.planning.ahead_of_time import Compiled, Sent

PAPER = "testbeds/gadre2024.yaml"
RUN = """
model: models/411m.yaml
data: {dataset: rpj, validation: [c4_val]}
batch_size: 512
token_multiplier: 20
"""


@pytest.fixture
def run_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def call(monkeypatch, capsys, *words: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `scaling-jax plan`."""
    monkeypatch.setattr(sys, "argv", ["scaling-jax", "plan", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def row(text: str, first: str) -> list[str]:
    """The words of the first line that begins with a word."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


def test_the_bill_of_the_paper(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, PAPER, "--slice", "v5p-128", "--each")
    assert code == 0
    assert "v5p-128: 64 v5p chips (4x4x4), 16 hosts, 95 GiB" in out
    assert row(out, "7b")[1:3] == ["3", "6,889,410,560"]
    assert row(out, "all")[1] == "104"
    assert sum(line.split()[:1] == ["rpj-11m-m20"] for line in out.splitlines()) == 1
    occupied = out.partition("occupancy")[2]
    assert row(occupied, "11m")[1:] == ["100.0%", "99.9%", "99.6%", "74.7%", "37.4%"]


def test_one_run_shows_its_alternatives_and_how_to_train_so(monkeypatch, capsys, run_yaml):
    words = (run_yaml, "--slice", "v5e-64", "--mfu", "0.5", "--price_per_chip_hour", "2")
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert "times at 50% MFU" in out
    columns = out.splitlines()[3].split()
    bill = row(out, "411m")
    hours, cost = (float(bill[columns.index(name)]) for name in ("chip_hours", "cost"))
    assert cost == pytest.approx(2 * hours, rel=1e-3)
    settings = out.partition("to train so: ")[2].split()
    again, once_more, _ = call(monkeypatch, capsys, run_yaml, *settings, "--slice", "v5e-64")
    assert again == 0
    assert once_more.partition("to train so: ")[2].split() == settings


def test_nothing_that_starts_devices_is_imported(run_yaml):
    program = (
        "import atexit, json, sys, time; from scaling_jax import cli; "
        "say = lambda: print(json.dumps(['jax' in sys.modules, time.process_time()])); "
        f"atexit.register(say); sys.argv = ['scaling-jax', 'plan', {str(run_yaml)!r}, "
        "'--slice', 'v5e-64']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    imported, seconds = json.loads(done.stdout.splitlines()[-1])
    assert not imported
    assert seconds < 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slice", "v5p-127"), "did you mean 'v5p-128'?"),
        (("--slice", "v5e-64", "mesh.data=3"), "cannot be laid on v5e-64, which has 64 chips"),
        (("--slice", "v5e-64", "batch_size=500"), "batch_size=500 cannot be split evenly"),
        (("--slice", "v5e-1", "model.layers=400"), "does not fit v5e-1"),
        (("--slice", "v5e-64", "--mfu", "40"), "mfu=40.0: a part of the peak"),
        (("--slice", "v5e-64", "--price_per_chip_hour", "-1"), "give a positive number"),
        (("--slice", "v5e-64", "--slices", "0"), "slices=0"),
        (("--slice", "v5e-64", "model.remat=blok"), "model.remat"),
        ((), "slice"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(monkeypatch, capsys, run_yaml, words, message):
    code, _, err = call(monkeypatch, capsys, run_yaml, *words)
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("warning: Cyclopts")]
    assert len(lines) == 1
    assert message in lines[0]


def test_a_config_of_something_else_is_one_line(monkeypatch, capsys):
    code, _, err = call(monkeypatch, capsys, "models/7b.yaml", "--slice", "v5e-64")
    assert code == 2
    assert "models/7b.yaml: neither a run" in err


def test_compile_prints_the_compilers_account(monkeypatch, capsys, run_yaml):
    monkeypatch.setattr(ahead_of_time, "check_installed", lambda: None)
    answers = [
        Compiled(
            True,
            6 << 30,
            1 << 30,
            5 << 30,
            4 << 30,
            12.0,
            (Sent("all-gather", "bf16", 7, 3 << 20),),
        ),
        Compiled(False, 20 << 30),
    ]
    asked = []

    def compile_step(*request):
        asked.append(request)
        return answers[len(asked) - 1]

    monkeypatch.setattr(ahead_of_time, "compile_step", compile_step)
    words = (run_yaml, "--slice", "v5e-64", "--compile")
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 0
    assert row(out.partition("compiled step")[2], "411m")[-2:] == ["yes", "12"]
    assert "411m all-gather  bf16" in out
    code, out, _ = call(monkeypatch, capsys, *words)
    assert code == 1
    assert "NO" in row(out.partition("compiled step")[2], "411m")


def test_a_testbed_compiles_each_size_once(monkeypatch, capsys):
    monkeypatch.setattr(ahead_of_time, "check_installed", lambda: None)
    asked = []

    def compile_step(*request):
        asked.append(request[0].label)
        return Compiled(True, 1 << 30)

    monkeypatch.setattr(ahead_of_time, "compile_step", compile_step)
    code, _, _ = call(monkeypatch, capsys, PAPER, "--slice", "v5p-128", "--compile")
    assert code == 0
    assert asked == ["11m", "79m", "154m", "411m", "1b", "7b"]
