"""Launching trainings on several processes."""

import multiprocessing as mp
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Run = Callable[..., list[dict[str, Any]]]

TIMEOUT = 100  # seconds, for all jobs of a launch


@pytest.fixture(scope="session")
def run_jobs() -> Any:
    """`run_jobs(world_size, jobs)`: what rank 0 has to say of each job of sharded_training.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = mp.get_context("forkserver")  # which imports torch and Lightning once for all processes
        context.set_forkserver_preload(["lightning.pytorch", "lightning_muon.optim", "lightning_muon.strategies"])
        yield lambda world_size, jobs: _launch(context, world_size, jobs)


def _launch(context: Any, world_size: int, jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    import sharded_training  # type: ignore[import-not-found]

    arguments = (world_size, _free_port(), jobs)
    processes = [
        context.Process(target=sharded_training.run_jobs, args=(rank, *arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    # One that fails leaves the others waiting for it.
    while any(process.exitcode is None for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size, f"exit codes {codes} (None: still running after {TIMEOUT} s), see stderr"
    return [torch.load(job["out"], weights_only=False) for job in jobs]


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def train(run_jobs: Run, tmp_path: Path) -> Run:
    """`train(world_size, *jobs)`: runs jobs on so many processes, with names for their results."""

    def run(world_size: int, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        named = [{**job, "out": str(tmp_path / f"{world_size}-{number}.pt")} for number, job in enumerate(jobs)]
        return run_jobs(world_size, named)

    return run


@pytest.fixture
def assert_equal() -> Callable[..., None]:
    """`assert_equal(result, expected, tolerance=1e-5)`: weights, optimizer state, its options and validation loss."""

    def check(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
        for part in ("weights", "state"):
            assert result[part].keys() == expected[part].keys()
            for name, value in expected[part].items():
                error = (result[part][name] - value).abs().max()
                assert error <= tolerance, f"{name} of the {part} is off by {error}"
        assert result["options"] == expected["options"]
        assert result["loss"] == pytest.approx(expected["loss"], abs=tolerance)

    return check
