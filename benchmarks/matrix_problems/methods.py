"""The compared methods, with their momenta and learning rates for each problem."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.matrix_problems.stopped_polargrad import StoppedPolarGrad
from lightning_muon.optim import MuonAdamW
from lightning_muon.optim.polar.orthogonalize import Orthogonalizer


class Method(NamedTuple):
    """A function that makes an optimizer, and its learning rates by problem. Problems without rates are skipped."""

    make: Callable[[list[Tensor], float, float], torch.optim.Optimizer]  # from matrices, lr and momentum
    momentum: dict[str, float]
    learning_rates: dict[str, list[float]]
    decays: tuple[bool, ...] = (False, True)


def _polargrad(*, polar_first: bool = False) -> Callable[[list[Tensor], float, float], torch.optim.Optimizer]:
    def make(matrices: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
        return MuonAdamW(
            [{"params": matrices, "algorithm": "muon"}],
            lr=lr,
            weight_decay=0.0,
            momentum=momentum,
            nesterov=False,
            orthogonalizer="qdwh",
            update_scale="nuclear_norm",
            polar_first=polar_first,
        )

    return make


def _muon(orthogonalizer: Orthogonalizer) -> Callable[[list[Tensor], float, float], torch.optim.Optimizer]:
    def make(matrices: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
        return MuonAdamW(
            [{"params": matrices, "algorithm": "muon"}],
            lr=lr,
            weight_decay=0.0,
            momentum=momentum,
            nesterov=True,
            orthogonalizer=orthogonalizer,
            update_scale="none",
        )

    return make


def _adam(matrices: list[Tensor], lr: float, momentum: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(matrices, lr=lr, betas=(momentum, 0.999))


_MUON_RATES = {
    "quadratic": [5e-3, 0.01, 0.03, 0.1],
    "logistic": [0.015, 0.03, 0.06, 0.1, 0.2],
    "completion": [0.03, 0.05, 0.1, 0.25],
}

# The momenta, and nesterov for Muon, are those of the paper's code.
METHODS = {
    "PolarGrad": Method(
        _polargrad(),
        {"quadratic": 0.0, "logistic": 0.0, "completion": 0.0},
        {
            "quadratic": [1.5e-8, 3.2e-8, 4e-8],
            "logistic": [1.2e-8, 2.5e-8, 5e-8, 1e-7],
            "completion": [12.0, 25.0, 35.0, 50.0],
        },
    ),
    "PolarGrad, two QDWH steps": Method(
        StoppedPolarGrad, {"quadratic": 0.0}, {"quadratic": [3.2e-8, 4e-8, 5e-8]}, decays=(False,)
    ),
    "PolarGrad, momentum": Method(
        _polargrad(),
        {"quadratic": 0.9, "logistic": 0.9, "completion": 0.5},
        {
            "quadratic": [5e-8, 1e-7, 2e-7],
            "logistic": [2.5e-8, 5e-8, 1e-7, 2e-7],
            "completion": [12.0, 25.0, 50.0, 100.0],
        },
    ),
    "PolarGrad, polar first": Method(
        _polargrad(polar_first=True),
        {"quadratic": 0.95, "logistic": 0.95, "completion": 0.5},
        {
            "quadratic": [1e-7, 2e-7, 4e-7],
            "logistic": [2.5e-8, 5e-8, 1e-7, 2e-7],
            "completion": [12.0, 25.0, 50.0, 100.0],
        },
    ),
    "Muon, Newton–Schulz": Method(
        _muon("newton_schulz"), {"quadratic": 0.95, "logistic": 0.95, "completion": 0.95}, _MUON_RATES
    ),
    "Muon, QDWH": Method(_muon("qdwh"), {"quadratic": 0.95, "logistic": 0.95, "completion": 0.95}, _MUON_RATES),
    "Adam": Method(
        _adam,
        {"quadratic": 0.9, "logistic": 0.9, "completion": 0.9},
        {"quadratic": [1e-3, 3e-3, 0.01, 0.05], "logistic": [2e-3, 5e-3, 1e-2], "completion": [0.02, 0.05, 0.1, 0.2]},
    ),
}
