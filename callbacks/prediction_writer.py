"""Write what ``predict`` finds to one file, from any number of ranks."""

import csv
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from typing_extensions import override

_SUFFIXES = (".jsonl", ".csv")


class PredictionWriter(BasePredictionWriter):
    """Write predictions to a file, a row for each sample, in the order of the samples, each once.

    ``predict_step`` returns a list with a dictionary for each sample of the batch, such as
    ``{"file": "a.png", "class": "cat", "probability": 0.9}``, or the dictionary alone if the batch is one sample. The
    keys become the columns of a CSV file, or the keys of JSON lines. The file appears when it is complete. Where
    several ranks predict, rank 0 writes for all; a sample that several of them had is written once.

    Args:
        path: The file to write, ``.jsonl`` or ``.csv``; it must not exist.

    Raises:
        ValueError: If the file has another ending.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)
        if self.path.suffix not in _SUFFIXES:
            raise ValueError(f"the file of predictions must end with {' or '.join(_SUFFIXES)}, got '{path}'")
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}  # by data loader and sample

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "predict":
            return
        if self.path.exists():
            raise FileExistsError(f"'{self.path}' exists already: give another name for the predictions")
        there = next(parent for parent in self.path.absolute().parents if parent.exists())
        if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
            raise PermissionError(f"'{self.path}' cannot be written: '{there}' is no folder that may be written to")
        self._rows = {}

    @override
    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        rows = [prediction] if isinstance(prediction, Mapping) else prediction
        if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
            kind = f"a list with a {type(rows[0]).__name__}" if isinstance(rows, list) else type(prediction).__name__
            raise ValueError(
                f"predictions can be written if predict_step of {type(pl_module).__name__} returns a list of"
                f" dictionaries, one for each sample; it returned {kind}"
            )
        if batch_indices:
            if len(batch_indices) != len(rows):
                raise ValueError(
                    f"predict_step of {type(pl_module).__name__} returned {len(rows)} rows for {len(batch_indices)}"
                    " samples: one for each can be written"
                )
        elif trainer.world_size > 1:
            raise ValueError(
                "predictions of several ranks have no order without the indices of samples: predict with a DataLoader"
                " of a dataset that has a length, or on one device"
            )
        else:
            batch_indices = range(len(self._rows), len(self._rows) + len(rows))
        for index, row in zip(batch_indices, rows, strict=True):
            self._rows[dataloader_idx, index] = {str(key): _plain(value) for key, value in row.items()}

    @override
    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows on rank 0, and write them. A collective."""
        every = [self._rows]
        if trainer.world_size > 1:
            every = [{}] * trainer.world_size
            dist.gather_object(self._rows, every if trainer.is_global_zero else None)
        if trainer.is_global_zero:
            joined = {key: row for rows in reversed(every) for key, row in rows.items()}
            rows = [joined[key] for key in sorted(joined)]
            self._write(_csv(rows) if self.path.suffix == ".csv" else _json_lines(rows))
            print(f"predictions: {self.path} ({len(rows)} rows)")
        self._rows = {}

    def _write(self, text: str) -> None:
        unfinished = self.path.with_name(f".{self.path.name}.unfinished")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("w", encoding="utf-8", newline="", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self.path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise


def writes_predictions(trainer: Trainer) -> bool:
    """Return whether predictions go to a file, so that ``predict_step`` need not print them."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, BasePredictionWriter) for callback in callbacks)


def _plain(value: Any) -> Any:
    """Return tensors and arrays as numbers and lists, and ``None`` for numbers that JSON lacks."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        nested = (dict, list)
        writer.writerow(
            {
                key: json.dumps(value, ensure_ascii=False) if isinstance(value, nested) else value
                for key, value in row.items()
            }
        )
    return stream.getvalue()
