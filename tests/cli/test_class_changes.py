"""Another class in the place of one: of its arguments nothing passes on that was not given for the new class."""

from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from lightning_muon.cli import MuonCLI, main
from lightning_muon.cli.optimizer_settings import optimizer_settings
from lightning_muon.optim import MuonAdamW
from tests.cli.conftest import TinyData, TinyModule

Run = Callable[..., MuonCLI]
Parse = Callable[..., dict[str, Any]]
pytestmark = pytest.mark.timeout(60)

HERE = "tests.cli.test_class_changes"
MORE_DEFAULTS = f"""
  net:
    class_path: {HERE}.Wide
    init_args:
      inputs: ${{data.dim}}
      width: 3
      activation: {{class_path: torch.nn.LeakyReLU, init_args: {{inplace: true}}}}
"""
LISTS = """
trainer:
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: logs, name: null, prefix: x}}
  callbacks: [{class_path: ModelCheckpoint, init_args: {monitor: val/loss, mode: max, verbose: true}}]
  strategy: {class_path: DDPStrategy, init_args: {process_group_backend: gloo, find_unused_parameters: true}}
"""


class Wide(nn.Module):
    def __init__(self, inputs: int, width: int = 8, activation: nn.Module | None = None, **options: int) -> None:
        super().__init__()


class Deep(nn.Module):
    def __init__(self, inputs: int, width: int = 9, activation: nn.Module | None = None, **options: int) -> None:
        super().__init__()


class ToTheEnd(CosineAnnealingLR):
    def __init__(self, optimizer: torch.optim.Optimizer, T_max: int, eta_min: float = 0.25) -> None:  # noqa: N803
        super().__init__(optimizer, T_max, eta_min)


class NeedsRate(torch.optim.SGD):
    def __init__(self, params: Any, lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, lr=lr, momentum=momentum)


class Untyped(torch.optim.SGD):
    def __init__(self, params, lr, momentum=0.0) -> None:  # type: ignore[no-untyped-def]
        super().__init__(params, lr=lr, momentum=momentum)


class WithMuon(TinyModule):
    """With another class as its own default, whose defaults do not pass on either."""

    def __init__(self, net: nn.Module, optimizer: OptimizerCallable = MuonAdamW, **options: Any) -> None:
        super().__init__(optimizer=optimizer, **options)


@pytest.fixture
def parse(capsys: pytest.CaptureFixture[str]) -> Parse:
    """Returns the configuration of a command line, or its error."""
    Path("default.yaml").write_text(Path("default.yaml").read_text().replace("data:", f"{MORE_DEFAULTS}\ndata:"))
    Path("lists.yaml").write_text(LISTS)

    def parsed(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            main(WithMuon, TinyData, default_config="default.yaml", args=["fit", *args, "--print_config"])
        said = capsys.readouterr()
        if end.value.code:
            return {"error": said.err.splitlines()[-1].removeprefix("error: ")}
        config: dict[str, Any] = yaml.safe_load(said.out)
        return config

    return parsed


def optimizer_of(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    spec = config["model"]["optimizer"] if "model" in config else {"class_path": config["error"], "init_args": {}}
    return spec["class_path"], spec["init_args"]


def defaults_of(kind: type, **given: Any) -> dict[str, Any]:
    """Return what a class gets when only this is given, as YAML has it."""
    found = {name: parameter.default for name, parameter in list(signature(kind).parameters.items())[1:]}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in {**found, **given}.items()}


@pytest.mark.parametrize(
    "args",
    [
        ["--model.optimizer", "AdamW"],
        ["--model.optimizer=torch.optim.AdamW"],
        ["--model.optimizer.class_path=torch.optim.AdamW"],
        ["--config=short.yaml"],
        ["--config={model: {optimizer: {class_path: torch.optim.adamw.AdamW}}}"],
        ["--model.optimizer=MuonAdamW", "--model.optimizer=AdamW"],
        ["--config={model: {optimizer: {init_args: {lr: 0.5}}}}", "--model.optimizer=AdamW"],
    ],
)
def test_a_class_has_its_own_defaults(parse: Parse, args: list[str]) -> None:
    """The default config has SGD with arguments that AdamW takes too."""
    Path("short.yaml").write_text("model: {optimizer: AdamW}")
    assert optimizer_of(parse(*args)) == ("torch.optim.AdamW", defaults_of(torch.optim.AdamW))


@pytest.mark.parametrize("path", ["SGD", "torch.optim.SGD", "torch.optim.sgd.SGD"])
def test_what_was_given_for_the_same_class_stays(parse: Parse, path: str) -> None:
    given = defaults_of(torch.optim.SGD, lr=0.125, momentum=0.5, weight_decay=0.25)
    assert optimizer_of(parse(f"--model.optimizer={path}")) == ("torch.optim.SGD", given)
    Path("sgd.yaml").write_text(f"model: {{optimizer: {{class_path: {path}, init_args: {{nesterov: true}}}}}}")
    assert optimizer_of(parse("--config=sgd.yaml")) == ("torch.optim.SGD", {**given, "nesterov": True})


@pytest.mark.parametrize(
    ("args", "given"),
    [
        ("--model.optimizer=AdamW --model.optimizer.lr 0.5", {"lr": 0.5}),
        ("--model.optimizer.lr 0.5 --model.optimizer AdamW", {"lr": 0.5}),
        (
            "--model.optimizer.lr=0.5 --model.optimizer.class_path=AdamW --model.optimizer.eps=1.0",
            {"lr": 0.5, "eps": 1},
        ),
        ("--model.optimizer.init_args.lr=0.5 --config=adamw.yaml", {"lr": 0.5, "eps": 0.25}),
        # Of two that say the same, the later one wins.
        ("--model.optimizer.lr=0.5 --model.optimizer.eps=0.5 --config=adamw.yaml", {"lr": 0.5, "eps": 0.25}),
        ("--config=adamw.yaml --model.optimizer.eps=0.5", {"eps": 0.5}),
        ("--model.optimizer.lr=0.5 --model.optimizer.lr=0.75 --model.optimizer=AdamW", {"lr": 0.75}),
        ("--model.optimizer.amsgrad=true --model.optimizer=SGD --model.optimizer=AdamW", {"amsgrad": True}),
    ],
)
def test_an_option_is_for_the_class_beside_it(parse: Parse, args: str, given: dict[str, Any]) -> None:
    """In either order. SGD, which the default config has, takes no `amsgrad`."""
    Path("adamw.yaml").write_text("model: {optimizer: {class_path: AdamW, init_args: {eps: 0.25}}}")
    assert optimizer_of(parse(*args.split()))[1] == defaults_of(torch.optim.AdamW, **given)


def test_an_option_as_one_value_with_the_class(parse: Parse) -> None:
    both = "{class_path: AdamW, init_args: {eps: 0.25}}"
    found = optimizer_of(parse("--model.optimizer.lr=0.5", "--model.optimizer.eps=1", "--model.optimizer", both))[1]
    assert found == defaults_of(torch.optim.AdamW, lr=0.5, eps=0.25)


@pytest.mark.parametrize("args", ["{momentum} {adamw}", "{adamw} {momentum}", "{momentum} --config=short.yaml"])
def test_an_option_that_the_new_class_does_not_have_is_an_error(parse: Parse, args: str) -> None:
    Path("short.yaml").write_text("model: {optimizer: AdamW}")
    options = args.format(momentum="--model.optimizer.momentum=0.5", adamw="--model.optimizer=AdamW").split()
    line = "unknown key 'model.optimizer.momentum' for torch.optim.AdamW; AdamW takes lr, betas, eps"
    assert parse(*options)["error"].startswith(line)


def test_interpolations_pass_on_and_values_do_not(parse: Parse) -> None:
    """They say where a value comes from: `T_max: ${trainer.max_steps}` and `inputs: ${data.dim}`."""
    fall = "--model.lr_scheduler.eta_min=0.5"
    before = parse("--model.lr_scheduler=CosineAnnealingLR", fall)["model"]["lr_scheduler"]["init_args"]
    assert (before["T_max"], before["eta_min"]) == (4, 0.5)
    Path("fall.yaml").write_text("model: {lr_scheduler: {init_args: {eta_min: 0.5}}}")
    schedule = parse("--config=fall.yaml", f"--model.lr_scheduler={HERE}.ToTheEnd")["model"]["lr_scheduler"]
    assert schedule["init_args"] == {"T_max": 4, "eta_min": 0.25}
    net = parse(f"--model.net={HERE}.Deep", "--model.dim=5")["model"]["net"]
    assert net["init_args"] == {"inputs": 5, "width": 9, "activation": None}


def test_a_class_among_the_arguments_of_a_class(parse: Parse) -> None:
    def network(*args: str) -> Any:
        return parse(*args)["model"]["net"]["init_args"]

    assert network("--model.net.activation=torch.nn.ELU")["activation"]["init_args"] == {"alpha": 1.0, "inplace": False}
    assert network("--model.net.activation=torch.nn.LeakyReLU")["activation"]["init_args"]["inplace"] is True
    inner = ["--model.net.activation.alpha=2.0", "--model.net.activation=torch.nn.ELU", "--model.net.width=5"]
    for args in ([*inner, f"--model.net={HERE}.Deep"], [f"--model.net={HERE}.Deep", *inner]):
        found = network(*args)
        assert found["width"] == 5
        assert found["activation"] == {"class_path": "torch.nn.ELU", "init_args": {"alpha": 2.0, "inplace": False}}


def test_arguments_without_a_name_stay_behind_too(parse: Parse) -> None:
    free = ["--model.net.dict_kwargs.heads=2", "--model.net.dict_kwargs.heads=3"]
    assert parse(free[0])["model"]["net"]["dict_kwargs"] == {"heads": 2}
    Path("free.yaml").write_text("model: {net: {dict_kwargs: {heads: 2}}}")
    assert "dict_kwargs" not in parse("--config=free.yaml", f"--model.net={HERE}.Deep")["model"]["net"]
    assert parse(*free, f"--model.net={HERE}.Deep")["model"]["net"]["dict_kwargs"] == {"heads": 3}


def test_logger_callbacks_and_strategy(parse: Parse) -> None:
    """A callback at the place of another, in a list as long."""
    callbacks = "[{class_path: EarlyStopping, init_args: {monitor: loss}}]"
    Path("other.yaml").write_text(f"trainer: {{callbacks: {callbacks}, strategy: {{class_path: FSDPStrategy}}}}")
    args = ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here"]
    trainer = parse("--config=lists.yaml", "--config=other.yaml", *args)["trainer"]
    assert (trainer["logger"]["init_args"]["name"], trainer["logger"]["init_args"]["prefix"]) == ("lightning_logs", "")
    (callback,) = trainer["callbacks"]
    assert (callback["init_args"]["mode"], callback["init_args"]["verbose"]) == ("min", False)
    assert trainer["strategy"]["init_args"]["process_group_backend"] is None
    assert "dict_kwargs" not in trainer["strategy"]


def test_null_after_an_option_is_null(parse: Parse) -> None:
    assert parse("--model.lr_scheduler.T_max=3", "--model.lr_scheduler=null")["model"]["lr_scheduler"] is None


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (f"--model.optimizer={HERE}.NeedsRate", f"{HERE}.NeedsRate: --model.optimizer.lr"),
        (f"--model.optimizer={HERE}.Untyped", f"{HERE}.Untyped: --model.optimizer.lr"),
        ("--config=rate.yaml", f"{HERE}.NeedsRate: --model.optimizer.lr (in rate.yaml)"),
    ],
)
def test_a_missing_argument_is_told(run: Run, capsys: pytest.CaptureFixture[str], args: str, line: str) -> None:
    Path("rate.yaml").write_text(f"model: {{optimizer: {{class_path: {HERE}.NeedsRate}}}}")
    with pytest.raises(SystemExit) as end:
        run("fit", *args.split())
    assert end.value.code == 2
    told = f"error: a value is missing for {line}; the value in default.yaml is for another class"
    assert capsys.readouterr().err.splitlines()[-1] == told
    rate = run("fit", *args.split(), "--model.optimizer.lr=0.5").trainer.optimizers[0].defaults
    assert (rate["lr"], rate["momentum"]) == (0.5, 0.0)


def test_a_run_has_the_optimizer_of_torch_and_goes_on_with_it(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.eps=1e-6"]
    first = run("fit", *chosen, "--config=checkpoints.yaml", "--trainer.default_root_dir=first")
    (optimizer,) = first.trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults == torch.optim.AdamW([torch.zeros(1)], eps=1e-6).defaults

    checkpoint = f"--ckpt_path={next(Path('first').rglob('last.ckpt'))}"
    model = yaml.safe_load(Path("first/config.yaml").read_text())["model"]
    capsys.readouterr()
    for args in (["--config=first/config.yaml"], []):  # with its own config, or with that of the checkpoint
        again = run("fit", checkpoint, *args, "--trainer.max_steps=5", "--trainer.default_root_dir=again")
        groups = [{**group, "params": None, "lr": None} for group in again.trainer.optimizers[0].param_groups]
        assert groups == [{**group, "params": None, "lr": None} for group in optimizer.param_groups]
        assert "model.optimizer" not in capsys.readouterr().err.replace("model.optimizer=torch.optim.AdamW", "")
    saved = [yaml.safe_load(Path("again", name).read_text())["model"] for name in ("config.yaml", "config-1.yaml")]
    assert saved[0] == model
    assert saved[1]["optimizer"] == model["optimizer"]


@pytest.mark.parametrize(
    ("args", "rate", "decay"),
    [
        (["--model.optimizer=AdamW"], 0.001, 0.01),
        (["--config=sgd.yaml", "--model.optimizer=AdamW", "--model.optimizer.lr=0.5"], 0.5, 0.01),
        (["--config=sgd.yaml"], 0.125, 0.0625),
    ],
)
def test_sweep_and_compare_see_the_same(args: Sequence[str], rate: float, decay: float) -> None:
    """They ask for `optimizer_settings`, which parses as `fit` does."""
    Path("sgd.yaml").write_text("model: {optimizer: {class_path: SGD, init_args: {weight_decay: 0.0625}}}")
    found = optimizer_settings(TinyModule, TinyData, "default.yaml", args)
    assert (found["lr"], found["weight_decay"]) == (rate, decay)
