"""The curves of runs, one panel a quantity, one colour a run."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal

from lightning_muon.cli.health import BF16_HEADROOM, ORTHOGONALITY_ERROR, WEIGHT_RMS
from lightning_muon.cli.output import python
from lightning_muon.cli.run_log import RunLog
from lightning_muon.cli.tags import OTHER_LOSS, UPDATE_RMS, VALIDATION_LOSS, WEIGHT_DECAY, matching

STYLES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dash-dotted"}


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: What stands above it.
        tags: Patterns of the tags that are drawn, each in the line style of its place. Where there is one only, each
            tag that it matches has a style of its own, and stands in the title.
        limit: Where a horizontal line marks the end of the healthy range.
        scale: Of the vertical axis.
    """

    title: str
    tags: tuple[str, ...]
    limit: float | None = None
    scale: Literal["linear", "log"] = "linear"

    def lines(self, logged: Iterable[str]) -> dict[str, str]:
        """Return the style of each tag that is to be drawn, of those that were logged."""
        logged = list(logged)
        styles = list(STYLES)
        found = [matching(logged, pattern) for pattern in self.tags]
        if len(found) == 1:
            found = [[tag] for tag in found[0]]
        return {tag: styles[place % len(styles)] for place, tags in enumerate(found) for tag in tags}

    def heading(self, lines: dict[str, str]) -> str:
        """Return the title, with what is drawn where that is not known before."""
        if len(self.tags) > 1 or self.tags[0] in lines:
            return self.title
        named = [f"{tag.partition('/')[2]} {STYLES[style]}" for tag, style in lines.items()]
        # More would not fit above a panel.
        return f"{self.title}: {', '.join(named[: len(STYLES)])}{', …' if len(named) > len(STYLES) else ''}"


PANELS = (
    Panel("loss: validation solid, others dashed", (VALIDATION_LOSS, OTHER_LOSS)),
    Panel("weight RMS: largest solid, mean dashed", ("weight_rms/max", "weight_rms/mean"), WEIGHT_RMS.bound),
    Panel(
        "bf16 headroom: smallest solid, mean dashed", ("bf16_headroom/min", "bf16_headroom/mean"), BF16_HEADROOM.bound
    ),
    Panel(
        "orthogonality error: mean solid, largest dashed",
        ("orthogonality_error/mean", "orthogonality_error/max"),
        ORTHOGONALITY_ERROR.bound,
    ),
    # The line is where WeightRMSMonitor warns of weights that are kept in bfloat16.
    Panel("updates that bf16 would lose: mean solid, largest dashed", ("lost_updates/mean", "lost_updates/max"), 0.5),
    Panel("layer output RMS: largest solid, mean dashed", ("output_rms/max", "output_rms/mean")),
    Panel("weight decay", (WEIGHT_DECAY,)),
    Panel("update RMS", (UPDATE_RMS,)),
    Panel(
        "condition number: gradient solid, momentum dashed",
        ("gradient_condition/mean", "momentum_condition/mean"),
        scale="log",
    ),
    Panel("optimizer's share of the step", ("optimizer_share",)),
)


def draw_curves(runs: Sequence[RunLog], path: Path) -> str | None:
    """Draw the panels for which a run has values.

    Returns:
        Why there is no plot, for the user; ``None`` if there is one.
    """
    logged = list(chain.from_iterable(run.scalars for run in runs))
    panels = [(panel, lines) for panel in PANELS if (lines := panel.lines(logged))]
    try:
        import matplotlib  # noqa: PLC0415 - reports without plots need none
    except ModuleNotFoundError:
        return f"no plots without matplotlib: {python()} -m pip install matplotlib"
    if not panels:
        return f"no plots: there are no values of {', '.join(panel.title.partition(':')[0] for panel in PANELS)}"
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415
    from matplotlib.lines import Line2D  # noqa: PLC0415

    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, (panel, lines) in zip(axes.flat, panels, strict=False):
        for number, run in enumerate(runs):
            for tag in lines.keys() & run.scalars.keys():
                steps, values = zip(*run.scalars[tag], strict=True)
                axis.plot(steps, values, lines[tag], color=f"C{number}", linewidth=1.4)
        if panel.limit is not None:
            axis.axhline(panel.limit, color="grey", linestyle=":", linewidth=1)
        axis.set_title(panel.heading(lines), fontsize=10)
        axis.set_yscale(panel.scale)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles = [Line2D([], [], color=f"C{number}", label=run.name) for number, run in enumerate(runs)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return None
