"""`StopOnSignal` in any Lightning project; what ranks agree on. Signals to whole runs are in tests/cli."""

import copy
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.distributed import HashStore

from lightning_muon.callbacks import StopOnSignal
from lightning_muon.callbacks.stopping.agreement import Agreement, Gate
from lightning_muon.callbacks.stopping.receiver import SignalReceiver, StoppedBySignal
from tests.processes import launch, run_module

pytestmark = pytest.mark.timeout(90)

HERE = Path(__file__).parent


def train(folder: Path, *arguments: str) -> tuple[int, str]:
    run = run_module("signalled_training", *arguments, folder=folder, path=[HERE], timeout=60)
    return run.returncode, run.stdout + run.stderr


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_one_line_in_another_project(tmp_path: Path, name: str, code: int) -> None:
    found, output = train(tmp_path, name)
    assert found == code, output
    assert f"{name}: stopped after step 4\ncheckpoint: checkpoints/last.ckpt\n" in output
    assert "Traceback" not in output
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_handler_of_the_user_is_called_too(tmp_path: Path) -> None:
    found, output = train(tmp_path, "SIGTERM", "user")
    assert found == 143, output
    assert "the user's own handler\n" in output


def test_a_run_without_checkpoints_says_that_it_has_none(tmp_path: Path) -> None:
    found, output = train(tmp_path, "SIGTERM", "unsaved")
    assert found == 143, output
    assert "SIGTERM: stopped after step 4; no checkpoint is saved in this run\n" in output
    assert not list(tmp_path.rglob("*.ckpt"))


def test_in_a_validation_the_checkpoint_has_averages_and_trained_weights_in_their_places(tmp_path: Path) -> None:
    """There they have changed places for the time of the validation."""
    found, output = train(tmp_path, "SIGTERM", "averaged")
    assert found == 143, output
    saved, averages, trained = (
        torch.load(tmp_path / name, weights_only=True)
        for name in ("checkpoints/last.ckpt", "averages.pt", "trained.pt")
    )
    for part, expected in (("state_dict", averages), ("current_model_state", trained)):
        assert all(torch.equal(saved[part][name], value) for name, value in expected.items())
    assert not torch.equal(averages["layer.weight"], trained["layer.weight"])


def test_without_a_signal_nothing_is_different(tmp_path: Path) -> None:
    found, output = train(tmp_path, "nothing")
    assert found == 0, output
    assert "trained to the end\n" in output


def test_a_step_costs_no_broadcast() -> None:
    """Lightning's own, before each batch, is switched off."""
    program = HERE / "signalled_training.py"
    assert launch(program, "broadcasts", 2, "StopOnSignal", process_group=False) == [0, 0]


def test_the_exit_code_is_the_same_on_another_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.checkpoint sends copies of an exception that comes while it saves."""
    monkeypatch.setattr(SignalReceiver, "_ending", False)
    sent = copy.copy(StoppedBySignal(signal.SIGTERM))
    assert (sent.code, sent.signum) == (143, signal.SIGTERM)


@pytest.mark.parametrize("grace", [0, -1, float("inf"), float("nan"), True, "5"])
def test_the_grace_is_a_number_of_seconds(grace: float) -> None:
    with pytest.raises(MisconfigurationException, match="grace must be a number of seconds above 0"):
        StopOnSignal(grace)


class Rank(threading.Thread):
    """A rank that goes from gate to gate; each step waits for all ranks, as a collective does."""

    def __init__(self, agreement: Agreement, step_end: threading.Barrier, validation_batches: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.agreement, self.step_end, self.validation_batches = agreement, step_end, validation_batches
        self.draw = random.Random(seed)  # noqa: S311 - pauses
        self.stopped_at: Gate | None = None
        self.watch = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while self.is_alive():
            self.agreement.poll()
            time.sleep(self.draw.uniform(0, 0.004))

    def run(self) -> None:
        self.watch.start()
        for step in range(1, 1000):
            time.sleep(self.draw.uniform(0, 0.002))
            self.step_end.wait(20)
            gates = [Gate(step, 0)]
            if step % 3 == 0:
                gates += [Gate(step, batch + 1) for batch in range(self.validation_batches)] + [Gate(step, 99)]
            for gate in gates:
                time.sleep(self.draw.uniform(0, 0.001))
                if self.agreement.at(gate):
                    self.stopped_at = gate
                    return


@pytest.mark.parametrize("seed", range(12))
def test_all_ranks_stop_at_the_same_step(seed: int) -> None:
    """Whatever the number of their validation batches, and whoever asks, and when."""
    draw = random.Random(seed)  # noqa: S311
    store, step_end = HashStore(), threading.Barrier(3)
    ranks = [Rank(Agreement(rank, 3, store), step_end, draw.randint(1, 5), seed * 10 + rank) for rank in range(3)]
    for rank in ranks:
        rank.start()
    time.sleep(draw.uniform(0, 0.1))
    for rank in draw.sample(ranks, draw.randint(1, 3)):
        rank.agreement.ask(15)
    for rank in ranks:
        rank.join(20)
    stopped = [rank.stopped_at for rank in ranks]
    assert len({gate.step for gate in stopped if gate}) == 1, stopped
    assert None not in stopped
    # Either all after the step, or all in the validation that follows.
    assert len({gate.validation_batch > 0 for gate in stopped if gate}) == 1, stopped


def test_a_request_that_ends_nothing_is_followed_by_another() -> None:
    alone = Agreement()
    assert alone.at(Gate(1, 0)) is None
    alone.ask(10)
    alone.ask(15)
    assert alone.at(Gate(2, 0)) == 10
    alone.done(Gate(2, 0))
    assert alone.at(Gate(3, 0)) == 15
