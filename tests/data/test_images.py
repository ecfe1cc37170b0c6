"""Images in folders: their classes and splits, what becomes of them, and errors that name the folder or file."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_muon.data import EpochLoader, ImageDataModule, LabelledImages, UnreadableSampleError
from lightning_muon.data.image_files import image_files, images_of_folder, split_by_class
from lightning_muon.data.images import ImageForm, Images

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make("cat", 3, where)`: a folder of a class with so many images of 12 × 8 pixels."""

    def make_class(name: str, count: int, folder: str = "pictures") -> Path:
        where = tmp_path / folder / name
        where.mkdir(parents=True)
        generator = np.random.default_rng(count)
        for number in range(count):
            Image.fromarray(generator.integers(256, size=(8, 12, 3), dtype=np.uint8)).save(where / f"{number}.png")
        return tmp_path / folder

    return make_class


def names(images: LabelledImages) -> set[Path]:
    return {image for image in images.images if isinstance(image, Path)}


def test_each_image_is_in_one_split_and_each_class_in_all(make: Make) -> None:
    make("dog", 20)
    folder = make("cat", 10)
    found = images_of_folder(folder)
    assert {split: len(labelled.images) for split, labelled in found.items()} == {"train": 24, "val": 3, "test": 3}
    assert names(found["train"]) | names(found["val"]) | names(found["test"]) == set(image_files(folder))
    for labelled in found.values():
        assert labelled.class_names == ["cat", "dog"]
        assert set(labelled.labels) == {0, 1}
        pairs = zip(labelled.images, labelled.labels, strict=True)
        assert all(isinstance(image, Path) and image.parent.name == ("cat", "dog")[label] for image, label in pairs)


def test_splits_depend_on_the_names_within_the_folder_only(make: Make, tmp_path: Path) -> None:
    make("dog", 20)
    before = images_of_folder(make("cat", 20))
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    after = images_of_folder(tmp_path / "elsewhere")
    assert {path.name for path in names(before["test"])} == {path.name for path in names(after["test"])}


def test_folders_of_splits_are_used_as_they_are(make: Make) -> None:
    for split, count in (("train", 9), ("valid", 2), ("test", 1)):
        make("dog", count, f"pictures/{split}")
        make("cat", count, f"pictures/{split}")
    found = images_of_folder(make("cat", 1, "other").parent / "pictures")
    assert {split: len(labelled.images) for split, labelled in found.items()} == {"train": 18, "val": 4, "test": 2}


def test_without_a_folder_for_validation_a_part_of_training_is(make: Make) -> None:
    make("dog", 20, "pictures/train")
    found = images_of_folder(make("cat", 20, "pictures/train").parent)
    assert {split: len(labelled.images) for split, labelled in found.items()} == {"train": 36, "val": 4}
    data = ImageDataModule(str(make("cat", 1, "other").parent / "pictures"))
    with pytest.raises(ValueError, match="pictures has no folder 'test'"):
        data.test_dataloader()


def test_arrays_are_split_too() -> None:
    labelled = LabelledImages(list(np.zeros((40, 4, 4), np.uint8)), [number % 2 for number in range(40)], ["a", "b"])
    found = split_by_class(labelled)
    assert [Counter(part.labels) for part in found.values()] == [{0: 16, 1: 16}, {0: 2, 1: 2}, {0: 2, 1: 2}]


def test_folders_that_cannot_work_are_refused_by_name(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    with pytest.raises(FileNotFoundError, match=r"--data\.folder: there is no folder .*pictures"):
        images_of_folder(folder)
    folder.mkdir()
    with pytest.raises(ValueError, match="pictures has no folders, and it takes at least two: one for each class"):
        images_of_folder(folder)
    make("cat", 5)
    with pytest.raises(ValueError, match="pictures has one folder, 'cat', and it takes at least two"):
        images_of_folder(folder)
    make("dog", 0)
    (folder / "dog" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"pictures/dog has no images: add some \(.bmp, .gif"):
        images_of_folder(folder)
    Image.new("RGB", (4, 4)).save(folder / "dog" / "1.PNG")
    with pytest.raises(
        ValueError, match=r"the class 'dog' in .*pictures has 1 image\(s\), and each of train, val, test"
    ):
        images_of_folder(folder)


def test_a_class_that_training_does_not_have_is_refused(make: Make) -> None:
    for name in ("cat", "dog"):
        make(name, 3, "pictures/train")
    make("cta", 1, "pictures/val")
    folder = make("dog", 1, "pictures/val").parent
    with pytest.raises(ValueError, match="val has the class 'cta', which training has not: that has cat, dog"):
        images_of_folder(folder)


def test_images_become_squares_of_the_middle(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (255, 0, 128)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    read = ImageForm(5, 3).read(tmp_path / "wide.png")
    assert read.shape == (5, 5, 3)
    assert read[2, 2].tolist() == [255, 0, 128]
    grey = ImageForm(5, 1).read(tmp_path / "wide.png")
    assert grey.shape == (5, 5, 1)
    form = ImageForm(5, 3, mean=[0.5, 0.25, 0.5], std=[0.5, 1.0, 0.25])
    tensor = form.tensor(read)
    torch.testing.assert_close(tensor[:, 2, 2], torch.tensor([1.0, -0.25, (128 / 255 - 0.5) / 0.25]))
    torch.testing.assert_close(form.visible(tensor)[:, 2, 2], torch.tensor([1.0, 0.0, 128 / 255]))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_image_is_read(tmp_path: Path, mode: str, channels: int) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 6), 200 * 256, np.uint16))
    else:
        image = Image.new("L", (6, 6), 200).convert(mode)
    image.save(tmp_path / "one.tif")
    read = ImageForm(6, channels).read(tmp_path / "one.tif")
    assert read.shape == (6, 6, channels)
    assert abs(int(read[3, 3, 0]) - (255 if mode == "1" else 200)) <= 1 or mode == "1"


def test_a_photograph_is_turned_as_its_camera_was(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[0] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    assert ImageForm(8, 1).read(tmp_path / "photo.png")[7].min() == 255


def pixels_of(count: int = 12) -> LabelledImages:
    pixels = np.random.default_rng(0).integers(1, 256, size=(count, 6, 6), dtype=np.uint8)
    return LabelledImages(list(pixels), list(range(count)), [str(number) for number in range(count)])


def test_augmented_images_are_moved_and_mirrored_by_their_generator() -> None:
    labelled = pixels_of()
    images = Images(labelled, ImageForm(6, 1, 0.0, 1.0), crop=2, flip=True)
    original = np.asarray(labelled.images[3], dtype=np.float32) / 255
    places: set[tuple[int, int, bool]] = set()
    for seed in range(300):
        drawn, label = images.draw(3, np.random.default_rng(seed))
        assert label == 3
        torch.testing.assert_close(drawn, images.draw(3, np.random.default_rng(seed))[0])
        for mirrored in (False, True):
            padded = np.pad(original, 2)
            for top in range(5):
                for left in range(5):
                    window = padded[top : top + 6, left : left + 6]
                    if np.array_equal(drawn[0].numpy(), window[:, ::-1] if mirrored else window):
                        places.add((top, left, mirrored))
    assert len(places) == 50
    torch.testing.assert_close(images[3][0][0], torch.from_numpy(original))


def test_what_is_drawn_depends_on_epoch_and_image_only() -> None:
    """Not on ranks, workers, batch size, or on where a run was resumed."""
    images = Images(pixels_of(), ImageForm(6, 1), crop=2, flip=True)

    def drawn(loader: EpochLoader) -> dict[int, torch.Tensor]:
        return {int(label): image for batch, labels in loader for image, label in zip(batch, labels, strict=True)}

    straight = EpochLoader(images, 4)
    first, second = drawn(straight), drawn(straight)
    assert any(not torch.equal(first[label], second[label]) for label in first)
    shared: dict[int, torch.Tensor] = {}
    for rank in range(2):
        loader = EpochLoader(images, 3, rank=rank, world_size=2, num_workers=1)
        iterator = iter(loader)
        batch, labels = next(iterator)
        shared |= dict(zip(labels.tolist(), batch, strict=True))
        resumed = EpochLoader(images, 2, rank=rank, world_size=2)
        resumed.load_state_dict({**loader.state_dict(), "seen": 0})
        shared |= drawn(resumed)
    assert shared.keys() == first.keys()
    assert all(torch.equal(shared[label], first[label]) for label in first)


@pytest.mark.parametrize(("workers", "train"), [(0, True), (0, False), pytest.param(1, True, marks=pytest.mark.slow)])
def test_a_damaged_file_is_named_in_one_line(make: Make, workers: int, train: bool) -> None:
    make("dog", 3)
    folder = make("cat", 3)
    damaged = folder / "cat" / "0.png"
    damaged.write_bytes(damaged.read_bytes()[:-60])
    data = ImageDataModule(str(folder), num_workers=workers)
    labelled = LabelledImages([damaged], [0], ["cat"])
    loader = data._loader(Images(labelled, data.form), train=train)
    with pytest.raises(UnreadableSampleError) as caught:
        next(iter(loader))
    assert str(caught.value).startswith(f"{damaged}: no image can be read (")
    assert "\n" not in str(caught.value)


def test_sizes_are_those_of_the_data_unless_given(make: Make) -> None:
    class Arrays(ImageDataModule):
        def default_images(self) -> LabelledImages:
            return LabelledImages(list(np.zeros((9, 5, 5), np.uint8)), [0, 1, 2] * 3, ["a", "b", "c"])

    arrays = Arrays()
    assert (arrays.classes, arrays.size, arrays.channels) == (3, 5, 1)
    images, labels = next(iter(arrays.train_dataloader()))
    assert images.shape == (3, 1, 5, 5)
    assert labels.dtype == torch.int64
    make("dog", 3)
    files = Arrays(str(make("cat", 3)))
    assert (files.classes, files.class_names, files.size, files.channels) == (2, ["cat", "dog"], 64, 3)
    given = Arrays(files.folder, size=6, channels=1)
    assert next(iter(given.val_dataloader()))[0].shape == (2, 1, 6, 6)
    with pytest.raises(ValueError, match=r"--data\.folder: say which folder the images are in"):
        _ = ImageDataModule().classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"crop": -1}, "crop must be at least 0, got -1"),
        ({"mean": [0.1, 0.2]}, r"mean must be a number or one for each channel, got \[0.1, 0.2\]"),
        ({"std": 0.0}, "std must be over 0, got 0.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataModule(**options)


def test_predictions_have_the_form_and_the_classes_of_the_checkpoint(make: Make, tmp_path: Path) -> None:
    make("dog", 3)
    folder = make("cat", 3)
    state = ImageDataModule(str(folder), size=7, channels=1, mean=0.1).state_dict()
    (tmp_path / "new" / "deep").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(tmp_path / "new" / "deep" / "x.jpg")
    (tmp_path / "new" / "y.txt").touch()
    later = ImageDataModule(predict=str(tmp_path / "new"))
    later.load_state_dict(state)
    assert later.class_names == ["cat", "dog"]
    ((images, files),) = later.predict_dataloader()
    assert images.shape == (1, 1, 7, 7)
    assert images.unique().tolist() == pytest.approx([-0.2])
    assert list(files) == [str(tmp_path / "new" / "deep" / "x.jpg")]
    for wrong, message in (("nothing", "there is no file or folder nothing"), ("empty", "empty has no images")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        path = wrong if wrong == "nothing" else str(tmp_path / wrong)
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            ImageDataModule(str(folder), predict=path).predict_dataloader()


def test_a_checkpoint_of_other_classes_is_refused(make: Make) -> None:
    make("dog", 3)
    state = ImageDataModule(str(make("cat", 3))).state_dict()
    make("bird", 3, "others")
    others = ImageDataModule(str(make("cat", 3, "others")))
    others.load_state_dict(state)
    with pytest.raises(ValueError, match="the checkpoint is of the classes cat, dog, and the data has bird, cat"):
        others.val_dataloader()


def test_a_file_that_is_no_image_tells_of_the_others(make: Make) -> None:
    make("dog", 8)
    folder = make("cat", 8)
    none = [folder / "cat" / "3.png", folder / "dog" / "5.png"]
    for path in none:
        path.write_bytes(b"none")
    labelled = LabelledImages(sorted(folder.rglob("*.png")), [0] * 16, ["cat"])
    with pytest.raises(UnreadableSampleError, match=f"1 more cannot be opened: {none[1]}$"):
        Images(labelled, ImageForm(8, 3))[labelled.images.index(none[0])]
