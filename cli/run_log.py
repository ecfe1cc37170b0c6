"""What a run has logged, as TensorBoard's event files and Lightning's CSV files hold it."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import SessionLog

from lightning_muon.cli.event_file import events
from lightning_muon.cli.tags import logger_prefix

EVENTS = "events.out.tfevents*"
METRICS = "metrics.csv"

Scalars = dict[str, list[tuple[int, float]]]
Texts = dict[str, list[tuple[int, str]]]

_TEXT = "/text_summary"  # what TensorBoard's writer puts behind the tag of a text


class RunLogError(ValueError):
    """A folder or file that holds no run; the message is one line for the user."""


@dataclass(frozen=True)
class RunLog:
    """What one run has logged.

    Attributes:
        name: What to call it: its path below what it has in common with the others.
        path: Its folder.
        scalars: For each tag, without a logger's prefix, the steps and values in the order of the steps.
        texts: For each tag, the steps and texts; ``None`` where only CSV was written, which has no texts.
        damage: What could not be read, a line for each file.
    """

    name: str
    path: Path
    scalars: Scalars
    texts: Texts | None
    damage: tuple[str, ...] = ()

    def said(self) -> list[str]:
        """Return what the monitors said during the run: their warnings, and the decisions about the weight decay."""
        texts = self.texts or {}
        return [text for tag in ("warnings", "weight_decay/decisions") for _, text in texts.get(tag, [])]


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders of all runs in and below folders, those that were written to last first.

    Raises:
        RunLogError: If a folder does not exist, or has no run in it.
    """
    found: dict[Path, float] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            what = "is a file: give the folder that it lies in" if folder.exists() else "does not exist"
            raise RunLogError(f"log folder '{folder}' {what}")
        files = [path for pattern in (EVENTS, METRICS) for path in folder.rglob(pattern) if path.is_file()]
        if not files:
            raise RunLogError(f"no run in '{folder}': neither {EVENTS} nor {METRICS} is in it or below")
        for file in files:
            found[file.parent] = max(found.get(file.parent, 0.0), file.stat().st_mtime)
    return sorted(found, key=lambda run: (-found[run], run))


def run_names(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run that tells it from the others: what of its path they do not share."""
    if len(runs) == 1:
        return [runs[0].resolve().name]
    shared = os.path.commonpath([run.resolve() for run in runs])
    return [os.path.relpath(run.resolve(), shared) for run in runs]


def read_run(path: Path, name: str) -> RunLog:
    """Read all that a run has logged, as far as its files are sound.

    Where two kinds of files have a tag, TensorBoard's is taken.

    Raises:
        RunLogError: If no file has a value, and one is not what its name says, or may not be read.
    """
    metrics: Scalars = {}
    written: Scalars = {}
    texts: Texts = {}
    damage: list[str] = []
    refused: list[RunLogError] = []
    written_by_tensorboard = sorted(path.glob(EVENTS))
    for file in [*filter(Path.is_file, [path / METRICS]), *written_by_tensorboard]:
        try:
            if file.name == METRICS:
                metrics = _read_metrics(file)
            else:
                damage += _read_events(file, written, texts)
        except OSError as error:
            refused.append(RunLogError(f"'{error.filename or file}' cannot be read: {error.strerror}"))
        except RunLogError as error:
            refused.append(error)
    scalars = _without_prefix(metrics) | _without_prefix(written)
    if refused and not scalars:
        raise refused[0]
    damage += [f"left out: {error}" for error in refused]
    return RunLog(name, path, scalars, texts if written_by_tensorboard else None, tuple(damage))


def _without_prefix(scalars: Scalars) -> Scalars:
    """Take what a logger's ``prefix`` put before them off the tags."""
    prefix = logger_prefix(scalars)
    stripped = {tag: tag.removeprefix(prefix) for tag in scalars}
    return {tag if stripped[tag] in scalars else stripped[tag]: logged for tag, logged in scalars.items()}


def _read_events(file: Path, scalars: Scalars, texts: Texts) -> list[str]:
    """Add what an event file has to scalars and texts.

    Returns:
        A line that says where it is damaged, if it is.
    """
    last: int | None = None
    with file.open("rb"):
        pass  # TensorBoard would not say why it cannot
    for event in events(file):
        if event is None and last is None:
            raise RunLogError(f"'{file}' is not a TensorBoard event file, or is damaged from its beginning")
        if event is None:
            return [f"'{file}' is damaged after step {last}: what follows could not be read"]
        last = max(last or 0, event.step)
        if event.session_log.status == SessionLog.START:
            _forget(event.step, scalars)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            elif value.tag.endswith(_TEXT) and value.tensor.string_val:
                text = value.tensor.string_val[0].decode(errors="replace")
                texts.setdefault(value.tag.removesuffix(_TEXT), []).append((event.step, text))
    return []


def _forget(step: int, scalars: Scalars) -> None:
    """Forget what was logged from a step on: the run was started there again, with a logger's ``purge_step``."""
    for tag, logged in list(scalars.items()):
        scalars[tag] = [(at, value) for at, value in logged if at < step]
        if not scalars[tag]:
            del scalars[tag]


def _read_metrics(file: Path) -> Scalars:
    """Read a file of Lightning's ``CSVLogger``: a column a metric, most cells of a row empty."""
    with file.open(newline="", errors="replace") as lines:
        rows = csv.DictReader(lines)
        if "step" not in (rows.fieldnames or ()):
            raise RunLogError(f"'{file}' has no column 'step': it is not a file of Lightning's CSVLogger")
        scalars: Scalars = {}
        for row in rows:
            try:
                step = int(row["step"])
                values = {tag: float(value) for tag, value in row.items() if tag and tag != "step" and value}
            except (TypeError, ValueError) as error:
                raise RunLogError(f"'{file}', line {rows.line_num}: {error}") from error
            for tag, value in values.items():
                scalars.setdefault(tag, []).append((step, value))
    return scalars
