"""What seqio streams, and that shards hold the same; no other test module imports TensorFlow."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds
import zstandard

from scaling_jax.data import catalog, corpora, prepare, tasks, zipf_markov
from scaling_jax.data.corpora import CORPORA, SPLITS
from scaling_jax.data.seqio_vocabulary import SeqioVocabulary
from scaling_jax.data.shards import Shards
from scaling_jax.data.vocabularies import train_sentencepiece, vocabulary
from scaling_jax.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
NEOX = SHARED / "tokenizer" / "20B_tokenizer.json"
PEPS = SHARED / "text" / "peps_rst" / "peps.txt"
AWKWARD = ["", "plain", "  two  spaces \n\ttab ", "naïve 文字 🙂", "a<|endoftext|>b"]


@pytest.fixture(scope="module")
def texts():
    return [document.text for document in corpora.python_docs()[:400]]


@pytest.fixture(scope="module")
def vocabulary_names(tmp_path_factory, texts):
    """One vocabulary of each kind; the Hugging Face one has its end of text at id 0."""
    import tokenizers

    folder = tmp_path_factory.mktemp("vocabularies")
    train_sentencepiece(texts, 600, folder / "docs.model")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        texts, vocab_size=500, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False
    )
    bpe.save(str(folder / "tokenizer.json"))
    return ["bytes", str(folder / "docs.model"), str(folder / "tokenizer.json")]


@pytest.fixture(scope="module")
def json_words(vocabulary_names):
    return vocabulary(vocabulary_names[2])


@pytest.fixture(scope="module")
def c4_folder(tmp_path_factory, texts):
    """A c4/en:3.1.0 as tensorflow-datasets would have prepared it, in three training files."""
    root = tmp_path_factory.mktemp("tfds")
    folder = root / "c4" / "en" / "3.1.0"
    folder.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {name: tfds.features.Text() for name in ("text", "url", "timestamp")}
    )
    parts = {
        "train": [texts[:150], texts[150:300], ["", *texts[300:350]]],
        "validation": [texts[350:]],
    }
    for split, files in parts.items():
        for number, part in enumerate(files):
            name = f"c4-{split}.tfrecord-{number:05d}-of-{len(files):05d}"
            with tf.io.TFRecordWriter(str(folder / name)) as writer:
                for text in part:
                    example = {"text": text, "url": "http://a.org", "timestamp": "2019"}
                    writer.write(features.serialize_example(example))
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(part) for part in files],
                num_bytes=0,
                filename_template=tfds.core.ShardedFileTemplate(
                    data_dir=folder, dataset_name="c4", split=split, filetype_suffix="tfrecord"
                ),
            )
            for split, files in parts.items()
        ],
    )
    return root


def streamed_rows(name: str, width: int, split: str = "train") -> list[list[int]]:
    """What a task or mixture gives to training, through seqio's own front door."""
    dataset = seqio.get_dataset(
        name,
        {"targets": width},
        seqio.PassThroughFeatureConverter(),
        dataset_split=split,
        shuffle=False,
    )
    return [example["targets"].tolist() for example in dataset.as_numpy_iterator()]


def prepared_rows(folder, width: int) -> list[list[int]]:
    shards = Shards.open(folder)
    return shards.rows(np.arange(shards.row_count(width - 1)), width - 1).tolist()


@pytest.mark.parametrize("kind", range(3))
def test_ids_in_tensorflow_are_those_in_python(vocabulary_names, kind):
    words = vocabulary(vocabulary_names[kind])
    same = words.as_seqio()
    assert (same.vocab_size, same.eos_id) == (words.size, words.end_of_text)
    assert same.pad_id != same.eos_id
    dataset = tf.data.Dataset.from_tensor_slices(AWKWARD).map(same.encode_tf)
    assert [row.tolist() for row in dataset.as_numpy_iterator()] == words.encode_batch(AWKWARD)
    assert [same.encode_tf(text).numpy().tolist() for text in AWKWARD] == words.encode_batch(
        AWKWARD
    )
    assert [list(same.encode(text)) for text in AWKWARD] == words.encode_batch(AWKWARD)
    for text, ids in zip(AWKWARD, words.encode_batch(AWKWARD), strict=True):
        if words.end_of_text in ids:  # where seqio's decoding stops
            continue
        assert same.decode(ids) == text
        if ids:
            assert same.decode_tf(tf.constant(ids)).numpy().decode() == text


@pytest.mark.skipif(not NEOX.is_file() or not PEPS.is_file(), reason=f"{NEOX} is not there")
def test_neox_ids_of_real_text_in_tensorflow():
    words = vocabulary(str(NEOX))
    texts = [text for text in PEPS.read_text()[:300_000].split("<|endoftext|>") if text]
    ids = words.encode_batch(texts)
    dataset = tf.data.Dataset.from_tensor_slices(texts).map(words.as_seqio().encode_tf)
    assert [row.tolist() for row in dataset.as_numpy_iterator()] == ids
    # The tokenizer composes characters before it does anything else.
    assert words.decode_batch(ids) == [unicodedata.normalize("NFC", text) for text in texts]


def test_seqio_vocabularies_are_equal_by_content(vocabulary_names):
    first, again = (vocabulary(vocabulary_names[2]).as_seqio() for _ in range(2))
    assert isinstance(first, SeqioVocabulary)
    assert first == again
    assert first != vocabulary("bytes").as_seqio()


@pytest.mark.parametrize("pack", [False, True])
def test_seqios_own_converter_would_lose_an_end_of_text_of_id_0(json_words, pack):
    assert json_words.end_of_text == 0
    ids = [5, 6, 0, 7, 8, 0]
    dataset = tf.data.Dataset.from_tensors({"targets": np.array(ids, np.int32)})
    length = {"targets": 6}
    kept = seqio.PassThroughFeatureConverter()(dataset, length)
    assert next(kept.as_numpy_iterator())["targets"].tolist() == ids
    features = {"targets": seqio.Feature(json_words.as_seqio(), add_eos=True)}
    converter = seqio.DecoderFeatureConverter(pack=pack)
    converted = next(
        converter(seqio.utils.trim_dataset(dataset, length, features), length).as_numpy_iterator()
    )
    weights = converted["decoder_loss_weights"].tolist()
    assert [weight for weight, id in zip(weights, ids, strict=True) if id == 0] == [0, 0]


@pytest.mark.parametrize("task", CORPORA)
def test_embedded_corpora_are_what_seqio_streams(task, tmp_path):
    for index in prepare.prepare(task, out=tmp_path, shards=3):
        folder = tmp_path / task / index.split
        Shards.open(folder).verify()
        (source,) = catalog.find(task, data_dir=tmp_path / "tensorflow_datasets")
        registered = tasks.register(source, vocabulary("bytes"))
        stream = registered.get_dataset(split=index.split, shuffle=False)
        ids = [example["targets"] for example in stream.as_numpy_iterator()]
        assert np.array_equal(np.concatenate(ids), np.concatenate(Shards.open(folder).arrays))
        documents = list(corpora.documents(task, index.split))
        content = b"".join(document.text.encode() + b"\xff" for document in documents)
        expected = np.frombuffer(content, np.uint8).astype(np.int64) + 3
        expected[expected == 0xFF + 3] = 1  # UTF-8 has no byte ff: it stood for the end of text
        assert np.array_equal(np.concatenate(ids), expected)
        assert index.documents == len(documents)
        entropy_rate = zipf_markov.entropy_rate() if task == "zipf_markov" else None
        assert index.entropy_rate == entropy_rate


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet", "txt"])
@pytest.mark.parametrize("shards", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_rows_of_files_are_what_seqio_streams(
    vocabulary_names, json_words, texts, tmp_path, kind, shards
):
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(2):
        part = ["", *texts[number::2]]
        path = folder / f"{number}.{kind}"
        lines = "".join(json.dumps({"text": text}) + "\n" for text in part).encode()
        if kind == "jsonl":
            path.write_bytes(lines)
        elif kind == "jsonl.zst":
            path.write_bytes(zstandard.compress(lines))
        elif kind == "parquet":
            pq.write_table(pa.table({"text": part}), path)
        else:
            path.write_text("\n\n".join(part))
    name = str(folder)
    (source,) = catalog.find(name, ["held_out_share=0"])
    prepare.prepare(
        name,
        out=tmp_path / "out",
        vocabulary=vocabulary_names[2],
        overrides=["held_out_share=0"],
        shards=shards,
    )
    task = tasks.register(source, json_words, in_rows=True)
    streamed = streamed_rows(task.name, 65)
    assert len(streamed) > 100
    assert prepared_rows(tmp_path / "out" / "docs" / "train", 65) == streamed
    assert any(0 in row for row in streamed)


def test_a_task_is_read_apart_by_pieces(json_words, texts, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(texts[number])
    (source,) = catalog.find(str(tmp_path), ["name=four", "held_out_share=0"])
    task = tasks.register(source, json_words)
    assert len(task.source.list_shards("train")) == 4
    found = [
        json_words.decode(example["targets"])
        for index in range(2)
        for example in task.get_dataset(
            split="train", shuffle=False, shard_info=seqio.ShardInfo(index, 2)
        ).as_numpy_iterator()
    ]
    assert found == [texts[0], texts[2], texts[1], texts[3]]


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_c4_of_tensorflow_datasets(c4_folder, vocabulary_names, json_words, tmp_path, workers):
    overrides = [f"folder={c4_folder}"]
    indices = prepare.prepare(
        "c4_tfds",
        out=tmp_path,
        vocabulary=vocabulary_names[2],
        overrides=overrides,
        shards=3,
        workers=workers,
    )
    assert [index.documents for index in indices] == [350, 50]
    assert [index.skipped for index in indices] == [{"empty": 1}, {}]
    (source,) = catalog.find("c4_tfds", overrides)
    task = tasks.register(source, json_words, in_rows=True)
    for split in SPLITS:
        rows = prepared_rows(tmp_path / "c4" / split, 33)
        assert rows == streamed_rows(task.name, 33, split)
    (again,) = catalog.find("tfds:c4/en:3.1.0", data_dir=c4_folder)
    assert again.fingerprint(again.pieces("train")[0])


def test_slices_and_mistakes_of_tensorflow_datasets(c4_folder, tmp_path):
    overrides = ["files=['train[:10]']", "validation_files=['train[-10:]']"]
    indices = prepare.prepare(
        "tfds:c4/en:3.1.0", out=tmp_path, data_dir=c4_folder, overrides=overrides
    )
    assert [index.documents for index in indices] == [10, 10]
    for name, overrides, message in [
        ("tfds:nosuch:1.0.0", [], "nosuch:1.0.0: not in"),
        ("tfds:c4/en:3.1.0", ["files=[training]"], "no split training"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            prepare.prepare(name, out=tmp_path, data_dir=c4_folder, overrides=overrides)
        assert "\n" not in str(caught.value)


def test_array_record_files(texts, tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = tmp_path / "docs.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:4")
    for text in [*texts, ""]:
        value = tf.train.BytesList(value=[text.encode()])
        feature = {"body": tf.train.Feature(bytes_list=value)}
        features = tf.train.Features(feature=feature)
        writer.write(tf.train.Example(features=features).SerializeToString())
    writer.close()
    overrides = ["text=body", "name=docs", "held_out_share=0"]
    (source,) = catalog.find(str(path), overrides)
    found = source.documents("train", source.pieces("train"))
    assert [record.text for record in found] == texts
    with pytest.raises(UserError, match="record 1 has no text"):
        list(catalog.find(str(path), overrides[1:])[0].documents("train", source.pieces("train")))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match="not a whole ArrayRecord file"):
        list(source.documents("train", source.pieces("train")))


def test_a_mixture_is_sampled_at_its_rates(json_words, texts, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        lines = (json.dumps({"text": name * 40}) + "\n" for _ in range(500))
        (tmp_path / name / "x.jsonl").write_text("".join(lines))
    content = {name: {"rate": rate, "files": [f"{name}/*"]} for name, rate in (("a", 3), ("b", 1))}
    (tmp_path / "mix.yaml").write_text(
        json.dumps({"name": "mix", "folder": str(tmp_path), "parts": content})
    )
    config = catalog.source_config(str(tmp_path / "mix.yaml"))
    mixture = tasks.register_mixture("mix", config.sources().values(), config.rates(), json_words)
    dataset = seqio.get_dataset(
        mixture.name,
        {"targets": 41},
        seqio.PassThroughFeatureConverter(),
        shuffle=False,
        num_epochs=None,
    )
    rows = [json_words.decode(row["targets"]) for row in dataset.take(800).as_numpy_iterator()]
    assert 0.70 < sum("a" in row for row in rows) / 800 < 0.80
