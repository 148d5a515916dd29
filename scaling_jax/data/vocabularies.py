"""Text to token ids and back: bytes, SentencePiece models, Hugging Face tokenizer.json files.

A vocabulary is named by one string: "bytes", a path ending in .model, or a path ending in .json.
Encoding and decoding here need no TensorFlow; `as_seqio` gives the same vocabulary to seqio.
"""

import abc
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import sentencepiece
import tokenizers

from scaling_jax import atomic
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    import seqio

END_OF_TEXT_PIECE = "<|endoftext|>"
# seqio.ByteVocabulary: padding, end and unknown come before the 256 bytes.
BYTE_OFFSET = 3
BYTE_END_OF_TEXT = 1
LONGEST_TRAINING_TEXT = 1 << 24  # bytes; SentencePiece leaves out what is longer


class Vocabulary(abc.ABC):
    """A two-way mapping of text and token ids.

    Vocabularies can be pickled; they come back from their files.

    Attributes:
      name: "bytes" or the path.
      size: one more than the largest id.
      end_of_text: the id that stands after every document. Of what encodes text only a
        tokenizer.json yields it, for a text that spells it out; bytes and SentencePiece never do.
      sha256: of the content: equal for equal vocabularies, wherever their files lie.
    """

    def __init__(self, name: str, size: int, end_of_text: int, sha256: str):
        self.name = name
        self.size = size
        self.end_of_text = end_of_text
        self.sha256 = sha256

    def __reduce__(self) -> tuple[Callable[[str, str], "Vocabulary"], tuple[str, str]]:
        return _unchanged, (self.name, self.sha256)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without the end of text."""
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; ends of text are left out."""
        return self.decode_batch([ids])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without the end of text."""
        return self._encode(texts)

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """The text of each row of ids; ends of text are left out."""
        return self._decode([[int(id) for id in row if id != self.end_of_text] for row in rows])

    @abc.abstractmethod
    def as_seqio(self) -> "seqio.Vocabulary":
        """The same vocabulary as an object of seqio (imports TensorFlow)."""

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _decode(self, rows: list[list[int]]) -> list[str]: ...


def vocabulary(name: str) -> Vocabulary:
    """The vocabulary called `name`.

    Raises:
      UserError: the name is neither "bytes" nor an existing .model or .json file of the right kind.
    """
    if name == "bytes":
        return ByteVocabulary()
    path = Path(name)
    kinds = {".model": SentencePieceVocabulary, ".json": TokenizerJsonVocabulary}
    if path.suffix not in kinds:
        raise UserError(
            f"vocabulary '{name}': give bytes, a SentencePiece file ending in .model, "
            "or a Hugging Face tokenizer.json"
        )
    if not path.is_file():
        raise UserError(f"vocabulary '{name}': there is no such file")
    return kinds[path.suffix](path)


class ByteVocabulary(Vocabulary):
    """UTF-8 bytes, with the ids of seqio.ByteVocabulary; other ids decode to nothing."""

    def __init__(self):
        fingerprint = hashlib.sha256(b"seqio.ByteVocabulary").hexdigest()
        super().__init__("bytes", 256 + BYTE_OFFSET, BYTE_END_OF_TEXT, fingerprint)

    def as_seqio(self) -> "seqio.Vocabulary":
        """seqio's own byte vocabulary."""
        import seqio

        return seqio.ByteVocabulary()

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + BYTE_OFFSET for byte in text.encode("utf-8")] for text in texts]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        known = range(BYTE_OFFSET, BYTE_OFFSET + 256)
        content = (bytes(id - BYTE_OFFSET for id in row if id in known) for row in rows)
        return [symbols.decode("utf-8", errors="replace") for symbols in content]


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model; its end-of-sentence piece ends a document."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model") from None
        end = self._processor.eos_id()
        if end < 0:
            raise UserError(f"{path}: the model has no end-of-sentence piece")
        super().__init__(str(path), self._processor.get_piece_size(), end, _file_sha256(path))

    def as_seqio(self) -> "seqio.Vocabulary":
        """seqio's vocabulary over the same file."""
        import seqio

        return seqio.SentencePieceVocabulary(str(self._path))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(texts), out_type=int)

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self._processor.decode(rows)


class TokenizerJsonVocabulary(Vocabulary):
    """A tokenizer.json of Hugging Face tokenizers that has an <|endoftext|> token (GPT-NeoX: 0).

    Ids are those of `tokenizers`: a text that spells out a special token holds that token, as it
    did in the paper's data. Every text is encoded whole, whatever truncation and padding the file
    was saved with.
    """

    def __init__(self, path: Path):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception:  # the library raises nothing narrower
            raise UserError(f"{path}: not a Hugging Face tokenizer.json") from None
        end = self._tokenizer.token_to_id(END_OF_TEXT_PIECE)
        if end is None:
            raise UserError(f"{path}: the tokenizer has no {END_OF_TEXT_PIECE} token")
        size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        sha256 = _file_sha256(path)
        if self._tokenizer.truncation is not None or self._tokenizer.padding is not None:
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            # They were obeyed once: the ids from then must not pass for those of this vocabulary.
            sha256 = hashlib.sha256(f"{sha256} texts whole".encode()).hexdigest()
        super().__init__(str(path), size, end, sha256)

    def as_seqio(self) -> "seqio.Vocabulary":
        """A seqio vocabulary that asks this one."""
        from scaling_jax.data.seqio_vocabulary import SeqioVocabulary

        return SeqioVocabulary(self)

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, rows: list[list[int]]) -> list[str]:
        return self._tokenizer.decode_batch(rows, skip_special_tokens=False)


def train_sentencepiece(documents: Iterable[str], size: int, out: Path) -> None:
    """Trains a SentencePiece model (BPE) of `size` pieces on `documents` and writes it to `out`.

    Nothing is normalised, no space is added or removed and unknown characters fall back to bytes,
    so decoding gives back every text, save U+2581, which SentencePiece itself writes for a space.

    Raises:
      UserError: `out` does not end in .model, or the documents cannot support so many pieces.
    """
    if out.suffix != ".model":
        raise UserError(f"{out}: the name of a SentencePiece vocabulary ends in .model")
    with atomic.replacing(out) as temporary, temporary.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(documents),
                model_writer=file,
                model_type="bpe",
                vocab_size=size,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                byte_fallback=True,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                eos_piece=END_OF_TEXT_PIECE,
                max_sentence_length=LONGEST_TRAINING_TEXT,
                minloglevel=2,
            )
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{out}: SentencePiece cannot make {size} pieces ({reason})") from None


@functools.lru_cache(maxsize=1)
def _unchanged(name: str, sha256: str) -> Vocabulary:
    """The vocabulary called `name`, if its content is what it was."""
    found = vocabulary(name)
    if found.sha256 != sha256:
        raise UserError(f"vocabulary '{name}': has changed in the meantime")
    return found


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
