"""`scaling-jax optimum`, `next` and `compare`: what fitted laws say about what to train."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.commands.law_options import LawOptions, dataset_names
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    from scaling_jax.laws import Comparison

LAW = LawOptions()


def optimum(
    table: Path,
    *,
    flops: float | None = None,
    loss: float | None = None,
    inference_tokens: float = 0.0,
    dataset: str | None = None,
    options: LawOptions = LAW,
) -> None:
    """The best params and tokens for a training budget, or for a loss and the tokens to be served.

    Then how much smaller than compute-optimal a model of the same loss can be, what its training
    costs, and from how many served tokens on it pays.

    Args:
      table: as for fit.
      flops: training compute 6ND to spend: the lowest loss for it.
      loss: to be reached: the lowest cost of training and serving for it.
      inference_tokens: with loss, tokens to be served over the model's life.
      dataset: only its rows; may be left out where the table has only one.
    """
    import pandas as pd

    from scaling_jax import laws
    from scaling_jax.terminal import print_table, say

    if (flops is None) == (loss is None):
        raise UserError("optimum: give either --flops or --loss")
    if flops is not None and inference_tokens:
        raise UserError("optimum: --inference_tokens goes with --loss")
    fitted, level = options.fit(table, dataset), options.level
    if flops is not None:
        found = laws.optimum(fitted, flops=flops, level=level)
    else:
        assert loss is not None
        found = laws.inference_optimum(
            fitted, loss=loss, inference_tokens=inference_tokens, level=level
        )
    names = [field.name for field in dataclasses.fields(found) if field.name != "level"]
    rows = [{"quantity": name, **dataclasses.asdict(getattr(found, name))} for name in names]
    print_table(pd.DataFrame(rows), f"{fitted.target}: optimum, {level:.0%} intervals")
    smaller = laws.iso_loss(fitted, flops=flops, loss=loss, level=level)
    title = "the same loss with fewer params than compute-optimal; inf: never"
    print_table(smaller, f"{title}; {level:.0%} intervals")
    for warning in fitted.warnings:
        say(f"warning: {warning}")


def suggest_next(
    table: Path,
    *,
    params: float,
    tokens: float,
    budget_flops: float,
    count: int | None = None,
    dataset: str | None = None,
    plot: Path | None = None,
    options: LawOptions = LAW,
) -> None:
    """The next runs to train, within a budget, to be surer of a prediction.

    Args:
      table: as for fit.
      params: N of the run to be predicted.
      tokens: D of the run to be predicted.
      budget_flops: training compute 6ND for the new runs together.
      count: at most so many runs; by default as many as help.
      dataset: only its rows; may be left out where the table has only one.
      plot: a figure of what each run adds, FILE.png, .pdf or .svg.
    """
    from scaling_jax import laws
    from scaling_jax.report import design_plot, gallery
    from scaling_jax.terminal import print_table, say

    fitted, level = options.fit(table, dataset), options.level
    goal = {"params": params, "tokens": tokens}
    found = laws.next_runs(fitted, target=goal, budget_flops=budget_flops, count=count, level=level)
    print_table(found.runs, "runs to train, cheapest first")
    say(
        f"{fitted.target}: half width of the Bayesian law's {level:.0%} interval "
        f"{found.before:.2%} now, {found.after:.2%} with these runs ({found.flops:.3g} FLOPs)"
    )
    if plot:
        say(f"{gallery.save(design_plot.figure(found), plot)}")


def compare(
    table: Path,
    other: Path | None = None,
    *,
    params: float,
    tokens: float,
    datasets: tuple[str, str] | None = None,
    flops_range: tuple[float, float] | None = None,
    options: LawOptions = LAW,
) -> None:
    """Compare the laws of two datasets or recipes: two of one table, or one of each of two tables.

    Args:
      table: as for fit.
      other: the table of the second, if it is another one.
      params: N of the run at which they are compared.
      tokens: D of the run at which they are compared.
      datasets: the first and the second; may be left out where there are no others.
      flops_range: training compute 6ND between which a crossing is looked for; by default from the
        median fitted run to 100 times the dearest.
    """
    from scaling_jax import laws

    names = _sides(table, other, datasets, options)
    fits = [
        options.fit(path, name) for path, name in zip((table, other or table), names, strict=True)
    ]
    found = laws.compare(
        *fits, params=params, tokens=tokens, level=options.level, flops_range=flops_range
    )
    labels = names if other is None else (f"{table}: {names[0]}", f"{other}: {names[1]}")
    _say_comparison(found, labels, fits[0].target)


def _sides(
    table: Path, other: Path | None, datasets: tuple[str, str] | None, options: LawOptions
) -> tuple[str, str]:
    """The names of the two datasets to compare."""
    if datasets is not None:
        return datasets
    paths = (table,) if other is None else (table, other)
    known = [dataset_names(options.read(path)) for path in paths]
    if sum(map(len, known)) != 2 or not all(known):
        listed = "; ".join(f"{p}: {', '.join(n)}" for p, n in zip(paths, known, strict=True))
        raise UserError(f"compare: give --datasets, a first and a second one ({listed})")
    first, second = (name for names in known for name in names)
    return first, second


def _say_comparison(found: "Comparison", labels: tuple[str, str], target: str) -> None:
    import pandas as pd

    from scaling_jax.terminal import print_table, say

    a, b = labels
    said = {
        "difference of the losses, a - b": found.difference,
        "compute a needs for b's loss, ratio": found.compute_ratio,
        "compute at which they cross": found.crossing_flops,
    }
    rows = [{"quantity": name, **dataclasses.asdict(part)} for name, part in said.items()]
    say(f"a: {a}\nb: {b}")
    print_table(pd.DataFrame(rows), f"{target}: a against b, {found.level:.0%} intervals")
    say(f"a has the lower loss in {found.a_better:.0%} of the draws")
    low, high = found.flops_range
    crossing = f"between {low:.3g} and {high:.3g} FLOPs in {found.crossing_share:.0%} of the draws"
    say(f"they cross {crossing}, at this token multiplier")
    for warning in found.warnings:
        say(f"warning: {warning}")
