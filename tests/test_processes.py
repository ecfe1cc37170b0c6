"""What the launcher of the other tests shows when a process fails, and that a hang ends."""

import re
from pathlib import Path

import pytest

from tests.processes import launch, run_module

CHECKS = """
import os, time
import torch.distributed as dist

def check_that_passes():
    dist.barrier()

def check_of_three():
    raise AssertionError("for three ranks only")

check_of_three.world_sizes = (3,)

def check_that_fails():
    print("on its way", flush=True)
    assert dist.get_rank() == 0, "not the first rank"
    dist.barrier()

def rank_and(word):
    return dist.get_rank(), word, os.getcwd()

def hang():
    time.sleep(60)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "some_checks.py"
    file.write_text(CHECKS)
    return file


def test_results_come_by_rank(program: Path, tmp_path: Path) -> None:
    assert launch(program, "rank_and", 2, "word", folder=tmp_path) == [(r, "word", str(tmp_path)) for r in (0, 1)]


def test_a_failure_shows_the_rank_the_check_and_its_traceback(program: Path) -> None:
    with pytest.raises(AssertionError) as failure:
        launch(program, "check_*", 2)
    first, second = str(failure.value).split("--- rank 1 of 2, exit code 1")
    assert "--- rank 0 of 2" in first
    assert "on its way" in first
    assert re.search(r"check_that_fails failed:\n.*Traceback.*not the first rank", second, re.DOTALL)


def test_a_hang_ends_with_the_line_it_is_at(program: Path) -> None:
    with pytest.raises(AssertionError, match=r"(?s)its time was over.*some_checks\.py\", line \d+ in hang"):
        launch(program, "hang", 1, timeout=1)


def test_a_module_runs_as_a_program(tmp_path: Path) -> None:
    code = "import sys; print(__name__, sys.argv[1:], 'tests' in sys.modules); sys.exit('no such thing')"
    (tmp_path / "program.py").write_text(code)
    finished = run_module("program", "a", "b", folder=tmp_path)
    assert (finished.returncode, finished.stderr) == (1, "no such thing\n")
    assert finished.stdout == "__main__ ['a', 'b'] False\n"
