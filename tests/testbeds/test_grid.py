"""A testbed's config becomes runs, planned before the first is started."""

import pytest

from scaling_jax import config as configs
from scaling_jax.config import TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.models import counting
from scaling_jax.testbeds import grid

CONTENT = {
    "name": "small",
    "run": {
        "model": {"vocabulary_size": 264, "sequence_length": 32},
        "data": {"validation": ["a", "b"]},
        "batch_size": 4,
        "optimizer": {"warmup_steps": 5},
    },
    "sizes": {
        "s": {"model": {"width": 16, "layers": 1, "heads": 2}},
        "l": {"model": {"width": 32, "layers": 1, "heads": 2}, "batch_size": 8},
    },
    "grid": [
        {
            "role": "fit",
            "datasets": ["a", "b"],
            "sizes": ["s", "l"],
            "token_multipliers": [1, 2.5],
            "seeds": [0, 1],
        },
        {"role": "held_out", "datasets": ["a"], "sizes": ["l"], "token_multipliers": [10]},
    ],
}

LONG_WARM_UP = {"schedule": "warmup_stable_decay", "warmup_steps": 5000}


def build(content=CONTENT) -> TestbedConfig:
    return configs.build(TestbedConfig, content, source="small.yaml")


def test_the_grid_is_the_product_of_its_blocks_by_compute():
    runs = grid.expand(build())
    assert len(runs) == 2 * 2 * 2 * 2 + 1
    assert len({run.name for run in runs}) == len(runs)
    flops = [run.budget.flops_6nd for run in runs]
    assert flops == sorted(flops)
    assert [run.role for run in runs].count("held_out") == 1
    assert runs[-1].name == "a-l-m10"
    assert "b-s-m2.5-s1" in {run.name for run in runs}


def test_a_size_changes_what_the_runs_share():
    by_name = {run.name: run for run in grid.expand(build())}
    large, small = by_name["a-l-m1"].config, by_name["a-s-m1"].config
    assert (large.batch_size, small.batch_size) == (8, 4)
    assert large.optimizer == small.optimizer
    assert large.model.name == "l"


def test_budgets_are_whole_steps_below_the_multiplier():
    for run in grid.expand(build()):
        wished = run.token_multiplier * counting.nominal_params(run.config.model)
        assert 0 <= wished - run.budget.tokens < run.budget.tokens_per_step + 1
        assert run.budget.tokens == run.budget.steps * run.config.batch_size * 32


def test_each_run_has_a_folder_of_its_own(tmp_path):
    runs = grid.expand(build())
    assert len({run.folder(tmp_path) for run in runs}) == len(runs)
    assert all(run.config.identity in run.folder(tmp_path).name for run in runs)


def test_all_datasets_are_named_once():
    assert grid.datasets(grid.expand(build())) == ["a", "b"]


def scheduled(schedule, **more):
    content = {**CONTENT, "run": {**CONTENT["run"], "optimizer": {"warmup_steps": 1, **more}}}
    content["run"]["optimizer"]["schedule"] = schedule
    return {run.name: run for run in grid.expand(build(content))}


def test_of_a_cosine_no_run_is_a_branch():
    assert not any(run.trunk for run in scheduled("cosine").values())


@pytest.mark.parametrize("schedule", ["constant", "warmup_stable_decay"])
def test_each_longer_run_of_a_column_branches_from_the_one_before_it(schedule):
    runs = scheduled(schedule)
    trunks = {name: run.trunk.name for name, run in runs.items() if run.trunk}
    expected = {
        f"{data}-{size}-m2.5{seed}": f"{data}-{size}-m1{seed}"
        for data in "ab"
        for size in "sl"
        for seed in ("", "-s1")
    }
    assert trunks == expected | {"a-l-m10": "a-l-m2.5"}
    order = list(runs)
    for name, run in runs.items():
        if run.trunk:
            assert order.index(run.trunk.name) < order.index(name)
            assert run.shared_steps == runs[run.trunk.name].budget.decay_start > 0
            assert run.shared_steps < run.budget.steps
        else:
            assert run.shared_steps == 0


def test_a_run_branches_only_where_it_does_not_decay_yet():
    """The same model under two names: what decays longer starts to decay before the shorter run."""
    long_decay = {**CONTENT["sizes"]["s"], "optimizer": {"decay_fraction": 0.8}}
    content = {**CONTENT, "sizes": {**CONTENT["sizes"], "late": long_decay}}
    schedule = {"warmup_steps": 1, "schedule": "warmup_stable_decay"}
    content["run"] = {**CONTENT["run"], "optimizer": schedule}
    block = {"role": "fit", "datasets": ["a"]}
    content["grid"] = [
        {**block, "sizes": ["s"], "token_multipliers": [2, 8]},
        {**block, "sizes": ["late"], "token_multipliers": [4]},
    ]
    runs = {run.name: run for run in grid.expand(build(content))}
    assert [run.trunk and run.trunk.name for run in runs.values()] == [None, None, "a-s-m2"]
    content["grid"][1]["token_multipliers"] = [10]
    runs = {run.name: run for run in grid.expand(build(content))}
    assert runs["a-late-m10"].trunk is runs["a-s-m2"]
    assert runs["a-s-m8"].trunk is runs["a-s-m2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": [{**CONTENT["grid"][1], "sizes": ["x"]}]}, "unknown size 'x'"),
        ({"grid": [CONTENT["grid"][1], CONTENT["grid"][1]]}, "a-l-m10 stands in the grid 2 times"),
        ({"grid": [{**CONTENT["grid"][1], "role": "test"}]}, "role"),
        (
            {"sizes": {**CONTENT["sizes"], "l": {"model": {"width": 33}}}},
            "run a-l-m1: key .model.layers. is missing",
        ),
        ({"grid": [{**CONTENT["grid"][1], "token_multipliers": [1e-4]}]}, "less than one step"),
        ({"laws": {"level": 2}}, "laws.level"),
        (
            {"run": {**CONTENT["run"], "data": {"validation": ["a"], "mixture": {"c": 1}}}},
            "run.data.mixture is one dataset, but the grid names a, b",
        ),
        (
            {"run": {**CONTENT["run"], "optimizer": LONG_WARM_UP}},
            r"run a-s-m1: a warm-up of 5000 steps and a decay of \d+ do not fit into a run of",
        ),
        ({"grid": []}, "its grid holds no run"),
        ({"grid": [{**CONTENT["grid"][1], "sizes": []}]}, "its grid holds no run"),
    ],
)
def test_a_faulty_testbed_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        grid.expand(build({**CONTENT, **change}), source="small.yaml")
    assert "\n" not in str(caught.value)
    assert "small.yaml" in str(caught.value)
