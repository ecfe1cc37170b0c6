"""The plots of a comparison: final loss over the length of the schedule, and the tuning of each optimizer."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from lightning_muon.experiments.outcome import Finalist, Outcome, TuningRun
from lightning_muon.report.plain_text import figure_text

BASELINE_COLOUR = "0.15"
# Okabe and Ito's colours, which colour-blind readers tell apart, and four more; without black, which the baseline has.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7A4FB5",
    "#8C6D31",
    "#B00020",
    "#5F7F00",
)
_LABEL_HEIGHT = 0.042  # of a label, as a share of the height of the axes


def colours(outcome: Outcome) -> dict[str, str]:
    """Return the colour of each finalist, the same in all plots."""
    others = [finalist.name for finalist in outcome if finalist.name != outcome.baseline]
    return {outcome.baseline: BASELINE_COLOUR, **dict(zip(others, itertools.cycle(COLOURS), strict=False))}


def draw_horizons(outcome: Outcome, path: Path) -> bool:
    """Draw the final loss over the steps of the schedule: a line through the means, a point for each seed.

    Returns:
        Whether there was something to draw.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message says what to do.
    """
    lines = {finalist.name: line for finalist in outcome if (line := _means(finalist))}
    if not lines:
        return False
    baseline = lines.get(outcome.baseline)
    # An optimizer that ends where the baseline began would press all others together.
    shown = [name for name in lines if not baseline or lines[name][-1][1] <= baseline[0][1]] or list(lines)
    with _figure(path, (8.5, 5.2)) as figure:
        axis = figure.subplots()
        _style(axis)
        colour = colours(outcome)
        for name in shown:
            width = 2.2 if name == outcome.baseline else 1.5
            axis.plot(*zip(*lines[name], strict=True), color=colour[name], linewidth=width)
            seeds = [(run.horizon, run.loss) for run in outcome[name].runs if run.finished]
            axis.scatter(*zip(*seeds, strict=True), s=11, color=colour[name], alpha=0.55, linewidths=0)
        axis.set_xscale("log")
        axis.set_xticks(outcome.horizons, [f"{horizon:,}" for horizon in outcome.horizons])
        axis.minorticks_off()
        axis.set_xlabel("steps of the whole schedule")
        axis.set_ylabel(f"{outcome.setting.metric} at its end")
        axis.set_title("Each point is a run to the end of its own schedule; lines are means", loc="left", fontsize=10)
        if baseline and baseline[-1][0] == outcome.horizon:
            _draw_target(axis, baseline[-1][1], outcome)
        _label_ends(axis, {_label(outcome[name]): (lines[name][-1], colour[name]) for name in shown}, outcome.horizon)
        beyond = [f"{name} ({lines[name][-1][1]:.3f} at {lines[name][-1][0]:,})" for name in lines if name not in shown]
        gone = [_label(finalist) for finalist in outcome if finalist.runs and finalist.name not in lines]
        remarks = [("above the picture: ", beyond), ("without a loss: ", gone)]
        text = "\n".join(start + ", ".join(names) for start, names in remarks if names)
        axis.annotate(figure_text(text), (0.99, 0.99), xycoords="axes fraction", ha="right", va="top", fontsize=8)
    return True


def draw_tuning(outcome: Outcome, path: Path) -> bool:
    """Draw the loss over the learning rate for each optimizer, with all others in grey behind it.

    Returns:
        Whether there was something to draw.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed; the message says what to do.
    """
    finalists = [finalist for finalist in outcome if any("lr" in run.settings for run in finalist.tuning)]
    losses = [run.loss for finalist in finalists for run in finalist.tuning if math.isfinite(run.loss)]
    if not losses:
        return False
    columns = min(4, len(finalists))
    rows = -(-len(finalists) // columns)
    colour = colours(outcome)
    with _figure(path, (2.9 * columns + 0.4, 2.4 * rows + 0.5)) as figure:
        axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
        bottom, top = _window(finalists, losses)
        for axis, finalist in zip(axes, finalists, strict=False):
            _style(axis)
            for other in finalists:
                if other is not finalist:
                    for rates, values in _sweeps(other.tuning):
                        axis.plot(rates, values, color="0.88", linewidth=0.9, zorder=0)
            _draw_search(axis, finalist, colour[finalist.name], top)
            axis.set_title(
                figure_text(finalist.name), loc="left", fontsize=10, color=colour[finalist.name], weight="bold"
            )
        axes[0].set_xscale("log")
        axes[0].set_ylim(bottom, top)
        for unused in axes[len(finalists) :]:
            unused.set_visible(False)
        figure.supxlabel("learning rate", fontsize=9)
        figure.supylabel(f"{outcome.setting.metric} of the tuning runs", fontsize=9)
        figure.suptitle(
            "Lines: the learning rate is tuned. Small points: weight decay and the rates of roles.\n"
            "Ring: the best of all. Crosses: diverged. Triangles: the loss is beyond the picture.",
            x=0.01,
            ha="left",
            fontsize=9,
        )
    return True


def _means(finalist: Finalist) -> list[tuple[int, float]]:
    """Return horizons and mean losses; a horizon at which a run diverged has none."""
    found = []
    for horizon in sorted({run.horizon for run in finalist.runs}):
        runs = finalist.at(horizon).values()
        losses = [run.loss for run in runs if run.finished]
        if losses and not any(run.diverged for run in runs):
            found.append((horizon, float(np.mean(losses))))
    return found


def _sweeps(tuning: Sequence[TuningRun]) -> list[tuple[list[float], list[float]]]:
    """Return learning rates and losses of each time that the learning rate was tuned, in the order of the rates."""
    found = []
    for stage, runs in itertools.groupby(tuning, key=lambda run: run.stage):
        if stage == "lr":
            points = sorted((run.settings["lr"], run.loss) for run in runs if math.isfinite(run.loss))
            found.append(([rate for rate, _ in points], [loss for _, loss in points]))
    return found


def _draw_search(axis: Any, finalist: Finalist, colour: str, top: float) -> None:
    """Draw the tuning of one optimizer."""
    sweeps = _sweeps(finalist.tuning)
    for number, (rates, values) in enumerate(sweeps, 1):
        strength = 1 if number == len(sweeps) else 0.45
        axis.plot(rates, values, color=colour, linewidth=1.5, marker="o", markersize=3.5, alpha=strength)
    runs = [run for run in finalist.tuning if "lr" in run.settings]
    others = [run for run in runs if run.stage != "lr" and math.isfinite(run.loss)]
    axis.scatter([run.settings["lr"] for run in others], [run.loss for run in others], s=7, color=colour, alpha=0.6)
    gone = sorted({run.settings["lr"] for run in runs if run.status == "diverged"})
    edge = axis.get_xaxis_transform()
    axis.plot(gone, [0.95] * len(gone), "x", color=colour, markersize=5, transform=edge)
    high = sorted({run.settings["lr"] for run in runs if top < run.loss < math.inf} - set(gone))
    axis.plot(high, [0.95] * len(high), "^", color=colour, markersize=4, alpha=0.7, transform=edge)
    best = min(runs, key=lambda run: run.loss)
    if math.isfinite(best.loss):
        axis.plot(best.settings["lr"], best.loss, "o", markersize=9, markerfacecolor="none", color=colour)
        label = f"{best.loss:.3f}\nat {best.settings['lr']:.3g}"
        axis.annotate(label, (best.settings["lr"], best.loss), (0, -8), textcoords="offset points", va="top", **_SMALL)


_SMALL: Mapping[str, Any] = {"ha": "center", "fontsize": 8, "linespacing": 1.0}


def _window(finalists: Sequence[Finalist], losses: Sequence[float]) -> tuple[float, float]:
    """Return the range of losses to show: all optima, and what lies near them, but not the losses of bad rates."""
    optima = [min(run.loss for run in finalist.tuning) for finalist in finalists]
    optima = [loss for loss in optima if math.isfinite(loss)]
    best, worst = min(optima), max(optima)
    height = max(worst - best, float(np.quantile(losses, 0.75)) - best, 1e-3)
    top = min(best + 1.25 * height, max(losses) + 0.08 * height)
    return best - 0.35 * (top - best), top


def _label(finalist: Finalist) -> str:
    """Return the name, with how many of its runs diverged."""
    diverged = sum(run.diverged for run in finalist.runs)
    return f"{finalist.name} ({diverged} diverged)" if diverged else finalist.name


def _draw_target(axis: Any, target: float, outcome: Outcome) -> None:
    """Draw the loss that the others are to reach."""
    axis.axhline(target, color=BASELINE_COLOUR, linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
    text, place = f"final loss of {figure_text(outcome.baseline)}", (outcome.horizons[0], target)
    axis.annotate(text, place, (0, -4), textcoords="offset points", va="top", fontsize=8, color=BASELINE_COLOUR)


def _label_ends(axis: Any, ends: Mapping[str, tuple[tuple[float, float], str]], last: int) -> None:
    """Write the labels of lines at their ends, moved apart where they would overlap.

    Args:
        axis: Where the lines are.
        ends: The last point and the colour of each line, by its label.
        last: Where lines end beside the labels; others are labelled where they end.
    """
    axis.figure.canvas.draw()
    to_axes = axis.transData + axis.transAxes.inverted()
    beside = [label for label, (end, _) in ends.items() if end[0] == last]
    heights = _apart([float(to_axes.transform(ends[label][0])[1]) for label in beside], _LABEL_HEIGHT)
    for label, height in zip(beside, heights, strict=True):
        end, colour = ends[label]
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 3}
        leader["relpos"] = (0, 0.5)
        axis.annotate(
            figure_text(label),
            end,
            (1.045, height),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
            arrowprops=leader,
        )
    for label in ends.keys() - set(beside):
        end, colour = ends[label]
        clear = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
        axis.annotate(
            figure_text(label),
            end,
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            bbox=clear,
        )


def _apart(heights: Sequence[float], least: float) -> list[float]:
    """Return heights that are at least so far apart, in the same order, each near its own, between zero and one.

    Neighbours that are too near form a group around the mean of their heights.
    """
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    groups: list[list[int]] = []

    def middle(group: Sequence[int]) -> float:
        half = least * len(group) / 2
        return min(max(sum(heights[place] for place in group) / len(group), half), 1 - half)

    for place in order:
        groups.append([place])
        while len(groups) > 1:
            distance = middle(groups[-1]) - middle(groups[-2])
            if distance >= least * (len(groups[-1]) + len(groups[-2])) / 2:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    found = [0.0] * len(heights)
    for group in groups:
        for number, place in enumerate(group):
            found[place] = middle(group) + least * (number - (len(group) - 1) / 2)
    return found


def _style(axis: Any) -> None:
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(color="0.93", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(labelsize=8)


@contextmanager
def _figure(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure, and save it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an extra
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ModuleNotFoundError("plots need the package matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    figure.savefig(path, dpi=150)
