"""The table of routes on the terminal, and in the log of a run."""

import sys
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from typing_extensions import override

from lightning_muon.optim import Route, routing_table
from lightning_muon.optim.routing.used import used_routes

_WIDTH = 240  # characters, in a file or a pipe: names stay whole


class PrintRouting(Callback):
    """Print what updates each parameter, with its role and the reason, before the first step; once, on rank zero.

    That is Muon or AdamW in ``MuonAdamW``, and the class of any other optimizer. The groups of the optimizers say it,
    so it holds for any module whose optimizers have groups of
    :func:`~lightning_muon.optim.route_parameters`. For others nothing is printed.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        routes = used_routes(trainer.optimizers) if trainer.is_global_zero else []
        if routes:
            print_routes(routes)


def print_routes(routes: Sequence[Route], *, every_parameter: bool = False) -> None:
    """Print routes as a table: a row for each reason, or for each parameter."""
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(routing_table(routes, every_parameter=every_parameter))
