"""The command line: LightningCLI, set up for training with Muon, and a command that reads finished runs.

A project's ``__main__`` calls :func:`main` with its module and its data; ``python -m lightning_muon.cli`` serves
modules from anywhere.
"""

from typing import TYPE_CHECKING, Any

from lightning_muon.cli.program import main

if TYPE_CHECKING:
    from lightning_muon.cli.muon_cli import MuonCLI

__all__ = ["MuonCLI", "main"]


def __getattr__(name: str) -> Any:
    """Import ``MuonCLI``, and Lightning with it, when it is asked for: a report is to be there at once."""
    if name == "MuonCLI":
        from lightning_muon.cli.muon_cli import MuonCLI  # noqa: PLC0415

        return MuonCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
