"""`scaling-jax predictable`: which downstream tasks small runs can predict."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from scaling_jax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from scaling_jax.testbeds.predictability import Method


def predictable(
    table: Path,
    *,
    tasks: str | None = None,
    loss: str = "",
    law: Literal["exponential", "sigmoid"] = "exponential",
    model: str | None = None,
    margin: float = 0.1,
    tolerance: float = 0.1,
    level: float = 0.9,
    sweep: bool = False,
    plot: Path | None = None,
    out: Path | None = None,
) -> None:
    """Say which tasks are above chance in small runs, and how well each is predicted from them.

    A task counts that some run in role fit beats guessing at by more than the margin (Gadre et al.
    2024: 17 of 46 tasks, by 10 points). Its law, with the asymptote held at guessing, is fitted to
    the runs in role fit and predicts the largest one in role held_out that has the task's error,
    from the loss that law over_training predicts: off = predicted / measured - 1.

    Args:
      table: records with loss/SET and error/TASK columns, and chance/TASK, the error of guessing.
      tasks: a config of tasks, such as gadre2024, that says what guessing gets where the table
        does not.
      loss: the column that the laws read; by default the loss on each dataset itself.
      law: of the error.
      model: the size whose runs, in any role, decide what counts; by default those in role fit.
      margin: by which a task has to be above chance, from 0 to below 1.
      tolerance: by which a prediction may be off.
      level: of the intervals.
      sweep: also fit the mean over the tasks above other margins, -0.05 to 0.5 (its figure 8).
      plot: a figure of the sweep, FILE.png, .pdf or .svg.
      out: a CSV file for the rows.
    """
    from scaling_jax import records
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import predictability

    _check(margin, tolerance, level, plot)
    rows = records.read(table)
    chance = _chance(rows, tasks, table)
    method = predictability.Method(law=law, loss=loss, level=level, tolerance=tolerance)
    found = predictability.by_task(rows, chance, method, margin=margin, model=model)
    print_table(_percent(found), f"tasks, {level:.0%} intervals; shares of 1, off in %")
    counted = list(dict.fromkeys(found[found["verdict"] != "near chance"]["task"]))
    known = found["task"].nunique()
    say(f"\nabove chance by {margin:g}: {len(counted)} of {known} tasks: {', '.join(counted)}")
    if out:
        from scaling_jax import atomic

        with atomic.replacing(out) as temporary:
            found.to_csv(temporary, index=False)
        say(f"{out}")
    if sweep or plot:
        _sweep(rows, chance, method, model, plot)


def _check(margin: float, tolerance: float, level: float, plot: Path | None) -> None:
    if not 0 <= margin < 1:
        raise UserError(f"predictable: margin is from 0 to below 1, not {margin:g}")
    if not 0 < tolerance < math.inf:
        raise UserError(f"predictable: tolerance is above 0, such as 0.1, not {tolerance:g}")
    if not 0 < level < 1:
        raise UserError(f"predictable: level is between 0 and 1, not {level:g}")
    if plot:
        from scaling_jax.report import gallery

        if plot.suffix not in gallery.SUFFIXES:
            raise UserError(f"{plot}: a figure's name ends in one of {', '.join(gallery.SUFFIXES)}")


def _sweep(
    rows: "pd.DataFrame",
    chance: Mapping[str, float],
    method: "Method",
    model: str | None,
    plot: Path | None,
) -> None:
    """Prints, and draws, the predictions of means over the tasks above several margins."""
    from scaling_jax.report import gallery
    from scaling_jax.report.margin_plot import margin_plot
    from scaling_jax.terminal import print_table, say
    from scaling_jax.testbeds import predictability

    swept = predictability.sweep(rows, chance, method, model=model)
    print_table(_percent(swept), "means over the tasks above each margin")
    if plot:
        say(f"{gallery.save(margin_plot(swept), plot)}")


def _chance(rows: "pd.DataFrame", tasks: str | None, table: Path) -> dict[str, float]:
    """The error of guessing of each task: as the table says, or else the config of the tasks."""
    from scaling_jax import records
    from scaling_jax.evaluation import tasks as task_configs

    known = records.chance_errors(rows)
    config = task_configs.load(tasks).tasks if tasks else {}
    said = {name: 1 - task.chance for name, task in config.items() if task.chance is not None}
    found = {name: error for name, error in (said | known).items() if f"error/{name}" in rows}
    if not found:
        raise UserError(
            f"{table}: has no column error/TASK with chance/TASK, the error of guessing; --tasks "
            "names a config that says what guessing gets"
        )
    return found


def _percent(found: "pd.DataFrame") -> "pd.DataFrame":
    """For reading: how far off in percent; nothing where there is no prediction."""
    offs = [name for name in ("off", "off_low", "off_high") if name in found]
    percent = {name: found[name].map("{:+.1%}".format, na_action="ignore") for name in offs}
    return found.assign(**percent).fillna("")
