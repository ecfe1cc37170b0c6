"""The published update scales."""

import math

import pytest
import torch

from lightning_muon.optim import MuonAdamW, orthogonalize, scale_factor

SCALES = {
    "none": lambda _out, _in: 1.0,
    "keller_jordan": lambda out, fan_in: math.sqrt(max(1, out / fan_in)),
    "mup": lambda out, fan_in: math.sqrt(out / fan_in),
    "moonlight": lambda out, fan_in: 0.2 * math.sqrt(max(out, fan_in)),
}


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(("fan_out", "fan_in"), [(8, 8), (8, 32), (32, 8), (1, 9)])
def test_formula(name: str, fan_out: int, fan_in: int) -> None:
    assert scale_factor(name, fan_out, fan_in) == pytest.approx(SCALES[name](fan_out, fan_in))


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize(
    ("shape", "layout", "fan_out", "fan_in"),
    [
        ((8, 32), {}, 8, 32),
        ((32, 8), {}, 32, 8),
        ((32, 8), {"transposed": True}, 8, 32),
        ((24, 8), {"blocks": 3}, 8, 8),
        ((3, 16, 8), {"stacked": True}, 16, 8),
        ((16, 4, 3, 3), {}, 16, 36),
    ],
)
def test_a_step_moves_by_lr_times_scale_times_polar_factor(
    name: str, shape: tuple[int, ...], layout: dict[str, int], fan_out: int, fan_in: int
) -> None:
    weight = torch.nn.Parameter(torch.randn(shape))
    weight.grad = torch.randn(shape)
    before = weight.detach().clone()
    layout = {"stacked": False, "blocks": 1, "transposed": False, **layout}
    group = {"params": [weight], "algorithm": "muon", "layouts": [layout]}
    MuonAdamW([group], lr=0.1, weight_decay=0.0, update_scale=name).step()
    from lightning_muon.optim import MatrixLayout

    view = MatrixLayout(**layout)
    factor = view.restore([orthogonalize(matrices) for matrices in view.matrices(weight.grad)], shape)
    torch.testing.assert_close(before - weight, 0.1 * SCALES[name](fan_out, fan_in) * factor, atol=1e-5, rtol=1e-5)


def test_moonlight_matches_the_rms_of_adamw() -> None:
    """An update by an exact polar factor has an RMS of 0.2 on every shape."""
    for shape in [(16, 64), (64, 16), (32, 32)]:
        factor = orthogonalize(torch.randn(shape), "svd")
        assert (scale_factor("moonlight", *shape) * factor).square().mean().sqrt() == pytest.approx(0.2, rel=1e-4)


def test_an_unknown_scale_is_refused() -> None:
    with pytest.raises(
        ValueError, match="unknown update_scale 'kj'; choose one of none, keller_jordan, mup, moonlight"
    ):
        scale_factor("kj", 1, 1)
