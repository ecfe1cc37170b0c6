"""The examples of the page "Your own model and data" run word for word, in a generated project and without one."""

import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.processes import run_module

PAGE = (Path(__file__).parents[1] / "docs" / "your-own-model-and-data.md").read_text()
FILES = {
    name: f"# {name}\n{text}" for name, text in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
}
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
QUICK = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
SMALL = [*QUICK, "--model.context=16", "--model.sample_tokens=5", "--data.batch_size=4", "--data.files=text.txt"]


def run(project: Path | None, folder: Path, command: str, *options: str) -> str:
    """Run a command of the page, with options that make it short, and return what it wrote to stdout."""
    assert command in COMMANDS
    for name, text in FILES.items():
        (folder / name).write_text(text)
    program, *arguments = shlex.split(command.replace("$run", "my_muon_project").removeprefix("python -m "))
    found = run_module(program, *arguments, *options, folder=folder, path=[project / "src"] if project else [])
    assert found.returncode == 0, found.stderr
    return found.stdout


def with_start(start: str) -> str:
    (command,) = [command for command in COMMANDS if command.startswith(start)]
    return command


def test_a_network_of_ones_own(baked_project: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    table = run(baked_project, tmp_path, with_start("$run fit --model.net"), *SMALL, "--trainer.max_steps=2")
    assert "net.layers.weight_ih_l0" in table


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
def test_a_model_of_transformers(baked_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 99)
    table = run(baked_project, tmp_path, "$run fit --config llama.yaml", *SMALL, "--trainer.max_steps=2")
    assert "net.model.layers.0.self_attn.q_proj.weight" in table


def test_a_module_and_its_data(baked_project: Path, tmp_path: Path) -> None:
    first, resumed, shown = (command for command in COMMANDS if "$run fit --model mine.Sums" in command)
    assert "2, such as net.0.weight" in run(baked_project, tmp_path, first, *QUICK, "--trainer.max_steps=2")
    again = run(baked_project, tmp_path, resumed, *QUICK, "--trainer.max_steps=3")
    assert "after 3 steps" in again
    assert "--model.width WIDTH" in run(baked_project, tmp_path, shown)


def test_a_lightning_project(tmp_path: Path) -> None:
    written = run(None, tmp_path, with_start("python -m lightning_muon.cli"), *QUICK, "--trainer.max_epochs=1")
    assert "checkpoint: logs/version_0/checkpoints/last.ckpt" in written


def test_what_is_counted_is_there() -> None:
    lines = {name: len([line for line in text.splitlines()[1:] if line.strip()]) for name, text in FILES.items()}
    told = [int(number) for number in re.findall(r"(\d+) lines", PAGE)]
    assert told == [lines["llama.yaml"], lines["nets.py"], lines["mine.py"]]


def test_every_command_is_tested() -> None:
    assert len(COMMANDS) == 7
