import pytest
import yaml

from scaling_jax import config_files
from scaling_jax.data import catalog
from scaling_jax.data.sources import FileSource
from scaling_jax.data.tfds_source import TfdsSource
from scaling_jax.errors import UserError


def test_the_papers_three():
    (c4,) = catalog.find("c4", ["folder=gs://bucket/c4"])
    assert isinstance(c4, FileSource)
    assert (c4.folder, c4.splits) == ("gs://bucket/c4", ("train", "validation"))
    (prepared,) = catalog.find("c4_tfds")
    assert isinstance(prepared, TfdsSource)
    assert (prepared.name, prepared.builder) == ("c4", "c4/en:3.1.0")
    (refined,) = catalog.find("refinedweb")
    assert isinstance(refined, FileSource)
    assert refined.fields == ("content", "url")
    assert refined.held_out_share > 0
    parts = catalog.find("redpajama")
    assert len(parts) == 7
    assert parts[0].name == "redpajama-common_crawl"
    rates = catalog.source_config("redpajama").rates()
    assert list(rates) == [part.name for part in parts]
    assert sum(rates.values()) == 1210
    assert rates["redpajama-common_crawl"] == 878


def test_a_config_of_your_own(tmp_path):
    (tmp_path / "notes.zip.txt").write_text("a")
    content = {"name": "mine", "folder": str(tmp_path), "files": ["*.txt"], "on_empty": "fail"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    (source,) = catalog.find(str(tmp_path / "mine.yaml"), ["name=other"])
    assert (source.name, source.splits) == ("other", ("train",))
    assert len(source.fatal) == 5


def test_paths(tmp_path):
    folder = tmp_path / "books"
    (folder / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.jsonl.zst", "deep/er/c[1].txt", "notes.md"):
        (folder / name).write_text("book")
    (folder / "link.txt").symlink_to("notes.md")
    with pytest.warns(UserWarning, match=r"1 file of other kinds left out: notes\.md"):
        (source,) = catalog.find(str(folder))
    assert source.name == "books"
    names = [piece.file.removeprefix(f"{folder}/") for piece in source.pieces("train")]
    assert sorted(names) == ["a.txt", "deep/b.jsonl.zst", "deep/er/c[1].txt", "link.txt"]
    assert {piece.size for piece in source.pieces("train")} == {4}
    (source,) = catalog.find(str(folder / "deep" / "er" / "c[1].txt"), ["name=c"])
    assert [piece.file for piece in source.pieces("train")] == [f"{folder}/deep/er/c[1].txt"]
    (source,) = catalog.find(str(folder / "deep" / "b.jsonl.zst"))
    assert source.name == "b"


def test_a_folder_with_both_splits_is_taken_as_it_is(tmp_path):
    for split in ("train", "validation"):
        (tmp_path / "own" / split).mkdir(parents=True)
        (tmp_path / "own" / split / "a.txt").write_text(f"for {split}")
    (source,) = catalog.find(str(tmp_path / "own"))
    for split in source.splits:
        found = source.documents(split, source.pieces(split))
        assert [record.text for record in found] == [f"for {split}"]


def test_two_datasets_of_the_same_name(tmp_path):
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").touch()
    one, other = (str(tmp_path / place / "text.txt") for place in ("x", "y"))
    with pytest.raises(UserError, match=r"y/text\.txt: would be called 'text', and so would .*x/"):
        catalog.check_names([one, other], [], tmp_path)
    with pytest.raises(UserError, match="c4_tfds: would be called 'c4', and so would c4"):
        catalog.check_names(["c4", "c4_tfds"], [], tmp_path)
    catalog.check_names([one, "python_code", "redpajama"], [], tmp_path)


def test_names_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="did you mean 'python_docs'"):
        catalog.find("python_doc")
    with pytest.raises(UserError, match="did you mean 'refinedweb'"):
        catalog.find("refinedweb2")
    (tmp_path / "table.csv").touch()
    with pytest.raises(UserError, match=r"ends in one of \.txt, \.jsonl"):
        catalog.find("table.csv")
    for folder in ("./python_code", "my data"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").touch()
        with pytest.raises(UserError, match="cannot be the name of a dataset"):
            catalog.find(str(tmp_path / folder))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file ends in"):
        catalog.find("empty")
    with pytest.raises(UserError, match="has no setting such as text=b"):
        catalog.find("python_code", ["text=b"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tekst=b"], r"data/c4\.yaml: unknown key 'tekst' \(did you mean 'text'\?\)"),
        (["on_error=ignore"], "on_error: "),
        (["held_out_share=0.1"], "give either validation_files or held_out_share"),
        (["held_out_share=1"], "held_out_share: "),
        (["files=[]", "validation_files=[]"], "give either files"),
        (["format=tfds"], "go together"),
        (["name=a/b"], "'a/b' cannot be the name"),
    ],
)
def test_settings_that_cannot_be(overrides, message):
    with pytest.raises(UserError, match=message):
        catalog.find("c4", overrides)


def test_every_packaged_config_is_right():
    for name in catalog.packaged():
        assert catalog.find(name)
        assert config_files.find(f"data/{name}.yaml").read_text().startswith("# ")
