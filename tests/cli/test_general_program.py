"""The program for modules that lie where one stands: chosen by ``--model`` and ``--data``."""

import sys
from pathlib import Path

import pytest

from lightning_muon.cli import main
from tests.processes import run_module

pytestmark = pytest.mark.timeout(120)

QUICK = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
MODULE = """
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

class {name}(BoringModel):
    def __init__(self, width: int = 2, hidden: int = 2):
        super().__init__()
        self.save_hyperparameters()
        if hidden > 9:
            raise ValueError(f"hidden is {{hidden}}, more than 9")
        self.hidden = hidden

class Data(BoringDataModule):
    pass
"""
PRESET = "model: {class_path: mine.Module, init_args: {hidden: '${model.init_args.width}'}}"


def test_python_m_trains_what_is_importable_from_here() -> None:
    Path("mine.py").write_text(MODULE.format(name="Module"))
    Path("preset.yaml").write_text(PRESET)
    arguments = ["--config=preset.yaml", "--model.width=5", "--data=mine.Data", "--trainer.max_steps=2", *QUICK]
    run = run_module("lightning_muon.cli", "fit", *arguments, folder=Path.cwd())
    assert run.returncode == 0, run.stderr
    checkpoint = next(Path().rglob("*.ckpt")).absolute()
    assert f"checkpoint: {checkpoint}" in run.stdout


def test_a_checkpoint_fills_in_the_arguments_of_a_chosen_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine_too.py").write_text(MODULE.format(name="Module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    classes = ["--model=mine_too.Module", "--data=mine_too.Data"]
    main(args=["fit", *classes, *QUICK, "--model.hidden=5", "--trainer.max_steps=1"])
    checkpoint = str(next(Path().rglob("*.ckpt")))

    followed = main(args=["validate", *classes, *QUICK, "--ckpt_path", checkpoint])
    assert followed.model.hidden == 5
    assert "from the checkpoint: model.hidden=5\n" in capsys.readouterr().err

    asked = main(args=["validate", *classes, *QUICK, "--ckpt_path", checkpoint, "--model.hidden=6"])
    assert asked.model.hidden == 6
    assert "model.hidden: 5 in the checkpoint, 6 used\n" in capsys.readouterr().err


def test_classes_by_their_import_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_by_path.py").write_text(MODULE.format(name="Module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    paths = ["mine_by_path.Module", "mine_by_path.Data"]
    with pytest.raises(SystemExit) as stop:  # a light command does not import them
        main(*paths, args=["report", "--help"])
    assert stop.value.code == 0
    assert "mine_by_path" not in sys.modules
    cli = main(*paths, args=["fit", *QUICK, "--model.hidden=5", "--trainer.fast_dev_run=1"])
    assert cli.model.hidden == 5


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("--model=mine_three.Modul", "model: module mine_three has no Modul; did you mean 'Module'?"),
        ("--model=mine_thre.Module", "model: cannot import mine_thre.Module, there is no module 'mine_thre'"),
        (
            "--model=mine_three.Module --model.hiden=3",
            "unknown key 'model.hiden' for mine_three.Module; did you mean 'model.hidden'?",
        ),
        ("--model=mine_three.Module --model.hidden=10", "hidden is 10, more than 9"),
        ("--trainer.max_steps=1", "a value is missing: --model"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: str, line: str
) -> None:
    (tmp_path / "mine_three.py").write_text(MODULE.format(name="Module"))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        main(args=["fit", *args.split(), "--trainer.accelerator=cpu", "--seed_everything=1"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.removeprefix("Seed set to 1\n") == f"error: {line}\n"
