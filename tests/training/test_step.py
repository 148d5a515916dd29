import dataclasses
import math

import jax
import numpy as np
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.errors import UserError
from scaling_jax.models import counting, head, kernels, transformer
from scaling_jax.planning.collectives import collectives
from scaling_jax.training import budget, optimizer, state, step
from scaling_jax.training.optimizer import Hyperparameters

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 16


@pytest.fixture(scope="module")
def batches(model):
    random = np.random.default_rng(0)
    shape = (3, BATCH, model.sequence_length + 1)
    return random.integers(0, model.vocabulary_size, shape).astype(np.int32)


@pytest.fixture(scope="module")
def hyper(config):
    return optimizer.hyperparameters(config, budget.plan(config))


@pytest.fixture(scope="module")
def run(model, batches, hyper, make_mesh, fill):
    """The metrics of three steps from the same parameters, and the state after them."""

    def go(mesh_name, microbatches=1):
        mesh = make_mesh(mesh_name)
        train_step = step.compiled(model, BATCH, microbatches, mesh)
        layout = state.abstract(model, mesh)
        current = fill(layout)
        current["moments"] = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
            layout["moments"],
        )
        rows = meshes.sharding(mesh, ("batch", "length"))
        metrics = []
        for batch in batches:
            current, found = train_step(current, jax.device_put(batch, rows), hyper)
            metrics.append(found)
        return np.array(metrics), current

    return go


@pytest.fixture(scope="module")
def alone(run):
    return run("one")


@pytest.mark.parametrize(
    ("mesh_name", "microbatches"),
    [
        ("all", 1),
        ("one", 4),
        pytest.param("data", 1, marks=pytest.mark.slow),
        pytest.param("data", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
        pytest.param("tensor", 1, marks=pytest.mark.slow),
    ],
)
def test_steps_are_the_same_on_every_mesh_and_in_microbatches(run, alone, mesh_name, microbatches):
    metrics, after = run(mesh_name, microbatches)
    np.testing.assert_allclose(metrics, alone[0], rtol=1e-5)
    # Adam turns rounding in a gradient near 0 into a step of any size up to the rate.
    for one, other in zip(
        *map(jax.tree.leaves, (after["params"], alone[1]["params"])), strict=True
    ):
        assert np.linalg.norm(one - np.asarray(other)) < 1e-3 * np.linalg.norm(other)


@pytest.mark.parametrize(("mesh_name", "parts"), [("one", 4), ("data", 2)])
def test_a_platform_may_want_a_batch_in_parts(
    monkeypatch, model, run, alone, make_mesh, mesh_name, parts
):
    numbers = BATCH * model.sequence_length * counting.activations_per_token(model)
    most = numbers / meshes.batch_parts(make_mesh(mesh_name)) / (parts - 0.5)
    cpu = dataclasses.replace(kernels.CPU, most_activations=most)
    monkeypatch.setattr(kernels, "CPU", cpu)
    monkeypatch.setattr(step, "compiled", step.compiled.__wrapped__)  # forgets no program of others
    asked, mean_loss = [], head.mean_loss

    def counted(hidden, *others):
        asked.append(len(hidden))
        return mean_loss(hidden, *others)

    monkeypatch.setattr(head, "mean_loss", counted)
    metrics, _ = run(mesh_name)
    np.testing.assert_allclose(metrics, alone[0], rtol=1e-5)
    # Where devices hold copies of the parameters, each works through parts of its own rows.
    assert min(asked) == BATCH // parts // meshes.batch_parts(make_mesh(mesh_name))


@pytest.mark.parametrize("microbatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_copies_add_up_their_gradients_once_a_step(model, make_mesh, microbatches):
    """However many microbatches there are: on two slices all of it crosses the slower network."""
    text = step.lower(model, BATCH, microbatches, make_mesh("data")).compile().as_text()
    assert text is not None
    summed = sum(
        each.repeats * math.prod(each.shape)
        for each in collectives(text)
        if each.kind == "all-reduce" and each.shape
    )
    assert summed == counting.actual_params(model)


def test_metrics_are_those_of_the_parameters_before_the_update(
    model, batches, hyper, make_mesh, fill, alone
):
    params = jax.device_get(fill(state.abstract(model, make_mesh("one"))))["params"]
    logits = np.float64(transformer.bind(model, params)(batches[0][:, :-1]))
    normalizer = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, batches[0][:, 1:, None], -1)[..., 0]
    first = step.Metrics(*alone[0][0])
    assert first.loss == pytest.approx((normalizer - chosen).mean(), rel=1e-5)
    assert first.z_loss == pytest.approx(1e-4 * (normalizer**2).mean(), rel=1e-5)
    assert first.learning_rate == pytest.approx(0.01 / 3, rel=1e-5)
    assert first.gradient_norm > hyper.gradient_clip_norm
    assert int(alone[1]["step"]) == 3
    assert int(alone[1]["moments"].count) == 3


def test_the_old_state_gives_its_memory_to_the_new_one(model, batches, hyper, make_mesh, fill):
    mesh = make_mesh("one")
    before = fill(state.abstract(model, mesh))
    rows = jax.device_put(batches[0], meshes.sharding(mesh, ("batch", "length")))
    step.compiled(model, BATCH, 1, mesh)(before, rows, hyper)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before["params"]))


@pytest.mark.usefixtures("alone")
def test_runs_of_one_size_share_one_compilation(model, batches, hyper, make_mesh, fill, caplog):
    """Rate, budget and the rest are arguments of the compiled step."""
    mesh = make_mesh("one")
    current = fill(state.abstract(model, mesh))
    rows = jax.device_put(batches[0], meshes.sharding(mesh, ("batch", "length")))
    other = Hyperparameters(*(1.5 * value for value in hyper))
    with jax.log_compiles():
        _, metrics = step.compiled(model, BATCH, 1, mesh)(current, rows, other)
    assert metrics.learning_rate == pytest.approx(0.01 / 3)
    assert not [record for record in caplog.records if "compil" in record.message.lower()]


def test_a_batch_that_does_not_split_is_refused(model, make_mesh):
    with pytest.raises(UserError, match=r"batch_size=12 is not .* 8 x 1 x 1") as caught:
        step.compiled(model, 12, 1, make_mesh("data"))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"batch_size=8 is not divisible by .* 2 x 2 x 4"):
        step.compiled(dataclasses.replace(model), 8, 4, make_mesh("all"))
