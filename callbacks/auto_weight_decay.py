"""Weight decay that is turned on when the weights grow too large, or computed to bring them to a target."""

import inspect
import math
from collections.abc import Generator, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_muon.callbacks.arguments import is_number, is_whole
from lightning_muon.callbacks.decay.controls import DecayControl, MatrixSet, MatrixSize, TargetControl, ThresholdControl
from lightning_muon.callbacks.decay.decay_swap import DecaySwap
from lightning_muon.callbacks.decay.target_decay import Aim, planned_lr
from lightning_muon.callbacks.logging import log_message, log_scalars, logged_step
from lightning_muon.callbacks.matrices import LabelledGroup, frozen_names, muon_groups, muon_matrices
from lightning_muon.callbacks.measures.weight_steps import UpdateSample, is_decoupled
from lightning_muon.callbacks.monitor import StepMonitor
from lightning_muon.callbacks.sampling import spread_evenly
from lightning_muon.callbacks.shards import entry_norms, find_shards, names_with_gradient, over_ranks
from lightning_muon.optim.update.state import HALF
from lightning_muon.report.plain_text import printable

# Lightning's default, for a trainer with log_every_n_steps=0.
STEPS_WITHOUT_LOG = 50

# Matrices of a group that are copied for the target "bf16": more than other monitors copy, because it depends on them.
SAMPLE = 8

# Arguments of only one of the two modes.
THRESHOLD_ARGUMENTS: tuple[str, ...] = ("limit", "weight_decay", "release")
TARGET_ARGUMENTS: tuple[str, ...] = ("per", "bounds")


class AutoWeightDecay(StepMonitor):
    r"""Give Muon's groups the weight decay that keeps their weights at a good size.

    **With a limit** (default) the decay is a constant that is turned on and off. When the largest RMS among the Muon
    matrices of all optimizers, smoothed, passes ``limit``, or grows so fast that it will within ``horizon`` steps, the
    decay of all Muon groups goes up to ``weight_decay`` by a linear ramp. When it is below ``release · limit``, and not
    about to pass the limit again, the decay goes back. With Moonlight's scale an update has an RMS of 0.2, so a decay
    of λ holds a weight's RMS below 0.2 / λ, however the updates add up.

    **With a target** the decay is computed. A step :math:`W' = (1 - ηλ) W - ηU` with learning rate η and decay λ
    changes the norm by :math:`\ln\|W'\| - \ln\|W\| = \ln(1 - ηλ) + \ln(\|W - ηU/(1 - ηλ)\| / \|W\|)`. So the norms at
    two measurements, and the decays between them, give the growth by the updates alone, :math:`G`. The decay

    .. math:: λ = G / \sum η + \ln(R / R^*) / (η \cdot \mathrm{horizon})

    holds the RMS :math:`R` by its first term, and brings it to the target :math:`R^*` by its second. Below the target
    the first term is multiplied by :math:`R / R^*`, because the same updates matter less to larger weights. From the
    second measurement on, the decay goes from each group's own to λ by a linear ramp.

    A group has the other decay only during steps: a schedule or a checkpoint sees its own, and may change it. Matrices
    without a gradient do not count. A measurement computes the norm of every Muon matrix. State and decision are saved
    in checkpoints.

    - ``weight_decay/<group>``: the decay of the last step, the mean over the group's matrices, at every measurement.
    - ``weight_decay/decisions``: each decision with its reason, as a text, and on the console.

    Args:
        target_rms: The target, or ``"bf16"``: the RMS at which the typical update at the full learning rate is as large
            as the spacing of bfloat16 numbers, 2⁷ · lr · rms(U). Default: use ``limit``.
        limit: The RMS that no matrix should pass.
        weight_decay: The decay that is turned on. A group whose own decay is larger keeps it.
        horizon: With a limit, the steps over which the growth is extrapolated; 0 waits until the limit is passed. With
            a target, the steps in which the distance to it falls to 1/e.
        ramp_steps: Length of the ramp, in logged steps, as ``horizon``. Under manual optimization these are batches.
        release: Fraction of ``limit`` below which the decay is turned off again.
        smoothing: Weight of the past in the moving averages of the RMS and of its growth.
        per: With a target, one decay and one RMS for each ``"group"``, or for each ``"matrix"``.
        bounds: With a target, the smallest and the largest decay.
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.

    Raises:
        MisconfigurationException: If an argument is wrong, or has no effect in the mode; at the start of training, if
            the trainer has two of these, or a Muon group has no ``weight_decay``. With a target, if there is no Muon
            group, a group has ``fixed_norm``, a decay is not decoupled as AdamW's is, or ``per="matrix"`` is used with
            weights in half precision.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import AutoWeightDecay
        >>> trainer = Trainer(callbacks=[AutoWeightDecay(target_rms=0.2)])
    """

    def __init__(
        self,
        target_rms: float | Literal["bf16"] | None = None,
        limit: float = 1.0,
        weight_decay: float = 0.5,
        horizon: int = 200,
        ramp_steps: int = 100,
        release: float = 0.8,
        smoothing: float = 0.8,
        per: Literal["group", "matrix"] = "group",
        bounds: tuple[float, float] = (0.0, 1.0),
        every_n_steps: int | None = None,
    ) -> None:
        super().__init__(every_n_steps)
        is_target = target_rms is None or target_rms == "bf16" or _is_positive(target_rms)
        for name, value, fits, demand in (
            ("target_rms", target_rms, is_target, "a positive number, 'bf16', or null for the limit"),
            ("limit", limit, _is_positive(limit), "positive and finite"),
            ("weight_decay", weight_decay, _is_positive(weight_decay), "positive and finite"),
            ("horizon", horizon, is_whole(horizon) and horizon >= 0, "at least 0, a whole number"),
            ("ramp_steps", ramp_steps, is_whole(ramp_steps) and ramp_steps >= 1, "at least 1, a whole number"),
            ("release", release, is_number(release) and 0 < release < 1, "between 0 and 1"),
            ("smoothing", smoothing, is_number(smoothing) and 0 <= smoothing < 1, "at least 0 and below 1"),
            ("per", per, per in ("group", "matrix"), "'group' or 'matrix'"),
            ("bounds", bounds, _are_bounds(bounds), "two finite numbers, the first at least 0 and below the second"),
        ):
            if not fits:
                raise MisconfigurationException(f"AutoWeightDecay: {name} must be {demand}, got {value!r}")
        self.target_rms = target_rms
        self.limit = limit
        self.weight_decay = weight_decay
        self.horizon = horizon
        self.ramp_steps = ramp_steps
        self.release = release
        self.smoothing = smoothing
        self.per = per
        self.bounds = (bounds[0], bounds[1])
        self._refuse_arguments_without_effect()

        self._control = self._make_control()
        self._swap = DecaySwap(self._choose_decays, self._record_step)
        self._taken: dict[str, tuple[float | Tensor, float]] = {}  # learning rate and decay of the last step, by group
        self._curve: dict[str, float] = {}  # what the last step logs, by tag
        self._still: set[str] = set()  # matrices without a gradient, which neither move nor decay

    @property
    def active(self) -> bool:
        """Whether the decay is turned on, or a target is being approached."""
        return self._control.ramp.active

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            target_rms=self.target_rms, per=self.per, limit=self.limit, weight_decay=self.weight_decay
        )

    @override
    def cadence(self, trainer: Trainer) -> int:
        # The weights are to be held even if the trainer logs nothing.
        return super().cadence(trainer) or STEPS_WITHOUT_LOG

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # before the state in a checkpoint is restored
            self._control = self._make_control()
            self._still.clear()
            self._curve.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        has_none = not frozen_names(pl_module) and not any(map(self.watches, trainer.optimizers))
        if self.target_rms is not None and has_none:
            raise MisconfigurationException(
                "AutoWeightDecay: no parameter group has algorithm='muon', so target_rms has nothing to steer."
                " Make the groups with route_parameters(module), or remove the callback."
            )
        super().on_train_start(trainer, pl_module)
        matrices = muon_matrices(trainer.optimizers, self._names)
        self._control.rename({one.label: one.earlier_label for one in muon_groups(trainer.optimizers)})
        for label, optimizer, _, group in muon_groups(trainer.optimizers):
            if "weight_decay" not in group:
                raise MisconfigurationException(
                    f"AutoWeightDecay: {type(optimizer).__name__} has no weight_decay in its group {label!r}."
                    " Take an optimizer that decays weights, or remove the callback."
                )
            if self.target_rms is not None and group.get("fixed_norm") is not None:
                raise MisconfigurationException(
                    f"AutoWeightDecay: the group {label!r} has fixed_norm, so no decay changes the size of its weights."
                    " Remove target_rms or fixed_norm."
                )
            if self.target_rms is not None and not is_decoupled(optimizer, group):
                raise MisconfigurationException(
                    f"AutoWeightDecay: target_rms needs a decoupled decay, but {type(optimizer).__name__} adds that"
                    f" of its group {label!r} to the gradient. Take AdamW, torch.optim.Muon or MuonAdamW, or use limit."
                )
        half = next((name for name, matrix in matrices.items() if matrix.dtype in HALF), None)
        if self.per == "matrix" and half is not None:
            raise MisconfigurationException(
                f"AutoWeightDecay: per='matrix' needs weights in float32, since the decay of one step would be rounded"
                f" away in {str(matrices[half].dtype).removeprefix('torch.')}, which {half} has."
                " Take per='group', or train with precision bf16-mixed."
            )
        self._swap.attach(trainer.optimizers)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._control.ramp.advance(logged_step(trainer), self.ramp_steps)

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """Find the matrices that move; if the target depends on the size of updates, measure some of these."""
        trainer = pl_module.trainer
        matrices = muon_matrices([optimizer], self._names)
        names = names_with_gradient(trainer, matrices)
        self._still = (self._still - matrices.keys()) | (matrices.keys() - set(names))
        if self.target_rms != "bf16":
            yield
            return
        chosen: dict[str, list[Tensor]] = {}
        for labelled in self._swap.groups_of(optimizer):
            members = dict(labelled.named_parameters(self._names))
            chosen[labelled.label] = [members[n] for n in spread_evenly([n for n in names if n in members], SAMPLE)]
        sample = UpdateSample(trainer, chosen)
        yield
        sample.finish({label: self._taken[label] for label in chosen})
        self._measured.append(sample)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        # After the callbacks that measure the step itself, and before the weights are measured here.
        self._swap.catch_up()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule, measured: list[UpdateSample]) -> None:
        matrices = muon_matrices(trainer.optimizers, self._names)
        shards = find_shards(trainer, list(matrices.values()))
        # The same on all ranks, so that all decide alike.
        found = over_ranks(trainer, shards, [entry_norms(shard.local for shard in shards)])
        present = {
            name: MatrixSize(norm, entries)
            for name, norm, entries in zip(matrices, found.norm[0].tolist(), found.entries.tolist(), strict=True)
            if entries > 0 and name not in self._still
        }
        norms = {name: size.norm for name, size in present.items()}
        self.warn_of_not_finite(trainer, "the weight RMS", norms, so="; nothing can be said about these")
        if isinstance(self._control, TargetControl):
            for sample in measured:
                for label, update_rms in sample.rms():
                    self._control.saw_update(label, update_rms)
        finite = {name: size for name, size in present.items() if math.isfinite(size.norm)}
        sets: dict[str, MatrixSet] = {}
        for labelled in muon_groups(trainer.optimizers):
            lrs = float(labelled.group["lr"]), planned_lr(labelled.group)
            for name in self._sets_of(labelled):
                members = self._matrices_of(labelled) if self.per == "group" else [name]
                sets[name] = MatrixSet(labelled.label, *lrs, members)
        if decision := self._control.judge(logged_step(trainer), finite, sets):
            message = f"AutoWeightDecay, step {logged_step(trainer)}: {decision}"
            rank_zero_info(printable(message))
            log_message(trainer, "weight_decay/decisions", message)
        log_scalars(trainer, self._curve)

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._control.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._control.load_state_dict(state_dict)

    def _refuse_arguments_without_effect(self) -> None:
        if self.target_rms is None:
            other, mode, found = TARGET_ARGUMENTS, "a target", "without target_rms"
        else:
            other, mode, found = THRESHOLD_ARGUMENTS, "the limit", f"with target_rms={self.target_rms!r}"
        defaults = inspect.signature(AutoWeightDecay).parameters
        if idle := [name for name in other if getattr(self, name) != defaults[name].default]:
            raise MisconfigurationException(
                f"AutoWeightDecay: {' and '.join(idle)} has no effect {found}: {', '.join(other)} belong to the mode"
                f" with {mode}. Set target_rms to steer to it, or leave it out to turn a constant decay on at a limit."
            )

    def _make_control(self) -> DecayControl:
        if self.target_rms is None:
            return ThresholdControl(
                self.limit, self.weight_decay, self.horizon, self.ramp_steps, self.release, self.smoothing
            )
        target = None if isinstance(self.target_rms, str) else float(self.target_rms)
        return TargetControl(target, Aim(self.horizon, self.smoothing, self.bounds), self.ramp_steps)

    def _matrices_of(self, labelled: LabelledGroup) -> list[str]:
        return [name for name, _ in labelled.named_parameters(self._names)]

    def _sets_of(self, labelled: LabelledGroup) -> list[str]:
        """Return the names of a group's sets of matrices with one decay: its own, or those of its matrices."""
        return [labelled.label] if self.per == "group" else self._matrices_of(labelled)

    def _choose_decays(self, labelled: LabelledGroup) -> list[float]:
        return [self._control.decay(name, labelled.group["weight_decay"]) for name in self._sets_of(labelled)]

    def _record_step(self, labelled: LabelledGroup, taken: float, decays: Sequence[float]) -> None:
        lr = labelled.group["lr"]
        self._taken[labelled.label] = lr, taken
        self._curve[f"weight_decay/{labelled.label}"] = sum(decays) / len(decays)
        for name, decay in zip(self._sets_of(labelled), decays, strict=True):
            self._control.took(name, lr, decay)

    @override
    def _close(self) -> None:
        super()._close()
        self._swap.close()


def _is_positive(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf


def _are_bounds(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(map(is_number, value)) and 0 <= value[0] < value[1] < math.inf
