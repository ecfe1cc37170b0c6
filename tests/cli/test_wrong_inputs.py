"""The table of wrong inputs: exit code 2, one line that names what is wrong, no traceback, nothing left behind."""

import errno
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.cli import MuonCLI
from lightning_muon.cli.config_files import ConfigFileError, parse_config

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)

LEVELS = "".join(f"{c}: &{c} [{', '.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))

# Contents of a file, and a part of the line about it.
CONFIGS: dict[str | bytes, str] = {
    "3": "config file 'my.yaml' holds no keys",
    "- a\n- b": "config file 'my.yaml' holds no keys",
    "a: 1\n---\nb: 2": "config file 'my.yaml', line 2: but found another document",
    "trainer:\n\tmax_steps: 3": "config file 'my.yaml', line 2: found character '\\t'",
    "model: {dim: 3": "config file 'my.yaml', line 1: expected ',' or '}'",
    "model:\n  dim: 3\n dim: 4": "config file 'my.yaml', line 3: ",
    "trainer: {max_steps: 1}\ntrainer: {max_steps: 2}": "line 2: the key 'trainer' stands twice",
    "model:\n  dim: 1\n  scale: 2\n  dim: 2": "line 4: the key 'dim' stands twice",
    "1: 2": "config file 'my.yaml': the key 1 is not a text",
    "true: {a: 1}": "the key True is not a text",
    "? [a, b]\n: 1": "config file 'my.yaml', line 1: found unhashable key",
    "trainer: [1]": "expected keys and values below 'trainer:', got [1]",
    "trainer: fast": "expected keys and values below 'trainer:', got 'fast'",
    "data: 3": "expected keys and values below 'data:', got 3",
    "model: [a]": "expected keys and values below 'model:', got ['a']",
    "model: fast": "model: expected a class by its import path, such as my_package.my_module.MyClass, got 'fast'",
    "model: {dim: '${model.dim}'}": "model.dim: ${model.dim} leads back to itself (in my.yaml): model.dim → model.dim",
    "model: {dim: '${model.hidden}', hidden: '${model.dim}'}": "model.dim → model.hidden → model.dim",
    "model: {dim: '${model.hidden}', hidden: '${data.dim}'}\ndata: {dim: '${model.dim}'}": "→ data.dim → model.dim",
    "model: ${model}": "model: ${model} leads back to itself",
    "model: {dim: '${model}'}": "model.dim: ${model} leads back to itself (in my.yaml): model.dim → model",
    "trainer: {max_steps: '${trainer.max_steps}'}": "trainer.max_steps: ${trainer.max_steps} leads back to itself",
    "model: {dim: '${model.dim'}": "model.dim: '${model.dim' is no interpolation (in my.yaml)",
    "model: {dim: '${}'}": "model.dim: '${}' is no interpolation",
    "model: {dim: '${model dim}'}": "model.dim: '${model dim}' is no interpolation",
    "model: {dim: '${model.${}}'}": "is no interpolation (in my.yaml): write ${model.dim}",
    "model: {dim: '${modle.hidden}'}": "model.dim: ${modle.hidden} leads to no key (in my.yaml); did you mean",
    "model: {dim: '${model.hidden+1}'}": "model.dim: ${model.hidden+1}: Interpolation key 'model.hidden+1' not found",
    "model: {dim: '${nope:3}'}": "model.dim: ${nope:3}: there is no 'nope:' (in my.yaml)",
    "model: {dim: '${oc.env:NOT_SET}'}": "model.dim: ${oc.env:NOT_SET}: the environment has no variable 'NOT_SET'",
    "model: {dim: '${oc.env:PATH}'}": "model.dim: expected a whole number, got '${oc.env:PATH}' (in my.yaml)",
    "model: {dim: '${oc.select:}'}": "model.dim: ${oc.select:}: it cannot be resolved (in my.yaml)",
    "model: {dim: '???'}": "model.dim: expected a whole number, got '???'",
    "a: &a\n  b: *a": "config file 'my.yaml', line 1: what the anchor here names contains itself",
    "model: &a\n  dim: *a": "line 1: what the anchor here names contains itself",
    "trainer:\n  callbacks: &c\n    - *c": "line 2: what the anchor here names contains itself",
    "model: &a\n  <<: *a\n  dim: 4": "line 1: what the anchor here names contains itself",
    "model: *nope": "config file 'my.yaml', line 1: found undefined alias 'nope'",
    f"a: &a [x, x, x, x, x, x, x, x, x]\n{LEVELS}": "line 6: its aliases stand for more than 100000 values",
    f"model:\n  dim: &a [x, x, x]\n{LEVELS}": "its aliases stand for more than 100000 values",
    f"a: {'[' * 60}{']' * 60}": "config file 'my.yaml', line 1: it has more than 50 levels",
    f"a: {'{b: ' * 900}1{'}' * 900}": "config file 'my.yaml' has more than 50 levels",
    "model: !!python/object/apply:os.system ['touch pwned']": "line 1: could not determine a constructor for the tag",
    "model: !mine {a: 1}": "line 1: could not determine a constructor for the tag '!mine'",
    "a: 2001-99-99": "config file 'my.yaml': month must be in 1..12",
    b"\xff\xfe\x00\x01": "config file 'my.yaml' is not a text file",
    "model: {dim: 4}".encode("utf-16"): "config file 'my.yaml' is not a text file in UTF-8",
    "model: {activation: 'é'}".encode("latin-1"): "config file 'my.yaml' is not a text file in UTF-8",
    "model: {dim: 3}\0": "config file 'my.yaml': not a YAML file",
    "trainer: {callbacks+: [{init_args: {patience: 2}}]}": "entry 1 of trainer.callbacks has no class_path, only",
    "trainer: {callbacks: [{}]}": "config file 'my.yaml': entry 1 of trainer.callbacks has no class_path",
    "trainer: {callbacks: [{class_path: Timer}, {class: Timer}]}": "entry 2 of trainer.callbacks has no class_path",
    "trainer: {callbacks: [null]}": "entry 1 of trainer.callbacks is None: expected 'class_path: '",
    "trainer: {callbacks: [3]}": "entry 1 of trainer.callbacks is 3",
    "trainer: {callbacks: [{class_path: null}]}": "entry 1 of trainer.callbacks has no class_path",
    "trainer: {callbacks: [{class_path: os.getcwd}]}": "trainer.callbacks: expected a class that can stand here",
    "trainer: {callbacks: [{class_path: torch.nn.ReLU}]}": "trainer.callbacks: expected a class that can stand here",
    "trainer: {callbacks: abc}": "trainer.callbacks: expected a class by its name or import path, got 'abc'",
    "trainer: {logger: {init_args: {save_dir: x}}}": "(in my.yaml)",
    "trainer: {strategy: {init_args: {x: 1}}}": "trainer.strategy: expected a text",
    "model: {optimizer: {class: SGD}}": "unknown key 'model.optimizer.class' for torch.optim.SGD (in my.yaml)",
    "model: {lr_scheduler: {class_path: StepLR}}": "a value is missing for torch.optim.lr_scheduler.StepLR",
    "config: other.yaml": "config is not valid here, got 'other.yaml' (in my.yaml)",
    "fit: {model: {dim: 16}}": "unknown key 'fit.model.dim' (in my.yaml); did you mean 'model.dim'",
    "ckpt_path: nope.ckpt": "--ckpt_path: 'nope.ckpt' does not exist",
    "seed_everything: abc": "seed_everything: expected true or false or a whole number, got 'abc' (in my.yaml)",
    "seed_everything: -1": "seed_everything must be from 0 to 4294967295, got -1 (in my.yaml)",
    "trainer: {accumulate_grad_batches: 0}": "trainer.accumulate_grad_batches must be at least 1, got 0 (in my.yaml)",
    "trainer: {gradient_clip_val: .inf}": "trainer.gradient_clip_val must be a finite number, got inf (in my.yaml)",
}

CHECKPOINTING = "--trainer.enable_checkpointing=true --trainer.callbacks=ModelCheckpoint"
COMMAND_LINES: dict[str, str] = {
    # values out of range
    "--model.lr_scheduler.T_max=0": "model.lr_scheduler.T_max must be at least 1, got 0",
    "--model.lr_scheduler.T_max=-1": "model.lr_scheduler.T_max must be at least 1, got -1",
    "--model.lr_scheduler=StepLR --model.lr_scheduler.step_size=0": "model.lr_scheduler.step_size must be at least 1",
    "--model.lr_scheduler=CosineAnnealingWarmRestarts --model.lr_scheduler.T_0=-3": "model.lr_scheduler.T_0 must be at",
    "--model.lr_scheduler.eta_min=.nan": "model.lr_scheduler.eta_min must be a finite number, got nan",
    "--model.optimizer.lr=.inf": "model.optimizer.lr must be a finite number, got inf",
    "--model.optimizer.lr=-.inf": "model.optimizer.lr must be a finite number, got -inf",
    "--model.optimizer.momentum=.nan": "model.optimizer.momentum must be a finite number, got nan",
    "--model.optimizer.lr=nan": "model.optimizer.lr: expected a number, got 'nan'",
    "--model.scale=-1": "scale is -1.0, but must not be negative",
    "--model.dim=1e400": "model.dim: expected a whole number, got '1e400'",
    "--model.dim=": "model.dim: expected a whole number, got ''",
    "--model.dim=16 --model.dim=x": "model.dim: expected a whole number, got 'x'",
    "--seed_everything=-1": "seed_everything must be from 0 to 4294967295, got -1",
    "--seed_everything=99999999999999999999": "seed_everything must be from 0 to 4294967295",
    "--seed_everything=1.5": "seed_everything: expected true or false or a whole number",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches must be at least 1, got 0",
    "--trainer.accumulate_grad_batches=-1": "trainer.accumulate_grad_batches must be at least 1, got -1",
    "--trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch must be at least 1, got 0",
    "--trainer.gradient_clip_val=-1": "trainer.gradient_clip_val must be at least 0, got -1",
    "--trainer.gradient_clip_val=.nan": "trainer.gradient_clip_val must be a finite number, got nan",
    "--trainer.log_every_n_steps=-1": "trainer.log_every_n_steps must be at least 0, got -1",
    "--trainer.min_steps=-1": "trainer.min_steps must be at least 0, got -1",
    "--trainer.min_epochs=-1": "trainer.min_epochs must be at least 0, got -1",
    "--trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps must be at least -1, got -2",
    "--trainer.val_check_interval=0": "trainer.val_check_interval must be over 0, got 0",
    "--trainer.val_check_interval=-.inf": "trainer.val_check_interval must be a finite number, got -inf",
    "--trainer.limit_train_batches=.inf": "trainer.limit_train_batches must be a finite number, got inf",
    "--trainer.limit_val_batches=-.inf": "trainer.limit_val_batches must be a finite number, got -inf",
    "--trainer.limit_val_batches=-inf": "trainer.limit_val_batches: expected a whole number or a number or null",
    "--trainer.overfit_batches=.nan": "trainer.overfit_batches must be a finite number, got nan",
    "--trainer.limit_train_batches=-1": "You have passed invalid value -1 for limit_train_batches",
    "--trainer.max_steps=-2": "trainer.max_steps must be at least -1, got -2",
    "--trainer.max_epochs=-2": "trainer.max_epochs must be at least -1, got -2",
    "--trainer.max_time=soon": "`Timer(duration='soon')` is not a valid duration",
    "--trainer.devices=x": "`devices` selected with `CPUAccelerator` should be an int > 0",
    "--trainer.devices=0": "`Trainer(devices='0')` value is not a valid input",
    "--trainer.devices=-2": "`devices` selected with `CPUAccelerator` should be an int > 0",
    "--trainer.num_nodes=0": "`num_nodes` must be a positive integer, but got 0",
    "--trainer.accelerator=quantum": "You selected an invalid accelerator name: `accelerator='quantum'`",
    "--trainer.precision=8": "trainer.precision: expected one of",
    "--trainer.fast_dev_run=-1": "fast_dev_run=-1 is not a valid configuration",
    "--trainer.gradient_clip_algorithm=x": "`gradient_clip_algorithm` x is invalid",
    "--trainer.val_check_interval=100": "`val_check_interval` (100) must be less than or equal to the number",
    "--trainer.barebones=true --trainer.logger=true": "was passed",
    # callbacks
    "--trainer.callbacks=WeightRMSMonitor --trainer.callbacks.max_weight_rms=.inf": "max_weight_rms must be",
    "--trainer.callbacks=WeightRMSMonitor --trainer.callbacks.max_lost_updates=.nan": "must be a number, got nan",
    "--trainer.callbacks=WeightRMSMonitor --trainer.callbacks.sample=-1": "WeightRMSMonitor: sample must be at least 1",
    "--trainer.callbacks=UpdateRMSMonitor --trainer.callbacks.max_ratio=.inf": "max_ratio must be at least 1",
    "--trainer.callbacks=AutoWeightDecay --trainer.callbacks.limit=.inf": "limit must be positive and finite, got inf",
    "--trainer.callbacks=AutoWeightDecay --trainer.callbacks.horizon=-1": "horizon must be at least 0, a whole number",
    "--trainer.callbacks=AutoWeightDecay --trainer.callbacks.target_rms=.nan": "trainer.callbacks.target_rms must be a",
    "--trainer.callbacks=MuonDashboard --trainer.callbacks.sample=0": "MuonDashboard: sample must be at least 1, got 0",
    "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=x --trainer.callbacks.patience=-1": "must be at",
    "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=x --trainer.callbacks.min_delta=.nan": "must be a",
    "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.save_top_k=-5": "Invalid value for save_top_k=-5",
    # forms of the command line
    "--model.dim=${model.dim}": "model.dim: ${model.dim} leads back to itself: model.dim → model.dim",
    "--model.dim=${": "model.dim: '${' is no interpolation",
    "--model.dim=${oc.env:NOT_SET}": "model.dim: ${oc.env:NOT_SET}: the environment has no variable 'NOT_SET'",
    "--model.hidden=&a[*a]": "--model.hidden",
    "--model.dim=\x1b[31mred": "model.dim: expected a whole number, got '\\x1b[31mred'",
    "--mod\u202eel=3": "unknown key 'mod\\u202eel'",
    "--config": "--config: a value is missing after it",
    "--config=": "config file '' does not exist",
    "--config=nope.yaml": "config file 'nope.yaml' does not exist",
    "--config=folder": "config file 'folder' is a folder: give a file in it",
    "--config=broken.yaml": "config file 'broken.yaml' is a link to a file that does not exist",
    "--config=/dev/null": "config file '/dev/null' is not a file on a disk",
    "--config=http://127.0.0.1:9/x.yaml": "config file 'http://127.0.0.1:9/x.yaml' does not exist",
    "--config={model:": "the text of --config, line 1: ",
    "--config={model:3}": "unknown key 'model:3'; did you mean 'model'?",
    f"--config={'x' * 300}": "cannot be read: File name too long",
    "--trainer.callbacks": "--trainer.callbacks: a value is missing after it",
    "--model": "--model: a value is missing after it",
    "--=3": "unknown key ''",
    "--ckpt_path=": "--ckpt_path: a value is missing after it",
    "--ckpt_path=nope.ckpt": "--ckpt_path: 'nope.ckpt' does not exist",
    "--ckpt_path=3": "--ckpt_path: '3' does not exist",
    # places that cannot be reached
    "--ckpt_path=http://127.0.0.1:9/x.ckpt": "--ckpt_path: 'http://127.0.0.1:9/x.ckpt' cannot be reached",
    "--ckpt_path=http://me:secret@127.0.0.1:9/x.ckpt?token=secret": "--ckpt_path: 'http://127.0.0.1:9/x.ckpt' cannot",
    "--ckpt_path=hf://owner/model/x.ckpt": "--ckpt_path: 'hf://owner/model/x.ckpt' cannot be reached",
    "--ckpt_path=s3://bucket/x.ckpt": "--ckpt_path: 's3://bucket/x.ckpt' cannot be reached",
    "--ckpt_path=nope://x": "--ckpt_path: 'nope://x' cannot be reached: Protocol not known: nope",
    # folders that cannot be written
    "--trainer.logger=CSVLogger --trainer.logger.save_dir=file": "trainer.logger.save_dir: '",
    "--trainer.logger=TensorBoardLogger --trainer.logger.save_dir=file/logs": "cannot be used: Not a directory; choose",
    "--trainer.default_root_dir=file": "trainer.default_root_dir: '",
    f"{CHECKPOINTING} --trainer.callbacks.dirpath=file": "trainer.callbacks.dirpath: '",
    "--trainer.default_root_dir=/proc/nothing": "trainer.default_root_dir: '/proc/nothing' cannot be used: ",
}


def left_behind(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def check_refused(
    run: Run, capsys: pytest.CaptureFixture[str], args: list[str], part: str, subcommand: str = "fit"
) -> None:
    before = left_behind(Path())
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(subcommand, *args)
    written = capsys.readouterr()
    assert stop.value.code == 2
    lines = [line for line in written.err.splitlines() if not re.match("Seed set|GPU available|TPU available|💡", line)]
    assert len(lines) == 1, written.err
    assert lines[0].startswith("error: ")
    assert part in lines[0]
    assert lines[0].isprintable()
    assert "secret" not in lines[0]
    assert "Traceback" not in written.out
    assert left_behind(Path()) == before


def test_the_table_is_long_enough() -> None:
    assert len(CONFIGS) + len(COMMAND_LINES) >= 120


@pytest.mark.parametrize("content", CONFIGS, ids=lambda content: str(content)[:40])
def test_configs(run: Run, capsys: pytest.CaptureFixture[str], content: str | bytes) -> None:
    file = Path("my.yaml")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    check_refused(run, capsys, ["--config", "my.yaml"], CONFIGS[content])


@pytest.mark.parametrize("line", COMMAND_LINES, ids=lambda line: line[:60])
def test_command_lines(run: Run, capsys: pytest.CaptureFixture[str], line: str) -> None:
    Path("folder").mkdir()
    Path("file").touch()
    Path("broken.yaml").symlink_to("nowhere")
    check_refused(run, capsys, line.split(" ") if line else [], COMMAND_LINES[line])


@pytest.mark.parametrize(
    "content",
    ["", "# trainer: {max_steps: 2}\n", "---\n", "null", "trainer:\n  # dim: 2\nmodel:\n", "\ufeffdata: {}"],
)
def test_what_is_commented_out_is_nothing(run: Run, content: str) -> None:
    Path("my.yaml").write_text(content)
    assert run("fit", "--config", "my.yaml", "--trainer.max_steps=1").trainer.global_step == 1


def test_a_default_config_may_be_commented_out(run: Run) -> None:
    Path("default.yaml").write_text("# nothing\n")
    options = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.logger=false"]
    assert run("fit", *options).trainer.global_step == 1


def test_a_bomb_is_refused_at_once() -> None:
    started = time.monotonic()
    with pytest.raises(ConfigFileError, match="its aliases stand for more than"):
        parse_config(f"a: &a [{', '.join('x' * 500)}]\n{LEVELS}", "it")
    assert time.monotonic() - started < 1


# ---- checkpoints


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch pwned",)


def save(content: Any) -> Callable[[Path, Path], None]:
    return lambda _, file: torch.save(content, file)


def change(**changes: Any) -> Callable[[Path, Path], None]:
    def write(good: Path, file: Path) -> None:
        torch.save({**torch.load(good, weights_only=True), **changes}, file)

    return write


def without(*keys: str) -> Callable[[Path, Path], None]:
    def write(good: Path, file: Path) -> None:
        checkpoint = torch.load(good, weights_only=True)
        torch.save({key: value for key, value in checkpoint.items() if key not in keys}, file)

    return write


def zipped(_: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")


def folder_without_metadata(good: Path, file: Path) -> None:
    file.mkdir()
    file.joinpath("meta.pt").write_bytes(good.read_bytes())


def old_format(good: Path, file: Path) -> None:
    torch.save(torch.load(good, weights_only=True), file, _use_new_zipfile_serialization=False)


CHECKPOINTS: Mapping[str, tuple[Callable[[Path, Path], Any], str]] = {
    "raw state dict": (save({"a": torch.ones(2)}), "'x.ckpt' holds weights only, not a checkpoint of Lightning"),
    "of another program": (
        save({"model": {"a": torch.ones(2)}, "step": 3}),
        "it has no 'pytorch-light",
    ),
    "a list": (save([1, 2]), "'x.ckpt' is not a checkpoint: it holds a list"),
    "a tensor": (save(torch.ones(2)), "'x.ckpt' is not a checkpoint: it holds a Tensor"),
    "empty dict": (save({}), "'x.ckpt' is not a checkpoint of Lightning"),
    "no state dict": (without("state_dict"), "it has no 'state_dict'"),
    "state dict is a list": (change(state_dict=[1]), "'x.ckpt' is damaged: its state_dict is a list"),
    "hyperparameters are a list": (change(hyper_parameters=[1]), "is damaged: its hyper_parameters is a list"),
    "step is a text": (change(global_step="x"), "'x.ckpt' is damaged: its global_step is a str"),
    "code": (change(more=Evil()), "'x.ckpt' holds more than plain values (posix.system), which could run code"),
    "text": (lambda _, file: file.write_text("hello"), "'x.ckpt' is not a checkpoint"),
    "empty": (lambda _, file: file.touch(), "'x.ckpt' is not a checkpoint: it is empty"),
    "cut off": (
        lambda good, file: file.write_bytes(good.read_bytes()[:-500]),
        "its end is missing",
    ),
    "another zip": (zipped, "'x.ckpt' is not a checkpoint, or is damaged"),
    "a pickle": (
        lambda _, file: file.write_bytes(pickle.dumps({"a": 1})),
        "it is a pickle",
    ),
    "old format": (old_format, "it is a pickle, such as torch saved before version 1.6"),
    "safetensors": (
        lambda _, file: file.write_bytes(b"\x10" + bytes(7) + b"{}" + bytes(14)),
        "a safetensors file",
    ),
    "empty folder": (lambda _, file: file.mkdir(), "the folder has no meta.pt and .metadata"),
    "half a folder": (folder_without_metadata, "'x.ckpt' is damaged: .metadata is missing"),
}


def test_what_is_no_checkpoint(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path.cwd()
    for kind, (write, part) in CHECKPOINTS.items():
        folder = home / kind
        folder.mkdir()
        folder.joinpath("default.yaml").write_bytes((home / "default.yaml").read_bytes())
        write(home / saved, folder / "x.ckpt")
        monkeypatch.chdir(folder)
        for subcommand in ("fit", "predict"):
            check_refused(run, capsys, ["--ckpt_path=x.ckpt"], part, subcommand)


def test_weights_of_lightning_serve_for_all_but_training(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    without("optimizer_states", "lr_schedulers", "loops")(Path(saved), Path("x.ckpt"))
    check_refused(run, capsys, ["--ckpt_path", "x.ckpt"], "was saved without the optimizer (save_weights_only)")
    assert run("validate", "--ckpt_path", "x.ckpt").trainer.callback_metrics["val/loss"] > 0


# ---- permissions; the tests may run as root, whom nothing is forbidden


def forbidden(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make the system refuse to open or write below a file or folder."""

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def refusing(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, (str, os.PathLike)) and name in Path(path).parts:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
            return original(path, *args, **options)

        return refusing

    import io

    monkeypatch.setattr("io.open", refuse(io.open))
    monkeypatch.setattr("builtins.open", refuse(open))
    for function in ("mkdir", "makedirs"):
        monkeypatch.setattr(os, function, refuse(getattr(os, function)))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: name not in Path(path).parts and access(path, mode))


def test_a_config_without_permission(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("my.yaml").write_text("model: {dim: 4}")
    forbidden(monkeypatch, "my.yaml")
    check_refused(run, capsys, ["--config=my.yaml"], "config file 'my.yaml' cannot be read: Permission denied")


def test_a_checkpoint_without_permission(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forbidden(monkeypatch, "last.ckpt")
    check_refused(run, capsys, ["--ckpt_path", saved], "last.ckpt' cannot be read: Permission denied")


@pytest.mark.parametrize("key", ["trainer.default_root_dir", "trainer.logger.save_dir", "trainer.callbacks.dirpath"])
def test_a_folder_without_permission(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    Path("locked").mkdir()
    options = ["--trainer.logger=CSVLogger"] if "logger" in key else []
    if "callbacks" in key:
        options = ["--trainer.enable_checkpointing=true", "--trainer.callbacks=ModelCheckpoint"]
    forbidden(monkeypatch, "locked")
    check_refused(run, capsys, [*options, f"--{key}=locked"], f"{key}: '")


# ---- what is found late


def test_a_run_that_is_refused_late_leaves_no_folder(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer checks its options when the logger and the configuration have already been written."""
    options = ["--model.optimizer=MuonAdamW", "--model.optimizer.momentum=2", "--model.lr_scheduler=null"]
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs/of/it"]
    check_refused(run, capsys, [*options, *logger], "momentum must be at least 0 and below 1")
    check_refused(run, capsys, options, "momentum must be at least 0 and below 1")


def test_it_leaves_what_was_there(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.version=0"]
    run("fit", *logger)
    before = {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()}
    assert {path.name for path in before} >= {"config.yaml", "hparams.yaml"}
    wrong = ["--model.optimizer=MuonAdamW", "--model.optimizer.momentum=2", "--model.lr_scheduler=null"]
    check_refused(run, capsys, [*logger, *wrong], "momentum must be")
    assert {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()} == before
