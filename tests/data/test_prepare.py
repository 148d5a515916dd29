"""The one test module that imports TensorFlow: tasks, vocabularies inside tf.data, preparation."""

import json
import subprocess
import sys

import numpy as np
import pytest
import seqio
import tensorflow as tf

from scaling_jax.data import corpora, prepare, tasks, zipf_markov
from scaling_jax.data.corpora import CORPORA, SPLITS
from scaling_jax.data.seqio_vocabulary import SeqioVocabulary
from scaling_jax.data.shards import Shards
from scaling_jax.data.vocabularies import train_sentencepiece, vocabulary
from scaling_jax.errors import UserError

TEXTS = ["", "plain", "  two  spaces \n\ttab ", "naïve 文字 🙂", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The three corpora, prepared as bytes."""
    folder = tmp_path_factory.mktemp("prepared")
    for task in CORPORA:
        prepare.prepare(task, out=folder)
    return folder


@pytest.fixture(scope="module")
def texts_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "docs.jsonl"
    texts = [document.text for document in corpora.python_docs()[:500]]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def vocabulary_names(tmp_path_factory):
    """One vocabulary of each kind; the Hugging Face one has its end of text at id 0."""
    import tokenizers

    folder = tmp_path_factory.mktemp("vocabularies")
    texts = [document.text for document in corpora.python_docs()[:300]]
    train_sentencepiece(texts, 600, folder / "docs.model")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=500, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False
    )
    bpe.save(str(folder / "tokenizer.json"))
    return ["bytes", str(folder / "docs.model"), str(folder / "tokenizer.json")]


@pytest.mark.parametrize("kind", range(3))
def test_ids_in_tensorflow_are_those_in_python(vocabulary_names, kind):
    words = vocabulary(vocabulary_names[kind])
    same = words.as_seqio()
    assert (same.vocab_size, same.eos_id) == (words.size, words.end_of_text)
    assert same.pad_id != same.eos_id
    dataset = tf.data.Dataset.from_tensor_slices(TEXTS).map(same.encode_tf)
    assert [row.tolist() for row in dataset.as_numpy_iterator()] == words.encode_batch(TEXTS)
    assert [same.encode_tf(text).numpy().tolist() for text in TEXTS] == words.encode_batch(TEXTS)
    assert [list(same.encode(text)) for text in TEXTS] == words.encode_batch(TEXTS)
    for text, ids in zip(TEXTS, words.encode_batch(TEXTS), strict=True):
        assert same.decode(ids) == text
        if ids:
            assert same.decode_tf(tf.constant(ids)).numpy().decode() == text


def test_seqio_vocabularies_are_equal_by_content(vocabulary_names):
    first, again = (vocabulary(vocabulary_names[2]).as_seqio() for _ in range(2))
    assert isinstance(first, SeqioVocabulary)
    assert first == again
    assert first != vocabulary("bytes").as_seqio()


@pytest.mark.parametrize("task", CORPORA)
@pytest.mark.parametrize("split", SPLITS)
def test_shards_hold_every_document_and_its_end(out, task, split):
    shards = Shards.open(out / task / split)
    shards.verify()
    documents = list(corpora.documents(task, split))
    content = b"".join(document.text.encode() + b"\xff" for document in documents)
    expected = np.frombuffer(content, np.uint8).astype(np.int64) + 3
    expected[expected == 0xFF + 3] = 1  # UTF-8 has no byte ff: it stood for the end of text
    assert np.array_equal(np.concatenate(shards.arrays), expected)
    assert shards.index.documents == len(documents)
    assert shards.index.text_bytes == len(content) - len(documents)


@pytest.mark.parametrize("task", CORPORA)
def test_shards_equal_the_seqio_stream(out, task):
    words = vocabulary("bytes")
    registered = tasks.register(task, words, out / "tensorflow_datasets")
    stream = seqio.get_mixture_or_task(registered.name).get_dataset(
        split="validation", shuffle=False
    )
    ids = np.concatenate([example["targets"] for example in stream.as_numpy_iterator()])
    assert np.array_equal(ids, np.concatenate(Shards.open(out / task / "validation").arrays))


@pytest.mark.parametrize("kind", range(3))
def test_a_users_texts_with_every_vocabulary(vocabulary_names, texts_path, tmp_path, kind):
    words = vocabulary(vocabulary_names[kind])
    indices = prepare.prepare(
        str(texts_path), out=tmp_path, vocabulary=vocabulary_names[kind], shards=3
    )
    found = []
    for split in SPLITS:
        shards = Shards.open(tmp_path / "docs" / split)
        shards.verify()
        assert shards.index == indices[split]
        assert shards.index.end_of_text == words.end_of_text
        parts = [
            np.split(array, np.flatnonzero(array == words.end_of_text) + 1)[:-1]
            for array in shards.arrays
        ]
        # documents are dealt out in turn
        found += [
            words.decode(parts[number % 3][number // 3]) for number in range(sum(map(len, parts)))
        ]
    texts = [json.loads(line)["text"] for line in texts_path.read_text().splitlines()]
    assert sorted(found) == sorted(texts)


def test_two_preparations_are_the_same_to_the_byte(out, tmp_path):
    for task in ("python_docs", "zipf_markov"):
        prepare.prepare(task, out=tmp_path)
        for split in SPLITS:
            again, first = (Shards.open(folder / task / split) for folder in (tmp_path, out))
            assert again.index_sha256 == first.index_sha256


def test_the_entropy_rate_is_that_of_bytes(out, vocabulary_names, tmp_path):
    for split in SPLITS:
        assert Shards.open(out / "zipf_markov" / split).entropy_rate == zipf_markov.entropy_rate()
        assert Shards.open(out / "python_docs" / split).entropy_rate is None
    draft = prepare._draft(
        "zipf_markov", "train", "", vocabulary_names[1], vocabulary(vocabulary_names[1])
    )
    assert draft.entropy_rate is None


def test_what_is_there_is_kept_and_what_is_not_whole_is_made_again(texts_path, tmp_path):
    heard = []

    def made_again() -> set[str]:
        heard.clear()
        prepare.prepare(str(texts_path), out=tmp_path, progress=heard.append)
        return {progress.split for progress in heard if progress.index is None}

    folder = tmp_path / "docs" / "train"
    assert made_again() == {"train", "validation"}
    digest = Shards.open(folder).index_sha256
    assert made_again() == set()
    shard = folder / Shards.open(folder).index.shards[0].file
    shard.write_bytes(shard.read_bytes().replace(b"a", b"b"))
    assert made_again() == {"train"}
    (folder / "index.json").unlink()
    assert made_again() == {"train"}
    assert Shards.open(folder).index_sha256 == digest
    prepare.prepare(str(texts_path), out=tmp_path, shards=2)
    assert len(list(folder.glob("tokens-*"))) == 2
    assert (
        Shards.open(folder).token_count
        == sum(1 for progress in heard if progress.index is None)
        + Shards.open(folder).index.text_bytes
    )


def test_changed_texts_are_prepared_again(texts_path, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(texts_path.read_text())
    before = prepare.prepare(str(path), out=tmp_path)["train"]
    path.write_text(texts_path.read_text() + json.dumps({"text": "one more"}) + "\n")
    after = prepare.prepare(str(path), out=tmp_path)
    assert after["train"].source != before.source
    assert sum(index.documents for index in after.values()) == 501


def test_nothing_stays_behind_when_the_source_fails(tmp_path):
    path = tmp_path / "texts.jsonl"
    good = [json.dumps({"text": f"text {number}"}) for number in range(300)]
    path.write_text("\n".join([*good, "broken"]))
    with pytest.raises(UserError, match="line 301"):
        prepare.prepare(str(path), out=tmp_path / "out")
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "python_cod"], "did you mean 'python_code'"),
        (["--task", "python_code", "--vocabulary", "words"], "give bytes"),
        (["--task", "python_code", "--shards", "0"], "give 1 or more"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setattr(sys, "argv", ["prepare", "--out", str(tmp_path), *arguments])
    with pytest.raises(SystemExit) as caught:
        prepare.main()
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_training_and_a_second_preparation_import_no_tensorflow(out):
    code = f"""
import pathlib, sys
from scaling_jax.data import batches, inspect, prepare, shards, vocabularies
prepare.prepare("python_docs", out=pathlib.Path({str(out)!r}))
inspect.inspect({str(out / "python_docs" / "validation")!r})
assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
