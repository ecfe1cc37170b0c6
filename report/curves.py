"""The curves of runs: one panel for each quantity, one colour for each group of runs that differ in their seed."""

import textwrap
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from lightning_muon.report.groups import Group
from lightning_muon.report.quantities import OTHER_LOSS, QUANTITIES, VALIDATION_LOSS, matching
from lightning_muon.report.quantity import Panel

COLOURED = 10  # groups: matplotlib has as many colours, then they repeat
_LEGEND_WIDTH = 130  # characters
_TITLE_WIDTH = 68
STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}


# The value at which a horizontal line is drawn, for each panel.
BOUNDS: dict[Panel, float | None] = {
    Panel(1, "loss: validation solid, others dashed", (VALIDATION_LOSS, OTHER_LOSS)): None,
    **{
        entry.panel: (entry.healthy.bound or entry.limit) if entry.panel.shows_bound else None
        for entry in QUANTITIES
        if entry.panel is not None
    },
}
PANELS = sorted(BOUNDS, key=lambda panel: panel.place)


def draw_curves(groups: Sequence[Group], path: Path) -> str | None:
    """Draw the panels for which a run has values, with as many groups as there are colours.

    Args:
        groups: The best first.
        path: Of the plot.

    Returns:
        Why there is no plot, for the user; ``None`` if there is one.
    """
    groups = groups[:COLOURED]
    logged = list(chain.from_iterable(run.scalars for group in groups for run in group.runs))
    panels = [(panel, styles) for panel in PANELS if (styles := _styles(panel, logged))]
    try:
        import matplotlib  # noqa: PLC0415 - a report without curves does not need it
    except ModuleNotFoundError:
        return "no plots without matplotlib: pip install matplotlib"
    if not panels:
        return f"no plots: there are no values of {', '.join(panel.title.partition(':')[0] for panel in PANELS)}"
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415
    from matplotlib.lines import Line2D  # noqa: PLC0415

    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, (panel, styles) in zip(axes.flat, panels, strict=False):
        for number, run in ((number, run) for number, group in enumerate(groups) for run in group.runs):
            for tag in styles.keys() & run.scalars.keys():
                steps, values = zip(*run.scalars[tag], strict=True)
                axis.plot(
                    steps, values, styles[tag], color=f"C{number}", linewidth=1.4, marker="." if len(steps) == 1 else ""
                )
        if (bound := BOUNDS[panel]) is not None:
            axis.axhline(bound, color="grey", linestyle=":", linewidth=1)
        axis.set_title(textwrap.fill(_title(panel, styles), _TITLE_WIDTH), fontsize=10)
        axis.set_yscale(panel.scale)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    # Settings that are too long to be read: the names of the runs.
    longest = max(len(group.name) for group in groups)
    names = [group.name if longest <= _LEGEND_WIDTH else group.runs[0].name for group in groups]
    names = [name.replace("$", r"\$") for name in names]  # between two of them is mathematics
    handles = [Line2D([], [], color=f"C{number}", label=name) for number, name in enumerate(names)]
    columns = max(1, min(4, _LEGEND_WIDTH // (max(map(len, names)) + 8)))  # with the line before a name
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return None


def _styles(panel: Panel, logged: Iterable[str]) -> dict[str, str]:
    """Return the line style of each logged tag that a panel draws."""
    logged = list(logged)
    found = [matching(logged, pattern) for pattern in panel.tags]
    if len(found) == 1:
        found = [[tag] for tag in found[0]]
    styles = list(STYLES)
    return {tag: styles[place % len(styles)] for place, tags in enumerate(found) for tag in tags}


def _title(panel: Panel, styles: dict[str, str]) -> str:
    """Return the title of a panel, with the names of its lines if they are only known from the run."""
    if len(panel.tags) > 1 or panel.tags[0] in styles:
        return panel.title
    names = [f"{tag.partition('/')[2]} {STYLES[style]}" for tag, style in styles.items()]
    # Above a panel there is room for as many as there are styles.
    return f"{panel.title}: {', '.join(names[: len(STYLES)])}{', …' if len(names) > len(STYLES) else ''}"
