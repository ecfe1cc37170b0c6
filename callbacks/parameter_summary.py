"""The summary of a model on the terminal: the parts that have parameters, and what is known of them."""

import sys
from typing import Any

from lightning.pytorch.callbacks import RichModelSummary
from lightning.pytorch.utilities.model_summary.model_summary import (
    get_formatted_model_size,
    get_human_readable_count,
)
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

_COUNTS = {"Params", "Params per Device", "FLOPs"}
_WIDTH = 240  # characters, in a file or a pipe: names stay whole


class ParameterSummary(RichModelSummary):
    """Lightning's summary of the model with what it does not know left out.

    Modules without parameters, such as metrics, have no row. Operations have a column if they were counted, for which
    Lightning needs ``example_input_array``. Frozen parameters and modules in evaluation mode are named if there are
    any.

    Args:
        max_depth: How deep modules are shown; 0 for no summary, -1 for all modules.

    Example::

        >>> from lightning.pytorch import Trainer
        >>> from lightning_muon.callbacks import ParameterSummary
        >>> trainer = Trainer(callbacks=[ParameterSummary(max_depth=2)])
    """

    @staticmethod
    @override
    def summarize(
        summary_data: list[tuple[str, list[str]]],
        total_parameters: int,
        trainable_parameters: int,
        model_size: float,
        total_training_modes: dict[str, int],
        total_flops: int,
        **summarize_kwargs: Any,
    ) -> None:
        columns = {title.strip(): list(map(str, cells)) for title, cells in summary_data}
        counts = columns.get("Params", [])
        has_parameters = [count.strip() != "0" for count in counts]
        left_out = {
            "",
            *([] if total_flops else ["FLOPs"]),
            *(["Mode"] if len(set(columns.get("Mode", []))) < 2 else []),
        }
        shown = [title for title in columns if title not in left_out]
        table = Table(header_style="bold", title="Model", title_justify="left")
        for title in shown:
            table.add_column(title.lower(), justify="right" if title in _COUNTS else "left", no_wrap=title == "Name")
        for row in zip(*(columns[title] for title in shown), has_parameters, strict=True):
            if row[-1]:
                table.add_row(*map(Text, row[:-1]))
        console = Console(width=None if sys.stdout.isatty() else _WIDTH)
        if table.row_count:
            console.print(table)
        frozen, evaluated = total_parameters - trainable_parameters, total_training_modes.get("eval", 0)
        facts = [
            f"{_count(total_parameters)} parameters, {get_formatted_model_size(model_size).strip()} MB",
            f"{_count(frozen)} of them frozen" if frozen else "",
            f"{evaluated} modules in evaluation mode" if evaluated else "",
            f"{_count(total_flops)} FLOPs" if total_flops else "",
        ]
        console.print("; ".join(filter(None, facts)), highlight=False)


def _count(number: int) -> str:
    return get_human_readable_count(int(number)).strip()
