"""With a checkpoint: what was asked for wins, the checkpoint fills in the rest, and differences are said."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.cli import MuonCLI

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)


def test_plain_resume_is_exact_and_says_nothing(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    straight = run("fit", "--trainer.max_steps", "4", "--model.lr_scheduler.T_max", "4")
    half = ["--trainer.max_steps", "2", "--model.lr_scheduler.T_max", "4", "--config", "checkpoints.yaml"]
    run("fit", *half, "--trainer.default_root_dir", "half")
    capsys.readouterr()
    checkpoint = str(next(Path("half").rglob("last.ckpt")))
    resumed = run("fit", "--ckpt_path", checkpoint)
    assert resumed.trainer.global_step == 4
    error = capsys.readouterr().err
    assert "in the checkpoint" not in error
    assert "not applied" not in error
    assert "from the checkpoint" not in error
    for key in ("lr", "initial_lr", "momentum", "weight_decay"):
        groups = [[group[key] for group in cli.trainer.optimizers[0].param_groups] for cli in (resumed, straight)]
        assert groups[0] == groups[1]


def test_the_command_line_wins_over_the_checkpoint(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("fit", "--ckpt_path", saved, "--trainer.max_steps", "5", "--model.scale", "0.5")
    assert cli.model.scale == 0.5
    assert "model.scale: 1.0 in the checkpoint, 0.5 used\n" in capsys.readouterr().err


def test_an_asked_config_wins_over_the_checkpoint_even_with_the_default_value(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run("fit", "--config", "checkpoints.yaml", "--model.scale", "3.0")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    Path("scale.yaml").write_text("model: {scale: 1.0}")
    assert run("validate", "--ckpt_path", checkpoint).model.scale == 3.0
    assert "from the checkpoint: model.scale=3.0\n" in capsys.readouterr().err
    assert run("validate", "--ckpt_path", checkpoint, "--config", "scale.yaml").model.scale == 1.0
    assert "model.scale: 3.0 in the checkpoint, 1.0 used\n" in capsys.readouterr().err


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test", "predict"])
def test_the_architecture_follows_the_checkpoint(run: Run, capsys: pytest.CaptureFixture[str], subcommand: str) -> None:
    run("fit", "--config", "checkpoints.yaml", "--model.hidden", "6", "--model.optimizer", "AdamW")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    capsys.readouterr()
    cli = run(subcommand, "--ckpt_path", checkpoint, "--trainer.max_steps", "5")
    assert cli.model.hidden_layer.out_features == 6
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("from the checkpoint: "))
    assert "model.hidden=6" in line
    assert "model.optimizer=torch.optim.AdamW" in line


def test_what_follows_an_asked_key_is_asked_too(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("fit", "--ckpt_path", saved, "--trainer.max_steps", "8")
    scheduler: Any = cli.trainer.lr_scheduler_configs[0].scheduler
    assert cli.config.fit.model.lr_scheduler.init_args.T_max == 8
    assert scheduler.T_max == 8
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("model.lr_scheduler.T_max")]
    assert line.endswith("4 in the checkpoint, 8 used: the schedule goes on where the new one would be")


def test_a_longer_schedule_goes_on_as_if_it_had_been_so_from_the_start(run: Run, saved: str) -> None:
    straight = run("fit", "--trainer.max_steps", "7", "--model.lr_scheduler.T_max", "8")
    resumed = run("fit", "--ckpt_path", saved, "--trainer.max_steps", "7", "--model.lr_scheduler.T_max", "8")
    rates = [[group["lr"] for group in cli.trainer.optimizers[0].param_groups] for cli in (straight, resumed)]
    assert rates[0] == pytest.approx(rates[1])
    assert rates[0][0] == pytest.approx(0.125 * (1 + math.cos(math.pi * 7 / 8)) / 2)


def test_options_of_the_optimizer_follow_the_command_line(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model.optimizer.weight_decay", "0.5", "--model.optimizer.momentum", "0.75"]
    cli = run("fit", "--ckpt_path", saved, "--trainer.max_steps", "5", "--model.lr_scheduler.T_max", "4", *options)
    groups = cli.trainer.optimizers[0].param_groups
    assert [group["momentum"] for group in groups] == [0.75, 0.75]
    # The head's group has no decay, by an option of its own.
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    error = capsys.readouterr().err
    assert "model.optimizer.weight_decay: 0.25 in the checkpoint, 0.5 used\n" in error
    assert "not applied" not in error


def test_a_new_learning_rate_continues_the_schedule_at_its_height(run: Run) -> None:
    constant = ["--config", "checkpoints.yaml", "--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "3"]
    run("fit", *constant, "--model.lr_scheduler.gamma", "0.5")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    cli = run("fit", "--ckpt_path", checkpoint, "--model.optimizer.lr", "0.25", "--trainer.max_steps", "7")
    for group in cli.trainer.optimizers[0].param_groups:
        assert group["initial_lr"] == 0.25
        assert group["lr"] == 0.25 / 4
    assert cli.trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.25, 0.25]


def test_a_new_learning_rate_without_a_schedule(run: Run) -> None:
    run("fit", "--config", "checkpoints.yaml", "--model.lr_scheduler", "null")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    arguments = ["--model.lr_scheduler", "null", "--model.optimizer.lr", "0.03", "--trainer.max_steps", "5"]
    cli = run("fit", "--ckpt_path", checkpoint, *arguments)
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == [0.03, 0.03]


def test_nested_schedulers_are_scaled_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "warm.py").write_text(
        "from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR\n"
        "from torch.optim import Optimizer\n"
        "class Warm(SequentialLR):\n"
        "    def __init__(self, optimizer: Optimizer, steps: int = 2):\n"
        "        parts = [LinearLR(optimizer, 0.5, total_iters=steps), CosineAnnealingLR(optimizer, 100)]\n"
        "        super().__init__(optimizer, parts, [steps])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run("fit", "--config", "checkpoints.yaml", "--model.lr_scheduler", "warm.Warm")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    cli = run("fit", "--ckpt_path", checkpoint, "--model.optimizer.lr", "0.25", "--trainer.max_steps", "5")
    scheduler: Any = cli.trainer.lr_scheduler_configs[0].scheduler
    assert [nested.base_lrs for nested in scheduler._schedulers] == [[0.25, 0.25], [0.25, 0.25]]


def test_muon_learning_rates_follow_each_its_own_option(run: Run) -> None:
    muon = ["--model.optimizer", "MuonAdamW", "--model.optimizer.lr", "0.02", "--model.optimizer.adamw_lr", "0.001"]
    run("fit", "--config", "checkpoints.yaml", "--model.lr_scheduler", "null", *muon)
    checkpoint = str(next(Path().rglob("last.ckpt")))
    more = ["--ckpt_path", checkpoint, "--trainer.max_steps", "5", "--model.lr_scheduler", "null"]
    # Both groups of the miniature are adamw groups.
    unchanged = run("fit", *more, "--model.optimizer.lr", "0.04").trainer.optimizers[0]
    assert [group["lr"] for group in unchanged.param_groups] == [0.001, 0.001]
    changed = run("fit", *more, "--model.optimizer.adamw_lr", "0.002").trainer.optimizers[0]
    assert [group["lr"] for group in changed.param_groups] == [0.002, 0.002]


def test_another_optimizer_starts_afresh(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("fit", "--ckpt_path", saved, "--trainer.max_steps", "5", "--model.optimizer", "AdamW")
    optimizer = cli.trainer.optimizers[0]
    assert type(optimizer) is torch.optim.AdamW
    assert [state["step"].item() for state in optimizer.state.values()] == [1.0] * 4
    error = capsys.readouterr().err
    assert "model.optimizer: torch.optim.SGD in the checkpoint, torch.optim.AdamW used\n" in error
    assert "its state and its schedule start afresh\n" in error


def test_another_scheduler_goes_on_at_its_own_step(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ["--model.lr_scheduler", "StepLR", "--model.lr_scheduler.step_size", "3", "--trainer.max_steps", "5"]
    cli = run("fit", "--ckpt_path", saved, *steps)
    assert [group["lr"] for group in cli.trainer.optimizers[0].param_groups] == pytest.approx([0.0125, 0.0125])
    assert cli.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 5
    assert "StepLR used: the schedule goes on where the new one would be\n" in capsys.readouterr().err


def test_a_schedule_that_is_new_goes_on_too(run: Run) -> None:
    run("fit", "--config", "checkpoints.yaml", "--model.lr_scheduler", "null")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    cosine = ["--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max", "8"]
    cli = run("fit", "--ckpt_path", checkpoint, "--trainer.max_steps", "6", *cosine)
    assert cli.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.125 * (1 + math.cos(math.pi * 6 / 8)) / 2)


def test_an_option_from_zero_does_not_reach_groups_with_a_zero_of_their_own(run: Run) -> None:
    """As the weight decay of norms and biases, which stays zero."""
    run("fit", "--config", "checkpoints.yaml", "--model.optimizer.weight_decay", "0.0")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    cli = run("fit", "--ckpt_path", checkpoint, "--trainer.max_steps", "5", "--model.optimizer.weight_decay", "0.5")
    assert [group["weight_decay"] for group in cli.trainer.optimizers[0].param_groups] == [0.5, 0.0]


def test_a_plateau_keeps_what_it_has_seen(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    plateau = ["--model.lr_scheduler=lightning.pytorch.cli.ReduceLROnPlateau", "--model.lr_scheduler.monitor=val/loss"]
    run("fit", "--config", "checkpoints.yaml", *plateau)
    checkpoint = str(next(Path().rglob("last.ckpt")))
    more = ["--model.lr_scheduler.patience=3", "--trainer.max_steps=5"]
    cli = run("fit", "--ckpt_path", checkpoint, *plateau, *more)
    assert cli.trainer.lr_scheduler_configs[0].scheduler.patience == 10
    assert "patience: 10 in the checkpoint goes on, 3 is not applied" in capsys.readouterr().err


def test_a_new_seed_is_said(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", "--ckpt_path", saved, "--trainer.max_steps", "5", "--seed_everything", "2")
    assert "seed_everything: 1 in the checkpoint, 2 used from here on" in capsys.readouterr().err


def test_a_checkpoint_that_the_trainer_finds_is_compared_as_well(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "checkpoints.yaml", "--trainer.default_root_dir", "here"]
    run("fit", *arguments)
    cli = run(
        "fit", *arguments, "--ckpt_path", "last", "--model.optimizer.momentum", "0.75", "--trainer.max_steps", "5"
    )
    assert cli.trainer.optimizers[0].param_groups[0]["momentum"] == 0.75
    assert "model.optimizer.momentum: 0.5 in the checkpoint, 0.75 used\n" in capsys.readouterr().err


def test_a_checkpoint_without_hyperparameters_is_told(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(saved, weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, "bare.ckpt")
    cli = run("fit", "--ckpt_path", "bare.ckpt", "--model.optimizer.momentum", "0.75", "--trainer.max_steps", "5")
    assert cli.trainer.optimizers[0].param_groups[0]["momentum"] == 0.5
    assert "the checkpoint holds no hyperparameters" in capsys.readouterr().err


ENDLESS = ["--trainer.max_steps", "-1", "--model.lr_scheduler.T_max", "100", "--trainer.val_check_interval", "8"]


def error_of(run: Run, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("steps", ["3", "4"])
def test_a_finished_run_does_not_go_on(run: Run, saved: str, capsys: pytest.CaptureFixture[str], steps: str) -> None:
    arguments = ["--trainer.logger", "true", "--trainer.default_root_dir", "again", "--trainer.max_steps", steps]
    error = error_of(run, capsys, "fit", "--ckpt_path", saved, *arguments)
    assert error == "error: --ckpt_path: the checkpoint is already at step 4: raise --trainer.max_steps"
    assert not Path("again").exists()
    assert run("validate", "--ckpt_path", saved).trainer.state.finished


def test_a_finished_run_that_the_trainer_finds_does_not_go_on(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--config", "checkpoints.yaml", "--trainer.default_root_dir", "here"]
    run("fit", *arguments)
    error = error_of(run, capsys, "fit", *arguments, "--ckpt_path", "last")
    assert error == "error: --ckpt_path: the checkpoint is already at step 4: raise --trainer.max_steps"


@pytest.mark.parametrize("when", ["every_n_train_steps: 1", "every_n_epochs: 1"])
def test_epochs_that_are_over_do_not_go_on(run: Run, capsys: pytest.CaptureFixture[str], when: str) -> None:
    """Also where the checkpoint was saved after the last step of the last epoch, before the epoch was over."""
    config = Path("checkpoints.yaml")
    config.write_text(config.read_text().replace("every_n_train_steps: 1", when))
    run("fit", "--config", "checkpoints.yaml", *ENDLESS, "--trainer.max_epochs", "2")
    checkpoint = str(next(Path().rglob("last.ckpt")))
    again = ["fit", "--ckpt_path", checkpoint, *ENDLESS, "--trainer.max_epochs"]
    for epochs in ("1", "2"):
        error = error_of(run, capsys, *again, epochs)
        assert error == "error: --ckpt_path: the checkpoint is already through 2 epochs: raise --trainer.max_epochs"
    assert run(*again, "3").trainer.global_step == 24


def test_a_run_without_a_limit_goes_on(run: Run, saved: str) -> None:
    """Steps after which no epoch is over, and then a limit by time."""
    time = ["--trainer.max_time", "00:00:00:01", "--trainer.limit_val_batches", "0"]
    cli = run("fit", "--ckpt_path", saved, *ENDLESS, "--trainer.max_epochs", "-1", *time)
    assert cli.trainer.global_step > 4


@pytest.mark.usefixtures("_without_a_process_group_afterwards")
@pytest.mark.parametrize("subcommand", ["fit", "validate"])
@pytest.mark.parametrize("strategy", ["auto", "fsdp2"])
def test_a_module_of_other_sizes(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str], subcommand: str, strategy: str
) -> None:
    arguments = ["--trainer.max_steps", "5", "--model.hidden", "6", "--trainer.strategy", strategy]
    assert error_of(run, capsys, subcommand, "--ckpt_path", saved, *arguments) == (
        "error: --ckpt_path: it is of another module: hidden_layer.weight is 4×4 there and 6×4 here, "
        "hidden_layer.bias is 4 there and 6 here, and 1 more; of its arguments differ: model.hidden (4 there, 6 here)"
    )


def test_a_module_of_other_parameters(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = torch.load(saved, weights_only=True)
    content["state_dict"]["tail.weight"] = content["state_dict"].pop("head.weight")
    torch.save(content, "renamed.ckpt")
    assert error_of(run, capsys, "validate", "--ckpt_path", "renamed.ckpt") == (
        "error: --ckpt_path: it is of another module: head.weight is only in the model, "
        "tail.weight is only in the checkpoint"
    )
