"""One run of a method on a problem, and its measurements."""

from functools import lru_cache
from math import isfinite
from typing import NamedTuple

import torch

from benchmarks.matrix_problems.methods import METHODS
from benchmarks.matrix_problems.problems import PROBLEMS, Problem

# A run ends when its loss has changed by one of these factors.
CONVERGED, DIVERGED = 1e-20, 1e3


class Run(NamedTuple):
    """The parameters of a run."""

    problem: str
    method: str
    decay: bool
    lr: float
    steps: int
    every: int
    seed: int


class Curve(NamedTuple):
    """The measurements of a run: before the steps ``step``, and after the last step."""

    step: list[int]
    loss: list[float]
    condition: list[float]  # of the gradient for the first matrix
    nuclear_norm: list[float]  # of the same gradient
    diverged: bool


def train(run: Run) -> Curve:
    """Train a method on a problem, on one thread, and return its curve."""
    torch.set_num_threads(1)
    problem = _problem(run.problem, run.seed)
    method = METHODS[run.method]
    matrices = [torch.nn.Parameter(matrix.clone()) for matrix in problem.start()]
    optimizer = method.make([*matrices], run.lr, method.momentum[run.problem])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=25, gamma=problem.decay if run.decay else 1.0)

    curve = Curve([], [], [], [], diverged=False)
    for step in range(run.steps + 1):
        values = [matrix.detach() for matrix in matrices]
        gradients = problem.gradients(values, step)
        if step % run.every == 0 or step == run.steps:
            loss = problem.loss(values)
            if not isfinite(loss) or loss > DIVERGED * (curve.loss or [loss])[0]:
                return curve._replace(diverged=True)
            singular_values = torch.linalg.svdvals(gradients[0])
            curve.step.append(step)
            curve.loss.append(_rounded(loss))
            curve.condition.append(_rounded(float(singular_values[0] / singular_values[-1])))
            curve.nuclear_norm.append(_rounded(float(singular_values.sum())))
            if loss < CONVERGED * curve.loss[0]:
                break
        for matrix, gradient in zip(matrices, gradients, strict=True):
            matrix.grad = gradient
        optimizer.step()
        scheduler.step()
    return curve


@lru_cache(maxsize=1)
def _problem(name: str, seed: int) -> Problem:
    problem: Problem = PROBLEMS[name](seed)
    return problem


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
