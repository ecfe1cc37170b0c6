"""Gradient accumulation by the size of the batch that a step is to have."""

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, is_whole
from lightning_muon.callbacks.monitor import check_only_one


class TargetBatch(Callback):
    """Accumulate gradients so that each optimizer step has a given number of samples or tokens.

    It sets ``trainer.accumulate_grad_batches`` to target / (batch size × ranks), so that a run does the same on another
    number of devices. The schedule, and all that is counted in steps, counts optimizer steps. The last step of an epoch
    has what is left of it.

    The batch size is the attribute ``batch_size`` of the data module, or else of the module; the tokens of a sample are
    its attribute ``tokens_per_sample``. Ranks are those that have batches of their own.

    Args:
        samples: Samples per step, over all ranks.
        tokens: Tokens per step, over all ranks, instead of ``samples``.

    Raises:
        MisconfigurationException: If not one of the two is given; if it is not a multiple of what the ranks have in one
            batch; if ``accumulate_grad_batches`` is given too; or if the batch size is not known.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import TargetBatch
        >>> trainer = Trainer(callbacks=[TargetBatch(samples=256)])
    """

    def __init__(self, samples: int | None = None, tokens: int | None = None) -> None:
        check_whole("TargetBatch", optional=True, samples=samples, tokens=tokens)
        if (samples is None) == (tokens is None):
            raise MisconfigurationException("TargetBatch: give either samples or tokens")
        self.samples = samples
        self.tokens = tokens
        self._batches = 1  # that it has set

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        check_only_one(trainer, TargetBatch, ": keep one.")
        if trainer.accumulate_grad_batches not in (1, self._batches):
            raise MisconfigurationException(
                f"TargetBatch sets trainer.accumulate_grad_batches, which is {trainer.accumulate_grad_batches} already:"
                " remove one of the two"
            )
        batch_size = _attribute(trainer, pl_module, "batch_size")
        ranks = replicas(trainer)
        target, unit, of_sample = self.samples or 0, "samples", 1
        if self.tokens is not None:
            target, unit = self.tokens, "tokens"
            of_sample = _attribute(trainer, pl_module, "tokens_per_sample")
        of_batch = batch_size * ranks * of_sample
        if target % of_batch:
            raise MisconfigurationException(_problem(target, unit, batch_size, ranks, of_sample))
        self._batches = trainer.accumulate_grad_batches = target // of_batch
        rank_zero_info(
            f"TargetBatch: {target} {unit} a step, accumulate_grad_batches={self._batches} of {batch_size} samples"
            f" on {_counted(ranks, 'rank')}"
        )


def replicas(trainer: Trainer) -> int:
    """Return the number of ranks that have batches of their own; those of a tensor-parallel group share theirs."""
    return int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))


def known_attribute(trainer: Trainer, pl_module: LightningModule, name: str) -> int | None:
    """Return a positive whole number that the data module has under a name, or else the module; ``None`` without."""
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        value = getattr(owner, name, None)
        if is_whole(value) and value > 0:
            return value
    return None


def _attribute(trainer: Trainer, pl_module: LightningModule, name: str) -> int:
    value = known_attribute(trainer, pl_module, name)
    if value is None:
        owner = getattr(trainer, "datamodule", None) or pl_module
        raise MisconfigurationException(
            f"TargetBatch: {name} is not known: give {type(owner).__name__} an attribute {name}, a whole number"
        )
    return value


def _problem(target: int, unit: str, batch_size: int, ranks: int, of_sample: int) -> str:
    of_batch = batch_size * ranks * of_sample
    below, above = target // of_batch * of_batch, (target // of_batch + 1) * of_batch
    values = " or ".join(str(value) for value in (below, above) if value)
    in_batch = f"{batch_size} samples × {_counted(ranks, 'rank')}"
    in_batch += f" × {_counted(of_sample, 'token')} = {of_batch}" if unit == "tokens" else f" = {of_batch}"
    message = f"TargetBatch: {target} {unit} are no multiple of a batch, {in_batch}: give {unit} {values}"
    whole, rest = divmod(target, ranks * of_sample)
    if not rest and (sizes := [size for size in range(1, batch_size) if whole % size == 0]):
        message += f", or batch_size {sizes[-1]}"
    return message


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
