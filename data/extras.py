"""Optional packages of the data modules."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def package(name: str, of: str | Path) -> Iterator[None]:
    """Say in one line how to install a package that the imports in this block need.

    Args:
        name: Of the package on PyPI.
        of: What needs it, such as a file.

    Raises:
        ModuleNotFoundError: If it cannot be imported.
    """
    try:
        yield
    except ImportError:
        raise ModuleNotFoundError(f"{of} needs the package {name}: pip install {name}") from None
