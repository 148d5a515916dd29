"""`scaling-jax evaluate RUN --tasks`, as a user calls it."""

import json

import jax
import pytest

from scaling_jax import cli
from scaling_jax.config import DataConfig, ModelConfig, RunConfig
from scaling_jax.models import transformer
from scaling_jax.training import converted

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = ModelConfig(width=16, layers=1, heads=2, vocabulary_size=264, sequence_length=32)
OWN = """\
tasks:
  quiz:
    data: quiz.jsonl
    type: multiple_choice
    shots: 1
  other:
    data: other.jsonl
    type: schema
averages:
  both: [quiz, other]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    data = DataConfig(dataset="words", validation=("words",), folder=str(folder / "nowhere"))
    config = RunConfig(model=MODEL, data=data, batch_size=1, tokens=320)
    params = jax.device_get(transformer.initialize(MODEL, jax.random.key(0)))
    converted.write(config, params, folder, 10, {})
    return folder


@pytest.fixture
def own(tmp_path):
    rows = [{"query": f"{n}", "choices": ["one", "two"], "gold": n % 2} for n in range(5)]
    (tmp_path / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.yaml").write_text(OWN)
    return tmp_path / "own.yaml"


@pytest.fixture
def evaluate(run, monkeypatch, capsys):
    """Calls the command; its exit code and what it printed."""

    def call(*words, folder=run):
        monkeypatch.setattr("sys.argv", ["scaling-jax", "evaluate", *map(str, (folder, *words))])
        code = 0
        try:
            cli.main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        return code, *capsys.readouterr()

    return call


def test_a_file_of_ones_own(evaluate, own, run):
    code, printed, _ = evaluate("--tasks", own, "--vocabulary", "bytes")
    assert code == 0
    assert f"left out: other: {own.parent / 'other.jsonl'} is not there" in printed
    assert "max_tokens=32, the model's sequence length" in printed
    assert "(ONLY 1 of 2 tasks)" in printed
    kept = run / "evaluations" / "own" / "step-00000010"
    report = json.loads((kept / "report.json").read_text())
    assert report["tasks"]["quiz"]["questions"] == 5
    assert report["averages"]["both"]["missing"] == ["other"]
    assert {path.name for path in kept.iterdir()} == {"quiz.json", "report.json"}


def test_changes_and_a_choice_of_tasks(evaluate, own, run):
    words = ("--tasks", own, "--vocabulary", "bytes", "name=changed", "tasks.quiz.shots=0")
    code, _, _ = evaluate(*words, "--only", "both")
    assert code == 0
    assert (run / "evaluations" / "changed").is_dir()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "quiz"), "give --tasks"),
        (("--tasks", "gadre2025"), "did you mean"),
        (("--tasks", "gadre2024"), "give --data"),
        (("--tasks", "OWN", "--data", "nowhere"), "nowhere: there is no such folder"),
        (("--tasks", "OWN", "--only", "quizz"), "did you mean 'quiz'"),
        (("--tasks", "OWN", "tasks.quiz.shot=1"), "did you mean 'shots'"),
        (("--tasks", "OWN", "tasks.quiz.type=schema"), "needs 'context_options'"),
        (("--tasks", "OWN", "--vocabulary", "none.json"), "no such file"),
    ],
)
def test_a_mistake_is_one_line(evaluate, own, words, message):
    given = [own if word == "OWN" else word for word in words]
    if "--vocabulary" not in given and "--only" not in given:
        given += ["--vocabulary", "bytes"]
    code, _, err = evaluate(*given)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
