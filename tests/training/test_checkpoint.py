import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scaling_jax.errors import OutageError, UserError
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


def replace_by_another(path):
    """By the file of the same name of the other step, or else by one of another kind."""
    other = path.parents[path.parts[::-1].index("8")] / "4" / path.relative_to(_step(path))
    path.write_bytes(other.read_bytes() if other.is_file() else b"\x00{}" * 40)


def _step(path):
    return next(parent for parent in path.parents if parent.name == "8")


DAMAGES = {
    "flip": flip,
    "cut": cut,
    "empty": lambda path: path.write_bytes(b""),
    "remove": lambda path: path.unlink(),
    "replace": replace_by_another,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_file_is_damaged_no_number_is_wrong(saved, tmp_path, layout, fill, caplog, damage):
    """What is restored is step 8 as it was saved, or step 4 and a word about what is damaged."""
    wanted = {step: fill(layout, step, step) for step in (4, 8)}
    files = sorted(path.relative_to(saved) for path in (saved / "8").rglob("*") if path.is_file())
    assert len(files) > 15
    set_aside = set()
    for number, file in enumerate(files):
        folder = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](folder / file)
        caplog.clear()
        with Checkpoints(folder, keep=2) as checkpoints:
            restored = checkpoints.restore_latest(layout)
        assert restored is not None, file
        step = restored.meta["step"]
        assert same(restored.state, wanted[step]), file
        for name, column in CURVE.items():
            expected = column[:4] if step == 4 else column
            assert np.array_equal(restored.curve[name], expected), file
            assert restored.curve[name].dtype == expected.dtype, file
        if step == 4:
            set_aside.add(file.parts[1])
            assert (folder / "8.damaged").is_dir()
            assert f"damaged and set aside: {folder / '8' / file.parts[1]}: " in caplog.text
        else:
            assert "set aside" not in caplog.text
    assert {"meta", "curve", "state"} <= set_aside


def test_a_step_in_the_place_of_another_is_no_checkpoint(folder, layout, fill, caplog):
    shutil.rmtree(folder / "8")
    shutil.copytree(folder / "4", folder / "8")
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(layout)
    assert restored is not None
    assert same(restored.state, fill(layout, 4, 4))
    assert "meta: it is that of step 4" in caplog.text


def test_the_meta_of_another_run_is_damage_and_its_whole_checkpoint_is_refused(
    folder, layout, fill, tmp_path, caplog
):
    def check(meta):
        if meta["identity"] != "abc":
            raise UserError(f"it is of {meta['identity']}")

    with Checkpoints(tmp_path / "other") as checkpoints:
        curve = {name: column[:8] for name, column in CURVE.items()}
        checkpoints.save(fill(layout, 5, 8), curve, {"identity": "xyz", "next_row": 8})
    meta = (tmp_path / "other" / "8" / "meta" / "metadata").read_bytes()
    (folder / "8" / "meta" / "metadata").write_bytes(meta)
    with Checkpoints(folder, keep=2) as checkpoints:
        restored = checkpoints.restore_latest(layout, check)
        assert restored is not None
        assert restored.meta["step"] == 4
    assert "curve: array" in caplog.text
    shutil.copytree(tmp_path / "other" / "8", folder / "8")
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(UserError, match="it is of xyz"),
    ):
        checkpoints.restore_latest(layout, check)
    assert (folder / "8").is_dir()


@pytest.mark.parametrize("part", ["meta", "curve"])
def test_what_is_read_without_the_state_is_checked_too(folder, part):
    flip(largest(folder / "8" / part))
    with pytest.raises(UserError, match=rf"8/{part}: .*rename .*8 to 8\.damaged") as caught:
        checkpoint.read_curve(folder)
    assert "\n" not in str(caught.value)
    (folder / "8").rename(folder / "8.damaged")
    assert len(checkpoint.read_curve(folder)["step"]) == checkpoint.read_meta(folder)["step"] == 4


def test_a_storage_that_cannot_be_read_sets_nothing_aside(folder, layout, monkeypatch):
    def denied(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.sealed, "read", denied)
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(UserError, match=r"8/meta: cannot be read: Permission denied;"),
    ):
        checkpoints.restore_latest(layout)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


class Outage:
    """Stands for a function: raises `error` so many times, then does what the function does."""

    def __init__(self, function, error, times):
        self.function, self.error, self.times = function, error, times

    def __call__(self, *arguments, **_):
        self.times -= 1
        if self.times >= 0:
            raise self.error
        return self.function(*arguments)


OUTAGES = {
    "disk": OSError(errno.EIO, "Input/output error"),
    "time": TimeoutError("timed out"),
    "mount": OSError(errno.ESTALE, "Stale file handle"),
    "tensorstore": ValueError("UNKNOWN: Error reading 'a' [os_error_code='5']"),
}


@pytest.mark.parametrize("error", OUTAGES.values(), ids=OUTAGES)
def test_a_short_outage_is_waited_for(folder, layout, fill, monkeypatch, caplog, error):
    outage = Outage(checkpoint._read_arrays, error, times=2)
    monkeypatch.setattr(checkpoint, "_read_arrays", outage)
    with Checkpoints(folder, keep=2, pauses=(0.01, 0.02)) as checkpoints:
        restored = checkpoints.restore_latest(layout)
    assert restored is not None
    assert same(restored.state, fill(layout, 8, 8))
    assert "trying again in 0.02 s" in caplog.text


@pytest.mark.parametrize("error", OUTAGES.values(), ids=OUTAGES)
@pytest.mark.parametrize("read_only", [True, False])
def test_an_outage_that_lasts_sets_nothing_aside(folder, layout, monkeypatch, error, read_only):
    monkeypatch.setattr(checkpoint.sealed, "read", Outage(None, error, times=2))
    with (
        Checkpoints(folder, keep=2, read_only=read_only, pauses=(0.01,)) as checkpoints,
        pytest.raises(OutageError, match=r"8/meta: cannot be read: .* same command") as caught,
    ):
        checkpoints.restore_latest(layout)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_what_nobody_knows_is_no_damage(folder, layout, monkeypatch):
    monkeypatch.setattr(checkpoint, "_read_arrays", Outage(None, RuntimeError("odd"), times=1))
    with Checkpoints(folder, keep=2) as checkpoints, pytest.raises(RuntimeError, match="odd"):
        checkpoints.restore_latest(layout)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_the_state_of_another_program_is_refused(folder, layout):
    other = dict(layout, extra=layout["step"])
    with (
        Checkpoints(folder, keep=2) as checkpoints,
        pytest.raises(UserError, match=r"state\['extra'\] is only here") as caught,
    ):
        checkpoints.restore_latest(other)  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_reading_leaves_what_a_training_run_writes_alone(folder, layout, fill, caplog):
    unfinished = folder / "12.orbax-checkpoint-tmp"
    unfinished.mkdir()
    flip(largest(folder / "8" / "state"))
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(layout)
    assert restored is not None
    assert same(restored.state, fill(layout, 4, 4))
    assert "checkpoint of step 8 is damaged or gone, passed over" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["12.orbax-checkpoint-tmp", "4", "8"]


def test_where_the_run_has_replaced_the_only_step_meanwhile_the_new_one_is_read(
    folder, layout, fill, monkeypatch
):
    (folder / "8").rename(folder / "later")
    read = checkpoint._read_meta

    def replaced(step):
        if step.name == "4":
            (folder / "later").rename(folder / "8")
            shutil.rmtree(step)
        return read(step)

    monkeypatch.setattr(checkpoint, "_read_meta", replaced)
    with Checkpoints(folder, read_only=True) as checkpoints:
        restored = checkpoints.restore_latest(layout)
    assert restored is not None
    assert same(restored.state, fill(layout, 8, 8))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (OSError(errno.EIO, "Input/output error"), OutageError),
        (TimeoutError("after 1200 s"), TimeoutError),
        (jax.errors.JaxRuntimeError("Gloo: Connection reset by peer"), jax.errors.JaxRuntimeError),
    ],
    ids=repr,
)
def test_a_save_that_fails_says_whether_it_may_be_over_later(
    tmp_path, layout, fill, monkeypatch, raised, expected
):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    monkeypatch.setattr(checkpoints._manager, "save", Outage(None, raised, times=1))
    with checkpoints, pytest.raises(expected):
        checkpoints.save(fill(layout, 4, 4), CURVE, {})


def test_the_newest_whole_meta_is_found(folder, caplog):
    assert (checkpoint.newest_whole_meta(folder) or {})["step"] == 8
    flip(folder / "8" / "meta" / "metadata")
    assert (checkpoint.newest_whole_meta(folder) or {})["step"] == 4
    assert "checkpoint of step 8 is damaged or gone" in caplog.text
    assert checkpoint.newest_whole_meta(folder / "absent") is None


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
