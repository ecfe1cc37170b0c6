"""The size of weights and of layer outputs, and how far bfloat16 could resolve the updates of the weights."""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import NameChoice, check_whole, some
from lightning_muon.callbacks.decay.target_decay import PLANNED_LRS
from lightning_muon.callbacks.limits import Limit, advice
from lightning_muon.callbacks.logging import warn
from lightning_muon.callbacks.matrices import frozen_names, muon_groups, muon_matrices
from lightning_muon.callbacks.measures.output_rms import OutputMeter, block_names, compiled_names, named_layers
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.sampling import spread_evenly
from lightning_muon.callbacks.shards import (
    Shard,
    entry_norms,
    find_shards,
    largest_entries,
    local_gradients,
    names_with_gradient,
    over_ranks,
)
from lightning_muon.optim.update.state import HALF

BLOCKS = "blocks"
BF16 = torch.finfo(torch.bfloat16)
VANISHING = 0.1  # of the peak of the learning rate

# Names, shards, and measurements: norms of weights, updates and gradients, and numbers of lost updates.
UpdateNorms = tuple[list[str], list[Shard], list[Tensor]]


class WeightRMSMonitor(StepMonitor):
    r"""Log the size of Muon's weights and of layer outputs, and how far bfloat16 resolves the updates.

    Muon's updates have a fixed size. Without weight decay the weights grow, and with them the spacing of bfloat16
    numbers, until updates are rounded away. Each quantity is logged as ``max``, ``mean`` and ``min`` over the matrices:

    - ``weight_rms/…``: root mean square of the entries.
    - ``weight_absmax/…``: largest entry in magnitude.
    - ``doublings_to_overflow/…``: :math:`\log_2(3.39 \cdot 10^{38} / \mathrm{absmax})`, how often the largest entry may
      double before bfloat16 overflows.
    - ``bf16_headroom/…``: RMS of the update in units of the spacing of bfloat16 numbers at the weight's RMS,
      :math:`\mathrm{rms}(W' - W) / 2^{\lfloor \log_2 \mathrm{rms}(W) \rfloor - 7}`. Below one half, most updates of
      bfloat16 weights would be lost.
    - ``lost_updates/…``: fraction of the entries that would not change if they were bfloat16 numbers and their update
      was rounded to nearest; of weights in bfloat16, those that did not change.
    - ``output_rms/…``: root mean square of the outputs of the modules chosen by ``outputs``, over all ranks, in the
      last forward pass before the step. Modules inside one that ``torch.compile`` compiled cannot be measured.
    - ``weight_bits``: the smallest number of bits of a weight, one scalar. With 16, updates really are lost.

    What bfloat16 would lose, the third to the fifth, is logged where weights are in half precision, or with
    ``as_if_bf16``. ``bf16_headroom`` and ``lost_updates`` are measured on a sample, copied for the step, of those
    matrices that are not zero, and whose gradient and learning rate are not zero. The other quantities take a pass over
    the weights. If a limit is passed, one warning names the layer and says what to do. Without Muon matrices only
    outputs are measured.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log the value of each matrix too: of all (true), or of those whose names match a pattern. Modules
            of ``outputs`` are logged by name with ``true``.
        sample: How many matrices of an optimizer are copied for a step, to measure their update.
        outputs: Patterns for the names of the modules whose output is measured, such as ``["net.blocks.*.mlp"]``; or
            ``"blocks"`` for the repeated layers of the model. What matches nothing is warned of.
        max_weight_rms: Warn if the RMS of a matrix is larger. Default: never.
        max_output_rms: Warn if the RMS of an output is larger. Default: never.
        max_lost_updates: Warn if weights in bfloat16 lose a larger fraction of their updates, while the learning rate
            is at least a tenth of its peak. Null: never.
        min_doublings_to_overflow: Warn if the largest weight has fewer doublings left. Null: never.
        as_if_bf16: Log what bfloat16 would lose of float32 weights too: what ``bf16-true`` would cost.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern of ``per_parameter`` matches nothing, or the
            trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import WeightRMSMonitor
        >>> trainer = Trainer(callbacks=[WeightRMSMonitor(every_n_steps=100, outputs=["blocks.*"])])
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_parameter: bool | Sequence[str] = False,
        sample: int = 4,
        outputs: Sequence[str] | Literal["blocks"] = (),
        max_weight_rms: float | None = None,
        max_output_rms: float | None = None,
        max_lost_updates: float | None = 0.5,
        min_doublings_to_overflow: float | None = 16.0,
        as_if_bf16: bool = False,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        check_whole("WeightRMSMonitor", sample=sample)
        self.sample = sample
        self.outputs = outputs
        self.max_weight_rms = max_weight_rms
        self.max_output_rms = max_output_rms
        self.max_lost_updates = max_lost_updates
        self.min_doublings_to_overflow = min_doublings_to_overflow
        self.as_if_bf16 = as_if_bf16
        self._chosen_outputs = NameChoice("WeightRMSMonitor: outputs", () if outputs == BLOCKS else outputs)
        self._limits = self.make_limits()  # which raises the error of a wrong argument
        self._outputs = OutputMeter({})
        self._wants_outputs = False
        self._only_outputs = False

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._wants_outputs = False

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return self._only_outputs or super().watches(optimizer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._only_outputs = bool(self.outputs) and not any(map(super().watches, trainer.optimizers))
        if self._only_outputs and not frozen_names(pl_module):
            warn(trainer, f"WeightRMSMonitor: only outputs are measured: {self.nothing_to_watch}")
        super().on_train_start(trainer, pl_module)
        layers = dict(named_layers(pl_module))
        for problem in self._chosen_outputs.unmatched(layers):
            warn(trainer, problem)
        blocks = set(block_names(pl_module)) if self.outputs == BLOCKS else set()
        if self.outputs == BLOCKS and not blocks:
            names = [name for name, layer in layers.items() if next(layer.parameters(), None) is not None]
            warn(
                trainer,
                "WeightRMSMonitor: outputs is 'blocks', but no list of the model repeats a layer, so no output is"
                f" measured. Give patterns for names: there are {some(names)}.",
            )
        chosen = {name: layer for name, layer in layers.items() if name in blocks or self._chosen_outputs.takes(name)}
        if without_hooks := sorted(compiled_names(pl_module) & chosen.keys()):
            warn(
                trainer,
                f"WeightRMSMonitor: torch.compile has made {some(without_hooks)} part of a larger whole, so output_rms"
                " cannot be measured there. Choose outputs outside, or train without compiling to see them.",
            )
        self._outputs = OutputMeter({name: layer for name, layer in chosen.items() if name not in without_hooks})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._wants_outputs |= self.measures_now(trainer)
        if self._due and self._wants_outputs:
            self._outputs.start()

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Measure the updates of a sample of the matrices."""
        trainer = pl_module.trainer
        moving = {
            name: matrix
            for labelled in muon_groups([optimizer])
            if float(labelled.group.get("lr", 1.0)) != 0
            for name, matrix in labelled.named_parameters(self._names)
            if self.as_if_bf16 or matrix.dtype in HALF
        }
        names = spread_evenly(names_with_gradient(trainer, moving), self.sample, self._chosen)
        sampled = [moving[name] for name in names]
        shards = find_shards(trainer, sampled)
        before = [shard.local.clone() for shard in shards]
        gradients = entry_norms(local_gradients(sampled))
        yield
        if not names:
            return
        updates = list(torch._foreach_sub([shard.local for shard in shards], before))
        lost = torch.stack([count_lost(old, update) for old, update in zip(before, updates, strict=True)])
        self._measured.append((names, shards, [entry_norms(before), entry_norms(updates), gradients, lost]))

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        self._outputs.stop()

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[UpdateNorms]) -> None:
        self._wants_outputs = False
        matrices = muon_matrices(trainer.optimizers, self._names)
        shards = find_shards(trainer, list(matrices.values()))
        local = [shard.local for shard in shards]
        found = over_ranks(trainer, shards, [entry_norms(local), largest_entries(local)])
        rms, largest = (found.norm[0] / found.entries.sqrt()).tolist(), found.max[1].tolist()
        present = [(name, index) for index, name in enumerate(matrices) if found.entries[index] > 0]
        room = {name: doublings_to_overflow(largest[index]) for name, index in present if largest[index] != 0}
        logs_room = self.as_if_bf16 or any(matrix.dtype in HALF for matrix in matrices.values())
        quantities = {
            "weight_rms": {name: rms[index] for name, index in present},
            "weight_absmax": {name: largest[index] for name, index in present},
            **({"doublings_to_overflow": room} if logs_room else {}),
            **_update_quantities(trainer, measured),
            "output_rms": self._outputs.rms(trainer) if self._outputs.modules else {},
        }
        bits = [8 * matrices[name].itemsize for name, _ in present]
        self.log_summary(trainer, quantities, **({"weight_bits": min(bits)} if bits else {}))
        in_bf16 = {
            name
            for labelled in muon_groups(trainer.optimizers)
            if not is_vanishing(labelled.group)
            for name, matrix in labelled.named_parameters(self._names)
            if matrix.dtype == torch.bfloat16
        }
        really_lost = {name: lost for name, lost in quantities["lost_updates"].items() if name in in_bf16}
        limited = {**quantities, "lost_updates": really_lost, "doublings_to_overflow": room}
        for quantity, limit in self._limits.items():
            limit.watch(trainer, limited[quantity])

    @override
    def make_limits(self) -> dict[str, Limit]:
        lost = "the fraction of the update that bfloat16 has rounded away"
        room = "the room of the largest weight, in doublings until bfloat16 overflows,"
        limits = {
            "weight_rms": ("max_weight_rms", self.max_weight_rms, "the weight RMS"),
            "output_rms": ("max_output_rms", self.max_output_rms, "the output RMS"),
            "lost_updates": ("max_lost_updates", self.max_lost_updates, lost),
            "doublings_to_overflow": ("min_doublings_to_overflow", self.min_doublings_to_overflow, room),
        }
        return {name: Limit("WeightRMSMonitor", *limit, advice(name)) for name, limit in limits.items()}


def _update_quantities(trainer: Trainer, measured: Iterable[UpdateNorms]) -> dict[str, dict[str, float]]:
    """Return the quantities that depend on the updates of the sample. A collective of all ranks."""
    quantities: dict[str, dict[str, float]] = {"bf16_headroom": {}, "lost_updates": {}}
    for names, shards, norms in measured:
        found = over_ranks(trainer, shards, norms)
        weights, updates, gradients, _ = (found.norm / found.entries.sqrt()).tolist()
        losses = (found.sum[3] / found.entries).tolist()
        for name, weight, update, gradient, lost in zip(names, weights, updates, gradients, losses, strict=True):
            # A matrix of zeros has no spacing to compare with; without a gradient there is no update to lose.
            if weight != 0 and gradient != 0:
                quantities["bf16_headroom"][name] = update / bf16_spacing(weight)
                quantities["lost_updates"][name] = lost
    return quantities


def bf16_spacing(value: float) -> float:
    """Return the distance between neighbouring bfloat16 numbers (ulp) at the size of a value; tiny for zero."""
    # frexp: value = fraction · 2^exponent with ½ ≤ fraction < 1
    _, exponent = math.frexp(max(abs(value), torch.finfo(torch.float32).tiny))
    return math.ldexp(BF16.eps, exponent - 1)


def doublings_to_overflow(largest: float) -> float:
    """Return how often the largest entry may double before bfloat16 overflows, log₂(3.39e38 / largest)."""
    if math.isfinite(largest) and largest > 0:
        return math.log2(BF16.max) - math.log2(largest)
    return math.inf if largest == 0 else math.nan if math.isnan(largest) else -math.inf


def is_vanishing(group: Mapping[str, Any]) -> bool:
    """Return whether a schedule has a group's learning rate near zero: bfloat16 then loses updates in any run."""
    lr = float(group.get("lr", 1.0))
    return lr < VANISHING * max([lr, *(float(group[key]) for key in PLANNED_LRS if key in group)])


def count_lost(weight: Tensor, update: Tensor) -> Tensor:
    """Return how many entries keep their value in bfloat16 when an update is rounded to nearest: a float32 scalar.

    Args:
        weight: Before the update. If it is in bfloat16, the update has been rounded already.
        update: What was added to it, of the same shape.
    """
    if weight.dtype == torch.bfloat16:
        moves = update
    else:
        rounded = weight.bfloat16()
        moves = (rounded + update).bfloat16() != rounded  # the sum is in the precision of the update
    return (weight.numel() - moves.count_nonzero()).float()
