"""Which rows of a Gaussian vector to observe, within a budget, to know others of its rows best.

The vector holds candidates, then goals, and its covariance is given. What an observation teaches is
then exact and does not depend on what is observed: candidates are added greedily and afterwards
exchanged while that lowers the mean variance of the goals (I-optimal design).

Source: Fedorov 1972, ch. 3; Atkinson, Donev and Tobias 2007, ch. 12.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

# An observation is added while it lowers the mean variance of the goals by this share at least.
WORTH = 1e-3
# Without a candidate that matters less than this beside the others there is money for a better one.
HARDLY = 1e-2
# Swaps that lower it by less, relatively, are rounding.
ROUNDING = 1e-9

Joint = Float[np.ndarray, "m+g m+g"]


def choose(
    joint: Joint,
    noise: float,
    costs: Float[np.ndarray, "m"],
    budget: float,
    most: int | None = None,
) -> list[int]:
    """The candidates to observe, cheapest first: the best of three sets after exchange.

    They are what is greedy per cost, the same without those that then hardly matter, and what is
    greedy outright.

    Args:
      joint: covariance of candidates and goals.
      noise: variance of an observation about its candidate.
      costs: of the candidates.
      budget: that the chosen ones cost at most together.
      most: so many candidates at most; by default any number.
    """
    cheap = greedy(joint, noise, costs, budget, most, per_cost=True)
    few = _needed(joint, noise, cheap, len(costs))
    dear = greedy(joint, noise, costs, budget, most, per_cost=False)
    found = [exchanged(joint, noise, costs, budget, start, most) for start in (cheap, few, dear)]
    best = min(found, key=lambda chosen: goal_variance(joint, noise, chosen, len(costs)))
    return sorted(best, key=lambda index: costs[index])


def greedy(
    joint: Joint,
    noise: float,
    costs: Float[np.ndarray, "m"],
    budget: float,
    most: int | None = None,
    *,
    per_cost: bool = True,
    start: Sequence[int] = (),
) -> list[int]:
    """`start` and, one by one, the affordable candidates that lower the variance most.

    Outright, or `per_cost`. It ends when none is affordable or worth it.
    """
    chosen = list(start)
    left = budget - costs[chosen].sum()
    known = observed(joint, noise, chosen)
    while len(chosen) < min(len(costs), len(costs) if most is None else most):
        gained = np.where(_free(costs, chosen, left), gains(known, noise, len(costs)), 0.0)
        index = int(np.argmax(gained / costs if per_cost else gained))
        if gained[index] <= WORTH * _goals(known, len(costs)):
            break
        known = observed(known, noise, [index])
        chosen.append(index)
        left -= costs[index]
    return chosen


def exchanged(
    joint: Joint,
    noise: float,
    costs: Float[np.ndarray, "m"],
    budget: float,
    chosen: Sequence[int],
    most: int | None = None,
) -> list[int]:
    """`chosen` after swaps with other candidates within the budget, the best one each time.

    What a swap leaves of the budget is spent greedily. It ends when no swap lowers the variance.
    """
    chosen = list(chosen)
    while swap := _best_swap(joint, noise, costs, budget, chosen):
        leaving, entering = swap
        kept = [index for index in chosen if index != leaving]
        chosen = greedy(joint, noise, costs, budget, most, start=[*kept, entering])
    return chosen


def observed(joint: Joint, noise: float, chosen: Sequence[int]) -> Joint:
    """The covariance once the `chosen` candidates have been observed."""
    chosen = list(chosen)
    among = joint[np.ix_(chosen, chosen)] + noise * np.eye(len(chosen))
    return joint - joint[:, chosen] @ np.linalg.solve(among, joint[chosen])


def goal_variance(joint: Joint, noise: float, chosen: Sequence[int], candidates: int) -> float:
    """The mean variance of the goals once the `chosen` of so many candidates were observed."""
    return _goals(observed(joint, noise, chosen), candidates)


def gains(joint: Joint, noise: float, candidates: int) -> Float[np.ndarray, "m"]:
    """By how much each candidate alone lowers the mean variance of the goals."""
    across, own = joint[candidates:, :candidates], np.diag(joint)[:candidates]
    return (across**2).mean(axis=0) / (own + noise)


def _best_swap(
    joint: Joint, noise: float, costs: np.ndarray, budget: float, chosen: list[int]
) -> tuple[int, int] | None:
    """The chosen and the other candidate whose swap lowers the variance most; None: none does."""
    best, swap = goal_variance(joint, noise, chosen, len(costs)) * (1 - ROUNDING), None
    for leaving in chosen:
        kept = [index for index in chosen if index != leaving]
        known = observed(joint, noise, kept)
        free = _free(costs, chosen, budget - costs[kept].sum())
        gained = np.where(free, gains(known, noise, len(costs)), 0.0)
        entering = int(np.argmax(gained))
        variance = _goals(known, len(costs)) - gained[entering]
        if variance < best:
            best, swap = variance, (leaving, entering)
    return swap


def _needed(joint: Joint, noise: float, chosen: list[int], candidates: int) -> list[int]:
    """`chosen` without those that hardly matter beside the others, the least useful first."""
    while chosen:
        fewer = [[index for index in chosen if index != one] for one in chosen]
        without = [goal_variance(joint, noise, rest, candidates) for rest in fewer]
        if min(without) > (1 + HARDLY) * goal_variance(joint, noise, chosen, candidates):
            break
        chosen = fewer[int(np.argmin(without))]
    return chosen


def _goals(known: Joint, candidates: int) -> float:
    return float(np.diag(known)[candidates:].mean())


def _free(costs: np.ndarray, chosen: Sequence[int], left: float) -> np.ndarray:
    """Which candidates are affordable and not chosen."""
    free = costs <= left
    free[list(chosen)] = False
    return free
