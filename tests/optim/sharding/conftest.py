"""Checks on several processes, as a fixture."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Launch = Callable[[str, int], None]
FOLDER = Path(__file__).parent


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Run all checks of a file in this folder on so many processes; what fails there fails here."""

    def run(file: str, world_size: int, timeout: float = 120) -> None:
        result = tmp_path / "result"
        command = [sys.executable, "-W", "ignore", str(FOLDER / "run_checks.py"), str(FOLDER / file)]
        logs = [(tmp_path / f"log.{rank}").open("w+") for rank in range(world_size)]
        processes = [
            subprocess.Popen(
                [*command, str(rank), str(world_size), str(tmp_path / "store"), str(result)],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
            )
            for rank, log in enumerate(logs)
        ]
        end = time.monotonic() + timeout
        try:
            for process in processes:
                process.wait(max(0.1, end - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failures = []
        for rank, (process, log) in enumerate(zip(processes, logs, strict=True)):
            log.seek(0)
            written = tmp_path / f"result.{rank}"
            found = json.loads(written.read_text()) if written.exists() else {f"exit {process.returncode}": log.read()}
            log.close()
            failures += [f"rank {rank}, {name}:\n{message}" for name, message in found.items()]
        assert not failures, "\n".join(failures)

    return run
