"""The network: a residual network of convolutions."""

from collections.abc import Sequence

import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn


class ResNet(nn.Module):
    """A residual network (arXiv:1512.03385) with group norm, for images of any size.

    Convolutions start at a standard deviation of √(2/in), the last of a block smaller by 1/√(2·blocks), and the head at
    zero, so that all classes are equally likely at first.

    Args:
        classes: Number of classes.
        size: Height and width of the images, in pixels: larger ones than 32 are made smaller by the first layer.
        channels: Values of each pixel.
        widths: Channels of each stage; each but the first halves height and width.
        depth: Blocks of each stage.
        norm: ``group`` for group norm, or ``batch`` for batch norm.
    """

    def __init__(
        self,
        classes: int,
        size: int = 8,
        channels: int = 1,
        widths: Sequence[int] = (32, 64),
        depth: int = 3,
        norm: str = "group",
    ) -> None:
        super().__init__()
        for name, value in {"classes": classes, "size": size, "channels": channels, "depth": depth}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not widths or min(widths) < 1:
            raise ValueError(f"widths must be at least one number over 0, got {list(widths)}")
        if norm not in {"group", "batch"}:
            raise ValueError(f"norm must be 'group' or 'batch', got {norm!r}")
        stride = max(1, size // 32)
        self.stem = nn.Conv2d(channels, widths[0], 2 * stride + 1, stride, padding=stride, bias=False)
        blocks = []
        for stage, (before, width) in enumerate(zip([widths[0], *widths], widths, strict=False)):
            for number in range(depth):
                is_first = number == 0
                blocks.append(
                    Block(before if is_first else width, width, stride=2 if is_first and stage else 1, norm=norm)
                )
        self.blocks = nn.ModuleList(blocks)
        self.norm = make_norm(widths[-1], norm)
        self.head = nn.Linear(widths[-1], classes)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                module.weight.data *= (2 * len(blocks)) ** -0.5 if name.endswith(".second") else 1.0
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (batch, classes) of images (batch, channels, height, width)."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


class Block(nn.Module):
    """Two convolutions, each after norm and ReLU (arXiv:1603.05027), added to their input.

    Args:
        before: Channels of the input.
        width: Channels of the output.
        stride: 2 halves height and width.
        norm: As in :class:`ResNet`.
    """

    def __init__(self, before: int, width: int, stride: int, norm: str) -> None:
        super().__init__()
        self.first_norm = make_norm(before, norm)
        self.first = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        self.second_norm = make_norm(width, norm)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(before, width, 1, stride, bias=False) if before != width or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, before, height, width) to (batch, width, height / stride, width / stride)."""
        y = self.first(F.relu(self.first_norm(x)))
        result: Tensor = self.skip(x) + self.second(F.relu(self.second_norm(y)))
        return result


def make_norm(width: int, kind: str) -> nn.GroupNorm | nn.BatchNorm2d:
    """Return the norm of a layer with so many channels; groups are of 16, or of all if they do not divide."""
    if kind == "batch":
        return nn.BatchNorm2d(width)
    return nn.GroupNorm(width // 16 if width % 16 == 0 else 1, width)
