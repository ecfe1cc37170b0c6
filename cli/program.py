"""The program: which command was asked for."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

    from lightning_muon.cli.muon_cli import MuonCLI


def main(
    model_class: "type[LightningModule] | Callable[..., LightningModule] | None" = None,
    datamodule_class: "type[LightningDataModule] | Callable[..., LightningDataModule] | None" = None,
    *,
    default_config: str | Path | None = None,
    args: Sequence[str] | None = None,
) -> "MuonCLI":
    """Runs the command line of a project; what its ``__main__`` calls.

    Beside the subcommands of :class:`MuonCLI` there are ``report``, which shows how healthy runs are, and
    ``consolidate``, which makes one file of a sharded checkpoint.

    Example::

        main(TextModule, TextData, default_config=Path(__file__).parent / "configs" / "default.yaml")

    Args:
        model_class: The module to train, or ``None`` to choose one by ``--model``.
        datamodule_class: Its data, or ``None`` to choose it by ``--data``, or to have none.
        default_config: A YAML file with the defaults of all subcommands, below every ``--config``.
        args: The command line, by default that of the program.

    Returns:
        What ran: its ``trainer``, ``model``, ``datamodule`` and ``config``.

    Raises:
        SystemExit: With code 0 after ``report`` and ``consolidate``; with code 2 after an error of the user, which is
            one line on stderr.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments[:1] == ["report"]:
        from lightning_muon.cli.commands import run_report  # noqa: PLC0415 - only what was asked for is imported

        run_report(arguments[1:])
        raise SystemExit(0)
    if arguments[:1] == ["consolidate"]:
        from lightning_muon.cli.commands import consolidate  # noqa: PLC0415

        consolidate(arguments[1:])
        raise SystemExit(0)
    from lightning_muon.cli.muon_cli import MuonCLI  # noqa: PLC0415 - which takes seconds to import

    return MuonCLI(model_class, datamodule_class, default_config=default_config, args=args)
