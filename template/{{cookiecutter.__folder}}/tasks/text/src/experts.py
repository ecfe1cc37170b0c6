"""A mixture of experts: each token uses a few of many MLPs."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn


class Experts(nn.Module):
    """MLPs around a squared ReLU, of which a router chooses some for each token.

    The weights of the chosen experts are the softmax of their scores. ``balance_loss`` is that of the Switch
    Transformer (arXiv:2101.03961, equation 4): experts × Σ (share of the choices × mean probability); it is 1 if all
    experts are used alike. The training loss adds it with a small factor.

    Args:
        dim: Width of the input and output.
        count: Number of experts.
        active: Number of experts for each token.
    """

    balance_loss: Tensor

    def __init__(self, dim: int, count: int, active: int) -> None:
        super().__init__()
        if not 1 <= active <= count:
            raise ValueError(f"active_experts must be from 1 to the number of experts ({count}), got {active}")
        self.active = active
        self.router = nn.Linear(dim, count, bias=False)
        self.is_transposed = False  # stored (experts, out, in); so route_parameters knows the matrices
        self.up = nn.Parameter(torch.empty(count, 4 * dim, dim))
        self.down = nn.Parameter(torch.empty(count, dim, 4 * dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same shape."""
        tokens = x.flatten(0, -2)
        scores = self.router(tokens).float()
        best, chosen = scores.topk(self.active, dim=-1)
        weights = torch.softmax(best, dim=-1).to(x.dtype)
        count = self.up.shape[0]
        share = F.one_hot(chosen, count).float().mean((0, 1))
        self.balance_loss = count * (share * torch.softmax(scores, dim=-1).mean(0)).sum()

        result = torch.zeros_like(tokens)
        for expert in range(count):
            rows, place = torch.where(chosen == expert)
            hidden = F.relu(F.linear(tokens[rows], self.up[expert])).square()
            result = result.index_add(0, rows, F.linear(hidden, self.down[expert]) * weights[rows, place, None])
        return result.view_as(x)

    def idle_weights(self) -> int:
        """Return the number of weights that a token does not use."""
        count = self.up.shape[0]
        return (self.up.numel() + self.down.numel()) * (count - self.active) // count
