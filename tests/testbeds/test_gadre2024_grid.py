"""The packaged testbed of the paper, run by run beside the release."""

import json
import warnings
from pathlib import Path

import pytest

from scaling_jax import cli
from scaling_jax import config as configs
from scaling_jax.config import TestbedConfig
from scaling_jax.testbeds import grid, published

CONFIG = "testbeds/gadre2024.yaml"
GADRE = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
needs_gadre = pytest.mark.skipif(not GADRE.is_dir(), reason="the released testbed is not here")
LENGTH, EPOCHS = 2048, 5
DATASETS = ("c4_original", "rpj", "rw_original")


@pytest.fixture(scope="module")
def runs():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "warm-up")
        return grid.expand(configs.load(TestbedConfig, CONFIG), source=CONFIG)


def key(dataset, params, multiplier):
    return dataset, params, float(multiplier)


@pytest.fixture(scope="module")
def planned(runs):
    return {
        key(run.config.data.dataset, run.budget.params, run.token_multiplier): run for run in runs
    }


@needs_gadre
def test_params_tokens_steps_and_flops_are_those_of_the_released_table(planned):
    table = published.gadre2024(GADRE)
    left = dict(planned)
    assert len(table) == len(left) == 104
    for row in table.to_dict("records"):
        run = left.pop(key(row["dataset"], row["params"], row["token_multiplier"]))
        budget = run.budget
        assert budget.params == row["params"]
        assert budget.tokens_asked == row["tokens"]
        assert budget.flops_asked == row["flops_6nd"]
        assert 0 <= row["tokens"] - budget.tokens < run.config.batch_size * LENGTH
        # open_lm counts whole sequences of each of five epochs, then whole batches.
        sequences = row["tokens"] // EPOCHS // LENGTH * EPOCHS
        assert budget.steps == sequences // run.config.batch_size
    assert not left


@needs_gadre
def test_settings_are_those_of_the_release(planned):
    contradicting = []
    for path in sorted((GADRE / "exp_data" / "models").glob("*.json")):
        released = json.loads(path.read_text())
        told, words = released["hyperparameters"], released["open_lm_args"]
        asked = {word: words[place + 1] for place, word in enumerate(words[:-1])}
        multiplier = 20 * told["chinchilla_multiplier"]
        run = planned[key(released["dataset_name"], told["params"], multiplier)].config
        assert run.optimizer.learning_rate == told["lr"]
        assert run.optimizer.minimum_learning_rate == told["cd"]
        assert run.optimizer.warmup_steps == told["warmup"]
        assert run.optimizer.weight_decay == told["wd"]
        assert run.optimizer.beta2 == float(asked["--beta2"])
        assert run.optimizer.gradient_clip_norm == float(asked["--grad-clip-norm"])
        assert run.batch_size == int(asked["--global-batch-size"])
        assert run.z_loss_weight == told["z_loss"]
        assert run.model.qk_norm == told["qk_norm"]
        assert run.model.rope_frequency_dtype == run.model.compute_dtype == "bfloat16"
        assert set(run.data.validation) == set(published.VALIDATION_SETS.values())
        if EPOCHS * int(asked["--train-num-samples"]) != told["tokens"]:
            contradicting.append(path.stem)
    # The configs of these two sizes say so.
    assert contradicting == [
        "c4_original-open_lm_7b-1.0",
        "rpj-open_lm_7b-1.0",
        "rw_original-d=576_l=24_h=8-4.0",
        "rw_original-d=576_l=24_h=8-8.0",
        "rw_original-open_lm_7b-1.0",
    ]


def test_laws_are_fitted_to_the_runs_of_table_1(runs):
    fitted = [run for run in runs if run.role == "fit"]
    assert {run.config.data.dataset for run in runs} == set(DATASETS)
    assert {(run.config.model.name, run.token_multiplier) for run in fitted} == {
        ("11m", 20),
        ("11m", 320),
        ("79m", 20),
        ("154m", 20),
        ("411m", 20),
    }
    # Table 1: 2.414e19 FLOPs for each dataset, 2.03e19 for the largest run.
    cost = sum(run.budget.flops_6nd for run in fitted) / len(DATASETS)
    assert cost == pytest.approx(2.414e19, rel=1e-3)
    assert max(run.budget.flops_6nd for run in fitted) == pytest.approx(2.03e19, rel=5e-3)


@pytest.mark.filterwarnings("ignore:warm-up")
def test_status_lists_every_run_without_data(monkeypatch, capsys, tmp_path):
    words = ["testbed", "status", CONFIG, "--out", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["scaling-jax", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sum("waiting" in line for line in lines) == 104
    row = ["rpj-1b-m640", "held_out", "waiting", "0", "1,757,562"]
    assert [*row, "1,439,795,200", "921,468,928,000", "7.9604e+21"] in lines
    assert not (tmp_path / "out").exists()
