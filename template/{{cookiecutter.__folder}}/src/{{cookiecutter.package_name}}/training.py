"""What every LightningModule of this project shares: the optimizer and its schedule."""

import lightning as L  # noqa: N812 - the name that everyone knows
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_muon.optim import MuonAdamW, Rule, route_parameters


class TrainingModule(L.LightningModule):
    """Update hidden matrices by Muon and the other parameters by AdamW, or all by any optimizer of torch.

    Args:
        net: The network.
        optimizer: ``MuonAdamW`` or any optimizer of torch, such as ``--model.optimizer AdamW`` for comparison.
        lr_scheduler: Any scheduler of torch. One with an argument ``total_steps`` gets the length of the run.
            ``ReduceLROnPlateau`` also takes the metric to ``monitor``.
        lr_by_role: Learning rates of roles in place of the optimizer's, such as ``{embedding: 0.1, head: 0.01}``.
        rules: Exceptions to the routing of parameters to Muon and AdamW.
        per_head: Let Muon orthogonalize each attention head by itself.
        strict_routing: Refuse to train while the role of a parameter is a guess, until a rule decides.
        compile: Compile the network with ``torch.compile``.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_by_role: dict[str, float] | None = None,
        rules: list[Rule] | None = None,
        per_head: bool = False,
        strict_routing: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        if compile:
            self.net.compile()  # in place, so that the names in checkpoints do not change
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_by_role = lr_by_role
        self.rules = rules or []
        self.per_head = per_head
        self.strict_routing = strict_routing

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of the routed parameters, and its schedule."""
        groups = route_parameters(
            self, self.rules, per_head=self.per_head, strict=self.strict_routing, lr_by_role=self.lr_by_role
        )
        optimizer = self.optimizer(groups)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        # ReduceLROnPlateau needs the validation loss, at the end of an epoch. Other schedulers step after each batch.
        interval = "epoch" if isinstance(scheduler, ReduceLROnPlateau) else "step"
        monitor = getattr(scheduler, "monitor", None)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": interval, "monitor": monitor},
        }
