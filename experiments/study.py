"""A study: many runs, taken from one journal by any number of workers."""

import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from lightning_muon.experiments.hparams import write_end
from lightning_muon.experiments.journal import Journal, Record
from lightning_muon.experiments.locks import StudyError
from lightning_muon.experiments.measured import curve_of, outcome
from lightning_muon.experiments.runs import AGAIN, DONE, STOPPED, Process, Run
from lightning_muon.experiments.trial import Result, Trial
from lightning_muon.experiments.workers import Worker, this_machine
from lightning_muon.report.plain_text import printable

Plan = Callable[[Sequence[Record]], list[Trial]]
ShouldPrune = Callable[[Sequence[Record], Sequence[tuple[int, float]]], bool]
OnResult = Callable[[Record, Sequence[Record]], None]

_LOOK_AGAIN = 1.0  # seconds between two looks at the metric of a run that may be ended early
_ASK_AGAIN = 1.0  # seconds between two looks at the journal, while other workers have all that there is to do
_GRACE = 30.0  # seconds for the runs to save and end; they take 25 at most
_SAME_ERROR = 3  # so many runs that fail alike, before any has ended well, end a study


class StudyStopped(SystemExit):
    """A study was stopped by a signal; its runs have saved and ended, and are given back."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum


def run_study(
    folder: str | Path,
    definition: Mapping[str, Any],
    plan: Plan,
    run: Run,
    *,
    arguments: Sequence[str] = (),
    metric: str = "val/loss",
    jobs: int = 1,
    should_prune: ShouldPrune | None = None,
    on_result: OnResult | None = None,
) -> list[Record]:
    """Be a worker of a study, until it is at its end.

    Any number of workers may do the same at the same time, on one machine or on several with a common folder: each
    takes the next trial from the journal in the folder. A trial whose worker was killed is taken over, and resumed from
    its checkpoint. Called again after all workers were stopped or killed, it goes on; at the end of a study, it runs
    the failed trials again.

    Args:
        folder: Of the study: its journal, and the runs below ``runs/``.
        definition: Plain values that must be equal for all workers, and whenever the study is continued. ``arguments``
            and ``metric`` are added.
        plan: Returns the trials that may be started now, given all that there are. It is called again after each
            result, must depend on the records only, and may return trials that are there already. The study is at its
            end when it returns no new one and none is running.
        run: The command line as a function of ``["fit", …]``, called in the process of a run.
        arguments: Of ``fit``, for all runs.
        metric: What judges a run, as it is logged.
        jobs: How many runs to have at a time. They share the cores and the GPUs of the machine.
        should_prune: Whether to end a run early, given all records, and the steps and values of the metric so far.
        on_result: Called with each record that this worker has finished, and all records.

    Returns:
        The trials, in the order in which they were started.

    Raises:
        StudyError: If the study was defined otherwise, its folder cannot be used, or all runs fail with the same error.
        StudyStopped: After SIGTERM or SIGINT.
    """
    folder = Path(folder).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        worker = Worker(folder)
    except OSError as error:
        raise StudyError(f"cannot write to the folder of the study, '{folder}': {error.strerror}") from error
    journal = Journal(folder)
    try:
        _check_definition(journal, {"arguments": list(arguments), "metric": metric, **definition})
        study = _Study(folder, journal, worker, plan, run, arguments, metric, jobs, should_prune, on_result)
        with _signals(study):
            return study.work()
    finally:
        worker.close()


def _check_definition(journal: Journal, definition: Mapping[str, Any]) -> None:
    definition = json.loads(json.dumps(definition))  # as the journal has it
    with journal.locked():
        known = journal.definition()
        if known is None:
            journal.append(study=definition)
            return
    for key in sorted(known.keys() | definition.keys()):
        if known.get(key) != definition.get(key):
            there, here = (_shown(values.get(key)) for values in (known, definition))
            raise StudyError(
                f"the study in '{journal.folder}' has {key} {there}, not {here}: give another folder, or the same"
                " command as before"
            )


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class _Study:
    """The work of one worker."""

    def __init__(
        self,
        folder: Path,
        journal: Journal,
        worker: Worker,
        plan: Plan,
        run: Run,
        arguments: Sequence[str],
        metric: str,
        jobs: int,
        should_prune: ShouldPrune | None,
        on_result: OnResult | None,
    ) -> None:
        self.folder, self.journal, self.worker = folder, journal, worker
        self.plan, self.run, self.arguments, self.metric, self.jobs = plan, run, arguments, metric, jobs
        self.should_prune, self.on_result = should_prune, on_result
        self.running: list[Process] = []
        self.signum: int | None = None
        self._signalled = 0

    # ---- the loop

    def work(self) -> list[Record]:
        """Run trials until there are no more."""
        ask_at, is_new = 0.0, True
        try:
            while self.signum is None:
                if len(self.running) < self.jobs and time.monotonic() >= ask_at:
                    claimed, at_end = self._claim(again=is_new)
                    is_new = False
                    if at_end and not self.running:
                        return self.journal.records()
                    for trial in claimed:
                        self._start(trial)
                    ask_at = time.monotonic() + _ASK_AGAIN
                if self._wait():
                    ask_at = 0.0
            signum = self._stop()
        except BaseException:
            for process in self.running:
                process.kill()
            self._give_back()
            raise
        raise StudyStopped(signum)

    def _wait(self) -> bool:
        """Wait a little for a run to end; return whether one has."""
        wait([process.process.sentinel for process in self.running], timeout=0.1)
        if not self.running:
            time.sleep(0.1)
        if not self.worker.touch():
            # This process was suspended: others may have taken its trials over.
            for process in self.running:
                process.kill()
            self._give_back()
            return True
        ended = [process for process in self.running if process.has_ended()]
        for process in ended:
            self._finish(process)
        if self.should_prune is not None:
            for process in self.running:
                self._prune(process, self.should_prune)
        return bool(ended)

    def _start(self, trial: Trial) -> None:
        place = min(set(range(self.jobs)) - {process.place for process in self.running})
        self.running.append(
            Process.start(self.folder, trial, self.run, self.arguments, self.metric, self.worker.file, place, self.jobs)
        )

    def _prune(self, process: Process, should_prune: ShouldPrune) -> None:
        """End a run early, if its metric says so; each value is judged once, in the order of the steps."""
        now = time.monotonic()
        if process.pruned or now < process.look_at:
            return
        curve = curve_of(process.folder, self.metric)
        for length in range(len(process.curve) + 1, len(curve) + 1):
            process.curve = curve[:length]
            with self.journal.locked():
                records = self.journal.records()
            if should_prune(records, process.curve):
                process.pruned = True
                process.ask_to_stop()
                break
        # A long run has a large file.
        process.look_at = now + max(_LOOK_AGAIN, 20 * (time.monotonic() - now))

    def _finish(self, process: Process) -> None:
        """Tell the result of a run that has ended, or give it back."""
        self.running.remove(process)
        code = process.end()
        if code == AGAIN or (code in STOPPED and not process.pruned):
            self._release(process.trial)
            if code in STOPPED and self.signum is None:
                self.signum = -code if code < 0 else code - 128  # whoever stops a run wants no more of it
            return
        result = outcome(process.folder, process.trial.name, 0 if process.pruned else code, self.metric)
        if process.pruned:
            step, value = process.curve[-1]
            result = replace(result, status="pruned", value=value, steps=step + 1)
        write_end(process.folder, succeeded=result.status in {"finished", "pruned"})
        curve = curve_of(process.folder, self.metric) if self.should_prune and not process.pruned else process.curve
        with self.journal.locked():
            if not self._is_mine(process.trial):
                return
            self.journal.finish(process.trial, self.worker.name, result, curve)
            (process.folder / DONE).unlink(missing_ok=True)
            records = self.journal.records()
        if self.on_result:
            self.on_result(next(one for one in records if one.trial.name == process.trial.name), records)
        self._check_failures(records)

    def _stop(self) -> int:
        """End the runs, each with a checkpoint, and give them back; return the signal."""
        signum = self.signum or signal.SIGTERM
        for process in self.running:
            process.ask_to_stop()
        until, heard = time.monotonic() + _GRACE, self._signalled
        while self.running and time.monotonic() < until and self._signalled <= heard:
            self._wait()
        for process in self.running:
            process.kill()
        self._give_back()
        return signum

    # ---- the journal

    def _claim(self, *, again: bool) -> tuple[list[Trial], bool]:
        """Return trials to start, as many as there is room for; and whether there is nothing left to wait for."""
        with self.journal.locked():
            records = self.journal.records()
            for record in records:
                if record.state == "running" and self.worker.is_dead(record.worker):
                    self.journal.release(record.trial, record.worker)
            trials = self._open_trials()
            at_end = not trials and not any(one.state == "running" for one in self.journal.records())
            if at_end and again and any(one.result and one.result.status == "failed" for one in records):
                self._open_failed(records)
                trials, at_end = self._open_trials(), False
            taken: list[Trial] = []
            while trials and (room := self.jobs - len(self.running) - len(taken)):
                for trial in trials[:room]:
                    self.journal.claim(trial, self.worker.name, host=self.worker.host, machine=this_machine())
                taken += trials[:room]
                trials = self._open_trials()  # a search suggests one at a time
        return taken, at_end

    def _open_trials(self) -> list[Trial]:
        """Return the trials that wait, then those that the plan has to add."""
        records = self.journal.records()
        waiting = [one.trial for one in records if one.state == "waiting"]
        known = {one.trial.name.casefold() for one in records}
        new: list[Trial] = []
        for trial in self.plan(records):
            if trial.name.casefold() not in known:
                _check_name(trial.name)
                new.append(trial)
                known.add(trial.name.casefold())
        return waiting + new

    def _is_mine(self, trial: Trial) -> bool:
        return any(
            one.trial.name == trial.name and one.state == "running" and one.worker == self.worker.name
            for one in self.journal.records()
        )

    def _release(self, trial: Trial) -> None:
        with self.journal.locked():
            if self._is_mine(trial):
                self.journal.release(trial, self.worker.name)

    def _give_back(self) -> None:
        for process in self.running:
            process.end()
            self._release(process.trial)
        self.running.clear()

    def _check_failures(self, records: Sequence[Record]) -> None:
        """End the study if nothing has gone well yet, and runs fail alike; they are run again when it goes on."""
        results = [one.result for one in records if one.result]
        failed = [one.message for one in results if one.status == "failed"]
        if len(failed) < len(results) or len(failed) < _SAME_ERROR or len({*map(_kind, failed)}) > 1:
            return
        with self.journal.locked():
            self._open_failed(self.journal.records())
        raise StudyError(f"{len(failed)} runs failed with the same error: {failed[0]}")

    def _open_failed(self, records: Sequence[Record]) -> None:
        for one in records:
            if one.result and one.result.status == "failed":
                self.journal.release(one.trial, one.worker)


def _kind(message: str) -> str:
    """Return an error without what differs between runs that fail alike: numbers, and the place of the output."""
    return re.sub(r"\d+", "0", message.rpartition(" (see ")[0] or message)


def _check_name(name: str) -> None:
    """Refuse what is no name of a folder on every system, and what the command line would take for a number."""
    fits = re.fullmatch(r"[\w=,+][\w=,+.-]{0,199}", name, re.ASCII) and re.search("[A-Za-z]", name) and name != "null"
    if not fits:
        raise ValueError(f"'{name}' cannot be the name of a trial, since it is that of a folder")


@contextmanager
def _signals(study: _Study) -> Iterator[None]:
    """Let SIGTERM and Ctrl-C end the study in order; a second one ends its runs at once."""

    def hear(signum: int, _: FrameType | None) -> None:
        study._signalled += 1
        if study.signum is None:
            study.signum = signum
            sys.stderr.write(f"\n{signal.Signals(signum).name}: the runs save and end; again: at once\n")

    is_main = threading.current_thread() is threading.main_thread()
    found = {signum: signal.signal(signum, hear) for signum in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        yield
    finally:
        for signum, handler in found.items():
            signal.signal(signum, handler)


def print_result(record: Record, records: Sequence[Record]) -> None:
    """Print one line about a run that has ended."""
    result = record.result or Result("failed")
    value = f" {result.value:.4g}" if result.value is not None else ""
    why = f": {result.message}" if result.message else ""
    done = sum(one.state == "finished" for one in records)
    print(printable(f"{done}: {record.trial.name} {result.status}{value}{why}"), flush=True)
