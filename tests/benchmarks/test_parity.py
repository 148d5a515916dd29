"""Golden runs: of open_lm where they are, and one made here of every odd shape."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
from golden import Golden

from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import transformer
from scaling_jax.models.loss import token_loss
from scaling_jax.training import optimizer, state, step
from scaling_jax.training.optimizer import Hyperparameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

SCRIPT = Path(parity.__file__)
SETTINGS = {
    "hidden_dim": 20,  # heads of 10: an odd multiple of 2
    "n_layers": 2,
    "n_heads": 2,
    "vocab_size": 300,
    "seq_len": 7,
    "batch": 6,
    "steps": 5,
    "warmup": 9,  # longer than the run
    "lr": 0.02,
    "min_lr": 0.0,
    "weight_decay": 0.3,
    "beta1": 0.8,
    "beta2": 0.99,
    "eps": 1e-6,
    "clip": 0.5,
    "z_loss": 0.01,
    "qk_norm": False,
    "norm": "gain_only_lp_layer_norm",
    "accum_freq": 3,
    "seed": 5,
}


def test_the_first_step_is_that_of_open_lm(golden):
    found = parity.compare_first_step(golden)
    assert len(found) == 14
    assert [each for each in found if not each.within] == []


def test_bfloat16_logits_are_near_those_of_open_lm_under_autocast(golden):
    (found,) = parity.compare_bfloat16(golden)
    assert 1e-3 < found.deviation <= found.tolerance


@pytest.mark.slow
def test_training_is_that_of_open_lm(golden):
    done = run(golden.path)
    assert done.stdout.splitlines()[-1].endswith("30 of 30 within their tolerances")
    assert done.returncode == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A golden run of our own parts: it shows that the script hands over what it is given."""
    path = tmp_path_factory.mktemp("golden") / "made.npz"
    path.with_suffix(".json").write_text(json.dumps(SETTINGS))
    model = ModelConfig(
        width=20, layers=2, heads=2, vocabulary_size=300, sequence_length=7, qk_norm=False
    )
    random = np.random.default_rng(0)
    tokens = random.integers(0, 300, (5, 6, 8)).astype(np.int32)
    layout = jax.eval_shape(lambda: transformer.initialize(model, jax.random.key(0)))
    params = jax.tree.map(
        lambda leaf: random.normal(leaf.ndim < 3, 0.3, leaf.shape).astype(np.float32), layout
    )
    hyper = Hyperparameters(
        learning_rate=0.02,
        minimum_learning_rate=0.0,
        learning_rate_floor=0.0,
        warmup_steps=9.0,
        total_steps=5.0,
        weight_decay=0.3,
        beta1=0.8,
        beta2=0.99,
        epsilon=1e-6,
        gradient_clip_norm=0.5,
        z_loss_weight=0.01,
    )

    @jax.jit
    def loss(params):
        scores = token_loss(transformer.bind(model, params)(tokens[0][:, :-1]), tokens[0][:, 1:])
        return scores.cross_entropy.mean() + 0.01 * (scores.log_normalizer**2).mean()

    def logits(params, dtype):
        config = dataclasses.replace(model, compute_dtype=dtype, rope_frequency_dtype=dtype)
        return jax.jit(lambda p: transformer.bind(config, p)(tokens[0][:, :-1]))(params)

    current = state.TrainState(
        params=params, moments=optimizer.initial_moments(params), step=jnp.int32(0)
    )
    train_step, metrics = jax.jit(step.train_step, static_argnums=(0, 1)), []
    for rows in tokens:
        current, found = train_step(model, 1, current, rows, hyper)
        metrics.append(found)
    metrics = step.Metrics(*np.array(metrics, np.float64).T)
    np.savez(
        path,
        tokens=tokens,
        logits0=logits(params, "float32"),
        logits_final_bf16_autocast=logits(current["params"], "bfloat16"),
        train_loss=metrics.loss + metrics.z_loss,
        ce_loss=metrics.loss,
        grad_norm=metrics.gradient_norm,
        lr=metrics.learning_rate,
        **named("init", params),
        **named("grad0", jax.grad(loss)(params)),
        **named("final", current["params"]),
    )
    return path


def named(group, params):
    """`params` under open_lm's names."""
    arrays = {
        "tok_embeddings": params["embedding"],
        "output": params["output"].T,
        "norm": params["norm"]["gain"],
    }
    for number in range(2):
        layer = jax.tree.map(lambda leaf, number=number: leaf[number], params["blocks"])
        arrays |= {
            f"layers.{number}.{name}": weight
            for name, weight in {
                "attention.in_proj": layer["attention"]["qkv"].reshape(20, -1).T,
                "attention.out_proj": layer["attention"]["out"].T,
                "feed_forward.w12": layer["feed_forward"]["gate_up"].reshape(20, -1).T,
                "feed_forward.w3": layer["feed_forward"]["down"].T,
                "attention_norm": layer["attention_norm"]["gain"],
                "ffn_norm": layer["feed_forward_norm"]["gain"],
            }.items()
        }
    return {f"{group}/{name}.weight": array for name, array in arrays.items()}


def changed(path, folder, settings=None, **arrays):
    """A copy of a golden run with other settings or arrays; an array None is left out."""
    content = dict(np.load(path)) | arrays
    copy = folder / "changed.npz"
    np.savez(copy, **{key: array for key, array in content.items() if array is not None})
    known = json.loads(path.with_suffix(".json").read_text())
    copy.with_suffix(".json").write_text(json.dumps(known | (settings or {})))
    return copy


@pytest.mark.slow
def test_any_shape_accumulation_and_a_warm_up_longer_than_the_run(made, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    with pytest.warns(UserWarning, match="warm-up"):
        found = parity.compare(Golden.load(made))
    assert {each.quantity for each in found} >= {"logits0", "grad_norm", "final embedding"}
    assert [each for each in found if not each.within] == []


def test_what_differs_is_beyond_its_tolerance(made, tmp_path, monkeypatch, capsys):
    arrays = dict(np.load(made))
    name = "final/layers.1.feed_forward.w3.weight"
    rate = arrays["lr"] * [1, 1, 1, 1 + 2e-4, 1]
    other = changed(made, tmp_path, **{name: arrays[name] * 1.002, "lr": rate})
    monkeypatch.setattr(jax, "devices", lambda: jax.local_devices()[:1])
    monkeypatch.setattr("sys.argv", ["parity.py", str(other)])
    with pytest.warns(UserWarning, match="warm-up"), pytest.raises(SystemExit) as stopped:
        parity.main()
    assert stopped.value.code == 1
    beyond = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "BEYOND" in line]
    assert beyond == [["lr", "relative,"], ["final", "blocks.feed_forward.down"]]


@pytest.mark.parametrize(
    ("settings", "arrays", "message"),
    [
        ({"norm": "lp_layer_norm"}, {}, "norm 'lp_layer_norm' is not supported"),
        ({"n_heads": 3}, {}, "heads=3 does not divide width=20"),
        ({"hidden_dim": 40}, {}, r"init/\* are of a model with width=20, .* means 40"),
        ({"n_layers": 3}, {}, r"init/\* are of a model with layers=2, .* means 3"),
        ({"qk_norm": True}, {}, r"init/\* are of a model with qk_norm=False, .* means True"),
        ({"steps": 6}, {}, r"'tokens' is \(5, 6, 8\), changed.json means \(6, 6, 8\)"),
        ({"lr": "fast"}, {}, "changed.json: lr: .*number"),
        ({"accum_freq": 4}, {}, "microbatches=4 does not divide"),
        ({}, {"grad_norm": None}, "no array 'grad_norm'"),
        ({}, {"grad0/norm.weight": None}, r"grad0/\*: 'norm.weight' is missing"),
        ({}, {"final/norm.weight": np.zeros(3)}, r"final/\*: 'norm.weight' has shape \(3,\)"),
        ({}, {"tokens": np.full((5, 6, 8), 300)}, "not below vocab_size=300"),
    ],
    ids=str,
)
def test_a_file_that_is_no_such_run_is_refused_in_one_line(
    made, tmp_path, settings, arrays, message
):
    with pytest.raises(UserError, match=message) as caught:
        Golden.load(changed(made, tmp_path, settings, **arrays))
    assert "\n" not in str(caught.value)
    assert "changed." in str(caught.value)


def test_missing_and_foreign_files_end_with_code_2(made, tmp_path, monkeypatch, capsys):
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "alone.npz").write_bytes(made.read_bytes())
    (tmp_path / "cut.npz").write_bytes(made.read_bytes()[:5000])
    (tmp_path / "odd.npz").write_bytes(made.read_bytes())
    (tmp_path / "odd.json").write_text("{")
    for name, message in {
        "nowhere.npz": "nowhere.npz: no such file",
        "text.npz": "text.npz: not an .npz of arrays",
        "cut.npz": "cut.npz: not an .npz of arrays",
        "alone.npz": "alone.json: no such file",
        "odd.npz": "odd.json: ",
    }.items():
        monkeypatch.setattr("sys.argv", ["parity.py", str(tmp_path / name)])
        with pytest.raises(SystemExit) as stopped:
            parity.main()
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def run(path):
    """The script as a user starts it, on one device."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, str(SCRIPT), str(path)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)
