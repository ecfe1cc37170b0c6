"""A data module for image classifiers: images in folders of classes, or in memory."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_muon.data.data_module import EpochDataModule
from lightning_muon.data.image_files import LabelledImages, image_files, images_of_folder, split_by_class
from lightning_muon.data.image_samples import ImageForm, Images, NamedImages
from lightning_muon.data.loader import EpochLoader

_SIZE_OF_FILES = 64
_IN_STATE = ("class_names", "size", "channels", "mean", "std")


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
    def setup(self, stage: str) -> None:
        """Save what `export` needs: with it, the exported network can be used on other images."""
        if stage == "fit":
            self.save_hyperparameters({name: getattr(self, name) for name in _IN_STATE}, logger=False)

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
    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict is None:
            return self.predict_loader(NamedImages(self._of_split("test").images, self.form))
        path = Path(self.predict)
        if not path.exists():
            raise FileNotFoundError(f"--data.predict: there is no file or folder {path}")
        files = [path] if path.is_file() else list(image_files(path))
        if not files:
            raise ValueError(f"--data.predict: {path} has no images")
        return self.predict_loader(NamedImages(files, self.form))

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
