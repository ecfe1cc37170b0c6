"""The networks: an FT-Transformer and an MLP, both from numbers and categories to outputs."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn


class FTTransformer(nn.Module):
    """A transformer whose tokens are the features of a row (arXiv:2106.11959), in its pre-norm form.

    Args:
        numbers: Number of features that are numbers.
        categories: Number of categories of each other feature; index 0 is an unknown one.
        outputs: Number of outputs: the classes, or 1.
        dim: Width of the tokens.
        depth: Number of blocks.
        heads: Number of attention heads; ``dim`` must be a multiple of it.
        dropout: Share of the hidden features that training leaves out, at random: of use for small tables. A resumed
            run leaves out others.
    """

    def __init__(
        self,
        numbers: int,
        categories: list[int],
        outputs: int,
        dim: int = 64,
        depth: int = 3,
        heads: int = 8,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(dim=dim, depth=depth, heads=heads)
        if dim % heads:
            raise ValueError(f"dim ({dim}) must be a multiple of the number of heads ({heads})")
        self.tokenizer = FeatureTokenizer(numbers, categories, dim)
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Predict the target of each row.

        Args:
            numbers: Shape (batch, numbers).
            categories: Indices of shape (batch, columns), int64.

        Returns:
            Shape (batch, outputs).
        """
        x = self.tokenizer(numbers, categories)
        for block in self.blocks:
            x = block(x)
        outputs: Tensor = self.head(self.norm(x[:, 0]))
        return outputs


class FeatureTokenizer(nn.Module):
    """A token for each feature, after one for the row as a whole, [CLS].

    The token of a number is number · weight + bias, with a weight and a bias of its own; that of a category is a row of
    a table. All of these are embeddings, which AdamW updates.
    """

    def __init__(self, numbers: int, categories: list[int], dim: int) -> None:
        super().__init__()
        bound = dim**-0.5
        self.weight = nn.Parameter(torch.empty(numbers, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(numbers, dim).uniform_(-bound, bound))
        self.cls_token = nn.Parameter(torch.empty(1, dim).uniform_(-bound, bound))
        self.tables = nn.ModuleList(nn.Embedding(count, dim) for count in categories)
        for table in self.tables:
            nn.init.uniform_(table.get_parameter("weight"), -bound, bound)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Map (batch, numbers) and (batch, columns) to tokens (batch, 1 + numbers + columns, dim)."""
        tokens = [self.cls_token.expand(len(numbers), 1, -1), numbers[..., None] * self.weight + self.bias]
        tokens += [table(categories[:, column, None]) for column, table in enumerate(self.tables)]
        return torch.cat(tokens, dim=1)


class Block(nn.Module):
    """Attention of all tokens to all, then an MLP, each added to the tokens of shape (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim)
        self.gate_up = nn.Linear(dim, 2 * 2 * dim)
        self.down = nn.Linear(2 * dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, tokens, dim) to the same shape."""
        x = x + self.dropout(self.out(self._attend(self.qkv(self.attention_norm(x)))))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)  # ReGLU (arXiv:2002.05202), as in the paper
        down: Tensor = self.down(self.dropout(F.relu(gate) * up))
        return x + down

    def _attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


class MLP(nn.Module):
    """Residual blocks of two layers on all features side by side (the ResNet of arXiv:2106.11959, with layer norm).

    Args:
        numbers: Number of features that are numbers.
        categories: Number of categories of each other feature; index 0 is an unknown one.
        outputs: Number of outputs: the classes, or 1.
        dim: Width of the hidden features.
        depth: Number of blocks.
        category_dim: Width of the embedding of each category.
        dropout: Share of the hidden features that training leaves out, at random: of use for small tables. A resumed
            run leaves out others.
    """

    def __init__(
        self,
        numbers: int,
        categories: list[int],
        outputs: int,
        dim: int = 128,
        depth: int = 3,
        category_dim: int = 16,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(dim=dim, depth=depth, category_dim=category_dim)
        self.tables = nn.ModuleList(nn.Embedding(count, category_dim) for count in categories)
        self.first = nn.Linear(numbers + category_dim * len(categories), dim)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim),
                nn.Linear(dim, 2 * dim),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(2 * dim, dim),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Map numbers (batch, numbers) and indices (batch, columns) to outputs (batch, outputs)."""
        embedded = [table(categories[:, column]) for column, table in enumerate(self.tables)]
        x = self.first(torch.cat([numbers, *embedded], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        outputs: Tensor = self.head(F.relu(self.norm(x)))
        return outputs


def _check_sizes(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
