"""Samples and tokens a second, and the share of the device's peak that the model uses."""

from typing import Any

from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.data import _extract_batch_size
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, is_number
from lightning_muon.callbacks.logging import log_scalars
from lightning_muon.callbacks.monitor import check_only_one
from lightning_muon.callbacks.optimizer_time import Moment
from lightning_muon.callbacks.target_batch import known_attribute, replicas


class SpeedMonitor(Callback):
    """Log how fast a run is.

    - ``throughput/samples_per_second``: samples of all ranks.
    - ``throughput/tokens_per_second``: those times ``tokens_per_sample``, an attribute of the data or of the module.
    - ``throughput/tflops``: floating-point operations a second of one device, in 10¹², from ``flops_per_batch``, an
      attribute of the module, which Lightning's ``ThroughputMonitor`` reads as well.
    - ``throughput/mfu``: that over the device's peak, the model FLOPs utilization of PaLM, arXiv:2204.02311.

    A value is the mean since the value before. Waiting for data and the optimizer count; validation with the checkpoint
    after it and the first step, which compiles, do not. All ranks are taken to have batches of one size.

    Lightning's ``ThroughputMonitor`` waits for the GPU in each batch, and logs nothing in the first hundred. This one
    records CUDA events, and waits where it logs.

    Args:
        every_n_steps: How often to log, in optimizer steps. Default: the trainer's ``log_every_n_steps``.
        peak_flops: Floating-point operations a second that one device can do. Default: from Lightning's table, which
            has the peak with structured sparsity, twice the usual one, for some GPUs.
        measure_flops: Count the operations of the first batch where the module has no ``flops_per_batch``. Not of a
            compiled module, nor under manual optimization.

    Raises:
        MisconfigurationException: If an argument is wrong, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import SpeedMonitor
        >>> trainer = Trainer(callbacks=[SpeedMonitor()])
    """

    def __init__(
        self, every_n_steps: int | None = None, peak_flops: float | None = None, measure_flops: bool = False
    ) -> None:
        check_whole("SpeedMonitor", optional=True, every_n_steps=every_n_steps)
        if peak_flops is not None and not (is_number(peak_flops) and peak_flops > 0):
            raise MisconfigurationException(f"SpeedMonitor: peak_flops must be positive or null, got {peak_flops!r}")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self.measure_flops = measure_flops
        self._peak: float | None = None
        self._measured: int | None = None  # operations of the first batch
        self._counter: FlopCounterMode | None = None
        self._start: Moment | None = None
        self._pause: Moment | None = None
        self._pauses: list[tuple[Moment, Moment]] = []
        self._samples = self._batches = self._steps = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check_only_one(trainer, SpeedMonitor, ": both would log under the same tags. Keep one.")
        self._stop_counting()
        self._measured = self._start = self._pause = None
        if stage == "fit":
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self._peak = self.peak_flops or get_available_flops(trainer.strategy.root_device, dtype)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        if self._pause is not None:
            self._pauses.append((self._pause, Moment(trainer.strategy.root_device)))
            self._pause = None
        if self.measure_flops and self._measured is None and _can_be_counted(pl_module):
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._measured = self._stop_counting() or self._measured

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Any, batch_idx: int
    ) -> None:
        self._samples += next(_extract_batch_size(batch), None) or 0
        self._batches += 1
        every: int = self.every_n_steps or trainer.log_every_n_steps  # type: ignore[attr-defined]
        steps, self._steps = self._steps, trainer.global_step
        is_due = every > 0 and self._steps // every > steps // every
        if steps != self._steps and (self._start is None or is_due):
            end = Moment(trainer.strategy.root_device)
            if self._start is not None:
                seconds = self._start.until(end) - sum(start.until(later) for start, later in self._pauses)
                log_scalars(trainer, self._rates(trainer, pl_module, seconds))
            self._start, self._pauses = end, []
            self._samples = self._batches = 0

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._start is not None and self._pause is None:
            self._pause = Moment(trainer.strategy.root_device)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_counting()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop_counting()

    def _rates(self, trainer: Trainer, pl_module: LightningModule, seconds: float) -> dict[str, float]:
        rates = samples_and_tokens(trainer, pl_module, self._samples, seconds)
        flops: Any = getattr(pl_module, "flops_per_batch", None) or self._measured
        if flops:
            flops_per_second = flops * self._batches / seconds
            rates["tflops"] = flops_per_second / 1e12
            if self._peak:
                rates["mfu"] = flops_per_second / self._peak
        return {f"throughput/{name}": value for name, value in rates.items()}

    def _stop_counting(self) -> int | None:
        """Return the operations so far, if they were counted."""
        if self._counter is None:
            return None
        counter, self._counter = self._counter, None
        counter.__exit__(None, None, None)
        return counter.get_total_flops()


def samples_and_tokens(trainer: Trainer, pl_module: LightningModule, samples: int, seconds: float) -> dict[str, float]:
    """Return the samples a second of all ranks, and the tokens if it is known how many a sample has; from one rank."""
    if not samples:
        return {}
    rates = {"samples_per_second": samples * replicas(trainer) / seconds}
    if tokens := known_attribute(trainer, pl_module, "tokens_per_sample"):
        rates["tokens_per_second"] = tokens * rates["samples_per_second"]
    return rates


def _can_be_counted(module: LightningModule) -> bool:
    compiled = any(child._compiled_call_impl is not None for child in module.modules())
    return module.automatic_optimization and not compiled and not getattr(module, "flops_per_batch", None)
