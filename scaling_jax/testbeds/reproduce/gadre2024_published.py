"""What Gadre et al. 2024 print: arXiv 2403.08540 v2, by table and figure. Nothing is computed here.

Relative errors are in percent. Train sets carry the names of the release.
"""

from typing import NamedTuple


class Downstream(NamedTuple):
    """Table 7: relative error of the predicted top-1 error at 6.9B parameters, 138B tokens."""

    arc_easy: float
    lambada_openai: float
    openbook_qa: float
    hellaswag_zeroshot: float
    average_17: float


class Model(NamedTuple):
    """Table 8: a public model, its parameters and tokens in billions, and D / N as printed."""

    name: str
    params: float
    tokens: float
    token_multiplier: float


class Cell(NamedTuple):
    """One cell of a heat map: relative error in percent, printed with one decimal."""

    figure: str
    train: str
    target: str
    params: str
    token_multiplier: int
    percent: float


# Table 1: compute of the fitted runs, in FLOPs.
TABLE1_FLOPS = {"loss_law": 2.4e19, "error_law": 2.7e20}

# Tables 2 and 7: Table 1's runs, and the same without the 1.4B one.
TABLE2 = {
    "c4_original": {
        "with_1b": Downstream(28.96, 15.01, 16.80, 79.58, 0.14),
        "without_1b": Downstream(0.92, 2.04, 96.16, 61.79, 0.42),
    },
    "rpj": {
        "with_1b": Downstream(5.21, 14.39, 8.44, 25.73, 0.05),
        "without_1b": Downstream(8.13, 11.07, 7.56, 30.98, 10.64),
    },
    "rw_original": {
        "with_1b": Downstream(26.06, 16.55, 1.92, 81.96, 2.94),
        "without_1b": Downstream(15.39, 6.26, 6.79, 6.52, 15.79),
    },
}

# Tables 4 and 5: what the grid search and the downstream evaluation consist of.
TABLE4 = {"topologies": 130, "configurations": 435}
TABLE5 = {"tasks": 46}

# Table 6, C4 eval and the 17-task split, to the digits printed.
TABLE6 = {
    "c4_original": {
        "E": 1.51,
        "a": 141.0,
        "b": 190.0,
        "eta": 0.121,
        "eps": 0.850,
        "k": 2.08,
        "gamma": 0.756,
    },
    "rpj": {
        "E": 1.84,
        "a": 212.0,
        "b": 367.0,
        "eta": 0.136,
        "eps": 0.857,
        "k": 2.21,
        "gamma": 0.715,
    },
    "rw_original": {
        "E": 1.73,
        "a": 157.0,
        "b": 246.0,
        "eta": 0.127,
        "eps": 0.865,
        "k": 2.21,
        "gamma": 0.707,
    },
}

TABLE8 = (
    Model("T5", 11, 34, 3.1),
    Model("GPT-3", 175, 300, 1.7),
    Model("Gopher", 280, 300, 1.1),
    Model("Chinchilla", 70, 1400, 20.0),
    Model("LLaMA 7B", 7, 1000, 140.0),
    Model("LLaMA 70B", 70, 1400, 20.0),
    Model("LLaMA-2 7B", 7, 2000, 290.0),
    Model("LLaMA-2 70B", 70, 2000, 30.0),
    Model("XGen", 7, 1500, 210.0),
    Model("MPT", 7, 1000, 140.0),
)

# Appendix F, equation 10, with the values of table 6.
OPTIMAL_MULTIPLIER = {"c4_original": 3.36, "rpj": 7.42, "rw_original": 5.85}

# Appendix F: 9 runs of 1.4B parameters and more, 17-task split.
RANK_CORRELATION = 0.88

# Figures 5, 7, 10, 11 and 12: the cells of the large runs, 1.4B at M = 20, 1.4B at its longest,
# 6.9B. The first is none where it is among the fitted runs.
_LARGE = {
    ("5", "loss/c4_val"): {
        "c4_original": (0.8, 1.5, 4.3),
        "rpj": (0.1, 0.7, 0.7),
        "rw_original": (0.6, 0.0, 1.6),
    },
    ("7", "loss/paloma_c4_en"): {"c4_original": (0.4, 2.3, 3.6)},
    ("7", "loss/paloma_redpajama"): {"rpj": (3.0, 15.4, 10.3)},
    ("7", "loss/paloma_falcon-refinedweb"): {"rw_original": (1.4, 6.0, 5.6)},
    ("10", "loss/paloma_dolma_100_programing_languages"): {"c4_original": (2.5, 4.3, 3.3)},
    ("10", "loss/paloma_ptb"): {"c4_original": (9.9, 10.0, 9.8)},
    ("10", "loss/val_de-en_100"): {"c4_original": (0.9, 7.6, 3.4)},
    ("11", "error/average_46"): {
        "c4_original": (None, 3.1, 0.1),
        "rpj": (None, 3.4, 2.1),
        "rw_original": (None, 4.3, 2.8),
    },
    ("12", "error/average_17"): {
        "c4_original": (None, 9.6, 0.1),
        "rpj": (None, 3.6, 0.0),
        "rw_original": (None, 5.6, 2.9),
    },
}
LONGEST_1B = {"c4_original": 80, "rpj": 640, "rw_original": 320}

HEAT_MAP_CELLS = tuple(
    Cell(figure, train, target, size, multiplier, percent)
    for (figure, target), by_train in _LARGE.items()
    for train, percents in by_train.items()
    for (size, multiplier), percent in zip(
        (("1.4B", 20), ("1.4B", LONGEST_1B[train]), ("6.9B", 20)), percents, strict=True
    )
    if percent is not None
)

# Figure 4: compute between these (FLOPs) was left out; the size of the search.
GRID_EXCLUDED_FLOPS = (5.2e16, 5.2e17)
# Figure 17: the range of its axis, which holds every exponent.
EXPONENT_RANGE = (0.11, 0.15)
