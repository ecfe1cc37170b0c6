"""How the program ends when the user did something wrong. It imports little, so that light commands start fast."""

import os
import sys
from typing import NoReturn


def debugging() -> bool:
    """Whether the user asked for tracebacks, by the environment variable ``LIGHTNING_MUON_DEBUG=1``."""
    return os.environ.get("LIGHTNING_MUON_DEBUG", "0") not in {"", "0"}


def exit_with(line: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2, as shells expect of a wrong command line."""
    sys.stderr.write(f"error: {' '.join(line.split())}\n")
    raise SystemExit(2)
