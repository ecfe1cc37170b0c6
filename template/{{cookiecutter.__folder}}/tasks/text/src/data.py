"""The text: by default the source code of Python's standard library, about 12 MB without a download."""

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from lightning_muon.data import TextDataModule

NOT_TEXT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class TextData(TextDataModule):
    """The samples: text from ``files``, or of the standard library, as tokens.

    For data of another kind, override ``train_dataloader`` and ``val_dataloader``; see ``TextDataModule``.
    """

    def default_files(self) -> Iterator[Path]:
        """Yield the source files of the standard library; folders of ``NOT_TEXT`` are not entered."""
        for folder, folders, names in os.walk(sysconfig.get_path("stdlib")):
            folders[:] = set(folders) - NOT_TEXT
            yield from (Path(folder, name) for name in names if name.endswith(".py"))
