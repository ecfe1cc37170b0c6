"""The subcommand ``consolidate``: one plain file from a sharded checkpoint."""

from argparse import ArgumentParser
from collections.abc import Sequence

from lightning_muon.cli.output import debugging, exit_with, program_name
from lightning_muon.strategies import consolidate_checkpoint


def consolidate(args: Sequence[str]) -> None:
    """Run ``consolidate <checkpoint folder> <file>``; an error of the user is one line."""
    parser = ArgumentParser(
        prog=f"{program_name()} consolidate",
        description="Turn a sharded checkpoint, which is a folder, into one file that loads on any number of devices.",
    )
    parser.add_argument("folder", help="the sharded checkpoint, such as logs/version_0/checkpoints/last.ckpt")
    parser.add_argument("file", help="where to write; nothing is overwritten")
    parsed = parser.parse_args(list(args))
    try:
        consolidate_checkpoint(parsed.folder, parsed.file)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        if debugging():
            raise
        exit_with(str(error))
    print(f"checkpoint: {parsed.file}")
