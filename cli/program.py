"""Choose the command: a light one, or a run of the trainer."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

    from lightning_muon.cli.muon_cli import MuonCLI


def main(
    model_class: "type[LightningModule] | Callable[..., LightningModule] | str | None" = None,
    datamodule_class: "type[LightningDataModule] | Callable[..., LightningDataModule] | str | None" = None,
    *,
    default_config: str | Path | None = None,
    args: Sequence[str] | None = None,
) -> "MuonCLI":
    """Run the command line of a project; its ``__main__`` calls this.

    Beside the subcommands of :class:`MuonCLI` there are ``report``, which shows how healthy runs are, and
    ``consolidate``, which makes one file of a sharded checkpoint. Both start without the module and its data, if these
    are given by their import paths.

    Example::

        main("my_project.module.TextModule", "my_project.data.TextData", default_config="configs/default.yaml")

    Args:
        model_class: The module to train, as a class or its import path; ``None`` to choose one by ``--model``.
        datamodule_class: Its data, likewise; ``None`` to choose it by ``--data``, or to have none.
        default_config: A YAML file with the defaults of all subcommands, below every ``--config``.
        args: The command line, by default that of the program.

    Returns:
        The command line that ran: its ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        SystemExit: With code 0 after ``report`` and ``consolidate``; with code 2 after an error of the user, which is
            one line on stderr.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["report"]:
        from lightning_muon.cli.commands import run_report  # noqa: PLC0415 - only the command that runs is imported

        run_report(arguments[1:])
        raise SystemExit(0)
    if arguments[:1] == ["consolidate"]:
        from lightning_muon.cli.commands import consolidate  # noqa: PLC0415

        consolidate(arguments[1:])
        raise SystemExit(0)
    from lightning_muon.cli.muon_cli import MuonCLI  # noqa: PLC0415 - it takes seconds to import

    return MuonCLI(model_class, datamodule_class, default_config=default_config, args=args)
