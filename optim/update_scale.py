"""How large an orthogonalized update is: the published scales."""

import math
from typing import Literal, get_args

UpdateScale = Literal["none", "keller_jordan", "mup", "moonlight"]

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
    ========================  =====================  ================================================================

    Args:
        update_scale: The name of the scale.
        fan_out: Outputs of the layer, however its weight is stored.
        fan_in: Inputs of the layer; for a convolution the input channels times the size of the kernel.

    Raises:
        ValueError: If the scale is unknown.
    """
    if update_scale == "none":
        return 1.0
    if update_scale == "keller_jordan":
        return math.sqrt(max(1.0, fan_out / fan_in))
    if update_scale == "mup":
        return math.sqrt(fan_out / fan_in)
    if update_scale == "moonlight":
        return ADAMW_UPDATE_RMS * math.sqrt(max(fan_out, fan_in))
    raise ValueError(f"unknown update_scale {update_scale!r}; choose one of {', '.join(get_args(UpdateScale))}")
