"""Bills: the paper's totals, and each step of a trunk paid for once."""

from pathlib import Path

import pytest

from scaling_jax import config as configs
from scaling_jax.config import TestbedConfig
from scaling_jax.planning import bill, slices
from scaling_jax.testbeds import grid, published

GADRE = Path(__file__).parents[2] / ".." / "shared" / "data" / "gadre"
CHIP = slices.find("v5p-128").chip


def bills(runs):
    return [bill.bill(run.config.model, run.budget, run.shared_steps, CHIP, 0.4) for run in runs]


@pytest.mark.skipif(not GADRE.exists(), reason=f"the released testbed is not at {GADRE}")
@pytest.mark.filterwarnings("ignore:warm-up")
def test_the_paper_costs_what_its_released_table_says():
    table = published.gadre2024(GADRE)
    paper = configs.load(TestbedConfig, "testbeds/gadre2024.yaml")
    found = bill.total(bills(grid.expand(paper)))
    assert found.runs == len(table) == 104
    assert found.flops_6nd == pytest.approx(table["flops_6nd"].sum(), rel=1e-12)
    assert found.tokens == pytest.approx(table["tokens"].sum(), rel=1e-12)
    # Hours are operations over peak and MFU; 6 N D and the model's own differ by few percent.
    hours = found.flops_model / (459e12 * 0.4) / 3600
    assert found.chip_hours == pytest.approx(hours)
    assert found.flops_model == pytest.approx(found.flops_6nd, rel=0.05)
    assert found.days(64) == pytest.approx(hours / 64 / 24)
    assert found.cost(2.5) == pytest.approx(2.5 * hours)


def test_branches_pay_for_their_own_steps_only():
    size = {"model": {"width": 32, "layers": 1, "heads": 4}, "batch_size": 4}
    size["model"] |= {"vocabulary_size": 264, "sequence_length": 16}
    content = {
        "name": "branched",
        "run": {
            "data": {"validation": ["a"]},
            "optimizer": {"schedule": "warmup_stable_decay", "warmup_steps": 10},
        },
        "sizes": {"small": size},
        "grid": [
            {"role": "fit", "datasets": ["a"], "sizes": ["small"], "token_multipliers": [5, 10]}
        ],
    }
    short, long = grid.expand(configs.build(TestbedConfig, content, source="test"))
    assert long.shared_steps == short.budget.decay_start > 0
    first, second = bills([short, long])
    steps = long.budget.steps - long.shared_steps
    assert second.tokens == pytest.approx(long.budget.tokens_asked * steps / long.budget.steps)
    alone = bill.bill(long.config.model, long.budget, 0, CHIP, 0.4)
    assert bill.total([first, second]).chip_hours < first.chip_hours + alone.chip_hours
