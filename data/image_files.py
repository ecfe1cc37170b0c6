"""Images and their classes: found in folders, and shared out to training, validation and test."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
"""The share of each split, where there are no folders for them."""

_SPLIT_OF_FOLDER = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class LabelledImages(NamedTuple):
    """Images and their classes.

    Args:
        images: Files; or arrays of dtype uint8, each of shape (height, width) or (height, width, 3).
        labels: For each image, the index of its class in ``class_names``.
        class_names: The name of each class.
    """

    images: Sequence[Path | np.ndarray]
    labels: Sequence[int]
    class_names: Sequence[str]


def images_of_folder(folder: str | Path) -> dict[str, LabelledImages]:
    """Find the images of each split below a folder.

    Either the folder has a folder for each class, ``folder/cat/1.png``; images are then shared out to the splits by
    :func:`split_by_class`. Or it has ``train`` with such folders, and ``val`` and ``test`` beside it; without ``val``,
    a part of ``train`` is for validation, and without ``test`` there is no such split. The classes are those of
    training, in the order of their names. Folders below that of a class belong to it.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If there are fewer than two classes, one has too few images, or a split has a class that training
            does not have.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--data.folder: there is no folder {root}")
    by_split = {
        _SPLIT_OF_FOLDER[path.name]: path for path in _folders(root) if path.name in _SPLIT_OF_FOLDER and _folders(path)
    }
    if "train" not in by_split:
        return split_by_class(_labelled(root), root)
    found = {"train": _labelled(by_split["train"])}
    names = found["train"].class_names
    for split in by_split.keys() - {"train"}:
        found[split] = _labelled(by_split[split], names)
    if "val" not in found:
        whole = split_by_class(found["train"], by_split["train"], {"train": 0.9, "val": 0.1})
        found = {**found, **whole}
    return found


def split_by_class(
    labelled: LabelledImages, root: Path | None = None, shares: Mapping[str, float] = SPLITS
) -> dict[str, LabelledImages]:
    """Share out the images of each class, by a hash of their names, or of their numbers if they are arrays.

    So the splits depend on nothing else, and each class has the same share of each.

    Args:
        labelled: The images.
        root: The folder to which the names are relative.
        shares: The share of each split.

    Raises:
        ValueError: If a class has fewer images than there are splits.
    """
    of_class: defaultdict[int, list[int]] = defaultdict(list)
    for number, label in enumerate(labelled.labels):
        of_class[label].append(number)
    numbers: dict[str, list[int]] = {split: [] for split in shares}
    for label, own in of_class.items():
        if len(own) < len(shares):
            raise ValueError(
                f"the class {labelled.class_names[label]!r}{f' in {root}' if root else ''} has {len(own)} image(s), and"
                f" each of {', '.join(shares)} needs one: add images, or remove the class"
            )
        own.sort(key=lambda number: _hash(labelled.images[number], number, root))
        held_out = 0
        for split in [split for split in shares if split != "train"]:
            count = max(1, round(shares[split] * len(own)))
            numbers[split] += own[held_out : held_out + count]
            held_out += count
        numbers["train"] += own[held_out:]
    return {
        split: LabelledImages(
            [labelled.images[number] for number in sorted(chosen)],
            [labelled.labels[number] for number in sorted(chosen)],
            labelled.class_names,
        )
        for split, chosen in numbers.items()
    }


def image_files(folder: Path) -> Iterator[Path]:
    """Yield the image files below a folder in the order of their names; what is hidden is left out."""
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(where, name)
            for name in sorted(names)
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        )


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _labelled(root: Path, class_names: Sequence[str] | None = None) -> LabelledImages:
    """Return the images in the class folders of a folder; of a split beside training, with the classes of training."""
    folders = _folders(root)
    names = [path.name for path in folders]
    if class_names is None and len(names) < 2:
        found = f"one folder, {names[0]!r}" if names else "no folders"
        raise ValueError(
            f"--data.folder: {root} has {found}, and it takes at least two: one for each class, with its images"
        )
    if class_names is not None and (unknown := set(names) - set(class_names)):
        raise ValueError(
            f"--data.folder: {root} has the class {min(unknown)!r}, which training has not:"
            f" that has {', '.join(class_names[:10])}{' …' if len(class_names) > 10 else ''}"
        )
    class_names = class_names or names
    images: list[Path | np.ndarray] = []
    labels: list[int] = []
    for path in folders:
        files = list(image_files(path))
        if not files:
            raise ValueError(
                f"--data.folder: {path} has no images: add some ({', '.join(sorted(SUFFIXES))}), or remove the folder"
            )
        images += files
        labels += [class_names.index(path.name)] * len(files)
    if not images:
        raise ValueError(f"--data.folder: {root} has no images")
    return LabelledImages(images, labels, class_names)


def _hash(image: Path | np.ndarray, number: int, root: Path | None) -> bytes:
    name = str(number) if isinstance(image, np.ndarray) else (image.relative_to(root) if root else image).as_posix()
    return hashlib.sha256(os.fsencode(name)).digest()
