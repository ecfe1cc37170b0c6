"""What the user did wrong is one line on stderr that names it and the nearest valid thing, and exit code 2."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_muon.cli import MuonCLI

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)


def line_of(run: Run, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    error = capsys.readouterr().err.removeprefix("Seed set to 1\n")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error.removeprefix("error: ").strip()


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("fit --trainer.max_step 3", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("fit --trainer.max_step=3", "unknown key 'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        ("fit --modle.dim 3", "unknown key 'modle.dim'; did you mean 'model.dim'?"),
        (
            "fit --trainer.max_epochs 2 --trainer.max_steps -1",
            "model.lr_scheduler.T_max follows trainer.max_steps, which is -1, for no limit: "
            "give --model.lr_scheduler.T_max, or --trainer.max_steps",
        ),
        ("fit --chekpoint 3", "unknown key 'chekpoint'; --help lists all keys"),
        (
            "fit --model.lr_scheduler ReduceLROnPlateau",
            "model.lr_scheduler: several classes are called ReduceLROnPlateau, give the path of one: "
            "torch.optim.lr_scheduler.ReduceLROnPlateau, lightning.pytorch.cli.ReduceLROnPlateau",
        ),
        (
            "fit --model.optimizer.momentun 0.9",
            "unknown key 'model.optimizer.momentun' for torch.optim.SGD; did you mean 'model.optimizer.momentum'?",
        ),
        (
            "fit --model.optimizer MuonAdamW --model.optimizer.update_scal mup",
            "unknown key 'model.optimizer.update_scal' for lightning_muon.optim.MuonAdamW; "
            "did you mean 'model.optimizer.update_scale'?",
        ),
        (
            "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr x",
            "unknown key 'trainer.callbacks.monitr' for lightning.pytorch.callbacks.EarlyStopping; "
            "did you mean 'trainer.callbacks.monitor'?",
        ),
        ("fit 3", "unexpected argument '3'; options are written --key value, and patterns of files in quotes"),
        ("fit --trainer.max_steps ten", "trainer.max_steps: expected a whole number, got 'ten'"),
        ("fit --model.optimizer.lr ten", "model.optimizer.lr: expected a number, got 'ten'"),
        ("fit --trainer.max_steps", "--trainer.max_steps: a value is missing after it"),
        (
            "fit --model.activation rely",
            "model.activation: expected one of relu, gelu, got 'rely'; did you mean 'relu'?",
        ),
        (
            "fit --trainer.precision bf16-mixd",
            "trainer.precision: expected one of transformer-engine, transformer-engine-float16, 16-true, 16-mixed, "
            "bf16-true, bf16-mixed, 32-true, 64-true, 64, 32, 16, bf16, got 'bf16-mixd'; did you mean 'bf16-mixed'?",
        ),
        (
            "fit --model.optimizer MuonAdamW --model.optimizer.update_scale mop",
            "model.optimizer.update_scale: expected one of none, keller_jordan, mup, moonlight, nuclear_norm, "
            "got 'mop'; "
            "did you mean 'mup'?",
        ),
        (
            "fit --model.optimizer AdamV",
            "model.optimizer: expected a class by its name or import path, got 'AdamV'; did you mean 'AdamW'?",
        ),
        (
            "fit --model.lr_scheduler CosineAnealingLR",
            "model.lr_scheduler: expected a class by its name or import path, got 'CosineAnealingLR'; "
            "did you mean 'CosineAnnealingLR'?",
        ),
        (
            "fit --trainer.callbacks+=EarlyStoping",
            "trainer.callbacks: expected a class by its name or import path, got 'EarlyStoping'; "
            "did you mean 'EarlyStopping'?",
        ),
        (
            "fit --model.optimizer torch.optim.AdamV",
            "model.optimizer: module torch.optim has no AdamV; did you mean 'AdamW'?",
        ),
        (
            "fit --model.optimizer toorch.optim.AdamW",
            "model.optimizer: cannot import toorch.optim.AdamW, there is no module 'toorch'",
        ),
        (
            "fit --model.lr_scheduler StepLR",
            "a value is missing for torch.optim.lr_scheduler.StepLR: --model.lr_scheduler.step_size",
        ),
        (
            "fit --model.hidden ${model.dimm}",
            "model.hidden: ${model.dimm} leads to no key; did you mean 'model.dim'?",
        ),
        ("fot", "unknown subcommand 'fot'; did you mean 'fit'?"),
        ("", "a subcommand is missing: one of fit, validate, test, predict, report, consolidate"),
        (
            "--trainer.max_steps 3 fit",
            "'--trainer.max_steps' stands before the subcommand; write 'fit --trainer.max_steps …'",
        ),
        (
            "fit --config checkpoint.yaml",
            "config file 'checkpoint.yaml' does not exist; did you mean 'checkpoints.yaml'?",
        ),
        ("fit --ckpt_path lost.ckpt", "--ckpt_path: 'lost.ckpt' does not exist"),
        ("fit --ckpt_path default.yaml", "--ckpt_path: 'default.yaml' is not a checkpoint"),
        ("fit --model.scale -1", "scale is -1.0, but must not be negative"),
    ],
)
def test_command_line(run: Run, capsys: pytest.CaptureFixture[str], args: str, line: str) -> None:
    assert line_of(run, capsys, *args.split()) == line


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("model: {dimm: 3}", "unknown key 'model.dimm' (in my.yaml); did you mean 'model.dim'?"),
        ("modle: {dim: 3}", "unknown key 'modle.dim' (in my.yaml); did you mean 'model.dim'?"),
        (
            "model: {optimizer: {class_path: SGD, init_args: {lrr: 3}}}",
            "unknown key 'model.optimizer.lrr' for torch.optim.SGD (in my.yaml); did you mean 'model.optimizer.lr'?",
        ),
        (
            "trainer: {callbacks+: [{class_path: EarlyStopping, init_args: {monitor: x, patiense: 2}}]}",
            "unknown key 'trainer.callbacks.patiense' for lightning.pytorch.callbacks.EarlyStopping (in my.yaml); "
            "did you mean 'trainer.callbacks.patience'?",
        ),
        (
            "model: {optimizer: {class_path: AdamV}}",
            "model.optimizer: expected a class by its name or import path, got 'AdamV' (in my.yaml); "
            "did you mean 'AdamW'?",
        ),
        ("trainer: {max_steps: ten}", "trainer.max_steps: expected a whole number, got 'ten' (in my.yaml)"),
        (
            "model:\n  hidden: ${modle.dim}",
            "model.hidden: ${modle.dim} leads to no key (in my.yaml); did you mean 'model.dim'?",
        ),
        ("model:\n  dim: [3", "config file 'my.yaml', line 2: expected ',' or ']', but got '<stream end>'"),
        ("just words", "config file 'my.yaml' holds no keys: expected lines such as 'trainer:' or 'model:'"),
    ],
)
def test_config_file(run: Run, capsys: pytest.CaptureFixture[str], content: str, line: str) -> None:
    Path("my.yaml").write_text(content)
    assert line_of(run, capsys, "fit", "--config", "my.yaml") == line


def test_the_default_config_is_named_too(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("default.yaml").write_text("model: {dimm: 3}")
    assert line_of(run, capsys, "fit") == "unknown key 'model.dimm' (in default.yaml); did you mean 'model.dim'?"
    Path("default.yaml").unlink()
    assert line_of(run, capsys, "fit") == "config file 'default.yaml' does not exist"


def test_misconfiguration_found_by_lightning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(run, capsys, "fit", "--trainer.callbacks+=DeviceStatsMonitor")
    assert line == "Cannot use `DeviceStatsMonitor` callback with `Trainer(logger=False)`."


def test_a_bug_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: MuonCLI) -> None:
        raise KeyError("missing")

    monkeypatch.setattr(MuonCLI, "after_fit", broken)
    with pytest.raises(KeyError, match="missing"):
        run("fit")


def test_an_error_deep_in_a_library_keeps_its_traceback(run: Run) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run("fit", "--data.dim", "3")


@pytest.mark.parametrize("args", [["fit", "--trainer.max_steps", "ten"], ["fit", "--model.scale", "-1"]])
def test_debugging_shows_the_exception(run: Run, monkeypatch: pytest.MonkeyPatch, args: list[str]) -> None:
    monkeypatch.setenv("LIGHTNING_MUON_DEBUG", "1")
    with pytest.raises(Exception, match=r"max_steps|scale is"):
        run(*args)
