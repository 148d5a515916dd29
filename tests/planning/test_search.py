"""The search for a mesh: what it returns fits and divides, and refusals say what would help."""

import dataclasses
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from scaling_jax import config as configs
from scaling_jax.config import MeshConfig, ModelConfig, RunConfig
from scaling_jax.errors import UserError
from scaling_jax.planning import search, slices
from scaling_jax.planning.search import USABLE, Free, Machine

FREE = Free()
FIXED = Free(mesh=False, microbatches=False, remat=False)


def run(size="411m", batch=512, **changes) -> RunConfig:
    content = {
        "model": f"models/{size}.yaml",
        "data": {"dataset": "rpj", "validation": ["c4_val"]},
        "batch_size": batch,
        "token_multiplier": 20,
    }
    from scaling_jax import config_files

    model = config_files.read(content["model"]) | changes.pop("model", {})
    return configs.build(RunConfig, content | {"model": model} | changes, source="test")


def machine(name="v5e-64", count=1) -> Machine:
    return Machine.of(slices.find(name), count)


@pytest.mark.parametrize("size", ["11m", "79m", "154m", "411m", "1b", "7b"])
@pytest.mark.parametrize("name", ["v5e-64", "v5p-128", "v4-64"])
def test_the_best_fits_divides_and_fills_the_slice(size, name):
    layouts = search.search(run(size), machine(name), FREE, 0.4)
    chip = slices.find(name).chip
    for layout in layouts:
        mesh = layout.mesh
        assert mesh.data * mesh.fsdp * mesh.tensor == slices.find(name).chips
        assert 512 % (mesh.data * mesh.fsdp * layout.microbatches) == 0
        assert layout.model.heads % mesh.tensor == 0
        assert layout.memory.peak <= USABLE * chip.hbm_bytes
    times = [layout.time.total for layout in layouts]
    assert times == sorted(times)


def test_a_big_model_is_split_and_a_small_one_is_not():
    assert search.search(run("7b"), machine("v5p-128"), FREE, 0.4)[0].mesh.fsdp > 1
    assert search.search(run("11m", 64), machine("v5p-128"), FREE, 0.4)[0].mesh.data == 64


def test_what_the_config_states_is_kept():
    stated = run("411m", mesh={"data": 8, "fsdp": -1}, microbatches=2)
    (layout,) = search.search(stated, machine("v5e-64"), FIXED, 0.4)
    assert layout.mesh == MeshConfig(8, 8, 1)
    assert layout.microbatches == 2
    assert layout.model.remat == "block"
    assert layout.settings == {
        "mesh.data": 8,
        "mesh.fsdp": 8,
        "mesh.tensor": 1,
        "microbatches": 2,
        "model.remat": "block",
    }


def test_free_is_what_a_config_does_not_say():
    assert Free.unstated({"model": {"width": 8}}) == FREE
    assert Free.unstated({"mesh": {"slices": 2}, "model": {}}).mesh
    assert Free.unstated({"mesh": {"data": 2}, "microbatches": 1, "model": {"remat": "none"}}) == (
        FIXED
    )


def test_slices_are_part_of_the_mesh():
    layout = search.search(run(), machine("v5e-64", 2), FREE, 0.4)[0]
    assert layout.mesh.slices == 2
    assert layout.settings["mesh.slices"] == 2


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ({"data": 3}, "mesh: data=3, fsdp=1, tensor=1, slices=1 cannot be laid on v5e-64"),
        ({"data": 128}, "which has 64 chips"),
        ({"data": 1, "tensor": 64}, "heads=8 cannot be split evenly over tensor=64"),
    ],
)
def test_a_mesh_that_does_not_go_with_the_slice_is_one_line(mesh, words):
    with pytest.raises(UserError) as error:
        search.search(run(mesh=mesh), machine(), FIXED, 0.4)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_batch_that_cannot_be_split_is_one_line():
    with pytest.raises(UserError, match="batch_size=500 cannot be split evenly into 64 parts"):
        search.search(run(batch=500), machine(), FIXED, 0.4)
    with pytest.raises(UserError, match="a smaller slice or a larger batch would do"):
        search.search(run(batch=3), machine(), FREE, 0.4)


def test_a_model_that_does_not_fit_says_by_how_much_and_what_would():
    alone = run("7b", 64, mesh={"data": 64}, microbatches=1)
    with pytest.raises(UserError, match=r"does not fit v5e-64: .* GiB more than 90%") as error:
        search.search(alone, machine(), FIXED, 0.4)
    told = str(error.value).partition("what fits: ")[2].split()
    told_settings = dict(pair.split("=") for pair in told)
    axes = {"data": 64, "fsdp": 1, "tensor": 1}
    axes |= {k[5:]: int(v) for k, v in told_settings.items() if k.startswith("mesh.")}
    changed = dataclasses.replace(
        alone,
        mesh=MeshConfig(**axes),
        microbatches=int(told_settings.get("microbatches", 1)),
        model=dataclasses.replace(alone.model, remat=told_settings.get("model.remat", "block")),
    )
    assert search.search(changed, machine(), FIXED, 0.4)


def test_a_model_that_needs_more_chips_names_a_slice_that_is_enough():
    with pytest.raises(UserError, match=r"does not fit v5e-4: .*; .* would fit") as error:
        search.search(run("7b", 256), machine("v5e-4"), FREE, 0.4)
    named = str(error.value).split("; ")[-1].split()[0]
    assert search.search(run("7b", 256), machine(named), FREE, 0.4)
    huge = {"width": 65536, "heads": 512, "layers": 512}
    with pytest.raises(UserError, match="no slice would fit"):
        search.search(run("7b", 64, model=huge), machine("v5e-64"), FREE, 0.4)


@settings(max_examples=20)
@given(
    width=st.sampled_from([64, 96, 256, 1024]),
    batch=st.integers(1, 600),
    name=st.sampled_from(["v5e-1", "v5e-8", "v4-16", "v6e-32", "v5p-64"]),
)
def test_any_run_is_planned_or_refused_in_one_line(width, batch, name):
    model = ModelConfig(width, 4, 4, 512, 128)
    config = dataclasses.replace(run("11m", batch), model=model)
    try:
        found = search.search(config, machine(name), FREE, 0.4)[0].time.total
    except UserError as error:
        found = str(error)
    chips = slices.find(name).chips
    if isinstance(found, str):
        assert "cannot be split evenly" in found
        assert "\n" not in found
        assert math.gcd(batch, chips) < chips
    else:
        assert found > 0
