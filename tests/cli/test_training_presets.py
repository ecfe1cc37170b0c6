"""Presets of loggers, profilers and callbacks: what each leaves, and what the end of a run says of it."""

import importlib.util
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

from lightning_muon.cli import MuonCLI, main
from lightning_muon.data import EpochDataModule, EpochLoader
from tests.cli.conftest import TinyData, TinyModule

PLOTS = importlib.util.find_spec("matplotlib") is not None
Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

CONFIGS = Path(__file__).parents[2] / "configs"


def preset(name: str) -> str:
    return f"--config={CONFIGS / name}.yaml"


def test_early_stopping_is_told_with_the_value(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Validations after 4 and 8 steps, and so on; nothing improves."""
    still = ["--model.optimizer.lr=0", "--trainer.max_steps=40"]
    cli = run("fit", preset("callbacks/early_stopping"), *still)
    assert cli.trainer.global_step == 16
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stopped early")]
    value = f"{float(cli.trainer.callback_metrics['val/loss']):.4g}"
    assert line.startswith(
        f"stopped early at val/loss {value}: Monitored metric val/loss did not improve in the last 3"
    )
    run("fit", preset("callbacks/early_stopping"))
    assert "stopped early" not in capsys.readouterr().out


class Locked(TinyData):
    """Data that cannot be copied."""

    def __init__(self, dim: int = 4, batch_size: int = 4) -> None:
        super().__init__(dim, batch_size)
        self.lock = threading.Lock()

    def train_dataloader(self) -> Any:
        torch.manual_seed(7)
        return super().train_dataloader()

    val_dataloader = train_dataloader


def test_a_moving_average_goes_on_exactly() -> None:
    """Checkpoints have the average as `state_dict` and the weights in training as `current_model_state`."""

    def fit(*arguments: str) -> MuonCLI:
        average = [preset("callbacks/ema"), "--config=checkpoints.yaml", "--model.lr_scheduler.T_max=16"]
        return main(TinyModule, Locked, default_config="default.yaml", args=["fit", *average, *arguments])

    def weights(cli: MuonCLI) -> list[Tensor]:
        return list(cli.model.state_dict().values())

    straight = fit("--trainer.max_steps=16")
    fit("--trainer.max_steps=8", "--trainer.default_root_dir=half")
    checkpoint = next(Path("half").rglob("last.ckpt"))
    resumed = fit("--trainer.max_steps=16", f"--ckpt_path={checkpoint}")
    assert all(map(torch.equal, weights(resumed), weights(straight)))
    saved = torch.load(checkpoint, weights_only=True)
    assert not torch.equal(saved["state_dict"]["head.weight"], saved["current_model_state"]["head.weight"])
    assert saved["averaging_state"]["n_averaged"] == 8


def test_an_optimizer_of_another_library_goes_on_exactly() -> None:
    """Its checkpoint has plain values only, and the command line still sets its learning rate."""

    def fit(steps: int, *arguments: str) -> MuonCLI:
        chosen = [preset("optimizer/soap"), "--config=checkpoints.yaml", "--model.lr_scheduler=null"]
        every = ["fit", *chosen, f"--trainer.max_steps={steps}", *arguments]
        return main(TinyModule, Locked, default_config="default.yaml", args=every)

    straight = fit(16)
    fit(8, "--trainer.default_root_dir=half")
    checkpoint = next(Path("half").rglob("last.ckpt"))
    resumed = fit(16, f"--ckpt_path={checkpoint}")
    assert type(resumed.trainer.optimizers[0]).__module__.startswith("pytorch_optimizer.")
    assert resumed.model.losses == straight.model.losses[8:]
    higher = fit(9, f"--ckpt_path={checkpoint}", "--model.optimizer.lr=0.7")
    assert {group["lr"] for group in higher.trainer.optimizers[0].param_groups} == {0.7}


@pytest.mark.parametrize("name", ["simple", "advanced"])
def test_the_profile_is_a_file_that_the_end_names(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    run("fit", preset(f"profiler/{name}"), preset("logger/csv"))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("profile: "))
    file = Path(line.removeprefix("profile:").strip())
    assert file == Path(f"logs/version_0/fit-{name}_profile.txt")
    assert "run_training_batch" in file.read_text()


class Ordered(EpochDataModule):
    def __init__(self, dim: int = 4, batch_size: int = 4) -> None:
        super().__init__(batch_size)

    def train_dataloader(self) -> EpochLoader:
        return self.train_loader(torch.arange(40.0).unsqueeze(1).expand(40, 4))


class Seeing(TinyModule):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.losses.append(batch[0, 0].item())
        return super().training_step([batch], batch_idx)


def test_what_the_debug_presets_do() -> None:
    def fit(name: str, *arguments: str) -> MuonCLI:
        options = [preset(f"debug/{name}"), "--trainer.val_check_interval=1.0", "--trainer.limit_val_batches=0"]
        return main(Seeing, Ordered, default_config="default.yaml", args=["fit", *options, *arguments])

    cli = fit("overfit", "--trainer.max_steps=6")
    assert cli.model.losses[::2] == [0.0, 4.0] * 3  # the first number of each batch; the loss follows it
    assert fit("fast").trainer.global_step == 4
    with pytest.raises(RuntimeError, match="returned nan values"):
        fit("anomalies", "--model.scale=.nan")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_without_its_package_says_what_to_install(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    missing = MagicMock(__bool__=lambda _: False, __str__=lambda _: f"Requirement '{name}>=1' not met")
    monkeypatch.setattr(f"lightning.pytorch.loggers.{name}._{name.upper()}_AVAILABLE", missing)
    with pytest.raises(SystemExit):
        run("fit", preset(f"logger/{name}"))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert name in error
    assert not Path("logs").exists()


WATCHED = ["--trainer.log_every_n_steps=1", "--model.optimizer=MuonAdamW"]
WATCHED += [f"--trainer.callbacks+={name}" for name in ("RunGuard", "SpeedMonitor", "AutoWeightDecay", "MuonDashboard")]


# On one of the quantities: the run is too short for the verdict on itself.
VERDICT = "by_quantity/not_finite"


def test_mlflow_gets_numbers_and_texts(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for the package, which is large."""
    client = MagicMock()
    client.create_run.return_value.info.run_id = "run"
    client.get_experiment_by_name.return_value.experiment_id = "0"
    parts: dict[str, dict[str, Any]] = {"mlflow": {"set_tracking_uri": str}}
    parts["mlflow.tracking"] = {"MlflowClient": lambda _: client, "context": object()}
    parts["mlflow.entities"] = {"Metric": lambda **metric: metric, "Param": lambda **param: param}
    parts["mlflow.utils"], parts["mlflow.utils.mlflow_tags"] = {}, {"MLFLOW_RUN_NAME": "name"}
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE", True)
    run("fit", preset("logger/mlflow"), *WATCHED)
    logged = {metric["key"] for call in client.log_batch.mock_calls for metric in call.kwargs.get("metrics", ())}
    assert {"train/loss", "watch/throughput/samples_per_second", "at_a_glance/loss", VERDICT} <= logged
    texts = {call.args[2] for call in client.log_text.mock_calls}
    assert {"watch/routing/step-0.md", "watch/config/step-0.md"} <= texts
    assert any(text.startswith("at_a_glance/verdict/step-") for text in texts)
    if PLOTS:
        (picture,) = client.log_artifact.mock_calls
        assert Path(picture.args[1]).parts[-2:] == ("run", "health.png")
        assert picture.args[2] == "at_a_glance"
    assert "mlflow ui --backend-store-uri file:logs/mlruns" in capsys.readouterr().out


def test_wandb_gets_numbers_and_texts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    try:
        cli = run("fit", preset("logger/wandb"), *WATCHED)
        summary = dict(cli.trainer.logger.experiment.summary)
        assert {"train/loss", "watch/throughput/samples_per_second", "watch/routing", "watch/config"} <= set(summary)
        assert {"at_a_glance/loss", "at_a_glance/verdict", VERDICT} <= set(summary)
        assert ("at_a_glance/picture" in summary) == PLOTS
    finally:
        wandb.finish()
