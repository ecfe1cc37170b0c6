"""PolarGrad with the polar factor of the paper's code: QDWH stopped after two iterations."""

import torch
from torch import Tensor

from lightning_muon.optim.polar.exact import halley_weights


class StoppedPolarGrad(torch.optim.Optimizer):
    """Update W ← W − lr·⟨G, O⟩·O, where O is the result of two QDWH steps from the gradient G.

    The paper's learning rates for its quadratic problem belong to this factor. Its singular values are between 0.7 and
    one, so its steps are shorter than those of the exact polar factor. The iteration is applied to the singular values,
    so that the difference comes from the iteration and not from rounding.

    Args:
        params: Matrices.
        lr: Learning rate.
        momentum: Must be zero. The argument exists because the other optimizers have it.

    Raises:
        ValueError: If ``momentum`` is not zero.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.0) -> None:
        if momentum:
            raise ValueError(f"StoppedPolarGrad has no momentum, got momentum={momentum}")
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix."""
        for group in self.param_groups:
            for param in group["params"]:
                factor = two_qdwh_steps(param.grad)
                param.sub_(factor * torch.sum(param.grad * factor), alpha=group["lr"])


def two_qdwh_steps(matrix: Tensor) -> Tensor:
    """Apply two QDWH steps to the singular values of a matrix, scaled and corrected as in the paper's code."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    # The initial bounds of JAX's QDWH, of which the paper's code is a translation: at most one, at least epsilon.
    values = values / torch.sqrt(torch.linalg.norm(matrix, 1) * torch.linalg.norm(matrix, torch.inf))
    lower = torch.finfo(torch.float32).eps
    for _ in range(2):
        a, b, c = halley_weights(lower)
        values = values * (a + b * values**2) / (1 + c * values**2)
        lower = lower * (a + b * lower**2) / (1 + c * lower**2)
    values = 1.5 * values - 0.5 * values**3
    factor: Tensor = u * values @ vh
    return factor
