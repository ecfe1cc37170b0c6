"""A run in one picture: the verdict and what to do, the loss, how near each quantity is to its limit, the sizes."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_muon.report.plain_text import figure_text, from_markdown
from lightning_muon.report.quantities import LOSS, OTHER_LOSS, QUANTITIES, VALIDATION_LOSS, matching
from lightning_muon.report.quantity import Range
from lightning_muon.report.run_log import RunLog
from lightning_muon.report.verdict import RunHealth, course

PICTURE = "health.png"  # in the folder of a run
NO_MATPLOTLIB = "no picture without matplotlib: pip install matplotlib"

_PANELS = 6
_MOST_POINTS = 40  # at which the run so far is judged again
_MOST_LINES = 6  # with a name in one panel
_HEAD_LINES = 5
_WIDTH = 150  # characters in a line of the head
_BETWEEN_NAMES = 0.055  # of the height of the panel
_COLOURS = {"ok": "#2e7d32", "watch": "#ef6c00", "bad": "#c62828"}
_OTHER = "#546e7a"
_MARK = {"color": "black", "linestyle": ":", "linewidth": 1}


def draw_picture(run: RunLog, health: RunHealth, path: Path) -> str | None:
    """Draw a run.

    Args:
        run: What it has logged.
        health: The verdict on it.
        path: Of the PNG.

    Returns:
        Why there is no picture, for the user; ``None`` if there is one.
    """
    figure = new_figure((12, 8.5))
    if figure is None:
        return NO_MATPLOTLIB
    top = _draw_head(figure, run, health)
    axes = figure.subplots(
        2, 3, gridspec_kw={"top": top, "bottom": 0.055, "left": 0.05, "right": 0.985, "hspace": 0.32}
    )
    places = iter(axes.flat)
    _draw_losses(next(places), run)
    _draw_verdict(next(places), run, health)
    drawn = 2
    wrong = [one.name for one in health.unhealthy]
    panels = [(entry.panel, entry) for entry in QUANTITIES if entry.panel is not None]
    for panel, entry in sorted(panels, key=lambda pair: (pair[1].name not in wrong, pair[0].place)):
        tags = [tag for pattern in panel.tags for tag in matching(run.scalars, pattern)]
        moves = any(len(set(run.values(tag))) > 1 for tag in tags)
        if drawn == _PANELS or not moves or entry.name == "optimizer_share":
            continue
        axis = next(places)
        limit = Range() if _does_not_matter(entry.name, run) else entry.healthy
        _draw_lines(axis, run, tags, panel.title.partition(":")[0], limit)
        drawn += 1
    for axis in places:
        axis.set_visible(False)
    if health.since is not None:
        for axis in axes.flat[:drawn]:
            axis.axvline(health.since, **_MARK)
    figure.savefig(path, dpi=100)
    return None


def new_figure(size: tuple[float, float], **options: Any) -> Any:
    """Return an empty figure of a size in inches; ``None`` without matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional; and without pyplot, which changes a process
    except ModuleNotFoundError:
        return None
    return Figure(figsize=size, **options)


def _draw_head(figure: Any, run: RunLog, health: RunHealth) -> float:
    """Draw the verdict on its colour, what to do, and how far the run is; return where the panels may begin."""
    from matplotlib.patches import Rectangle  # noqa: PLC0415

    colour = _COLOURS.get(health.verdict, _OTHER)
    figure.add_artist(Rectangle((0, 0.9), 1, 0.1, color=colour, transform=figure.transFigure))
    verdict, _, what = health.headline.partition(": ")
    # A card of TensorBoard shows a third of the size: there the verdict is still read.
    figure.text(0.015, 0.967, figure_text(verdict), color="white", fontsize=26, weight="bold", va="center")
    reason = textwrap.shorten(figure_text(what), 110, placeholder=" …")
    figure.text(0.015, 0.921, reason, color="white", fontsize=14, va="center")
    lines = [figure_text(", ".join(_facts(run)))]
    for name, advice in _advice(run, health).items():
        left = _HEAD_LINES - len(lines)
        if left > 0:
            lines += textwrap.wrap(figure_text(f"{name}: {advice}"), _WIDTH, max_lines=min(2, left), placeholder=" …")
    figure.text(0.015, 0.889, "\n".join(lines), fontsize=10.5, va="top", linespacing=1.35)
    return 0.85 - 0.0235 * len(lines)


def _advice(run: RunLog, health: RunHealth) -> dict[str, str]:
    """Return what to do about each quantity that is not healthy; of warnings, what the last one says."""
    said = {one.name: one.line.advice for one in reversed(health.unhealthy) if one.line.advice}
    if any(one.name == "warnings" for one in health.unhealthy):
        said["warnings"] = [from_markdown(text) for _, text in (run.texts or {}).get("warnings", [])][-1]
    return {one.name: said[one.name] for one in health.unhealthy if one.name in said}


def _facts(run: RunLog) -> list[str]:
    facts = [run.name, f"{run.steps} steps"]
    for tag in [*matching(run.scalars, VALIDATION_LOSS), *matching(run.scalars, OTHER_LOSS)][:2]:
        facts.append(f"{tag} {run.values(tag)[-1]:.4g}")
    for unit in ("tokens", "samples"):
        if rates := run.values(f"throughput/{unit}_per_second"):
            return [*facts, f"{sorted(rates)[len(rates) // 2]:,.0f} {unit} a second"]
    return facts


def _draw_losses(axis: Any, run: RunLog) -> None:
    _draw_lines(axis, run, matching(run.scalars, LOSS), "loss", Range())


def _draw_verdict(axis: Any, run: RunLog, health: RunHealth) -> None:
    """Draw how near each quantity was to its limit, as the run was judged then."""
    steps = sorted({step for logged in run.scalars.values() for step, _ in logged})
    every = max(1, -(-len(steps) // _MOST_POINTS))
    lines = course(run, sorted({*steps[::every], *steps[-1:]}))
    final = health.severities()
    for name, severity in final.items():
        if name in lines and steps:
            lines[name][-1] = steps[-1], severity
    top = max(2.6, *(value for points in lines.values() for _, value in points), 0.0) * 1.04
    for low, high, verdict in ((0, 1, "ok"), (1, 2, "watch"), (2, top, "bad")):
        axis.axhspan(low, high, color=_COLOURS[verdict], alpha=0.09, linewidth=0)
    for limit in (1, 2):
        axis.axhline(limit, color="grey", linewidth=0.8)
    drawn = [name for name in lines if any(value > 0 for _, value in lines[name])]
    worst = sorted(drawn, key=lambda name: -final.get(name, 0.0))[:_MOST_LINES]
    height = -math.inf
    for number, name in sorted(enumerate(worst), key=lambda one: lines[one[1]][-1][1]):
        _draw_line(axis, lines[name], number, "")
        last, value = lines[name][-1]
        height = max(value, height + top * _BETWEEN_NAMES)
        label = f" {figure_text(name)}{' (' + format(value, '.1f') + ')'}"
        axis.text(last, height, label, color=f"C{number}", fontsize=8.5, va="center")
    axis.set_ylim(0, max(top, height + top * _BETWEEN_NAMES))
    if steps:
        axis.set_xlim(steps[0], steps[-1] + (steps[-1] - steps[0] or 1))  # room for the names
        axis.set_xticks([tick for tick in axis.get_xticks() if steps[0] <= tick <= steps[-1]])
    _finish(axis, "each quantity: 1 is its limit, above 2 is bad")


def _draw_lines(axis: Any, run: RunLog, tags: Sequence[str], title: str, limit: Range) -> None:
    largest = 0.0
    for number, tag in enumerate(tags[:_MOST_LINES]):
        _, _, rest = tag.partition("/")
        _draw_line(axis, run.scalars[tag], number, tag if title == "loss" or not rest else rest)
        largest = max(largest, *(value for _, value in run.scalars[tag] if math.isfinite(value)), 0.0)
    if limit.bound is not None and largest > 0 and (limit.bound <= 10 * largest):
        axis.axhline(limit.bound, color=_COLOURS["bad"], linewidth=1.2, linestyle="--", label=f"healthy: {limit.words}")
        title += f", healthy {limit.words}"
    smallest = min((v for tag in tags for v in run.values(tag) if math.isfinite(v) and v > 0), default=0.0)
    if smallest > 0 and largest / smallest > 200:
        axis.set_yscale("log")
    _finish(axis, title)


def _draw_line(axis: Any, logged: Sequence[tuple[int, float]], number: int, name: str) -> None:
    steps, values = zip(*logged, strict=True)
    marker = "o" if len(steps) == 1 else ""
    axis.plot(
        steps, values, color=f"C{number}", linewidth=1.6, marker=marker, markersize=4, label=figure_text(name) or "_"
    )


def _finish(axis: Any, title: str) -> None:
    axis.set_title(figure_text(title), fontsize=10.5)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize=8, loc="best", framealpha=0.7)


def _does_not_matter(name: str, run: RunLog) -> bool:
    """Return whether a quantity is about bfloat16 weights, and the run's have 32 bits."""
    bits = run.values("weight_bits")
    return name in {"bf16_headroom", "lost_updates"} and bool(bits) and min(bits) > 16
