"""The progress of a fit: lines where there is no terminal, by a clock that the test moves, and a bar in a terminal."""

import os
import pty
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_muon.callbacks import ParameterSummary, StepProgressBar, progress

Fit = Callable[..., Trainer]


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Timed(LightningModule):
    """A batch of 4 samples takes 2 s, the first one 50 s, and one of the validation 10 s; the loss stays."""

    def __init__(self, clock: Clock, *, on_bar: bool = True, tokens_per_sample: int | None = None) -> None:
        super().__init__()
        self.net, self.clock, self.on_bar = nn.Linear(8, 16, bias=False), clock, on_bar
        self.seen = 0
        if tokens_per_sample:
            self.tokens_per_sample = tokens_per_sample

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.clock.now += 2 if self.seen else 50
        self.seen += 1
        loss: Tensor = self.net(batch[0]).square().sum() * 0 + 1.5
        if self.on_bar:
            self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.clock.now += 10
        self.log("val/loss", torch.tensor(0.25), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(24, 8)), batch_size=4)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.randn(4, 8)), batch_size=4)


def trained(module: LightningModule, *callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Trainer:
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "enable_model_summary": False,
        "num_sanity_val_steps": 2,
        "limit_val_batches": 0,
        "log_every_n_steps": 3,
    }
    trainer = Trainer(callbacks=[StepProgressBar(), *callbacks], **{**given, **options})
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def test_a_line_at_the_first_step_at_each_logged_one_and_at_the_last(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(Timed(clock, tokens_per_sample=100), max_steps=8)
    # Seven steps are left after the first, which takes 50 s, and each of the others takes 2 s: 200 tokens a second.
    assert capsys.readouterr().out.splitlines() == [
        "step 1/8  train/loss 1.500",
        "step 3/8  train/loss 1.500  200 tokens/s  00:10 left",
        "step 6/8  train/loss 1.500  200 tokens/s  00:04 left",
        "step 8/8  train/loss 1.500  200 tokens/s",
    ]


def test_epochs_accumulation_and_validation(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trained(Timed(clock), max_epochs=2, accumulate_grad_batches=2, limit_val_batches=1, log_every_n_steps=2)
    # A step takes 4 s. After the second epoch's first step two are left; the validation has taken 10 s of 22 s.
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/2  step 1/6  train/loss 1.500",
        "epoch 1/2  step 2/6  train/loss 1.500  2.00 samples/s  00:16 left",
        "epoch 2/2  step 4/6  train/loss 1.500  2.00 samples/s  00:14 left  val/loss 0.250",
        "epoch 2/2  step 6/6  train/loss 1.500  2.00 samples/s  val/loss 0.250",
    ]


def test_a_run_goes_on_at_its_step_in_the_middle_of_an_epoch(
    clock: Clock, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    trained(Timed(clock), saving, max_steps=4)
    capsys.readouterr()
    trained(Timed(clock), max_epochs=2, max_steps=-1, ckpt_path=str(tmp_path / "step=4.ckpt"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 1/2  step  5/12  train/loss 1.500"
    assert lines[1] == "epoch 1/2  step  6/12  train/loss 1.500  2.00 samples/s  00:12 left"
    assert lines[-1] == "epoch 2/2  step 12/12  train/loss 1.500  2.00 samples/s"


def test_without_an_end_in_steps_the_timer_says_how_long(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    class Ending(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    trained(Timed(clock), Ending(), max_steps=-1, max_epochs=-1, max_time="00:00:01:30")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1", "step 3", "step 4"]
    assert all(re.search(r"  01:(30|2\d) left$", line) for line in lines)


def test_steps_of_several_optimizers(adversaries: Any, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    module = adversaries(lambda groups, _: torch.optim.SGD([group["params"][0] for group in groups], lr=0.01))
    original = module.training_step

    def training_step(batch: list[Tensor], batch_idx: int) -> None:
        clock.now += 3
        original(batch, batch_idx)

    module.training_step = training_step
    trained(module, max_epochs=1, log_every_n_steps=8)
    # Ten batches of two steps, 3 s each; how many steps that makes is not known before.
    assert capsys.readouterr().out.splitlines() == [
        "epoch 1/1  step 2",
        "epoch 1/1  step 8  5.33 samples/s  00:18 left",
        "epoch 1/1  step 16  5.33 samples/s  00:06 left",
        "epoch 1/1  step 20  5.33 samples/s  00:00 left",
    ]


def test_the_loss_is_shown_if_nothing_is_logged_for_the_bar(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    trained(Timed(clock, on_bar=False), max_steps=1, accumulate_grad_batches=2)
    assert capsys.readouterr().out == "step 1/1  loss 1.500\n"


def test_each_line_is_flushed_and_metrics_are_read_only_for_lines(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    flushed: list[int] = []
    original = StepProgressBar.get_metrics

    def get_metrics(self: StepProgressBar, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        reads.append(trainer.global_step)
        return original(self, trainer, module)

    monkeypatch.setattr(StepProgressBar, "get_metrics", get_metrics)
    monkeypatch.setattr(sys.stdout, "flush", lambda: flushed.append(1))
    trained(Timed(clock), max_steps=8)
    assert reads == [1, 3, 6, 8]
    assert len(flushed) == 4


def test_only_rank_zero_shows_anything(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trainer, "is_global_zero", property(lambda _: False))
    trained(Timed(clock), max_steps=3)
    assert not capsys.readouterr().out


def test_a_summary_of_what_has_parameters(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    module = Timed(clock)
    module.metric, module.frozen = nn.Identity(), nn.Linear(2, 2).requires_grad_(False).eval()
    trained(module, ParameterSummary(), max_steps=1, enable_model_summary=True, log_every_n_steps=0)
    output = capsys.readouterr().out
    assert "net" in output
    assert not any(word in output for word in ("metric", "FLOPs", "Identity"))
    assert "134 parameters, 0.001 MB; 6 of them frozen; 1 modules in evaluation mode\n" in output


# ---- in a terminal


@contextmanager
def terminal(errors: TextIO | None = None) -> Iterator[list[str]]:
    """Make stdout and stderr those of a terminal of 80 columns; yield a list that gets what was written to it.

    Args:
        errors: Where stderr goes instead.
    """
    ours, theirs = pty.openpty()
    written: list[bytes] = []
    found: list[str] = []

    def read() -> None:
        with suppress(OSError):  # when the other end is closed
            while data := os.read(ours, 1 << 16):
                written.append(data)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(theirs, "w", buffering=1) as stream:
        for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", errors or stream)
        yield found
    reader.join(10)
    os.close(ours)
    found.append(b"".join(written).decode())


def shown(output: str) -> list[str]:
    """Return the lines that were drawn, without the codes of colours and movements."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    return [line.rstrip() for line in re.split(r"[\r\n]+", plain) if line.strip()]


LONG_LINE = f"resume: {' '.join(['a-command-to-copy'] * 8)}"


def test_a_bar_of_the_run_in_a_terminal(tmp_path: Path) -> None:
    class Telling(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 4:
                sys.stderr.write(f"{LONG_LINE}\n")

    with terminal() as written:
        logger = CSVLogger(tmp_path)  # with a version, which is no figure of a run
        trained(Timed(Clock()), Telling(), max_steps=8, limit_val_batches=1, val_check_interval=4, logger=logger)
    lines = shown(written[0])
    bars = [line for line in lines if line.startswith("step")]
    assert re.fullmatch(r"step 0/8 ━+", bars[0])
    assert re.fullmatch(r"step 8/8 ━+ train/loss 1.500  \S+ samples/s  val/loss 0.250", bars[-1])
    assert all(len(line) <= 80 for line in bars)
    assert not any("Epoch" in line or "v_num" in line or "Sanity" in line for line in lines)
    assert LONG_LINE in lines, "not broken at the width of the terminal"


def test_stderr_in_a_file_stays_there(tmp_path: Path) -> None:
    class Telling(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            sys.stderr.write("told\n")

    with (tmp_path / "errors").open("w") as errors, terminal(errors) as written:
        trained(Timed(Clock()), Telling(), max_steps=2)
    assert "step 2/2" in written[0]
    assert "told" not in written[0]
    assert (tmp_path / "errors").read_text() == "told\ntold\n"
