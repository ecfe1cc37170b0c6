"""How this program is called, to be copied into a shell."""

import os
import shutil
import sys
from pathlib import Path


def program_name() -> str:
    """How this program was called, as one would type it again: ``python -m my_project`` or ``python train.py``."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None:
        return f"{python()} -m {spec.name.removesuffix('.__main__')}"
    script = sys.argv[0] if sys.argv else ""
    return f"{python()} {script}" if script.endswith(".py") else Path(script).name


def python() -> str:
    """How to call this Python: by its name where the shell finds it, as in an active environment, else by its path."""
    found = shutil.which("python")
    if found and Path(found).parent == Path(sys.executable).parent:
        return "python"
    path = Path(os.path.relpath(sys.executable))
    return quoted(str(path if len(path.parts) < len(Path(sys.executable).parts) else Path(sys.executable)))


def quoted(path: str) -> str:
    """The path as a shell takes it."""
    return f"'{path}'" if " " in path else path
