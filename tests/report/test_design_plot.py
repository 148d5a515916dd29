"""The figure of a design says which runs were chosen, what they cost and what they buy."""

import numpy as np
import pandas as pd
import pytest

from scaling_jax import laws
from scaling_jax.report import design_plot, markup

TARGET = {"params": 6.9e9, "tokens": 138e9}


@pytest.fixture(scope="module")
def design() -> laws.Design:
    return laws.first_runs(target=TARGET, budget_flops=1e19)


def test_the_curve_is_the_designs_and_every_candidate_is_drawn(design):
    figure = design_plot.figure(design)
    curve, candidates = figure.axes[:2]
    x, y = np.asarray(curve.lines[1].get_data(), float)
    np.testing.assert_allclose(x, design.runs["flops_6nd"].cumsum())
    np.testing.assert_allclose(y, 100 * design.runs["half_width"])
    drawn, ringed = (np.ma.getdata(one.get_offsets()) for one in candidates.collections[:2])
    assert len(drawn) == len(design.candidates)
    np.testing.assert_allclose(ringed, design.runs[["params", "tokens"]])
    for axes in (curve, candidates):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    assert markup.png(figure).startswith(b"\x89PNG")


def test_one_candidate_is_enough():
    alone = pd.DataFrame({"params": [1e8], "tokens": [2e9]})
    design = laws.first_runs(target=TARGET, budget_flops=1e19, candidates=alone)
    assert markup.png(design_plot.figure(design)).startswith(b"\x89PNG")
