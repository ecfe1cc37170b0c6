"""The curves of runs, one panel a quantity, one colour a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_muon.cli.run_log import RunLog


@dataclass(frozen=True)
class Panel:
    """One panel.

    Args:
        title: What stands above it.
        tags: What is drawn, each in the line style of its place: solid, dashed, dotted.
        limit: Where a horizontal line marks the end of the healthy range.
        scale: Of the vertical axis.
    """

    title: str
    tags: tuple[str, ...]
    limit: float | None = None
    scale: Literal["linear", "log"] = "linear"


PANELS = (
    Panel("loss: validation solid, training dashed", ("val/loss", "train/loss")),
    Panel("weight RMS: largest solid, mean dashed", ("weight_rms/max", "weight_rms/mean"), 1.0),
    Panel("bf16 headroom: smallest solid, mean dashed", ("bf16_headroom/min", "bf16_headroom/mean"), 0.5),
    Panel(
        "orthogonality error: mean solid, largest dashed",
        ("orthogonality_error/mean", "orthogonality_error/max"),
        0.7,
    ),
    Panel("updates that bf16 would lose: mean solid, largest dashed", ("lost_updates/mean", "lost_updates/max"), 0.5),
    Panel("layer output RMS: largest solid, mean dashed", ("output_rms/max", "output_rms/mean")),
    Panel("weight decay of muon", ("weight_decay/muon",)),
    Panel("update RMS: muon solid, adamw dashed", ("update_rms/muon", "update_rms/adamw")),
    Panel(
        "condition number: gradient solid, momentum dashed",
        ("gradient_condition/mean", "momentum_condition/mean"),
        scale="log",
    ),
    Panel("optimizer's share of the step", ("optimizer_share",)),
)
STYLES = ("-", "--")


def draw_curves(runs: Sequence[RunLog], path: Path) -> str | None:
    """Draw the panels for which a run has values.

    Returns:
        Why there is no plot, for the user; ``None`` if there is one.
    """
    panels = [panel for panel in PANELS if any(tag in run.scalars for run in runs for tag in panel.tags)]
    try:
        import matplotlib  # noqa: PLC0415 - reports without plots need none
    except ModuleNotFoundError:
        return "no plots without matplotlib: pip install matplotlib"
    if not panels:
        return f"no plots: there are no values of {', '.join(panel.tags[0] for panel in PANELS)}"
    matplotlib.use("agg")
    from matplotlib import pyplot  # noqa: PLC0415

    rows = -(-len(panels) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 3.1 * rows), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        for number, run in enumerate(runs):
            for tag, style in zip(panel.tags, STYLES, strict=False):
                if tag in run.scalars:
                    steps, values = zip(*run.scalars[tag], strict=True)
                    label = run.name if tag == panel.tags[0] else None
                    axis.plot(steps, values, style, color=f"C{number}", linewidth=1.4, label=label)
        if panel.limit is not None:
            axis.axhline(panel.limit, color="grey", linestyle=":", linewidth=1)
        axis.set_title(panel.title, fontsize=10)
        axis.set_yscale(panel.scale)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return None
