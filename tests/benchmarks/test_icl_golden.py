"""Downstream tasks against composer's own output, where that is; and what the script reports."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import icl_golden
import numpy as np
import pytest
from tiny_neox import TinyNeoX, draw_weights

SHARED = Path(__file__).parents[2] / ".." / "shared"
FOLDER = SHARED / "golden" / "icl"
GOLDEN = {
    "prompts": FOLDER / "prompts_composer_v0.17.2.json",
    "scores": FOLDER / "scores_tiny_neox.json",
}
DATA = SHARED / "data" / "icl"
TOKENIZER = SHARED / "data" / "tokenizer" / "20B_tokenizer.json"

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"composer's output is not there: {FOLDER}"),
    pytest.mark.skipif(not TOKENIZER.is_file(), reason=f"no tokenizer: {TOKENIZER}"),
]


def run(**files):
    given = {"data": DATA, "tokenizer": TOKENIZER, **files}
    arguments = [text for name, path in given.items() for text in (f"--{name}", str(path))]
    return subprocess.run(
        [sys.executable, icl_golden.__file__, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def part(tmp_path, prompts=(), scores=(), **changes):
    """Files that hold a part of the golden tasks; `changes` are laid over each task's prompts."""
    files = {}
    for kind, names in (("prompts", prompts), ("scores", scores)):
        golden = json.loads(GOLDEN[kind].read_text())
        kept = {name: golden[name] for name in names}
        if kind == "prompts":
            kept = {name: each | changes for name, each in kept.items()}
        files[kind] = tmp_path / f"{kind}.json"
        files[kind].write_text(json.dumps(kept))
    return files


def test_some_tasks_of_every_type(tmp_path):
    prompts = ["winogender_mc_female", "winograd", "bigbench_repeat_copy_logic", "agi_eval_lsat_ar"]
    scores = ["winograd", "copa", "bigbench_dyck_languages", "triviaqa_sm_sub"]
    done = run(**part(tmp_path, prompts, scores))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 of 7 tasks are as composer has them" in done.stdout
    assert "273 prompts equal   48 scored" in done.stdout


@pytest.mark.slow
def test_every_task():
    done = run(**GOLDEN)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_difference_is_named_and_fails(tmp_path):
    files = part(tmp_path, ["copa"], ["copa"], n=101, sha256="0" * 64)
    scores = json.loads(files["scores"].read_text())
    first = scores["copa"]["categories"][""]["examples"][0]
    first["pred"] = 1 - first["pred"]
    first["choices"][0]["mean_nll_f32"] += 2e-4
    scores["nonsense"] = scores["copa"]
    files["scores"].write_text(json.dumps(scores))
    done = run(**files)
    assert done.returncode == 1
    copa, nonsense = done.stdout.splitlines()[:2]
    for words in ("questions: 100, not 101", "sha256", "question 0: prediction", "2.0e-04"):
        assert words in copa
    assert "no such task" in nonsense


def test_files_that_are_no_golden_ones(tmp_path):
    files = part(tmp_path)
    assert run(**files | {"scores": tmp_path / "none.json"}).returncode == 2
    assert run(**files, tokenizer=files["scores"]).returncode == 2
    assert run(**files, data=tmp_path / "none").returncode == 2
    files["scores"].write_text("[]")
    done = run(**files)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_the_tiny_model_is_the_one_that_composer_scored():
    spec = importlib.util.spec_from_file_location("tiny", FOLDER / "tiny_neox_numpy.py")
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    weights = theirs.weights()
    assert {name.removeprefix("gpt_neox.") for name in weights} == set(draw_weights())
    ids = np.random.default_rng(0).integers(0, theirs.V, 60).astype(np.int32)
    wanted, likeliest = theirs.token_logprobs(weights, ids.tolist(), 20)
    positions = np.arange(19, 59, dtype=np.int32)[None]
    found = TinyNeoX()(ids[None], positions, ids[None, 20:])
    np.testing.assert_allclose(found.log_probability[0], wanted, atol=5e-5)
    assert (found.likeliest[0] == likeliest).all()
