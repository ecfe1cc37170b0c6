"""When growing logits will reach a limit."""

from collections import deque

import torch
from torch import Tensor


class Growth:
    """The recent values of several series, and the step at which the first of them will reach a limit.

    A straight line is fitted to the last values of each series by least squares.

    Args:
        limit: The limit.
        points: How many values of a series count.
        least: With fewer values nothing is said.
    """

    def __init__(self, limit: float, points: int = 8, least: int = 4) -> None:
        self.limit = limit
        self.least = least
        self._seen: deque[tuple[int, dict[str, float]]] = deque(maxlen=points)

    def add(self, step: int, values: dict[str, float]) -> None:
        """Add the values of a step."""
        self._seen.append((step, values))

    def reached_at(self) -> tuple[float, str] | None:
        """Return the first step at which a series reaches the limit, with its name; ``None`` if none grows.

        A series that has reached it does so in the last step.
        """
        if len(self._seen) < self.least:
            return None
        steps = torch.tensor([step for step, _ in self._seen], dtype=torch.float64)
        last, now = self._seen[-1]
        names = [name for name in now if all(name in values for _, values in self._seen)]
        if not names:
            return None
        values = torch.tensor([[found[name] for name in names] for _, found in self._seen], dtype=torch.float64)
        at = _crossings(steps, values, self.limit)
        at = torch.where(values[-1] >= self.limit, last, at.clamp(min=last))
        first = int(torch.where(at.isnan(), torch.inf, at).argmin())
        return (float(at[first]), names[first]) if at[first].isfinite() else None


def _crossings(steps: Tensor, values: Tensor, limit: float) -> Tensor:
    """Return where the fitted line of each column of values (steps, series) is at the limit; infinite if it falls."""
    centred = steps - steps.mean()
    slope = centred @ (values - values.mean(0)) / centred.square().sum()
    return torch.where(slope > 0, steps.mean() + (limit - values.mean(0)) / slope, torch.inf)
