"""A testbed that two real processes run together: packed on each host's devices, scored by all."""

import json
import signal
import time

import numpy as np
import pytest
from joined_processes import lines, printed

from scaling_jax import claims, records
from scaling_jax import config as configs
from scaling_jax.config import TestbedConfig
from scaling_jax.testbeds import grid, runner
from scaling_jax.training import checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:words. .* tokens need the data"),
]
PACKED = ("--pack", "--slots=2")
TASKS = """\
name: own
tasks:
  cloze: {data: cloze.jsonl, type: language_modeling}
  choice: {data: choice.jsonl, type: multiple_choice}
  answers: {data: answers.jsonl, type: question_answering}
  broken: {data: broken.jsonl, type: multiple_choice}
"""
QUESTIONS = {
    "cloze": [{"context": "the cat sat", "continuation": end} for end in ("on", "up", "at")],
    "choice": [{"query": "the dog", "choices": ["sat", "xyz", "log"], "gold": n} for n in (0, 1)],
    "answers": [{"context": "where?", "answer": "mat", "aliases": ["mat", "log"]}],
    "broken": [{"query": "the dog", "choices": ["sat"], "gold": 7}],
}


@pytest.fixture(scope="module")
def folder(write_words, tmp_path_factory):
    return write_words(tmp_path_factory.mktemp("data"), QUESTIONS, TASKS)


@pytest.fixture
def write(folder, tmp_path):
    """Writes the config of a testbed, the grid's cell as given, and says what its runs are."""

    def make(tasks=None, checkpoint=None, mesh=None, more=None, **cell):
        content = {
            "name": "pair",
            "run": {
                "model": {"width": 16, "layers": 1, "heads": 2, "vocabulary_size": 264},
                "data": {"validation": ["words"], "folder": str(folder)},
                "batch_size": 8,
                "optimizer": {"warmup_steps": 2},
                "evaluation": {"sequences": 8, "batch_size": 8, "bootstrap_samples": 10},
                "checkpoint": checkpoint or {},
                "mesh": mesh or {},
            },
            "sizes": {"s": {}, "t": {"model": {"layers": 2}}},
            "grid": [{"role": "fit", "datasets": ["words"], "sizes": ["s"]} | cell],
        }
        content["run"]["model"]["sequence_length"] = 16
        content["grid"] += [more] if more else []
        if tasks:
            content["run"]["evaluation"]["tasks"] = tasks
        path = tmp_path / "pair.yaml"
        path.write_text(json.dumps(content))
        return path, grid.expand(configs.build(TestbedConfig, content, source="pair.yaml"))

    return make


def losses(runs, folder):
    curves = runner.curves(runs, folder)
    return {run.name: curves[run.name]["loss"] for run in runs}


def trainers(runs, folder):
    """The processes that had a claim of any run."""
    files = (file for run in runs for file in run.folder(folder).glob("claims/*.json"))
    return {json.loads(file.read_text())["pid"] for file in files}


def test_runs_are_trained_and_scored_on_tasks_together(jobs, write, folder, tmp_path):
    path, runs = write(tasks={"config": str(folder / "own.yaml")}, token_multipliers=[0.05])
    ends = {}
    for processes in (2, 1):
        job = jobs(path, tmp_path / str(processes), processes, command="testbed run")
        ends[processes] = job.ends()
        assert ends[processes][0][0] == 2  # too few runs for a law
    (_, _, first), (other, silent, _) = ends[2]
    assert other == 0
    assert "left out: broken" in first
    assert not printed(silent)
    tables = [records.read(tmp_path / str(processes) / "records.csv") for processes in (2, 1)]
    scores = [name for name in map(str, tables[0]) if name.startswith("error/")]
    assert {"error/cloze", "error/choice", "error/answers"} <= set(scores)
    for name in ("loss/words", *scores):
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=1e-5)
    run = runs[0].folder(tmp_path / "2")
    (kept,) = (run / "evaluations").glob("own/*/choice-*.json")
    before = kept.stat().st_mtime_ns
    kept.with_name(next(kept.parent.glob("cloze-*.json")).name).unlink()
    again = jobs(run, None, 2, "--tasks", str(folder / "own.yaml"), command="evaluate")
    assert [code for code, *_ in again.ends()] == [2, 2]  # one task is left out
    assert list(kept.parent.glob("cloze-*.json"))
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("slots", "where"),
    [((), "2 slots of 1 device"), (("--slots=1",), "1 slot of 2 devices")],
)
def test_each_host_packs_the_runs_that_it_can_claim(jobs, write, tmp_path, slots, where):
    path, runs = write(token_multipliers=[0.1, 0.4], seeds=[0, 1, 2, 3])
    packed = jobs(path, tmp_path / "packed", 2, "--pack", *slots, command="testbed run")
    ends = packed.ends()
    assert [code for code, *_ in ends] == [2, 0], ends  # too few runs for a law
    assert f"8 runs of s in {where}, on each of 2 hosts" in ends[0][1]
    assert len(trainers(runs, tmp_path / "packed")) == 2
    alone = jobs(path, tmp_path / "alone", 1, command="testbed run")
    assert alone.ends()[0][0] == 2
    found, expected = (losses(runs, tmp_path / name) for name in ("packed", "alone"))
    for name, curve in expected.items():
        np.testing.assert_allclose(found[name], curve, rtol=0, atol=1e-5)


@pytest.mark.parametrize("asked", [(0,), (1,), (1, 0)])
def test_asked_to_stop_all_hosts_save_what_they_have(jobs, write, tmp_path, asked):
    """One of them is asked, or both, the second when it has heard of it already."""
    path, runs = write(token_multipliers=[100], seeds=[0, 1, 2, 3])
    out = tmp_path / "bed"
    job = jobs(path, out, 2, *PACKED, command="testbed run")
    job.wait_for_step(5, *(run.folder(out) for run in runs))
    for number in asked:
        job.processes[number].send_signal(signal.SIGTERM)
        time.sleep(1.2)
    ends = job.ends()
    assert [code for code, *_ in ends] == [128 + signal.SIGTERM] * 2, ends
    assert all("stopped and saved" in err.splitlines()[-1] for *_, err in ends), ends
    written = [len(lines(run.folder(out))) for run in runs]
    steps = [checkpoint.latest_step(run.folder(out) / "checkpoints") for run in runs]
    assert steps == written
    assert max(written) < runs[0].budget.steps


def test_what_is_left_is_trained_by_all_hosts_together(jobs, write, tmp_path):
    """They have saved different numbers of times when they meet."""
    path, runs = write(
        token_multipliers=[0.1],
        seeds=[0, 1, 2],
        more={
            "role": "held_out",
            "datasets": ["words"],
            "sizes": ["t"],
            "token_multipliers": [0.05],
        },
        mesh={"data": -1, "fsdp": 2},
        checkpoint={"every_steps": 4},
    )
    out = tmp_path / "bed"
    job = jobs(path, out, 2, "--pack", "--slots=1", command="testbed run")
    ends = job.ends()
    assert [code for code, *_ in ends] == [2, 0], ends  # too few runs for a law
    assert "alone: words-t-m0.05" in ends[0][1]
    assert not [err for *_, err in ends if "damaged" in err]
    alone = jobs(path, tmp_path / "alone", 1, command="testbed run")
    assert alone.ends()[0][0] == 2
    found, expected = losses(runs, out), losses(runs, tmp_path / "alone")
    for name, curve in expected.items():
        np.testing.assert_allclose(found[name], curve, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("own", "mistake"),
    [("--slots=0", "slots=0: 1 or more"), ("run.data.folder=nowhere", "nowhere/words/")],
)
def test_a_mistake_of_one_host_ends_all_with_its_code(jobs, write, tmp_path, own, mistake):
    """Before anything is trained, or when the other one trains: that lets its runs go."""
    path, runs = write(token_multipliers=[4], seeds=[0, 1, 2, 3])
    out = tmp_path / "bed"
    job = jobs(path, out, 2, "--pack", command="testbed run", own=own)
    (code, _, first), (own_code, _, last) = job.ends()
    assert (code, own_code) == (2, 2)
    assert mistake in last.splitlines()[-1]
    assert mistake in first.splitlines()[-1]
    assert not any(claims.holder(run.folder(out)) for run in runs)


def test_a_killed_host_ends_the_others_and_the_rerun_is_the_same(jobs, write, tmp_path):
    path, runs = write(token_multipliers=[10], seeds=[0, 1, 2, 3], checkpoint={"every_steps": 100})
    out = tmp_path / "bed"
    job = jobs(path, out, 2, *PACKED, command="testbed run")
    job.wait_for_step(150, *(run.folder(out) for run in runs))
    job.processes[1].kill()
    code, _, err = job.end(0)
    assert code == 75
    assert "lost process 1" in err.splitlines()[-1]
    again = jobs(path, out, 2, *PACKED, command="testbed run").ends()
    assert [code for code, *_ in again] == [2, 0], again
    whole = jobs(path, tmp_path / "whole", 2, *PACKED, command="testbed run").ends()
    assert [code for code, *_ in whole] == [2, 0], whole
    found, expected = losses(runs, out), losses(runs, tmp_path / "whole")
    assert all(np.array_equal(found[name], curve) for name, curve in expected.items())
