"""Automatic weight decay with a target: real runs settle there, exactly as computed, and go on after a checkpoint."""

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_muon.callbacks import AutoWeightDecay
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]
Groups = list[dict[str, Any]]
growing = partial(MuonAdamW, lr=0.2, weight_decay=0.0)
steer = partial(AutoWeightDecay, horizon=50, ramp_steps=20)


def muon_groups(optimizer: Any) -> Groups:
    return [group for group in optimizer.param_groups if group.get("algorithm", "muon") == "muon"]


class Watch(Callback):
    """What each step of an optimizer does to Muon's matrices, in float64.

    Args:
        optimizer: Its place.
    """

    def __init__(self, optimizer: int = 0) -> None:
        self.optimizer = optimizer
        self.decays: list[list[float]] = []  # by step and group
        self.lrs: list[list[float]] = []
        self.weights: list[list[list[Tensor]]] = []  # by step, group and matrix; the first is before all steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        optimizer = trainer.optimizers[self.optimizer]
        self.look(optimizer)
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.look)

    def before(self, optimizer: Any, *_: Any) -> None:
        self.decays.append([group["weight_decay"] for group in muon_groups(optimizer)])
        self.lrs.append([float(group["lr"]) for group in muon_groups(optimizer)])

    def look(self, optimizer: Any, *_: Any) -> None:
        self.weights.append([[p.detach().double() for p in group["params"]] for group in muon_groups(optimizer)])

    def matrix_rms(self) -> list[list[float]]:
        """By step, of each matrix."""
        return [[float(p.square().mean().sqrt()) for group in step for p in group] for step in self.weights[1:]]

    def group_rms(self, group: int = 0) -> list[float]:
        entries = [torch.cat([p.flatten() for p in step[group]]) for step in self.weights[1:]]
        return [float(p.square().mean().sqrt()) for p in entries]


def by_torch(groups: Groups) -> torch.optim.Optimizer:
    """torch's own Muon, which must have matrices alone."""
    return torch.optim.Muon(
        [p for group in groups if group["algorithm"] == "muon" for p in group["params"]],
        lr=0.2,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )


def adamw_with_lr_tensor(groups: Groups) -> torch.optim.Optimizer:
    """Not Muon at all, on Muon's groups."""
    return torch.optim.AdamW(groups, lr=torch.tensor(0.07), weight_decay=0.0)


def with_cosine(groups: Groups, **options: Any) -> dict[str, Any]:
    optimizer = growing(groups, **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.fixture(scope="module")
def without_target(regression: Module, fit: Fit) -> Callable[[Any], list[float]]:
    """`without_target(make_optimizer)`: the RMS of the group by step, in the run without the callback."""

    @cache
    def course(make_optimizer: Any) -> list[float]:
        watch = Watch()
        fit(regression(make_optimizer), callbacks=[watch], max_epochs=60, log_every_n_steps=5)
        return watch.group_rms()

    return course


OPTIMIZERS = [growing, with_cosine, by_torch, adamw_with_lr_tensor]


@pytest.mark.parametrize(
    ("make_optimizer", "per"),
    [
        *(pytest.param(make, "group", marks=pytest.mark.slow) for make in (*OPTIMIZERS[:2], OPTIMIZERS[3])),
        (OPTIMIZERS[2], "group"),
        (growing, "matrix"),
        *(pytest.param(make, "matrix", marks=pytest.mark.slow) for make in OPTIMIZERS[1:]),
    ],
)
def test_the_rms_settles_at_the_target(
    regression: Module, fit: Fit, without_target: Callable[[Any], list[float]], make_optimizer: Any, per: str
) -> None:
    """Within 10 %, where without the callback the weights keep growing; lr schedules and other optimizers too."""
    watch, alone = Watch(), without_target(make_optimizer)
    callbacks = [steer(target_rms=0.6, per=per), watch]
    fit(regression(make_optimizer), callbacks=callbacks, max_epochs=60, log_every_n_steps=5)
    assert alone[-1] > (1.03 if make_optimizer is with_cosine else 1.2) * alone[299] > 1.5 * 0.6
    assert watch.group_rms()[300:] == pytest.approx([0.6] * 300, rel=0.1)
    if per == "matrix":
        assert [rms for step in watch.matrix_rms()[300:] for rms in step] == pytest.approx([0.6] * 600, rel=0.1)
    else:  # one decay for matrices that grow at different rates
        assert watch.matrix_rms()[-1] != pytest.approx([0.6, 0.6], rel=0.02)


def two_groups(groups: Groups) -> MuonAdamW:
    """Each hidden matrix with its own learning rate."""
    muon = next(group for group in groups if group["algorithm"] == "muon")
    names, lists = ("first", "second"), ("params", "param_names", "layouts", "reasons")
    parts = [
        {**muon, **{key: [muon[key][place]] for key in lists if key in muon}, "name": name, "lr": (0.2, 0.05)[place]}
        for place, name in enumerate(names)
    ]
    return MuonAdamW([*parts, *(group for group in groups if group is not muon)], lr=0.2, weight_decay=0.0)


def test_groups_are_steered_each_by_itself(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    watch, options = Watch(), {"max_epochs": 60, "log_every_n_steps": 5}
    trainer = fit(regression(two_groups), callbacks=[steer(target_rms=0.4), watch], logger=tensorboard, **options)
    for group in (0, 1):
        assert watch.group_rms(group)[300:] == pytest.approx([0.4] * 300, rel=0.1)
    curves = events(trainer).scalars()
    for place, tag in enumerate(("weight_decay/first", "weight_decay/second")):
        assert [value for _, value in curves[tag]] == pytest.approx([watch.decays[s][place] for s in range(4, 600, 5)])
    assert watch.decays[-1][0] != pytest.approx(watch.decays[-1][1], rel=0.2)
    assert all(group["weight_decay"] == 0.0 for group in trainer.optimizers[0].param_groups)


@pytest.mark.parametrize("per", ["group", pytest.param("matrix", marks=pytest.mark.slow)])
def test_the_end_of_bf16_headroom_is_a_target(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, per: str
) -> None:
    """There the update, 0.2 with Moonlight's scale but for the iteration, is as large as 2⁻⁷ of the weight."""
    make_optimizer = partial(MuonAdamW, lr=0.005, weight_decay=0.0, orthogonalizer="svd")
    watch = Watch()
    options = {"max_epochs": 40, "log_every_n_steps": 5, "logger": tensorboard}
    trainer = fit(regression(make_optimizer), callbacks=[steer(target_rms="bf16", per=per), watch], **options)
    # An orthogonal matrix (m, n) has an RMS of 1/√max(m, n), but m·n entries of which the group's RMS is made.
    target = 2**7 * 0.005 * math.sqrt((0.2**2 * 16 * 8 * 8 / 8 + 0.2**2 * 16 * 16) / (16 * 8 + 16 * 16))
    assert watch.group_rms()[200:] == pytest.approx([target] * 200, rel=0.1)
    assert "(the target is 2^7 · lr 0.005 · update RMS 0.2)" in events(trainer).texts("weight_decay/decisions")[0]


@pytest.mark.slow  # five seconds
def test_the_target_of_bf16_outlasts_the_schedule(regression: Module, fit: Fit) -> None:
    """At the end of a cosine updates vanish, and the weights need not follow."""
    watch = Watch()
    callbacks = [steer(target_rms="bf16"), watch]
    fit(
        regression(partial(with_cosine, lr=0.005, orthogonalizer="svd")),
        max_epochs=60,
        log_every_n_steps=5,
        callbacks=callbacks,
    )
    assert watch.group_rms()[400:] == pytest.approx([2**7 * 0.005 * 0.2] * 200, rel=0.1)


def test_the_size_of_an_update_is_told_from_the_decay(regression: Module, fit: Fit) -> None:
    """A decay of their own takes twenty times as much from the weights as the update adds, of 0.2 in each matrix."""
    auto = steer(target_rms="bf16", ramp_steps=10**9)
    make_optimizer = partial(MuonAdamW, lr=0.005, weight_decay=20.0, orthogonalizer="svd")
    fit(regression(make_optimizer), callbacks=[auto], limit_train_batches=3)
    assert auto.state_dict()["bf16"]["matrix"]["update_rms"] == pytest.approx(0.2, rel=1e-3)


def formula(watch: Watch, steps: range, matrix: int) -> float:
    """The decay that would have held a matrix over these steps, from its updates, averaged by learning rate."""
    needed = 0.0
    for step in steps:
        old, new = (watch.weights[place][0][matrix] for place in (step, step + 1))
        ((lr,), (decay,)) = watch.lrs[step], watch.decays[step]
        update = ((1 - lr * decay) * old - new) / lr
        needed += lr * float((lr * update.square().sum() / 2 - (old * update).sum()) / old.square().sum())
    return needed / sum(watch.lrs[step][0] for step in steps)


def small(groups: Groups) -> dict[str, Any]:
    """Small steps, of growing learning rate and with a decay of their own."""
    optimizer = MuonAdamW(groups, lr=2e-3, weight_decay=0.3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 + 0.05 * step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(("every", "accumulate"), [(1, 1), (5, 1), (2, 2)])
def test_the_decay_is_what_the_updates_ask_for(regression: Module, fit: Fit, every: int, accumulate: int) -> None:
    """Of each matrix, from the updates of all steps between two measurements; the target is where the weights are."""
    found: list[dict[str, Any]] = []
    auto = steer(target_rms=1e-3, per="matrix", smoothing=0.0, ramp_steps=10**9, bounds=(0.0, 1e9), every_n_steps=every)

    class Look(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            found.append(auto.state_dict()["sets"])

    watch = Watch()
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2 * accumulate}
    fit(regression(small), callbacks=[watch, auto, Look()], **options)
    last = range(20 - every, 20)
    for matrix, name in enumerate(("net.0.weight", "net.2.weight")):
        growth, lr = found[-1][name]["growth"], found[-1][name]["growth_lr"]
        assert lr == pytest.approx(sum(watch.lrs[step][0] for step in last))
        assert growth / lr == pytest.approx(formula(watch, last, matrix), rel=0.02, abs=2e-3)
        rms = watch.matrix_rms()[-1][matrix]
        steering = math.log(rms / 1e-3) / (50 * lr / every)
        assert found[-1][name]["decay"] == pytest.approx(growth / lr + steering)


def test_skipped_steps_are_not_counted(regression: Module, fit: Fit, scaled: Any) -> None:
    """A gradient scaler leaves out the steps whose gradients overflow: neither lr nor decay happened."""

    class Overflowing(regression):  # type: ignore[valid-type,misc]
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx in {2, 5}:
                self.net[0].weight.grad.fill_(torch.inf)

    auto = steer(target_rms=0.6, every_n_steps=4)
    watch = Watch()
    fit(Overflowing(growing), callbacks=[watch, auto], plugins=[scaled()])
    assert len(watch.decays) == 8
    counted = auto.state_dict()["sets"]["matrix"]
    assert counted["steps"] * 0.2 == pytest.approx(counted["lr"])
    assert counted["rms"] == pytest.approx(watch.group_rms()[-1 - counted["steps"]], rel=1e-6)


def test_every_step_of_a_batch_decays(adversaries: Module, fit: Fit) -> None:
    """Three steps of one optimizer and one of the other: where nothing but decay acts, it ends where it should.

    Without a horizon each matrix is to be at its target after one interval, whatever it is above it.
    """

    class AtRest(adversaries):  # type: ignore[valid-type,misc]
        def manual_backward(self, loss: Tensor) -> None:
            super().manual_backward(0.0 * loss)

    module = AtRest(lambda groups, _: MuonAdamW(groups, lr=0.01, weight_decay=0.0), lambda _: (3, 1))
    watches = [Watch(0), Watch(1)]
    auto = AutoWeightDecay(
        target_rms=0.15, per="matrix", horizon=0, ramp_steps=1, smoothing=0.0, bounds=(0.0, 1e3), every_n_steps=4
    )
    fit(module, callbacks=[auto, *watches], limit_train_batches=8, max_epochs=2)
    for watch, steps in zip(watches, (48, 16), strict=True):
        course = watch.matrix_rms()
        assert len(course) == steps
        assert min(course[steps // 2 - 1]) > 1.06 * 0.15  # eight batches: two measurements
        assert course[3 * steps // 4] == pytest.approx([0.15] * 2, rel=0.05)  # e^-x is not quite 1 - x


def test_a_matrix_without_gradient_rests(regression: Module, fit: Fit) -> None:
    """It was not updated, so it must not decay either."""

    class Frozen(regression):  # type: ignore[valid-type,misc]
        def on_after_backward(self) -> None:
            if self.trainer.global_step >= 20:
                self.net[0].weight.grad = None

    watch = Watch()
    callbacks = [steer(target_rms=0.3, per="matrix"), watch]
    fit(Frozen(growing), callbacks=callbacks, max_epochs=30, log_every_n_steps=2)
    first = [step[0][0] for step in watch.weights]
    assert watch.matrix_rms()[-1][1] == pytest.approx(0.3, rel=0.2)
    assert watch.matrix_rms()[20][0] > 0.36
    assert all(torch.equal(weights, first[20]) for weights in first[20:])


def test_what_is_not_finite_is_left_out(regression: Module, fit: Fit) -> None:
    """The first matrix breaks; the other is steered on, alone."""

    class Broken(Callback):
        @torch.no_grad()
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step >= 50:
                trainer.optimizers[0].param_groups[0]["params"][0].fill_(torch.nan)

    # All of the network's output is NaN then, and with it the gradient, but not that of the zeros put in its place.
    class Blind(regression):  # type: ignore[valid-type,misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                parameter.grad.nan_to_num_(nan=0.1)

    auto = steer(target_rms=0.5)
    with pytest.warns(UserWarning, match=r"AutoWeightDecay.*net\.0\.weight; nothing can be said"):
        fit(Blind(growing), callbacks=[Broken(), auto], max_epochs=6, log_every_n_steps=5)
    kept = auto.state_dict()["sets"]["matrix"]
    assert kept["left_out"] == ["net.0.weight"]
    assert all(math.isfinite(kept[key]) for key in ("decay", "growth", "rms"))


def test_a_decay_that_someone_sets_during_the_step_counts_as_taken(regression: Module, fit: Fit) -> None:
    class Someone(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
            trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.3

    auto, watch = steer(target_rms=1e-3, per="matrix", smoothing=0.0), Watch()
    trainer = fit(regression(partial(MuonAdamW, lr=2e-3)), callbacks=[watch, auto, Someone()])
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.3
    watch.decays = [[0.3]] * 10  # what the steps really took
    for matrix, name in enumerate(("net.0.weight", "net.2.weight")):
        kept = auto.state_dict()["sets"][name]
        assert kept["growth"] / kept["growth_lr"] == pytest.approx(
            formula(watch, range(9, 10), matrix), rel=0.02, abs=2e-3
        )


@pytest.mark.parametrize("options", [{"target_rms": 0.1}, {"target_rms": "bf16", "per": "matrix"}])
def test_a_resumed_run_is_the_straight_one(
    regression: Module, fit: Fit, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Twenty steps straight, and ten and ten through a checkpoint, within a ramp and between two measurements."""
    make_optimizer = partial(with_cosine, lr=1e-3)  # with the end of bf16 headroom below the first weights
    straight, first, second = (regression(make_optimizer, seed=seed) for seed in (0, 0, 5))
    whole, begun, resumed = (steer(every_n_steps=3, **options) for _ in range(3))
    fit(straight, max_epochs=2, callbacks=[whole])
    fit(first, max_epochs=1, callbacks=[begun]).save_checkpoint(tmp_path / "half.ckpt")
    state = begun.state_dict()
    assert 0.0 < state["strength"] < 1.0
    assert all(kept["steps"] == 1 and kept["lr"] > 0 for kept in state["sets"].values())
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    fit(second, max_epochs=2, callbacks=[resumed], ckpt_path=str(tmp_path / "half.ckpt"))
    assert whole.state_dict() == resumed.state_dict()
    assert any(kept["decay"] > 0 for kept in resumed.state_dict()["sets"].values())
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_decay_is_ramped_in_from_the_groups_own(regression: Module, fit: Fit) -> None:
    """Own until there are two measurements; then step by step to one that the lower bound keeps fixed."""
    watch = Watch()
    auto = AutoWeightDecay(target_rms=100.0, ramp_steps=5, bounds=(0.05, 1.0), every_n_steps=2)
    fit(regression(partial(MuonAdamW, lr=1e-3, weight_decay=0.3)), callbacks=[auto, watch])
    assert auto.active
    expected = [0.3] * 4 + [0.25, 0.2, 0.15, 0.1, 0.05, 0.05]
    assert [decay for (decay,) in watch.decays] == pytest.approx(expected)


def test_half_precision_is_steered_by_group(regression: Module, fit: Fit) -> None:
    """MuonAdamW rounds update and decay together, so the decay has its effect."""
    watch = Watch()
    options = {"max_epochs": 40, "log_every_n_steps": 5, "precision": "bf16-true"}
    fit(regression(growing), callbacks=[steer(target_rms=0.6), watch], **options)
    assert watch.group_rms()[200:] == pytest.approx([0.6] * 200, rel=0.1)
