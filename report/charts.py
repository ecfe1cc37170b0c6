"""The charts of TensorBoard's page Custom Scalars.

A chart has its title, its expression and its place whatever a run logs, so that TensorBoard can merge the pages of
several runs. Those of the first two sections are on every page: without them, those of runs side by side would move.
"""

from collections.abc import Sequence
from dataclasses import replace

from lightning_muon.report.quantities import LEARNING_RATE, LOSS, QUANTITIES
from lightning_muon.report.quantity import Chart, Quantity
from lightning_muon.report.tags import HEALTH, LIMITS, VERDICT, WATCH


def _of_quantities() -> set[Chart]:
    """Return the charts of the table, with the ends of healthy ranges as lines; quantities may share a chart."""
    found: dict[Chart, list[Quantity]] = {}
    for entry in QUANTITIES:
        if entry.chart is not None:
            found.setdefault(entry.chart, []).append(entry)
    return {_with_limits(chart, entries) for chart, entries in found.items()}


def _with_limits(chart: Chart, entries: Sequence[Quantity]) -> Chart:
    limits = [f"{LIMITS}/{entry.name}" for entry in entries if entry.limit_is_drawn]
    tags = "|".join([f"{WATCH}/({chart.tags})", *limits])
    if len(entries) > 1 or not entries[0].tag.endswith("/…"):
        return replace(chart, tags=tags, category="Updates" if chart.category == "Health" else chart.category)
    name = f"{WATCH}/{entries[0].name}"
    margins = [(f"{name}/mean", f"{name}/min", f"{name}/max"), *((limit, limit, limit) for limit in limits)]
    return replace(chart, tags=tags, margins=tuple(margins))


# TensorBoard shows charts with bands behind the others of a section, so those without are in a section of their own.
SECTIONS = ("Overview", "Health", "Updates", "Attention", "bfloat16", "Training", "Cost")
ON_EVERY_PAGE = SECTIONS[:2]
CHARTS = sorted(
    {
        Chart("Overview", 1, "Health: under 1 is ok, above 2 is bad", rf"{HEALTH}|{LIMITS}/health_(watch|bad)"),
        Chart("Overview", 2, "Loss", LOSS),
        Chart(
            "Overview",
            3,
            "Each quantity: 1 is its limit, above 2 is bad",
            rf"{VERDICT}/.+|{LIMITS}/quantity_(watch|bad)",
        ),
        Chart("Overview", 4, "Samples per second", rf"{WATCH}/throughput/samples_per_second"),
        Chart("Overview", 5, "Learning rate", LEARNING_RATE),
        *_of_quantities(),
        Chart("Training", 2, "Other validation metrics", r"(val|valid|validation|eval)[/_](?!.*[Ll]oss).+"),
        Chart("Cost", 2, "Batches per second", r"(train|device)[|/]batches_per_sec(ond)?"),
        Chart("Cost", 3, "Samples per second of Lightning", r"(train|device)[|/]samples_per_sec(ond)?"),
    },
    key=lambda chart: (SECTIONS.index(chart.category), chart.place, chart.title),
)
