"""The state of a learning-rate scheduler, in the parameter groups of another run."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

# What a scheduler of torch takes from the groups, in one list entry for each.
_FROM_GROUPS = {"base_lrs": "initial_lr", "_last_lr": "lr"}
# What the user gave, for all groups or for each.
_GIVEN = ("min_lrs", "max_lrs", "base_momentums", "max_momentums", "lr_lambdas")


def follow_groups(scheduler: Any, groups: Sequence[Mapping[str, Any]]) -> None:
    """Make a restored scheduler fit the groups of its optimizer, if those of the checkpoint were others.

    Torch's schedulers have lists with an entry for each group, and match them by position. An optimizer that has taken
    its groups from a checkpoint by name, as ``MuonAdamW`` does, has their learning rates in the groups: they are copied
    from there. ``MuonCLI`` and ``FSDP2Strategy`` do this; with another trainer do it in the module's
    ``on_train_start``::

        for config in self.trainer.lr_scheduler_configs:
            follow_groups(config.scheduler, config.scheduler.optimizer.param_groups)

    Args:
        scheduler: The scheduler, with what its checkpoint said, or its state dict; changed in place.
        groups: The groups of its optimizer, as they were restored.

    Raises:
        ValueError: If the checkpoint has values of a setting that differ between its groups.
    """
    state: MutableMapping[str, Any] = scheduler if isinstance(scheduler, dict) else vars(scheduler)
    for nested in state.get("_schedulers", ()):
        follow_groups(nested, groups)
    for key, option in _FROM_GROUPS.items():
        rates, own = state.get(key), [group[option] for group in groups if option in group]
        # The same rates in another order are those of the same groups in another order.
        moved = isinstance(rates, list) and (len(rates) != len(groups) or sorted(rates) == sorted(own))
        if moved and len(own) == len(groups):
            state[key] = own
    for key in _GIVEN:
        values = state.get(key)
        if isinstance(values, list) and len(values) != len(groups):
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{key} of the scheduler is {values} in the checkpoint, one for each of its parameter groups, and"
                    f" this run has {len(groups)}: route the parameters as in the run that saved it"
                )
            state[key] = values[:1] * len(groups)
