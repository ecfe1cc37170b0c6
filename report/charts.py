"""The charts of TensorBoard's page Custom Scalars."""

from dataclasses import replace

from lightning_muon.report.quantities import LEARNING_RATE, LOSS, QUANTITIES
from lightning_muon.report.quantity import Chart
from lightning_muon.report.tags import WATCH

_SECTIONS = ("Health", "Training", "Cost")
CHARTS = sorted(
    {  # quantities may share a chart
        *(
            replace(quantity.chart, tags=f"{WATCH}/({quantity.chart.tags})")
            for quantity in QUANTITIES
            if quantity.chart is not None
        ),
        Chart("Training", 1, "Loss", LOSS),
        Chart("Training", 2, "Other validation metrics", r"(val|valid|validation|eval)[/_](?!.*[Ll]oss).+"),
        Chart("Training", 3, "Learning rate", LEARNING_RATE),
        Chart("Cost", 2, "Batches per second", r"(train|device)[|/]batches_per_sec(ond)?"),
        Chart("Cost", 3, "Samples per second", r"(train|device)[|/]samples_per_sec(ond)?"),
    },
    key=lambda chart: (_SECTIONS.index(chart.category), chart.place, chart.title),
)
