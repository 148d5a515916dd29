import dataclasses
import functools

import jax
import ml_dtypes
import numpy as np
import pytest

from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import openlm, torch_file, transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")

MODEL = ModelConfig(width=16, layers=2, heads=2, vocabulary_size=32, sequence_length=2048)


def random_params(model, seed=0):
    layout = jax.eval_shape(lambda: transformer.initialize(model, jax.random.key(0)))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype("f4"), layout)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(model, params, tokens):
    return transformer.bind(model, params)(tokens)


@pytest.fixture
def tensors():
    return openlm.from_params(MODEL, random_params(MODEL))


def test_names_and_shapes_are_those_of_the_golden_checkpoint(golden):
    path = golden.path.with_suffix(".pt")
    expected = torch_file.read(path)["state_dict"]
    found = openlm.from_params(golden.model(), golden.params("final"))
    assert [f"module.{name}" for name in found] == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[f"module.{name}"].dtype, name
        assert np.array_equal(tensor, expected[f"module.{name}"]), name  # inv_freq too


def test_a_golden_checkpoint_is_the_golden_model(golden):
    checkpoint = openlm.read(golden.path.with_suffix(".pt"))
    assert (checkpoint.epoch, checkpoint.step) == (1, None)
    settings = openlm.settings(checkpoint.tensors, "golden")
    model = dataclasses.asdict(golden.model())
    assert settings == {key: model[key] for key in settings}
    assert settings.keys() == {"width", "layers", "heads", "vocabulary_size", "qk_norm"}
    params = openlm.to_params(checkpoint.tensors)
    rows = golden.arrays["tokens"][0][:, :-1]
    config = golden.model(compute_dtype="bfloat16", rope_frequency_dtype="bfloat16")
    logits = logits_of(config, params, rows)
    expected = golden.arrays["logits_final_bf16_autocast"]
    assert np.linalg.norm(logits - expected) < 0.02 * np.linalg.norm(expected)


def test_logits_of_its_weights_are_those_of_open_lm(golden):
    weights = {
        name.removeprefix("init/"): array
        for name, array in golden.arrays.items()
        if name.startswith("init/")
    }
    rows = golden.arrays["tokens"][0][:, :-1]
    found = logits_of(golden.model(), openlm.to_params(weights), rows)
    np.testing.assert_allclose(found, golden.arrays["logits0"], atol=2e-5)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": False, "layers": 11}, {"norm": "rms_norm"}])
def test_there_and_back_is_bit_for_bit(tmp_path, changes, suffix):
    model = dataclasses.replace(MODEL, **changes)
    params = random_params(model)
    path = tmp_path / f"model{suffix}"
    openlm.write(path, openlm.from_params(model, params), "name", epoch=4, step=77)
    checkpoint = openlm.read(path)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, openlm.to_params(checkpoint.tensors)))
    known = suffix != ".safetensors"
    assert (checkpoint.epoch, checkpoint.step) == ((4, 77) if known else (None, None))
    settings = openlm.settings(checkpoint.tensors, "made")
    assert settings["layers"] == model.layers
    assert settings["heads"] == 2
    assert settings["qk_norm"] == model.qk_norm


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("wrapped", [True, False])
def test_every_way_in_which_training_saves_is_read(tmp_path, tensors, prefix, wrapped):
    content = {prefix + name: tensor for name, tensor in tensors.items()}
    path = tmp_path / "a.pt"
    torch_file.write(path, {"epoch": 2, "state_dict": content} if wrapped else content)
    found = openlm.read(path)
    assert list(found.tensors) == list(tensors)
    assert found.epoch == (2 if wrapped else None)


def test_half_precision_is_widened_exactly(tensors):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        rounded = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        params = openlm.to_params(rounded)
        back = openlm.from_params(MODEL, params)
        for name, tensor in rounded.items():
            assert back[name].dtype == np.float32
            if not name.endswith("inv_freq"):
                assert np.array_equal(back[name].astype(dtype), tensor)


def test_frequencies_are_kept_as_they_were(tensors):
    stored = np.array([1.0, 0.1, 0.02, 0.003], np.float32)
    back = openlm.from_params(MODEL, openlm.to_params(tensors), stored)
    kept = {name: tensor for name, tensor in back.items() if name.endswith("inv_freq")}
    assert len(kept) == MODEL.layers
    assert all(np.array_equal(tensor, stored) for tensor in kept.values())


def test_frequencies_that_were_saved_rounded_tell_it(tensors):
    rounded = {
        name: tensor.astype(ml_dtypes.bfloat16) if name.endswith("inv_freq") else tensor
        for name, tensor in tensors.items()
    }
    assert "rope_frequency_dtype" not in openlm.settings(tensors, "a")
    assert openlm.settings(rounded, "a")["rope_frequency_dtype"] == "bfloat16"


def test_without_frequencies_the_heads_are_unknown(tensors):
    bare = {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}
    assert openlm.settings(bare, "a") == {
        "width": 16, "layers": 2, "vocabulary_size": 32, "qk_norm": True,
    }  # fmt: skip


def changed(tensors, name, change):
    return tensors | {name: change(tensors[name])}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: {"wte.weight": t["output.weight"]}, "a.pt: no checkpoint of open_lm"),
        (
            lambda t: {
                name: part for name, part in t.items() if name != "layers.1.ffn_norm.weight"
            },
            "'layers.1.ffn_norm.weight' is missing",
        ),
        (
            lambda t: {name.replace("layers.1.", "layers.7."): part for name, part in t.items()},
            "'layers.1.attention.in_proj.weight' is missing",
        ),
        (
            lambda t: {name: part for name, part in t.items() if "layers" not in name},
            "layers: input should be greater than 0",
        ),
        (lambda t: t | {"norm.bias": t["norm.weight"]}, "'norm.bias' has no place"),
        (
            lambda t: t | {"layers.0.feed_forward.experts.mlp.w1": t["norm.weight"]},
            "without experts",
        ),
        (
            lambda t: changed(t, "output.weight", lambda w: w[:-1]),
            "'output.weight' has shape (31, 16) where open_lm has (32, 16)",
        ),
        (
            lambda t: changed(t, "layers.1.feed_forward.w12.weight", lambda w: w[:-2]),
            "'layers.1.feed_forward.w12.weight' has shape (510, 16)",
        ),
        (
            lambda t: changed(t, "norm.weight", lambda w: w.astype(np.float64)),
            "'norm.weight' is of type float64",
        ),
        (
            lambda t: changed(t, "layers.1.attention.pos_embed.inv_freq", lambda f: f * 2),
            "not the same in every layer",
        ),
        (
            lambda t: {n: p * 2 if n.endswith("inv_freq") else p for n, p in t.items()},
            "other frequencies than those of base 10000",
        ),
        (
            lambda t: {n: p[:3] if n.endswith("inv_freq") else p for n, p in t.items()},
            "fits no heads of width 16",
        ),
    ],
)
def test_what_is_no_checkpoint_of_open_lm_is_refused(tensors, make, message):
    with pytest.raises(UserError) as caught:
        openlm.settings(make(tensors), "a.pt")
    assert message in str(caught.value)
    assert str(caught.value).startswith("a.pt: ")


def test_steps_that_are_no_counts_are_left_out(tmp_path, tensors):
    for wrong in (-1, 1 << 31, "7", 7.0, True):
        torch_file.write(tmp_path / "a.pt", {"step": wrong, "epoch": wrong, "state_dict": tensors})
        checkpoint = openlm.read(tmp_path / "a.pt")
        assert (checkpoint.epoch, checkpoint.step) == (None, None)


def test_files_without_a_state_dict_are_refused(tmp_path):
    path = tmp_path / "optimizer_1.pt"
    torch_file.write(path, {"epoch": 1, "optimizer": {}})
    with pytest.raises(UserError, match=r"optimizer_1.pt: holds no state dict"):
        openlm.read(path)
    torch_file.write(path, {"epoch": 1, "state_dict": {}})
    with pytest.raises(UserError, match="holds no state dict"):
        openlm.read(path)
    with pytest.raises(UserError, match="its format is told by its suffix"):
        openlm.read(tmp_path / "model.ckpt")


def test_other_rotary_positions_are_not_exported(tensors):
    with pytest.raises(UserError, match="rope_base=10: open_lm always takes 10000"):
        openlm.from_params(dataclasses.replace(MODEL, rope_base=10.0), openlm.to_params(tensors))
