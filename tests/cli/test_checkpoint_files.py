"""Checkpoints on the command line: saved whole, checked before anything starts, and never run."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_muon.cli import MuonCLI
from lightning_muon.strategies import AsyncAtomicCheckpointIO, AtomicCheckpointIO

Run = Callable[..., MuonCLI]
pytestmark = pytest.mark.timeout(60)


def line_of(run: Run, capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_runs_save_whole_checkpoints_by_themselves(run: Run, saved: str) -> None:
    assert isinstance(run("fit").trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert list(Path(saved).parent.iterdir()) == [Path(saved)]


@pytest.mark.parametrize("plugin", ["AsyncCheckpointIO", "lightning_muon.strategies.AsyncAtomicCheckpointIO"])
def test_in_the_background_a_run_is_the_same(run: Run, saved: str, plugin: str) -> None:
    Path("plugins.yaml").write_text(f"trainer: {{plugins: [{{class_path: {plugin}}}]}}")
    cli = run("fit", "--config=checkpoints.yaml", "--config=plugins.yaml", "--trainer.default_root_dir=second")
    assert isinstance(cli.trainer.strategy.checkpoint_io, AsyncAtomicCheckpointIO)
    there, here = (torch.load(path) for path in (saved, next(Path("second").rglob("last.ckpt"))))
    assert there["state_dict"].keys() == here["state_dict"].keys()
    assert all(torch.equal(there["state_dict"][name], value) for name, value in here["state_dict"].items())


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_a_damaged_checkpoint_is_refused_before_anything_starts(
    run: Run, saved: str, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    whole = Path(saved).with_name("step=3.ckpt")
    shutil.copy(saved, whole)
    content = Path(saved).read_bytes()
    before = sorted(Path().rglob("*"))
    start = f"--ckpt_path: the checkpoint '{saved}' is damaged: "
    end = f"; use '{whole}', the newest whole one beside it"
    Path(saved).write_bytes(content[: len(content) // 2])
    assert line_of(run, capsys, command, "--ckpt_path", saved) == f"{start}its end is missing{end}"
    place = content.index(torch.load(whole)["state_dict"]["hidden_layer.weight"].numpy().tobytes())
    Path(saved).write_bytes(content[:place] + b"\0\0\0\0" + content[place + 4 :])
    line = line_of(run, capsys, command, "--ckpt_path", saved)
    assert line.startswith(f"{start}its bytes have changed (Bad CRC-32 for file")
    assert line.endswith(end)
    assert sorted(Path().rglob("*")) == before


class Payload:
    """Runs a command when plain pickle reads it."""

    def __reduce__(self) -> Any:
        return os.system, ("touch witness",)


@pytest.mark.parametrize("command", ["fit", "predict"])
def test_no_code_of_a_checkpoint_runs(run: Run, saved: str, capsys: pytest.CaptureFixture[str], command: str) -> None:
    checkpoint = torch.load(saved)
    torch.save({**checkpoint, "more": Payload()}, saved)
    line = line_of(run, capsys, command, "--ckpt_path", saved, "--trainer.max_steps", "5")
    assert line.startswith(f"--ckpt_path: '{saved}' holds more than plain values (posix.system), which could run code")
    assert "--weights_only false" in line
    assert not Path("witness").exists()
    # The user may ask for it.
    run(command, "--ckpt_path", saved, "--trainer.max_steps", "5", "--weights_only", "false")
    assert Path("witness").exists()


@pytest.mark.parametrize("command", ["fit", "predict"])
@pytest.mark.parametrize("part", [".metadata", "meta.pt"])
def test_no_code_of_a_folder_runs(run: Run, capsys: pytest.CaptureFixture[str], command: str, part: str) -> None:
    folder = Path("sharded.ckpt")
    save({"state_dict": {"w": torch.zeros(2)}}, checkpoint_id=folder, no_dist=True)
    torch.save({"global_step": 1}, folder / "meta.pt")
    if part == "meta.pt":
        torch.save({"global_step": Payload()}, folder / "meta.pt")
    else:
        (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    line = line_of(run, capsys, command, "--ckpt_path", str(folder))
    if part == ".metadata":
        assert line.startswith("--ckpt_path: 'sharded.ckpt' is not loaded: its .metadata names posix.system")
    assert not Path("witness").exists()


def test_what_a_kill_left_is_put_in_order_at_the_next_start(
    run: Run, saved: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="lightning.pytorch")
    half = Path(saved).with_name(".step=4.ckpt.0123abcd.saving")
    half.write_bytes(b"half")
    run("predict", "--ckpt_path", saved)
    assert half.exists()  # it may be another run's
    run("fit", "--ckpt_path", saved, "--trainer.max_steps", "5")
    assert not half.exists()
    assert f"removed '{half}': the process that saved it was killed" in caplog.messages


@pytest.mark.usefixtures("saved")
def test_a_full_disk_is_one_line(run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), descriptor)

    monkeypatch.setattr(os, "fsync", full)
    line = line_of(run, capsys, "fit", "--config", "checkpoints.yaml", "--trainer.default_root_dir", "second")
    assert line.endswith("last.ckpt' could not be saved: No space left on device; nothing is left of it")
    assert not any(path.is_file() for path in Path("second").rglob("*.ckpt*"))
