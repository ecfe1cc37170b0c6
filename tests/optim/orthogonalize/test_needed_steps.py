"""The steps that a method needs, against the method itself in float64."""

from typing import Any

import pytest
import torch

from lightning_muon.optim import orthogonalize
from lightning_muon.optim.polar.needed_steps import MOST_STEPS, needed_steps

SIGMAS = (0.4, 0.05, 3e-3, 2e-5)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("newton_schulz", {}),
        ("newton_schulz", {"coefficients": "cubic", "steps": 9}),
        ("newton_schulz", {"coefficients": "polar_express"}),
        ("newton_schulz", {"coefficients": [[3.4445, -4.775, 2.0315], [2.0, -1.5, 0.5]]}),
        ("gram_newton_schulz", {"coefficients": "modula", "restart_every": 1}),
        ("polar_express", {}),
        ("polar_express", {"lower_bound": 1e-2}),
    ],
)
@pytest.mark.parametrize("smallest", SIGMAS)
def test_the_first_number_that_is_enough(method: str, options: dict[str, Any], smallest: float) -> None:
    torch.manual_seed(0)
    values = torch.tensor([1.0, 0.8, 0.5, smallest], dtype=torch.float64)
    left, right = (torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q for _ in range(2))
    norm = values.pow(8).sum() ** 0.125 if method == "polar_express" else values.norm()
    found = needed_steps((values[-1:] / norm), 0.7, method, options)
    assert found is not None

    def deviation(steps: int) -> float:
        kept = {name: value for name, value in options.items() if name != "steps"}
        if isinstance(kept.get("coefficients"), list):
            kept["coefficients"] = kept["coefficients"][:steps]
        factor = orthogonalize(left * values @ right.mT, method, dtype="float64", steps=steps, **kept)
        lifted = (left.mT @ factor @ right).diagonal()[-1]
        return abs(float(lifted) ** 2 - 1)

    steps = int(found)
    assert deviation(steps) <= 0.7
    assert all(deviation(fewer) > 0.7 for fewer in range(1, steps))


def test_what_no_steps_lift_and_methods_without() -> None:
    found = needed_steps(torch.tensor([0.0, torch.nan, 0.6]), 0.7, "newton_schulz", {})
    assert found is not None
    assert found.nan_to_num(-1).tolist() == [MOST_STEPS, -1, 1]
    assert needed_steps(torch.tensor([0.1]), 0.7, "svd", {}) is None
    assert needed_steps(torch.tensor([0.1]), 0.7, torch.linalg.pinv, {}) is None
