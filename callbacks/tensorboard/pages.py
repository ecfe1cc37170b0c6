"""Charts for the page Custom Scalars, Markdown for Text, and singular values for Histograms."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Layout, MarginChartContent, MultilineChartContent
from tensorboard.plugins.custom_scalar.layout_pb2 import Chart as TensorBoardChart
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.tensorboard.summary import custom_scalars

from lightning_muon.callbacks.matrices import labelled_groups, module_names, own_names
from lightning_muon.optim.update.matrix_layout import MatrixLayout
from lightning_muon.report.charts import CHARTS, ON_EVERY_PAGE
from lightning_muon.report.plain_text import code, code_block, markdown
from lightning_muon.report.quantity import Chart
from lightning_muon.report.tags import is_ours

# Section → title → chart.
Page = dict[str, dict[str, Chart]]


def layout(tags: Iterable[str]) -> Page:
    """Return the layout of the charts for the tags that a run has logged.

    Charts without tags are left out, except those of the first sections where monitors are on: so they keep their
    places when TensorBoard merges the pages of several runs.
    """
    tags = list(tags)
    is_monitored = any(map(is_ours, tags))
    page: Page = {}
    for chart in CHARTS:
        if chart.draws(tags) or (is_monitored and chart.category in ON_EVERY_PAGE):
            page.setdefault(chart.category, {})[chart.title] = chart
    return page


def layout_summary(page: Page, prefix: str) -> Summary:
    """Return a page as TensorBoard reads it.

    Args:
        page: What :func:`layout` returns.
        prefix: What the logger puts before each tag, with its hyphen; a band has its tags by name.
    """
    categories = []
    place = {chart: number for number, chart in enumerate(CHARTS)}
    for section, charts in page.items():
        found = []
        # TensorBoard shows the last chart with bands first, behind all others.
        for chart in sorted(charts.values(), key=lambda chart: -place[chart] if chart.margins else -math.inf):
            if chart.margins:
                series = [
                    MarginChartContent.Series(value=prefix + value, lower=prefix + lower, upper=prefix + upper)
                    for value, lower, upper in chart.margins
                ]
                found.append(TensorBoardChart(title=chart.title, margin=MarginChartContent(series=series)))
            else:
                content = MultilineChartContent(tag=[chart.pattern])
                found.append(TensorBoardChart(title=chart.title, multiline=content))
        categories.append(Category(title=section, chart=found))
    summary: Summary = custom_scalars({})  # which writes one line in a band at most
    summary.value[0].tensor.string_val[0] = Layout(category=categories).SerializeToString()
    return summary


def routing_card(optimizers: Iterable[Optimizer], module: LightningModule) -> str:
    """Return a table of all parameters that are updated: name, shape, what updates them, group, reason."""
    names = module_names(module)
    lines = ["| parameter | shape | updated by | group | reason |", "| --- | --- | --- | --- | --- |"]
    for labelled in labelled_groups(optimizers):
        label, _, _, group = labelled
        reasons = group.get("reasons") or [""] * len(group["params"])
        for own, parameter, reason in zip(own_names(label, group), group["params"], reasons, strict=True):
            shape = "×".join(map(str, parameter.shape)) or "scalar"
            name = code(names.get(id(parameter), own)).replace("|", r"\|")
            lines.append(f"| {' | '.join([name, shape, *map(markdown, (labelled.updated_by, label, reason))])} |")
    return "\n".join(lines)


def config_card(log_dir: str | Path | None, hyperparameters: Mapping[str, Any]) -> str | None:
    """Return the configuration of a run as YAML.

    Args:
        log_dir: Where LightningCLI saved ``config.yaml``. If there are several (``config-1.yaml``, …), the newest is
            taken.
        hyperparameters: Of module and data; they are shown if there is no such file.

    Returns:
        ``None`` if there is neither.
    """
    saved = sorted(Path(log_dir).glob("config*.yaml"), key=lambda path: path.stat().st_mtime) if log_dir else []
    if saved:
        text = saved[-1].read_text()
    elif hyperparameters:
        text = yaml.safe_dump(_plain(hyperparameters), sort_keys=False)
    else:
        return None
    return code_block(text, "yaml")


@torch.no_grad()
def singular_values(parameter: Tensor, **layout: Any) -> Tensor | None:
    """Return the singular values of all matrices in a whole parameter, shape (values,), float32.

    Args:
        parameter: With one matrix or several.
        layout: Where they are, see ``MatrixLayout``.

    Returns:
        ``None`` if an entry is not finite: there are no singular values then.
    """
    if not parameter.isfinite().all():
        return None
    matrices = MatrixLayout(**layout).matrices(parameter.float())
    return torch.cat([torch.linalg.svdvals(of_shape).flatten() for of_shape in matrices])


def _plain(value: object) -> object:
    """Return a value as YAML can hold it; anything else as its ``repr``."""
    if isinstance(value, Mapping):
        return {str(key): _plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(child) for child in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
