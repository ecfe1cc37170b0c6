"""What a run has logged so far, as the report reads it, to judge the run while it goes on."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from lightning_muon.report.run_log import RunLog, Scalars, Texts

# Points of a quantity, at most; then every second one is dropped, but not the extremes, by which sizes are judged.
MOST_POINTS = 512


class Record:
    """Scalars and texts by name.

    Args:
        name: Of the run.
        path: Its folder.
        before: What it logged before it was resumed.
    """

    def __init__(self, name: str = "", path: Path = Path(), before: RunLog | None = None) -> None:
        self._name = name
        self._path = path
        self._scalars: Scalars = {} if before is None else {name: list(given) for name, given in before.scalars.items()}
        self._texts: Texts = {} if before is None or before.texts is None else dict(before.texts)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Take scalars of a step."""
        for name, value in scalars.items():
            logged = self._scalars.setdefault(name, [])
            if logged and logged[-1][0] >= step:
                del logged[-1]
            logged.append((step, float(value)))
            if len(logged) > MOST_POINTS:
                self._scalars[name] = _thinned(logged)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Take a text of a step."""
        self._texts.setdefault(name, []).append((step, text))

    def run(self) -> RunLog:
        """Return the run so far."""
        return RunLog(self._name, self._path, self._scalars, self._texts)

    @property
    def names(self) -> Iterable[str]:
        """What was logged."""
        return self._scalars.keys()


def _thinned(logged: list[tuple[int, float]]) -> list[tuple[int, float]]:
    values = [value for _, value in logged]
    kept = {values.index(min(values)), values.index(max(values)), len(logged) - 1}
    return [
        point for place, point in enumerate(logged) if place % 2 == 0 or place in kept or not math.isfinite(point[1])
    ]
