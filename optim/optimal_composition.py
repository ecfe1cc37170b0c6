"""The coefficients of Polar Express: the best odd quintics to compose, one after the other."""

from functools import lru_cache
from math import sqrt

# The a, b and c of the odd quintic ax + bx³ + cx⁵.
Quintic = tuple[float, float, float]

# Amsel, Persson, Musco & Gower, "The Polar Express" (2025), https://arxiv.org/abs/2505.16932, and the code in
# its appendix: the quintic of a step is the best one on [max(l, CUSHION·u), u], because the best one on a wider
# interval sends neighbouring singular values far apart; and its argument is divided by SAFETY, because rounding may
# have pushed a singular value above u, where the quintic grows fast.
CUSHION = 0.02407327424182761
SAFETY = 1.01


@lru_cache(maxsize=128)
def optimal_composition(steps: int, lower_bound: float = 1e-3, safety: float = SAFETY) -> tuple[Quintic, ...]:
    """Compute the quintics whose composition is closest to one on the interval [lower_bound, 1].

    The greedy choice is optimal (a theorem of the paper): take the quintic p closest to one on the interval [l, u]
    that holds all singular values, then go on with the interval [p(l), 2 − p(l)] that holds their images.

    Args:
        steps: Number of quintics.
        lower_bound: The smallest singular value that should arrive near one, where the largest is at most one.
        safety: Divides the argument of every quintic but the last; 1 for exact arithmetic.

    Returns:
        The coefficients of each quintic, in the order of application.

    Raises:
        ValueError: If ``lower_bound`` is not between 0 and 1.
    """
    if not 0 < lower_bound < 1:
        raise ValueError(f"lower_bound must lie between 0 and 1, got {lower_bound}")
    lower, upper = lower_bound, 1.0
    quintics: list[Quintic] = []
    for step in range(steps):
        a, b, c = closest_to_one(max(lower, CUSHION * upper), upper)
        # What the cushion left out comes out lower than 2 - p(u): centre the image of the whole interval around one.
        centre = (_odd(lower, a, b, c) + _odd(upper, a, b, c)) / 2
        a, b, c = a / centre, b / centre, c / centre
        lower = _odd(lower, a, b, c)
        upper = 2 - lower
        margin = safety if step < steps - 1 else 1.0
        quintics.append((a / margin, b / margin**3, c / margin**5))
    return tuple(quintics)


def closest_to_one(lower: float, upper: float) -> Quintic:
    """Compute the odd quintic with the smallest maximal distance from one on [lower, upper], by the Remez algorithm.

    The best p touches 1 − E, 1 + E, 1 − E, 1 + E at lower < q < r < upper, where q and r are its extrema. For given q
    and r, p(q) = p(upper) and p(lower) = p(r) fix the direction of (a, b, c), as the cross product of two vectors, and
    p(lower) + p(upper) = 2 fixes its length; the extrema of that p are the next q and r.
    """
    if lower > (1 - 5e-6) * upper:  # the limit: the Newton–Schulz polynomial of degree five
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5
    q, r = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    moved = upper
    for _ in range(50):  # it converges quadratically, in about ten rounds
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
