"""The singular values of the weights that Muon updates."""

from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.update.matrix_layout import MatrixLayout


@torch.no_grad()
def singular_values(parameter: Tensor, **layout: Any) -> Tensor | None:
    """Return the singular values of all matrices in a whole parameter, shape (values,), float32.

    Args:
        parameter: With one matrix or several.
        layout: Where they are, see ``MatrixLayout``.

    Returns:
        ``None`` if an entry is not finite: there are no singular values then.
    """
    if not parameter.isfinite().all():
        return None
    values: Tensor = torch.linalg.svdvals(MatrixLayout(**layout).matrices(parameter.float()))
    return values.flatten()
