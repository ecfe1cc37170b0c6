"""Arguments of HyperparameterSchedule: what is refused, and how the command line and the docs give them."""

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR, SequentialLR
from torch.utils.data import IterableDataset

from lightning_muon.callbacks import AutoWeightDecay, HyperparameterSchedule
from lightning_muon.optim import MuonAdamW

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

DOCS = Path(__file__).parents[2] / "docs" / "choosing-a-method.md"
SECTION = DOCS.read_text().split("## Schedules for momentum and weight decay")[1].split("\n## ")[0]

muon = partial(MuonAdamW, lr=0.02, weight_decay=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lr", {0: 0.1}), "hyperparameter is 'lr', which learning-rate schedulers set.*configure_optimizers"),
        (("initial_lr", {0: 0.1}), "hyperparameter is 'initial_lr', which learning-rate schedulers set"),
        (("momentum", {}), "points must map places in the run to values"),
        (("momentum", [0.1]), r"points must map places in the run to values.*got \[0.1\]"),
        (("momentum", {0: 1.0}), r"points\[0\] must be a number from 0 on and below 1, got 1.0"),
        (("beta2", {0: 0.9, -1: -0.1}), r"points\[-1\] must be a number from 0 on and below 1, got -0.1"),
        (("weight_decay", {"5%": math.inf}), r"points\['5%'\] must be a number from 0 on and finite, got inf"),
        (("weight_decay", {0: math.nan}), r"points\[0\] must be a number from 0 on"),
        (("weight_decay", {0: "much"}), r"points\[0\] must be a number from 0 on and finite, got 'much'"),
        (("weight_decay", {0: True}), r"points\[0\] must be a number from 0 on and finite, got True"),
        (("momentum", {0.5: 0.9}), "points has the place 0.5: write a step such as 300, .* such as '80%'"),
        (("momentum", {"120%": 0.9}), "points has the place '120%'"),
        (("momentum", {"half": 0.9}), "points has the place 'half'"),
        (("momentum", {0: 0.9}, "muon"), "groups must be a list of patterns .*got 'muon'"),
        (("momentum", {0: 0.9}, []), "groups must be a list of patterns"),
    ],
)
def test_bad_arguments_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"^HyperparameterSchedule: {message}"):
        HyperparameterSchedule(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("momemtum", {0: 0.9}),
            "no parameter group has a hyperparameter 'momemtum'.* there are .*momentum.*beta1, beta2",
        ),
        (("nesterov", {0: 0.9}), "no parameter group has a hyperparameter 'nesterov' that is a number"),
        (("params", {0: 0.9}), "no parameter group has a hyperparameter 'params' that is a number"),
        (("neuron_beta", {0: 0.9}), r"neuron_beta is turned off \(null\) in \w+: give the optimizer a value"),
        (("momentum", {0: 0.9}, ["embeding"]), "groups has the pattern 'embeding', which matches no name. There are"),
        (("momentum", {0: 0.9}, ["adamw"]), "groups has the pattern 'adamw', which matches no name"),  # no effect there
        (("momentum", {0: 0.9, 10: 0.95}), "points has 10, but the run has 10 steps, 0 to 9"),
        (("momentum", {-11: 0.9}), "points has -11, but the run has 10 steps"),
        (
            ("momentum", {5: 0.9, -5: 0.95}),
            "must increase .* in this run of 10 steps -5 is step 5 and 5 before it step 5",
        ),
        (("momentum", {"90%": 0.9, 4: 0.95}), "4 is step 4 and 90% before it step 8.1"),
    ],
)
def test_runs_are_refused_at_their_start(regression: Module, fit: Fit, arguments: Any, message: str) -> None:
    module = regression(muon)
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, callbacks=[HyperparameterSchedule(*arguments)])
    assert module.losses == []


def test_groups_without_decay_must_be_named(regression: Module, fit: Fit) -> None:
    schedule = partial(HyperparameterSchedule, "weight_decay", {0: 0.5})
    without = partial(MuonAdamW, weight_decay=0.0)
    with pytest.raises(MisconfigurationException, match=r"weight_decay is 0 in all groups.*name in groups"):
        fit(regression(without), callbacks=[schedule()])
    trainer = fit(regression(without), callbacks=[schedule(groups=["muon"])])
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize("key", ["momentum", "neuron_beta", "eps", "weight_decay", "beta1", "beta2"])
@pytest.mark.parametrize("value", [-0.1, 0.0, 0.999, 1.0, 2.0])
def test_the_range_is_that_of_the_optimizer(key: str, value: float) -> None:
    option: dict[str, Any] = {"beta1": {"betas": (value, 0.9)}, "beta2": {"betas": (0.9, value)}}.get(key, {key: value})
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))], "algorithm": "adamw"}

    def is_refused(make: Callable[[], object]) -> bool:
        try:
            make()
        except (ValueError, MisconfigurationException):
            return True
        return False

    schedule = partial(HyperparameterSchedule, key, {0: value})
    assert is_refused(schedule) == is_refused(partial(MuonAdamW, [group], **option))


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_epochs": 3}])
def test_a_run_without_an_end(regression: Module, fit: Fit, options: dict[str, Any]) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            while True:
                yield [torch.ones(8, 8), torch.ones(8, 4)]

    loader = torch.utils.data.DataLoader(Endless(), batch_size=None)
    with pytest.raises(
        MisconfigurationException, match=r"points has -5, but the number of steps .*set trainer.max_steps"
    ):
        fit(
            regression(muon),
            train_dataloaders=loader,
            callbacks=[HyperparameterSchedule("momentum", {0: 0.9, -5: 0.5})],
            **options,
        )
    with pytest.raises(MisconfigurationException, match="must increase from place to place, but 4 is step 4 and 9"):
        fit(
            regression(muon),
            train_dataloaders=loader,
            callbacks=[HyperparameterSchedule("momentum", {9: 0.9, 4: 0.5})],
            **options,
        )


def test_by_hand_the_end_is_known_by_max_steps_alone(adversaries: Any, fit: Fit) -> None:
    with pytest.raises(MisconfigurationException, match=r"points has 100%, but the number of steps .*max_steps"):
        fit(
            adversaries(lambda groups, _: muon(groups)),
            callbacks=[HyperparameterSchedule("momentum", {0: 0.9, "100%": 0.5})],
            max_epochs=1,
        )


def scheduled(groups: Any, make: Callable[..., Any]) -> Any:
    optimizer = muon(groups)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step"}}


one_cycle = partial(OneCycleLR, max_lr=0.1, total_steps=20)
cyclic = partial(CyclicLR, base_lr=0.1, max_lr=0.2)


@pytest.mark.parametrize("hyperparameter", ["momentum", "beta1"])
@pytest.mark.parametrize(
    "make", [one_cycle, cyclic, lambda o: SequentialLR(o, [cyclic(o), cyclic(o, cycle_momentum=False)], [5])]
)
def test_a_scheduler_that_cycles_the_momentum(
    regression: Module, fit: Fit, make: Callable[..., Any], hyperparameter: str
) -> None:
    schedule = HyperparameterSchedule(hyperparameter, {0: 0.9})
    with pytest.raises(
        MisconfigurationException, match=f"LR cycles {hyperparameter} too. Give it cycle_momentum=False"
    ):
        fit(regression(partial(scheduled, make=make)), callbacks=[schedule])
    free = partial(scheduled, make=partial(one_cycle, cycle_momentum=False))
    fit(regression(free), callbacks=[HyperparameterSchedule(hyperparameter, {0: 0.9})], max_steps=1)
    both = partial(scheduled, make=make)
    fit(regression(both), callbacks=[HyperparameterSchedule("weight_decay", {0: 0.9})], max_steps=1)


def test_two_schedules_of_one_thing(regression: Module, fit: Fit) -> None:
    first = HyperparameterSchedule("weight_decay", {0: 0.5})
    with pytest.raises(
        MisconfigurationException, match=r"two schedules set weight_decay of .*give them different groups"
    ):
        fit(regression(muon), callbacks=[first, HyperparameterSchedule("weight_decay", {0: 0.1}, groups=["*"])])
    apart = [HyperparameterSchedule("weight_decay", {0: 0.5}, groups=[name]) for name in ("muon", "adamw")]
    fit(regression(muon), callbacks=apart, max_steps=1)


def test_a_decay_that_is_computed(regression: Module, fit: Fit) -> None:
    for target in (0.2, "bf16"):
        steered = [AutoWeightDecay(target_rms=target), HyperparameterSchedule("weight_decay", {0: 0.5})]
        with pytest.raises(
            MisconfigurationException, match=r"AutoWeightDecay\(target_rms=.*computes the weight_decay of"
        ):
            fit(regression(muon), callbacks=steered)
    others = HyperparameterSchedule("weight_decay", {0: 0.5}, groups=["adamw"])
    fit(regression(muon), callbacks=[AutoWeightDecay(target_rms=0.2), others], max_steps=1)


def test_the_command_line_gives_what_python_gives() -> None:
    parser = LightningArgumentParser(parser_mode="omegaconf+")
    parser.add_subclass_arguments(HyperparameterSchedule, "callback")
    argument = "--callback.init_args.points={0: 0.85, 300: 0.95, '-50': 0.95, 100%: 8.5e-1}"
    given = ["--callback=HyperparameterSchedule", "--callback.init_args.hyperparameter=momentum", argument]
    callback = parser.instantiate_classes(parser.parse_args(given)).callback
    python = HyperparameterSchedule("momentum", {0: 0.85, 300: 0.95, -50: 0.95, "100%": 0.85})
    assert str(callback) == str(python) == "momentum: 0: 0.85, 300: 0.95, -50: 0.95, 100%: 0.85"


def test_the_example_in_the_docs(regression: Module, fit: Fit) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", SECTION, re.DOTALL)
    entries = yaml.safe_load(example)["trainer"]["callbacks+"]
    assert {entry["class_path"] for entry in entries} == {"lightning_muon.callbacks.HyperparameterSchedule"}
    schedules = [HyperparameterSchedule(**entry["init_args"]) for entry in entries]
    seen: list[tuple[float, float]] = []

    def watched(groups: list[dict[str, Any]]) -> MuonAdamW:
        optimizer = muon(groups)
        optimizer.register_step_pre_hook(
            lambda *_: seen.append((optimizer.param_groups[0]["momentum"], optimizer.param_groups[0]["weight_decay"]))
        )
        return optimizer

    fit(regression(watched), callbacks=schedules, max_epochs=-1, max_steps=401)
    expected = {
        0: (0.85, 0.1),
        150: (0.9, 0.1),
        320: (0.95, 0.1),
        360: (0.95, 0.05),
        390: (0.9, 0.0125),
        400: (0.85, 0.0),
    }
    for step, values in expected.items():
        assert seen[step] == pytest.approx(values)
