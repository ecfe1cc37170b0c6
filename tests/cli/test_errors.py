"""What the user did wrong is one line on stderr that names it and the nearest valid thing, and exit code 2."""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

import pytest

from lightning_muon.cli import MuonCLI
from tests.processes import REPOSITORY, run_module

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

CONFIGS = REPOSITORY / "configs"


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
        ("fit --trainr.max_steps 3", "unknown key 'trainr.max_steps'; did you mean 'trainer.max_steps'?"),
        ("fit --trainr.max_step 3", "unknown key 'trainr.max_step'; did you mean 'trainer.max_steps'?"),
        ("fit --max_steps 3", "unknown key 'max_steps'; did you mean 'trainer.max_steps'?"),
        ("fit --epochs 3", "unknown key 'epochs'; did you mean 'trainer.max_epochs'?"),
        ("fit --dim 3", "unknown key 'dim'; did you mean 'model.dim' or 'data.dim'?"),
        ("fit --model.lr 3", "unknown key 'model.lr'; did you mean 'model.optimizer.lr'?"),
        (
            "fit --chekpoint 3",
            "unknown key 'chekpoint'; the keys are config, seed_everything, trainer, model, data, grace, weights, "
            "fresh, quiet, ckpt_path, weights_only",
        ),
        ("fit --data.nope 3", "unknown key 'data.nope'; data takes dim, batch_size"),
        (
            "fit --model.optimizer.learning_rate 1",
            "unknown key 'model.optimizer.learning_rate' for torch.optim.SGD; did you mean 'model.optimizer.lr'?",
        ),
        (
            "fit --model.optimizer.lr_scheduler StepLR",
            "unknown key 'model.optimizer.lr_scheduler' for torch.optim.SGD; did you mean 'model.lr_scheduler'?",
        ),
        (
            "fit --trainer.callbacks+=LearningRateMonitor --trainer.callbacks.outputs x",
            "unknown key 'trainer.callbacks.outputs' for lightning.pytorch.callbacks.LearningRateMonitor; "
            "LearningRateMonitor takes logging_interval, log_momentum, log_weight_decay",
        ),
        (
            "fit --trainer.callbacks+=WeightRMSMonitor --trainer.callbacks.every_n_step.x 3",
            "unknown key 'trainer.callbacks.every_n_step.x' for lightning_muon.callbacks.WeightRMSMonitor; "
            "did you mean 'trainer.callbacks.every_n_steps'?",
        ),
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
            "parameter group 0: unknown update_scale 'mop'; choose one of none, keller_jordan, mup, moonlight, "
            "nuclear_norm, or give an import path; did you mean 'mup'?",
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
            "fit --trainer.callbacks+=WeightMonitor",
            "trainer.callbacks: expected a class by its name or import path, got 'WeightMonitor'; "
            "did you mean 'WeightRMSMonitor'?",
        ),
        (
            "fit --trainer.callbacks+=MyOwnMonitor",
            "trainer.callbacks: expected a class by its name or import path, got 'MyOwnMonitor'",
        ),
        (
            "fit --trainer.callbacks+=Nope --trainer.callbacks+=lightning_muon.callbacks.AutoWeightDecay",
            "trainer.callbacks: expected a class by its name or import path, got 'Nope'",
        ),
        (
            "fit --trainer.callbacks+=lost.Nope --trainer.callbacks+=lightning_muon.callbacks.AutoWeightDecay",
            "trainer.callbacks: cannot import lost.Nope, there is no module 'lost'",
        ),
        (
            "fit --trainer.callbacks+=EarlyStopping --trainer.callbacks.patience abc",
            "trainer.callbacks.patience: expected a whole number, got 'abc'",
        ),
        (
            "fit --trainer.callbacks+=AutoWeightDecay --trainer.callbacks.target_rms abc",
            "trainer.callbacks.target_rms: expected one of bf16 or a number, got 'abc'",
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
        (
            "",
            "a subcommand is missing: one of fit, validate, test, predict, routes, sweep, compare, report, export, "
            "consolidate",
        ),
        (
            "--trainer.max_steps 3 fit",
            "'--trainer.max_steps' stands before the subcommand; write 'fit --trainer.max_steps …'",
        ),
        (
            "fit --config checkpoint.yaml",
            "config file 'checkpoint.yaml' does not exist; did you mean 'checkpoints.yaml'?",
        ),
        (
            "fit --config nope.yaml",
            "config file 'nope.yaml' does not exist; in '.' there are checkpoints.yaml, default.yaml",
        ),
        ("fit --config lost/nope.yaml", "config file 'lost/nope.yaml' does not exist"),
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
        (
            "trainer: {callbacks+: [{class_path: EarlyStopping, init_args: {monitor: x, patience: abc}}]}",
            "trainer.callbacks.patience: expected a whole number, got 'abc' (in my.yaml)",
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
    assert line_of(run, capsys, "fit") == (
        "config file 'default.yaml' does not exist; in '.' there are checkpoints.yaml"
    )


def test_misconfiguration_found_by_lightning(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(run, capsys, "fit", "--trainer.callbacks+=DeviceStatsMonitor")
    assert line == "Cannot use `DeviceStatsMonitor` callback with `Trainer(logger=False)`."


def test_a_preset_whose_package_is_missing_names_the_extra(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "pytorch_optimizer", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without("pytorch_optimizer"), *sys.meta_path])
    line = line_of(run, capsys, "fit", f"--config={CONFIGS / 'optimizer' / 'soap.yaml'}")
    assert "cannot import pytorch_optimizer.SOAP, there is no module 'pytorch_optimizer'" in line
    assert line.endswith(": pip install pytorch-optimizer, or with the extra 'baselines'")


class Without(MetaPathFinder):
    """Makes a package one that is not installed."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, fullname: str, *_: Any) -> None:
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named '{fullname}'", name=fullname)


def test_the_folder_of_a_config_file_is_corrected(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    Path("presets").mkdir()
    line = line_of(run, capsys, "fit", "--config", "preset/fast.yaml")
    assert line == "config file 'preset/fast.yaml' does not exist; did you mean 'presets/fast.yaml'?"


def test_a_checkpoint_is_no_config_file(run: Run, saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = line_of(run, capsys, "fit", "--config", saved)
    assert line == f"config file '{saved}' is not a text file: a checkpoint goes to --ckpt_path"


def test_our_classes_have_short_names() -> None:
    """In a process of its own: in this one another test may have imported them."""
    monitors = ["AutoWeightDecay", "WeightRMSMonitor", "MuonDashboard"]
    arguments = [*(f"--trainer.callbacks+={name}" for name in monitors), "--model.optimizer=MuonAdamW"]
    Path("tiny.py").write_text(
        "from tests.cli.conftest import TinyModule, TinyData; from lightning_muon.cli import main; "
        f"main(TinyModule, TinyData, args=['fit', *{arguments}, '--print_config'])"
    )
    done = run_module("tiny", folder=Path.cwd(), path=[REPOSITORY])
    for path in (*(f"callbacks.{name}" for name in monitors), "optim.MuonAdamW"):
        assert f"class_path: lightning_muon.{path}" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["fsdp3", "FSDP2Stratgy"])
def test_a_strategy_that_there_is_not(run: Run, capsys: pytest.CaptureFixture[str], name: str) -> None:
    line = line_of(run, capsys, "fit", "--trainer.strategy", name)
    assert line.startswith("trainer.strategy: expected one of auto, ddp, ")
    assert line.endswith(f", got '{name}'; did you mean 'fsdp2'?")


@pytest.mark.parametrize(
    ("strategy", "precision", "part"),
    [
        ("lightning.pytorch.strategies.FSDPStrategy", "32-true", "`fsdp` requires a GPU accelerator"),
        ("lightning_muon.strategies.FSDP2Strategy", "16-mixed", "does not support `Fabric(..., precision='16-mixed')`"),
    ],
)
def test_settings_that_do_not_go_together(
    run: Run, capsys: pytest.CaptureFixture[str], strategy: str, precision: str, part: str
) -> None:
    Path("strategy.yaml").write_text(f"trainer: {{strategy: {{class_path: {strategy}}}, precision: {precision}}}")
    assert part in line_of(run, capsys, "fit", "--config", "strategy.yaml")


@pytest.mark.parametrize(
    ("metric", "alternative"),
    [("val/los", "did you mean 'val/loss'?"), ("nope", "there are train/loss, val/loss")],
)
def test_early_stopping_by_no_metric(
    run: Run, capsys: pytest.CaptureFixture[str], metric: str, alternative: str
) -> None:
    with pytest.raises(SystemExit) as stop:
        run("fit", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", metric)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: EarlyStopping: no metric '{metric}' was logged; {alternative}"


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
