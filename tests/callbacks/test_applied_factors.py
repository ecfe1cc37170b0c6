"""What optimizers without a hook have orthogonalized, against the factors themselves."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.callbacks import AutoWeightDecay, OrthogonalityMonitor
from lightning_muon.optim import MatrixLayout
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

MATRICES = ("net.0.weight", "net.2.weight")


def values_of(factors: Tensor) -> tuple[float, float, float]:
    """The error and the extreme singular values: of several matrices the worst of each."""
    values = torch.linalg.svdvals(factors.double())
    error = (values.square() - 1).square().mean(-1).sqrt()
    return float(error.max()), float(values.min()), float(values.max())


def logged(metrics: Any, name: str) -> tuple[float, ...]:
    tags = ("orthogonality_error", "singular_value_min", "singular_value_max")
    return tuple(float(metrics[f"{tag}/{name}"]) for tag in tags)


def measured(trainer: Trainer) -> set[str]:
    names = {tag.split("/", 1)[1] for tag in watched(trainer) if tag.startswith("orthogonality_error")}
    return names - {"max", "mean", "min"}


def torch_muon(groups: list[dict[str, Any]], **options: Any) -> Optimizer:
    """Torch's Muon on the matrices alone; it takes nothing else."""
    (group,) = (group for group in groups if group["algorithm"] == "muon")
    return torch.optim.Muon([group], **{"lr": 0.02, "weight_decay": 0.1, **options})


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What torch's Muon orthogonalizes, in its order."""
    factors: list[Tensor] = []
    own = torch.optim._muon._zeropower_via_newtonschulz

    def catch(*args: Any) -> Tensor:
        factors.append(own(*args))
        return factors[-1]

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", catch)
    return factors


class Logged(Callback):
    """What was logged at each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.steps.append(dict(watched(trainer)))


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize(("precision", "rel"), [("64-true", 1e-5), ("32-true", 2e-3)])
def test_of_torchs_muon(
    regression: Module, fit: Fit, caught: list[Tensor], adjust: str | None, precision: str, rel: float
) -> None:
    seen = Logged()
    monitor = OrthogonalityMonitor(every_n_steps=1, per_parameter=True)
    make = partial(torch_muon, adjust_lr_fn=adjust)
    fit(regression(make), precision=precision, callbacks=[monitor, seen])
    for step, metrics in enumerate(seen.steps):
        for place, name in enumerate(MATRICES):
            assert logged(metrics, name) == pytest.approx(values_of(caught[2 * step + place]), rel=rel, abs=5e-4)


def test_torchs_muon_knows_no_layout(regression: Module, fit: Fit, caught: list[Tensor]) -> None:
    """A fused projection is one matrix to it, whatever its group says."""

    def fused(groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = torch_muon(groups)
        optimizer.param_groups[0]["layouts"] = [{"blocks": 4}, {"blocks": 2}]
        return optimizer

    monitor = OrthogonalityMonitor(per_parameter=True)
    trainer = fit(regression(fused), precision="64-true", callbacks=[monitor], max_steps=1)
    for name, factor in zip(MATRICES, caught, strict=True):
        assert logged(watched(trainer), name) == pytest.approx(values_of(factor), rel=1e-5, abs=5e-4)


@pytest.mark.parametrize("with_scaler", [False, True])
def test_the_decay_that_was_raised_for_the_step(
    regression: Module, fit: Fit, caught: list[Tensor], scaled: Any, with_scaler: bool
) -> None:
    """With a gradient scaler it is raised only after the gradients are there, and is always lowered before the end."""
    seen = Logged()
    decay = AutoWeightDecay(limit=0.01, weight_decay=20.0, ramp_steps=2, every_n_steps=1)
    monitor = OrthogonalityMonitor(per_parameter=True)
    plugins = [scaled()] if with_scaler else []
    fit(regression(torch_muon), callbacks=[decay, monitor, seen], plugins=plugins)
    assert seen.steps[-1]["weight_decay/matrix"] == 20
    for step, metrics in enumerate(seen.steps):
        for place, name in enumerate(MATRICES):
            assert logged(metrics, name) == pytest.approx(values_of(caught[2 * step + place]), rel=2e-3, abs=5e-4)


class ForeignMuon(Optimizer):
    """Adds its own multiple of known factors to every matrix that has a gradient, whatever the gradient is."""

    def __init__(self, groups: list[dict[str, Any]], lr: float = 0.5, weight_decay: float = 0.1) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.factors: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = torch.enable_grad()(closure)()
        for group in self.param_groups:
            if group["algorithm"] != "muon":
                continue
            for name, p, where in zip(group["param_names"], group["params"], group["layouts"], strict=True):
                if p.grad is None:
                    continue
                generator = torch.Generator().manual_seed(len(name))
                layout = MatrixLayout(**where)
                factors = torch.randn(layout.matrices(p)[0].shape, generator=generator, dtype=torch.float64)
                scale = torch.linspace(0.1, 3.7, len(factors)).view(-1, 1, 1)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * layout.restore([(factors * scale).to(p)], p.shape))
                norms = torch.linalg.matrix_norm(factors, keepdim=True)
                self.factors[name] = factors * min(factors.shape[1:]) ** 0.5 / norms
        return loss


def test_of_others_the_spread(regression: Module, fit: Fit) -> None:
    """In every layout; of several matrices in one parameter the worst."""

    class Layouts(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(ForeignMuon)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.convolution = nn.Conv1d(8, 6, 3, padding=1)
            self.back = nn.ConvTranspose1d(6, 8, 3, padding=1)
            self.head = nn.Linear(4, 4)  # the last layer is not Muon's

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0].unsqueeze(1)
            x = self.attention(x, x, x)[0]
            x = self.back(self.convolution(x.mT)).mT
            return super().training_step([x.squeeze(1), batch[1]], batch_idx)

    monitor = OrthogonalityMonitor(per_parameter=True)
    trainer = fit(Layouts(), precision="64-true", callbacks=[monitor], max_steps=2)
    factors = trainer.optimizers[0].factors
    assert {"attention.in_proj_weight", "convolution.weight", "back.weight", *MATRICES} <= factors.keys()
    assert len(factors["attention.in_proj_weight"]) == 3
    assert measured(trainer) == factors.keys()
    for name, of_one in factors.items():
        assert logged(watched(trainer), name) == pytest.approx(values_of(of_one), rel=1e-4, abs=5e-4), name


def test_stacked_matrices_are_told_apart(fit: Fit, regression: Module) -> None:
    """Experts; one has not moved, and is left out."""

    class Experts(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(None)
            self.experts = nn.Parameter(torch.randn(3, 8, 8) / 3)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([batch[0] @ self.experts.sum(0), batch[1]], batch_idx)

        def configure_optimizers(self) -> Optimizer:
            group = {"params": [self.experts], "algorithm": "muon", "param_names": ["experts"]}
            self.optimizer = ForeignMuon([{**group, "layouts": [{"stacked": True}]}], weight_decay=0.0)
            self.optimizer.register_step_post_hook(self.undo)
            return self.optimizer

        @torch.no_grad()
        def on_before_optimizer_step(self, *_: Any) -> None:
            self.second = self.experts[1].clone()

        @torch.no_grad()
        def undo(self, *_: Any) -> None:
            self.experts[1] = self.second

    monitor = OrthogonalityMonitor(per_parameter=True)
    module = Experts()
    trainer = fit(module, precision="64-true", callbacks=[monitor], max_steps=1)
    expected = values_of(module.optimizer.factors["experts"][[0, 2]])
    assert logged(watched(trainer), "experts") == pytest.approx(expected, rel=1e-4, abs=5e-4)


class TunedAdamW(torch.optim.AdamW):
    """Someone's own."""


class Whitening(Optimizer):
    """Of another library, and not one of Muon's kin."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.1})

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
        return loss


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, TunedAdamW, Whitening])
def test_of_those_that_do_not_orthogonalize_nothing_is_said(regression: Module, fit: Fit, optimizer: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer = fit(regression(optimizer), callbacks=[OrthogonalityMonitor()])
    assert not [warning for warning in said if "Orthogonality" in str(warning.message)]
    assert not any(tag.startswith(("orthogonality", "singular")) for tag in watched(trainer))


def test_half_precision_hides_the_step(regression: Module, fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"half precision rounds away what it did to net\.0\.weight") as said:
        trainer = fit(regression(torch_muon), precision="bf16-true", callbacks=[OrthogonalityMonitor()])
    assert sum("OrthogonalityMonitor" in str(one.message) for one in said) == 1
    assert not measured(trainer)
    assert "orthogonality_error/max" not in watched(trainer)


def test_too_large_ones_are_left_out(regression: Module, fit: Fit) -> None:
    monitor = OrthogonalityMonitor(per_parameter=True, max_elements=8 * 16)
    assert measured(fit(regression(torch_muon), callbacks=[monitor])) == {"net.0.weight"}
    with pytest.warns(UserWarning, match="max_elements=9 elements, so there is no orthogonality_error to log"):
        fit(regression(torch_muon), callbacks=[OrthogonalityMonitor(max_elements=9)])


def test_the_sample_is_spread(regression: Module, fit: Fit) -> None:
    class Deep(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(torch_muon)
            self.net = nn.Sequential(nn.Linear(8, 8), *(nn.Linear(8, 8) for _ in range(8)), nn.Linear(8, 4))

    trainer = fit(Deep(), callbacks=[OrthogonalityMonitor(per_parameter=True, sample=3)])
    assert measured(trainer) == {"net.0.weight", "net.4.weight", "net.8.weight"}


@pytest.mark.parametrize("lr", [0.0, 0.02])
def test_what_did_not_move_is_left_out(regression: Module, fit: Fit, lr: float) -> None:
    """One has no gradient, and does not even decay; one has a gradient of zeros, and only decays."""

    class Frozen(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(partial(torch_muon, lr=lr))
            layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4)]
            self.net = nn.Sequential(*layers)

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.net[0].weight.grad = None
            self.net[2].weight.grad.zero_()

    trainer = fit(Frozen(), callbacks=[OrthogonalityMonitor(per_parameter=True)])
    assert measured(trainer) == ({"net.4.weight"} if lr else set())


def test_a_gradient_of_nan_is_named(regression: Module, fit: Fit) -> None:
    class Broken(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.global_step == 9:
                self.net[2].weight.grad[0, 0] = torch.nan

    with pytest.warns(UserWarning, match=r"step 9: orthogonality_error is not finite for net\.2\.weight\. This"):
        trainer = fit(Broken(torch_muon), callbacks=[OrthogonalityMonitor(per_parameter=True)])
    assert math.isnan(watched(trainer)["singular_value_max/net.2.weight"])
    assert not math.isnan(watched(trainer)["singular_value_max/net.0.weight"])


def test_a_skipped_step_leaves_nothing(
    overflowing: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Overflow(overflowing):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            hooks.append(len(self.trainer.optimizers[0]._optimizer_step_pre_hooks))
            return super().training_step(batch, batch_idx)

    hooks: list[int] = []
    callbacks = [OrthogonalityMonitor(2)]
    trainer = fit(Overflow(torch_muon), plugins=[scaled()], callbacks=callbacks, logger=tensorboard)
    assert [step for step, _ in events(trainer).scalars()["orthogonality_error/max"]] == [2, 3, 5, 7, 9]
    assert len(set(hooks)) == 1
    assert len(trainer.optimizers[0]._optimizer_step_post_hooks) == 0


@pytest.mark.parametrize("argument", ["sample", "max_elements"])
def test_arguments(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"{argument} must be at least 1, got 0"):
        OrthogonalityMonitor(**{argument: 0})
