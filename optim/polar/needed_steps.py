"""How many steps a method needs until the smallest singular value of a matrix has come near one."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.polar.newton_schulz import gram_newton_schulz, newton_schulz, polar_express
from lightning_muon.optim.polar.options import defaults_of
from lightning_muon.optim.polar.quintics import Quintic, optimal_composition, quintics

# No method needs more: the cubic lifts 1e-7, the least that float32 resolves, in 38 steps.
MOST_STEPS = 50

_METHODS = {f.__name__: defaults_of(f) for f in (newton_schulz, gram_newton_schulz, polar_express)}


def needed_steps(smallest: Tensor, error: float, method: object, options: Mapping[str, Any]) -> Tensor | None:
    """Return the least number of steps after which a singular value σ has abs(σ² − 1) ≤ ``error``.

    A step replaces each singular value by a polynomial of it, and leaves the vectors alone. So to iterate the
    polynomials on the smallest one is exact, but for the rounding of the matrix products (Higham, "Functions of
    Matrices", 2008, section 8.3). Of a schedule, which depends on the number of steps, that of each number is taken.

    Args:
        smallest: The smallest singular value of each matrix as the method gets it, shape (n,): over the Frobenius norm,
            and for ``polar_express`` over (Σσ⁸)^⅛.
        error: The largest good deviation.
        method: As for :func:`~lightning_muon.optim.orthogonalize`.
        options: Of the method.

    Returns:
        Shape (n,), float64, at most ``MOST_STEPS``; NaN where σ is. ``None`` if the method has no such steps.
    """
    if not takes_steps(method):
        return None
    start = smallest.double()
    found = torch.full_like(start, MOST_STEPS)
    waiting = torch.ones_like(start, dtype=torch.bool)
    for steps in range(1, MOST_STEPS):
        values = start
        for a, b, c in _schedule(str(method), options, steps):
            square = values * values
            values = values * (a + square * (b + square * c))
        reached = waiting & ((values * values - 1).abs() <= error)
        found[reached] = steps
        waiting &= ~reached
        if not waiting.any():
            break
    return found.masked_fill(start.isnan(), torch.nan)


def takes_steps(method: object) -> bool:
    """Return whether a method takes steps of polynomials, whose number can be chosen."""
    return isinstance(method, str) and method in _METHODS


def steps_taken(method: object, options: Mapping[str, Any]) -> int:
    """Return how many steps a method that takes them is to take."""
    return int({**_METHODS[str(method)], **options}["steps"])


def _schedule(method: str, options: Mapping[str, Any], steps: int) -> tuple[Quintic, ...]:
    given = {**_METHODS[method], **options}
    if "lower_bound" in given:
        return optimal_composition(steps, given["lower_bound"])
    coefficients = given["coefficients"]
    least = steps if isinstance(coefficients, str) else max(steps, len(coefficients))
    return quintics(coefficients, least)[:steps]
