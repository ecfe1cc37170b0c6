"""HyperparameterSchedule: the value of each step, who sees it, and exact resuming."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_muon.callbacks import AutoWeightDecay, HyperparameterSchedule, MuonDashboard
from lightning_muon.callbacks.points import Points
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

muon = partial(MuonAdamW, lr=0.02, weight_decay=0.1)


def weights(module: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(module.parameters()).detach()


def read(group: dict[str, Any], key: str) -> Any:
    return group["betas"][int(key[-1]) - 1] if key.startswith("beta") else group[key]


class Taken:
    """Makes an optimizer, and records a hyperparameter of its groups at each step, by the names of the groups."""

    def __init__(self, key: str, make: Callable[..., Optimizer] = muon, set_to: list[float] | None = None) -> None:
        self.key, self.make, self.set_to = key, make, set_to
        self.steps: list[dict[str, float]] = []

    def __call__(self, groups: list[dict[str, Any]]) -> Optimizer:
        optimizer = self.make(groups)
        optimizer.register_step_pre_hook(self.before_step)
        return optimizer

    def before_step(self, optimizer: Optimizer, *_: object) -> None:
        if self.set_to is not None:
            optimizer.param_groups[0][self.key] = self.set_to[len(self.steps)]
        self.steps.append({group["name"]: read(group, self.key) for group in optimizer.param_groups})

    def of(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]


def first_group(fit: Fit, module: LightningModule, taken: Taken, **options: Any) -> list[float]:
    trainer = fit(module, **options)
    return taken.of(trainer.optimizers[0].param_groups[0]["name"])


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ({0: 0.5, 4: 0.9}, [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]),
        ({2: 0.5, -2: 0.2}, [0.5, 0.5, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.2]),
        ({"0": 0.9, "100%": 0.0}, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
        ({"50%": 0.9, -1: 0.0}, [0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0]),  # 50 % is step 4.5
        ({7: 0.3}, [0.3] * 10),
    ],
)
def test_each_step_takes_its_value(
    regression: Module, fit: Fit, points: dict[int | str, float], expected: list[float]
) -> None:
    taken = Taken("momentum")
    schedule = HyperparameterSchedule("momentum", points)
    assert first_group(fit, regression(taken), taken, callbacks=[schedule]) == pytest.approx(expected, abs=1e-12)


def test_the_value_of_a_point_is_exact() -> None:
    value_at = Points("points", {0: 0.1, 7: 0.7, "100%": 0.3}).in_a_run(101)
    assert [value_at(step) for step in (0, 7, 100, 10**6)] == [0.1, 0.7, 0.3, 0.3]


def test_the_steps_are_those_of_a_momentum_set_by_hand(regression: Module, fit: Fit) -> None:
    values = [0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9]
    value_at = Points("points", {0: 0.5, 4: 0.9}).in_a_run(10)
    by_hand = regression(Taken("momentum", set_to=[value_at(step) for step in range(10)]))
    fit(by_hand)
    module, constant = regression(muon), regression(muon)
    fit(module, callbacks=[HyperparameterSchedule("momentum", {0: 0.5, 4: 0.9})])
    fit(constant)
    assert [value_at(step) for step in range(10)] == pytest.approx(values)
    assert torch.equal(weights(module), weights(by_hand))
    assert not torch.equal(weights(module), weights(constant))


def test_steps_are_counted_not_batches(regression: Module, fit: Fit) -> None:
    """Ten batches, three a step: the last step has one batch."""
    taken = Taken("momentum")
    schedule = HyperparameterSchedule("momentum", {0: 0.9, -1: 0.3})
    values = first_group(fit, regression(taken), taken, callbacks=[schedule], accumulate_grad_batches=3)
    assert values == pytest.approx([0.9, 0.7, 0.5, 0.3])


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_is_logged_is_what_acted(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, ours_first: bool, accumulate: int
) -> None:
    taken = Taken("momentum")
    both: list[Callback] = [
        HyperparameterSchedule("momentum", {0: 0.9, -1: 0.3}),
        LearningRateMonitor(log_momentum=True, logging_interval="step"),
    ]
    callbacks = both if ours_first else both[::-1]
    options = {"accumulate_grad_batches": accumulate, "max_epochs": 2, "logger": tensorboard}
    trainer = fit(regression(taken), callbacks=callbacks, **options)
    name = trainer.optimizers[0].param_groups[0]["name"]
    scalars = events(trainer).scalars()
    expected = list(enumerate(pytest.approx(value) for value in taken.of(name)))
    assert len(expected) == 20 // accumulate
    assert scalars[f"hyperparameter/momentum/{name}"] == expected
    assert dict(scalars[f"lr-MuonAdamW/{name}-momentum"]) == dict(expected)
    assert [tag for tag in scalars if tag.startswith("hyperparameter/")] == [f"hyperparameter/momentum/{name}"]


def test_it_tells_groups_and_steps_on_the_page(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any
) -> None:
    schedule = HyperparameterSchedule("momentum", {"0%": 0.9, -4: 0.95})
    trainer = fit(regression(muon), callbacks=[schedule, MuonDashboard()], logger=tensorboard)
    name = trainer.optimizers[0].param_groups[0]["name"]
    (text,) = events(trainer).texts("hyperparameter/momentum")
    assert text == f"momentum of {name}: 0.9 in step 0, 0.95 in step 6"
    assert str(schedule) == "momentum: 0%: 0.9, -4: 0.95"


OPTIMIZERS: list[tuple[str, Any]] = [
    ("momentum", muon),
    ("weight_decay", muon),
    ("neuron_beta", partial(muon, neuron_beta=0.9)),
    ("eps", muon),
    ("beta1", muon),
    ("beta2", muon),
    ("momentum", partial(torch.optim.SGD, lr=0.1, momentum=0.5)),
    ("dampening", partial(torch.optim.SGD, lr=0.1, momentum=0.5)),
    ("beta1", torch.optim.AdamW),
    ("alpha", torch.optim.RMSprop),
]


@pytest.mark.parametrize(("hyperparameter", "make"), OPTIMIZERS)
def test_only_groups_in_which_it_acts_change(
    regression: Module, fit: Fit, hyperparameter: str, make: Callable[..., Optimizer]
) -> None:
    """In MuonAdamW every group has all options; those of the other algorithm do nothing there."""
    module = regression(make)
    trainer = fit(module, callbacks=[HyperparameterSchedule(hyperparameter, {0: 0.5, -1: 0.25})], max_steps=2)
    plain = regression(make)
    before = fit(plain, max_steps=2).optimizers[0].param_groups
    hybrid = isinstance(trainer.optimizers[0], MuonAdamW)
    for group, own in zip(trainer.optimizers[0].param_groups, before, strict=True):
        of_muon = hyperparameter in {"momentum", "neuron_beta"}
        acts = not hybrid or hyperparameter == "weight_decay" or of_muon == (group["algorithm"] == "muon")
        acts &= hyperparameter != "weight_decay" or own["weight_decay"] != 0  # vectors have none, by default
        assert read(group, hyperparameter) == (0.25 if acts else read(own, hyperparameter))


def test_groups_by_name_and_by_algorithm(regression: Module, fit: Fit) -> None:
    groups = fit(regression(muon), max_steps=1).optimizers[0].param_groups
    names = [group["name"] for group in groups]
    adamw = {group["name"] for group in groups if group["algorithm"] == "adamw"}
    for wanted, expected in (([names[1]], {names[1]}), (["adamw"], adamw), ([names[0], f"{names[1]}*"], None)):
        taken = Taken("weight_decay")
        schedule = HyperparameterSchedule("weight_decay", {0: 0.5}, groups=wanted)
        fit(regression(taken), callbacks=[schedule], max_steps=1)
        found = {name for name, value in taken.steps[0].items() if value == 0.5}
        assert found == (expected or {names[0], names[1]})


def test_a_group_that_comes_later_follows(regression: Module, fit: Fit) -> None:
    class Grows(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
            if trainer.global_step == 4:
                new = nn.Parameter(torch.ones(3, 3))
                trainer.optimizers[0].add_param_group({"params": [new], "algorithm": "muon", "name": "late"})

    taken = Taken("momentum")
    fit(regression(taken), callbacks=[Grows(), HyperparameterSchedule("momentum", {0: 0.9, -1: 0.0})])
    assert taken.steps[9]["late"] == 0.0
    assert taken.steps[4]["late"] == pytest.approx(0.5)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_resumed_run_is_bit_equal(regression: Module, fit: Fit, tmp_path: Path, accumulate: int) -> None:
    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    def callbacks() -> list[Callback]:
        return [
            HyperparameterSchedule("momentum", {0: 0.5, 3: 0.9, "100%": 0.1}),
            HyperparameterSchedule("weight_decay", {"70%": 0.0, -1: 0.5}),  # the checkpoint says 0
            Save(),
        ]

    options = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    straight, second = Taken("weight_decay"), Taken("weight_decay")
    module, again = regression(straight), regression(second, seed=9)
    end = fit(module, callbacks=callbacks(), **options)
    resumed = fit(again, callbacks=callbacks(), ckpt_path=str(tmp_path / "half.ckpt"), **options)
    assert second.steps == straight.steps[len(straight.steps) // 2 :]
    assert torch.equal(weights(module), weights(again))
    saved, once_more = end.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()
    assert saved["param_groups"] == once_more["param_groups"]
    assert saved["param_groups"][0]["momentum"] == 0.1
    assert saved["param_groups"][0]["weight_decay"] == 0.5


def test_a_checkpoint_amid_the_schedule(regression: Module, fit: Fit, tmp_path: Path) -> None:
    """With validation amid an epoch, and against what the checkpoint says."""

    class Save(Callback):
        def on_validation_end(self, trainer: Trainer, *_: object) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    points: dict[int | str, float] = {0: 0.5, -1: 0.9}
    schedule = partial(HyperparameterSchedule, "momentum", points)
    options = {"max_epochs": 2, "val_check_interval": 5, "limit_val_batches": 1}
    straight, second = Taken("momentum"), Taken("momentum")
    module, again = regression(straight), regression(second, seed=9)
    fit(module, callbacks=[schedule(), Save()], **options)
    saved = torch.load(tmp_path / "half.ckpt", weights_only=True)
    for group in saved["optimizer_states"][0]["param_groups"]:
        group["momentum"] = 0.123
    torch.save(saved, tmp_path / "half.ckpt")
    fit(again, callbacks=[schedule()], ckpt_path=str(tmp_path / "half.ckpt"), **options)
    name = next(iter(straight.steps[0]))
    assert second.of(name) == straight.of(name)[5:]


def test_a_step_that_a_scaler_skips_is_counted(overflowing: Any, scaled: Any, fit: Fit) -> None:
    """As the learning-rate schedules of Lightning count it."""
    taken = Taken("momentum")
    fit(overflowing(taken), callbacks=[HyperparameterSchedule("momentum", {0: 0.9, -1: 0.0})], plugins=[scaled()])
    values = taken.of(next(iter(taken.steps[0])))
    assert values == pytest.approx([0.9, *(0.9 - 0.1 * step for step in range(2, 10))], abs=1e-12)


def test_several_optimizers_by_hand(adversaries: Any, fit: Fit) -> None:
    """Steps are those of both, as max_steps counts them."""
    turns: list[int] = []
    taken: list[float] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
            turns.append(trainer.optimizers.index(optimizer))
            taken.append(optimizer.param_groups[0]["momentum"])

    schedule = HyperparameterSchedule("momentum", {0: 0.9, -1: 0.2})
    fit(adversaries(lambda groups, _: muon(groups)), callbacks=[schedule, Look()], max_steps=8)
    assert turns == [0, 1] * 4
    assert taken == pytest.approx([0.9 - 0.1 * step for step in range(8)])


@pytest.mark.parametrize("schedule_first", [True, False])
def test_a_limit_of_the_weights_goes_with_a_schedule_of_the_decay(
    regression: Module, fit: Fit, schedule_first: bool
) -> None:
    """Within the step, the larger decay of the two counts; between steps the group has that of the schedule."""
    inside: list[float] = []

    class Look(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
            inside.append(optimizer.param_groups[0]["weight_decay"])

    taken = Taken("weight_decay")
    limit = AutoWeightDecay(limit=1e-3, weight_decay=0.25, ramp_steps=1, horizon=0, smoothing=0.0, every_n_steps=1)
    schedule = HyperparameterSchedule("weight_decay", {0: 0.5, -1: 0.05})
    both = [schedule, limit] if schedule_first else [limit, schedule]
    values = first_group(fit, regression(taken), taken, callbacks=[*both, Look()])
    line = [0.5 - 0.05 * step for step in range(10)]
    assert values == pytest.approx(line)
    assert inside == pytest.approx([max(value, 0.25) for value in line])


def test_a_quick_run_tries_the_first_value(regression: Module, fit: Fit) -> None:
    taken = Taken("momentum")
    schedule = HyperparameterSchedule("momentum", {0: 0.5, 300: 0.9, -50: 0.9})
    assert first_group(fit, regression(taken), taken, callbacks=[schedule], fast_dev_run=2) == [0.5, 0.5]
