"""A data module for image classifiers: images in folders of classes, or in memory."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from lightning_muon.data.data_module import EpochDataModule
from lightning_muon.data.image_files import LabelledImages, image_files, images_of_folder, split_by_class
from lightning_muon.data.loader import EpochLoader, UnreadableSampleError

_SIZE_OF_FILES = 64
_IN_STATE = ("class_names", "size", "channels", "mean", "std")


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
        try:
            import PIL  # noqa: F401, PLC0415 - an extra
        except ModuleNotFoundError:
            raise ModuleNotFoundError("images need the package Pillow: pip install Pillow") from None
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


class ImageDataModule(EpochDataModule):
    """Images and their classes for training, validation and test, and images to be classified.

    A batch is a pair: images of shape (batch, channels, size, size), and the indices of their classes; for ``predict``
    the names of their files. A subclass may have images of its own, by :meth:`default_images`.

    Args:
        folder: A folder with a folder for each class; or with such folders in ``train``, ``val`` and ``test``.
        size: Height and width in pixels. Default: 64 for files, that of the images for arrays.
        channels: 3 for colours, 1 for grey values. Default: 3 for files, that of the images for arrays.
        mean: What is subtracted from values between 0 and 1: a number, or one for each channel.
        std: By what the result is divided.
        crop: Pixels by which images are moved at random in training. Default: an eighth of the size.
        flip: Whether images are mirrored at random in training. Default: files are.
        predict: The images that ``predict`` classifies: a file, or a folder with files at any depth. Default: those of
            the test.
        batch_size: Images per batch and device.
        num_workers: Processes that read images, for each device.
        seed: Seed of the order of images, and of what is random in training.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        folder: str | None = None,
        size: int | None = None,
        channels: int | None = None,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        crop: int | None = None,
        flip: bool | None = None,
        predict: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        if channels not in (None, 1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        if crop is not None and crop < 0:
            raise ValueError(f"crop must be at least 0, got {crop}")
        for name, value in (("mean", mean), ("std", std)):
            if isinstance(value, list) and len(value) not in (1, channels or 3):
                raise ValueError(f"{name} must be a number or one for each channel, got {value}")
        if not min(std if isinstance(std, list) else [std]) > 0:
            raise ValueError(f"std must be over 0, got {std}")
        self.folder = folder
        self.mean = mean
        self.std = std
        self.predict = predict
        self._size, self._channels = size, channels
        self._crop, self._flip = crop, flip
        self._saved: dict[str, Any] = {}

    def default_images(self) -> LabelledImages:
        """Return the images, where ``folder`` does not say."""
        raise ValueError("--data.folder: say which folder the images are in, with a folder for each class")

    @cached_property
    def splits(self) -> dict[str, LabelledImages]:
        """The images of ``"train"``, ``"val"`` and perhaps ``"test"``."""
        return split_by_class(self.default_images()) if self.folder is None else images_of_folder(self.folder)

    @property
    def class_names(self) -> list[str]:
        """The name of each class; for ``predict``, those of the checkpoint."""
        names: Sequence[str] = self._saved.get("class_names") or self.splits["train"].class_names
        return list(names)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def size(self) -> int:
        """Height and width in pixels."""
        if self._size is not None:
            return self._size
        first = self._first
        return first.shape[0] if isinstance(first, np.ndarray) else _SIZE_OF_FILES

    @property
    def channels(self) -> int:
        """Values of each pixel."""
        if self._channels is not None:
            return self._channels
        return 1 if isinstance(self._first, np.ndarray) and self._first.ndim == 2 else 3

    @property
    def _first(self) -> Path | np.ndarray:
        return self.splits["train"].images[0]

    @property
    def form(self) -> ImageForm:
        """How images become tensors; where there is a checkpoint, as in its run."""
        return ImageForm(*(self._saved[name] if name in self._saved else getattr(self, name) for name in _IN_STATE[1:]))

    @override
    def train_dataloader(self) -> EpochLoader:
        crop = self.size // 8 if self._crop is None else self._crop
        flip = isinstance(self._first, Path) if self._flip is None else self._flip
        return self.train_loader(Images(self._of_split("train"), self.form, crop, flip))

    @override
    def val_dataloader(self) -> EpochLoader:
        return self.eval_loader(Images(self._of_split("val"), self.form))

    @override
    def test_dataloader(self) -> EpochLoader:
        return self.eval_loader(Images(self._of_split("test"), self.form))

    @override
    def predict_dataloader(self) -> EpochLoader:
        if self.predict is None:
            return self.eval_loader(NamedImages(self._of_split("test").images, self.form))
        path = Path(self.predict)
        if not path.exists():
            raise FileNotFoundError(f"--data.predict: there is no file or folder {path}")
        files = [path] if path.is_file() else list(image_files(path))
        if not files:
            raise ValueError(f"--data.predict: {path} has no images")
        return self.eval_loader(NamedImages(files, self.form))

    def _of_split(self, split: str) -> LabelledImages:
        if split not in self.splits:
            raise ValueError(f"--data.folder: {self.folder} has no folder {split!r}")
        labelled = self.splits[split]
        names = self._saved.get("class_names")
        if names and list(labelled.class_names) != names:
            raise ValueError(
                f"the checkpoint is of the classes {_listed(names)}, and the data has {_listed(labelled.class_names)}:"
                " give the images of its run by --data.folder"
            )
        return labelled

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), **{name: getattr(self, name) for name in _IN_STATE}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = {name: state_dict[name] for name in _IN_STATE if name in state_dict}
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in _IN_STATE})


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:5])}{f' … ({len(names)})' if len(names) > 5 else ''}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
