"""The orthogonality error, against float64 on what was applied."""

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_muon.callbacks import OrthogonalityMonitor
from lightning_muon.callbacks.measures.polar_factors import gram_matrices, orthogonality_error
from lightning_muon.optim import MuonAdamW, route_parameters
from tests.callbacks.watched import watched

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
        for quantity, place in (("singular_value_max", 0), ("singular_value_min", -1)):
            for step, value in scalars[f"{quantity}/{name}"]:
                assert value == pytest.approx(
                    float(torch.linalg.svdvals(applied.factors[step][name])[place]), rel=1e-4, abs=5e-4
                )
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
    assert float(watched(trainer)["orthogonality_error/max"]) < 1e-5


def test_a_name_that_nobody_knows_is_refused(regression: Module, fit: Fit) -> None:
    class Confused(MuonAdamW):
        def step(self, closure: Any = None) -> Any:
            closure()
            for hook in self._orthogonalize_hooks.values():
                hook(["net.0.weight", "net.1.weight"], torch.eye(4).repeat(2, 1, 1))

    with pytest.raises(
        MisconfigurationException, match=r"Confused has handed out net\.1\.weight .* net\.0\.weight, net"
    ):
        fit(regression(Confused), callbacks=[OrthogonalityMonitor()])


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
    assert not module.trainer.optimizers[0]._orthogonalize_hooks
    assert not module.trainer.optimizers[0]._optimizer_step_post_hooks


@pytest.mark.parametrize(("worst", "largest"), [(1e-4, 1.0), (math.nan, math.nan)])
def test_of_several_blocks_the_largest_error_counts(fit: Fit, regression: Module, worst: float, largest: float) -> None:
    """A fused projection is orthogonalized in blocks; here the middle one is nearly zero, or is NaN."""

    class Fused(MuonAdamW):
        def step(self, closure: Any = None) -> Any:
            closure()
            factors = torch.eye(4).repeat(4, 1, 1) * torch.tensor([1.0, worst, 0.9, 1.0]).view(4, 1, 1)
            for hook in self._orthogonalize_hooks.values():
                hook(["net.0.weight"] * 3 + ["net.2.weight"], factors)

    trainer = fit(regression(Fused), callbacks=[OrthogonalityMonitor(per_parameter=True)])
    found = {name: float(value) for name, value in watched(trainer).items() if "orthogonality" in name}
    assert found["orthogonality_error/net.0.weight"] == pytest.approx(largest, nan_ok=True)
    assert found["orthogonality_error/net.2.weight"] == pytest.approx(0.0)
    assert found["orthogonality_error/mean"] == pytest.approx(largest / 2, nan_ok=True)


@pytest.mark.parametrize("options", [{}, {"polar_first": True}], ids=str)
def test_matrices_that_rest_are_left_out(
    options: dict[str, Any], regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """One has no gradient from the third step on, both from the sixth on."""

    class Resting(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for place, first in ((2, 2), (0, 5)):
                if self.global_step >= first:
                    self.net[place].weight.grad.zero_()

    module = Resting(partial(MuonAdamW, orthogonalizer="svd", **options))
    monitor = OrthogonalityMonitor(per_parameter=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="OrthogonalityMonitor")
        trainer = fit(module, callbacks=[monitor], logger=tensorboard)
    scalars = events(trainer).scalars()
    steps = {name: [step for step, _ in scalars[f"orthogonality_error/{name}"]] for name in (*MATRICES, "max")}
    assert steps == {"net.0.weight": [0, 1, 2, 3, 4], "net.2.weight": [0, 1], "max": [0, 1, 2, 3, 4]}
    assert max(value for _, value in scalars["orthogonality_error/max"]) < 1e-5
    assert min(value for _, value in scalars["singular_value_min/min"]) > 0.999


def test_names_that_collide_in_one_optimizer_are_kept(adversaries: Module, fit: Fit) -> None:
    """What the optimizer calls alike cannot be told apart: better its own name than a wrong one."""

    class Joint(adversaries):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.manual_backward(self.generator(batch[0]).mean() + self.critic(batch[0]).mean())
            self.optimizers().step()

        def configure_optimizers(self) -> Any:
            return MuonAdamW(route_parameters(self.generator) + route_parameters(self.critic))

    trainer = fit(Joint(None), callbacks=[OrthogonalityMonitor(per_parameter=True)], limit_train_batches=1)
    names = {name.split("/")[1] for name in watched(trainer) if name.startswith("orthogonality_error")}
    assert names == {"max", "mean", "min", "0.weight", "2.weight"}


def test_two_optimizers_are_one_summary(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Each matrix has the error of its own optimizer's first step in a batch; names of the two collide."""
    errors: defaultdict[str, list[float]] = defaultdict(list)

    def make(groups: list[dict[str, Any]], place: int) -> MuonAdamW:
        def listen(names: list[str], factors: Tensor) -> None:
            for name, factor in zip(names, factors, strict=True):
                errors[f"{('generator', 'critic')[place]}.{name}"].append(error(factor.double()))

        optimizer = MuonAdamW(groups)
        optimizer.register_orthogonalize_hook(listen)
        return optimizer

    module = adversaries(make, lambda _: (1, 3))
    trainer = fit(module, callbacks=[OrthogonalityMonitor(per_parameter=True)], logger=tensorboard)
    scalars = events(trainer).scalars()
    firsts = {name: found[:: 3 if name.startswith("critic") else 1] for name, found in errors.items()}
    assert len(firsts) == 4
    for name, expected in firsts.items():
        assert scalars[f"orthogonality_error/{name}"] == list(enumerate(pytest.approx(e, rel=1e-4) for e in expected))
    for kind, reduce in (("max", max), ("min", min), ("mean", lambda four: sum(four) / 4)):
        summary = [reduce(four) for four in zip(*firsts.values(), strict=True)]
        assert scalars[f"orthogonality_error/{kind}"] == list(enumerate(pytest.approx(e, rel=1e-4) for e in summary))


def test_only_the_first_of_several_steps_is_listened_to(adversaries: Module, fit: Fit) -> None:
    listeners: list[int] = []

    def make(groups: list[dict[str, Any]], place: int) -> MuonAdamW:
        optimizer = MuonAdamW(groups)
        if place == 0:
            optimizer.register_step_post_hook(lambda o, *_: listeners.append(len(o._orthogonalize_hooks)))
        return optimizer

    fit(adversaries(make, lambda _: (3, 1)), callbacks=[OrthogonalityMonitor()], limit_train_batches=2)
    assert listeners == [1, 0, 0, 1, 0, 0]


def test_autocast_does_not_round_the_error() -> None:
    factor = torch.linalg.qr(torch.randn(1, 64, 64)).Q
    with torch.autocast("cpu", torch.bfloat16):
        assert orthogonality_error(gram_matrices(factor)).item() < 1e-5


def test_a_gradient_of_nan_is_named(regression: Module, fit: Fit) -> None:
    class Broken(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 4:
                self.net[2].weight.grad[0, 0] = torch.nan

    with pytest.warns(
        UserWarning, match=r"step 4: orthogonality_error is not finite for net\.2\.weight\. This"
    ) as caught:
        trainer = fit(Broken(MuonAdamW), callbacks=[OrthogonalityMonitor()])
    assert sum("OrthogonalityMonitor" in str(one.message) for one in caught) == 1
    assert watched(trainer)["orthogonality_error/max"].isnan()


def test_a_long_list_of_names_is_cut() -> None:
    monitor = OrthogonalityMonitor()
    values = {f"layer{i}": float("nan") for i in range(7)}
    with pytest.warns(UserWarning, match="for layer0, layer1, layer2, layer3, layer4 and 2 more"):
        monitor.warn_of_not_finite(Trainer(logger=False, accelerator="cpu"), "error", values)
