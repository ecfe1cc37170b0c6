"""A run that goes bad ends with what is known about it, or without its bad steps; its checkpoints stay finite."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_muon.callbacks import NonFiniteError, RunGuard
from lightning_muon.callbacks.measures.spikes import LEAST_SPREAD_OF_NORM, SpikeFinder
from lightning_muon.optim import MuonAdamW
from lightning_muon.report import compare

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

SPOILT = "net.2.weight"


class Spoil(Callback):
    """Makes one entry of a gradient NaN in some steps, or of the weight after it."""

    def __init__(self, *steps: int, name: str = SPOILT, value: float = math.nan, weight: bool = False) -> None:
        self.steps, self.name, self.value, self.weight = steps, name, value, weight

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step in self.steps and not self.weight:
            gradient = pl_module.get_parameter(self.name).grad
            assert gradient is not None
            gradient.view(-1)[-1] = self.value

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step - 1 in self.steps and self.weight:
            pl_module.get_parameter(self.name).view(-1)[-1] = self.value


def muon(groups: Any) -> MuonAdamW:
    return MuonAdamW(groups, lr=0.01)


def weights(module: LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_finite(checkpoint: str | Path) -> bool:
    return all(value.isfinite().all() for value in torch.load(checkpoint, weights_only=True)["state_dict"].values())


@pytest.mark.parametrize("optimizer", [muon, torch.optim.AdamW])
def test_a_nan_ends_the_run_and_its_newest_checkpoint_goes_on(
    optimizer: Any, regression: Module, fit: Fit, tmp_path: Path
) -> None:
    step = int(torch.randint(8, 28, ()))  # the seed is that of the test
    # An epoch is one batch: Lightning resumes exactly only between epochs.
    batches = DataLoader(regression(optimizer).train_dataloader().dataset, batch_size=80)
    options = {"max_epochs": 30, "train_dataloaders": batches, "enable_checkpointing": True, "log_every_n_steps": 5}

    def saving() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, every_n_train_steps=4, save_last=True, save_top_k=-1)

    with pytest.raises(NonFiniteError) as ended:
        fit(regression(optimizer), callbacks=[Spoil(step), RunGuard(), saving()], **options)
    newest = tmp_path / f"epoch={step // 4 * 4 - 1}-step={step // 4 * 4}.ckpt"
    assert f"in step {step} the norm of the gradient of {SPOILT} is not finite" in str(ended.value)
    assert ended.value.checkpoint in {str(newest), str(tmp_path / "last.ckpt")}
    assert f"(after {step // 4 * 4} steps)" in str(ended.value)
    assert all(is_finite(file) for file in tmp_path.glob("*.ckpt"))
    resumed, straight = regression(optimizer), regression(optimizer)
    fit(resumed, callbacks=[RunGuard(), saving()], ckpt_path=ended.value.checkpoint, **options)
    fit(straight, **{**options, "enable_checkpointing": False})
    for name, value in weights(straight).items():
        assert torch.equal(value, weights(resumed)[name])


def test_what_ended_a_run_is_in_its_report(regression: Module, fit: Fit, tmp_path: Path, tensorboard: Any) -> None:
    loggers = [tensorboard, CSVLogger(tmp_path / "csv")]
    for logger in loggers:
        with pytest.raises(NonFiniteError, match="there is no healthy checkpoint"):
            fit(regression(muon), callbacks=[Spoil(7), RunGuard()], logger=logger, log_every_n_steps=3)
        comparison = compare([logger.log_dir], limit=1)
        assert comparison.verdicts() == ["bad"]
        assert any("not finite from step is 7; a gradient or a weight" in remark for remark in comparison.remarks(0))
    assert any(
        "in step 7 the norm of the gradient" in remark for remark in compare([tensorboard.log_dir], 1).remarks(0)
    )


@pytest.mark.parametrize("weights_only", [False, True])
def test_weights_that_are_not_finite_are_not_saved(
    weights_only: bool, regression: Module, fit: Fit, tmp_path: Path
) -> None:
    """Whatever made them so: no gradient was bad before."""
    saving = ModelCheckpoint(
        tmp_path,
        every_n_train_steps=1,
        save_last=True,
        save_top_k=2,
        monitor="train/loss",
        save_weights_only=weights_only,
        save_on_exception=True,
    )
    spoil = Spoil(5, weight=True, value=math.inf)
    with pytest.raises(NonFiniteError, match=rf"after step 5 weights in {SPOILT} are not finite; .*\(after 5 steps\)"):
        fit(regression(muon), callbacks=[spoil, RunGuard(), saving], enable_checkpointing=True, log_every_n_steps=100)
    assert len(list(tmp_path.glob("*.ckpt"))) == 3
    assert all(is_finite(file) for file in tmp_path.glob("*.ckpt"))


def test_a_run_does_not_begin_with_them(regression: Module, fit: Fit, tmp_path: Path) -> None:
    bad = str(tmp_path / "bad.ckpt")
    fit(regression(muon), callbacks=[Spoil(9, weight=True)]).save_checkpoint(bad, weights_only=False)
    for options in ({"ckpt_path": bad}, {}):
        module = regression(muon)
        if not options:
            module.load_state_dict(torch.load(bad, weights_only=True)["state_dict"])
        with pytest.raises(
            NonFiniteError, match=f"at the start of training weights in {SPOILT}.*no healthy checkpoint$"
        ):
            fit(module, callbacks=[RunGuard()], max_epochs=2, **options)


def test_the_end_of_a_run_is_looked_at(regression: Module, fit: Fit) -> None:
    with pytest.raises(NonFiniteError, match="in step 9 "):
        fit(regression(muon), callbacks=[Spoil(9), RunGuard()], log_every_n_steps=100)
    guard = RunGuard()
    fit(regression(muon), callbacks=[guard], log_every_n_steps=100)


def test_a_skipped_step_changes_nothing(regression: Module, fit: Fit, tensorboard: Any, events: Any) -> None:
    class WithoutSteps(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
            if trainer.global_step in {3, 4, 7}:
                optimizer.zero_grad()

    guarded, expected = regression(muon), regression(muon)
    guard = RunGuard(mode="skip", most_skips=2)
    options = {"gradient_clip_val": 0.5}
    with pytest.warns(
        UserWarning, match=f"in step 4 the norm of the gradient of {SPOILT} is not finite: the step is skipped"
    ):
        trainer = fit(guarded, callbacks=[Spoil(3, 4, 7), guard], logger=tensorboard, **options)
    fit(expected, callbacks=[WithoutSteps()], **options)
    for name, value in weights(expected).items():
        assert torch.equal(value, weights(guarded)[name])
    assert guard.skipped == 3
    assert len(events(trainer).texts("warnings")) == 3
    assert events(trainer).scalars()["skipped_steps"] == [(3, 1.0), (4, 2.0), (7, 3.0)]
    remarks = compare([tensorboard.log_dir], 1).remarks(0)
    assert any("watch: skipped steps is 3; some gradients were not finite" in remark for remark in remarks)


def test_skips_in_a_row_end_the_run_also_over_a_resume(regression: Module, fit: Fit, tmp_path: Path) -> None:
    def run(*bad: int, ckpt_path: str | None = None, steps: int = 10) -> RunGuard:
        guard = RunGuard(mode="skip", most_skips=2)
        trainer = fit(
            regression(muon), callbacks=[Spoil(*bad), guard], max_epochs=-1, max_steps=steps, ckpt_path=ckpt_path
        )
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt", weights_only=False)
        return guard

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(1, 3, 4, steps=5).skipped == 3
        assert run(6, 7, ckpt_path=str(tmp_path / "5.ckpt"), steps=8).skipped == 5
        with pytest.raises(NonFiniteError, match=r"in step 5 .* after 2 skipped steps in a row; .*5.ckpt'$"):
            run(5, ckpt_path=str(tmp_path / "5.ckpt"))


def test_the_scaler_may_search_for_its_scale(
    overflowing: Any, scaled: Any, fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("stop", "skip"):
        guard = RunGuard(mode=mode)  # type: ignore[arg-type]
        fit(overflowing(muon), callbacks=[guard], plugins=[scaled()])
        assert guard.skipped == 0
    monkeypatch.setattr("lightning_muon.callbacks.run_guard.MOST_SKIPPED_BY_SCALER", 3)
    with pytest.raises(NonFiniteError, match="up to step 8 the gradient scaler has skipped 4 steps in a row"):
        fit(overflowing(muon), callbacks=[Spoil(*range(5, 10)), RunGuard()], plugins=[scaled()])


def test_optimizers_that_step_by_hand(adversaries: Any, fit: Fit) -> None:
    """Each step counts, and only the parameters of its optimizer."""

    class SpoilCritic(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Optimizer) -> None:
            if trainer.global_step == 5:
                pl_module.critic[2].weight.grad[0] = math.inf

    def make(groups: Any, place: int) -> Optimizer:
        return MuonAdamW(groups) if place else torch.optim.AdamW(groups)

    with pytest.raises(NonFiniteError, match=r"in step 5 the norm of the gradient of critic.2.weight is not finite"):
        fit(adversaries(make), callbacks=[SpoilCritic(), RunGuard()], log_every_n_steps=4)
    guard = RunGuard(mode="skip")
    module = adversaries(make)
    with pytest.warns(UserWarning, match="in step 5 .* the step is skipped"):
        fit(module, callbacks=[SpoilCritic(), guard])
    assert guard.skipped == 1
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_accumulated_gradients_and_parameters_of_several_kinds(regression: Any, fit: Fit) -> None:
    class Odd(regression):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.waves = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
            self.brief = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
            self.idle = torch.nn.Parameter(torch.ones(3))

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + self.waves.abs().sum() + self.brief.float().sum()

    options = {"accumulate_grad_batches": 3, "max_epochs": 2, "log_every_n_steps": 2}
    fit(Odd(torch.optim.AdamW), callbacks=[RunGuard()], **options)
    for name in ("waves", "brief"):
        with pytest.raises(NonFiniteError, match=f"in step 3 the norm of the gradient of {name} is not finite"):
            fit(Odd(torch.optim.AdamW), callbacks=[Spoil(3, name=name), RunGuard()], **options)


def test_when_it_looks(regression: Module, fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    look = RunGuard._look

    def counted(guard: RunGuard, trainer: Trainer) -> None:
        looked.append(trainer.global_step)
        look(guard, trainer)

    monkeypatch.setattr(RunGuard, "_look", counted)
    fit(regression(muon), callbacks=[RunGuard()], log_every_n_steps=4, max_epochs=3)
    assert looked == [0, 4, 8, 12, 16, 20, 24, 28, 30]  # the first, which reads nothing, is for a new optimizer


@pytest.mark.parametrize("often", [False, True])
def test_a_spike_is_told_once(often: bool, regression: Any, fit: Fit, tensorboard: Any, events: Any) -> None:
    """One of the loss is a warning, one of the gradient only if it is one of many."""

    class Spiky(regression):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = super().training_step(batch, batch_idx)
            return loss * (100.0 if self.global_step in range(61, 67 if often else 63) else 1.0)

    trainer = fit(
        Spiky(lambda groups: MuonAdamW(groups, lr=0.0)),
        callbacks=[RunGuard()],
        logger=tensorboard,
        max_epochs=12,
        log_every_n_steps=20,
    )
    written = events(trainer)
    *others, loss = written.texts("warnings")
    [norm] = others if often else written.texts("spikes")
    assert norm.startswith("RunGuard, step 6")
    assert "the norm of the gradient rose to" in norm
    assert ("; so high in 6 of the last 1000 steps. Look at" if often else ". Usual in up to 5 of 1000 steps.") in norm
    assert "the loss rose to" in loss
    assert {value for _, value in written.scalars()["gradient_spikes"]} == {6.0 if often else 2.0}


def test_a_gradient_that_the_loss_does_not_follow_is_no_warning(
    regression: Any, fit: Fit, tensorboard: Any, events: Any
) -> None:
    class Odd(Callback):
        def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.global_step == 61:
                for parameter in pl_module.parameters():
                    parameter.grad.mul_(100)  # type: ignore[union-attr]

    options = {"gradient_clip_val": 1.0, "max_epochs": 12, "log_every_n_steps": 20}
    trainer = fit(regression(muon), callbacks=[Odd(), RunGuard()], logger=tensorboard, **options)
    assert events(trainer).texts("warnings") == []
    assert len(events(trainer).texts("spikes")) == 1
    assert not any("spike" in remark or "norm" in remark for remark in compare([tensorboard.log_dir], 1).remarks(0))


def test_how_many_of_the_last_values_are_in_a_spike() -> None:
    finder = SpikeFinder(10.0)
    assert [spike.step for spike in finder.find(enumerate(([1.0] * 45 + [9.0] * 2 + [1.0] * 53) * 10))][:2] == [45, 145]
    assert finder.often == 20
    list(finder.find(enumerate([1.0] * 500)))
    assert finder.often == 10


@pytest.mark.parametrize(
    ("series", "steps"),
    [
        ([1.0] * 60, []),
        ([1.0] * 40 + [1.9] * 60, []),  # less than twice as high
        ([1.0] * 40 + [5.0] + [1.0] * 59, [40]),
        ([1.0] * 40 + [5.0, 7.0, 6.0] + [1.0] * 57 + [9.0] * 2, [41, 100]),
        ([1.0] * 10 + [50.0] * 3, []),  # too early to know
        ([math.nan] * 40 + [1.0] * 40 + [math.inf, 9.0], [81]),
        ([-1.0] * 40 + [-0.5] + [2.0], [41]),
        ([1.0, 3.0, 2.0, 5.0] * 20 + [12.0], []),  # such a series is rough
    ],
)
def test_what_a_spike_is(series: list[float], steps: list[int]) -> None:
    assert [spike.step for spike in SpikeFinder(10.0).find(enumerate(series))] == steps


def test_a_norm_may_double() -> None:
    finder = SpikeFinder(10.0, LEAST_SPREAD_OF_NORM)
    assert [spike.step for spike in finder.find(enumerate([1.0] * 40 + [3.9] + [1.0] * 59 + [4.1]))] == [100]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "warn"}, "mode must be 'stop' or 'skip', got 'warn'"),
        ({"most_skips": 0}, "most_skips must be at least 1, got 0"),
        ({"every_n_steps": 0.5}, "every_n_steps must be a whole number or null, got 0.5"),
        ({"spike_factor": math.inf}, "spike_factor must be positive or null, got inf"),
    ],
)
def test_wrong_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"RunGuard: {message}"):
        RunGuard(**arguments)


def test_two_guards_are_refused(regression: Module, fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match="RunGuard is in the trainer's callbacks more than once"):
        fit(regression(muon), callbacks=[RunGuard(), RunGuard(mode="skip")])
