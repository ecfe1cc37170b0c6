"""The model: a small modern GPT over bytes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn

BYTES = 256


class GPT(nn.Module):
    """A decoder-only transformer with rotary positions, QK-norm, RMSNorm, squared ReLU and no biases.

    Args:
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads; ``dim / heads`` must be even.
        context: Largest number of input bytes.
        tied_embeddings: Share the embedding weight with the output head.
    """

    def __init__(
        self, dim: int = 128, depth: int = 4, heads: int = 4, context: int = 256, tied_embeddings: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("depth", depth), ("heads", heads), ("context", context)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % (2 * heads):
            raise ValueError(f"dim ({dim}) must be a multiple of twice the number of heads ({heads})")
        self.context = context
        self.embedding = nn.Embedding(BYTES, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, context) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, BYTES, bias=False)
        self._initialize(depth)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict the next byte at each position.

        Args:
            tokens: Shape (batch, time), dtype int64, time ≤ context.

        Returns:
            Logits of shape (batch, time, 256).

        Raises:
            ValueError: If ``time`` is larger than the context.
        """
        if tokens.shape[1] > self.context:
            raise ValueError(f"crops of {tokens.shape[1]} bytes are longer than the model's context of {self.context}")
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _initialize(self, depth: int) -> None:
        """Keep activations near unit variance, and start with equal probabilities for all bytes."""
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                adds_to_stream = name.endswith((".out", ".down"))
                std = module.in_features**-0.5 * ((2 * depth) ** -0.5 if adds_to_stream else 1.0)
                nn.init.normal_(module.weight, std=std)
        nn.init.zeros_(self.head.weight)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream of shape (batch, time, dim)."""

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads, context)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = MLP(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Attention(nn.Module):
    """Causal self-attention; queries and keys are normalized (QK-norm, arXiv:2302.05442), then rotated."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, dim: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        cosine, sine = rotary_table(dim // heads, context)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same shape."""
        batch, time, dim = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (self._rotate(F.rms_norm(t, t.shape[-1:])).to(v.dtype) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, dim))
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate each pair of features by its position; shape (batch, heads, time, features)."""
        first, second = x.chunk(2, dim=-1)
        cosine, sine = self.cosine[: x.shape[-2]], self.sine[: x.shape[-2]]
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class MLP(nn.Module):
    """Two layers around a squared ReLU (Primer, arXiv:2109.08668)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, time, dim) to the same shape."""
        out: Tensor = self.down(F.relu(self.up(x)).square())
        return out


@torch.no_grad()
def generate(
    logits_of: Callable[[Tensor], Tensor], tokens: Tensor, count: int, context: int, temperature: float = 1.0
) -> Tensor:
    """Continue a text, byte by byte.

    Args:
        logits_of: Maps bytes (batch, time), int64, to logits (batch, time, 256).
        tokens: Shape (batch, time), dtype int64, at least one byte each.
        count: Number of bytes to add.
        context: Largest number of bytes that are shown to ``logits_of``.
        temperature: Divisor of the logits. Smaller values give more likely text.

    Returns:
        Shape (batch, time + count).
    """
    for _ in range(count):
        logits = logits_of(tokens[:, -context:])[:, -1, :BYTES].float()
        following = torch.multinomial(torch.softmax(logits / temperature, dim=-1), num_samples=1)
        tokens = torch.cat([tokens, following], dim=1)
    return tokens


def rotary_table(features: int, context: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (context, features / 2), of rotary positions (RoFormer, arXiv:2104.09864)."""
    frequency = base ** -(torch.arange(0, features, 2) / features)
    angle = torch.outer(torch.arange(context), frequency)
    return angle.cos(), angle.sin()
