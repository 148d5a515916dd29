"""Workers divide a testbed without a word between them."""

import dataclasses
import itertools

import hypothesis
import hypothesis.strategies as st
import pytest

from scaling_jax import config as configs
from scaling_jax.commands import parts
from scaling_jax.config import TestbedConfig
from scaling_jax.errors import UserError
from scaling_jax.testbeds import grid, shares
from scaling_jax.testbeds.shares import Part


@pytest.fixture(scope="module")
def paper():
    return grid.expand(configs.load(TestbedConfig, "testbeds/gadre2024.yaml"))


def divide(runs, count):
    return [shares.share(runs, Part(index, count)) for index in range(count)]


def work(runs):
    return sum(run.budget.flops_6nd for run in runs)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
def test_each_run_is_in_one_share_and_the_order_stays(paper, count):
    divided = divide(paper, count)
    assert sorted(run.name for share in divided for run in share) == sorted(
        run.name for run in paper
    )
    for share in divided:
        assert share == [run for run in paper if run in share]
    assert divide(paper, count) == divided


def test_of_the_paper_s_runs_four_workers_get_nearly_the_same(paper):
    loads = [work(share) for share in divide(paper, 4)]
    assert max(loads) < 1.12 * sum(loads) / 4


def made(template, sizes):
    """Runs of such FLOPs, each a column of its own."""
    budgets = [dataclasses.replace(template.budget, steps=size) for size in sizes]
    return [
        dataclasses.replace(template, name=f"run {number}", budget=budget, trunk=None)
        for number, budget in enumerate(budgets)
    ]


def loads(sizes, places, count):
    """The load of each worker when every run has such a place."""
    return [
        sum(size for size, place in zip(sizes, places, strict=True) if place == worker)
        for worker in range(count)
    ]


@hypothesis.settings(max_examples=40)
@hypothesis.given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_the_busiest_has_at_most_four_thirds_of_the_best_division(paper, sizes, count):
    """Graham 1969, against every possible division."""
    runs = made(paper[0], sizes)
    divisions = itertools.product(range(count), repeat=len(sizes))
    best = min(max(loads(sizes, places, count)) for places in divisions)
    busiest = max(sum(run.budget.steps for run in share) for share in divide(runs, count))
    assert busiest <= (4 - 1 / count) / 3 * best + 1e-9


def test_a_trunk_and_its_branches_stay_together(paper):
    short, middle, long, other = made(paper[0], [40, 80, 120, 100])
    half = dataclasses.replace(short.budget, decay_start=30)
    short = dataclasses.replace(short, budget=half)
    middle = dataclasses.replace(middle, trunk=short)
    long = dataclasses.replace(long, trunk=middle)
    assert divide([short, middle, other, long], 2) == [[short, middle, long], [other]]


WRONG = ["0/3", "4/3", "1", "a/b", "-1/3", "1/0", "1/3/5", "", "1 /3", "²/3"]


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_part_is_named(text):
    with pytest.raises(UserError, match=r"index=.*: give i/n, from 1/n to n/n"):
        parts.parse(text, "index")
    assert parts.parse("3/3", "index") == (2, 3)
