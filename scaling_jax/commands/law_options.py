"""What the law commands have in common: their options, and from a table to a fitted law."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from scaling_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.laws import Fit

# Columns named where one has to be chosen.
LISTED = 10
_UNSHOWN = Parameter(show_default=False)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LawOptions:
    """Which law is fitted to which column.

    Attributes:
      law: over_training, chinchilla, kaplan, data_constrained, broken_power_law; for errors,
        exponential or sigmoid.
      target: the column, loss/SET or error/TASK; may be left out where the table has only one.
      level: of the intervals, 0 to 1.
      columns: other names of the columns in the file, as --columns.N params --columns.val loss/val.
      scale: other units of the columns in the file, as --scale.N 1e9.
      unhealthy: take in runs whose training went wrong, by the table's column health.
    """

    law: str = "over_training"
    target: str | None = None
    level: float = 0.9
    columns: Annotated[dict[str, str], _UNSHOWN] = dataclasses.field(default_factory=dict)
    scale: Annotated[dict[str, float], _UNSHOWN] = dataclasses.field(default_factory=dict)
    unhealthy: bool = False

    def read(self, table: Path, dataset: str | None = None) -> "pd.DataFrame":
        """The rows of a records table, of one dataset if it is given."""
        from scaling_jax import records

        rows = records.read(table, self.columns, self.scale, self.unhealthy)
        if dataset is None:
            return rows
        names = dataset_names(rows)
        if dataset not in names:
            raise UserError(f"{table}: no dataset '{dataset}' ({nearest(dataset, names)})")
        return rows[rows["dataset"] == dataset]

    def column(self, rows: "pd.DataFrame") -> str:
        """The column to fit: the one given, or the only one there is."""
        from scaling_jax import records

        found = records.targets(rows)
        if self.target is not None:
            return self.target
        if not found:
            raise UserError("the table has no loss/<set> or error/<task> column to fit (--columns)")
        if len(found) > 1:
            more = f" and {len(found) - LISTED} more" if len(found) > LISTED else ""
            raise UserError(f"give --target, one of {', '.join(found[:LISTED])}{more}")
        return found[0]

    def fit(self, table: Path, dataset: str | None = None) -> "Fit":
        """The law fitted to the rows in role `fit` of a table's one dataset."""
        from scaling_jax import laws
        from scaling_jax.testbeds import analysis

        rows = one_dataset(self.read(table, dataset), table)
        return laws.fit(self.law, analysis.split(rows)[0], target=self.column(rows))


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ErrorOptions:
    """What the laws of errors need besides.

    Attributes:
      loss: for error laws, the loss column that is their input.
      chance: for error laws, the error of guessing, to which the asymptote is pinned.
    """

    loss: str | None = None
    chance: float | None = None


def dataset_names(rows: "pd.DataFrame") -> list[str]:
    """The names of the datasets in a table, sorted."""
    return sorted(map(str, rows["dataset"].unique()))


def one_dataset(rows: "pd.DataFrame", table: Path) -> "pd.DataFrame":
    """`rows`, if they are of one dataset."""
    names = dataset_names(rows)
    if len(names) > 1:
        raise UserError(f"{table}: has several datasets, give --dataset: {', '.join(names)}")
    return rows
