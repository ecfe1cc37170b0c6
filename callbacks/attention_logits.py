"""The largest attention logits, and when they will be too large."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import NameChoice, check_whole, some
from lightning_muon.callbacks.attention.calls import SUPPORTED, AttentionCall, AttentionCalls, looks_like_attention
from lightning_muon.callbacks.attention.growth import Growth
from lightning_muon.callbacks.attention.logits import largest_logits
from lightning_muon.callbacks.attention.maxima import HeadMaxima
from lightning_muon.callbacks.limits import Limit, advice
from lightning_muon.callbacks.logging import log_scalars, logged_step, summarize, warn
from lightning_muon.callbacks.matrices import labelled_groups
from lightning_muon.callbacks.measures.output_rms import named_layers
from lightning_muon.callbacks.monitor import StepMonitor

# A step is not told that lies farther ahead than so many times the steps so far: a line is no more than a guess there.
FARTHEST = 10


class AttentionLogitMonitor(StepMonitor):
    r"""Log the largest attention logit of each head, and the step at which its growth will reach a limit.

    The logits are what goes into the softmax, :math:`q \cdot k / \sqrt d` with the scale, the soft-cap and the mask of
    the attention, after rotation and QK-norm. Where they grow into the hundreds the softmax takes one key, gradients
    become large, and the run may diverge. Moonshot AI trained Kimi K2 with at most 100 (Kimi K2, 2025,
    arXiv:2507.20534, section 2.1); see :class:`QKClip` for how.

    - ``attention_logit/…``: the largest logit of a head, as ``max``, ``mean`` and ``min`` over all heads.
    - ``attention_limit_step``: the step at which the first head reaches ``max_logit``, by a straight line through its
      last eight values; nothing where no head grows, and where it is more than ten times as far as the start.

    Measured are modules that call ``torch.nn.functional.scaled_dot_product_attention``, ``nn.MultiheadAttention``, with
    weights or without, and models of transformers with ``attn_implementation`` ``"sdpa"`` or ``"eager"``. In a step
    that is measured, the logits of ``queries`` queries of each head with all keys that they see are computed once more,
    in all its forward passes; other steps cost nothing. A sample's largest logit is at most that of all queries, and
    the sample changes with each measurement. The maximum is over all ranks. Under tensor parallelism the heads are
    those of a rank. Attention inside a module that ``torch.compile`` compiled is not seen: it runs as one compiled
    function. If a model has attention, by the names of its classes, and none is seen, one warning says so.

    Args:
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.
        per_parameter: Log the largest logit of each module too, by its name, and of each head, as ``<name>.head_<i>``:
            of all (true), or of the modules whose names match a pattern.
        queries: How many queries of each head to take at most in a forward pass, from at most four sequences; null:
            all.
        max_logit: Warn once if a logit is larger. Null: never, and no step is told.

    Raises:
        MisconfigurationException: If an argument is wrong, a pattern matches nothing, or the trainer has two of these.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import AttentionLogitMonitor
        >>> trainer = Trainer(callbacks=[AttentionLogitMonitor(every_n_steps=100)])
    """

    nothing_to_watch = "no optimizer has parameters, so there is nothing to measure."

    def __init__(
        self,
        every_n_steps: int | None = None,
        per_parameter: bool | Sequence[str] = False,
        queries: int | None = 64,
        max_logit: float | None = 100.0,
    ) -> None:
        super().__init__(every_n_steps, per_parameter)
        check_whole("AttentionLogitMonitor", optional=True, queries=queries)
        self.queries = queries
        self.max_logit = max_logit
        self._limits = self.make_limits()  # which raises the error of a wrong argument
        self._calls: AttentionCalls | None = None
        self._maxima = HeadMaxima()
        self._growth: Growth | None = None
        self._turn = 0
        self._wanted = False
        self._looked = False

    @override
    def watches(self, optimizer: Optimizer) -> bool:
        return bool(labelled_groups([optimizer]))

    @override
    def choices(self, trainer: Trainer) -> Iterable[str]:
        return dict(named_layers(trainer.lightning_module))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._calls = AttentionCalls(pl_module, self._see)
        self._maxima = HeadMaxima()
        self._growth = None if self.max_logit is None else Growth(self.max_logit)
        self._wanted = self._looked = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._wanted |= self.measures_now(trainer)
        if self._due and self._wanted and self._calls is not None:
            self._calls.start()

    @override
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[Any]) -> None:
        self._wanted = False
        self._turn += 1
        found = self._maxima.read(trainer)
        if not found and not self._looked:
            self._warn_of_what_is_not_reached(trainer, pl_module)
        self._looked = True
        heads = {f"{name}.head_{i}": value for name, values in found.items() for i, value in enumerate(values)}
        heads = {name: value for name, value in heads.items() if value != -math.inf}
        self.warn_of_not_finite(trainer, "the largest attention logit", heads)
        scalars = dict(summarize("attention_logit", heads, NameChoice("", wanted=False)))
        for name in filter(self._chosen.takes, found):
            of_heads = [f"{name}.head_{i}" for i in range(len(found[name]))]
            of_module = [heads[head] for head in of_heads if head in heads]
            scalars[f"attention_logit/{name}"] = math.nan if any(map(math.isnan, of_module)) else max(of_module)
            scalars |= {f"attention_logit/{head}": heads[head] for head in of_heads if head in heads}
        step = logged_step(trainer)
        if self._growth is not None and heads:
            self._growth.add(step, heads)
            reached = self._growth.reached_at()
            if reached is not None and reached[0] - step <= FARTHEST * step:
                scalars["attention_limit_step"] = reached[0]
        log_scalars(trainer, scalars)
        self._limits["attention_logit"].watch(trainer, heads)

    @override
    def make_limits(self) -> dict[str, Limit]:
        what = "the largest attention logit"
        limit = Limit("AttentionLogitMonitor", "max_logit", self.max_logit, what, advice("attention_logit"))
        return {"attention_logit": limit}

    @override
    def _stop_watching(self) -> None:
        super()._stop_watching()
        if self._calls is not None:
            self._calls.stop()

    def _see(self, name: str, module: nn.Module, call: AttentionCall) -> None:
        self._maxima.add(name, largest_logits(call, self.queries, self._turn))

    def _warn_of_what_is_not_reached(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if modules attend, by the names of their classes, and no call was seen."""
        attending = [name for name, layer in named_layers(pl_module) if looks_like_attention(layer)]
        compiled = self._calls.compiled if self._calls is not None else set()
        if inside := [name for name in attending if name in compiled]:
            warn(
                trainer,
                f"AttentionLogitMonitor: torch.compile has made {some(inside)} part of a larger whole, so"
                " attention_logit cannot be measured there. Train some steps without compiling to see it.",
            )
        elif attending:
            warn(
                trainer,
                f"AttentionLogitMonitor: {some(attending)} did not attend in a way that can be seen, so there is no"
                f" attention_logit to log. Seen are {SUPPORTED}.",
            )
