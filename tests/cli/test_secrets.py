"""Values from the environment are used, and stay out of what a run writes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_muon.cli import MuonCLI, main
from lightning_muon.cli.given import Given
from lightning_muon.cli.secrets import Secrets
from tests.cli.conftest import TinyData, TinyModule

SECRET = "hunter2-hunter2"  # noqa: S105
CONFIG = """
trainer:
  logger: {class_path: TensorBoardLogger, init_args: {save_dir: logs, default_hp_metric: false}}
  enable_checkpointing: true
  callbacks: [{class_path: MuonDashboard}, {class_path: ModelCheckpoint, init_args: {save_last: true}}]
model:
  token: ${oc.env:TOKEN}
  url: https://${oc.env:TOKEN}@host
  again: ${model.token}
  words: [plain, "${oc.env:TOKEN}"]
  scale: ${oc.env:SCALE,1.0}
"""


class WithToken(TinyModule):
    def __init__(
        self, token: str = "", url: str = "", again: str = "", words: list[str] | None = None, scale: float = 1.0
    ) -> None:
        super().__init__(scale=scale)
        self.save_hyperparameters()
        self.secrets = [token, url, again, *(words or [])]


@pytest.fixture
def run_with_token(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MuonCLI]:
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("SCALE", "0.5")
    Path("token.yaml").write_text(CONFIG)
    Path("few.yaml").write_text("trainer: {max_steps: 2, accelerator: cpu, devices: 1, enable_progress_bar: false}")

    def run(*args: str) -> MuonCLI:
        return main(WithToken, TinyData, default_config="few.yaml", args=args)

    return run


def files_with(text: str) -> list[Path]:
    return [path for path in Path().rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_value_is_used_and_what_was_written_is_saved(
    run_with_token: Callable[..., MuonCLI], capsys: pytest.CaptureFixture[str]
) -> None:
    cli = run_with_token("fit", "--config=token.yaml")
    assert cli.model.secrets == [SECRET, f"https://{SECRET}@host", SECRET, "plain", SECRET]
    assert cli.model.scale == 0.5
    assert files_with(SECRET) == []

    (config,) = Path().rglob("config.yaml")
    model = yaml.safe_load(config.read_text())["model"]
    assert model == yaml.safe_load(CONFIG)["model"]
    logged = EventAccumulator(str(config.parent)).Reload()
    (text,) = (event.tensor_proto.string_val[0].decode() for event in logged.Tensors("watch/config/text_summary"))
    assert "token: ${oc.env:TOKEN}" in text
    assert "https://${oc.env:TOKEN}@host" in (config.parent / "hparams.yaml").read_text()

    again = run_with_token("fit", f"--config={config}")
    assert again.model.secrets == cli.model.secrets
    (checkpoint,) = config.parent.rglob("last.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["url"] == "https://${oc.env:TOKEN}@host"
    capsys.readouterr()
    resumed = run_with_token("fit", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3")
    assert resumed.model.secrets == cli.model.secrets
    assert files_with(SECRET) == []
    written = capsys.readouterr()
    assert SECRET not in written.out + written.err


def test_on_the_command_line(run_with_token: Callable[..., MuonCLI]) -> None:
    options = [
        "--model.token=${oc.env:TOKEN}",
        "--model.words=[x, '${oc.env:TOKEN}']",
        "--trainer.default_root_dir=here",
    ]
    cli = run_with_token("fit", *options, "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=here")
    assert cli.model.secrets == [SECRET, "", "", "x", SECRET]
    assert files_with(SECRET) == []


def test_print_config_shows_what_was_written(
    run_with_token: Callable[..., MuonCLI], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        run_with_token("fit", "--config=token.yaml", "--print_config")
    assert end.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"] == yaml.safe_load(CONFIG)["model"]
    assert SECRET not in str(shown)


def test_a_later_value_is_no_secret() -> None:
    given = [Given("model.token", "${oc.env:TOKEN}", "a.yaml", True), Given("model.token", "plain", None, True)]
    assert Secrets(given).masked({"model": {"token": "plain"}}) == {"model": {"token": "plain"}}
    assert Secrets(given[:1]).masked({"model": {"token": "x"}}) == {"model": {"token": "${oc.env:TOKEN}"}}
