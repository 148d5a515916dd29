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
        ({"grid": []}, "its grid holds no run"),
        ({"grid": [{**CONTENT["grid"][1], "sizes": []}]}, "its grid holds no run"),
    ],
)
def test_a_faulty_testbed_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        grid.expand(build({**CONTENT, **change}), source="small.yaml")
    assert "\n" not in str(caught.value)
    assert "small.yaml" in str(caught.value)
