"""Studies: each trial once, whatever is killed, and how many workers there are."""

import json
import random
import time
from functools import partial
from pathlib import Path

import pytest

from lightning_muon.experiments import Record, StudyError, run_study
from tests.experiments.small_runs import STEPS, kill, loss, plan_of, start, train, trials, two_rounds

pytestmark = pytest.mark.timeout(60)


def summary(records: list[Record]) -> list[tuple[object, ...]]:
    """What must not depend on how often a study was killed."""
    return [(one.trial, one.state, one.result.status, one.result.value, one.result.steps) for one in records]


def events(folder: Path, kind: str) -> list[str]:
    entries = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
    return [entry["trial"] for entry in entries if entry.get("event") == kind]


@pytest.mark.parametrize("jobs", [1, 3])
def test_each_trial_is_run_and_told(tmp_path: Path, jobs: int) -> None:
    told = []
    records = run_study(
        tmp_path, {"a": 1}, plan_of(5), train, jobs=jobs, on_result=lambda one, _: told.append(one.trial.name)
    )
    assert sorted(summary(records), key=lambda one: one[0].name) == [
        (trial, "finished", "finished", pytest.approx(loss(trial.options["lr"], STEPS), rel=1e-6), STEPS)
        for trial in trials(5)
    ]
    assert sorted(told) == sorted(events(tmp_path, "claimed")) == [trial.name for trial in trials(5)]
    assert all(len((tmp_path / f"{name}.attempts").read_text().splitlines()) == 1 for name in told)
    assert records == run_study(tmp_path, {"a": 1}, plan_of(5), train)  # there is nothing left
    assert not list((tmp_path / "workers").iterdir())


def test_a_plan_goes_on_from_the_results(tmp_path: Path) -> None:
    records = run_study(tmp_path, {}, two_rounds, train, jobs=2)
    assert {one.trial.options["lr"] for one in records} == {0.01, 0.02, 0.03, 0.016, 0.025}


def test_killed_at_random_moments_a_study_gives_the_same_result(tmp_path: Path) -> None:
    expected = summary(run_study(tmp_path / "whole", {}, two_rounds, train))
    draw = random.Random(0)  # noqa: S311
    folder = tmp_path / "killed"
    for _ in range(20):
        process = start(folder, two_rounds)
        process.join(draw.uniform(0.01, 0.08))
        if process.exitcode is None:
            kill(process)
    records = run_study(folder, {}, two_rounds, train)
    assert summary(records) == expected
    assert sorted(events(folder, "finished")) == sorted(one.trial.name for one in records)


def test_three_workers_take_each_trial_once_and_that_of_a_killed_one(tmp_path: Path) -> None:
    run = partial(train)
    workers = [start(tmp_path, plan_of(9), run) for _ in range(3)]
    until = time.monotonic() + 20
    while len(events(tmp_path, "claimed") if (tmp_path / "journal.jsonl").exists() else ()) < 4:
        assert time.monotonic() < until
        time.sleep(0.002)
    kill(workers[0])
    for process in workers[1:]:
        process.join(30)
        assert process.exitcode == 0
    assert sorted(events(tmp_path, "finished")) == [trial.name for trial in trials(9)]
    taken_over = events(tmp_path, "released")
    assert len(taken_over) == 1
    assert sorted(events(tmp_path, "claimed")) == sorted([*(trial.name for trial in trials(9)), *taken_over])


def test_a_study_is_not_continued_with_another_definition(tmp_path: Path) -> None:
    run_study(tmp_path, {"values": (1, 2)}, lambda _: [], train)
    run_study(tmp_path, {"values": [1, 2]}, lambda _: [], train)
    with pytest.raises(StudyError, match=r"has values 1 2, not 1 3: give another folder, or the same command"):
        run_study(tmp_path, {"values": [1, 3]}, lambda _: [], train)
