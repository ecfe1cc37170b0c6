"""PolarGrad with the polar factor that the code of its paper uses: QDWH stopped after two iterations."""

import torch
from torch import Tensor

from lightning_muon.optim.polar.exact import halley_weights


class StoppedPolarGrad(torch.optim.Optimizer):
    """W ← W − lr·⟨G, O⟩·O, where O is two QDWH steps from the gradient G: to explain the paper's learning rates.

    Those of its quadratic problem belong to this factor. Its singular values lie anywhere between 0.7 and one, so it
    steps less far than the polar factor. It is computed by applying the iteration to the singular values: what stops
    it short is the iteration, not rounding.

    Args:
        params: Matrices.
        lr: Learning rate.
        momentum: Zero; the other optimizers here have one.
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
    """Apply two QDWH steps, with the start and the finish of the paper's code, to the singular values of a matrix."""
    u, values, vh = torch.linalg.svd(matrix, full_matrices=False)
    # The bounds that JAX's QDWH starts from, which the paper's is a translation of: at most one, at least the epsilon.
    values = values / torch.sqrt(torch.linalg.norm(matrix, 1) * torch.linalg.norm(matrix, torch.inf))
    lower = torch.finfo(torch.float32).eps
    for _ in range(2):
        a, b, c = halley_weights(lower)
        values = values * (a + b * values**2) / (1 + c * values**2)
        lower = lower * (a + b * lower**2) / (1 + c * lower**2)
    values = 1.5 * values - 0.5 * values**3
    factor: Tensor = u * values @ vh
    return factor
