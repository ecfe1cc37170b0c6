"""A disk that refuses one operation of a save."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest


class FailingDisk:
    """Fails at the n-th operation of a save: syncing or renaming a file, making a folder, and what else is counted."""

    def __init__(self, patch: pytest.MonkeyPatch, code: int = errno.ENOSPC) -> None:
        self.left, self.code = -1, code
        for name in ("fsync", "replace", "rename", "mkdir"):
            patch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.count()
            return function(*arguments, **options)

        return call

    def count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))

    @contextmanager
    def failing(self, operation: int) -> Iterator[None]:
        self.left = operation
        yield
        self.failed = self.left <= 0
        self.left = -1
