"""The RMS of layers' outputs, against float64 on what the layers returned; and what is told when a limit is passed."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_muon.callbacks import OrthogonalityMonitor, WeightRMSMonitor
from lightning_muon.callbacks.limits import Limit
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]

LAYERS = ("net.1", "net.2", "net.4")


class Outputs(Callback):
    """The RMS of the layers' outputs in each forward pass of training, in float64, and how many hooks they have."""

    def __init__(self) -> None:
        self.rms: dict[str, list[float]] = {name: [] for name in LAYERS}
        self.hooks: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name in LAYERS:
            pl_module.get_submodule(name).register_forward_hook(
                lambda layer, _, output, name=name: (
                    self.rms[name].append(float(output.double().square().mean().sqrt())) if layer.training else None
                )
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self.hooks.append(sum(len(layer._forward_hooks) for layer in pl_module.modules()))


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_values(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, accumulate: int, precision: str
) -> None:
    """Of the last of two accumulated batches; between the steps that log, no hook is there."""
    expected = Outputs()
    monitor = WeightRMSMonitor(every_n_steps=2, per_parameter=True, outputs=["net.[24]", "net.1"])
    trainer = fit(
        regression(MuonAdamW),
        callbacks=[monitor, expected],
        logger=tensorboard,
        accumulate_grad_batches=accumulate,
        precision=precision,
        limit_val_batches=2,
    )
    scalars = events(trainer).scalars()
    steps = range(1, 10 // accumulate, 2)
    for name in LAYERS:
        outputs = [expected.rms[name][(step + 1) * accumulate - 1] for step in steps]
        assert [step for step, _ in scalars[f"output_rms/{name}"]] == list(steps)
        assert [value for _, value in scalars[f"output_rms/{name}"]] == pytest.approx(outputs, rel=1e-5)
    largest = [max(expected.rms[name][(step + 1) * accumulate - 1] for name in LAYERS) for step in steps]
    assert [value for _, value in scalars["output_rms/max"]] == pytest.approx(largest, rel=1e-5)
    assert expected.hooks == [3] * 10


@pytest.mark.parametrize("turns", [1, 2])
def test_outputs_are_measured_without_muon(regression: Module, fit: Fit, turns: int) -> None:
    """They have nothing to do with it; that nothing else is measured is told."""
    whole = regression(lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]]))
    expected = Outputs()
    with pytest.warns(UserWarning, match=r"only outputs are measured: no parameter group has algorithm='muon'"):
        trainer = fit(whole, callbacks=[WeightRMSMonitor(outputs=["net.2"]), expected], accumulate_grad_batches=turns)
    assert {tag for tag in watched(trainer) if tag.startswith(("weight_", "output_"))} == {
        f"output_rms/{kind}" for kind in ("max", "mean", "min")
    }
    assert float(watched(trainer)["output_rms/max"]) == pytest.approx(expected.rms["net.2"][-1], rel=1e-5)


def test_a_module_called_mean_is_not_the_mean(regression: Module, fit: Fit) -> None:
    """As autoencoders call theirs."""

    class Named(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.mean = nn.Linear(4, 4)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss: Tensor = self.mean(self.net(batch[0])).square().mean()
            return loss

    monitor = WeightRMSMonitor(outputs=["mean", "net.2"], per_parameter=True)
    found = watched(fit(Named(), callbacks=[monitor]))
    one, other = (float(found[f"output_rms/{name}"]) for name in (".mean", "net.2"))
    assert float(found["output_rms/mean"]) == pytest.approx((one + other) / 2)
    assert one != pytest.approx(other)


def test_modules_are_measured_only_when_asked_for(regression: Module, fit: Fit) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor()])
    assert not [tag for tag in watched(trainer) if tag.startswith("output_rms")]
    trainer = fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(outputs=["net.*"])])
    found = [tag for tag in watched(trainer) if tag.startswith("output_rms")]
    assert sorted(found) == ["output_rms/max", "output_rms/mean", "output_rms/min"]


def test_the_first_tensor_of_floating_point_counts(regression: Module, fit: Fit) -> None:
    """Of whatever a module returns; a module that did not run, or returns none, has no value."""

    class Part(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"index": torch.arange(3), "nested": [None, x, 100.0 * x]}

    class Counter(nn.Module):
        def forward(self, x: Tensor) -> int:
            return len(x)

    class Odd(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.part, self.counter, self.unused = Part(), Counter(), nn.Linear(2, 2)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            assert self.counter(batch[0]) == 8
            self.part(torch.full((2, 3), -2.0))
            return super().training_step(batch, batch_idx)

    monitor = WeightRMSMonitor(per_parameter=True, outputs=["part", "counter", "unused"])
    trainer = fit(Odd(), callbacks=[monitor], limit_train_batches=2)
    found = {tag: float(v) for tag, v in watched(trainer).items() if tag.startswith("output_rms/")}
    assert found == dict.fromkeys(("output_rms/part", "output_rms/max", "output_rms/mean", "output_rms/min"), 2.0)


@pytest.mark.parametrize("way", ["in place", "wrapped"])
def test_what_is_compiled_as_a_whole_cannot_be_heard(regression: Module, fit: Fit, way: str) -> None:
    """It is said which, and the rest is measured."""

    class Compiled(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.after = nn.Identity()
            if way == "in place":
                self.net.compile(backend="eager")
            else:
                self.net: Any = torch.compile(self.net, backend="eager")

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.after(super().training_step(batch, batch_idx))

    monitor = WeightRMSMonitor(per_parameter=True, outputs=["net.2", "after"])
    with pytest.warns(UserWarning, match=r"torch\.compile has made net\.2 part of a larger whole"):
        trainer = fit(Compiled(), callbacks=[monitor])
    found = {tag for tag in watched(trainer) if tag.startswith("output_rms/")}
    assert found == {f"output_rms/{what}" for what in ("after", "max", "mean", "min")}


class Residual(nn.Module):
    """Two blocks, each with a list of its own, and a layer that is alone in its list."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2)]
        self.lists = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "alone": nn.ModuleList([nn.Linear(8, 8)])})

    def forward(self, x: Tensor) -> Tensor:
        for block in self.lists["blocks"]:
            x = x + block(x)
        outputs: Tensor = self.lists["alone"][0](x)
        return outputs


def test_blocks_are_the_repeated_layers(regression: Module, fit: Fit) -> None:
    module = regression(MuonAdamW)
    module.net = nn.Sequential(Residual(), module.net)
    trainer = fit(module, callbacks=[WeightRMSMonitor(outputs="blocks", per_parameter=True)])
    found = {tag.partition("/")[2] for tag in watched(trainer) if tag.startswith("output_rms/")}
    layers = {"net.1.0", "net.1.2", "net.1.4"}
    assert found == {"max", "mean", "min", "net.0.lists.blocks.0", "net.0.lists.blocks.1"} | layers


def test_a_model_may_have_no_blocks(regression: Module, fit: Fit) -> None:
    module = regression(MuonAdamW)
    module.net = nn.Sequential(nn.Linear(8, 4))
    message = r"outputs is 'blocks', but no list of the model repeats a layer, .* there are net, net\.0"
    with pytest.warns(UserWarning, match=message):
        trainer = fit(module, callbacks=[WeightRMSMonitor(outputs="blocks")])
    assert not [tag for tag in watched(trainer) if tag.startswith("output_rms/")]


def test_a_pattern_of_parameters_that_matches_nothing_is_refused(regression: Module, fit: Fit) -> None:
    message = r"per_parameter has the pattern 'net\.7\.\*', .*There are net\.[02]\.weight, net\.[02]"
    with pytest.raises(MisconfigurationException, match=f"WeightRMSMonitor: {message}"):
        fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(per_parameter=["net.7.*"])])


def test_outputs_that_match_nothing_are_told_and_the_others_measured(regression: Module, fit: Fit) -> None:
    message = r"WeightRMSMonitor: outputs has the pattern 'blocks\.\*', which matches no name\. There are net\."
    with pytest.warns(UserWarning, match=message) as told:
        trainer = fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(outputs=["net.0", "blocks.*"])])
    assert sum("blocks" in str(warning.message) for warning in told) == 1
    assert watched(trainer)["output_rms/max"] > 0


@pytest.mark.parametrize("argument", ["outputs", "per_parameter"])
@pytest.mark.parametrize("value", ["net.*", [3]])
def test_patterns_are_a_list(argument: str, value: Any) -> None:
    with pytest.raises(MisconfigurationException, match=f"WeightRMSMonitor: {argument} must be true, false or a list"):
        WeightRMSMonitor(**{argument: value})


@pytest.mark.parametrize("monitor", [WeightRMSMonitor, OrthogonalityMonitor])
def test_parameters_are_chosen_by_pattern(regression: Module, fit: Fit, monitor: Any) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[monitor(per_parameter=["net.2.*"])])
    by_name = {tag.partition("/")[2] for tag in watched(trainer)} - {"max", "mean", "min", "loss", ""}
    assert by_name - {"net"} == {"net.2.weight"}  # the operator is net at depth 2


@pytest.mark.parametrize("monitor", [WeightRMSMonitor, OrthogonalityMonitor])
def test_two_of_a_kind_are_refused(regression: Module, fit: Fit, monitor: Any) -> None:
    message = f"{monitor.__name__} is in the trainer's callbacks more than once"
    with pytest.raises(MisconfigurationException, match=message):
        fit(regression(MuonAdamW), callbacks=[monitor(), monitor(every_n_steps=3)])


LIMITS = ("max_weight_rms", "max_output_rms", "max_lost_updates", "min_doublings_to_overflow")


@pytest.mark.parametrize("argument", LIMITS)
def test_a_negative_limit_is_refused(argument: str) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"WeightRMSMonitor: {argument} must be at least 0 and finite, or null"
    ):
        WeightRMSMonitor(**{argument: -1.0})


@pytest.mark.parametrize(
    ("argument", "bound", "message"),
    [
        ("max_weight_rms", 3.0, r"the weight RMS is 4 in net\.2\.weight, over max_weight_rms=3\. Raise weight_decay"),
        ("max_output_rms", 1e-3, r"the output RMS is .* in net\.[04] and 1 more, over max_output_rms=0\.001\."),
        (
            "min_doublings_to_overflow",
            127.0,
            r"doublings .* is 126 in net\.2\.weight, under min_doublings_to_overflow=127\.",
        ),
    ],
)
def test_a_limit_that_is_passed_is_told_once(
    regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder, argument: str, bound: float, message: str
) -> None:
    module = regression(lambda groups: MuonAdamW(groups, lr=0.0))
    torch.nn.init.constant_(module.net[2].weight, 4.0)
    arguments = {"outputs": ["net.[04]"], argument: bound}
    fit(module, callbacks=[WeightRMSMonitor(**arguments)])
    (said,) = [str(one.message) for one in recwarn if f"{argument}=" in str(one.message)]
    assert re.search(message, said), said


def test_a_limit_names_the_farthest_beyond_and_keeps_silent_below(regression: Module, fit: Fit) -> None:
    limit = Limit("Monitor", "max_size", 2.0, "the size", "Do something.")
    trainer = fit(regression(MuonAdamW), limit_train_batches=1)
    limit.watch(trainer, {"a": 1.0, "b": 2.0, "c": float("nan")})
    assert not limit.told
    with pytest.warns(UserWarning, match=r"the size is 9 in b and 1 more, over max_size=2\. Do something\."):
        limit.watch(trainer, {"a": 3.0, "b": 9.0})
    assert limit.told


def test_no_hook_stays_for_an_optimizer_that_rests(adversaries: Module, fit: Fit) -> None:
    """The second never steps and stays due; outputs are measured beside the first."""
    hooks: list[int] = []

    class Count(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            hooks.append(sum(len(layer._forward_hooks) for layer in pl_module.modules()))

    module = adversaries(lambda groups, _: MuonAdamW(groups), lambda _: (1, 0))
    fit(module, callbacks=[WeightRMSMonitor(4, outputs=["generator.*"]), Count()])
    assert [step for step, count in enumerate(hooks) if count] == [3, 7]


def test_a_module_that_is_compiled_itself_cannot_be_heard(regression: Module, fit: Fit) -> None:
    class Plain(regression):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

    module: Any = torch.compile(Plain(MuonAdamW), backend="eager")
    with pytest.warns(UserWarning, match=r"torch\.compile has made net\.2 part of a larger whole"):
        fit(module, callbacks=[WeightRMSMonitor(outputs=["net.2"])])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightRMSMonitor(every_n_steps="5"), "every_n_steps must be a whole number or null, got '5'"),  # type: ignore[arg-type]
        (lambda: WeightRMSMonitor(sample=2.5), "sample must be a whole number, got 2.5"),  # type: ignore[arg-type]
        (lambda: WeightRMSMonitor(outputs=None), "outputs must be true, false or a list"),  # type: ignore[arg-type]
        (lambda: WeightRMSMonitor(max_weight_rms="1"), "max_weight_rms must be at least 0 and finite, or null"),  # type: ignore[arg-type]
    ],
)
def test_arguments_of_another_type_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"WeightRMSMonitor: {message}"):
        make()
