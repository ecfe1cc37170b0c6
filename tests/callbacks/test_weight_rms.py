"""Weight RMS, largest entry and bf16 headroom, against float64 on the weights themselves."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_muon.callbacks import (
    AutoWeightDecay,
    GradientMonitor,
    OrthogonalityMonitor,
    UpdateRMSMonitor,
    WeightRMSMonitor,
)
from lightning_muon.callbacks.shards import entry_norms, largest_entries
from lightning_muon.callbacks.weight_rms import bf16_spacing, doublings_to_overflow
from lightning_muon.optim import MuonAdamW
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]
Module = Callable[..., LightningModule]
QUANTITIES = ("weight_rms", "weight_absmax", "bf16_headroom", "lost_updates", "doublings_to_overflow")
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


def measured_in(trainer: Trainer, quantity: str) -> set[str]:
    """The matrices whose value of a quantity was logged."""
    names = (name.removeprefix(f"{quantity}/") for name in watched(trainer) if name.startswith(f"{quantity}/"))
    return {name for name in names if name not in {"max", "mean", "min"}}


def rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values(regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, accumulate: int) -> None:
    snapshots = Snapshots()
    monitor = WeightRMSMonitor(every_n_steps=2, per_parameter=True, as_if_bf16=True)
    module = regression(partial(MuonAdamW, lr=0.02))
    trainer = fit(module, callbacks=[snapshots, monitor], logger=tensorboard, accumulate_grad_batches=accumulate)
    scalars = events(trainer).scalars()

    measured_steps = [step for step in range(10 // accumulate) if (step + 1) % 2 == 0]
    for name in MATRICES:
        assert [step for step, _ in scalars[f"weight_rms/{name}"]] == measured_steps
        for (step, value), (_, largest), (_, headroom), (_, lost), (_, room) in zip(
            *(scalars[f"{quantity}/{name}"] for quantity in QUANTITIES), strict=True
        ):
            old, new = snapshots.weights[step][name], snapshots.weights[step + 1][name]
            assert value == pytest.approx(rms(new), rel=1e-5)
            assert largest == pytest.approx(float(new.abs().max()), rel=1e-5)
            spacing = 2.0 ** (torch.tensor(rms(old)).log2().floor().item() - 7)
            assert headroom == pytest.approx(rms(new - old) / spacing, rel=1e-3)
            assert room == pytest.approx(math.log2(float(torch.finfo(torch.bfloat16).max / new.abs().max())), rel=1e-6)
            stays = (old.bfloat16().double() + (new - old)).bfloat16() == old.bfloat16()
            assert lost == pytest.approx(float(stays.double().mean()), abs=1.01 / stays.numel())
    for quantity in QUANTITIES:
        values = [[value for _, value in scalars[f"{quantity}/{name}"]] for name in MATRICES]
        for kind, reduce in (("max", max), ("min", min), ("mean", lambda pair: sum(pair) / 2)):
            expected = [reduce(pair) for pair in zip(*values, strict=True)]
            assert [value for _, value in scalars[f"{quantity}/{kind}"]] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [1.0, 1.5, 1.9921875, 0.05, 3e-5, 700.0])
def test_bf16_spacing_is_the_distance_to_the_next_number(value: float) -> None:
    number = torch.tensor([value]).bfloat16()
    following = (number.view(torch.int16) + 1).view(torch.bfloat16)
    assert bf16_spacing(number.item()) == following.item() - number.item()


def test_in_bf16_lost_updates_are_seen(regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder) -> None:
    """Weights of size one in bfloat16 do not move by 1e-4 at all; in float32 they do, by a fraction of the spacing."""
    found, moved = {}, {}
    for precision in ("32-true", "bf16-true"):
        module = regression(partial(MuonAdamW, lr=5e-4, weight_decay=0.0))
        for name in MATRICES:
            torch.nn.init.ones_(module.get_parameter(name))
        trainer = fit(module, precision=precision, callbacks=[WeightRMSMonitor(as_if_bf16=True)])
        found[precision] = {quantity: float(watched(trainer)[f"{quantity}/max"]) for quantity in QUANTITIES}
        warned = [str(one.message) for one in recwarn if "has rounded away" in str(one.message)]
        assert len(warned) == (precision == "bf16-true")
        moved[precision] = [bool((module.get_parameter(name) != 1.0).any()) for name in MATRICES]
    assert moved == {"32-true": [True, True], "bf16-true": [False, False]}
    assert found["bf16-true"]["bf16_headroom"] == 0.0
    assert 0.0 < found["32-true"]["bf16_headroom"] < 0.5
    # What float32 says that bfloat16 would lose, it loses.
    assert found["bf16-true"]["lost_updates"] == found["32-true"]["lost_updates"] == 1.0
    assert "the fraction of the update that bfloat16 has rounded away is 1 in net." in warned[0]
    assert "and 1 more, over max_lost_updates=0.5. Keep the weights in float32" in warned[0]


def test_no_warning_where_a_schedule_ends(regression: Module, fit: Fit, recwarn: pytest.WarningsRecorder) -> None:
    """There every run in bfloat16 loses its updates, and nothing is wrong."""

    def late(groups: Any) -> torch.optim.Optimizer:
        optimizer = MuonAdamW(groups, lr=5e-4, weight_decay=0.0)
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.02  # a schedule sets it
        return optimizer

    module = regression(late)
    for name in MATRICES:
        torch.nn.init.ones_(module.get_parameter(name))
    trainer = fit(module, precision="bf16-true", callbacks=[WeightRMSMonitor()])
    assert float(watched(trainer)["lost_updates/max"]) == 1.0
    assert not [one for one in recwarn if "has rounded away" in str(one.message)]


def test_the_sample_is_bounded_and_the_rest_is_still_measured(regression: Module, fit: Fit) -> None:
    monitor = WeightRMSMonitor(sample=1, per_parameter=True, as_if_bf16=True)
    trainer = fit(regression(MuonAdamW), callbacks=[monitor])
    names = [name for name in watched(trainer) if name.startswith("bf16_headroom/net")]
    assert len(names) == 1
    assert {f"weight_rms/{name}" for name in MATRICES} <= set(watched(trainer))


@pytest.mark.parametrize("make", [torch.optim.AdamW, partial(torch.optim.SGD, lr=0.1)])
def test_other_optimizers_are_measured_on_the_same_matrices(regression: Module, fit: Fit, make: Any) -> None:
    trainer = fit(regression(make), callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)])
    assert {f"weight_rms/{name}" for name in MATRICES} <= set(watched(trainer))


def test_any_logger_or_none(regression: Module, fit: Fit, tmp_path: Any, tensorboard: TensorBoardLogger) -> None:
    csv = CSVLogger(tmp_path)
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(as_if_bf16=True)], logger=[csv, tensorboard])
    assert any("weight_rms/max" in row for row in csv.experiment.metrics) or "weight_rms/max" in (
        (tmp_path / csv.name / "version_0" / "metrics.csv").read_text()
    )
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(as_if_bf16=True)], fast_dev_run=True)
    fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(as_if_bf16=True)], logger=False)


@pytest.mark.parametrize(("argument", "value"), [("every_n_steps", 0), ("sample", 0)])
def test_bad_arguments_are_named(argument: str, value: int) -> None:
    with pytest.raises(MisconfigurationException, match=f"WeightRMSMonitor: {argument} must be at least 1, got 0"):
        WeightRMSMonitor(**{argument: value})


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_precisions(regression: Module, fit: Fit, precision: str) -> None:
    module = regression(MuonAdamW)
    trainer = fit(module, precision=precision, callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)])
    for name in MATRICES:
        weight = module.get_parameter(name).detach().double()
        assert float(watched(trainer)[f"weight_rms/{name}"]) == pytest.approx(rms(weight), rel=1e-5)
        assert float(watched(trainer)[f"weight_absmax/{name}"]) == pytest.approx(float(weight.abs().max()))


def test_matrices_of_several_precisions_and_none() -> None:
    tensors = [torch.randn(3, 5).bfloat16(), torch.randn(4, 4).double(), torch.randn(2, 7), torch.randn(5, 2).half()]
    expected = torch.tensor([float(tensor.double().norm()) for tensor in tensors])
    torch.testing.assert_close(entry_norms(tensors), expected, rtol=1e-6, atol=0)
    largest = torch.tensor([float(tensor.double().abs().max()) for tensor in tensors])
    torch.testing.assert_close(largest_entries(tensors), largest, rtol=1e-6, atol=0)
    for measure in (entry_norms, largest_entries):
        assert measure([]).tolist() == []
    assert entry_norms([torch.empty(0, 3), torch.ones(4)]).tolist() == [0.0, 2.0]
    assert largest_entries([torch.empty(0, 3), -torch.ones(4)]).tolist() == [0.0, 1.0]
    assert math.isnan(largest_entries([torch.tensor([1.0, math.nan])]))


def test_room_of_what_is_not_a_size() -> None:
    assert doublings_to_overflow(0.0) == math.inf
    assert doublings_to_overflow(math.inf) == -math.inf
    assert math.isnan(doublings_to_overflow(math.nan))


def test_a_small_float64_matrix_keeps_its_size(regression: Module, fit: Fit) -> None:
    """Squares of 1e-30 are below float32."""
    module = regression(partial(torch.optim.AdamW, lr=0.0))
    for name in MATRICES:
        torch.nn.init.constant_(module.get_parameter(name), 1e-30)
    trainer = fit(module, precision="64-true", callbacks=[WeightRMSMonitor(as_if_bf16=True)])
    assert float(watched(trainer)["weight_rms/max"]) == pytest.approx(1e-30)


def test_an_empty_matrix_is_left_out(regression: Module, fit: Fit) -> None:
    class WithEmpty(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.empty, self.head = nn.Linear(0, 4), nn.Linear(4, 1)

    trainer = fit(WithEmpty(), callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)])
    assert measured_in(trainer, "weight_absmax") == {*MATRICES, "net.4.weight"}


def test_headroom_is_for_matrices_that_can_move(regression: Module, fit: Fit) -> None:
    """A matrix of zeros has no spacing, one without gradient has no update, and one that sees none of it neither."""

    class Odd(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.unused, self.head = nn.Linear(8, 8), nn.Linear(4, 1)
            nn.init.zeros_(self.net[2].weight)

    trainer = fit(Odd(), callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)], limit_train_batches=1)
    assert measured_in(trainer, "bf16_headroom") == measured_in(trainer, "lost_updates") == {"net.4.weight"}
    assert measured_in(trainer, "weight_rms") == {*MATRICES, "net.4.weight", "unused.weight"}


@pytest.mark.parametrize(
    ("precision", "bits"), [("32-true", 32), ("bf16-mixed", 32), ("bf16-true", 16), ("64-true", 64)]
)
def test_how_the_weights_are_kept_is_logged(regression: Module, fit: Fit, precision: Any, bits: int) -> None:
    trainer = fit(
        regression(MuonAdamW), callbacks=[WeightRMSMonitor(as_if_bf16=True)], precision=precision, limit_train_batches=1
    )
    assert float(watched(trainer)["weight_bits"]) == bits


@pytest.mark.parametrize("broken", MATRICES)
def test_nan_is_seen_and_named_once(
    regression: Module, fit: Fit, broken: str, tensorboard: TensorBoardLogger, events: Any
) -> None:
    class Around(regression):  # type: ignore[valid-type,misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return self.net[4](torch.ones(2, 16)).square().mean()

    module = Around(MuonAdamW)
    with torch.no_grad():
        module.get_parameter(broken)[0, 0] = torch.nan
    monitor = WeightRMSMonitor(as_if_bf16=True)
    with pytest.warns(UserWarning, match="WeightRMSMonitor, step") as caught:
        trainer = fit(module, callbacks=[monitor], logger=tensorboard, limit_train_batches=3)
    messages = [str(one.message) for one in caught if "WeightRMSMonitor" in str(one.message)]
    assert len(messages) == 1
    assert f"step 0: weight_rms is not finite for {broken}." in messages[0]
    scalars = events(trainer).scalars()
    for kind in ("max", "mean", "min"):
        assert all(math.isnan(value) for _, value in scalars[f"weight_rms/{kind}"])
        assert len(scalars[f"weight_rms/{kind}"]) == 3
    with pytest.warns(UserWarning, match="WeightRMSMonitor, step 0"):
        fit(module, callbacks=[monitor], limit_train_batches=1)


def test_names_are_without_wrappers(regression: Module, fit: Fit) -> None:
    class Compiled(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(None)
            plain = self.net
            self.net: Any = torch.compile(plain, backend="eager")
            self.matrices = [plain[0].weight, plain[2].weight]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Muon(self.matrices)

    trainer = fit(Compiled(), callbacks=[WeightRMSMonitor(per_parameter=True, as_if_bf16=True)], limit_train_batches=1)
    assert measured_in(trainer, "weight_rms") == set(MATRICES)


def test_a_name_that_contains_that_of_a_wrapper_is_kept(regression: Module, fit: Fit) -> None:
    """Whole parts of a name are removed, not text inside them."""

    class Named(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(MuonAdamW)
            self.my_orig_mod, self.head = nn.Linear(8, 8), nn.Linear(4, 1)  # the last layer would be an output head

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            return super().training_step([self.my_orig_mod(batch[0]), batch[1]], batch_idx)

    monitor = WeightRMSMonitor(per_parameter=True, outputs=["my_orig_mod"], as_if_bf16=True)
    trainer = fit(Named(), callbacks=[monitor], limit_train_batches=1)
    assert "my_orig_mod.weight" in measured_in(trainer, "weight_rms")
    assert measured_in(trainer, "output_rms") == {"my_orig_mod"}


def test_a_matrix_of_zeros_is_not_called_broken(
    regression: Module, fit: Fit, tensorboard: TensorBoardLogger, events: Any, recwarn: pytest.WarningsRecorder
) -> None:
    """And what breaks later is: only a NaN is news."""

    class Zeros(regression):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            super().__init__(partial(MuonAdamW, lr=0.0))
            nn.init.zeros_(self.net[2].weight)

        @torch.no_grad()
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                self.net[0].weight[0, 0] = math.nan

    trainer = fit(Zeros(), callbacks=[WeightRMSMonitor(as_if_bf16=True)], logger=tensorboard)
    room = dict(events(trainer).scalars()["doublings_to_overflow/max"])
    assert 100 < room[2] < 140
    assert math.isnan(room[4])
    (said,) = [str(one.message) for one in recwarn if "WeightRMSMonitor" in str(one.message)]
    assert "step 3: weight_rms is not finite for net.0.weight" in said


def test_what_a_pattern_names_is_in_the_sample(regression: Module, fit: Fit) -> None:
    """Though a sample of one would be the first matrix."""
    for monitor in (WeightRMSMonitor, UpdateRMSMonitor, GradientMonitor):
        trainer = fit(
            regression(MuonAdamW),
            callbacks=[monitor(every_n_steps=1, sample=1, per_parameter=["net.2.weight"])],  # type: ignore[operator]
        )
        by_name = {tag for tag in watched(trainer) if tag.endswith("/net.2.weight")}
        expected = {"WeightRMSMonitor": 2, "UpdateRMSMonitor": 2, "GradientMonitor": 4}[monitor.__name__]
        assert len(by_name) == expected, monitor


@pytest.mark.parametrize("monitor", [WeightRMSMonitor, OrthogonalityMonitor, GradientMonitor, AutoWeightDecay])
def test_a_run_in_which_there_is_nothing_to_measure_is_told(regression: Module, fit: Fit, monitor: Any) -> None:
    plain = regression(lambda groups: torch.optim.AdamW([p for group in groups for p in group["params"]]))
    with pytest.warns(UserWarning, match=f"{monitor.__name__}: no parameter group has algorithm='muon', so there is"):
        fit(plain, callbacks=[monitor()])


@pytest.mark.parametrize(
    ("precision", "as_if_bf16", "is_logged"),
    [("32-true", False, False), ("bf16-mixed", False, False), ("32-true", True, True), ("bf16-true", False, True)],
)
def test_what_bf16_would_lose_is_logged_where_it_matters(
    regression: Module, fit: Fit, precision: Any, as_if_bf16: bool, is_logged: bool
) -> None:
    trainer = fit(regression(MuonAdamW), callbacks=[WeightRMSMonitor(as_if_bf16=as_if_bf16)], precision=precision)
    found = {name.partition("/")[0] for name in watched(trainer)}
    room = {"bf16_headroom", "lost_updates", "doublings_to_overflow"}
    assert found & room == (room if is_logged else set())
    assert {"weight_rms", "weight_absmax", "weight_bits"} <= found
