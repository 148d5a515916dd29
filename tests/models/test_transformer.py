import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
import scipy.stats

from scaling_jax import mesh as meshes
from scaling_jax.config import ModelConfig
from scaling_jax.models import kernels, transformer
from scaling_jax.models.loss import token_loss

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = ModelConfig(width=16, layers=2, heads=2, vocabulary_size=32, sequence_length=8)
SMALL = ModelConfig(width=64, layers=3, heads=4, vocabulary_size=256, sequence_length=8)


def random_params(config, seed=0):
    """Every number drawn, gains too: a gain of 1 that is left out would not be noticed."""
    layout = jax.eval_shape(lambda: transformer.initialize(config, jax.random.key(0)))
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (
            0.5 * random.standard_normal(leaf.shape) + (leaf.shape[-1:] == leaf.shape)
        ).astype(np.float32),
        layout,
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens):
    return transformer.bind(config, params)(tokens)


def reference_logits(config, params, tokens):
    """The model again, in float64 and with loops: pairs of a head are complex numbers here."""
    params = jax.tree.map(np.float64, params)
    length, width = tokens.shape[1], config.width
    half = width // config.heads // 2
    turns = np.exp(
        1j * np.outer(np.arange(length), config.rope_base ** (-2 * np.arange(half) / (2 * half)))
    )
    future = np.triu(np.full((length, length), -np.inf), 1)

    def normalise(x, gain):
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer_norm" else x
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    def turned(x, head):
        x = x[:, head * 2 * half : (head + 1) * 2 * half]
        return (x[:, :half] + 1j * x[:, half:]) * turns

    def block(x, layer):
        part = layer["attention"]
        inner = normalise(x, layer["attention_norm"]["gain"])
        query, key, value = (inner @ part["qkv"][:, which] for which in range(3))
        if config.qk_norm:
            query = normalise(query, part["query_norm"]["gain"])
            key = normalise(key, part["key_norm"]["gain"])
        mixed = np.empty_like(x)
        for head in range(config.heads):
            columns = slice(head * 2 * half, (head + 1) * 2 * half)
            scores = (turned(query, head) @ turned(key, head).conj().T).real / np.sqrt(2 * half)
            mixed[:, columns] = scipy.special.softmax(scores + future, -1) @ value[:, columns]
        x = x + mixed @ part["out"]
        inner = normalise(x, layer["feed_forward_norm"]["gain"])
        gate, up = (inner @ layer["feed_forward"]["gate_up"][:, which] for which in range(2))
        return x + (gate * scipy.special.expit(gate) * up) @ layer["feed_forward"]["down"]

    def sequence(ids):
        x = params["embedding"][ids]
        for depth in range(config.layers):
            x = block(x, jax.tree.map(lambda leaf, depth=depth: leaf[depth], params["blocks"]))
        return normalise(x, params["norm"]["gain"]) @ params["output"]

    return np.stack([sequence(ids) for ids in tokens])


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 32, (3, 8)).astype(np.int32)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False},
        {"norm": "rms_norm"},
        {"heads": 8, "rope_base": 100.0},
        {"heads": 1, "layers": 1},
    ],
)
def test_logits_are_those_of_a_plain_implementation(tokens, changes):
    config = dataclasses.replace(TINY, **changes)
    params = random_params(config)
    expected = reference_logits(config, params, tokens)
    assert np.abs(expected).max() > 1
    found = logits_of(config, params, tokens)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_gradients_are_finite_differences_of_a_plain_implementation(tokens):
    params = random_params(TINY)

    def loss(params):
        logits = logits_of(TINY, params, tokens[:, :-1])
        return token_loss(logits, tokens[:, 1:]).cross_entropy.mean()

    def reference_loss(params):
        logits = reference_logits(TINY, params, tokens[:, :-1])
        chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
        return (scipy.special.logsumexp(logits, axis=-1) - chosen).mean()

    gradients, structure = jax.tree.flatten(jax.jit(jax.grad(loss))(params))
    leaves = [np.float64(leaf) for leaf in jax.tree.leaves(params)]
    random = np.random.default_rng(2)
    for place, leaf in enumerate(leaves):
        direction = random.standard_normal(leaf.shape)
        moved = [
            [*leaves[:place], leaf + move * direction, *leaves[place + 1 :]]
            for move in (1e-5, -1e-5)
        ]
        up, down = (reference_loss(structure.unflatten(each)) for each in moved)
        slope = (gradients[place] * direction).sum()
        assert slope == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5)


def test_no_position_sees_a_later_one_and_each_sees_all_before():
    """With a token of its own at each position, rows of the embedding are the positions' inputs."""
    config = dataclasses.replace(TINY, layers=1)
    params = random_params(config)
    tokens = np.arange(8)[None]
    weights = np.random.default_rng(3).standard_normal(32)

    def read(embedding):
        return logits_of(config, params | {"embedding": embedding}, tokens)[0] @ weights

    slopes = jax.jacrev(read)(params["embedding"])[:, :8]
    seen = np.abs(slopes).max(axis=-1)
    assert np.array_equal(np.triu(seen, 1), np.zeros((8, 8)))
    assert seen[np.tril_indices(8)].min() > 1e-4


@pytest.mark.parametrize("heads", [1, 4, 8])
def test_rotation_tables_hold_the_angles_of_the_formula(heads):
    config = dataclasses.replace(TINY, heads=heads)
    width = 16 // heads
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(50)[:, None] * frequencies
    cosine, sine = transformer.rotation_tables(config, 50)
    np.testing.assert_allclose(cosine, np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sine, np.sin(angles), atol=1e-5)


def test_frequencies_rounded_to_bfloat16_turn_late_positions_as_in_the_papers_runs():
    """By 2.5 rad at position 2047 and up to 1.89 in the cosine, as measured on open_lm."""
    exact = ModelConfig(
        width=128, layers=1, heads=1, vocabulary_size=2, sequence_length=2, rope_base=10_000
    )
    rounded = dataclasses.replace(exact, rope_frequency_dtype="bfloat16")
    frequencies = (10_000.0 ** (-np.arange(64) / 64)).astype(ml_dtypes.bfloat16)
    cosine, sine = (np.float64(part) for part in transformer.rotation_tables(rounded, 2048))
    angles = np.arange(2048)[:, None] * frequencies.astype(np.float64)
    np.testing.assert_allclose(cosine, np.cos(angles), atol=1e-3)
    np.testing.assert_allclose(sine, np.sin(angles), atol=1e-3)
    exact_cosine, exact_sine = transformer.rotation_tables(exact, 2048)
    turned = np.angle((cosine + 1j * sine) * (exact_cosine - 1j * np.asarray(exact_sine)))
    assert np.abs(turned[2047]).max() == pytest.approx(2.5, abs=0.01)
    assert np.abs(cosine - exact_cosine).max() == pytest.approx(1.89, abs=0.01)


def test_attention_scores_depend_on_relative_positions_only():
    config = dataclasses.replace(TINY, heads=1)
    rotation = transformer.rotation_tables(config, 40)
    random = np.random.default_rng(4)
    query, key = (
        transformer.rotate(jnp.tile(random.standard_normal(16), (1, 40, 1, 1)), rotation)[0, :, 0]
        for _ in range(2)
    )
    scores = np.asarray(query @ key.T)
    for distance in range(-39, 40):
        diagonal = np.diagonal(scores, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert np.std(scores[20]) > 0.1


def test_rotation_keeps_lengths_and_leaves_the_first_position_alone():
    rotation = transformer.rotation_tables(TINY, 8)
    x = np.random.default_rng(5).standard_normal((2, 8, 2, 8)).astype(np.float32)
    turned = transformer.rotate(jnp.asarray(x), rotation)
    np.testing.assert_allclose(
        np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5
    )
    assert np.array_equal(turned[:, 0], x[:, 0])


@functools.partial(jax.jit, static_argnums=0)
def initialize(config, key):
    return transformer.initialize(config, key)


@pytest.fixture(scope="module")
def fresh():
    return initialize(SMALL, jax.random.key(0))


def test_initial_weights_are_normal_cut_off_at_three_deviations(fresh):
    """Deviations 1/sqrt(fan in), and towards the residual that over sqrt(2 (layer + 1))."""
    blocks, width, hidden = fresh["blocks"], 64, 256
    weights = {"embedding": (fresh["embedding"], width), "output": (fresh["output"], width)}
    for layer in range(3):
        shrunk = 2 * (layer + 1)
        part = jax.tree.map(lambda leaf, layer=layer: leaf[layer], blocks)
        weights |= {
            f"qkv {layer}": (part["attention"]["qkv"], width),
            f"out {layer}": (part["attention"]["out"], width * shrunk),
            f"gate_up {layer}": (part["feed_forward"]["gate_up"], width),
            f"down {layer}": (part["feed_forward"]["down"], hidden * shrunk),
        }
    for name, (weight, inverse_variance) in weights.items():
        scaled = np.ravel(weight) * np.sqrt(inverse_variance)
        assert np.abs(scaled).max() <= 3.0001, name
        assert scipy.stats.kstest(scaled, scipy.stats.truncnorm(-3, 3).cdf).pvalue > 1e-3, name
        assert np.std(scaled) == pytest.approx(0.9866, abs=4 / np.sqrt(2 * scaled.size)), name


def test_initial_weights_are_drawn_apart_and_gains_are_one(fresh):
    blocks = fresh["blocks"]
    weights = [fresh["embedding"].T, fresh["output"]]
    weights += [part for name in ("qkv", "out") for part in blocks["attention"][name]]
    weights += [part for name in ("gate_up", "down") for part in blocks["feed_forward"][name]]
    starts = np.stack([np.ravel(weight)[:4096] for weight in weights])
    mixed = np.corrcoef(starts) - np.eye(len(weights))
    assert np.abs(mixed).max() < 5 / np.sqrt(4096)
    gains = [leaf for path, leaf in jax.tree.leaves_with_path(fresh) if "gain" in str(path[-1])]
    assert len(gains) == 5
    assert all(np.all(gain == 1) for gain in gains)


def test_the_key_alone_decides_the_initial_weights():
    first, again, other = (initialize(SMALL, jax.random.key(seed)) for seed in (3, 3, 4))
    assert jax.tree.all(jax.tree.map(np.array_equal, first, again))
    assert not np.array_equal(first["embedding"], other["embedding"])


@pytest.fixture(scope="module")
def deep_gradients():
    """Gradients and working memory of a model of five layers, by remat policy and scan or not."""
    tokens = jnp.asarray(np.random.default_rng(6).integers(0, 32, (8, 33)), jnp.int32)
    results = {}
    for remat, most_unrolled in (("none", 0), ("dots", 0), ("block", 0), ("none", 100)):
        config = dataclasses.replace(TINY, layers=5, sequence_length=32, remat=remat)
        params = random_params(config)

        def loss(params, config=config):
            logits = logits_of(config, params, tokens[:, :-1])
            return token_loss(logits, tokens[:, 1:]).cross_entropy.mean()

        with pytest.MonkeyPatch.context() as patch:
            # Remat is for accelerators; policies see no products inside the kernels for CPU.
            plain = dataclasses.replace(kernels.PLAIN, most_unrolled=most_unrolled)
            patch.setattr(kernels, "chosen", lambda plain=plain: plain)
            compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes  # pyright: ignore[reportOptionalMemberAccess]
        results[remat, "unrolled" if most_unrolled else "scanned"] = compiled(params), memory
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [("dots", "scanned"), ("block", "scanned"), ("none", "unrolled")], ids=str
)
def test_neither_remat_nor_unrolling_changes_the_gradients(deep_gradients, variant):
    expected, found = (
        jax.tree.leaves(deep_gradients[key][0]) for key in (("none", "scanned"), variant)
    )
    for one, other in zip(expected, found, strict=True):
        assert np.linalg.norm(one - other) <= 1e-5 * np.linalg.norm(one)


@pytest.mark.slow
def test_remat_saves_memory(deep_gradients):
    memory = {remat: deep_gradients[remat, "scanned"][1] for remat in ("none", "dots", "block")}
    assert memory["block"] < memory["dots"] < memory["none"]


def test_parameters_stay_in_float32_and_so_do_their_gradients(tokens):
    config = dataclasses.replace(TINY, layers=1, compute_dtype="bfloat16")
    params = random_params(config)
    exact = logits_of(dataclasses.replace(config, compute_dtype="float32"), params, tokens)
    rounded = logits_of(config, params, tokens)
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-4 < difference < 0.03
    gradients = jax.eval_shape(
        jax.grad(lambda params: logits_of(config, params, tokens).mean()), params
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_every_axis_of_every_parameter_has_a_name_in_the_table(qk_norm):
    config = dataclasses.replace(TINY, qk_norm=qk_norm)
    params = random_params(config)
    axes = transformer.parameter_axes(config)
    ranks = jax.tree.map(lambda leaf, names: (leaf.ndim, len(meshes.spec(names))), params, axes)
    assert all(rank == named for rank, named in jax.tree.leaves(ranks, is_leaf=_is_pair))


def _is_pair(node):
    return isinstance(node, tuple)
