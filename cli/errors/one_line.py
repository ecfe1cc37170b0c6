"""The end of the program after a mistake of the user: one line, and an exit code."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_muon.callbacks import NonFiniteError
from lightning_muon.cli.output import debugging, exit_with, resume_command

if TYPE_CHECKING:
    from lightning_muon.cli.muon_cli import MuonCLI


@contextmanager
def in_one_line(cli: "MuonCLI") -> Iterator[None]:
    """Show a mistake of the user, or that the run went bad, as one line; bugs keep their traceback."""
    try:
        yield
    except NonFiniteError as error:
        if debugging():
            raise
        if getattr(rank_zero_only, "rank", 0):  # all ranks end with the same error
            raise SystemExit(1) from None
        resume = resume_command(cli._args, error.checkpoint) if error.checkpoint else None
        exit_with(f"{error}{f'. Go on from it: {resume}' if resume else ''}", code=1)
    except Exception as error:
        message = None if debugging() else cli.explain_error(error)
        if message is None:
            raise
        cli.undo()
        exit_with(message)
