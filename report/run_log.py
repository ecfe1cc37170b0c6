"""Find runs, and read what they logged: TensorBoard's event files and the files of Lightning's ``CSVLogger``."""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.errors import DataLossError, OutOfRangeError
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

from lightning_muon.report.plain_text import from_markdown, printable
from lightning_muon.report.quantities import QUANTITIES
from lightning_muon.report.settings import Settings
from lightning_muon.report.tags import GLANCE, LIMITS, VERDICT, WATCH, is_ours, name_of, of_today

EVENTS = "events.out.tfevents*"
METRICS = "metrics.csv"

Scalars = dict[str, list[tuple[int, float]]]
Texts = dict[str, list[tuple[int, str]]]

_TEXT = "/text_summary"  # TensorBoard's writer appends it to the tag of a text
_MONITOR_TAG = re.compile(
    f"(?P<prefix>(.+?-)??)(({WATCH}|{VERDICT}|{LIMITS}|{GLANCE})/.+|"
    f"{'|'.join({f'{entry.name}/.+' if '/' in entry.tag else entry.tag for entry in QUANTITIES})})"
)


class RunLogError(ValueError):
    """A folder or file has no readable run; the message is one line for the user."""


@dataclass(frozen=True)
class RunLog:
    """What one run logged.

    Attributes:
        name: A name that tells it apart from other runs.
        path: Its folder.
        scalars: Steps and values by tag, in the order of the steps. Tags are without a logger's prefix, and those of
            the monitors without their namespace: ``weight_rms/max``.
        texts: Steps and texts by tag, likewise; ``None`` if the run wrote only CSV, which has no texts.
        damage: What could not be read, a line for each file.
        seconds_per_step: The median over all steps; each has the mean of the interval between two logged ones. ``None``
            if the run wrote only CSV, which has no times.
        settings: What it saved of its settings; ``None`` if that is not known.
    """

    name: str
    path: Path
    scalars: Scalars
    texts: Texts | None
    damage: tuple[str, ...] = ()
    seconds_per_step: float | None = None
    settings: Settings | None = None

    @property
    def steps(self) -> int:
        """How many steps it has made, up to its last logged value; Lightning counts them from 0."""
        return max((logged[-1][0] + 1 for logged in self.scalars.values() if logged), default=0)

    def values(self, tag: str) -> list[float]:
        """Return what was logged under a tag, in the order of the steps."""
        return [value for _, value in self.scalars.get(tag, [])]

    def messages(self) -> list[str]:
        """Return the warnings of the monitors, and the decisions about the weight decay."""
        texts = self.texts or {}
        tags = ("warnings", "weight_decay/decisions")
        return [from_markdown(text) for tag in tags for _, text in texts.get(tag, [])]


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Return the folders of all runs in and below folders, the latest written first.

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
    """Return a name for each run: the part of its path that the runs do not share."""
    if len(runs) == 1:
        return [printable(runs[0].resolve().name)]
    shared = os.path.commonpath([run.resolve() for run in runs])
    return [printable(os.path.relpath(run.resolve(), shared)) for run in runs]


def read_run(path: Path, name: str) -> RunLog:
    """Read all that a run logged, as far as its files are sound.

    If both kinds of files have a tag, TensorBoard's values are used.

    Args:
        path: The folder of the run.
        name: What to call it.

    Raises:
        RunLogError: If no file has a value and one of them cannot be read, or is not what its name says.
    """
    metrics: Scalars = {}
    written: Scalars = {}
    texts: Texts = {}
    damage: list[str] = []
    intervals: list[tuple[float, int]] = []
    refused: list[RunLogError] = []
    event_files = sorted(path.glob(EVENTS))
    for file in [*filter(Path.is_file, [path / METRICS]), *event_files]:
        try:
            if file.name == METRICS:
                metrics = _read_metrics(file)
            else:
                damage += _read_events(file, written, texts, intervals)
        except OSError as error:
            refused.append(RunLogError(f"'{error.filename or file}' cannot be read: {error.strerror}"))
        except RunLogError as error:
            refused.append(error)
    scalars = _by_name(metrics) | _by_name(written)
    if refused and not scalars:
        raise refused[0]
    damage += [f"left out: {error}" for error in refused]
    named = {name_of(tag): given for tag, given in texts.items()} if event_files else None
    return RunLog(name, path, scalars, named, tuple(damage), _median(intervals))


def _median(weighted: list[tuple[float, int]]) -> float | None:
    """Return the value in the middle of the weight; ``None`` if there are no values."""
    half = sum(weight for _, weight in weighted) / 2
    for value, weight in sorted(weighted):
        half -= weight
        if half <= 0:
            return value
    return None


def logger_prefix(tags: Iterable[str]) -> str:
    """Return what a logger's ``prefix`` put before the tags, with its hyphen; empty if there is none.

    It is what most of the monitors' tags begin with: a single tag may begin with a hyphened word by chance.
    """
    before = Counter(found["prefix"] for tag in tags if (found := _MONITOR_TAG.fullmatch(tag)))
    return max(before, key=lambda prefix: (before[prefix], len(prefix)), default="")


def _by_name(scalars: Scalars) -> Scalars:
    """Return scalars by the names of today, without prefix, namespace, limits and copies."""
    prefix = logger_prefix(scalars)
    stripped = {tag: tag.removeprefix(prefix) for tag in scalars}
    found: Scalars = {}
    for tag, logged in scalars.items():
        plain = stripped[tag] if stripped[tag] not in scalars or is_ours(stripped[tag]) else tag
        if not plain.startswith((f"{LIMITS}/", f"{GLANCE}/")):
            name, values = of_today(name_of(plain), logged)
            # A run may have begun with the tags of an older version.
            found[name] = sorted([*found.get(name, []), *values], key=lambda value: value[0])
    return found


def _read_events(file: Path, scalars: Scalars, texts: Texts, intervals: list[tuple[float, int]]) -> list[str]:
    """Add the values and texts of an event file, and the intervals between its values.

    An interval is seconds a step, and how many steps.

    Returns:
        A line that says where the file is damaged, if it is.
    """
    last: int | None = None
    before: tuple[int, float] | None = None  # the first value at a step, with its time
    with file.open("rb"):
        pass  # raises the reason why it cannot be read, which TensorBoard would not give
    for event in _events(file):
        if event is None and last is None:
            raise RunLogError(f"'{file}' is not a TensorBoard event file, or is damaged from its beginning")
        if event is None:
            return [f"'{file}' is damaged after step {last}: what follows could not be read"]
        last = max(last or 0, event.step)
        if event.session_log.status == SessionLog.START:
            _remove_from(event.step, scalars)
        for value in event.summary.value:
            if value.HasField("simple_value"):
                if before is None or event.step > before[0]:
                    if before is not None:
                        steps = event.step - before[0]
                        intervals.append(((event.wall_time - before[1]) / steps, steps))
                    before = event.step, event.wall_time
                scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
            elif value.tag.endswith(_TEXT) and value.tensor.string_val:
                text = value.tensor.string_val[0].decode(errors="replace")
                texts.setdefault(value.tag.removesuffix(_TEXT), []).append((event.step, text))
    return []


def _events(file: Path) -> Iterator[Event | None]:
    """Yield the events of a file, and ``None`` at the end if the rest is damaged.

    TensorBoard's own loader stops at damage without a message. An incomplete last record is no damage: the file of a
    run in progress ends like this.
    """
    reader = PyRecordReader_New(str(file))
    while True:
        try:
            reader.GetNext()
            yield Event.FromString(reader.record())
        except OutOfRangeError:
            return
        except (DataLossError, DecodeError) as error:
            if "truncated" not in str(error):
                yield None
            return


def _remove_from(step: int, scalars: Scalars) -> None:
    """Remove the values from a step on: the run was restarted there, with a logger's ``purge_step``."""
    for tag, logged in list(scalars.items()):
        scalars[tag] = [(at, value) for at, value in logged if at < step]
        if not scalars[tag]:
            del scalars[tag]


def _read_metrics(file: Path) -> Scalars:
    """Read a file of Lightning's ``CSVLogger``: a column for each metric, most cells of a row empty."""
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
