"""The records table: one row for each (run, evaluated step). Training writes it, laws read it.

Columns
    run               name of the training run
    dataset           the data the run was trained on
    model             name of the model size
    params            N, parameters counted as in the paper (both embeddings, no qk-norm gains)
    tokens            D, tokens trained on (sequences x sequence length)
    token_multiplier  M = D / N
    flops_6nd         C = 6 N D
    seed, step
    loss/<set>        cross-entropy in nats per token, with 95 % bounds loss/<set>/low and /high
    error/<task>      1 - accuracy, with bounds in the same way; error/<average>: a mean over tasks
    chance/<task>     the error of guessing, the same in every row
    bits_per_byte/<set>   the loss in bits per byte of text, comparable between vocabularies
    unique_tokens     tokens trained on that were no repetition; absent means that it is not known
    health            ok, or what went wrong in training (skipped 3, spiked 1); absent: not known
Other columns are kept as they are. A table with other names or units is read by saying what its
columns are:

    read("sweep.csv", columns={"N": "params", "D": "tokens", "val": "loss/val"}, scale={"D": 1e9})
"""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from scaling_jax import atomic
from scaling_jax.errors import UserError, nearest

IDENTITY_COLUMNS = ("run", "dataset", "model")
COUNT_COLUMNS = ("params", "tokens")
DERIVED_COLUMNS = ("token_multiplier", "flops_6nd")
BITS_PER_BYTE = "bits_per_byte/"
CHANCE = "chance/"
HEALTH = "health"
HEALTHY = "ok"
MEASURE_PREFIXES = ("loss/", "error/", BITS_PER_BYTE)
SUFFIXES = (".csv", ".parquet", ".json")
# Runs named in a warning.
LISTED = 5


def read(
    path: str | Path,
    columns: Mapping[str, str] | None = None,
    scale: Mapping[str, float] | None = None,
    unhealthy: bool = False,
) -> pd.DataFrame:
    """Reads and checks a records table from CSV, Parquet or JSON (a list of row objects).

    Runs that the column `health` marks are left out, with a warning, unless they are asked for.

    Args:
      path: of the file; its suffix names the format.
      columns: {name in the file: name in the records table}; columns not named keep theirs.
      scale: {name in the file: factor}, for columns in other units (tokens in billions: 1e9).
      unhealthy: keep the runs in whose training something went wrong.

    Raises:
      UserError: the file is missing or unreadable, has no such column to rename or to scale, would
        have a column twice, `check` finds a fault in it, or no run in it is healthy.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such records table")
    _warn_if_changed(path)
    try:
        if path.suffix == ".csv":
            # Names are text, also those that look like numbers.
            table = pd.read_csv(path, dtype=dict.fromkeys(IDENTITY_COLUMNS, "str"))
        elif path.suffix == ".parquet":
            table = pd.read_parquet(path)
        elif path.suffix == ".json":
            table = pd.DataFrame(_json_rows(path))
        else:
            raise UserError(f"{path}: a records table ends in one of {', '.join(SUFFIXES)}")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not a readable table ({str(error).splitlines()[0]})") from error
    table = _renamed(_scaled(table, scale or {}, str(path)), columns or {}, str(path))
    table = check(table, source=str(path))
    return table if unhealthy else _healthy(table, str(path))


def write(table: pd.DataFrame, path: str | Path) -> None:
    """Checks `table` and writes it, atomically, in the format that the suffix of `path` names.

    Raises:
      UserError: unknown suffix, or `check` finds a fault in the table.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a records table ends in one of {', '.join(SUFFIXES)}")
    table = check(table, source=str(path))
    with atomic.replacing(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False)
        elif path.suffix == ".parquet":
            table.to_parquet(temporary, index=False)
        else:
            table.to_json(temporary, orient="records", indent=1)


def sign(path: Path) -> None:
    """Writes the sha256 of the table in `path` beside it, as sha256sum does; `read` looks at it."""
    line = f"{_sha256(path)}  {path.name}\n"
    atomic.write_text(_signature(path), line)


def unsign(path: Path) -> None:
    """Removes what `sign` has written, before the table changes."""
    _signature(path).unlink(missing_ok=True)


def check(table: pd.DataFrame, source: str = "records table") -> pd.DataFrame:
    """Returns a copy of `table` with the derived columns filled in, after checking every contract.

    `run`, `dataset` and `model` are optional (filled with the row number, "data" and the parameter
    count), so that a bare table of params, tokens and losses from any other trainer is welcome.

    Raises:
      UserError: naming `source`, row (1 is the first below the header) and column, if a required
        column is missing, a value is not a finite positive number, or a key appears twice.
    """
    if table.empty:
        raise UserError(f"{source}: has no rows")
    table = table.copy()
    for column in COUNT_COLUMNS:
        if column not in table:
            hint = nearest(column, map(str, table.columns))
            raise UserError(f"{source}: column '{column}' is missing ({hint})")
        table[column] = _positive(table[column], source)
    if "run" not in table:
        table["run"] = [f"row {row}" for row in range(1, len(table) + 1)]
    if "dataset" not in table:
        table["dataset"] = "data"
    if "model" not in table:
        table["model"] = [f"{params:.4g}" for params in table["params"]]
    for column in measures(table):
        table[column] = _positive(table[column], source, optional=True)
    if "token_multiplier" not in table:
        table["token_multiplier"] = table["tokens"] / table["params"]
    if "flops_6nd" not in table:
        table["flops_6nd"] = 6.0 * table["params"] * table["tokens"]
    for column in DERIVED_COLUMNS:
        table[column] = _positive(table[column], source)
    _check_keys(table, source)
    return table


def measures(table: pd.DataFrame) -> list[str]:
    """The names of the loss and error columns of `table`, bounds included."""
    return [name for name in map(str, table.columns) if name.startswith(MEASURE_PREFIXES)]


def targets(table: pd.DataFrame) -> list[str]:
    """The names of the loss and error columns that a law can be fitted to (no bounds)."""
    return [name for name in measures(table) if not name.endswith(("/low", "/high"))]


def chance_errors(table: pd.DataFrame) -> dict[str, float]:
    """The error of guessing of each task that has a column chance/<task>."""
    names = [name for name in map(str, table.columns) if name.startswith(CHANCE)]
    known = {name: table[name].dropna() for name in names}
    return {
        name.removeprefix(CHANCE): float(values.iloc[0])
        for name, values in known.items()
        if len(values)
    }


def next_token_error(validation_set: str) -> str:
    """The column of the top-1 next-token error on a validation set."""
    return f"error/next_token_{validation_set}"


def require(table: pd.DataFrame, columns: Sequence[str], source: str = "records table") -> None:
    """Raises a UserError naming the first of `columns` that `table` lacks, and the nearest one."""
    for column in columns:
        if column not in table:
            hint = nearest(column, map(str, table.columns))
            raise UserError(f"{source}: no column '{column}' ({hint})")


def _healthy(table: pd.DataFrame, source: str) -> pd.DataFrame:
    """The rows of runs that are healthy, or of which it is not known; the others are warned of."""
    if HEALTH not in table:
        return table
    wrong = table[HEALTH].notna() & (table[HEALTH] != HEALTHY)
    if wrong.all():
        raise UserError(
            f"{source}: no run is healthy (column '{HEALTH}'); take them with unhealthy"
        )
    if wrong.any():
        rows = table[wrong].drop_duplicates("run").head(LISTED)
        named = ", ".join(
            f"{run} ({what})" for run, what in zip(rows["run"], rows[HEALTH], strict=True)
        )
        more = table[wrong]["run"].nunique() - len(rows)
        warnings.warn(
            f"{source}: UNHEALTHY runs are left out, {wrong.sum()} of {len(table)} rows: {named}"
            f"{f' and {more} more' if more else ''}; take them in with unhealthy",
            stacklevel=3,
        )
    return table[~wrong].reset_index(drop=True)


def _warn_if_changed(path: Path) -> None:
    signature = _signature(path)
    if signature.is_file() and signature.read_bytes().split()[:1] != [_sha256(path).encode()]:
        warnings.warn(
            f"{path}: not what was written there: damaged, or edited (then remove "
            f"{signature.name}); `scaling-jax testbed table` writes it anew",
            stacklevel=3,
        )


def _signature(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _json_rows(path: Path) -> list[dict[str, Any]]:
    """Raises a ValueError unless the file is a list of objects, one a row, of numbers and texts."""
    rows = json.loads(path.read_bytes())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it is no list of objects, one a row")
    for number, row in enumerate(rows, start=1):
        for name, value in row.items():
            if isinstance(value, dict | list):
                raise ValueError(f"row {number}, column '{name}': neither a number nor text")
    return rows


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _scaled(table: pd.DataFrame, scale: Mapping[str, float], source: str) -> pd.DataFrame:
    require(table, list(scale), source)
    for name, factor in scale.items():
        if not (np.isfinite(factor) and factor > 0):
            raise UserError(
                f"{source}: column '{name}': the scale {factor} is not finite and positive"
            )
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UserError(f"{source}: column '{name}' is not a column of numbers to scale")
    return table.assign(**{name: table[name] * factor for name, factor in scale.items()})


def _renamed(table: pd.DataFrame, columns: Mapping[str, str], source: str) -> pd.DataFrame:
    require(table, list(columns), source)
    table = table.rename(columns=dict(columns))
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise UserError(f"{source}: with these names column '{twice[0]}' is there twice")
    return table


def _positive(values: pd.Series, source: str, optional: bool = False) -> pd.Series:
    """`values` as float64; every one finite and positive (or absent, where that is allowed)."""
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    absent = values.isna() if optional else np.zeros(len(values), bool)
    # An error of exactly 0 is a possible measurement; a loss or a count of 0 is not.
    lowest_ok = numbers >= 0 if str(values.name).startswith("error/") else numbers > 0
    wrong = ~(np.isfinite(numbers) & lowest_ok) & ~absent
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        value = values.iloc[row]
        shown = repr(value) if isinstance(value, str) else value
        raise UserError(
            f"{source}: row {row + 1}, column '{values.name}': {shown} "
            "is not a finite positive number"
        )
    return numbers


def _check_keys(table: pd.DataFrame, source: str) -> None:
    key = ["run", "dataset", "step"] if "step" in table else ["run", "dataset"]
    repeated = table.duplicated(subset=key)
    if repeated.any():
        row = int(np.flatnonzero(repeated)[0])
        values = ", ".join(f"{name} {table.iloc[row][name]}" for name in key)
        raise UserError(f"{source}: row {row + 1} repeats the key ({values}) of an earlier row")
