import hashlib
import math

import numpy as np
import pytest

from scaling_jax.data import zipf_markov

SIZE = len(zipf_markov.ALPHABET)


@pytest.fixture(scope="module")
def texts():
    return list(zipf_markov.texts())


@pytest.fixture(scope="module")
def transitions():
    """P(symbol | before, last), built from the table apart from the code that draws."""
    table = np.zeros((SIZE, SIZE, SIZE))
    ranks = zipf_markov.rank_probabilities()
    for before in range(SIZE):
        for last in range(SIZE):
            table[before, last, zipf_markov.ranked_symbols()[before, last]] = ranks
    return table


def test_entropy_rate_is_the_mean_code_length_of_the_text(texts, transitions):
    """Monte Carlo: -log p of each token under the true model, over all documents."""
    place = {symbol: index for index, symbol in enumerate(zipf_markov.ALPHABET)}
    q = zipf_markov.END_PROBABILITY
    totals, tokens = [], []
    for text in texts[:4000]:
        path = np.array([0, 0, *(place[symbol] for symbol in text)])
        symbols = transitions[path[:-2], path[1:-1], path[2:]]
        total = -np.log(symbols).sum() - (len(text) - 1) * math.log1p(-q) - math.log(q)
        totals.append(total)
        tokens.append(len(text) + 1)
    totals, tokens = np.array(totals), np.array(tokens)
    estimate = totals.sum() / tokens.sum()
    standard_error = np.std(totals - estimate * tokens) * math.sqrt(len(totals)) / tokens.sum()
    assert standard_error < 0.002
    assert abs(estimate - zipf_markov.entropy_rate()) < 4 * standard_error


def test_every_context_is_equally_uncertain(transitions):
    assert np.allclose(transitions.sum(-1), 1)
    assert np.allclose(np.sort(transitions, axis=-1)[..., ::-1], zipf_markov.rank_probabilities())


def test_more_context_helps(transitions):
    """A model of no, one or two symbols of context: each must be clearly better than the last."""
    context = np.full((SIZE, SIZE), 1 / SIZE**2)
    for _ in range(200):
        context = np.einsum("ij,ijk->jk", context, transitions)
    joint = np.einsum("ij,ijk->ijk", context, transitions)
    pairs, last, symbols = joint.sum(0), joint.sum((0, 2)), joint.sum((0, 1))
    unigram = _entropy(symbols)
    bigram = _entropy(pairs) - _entropy(last)
    trigram = _entropy(joint) - _entropy(context)
    assert unigram - bigram > 0.3
    assert bigram - trigram > 0.5
    assert trigram == pytest.approx(_entropy(zipf_markov.rank_probabilities()))


def test_documents_have_the_lengths_they_should(texts):
    lengths = np.array([len(text) for text in texts])
    mean = 1 / zipf_markov.END_PROBABILITY
    assert lengths.min() >= 1
    assert lengths.mean() == pytest.approx(mean, abs=4 * mean / math.sqrt(len(texts)))
    assert set("".join(texts[:100])) <= set(zipf_markov.ALPHABET)


def test_the_version_names_the_content(texts):
    """Raise `zipf_markov.VERSION` when this changes: prepared data are recognised by it."""
    digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert (zipf_markov.VERSION, digest[:16]) == ("1.0.0", "d30faf16cc50cc04")


def _entropy(probabilities):
    positive = probabilities[probabilities > 0]
    return -(positive * np.log(positive)).sum()
