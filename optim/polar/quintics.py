"""The coefficients of the odd quintics in Newton–Schulz iterations: published ones, and those of Polar Express."""

from collections.abc import Sequence
from functools import lru_cache
from math import sqrt
from typing import Any

from lightning_muon.optim.polar.options import check_lower_bound, check_whole, is_number

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
# The schedules of published recipes, one triple a step. Bands: where the singular values end up that start, relative to
# the Frobenius norm, above the given value (``tests/optim/orthogonalize/test_named_coefficients.py``).
#
# Five steps of the NanoGPT speedrun, found by YouJiacheng with the loss of leloykun; also in Dion, and "quintic" in
# NVIDIA's Emerging-Optimizers: 0.978 to 1.032 above 0.01, 0.85 to 1.15 above 0.002.
# https://leloykun.github.io/ponder/muon-opt-coeffs/ and train_gpt_medium.py of
# https://github.com/KellerJordan/modded-nanogpt.
_MODDED_NANOGPT: tuple[Quintic, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
# Six steps by YouJiacheng, in units of 1/1024, which never exceed one; the iteration of Modula: 0.995 to 1 above 0.002.
# https://x.com/YouJiacheng/status/1893704552689303901, https://docs.modula.systems/algorithms/newton-schulz/.
_MODULA: tuple[Quintic, ...] = (
    (3955 / 1024, -8306 / 1024, 5008 / 1024),
    (3735 / 1024, -6681 / 1024, 3463 / 1024),
    (3799 / 1024, -6499 / 1024, 3211 / 1024),
    (4019 / 1024, -6385 / 1024, 2906 / 1024),
    (2677 / 1024, -3029 / 1024, 1162 / 1024),
    (2172 / 1024, -1833 / 1024, 682 / 1024),
)
# Ten steps: eight of the classic quintic, which lift what is small, and two of one that converges quadratically, with
# p(1) = 1 and p'(1) = 0: 1 to 1.001 above 0.001. DeepSeek-AI, "DeepSeek-V4" (2026), the section on Muon.
_DEEPSEEK_V4: tuple[Quintic, ...] = (KELLER_JORDAN_COEFFICIENTS,) * 8 + ((2.0, -1.5, 0.5),) * 2
_NAMED: dict[str, tuple[Quintic, ...]] = {
    "keller_jordan": (KELLER_JORDAN_COEFFICIENTS,),
    "cubic": (CUBIC_COEFFICIENTS,),
    "modded_nanogpt": _MODDED_NANOGPT,
    "modula": _MODULA,
    "deepseek_v4": _DEEPSEEK_V4,
}

# Amsel, Persson, Musco & Gower, "The Polar Express" (2025), https://arxiv.org/abs/2505.16932, and the code in its
# appendix. The quintic of a step is the best one on [max(l, CUSHION·u), u], because the best one on a wider interval
# sends neighbouring singular values far apart. Its argument is divided by SAFETY, because rounding may have pushed a
# singular value above u, where the quintic grows fast.
CUSHION = 0.02407327424182761
SAFETY = 1.01


def quintics(coefficients: Coefficients, steps: int) -> tuple[Quintic, ...]:
    """Return the a, b and c of each step.

    Of a schedule that is longer than ``steps`` the first triples are taken if it has a name, since its first steps are
    those that lift small singular values; the last triple of a shorter one is repeated.

    Raises:
        ValueError: If ``steps`` is not a whole number of at least one, or if ``coefficients`` is an unknown name, has
            not three finite numbers a step, or more triples than there are steps.
    """
    check_whole("steps", steps)
    if isinstance(coefficients, str):
        if coefficients == "polar_express":
            return optimal_composition(steps)
        if coefficients not in _NAMED:
            known = ", ".join([*_NAMED, "polar_express"])
            raise ValueError(f"unknown coefficients {coefficients!r}; choose one of {known}, or give a, b and c")
        named = _NAMED[coefficients]
        return named[:steps] + named[-1:] * (steps - len(named))
    if not isinstance(coefficients, Sequence):
        raise ValueError(f"coefficients must be a name, three numbers, or a list of triples, got {coefficients!r}")
    triples: list[Any] = [coefficients] if all(map(is_number, coefficients)) else list(coefficients)
    if any(
        not isinstance(triple, Sequence) or len(triple) != 3 or not all(map(is_number, triple)) for triple in triples
    ):
        raise ValueError(f"coefficients must be three numbers a, b, c, or a list of such triples, got {coefficients!r}")
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
        ValueError: If ``lower_bound`` is not between 10⁻³⁰ and 1.
    """
    check_lower_bound(lower_bound)
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
