"""Weight RMS, largest entry and bf16 headroom, against float64 on the weights themselves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_muon.callbacks import WeightRMSMonitor
from lightning_muon.callbacks.weight_rms import bf16_spacing
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

MATRICES = ("net.0.weight", "net.2.weight")


class Snapshots(Callback):
    """The Muon matrices after each optimizer step, in float64."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step > len(self.weights) - 1:
            self.weights.append({name: pl_module.get_parameter(name).detach().double().clone() for name in MATRICES})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_batch_end(trainer, pl_module)


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, accumulate: int) -> None:
    snapshots = Snapshots()
    monitor = WeightRMSMonitor(every_n_steps=2, per_parameter=True)
    module = regression(partial(MuonAdamW, lr=0.02))
    trainer = fit(module, callbacks=[snapshots, monitor], logger=tensorboard, accumulate_grad_batches=accumulate)
    scalars = events(trainer).scalars()

    measured_steps = [step for step in range(10 // accumulate) if (step + 1) % 2 == 0]
    for name in MATRICES:
        assert [step for step, _ in scalars[f"weight_rms/{name}"]] == measured_steps
        for (step, value), (_, largest), (_, headroom) in zip(
            *(scalars[f"{quantity}/{name}"] for quantity in ("weight_rms", "weight_absmax", "bf16_headroom")),
            strict=True,
        ):
            old, new = snapshots.weights[step][name], snapshots.weights[step + 1][name]
            assert value == pytest.approx(rms(new), rel=1e-5)
            assert largest == pytest.approx(float(new.abs().max()), rel=1e-5)
            spacing = 2.0 ** (torch.tensor(rms(old)).log2().floor().item() - 7)
            assert headroom == pytest.approx(rms(new - old) / spacing, rel=1e-3)
    for quantity in ("weight_rms", "weight_absmax", "bf16_headroom"):
        values = [[value for _, value in scalars[f"{quantity}/{name}"]] for name in MATRICES]
        for kind, reduce in (("max", max), ("min", min), ("mean", lambda pair: sum(pair) / 2)):
            expected = [reduce(pair) for pair in zip(*values, strict=True)]
            assert [value for _, value in scalars[f"{quantity}/{kind}"]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [1.0, 1.5, 1.9921875, 0.05, 3e-5, 700.0])
def test_bf16_spacing_is_the_distance_to_the_next_number(value: float) -> None:
    number = torch.tensor([value]).bfloat16()
    following = (number.view(torch.int16) + 1).view(torch.bfloat16)
    assert bf16_spacing(number.float()) == following.float() - number.float()


def test_in_bf16_lost_updates_show_as_no_headroom(regression: Module, fit: Fit) -> None:
    """Weights of size one in bfloat16 do not move by 1e-4 at all; in float32 they do, by a fraction of the spacing."""
    headroom = {}
    for precision in ("bf16-true", "32-true"):
        module = regression(partial(MuonAdamW, lr=5e-4, weight_decay=0.0))
        for name in MATRICES:
            torch.nn.init.ones_(module.get_parameter(name))
        trainer = fit(module, precision=precision, callbacks=[WeightRMSMonitor()])
        headroom[precision] = float(trainer.callback_metrics["bf16_headroom/max"])
    assert headroom["bf16-true"] == 0.0
    assert 0.0 < headroom["32-true"] < 0.5


def test_the_sample_is_bounded_and_the_rest_is_still_measured(regression: Module, fit: Fit) -> None:
    monitor = WeightRMSMonitor(sample=1, per_parameter=True)
    trainer = fit(regression(MuonAdamW), callbacks=[monitor])
    names = [name for name in trainer.callback_metrics if name.startswith("bf16_headroom/net")]
    assert len(names) == 1
    assert {f"weight_rms/{name}" for name in MATRICES} <= set(trainer.callback_metrics)
    assert not monitor._before


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1)])
def test_other_optimizers_are_measured_on_the_same_matrices(regression: Module, fit: Fit, make: Any) -> None:
    trainer = fit(regression(make), callbacks=[WeightRMSMonitor(per_parameter=True)])
    assert {f"weight_rms/{name}" for name in MATRICES} <= set(trainer.callback_metrics)


def test_torch_muon_under_manual_optimization(regression: Module, fit: Fit) -> None:
    class Manual(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            matrices = [self.get_parameter(name) for name in MATRICES]
            rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
            return [torch.optim.Muon(matrices), torch.optim.AdamW(rest)]

    trainer = fit(Manual(None), callbacks=[WeightRMSMonitor(per_parameter=True)])
    measured = {name for name in trainer.callback_metrics if name.startswith("weight_rms/net")}
    assert measured == {f"weight_rms/{name}" for name in MATRICES}


def test_any_logger_or_none(regression: Module, fit: Fit, tmp_path: Any, tensorboard: TensorBoardLogger) -> None:
    csv = CSVLogger(tmp_path)
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor()], logger=[csv, tensorboard])
    assert any("weight_rms/max" in row for row in csv.experiment.metrics) or "weight_rms/max" in (
        (tmp_path / csv.name / "version_0" / "metrics.csv").read_text()
    )
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor()], fast_dev_run=True)
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor()], logger=False)


@pytest.mark.parametrize(("argument", "value"), [("every_n_steps", 0), ("sample", 0)])
def test_bad_arguments_are_named(argument: str, value: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"WeightRMSMonitor: {argument} must be at least 1, got 0"):
        WeightRMSMonitor(**{argument: value})
