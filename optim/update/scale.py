"""How large an orthogonalized update is: the published scales."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

UpdateScale = Literal["none", "keller_jordan", "mup", "moonlight", "nuclear_norm"]

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

    The nuclear norm depends on the matrix, not on its shape: :func:`nuclear_norm` computes it.

    Args:
        update_scale: The name of the scale.
        fan_out: Outputs of the layer, however its weight is stored.
        fan_in: Inputs of the layer; for a convolution the input channels times the size of the kernel.

    Raises:
        ValueError: If the scale is unknown.
    """
    if update_scale in {"none", "nuclear_norm"}:
        return 1.0
    if update_scale == "keller_jordan":
        return math.sqrt(max(1.0, fan_out / fan_in))
    if update_scale == "mup":
        return math.sqrt(fan_out / fan_in)
    if update_scale == "moonlight":
        return ADAMW_UPDATE_RMS * math.sqrt(max(fan_out, fan_in))
    raise ValueError(f"unknown update_scale {update_scale!r}; choose one of {', '.join(get_args(UpdateScale))}")


def nuclear_norm(matrices: Tensor, factors: Tensor) -> Tensor:
    """Return ⟨A, O⟩, the sum of the singular values of each matrix A whose polar factor is O.

    With an approximate factor it is the size of A along the step that is applied. Matrices and factors have the shape
    (b, m, n), the result (b, 1, 1) in at least float32.
    """
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    return torch.einsum("bij,bij->b", matrices.to(dtype), factors.to(dtype)).view(-1, 1, 1)
