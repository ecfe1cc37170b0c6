"""Images as tensors: read, scaled, normalized, and augmented in training."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_muon.data.extras import package
from lightning_muon.data.image_files import LabelledImages
from lightning_muon.data.loader import UnreadableSampleError


class ImageForm:
    """How images become tensors: cut to a square in their middle, scaled to a size, and normalized.

    Args:
        size: Height and width in pixels.
        channels: 3 for colours, 1 for grey values.
        mean: What is subtracted from values between 0 and 1: a number, or one for each channel.
        std: By what the result is divided.

    Raises:
        ModuleNotFoundError: If Pillow is not installed.
    """

    def __init__(
        self, size: int, channels: int, mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5
    ) -> None:
        with package("Pillow", "an image"):
            import PIL  # noqa: F401, PLC0415
        self.size = size
        self.channels = channels
        self.mean, self.std = (torch.tensor(value, dtype=torch.float32).view(-1, 1, 1) for value in (mean, std))

    def read(self, image: Path | np.ndarray) -> np.ndarray:
        """Return an image of a file or array as an array of shape (size, size, channels), dtype uint8.

        Raises:
            UnreadableSampleError: If the file holds no image, or a damaged one.
        """
        from PIL import Image, ImageOps  # noqa: PLC0415 - an extra

        mode = "RGB" if self.channels == 3 else "L"
        size = (self.size, self.size)
        if isinstance(image, np.ndarray):
            if image.shape == (*size, 3)[: image.ndim] and (image.ndim == 3) == (self.channels == 3):
                return image.reshape(*size, self.channels)
            opened = Image.fromarray(image)
        else:
            try:
                with Image.open(image) as file:
                    file.draft(mode, size)  # a JPEG is decoded at a fraction of its size that is large enough
                    file.load()
                    opened = ImageOps.exif_transpose(file)
            except Exception as error:  # Pillow's readers raise what they like on damaged files
                message = f"{image}: no image can be read ({_line(error)}); replace or remove the file"
                raise UnreadableSampleError(message) from error
        if opened.mode.startswith("I;16"):
            opened = opened.point(lambda value: value / 256).convert("L")
        fitted = ImageOps.fit(opened.convert(mode), size, Image.Resampling.BICUBIC)
        return np.asarray(fitted).reshape(*size, self.channels)

    def tensor(self, pixels: np.ndarray) -> Tensor:
        """Return pixels (height, width, channels), dtype uint8, normalized, shape (channels, height, width)."""
        values = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32, order="C"))
        return (values / 255 - self.mean) / self.std

    def visible(self, images: Tensor) -> Tensor:
        """Return normalized images (…, channels, height, width) with values from 0 to 1."""
        return (images * self.std.to(images) + self.mean.to(images)).clamp(0, 1)


class Images:
    """A dataset of images and their classes.

    Args:
        labelled: The images.
        form: What becomes of them.
        crop: Pixels by which an image may be moved in each direction in training; what it leaves is black.
        flip: Whether half of the images are mirrored in training.
    """

    def __init__(self, labelled: LabelledImages, form: ImageForm, crop: int = 0, flip: bool = False) -> None:
        self.labelled = labelled
        self.form = form
        self.crop = crop
        self.flip = flip

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labelled.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return an image, shape (channels, size, size), and the index of its class."""
        return self.form.tensor(self.form.read(self.labelled.images[index])), self.labelled.labels[index]

    def draw(self, index: int, generator: np.random.Generator) -> tuple[Tensor, int]:
        """Return an image that is moved and perhaps mirrored, and the index of its class."""
        pixels, size = self.form.read(self.labelled.images[index]), self.form.size
        if self.crop:
            padded = np.pad(pixels, ((self.crop, self.crop), (self.crop, self.crop), (0, 0)))
            top, left = generator.integers(2 * self.crop + 1, size=2)
            pixels = padded[top : top + size, left : left + size]
        if self.flip and generator.random() < 0.5:
            pixels = pixels[:, ::-1]
        return self.form.tensor(pixels), self.labelled.labels[index]


class NamedImages:
    """A dataset of images without classes, each with the name of its file."""

    def __init__(self, images: Sequence[Path | np.ndarray], form: ImageForm) -> None:
        self.images = images
        self.form = form

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        """Return an image, shape (channels, size, size), and its file, or its number if it is an array."""
        image = self.images[index]
        return self.form.tensor(self.form.read(image)), str(index if isinstance(image, np.ndarray) else image)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
