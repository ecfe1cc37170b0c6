"""How the program ends: one line for a mistake of the user, a traceback for a bug, and at once on a signal."""

import signal
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf.errors import OmegaConfBaseException

from lightning_muon.callbacks import NonFiniteError
from lightning_muon.callbacks.stopping.receiver import SignalReceiver, StoppedBySignal
from lightning_muon.cli.errors.files import explain_file_error
from lightning_muon.cli.errors.parser import explain
from lightning_muon.cli.errors.user import message_for_the_user, raised_on_purpose
from lightning_muon.cli.given import value_of
from lightning_muon.cli.output import debugging, exit_with, resume_command
from lightning_muon.cli.resume.checks import explain_other_weights

if TYPE_CHECKING:
    from lightning_muon.cli.muon_cli import MuonCLI

_SECONDS_TO_UNWIND = 5.0  # after a signal outside of training


@contextmanager
def errors_in_one_line(cli: "MuonCLI") -> Iterator[None]:
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
        message = None if debugging() else _explanation(cli, error)
        if message is None:
            raise
        cli.undo()
        exit_with(message)


def _explanation(cli: "MuonCLI", error: Exception) -> str | None:
    """Return one line for an error that the user can correct; ``None`` for a bug."""
    if isinstance(error, OSError) and "subcommand" in cli.config:
        config = cli.config[cli.config["subcommand"]].as_dict()
        if line := explain_file_error(error, config):
            return line
    if isinstance(error, (ArgumentError, OmegaConfBaseException)):
        return explain(str(error), cli.parser_in_use(), cli.given, cli.choices.paths)
    if hasattr(cli, "model") and isinstance(error, (RuntimeError, ValueError)):
        message = explain_other_weights(str(error), type(cli.model).__name__, cli.resume)
        if message and value_of(cli.given, "ckpt_path") is not None:
            return message
    if cli.has_seen_a_batch() and not raised_on_purpose(error):
        return None
    made = [choice.made for choice in cli.choices] if hasattr(cli, "choices") else []
    packages = {one.__module__.split(".")[0] for one in made if one is not None}
    return message_for_the_user(error, {"lightning_muon", *packages} - {"lightning", "torch"})


@contextmanager
def ending_on_signals(cli: "MuonCLI") -> Iterator[None]:
    """End at once on SIGTERM and Ctrl-C, with the processes of other ranks; training has its own receiver."""
    receiver = SignalReceiver(_SECONDS_TO_UNWIND, raises=True, before_exit=partial(_end_other_ranks, cli))
    receiver.start()
    try:
        yield
    except BaseException as error:
        # After a signal the receiver goes on: another one brings no traceback, and the process ends in time.
        if isinstance(error, StoppedBySignal):
            _end_other_ranks(cli)
            raise
        if receiver.signum is not None and not debugging():
            # Another rank has ended before this one, or a library has made something else of the exception.
            raise StoppedBySignal(receiver.signum) from error
        receiver.close()
        raise
    receiver.close()


def _end_other_ranks(cli: "MuonCLI") -> None:
    launcher = cli.trainer.strategy.launcher if hasattr(cli, "trainer") else None
    if launcher is not None:
        launcher.kill(signal.SIGTERM)
