"""What a run has logged, as TensorBoard's event files and Lightning's CSV files hold it."""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

EVENTS = "events.out.tfevents*"
METRICS = "metrics.csv"

# All scalars and texts; of what a report does not show, one, because zero would be all.
_HOW_MANY = {"scalars": 0, "tensors": 0, "histograms": 1, "compressedHistograms": 1, "images": 1, "audio": 1}


class RunLogError(ValueError):
    """A folder or file that holds no run; the message is one line for the user."""


@dataclass(frozen=True)
class RunLog:
    """What one run has logged.

    Attributes:
        name: What to call it: its path below what it has in common with the others.
        path: Its folder.
        scalars: For each tag, the steps and values in the order of the steps.
        texts: For each tag, the steps and texts; ``None`` where only CSV was written, which has no texts.
    """

    name: str
    path: Path
    scalars: dict[str, list[tuple[int, float]]]
    texts: dict[str, list[tuple[int, str]]] | None

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
    """Read all that a run has logged; where two files have a tag, TensorBoard's is taken.

    Raises:
        RunLogError: If a file is not what its name says, or may not be read.
    """
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, list[tuple[int, str]]] | None = None
    try:
        if (path / METRICS).is_file():
            scalars |= _read_metrics(path / METRICS)
        events = sorted(path.glob(EVENTS))
        if events:
            _check_events(events)
            written, texts = _read_events(path)
            scalars |= written
    except OSError as error:
        raise RunLogError(f"'{error.filename or path}' cannot be read: {error.strerror}") from error
    return RunLog(name, path, scalars, texts)


def _check_events(files: Sequence[Path]) -> None:
    """Refuse files without a single event in them, over which TensorBoard passes in silence."""
    for file in files:
        with file.open("rb"):
            pass  # TensorBoard would not say why it cannot
        if file.stat().st_size > 0 and next(iter(EventFileLoader(str(file)).Load()), None) is None:
            raise RunLogError(f"'{file}' is not a TensorBoard event file, or is damaged from its beginning")


def _read_events(path: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, str]]]]:
    events = EventAccumulator(str(path), size_guidance=_HOW_MANY)
    events.Reload()
    tags = events.Tags()
    scalars = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags["scalars"]}
    texts = {
        tag.removesuffix("/text_summary"): [
            (event.step, event.tensor_proto.string_val[0].decode(errors="replace")) for event in events.Tensors(tag)
        ]
        for tag in tags["tensors"]
        if tag.endswith("/text_summary")
    }
    return scalars, texts


def _read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Read a file of Lightning's ``CSVLogger``: a column a metric, most cells of a row empty."""
    with file.open(newline="", errors="replace") as lines:
        rows = csv.DictReader(lines)
        if "step" not in (rows.fieldnames or ()):
            raise RunLogError(f"'{file}' has no column 'step': it is not a file of Lightning's CSVLogger")
        scalars: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            try:
                step = int(row["step"])
                values = {tag: float(value) for tag, value in row.items() if tag and tag != "step" and value}
            except (TypeError, ValueError) as error:
                raise RunLogError(f"'{file}', line {rows.line_num}: {error}") from error
            for tag, value in values.items():
                scalars.setdefault(tag, []).append((step, value))
    return scalars
