"""Files appear whole or not at all."""

import os
import stat

import pytest

from scaling_jax import atomic


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    atomic.write_text(path, "one")
    atomic.write_text(path, "zwei ü")
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    atomic.write_text(path, "old")

    def fail_halfway():
        with atomic.replacing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_target_is_untouched_until_the_end(tmp_path):
    path = tmp_path / "file.txt"
    with atomic.replacing(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"


def test_permissions_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic.write_text(tmp_path / "file.txt", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "file.txt").stat().st_mode) == 0o640


def test_a_folder_appears_whole(tmp_path):
    path = tmp_path / "deep" / "data"
    with atomic.new_folder(path) as temporary:
        (temporary / "file.txt").write_text("new")
        assert not path.exists()
    assert (path / "file.txt").read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_failed_leaves_nothing_not_even_its_parents(tmp_path):
    def fail_halfway():
        with atomic.new_folder(tmp_path / "deep" / "deeper" / "data") as temporary:
            (temporary / "file.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
