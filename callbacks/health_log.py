"""The verdict on a run while it goes on: a line for each quantity, a text that says what to do, and a picture."""

import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_muon.callbacks.logging import log_text, logged_step, write_scalars
from lightning_muon.callbacks.record import Record
from lightning_muon.report.health import named_lines
from lightning_muon.report.orthogonality_map import OrthogonalityMap, draw_map
from lightning_muon.report.picture import PICTURE, draw_picture
from lightning_muon.report.plain_text import code, markdown, printable
from lightning_muon.report.quantities import LEARNING_RATE, LOSS, OTHER_LOSS, QUANTITIES, VALIDATION_LOSS, matching
from lightning_muon.report.quantity import Line
from lightning_muon.report.replaced import replaced
from lightning_muon.report.run_log import RunLog, RunLogError, read_run
from lightning_muon.report.tags import GLANCE, HEALTH, LIMITS, VERDICT, tag_of
from lightning_muon.report.verdict import RunHealth, health_of

PICTURE_TAG = f"{GLANCE}/picture"
MAP = "orthogonality.png"
MAP_TAG = tag_of("orthogonality_map")
TEXT = f"{GLANCE}/verdict"

# Drawing takes about a second. It may take this part of the time of a run, besides the one at the end.
SHARE_OF_PICTURES = 0.002

# Lines of the chart of verdicts: where `watch` begins, and where `bad` does.
LINES = {
    f"{LIMITS}/{of}_{verdict}": limit
    for of in ("health", "quantity")
    for verdict, limit in (("watch", 1.0), ("bad", 2.0))
}


class HealthLog:
    """Judges what it hears of a run. On rank zero only: the other ranks hear and write nothing.

    Args:
        trainer: At the start of training.
        folder: The ``log_dir`` of the trainer; the picture goes to the folder of the run, there or below.
    """

    def __init__(self, trainer: Trainer, folder: str | None) -> None:
        self._folder = _folder_of_run(trainer, folder)
        self._record = Record(*_name_and_path(self._folder), before=_before(trainer, self._folder))
        self._lines: tuple[int, list[tuple[str, Line]]] = (-1, [])
        self._told: tuple[str, tuple[str, ...]] = ("", ())
        self._drawn_at, self._drawing_took = time.monotonic(), 1.0
        self._drawn_in: int | None = None
        self._speed: float | None = None
        self._judged = 0

    def hear(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars of a monitor by name."""
        self._record.add(step, scalars)
        self._speed = scalars.get("throughput/samples_per_second", self._speed)

    def hear_text(self, step: int, name: str, text: str) -> None:
        """Take a text by name."""
        self._record.add_text(step, name, text)

    def hear_metrics(self, trainer: Trainer, metrics: Mapping[str, object], *, of_validation: bool) -> None:
        """Take losses and learning rates from the metrics of the trainer, which were logged just now."""
        validation = ("val", "eval")
        found = [tag for tag in matching(metrics, LOSS) if tag.startswith(validation) == of_validation]
        if not of_validation:
            found += matching(metrics, LEARNING_RATE)
        values = {tag: float(metrics[tag]) for tag in found}  # type: ignore[arg-type]
        self._record.add(logged_step(trainer), values)
        losses = matching(values, VALIDATION_LOSS if of_validation else OTHER_LOSS)
        copies = {f"{GLANCE}/{'val_loss' if of_validation else 'loss'}": values[losses[0]]} if losses else {}
        if self._speed is not None and not of_validation:
            copies[f"{GLANCE}/samples_per_second"], self._speed = self._speed, None
        write_scalars(trainer, copies)

    def judge(self, trainer: Trainer, *, is_over: bool) -> RunHealth:
        """Write the severity of each quantity, their largest, and the limits; and a text if the verdict has changed."""
        run = self._record.run()
        if self._lines[0] != len(run.scalars):  # looking for them takes most of the time
            self._lines = len(run.scalars), named_lines([run])
        health = health_of(run, is_over=is_over, lines=self._lines[1])
        severities = health.severities()
        if severities and any(matching(run.scalars, f"({'|'.join(entry.name for entry in QUANTITIES)})(/.+)?")):
            scalars = {f"{VERDICT}/{name}": severity for name, severity in severities.items()}
            if health.severity is not None:
                scalars[HEALTH] = health.severity
            self._judged += 1
            if is_over or self._judged & (self._judged - 1) == 0:
                scalars |= LINES | _limits(severities)
            # When the run is over, the current batch is one that there is not.
            write_scalars(trainer, scalars, max(0, logged_step(trainer) - is_over))
        told = (health.verdict, tuple(one.line.label for one in health.unhealthy))
        if told != self._told and (health.severity is not None or is_over):
            self._told = told
            log_text(trainer, TEXT, as_text(health))
        return health

    def draw_now_and_then(self, trainer: Trainer) -> None:
        """Draw the pictures if the last ones are long ago, by the time that drawing takes."""
        if time.monotonic() - self._drawn_at > self._drawing_took / SHARE_OF_PICTURES:
            self.draw(trainer, health_of(self._record.run(), is_over=False))

    def draw(self, trainer: Trainer, health: RunHealth) -> None:
        """Draw the pictures into the folder of the run and to the loggers, or say why there are none."""
        if self._folder is None or not trainer.loggers or self._drawn_in == logged_step(trainer):
            return
        self._drawn_in = logged_step(trainer)
        began = time.monotonic()
        path, found = self._folder / PICTURE, OrthogonalityMap.of_run(self._record.run())
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with replaced(path) as unfinished:
                no_picture = draw_picture(self._record.run(), health, unfinished)
            if found is not None and not no_picture:
                with replaced(self._folder / MAP) as unfinished:
                    draw_map(self._record.run().name, found, unfinished)
        except OSError as error:  # a full disk does not end a run
            no_picture = f"no picture in '{path}': {error.strerror}"
        if no_picture:
            rank_zero_info(f"MuonDashboard: {no_picture}")
            self._drawing_took = math.inf
            return
        _send(trainer, path, PICTURE_TAG)
        if found is not None:
            _send(trainer, self._folder / MAP, MAP_TAG)
        self._drawn_at = time.monotonic()
        self._drawing_took = self._drawn_at - began


def _limits(quantities: Iterable[str]) -> dict[str, float]:
    """Return the ends of healthy ranges that are lines in the charts of some quantities.

    They are written after 1, 2, 4, 8, … logs and at the end: TensorBoard leaves outliers out of a chart, and among
    many points on the limits a sick run would be one.
    """
    return {
        f"{LIMITS}/{entry.name}": float(entry.healthy.bound)
        for entry in QUANTITIES
        if entry.limit_is_drawn and entry.name in quantities and entry.healthy.bound is not None
    }


def as_text(health: RunHealth) -> str:
    """Return the verdict, what is wrong since when, and what to do, as Markdown."""
    lines = [f"## {markdown(health.headline)}", ""]
    for one in health.unhealthy:
        since = "" if one.since is None else f" since step {one.since}"
        advice = f" {markdown(one.line.advice[:1].upper() + one.line.advice[1:])}." if one.line.advice else ""
        tag = code(tag_of(one.line.tags)) if one.line.tags and "\\" not in one.line.tags else ""
        lines.append(f"- **{one.verdict}**{since}: {markdown(str(one))}.{advice} {tag}".rstrip())
    return "\n".join(lines)


def _folder_of_run(trainer: Trainer, folder: str | None) -> Path | None:
    """Return where a run has its files; with other loggers as ``ModelCheckpoint`` does, below their ``save_dir``."""
    logger = trainer.logger
    if folder is None or logger is None or isinstance(logger, (TensorBoardLogger, CSVLogger)):
        return Path(folder) if folder else None
    return Path(folder) / str(logger.name) / str(logger.version)


def _name_and_path(folder: Path | None) -> tuple[str, Path]:
    return (printable(folder.name), folder) if folder else ("", Path())


def _before(trainer: Trainer, folder: Path | None) -> RunLog | None:
    """Return what a resumed run has logged in this folder before."""
    if folder is None or not trainer.is_global_zero or logged_step(trainer) == 0:
        return None
    try:
        return read_run(folder, folder.name)
    except (RunLogError, OSError):
        return None


def _send(trainer: Trainer, path: Path, tag: str) -> None:
    """Give a picture to the loggers that show pictures."""
    from matplotlib.image import imread  # noqa: PLC0415 - the picture was drawn by it

    step = logged_step(trainer)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, imread(path)[..., :3], step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [str(path)], step=step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(path), GLANCE)
