"""The data: memory-mapped text, in random crops of bytes. A resumed run continues with the next crop."""

import glob
import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import lightning as L  # noqa: N812 - the name that everyone knows
import numpy as np
import torch
from torch import Tensor

SPLITS = {"train": 0.9, "val": 0.05, "test": 0.05}
NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
COPY_BYTES = 1 << 20
BASELINE_BYTES = 1 << 24  # enough to estimate byte frequencies


class TextData(L.LightningDataModule):
    """Training, validation and test text from text files.

    By default the text is the source code of Python's standard library: about 12 MB, no download. Three or more files
    are split by file. Fewer are split by position: the beginning for training, the end for validation and test.

    Args:
        files: Patterns of the text files, such as ``corpus/**/*.txt``, in any encoding.
        context: Bytes per sample.
        batch_size: Samples per batch and device.
        val_batches: Batches per validation, over all devices; the same batches each time.
        prompt: The text that ``predict`` continues.
        data_dir: Folder of the prepared text.
        seed: Seed of the random crops.
    """

    def __init__(
        self,
        files: str | list[str] | None = None,
        context: int = 256,
        batch_size: int = 16,
        val_batches: int = 32,
        prompt: str = "def ",
        data_dir: str = "data",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("context", context), ("batch_size", batch_size), ("val_batches", val_batches)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        if not prompt:
            raise ValueError("prompt must have at least one character")
        self.files = [files] if isinstance(files, str) else files
        self.context = context
        self.batch_size = batch_size
        self.val_batches = val_batches
        self.prompt = prompt
        self.data_dir = Path(data_dir)
        self.seed = seed

    def prepare_data(self) -> None:
        """Join the files of each split into one file, unless an earlier run has done so."""
        if self._folder.is_dir():
            return
        self.data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.data_dir) as unfinished:
            target = Path(unfinished) / "text"
            target.mkdir()
            write_splits(self._paths, target)
            with suppress(OSError):  # another run has written the folder meanwhile
                target.rename(self._folder)

    def train_dataloader(self) -> "Crops":
        """Return random crops. An epoch has as many bytes as the text, or is the whole run if that is shorter."""
        text = self._text("train")
        length = len(text) // (self.context * self.batch_size * self._world_size)
        if self.trainer and self.trainer.max_steps > 0:
            length = min(length, self.trainer.max_steps * self.trainer.accumulate_grad_batches)
        return Crops(text, self.context, self.batch_size, max(1, length), self.seed, self._rank, self._world_size)

    def val_dataloader(self) -> "Crops":
        """Return the same random crops of the validation text at each call."""
        return self._fixed("val")

    def test_dataloader(self) -> "Crops":
        """Return the same random crops of the test text at each call."""
        return self._fixed("test")

    def predict_dataloader(self) -> "Crops":
        """Return one batch with the prompt, shape (1, bytes)."""
        prompt = torch.tensor(list(self.prompt.encode()), dtype=torch.uint8)
        return Crops(prompt, context=len(prompt) - 1, batch_size=1, length=1, seed=self.seed, endless=False)

    @cached_property
    def unigram_loss(self) -> float:
        """Validation loss, in nats per byte, of a model that predicts the byte frequencies of the training text."""
        counts = [torch.bincount(self._text(split)[:BASELINE_BYTES].int(), minlength=256) for split in ("train", "val")]
        log_frequency = torch.log((counts[0] + 1) / (counts[0] + 1).sum())
        return -float((counts[1] * log_frequency).sum() / counts[1].sum())

    @cached_property
    def _paths(self) -> list[Path]:
        if self.files is None:
            found: Iterable[Path] = library_files()
        else:
            found = (Path(match) for pattern in self.files for match in glob.glob(pattern, recursive=True))  # noqa: PTH207 - absolute patterns too
        paths = sorted({path for path in found if path.is_file()})
        for path in paths:
            path.open("rb").close()  # an unreadable file is told before anything is written
        if not paths:
            raise FileNotFoundError(f"--data.files {self.files}: no file matches in {Path.cwd()}")
        return paths

    @cached_property
    def _folder(self) -> Path:
        facts = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in self._paths]
        return self.data_dir / hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    def _text(self, split: str) -> Tensor:
        """Return the bytes of a split, dtype uint8, memory-mapped."""
        path = self._folder / split
        size = path.stat().st_size
        if size <= self.context:
            raise ValueError(
                f"the {split} text has {size} bytes, and a sample needs {self.context + 1}:"
                " add text by --data.files, or reduce --model.context"
            )
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)

    def _fixed(self, split: str) -> "Crops":
        length = max(1, self.val_batches // self._world_size)
        return Crops(
            self._text(split),
            self.context,
            self.batch_size,
            length,
            self.seed,
            self._rank,
            self._world_size,
            endless=False,
        )

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1


class Crops:
    """Batches of random crops of a text. Crop i depends only on i and the seed.

    Ranks take batches in turn. So two devices with half the batch size, or two accumulated batches, use the same crops
    as one device.

    Args:
        text: Shape (bytes,), dtype uint8.
        context: Length of a crop without the target of its last byte.
        batch_size: Crops per batch.
        length: Batches per epoch on this rank.
        seed: Seed of the crops.
        rank: Rank of this process.
        world_size: Number of processes.
        endless: True: each epoch has new crops. False: each epoch repeats the same crops.
    """

    def __init__(
        self,
        text: Tensor,
        context: int,
        batch_size: int,
        length: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = True,
    ) -> None:
        self.text = text
        self.context = context
        self.batch_size = batch_size
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.endless = endless
        self.drawn = 0

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.length

    def __iter__(self) -> Iterator[Tensor]:
        """Yield batches of shape (batch, context + 1), dtype uint8."""
        if not self.endless:
            self.drawn = 0
        for _ in range(self.length):
            first = self.drawn + self.rank * self.batch_size
            self.drawn += self.world_size * self.batch_size
            yield torch.stack([self.crop(number) for number in range(first, first + self.batch_size)])

    def crop(self, number: int) -> Tensor:
        """Return a crop of shape (context + 1,)."""
        start = int(np.random.default_rng([self.seed, number]).integers(len(self.text) - self.context))
        return self.text[start : start + self.context + 1]

    def state_dict(self) -> dict[str, int]:
        """Return the number of crops drawn by all ranks; Lightning saves it in the checkpoint."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.drawn = state_dict["drawn"]


def library_files() -> Iterator[Path]:
    """Yield the source files of the standard library; folders of ``NOT_TEXT`` are not entered."""
    for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
        folders[:] = set(folders) - NOT_TEXT
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def write_splits(paths: list[Path], folder: Path) -> None:
    """Write the text of each split to ``folder``: whole files by a hash of their names, or parts of few files."""
    with ExitStack() as stack:
        writers = {split: stack.enter_context((folder / split).open("wb")) for split in SPLITS}
        if len(paths) < len(SPLITS):
            for path in paths:
                _cut(path, writers)
            return
        root = os.path.commonpath(paths)
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(os.fsencode(path.relative_to(root))).digest())
        held_out = max(1, round(SPLITS["val"] * len(paths)))
        for rank, path in enumerate(by_hash):
            split = "test" if rank < held_out else "val" if rank < 2 * held_out else "train"
            with path.open("rb") as reader:
                shutil.copyfileobj(reader, writers[split])


def _cut(path: Path, writers: Mapping[str, BinaryIO]) -> None:
    """Write the beginning of a file to the training text and its end to the other splits."""
    size = path.stat().st_size
    with path.open("rb") as reader:
        end = 0.0
        for split, share in SPLITS.items():
            end += share * size
            while (wanted := min(round(end) - reader.tell(), COPY_BYTES)) > 0 and (chunk := reader.read(wanted)):
                writers[split].write(chunk)
