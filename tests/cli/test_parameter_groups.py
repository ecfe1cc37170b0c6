"""Learning rates by role on the command line, and checkpoints whose parameters were grouped otherwise."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from lightning_muon.cli import MuonCLI, main
from lightning_muon.optim import route_parameters
from tests.cli.conftest import TinyData, TinyModule
from tests.earlier_groups import earlier_groups

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

MUON = ["--model.optimizer", "MuonAdamW", "--model.optimizer.lr", "0.02", "--model.optimizer.adamw_lr", "0.005"]
RESTARTS = ["--model.lr_scheduler", "CosineAnnealingWarmRestarts", "--model.lr_scheduler.T_0", "3"]
CONSTANT = ["--model.lr_scheduler", "null"]
SAVING = ["--config", "checkpoints.yaml"]


class Routed(TinyModule):
    """With a parameter of each usual role; ``earlier`` groups them as version 0.1 did."""

    earlier = False

    def __init__(self, *args: Any, lr_by_role: dict[str, float] | None = None, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lr_by_role = lr_by_role
        self.embedding = nn.Embedding(3, self.hidden_layer.in_features)

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs + self.embedding.weight[0])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        groups = route_parameters(self, lr_by_role=self.lr_by_role)
        optimizer = self.optimizer(earlier_groups(groups, backwards=True) if self.earlier else groups)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}


@pytest.fixture
def run() -> Run:
    def run_routed(*args: str) -> MuonCLI:
        return main(Routed, TinyData, default_config="default.yaml", args=args)

    return run_routed


def rates(cli: MuonCLI, key: str = "lr") -> dict[str, float]:
    return {group["name"]: group[key] for group in cli.trainer.optimizers[0].param_groups}


def checkpoint() -> str:
    return str(next(Path().rglob("last.ckpt")))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.lr_by_role", "{embedding: 0.3, head: 0.008}"],
        ["--model.lr_by_role.embedding", "0.3", "--model.lr_by_role.head=0.008"],
        ["--config", "roles.yaml", "--model.lr_by_role.head=0.008"],
    ],
)
def test_rates_by_role(run: Run, arguments: list[str]) -> None:
    Path("roles.yaml").write_text("model: {lr_by_role: {embedding: 0.3, head: 0.5}}")
    cli = run("fit", *MUON, *arguments, "--trainer.max_steps", "1", *CONSTANT)
    assert rates(cli) == {"matrix": 0.02, "embedding": 0.3, "head": 0.008, "vector": 0.005}


def test_one_rate_by_role_is_raised_on_resume_with_any_optimizer(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the other roles stay as in the checkpoint."""
    adamw = ["--model.optimizer", "AdamW", "--model.optimizer.lr", "0.02", *CONSTANT]
    run("fit", *adamw, *SAVING, "--model.lr_by_role", "{head: 0.1, vector: 0.4}")
    more = ["--model.lr_by_role.head", "0.2", "--model.optimizer.lr", "0.01"]
    resumed = run("fit", "--ckpt_path", checkpoint(), "--trainer.max_steps", "8", *more)
    assert isinstance(resumed.trainer.optimizers[0], torch.optim.AdamW)
    assert rates(resumed) == {"matrix": 0.01, "embedding": 0.01, "head": 0.2, "vector": 0.4}
    told = capsys.readouterr()
    assert "model.lr_by_role.head: 0.1 in the checkpoint, 0.2 used" in told.out + told.err
    assert "not applied" not in told.err


@pytest.mark.parametrize("optimizer", [MUON, ["--model.optimizer", "AdamW"]], ids=["MuonAdamW", "torch's AdamW"])
def test_earlier_groups_resume_at_the_same_rates_and_weights(
    run: Run, optimizer: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also over a restart of the schedule, which starts from its base rates."""
    arguments = [*optimizer, *RESTARTS]
    straight = run("fit", *arguments, "--trainer.max_steps", "5")
    monkeypatch.setattr(Routed, "earlier", True)
    earlier = run("fit", *arguments, *SAVING, "--trainer.max_steps", "2")
    assert list(rates(earlier)) == ["adamw_vectors", "adamw", "muon"]
    monkeypatch.setattr(Routed, "earlier", False)
    resumed = run("fit", *arguments, "--ckpt_path", checkpoint(), "--trainer.max_steps", "5")
    assert "not applied" not in capsys.readouterr().err
    for key in ("lr", "initial_lr", "weight_decay"):
        assert rates(resumed, key) == rates(straight, key)
    states = [cli.trainer.optimizers[0].state_dict()["state"] for cli in (straight, resumed)]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert all(torch.equal(value, states[1][name][key]) for key, value in state.items() if key == "step")
    schedules = [copy.copy(cli.trainer.lr_scheduler_configs[0].scheduler.state_dict()) for cli in (straight, resumed)]
    assert schedules[0]["base_lrs"] == schedules[1]["base_lrs"]
    assert schedules[0]["_last_lr"] == schedules[1]["_last_lr"]


@pytest.mark.parametrize(
    "schedule", [pytest.param(RESTARTS, marks=pytest.mark.slow), CONSTANT], ids=["restarts", "constant"]
)
def test_new_rates_by_role_are_used_from_a_checkpoint_on(
    run: Run, schedule: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Routed, "earlier", True)
    run("fit", *MUON, *schedule, *SAVING, "--trainer.max_steps", "3")
    monkeypatch.setattr(Routed, "earlier", False)
    first = checkpoint()
    by_role = ["--model.lr_by_role", "{head: 0.1, vector: 0.4}"]
    more = ["--trainer.max_steps", "6", *MUON, *schedule]
    resumed = run("fit", *more, "--ckpt_path", first, *by_role)
    fresh = run("fit", *more, *by_role)
    assert rates(resumed) == pytest.approx(rates(fresh))
    assert rates(fresh)["head"] == 20 * rates(fresh)["embedding"]
    assert "not applied" not in capsys.readouterr().err

    run("fit", *more, *by_role, *SAVING, "--trainer.default_root_dir", "second")
    second = str(next(Path("second").rglob("last.ckpt")))
    without = run("fit", *more, "--ckpt_path", second, "--trainer.max_steps", "9", "--model.lr_by_role=null")
    assert rates(without)["head"] == pytest.approx(rates(without)["embedding"])
    assert rates(without)["vector"] == pytest.approx(rates(without)["embedding"])
    assert "not applied" not in capsys.readouterr().err
