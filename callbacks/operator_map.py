"""How orthogonal the update of each operator is at each depth, and how many steps it needs: now and then, as a map."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.optim import Optimizer

from lightning_muon.callbacks.logging import log_scalars, log_text, logged_step
from lightning_muon.callbacks.matrices import muon_groups
from lightning_muon.callbacks.measures.sources import Place, SourceMeter
from lightning_muon.callbacks.operators import Operator, Operators
from lightning_muon.optim.polar.needed_steps import needed_steps, steps_taken, takes_steps
from lightning_muon.report.orthogonality_map import TEXT, OrthogonalityMap
from lightning_muon.report.quantities import quantity

# After 4 and 8 measurements of the monitor, and then after each of so many.
FIRST_MAPS, MEASUREMENTS_TO_A_MAP = (4, 8), 16
# A map measures the singular values of about so many elements, and the next one those of other parameters. On a CPU a
# matrix of 128 × 128 takes a millisecond.
ELEMENTS, ELEMENTS_ON_CPU = 1 << 24, 1 << 18
# The last map of a run takes the turns of so many, so that its picture is complete where the model is small.
LAST_TURNS = 3
# A stack has a row for each of so many experts, or else one for the worst of them.
MOST_EXPERTS = 8

Found = dict[Place, tuple[float, float | None]]


def is_due(measurement: int) -> bool:
    """Return whether there is a map after so many measurements."""
    return measurement in FIRST_MAPS or (measurement > 0 and measurement % MEASUREMENTS_TO_A_MAP == 0)


class OperatorMap:
    """Errors and needed steps of all matrices, by the time that each was measured last.

    Args:
        optimizers: With Muon's groups.
        names: See :func:`~lightning_muon.callbacks.matrices.module_names`.
        max_elements: The largest parameter whose singular values are measured.
    """

    def __init__(self, optimizers: Iterable[Optimizer], names: Mapping[int, str], max_elements: int) -> None:
        optimizers = list(optimizers)
        self._operators = Operators(optimizers, names)
        self._cells: dict[Operator, tuple[float, int | None]] = {}
        self._turn = 0
        self._groups: dict[str, dict[str, Any]] = {}
        self._turns: dict[str, int] = {}
        elements = 0
        for labelled in muon_groups(optimizers):
            for name, parameter in labelled.named_parameters(names):
                self._groups[name] = labelled.group
                if takes_steps(self._method(name)) and parameter.numel() <= max_elements:
                    self._turns[name] = elements // (ELEMENTS_ON_CPU if parameter.device.type == "cpu" else ELEMENTS)
                    elements += parameter.numel()
        self._all_turns = max(self._turns.values(), default=0) + 1

    def sources(self, *, is_last: bool) -> SourceMeter:
        """Return what is to measure the matrices whose turn it is."""
        count = LAST_TURNS if is_last else 1
        turns = {(self._turn + number) % self._all_turns for number in range(count)}
        chosen = {name for name, turn in self._turns.items() if turn in turns}
        return SourceMeter(chosen, lambda name: self._method(name) == "polar_express")

    def add(self, trainer: Trainer, errors: Mapping[Place, float], smallest: Mapping[Place, float]) -> None:
        """Log the map with new measurements of this rank. A collective of all ranks.

        Args:
            trainer: With the ranks.
            errors: The orthogonality error of each matrix whose factor this rank has seen.
            smallest: The smallest singular values, by :meth:`SourceMeter.finish`.
        """
        self._turn += 1
        steps = self._steps({place: value for place, value in smallest.items() if place in errors})
        found: Found = {}
        for of_rank in _of_all_ranks(trainer, {place: (error, steps.get(place)) for place, error in errors.items()}):
            found |= of_rank  # in the same order on all ranks
        new: defaultdict[Operator, list[tuple[float, float | None]]] = defaultdict(list)
        for (name, first), measured in found.items():
            new[self._operators.of(name, first)].append(measured)
        scalars: defaultdict[str, list[float]] = defaultdict(list)
        needed: defaultdict[str, list[float]] = defaultdict(list)
        for operator, of_operator in new.items():
            all_steps = [number for _, number in of_operator if number is not None and not math.isnan(number)]
            number = int(max(all_steps)) if all_steps else self._cells.get(operator, (0.0, None))[1]
            self._cells[operator] = _largest(error for error, _ in of_operator), number
            scalars[operator.name].append(self._cells[operator][0])
            needed[operator.name] += all_steps
        logged = {f"operator_error/{name}": sum(all_errors) / len(all_errors) for name, all_errors in scalars.items()}
        logged |= {f"needed_steps/{name}": max(numbers) for name, numbers in needed.items() if numbers}
        log_scalars(trainer, logged)
        if self._cells:
            log_text(trainer, TEXT, self._drawn(logged_step(trainer)).as_text())

    def _steps(self, smallest: Mapping[Place, float]) -> dict[Place, float]:
        """Return the steps that lift the smallest singular values into the healthy range of the error."""
        limit = quantity("orthogonality_error").healthy.bound or 1.0
        of_groups: defaultdict[int, list[Place]] = defaultdict(list)
        for place in smallest:
            of_groups[id(self._groups[place[0]])].append(place)
        steps: dict[Place, float] = {}
        for places in of_groups.values():
            group = self._groups[places[0][0]]
            values = torch.tensor([smallest[place] for place in places], dtype=torch.float64)
            found = needed_steps(values, limit, group["orthogonalizer"], _options(group))
            steps |= {} if found is None else dict(zip(places, found.tolist(), strict=True))
        return steps

    def _drawn(self, step: int) -> OrthogonalityMap:
        experts: defaultdict[str, set[int | None]] = defaultdict(set)
        for operator in self._cells:
            experts[operator.name].add(operator.expert)
        cells: dict[tuple[str, str], tuple[float, int | None]] = {}
        for operator, (error, needed) in self._in_order():
            of_name = experts[operator.name] - {None}
            row = operator.name
            if len(of_name) > MOST_EXPERTS:
                row = f"{row}, worst of {len(of_name)}"
            elif operator.expert is not None:
                row = f"{row}, expert {operator.expert}"
            cell = row, "–" if operator.depth is None else str(operator.depth)
            others, before = cells.get(cell, (0.0, None))
            both = [number for number in (needed, before) if number is not None]
            cells[cell] = _largest((error, others)), max(both, default=None)
        taken = [
            steps_taken(self._method(name), _options(group))
            for name, group in self._groups.items()
            if takes_steps(self._method(name))
        ]
        return OrthogonalityMap(step, max(taken, default=None), cells)

    def _in_order(self) -> list[tuple[Operator, tuple[float, int | None]]]:
        """Return the cells in the order of the model, whichever rank or batch came first."""
        order = self._operators.order
        return sorted(self._cells.items(), key=lambda cell: (order(cell[0].name), cell[0].expert or 0))

    def _method(self, name: str) -> object:
        return self._groups[name].get("orthogonalizer")


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    given = group.get("orthogonalizer_options") or {}
    return {name: value for name, value in given.items() if name != "dtype"}


def _largest(values: Iterable[float]) -> float:
    """Return the largest; NaN if one is."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def _of_all_ranks(trainer: Trainer, found: Found) -> list[Found]:
    if trainer.world_size == 1:
        return [found]
    of_ranks: list[Found] = [{} for _ in range(trainer.world_size)]
    dist.all_gather_object(of_ranks, found)
    return of_ranks
