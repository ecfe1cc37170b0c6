"""The options of light commands, which need no configuration of a training."""

from argparse import ArgumentParser, ArgumentTypeError
from typing import NoReturn

from typing_extensions import override

from lightning_muon.cli.output import exit_with


class OptionParser(ArgumentParser):
    """Its errors are one line, without the usage."""

    @override
    def error(self, message: str) -> NoReturn:
        exit_with(f"{message}; see {self.prog} --help")


def positive(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
