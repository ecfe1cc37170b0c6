"""The orthogonality error, against float64 on what was applied."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import OrthogonalityMonitor
from lightning_muon.callbacks.orthogonality import orthogonality_error
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

MATRICES = ("net.0.weight", "net.2.weight")
LR = 0.02


class AppliedFactors(Callback):
    """The polar factors by what they did: (W − W') / lr, with no decay and no scale."""

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}
        self.factors: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.before = {name: pl_module.get_parameter(name).detach().clone() for name in MATRICES}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        after = {name: pl_module.get_parameter(name).detach() for name in MATRICES}
        self.factors.append({name: (self.before[name] - after[name]).double() / LR for name in MATRICES})


def error(factor: Tensor) -> float:
    squares = torch.linalg.svdvals(factor).square()
    return float((squares - 1).square().mean().sqrt())


def test_values(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    applied = AppliedFactors()
    module = regression(partial(MuonAdamW, lr=LR, weight_decay=0.0, update_scale="none"))
    monitor = OrthogonalityMonitor(every_n_steps=3, per_parameter=True)
    trainer = fit(module, precision="64-true", callbacks=[applied, monitor], logger=tensorboard)
    scalars = events(trainer).scalars()
    for name in MATRICES:
        logged = scalars[f"orthogonality_error/{name}"]
        assert [step for step, _ in logged] == [2, 5, 8]
        for step, value in logged:
            assert value == pytest.approx(error(applied.factors[step][name]), rel=1e-4)
    for step, value in scalars["orthogonality_error/max"]:
        assert value == pytest.approx(max(error(factor) for factor in applied.factors[step].values()), rel=1e-4)


def test_off_its_cadence_it_asks_for_nothing(regression: Module, fit: Fit) -> None:
    listeners: list[int] = []

    def configure(groups: list[dict[str, Any]]) -> MuonAdamW:
        optimizer = MuonAdamW(groups)
        optimizer.register_step_post_hook(lambda o, *_: listeners.append(len(o._orthogonalize_hooks)))
        return optimizer

    fit(regression(configure), callbacks=[OrthogonalityMonitor(every_n_steps=4)])
    assert listeners == [0, 0, 0, 1, 0, 0, 0, 1, 0, 0]


def test_the_exact_factor_has_no_error(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(partial(MuonAdamW, orthogonalizer="svd")), callbacks=[OrthogonalityMonitor()])
    assert float(trainer.callback_metrics["orthogonality_error/max"]) < 1e-5


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (2, 1, 7), (1, 4, 4)])
def test_error_of_a_batch(shape: tuple[int, ...]) -> None:
    batch = torch.randn(shape)
    expected = torch.tensor([error(matrix.double()) for matrix in batch], dtype=torch.float32)
    torch.testing.assert_close(orthogonality_error(batch), expected, rtol=1e-4, atol=1e-5)


def test_an_optimizer_that_hands_nothing_out_is_told(regression: Module, fit: Fit) -> None:
    with pytest.warns(UserWarning, match="OrthogonalityMonitor: AdamW does not hand out what it orthogonalizes"):
        trainer = fit(regression(torch.optim.AdamW), callbacks=[OrthogonalityMonitor()])
    assert not any(name.startswith("orthogonality_error") for name in trainer.callback_metrics)


def test_an_interrupted_step_leaves_no_listener(regression: Module, fit: Fit) -> None:
    class Interrupted(regression):  # type: ignore[valid-type,misc]
        def on_train_batch_end(self, *_: Any) -> None:
            raise RuntimeError("stop")

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            raise RuntimeError("stop")

    module = Interrupted(MuonAdamW)
    monitor = OrthogonalityMonitor()
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, callbacks=[monitor])
    assert not monitor._handles
