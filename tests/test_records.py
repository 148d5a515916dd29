"""The records table keeps what it is given and says exactly what is wrong with it."""

import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scaling_jax import records
from scaling_jax.errors import UserError


def table(rows: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "run": [f"r{i}" for i in range(rows)],
            "dataset": "c4",
            "model": "m",
            "params": [10.0 ** (6 + i) for i in range(rows)],
            "tokens": [10.0 ** (8 + i) for i in range(rows)],
            "loss/c4": [3.5 - 0.3 * i for i in range(rows)],
            "error/task": [0.0, 0.5, 1.0][:rows],
            "note": ["a", "b,c", 'd"e'][:rows],
        }
    )


@pytest.mark.parametrize("suffix", records.SUFFIXES)
def test_every_format_gives_back_the_same_table(tmp_path, suffix):
    path = tmp_path / f"runs{suffix}"
    records.write(table(), path)
    pd.testing.assert_frame_equal(records.read(path), records.check(table()), rtol=1e-9)


def test_derived_columns_are_filled_in_and_unknown_ones_kept():
    checked = records.check(table()[["params", "tokens", "loss/c4", "note"]])
    np.testing.assert_allclose(checked["token_multiplier"], checked["tokens"] / checked["params"])
    np.testing.assert_allclose(checked["flops_6nd"], 6 * checked["params"] * checked["tokens"])
    assert list(checked["run"]) == ["row 1", "row 2", "row 3"]
    assert list(checked["note"]) == ["a", "b,c", 'd"e']


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="tokens"), "column 'tokens' is missing"),
        (lambda t: t.rename(columns={"params": "parms"}), "did you mean 'parms'"),
        (lambda t: t.assign(params=[1, -1, 2]), "row 2, column 'params': -1"),
        (lambda t: t.assign(tokens=[1.0, np.nan, 2.0]), "row 2, column 'tokens'"),
        (lambda t: t.assign(**{"loss/c4": [1.0, 0.0, 2.0]}), "row 2, column 'loss/c4'"),
        (lambda t: t.assign(**{"loss/c4": [1.0, np.inf, 2.0]}), "row 2, column 'loss/c4'"),
        (lambda t: t.assign(**{"loss/c4": ["1", "two", "3"]}), "'two'"),
        (lambda t: t.assign(**{"error/task": [0.1, -0.1, 0.2]}), "column 'error/task'"),
        (lambda t: t.assign(run="r"), "row 2 repeats the key"),
        (lambda t: t[:0], "no rows"),
    ],
)
def test_a_fault_is_named_with_row_and_column(tmp_path, change, message):
    path = tmp_path / "runs.csv"
    change(table()).to_csv(path, index=False)
    with pytest.raises(UserError, match=message) as caught:
        records.read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loss_may_be_absent_but_a_count_may_not():
    some = table().assign(**{"loss/c4": [3.0, np.nan, 2.0]})
    assert records.check(some)["loss/c4"].isna().sum() == 1


def test_one_run_may_have_several_steps():
    twice = pd.concat([table().assign(step=1), table().assign(step=2)])
    assert len(records.check(twice)) == 6


@pytest.mark.parametrize("name", ["runs.xlsx", "runs"])
def test_an_unknown_suffix_is_refused_both_ways(tmp_path, name):
    (tmp_path / name).write_text("x")
    for action in (lambda path: records.write(table(), path), records.read):
        with pytest.raises(UserError, match=r"\.csv, \.parquet, \.json"):
            action(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'{"a": [1, 2'])
@pytest.mark.parametrize("suffix", records.SUFFIXES)
def test_bytes_that_are_no_table_are_refused_in_one_line(tmp_path, suffix, content):
    path = tmp_path / f"runs{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        records.read(path)
    assert "\n" not in str(caught.value)


def test_a_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "runs.csv"
    records.write(table(), path)
    before = path.read_bytes()
    with pytest.raises(UserError):
        records.write(table().assign(params=-1.0), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.parametrize("suffix", records.SUFFIXES)
def test_columns_are_renamed_and_scaled_on_the_way_in(tmp_path, suffix):
    theirs = pd.DataFrame({"N": [1e8, 2e8], "D (billions)": [2, 4], "val": [3.0, 2.8], "lr": 0.1})
    path = tmp_path / f"sweep{suffix}"
    if suffix == ".csv":
        theirs.to_csv(path, index=False)
    elif suffix == ".parquet":
        theirs.to_parquet(path)
    else:
        theirs.to_json(path, orient="records")
    names = {"N": "params", "D (billions)": "tokens", "val": "loss/c4_val"}
    found = records.read(path, columns=names, scale={"D (billions)": 1e9})
    assert list(found["tokens"]) == [2e9, 4e9]
    assert list(found["token_multiplier"]) == [20, 20]
    assert records.targets(found) == ["loss/c4_val"]
    assert list(found["lr"]) == [0.1, 0.1]


@pytest.mark.parametrize(
    ("columns", "scale", "message"),
    [
        ({"prams": "params"}, {}, "no column 'prams' .did you mean 'params'"),
        ({"tokens": "params"}, {}, "column 'params' is there twice"),
        ({"loss/c4": "loss/a", "error/task": "loss/a"}, {}, "column 'loss/a' is there twice"),
        ({}, {"tokns": 1e9}, "no column 'tokns' .did you mean 'tokens'"),
        ({}, {"tokens": 0.0}, "column 'tokens': the scale 0.0 is not finite and positive"),
        ({}, {"tokens": float("nan")}, "the scale nan"),
        ({}, {"note": 2.0}, "column 'note' is not a column of numbers to scale"),
        ({"params": "N"}, {}, "column 'params' is missing"),
    ],
)
def test_a_wrong_mapping_is_one_clear_line(tmp_path, columns, scale, message):
    path = tmp_path / "runs.csv"
    table().to_csv(path, index=False)
    with pytest.raises(UserError, match=message) as caught:
        records.read(path, columns=columns, scale=scale)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-3, 1e15), min_size=1, max_size=8, unique=True))
def test_csv_keeps_every_digit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "runs.csv"
    records.write(pd.DataFrame({"params": values, "tokens": values}), path)
    assert list(records.read(path)["params"]) == values


def test_names_that_look_like_numbers_stay_names(tmp_path):
    table = records.check(pd.DataFrame({"params": [1e7], "tokens": [2e8], "loss/val": [3.0]}))
    records.write(table.assign(run="007"), tmp_path / "runs.csv")
    found = records.read(tmp_path / "runs.csv")
    assert found["run"].tolist() == ["007"]
    assert found["model"].tolist() == ["1e+07"]


def test_unhealthy_runs_are_left_out_loudly_unless_asked_for(tmp_path):
    path = tmp_path / "runs.csv"
    records.write(table().assign(health=pd.Series(["ok", "skipped 3", None])), path)
    with pytest.warns(UserWarning, match=r"UNHEALTHY .* 1 of 3 rows: r1 \(skipped 3\)"):
        assert list(records.read(path)["run"]) == ["r0", "r2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(records.read(path, unhealthy=True)["run"]) == ["r0", "r1", "r2"]
    records.write(table().assign(health="spiked 1"), path)
    with pytest.raises(UserError, match="no run is healthy"):
        records.read(path)


def test_a_signed_table_that_has_changed_is_warned_of(tmp_path):
    path = tmp_path / "records.csv"
    records.write(table(), path)
    records.sign(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records.read(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"3", 1))
    with pytest.warns(UserWarning, match="not what was written there: damaged, or edited"):
        records.read(path)
    records.unsign(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        records.read(path)
