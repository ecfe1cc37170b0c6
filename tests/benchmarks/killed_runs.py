"""A few kills of each kind of checkpoint, from a process without threads."""

import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.kills.__main__ import SUBJECTS, kill_often


def run(kills: int, steps: int, subjects: list[int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for number in subjects:
        folder = Path(str(number))
        folder.mkdir()
        rows.append(kill_often(SUBJECTS[number], kills, steps, random.Random(0), folder).row(SUBJECTS[number]))  # noqa: S311
    return rows
