"""The size of updates, against what the same optimizer does without weight decay, in float64."""

import copy
import math
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.callbacks import AutoWeightDecay, UpdateRMSMonitor
from lightning_muon.callbacks.matrices import labelled_groups
from lightning_muon.callbacks.measures.weight_steps import angular_equilibrium, some_rows
from lightning_muon.callbacks.update_rms import ratios
from lightning_muon.optim import MuonAdamW
from lightning_muon.report import read_run
from lightning_muon.report.charts import CHARTS
from lightning_muon.report.quantities import matching
from lightning_muon.report.verdict import health_of
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]
Updates = dict[str, dict[str, Tensor]]

LR = 0.02


class Twin(Callback):
    """The updates U of each optimizer step by group and parameter: a copy of the optimizer takes it without decay."""

    def __init__(self, decoupled: bool = True) -> None:
        self.decoupled = decoupled
        self.updates: list[Updates] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        twin = copy.deepcopy(optimizer)
        labels = {place: label for label, owner, place, _ in labelled_groups(trainer.optimizers) if owner is optimizer}
        if self.decoupled:
            for group in twin.param_groups:
                group["weight_decay"] = 0.0
        params = [p for group in twin.param_groups for p in group["params"]]
        for p, original in zip(params, (p for group in optimizer.param_groups for p in group["params"]), strict=True):
            p.grad = original.grad.clone()
        before = [p.detach().double().clone() for p in params]
        twin.step()
        after = [p.detach().double() for p in params]
        names = {id(p): name for name, p in pl_module.named_parameters()}
        found: Updates = defaultdict(dict)
        moves = iter(zip(before, after, strict=True))
        for place, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                old, new = next(moves)
                found[labels[place]][names[id(p)]] = (old - new) / float(group["lr"])
        self.updates.append(found)


def rms(*tensors: Tensor) -> float:
    return float(torch.cat([tensor.flatten() for tensor in tensors]).square().mean().sqrt())


def check(scalars: Any, steps: list[int], updates: list[Updates], rel: float = 1e-4) -> None:
    """Compare what was logged for these steps with the updates of each."""
    for group, of_group in updates[0].items():
        assert [step for step, _ in scalars[f"update_rms/{group}"]] == steps
        for step, value in scalars[f"update_rms/{group}"]:
            assert value == pytest.approx(rms(*updates[step][group].values()), rel=rel)
        for name in of_group:
            for step, value in scalars[f"parameter_update_rms/{name}"]:
                assert value == pytest.approx(rms(updates[step][group][name]), rel=rel)


def plain(make: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """An optimizer that knows nothing of roles: one group of parameters, no names."""
    return lambda groups: make([p for group in groups for p in group["params"]])


@pytest.mark.parametrize(
    ("make", "decoupled"),
    [
        (partial(MuonAdamW, lr=LR, weight_decay=1.0), True),
        (partial(MuonAdamW, lr=LR, weight_decay=1.0, adamw_lr=0.5 * LR, update_scale="keller_jordan"), True),
        (partial(MuonAdamW, lr=LR, weight_decay=1.0, cautious_weight_decay=True), True),
        (partial(torch.optim.AdamW, lr=LR, weight_decay=1.0), True),
        (partial(torch.optim.AdamW, lr=torch.tensor(LR), weight_decay=1.0), True),
        (plain(partial(torch.optim.AdamW, lr=LR, weight_decay=1.0)), True),
        (plain(partial(torch.optim.Adam, lr=LR, weight_decay=1.0)), False),
        (plain(partial(torch.optim.SGD, lr=LR, weight_decay=1.0, momentum=0.9)), False),
    ],
)
def test_values(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, make: Any, decoupled: bool
) -> None:
    twin = Twin(decoupled)
    monitor = UpdateRMSMonitor(every_n_steps=3, per_parameter=True, sample=9)
    trainer = fit(regression(make), callbacks=[twin, monitor], logger=tensorboard)
    check(events(trainer).scalars(), [2, 5, 8], twin.updates)


def test_torch_muon_and_adamw(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    """Both have a first group without a name; the matrices are not AdamW's."""

    class Manual(regression):  # type: ignore[valid-type,misc]
        automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            self.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> list[Optimizer]:
            matrices = [self.net[0].weight, self.net[2].weight]
            rest = [p for p in self.parameters() if all(p is not matrix for matrix in matrices)]
            muon = torch.optim.Muon(matrices, lr=LR, weight_decay=1.0, adjust_lr_fn="match_rms_adamw")
            return [torch.optim.AdamW(rest, lr=LR), muon]

    twin = Twin()
    callbacks = [twin, UpdateRMSMonitor(per_parameter=True)]
    trainer = fit(Manual(None), precision="64-true", callbacks=callbacks, logger=tensorboard)
    scalars = events(trainer).scalars()
    check(scalars, list(range(10)), twin.updates[0::2])
    check(scalars, list(range(10)), twin.updates[1::2], rel=1e-2)  # torch orthogonalizes in bfloat16
    assert 0.1 < scalars["update_rms/group_0-1"][-1][1] < 0.3


def test_of_adamw_it_is_torchs_formula(regression: Module, fit: Fit) -> None:
    module = regression(plain(partial(torch.optim.AdamW, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.3)))
    trainer = fit(module, callbacks=[UpdateRMSMonitor(sample=9)])
    updates = []
    for state in trainer.optimizers[0].state.values():
        average, square = state["exp_avg"].double() / (1 - 0.9**10), state["exp_avg_sq"].double() / (1 - 0.95**10)
        updates.append(average / (square.sqrt() + 1e-8))
    assert float(watched(trainer)["update_rms/group_0"]) == pytest.approx(rms(*updates), rel=1e-4)


def test_a_decay_that_was_raised_for_the_step_is_no_update(
    regression: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    for name, plugins in (("plain", []), ("scaler", [scaled()])):
        twin = Twin()
        decay = AutoWeightDecay(limit=1e-3, weight_decay=20.0, ramp_steps=4, horizon=0, every_n_steps=1)
        callbacks = [twin, decay, UpdateRMSMonitor(every_n_steps=2, per_parameter=True)]
        logger = TensorBoardLogger(tensorboard.root_dir, name=name)
        trainer = fit(regression(partial(MuonAdamW, lr=LR)), callbacks=callbacks, plugins=plugins, logger=logger)
        scalars = events(trainer).scalars()
        assert scalars["weight_decay/matrix"][-1][1] == 20.0
        check(scalars, [1, 3, 5, 7, 9], twin.updates)


def test_a_skipped_step_is_not_measured(
    overflowing: Module, fit: Fit, scaled: Any, tensorboard: TensorBoardLogger, events: Any
) -> None:
    trainer = fit(overflowing(MuonAdamW), plugins=[scaled()], callbacks=[UpdateRMSMonitor(2)], logger=tensorboard)
    scalars = events(trainer).scalars()
    assert [step for step, _ in scalars["update_rms/matrix"]] == [2, 3, 5, 7, 9]
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


def test_accumulation_and_clipping(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    """Of AdamW, whose update does not depend on the size of gradients, nor on clipping them."""
    make = plain(partial(torch.optim.AdamW, lr=LR, eps=1e-30))
    twin = Twin()
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 1e-3, "gradient_clip_algorithm": "norm"}
    callbacks = [twin, UpdateRMSMonitor(per_parameter=True, sample=9)]
    trainer = fit(regression(make), callbacks=callbacks, logger=tensorboard, limit_train_batches=2, **options)
    check(events(trainer).scalars(), [0], twin.updates)


def test_in_bf16_it_is_what_the_weights_moved_by(regression: Module, fit: Fit) -> None:
    """An update of a third of the spacing is lost in most entries, and one spacing in the rest."""
    module = regression(partial(MuonAdamW, lr=LR, weight_decay=0.0))
    before = {name: p.detach().bfloat16().double() for name, p in module.named_parameters()}
    trainer = fit(module, precision="bf16-true", callbacks=[UpdateRMSMonitor(per_parameter=True)], max_steps=1)
    for name, old in before.items():
        moved = (old - module.get_parameter(name).detach().double()) / LR
        assert float(watched(trainer)[f"parameter_update_rms/{name}"]) == pytest.approx(rms(moved), rel=1e-5)


def test_what_does_not_move_is_left_out(regression: Module, fit: Fit) -> None:
    """No gradient, or a learning rate of zero, which no decay moves either."""

    class Odd(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(partial(MuonAdamW, lr=LR, adamw_lr=0.0, weight_decay=1.0))
            self.unused, self.head = nn.Linear(8, 8), nn.Linear(4, 1)

    trainer = fit(Odd(), callbacks=[UpdateRMSMonitor(per_parameter=True)])
    logged = {name for name in watched(trainer) if "update_rms" in name}
    matrices = {f"parameter_update_rms/net.{layer}.weight" for layer in (0, 2, 4)}
    assert logged == {"update_rms/matrix", *matrices}


def test_groups_of_several_optimizers(
    adversaries: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    """Equal labels are numbered as those of weight_decay; an optimizer without Muon takes part, at its own steps."""

    def make(groups: list[dict[str, Any]], place: int) -> Optimizer:
        if place == 0:
            return MuonAdamW(groups, lr=LR)
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=LR)

    trainer = fit(
        adversaries(make, lambda batch: (batch % 2 == 0, 1)), callbacks=[UpdateRMSMonitor()], logger=tensorboard
    )
    scalars = events(trainer).scalars()
    assert [step for step, _ in scalars["update_rms/matrix"]] == [0, 2, 4, 6, 8]
    assert [step for step, _ in scalars["update_rms/group_0"]] == list(range(10))

    both = fit(
        adversaries(lambda groups, _: MuonAdamW(groups, lr=LR)), callbacks=[UpdateRMSMonitor(), AutoWeightDecay()]
    )
    logged = {name for name in watched(both) if name.startswith(("update_rms/matrix", "weight_decay"))}
    assert logged == {
        f"{quantity}/matrix{number}" for quantity in ("update_rms", "weight_decay") for number in ("", "-1")
    }


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": 1.0, "adamw_lr": 1e-3}, r"in matrix \([\d.]+\) to head \([\de.-]+\)"),
        ({"lr": 1e-4, "adamw_lr": 0.1}, r"in \w+ \([\de.-]+\) to matrix \([\de.-]+\)"),
    ],
)
def test_groups_that_drift_apart_are_named_once(regression: Module, fit: Fit, options: Any, named: str) -> None:
    module = regression(partial(MuonAdamW, **options))
    with pytest.warns(UserWarning, match="max_ratio=10") as caught:
        fit(module, callbacks=[UpdateRMSMonitor()])
    (message,) = [str(one.message) for one in caught if "UpdateRMSMonitor" in str(one.message)]
    assert re.search(named, message)
    assert "update_scale: moonlight" in message
    assert "adamw_lr" in message


@pytest.mark.parametrize(("max_ratio", "lr"), [(10.0, LR), (None, 5.0)])
def test_no_warning_where_both_move_alike(
    regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder, max_ratio: float | None, lr: float
) -> None:
    fit(regression(partial(MuonAdamW, lr=lr, adamw_lr=LR)), callbacks=[UpdateRMSMonitor(max_ratio=max_ratio)])
    assert not [one for one in recwarn if "UpdateRMSMonitor" in str(one.message)]


@pytest.mark.parametrize(("adamw_lr", "verdict"), [(LR, "ok"), (LR / 1000, "bad")])
def test_rates_that_are_far_apart_are_judged(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, adamw_lr: float, verdict: str
) -> None:
    options = {"max_epochs": 8, "limit_val_batches": 1, "log_every_n_steps": 5}  # long enough to be judged
    monitor = UpdateRMSMonitor(max_ratio=None)  # no warning
    trainer = fit(
        regression(partial(MuonAdamW, lr=LR, adamw_lr=adamw_lr)), callbacks=[monitor], logger=tensorboard, **options
    )
    tensorboard.finalize("success")
    run = read_run(Path(str(trainer.log_dir)), "run")
    for step, ratio in run.scalars["rate_ratio"]:
        rates = {tag.partition("/")[2]: dict(run.scalars[tag]) for tag in matching(run.scalars, "effective_lr/.+")}
        others = [of_group[step] / rates["matrix"][step] for group, of_group in rates.items() if group != "matrix"]
        assert ratio == pytest.approx(max(max(one, 1 / one) for one in others), rel=1e-5)
    health = health_of(run)
    assert health.verdict == verdict
    if verdict == "bad":
        assert health.unhealthy[0].name == "rate_ratio"
        assert "adamw_lr" in health.unhealthy[0].line.advice


def test_ratios_name_the_larger_first() -> None:
    found = ratios({"muon": 0.2, "still": 0.0}, {"adamw": 0.1, "vectors": 0.8, "broken": math.nan})
    assert {text: value for text, value in found.items() if not math.isnan(value)} == {
        "muon (0.2) to adamw (0.1)": pytest.approx(2.0),
        "vectors (0.8) to muon (0.2)": pytest.approx(4.0),
    }
    assert not any(value > 1e9 for value in found.values())


def test_nan_is_named(regression: Module, fit: Fit) -> None:
    class Broken(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            self.net[2].weight.grad[0, 0] = torch.nan

    with pytest.warns(UserWarning, match=r"the update RMS is not finite for net\.2\.weight\."):
        trainer = fit(Broken(MuonAdamW), callbacks=[UpdateRMSMonitor()], max_steps=1)
    assert math.isnan(watched(trainer)["update_rms/matrix"])
    assert math.isfinite(watched(trainer)["update_rms/head"])


def test_the_sample_is_bounded(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[UpdateRMSMonitor(sample=1, per_parameter=True)])
    sampled = {name for name in watched(trainer) if name.startswith("parameter_update_rms/")}
    assert len(sampled) == len([name for name in watched(trainer) if name.startswith("update_rms/")]) == 3


@pytest.mark.parametrize("shape", [(1000, 30), (3, 40000), (30000,), (7, 5, 900), (), (0, 4)])
def test_of_large_parameters_some_rows_are_looked_at(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    rows = some_rows(tensor, 10000)
    assert rows.numel() <= max(10000 + tensor[0].numel() if tensor.ndim and len(tensor) else 1, 1)
    assert rows.numel() >= min(tensor.numel(), 3000)
    assert rows.data_ptr() == tensor.data_ptr()  # a view, which shows the weights of the time


def test_large_parameters_in_a_run(regression: Module, fit: Fit) -> None:
    """Rows of a polar factor are alike: a fourth of them tell its size."""
    found = {}
    for max_elements in (64, 1 << 20):
        module = regression(partial(MuonAdamW, lr=LR, orthogonalizer="svd"))
        trainer = fit(module, callbacks=[UpdateRMSMonitor(max_elements=max_elements, per_parameter=["net.2.*"])])
        found[max_elements] = float(watched(trainer)["parameter_update_rms/net.2.weight"])
    # Of 16 orthonormal rows each has the same norm, times Moonlight's 0.2 √16.
    assert found[64] == pytest.approx(found[1 << 20], rel=1e-3) == pytest.approx(0.2, rel=1e-3)


def test_the_chart_has_a_line_for_each_group_not_for_each_parameter() -> None:
    (chart,) = [chart for chart in CHARTS if chart.draws(["watch/update_rms/matrix"])]
    assert not chart.draws(["watch/parameter_update_rms/net.0.weight"])


@pytest.mark.parametrize("argument", ["every_n_steps", "sample", "max_elements", "max_ratio"])
def test_bad_arguments_are_named(argument: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"UpdateRMSMonitor: {argument} must be at least 1.*, got 0"):
        UpdateRMSMonitor(**{argument: 0})


def test_patterns_are_for_all_parameters(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[UpdateRMSMonitor(per_parameter=["*.bias"])])
    logged = {name for name in watched(trainer) if name.startswith("parameter_update_rms/")}
    assert logged == {f"parameter_update_rms/net.{layer}.bias" for layer in (0, 2, 4)}
    with pytest.raises(MisconfigurationException, match=r"pattern 'x\*', which matches no name"):
        fit(regression(MuonAdamW), callbacks=[UpdateRMSMonitor(per_parameter=["x*"])])


def test_angles_and_effective_rates(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    """From the updates of a twin and the weights before the step, in float64."""
    weights: list[dict[str, float]] = []

    class Sizes(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            weights.append({name: float(p.detach().double().norm()) for name, p in pl_module.named_parameters()})

    twin = Twin()
    monitor = UpdateRMSMonitor(sample=10, per_parameter=True)
    make = partial(MuonAdamW, lr=LR, weight_decay=0.1, momentum=0.9, nesterov=False)
    trainer = fit(regression(make), callbacks=[twin, Sizes(), monitor], logger=tensorboard)
    scalars = events(trainer).scalars()
    for step, (updates, sizes) in enumerate(zip(twin.updates, weights, strict=True)):
        for group, of_group in updates.items():
            effective, angle = (dict(scalars[f"{tag}/{group}"])[step] for tag in ("effective_lr", "angular_update"))
            assert effective == pytest.approx(LR * rms(*of_group.values()), rel=1e-4)
            angles = {name: LR * float(update.norm()) / sizes[name] for name, update in of_group.items()}
            assert angle == pytest.approx(sum(angles.values()) / len(angles), rel=1e-4)
            for name, expected in angles.items():
                assert dict(scalars[f"parameter_angular_update/{name}"])[step] == pytest.approx(expected, rel=1e-4)
    matrix = next(group for group in twin.updates[0] if f"angular_equilibrium/{group}" in scalars)
    rest = math.sqrt(2 * LR * 0.1 * 0.1 / 1.9)
    assert [value for _, value in scalars[f"angular_equilibrium/{matrix}"]] == pytest.approx([rest] * 10)


@pytest.mark.parametrize(
    ("options", "least", "most"),
    [
        ({"algorithm": "muon", "momentum": 0.0}, 0.98, 1.01),
        ({"algorithm": "muon", "momentum": 0.9, "nesterov": False}, 1.0, 1.45),
        ({"algorithm": "muon", "momentum": 0.9, "nesterov": True}, 1.0, 1.35),
        ({"algorithm": "adamw", "betas": (0.9, 0.99)}, 0.95, 1.12),  # more, as 1/ηλ is only 50 steps
        ({"algorithm": "adamw", "betas": (0.0, 0.99)}, 0.95, 1.05),
    ],
)
def test_updates_come_to_rest_at_the_equilibrium(options: dict[str, Any], least: float, most: float) -> None:
    """Of noise at right angles to the weight, as the gradient of a layer before a norm is."""
    lr, decay = 0.05, 0.4
    weight = nn.Parameter(0.1 * torch.randn(16, 16))
    optimizer = MuonAdamW([{"params": [weight], **options}], lr=lr, weight_decay=decay)
    ratios_seen = []
    for step in range(800):
        noise = torch.randn(16, 16)
        weight.grad = noise - weight.detach() * ((noise * weight.detach()).sum() / weight.detach().square().sum())
        old = weight.detach().clone()
        optimizer.step()
        if step >= 300:
            ratios_seen.append(float(((1 - lr * decay) * old - weight.detach()).norm() / old.norm()))
    rest = angular_equilibrium(lr * decay, optimizer.param_groups[0])
    assert rest is not None
    assert least <= sum(ratios_seen) / len(ratios_seen) / rest <= most


def test_where_there_is_no_equilibrium() -> None:
    assert angular_equilibrium(0.0, {"betas": (0.9, 0.99)}) is None
    assert angular_equilibrium(0.01, {"betas": (0.9, 0.99), "cautious_weight_decay": True}) is None
