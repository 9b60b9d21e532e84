"""The multiple-choice knapsack, solved exactly: one option for each unit, the least total loss within a budget of bytes. Pure arithmetic, no torch.

Dynamic programming over Pareto lists: after u units only those (bytes, loss) are kept that no other choice for these units beats in both. That alone is exact.
It stays small because of a bound: for any price λ per byte, a partial choice cannot end below  loss + λ·bytes + Σ_rest min(loss + λ·bytes) - λ·budget
(Lagrange), so what exceeds a complete choice already in hand is dropped, with the λ that makes the bound of the empty choice largest. Nothing is dropped for
another reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tradespace.errors import BudgetError
from tradespace.units import format_bytes


@dataclass(frozen=True, slots=True)
class Option:
    """One way to hold a unit: its name, its bytes, and what it costs in quality (nats per token)."""

    name: str
    nbytes: int
    loss: float


@dataclass(frozen=True, slots=True)
class Choice:
    """The best choice: an option per unit, its bytes and loss; `bound` is the Lagrangian lower bound on any choice within the budget."""

    options: tuple[Option, ...]
    nbytes: int
    loss: float
    bound: float


def choose(units: Sequence[Sequence[Option]], budget_bytes: int) -> Choice:
    """The choice of least loss within the budget; among equals, of fewest bytes.

    Raises BudgetError (need, have) where the smallest options do not fit.
    """
    smallest = sum(min(option.nbytes for option in options) for options in units)
    if smallest > budget_bytes:
        raise BudgetError(
            f"the smallest formats on offer take {format_bytes(smallest)} ({smallest} bytes); the budget is {format_bytes(budget_bytes)} "
            f"({budget_bytes} bytes). State at least {format_bytes(smallest)}, or offer smaller formats",
            need_bytes=smallest,
            have_bytes=budget_bytes,
        )
    price, bound = _best_price(units, budget_bytes)
    first = _feasible(units, budget_bytes, price)
    limit = sum(option.loss for option in first)
    # rounding of float sums must not drop the optimum itself
    slack = 1e-12 * (abs(limit) + sum(max(abs(option.loss) for option in options) for options in units) + price * budget_bytes)
    best = _pareto(units, budget_bytes, price, limit + slack)
    return Choice(best, sum(option.nbytes for option in best), sum(option.loss for option in best), bound)


def _arrays(units: Sequence[Sequence[Option]]) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(np.array([o.nbytes for o in options], dtype=np.int64), np.array([o.loss for o in options])) for options in units]


def _dual(arrays: list[tuple[np.ndarray, np.ndarray]], budget_bytes: int, price: float) -> tuple[float, int]:
    """The bound at this price, and the bytes of the choice that attains it (the smaller of two that tie)."""
    total, used = -price * budget_bytes, 0
    for nbytes, loss in arrays:
        at = np.lexsort((nbytes, loss + price * nbytes))[0]
        total += float(loss[at] + price * nbytes[at])
        used += int(nbytes[at])
    return total, used


def _best_price(units: Sequence[Sequence[Option]], budget_bytes: int) -> tuple[float, float]:
    """The price at which the bound is largest: the bound is concave in it, and its slope is the bytes used minus the budget."""
    arrays = _arrays(units)
    low, high = 0.0, 1e-12
    if _dual(arrays, budget_bytes, 0.0)[1] <= budget_bytes:
        return 0.0, _dual(arrays, budget_bytes, 0.0)[0]
    while _dual(arrays, budget_bytes, high)[1] > budget_bytes:
        low, high = high, high * 4
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if _dual(arrays, budget_bytes, middle)[1] > budget_bytes else (low, middle)
    return max((_dual(arrays, budget_bytes, price)[0], price) for price in (low, high))[1], max(_dual(arrays, budget_bytes, p)[0] for p in (low, high))


def _feasible(units: Sequence[Sequence[Option]], budget_bytes: int, price: float) -> list[Option]:
    """A good choice within the budget: what the price picks, made smaller where it must be, then larger where it may."""
    picked = [min(options, key=lambda o: (o.loss + price * o.nbytes, o.nbytes)) for options in units]
    used = sum(option.nbytes for option in picked)
    while used > budget_bytes:
        steps = [
            ((o.loss - here.loss) / (here.nbytes - o.nbytes), unit, o)
            for unit, (here, options) in enumerate(zip(picked, units, strict=True))
            for o in options
            if o.nbytes < here.nbytes
        ]
        _, unit, option = min(steps, key=lambda step: step[0])
        used += option.nbytes - picked[unit].nbytes
        picked[unit] = option
    while True:
        steps = [
            (here.loss - o.loss, unit, o)
            for unit, (here, options) in enumerate(zip(picked, units, strict=True))
            for o in options
            if o.loss < here.loss and used - here.nbytes + o.nbytes <= budget_bytes
        ]
        if not steps:
            return picked
        _, unit, option = max(steps, key=lambda step: step[0])
        used += option.nbytes - picked[unit].nbytes
        picked[unit] = option


def _pareto(units: Sequence[Sequence[Option]], budget_bytes: int, price: float, limit: float) -> tuple[Option, ...]:
    arrays = _arrays(units)
    # of the units from u on: the least bytes, and the least loss + price · bytes
    rest_bytes = [0] * (len(units) + 1)
    rest_priced = [0.0] * (len(units) + 1)
    for u in range(len(units) - 1, -1, -1):
        nbytes, loss = arrays[u]
        rest_bytes[u] = rest_bytes[u + 1] + int(nbytes.min())
        rest_priced[u] = rest_priced[u + 1] + float((loss + price * nbytes).min())
    total_bytes, total_loss = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []  # per unit: the state before, and the option taken, of each state kept
    for u, (nbytes, loss) in enumerate(arrays):
        grown_bytes = (total_bytes[:, None] + nbytes).ravel()
        grown_loss = (total_loss[:, None] + loss).ravel()
        fits = grown_bytes + rest_bytes[u + 1] <= budget_bytes
        fits &= grown_loss + price * grown_bytes + rest_priced[u + 1] - price * budget_bytes <= limit
        index = np.flatnonzero(fits)
        index = index[np.lexsort((grown_loss[index], grown_bytes[index]))]
        # sorted by bytes: kept is what has less loss than all that is smaller
        before = np.minimum.accumulate(np.concatenate(([np.inf], grown_loss[index][:-1])))
        index = index[grown_loss[index] < before]
        total_bytes, total_loss = grown_bytes[index], grown_loss[index]
        history.append((index // len(nbytes), index % len(nbytes)))
    state = int(np.lexsort((total_bytes, total_loss))[0])
    taken: list[Option] = []
    for u in range(len(units) - 1, -1, -1):
        came_from, option = history[u]
        taken.append(units[u][int(option[state])])
        state = int(came_from[state])
    return tuple(reversed(taken))
