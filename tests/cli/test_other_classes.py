"""Other classes than the program's own: chosen by command line or config, with its defaults and presets."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml

from lightning_muon.cli import MuonCLI, main
from lightning_muon.optim import MuonAdamW

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

REPOSITORY = Path(__file__).parents[2]
MINE = """
import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Plain(L.LightningModule):
    '''A module that makes no optimizer.'''

    def __init__(self, width: int, hidden: int = 8):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.Linear(hidden, 1))

    def training_step(self, batch, batch_idx):
        loss = (self.net(batch[0]) - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

class Own(Plain):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.5)

class WithMuon(Plain):
    def configure_optimizers(self):
        return torch.optim.Muon([p for p in self.parameters() if p.ndim == 2])

class Whole(Plain):
    def __init__(self, width: int = 3):
        super().__init__(width)

    def train_dataloader(self):
        return Data().train_dataloader()

class Free(L.LightningModule):
    def __init__(self, **kwargs):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Linear(self.hparams.width, 1)

    training_step = Plain.training_step

class Wrong(Plain):
    def training_step(self, batch, batch_idx):
        a, b, c = batch

class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 3)), batch_size=4)

    val_dataloader = train_dataloader

class Sized(Data):
    def __init__(self, batch_size: int = 2):
        super().__init__()
        self.batch_size = batch_size
"""
PLAIN = ["--model=mine_other.Plain", "--model.width=3", "--data=mine_other.Data"]
LOGS = "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: logs, name: null}}, enable_checkpointing: true}"


@pytest.fixture(autouse=True)
def _mine(tmp_path: Path) -> Iterator[None]:
    """A module of the user's in the folder where the program is started."""
    (tmp_path / "mine_other.py").write_text(MINE)
    (tmp_path / "logs.yaml").write_text(LOGS)
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("mine_other", None)


def told(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "config",
    [
        "model: {class_path: mine_other.Plain, init_args: {width: 3, hidden: 5}}\ndata: {class_path: mine_other.Sized}",
        "model: {class_path: mine_other.Plain, width: 3, hidden: '${data.init_args.batch_size}'}\n"
        "data: {class_path: mine_other.Sized, init_args: {batch_size: 5}}",
        "model: {width: 3, hidden: 5}",
        "model: mine_other.Plain\ndata: mine_other.Sized",
    ],
)
def test_every_way_to_choose(run: Run, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text(config)
    options = [] if "class_path" in config else ["--model=mine_other.Plain", "--data", "mine_other.Sized"]
    options += ["--model.init_args.width=3", "--model.hidden=5"] if config.startswith("model: mine") else []
    cli = run("fit", "--config=my.yaml", *options)
    assert type(cli.model).__name__ == "Plain"
    assert type(cli.datamodule).__name__ == "Sized"
    assert cli.model.net[0].weight.shape == (5, 3)
    assert cli.trainer.global_step == 4
    left_out = (
        "left out of default.yaml, for mine_other.Plain and mine_other.Sized: model.dim, model.hidden, data.dim\n"
    )
    assert left_out in capsys.readouterr().err  # the default of `hidden` leads to `dim`


def test_the_module_gets_the_optimizer_and_the_schedule_of_the_defaults(run: Run) -> None:
    cli = run("fit", *PLAIN)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.defaults["momentum"] == 0.5
    assert {group["algorithm"] for group in optimizer.param_groups} == {"muon", "adamw"}
    config = cli.trainer.lr_scheduler_configs[0]
    assert (config.scheduler.T_max, config.interval) == (4, "step")
    assert all(group["lr"] == 0 for group in optimizer.param_groups)


def test_presets_set_the_added_optimizer_and_rules_route(run: Run) -> None:
    rules = '--model.rules=[{"pattern": "net.0.weight", "algorithm": "adamw"}]'
    cli = run("fit", *PLAIN, "--config=optimizer/keller_jordan", "--config=schedule/constant", rules)
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is MuonAdamW
    assert optimizer.defaults["update_scale"] == "keller_jordan"
    assert not cli.trainer.lr_scheduler_configs
    assert {g["name"]: g["param_names"] for g in optimizer.param_groups}["matrix"] == ["net.2.weight"]


def test_the_added_optimizer_under_fsdp2(run: Run) -> None:
    environment = dict(os.environ)  # Lightning adds the port of the process group
    try:
        cli = run("fit", *PLAIN, "--model.optimizer=MuonAdamW", "--model.optimizer.lr=0.1", "--trainer.strategy=fsdp2")
        assert type(cli.trainer.optimizers[0]) is MuonAdamW
        assert cli.trainer.global_step == 4
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(environment)


def test_a_run_is_repeated_resumed_and_loaded(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    first = run("fit", *PLAIN, "--config=logs.yaml", "--model.optimizer=MuonAdamW", "--model.optimizer.lr=0.1")
    folder = Path(str(first.trainer.log_dir))
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["class_path"] == "mine_other.Plain"
    assert saved["model"]["init_args"]["width"] == 3
    assert saved["data"] == {"class_path": "mine_other.Data", "init_args": {}}
    again = run("fit", f"--config={folder / 'config.yaml'}")
    assert torch.equal(again.model.net[0].weight, first.model.net[0].weight)

    checkpoint = str(next((folder / "checkpoints").glob("*.ckpt")))
    classes = ["--model=mine_other.Plain", "--data=mine_other.Data"]
    # The width and the optimizer come from the checkpoint, though the class saves nothing.
    resumed = run("fit", *classes, f"--ckpt_path={checkpoint}", "--trainer.max_steps=5", "--model.optimizer.lr=0.2")
    assert resumed.trainer.global_step == 5
    assert type(resumed.trainer.optimizers[0]) is MuonAdamW
    assert resumed.model.net[0].in_features == 3
    assert "model.optimizer.lr: 0.1 in the checkpoint, 0.2 used" in capsys.readouterr().err
    loaded = sys.modules["mine_other"].Plain.load_from_checkpoint(checkpoint)
    assert torch.equal(loaded.net[0].weight, first.model.net[0].weight)

    line = told(capsys, lambda: run("validate", f"--ckpt_path={checkpoint}"))
    assert line.endswith("; it is of --model mine_other.Plain")


def test_arguments_without_names_go_below_dict_kwargs(run: Run) -> None:
    options = ["--model=mine_other.Free", "--data=mine_other.Data", "--model.dict_kwargs.width=3", "--config=logs.yaml"]
    cli = run("fit", *options)
    assert cli.model.net.weight.shape == (1, 3)
    config = Path(str(cli.trainer.log_dir)) / "config.yaml"
    assert run("fit", f"--config={config}").model.net.weight.equal(cli.model.net.weight)


def test_only_the_data_or_only_the_module(run: Run) -> None:
    Path("default.yaml").write_text(Path("default.yaml").read_text() + "  batch_size: 8\n")
    other_data = run("fit", "--data=mine_other.Sized", "--model.dim=3")
    assert type(other_data.model).__name__ == "TinyModule"
    assert other_data.datamodule.batch_size == 8  # as the default config has it
    other_module = run("fit", "--model=mine_other.Plain", "--model.width=4", "--trainer.max_steps=2")
    assert type(other_module.datamodule).__name__ == "TinyData"


def test_a_module_may_have_its_data_with_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run("fit", "--model=mine_other.Whole")
    assert cli.datamodule is None
    assert (
        "left out of default.yaml, for mine_other.Whole: model.dim, model.hidden, data.dim" in capsys.readouterr().err
    )
    asked = run("fit", "--model=mine_other.Whole", "--data=mine_other.Sized")
    assert type(asked.datamodule).__name__ == "Sized"
    assert run("fit", "--model=mine_other.Whole", "--data=null").datamodule is None


def test_a_config_for_one_class_below_another(run: Run) -> None:
    Path("a.yaml").write_text(
        "model: {class_path: mine_other.Plain, init_args: {width: 3, hidden: 5}}\ndata: {class_path: mine_other.Data}"
    )
    cli = run("fit", "--config=a.yaml", "--model=mine_other.Whole")
    assert type(cli.model).__name__ == "Whole"
    assert type(cli.datamodule).__name__ == "Data"


def test_what_is_printed_is_a_config(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", *PLAIN, "--print_config")
    Path("printed.yaml").write_text(capsys.readouterr().out)
    cli = run("fit", "--config=printed.yaml")
    assert type(cli.model).__name__ == "Plain"
    assert type(cli.datamodule).__name__ == "Data"


def test_help_shows_the_arguments_of_the_chosen_class(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("fit", *PLAIN, "--help")
    shown = capsys.readouterr().out
    assert "A module that makes no optimizer" in shown
    assert "--model.width WIDTH" in shown
    assert "--model.optimizer" in shown
    assert "--model.dim" not in shown


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("--model=mine_other.Plan", "model: module mine_other has no Plan; did you mean 'Plain'?"),
        ("--model=mine_othr.Plain", "model: cannot import mine_othr.Plain, there is no module 'mine_othr'"),
        (
            "--model=Plane",
            "model: expected a class by its import path, such as my_package.my_module.MyClass, got 'Plane'",
        ),
        ("--model=torch.nn.Linear", "model: expected a LightningModule, got 'torch.nn.Linear'; --model.net torch.nn"),
        ("--data=mine_other.Plain", "data: expected a LightningDataModule, got 'mine_other.Plain'"),
        ("--model=mine_other.Plain", "a value is missing for mine_other.Plain: --model.width"),
        ("--model=mine_other.Plain --model.width=x", "model.width: expected a whole number, got 'x'"),
        (
            "--model=mine_other.Plain --model.wdth=3",
            "unknown key 'model.wdth' for mine_other.Plain; did you mean 'model.w",
        ),
        (
            "--model=mine_other.Plain --model.width=3 --model.dim=3",
            "unknown key 'model.dim' for mine_other.Plain; did you",
        ),
        (
            "--model=mine_other.Plain --model.width=3 --config=w.yaml",
            "unknown key 'model.dim' for mine_other.Plain (in w",
        ),
        ("--data=mine_other.Data --data.batch_size=3", "unknown key 'data.batch_size' for mine_other.Data"),
        (
            "--model=mine_other.Own --model.width=3 --config=optimizer/moonlight",
            f"model.optimizer (in {REPOSITORY}/configs/optimizer/moonlight.yaml) is set, but mine_other.Own has no"
            " argument 'optimizer', and makes its optimizer itself: add 'optimizer: OptimizerCallable = MuonAdamW' to",
        ),
        (
            "--model=mine_other.Own --model.width=3 --config=schedule/constant",
            f"model.lr_scheduler (in {REPOSITORY}/configs/schedule/constant.yaml) is set, but mine_other.Own has no",
        ),
        ("--model=mine_other.Own --model.width=3 --model.optimizer.lr=3", "model.optimizer is set, but mine_other.Own"),
        (
            "--config=optimizer/monlight",
            "config file 'optimizer/monlight' does not exist; did you mean 'optimizer/moon",
        ),
    ],
)
def test_errors_are_one_line(run: Run, capsys: pytest.CaptureFixture[str], args: str, line: str) -> None:
    Path("w.yaml").write_text("model: {dim: 3}")
    assert told(capsys, lambda: run("fit", *args.split())).startswith(f"error: {line}")


def test_a_metric_of_another_name_is_told(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = "[{class_path: ModelCheckpoint, init_args: {monitor: val/loss}}]"
    Path("best.yaml").write_text(f"trainer: {{callbacks: {callbacks}}}")
    line = told(capsys, lambda: run("fit", *PLAIN, "--config=best.yaml", "--config=logs.yaml"))
    assert line == (
        "error: ModelCheckpoint: no metric 'val/loss' was logged: log it, or give the checkpoint another 'monitor' in a"
        " config; did you mean 'val_loss'?"
    )


def test_a_mistake_in_a_step_keeps_its_traceback(run: Run) -> None:
    with pytest.raises(ValueError, match="not enough values to unpack"):
        run("fit", "--model=mine_other.Wrong", "--model.width=3", "--data=mine_other.Data")


@pytest.mark.parametrize("module", ["Plain", "Own", "WithMuon"])
def test_a_foreign_module_gets_the_monitors_by_one_argument(module: str) -> None:
    options = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=2"]
    classes = [f"--model=mine_other.{module}", "--model.width=3", "--data=mine_other.Data"]
    cli = main(args=["fit", *classes, "--config=monitors", "--trainer.max_steps=8", *options])
    assert next(Path("logs").rglob("last.ckpt"))
    metrics = set(cli.trainer.callback_metrics)
    assert "watch/optimizer_share" in metrics
    assert ("watch/orthogonality_error/max" in metrics) == (module != "Own")
    assert any(name.startswith("lr-") for name in metrics)


def test_the_monitors_are_those_of_the_default_config() -> None:
    names = [
        [callback["class_path"] for callback in yaml.safe_load(path.read_text())["trainer"]["callbacks"]]
        for path in (REPOSITORY / "configs" / name for name in ("monitors.yaml", "default.yaml"))
    ]
    assert names[0] == names[1]
