"""The journal of a study: an append-only file of JSON lines that several workers share.

It is the only state of a study. Each line is written under a lock, which the kernel releases when a process is killed;
it works on NFS too. A line that a killed writer has left incomplete is cut off by the next one.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lightning_muon.experiments.locks import StudyError, lock
from lightning_muon.experiments.trial import Result, Trial

JOURNAL = "journal.jsonl"

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """A trial of a study, as the journal has it.

    Args:
        trial: What was asked for.
        state: ``waiting`` if its worker has ended or was killed: the next free worker goes on with it.
        worker: Who runs it, or ran it last.
        result: What came of it; ``None`` unless it is finished.
        curve: The steps and values of the metric, if the study may end runs early.
    """

    trial: Trial
    state: Literal["running", "waiting", "finished"]
    worker: str
    result: Result | None = None
    curve: tuple[tuple[int, float], ...] = ()


@dataclass
class Journal:
    """The journal in the folder of a study.

    Args:
        folder: The folder, which exists.
    """

    folder: Path
    _entries: list[Entry] = field(default_factory=list)
    _end: int = 0  # bytes of the file that were read
    _descriptor: int | None = None

    @property
    def file(self) -> Path:
        """The file."""
        return self.folder / JOURNAL

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep all other workers out; what they have written is read first.

        Raises:
            StudyError: If the file system has no locks, or the file is damaged.
        """
        try:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StudyError(f"cannot write '{self.file}': {error.strerror}") from error
        try:
            lock(self.file, descriptor, wait=True)
            self._descriptor = descriptor
            self._read_on(descriptor)
            yield
        finally:
            self._descriptor = None
            os.close(descriptor)  # this releases the lock

    def append(self, **entry: Any) -> None:
        """Write a line; only while it is locked."""
        descriptor = self._descriptor
        if descriptor is None:
            raise RuntimeError("the journal is not locked")
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        except OSError as error:  # the disk may be full
            os.ftruncate(descriptor, self._end)
            raise StudyError(f"cannot write '{self.file}': {error.strerror}") from error
        self._end += len(line)
        self._entries.append(json.loads(line))

    def definition(self) -> Mapping[str, Any] | None:
        """Return what the study was defined by; ``None`` if it is new."""
        return self._entries[0]["study"] if self._entries else None

    def records(self) -> list[Record]:
        """Return all trials, in the order in which they were asked for."""
        records: dict[str, Record] = {}
        for entry in self._entries[1:]:
            name = entry["trial"]
            record = records.get(name)
            if entry["event"] == "claimed":
                trial = record.trial if record else Trial(name, entry["options"])
                records[name] = Record(trial, "running", entry["worker"])
            elif record is None:
                continue  # of a later version
            elif entry["event"] == "released":
                records[name] = replace(record, state="waiting", result=None, curve=())
            elif entry["event"] == "finished":
                curve = tuple((step, value) for step, value in entry["curve"])
                records[name] = replace(record, state="finished", result=Result(**entry["result"]), curve=curve)
        return list(records.values())

    def claim(self, trial: Trial, worker: str, **about_worker: Any) -> None:
        """Take a trial for a worker."""
        options = dict(trial.options)
        self.append(event="claimed", trial=trial.name, options=options, worker=worker, **about_worker)

    def release(self, trial: Trial, worker: str) -> None:
        """Give a trial back, to be run by another worker."""
        self.append(event="released", trial=trial.name, worker=worker)

    def finish(self, trial: Trial, worker: str, result: Result, curve: Sequence[tuple[int, float]] = ()) -> None:
        """Tell the result of a trial."""
        values = {**asdict(result), "figures": dict(result.figures)}
        self.append(event="finished", trial=trial.name, worker=worker, result=values, curve=list(curve))

    def _read_on(self, descriptor: int) -> None:
        """Read what is new, and cut off what a killed writer has left."""
        text = os.pread(descriptor, max(os.fstat(descriptor).st_size - self._end, 0), self._end)
        whole, newline, torn = text.rpartition(b"\n")
        if torn:
            os.ftruncate(descriptor, self._end + len(whole) + len(newline))
        for line in whole.split(b"\n") if newline else ():
            try:
                entry = json.loads(line)
            except ValueError as error:
                number = len(self._entries) + 1
                raise StudyError(f"'{self.file}', line {number}: not JSON; the file is damaged") from error
            self._entries.append(entry)
        self._end += len(whole) + len(newline)
