"""The coefficients of the odd quintics in Newton–Schulz iterations: published ones, and those of Polar Express."""

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt
from typing import Any

# The a, b and c of the odd quintic ax + bx³ + cx⁵.
Quintic = tuple[float, float, float]
# A name, the a, b and c of every step, or a list with those of each step.
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Maximizes the slope at zero; Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/, and the default
# of torch.optim.Muon. The iteration does not converge: it leaves the singular values between about 0.68 and 1.13.
KELLER_JORDAN_COEFFICIENTS: Quintic = (3.4445, -4.7750, 2.0315)
KELLER_JORDAN_STEPS = 5
# The Newton–Schulz iteration itself. It is slow where singular values are small (they grow by 1.5 a step), but it
# converges, quadratically once they are near one. Higham, "Functions of Matrices" (2008), section 8.3.
CUBIC_COEFFICIENTS: Quintic = (1.5, -0.5, 0.0)
_NAMED: dict[str, Quintic] = {"keller_jordan": KELLER_JORDAN_COEFFICIENTS, "cubic": CUBIC_COEFFICIENTS}

# Amsel, Persson, Musco & Gower, "The Polar Express" (2025), https://arxiv.org/abs/2505.16932, and the code in its
# appendix. The quintic of a step is the best one on [max(l, CUSHION·u), u], because the best one on a wider interval
# sends neighbouring singular values far apart. Its argument is divided by SAFETY, because rounding may have pushed a
# singular value above u, where the quintic grows fast.
CUSHION = 0.02407327424182761
SAFETY = 1.01


def quintics(coefficients: Coefficients, steps: int) -> tuple[Quintic, ...]:
    """Return the a, b and c of each step.

    Raises:
        ValueError: If ``steps`` is less than one, or if ``coefficients`` is an unknown name, has not three numbers a
            step, or more triples than there are steps.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if coefficients == "polar_express":
        return optimal_composition(steps)
    if isinstance(coefficients, str):
        if coefficients not in _NAMED:
            known = ", ".join([*_NAMED, "polar_express"])
            raise ValueError(f"unknown coefficients {coefficients!r}; choose one of {known}, or give a, b and c")
        return (_NAMED[coefficients],) * steps
    one_triple = all(isinstance(number, int | float) for number in coefficients)
    triples: list[Any] = [coefficients] if one_triple else list(coefficients)
    if any(not isinstance(triple, Sequence) or len(triple) != 3 for triple in triples):
        raise ValueError(f"coefficients must be three numbers a, b, c, or a list of such triples, got {coefficients}")
    if len(triples) > steps:
        raise ValueError(f"coefficients has {len(triples)} triples for {steps} steps; leave some out, or raise steps")
    return tuple((a, b, c) for a, b, c in triples + triples[-1:] * (steps - len(triples)))


@lru_cache(maxsize=128)
def optimal_composition(steps: int, lower_bound: float = 1e-3, safety: float = SAFETY) -> tuple[Quintic, ...]:
    """Compute the quintics, in the order of application, whose composition is closest to one on [lower_bound, 1].

    The greedy choice is optimal (a theorem of the paper): take the quintic p closest to one on the interval [l, u]
    that contains all singular values, then continue with the interval [p(l), 2 − p(l)] that contains their images.

    Args:
        steps: Number of quintics.
        lower_bound: The smallest singular value that should arrive near one, where the largest is at most one.
        safety: Divides the argument of every quintic but the last; 1 for exact arithmetic.

    Raises:
        ValueError: If ``lower_bound`` is not between 0 and 1.
    """
    if not 0 < lower_bound < 1:
        raise ValueError(f"lower_bound must lie between 0 and 1, got {lower_bound}")
    lower, upper = lower_bound, 1.0
    found: list[Quintic] = []
    for step in range(steps):
        a, b, c = closest_to_one(max(lower, CUSHION * upper), upper)
        # Values below the cushion come out lower than 2 - p(u): center the image of the whole interval around one.
        center = (_odd(lower, a, b, c) + _odd(upper, a, b, c)) / 2
        a, b, c = a / center, b / center, c / center
        lower = _odd(lower, a, b, c)
        upper = 2 - lower
        margin = safety if step < steps - 1 else 1.0
        found.append((a / margin, b / margin**3, c / margin**5))
    return tuple(found)


def closest_to_one(lower: float, upper: float) -> Quintic:
    """Compute the odd quintic with the smallest maximal distance from one on [lower, upper], by the Remez algorithm.

    The best p takes the values 1 − E, 1 + E, 1 − E, 1 + E at lower < q < r < upper, where q and r are its extrema. For
    given q and r, p(q) = p(upper) and p(lower) = p(r) fix the direction of (a, b, c), as the cross product of two
    vectors, and p(lower) + p(upper) = 2 fixes its length. The extrema of that p are the next q and r.
    """
    if lower > (1 - 5e-6) * upper:  # the limit: the Newton–Schulz polynomial of degree five
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    moved = upper
    for _ in range(50):  # quadratic convergence, in about ten iterations
        # (xⁿ − yⁿ) / (x − y) for n = 3 and 5, at both pairs of equal values
        (v3, v5), (w3, w5) = _divided_differences(q, upper), _divided_differences(lower, r)
        a, b, c = v3 * w5 - v5 * w3, v5 - w5, w3 - v3
        mean = (_odd(lower, a, b, c) + _odd(upper, a, b, c)) / 2
        a, b, c = a / mean, b / mean, c / mean
        if moved <= 1e-15 * upper:
            break
        root = sqrt(9 * b * b - 20 * a * c)  # of p'(x) = a + 3bx² + 5cx⁴
        extrema = sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c))
        moved = abs(extrema[0] - q) + abs(extrema[1] - r)
        q, r = extrema
    return a, b, c


def _divided_differences(x: float, y: float) -> tuple[float, float]:
    return x * x + x * y + y * y, x**4 + x**3 * y + x * x * y * y + x * y**3 + y**4


def _odd(x: float, a: float, b: float, c: float) -> float:
    return x * (a + x * x * (b + x * x * c))
