"""From files to shards, without TensorFlow; `test_tasks` compares with what seqio streams."""

import gzip
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from scaling_jax.data import corpora, prepare
from scaling_jax.data.shards import Shards
from scaling_jax.errors import UserError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
NEOX = SHARED / "tokenizer" / "20B_tokenizer.json"
REAL = {
    "shakespeare": SHARED / "text" / "tinyshakespeare" / "input.txt",
    "wikitext": SHARED / "text" / "wikitext2" / "valid.txt",
    "peps": SHARED / "text" / "peps_rst" / "peps.txt",
}
needs_real_text = pytest.mark.skipif(
    not NEOX.is_file() or not all(path.is_file() for path in REAL.values()),
    reason=f"the text and the tokenizer are not there: {SHARED}",
)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    texts = [document.text for document in corpora.python_docs()[:600]]
    return write_lines(tmp_path_factory.mktemp("texts") / "docs.jsonl", texts)


@pytest.fixture(scope="module")
def real_documents():
    """Three kinds of real text; all but the PEPs, which are separated, cut at blank lines."""
    separators = {"shakespeare": "\n\n", "wikitext": " \n \n", "peps": "<|endoftext|>"}
    return {
        name: [text for text in path.read_text()[:400_000].split(separators[name]) if text]
        for name, path in REAL.items()
    }


@needs_real_text
def test_the_ids_of_real_text_are_those_of_tokenizers(real_documents, tmp_path):
    folder = tmp_path / "real"
    folder.mkdir()
    shakespeare, wikitext, peps = real_documents.values()
    write_lines(folder / "a.jsonl", shakespeare)
    with gzip.open(folder / "b.json.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in wikitext)
    for number, text in enumerate(peps):
        (folder / f"pep {number:04d}.txt").write_text(text)
    (index,) = prepare.prepare(
        str(folder), out=tmp_path, vocabulary=str(NEOX), overrides=["held_out_share=0"], shards=5
    )
    plain = tokenizers.Tokenizer.from_file(str(NEOX))
    documents = [*peps, *shakespeare, *wikitext]  # .txt files come before lines
    expected = [id for row in plain.encode_batch(documents) for id in [*row.ids, 0]]
    shards = Shards.open(tmp_path / "real" / "train")
    assert np.concatenate(shards.arrays).tolist() == expected
    rows = shards.rows(np.arange(shards.row_count(2048)), 2048)
    assert rows.ravel().tolist() == expected[: len(expected) // 2049 * 2049]
    assert index.documents == len(documents)
    assert index.text_bytes == sum(len(text.encode()) for text in documents)


@needs_real_text
def test_ends_of_text_that_a_file_spells_out_end_its_documents(real_documents, tmp_path):
    peps = real_documents["peps"][:20]
    (tmp_path / "peps.txt").write_text("<|endoftext|>".join(peps))
    (index,) = prepare.prepare(
        str(tmp_path / "peps.txt"),
        out=tmp_path,
        vocabulary=str(NEOX),
        overrides=["held_out_share=0"],
    )
    plain = tokenizers.Tokenizer.from_file(str(NEOX))
    expected = [id for row in plain.encode_batch(peps) for id in [*row.ids, 0]]
    assert Shards.open(tmp_path / "peps" / "train").arrays[0].tolist() == expected
    assert index.shards[0].spelled_ends == 19
    assert prepare.describe(index).endswith("their text spells out 19 ends of text")


def test_any_number_of_shards_workers_and_machines_gives_the_same(docs, tmp_path):
    def tokens(name: str, **options: object) -> tuple[bytes, int]:
        (index, _) = prepare.prepare(str(docs), out=tmp_path / name, **options)  # pyright: ignore[reportArgumentType]
        shards = Shards.open(tmp_path / name / "docs" / "train")
        shards.verify()
        assert shards.index == index
        return np.concatenate(shards.arrays).tobytes(), len(index.shards)

    one, _ = tokens("one")
    assert tokens("seven", shards=7) == (one, 7)
    assert tokens("spread", shards=7, workers=2) == (one, 7)
    assert prepare.prepare(str(docs), out=tmp_path / "apart", shards=7, machine=(1, 2)) == []
    assert not list((tmp_path / "apart").rglob("index.json"))
    assert tokens("apart", shards=7, machine=(0, 2)) == (one, 7)
    assert (
        content(tmp_path / "seven") == content(tmp_path / "spread") == content(tmp_path / "apart")
    )


def test_what_is_there_is_kept_and_what_is_not_whole_is_made_again(docs, tmp_path):
    folder = tmp_path / "docs" / "train"

    def made_again(shards: int = 4) -> int:
        heard: list[prepare.Todo] = []
        prepare.prepare(str(docs), out=tmp_path, shards=shards, begin=heard.append)
        Shards.open(folder).verify()
        assert not list(folder.glob(".*"))
        return heard[0].shards

    assert made_again() == 8
    first = content(tmp_path)
    assert made_again() == 0
    shard = folder / "tokens-00001-of-00004.u16"
    shard.write_bytes(shard.read_bytes().replace(b"a", b"b"))
    assert made_again() == 1
    shard.unlink()
    (folder / f".{shard.name}.abc.tmp").write_bytes(b"half")
    assert made_again() == 1
    (folder / "index.json").unlink()
    assert made_again() == 4  # without the index nobody knows what they were made from
    assert content(tmp_path) == first
    made_again(shards=2)
    assert len(list(folder.glob("tokens-*"))) == 2


def test_only_what_changed_is_prepared_again(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(6):
        write_lines(folder / f"{number}.jsonl", [f"text {number} {line}" for line in range(100)])

    def made(vocabulary: str = "bytes") -> tuple[int, list[prepare.Index]]:
        heard: list[prepare.Todo] = []
        indices = prepare.prepare(
            str(folder),
            out=tmp_path / "out",
            vocabulary=vocabulary,
            overrides=["held_out_share=0"],
            shards=6,
            begin=heard.append,
        )
        return heard[0].shards, indices

    count, (before,) = made()
    assert count == 6
    path = folder / "3.jsonl"
    path.write_text(path.read_text().replace("text 3 7", "text 3 8"))
    count, (after,) = made()
    assert count == 1
    changed = [old != new for old, new in zip(before.shards, after.shards, strict=True)]
    assert changed == [number == 3 for number in range(6)]


def test_a_piece_whose_last_line_changed_beyond_its_end_is_prepared_again(tmp_path):
    path = write_lines(tmp_path / "lines.jsonl", ["a" * 1000 for _ in range(8)])

    def tokens(out: Path) -> bytes:
        prepare.prepare(str(path), out=out, overrides=["held_out_share=0"], shards=3)
        return np.concatenate(Shards.open(out / "lines" / "train").arrays).tobytes()

    before = tokens(tmp_path / "out")
    text = path.read_text()
    end = -(-len(text) // 3)
    path.write_text(text[: end + 10] + "bbb" + text[end + 13 :])
    after = tokens(tmp_path / "out")
    assert before != after == tokens(tmp_path / "new")


def test_another_source_of_the_same_name_is_refused(tmp_path):
    out = tmp_path / "out"
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        write_lines(tmp_path / place / "text.jsonl", [f"{place} {line}" for line in range(99)])
    first, second = (tmp_path / place / "text.jsonl" for place in ("x", "y"))
    prepare.prepare(str(first), out=out)
    before = content(out)
    for options in ({}, {"shards": 4}, {"overrides": ["held_out_share=0.2"]}, {"machine": (1, 9)}):
        with pytest.raises(UserError, match=r"text/\w+: holds what was .*x/text\.jsonl, not from"):
            prepare.prepare(str(second), out=out, **options)  # pyright: ignore[reportArgumentType]
        assert content(out) == before
    prepare.prepare(str(second), out=out, overrides=["name=other"])
    assert content(out).items() > before.items()
    write_lines(first, [f"other {line}" for line in range(99)])  # the same files may change
    prepare.prepare(str(first), out=out, shards=2)
    first.rename(tmp_path / "text.jsonl")  # and move
    before = content(out)
    prepare.prepare(str(tmp_path / "text.jsonl"), out=out, shards=2)
    assert content(out) == before


def test_a_folder_that_grows_is_the_same_source(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    write_lines(folder / "a.jsonl", [f"text {line}" for line in range(99)])
    (before, _) = prepare.prepare(str(folder), out=tmp_path)
    (folder / "b.txt").write_text("a text of another kind")
    (after, _) = prepare.prepare(str(folder), out=tmp_path)
    assert after.tokens > before.tokens
    with pytest.raises(UserError, match=r"train/index\.json: is to be written, and to be read"):
        prepare.prepare(str(folder), out=tmp_path, overrides=['files=["**/*.json"]'])


def test_nothing_stays_behind_when_the_source_fails(tmp_path):
    path = write_lines(tmp_path / "texts.jsonl", [f"text {number}" for number in range(300)])
    path.write_text(path.read_text() + "broken")
    with pytest.raises(UserError, match="line 301"):
        prepare.prepare(str(path), out=tmp_path / "out")
    assert list(content(tmp_path)) == ["texts.jsonl"]
    with pytest.raises(UserError, match="line 301"):
        prepare.prepare(str(path), out=tmp_path / "out", shards=4, workers=2)
    assert not list(tmp_path.rglob("index.json"))
    indices = prepare.prepare(str(path), out=tmp_path / "out", overrides=["on_error=skip"])
    assert sum(index.documents for index in indices) == 300
    assert [index.skipped for index in indices if index.skipped] == [{"not JSON": 1}]
    with pytest.raises(UserError, match="line 301"):  # what was left out once is not forgiven
        prepare.prepare(str(path), out=tmp_path / "out")


def test_an_empty_split_is_an_error_that_says_what_to_do(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the only document")
    with pytest.raises(UserError, match="no document falls into the train split; give more"):
        prepare.prepare(str(path), out=tmp_path / "out")
    assert not list(tmp_path.rglob("index.json"))


def test_a_validation_split_that_no_document_falls_into_is_left_out(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a single document")
    with pytest.warns(UserWarning, match="no document falls into the validation split"):
        (index,) = prepare.prepare(str(path), out=tmp_path / "out")
    assert (index.split, index.documents) == ("train", 1)


def test_a_full_disk(docs, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"tokens-.*cannot be written \(.*goes on from there"):
            prepare.prepare(str(docs), out=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == {}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(docs, tmp_path):
    command = [sys.executable, "-m", "scaling_jax.cli", "data", "prepare", str(docs)]
    command += ["--shards", "60", "--workers", "2", "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    whole = content(tmp_path / "whole")
    random.seed(0)
    killed = 0
    for attempt in range(3):
        out = tmp_path / f"killed {attempt}"
        for files in sorted(random.choices(range(1, 240), k=3)):
            process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
            while process.poll() is None and len(list(out.rglob("*"))) < files:
                time.sleep(0.001)
            process.send_signal(random.choice([signal.SIGKILL, signal.SIGINT]))
            killed += process.wait() != 0
            for file in out.rglob("index.json"):
                Shards.open(file.parent).verify()
        subprocess.run([*command, str(out)], check=True)
        assert content(out) == whole
    assert killed >= 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs /proc")
@pytest.mark.slow
def test_workers_end_with_their_parent(docs, tmp_path):
    command = [sys.executable, "-m", "scaling_jax.cli", "data", "prepare", str(docs), "--shards"]
    command += ["400", "--workers", "2", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not list(tmp_path.rglob("*.u16")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _alive_in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive_in_session(process.pid)


def _alive_in_session(session: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["python_cod"], "did you mean 'python_code'"),
        (["python_code", "--vocabulary", "words"], "give bytes"),
        (["python_code", "--shards", "0"], "give 1 or more"),
        (["python_code", "--workers", "0"], "give 1 or more"),
        (["python_code", "--shard", "0/4"], "give i/n, from 1/n to n/n"),
        (["c4", "folder=nowhere"], "nowhere: no file is called en/c4-train.*.json.gz"),
        (["python_code", "python_code"], "would be called 'python_code'"),
        (["memory://b/x=1.jsonl"], "memory://b/x=1.jsonl: there is no such file or folder"),
        (["python_docs", "--out", "/proc/foo"], "/proc/foo: cannot be made a folder"),
        (["python_docs", "--out", __file__], "cannot be made a folder (File exists)"),
        (["python_docs", "--out", f"{__file__}/below"], "cannot be made a folder (Not a dir"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(monkeypatch, capsys, tmp_path, arguments, message):
    from scaling_jax import cli

    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scaling-jax", "data", "prepare", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = (line for line in lines if "Cyclopts" not in line)  # it notices that this is a test
    assert message in error
    assert content(tmp_path) == {}


def test_a_file_with_an_equals_sign_in_its_name_is_no_setting(monkeypatch, tmp_path):
    from scaling_jax import cli

    monkeypatch.chdir(tmp_path)
    write_lines(Path("st=1.jsonl"), [f"text {line}" for line in range(99)])
    command = ["scaling-jax", "data", "prepare", "st=1.jsonl", "held_out_share=0", "--out", "out"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code
    assert Shards.open("out/st=1/train").index.documents == 99


@pytest.mark.slow
def test_preparing_files_imports_no_tensorflow(docs, tmp_path):
    code = f"""
import pathlib, sys
from scaling_jax.data import batches, inspect, prepare, shards, vocabularies
out = pathlib.Path({str(tmp_path)!r})
prepare.prepare("python_docs", out=out)
prepare.prepare({str(docs)!r}, out=out)
inspect.inspect(out / "docs" / "validation")
assert not {{"tensorflow", "seqio", "tensorflow_datasets"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
