import hashlib
import json
import pickle
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.data import corpora
from scaling_jax.data.vocabularies import (
    TokenizerJsonVocabulary,
    train_sentencepiece,
    vocabulary,
)
from scaling_jax.errors import UserError

NEOX = Path(__file__).parents[2] / ".." / "shared" / "data" / "tokenizer" / "20B_tokenizer.json"
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = ["", " ", "  two  spaces \n\n\ttab ", "naïve 文字 🙂 \x00\x7f", "a<|end|>b", "\r\n"]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabularies") / "docs.model"
    train_sentencepiece((document.text for document in corpora.python_docs()[:600]), 700, path)
    return path


@pytest.fixture(scope="module")
def json_path(tmp_path_factory):
    """A byte-level BPE with its end of text at id 0, as GPT-NeoX has it."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (document.text for document in corpora.python_docs()[:600])
    tokenizer.train_from_iterator(texts, trainer)
    path = tmp_path_factory.mktemp("vocabularies") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="module", params=["bytes", "sentencepiece_path", "json_path"])
def words(request):
    name = request.param
    return vocabulary(name if name == "bytes" else str(request.getfixturevalue(name)))


def test_round_trip_is_exact(words):
    assert words.decode_batch(words.encode_batch(AWKWARD)) == AWKWARD


@given(text=TEXTS)
def test_round_trip_of_any_text(words, text):
    text = text.replace("\u2581", "")  # SentencePiece's own sign for a space
    assert words.decode(words.encode(text)) == text


@given(text=TEXTS)
def test_ids_lie_in_the_vocabulary(words, text):
    assert all(0 <= id < words.size for id in words.encode(text + "<|endoftext|>"))


def test_only_a_tokenizer_json_reads_a_special_token_out_of_text(words):
    spelled = words.encode("a<|endoftext|>b").count(words.end_of_text)
    assert spelled == isinstance(words, TokenizerJsonVocabulary)


def test_ends_of_text_are_left_out_when_decoding(words):
    ids = [*words.encode("first"), words.end_of_text, *words.encode("second"), words.end_of_text]
    assert words.decode(ids) == "firstsecond"


def test_the_fingerprint_follows_the_content(json_path, tmp_path):
    before = vocabulary(str(json_path)).sha256
    moved = tmp_path / "moved.json"
    moved.write_bytes(json_path.read_bytes())
    assert vocabulary(str(moved)).sha256 == before
    moved.write_text(moved.read_text() + "\n")
    assert vocabulary(str(moved)).sha256 != before


def test_texts_are_encoded_whole_whatever_the_file_says(json_path, tmp_path):
    limited = tokenizers.Tokenizer.from_file(str(json_path))
    limited.enable_truncation(4)
    limited.enable_padding(pad_id=1, pad_token="<|padding|>")
    path = tmp_path / "limited.json"
    limited.save(str(path))
    texts = ["a", "a text of more tokens than four, by far"]
    whole, found = vocabulary(str(json_path)), vocabulary(str(path))
    assert found.encode_batch(texts) == whole.encode_batch(texts)
    assert pickle.loads(pickle.dumps(found)).encode_batch(texts) == whole.encode_batch(texts)
    # what was once encoded with the limits is not taken for what is encoded without
    assert found.sha256 != hashlib.sha256(path.read_bytes()).hexdigest()
    assert whole.sha256 == hashlib.sha256(json_path.read_bytes()).hexdigest()


def test_byte_ids():
    words = vocabulary("bytes")
    assert words.encode("aé") == [97 + 3, 0xC3 + 3, 0xA9 + 3]
    assert (words.size, words.end_of_text) == (259, 1)
    assert words.decode([0, 2, 100, 258, 300]) == "a\ufffd"


def test_sentencepiece_training_is_deterministic(sentencepiece_path, tmp_path):
    again = tmp_path / "again.model"
    train_sentencepiece((document.text for document in corpora.python_docs()[:600]), 700, again)
    assert again.read_bytes() == sentencepiece_path.read_bytes()
    assert vocabulary(str(again)).size == 700


@pytest.mark.skipif(not NEOX.is_file(), reason=f"{NEOX} is not there")
def test_neox_tokenizer():
    words = vocabulary(str(NEOX))
    assert (words.size, words.end_of_text) == (50_277, 0)
    plain = tokenizers.Tokenizer.from_file(str(NEOX))
    texts = [document.text for document in corpora.python_docs()[:500]]
    assert words.encode_batch(texts) == [encoding.ids for encoding in plain.encode_batch(texts)]
    assert words.decode_batch(words.encode_batch(texts)) == texts
    assert words.encode("a<|endoftext|>b") == plain.encode("a<|endoftext|>b").ids


def test_bad_vocabularies(tmp_path, json_path):
    with pytest.raises(UserError, match="give bytes, a SentencePiece"):
        vocabulary("byte")
    with pytest.raises(UserError, match="no such file"):
        vocabulary("absent.model")
    (tmp_path / "no.model").write_bytes(b"no model")
    with pytest.raises(UserError, match="not a SentencePiece model"):
        vocabulary(str(tmp_path / "no.model"))
    (tmp_path / "no.json").write_text("{}")
    with pytest.raises(UserError, match=r"not a Hugging Face tokenizer\.json"):
        vocabulary(str(tmp_path / "no.json"))
    endless = json.loads(json_path.read_text().replace("<|endoftext|>", "<eos>"))
    (tmp_path / "endless.json").write_text(json.dumps(endless))
    with pytest.raises(UserError, match=r"has no <\|endoftext\|> token"):
        vocabulary(str(tmp_path / "endless.json"))


def test_more_pieces_than_the_text_can_support(tmp_path):
    with pytest.raises(UserError, match="cannot make 100000 pieces"):
        train_sentencepiece(["a short text"], 100_000, tmp_path / "big.model")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"ends in \.model"):
        train_sentencepiece(["a short text"], 300, tmp_path / "big.spm")
