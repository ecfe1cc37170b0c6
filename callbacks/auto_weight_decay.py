"""Weight decay that comes when the weights need it, and as much as they need."""

import inspect
import math
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_muon.callbacks.arguments import is_number, is_whole
from lightning_muon.callbacks.decay.bf16_target import SAMPLE, UpdateSample, planned_lr
from lightning_muon.callbacks.decay.decay_control import DecayControl, Size, WeightSet
from lightning_muon.callbacks.decay.target_control import TargetControl
from lightning_muon.callbacks.decay.target_decay import Aim
from lightning_muon.callbacks.decay.threshold_decay import ThresholdDecay
from lightning_muon.callbacks.group_labels import LabelledGroup, labelled_groups
from lightning_muon.callbacks.monitor import StepMonitor, log_scalars, log_text, logged_step
from lightning_muon.callbacks.muon_matrices import HALF, entry_norms, is_muon, muon_groups, muon_matrices
from lightning_muon.callbacks.sampled_matrices import spread_evenly
from lightning_muon.callbacks.shards import find_shards, names_with_gradient, over_ranks, sizes
from lightning_muon.callbacks.step_options import is_decoupled

# Lightning's own default, for a trainer with log_every_n_steps=0.
STEPS_WITHOUT_LOG = 50

# What only one of the two modes reads.
OF_THRESHOLD = ("limit", "weight_decay", "release")
OF_TARGET = ("per", "bounds")


class Raised(NamedTuple):
    """A group with another decay than its own, for a step.

    Args:
        label: Its name in the log.
        group: The group.
        own: Its own decay.
        raised: The one that it has meanwhile.
        decays: What each of its sets is to take.
    """

    label: str
    group: dict[str, Any]
    own: float
    raised: float
    decays: list[float]


class AutoWeightDecay(StepMonitor):
    r"""Give Muon's groups the weight decay that keeps their weights at a good size.

    **With** ``target_rms`` the decay is computed. A step :math:`W' = (1 - ηλ) W - ηU` with learning rate η and decay λ
    changes the norm by :math:`\ln\|W'\| - \ln\|W\| = \ln(1 - ηλ) + \ln(\|W - ηU/(1 - ηλ)\| / \|W\|)`. So the norms at
    two measurements and the decays between tell how much the updates alone let it grow, :math:`G`, over all steps
    between, and

    .. math:: λ = G / \sum η + \ln(R / R^*) / (η \cdot \mathrm{horizon})

    holds the RMS :math:`R` by its first term, and brings it to the target :math:`R^*` by its second. Below the target
    the first is taken times :math:`R / R^*`, since the same updates will count less for larger weights. From the second
    measurement on, the decay goes from each group's own to λ by a linear ramp.

    **Without**, the decay is a constant that is turned on and off. When the largest RMS among the Muon matrices of all
    optimizers, smoothed, passes ``limit``, or its growth says that it will within ``horizon`` steps, the decay of all
    Muon groups goes up to ``weight_decay`` by the ramp. When the RMS is back under ``release · limit``, and not about
    to pass the limit again, the decay goes down to what it was. With Moonlight's scale an update has an RMS of 0.2, so
    a decay of λ holds a weight's RMS under 0.2 / λ, however the updates add up.

    ``weight_decay/<group>`` is logged at every measurement, the mean over its matrices. Each decision is told on the
    console with its reason and, in TensorBoard, as a text. State and decision are in the checkpoint. A group has the
    other decay only while its optimizer steps. Everyone else, a schedule or a checkpoint, sees the group's own decay
    and may change it. Matrices without a gradient do not count. With a target the decay must be decoupled, as in AdamW.

    Args:
        target_rms: The RMS to which weights are brought, or ``"bf16"``: that at which the typical update at the full
            learning rate is as large as the spacing of bfloat16 numbers, 2⁷ · lr · rms(U). Default: use ``limit``.
        limit: The RMS that no matrix should pass.
        weight_decay: The decay that is turned on; a group that has more keeps its own.
        horizon: How many steps ahead the growth is extrapolated, and 0 waits until the limit is passed; with a target,
            the steps in which the distance to it falls to 1/e.
        ramp_steps: Steps from no change to the full one; as in ``horizon``, steps are counted as they are logged, which
            under manual optimization are batches.
        release: Fraction of ``limit`` under which the decay is turned off again.
        smoothing: Weight of the past in the moving averages of the RMS and of its growth.
        per: With a target, whether all matrices of a ``"group"`` have one decay and one RMS, or each ``"matrix"``.
        bounds: With a target, the smallest and the largest decay.
        every_n_steps: How often to measure. Default: the trainer's ``log_every_n_steps``.

    Raises:
        MisconfigurationException: If an argument is out of its range, or belongs to the other mode; at the start, if
            a Muon group has no ``weight_decay``; with a target, if there is no Muon group, or one whose decay is not
            decoupled, or weights in half precision are to decay each by itself.

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
        for name, value, fits, demand in (
            ("target_rms", target_rms, _is_target(target_rms), "a positive number, 'bf16', or null for the limit"),
            ("limit", limit, is_number(limit) and limit > 0, "positive"),
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
        self._refuse_what_has_no_effect()

        self._control = self._make_control()
        self._optimizers: list[Optimizer] = []
        self._matrix_names: dict[int, str] = {}  # by id
        self._handles: list[RemovableHandle] = []
        self._raised: list[Raised] = []
        self._taken: dict[str, tuple[float | Tensor, float]] = {}  # by group, learning rate and decay of the last step
        self._curve: dict[str, float] = {}  # by tag, the mean over a group's matrices of what they took in it
        self._behind: dict[Tensor, Any] = {}  # by matrix, the factor that its steps in this batch have left out
        self._samples: list[UpdateSample] = []
        self._still: set[str] = set()  # matrices without a gradient, which neither move nor decay

    @property
    def active(self) -> bool:
        """Whether the decay is turned on, or a target is steered to."""
        return self._control.active

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(
            target_rms=self.target_rms, per=self.per, limit=self.limit, weight_decay=self.weight_decay
        )

    @override
    def cadence(self, trainer: Trainer) -> int:
        # A trainer that logs nothing still wants its weights held.
        return super().cadence(trainer) or STEPS_WITHOUT_LOG

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":  # before the state in a checkpoint is restored
            self._control = self._make_control()
            self._samples.clear()
            self._still.clear()
            self._curve.clear()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.target_rms is not None and not any(map(self.watches, trainer.optimizers)):
            raise MisconfigurationException(
                "AutoWeightDecay: no parameter group has algorithm='muon', so target_rms has nothing to steer."
                " Make the groups with route_parameters(module), or remove the callback."
            )
        super().on_train_start(trainer, pl_module)
        self._optimizers = trainer.optimizers
        matrices = muon_matrices(trainer.optimizers, self._names)
        self._matrix_names = {id(matrix): name for name, matrix in matrices.items()}
        for label, optimizer, _, group in _labelled_muon_groups(trainer.optimizers):
            if "weight_decay" not in group:
                raise MisconfigurationException(
                    f"AutoWeightDecay: {type(optimizer).__name__} has no weight_decay in its group {label!r}."
                    " Take an optimizer that decays weights, or remove the callback."
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
        for optimizer in trainer.optimizers:
            if muon_groups(optimizer):
                self._handles.append(optimizer.register_step_pre_hook(self._raise_decay))
                self._handles.append(optimizer.register_step_post_hook(self._finish_step))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Go along the ramp by the steps that were taken."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        self._control.advance(logged_step(trainer))

    @override
    def around_step(self, pl_module: LightningModule, optimizer: Optimizer) -> Generator[None, None, None]:
        """See which matrices move at all; where the target depends on the size of updates, look at some."""
        trainer = pl_module.trainer
        matrices = muon_matrices([optimizer], self._names)
        names = names_with_gradient(trainer, matrices)
        self._still = (self._still - matrices.keys()) | (matrices.keys() - set(names))
        if self.target_rms != "bf16":
            yield
            return
        chosen: dict[str, list[Tensor]] = {}
        for label, group in self._groups_of(optimizer):
            ids = {id(matrix) for matrix in group["params"]}
            members = spread_evenly([name for name in names if id(matrices[name]) in ids], SAMPLE)
            chosen[label] = [matrices[name] for name in members]
        sample = UpdateSample(trainer, chosen)
        yield
        sample.finish({label: self._taken[label] for label in chosen})
        self._samples.append(sample)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Let each matrix decay as far as it should, after all who look at the step itself, and before measuring."""
        self._catch_up()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    @torch.no_grad()
    def report(self, trainer: Trainer, pl_module: LightningModule) -> None:
        matrices = muon_matrices(trainer.optimizers, self._names)
        self._matrix_names = {id(matrix): name for name, matrix in matrices.items()}
        shards = find_shards(trainer, list(matrices.values()))
        # The same on all ranks, so that all decide alike.
        found = over_ranks(trainer, shards, [entry_norms(shard.local for shard in shards), sizes(shards)])
        measured = {
            name: Size(norm, entries)
            for name, norm, entries in zip(matrices, found.norm[0].tolist(), found.sum[1].tolist(), strict=True)
            if entries > 0 and name not in self._still
        }
        rms = {name: size.rms for name, size in measured.items()}
        self.warn_of_not_finite(trainer, "the weight RMS", rms, so="; nothing can be said about these")
        samples, self._samples = self._samples, []
        if isinstance(self._control, TargetControl):
            for sample in samples:
                for label, update_rms in sample.rms():
                    self._control.saw_update(label, update_rms)
        finite = {name: size for name, size in measured.items() if math.isfinite(size.norm)}
        if decision := self._control.judge(logged_step(trainer), finite, dict(self._weight_sets())):
            message = f"AutoWeightDecay, step {logged_step(trainer)}: {decision}"
            rank_zero_info(message)
            log_text(trainer, "weight_decay/decisions", message)
        log_scalars(trainer, self._curve)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._let_go()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._let_go()

    @override
    def state_dict(self) -> dict[str, Any]:
        return self._control.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._control.load_state_dict(state_dict)

    def _refuse_what_has_no_effect(self) -> None:
        other, mode = (OF_TARGET, "a target") if self.target_rms is None else (OF_THRESHOLD, "the limit")
        defaults = inspect.signature(AutoWeightDecay).parameters
        idle = [name for name in other if getattr(self, name) != defaults[name].default]
        if idle:
            found = "without target_rms" if self.target_rms is None else f"with target_rms={self.target_rms!r}"
            raise MisconfigurationException(
                f"AutoWeightDecay: {' and '.join(idle)} has no effect {found}: {', '.join(other)} belong to the mode"
                f" with {mode}. Set target_rms to steer to it, or leave it out to turn a constant decay on at a limit."
            )

    def _make_control(self) -> DecayControl:
        if self.target_rms is None:
            return ThresholdDecay(
                self.limit, self.weight_decay, self.horizon, self.ramp_steps, self.release, self.smoothing
            )
        target = None if isinstance(self.target_rms, str) else float(self.target_rms)
        return TargetControl(target, Aim(self.horizon, self.smoothing, self.bounds), self.ramp_steps)

    def _groups_of(self, optimizer: Optimizer) -> list[tuple[str, dict[str, Any]]]:
        found = _labelled_muon_groups(self._optimizers)
        return [(label, group) for label, owner, _, group in found if owner is optimizer]

    def _weight_sets(self) -> Iterator[tuple[str, WeightSet]]:
        for label, _, _, group in _labelled_muon_groups(self._optimizers):
            lrs = float(group["lr"]), planned_lr(group)
            names = [self._matrix_names[id(matrix)] for matrix in group["params"] if id(matrix) in self._matrix_names]
            if self.per == "group":
                yield label, WeightSet(label, *lrs, names)
            else:
                yield from ((name, WeightSet(label, *lrs, [name])) for name in names)

    def _set_names(self, label: str, group: dict[str, Any]) -> list[str]:
        """Return the names of a group's sets: its own, or those of its matrices."""
        if self.per == "group":
            return [label]
        return [self._matrix_names.get(id(matrix), "") for matrix in group["params"]]

    def _decays(self, label: str, group: dict[str, Any]) -> list[float]:
        return [self._control.decay(name, group["weight_decay"]) for name in self._set_names(label, group)]

    def _raise_decay(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for label, group in self._groups_of(optimizer):
            if any(raised.group is group for raised in self._raised):  # a step that calls that of its parent
                continue
            decays = self._decays(label, group)
            # The optimizer takes the smallest; what a matrix needs beyond it is done at the end of the batch.
            own, group["weight_decay"] = group["weight_decay"], min(decays)
            self._raised.append(Raised(label, group, own, group["weight_decay"], decays))

    def _finish_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for raised in self._raised:
            group, taken = raised.group, raised.group["weight_decay"]
            lr = group["lr"]
            # Who set another decay during the step meant it for all.
            decays = raised.decays if taken == raised.raised else [taken] * len(raised.decays)
            self._taken[raised.label] = lr, taken
            self._curve[f"weight_decay/{raised.label}"] = sum(decays) / len(decays)
            for name, decay in zip(self._set_names(raised.label, group), decays, strict=True):
                self._control.took(name, lr, decay)
            if self.per == "matrix":
                for matrix, decay in zip(group["params"], decays, strict=True):
                    if decay != taken and matrix.grad is not None:  # without a gradient it took no step
                        factor = (1 - lr * decay) / (1 - lr * taken)
                        self._behind[matrix] = self._behind.get(matrix, 1.0) * factor
        self._lower_decay()

    @torch.no_grad()
    def _catch_up(self) -> None:
        if self._behind:
            local = [m.to_local() if isinstance(m, DTensor) else m for m in self._behind]
            for kind in (float, Tensor):  # a learning rate may be a tensor
                alike = [(m, by) for m, by in zip(local, self._behind.values(), strict=True) if isinstance(by, kind)]
                if alike:
                    matrices, factors = zip(*alike, strict=True)
                    torch._foreach_mul_(list(matrices), list(factors))
            self._behind.clear()

    def _lower_decay(self) -> None:
        while self._raised:
            _, group, own, raised, _ = self._raised.pop()
            if group["weight_decay"] == raised:  # else someone set it during the step
                group["weight_decay"] = own

    def _let_go(self) -> None:
        self._lower_decay()
        self._samples.clear()
        self._behind.clear()
        while self._handles:
            self._handles.pop().remove()


def _labelled_muon_groups(optimizers: Iterable[Optimizer]) -> list[LabelledGroup]:
    return [labelled for labelled in labelled_groups(optimizers) if is_muon(labelled.optimizer, labelled.group)]


def _is_target(value: object) -> bool:
    return value is None or value == "bf16" or _is_positive(value)


def _is_positive(value: object) -> bool:
    return is_number(value) and 0 < value < math.inf


def _are_bounds(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(map(is_number, value)) and 0 <= value[0] < value[1] < math.inf
