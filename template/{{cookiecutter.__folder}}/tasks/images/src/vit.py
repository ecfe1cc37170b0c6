"""Another network: a small vision transformer."""

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn


class ViT(nn.Module):
    """A vision transformer (arXiv:2010.11929) with learned positions, QK-norm, RMSNorm and mean pooling, no biases.

    Matrices start at a standard deviation of 1/√in, those that add to the residual stream smaller by 1/√(2·depth), and
    the head at zero, so that all classes are equally likely at first.

    Args:
        classes: Number of classes.
        size: Height and width of the images, in pixels.
        channels: Values of each pixel.
        patch: Height and width of a patch, in pixels; ``size`` must be a multiple. Default: the smallest over 1 with at
            most 64 patches.
        dim: Width of the residual stream.
        depth: Number of blocks.
        heads: Number of attention heads; ``dim`` must be a multiple.
        dropout: Probability with which a value that is added to the residual stream is left out in training.
    """

    def __init__(
        self,
        classes: int,
        size: int = 8,
        channels: int = 1,
        patch: int | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if patch is None:
            patch = next((p for p in range(2, size) if size % p == 0 and size // p <= 8), size)
        sizes = {"classes": classes, "size": size, "channels": channels, "patch": patch}
        for name, value in {**sizes, "dim": dim, "depth": depth, "heads": heads}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if size % patch:
            raise ValueError(f"size ({size}) must be a multiple of patch ({patch})")
        if dim % heads:
            raise ValueError(f"dim ({dim}) must be a multiple of heads ({heads})")
        self.shape = (channels, size, size)
        self.patches = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch, bias=False)
        self.positions = nn.Parameter(torch.empty((size // patch) ** 2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, classes, bias=False)
        self._initialize(depth)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, size, size).

        Raises:
            ValueError: If the images are of another shape.
        """
        if images.shape[1:] != self.shape:
            raise ValueError(f"images of shape {tuple(images.shape[1:])}: the model is for {self.shape}")
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits

    def _initialize(self, depth: int) -> None:
        nn.init.normal_(self.positions, std=0.02)
        for name, weight in self.named_parameters():
            if weight.ndim >= 2 and name != "positions":
                adds_to_stream = name.endswith((".out.weight", ".down.weight"))
                std = weight[0].numel() ** -0.5 * ((2 * depth) ** -0.5 if adds_to_stream else 1.0)
                nn.init.normal_(weight, std=std)
        nn.init.zeros_(self.head.weight)


class Block(nn.Module):
    """Attention, then an MLP, each added to the residual stream of shape (batch, patches, dim)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.mlp_norm = nn.RMSNorm(dim)
        self.mlp = MLP(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, patches, dim) to the same shape."""
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        result: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return result


class Attention(nn.Module):
    """Self-attention among all patches; queries and keys are normalized (QK-norm, arXiv:2302.05442)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, patches, dim) to the same shape."""
        batch, patches, dim = x.shape
        q, k, v = self.qkv(x).view(batch, patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k = (F.rms_norm(t, t.shape[-1:]).to(v.dtype) for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, patches, dim))
        return out


class MLP(nn.Module):
    """Two layers around a GELU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, patches, dim) to the same shape."""
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out
