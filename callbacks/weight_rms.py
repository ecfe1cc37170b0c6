"""How large weights and outputs are, and whether bfloat16 could still resolve the updates of the weights."""

from collections.abc import Generator, Sequence

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole
from lightning_muon.callbacks.limits import Limit, advice
from lightning_muon.callbacks.measures.bf16_headroom import bf16_spacing, count_lost, doublings_to_overflow
from lightning_muon.callbacks.measures.output_rms import OutputListener, compiled_names, named_layers
from lightning_muon.callbacks.monitor import StepMonitor, warn
from lightning_muon.callbacks.muon_matrices import entry_norms, largest_entries, muon_groups, muon_matrices
from lightning_muon.callbacks.name_choice import NameChoice, some
from lightning_muon.callbacks.sampled_matrices import spread_evenly
from lightning_muon.callbacks.shards import Shard, find_shards, local_gradients, names_with_gradient, over_ranks, sizes


class WeightRMSMonitor(StepMonitor):
    r"""Log the size of the weights that Muon updates, of the outputs of layers, and how far bfloat16 resolves updates.

    Muon's updates have a fixed size, so without weight decay the weights grow, and with them the spacing of bfloat16
    numbers, until an update is rounded away. Each quantity comes as ``max``, ``mean`` and ``min`` over the matrices:

    - ``weight_rms/…``: root mean square of the entries.
    - ``weight_absmax/…``: largest entry in magnitude.
    - ``doublings_to_overflow/…``: :math:`\log_2(3.39 \cdot 10^{38} / \mathrm{absmax})`, how often the largest entry may
      double before bfloat16 overflows.
    - ``bf16_headroom/…``: RMS of the update over the spacing of bfloat16 numbers at the weight's RMS,
      :math:`\mathrm{rms}(W' - W) / 2^{\lfloor \log_2 \mathrm{rms}(W) \rfloor - 7}`. Below one half, most updates would
      be lost if the weights were kept in bfloat16.
    - ``lost_updates/…``: fraction of the entries that would stay what they are if they were bfloat16 numbers, whose
      update is rounded to nearest; where they are such, those that stayed.
    - ``weight_bits``: bits in which the weights are kept, the fewest: where there are 16, updates are lost in earnest.
    - ``output_rms/…``: root mean square of what the modules chosen by ``outputs`` return in the last forward pass
      before the step, over all ranks. Modules inside one that ``torch.compile`` made a whole cannot be heard.

    ``bf16_headroom`` and ``lost_updates`` are measured on a sample of the matrices that are not zero, and whose
    gradient and learning rate are not. Where a limit is passed, one warning names the layer and says what to do.
    Without Muon's matrices only outputs are measured.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log each matrix too, under its name; or only those that match one of these patterns. Modules of
            ``outputs`` are logged so by ``true``.
        sample: How many matrices of an optimizer are copied for a step, to see their update.
        outputs: Patterns for the names of the modules whose output is measured, such as ``["net.blocks.*.mlp"]``.
        max_weight_rms: Warn where the RMS of a matrix is over this. Default: never.
        max_output_rms: Warn where the RMS of an output is over this. Default: never.
        max_lost_updates: Warn where weights that are kept in bfloat16 lose more than this fraction of their updates.
        min_doublings_to_overflow: Warn where the largest weight has fewer doublings left.

    Raises:
        MisconfigurationException: If an argument is out of its range; at the start of training, if a pattern matches
            nothing, or the trainer has two of these.

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
        outputs: Sequence[str] = (),
        max_weight_rms: float | None = None,
        max_output_rms: float | None = None,
        max_lost_updates: float | None = 0.5,
        min_doublings_to_overflow: float | None = 16.0,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        check_whole("WeightRMSMonitor", "sample", sample)
        self.sample = sample
        self.outputs = outputs
        self.max_weight_rms = max_weight_rms
        self.max_output_rms = max_output_rms
        self.max_lost_updates = max_lost_updates
        self.min_doublings_to_overflow = min_doublings_to_overflow
        self._chosen_outputs = NameChoice("WeightRMSMonitor: outputs", outputs)
        self._limits = self._make_limits()
        self._listener = OutputListener({})
        self._wants_outputs = False
        self._only_outputs = False
        self._sampled: list[tuple[list[str], list[Shard], list[Tensor]]] = []

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._sampled.clear()
        self._wants_outputs = False
        self._limits = self._make_limits()

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return self._only_outputs or super().watches(optimizer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._only_outputs = bool(self.outputs) and not any(map(super().watches, trainer.optimizers))
        if self._only_outputs:
            warn(trainer, f"WeightRMSMonitor: only outputs are measured: {self.nothing_to_watch}")
        super().on_train_start(trainer, pl_module)
        layers = dict(named_layers(pl_module))
        self._chosen_outputs.check(layers)
        chosen = {name: layer for name, layer in layers.items() if self._chosen_outputs.takes(name)}
        if deaf := sorted(compiled_names(pl_module) & chosen.keys()):
            warn(
                trainer,
                f"WeightRMSMonitor: torch.compile has made {some(deaf)} part of a larger whole, so output_rms cannot"
                " be measured there. Choose outputs outside, or train without compiling to see them.",
            )
        self._listener = OutputListener({name: layer for name, layer in chosen.items() if name not in deaf})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._wants_outputs |= self.measures_now(trainer)
        if self._due and self._wants_outputs:
            self._listener.start()

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Keep the size of sampled matrices before the step, and of their updates."""
        trainer = pl_module.trainer
        matrices = muon_matrices([optimizer], self._names)
        resting = {
            id(p) for _, group in muon_groups(optimizer) if float(group.get("lr", 1.0)) == 0 for p in group["params"]
        }
        moving = {name: matrix for name, matrix in matrices.items() if id(matrix) not in resting}
        if not moving:
            yield
            return
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
        self._sampled.append((names, shards, [entry_norms(before), entry_norms(updates), gradients, lost]))

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        self._listener.stop()

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wants_outputs = False
        matrices = muon_matrices(trainer.optimizers, self._names)
        shards = find_shards(trainer, list(matrices.values()))
        local = [shard.local for shard in shards]
        found = over_ranks(trainer, shards, [entry_norms(local), largest_entries(local), sizes(shards)])
        rms, largest, size = (found.norm[0] / found.sum[2].sqrt()).tolist(), found.max[1].tolist(), found.sum[2]
        present = [(name, index) for index, name in enumerate(matrices) if size[index] > 0]
        quantities = {
            "weight_rms": {name: rms[index] for name, index in present},
            "weight_absmax": {name: largest[index] for name, index in present},
            "doublings_to_overflow": {
                name: doublings_to_overflow(largest[index]) for name, index in present if largest[index] != 0
            },
            **self._headroom(trainer),
            "output_rms": self._listener.rms(trainer) if self._listener.modules else {},
        }
        bits = [8 * matrices[name].itemsize for name, _ in present]
        self.log_summary(trainer, quantities, {"weight_bits": min(bits)} if bits else None)
        in_bf16 = {name for name, matrix in matrices.items() if matrix.dtype == torch.bfloat16}
        happened = {name: lost for name, lost in quantities["lost_updates"].items() if name in in_bf16}
        for quantity, limit in self._limits.items():
            limit.watch(trainer, happened if quantity == "lost_updates" else quantities[quantity])

    def _headroom(self, trainer: Trainer) -> dict[str, dict[str, float]]:
        sampled, self._sampled = self._sampled, []
        quantities: dict[str, dict[str, float]] = {"bf16_headroom": {}, "lost_updates": {}}
        for names, shards, measured in sampled:
            found = over_ranks(trainer, shards, [*measured, sizes(shards)])
            *_, lost, size = found.sum.tolist()
            old, update, gradient, *_ = (found.norm / found.sum[-1].sqrt()).tolist()
            for index, name in enumerate(names):
                # A matrix of zeros has no spacing to compare with; without gradient there is no update to be lost.
                if old[index] != 0 and gradient[index] != 0:
                    quantities["bf16_headroom"][name] = update[index] / bf16_spacing(old[index])
                    quantities["lost_updates"][name] = lost[index] / size[index]
        return quantities

    def _make_limits(self) -> dict[str, Limit]:
        monitor = "WeightRMSMonitor"
        lost = "the fraction of the update that bfloat16 has rounded away"
        room = "the room of the largest weight, in doublings until bfloat16 overflows,"
        least = self.min_doublings_to_overflow
        return {
            "weight_rms": Limit(monitor, "max_weight_rms", self.max_weight_rms, "the weight RMS", advice("weight_rms")),
            "output_rms": Limit(monitor, "max_output_rms", self.max_output_rms, "the output RMS", advice("output_rms")),
            "lost_updates": Limit(monitor, "max_lost_updates", self.max_lost_updates, lost, advice("lost_updates")),
            "doublings_to_overflow": Limit(
                monitor, "min_doublings_to_overflow", least, room, advice("doublings_to_overflow"), is_least=True
            ),
        }
