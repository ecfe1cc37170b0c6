"""``--weights``: a run begins with the weights of another one, and with nothing else of it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_muon.cli import main
from lightning_muon.strategies import read_weights
from tests.cli.conftest import RunTiny
from tests.cli.network import LateModule, Net, NetData, NetModule, fit, last
from tests.processes import launch

PROGRAM = Path(__file__).with_name("network.py")
STILL = "--model.optimizer.lr=0"


@pytest.fixture
def first() -> Path:
    """The checkpoint of a run with another width than the default."""
    fit("--model.net.width=6", "--model.optimizer.lr=0.5", "--trainer.default_root_dir=first")
    return last("first")


def state(checkpoint: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


def equal(module: torch.nn.Module, checkpoint: Path) -> bool:
    expected = state(checkpoint)
    own = module.state_dict()
    return all(torch.equal(own[name], value) for name, value in expected.items() if name.startswith("net."))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fit(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_weights_and_network_come_from_the_checkpoint(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    cli = fit(f"--weights={first}", STILL, "--trainer.max_steps=1", "--trainer.default_root_dir=second")
    assert equal(cli.model, first)
    assert cli.trainer.global_step == 1  # of its own
    told = capsys.readouterr().err
    assert "--weights: with them come model.net.width=6\n" in told
    assert f"--weights: 4 weights of Net from '{first}'\n" in told


@pytest.mark.parametrize("file", ["net.safetensors", "net.pt"])
def test_weights_and_network_come_from_an_exported_file(first: Path, file: str) -> None:
    with pytest.raises(SystemExit):
        main(args=["export", str(first), file])
    cli = fit(f"--weights={file}", STILL)
    assert equal(cli.model, first)


def test_a_run_that_goes_on_does_not_begin_again(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [f"--weights={first}", "--model.optimizer.lr=0.5", "--trainer.default_root_dir=second"]
    fit(*options)
    second = last("second")
    assert not torch.equal(state(second)["net.hidden.weight"], state(first)["net.hidden.weight"])
    capsys.readouterr()
    cli = fit(*options, STILL, "--trainer.max_steps=3", f"--ckpt_path={second}", "--trainer.enable_checkpointing=false")
    assert "--weights: not read, because the run goes on from --ckpt_path\n" in capsys.readouterr().err
    assert cli.trainer.global_step == 3
    assert equal(cli.model, second)


def test_other_names_and_shapes_are_told_in_a_line(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, f"--weights={first}", "--model.net.width=4")
    assert line == (
        f"error: --weights: '{first}': it does not fit Net: 4 of another shape (embedding.weight is 8×6 there and 8×4"
        " here, hidden.weight is 6×6 there and 4×4 here, …); --fresh names what may differ"
    )
    torch.save({"hidden.weight": torch.zeros(4, 4), "hidden.scale": torch.zeros(4)}, "other.pt")
    line = refused(capsys, "--weights=other.pt")
    assert "3 only here (embedding.weight, hidden.bias, …); 1 only there (hidden.scale)" in line
    assert "'absent.ckpt' does not exist" in refused(capsys, "--weights=absent.ckpt")
    assert "--fresh goes with --weights" in refused(capsys, "--fresh=['head.*']")


def test_a_head_may_differ_where_it_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    exported = Net(4).state_dict()
    torch.save({**exported, "head.weight": torch.zeros(3, 4)}, "other.pt")
    cli = fit("--weights=other.pt", "--fresh=['head.*']", STILL)
    assert torch.equal(cli.model.net.hidden.weight, exported["hidden.weight"])
    assert cli.model.net.head.weight.shape == (8, 4)
    assert "--weights: 3 weights of Net, 1 as they were from" in capsys.readouterr().err
    assert "no weight has a name like 'heed'" in refused(capsys, "--weights=other.pt", "--fresh=['heed']")


def test_tied_weights_are_one(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, f"--weights={first}", "--model.net.tied=true")
    assert "it does not fit Net: 1 tied here but not there (embedding.weight and head.weight)" in line


def test_a_module_without_a_network_of_its_own(run: RunTiny, saved: str) -> None:
    cli = run("fit", f"--weights={saved}", STILL)
    assert equal(cli.model, Path(saved))
    assert torch.equal(cli.model.head.weight, state(Path(saved))["head.weight"])


def test_a_network_that_is_made_late() -> None:
    fit("--model.optimizer.lr=0.5", "--trainer.default_root_dir=first")
    first = last("first")
    cli = fit(f"--weights={first}", STILL, module=LateModule)
    assert equal(cli.model, first)
    launch(PROGRAM, "begin_late_on_two_ranks", 2, str(first), folder=Path.cwd(), process_group=False)
    assert last("late").is_dir()
    found = read_weights(last("late")).tensors
    for name, value in state(first).items():
        assert torch.equal(found[name], value) or name == "temperature", name


def test_a_saved_config_with_weights_is_one_of_all_commands(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("saved.yaml").write_text(f"weights: {first}\nfresh: []\nmodel:\n  net: tests.cli.network.Net\n")
    with pytest.raises(SystemExit) as end:
        main(NetModule, NetData, args=["routes", "--config=saved.yaml", "--every-parameter"])
    assert end.value.code == 0
    assert "8×6" in capsys.readouterr().out


def test_two_ranks_begin_with_the_weights(capsys: pytest.CaptureFixture[str]) -> None:
    fit("--model.net.tied=true", "--model.optimizer.lr=0.5", "--trainer.default_root_dir=first")
    strategies = ["ddp", "fsdp2"]
    launch(PROGRAM, "begin_on_two_ranks", 2, str(last("first")), strategies, folder=Path.cwd(), process_group=False)
    expected = state(last("first"))
    for strategy in strategies:
        # A sharded folder too, with averages: tied weights are one again.
        with pytest.raises(SystemExit):
            main(args=["export", str(last(strategy)), f"{strategy}.pt"])
        found = torch.load(f"{strategy}.pt", weights_only=True)
        assert found["head.weight"].data_ptr() == found["embedding.weight"].data_ptr()
        for name, value in found.items():
            torch.testing.assert_close(value, expected[f"net.{name}"], rtol=0, atol=0)
    assert last("fsdp2").is_dir()
    assert capsys.readouterr().out.count(", averages") == 2
