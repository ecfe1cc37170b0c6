"""A map of a model: of each operator and depth how far the update was from orthogonal, and the steps that it needs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_muon.report.picture import NO_MATPLOTLIB, new_figure
from lightning_muon.report.plain_text import code, figure_text, table_row
from lightning_muon.report.quantities import quantity
from lightning_muon.report.run_log import RunLog

TEXT = "orthogonality_map"  # the name under which a run logs it

_INTRODUCTION = re.compile(r"Step (\d+)\b")
_TAKEN = re.compile(r"(\d+) are taken")
_CELL = re.compile(r"(nan|inf|[\d.]+)(?: \((\d+)\))?")
_MOST_LABELS = 240  # cells of a panel that have their number in them
_DARK = 0.75  # of the way from white to the ends of the colours, behind white letters


@dataclass(frozen=True)
class OrthogonalityMap:
    """Orthogonality errors by operator and depth.

    Attributes:
        step: When they were measured.
        taken: How many steps the method takes; ``None`` if it takes none.
        cells: Error and needed steps, if known, by operator and depth, in the order of the model; of several matrices
            the worst.
    """

    step: int
    taken: int | None
    cells: Mapping[tuple[str, str], tuple[float, int | None]]

    @property
    def operators(self) -> list[str]:
        """The rows."""
        return list(dict.fromkeys(operator for operator, _ in self.cells))

    @property
    def depths(self) -> list[str]:
        """The columns."""
        found = {depth for _, depth in self.cells}
        return sorted(found, key=lambda depth: (depth.isdigit(), int(depth) if depth.isdigit() else 0))

    @property
    def introduction(self) -> str:
        """What the numbers are."""
        needs = f", and in brackets the steps that it needs; {self.taken} are taken" if self.taken is not None else ""
        return f"Step {self.step}: orthogonality error of each operator at each depth{needs}."

    def as_text(self) -> str:
        """Return the map as a table in Markdown, from which :meth:`of_text` reads it."""
        depths = self.depths
        lines = [self.introduction, ""]
        lines += [table_row("operator", *depths), table_row("---", *["---:"] * len(depths))]
        for operator in self.operators:
            cells = (self.cells.get((operator, depth)) for depth in depths)
            lines.append(
                table_row(code(operator).replace("|", "¦"), *("–" if cell is None else written(cell) for cell in cells))
            )
        return "\n".join(lines)

    @classmethod
    def of_text(cls, text: str) -> "OrthogonalityMap | None":
        """Read a map; ``None`` if the text has none."""
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
        step, taken = _INTRODUCTION.match(text), _TAKEN.search(text.partition("\n")[0])
        if step is None or len(rows) < 3:
            return None
        cells: dict[tuple[str, str], tuple[float, int | None]] = {}
        for operator, *found in rows[2:]:
            for depth, cell in zip(rows[0][1:], found, strict=False):
                if (parts := _CELL.fullmatch(cell)) is not None:
                    steps = None if parts[2] is None else int(parts[2])
                    cells[operator.strip("` "), depth] = float(parts[1]), steps
        return cls(int(step[1]), None if taken is None else int(taken[1]), cells)

    @classmethod
    def of_run(cls, run: RunLog) -> "OrthogonalityMap | None":
        """Return the last map that a run has logged; ``None`` if there is none."""
        logged = (run.texts or {}).get(TEXT, [])
        return cls.of_text(logged[-1][1]) if logged else None


def written(cell: tuple[float, int | None]) -> str:
    """Return an error, with the steps in brackets."""
    error, steps = cell
    return f"{error:.2f}" if steps is None else f"{error:.2f} ({steps})"


def draw_map(name: str, found: OrthogonalityMap, path: Path) -> str | None:
    """Draw a map: errors, white at the limit and red beyond it, and beside them the steps that are needed.

    Args:
        name: Of the run.
        found: The map.
        path: Of the PNG.

    Returns:
        Why there is no picture, for the user; ``None`` if there is one.
    """
    limit = quantity("orthogonality_error").healthy.bound or 1.0
    operators, depths = found.operators, found.depths
    errors = [[found.cells.get((o, d), (None, None))[0] for d in depths] for o in operators]
    steps = [[found.cells.get((o, d), (None, None))[1] for d in depths] for o in operators]
    panels: list[tuple[str, list[Any], str, float | None, float]] = [
        (f"orthogonality error, healthy up to {limit:g}", errors, "{:.2f}", limit, 1.0)
    ]
    numbers = [number for row in steps for number in row if number is not None]
    if found.taken is not None and numbers:
        title = f"steps that its smallest σ needs; {found.taken} are taken"
        panels.append((title, steps, "{:.0f}", None, float(max(numbers))))
    labels = max(map(len, operators))
    width = min(max(3.2, 0.5 * len(depths) + 1), 10)
    height = min(max(1.2, 0.3 * len(operators)), 14)
    size = (len(panels) * width + 0.085 * labels + 1, height + 1.5)
    figure = new_figure(size, layout="constrained")
    if figure is None:
        return NO_MATPLOTLIB
    figure.suptitle(figure_text(f"{name}, step {found.step}: what each operator's update is like"), fontsize=11)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, values, write, centre, end) in zip(axes, panels, strict=True):
        _draw_panel(axis, values, write, centre, end)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("depth", fontsize=9)
        every = -(-len(depths) // 24)
        axis.set_xticks(range(0, len(depths), every), depths[::every], fontsize=8)
    axes[0].set_yticks(range(len(operators)), [figure_text(operator) for operator in operators], fontsize=8.5)
    figure.savefig(path, dpi=100)
    return None


def _draw_panel(axis: Any, values: list[Any], write: str, limit: float | None, end: float) -> None:
    """Draw numbers up to an end as colours: grey without a number, black for NaN.

    With a limit they are blue under it, white at it, and red beyond; without one darker where they are larger.
    """
    from matplotlib.colors import Normalize, TwoSlopeNorm  # noqa: PLC0415

    numbers = [[math.nan if value is None else min(value, end) for value in row] for row in values]
    norm = Normalize(0.0, 1.6 * end) if limit is None else TwoSlopeNorm(limit, 0.0, end)
    axis.set_facecolor("#d0d0d0")
    axis.imshow(numbers, cmap="Purples" if limit is None else "RdBu_r", norm=norm, aspect="auto")
    is_labelled = len(values) * len(values[0]) <= _MOST_LABELS
    for row, of_row in enumerate(values):
        for column, value in enumerate(of_row):
            is_dark = value is not None and (not math.isfinite(value) or abs(2 * float(norm(value)) - 1) > _DARK)
            if value is not None and not math.isfinite(value):
                axis.fill_between([column - 0.5, column + 0.5], row - 0.5, row + 0.5, color="black")
            if value is not None and is_labelled:
                colour = "white" if is_dark and limit is not None else "black"
                axis.text(column, row, write.format(value), ha="center", va="center", fontsize=8, color=colour)
