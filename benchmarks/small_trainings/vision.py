"""Images of shapes: detection of them, and diffusion of them."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, silu, smooth_l1_loss

from benchmarks.small_trainings.training import Task

SIDE, CELLS, CLASSES = 24, 6, 3
TRAIN, HELD_OUT = 2048, 512


def shapes(count: int, objects: int, seed: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images with discs, squares and crosses in cells that are chosen at random.

    Returns:
        The images (count, 1, side, side); the class of each cell (count, cells, cells), -1 where it has no object; the
        boxes (count, 3, cells, cells): the shifts of the center from that of its cell, and the radius, in cells.
    """
    g = torch.Generator().manual_seed(seed)
    size = SIDE // CELLS
    chosen = torch.rand(count, CELLS * CELLS, generator=g).argsort(dim=1)[:, :objects]
    present = torch.rand(count, objects, generator=g) < 0.8
    kind = torch.randint(CLASSES, (count, objects), generator=g)
    shift = torch.rand(count, objects, 2, generator=g) - 0.5
    radius = 0.6 + 0.8 * torch.rand(count, objects, generator=g)
    row, column = chosen // CELLS, chosen % CELLS
    center = (torch.stack([row, column], dim=-1) + 0.5 + shift) * size
    axis = torch.arange(SIDE) + 0.5
    dy = axis[None, None, :, None] - center[..., 0, None, None]
    dx = axis[None, None, None, :] - center[..., 1, None, None]
    r = (radius * size)[..., None, None]
    disc = dy**2 + dx**2 < r**2
    square = torch.maximum(dy.abs(), dx.abs()) < 0.85 * r
    cross = (torch.minimum(dy.abs(), dx.abs()) < 0.3 * r) & (torch.maximum(dy.abs(), dx.abs()) < r)
    drawn = torch.stack([disc, square, cross], dim=2).gather(
        2, kind[..., None, None, None].expand(-1, -1, 1, SIDE, SIDE)
    )
    image = (drawn[:, :, 0] & present[..., None, None]).any(dim=1, keepdim=True).float()
    classes = torch.full((count, CELLS * CELLS), -1).scatter(1, chosen, torch.where(present, kind, -1))
    boxes = torch.zeros(count, 3, CELLS * CELLS)
    for index, values in enumerate((shift[..., 0], shift[..., 1], radius)):
        boxes[:, index].scatter_(1, chosen, values)
    grid = (count, CELLS, CELLS)
    image = image + noise * torch.randn(image.shape, generator=g)
    return image, classes.view(grid), boxes.view(count, 3, CELLS, CELLS)


@cache
def scenes(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images to detect in; seed 0 for training, 1 held out."""
    return shapes(TRAIN if seed == 0 else HELD_OUT, 3, seed, noise=0.3)


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, channels, h, w) to the same shape."""
        result: Tensor = x + self.second(silu(self.first(silu(self.norm(x)))))
        return result


class Detector(nn.Module):
    """One cell of the image, one prediction: whether there is an object, its class, its box."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 4, stride=2, padding=1)
        self.down = nn.Conv2d(width, width, 4, stride=2, padding=1)
        self.blocks = nn.Sequential(Residual(width), Residual(width))
        self.classes = nn.Conv2d(width, 1 + CLASSES, 1)
        self.boxes = nn.Conv2d(width, 3, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (b, 1, side, side) to logits (b, 1 + classes, cells, cells) and boxes (b, 3, cells, cells)."""
        x = silu(self.blocks(silu(self.down(silu(self.stem(image))))))
        return self.classes(x), self.boxes(x)


def detection_loss(model: nn.Module, images: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
    """Binary cross entropy of the objects in all cells; of those with one, cross entropy of the class, and the box."""
    logits, found = model(images)
    there = classes >= 0
    objects = binary_cross_entropy_with_logits(logits[:, 0], there.float())
    of_class = cross_entropy(logits[:, 1:].movedim(1, -1)[there], classes[there])
    of_box = smooth_l1_loss(found.movedim(1, -1)[there], boxes.movedim(1, -1)[there], beta=0.1)
    return objects + 0.2 * of_class + of_box


def detection(steps: int = 400) -> Task:
    """Detection of shapes by a small convolutional network with two heads."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(TRAIN, (32,), generator=generator)
        return detection_loss(model, *(values[rows] for values in scenes(0)))

    return Task("detection", Detector, {None: loss}, lambda model: float(detection_loss(model, *scenes(1))), steps)


class Denoiser(nn.Module):
    """A U-Net with one level, which is told the time."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 1.5, 8))
        self.time = nn.Sequential(nn.Linear(16, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.conv_in = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)
        self.middle = nn.ModuleList(Residual(2 * width) for _ in range(2))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.join = nn.Conv2d(2 * width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        """Map noisy images (b, 1, h, w) and their times (b,) to velocities (b, 1, h, w)."""
        angles = time[:, None] * self.get_buffer("frequencies")
        told = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))[..., None, None]
        fine = silu(self.conv_in(noisy))
        coarse = self.down(fine) + told
        for block in self.middle:
            coarse = block(coarse)
        velocity: Tensor = self.conv_out(silu(self.join(torch.cat([fine, silu(self.up(silu(coarse)))], dim=1))))
        return velocity


DIFFUSED = SIDE // 2  # the side of the images that are denoised


@cache
def clean_images(seed: int) -> Tensor:
    """Small images without noise, between -1 and 1, every other pixel of the scenes."""
    return 2 * shapes(TRAIN if seed == 0 else HELD_OUT, 2, 10 + seed, noise=0.0)[0][:, :, ::2, ::2] - 1


def velocity_loss(model: nn.Module, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the velocity from noise to image (flow matching), at times and noises that are drawn."""
    time = torch.rand(len(clean), generator=generator)
    noise = torch.randn(clean.shape, generator=generator)
    mixed = torch.lerp(noise, clean, time[:, None, None, None])
    error: Tensor = (model(mixed, time) - (clean - noise)).square().mean()
    return error


def diffusion(steps: int = 300) -> Task:
    """Flow matching of images of shapes."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(TRAIN, (32,), generator=generator)
        return velocity_loss(model, clean_images(0)[rows], generator)

    def held_out(model: nn.Module) -> float:
        """With four noises for each image, the same in each run."""
        g = torch.Generator().manual_seed(5)
        return sum(float(velocity_loss(model, clean_images(1), g)) for _ in range(4)) / 4

    return Task("diffusion", Denoiser, {None: loss}, held_out, steps)
