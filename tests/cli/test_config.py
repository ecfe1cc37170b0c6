"""What a value is in the end: defaults, presets, interpolation, the command line; and what is saved of it."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, ModelSummary
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_muon.cli import MuonCLI, main
from lightning_muon.cli.saved_config import MaskingParser, try_integers_first
from lightning_muon.optim import MuonAdamW
from tests.cli.conftest import TinyData, TinyModule

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)


def schedule_length(cli: MuonCLI) -> int:
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(scheduler, CosineAnnealingLR)
    return scheduler.T_max


def callbacks_of(cli: MuonCLI) -> list[Callback]:
    return list(vars(cli.trainer)["callbacks"])


def test_interpolation_in_the_default_config_follows_the_command_line(run: Run) -> None:
    cli = run("fit", "--trainer.max_steps", "3", "--model.dim", "2")
    assert cli.model.hidden_layer.weight.shape == (2, 2)
    assert cli.datamodule.dim == 2
    assert schedule_length(cli) == 3


def test_interpolation_in_the_default_config_follows_a_later_preset(run: Run) -> None:
    Path("wide.yaml").write_text("model: {dim: 6}\ntrainer: {max_steps: 2}")
    cli = run("fit", "--config", "wide.yaml")
    assert cli.model.hidden_layer.weight.shape == (6, 6)
    assert schedule_length(cli) == 2


def test_interpolation_in_a_preset_follows_what_is_laid_over_it(run: Run) -> None:
    Path("follow.yaml").write_text("model: {hidden: '${data.batch_size}'}\ndata: {batch_size: 5}")
    Path("batch.yaml").write_text("data: {batch_size: 3}")
    assert run("fit", "--config", "follow.yaml").model.hidden_layer.out_features == 5
    assert run("fit", "--config=follow.yaml", "--config=batch.yaml").model.hidden_layer.out_features == 3
    assert run("fit", "-c", "follow.yaml", "--data.batch_size=2").model.hidden_layer.out_features == 2


def test_interpolation_on_the_command_line(run: Run) -> None:
    cli = run("fit", "--trainer.max_steps", "2", "--model.hidden", "${trainer.max_steps}")
    assert cli.model.hidden_layer.out_features == 2


def test_later_presets_win_and_callbacks_append(run: Run) -> None:
    Path("one.yaml").write_text(
        "model: {scale: 2.0}\ntrainer: {callbacks+: [{class_path: EarlyStopping, init_args: {monitor: val/loss}}]}"
    )
    Path("two.yaml").write_text("model: {scale: 3.0}\ntrainer: {callbacks+: [{class_path: ModelSummary}]}")
    cli = run("fit", "--config", "one.yaml", "--config", "two.yaml", "--trainer.fast_dev_run", "1")
    assert cli.model.scale == 3.0
    kinds = [type(callback) for callback in callbacks_of(cli)]
    assert EarlyStopping in kinds
    assert ModelSummary in kinds


@pytest.mark.parametrize("subcommand", ["fit", "validate", "predict"])
def test_default_config_serves_all_subcommands(run: Run, subcommand: str) -> None:
    Path("default.yaml").write_text(Path("default.yaml").read_text() + "  batch_size: 7\n")
    cli = run(subcommand, "--trainer.fast_dev_run", "true")
    assert cli.datamodule.batch_size == 7


def test_muon_by_its_short_name(run: Run) -> None:
    args = ["--model.optimizer", "MuonAdamW", "--model.optimizer.lr", "0.01", "--model.optimizer.update_scale", "mup"]
    optimizer = run("fit", *args).trainer.optimizers[0]
    assert type(optimizer) is MuonAdamW
    assert optimizer.defaults["update_scale"] == "mup"


def test_the_saved_config_repeats_the_run_exactly(run: Run) -> None:
    Path("logs.yaml").write_text(
        "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: logs}}, log_every_n_steps: 1}"
    )
    first = run("fit", "--config", "logs.yaml", "--trainer.max_steps", "3", "--model.optimizer", "AdamW")
    saved = Path(str(first.trainer.log_dir)) / "config.yaml"
    # As on another day: with other defaults.
    Path("default.yaml").write_text("seed_everything: 2\ntrainer: {max_steps: 9}\nmodel: {optimizer: Adagrad}")
    second = run("fit", "--config", str(saved))
    assert second.trainer.global_step == 3
    assert second.model.losses == first.model.losses
    assert torch.equal(second.model.head.weight, first.model.head.weight)
    repeated = yaml.safe_load((Path(str(second.trainer.log_dir)) / "config.yaml").read_text())
    assert repeated == yaml.safe_load(saved.read_text())


def test_the_saved_config_holds_plain_values(run: Run) -> None:
    cli = run("fit", "--trainer.default_root_dir", "here")
    saved = yaml.safe_load(Path("here/config.yaml").read_text())
    assert saved["model"]["lr_scheduler"]["init_args"]["T_max"] == 4
    again = run("fit", "--config", "here/config.yaml", "--trainer.max_steps", "2")
    assert cli.trainer.global_step == 4
    assert again.trainer.global_step == 2
    assert schedule_length(again) == 4


def test_a_run_in_the_folder_of_another_leaves_its_config_alone(run: Run) -> None:
    run("fit", "--trainer.default_root_dir", "here")
    run("fit", "--trainer.default_root_dir", "here", "--model.scale", "2")
    run("validate", "--trainer.default_root_dir", "here")
    scales = [
        yaml.safe_load(Path("here", name).read_text())["model"]["scale"] for name in ("config.yaml", "config-1.yaml")
    ]
    assert scales == [1.0, 2.0]
    assert Path("here/validate.yaml").exists()


def test_module_without_an_optimizer_argument() -> None:
    from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

    cli = main(BoringModel, BoringDataModule, args=["fit", "--trainer.fast_dev_run=2", "--trainer.accelerator=cpu"])
    assert cli.trainer.global_step == 2


@pytest.mark.parametrize("active", [True, False])
def test_the_closing_lines(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, active: bool
) -> None:
    """In an active environment the shell finds python by its name."""
    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(folder) if active else "/nowhere")
    Path("board.yaml").write_text("trainer: {logger: {class_path: TensorBoardLogger, init_args: {save_dir: my logs}}}")
    run("fit", "--config", "checkpoints.yaml", "--config", "board.yaml")
    lines = capsys.readouterr().out.splitlines()
    assert any("val/loss" in line for line in lines)
    assert not any("train/loss" in line for line in lines)
    checkpoint = next(line.removeprefix("checkpoint: ") for line in lines if line.startswith("checkpoint: "))
    assert Path(checkpoint).name == "last.ckpt"
    assert Path(checkpoint).is_file()
    look, predict = (
        shlex.split(next(line.partition(":")[2] for line in lines if line.startswith(f"{word}: ")))
        for word in ("look", "predict")
    )
    assert look[1:] == ["-m", "tensorboard.main", "--logdir", "my logs"]
    assert predict[1:] == ["tiny.py", "predict", "--ckpt_path", checkpoint]
    for python in (look[0], predict[0]):
        assert python == "python" if active else Path(python).samefile(sys.executable)


def test_closing_without_logger_and_checkpoint_names_neither(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit")
    out = capsys.readouterr().out
    assert "val/loss" in out
    assert "tensorboard" not in out
    assert "checkpoint" not in out


def test_the_best_checkpoint_is_named_where_there_is_no_last(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("fit", "--trainer.enable_checkpointing", "true", "--trainer.default_root_dir", "here")
    callback = next(callback for callback in callbacks_of(cli) if isinstance(callback, ModelCheckpoint))
    assert f"checkpoint: {callback.best_model_path}" in capsys.readouterr().out


def test_a_config_takes_the_place_of_a_default_preset_from_its_folder(capsys: pytest.CaptureFixture[str]) -> None:
    presets = {
        "optimizer/polar.yaml": "{class_path: MuonAdamW, init_args: {lr: 0.5, nesterov: false, momentum: 0.5}}",
        "optimizer/plain.yaml": "{class_path: MuonAdamW, init_args: {lr: 0.25}}",
        "other/plain.yaml": "{class_path: MuonAdamW, init_args: {lr: 0.25}}",
    }
    for name, optimizer in presets.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"model: {{optimizer: {optimizer}}}")
    Path("few.yaml").write_text("model: {scale: 3.0}")
    lines = Path("default.yaml").read_text().splitlines()
    base = [
        line for line in lines if not line.lstrip().startswith(("optimizer:", "class_path: SGD", "init_args: {lr:"))
    ]
    Path("default.yaml").write_text("\n".join([*base, "  batch_size: 7"]))

    def options(*args: str) -> tuple[float, bool, float]:
        default = ["default.yaml", "optimizer/polar.yaml"]
        cli = main(TinyModule, TinyData, default_config=default, args=["fit", *args, "--trainer.fast_dev_run=1"])
        group = cli.trainer.optimizers[0].param_groups[0]
        assert cli.datamodule.batch_size == 7  # default.yaml stays
        return group["initial_lr"], group["nesterov"], group["momentum"]

    assert options() == (0.5, False, 0.5)
    assert options("--config=few.yaml", "--model.optimizer.lr=0.125") == (0.125, False, 0.5)
    assert options("--config", "optimizer/plain.yaml") == (0.25, True, 0.95)
    assert options(f"-c={Path('optimizer/plain.yaml').resolve()}") == (0.25, True, 0.95)
    assert options("--config=other/plain.yaml") == (0.25, False, 0.5)  # on top of it

    Path("optimizer/polar.yaml").write_text("model: {scael: 1}")
    with pytest.raises(SystemExit):
        options()
    assert "optimizer/polar.yaml" in capsys.readouterr().err


@pytest.mark.parametrize("order", [float | int | None, int | float | None, float | int | str])
def test_one_batch_is_not_all_of_them(order: Any) -> None:
    """Python may give the types of the trainer's arguments in either order."""
    parser = MaskingParser(parser_mode="omegaconf+")
    parser.add_argument("--limit", type=order, default=1.0)
    parser.add_argument("--rate", type=float | None, default=1.0)
    try_integers_first(parser)
    for written, value in (("1", 1), ("1.0", 1.0), ("0.5", 0.5), ("7", 7)):
        found = parser.parse_args([f"--limit={written}", "--rate=2"])
        assert (found.limit, type(found.limit), type(found.rate)) == (value, type(value), float)


def test_a_limit_of_batches_on_the_command_line(run: Run) -> None:
    assert run("fit", "--trainer.limit_val_batches=1").trainer.num_val_batches == [1]
