"""How large an orthogonalized update is: the published scales."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_muon.optim.polar.options import is_number
from lightning_muon.optim.polar.user_function import name_of, resolve_function

UpdateScaleName = Literal["none", "keller_jordan", "mup", "moonlight", "nuclear_norm"]
# A name, the import path of a function, or a function (fan_out, fan_in) -> factor.
UpdateScale: TypeAlias = UpdateScaleName | str | Callable[[int, int], float]

# The usual RMS of an AdamW update, which Moonlight matches; Liu et al., "Muon is Scalable for LLM Training" (2025),
# arXiv:2502.16982, section 2.2.
ADAMW_UPDATE_RMS = 0.2


def scale_factor(update_scale: UpdateScale, fan_out: int, fan_in: int) -> float:
    """Return the number that multiplies the polar factor of a layer.

    ========================  =====================  ================================================================
    ``update_scale``          factor                 source
    ========================  =====================  ================================================================
    ``"none"``                1                      the polar factor as it is: spectral norm one
    ``"keller_jordan"``       √max(1, out / in)      Jordan, "Muon" (2024); ``torch.optim.Muon``'s ``"original"``
    ``"mup"``                 √(out / in)            spectral condition for feature learning, arXiv:2310.17813
    ``"moonlight"``           0.2·√max(out, in)      arXiv:2502.16982; ``torch.optim.Muon``'s ``"match_rms_adamw"``
    ``"nuclear_norm"``        1, and see below       PolarGrad, arXiv:2505.21799
    ========================  =====================  ================================================================

    The nuclear norm, by which ``MuonAdamW`` multiplies in PolarGrad, depends on the matrix, not on its shape.

    Args:
        update_scale: The name of the scale; or a function of your own, ``f(fan_out, fan_in)``, or its import path
            ``"package.module.function"``. It is called at each step.
        fan_out: Outputs of the layer, however its weight is stored.
        fan_in: Inputs of the layer; for a convolution the input channels times the size of the kernel.

    Raises:
        ValueError: If the scale is unknown or cannot be imported, or a function of your own returns something else
            than a finite positive number.
    """
    match update_scale:
        case "none" | "nuclear_norm":
            return 1.0
        case "keller_jordan":
            return math.sqrt(max(1.0, fan_out / fan_in))
        case "mup":
            return math.sqrt(fan_out / fan_in)
        case "moonlight":
            return ADAMW_UPDATE_RMS * math.sqrt(max(fan_out, fan_in))
    function = resolve_function(update_scale, "update_scale", get_args(UpdateScaleName))
    factor = function(fan_out, fan_in)
    if not is_number(factor) or factor <= 0:
        raise ValueError(
            f"update_scale {name_of(function)!r} must return a finite positive number, got {factor!r}"
            f" for fan-out {fan_out} and fan-in {fan_in}"
        )
    return float(factor)


def check_update_scale(update_scale: UpdateScale) -> None:
    """Raise a ValueError if a scale is unknown or cannot be imported. A function of the user is not called."""
    if update_scale not in get_args(UpdateScaleName):
        resolve_function(update_scale, "update_scale", get_args(UpdateScaleName))


def nuclear_norm(matrices: Tensor, factors: Tensor) -> Tensor:
    """Return ⟨A, O⟩, the sum of the singular values of each matrix A whose polar factor is O.

    With an approximate factor it is the size of A along the step that is applied. It is summed row by row, or column by
    column where these are contiguous, and then over these sums in float64: one long sum of float32 would lose three
    digits for a matrix of 4096². A matrix has the same nuclear norm alone and in a batch.

    Args:
        matrices: Shape (b, m, n).
        factors: Shape (b, m, n).

    Returns:
        Shape (b, 1, 1), in at least float32, with a relative error of at most 10⁻⁶ in float32.
    """
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    products = matrices.to(dtype) * factors.to(dtype)
    along, across = (-2, -1) if products.stride(-2) == 1 else (-1, -2)
    sums = products.sum(dim=along, keepdim=True)
    return sums.sum(dim=across, keepdim=True, dtype=dtype if sums.is_mps else torch.float64).to(dtype)
