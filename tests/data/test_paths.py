import gzip
import warnings

import fsspec
import pytest

from scaling_jax.data import catalog, paths
from scaling_jax.data.sources import FileSource
from scaling_jax.errors import UserError

LINE = '{"text": "a line"}\n'


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(LINE)
    return str(folder)


def read(path, split, overrides=()):
    (source,) = catalog.find(path, overrides)
    assert isinstance(source, FileSource)
    pieces = source.pieces(split)
    return sorted(piece.file.removeprefix(f"{source.folder}/") for piece in pieces)


def test_every_documented_kind_is_found_in_a_folder(tmp_path):
    kinds = [
        f"{kind}{packed}" for kind in ("txt", "jsonl", "json") for packed in ("", ".gz", ".zst")
    ]
    names = [f"a.{kind}" for kind in kinds]
    names += [
        "B.TXT",
        "b.JSONL.GZ",
        "a.parquet",
        "a.array_record",
        "n.array_record-00000-of-00001",
        "c/.txt",
    ]
    assert read(fill(tmp_path, *names), "train") == sorted(names)


def test_files_in_upper_case_are_unpacked(tmp_path):
    (tmp_path / "A.JSONL.GZ").write_bytes(gzip.compress(LINE.encode()))
    (source,) = catalog.find(str(tmp_path / "A.JSONL.GZ"), ["held_out_share=0"])
    found = source.documents("train", source.pieces("train"))
    assert (source.name, [record.text for record in found]) == ("A", ["a line"])


def test_what_a_folder_leaves_out_is_said(tmp_path):
    folder = fill(tmp_path, "a.txt", "b.csv", "c/d.md", "e.md", "f.md", ".hidden")
    with pytest.warns(
        UserWarning, match=r"4 files of other kinds left out: b\.csv, c/d\.md, e\.md"
    ):
        paths.config_of(folder)
    (tmp_path / "b.csv").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paths.config_of(fill(tmp_path / "c" / "clean", "a.txt", ".hidden"))


@pytest.mark.parametrize("validation", ["validation", "val", "valid", "dev"])
def test_the_splits_of_a_folder(tmp_path, validation):
    folder = fill(tmp_path, "train/a.jsonl", "train/more/b.txt", f"{validation}/c.jsonl")
    assert read(folder, "train") == ["train/a.jsonl", "train/more/b.txt"]
    assert read(folder, "validation") == [f"{validation}/c.jsonl"]
    assert read(folder, "validation", ["files=[train/a.jsonl]"]) == [f"{validation}/c.jsonl"]


def test_what_is_not_for_training_is_left_out(tmp_path):
    folder = fill(tmp_path, "train/a.jsonl", "test/b.jsonl", "c.jsonl")
    with pytest.warns(UserWarning, match="2 files outside train/ left out: c.jsonl, test/b.jsonl"):
        assert read(folder, "train") == ["train/a.jsonl"]


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev", "test"])
def test_a_split_without_a_folder_for_training_is_refused(tmp_path, name):
    folder = fill(tmp_path, "a.txt", f"{name}/b.txt")
    with pytest.raises(UserError, match=f"has {name}/ but no train/; say what to train on"):
        catalog.find(folder)
    assert read(folder, "train", ['files=["*.txt"]']) == ["a.txt"]
    own = ['files=["*.txt"]', f"validation_files=[{name}/b.txt]"]
    assert read(folder, "validation", own) == [f"{name}/b.txt"]


def test_two_splits_for_validation_are_refused(tmp_path):
    folder = fill(tmp_path, "train/a.txt", "val/b.txt", "dev/c.txt")
    with pytest.raises(UserError, match="val/ and dev/ may both be for validation"):
        catalog.find(folder)


def test_urls(tmp_path):
    memory = fsspec.filesystem("memory")
    for name in ("train/a.jsonl", "dev/b.jsonl"):
        memory.pipe(f"/bucket/mine/{name}", LINE.encode())
    for url in ("memory://bucket/mine", "memory://bucket/mine/"):
        (source,) = catalog.find(url)
        assert (source.name, source.splits) == ("mine", ("train", "validation"))
        for split in source.splits:
            found = source.documents(split, source.pieces(split))
            assert [record.text for record in found] == ["a line"]
    (source,) = catalog.find("memory://bucket/mine/dev/b.jsonl", ["held_out_share=0"])
    assert source.name == "b"
    assert len(source.pieces("train")) == 1
    (source,) = catalog.find(f"file://{fill(tmp_path, 'c.txt')}")
    assert source.name == tmp_path.name
    with pytest.raises(UserError, match=r"^memory://bucket/nothing.jsonl: there is no such file"):
        catalog.find("memory://bucket/nothing.jsonl")
    with pytest.raises(UserError, match=r"^nosuch://bucket/a.jsonl: cannot be searched"):
        catalog.find("nosuch://bucket/a.jsonl")
