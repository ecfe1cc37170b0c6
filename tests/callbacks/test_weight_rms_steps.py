"""Which steps WeightRMSMonitor measures: of several optimizers, skipped, interrupted, unseen."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

from lightning_muon.callbacks import (
    OrthogonalityMonitor,
    WeightRMSMonitor,
)
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]
QUANTITIES = ("weight_rms", "weight_absmax", "bf16_headroom", "lost_updates", "doublings_to_overflow")
MATRICES = ("net.0.weight", "net.2.weight")
HIDDEN = [f"{part}.{layer}.weight" for part in ("generator", "critic") for layer in (0, 2)]


def measured_in(trainer: Trainer, quantity: str) -> set[str]:
    """The matrices whose value of a quantity was logged."""
    names = (name.removeprefix(f"{quantity}/") for name in watched(trainer) if name.startswith(f"{quantity}/"))
    return {name for name in names if name not in {"max", "mean", "min"}}


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def test_two_optimizers_are_one_summary(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Relative names collide; each step is logged once, over all matrices, under the names of the whole module."""
    module = adversaries(lambda groups, _: MuonAdamW(groups, lr=0.02))
    trainer = fit(module, callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)], logger=tensorboard)
    scalars = events(trainer).scalars()
    for quantity in QUANTITIES:
        assert measured_in(trainer, quantity) == set(HIDDEN)
        assert [step for step, _ in scalars[f"{quantity}/max"]] == list(range(10))
        last = [scalars[f"{quantity}/{name}"][-1][1] for name in HIDDEN]
        assert scalars[f"{quantity}/max"][-1][1] == pytest.approx(max(last))
        assert scalars[f"{quantity}/mean"][-1][1] == pytest.approx(sum(last) / 4)
    for name in HIDDEN:
        final = rms(module.get_parameter(name).detach().double())
        assert scalars[f"weight_rms/{name}"][-1][1] == pytest.approx(final, rel=1e-5)


def test_of_several_steps_in_a_batch_one_is_measured(adversaries: Module, fit: Fit) -> None:
    """The headroom is that of the first of three steps, not of their sum."""
    steps: list[dict[str, Tensor]] = []
    module = adversaries(lambda groups, _: MuonAdamW(groups, lr=0.02), lambda _: (3, 0))

    class Weights(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.keep()
            trainer.optimizers[0].register_step_post_hook(self.keep)

        def keep(self, *_: Any) -> None:
            steps.append({name: module.get_parameter(name).detach().double().clone() for name in HIDDEN[:2]})

    monitor = WeightRMSMonitor(per_parameter=True, as_if_bf16=True)
    trainer = fit(module, callbacks=[Weights(), monitor], limit_train_batches=1)
    assert measured_in(trainer, "bf16_headroom") == set(HIDDEN[:2])
    for name in HIDDEN[:2]:
        spacing = 2.0 ** (torch.tensor(rms(steps[0][name])).log2().floor().item() - 7)
        expected = rms(steps[1][name] - steps[0][name]) / spacing
        assert float(watched(trainer)[f"bf16_headroom/{name}"]) == pytest.approx(expected, rel=1e-3)


def test_optimizers_that_take_turns_are_both_measured(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Due at every second batch, the one that does not step then is measured at its next step."""
    module = adversaries(lambda groups, _: MuonAdamW(groups), lambda batch: (batch % 2 == 0, batch % 2))
    trainer = fit(module, callbacks=[WeightRMSMonitor(2, per_parameter=True, as_if_bf16=True)], logger=tensorboard)
    scalars = events(trainer).scalars()
    assert [step for step, _ in scalars["bf16_headroom/critic.0.weight"]] == [1, 3, 5, 7, 9]
    assert [step for step, _ in scalars["bf16_headroom/generator.0.weight"]] == [2, 4, 6, 8]


def test_accumulation_by_hand_is_measured_at_its_steps(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    module = adversaries(lambda groups, _: MuonAdamW(groups), lambda batch: (batch % 3 == 2, 0))
    trainer = fit(module, callbacks=[WeightRMSMonitor(2, as_if_bf16=True)], logger=tensorboard)
    assert [step for step, _ in events(trainer).scalars()["weight_rms/max"]] == [2, 5, 8]


def test_steps_of_an_optimizer_without_muon_are_not_measured(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    def make(groups: list[dict[str, Any]], place: int) -> torch.optim.Optimizer:
        return MuonAdamW(groups) if place == 0 else torch.optim.SGD([p for group in groups for p in group["params"]])

    module = adversaries(make, lambda batch: (batch % 3 == 2, 1))
    trainer = fit(module, callbacks=[WeightRMSMonitor(as_if_bf16=True)], logger=tensorboard)
    assert [step for step, _ in events(trainer).scalars()["weight_rms/max"]] == [2, 5, 8]


def test_a_skipped_step_is_not_measured(
    overflowing: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """A gradient scaler skips the second step; the optimizer stays due for the third."""

    monitors = [WeightRMSMonitor(2, as_if_bf16=True), OrthogonalityMonitor(2)]
    trainer = fit(overflowing(MuonAdamW), plugins=[scaled()], callbacks=monitors, logger=tensorboard)
    scalars = events(trainer).scalars()
    for tag in ("bf16_headroom/min", "orthogonality_error/max"):
        assert [step for step, _ in scalars[tag]] == [2, 3, 5, 7, 9]
    assert all(value > 0 for _, value in scalars["bf16_headroom/min"])


def test_an_interrupted_run_leaves_nothing_for_the_next(regression: Module, adversaries: Module, fit: Fit) -> None:
    class Interrupted(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

    monitors = [WeightRMSMonitor(per_parameter=True, as_if_bf16=True), OrthogonalityMonitor(per_parameter=True)]
    with pytest.raises(RuntimeError, match="stop"):
        fit(regression(MuonAdamW), callbacks=[Interrupted(), *monitors])
    trainer = fit(adversaries(lambda groups, _: MuonAdamW(groups)), callbacks=monitors, limit_train_batches=1)
    assert measured_in(trainer, "bf16_headroom") == measured_in(trainer, "orthogonality_error") == set(HIDDEN)


def test_a_parameter_that_comes_later_has_its_name(regression: Module, fit: Fit) -> None:
    class Growing(regression):  # type: ignore[valid-type,misc]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                self.late = nn.Linear(4, 4)
                group = {"params": [self.late.weight], "param_names": ["late.weight"], "algorithm": "muon"}
                self.optimizers(use_pl_optimizer=False).add_param_group(group)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + self.late(batch[1]).square().mean() if hasattr(self, "late") else loss

    trainer = fit(Growing(MuonAdamW), callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)])
    assert measured_in(trainer, "bf16_headroom") == {*MATRICES, "late.weight"}


def test_steps_that_lightning_does_not_see_are_told(regression: Module, fit: Fit) -> None:
    class Unseen(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    with pytest.warns(UserWarning, match="WeightRMSMonitor: in 100 batches no optimizer has stepped") as caught:
        fit(Unseen(MuonAdamW), callbacks=[WeightRMSMonitor(5, as_if_bf16=True)], max_epochs=30)
    assert sum("100 batches" in str(one.message) for one in caught) == 1
