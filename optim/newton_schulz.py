"""The Newton–Schulz iteration: a polar factor from matrix products alone."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_muon.optim.optimal_composition import Quintic, optimal_composition
from lightning_muon.optim.quintic_iteration import apply_quintics

# Maximizes the slope at zero; Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/, and the default
# of torch.optim.Muon. The iteration does not converge: it leaves the singular values between about 0.68 and 1.13.
KELLER_JORDAN_COEFFICIENTS: Quintic = (3.4445, -4.7750, 2.0315)
KELLER_JORDAN_STEPS = 5
# The iteration of Newton and Schulz itself: slow where singular values are small (they grow by 1.5 a step), but it
# converges, quadratically once they are near one. Higham, "Functions of Matrices" (2008), section 8.3.
CUBIC_COEFFICIENTS: Quintic = (1.5, -0.5, 0.0)

# A name, the a, b and c of every step, or a list with those of each step.
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]
_NAMED: dict[str, Quintic] = {"keller_jordan": KELLER_JORDAN_COEFFICIENTS, "cubic": CUBIC_COEFFICIENTS}


def newton_schulz(
    matrix: Tensor, steps: int = KELLER_JORDAN_STEPS, coefficients: Coefficients = KELLER_JORDAN_COEFFICIENTS
) -> Tensor:
    """Drive the singular values of each matrix towards one by odd polynomials of degree five, or three.

    Each step replaces X by aX + b(XXᵀ)X + c(XXᵀ)²X, which maps every singular value σ to aσ + bσ³ + cσ⁵ and leaves the
    singular vectors alone. Where n ≥ 1.5m, two steps are taken at a time on XXᵀ, which rounds no worse, see
    :func:`~lightning_muon.optim.quintic_iteration.apply_quintics`.

    - Cost: 2m²(2n + m) FLOPs a step for an m×n matrix, m ≤ n, and 2m²(2n + 5m) two steps at a time; 4m²n a step with
      the cubic.
    - Error: the default leaves the singular values that started above 0.01 or so between 0.68 and 1.13, and smaller
      ones below that. The cubic converges to working precision, but takes log(σ₁/σₘ) / log 1.5 steps and a few.
    - When: the default is what Muon is known with. For a smaller error at the same cost take ``polar_express``.
    - Source: Keller Jordan, "Muon" (2024), https://kellerjordan.github.io/posts/muon/.

    Args:
        matrix: Shape (batch, m, n), m ≤ n, singular values at most one.
        steps: Number of iterations.
        coefficients: The a, b and c of the polynomial; or a list of such triples, one a step, the last of which is
            repeated; or ``"keller_jordan"`` (the default), ``"cubic"`` (the convergent iteration) or
            ``"polar_express"``.

    Returns:
        Shape (batch, m, n), in the dtype of ``matrix``.
    """
    return apply_quintics(matrix, quintics(coefficients, steps), longest_run=2)


def quintics(coefficients: Coefficients, steps: int) -> tuple[Quintic, ...]:
    """Spell out the a, b and c of each step.

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
