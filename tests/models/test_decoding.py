"""Cached generation beside the plain forward pass, and sampling beside its definition."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from scaling_jax.config import ModelConfig
from scaling_jax.errors import UserError
from scaling_jax.models import decoding, transformer
from scaling_jax.models.decoding import Sampling

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTH, VOCABULARY = 12, 40
TINY = ModelConfig(width=16, layers=2, heads=2, vocabulary_size=VOCABULARY, sequence_length=LENGTH)
PROMPTS = [[3], [1, 5, 9, 2, 6], [7, 7, 7, 7, 7, 7, 7, 7]]


@functools.cache
def params_of(config):
    """Far from the initial ones, so that greedy text is not one token over and over."""
    random = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: jnp.asarray(random.standard_normal(leaf.shape), jnp.float32),
        jax.eval_shape(lambda: transformer.initialize(config, jax.random.key(0))),
    )


@functools.partial(jax.jit, static_argnums=0)
def plain_logits(config, params, tokens):
    return transformer.bind(config, params)(tokens)


def plain_greedy(config, prompt, count):
    """The most probable tokens, each from all (at most sequence_length) before it, no cache."""
    tokens = list(prompt)
    for _ in range(count):
        window = tokens[-LENGTH:]
        padded = np.array([window + [0] * (LENGTH - len(window))])
        logits = plain_logits(config, params_of(config), padded)[0, len(window) - 1]
        tokens.append(int(np.argmax(logits)))
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "norm": "rms_norm", "heads": 1},
        {"layers": 6, "rope_base": 100.0},
        {"rope_frequency_dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("prompt", [1, 5, LENGTH])
def test_cached_logits_are_those_of_the_whole_pass(changes, prompt):
    """The prompt at once, then token by token to the end."""
    config = dataclasses.replace(TINY, **changes)
    params = transformer.initialize(config, jax.random.key(1))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (3, LENGTH))
    expected = plain_logits(config, params, tokens)
    advance = jax.jit(decoding.advance, static_argnums=0)
    cache = decoding.empty_cache(config, 3, LENGTH)
    places = [slice(0, prompt), *(slice(at, at + 1) for at in range(prompt, LENGTH))]
    for place in places:
        positions = np.broadcast_to(np.arange(LENGTH), (3, LENGTH))[:, place]
        hidden, cache = advance(config, params, cache, tokens[:, place], positions)
        for column, at in enumerate(range(place.start, place.stop)):
            found = decoding.read_logits(params, hidden[:, column])
            np.testing.assert_allclose(found, expected[:, at], atol=1e-5)


@pytest.mark.parametrize(
    "changes", [{}, pytest.param({"qk_norm": False, "layers": 5}, marks=pytest.mark.slow)], ids=str
)
def test_greedy_text_is_that_without_a_cache_whatever_the_rows_lengths(changes):
    config = dataclasses.replace(TINY, **changes)
    found = decoding.generate(config, params_of(config), PROMPTS)
    assert [len(row) for row in found] == [LENGTH + 1 - 8] * 3
    for prompt, row in zip(PROMPTS, found, strict=True):
        assert row == plain_greedy(config, prompt, len(row))
        assert [row] == decoding.generate(config, params_of(config), [prompt], len(row))


@pytest.mark.parametrize("length", [1, 4, LENGTH - 1, LENGTH])
def test_the_sequence_length_is_filled_and_one_token_more_is_predicted(length):
    prompt = list(range(length))
    (row,) = decoding.generate(TINY, params_of(TINY), [prompt])
    assert row == plain_greedy(TINY, prompt, LENGTH + 1 - length)
    assert len(set(row)) > 1 or length == LENGTH


def test_a_sliding_window_predicts_from_the_last_tokens_only():
    found = decoding.generate(TINY, params_of(TINY), PROMPTS, 30, slide=True)
    assert found == [plain_greedy(TINY, prompt, 30) for prompt in PROMPTS]
    long = list(range(LENGTH + 5))
    (row,) = decoding.generate(TINY, params_of(TINY), [long], 4, slide=True)
    assert row == plain_greedy(TINY, long, 4)


def test_a_row_ends_before_its_end_of_text():
    whole = decoding.generate(TINY, params_of(TINY), PROMPTS, 5)
    end = whole[0][2]
    found = decoding.generate(TINY, params_of(TINY), PROMPTS, 5, end_of_text=end)
    expected = [row[: row.index(end)] if end in row else row for row in whole]
    assert found == expected
    assert len(found[0]) < 5


def test_padding_of_the_vocabulary_is_never_chosen():
    sampling = Sampling(temperature=50.0)  # nearly uniform
    rows = decoding.generate(
        TINY, params_of(TINY), [[1]] * 40, sampling=sampling, vocabulary_size=10
    )
    assert {token for row in rows for token in row} == set(range(10))


def test_the_seed_alone_decides_and_each_row_has_numbers_of_its_own():
    def draw(count, seed):
        return decoding.generate(
            TINY, params_of(TINY), [[1, 2]] * count, 6, Sampling(temperature=5.0), seed=seed
        )

    three = draw(3, 0)
    assert three == draw(3, 0)
    assert three[:1] == draw(1, 0)
    assert len({tuple(row) for row in [*three, *draw(3, 1)]}) == 6


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2]))


# Which tokens may be drawn; the second of top_p=0.5 is needed to reach it, as is that of 0.65.
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "allowed"),
    [
        (1.0, None, 1.0, [0, 1, 2, 3, 4]),
        (0.5, None, 1.0, [0, 1, 2, 3, 4]),
        (2.0, 3, 1.0, [1, 3, 4]),
        (1.0, 1, 1.0, [1]),
        (1.0, None, 0.39, [1]),
        (1.0, None, 0.5, [1, 3]),
        (1.0, None, 0.64, [1, 3]),
        (1.0, None, 0.66, [1, 3, 4]),
        (1.0, 2, 0.62, [1, 3]),  # of these two alone the first has 0.615
        (1.0, 2, 0.61, [1]),
        (0.0, None, 1.0, [1]),
    ],
)
def test_tokens_are_drawn_from_the_softmax_of_what_is_allowed(temperature, top_k, top_p, allowed):
    count = 4000
    keys = jax.random.split(jax.random.key(3), count)
    drawn = decoding.choose(
        jnp.tile(jnp.asarray(LOGITS, jnp.float32), (count, 1)),
        keys,
        jnp.float32(temperature),
        jnp.int32(top_k or 5),
        jnp.float32(top_p),
    )
    counts = np.bincount(drawn, minlength=5)
    assert np.flatnonzero(counts).tolist() == allowed
    if len(allowed) > 1:
        expected = count * scipy.special.softmax(LOGITS[allowed] / temperature)
        assert scipy.stats.chisquare(counts[allowed], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[]], {}, "the prompt is empty"),
        ([[1], []], {}, "the prompt is empty"),
        ([[1, VOCABULARY]], {}, f"ids go from 1 to {VOCABULARY}, .* from 0 to {VOCABULARY - 1}"),
        ([[-1]], {}, "ids go from -1"),
        ([[1] * 4], {"max_tokens": 10}, "sequence_length=12, .*: at most 9 fit without slide"),
        ([[1] * 13], {}, "13 tokens fills sequence_length=12 already"),
        ([[1] * 13], {"slide": True}, "13 tokens fills sequence_length=12 already"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0: give 1 or more"),
    ],
    ids=str,
)
def test_what_cannot_be_generated_is_refused_in_one_line(prompts, options, message):
    with pytest.raises(UserError, match=message) as caught:
        decoding.generate(TINY, params_of(TINY), prompts, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}]
)
def test_impossible_sampling_is_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)
