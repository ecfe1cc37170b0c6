"""How many elements are updated at a time."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

# Elements in a batch of matrices unless an option sets them: enough to keep a GPU busy with small matrices; on a CPU so
# few that what is computed from them stays in its cache (measured by benchmarks/optimizer_step.py).
BATCH_ELEMENTS = {"cpu": 1 << 20}
BATCH_ELEMENTS_ELSEWHERE = 1 << 25

Item = TypeVar("Item")


def batch_bound(batch_elements: int | None, device: torch.device) -> int:
    """Return the number of elements in a batch on a device: the option, or the default of the device."""
    return batch_elements or BATCH_ELEMENTS.get(device.type, BATCH_ELEMENTS_ELSEWHERE)


def bounded(items: Iterable[Item], elements: Callable[[Item], int], most_elements: int) -> Iterator[list[Item]]:
    """Cut items into runs of at most ``most_elements``; an item that is larger is a run by itself."""
    run: list[Item] = []
    total = 0
    for item in items:
        if run and total + elements(item) > most_elements:
            yield run
            run, total = [], 0
        run.append(item)
        total += elements(item)
    if run:
        yield run
