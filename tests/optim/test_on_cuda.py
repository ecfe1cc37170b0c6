"""On a GPU: the results of the CPU, no waiting for the device in a step, and state that stays there."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, orthogonalize, route_parameters

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "polar_express": {"orthogonalizer": "polar_express", "orthogonalizer_options": {"steps": 3, "lower_bound": 0.02}},
    "gram_newton_schulz": {"orthogonalizer": "gram_newton_schulz"},
    "neuron_beta": {"neuron_beta": 0.95},
    "nuclear_norm": {"update_scale": "nuclear_norm"},
    "qdwh, nuclear_norm": {"orthogonalizer": "qdwh", "update_scale": "nuclear_norm", "nesterov": False},
    "polar_first": {"polar_first": True},
    "cautious": {"cautious_weight_decay": True},
    "fixed_norm": {"fixed_norm": 0.1},
    "int8": {"momentum_dtype": "int8"},
}
# Where rounding differs, a value may get the next code, which changes the factor of a small matrix by some 10⁻³.
CODED = 1e-3


class Layers(nn.Module):
    """Wide, tall and square matrices, two of one shape, a stack, a convolution, and vectors."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(200, 24)  # large enough for codes of its moments
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 48), nn.Linear(48, 24)])
        self.experts = nn.Parameter(torch.randn(3, 16, 24))
        self.convolution = nn.Conv2d(4, 8, 3)
        self.norm = nn.LayerNorm(24)
        self.to(dtype)


def make(device: str, dtype: torch.dtype, **options: Any) -> tuple[Layers, MuonAdamW]:
    layers = Layers(dtype).to(device)
    rules = [Rule("experts", "muon", layout=MatrixLayout(stacked=True))]
    return layers, MuonAdamW(route_parameters(layers, rules), lr=0.02, **options)


def steps(layers: Layers, optimizer: MuonAdamW, first: int = 0, last: int = 3) -> Layers:
    """Take steps along gradients that are the same on each device."""
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in layers.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()
    return layers


def assert_equal(layers: Layers, expected: Layers, tolerance: float) -> None:
    for (name, parameter), other in zip(layers.named_parameters(), expected.parameters(), strict=True):
        error = (parameter.detach().cpu() - other.detach().cpu()).abs().max()
        assert error <= tolerance, f"{name} is off by {error}"


@pytest.fixture
def sync_is_an_error() -> Iterator[Callable[[str], None]]:
    """`sync_is_an_error("error")`: an operation that makes the host wait raises from here on."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_does_not_wait_for_the_device(
    variant: str, dtype: torch.dtype, sync_is_an_error: Callable[[str], None]
) -> None:
    layers, optimizer = make(DEVICE, dtype, **VARIANTS[variant])
    steps(layers, optimizer)  # makes the state
    before = [parameter.clone() for parameter in layers.parameters()]
    sync_is_an_error("error")
    optimizer.step()
    sync_is_an_error("default")
    for parameter, old in zip(layers.parameters(), before, strict=True):
        assert not torch.equal(parameter, old)


def test_waiting_is_noticed(sync_is_an_error: Callable[[str], None]) -> None:
    """Else the test above could not fail."""
    number = torch.ones((), device=DEVICE)
    sync_is_an_error("error")
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        number.item()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_those_of_the_cpu(variant: str, dtype: torch.dtype, tolerance: float) -> None:
    options = {**VARIANTS[variant]}
    options["orthogonalizer_options"] = {
        **options.get("orthogonalizer_options", {}),
        "dtype": str(dtype).removeprefix("torch."),
    }
    # With the nuclear norm a step is as large as the gradient; it is scaled to that of the other variants.
    scale = {"lr": 1e-4} if options.get("update_scale") == "nuclear_norm" else {}
    made = [make(device, dtype, **options) for device in (DEVICE, "cpu")]
    for _, optimizer in made:
        for group in optimizer.param_groups:
            group.update(scale)
    on_device, on_cpu = (steps(*one) for one in made)
    assert_equal(on_device, on_cpu, CODED if variant == "int8" else tolerance)
    assert all(parameter.device.type == DEVICE for parameter in on_device.parameters())


def test_bfloat16_parameters_are_rounded_once() -> None:
    """One step from the same weights differs from float32 by rounding alone."""
    options: dict[str, Any] = {"orthogonalizer_options": {"dtype": "float32"}}
    layers, optimizer = make(DEVICE, torch.bfloat16, **options)
    wide, wide_optimizer = make(DEVICE, torch.float32, **options)
    for parameter, narrow in zip(wide.parameters(), layers.parameters(), strict=True):
        parameter.data.copy_(narrow)
    steps(layers, optimizer, last=1)
    for parameter, narrow in zip(wide.parameters(), layers.parameters(), strict=True):
        assert narrow.grad is not None
        parameter.grad = narrow.grad.float()
    wide_optimizer.step()
    for parameter, narrow in zip(wide.parameters(), layers.parameters(), strict=True):
        # Half a unit in the last place, 2⁻⁹ relative, and the rounding of the momentum to bfloat16 in the step.
        torch.testing.assert_close(narrow.float(), parameter, rtol=2**-8, atol=0.02 * 2**-7)


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express", "gram_newton_schulz"])
def test_half_precision_of_the_gpu_keeps_the_band(method: Any) -> None:
    """By default the GPU computes in half precision; the singular values arrive where the quintics bring them."""
    torch.manual_seed(0)
    matrices = torch.randn(4, 96, 256, device=DEVICE)
    values = torch.linalg.svdvals(orthogonalize(matrices, method))
    assert values.min() > 0.6
    assert values.max() < 1.25
    exact = orthogonalize(matrices, "svd")
    cosine = (orthogonalize(matrices, method) * exact).sum((-2, -1)) / exact.square().sum((-2, -1))
    assert cosine.min() > 0.65


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [(torch.float32, (1e-30, 1e-20, 1.0, 1e20, 1e30)), (torch.float64, (1e-140, 1.0, 1e140))],
    ids=str,
)
def test_the_factor_is_free_of_scale(dtype: torch.dtype, scales: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 40, device=DEVICE, dtype=dtype)
    stack = torch.stack([matrix * scale for scale in scales])
    expected = orthogonalize(matrix.double().cpu(), "svd")
    for factor in orthogonalize(stack, "qdwh"):
        torch.testing.assert_close(
            factor.double().cpu(), expected, atol=1e-4 if dtype == torch.float32 else 1e-10, rtol=0
        )


def test_zero_stays_zero_and_nan_stays_alone() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 16, 40, device=DEVICE)
    stack[0] = 0
    stack[1, 2, 3] = torch.nan
    zero, broken, whole = orthogonalize(stack, dtype="float32", check_finite=False)
    assert not zero.any()
    assert broken.isnan().all()
    torch.testing.assert_close(whole, orthogonalize(stack[2], dtype="float32"), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"matrices \(1,\) of the batch"):
        orthogonalize(stack)


def test_autocast_does_not_change_the_precision() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(16, 40, device=DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = orthogonalize(matrix, dtype="float32")
    torch.testing.assert_close(inside, orthogonalize(matrix, dtype="float32"), atol=1e-6, rtol=0)


def test_the_compiled_step_is_the_step() -> None:
    options: dict[str, Any] = {"orthogonalizer_options": {"dtype": "float32"}}
    compiled, plain = (steps(*make(DEVICE, torch.float32, compile=flag, **options)) for flag in (True, False))
    assert_equal(compiled, plain, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_read_on_the_cpu_resumes_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    layers, optimizer = make(DEVICE, dtype, neuron_beta=0.95)
    steps(layers, optimizer)
    torch.save([layers.state_dict(), optimizer.state_dict()], tmp_path / "saved")
    weights, state = torch.load(tmp_path / "saved", map_location="cpu", weights_only=True)
    again, resumed = make(DEVICE, dtype, neuron_beta=0.95)
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    for parameter, saved in optimizer.state.items():
        assert all(t.device == parameter.device for name, t in saved.items() if name != "step")
    kinds = [
        {name: (t.device, t.dtype) for name, t in s.items() if isinstance(t, Tensor)} for s in resumed.state.values()
    ]
    assert kinds == [{n: (t.device, t.dtype) for n, t in s.items()} for s in optimizer.state.values()]
    for model, its_optimizer in ((layers, optimizer), (again, resumed)):
        steps(model, its_optimizer, first=3, last=5)
    assert_equal(again, layers, 0.0)


def test_lightning_resumes_on_the_gpu(
    regression: type[LightningModule], fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    def module() -> Any:
        return regression(lambda groups: MuonAdamW(groups, lr=0.02))  # type: ignore[call-arg]

    on_gpu = {"accelerator": "gpu", "devices": 1}
    whole, half, resumed = module(), module(), module()
    fit(whole, max_epochs=2, **on_gpu)
    fit(half, max_epochs=1, **on_gpu).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(resumed, max_epochs=2, ckpt_path=tmp_path / "half.ckpt", **on_gpu)
    assert trainer.global_step == 20
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=0, rtol=0)
