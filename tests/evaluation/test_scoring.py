import jax
import numpy as np
import pytest

from scaling_jax import mesh as meshes
from scaling_jax.config import MeshConfig, ModelConfig
from scaling_jax.evaluation import scoring
from scaling_jax.evaluation.model_scorer import TransformerScorer
from scaling_jax.evaluation.prompts import Continuation, Prompt
from scaling_jax.evaluation.scoring import TargetScores
from scaling_jax.models import transformer

pytestmark = pytest.mark.usefixtures("quick_compilation")
MODEL = ModelConfig(width=16, layers=2, heads=2, vocabulary_size=40, sequence_length=64)


def prompt(*choices):
    """A question of (context, continuation) ids."""
    pairs = [[np.array(ids, np.int32) for ids in choice] for choice in choices]
    return Prompt("", 0, tuple(Continuation(*pair, truncated=False) for pair in pairs), 0)


def counting_logits(tokens):
    """After token t, and at sum s of all so far, token (t + 1) % 7 is likeliest, by s / 10."""
    logits = np.zeros((*tokens.shape, 7), np.float32)
    sums = np.cumsum(tokens, axis=1) / 10
    np.put_along_axis(logits, (tokens[..., None] + 1) % 7, sums[..., None], axis=2)
    return logits


def test_log_probabilities_are_those_of_a_formula():
    asked = [prompt(([1, 2], [3, 4]), ([1, 2], [5, 6])), prompt(([6], [1]))]
    (right, wrong), (other,) = scoring.score(asked, scoring.from_logits(counting_logits))

    def expected(total, hit):
        return hit * total / 10 - np.log(6 + np.exp(total / 10))

    assert right.log_probability == pytest.approx(expected(3, 1) + expected(6, 1), abs=1e-6)
    assert (right.likeliest, right.greedy) == ((3, 4), True)
    assert right.nats_per_token == pytest.approx(-right.log_probability / 2)
    assert wrong.log_probability == pytest.approx(expected(3, 0) + expected(8, 1), abs=1e-6)
    assert (wrong.likeliest, wrong.greedy) == ((3, 6), False)
    assert other.log_probability == pytest.approx(expected(6, 0), abs=1e-6)


def test_single_tokens_after_the_same_context_share_a_row():
    seen = []

    def scorer(tokens, positions, targets):
        seen.append(int((positions > 0).any(axis=1).sum()))
        return TargetScores(np.zeros(positions.shape), np.zeros(positions.shape, int))

    scoring.score([prompt(*(([1, 2, 3], [choice]) for choice in range(4)))], scorer)
    assert sum(seen) == 1
    # The same three tokens; of each choice another part is scored.
    both = prompt(([1, 2], [3, 4]), ([1, 2, 3], [4]))
    scoring.score([both], scorer)
    assert sum(seen) == 2
    ((whole, rest),) = scoring.score([both], scoring.from_logits(counting_logits))
    assert (whole.likeliest, rest.likeliest) == ((3, 4), (4,))


def test_few_shapes_reach_the_model():
    shapes = set()

    def scorer(tokens, positions, targets):
        shapes.add((tokens.shape, positions.shape))
        return TargetScores(np.zeros(positions.shape), np.zeros(positions.shape, int))

    asked = [prompt((range(1, n), [1] * (1 + n % 4))) for n in [*range(3, 23), *range(50, 54)]]
    scoring.score(asked, scorer, tokens_per_batch=512)
    # Full batches, and a last one of a power of four.
    assert {tokens for tokens, _ in shapes} == {(16, 32), (4, 32), (4, 64)}
    assert {positions[1] for _, positions in shapes} == {4}


@pytest.fixture(scope="module")
def params():
    return transformer.initialize(MODEL, jax.random.key(3))


def scorer(params, devices, **axes):
    mesh = meshes.make_mesh(MeshConfig(**axes), jax.devices()[:devices])
    return TransformerScorer(MODEL, params, mesh)


def drawn(random, longest, choices, common):
    """A question of random ids; its contexts of up to `longest` begin with `common` equal ones."""
    start = random.integers(0, 40, common)
    lengths = random.integers(1, (longest - common, 5), (choices, 2))
    pairs = ([random.integers(0, 40, length) for length in pair] for pair in lengths)
    return prompt(*(([*start, *context], tokens) for context, tokens in pairs))


def with_one_context(random):
    context = random.integers(0, 40, 20)
    return prompt(*((context, random.integers(0, 40, length)) for length in (1, 2, 4)))


def test_branches_are_scored_as_rows_of_their_own(params):
    random = np.random.default_rng(1)
    asked = [drawn(random, longest=25, choices=3, common=15) for _ in range(6)]
    asked += [with_one_context(random) for _ in range(6)]
    ours, read = scorer(params, 8), []

    class Counted(TransformerScorer):
        def __init__(self):
            pass

        def score_branches(self, tokens, places, branches, positions, targets):
            read.append(int((places > 0).sum()))
            return ours.score_branches(tokens, places, branches, positions, targets)

    logits = jax.jit(transformer.bind(MODEL, params))
    with jax.default_matmul_precision("float32"):
        slow = scoring.score(asked, scoring.from_logits(logits), tokens_per_batch=512)
    fast = scoring.score(asked, Counted(), tokens_per_batch=512)
    for one, other in zip(sum(fast, ()), sum(slow, ()), strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-5)
        assert one.likeliest == other.likeliest
    every = sum(
        len(choice.context) + len(choice.tokens) - 1 for each in asked for choice in each.choices
    )
    assert sum(read) < 0.6 * every


def test_choices_that_fit_into_no_row_together_get_their_own():
    lengths = []

    class Scorer:
        def __call__(self, tokens, positions, targets):
            raise AssertionError

        def score_branches(self, tokens, places, branches, positions, targets):
            lengths.append(int((places > 0).sum()) + 1)
            return TargetScores(np.zeros(positions.shape), np.zeros(positions.shape, int))

    context = np.arange(2040)
    scoring.score([prompt((context, [1] * 8), (context, [2] * 9))], Scorer(), tokens_per_batch=1)
    scoring.score([prompt((context, [1] * 2), (context, [2] * 3))], Scorer(), tokens_per_batch=1)
    assert lengths == [2047, 2048, 2043]


def test_any_batch_and_any_device_count_give_the_same(params):
    random = np.random.default_rng(0)
    asked = [drawn(random, longest=28, choices=1, common=2) for _ in range(20)]
    alone = scoring.score(asked, scorer(params, 1), tokens_per_batch=1)
    for devices, size in ((1, 512), (8, 512), (8, 1)):
        together = scoring.score(asked, scorer(params, devices), tokens_per_batch=size)
        for one, other in zip(alone, together, strict=True):
            assert one[0].nats_per_token == pytest.approx(other[0].nats_per_token, abs=1e-5)
            assert one[0].likeliest == other[0].likeliest


@pytest.mark.parametrize("axes", [{}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_branches_are_the_same_on_any_mesh(params, axes):
    random = np.random.default_rng(2)
    asked = [drawn(random, longest=25, choices=3, common=15) for _ in range(10)]
    asked += [with_one_context(random) for _ in range(5)]
    alone = scoring.score(asked, scorer(params, 1), tokens_per_batch=1)
    together = scoring.score(asked, scorer(params, 8, **axes), tokens_per_batch=512)
    for one, other in zip(sum(alone, ()), sum(together, ()), strict=True):
        assert one.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-5)
        assert one.likeliest == other.likeliest


@pytest.fixture
def compiled():
    """Counts the programs that are compiled."""
    programs = []

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield lambda: len(programs)
    jax.monitoring.unregister_event_duration_listener(count)


def test_nothing_is_compiled_after_the_first_model(params, compiled):
    random = np.random.default_rng(5)
    asked = [drawn(random, longest=40, choices=2, common=12) for _ in range(30)]
    asked += [with_one_context(random) for _ in range(5)]
    first = scoring.score(asked, scorer(params, 8), tokens_per_batch=512)
    warm = compiled()
    assert warm > 0
    # Another checkpoint, and the questions in another order.
    other = scorer(jax.tree.map(lambda leaf: leaf * 1.5, params), 8)
    warm = compiled()
    second = scoring.score(asked[::-1], other, tokens_per_batch=512)
    assert compiled() == warm
    assert second[0][0].log_probability != first[-1][0].log_probability
