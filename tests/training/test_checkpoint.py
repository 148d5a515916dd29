import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.errors import UserError
from scaling_jax.training import checkpoint, state
from scaling_jax.training.checkpoint import Checkpoints

CURVE = {
    "step": np.arange(1, 2001),
    # More than 32 bits hold: the tokens of a real run.
    "tokens": np.arange(1, 2001) * 138_000_000,
    "loss": np.random.default_rng(0).random(2000).astype(np.float32),
}


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0b100
    path.write_bytes(content)


def largest(folder):
    return max(folder.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)


def same(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, jax.device_get(one), jax.device_get(other)))


@pytest.fixture(scope="module")
def layout(model, make_mesh):
    return state.abstract(model, make_mesh("all"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, layout, fill):
    """Two checkpoints, of step 4 and of step 8; tests change copies of them."""
    folder = tmp_path_factory.mktemp("checkpoints") / "kept"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step in (4, 8):
            curve = {name: column[:step] if step == 4 else column for name, column in CURVE.items()}
            checkpoints.save(fill(layout, step, step), curve, {"identity": "abc", "next_row": step})
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.mark.parametrize("mesh_name", ["all", "one", "fsdp"])
def test_what_is_restored_is_what_was_saved_on_any_mesh(
    folder, layout, fill, model, make_mesh, mesh_name
):
    wanted = state.abstract(model, make_mesh(mesh_name))
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(wanted)
    assert restored is not None
    assert same(restored.state, fill(layout, 8, 8))
    assert jax.tree.structure(restored.state) == jax.tree.structure(wanted)
    for leaf, like in zip(*map(jax.tree.leaves, (restored.state, wanted)), strict=True):
        assert (leaf.dtype, leaf.sharding) == (like.dtype, like.sharding)
    assert restored.meta["identity"] == "abc"
    assert (restored.meta["step"], restored.meta["next_row"]) == (8, 8)
    for name, column in CURVE.items():
        assert np.array_equal(restored.curve[name], column)
        assert restored.curve[name].dtype == column.dtype


def test_curve_and_meta_are_read_without_the_state(folder):
    shutil.rmtree(folder / "8" / "state")
    curve = checkpoint.read_curve(folder)
    assert all(np.array_equal(curve[name], column) for name, column in CURVE.items())
    meta = json.loads((folder / "8" / "meta" / "metadata").read_text())
    assert meta["versions"]["jax"] == jax.__version__


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Orbax leaves tasks behind that it has given up.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("part", ["state", "curve"])
@pytest.mark.parametrize("damage", [flip, cut, lambda path: path.unlink()], ids=["flip", "cut", ""])
def test_a_damaged_step_is_set_aside_and_the_one_before_it_is_used(
    folder, layout, fill, caplog, part, damage
):
    damage(largest(folder / "8" / part))
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(layout)
        assert restored is not None
        assert same(restored.state, fill(layout, 4, 4))
        assert len(restored.curve["step"]) == 4
        assert "checkpoint of step 8 is damaged and set aside" in caplog.text
        assert checkpoint.latest_step(folder) == 4
        checkpoints.save(fill(layout, 8, 8), CURVE, {})
    with Checkpoints(folder, keep=2) as checkpoints:
        again = checkpoints.restore_latest(layout)
    assert again is not None
    assert same(again.state, fill(layout, 8, 8))
    assert (folder / "8.damaged" / part).is_dir()


def test_nothing_good_is_none(folder, layout, tmp_path):
    with Checkpoints(tmp_path / "empty", keep=2) as checkpoints:
        assert checkpoints.restore_latest(layout) is None
    for step in ("4", "8"):
        flip(largest(folder / step / "state"))
    with Checkpoints(folder, keep=2) as checkpoints:
        assert checkpoints.restore_latest(layout) is None


def test_a_checkpoint_that_is_not_wanted_stays_as_it_is(folder, layout):
    def refuse(meta):
        raise UserError(f"it is of {meta['identity']}")

    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(UserError, match="it is of abc"):
        checkpoints.restore_latest(layout, refuse)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_only_the_latest_are_kept_and_a_step_is_saved_once(folder, layout, fill):
    with Checkpoints(folder, keep=2) as checkpoints:
        checkpoints.save(fill(layout, 12, 12), CURVE, {})
        checkpoints.save(fill(layout, 13, 12), CURVE, {})
    assert sorted(path.name for path in folder.iterdir()) == ["12", "8"]
    assert checkpoint.latest_step(folder) == 12
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(layout)
    assert restored is not None
    assert same(restored.state, fill(layout, 12, 12))


def test_the_latest_step_of_an_empty_or_absent_folder_is_none(tmp_path):
    assert checkpoint.latest_step(tmp_path) is None
    assert checkpoint.latest_step(tmp_path / "absent") is None


ARRAY = np.random.default_rng(0).standard_normal(1000).astype(np.float32)


@given(place=st.integers(0, 999), bit=st.integers(0, 31))
def test_any_flipped_bit_changes_the_fingerprint(place, bit):
    words = ARRAY.view(np.uint32).copy()
    words[place] ^= np.uint32(1 << bit)
    before, after = (
        checkpoint._fingerprints({"a": jnp.asarray(each)})  # pyright: ignore[reportArgumentType]
        for each in (ARRAY, words.view(np.float32))
    )
    assert before["a"] != after["a"]


@given(places=st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True))
def test_swapped_numbers_change_the_fingerprint(places):
    swapped = ARRAY.copy()
    swapped[places] = ARRAY[places[::-1]]
    before, after = (
        checkpoint._fingerprints({"a": jnp.asarray(each)})  # pyright: ignore[reportArgumentType]
        for each in (ARRAY, swapped)
    )
    assert before["a"] != after["a"]
