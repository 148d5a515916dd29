"""`scaling-jax plan`: what a run or a testbed takes on TPU slices, before anything is started."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaling_jax.commands.overrides import Overrides
from scaling_jax.errors import UserError

if TYPE_CHECKING:
    from scaling_jax.config import RunConfig
    from scaling_jax.planning.ahead_of_time import Compiled
    from scaling_jax.planning.bill import Bill
    from scaling_jax.planning.search import Free, Layout, Machine
    from scaling_jax.planning.slices import Slice
    from scaling_jax.training.budget import Budget

ALTERNATIVES = 5
GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One run to be planned: how it is spread is the same for all of one size."""

    name: str
    config: "RunConfig"
    budget: "Budget"
    shared_steps: int
    free: "Free"


@dataclasses.dataclass(frozen=True)
class _Prices:
    """What time and money are counted with."""

    mfu: float
    per_chip_hour: float | None


def plan(
    config: str,
    *overrides: Overrides,
    slice: str,
    slices: int | None = None,
    mfu: float = 0.4,
    price_per_chip_hour: float | None = None,
    free: bool = False,
    each: bool = False,
    compile: bool = False,
) -> None:
    """Say what a run or a testbed takes on TPU slices: memory, mesh, chip-hours, days, money.

    The fastest mesh, microbatches and remat policy that fit are searched where the config does not
    state them. No device is needed. Exit code 1: compiled, it does not fit.

    Args:
      config: a run's or a testbed's YAML, a path or the name of a packaged config.
      slice: of Google Cloud, such as v5p-128 or v5litepod-16.
      slices: how many of them work on one run together; by default as the config says.
      mfu: the part of the chips' peak that a run reaches, 0 to 1; small models reach less.
      price_per_chip_hour: in your currency.
      free: search mesh, microbatches and remat also where the config states them.
      each: list every run of a testbed.
      compile: compile the real step for the slice with libtpu; takes minutes.
    """
    from scaling_jax.planning import ahead_of_time
    from scaling_jax.planning import slices as known
    from scaling_jax.planning.search import Machine

    prices = _check(mfu, price_per_chip_hour)
    if slices is not None and slices < 1:
        raise UserError(f"slices={slices}: at least 1")
    one = known.find(slice)
    title, entries = _entries(config, overrides, everything_free=free)
    count = slices or entries[0].config.mesh.slices
    if compile:
        ahead_of_time.check_installed()
    machine = Machine.of(one, count)
    sizes = _by_size(entries)
    layouts = {size: _search(runs[0], machine, prices, config) for size, runs in sizes.items()}
    _print_machine(machine, one, prices)
    _print_bill(title, sizes, layouts, machine, prices)
    if each:
        _print_each(entries, machine, prices)
    if len(entries) > 1:
        _print_occupancy(sizes, machine, prices)
    _print_memory(layouts)
    if len(sizes) == 1:
        _print_alternatives(next(iter(layouts.values())))
    if compile and not _compile(layouts, one):
        raise SystemExit(1)


def _check(mfu: float, price_per_chip_hour: float | None) -> _Prices:
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu}: a part of the peak, above 0 and at most 1")
    if price_per_chip_hour is not None and not 0 < price_per_chip_hour < float("inf"):
        raise UserError(f"price_per_chip_hour={price_per_chip_hour}: give a positive number")
    return _Prices(mfu, price_per_chip_hour)


def _entries(
    config: str, overrides: Sequence[str], everything_free: bool
) -> tuple[str, list[_Entry]]:
    """The runs of a run's or a testbed's config, and what they are called together."""
    from scaling_jax import config as configs
    from scaling_jax import config_files
    from scaling_jax.planning.search import Free
    from scaling_jax.testbeds import grid
    from scaling_jax.training import budget

    content = config_files.read(config, overrides)
    if not {"grid", "model"} & set(content):
        raise UserError(f"{config}: neither a run, which has a model, nor a testbed with its grid")
    if "grid" not in content:
        run = configs.build(configs.RunConfig, content, source=config)
        free = Free() if everything_free else Free.unstated(content)
        return config, [_Entry(run.model.label, run, budget.plan(run), 0, free)]
    testbed = configs.build(configs.TestbedConfig, content, source=config)
    frees = {
        size: Free() if everything_free else Free.unstated(config_files.merge(testbed.run, changes))
        for size, changes in testbed.sizes.items()
    }
    return testbed.name, [
        _Entry(run.name, run.config, run.budget, run.shared_steps, frees[run.config.model.label])
        for run in grid.expand(testbed, source=config)
    ]


def _by_size(entries: Sequence[_Entry]) -> dict[str, list[_Entry]]:
    """Runs of one model and batch together, smallest first."""
    found: dict[str, list[_Entry]] = {}
    for entry in sorted(entries, key=lambda entry: entry.budget.params):
        found.setdefault(entry.config.model.label, []).append(entry)
    return found


def _search(entry: _Entry, machine: "Machine", prices: _Prices, source: str) -> list["Layout"]:
    from scaling_jax.planning import search

    try:
        return search.search(entry.config, machine, entry.free, prices.mfu)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _print_machine(machine: "Machine", one: "Slice", prices: _Prices) -> None:
    from scaling_jax.terminal import say

    say(
        f"{machine.name}: {machine.chips * machine.slices} {one.chip.name} chips "
        f"({one.shape}{' a slice' if machine.slices > 1 else ''}), "
        f"{one.hosts * machine.slices} hosts, {one.chip.hbm_bytes / GIB:.0f} GiB and "
        f"{one.chip.peak_flops / 1e12:.0f} TFLOP/s a chip; times at {prices.mfu:.0%} MFU"
    )


def _bill(entries: Sequence[_Entry], machine: "Machine", prices: _Prices) -> "Bill":
    from scaling_jax.planning import bill

    return bill.total(
        [
            bill.bill(run.config.model, run.budget, run.shared_steps, machine.chip, prices.mfu)
            for run in entries
        ]
    )


def _columns(entries: Sequence[_Entry], machine: "Machine", prices: _Prices) -> dict[str, Any]:
    bill = _bill(entries, machine, prices)
    cost = {} if prices.per_chip_hour is None else {"cost": bill.cost(prices.per_chip_hour)}
    return {
        "tokens": bill.tokens,
        "flops_6nd": bill.flops_6nd,
        "flops_model": bill.flops_model,
        "chip_hours": bill.chip_hours,
        "days": bill.days(machine.chips * machine.slices),
        **cost,
    }


def _print_bill(
    title: str,
    sizes: dict[str, list[_Entry]],
    layouts: dict[str, list["Layout"]],
    machine: "Machine",
    prices: _Prices,
) -> None:
    import pandas as pd

    from scaling_jax.terminal import print_table

    rows = [
        {
            "size": size,
            "runs": len(runs),
            "params": runs[0].budget.params,
            **_columns(runs, machine, prices),
            **_layout_columns(layouts[size][0]),
        }
        for size, runs in sizes.items()
    ]
    if len(rows) > 1:
        every = [run for runs in sizes.values() for run in runs]
        whole = {"size": "all", "runs": len(every), **_columns(every, machine, prices)}
        rows.append({key: whole.get(key, "") for key in rows[0]})
    print_table(pd.DataFrame(rows), title)


def _layout_columns(layout: "Layout") -> dict[str, Any]:
    mesh = layout.mesh
    shape = f"{mesh.data} x {mesh.fsdp} x {mesh.tensor}"
    return {
        "batch": layout.batch_size,
        "data x fsdp x tensor": shape if mesh.slices == 1 else f"{mesh.slices} x {shape}",
        "microbatches": layout.microbatches,
        "remat": layout.model.remat,
        "chip_GiB": round(layout.memory.peak / GIB, 2),
    }


def _print_each(entries: Sequence[_Entry], machine: "Machine", prices: _Prices) -> None:
    import pandas as pd

    from scaling_jax.terminal import print_table

    rows = [
        {"run": run.name, "params": run.budget.params, **_columns([run], machine, prices)}
        for run in sorted(entries, key=lambda run: run.budget.params)
    ]
    print_table(pd.DataFrame(rows), "runs")


def _print_memory(layouts: dict[str, list["Layout"]]) -> None:
    import pandas as pd

    from scaling_jax.terminal import print_table

    rows = []
    for size, found in layouts.items():
        memory = found[0].memory
        parts = {name: part / GIB for name, part in dataclasses.asdict(memory).items()}
        rows.append({"size": size, **parts, "peak": memory.peak / GIB})
    print_table(pd.DataFrame(rows), "memory of a chip by formula, GiB")


def _print_alternatives(layouts: Sequence["Layout"]) -> None:
    import pandas as pd

    from scaling_jax.terminal import print_table, say

    rows = [
        {
            **_layout_columns(layout),
            "compute_ms": layout.time.compute * 1e3,
            "collectives_ms": layout.time.collectives * 1e3,
        }
        for layout in layouts[:ALTERNATIVES]
    ]
    print_table(pd.DataFrame(rows), f"fastest of {len(layouts)} that fit, by estimate")
    settings = layouts[0].settings.items()
    say(f"\nto train so: {' '.join(f'{name}={value}' for name, value in settings)}")


def _print_occupancy(sizes: dict[str, list[_Entry]], machine: "Machine", prices: _Prices) -> None:
    """How full the chips are when runs of a size share them, for as many slots as can hold one."""
    import pandas as pd

    from scaling_jax.planning import occupancy, search
    from scaling_jax.planning.search import Machine
    from scaling_jax.terminal import print_table

    chips, rows = machine.chips, []
    for size, runs in sizes.items():
        lengths = [run.budget.tokens_asked for run in runs]
        row: dict[str, Any] = {"size": size}
        for slots in occupancy.slot_counts(chips, max(map(len, sizes.values()))):
            row[str(slots)] = ""
            slot = Machine(f"a slot of {chips // slots} chips", machine.chip, chips // slots)
            try:
                search.search(runs[0].config, slot, search.Free(), prices.mfu)
            except UserError:
                continue
            row[str(slots)] = f"{occupancy.occupancy(lengths, slots * machine.slices):.1%}"
        rows.append(row)
    print_table(pd.DataFrame(rows), "occupancy when a size's runs share the slice, by slots")


def _compile(layouts: dict[str, list["Layout"]], one: "Slice") -> bool:
    """Compiles the chosen step of each size; whether all fit."""
    import pandas as pd

    from scaling_jax.planning import ahead_of_time
    from scaling_jax.terminal import print_table, say

    rows, sent, fits = [], [], True
    for size, found in layouts.items():
        layout = found[0]
        say(f"compiling the step of {size} for {one.name} ...")
        done = ahead_of_time.compile_step(
            layout.model, layout.batch_size, layout.microbatches, layout.mesh, one
        )
        fits = fits and done.fits
        rows.append({"size": size, **_compiled_columns(layout, done)})
        sent += [
            {"size": size, "kind": each.kind, "dtype": each.dtype}
            | {"arrays": each.count, "MiB": each.bytes / MIB}
            for each in done.sent
        ]
    print_table(pd.DataFrame(rows), f"the compiled step on one chip of {one.name}, GiB")
    if sent:
        print_table(pd.DataFrame(sent), "its collectives a step")
    return fits


def _compiled_columns(layout: "Layout", done: "Compiled") -> dict[str, Any]:
    sizes = {
        "arguments": done.argument_bytes,
        "temporaries": done.temporary_bytes,
        "total": done.total_bytes,
        "in_use": done.peak_bytes,
    }
    return {
        **{name: size / GIB if size else "" for name, size in sizes.items()},
        "by_formula": layout.memory.peak / GIB,
        "fits": "yes" if done.fits else "NO",
        "seconds": done.seconds,
    }
