"""The record of a benchmark: a printed table, and a JSON file with machine and date."""

import json
import os
import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"


def machine() -> dict[str, Any]:
    """Return the machine and the versions on which a result depends."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("lightning"),
    }


def card() -> str:
    """Return the name of the GPU as a part of a file's name, ``cpu`` if there is none."""
    return re.sub(r"\W+", "_", torch.cuda.get_device_name().lower()) if torch.cuda.is_available() else "cpu"


def report(
    title: str,
    rows: list[dict[str, Any]],
    columns: list[str],
    details: dict[str, Any],
    name: str,
    results: Path = RESULTS,
) -> Path:
    """Print rows as a table and write them to ``<results>/<name>.json``.

    Args:
        title: Title of the table.
        rows: One dict per row. Numbers are printed with three digits.
        columns: Keys to print, in this order. The file has all keys.
        details: Settings of the benchmark, for the file.
        name: Name of the file, without suffix.
        results: Folder of the file.

    Returns:
        The path of the file.
    """
    print_table(title, rows, columns)
    path = results / f"{name}.json"
    write(path, record(title, rows, details))
    return path


def record(title: str, rows: list[dict[str, Any]], details: dict[str, Any]) -> dict[str, Any]:
    """Return the record of rows that were measured on this machine today; see :func:`report`."""
    return {
        "title": title,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "machine": machine(),
        "settings": details,
        "rows": rows,
    }


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file under its final name only when it is complete, so that a kill leaves the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def print_table(title: str, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Print the ``columns`` of rows as a table, numbers with three digits."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*(shown(row.get(column)) for column in columns))
    Console(width=max(80, 16 * len(columns))).print(table)


def shown(value: Any) -> str:
    """Format a value for a table."""
    if value is None:
        return ""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.exists() else []
