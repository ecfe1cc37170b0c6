"""SIGKILL at random moments leaves a checkpoint that resumes exactly; `python -m benchmarks.kills` does it often."""

from pathlib import Path

import pytest

from tests.processes import REPOSITORY, launch


@pytest.mark.parametrize(("kills", "subjects"), [(2, [2]), pytest.param(20, [0, 2, 3, 4], marks=pytest.mark.slow)])
def test_killed_runs_end_as_the_others(kills: int, subjects: list[int], tmp_path: Path) -> None:
    program = Path(__file__).with_name("killed_runs.py")
    steps = 12 if kills == 2 else 60
    (rows,) = launch(program, "run", 1, kills, steps, subjects, folder=tmp_path, path=[REPOSITORY], process_group=False)
    names = [
        "one file, atomic",
        "",
        "folder, 2 ranks, atomic",
        "one file, asynchronous",
        "folder, 2 ranks, asynchronous",
    ]
    assert [f"{row['checkpoint']}, {row['saved by']}" for row in rows] == [names[number] for number in subjects]
    for row in rows:
        assert row["kills"] >= kills
        assert not row["reasons"], row
        assert row["torn or mixed"] == row["unreadable"] == row["lost steps"] == row["left behind"] == 0
        assert row["bit-equal"] == row["chains"]
