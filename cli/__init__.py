"""The command line: LightningCLI, set up for training with Muon.

A project's ``__main__`` calls :func:`main` with its module and its data; ``python -m lightning_muon.cli`` serves
modules from anywhere.
"""

from lightning_muon.cli.muon_cli import MuonCLI, main

__all__ = ["MuonCLI", "main"]
