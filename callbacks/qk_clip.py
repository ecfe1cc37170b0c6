"""QK-clip: attention logits that are too large, brought back by the weights of queries and keys."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import check_whole, is_number, some
from lightning_muon.callbacks.attention.calls import SUPPORTED, AttentionCall, AttentionCalls
from lightning_muon.callbacks.attention.logits import largest_logits
from lightning_muon.callbacks.attention.maxima import HeadMaxima
from lightning_muon.callbacks.attention.projections import HeadWeights, NotClippable, Projections
from lightning_muon.callbacks.logging import log_scalars, logged_step, warn
from lightning_muon.callbacks.matrices import labelled_groups
from lightning_muon.callbacks.measures.output_rms import named_layers
from lightning_muon.callbacks.monitor import StepMonitor


class QKClip(StepMonitor):
    r"""Rescale the queries and keys of heads whose largest attention logit is over a limit, after the step.

    With the largest logit :math:`S` of a head over the step's batch, and :math:`\gamma = \min(1, \tau / S)`, the rows
    of the head in the weights of queries and of keys, and in their biases, are multiplied by :math:`\sqrt\gamma` each
    (QK-Clip, Kimi K2, 2025, arXiv:2507.20534, section 2.1 and algorithm 1). Logits stay near the limit, and other heads
    as they are. Where heads share a key, as with grouped queries, the key stays, because a change of it would reach all
    heads of the group, and the query takes the whole :math:`\gamma`, as K2 does with the rotary keys that its heads
    share.

    The weights are found by what they do: queries must be a block of the outputs of a layer of their attention, but for
    a rotation and a constant. Layers are looked for by the usual names (``q_proj`` and ``k_proj``, ``query`` and
    ``key``, ``qkv``, ``c_attn`` and others) and in ``nn.MultiheadAttention``. **A model with QK-norm cannot be clipped
    by these weights**, and does not need it: the norm bounds its logits. If no attention can be clipped the first step
    is an error that says why; if some cannot, a warning names them.

    Attention is seen as by :class:`AttentionLogitMonitor`. The logits of each measured step are computed once more,
    without waiting for the device; on several ranks one all-reduce takes the maximum. A logit that is not finite is
    left to :class:`RunGuard`. Weights may be whole or sharded by FSDP2, not by FSDP1.

    - ``clipped_heads``: how many heads were clipped since the last log, every ``log_every_n_steps`` of the trainer.

    Args:
        max_logit: The limit :math:`\tau`; 100 in Kimi K2.
        every_n_steps: How often to measure and clip; 1 in Kimi K2.
        queries: How many queries of each head to take at most, from at most four sequences of a batch; null: all.
        projections: Names inside of an attention, of the layer of queries and that of keys, such as ``[wq, wk]``, or of
            the one layer of both, such as ``[qkv]``. Default: the usual ones.

    Raises:
        MisconfigurationException: If an argument is wrong, or the trainer has two of these; in the first step, if no
            attention can be clipped.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import AttentionLogitMonitor, QKClip
        >>> trainer = Trainer(callbacks=[AttentionLogitMonitor(), QKClip(max_logit=100.0)])
    """

    nothing_to_watch = "no optimizer has parameters, so there is nothing to clip."

    def __init__(
        self,
        max_logit: float = 100.0,
        every_n_steps: int = 1,
        queries: int | None = None,
        projections: Sequence[str] = (),
    ) -> None:
        check_whole("QKClip", every_n_steps=every_n_steps)
        super().__init__(every_n_steps)
        check_whole("QKClip", optional=True, queries=queries)
        if not (is_number(max_logit) and 0 < max_logit < math.inf):
            raise MisconfigurationException(f"QKClip: max_logit must be over 0 and finite, got {max_logit!r}")
        names = isinstance(projections, (list, tuple)) and all(isinstance(name, str) for name in projections)
        if not names or len(projections) > 2:
            raise MisconfigurationException(
                f"QKClip: projections must be the names of one or two layers, such as ['wq', 'wk'], got {projections!r}"
            )
        self.max_logit = max_logit
        self.queries = queries
        self.projections = projections
        self._calls: AttentionCalls | None = None
        self._projections = Projections({}, {})
        self._maxima = HeadMaxima()
        self._found: dict[str, HeadWeights | str | None] = {}  # or why not; None while that cannot be told
        self._told: set[str] = set()
        self._clipped: Tensor | None = None  # whether each head was, since the last log
        self._next_log = 0

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return bool(labelled_groups([optimizer]))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._calls = AttentionCalls(pl_module, self._see)
        self._projections = Projections(self._calls.modules, dict(named_layers(pl_module)), self.projections)
        self._maxima = HeadMaxima()
        self._found, self._told, self._clipped = {}, set(), None
        self._next_log = logged_step(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._due and self._calls is not None:
            # Between logs only what attends already: other modules need no hooks.
            looks = self._looks_now(trainer)
            self._calls.start(None if looks else self._maxima.heads)
            if looks:
                self._projections.start()

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[Any]) -> None:
        """Clip the heads."""
        looks = self._looks_now(trainer)
        if looks:
            self._agree(trainer)
        largest = self._maxima.stacked(trainer)
        largest = largest.masked_fill(~largest.isfinite(), -math.inf)
        if trainer.world_size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        is_over = largest > self.max_logit
        factors = torch.where(is_over, self.max_logit / largest, torch.ones_like(largest))
        start = 0
        for name, heads in self._maxima.heads.items():
            weights = self._found[name]
            if isinstance(weights, HeadWeights):
                weights.scale(factors[start : start + heads])
            start += heads
        earlier = self._clipped if self._clipped is not None else torch.zeros_like(is_over)
        self._clipped = is_over | torch.cat([earlier, is_over.new_zeros(len(is_over) - len(earlier))])
        if looks:
            log_scalars(trainer, {"clipped_heads": float(self._clipped.sum())})
            self._clipped = None
            self._next_log = logged_step(trainer) + max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        if self._calls is not None:
            self._calls.stop()
            self._projections.stop()

    def _looks_now(self, trainer: Trainer) -> bool:
        """Return whether to look for attention that is new, and to log: in the first step, and on time."""
        return logged_step(trainer) >= self._next_log

    def _see(self, name: str, module: nn.Module, call: AttentionCall) -> None:
        if self._found.get(name) is None:
            try:
                self._found[name] = self._projections.find(name, module, call)
            except NotClippable as why:
                self._found[name] = str(why)
        if isinstance(self._found[name], HeadWeights):
            self._maxima.add(name, largest_logits(call, self.queries))

    def _agree(self, trainer: Trainer) -> None:
        """Let all ranks clip the same heads, and tell of those that cannot be clipped. A collective."""
        for name, weights in self._found.items():
            if isinstance(weights, HeadWeights) and name not in self._maxima.heads:
                try:
                    weights.check()
                except NotClippable as why:
                    self._found[name] = str(why)
        own = {name: w.heads if isinstance(w, HeadWeights) else w for name, w in self._found.items()}
        of_ranks: list[dict[str, int | str | None]] = [own]
        if trainer.world_size > 1:
            of_ranks = [{} for _ in range(trainer.world_size)]
            dist.all_gather_object(of_ranks, own)
        names = dict.fromkeys(name for of_rank in of_ranks for name in of_rank)
        problems: dict[str, str] = {}
        heads: dict[str, int] = {}
        for name in names:
            found = [of_rank.get(name) for of_rank in of_ranks]
            if said := [one for one in found if isinstance(one, str)]:
                problems[name] = said[0]
            numbers = [one for one in found if isinstance(one, int)]
            if len(numbers) == trainer.world_size:  # known to all
                heads[name] = numbers[0]
        # Those that are known keep their places.
        self._maxima.heads |= {name: number for name, number in heads.items() if name not in self._maxima.heads}
        self._tell(trainer, len(names), problems)

    def _tell(self, trainer: Trainer, seen: int, problems: dict[str, str]) -> None:
        """Warn of attention that cannot be clipped; raise an error if there is no other."""
        compiled = self._calls.compiled if self._calls is not None else ()
        if not seen:
            inside = ", and not inside of what torch.compile has compiled" if compiled else ""
            raise MisconfigurationException(
                f"QKClip: no attention was seen in the first step, so there is nothing to clip. Seen are {SUPPORTED}"
                f"{inside}. Remove QKClip, or let the model attend in one of these ways."
            )
        new = {name: why for name, why in problems.items() if name not in self._told}
        self._told |= new.keys()
        if not new:
            return
        why = next(iter(new.values()))
        said = f"QKClip cannot clip {some(list(new))} by its weights: {why}."
        if len(problems) == seen:
            raise MisconfigurationException(f"{said} Nothing else attends: remove QKClip.")
        warn(trainer, f"{said} Its logits may grow.")
