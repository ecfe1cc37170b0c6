"""Which workers of a study are alive."""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from lightning_muon.experiments.locks import lock

HEARTBEAT = 5.0  # seconds between two signs of life
# Seconds without one, after which a run of a worker ends itself, and after which others take the worker for dead. In
# between, the runs have ended for certain.
SILENT, DEAD = 40.0, 60.0


def this_machine() -> str:
    """Return what is equal in all processes under one kernel, containers included, and different elsewhere."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


class Worker:
    """This process, as a worker of a study: a file that it keeps locked, and touches every few seconds.

    Args:
        folder: The folder of the study.
    """

    def __init__(self, folder: Path) -> None:
        self.host = socket.gethostname()
        self.name = f"{self.host}-{os.getpid()}-{uuid4().hex[:6]}"
        self._folder = folder / "workers"
        self._folder.mkdir(exist_ok=True)
        self.file = self._folder / self.name
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        lock(self.file, self._descriptor)
        os.write(self._descriptor, json.dumps({"machine": this_machine()}).encode())
        self._touched = time.monotonic()

    def close(self) -> None:
        """End being a worker, when all trials are finished or given back."""
        os.close(self._descriptor)
        self.file.unlink(missing_ok=True)

    def touch(self) -> bool:
        """Give a sign of life, if it is time.

        Returns:
            False if the last one is so long ago that others may take this worker for dead.
        """
        now = time.monotonic()
        silent = now - self._touched
        if silent > HEARTBEAT:
            with suppress(OSError):
                os.utime(self.file)  # the time of the file system, which all machines share
                self._touched = now
        return silent < SILENT

    def is_dead(self, other: str) -> bool:
        """Return whether another worker has ended, or was killed.

        Under the kernel of this machine its lock says so. On another machine there may be nobody left to release it.
        """
        if other == self.name:
            return False
        path = self._folder / other
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if self._machine_of(descriptor) == this_machine():
                return lock(path, descriptor)
            os.utime(self.file)
            return self.file.stat().st_mtime - os.fstat(descriptor).st_mtime > DEAD
        finally:
            os.close(descriptor)

    @staticmethod
    def _machine_of(descriptor: int) -> str | None:
        try:
            machine: str = json.loads(os.pread(descriptor, 1000, 0))["machine"]
        except (ValueError, KeyError):  # killed before it was written: nothing can be claimed yet
            return None
        return machine
