"""The routing table in the log of a run."""

import rich
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_muon.optim import routing_table
from lightning_muon.optim.routing.from_groups import routes_of_groups


class PrintRouting(Callback):
    """Print which algorithm updates each parameter, and why, before the first step; once per run, on rank zero.

    The groups of the optimizers say it, so it holds for any module whose optimizers have groups of
    :func:`~lightning_muon.optim.route_parameters`. For others nothing is printed.
    """

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        routes = routes_of_groups(groups) if trainer.is_global_zero else []
        if routes:
            rich.print(routing_table(routes))
