"""The network: a small modern GPT, dense or with a mixture of experts."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn

from .experts import Experts

Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each block, each of shape (batch, kv_heads, time, dim / heads)."""


class GPT(nn.Module):
    """A decoder-only transformer with rotary positions, QK-norm, RMSNorm, squared ReLU and no biases.

    Matrices start at a standard deviation of 1/√in, those that add to the residual stream smaller by 1/√(2·depth), the
    embedding at 1/√dim and the head at zero, so that all tokens are equally likely at first.

    Args:
        vocabulary: Number of tokens: 256 for bytes.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads; ``dim / heads`` must be even.
        kv_heads: Heads of keys and values, each for a group of heads (arXiv:2305.13245); default: ``heads``.
        context: Largest number of input tokens.
        tied_embeddings: Share the embedding weight with the output head.
        softcap: Bound of the logits, c·tanh(logits/c) (Gemma 2, arXiv:2408.00118); default: none.
        experts: Number of expert MLPs in each block, of which each token uses ``active_experts``; 0: one MLP for all.
        active_experts: Number of experts for each token.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        dim: int = 128,
        depth: int = 4,
        heads: int = 4,
        kv_heads: int | None = None,
        context: int = 256,
        tied_embeddings: bool = False,
        softcap: float | None = None,
        experts: int = 0,
        active_experts: int = 2,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"vocabulary": vocabulary, "dim": dim, "depth": depth, "heads": heads, "kv_heads": kv_heads}
        for name, value in {**sizes, "context": context}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if dim % (2 * heads):
            raise ValueError(f"dim ({dim}) must be a multiple of twice the number of heads ({heads})")
        if heads % kv_heads:
            raise ValueError(f"heads ({heads}) must be a multiple of kv_heads ({kv_heads})")
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be over 0, got {softcap}")
        self.context = context
        self.softcap = softcap
        self.embedding = nn.Embedding(vocabulary, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, kv_heads, context, Experts(dim, experts, active_experts) if experts else MLP(dim))
            for _ in range(depth)
        )
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self._initialize(depth)
        if tied_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Predict the next token at each position.

        Args:
            tokens: Shape (batch, time), dtype int64, time ≤ context.
            cache: Keys and values of earlier tokens, empty at first; those of ``tokens`` are added to it.

        Returns:
            Logits of shape (batch, time, vocabulary).

        Raises:
            ValueError: If there are more tokens, with those of the cache, than the context.
        """
        time = tokens.shape[1] + (cache[0][0].shape[2] if cache else 0)
        if time > self.context:
            raise ValueError(f"crops of {time} tokens are longer than the model's context of {self.context}")
        x = self.embedding(tokens)
        earlier: Sequence[tuple[Tensor, Tensor] | None] = cache or [None] * len(self.blocks)
        later = []
        for block, of_block in zip(self.blocks, earlier, strict=True):
            x, keys_and_values = block(x, of_block)
            later.append(keys_and_values)
        if cache is not None:
            cache[:] = later
        logits: Tensor = self.head(self.norm(x))
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @property
    def balance_loss(self) -> Tensor | float:
        """How unevenly the experts were used in the last forward pass, mean of the blocks: 1 is even; 0 without any."""
        losses = [block.mlp.balance_loss for block in self.blocks if isinstance(block.mlp, Experts)]
        return torch.stack(losses).mean() if losses else 0.0

    def flops_per_token(self) -> int:
        """Return the floating-point operations of a training step for each token, forward and backward.

        Six for each weight that a token meets in a product, and 12 · depth · dim · context for attention; see PaLM,
        arXiv:2204.02311, appendix B.
        """
        weights = sum(p.numel() for p in self.parameters() if p.ndim >= 2) - self.embedding.weight.numel()
        for block in self.blocks:
            if isinstance(block.mlp, Experts):
                weights -= block.mlp.idle_weights()
        if self.head.weight is self.embedding.weight:
            weights += self.head.weight.numel()
        return 6 * weights + 12 * len(self.blocks) * self.embedding.embedding_dim * self.context

    def _initialize(self, depth: int) -> None:
        nn.init.normal_(self.embedding.weight, std=self.embedding.embedding_dim**-0.5)
        for name, weight in self.named_parameters():
            if weight.ndim >= 2 and name != "embedding.weight":
                adds_to_stream = name.removesuffix(".weight").endswith((".out", ".down"))
                nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 * ((2 * depth) ** -0.5 if adds_to_stream else 1.0))
        nn.init.zeros_(self.head.weight)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream of shape (batch, time, dim)."""

    def __init__(self, dim: int, heads: int, kv_heads: int, context: int, mlp: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads, kv_heads, context)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor, earlier: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map (batch, time, dim) to the same shape; also return all keys and values so far."""
        attended, keys_and_values = self.attention(self.attention_norm(x), earlier)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), keys_and_values


class Attention(nn.Module):
    """Causal self-attention; queries and keys are normalized (QK-norm, arXiv:2302.05442), then rotated."""

    cosine: Tensor
    sine: Tensor

    def __init__(self, dim: int, heads: int, kv_heads: int, context: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.num_kv_heads = kv_heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        cosine, sine = rotary_table(self.head_dim, context)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, x: Tensor, earlier: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Map (batch, time, dim) to the same shape; also return all keys and values so far."""
        batch, time, dim = x.shape
        by_head = self.qkv(x).view(batch, time, -1, self.head_dim).transpose(1, 2)
        q, k, v = by_head.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        start = earlier[0].shape[2] if earlier else 0
        q, k = (self._rotate(F.rms_norm(t, t.shape[-1:]), start).to(v.dtype) for t in (q, k))
        if earlier:
            k, v = (torch.cat(pair, dim=2) for pair in zip(earlier, (k, v), strict=True))
        mask = self._mask(time, start, x.device)
        gqa = self.num_kv_heads != self.num_heads
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=start == 0, enable_gqa=gqa)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, dim))
        return out, (k, v)

    def _rotate(self, x: Tensor, start: int) -> Tensor:
        """Rotate each pair of features by its position; shape (batch, heads, time, features)."""
        first, second = x.chunk(2, dim=-1)
        positions = slice(start, start + x.shape[-2])
        cosine, sine = self.cosine[positions], self.sine[positions]
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    @staticmethod
    def _mask(time: int, start: int, device: torch.device) -> Tensor | None:
        """Return which keys each of several tokens after a cache sees; without a cache, is_causal says it."""
        if start == 0 or time == 1:
            return None
        return torch.ones(time, start + time, dtype=torch.bool, device=device).tril(start)


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


def rotary_table(features: int, context: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (context, features / 2), of rotary positions (RoFormer, arXiv:2104.09864)."""
    frequency = base ** -(torch.arange(0, features, 2) / features)
    angle = torch.outer(torch.arange(context), frequency)
    return angle.cos(), angle.sin()
