"""Studies: each trial once, whatever is killed, and how many workers there are."""

import json
import math
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lightning_muon.experiments import Record, StudyError, run_study, runs
from lightning_muon.experiments.journal import Journal
from lightning_muon.experiments.locks import lock
from lightning_muon.experiments.runs import DONE
from lightning_muon.experiments.study import _Study
from lightning_muon.experiments.workers import Worker, this_machine
from tests.experiments.small_runs import (
    FORK,
    STEPS,
    await_files,
    folder_of,
    kill,
    loss,
    options_of,
    plan_of,
    start,
    train,
    trials,
    two_rounds,
    write_scalar,
)

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


def begin_slowly(command: list[str]) -> None:
    """Train; but the first of all runs waits until it is killed."""
    try:
        folder_of(command).parents[1].joinpath("begun").touch(exist_ok=False)
    except FileExistsError:
        train(command)
    else:
        time.sleep(60)


def test_three_workers_take_each_trial_once_and_that_of_a_killed_one(tmp_path: Path) -> None:
    workers = [start(tmp_path, plan_of(9), begin_slowly) for _ in range(3)]
    await_files(tmp_path, "begun", 1)
    while len(events(tmp_path, "finished")) < 4:
        time.sleep(0.01)
    (unfinished,) = set(events(tmp_path, "claimed")[:3]) - set(events(tmp_path, "finished"))
    lines = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    (slow,) = [line["worker"] for line in lines if line.get("trial") == unfinished]
    (killed,) = [process for process in workers if str(process.pid) in slow.split("-")]
    kill(killed)
    for process in workers:
        process.join(30)
    assert sorted(process.exitcode for process in workers) == [-signal.SIGKILL, 0, 0]
    names = [trial.name for trial in trials(9)]
    assert sorted(events(tmp_path, "finished")) == names
    assert events(tmp_path, "released") == [unfinished]
    assert sorted(events(tmp_path, "claimed")) == sorted([*names, unfinished])


def test_a_study_is_not_continued_with_another_definition(tmp_path: Path) -> None:
    run_study(tmp_path, {"values": (1, 2)}, lambda _: [], train)
    run_study(tmp_path, {"values": [1, 2]}, lambda _: [], train)
    with pytest.raises(StudyError, match=r"has values 1 2, not 1 3: give another folder, or the same command"):
        run_study(tmp_path, {"values": [1, 3]}, lambda _: [], train)


def test_a_line_that_a_kill_left_incomplete_is_cut_off(tmp_path: Path) -> None:
    first = summary(run_study(tmp_path, {}, plan_of(2), train))
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    for torn in (b"{", whole.splitlines()[-1][:-1], whole.splitlines()[-1]):
        journal.write_bytes(whole + torn)
        assert summary(run_study(tmp_path, {}, plan_of(2), train)) == first
        assert journal.read_bytes() == whole
    journal.write_bytes(b"not JSON\n" + whole)
    with pytest.raises(StudyError, match=r"journal.jsonl', line 1: not JSON; the file is damaged"):
        run_study(tmp_path, {}, plan_of(2), train)


def test_a_run_that_ended_just_before_its_worker_was_killed_is_told(tmp_path: Path) -> None:
    first = summary(run_study(tmp_path, {}, plan_of(1), train))
    journal = tmp_path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(line for line in lines if '"finished"' not in line))
    (mark,) = [tmp_path / "runs" / trial.name / DONE for trial, *_ in first]
    mark.touch()
    assert summary(run_study(tmp_path, {}, plan_of(1), train)) == first
    assert len((tmp_path / f"{first[0][0].name}.attempts").read_text().splitlines()) == 1
    assert not mark.exists()


def test_a_worker_that_was_taken_for_dead_tells_no_second_result(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    (trial,) = trials(1)
    with journal.locked():
        journal.append(study={"arguments": [], "metric": "val/loss"})
        journal.claim(trial, "slow")
    study = _Study(tmp_path, journal, Worker(tmp_path), plan_of(1), train, [], "val/loss", 1, None, None)
    assert [one.worker for one in study.work()] == [study.worker.name]
    slow = _Study(tmp_path, journal, Worker(tmp_path), plan_of(1), train, [], "val/loss", 1, None, None)
    slow.worker.name = "slow"
    slow._start(trial)
    while slow.running:
        slow._wait()
    assert events(tmp_path, "finished") == [trial.name]
    study.worker.close()


def fail(_: list[str]) -> None:
    sys.stderr.write("warning\nerror: no such file 'data 17'\n")
    raise SystemExit(2)


def fail_unless_mended(command: list[str]) -> None:
    if not folder_of(command).parents[1].joinpath("mended").exists():
        raise ValueError(f"{options_of(command)['lr']} fits badly")
    train(command)


def test_a_study_whose_runs_all_fail_alike_ends_with_that_error_and_goes_on_once_it_is_mended(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"^3 runs failed with the same error: no such file 'data 17' \(see"):
        run_study(tmp_path, {}, plan_of(9), fail)
    assert len(set(events(tmp_path, "claimed"))) == 3
    with pytest.raises(StudyError, match=r"ValueError: 0.01 fits badly"):
        run_study(tmp_path, {}, plan_of(9), fail_unless_mended)
    (tmp_path / "mended").touch()
    records = run_study(tmp_path, {}, plan_of(9), fail_unless_mended)
    assert {one.result.status for one in records} == {"finished"}


def go_badly(command: list[str]) -> None:
    lr = float(options_of(command)["lr"])
    if lr == 0.01:
        raise SystemExit(1)
    if lr == 0.02:
        writer = EventFileWriter(str(folder_of(command)))
        write_scalar(writer, "val/loss", 0, math.nan)
        writer.close()
    elif lr == 0.03:
        if os.fork() == 0:  # as a worker of a DataLoader
            time.sleep(60)
        folder_of(command).joinpath("left").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    elif lr == 0.04:
        raise ValueError(3)
    elif lr == 0.05:
        writer = EventFileWriter(str(folder_of(command)))
        write_scalar(writer, "train/loss", 7, 1.0)
        writer.close()
    else:
        train(command)


def test_how_runs_end_is_told_apart(tmp_path: Path) -> None:
    records = run_study(tmp_path, {}, plan_of(6), go_badly)
    told = {one.trial.options["lr"]: (one.result.status, one.result.message) for one in records}
    assert told[0.01][0] == "diverged"
    assert told[0.02] == ("diverged", "not finite: val/loss")
    assert told[0.03][0] == "failed"
    assert told[0.03][1].startswith("ended by signal 9, as when memory is out")
    assert told[0.04][0] == "failed"
    assert told[0.04][1].startswith("ValueError: 3 (see ")
    assert told[0.05][0] == "failed"
    assert told[0.05][1].startswith("the run logged no val/loss; it logged train/loss; in its 8 steps there was no v")
    assert told[0.06] == ("finished", "")


def tell_share(command: list[str]) -> None:
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    folder_of(command).joinpath("share").write_text(f"{gpus} {os.environ['OMP_NUM_THREADS']}")
    train(command)
    while len(list(folder_of(command).parent.glob("*/share"))) < 3:
        time.sleep(0.01)


def test_runs_at_a_time_share_cores_and_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    run_study(tmp_path, {}, plan_of(3), tell_share, jobs=3)
    threads = max(1, len(os.sched_getaffinity(0)) // 3)
    shares = sorted(file.read_text() for file in tmp_path.glob("runs/*/share"))
    assert shares == [f"{gpus} {threads}" for gpus in ("4", "5", "6,7")]


def test_a_worker_on_another_machine_is_dead_after_a_minute_of_silence(tmp_path: Path) -> None:
    journal, worker = Journal(tmp_path), Worker(tmp_path)
    (trial,) = trials(1)
    with journal.locked():
        journal.append(study={"arguments": [], "metric": "val/loss"})
        journal.claim(trial, "elsewhere")
    elsewhere = tmp_path / "workers" / "elsewhere"
    elsewhere.write_text('{"machine": "another"}')
    assert not worker.is_dead("elsewhere")
    os.utime(elsewhere, times=(time.time() - 59, time.time() - 59))
    assert not worker.is_dead("elsewhere")
    os.utime(elsewhere, times=(time.time() - 61, time.time() - 61))
    worker.close()
    (record,) = run_study(tmp_path, {}, plan_of(1), train)
    assert record.result.status == "finished"


@pytest.mark.parametrize("machine", ["another", this_machine()])
def test_a_run_begins_when_the_last_process_in_its_folder_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str
) -> None:
    """But it does not wait for a process of a machine that has failed."""
    monkeypatch.setattr(runs, "_PATIENCE", 0.3)
    folder = tmp_path / "runs" / trials(1)[0].name
    folder.mkdir(parents=True)
    (folder / ".lock").write_text(machine)
    held, release = FORK.Event(), FORK.Event()
    holder = FORK.Process(target=hold, args=(folder / ".lock", held, release))
    holder.start()
    held.wait(10)
    worker = start(tmp_path, plan_of(1))
    if machine == "another":
        worker.join(20)
    await_files(tmp_path, "journal.jsonl", 1)
    while not (ended := events(tmp_path, "finished") + events(tmp_path, "released")):
        time.sleep(0.01)
    assert (ended == events(tmp_path, "finished")) == (machine == "another")
    release.set()
    worker.join(10)
    holder.join(10)
    assert len(events(tmp_path, "finished")) == 1


def hold(path: Path, held: Any, release: Any) -> None:
    with path.open("r+") as file:
        assert lock(path, file.fileno())
        held.set()
        release.wait(10)


def test_a_worker_that_was_suspended_gives_its_trials_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = tmp_path / "begun"
    suspended = iter([True])
    monkeypatch.setattr(Worker, "touch", lambda _: not (begun.exists() and next(suspended, False)))
    (record,) = run_study(tmp_path, {}, plan_of(1), begin_slowly)
    assert record.result.status == "finished"
    assert events(tmp_path, "claimed") == [record.trial.name] * 2
    assert events(tmp_path, "released") == events(tmp_path, "finished") == [record.trial.name]


def wait_long(command: list[str]) -> None:
    folder_of(command).joinpath("begun").touch()
    while True:
        folder_of(command).joinpath("alive").write_text(str(time.monotonic()))
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_runs_and_gives_them_back(tmp_path: Path, signum: int) -> None:
    worker = start(tmp_path, plan_of(3), wait_long, jobs=2)
    await_files(tmp_path, "runs/*/begun", 2)
    os.kill(worker.pid, signum)
    worker.join(10)
    assert worker.exitcode == 128 + signum
    assert sorted(events(tmp_path, "released")) == sorted(events(tmp_path, "claimed"))
    assert {one.result.status for one in run_study(tmp_path, {}, plan_of(3), train)} == {"finished"}


def test_no_run_outlives_its_worker(tmp_path: Path) -> None:
    worker = start(tmp_path, plan_of(1), wait_long)
    (alive,) = await_files(tmp_path, "runs/*/alive", 1)
    kill(worker)
    until = time.monotonic() + 10
    while time.time() - alive.stat().st_mtime < 1:  # it is written 50 times a second
        assert time.monotonic() < until
        time.sleep(0.1)
