"""`scaling-jax evaluate RUN --tasks`, as a user calls it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tokenizers
import yaml

from scaling_jax import cli
from scaling_jax.config import DataConfig, ModelConfig, RunConfig
from scaling_jax.models import openlm, transformer
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


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scaling_jax" / "prompts"


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

    def call(*words, folder=run, command=("evaluate",)):
        monkeypatch.setattr("sys.argv", ["scaling-jax", *command, *map(str, (folder, *words))])
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
    (file,) = kept.glob("report-*.json")
    assert str(file) in printed.replace("\n", "")
    report = json.loads(file.read_text())
    assert report["tasks"]["quiz"]["questions"] == 5
    assert report["averages"]["both"]["missing"] == ["other"]
    assert {path.name.split("-")[0] for path in kept.iterdir()} == {"quiz", "report"}
    quiz = report["tasks"]["quiz"]
    assert quiz["accuracy_low"] < quiz["accuracy"] < quiz["accuracy_high"]
    bounds = f"({quiz['accuracy_low']:.4f} to {quiz['accuracy_high']:.4f})"
    assert f"both: accuracy {quiz['accuracy']:.4f} {bounds}" in printed


def test_token_ids_are_kept_for_the_next_model(evaluate, own, cache, monkeypatch):
    words = ("--tasks", own, "--vocabulary", "bytes")
    assert evaluate(*words, "name=first")[0] == 0
    (file,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("scaling_jax.evaluation.prompts.build", lambda *_: pytest.fail("built"))
        assert evaluate(*words, "name=again")[0] == 0
    assert list(cache.iterdir()) == [file]
    elsewhere = own.parent / "elsewhere"
    assert evaluate(*words, "name=other", "--cache", elsewhere)[0] == 0
    assert [path.name for path in elsewhere.iterdir()] == [file.name]


def test_a_damaged_result_is_made_anew_with_a_warning(evaluate, own, run):
    words = ("--tasks", own, "--vocabulary", "bytes", "name=damaged")
    assert evaluate(*words)[0] == 0
    (kept,) = (run / "evaluations" / "damaged" / "step-00000010").glob("quiz-*.json")
    before = kept.read_text()
    kept.write_text(before.replace("true", "false", 1))
    code, _, err = evaluate(*words)
    assert code == 0
    assert f"warning: {kept}: damaged and not used" in err
    assert kept.read_text() == before


def test_changes_and_a_choice_of_tasks(evaluate, own, run):
    words = ("--tasks", own, "--vocabulary", "bytes", "name=changed", "tasks.quiz.shots=0")
    code, _, _ = evaluate(*words, "--only", "both")
    assert code == 0
    assert (run / "evaluations" / "changed").is_dir()


def test_a_task_that_cannot_be_scored_does_not_end_the_others(evaluate, own):
    row = {"context_options": ["x" * 9, "y"], "continuation": "z" * 40, "gold": 0}
    (own.parent / "other.jsonl").write_text(json.dumps(row) + "\n")
    reason = f"other: {own.parent / 'other.jsonl'}: question 0: 41 tokens to score leave no room"
    for _ in range(2):  # the second time as it is kept
        code, printed, err = evaluate("--tasks", own, "--vocabulary", "bytes", "name=long")
        assert code == 2
        assert f"left out: {reason}" in printed
        assert "quiz: " in printed
        assert "(ONLY 1 of 2 tasks)" in printed
        assert err.startswith(f"error: left out: {reason}")
        assert err.count("\n") == 1


def test_pooled_means_have_bounds(evaluate, own):
    own.write_text(OWN + "pooled:\n  all: [quiz]\n")
    code, printed, _ = evaluate("--tasks", own, "--vocabulary", "bytes", "--only", "all")
    assert code == 0
    line = re.search(r"^all: accuracy (\S+) \((\S+) to (\S+)\)$", printed, re.MULTILINE)
    assert line is not None
    accuracy, low, high = map(float, line.groups())
    assert low < accuracy < high


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--only", "quiz"), "give --tasks"),
        (("--cache", "somewhere"), "give --tasks"),
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
    if "--tasks" in given and "--vocabulary" not in given:
        given += ["--vocabulary", "bytes"]
    code, _, err = evaluate(*given)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_kill_loses_one_task_at_most_and_changes_nothing(evaluate, run, tmp_path):
    random = np.random.default_rng(0)
    tasks = {}
    for number in range(6):
        rows = [
            {"query": f"{n}" * (1 + 4 * number), "choices": ["a", "bc"], "gold": n % 2}
            for n in random.integers(10, 99, 150).tolist()
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"task_{number}.jsonl").write_text(text)
        data, kind = f"task_{number}.jsonl", "multiple_choice"
        tasks[f"task_{number}"] = {"data": data, "type": kind, "shots": number % 3}
    config = tmp_path / "killed.yaml"
    config.write_text(yaml.dump({"tasks": tasks}))
    words = ("--tasks", config, "--vocabulary", "bytes")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("evaluations"))
    kept = killed / "evaluations" / "killed" / "step-00000010"

    program = "from scaling_jax import cli; cli.main()"
    command = [sys.executable, "-c", program, "evaluate", killed, *words]
    # Compiled as here (quick_compilation), so that every digit is the same.
    settings = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    child = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, env=settings)
    while len(list(kept.glob("task_*.json"))) < 2:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    assert child.wait() == -9
    done = {path.name: path.stat().st_mtime_ns for path in kept.glob("task_*.json")}
    assert 2 <= len(done) < 6
    assert not list(kept.glob("report-*.json"))

    assert evaluate(*words, folder=killed)[0] == 0
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}.items()
    assert evaluate(*words, folder=whole)[0] == 0
    expected = whole / "evaluations" / "killed" / "step-00000010"
    for path in expected.iterdir():
        assert (kept / path.name).read_bytes() == path.read_bytes(), path.name


def letters(size):
    """A tokenizer.json with an id for each of `size - 1` characters, and the end of text."""
    names = {chr(0x4E00 + id): id for id in range(size - 1)} | {"<|endoftext|>": size - 1}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=names, merges=[]))
    found.add_special_tokens(["<|endoftext|>"])
    return found.to_str()


def test_a_checkpoint_of_open_lm_is_scored_as_open_lm_sees_it(evaluate, golden, tmp_path):
    """From its file to the report, against the logits that open_lm itself computed."""
    size, length = golden.settings.vocab_size, golden.settings.seq_len
    source, folder = tmp_path / "epoch_1.pt", tmp_path / "run"
    tensors = openlm.from_params(golden.model(), golden.params("init"))
    openlm.write(source, tensors, "made", epoch=1, step=3)
    sizes = (f"model.sequence_length={length}", "data.validation=[walk]")
    settings = (folder, *sizes)
    code, _, err = evaluate(*settings, folder=source, command=("convert", "open_lm"))
    assert code == 0, err

    (tmp_path / "letters.json").write_text(letters(size))
    rows = golden.arrays["tokens"][0]
    used = [row for row in range(len(rows)) if size - 1 not in rows[row][:length]]
    assert used
    texts = ["".join(chr(0x4E00 + id) for id in rows[row][:length]) for row in used]
    half = length // 2
    words = [{"context": text[:half], "continuation": text[half:]} for text in texts]
    quiz = [
        {"query": text[:-1], "choices": [chr(0x4E00 + id) for id in (7, 3, 11)], "gold": 1}
        for text in texts
    ]
    for name, lines in (("words", words), ("quiz", quiz)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    asked = {
        "words": {"data": "words.jsonl", "type": "language_modeling"},
        "quiz": {"data": "quiz.jsonl", "type": "multiple_choice"},
    }
    for task in asked.values():
        task |= {"continuation_delimiter": ""}
    (tmp_path / "own.yaml").write_text(yaml.dump({"tasks": asked}))
    given = ("--tasks", tmp_path / "own.yaml", "--vocabulary", tmp_path / "letters.json")
    code, _, err = evaluate(*given, folder=folder)
    assert code == 0, err

    kept = folder / "evaluations" / "own" / "step-00000003"
    found = {
        name: json.loads(path.read_text())["result"]["outcomes"]
        for name in asked
        for path in kept.glob(f"{name}-*.json")
    }
    logits = golden.arrays["logits0"].astype(np.float64)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    for number, row in enumerate(used):
        said, targets = logs[row, half - 1 : length - 1], rows[row][half:length]
        (ours,) = found["words"][number]["log_probabilities"]
        assert ours == pytest.approx(said[np.arange(len(targets)), targets].sum(), abs=1e-3)
        assert found["words"][number]["correct"] == bool((said.argmax(axis=1) == targets).all())
        expected = logs[row, length - 2, [7, 3, 11]]
        np.testing.assert_allclose(found["quiz"][number]["log_probabilities"], expected, atol=1e-4)
        assert found["quiz"][number]["prediction"] == expected.argmax()
