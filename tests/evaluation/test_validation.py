import dataclasses
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from scaling_jax import config as configs
from scaling_jax import mesh as meshes
from scaling_jax.config import DataConfig, EvaluationConfig, MeshConfig, ModelConfig, RunConfig
from scaling_jax.data.shards import Shards
from scaling_jax.errors import UserError
from scaling_jax.evaluation import validation
from scaling_jax.models import transformer
from scaling_jax.training import state

pytestmark = pytest.mark.usefixtures("quick_compilation")
LENGTH, ROWS = 8, 37  # 333 validation tokens are 37 rows of nine


@pytest.fixture(scope="module")
def config(data_folder):
    return RunConfig(
        model=ModelConfig(width=16, layers=1, heads=2, vocabulary_size=40, sequence_length=LENGTH),
        data=DataConfig(dataset="walk", validation=("walk",), folder=str(data_folder)),
        batch_size=8,
        tokens=1000,
        evaluation=EvaluationConfig(sequences=1000, batch_size=16),
    )


@pytest.fixture(scope="module")
def params(config):
    layout = jax.eval_shape(lambda: transformer.initialize(config.model, jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: 0.5 * random.standard_normal(leaf.shape).astype(np.float32), layout
    )


@pytest.fixture(scope="module")
def by_hand(config, params, data_folder):
    """Mean loss and error of each validation row, in float64."""
    tokens = np.fromfile(data_folder / "walk/validation/tokens-00000-of-00001.u16", "<u2")
    rows = tokens.reshape(ROWS, LENGTH + 1).astype(np.int32)
    logits = np.float64(transformer.bind(config.model, params)(jnp.asarray(rows[:, :-1])))
    chosen = np.take_along_axis(logits, rows[:, 1:, None], -1)[..., 0]
    losses = (np.log(np.exp(logits).sum(-1)) - chosen).mean(1)
    errors = (logits.argmax(-1) != rows[:, 1:]).mean(1)
    return losses, errors


def changed(config, **changes):
    return dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, **changes))


def test_scores_are_those_of_a_computation_by_hand(config, params, by_hand):
    losses, errors = by_hand
    score = validation.evaluate(config, params)["walk"]
    assert score["loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert score["error"] == pytest.approx(errors.mean(), rel=1e-6)
    assert (score["sequences"], score["tokens"]) == (ROWS, ROWS * LENGTH)
    assert score["loss_low"] < score["loss"] < score["loss_high"]
    spread = 1.96 * losses.std() / math.sqrt(ROWS)
    assert score["loss_high"] - score["loss_low"] == pytest.approx(2 * spread, rel=0.15)


@pytest.mark.parametrize("batch_size", [1, 10, 37, 64, 1000])
def test_the_batch_size_does_not_matter(config, params, by_hand, batch_size):
    score = validation.evaluate(changed(config, batch_size=batch_size), params)["walk"]
    assert score["loss"] == pytest.approx(by_hand[0].mean(), rel=1e-6)
    assert score["error"] == pytest.approx(by_hand[1].mean(), rel=1e-6)


@pytest.mark.parametrize(
    ("devices", "mesh"), [(1, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, tensor=2))]
)
def test_the_mesh_does_not_matter(config, params, by_hand, monkeypatch, devices, mesh):
    present = jax.devices()[:devices]
    monkeypatch.setattr(jax, "devices", lambda: present)
    layout = state.abstract(config.model, meshes.make_mesh(mesh))["params"]
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), params, layout)
    score = validation.evaluate(dataclasses.replace(config, mesh=mesh), placed)["walk"]
    assert score["loss"] == pytest.approx(by_hand[0].mean(), rel=1e-6)
    assert score["error"] == pytest.approx(by_hand[1].mean(), rel=1e-6)


@pytest.mark.parametrize("sequences", [1, 2, 5, 36])
def test_fewer_rows_are_spread_evenly_and_are_the_same_for_every_run(
    config, params, by_hand, sequences
):
    chosen = [round(place) for place in np.linspace(0, ROWS - 1, sequences).tolist()]
    fewer = changed(config, sequences=sequences)
    scores = validation.evaluate(fewer, params)
    assert scores["walk"]["sequences"] == sequences == len(set(chosen))
    assert scores["walk"]["loss"] == pytest.approx(by_hand[0][chosen].mean(), rel=1e-6)
    assert validation.evaluate(dataclasses.replace(fewer, seed=9, batch_size=16), params) == scores


def test_bits_per_byte_are_those_of_the_whole_split(config, params, by_hand):
    """333 tokens, of which one is an end of text, for 332 bytes."""
    score = validation.evaluate(config, params)["walk"]
    assert score["bits_per_byte"] == pytest.approx(by_hand[0].mean() / math.log(2) * 333 / 332)


def test_without_text_there_are_no_bits_per_byte(config, params, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    index = tmp_path / "data" / "walk" / "validation" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_bytes": 0}))
    data = dataclasses.replace(config.data, folder=str(tmp_path / "data"))
    score = validation.evaluate(dataclasses.replace(config, data=data), params)["walk"]
    assert score["bits_per_byte"] is None


def test_any_split_is_a_validation_set(config, params, data_folder):
    data = dataclasses.replace(config.data, validation=("walk/train", "walk/validation", "walk"))
    scores = validation.evaluate(dataclasses.replace(config, data=data), params)
    assert scores["walk/validation"] == scores["walk"]
    assert scores["walk/train"]["sequences"] == 900 // (LENGTH + 1)


def test_a_model_that_knows_nothing_loses_the_log_of_its_vocabulary(config, params):
    blank = params | {"output": np.zeros_like(params["output"])}
    score = validation.evaluate(config, blank)["walk"]
    assert score["loss"] == pytest.approx(math.log(40), rel=1e-6)
    assert score["loss_low"] == pytest.approx(score["loss_high"])
    assert score["error"] == 1  # the argmax of equal logits is 0, which the data do not hold


@pytest.mark.parametrize("kind", ["normal", "exponential"])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_bounds_are_those_of_the_normal_approximation(kind, level):
    values = getattr(np.random.default_rng(1), kind)(size=1000)
    low, high = validation.bootstrap_bounds(values, samples=4000, level=level)
    half = scipy.special.ndtri((1 + level) / 2) * values.std() / math.sqrt(1000)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bounds_hold_the_true_mean_as_often_as_they_say():
    random = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        low, high = validation.bootstrap_bounds(random.exponential(size=100), samples=400)
        held += low < 1 < high
    assert held / 400 == pytest.approx(0.95, abs=0.04)


def test_bounds_of_one_value_are_the_value():
    assert validation.bootstrap_bounds(np.array([2.5]), samples=10) == (2.5, 2.5)


def test_scores_are_kept_and_read_again(config, params, tmp_path):
    scores = validation.evaluate(config, params)
    assert validation.read(tmp_path, 12) is None
    validation.write(scores, tmp_path, 12)
    assert validation.read(tmp_path, 12) == scores
    assert validation.read(tmp_path, 13) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.validation": ("wolk",)}, r"wolk/validation/index\.json: not found"),
        ({"data.validation": ("walk/test",)}, r"walk/test/index\.json: not found"),
        ({"model.vocabulary_size": 32}, "40 token ids, but model.vocabulary_size is 32"),
        ({"model.sequence_length": 333}, "holds no row of sequence_length=333"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(config, changes, message):
    content = dataclasses.asdict(config)
    for key, value in changes.items():
        section, name = key.split(".")
        content[section][name] = value
    wrong = configs.build(RunConfig, content, source="test")
    with pytest.raises(UserError, match=message) as caught:
        validation.evaluate(wrong, {})
    assert "\n" not in str(caught.value)


def test_the_last_row_of_a_set_can_be_scored(config, data_folder):
    shards = Shards.open(data_folder / "walk" / "validation")
    assert shards.row_count(LENGTH) == ROWS
    assert shards.row_count(332) == 1
