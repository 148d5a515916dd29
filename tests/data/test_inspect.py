import pytest

from scaling_jax.data.inspect import inspect
from scaling_jax.data.vocabularies import vocabulary
from scaling_jax.errors import UserError

WORDS = vocabulary("bytes")


@pytest.fixture
def folder(make_shards, monkeypatch):
    texts = ["one", "two and two", "one", "é" * 10]
    folder = make_shards([[*WORDS.encode(text), 1] for text in texts]).folder
    index = (folder / "index.json").read_text()
    known = f'"vocabulary_sha256": "{WORDS.sha256}"'
    (folder / "index.json").write_text(index.replace('"vocabulary_sha256": ""', known))
    return folder


def test_lengths_and_samples(folder):
    found = inspect(folder, sequence_length=15, samples=10)
    assert found.tokens == 4 + 12 + 4 + 21
    assert found.document_lengths[0.0] == 4
    assert found.document_lengths[1.0] == 21
    assert found.rows == 2
    assert found.samples[0] == "one<|endoftext|>two and two<|endoftext|>"
    assert found.samples[1] == "one<|endoftext|>éééééé"
    assert found.bytes_per_token == (found.tokens - 4) / found.tokens
    assert found.length_histogram == {4: 2, 8: 1, 16: 1}


def test_of_a_large_split_only_the_beginning_is_read(folder):
    found = inspect(folder, sequence_length=3, limit=17)
    assert (found.tokens_read, found.tokens) == (17, 41)
    assert found.length_histogram == {4: 1, 8: 1}
    assert found.duplicate_rows == 0


def test_rows_that_repeat_are_counted(make_shards, folder):
    assert inspect(folder, sequence_length=15).duplicate_rows == 0
    assert inspect(folder, sequence_length=3).duplicate_rows == 0.5  # "one." and five times "éé"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: give 1 or more"),
        ({"sequence_length": -5}, "sequence_length=-5: give 1 or more"),
        ({"samples": -1}, "samples=-1: give 0 or more"),
        ({"limit": 0}, "limit=0: give 1 or more"),
        ({"limit": 3}, "the first 3 tokens hold no end of a document: raise limit"),
    ],
)
def test_numbers_that_make_no_sense(folder, number, message):
    with pytest.raises(UserError, match=message):
        inspect(folder, **number)


def test_a_vocabulary_that_changed_is_refused(folder):
    index = (folder / "index.json").read_text()
    (folder / "index.json").write_text(index.replace(WORDS.sha256, "0" * 64))
    with pytest.raises(UserError, match="'bytes' has changed"):
        inspect(folder)
