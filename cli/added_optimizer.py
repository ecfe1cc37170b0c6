"""An optimizer and its schedule for modules that make none themselves, so that all presets train them."""

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_muon.optim import MuonAdamW, Rule, route_parameters

# The key of the added arguments in a checkpoint: `load_from_checkpoint` makes the class without them.
ADDED_HYPERPARAMETERS = "added_hyper_parameters"


class AddedOptimizer(LightningModule):
    """What :func:`with_optimizer` puts before a class of modules.

    Args:
        optimizer: ``MuonAdamW`` or any optimizer of torch. It gets the groups of ``route_parameters``.
        lr_scheduler: Any scheduler of torch, which steps after each batch; ``ReduceLROnPlateau`` after each epoch.
        lr_by_role: Learning rates of roles in place of the optimizer's, such as ``{embedding: 0.1, head: 0.01}``.
        rules: Exceptions to the routing of parameters to Muon and AdamW.
        per_head: Let Muon orthogonalize each attention head by itself.
        strict_routing: Refuse to train while the role of a parameter is a guess.
        arguments: Of the class.
    """

    def __init__(
        self,
        *,
        optimizer: OptimizerCallable = MuonAdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_by_role: dict[str, float] | None = None,
        rules: list[Rule] | None = None,
        per_head: bool = False,
        strict_routing: bool = False,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.save_hyperparameters()  # to resume with them; the class itself may save none
        self.lr_by_role = lr_by_role
        self.rules, self.per_head, self.strict_routing = rules or [], per_head, strict_routing
        self._make_optimizer, self._make_scheduler = optimizer, lr_scheduler

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Set the added arguments apart."""
        super().on_save_checkpoint(checkpoint)
        arguments = checkpoint.get("hyper_parameters", {})
        added = inspect.signature(AddedOptimizer.__init__).parameters
        checkpoint[ADDED_HYPERPARAMETERS] = {name: arguments.pop(name) for name in added if name in arguments}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer of the routed parameters, and its schedule."""
        groups = route_parameters(
            self, self.rules, per_head=self.per_head, strict=self.strict_routing, lr_by_role=self.lr_by_role
        )
        optimizer = self._make_optimizer(groups)
        if self._make_scheduler is None:
            return optimizer
        scheduler = self._make_scheduler(optimizer)
        plateau = isinstance(scheduler, ReduceLROnPlateau)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {
                "scheduler": scheduler,
                "interval": "epoch" if plateau else "step",
                "monitor": getattr(scheduler, "monitor", None),
            },
        }


def with_optimizer(made: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class that also has the arguments of :class:`AddedOptimizer`, if it makes no optimizer.

    Other classes and functions are returned as they are: what has ``configure_optimizers`` knows what to do.
    """
    if not (inspect.isclass(made) and issubclass(made, LightningModule)):
        return made
    if made.configure_optimizers is not LightningModule.configure_optimizers:
        return made
    names = {"__module__": made.__module__, "__qualname__": made.__qualname__, "__doc__": made.__doc__}
    return type(made.__name__, (AddedOptimizer, made), names)
