"""``MuonAdamW`` equals torch's optimizers, and handles edge cases."""

import copy
import io
import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MuonAdamW, orthogonalize, route_parameters


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 8), nn.Linear(8, 5))


def train(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int = 20, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(11, (16,), generator=generator)
        target = torch.randn(16, 5, generator=generator)
        model.zero_grad()
        (model(tokens).float() - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def distance(a: nn.Module, b: nn.Module) -> float:
    return max(float((p - q).abs().max().detach()) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(("scale", "theirs"), [("keller_jordan", "original"), ("moonlight", "match_rms_adamw")])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon(scale: str, theirs: str, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch computes its iteration in bfloat16; in float64 on both sides nothing but the order of sums differs."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    reference, ours = network().double(), network().double()
    hidden = ["1.weight", "3.weight"]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    muon = torch.optim.Muon([reference.get_parameter(n) for n in hidden], adjust_lr_fn=theirs, **options)
    group = {"params": [ours.get_parameter(n) for n in hidden], "algorithm": "muon"}
    train(reference, [muon])
    train(ours, [MuonAdamW([group], update_scale=scale, **options)])
    assert distance(reference, ours) < 1e-9
    assert distance(ours, network().double()) > 0.1


def test_equals_torch_muon_to_the_rounding_of_bfloat16() -> None:
    """The same without any patch: torch as it is, ours asked for the same precision."""
    reference, ours = network(), network()
    hidden = ["1.weight", "3.weight"]
    muon = torch.optim.Muon([reference.get_parameter(n) for n in hidden], lr=0.02)
    group = {"params": [ours.get_parameter(n) for n in hidden], "algorithm": "muon"}
    options = {"dtype": "bfloat16"}
    train(reference, [muon])
    train(ours, [MuonAdamW([group], lr=0.02, update_scale="keller_jordan", orthogonalizer_options=options)])
    moved = distance(ours, network())
    assert distance(reference, ours) < 0.1 * moved


@pytest.mark.parametrize(("fused", "difference"), [(True, 0.0), (False, 1e-6)])
def test_equals_torch_adamw(fused: bool, difference: float) -> None:
    """To the bit with torch's fused kernel, to rounding with its loop."""
    reference, ours = network(), network()
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    train(reference, [torch.optim.AdamW(reference.parameters(), fused=fused, **options)])
    group = {"params": list(ours.parameters()), "algorithm": "adamw"}
    train(ours, [MuonAdamW([group], **options)])
    assert distance(reference, ours) <= difference


@pytest.mark.parametrize(("dtype", "difference"), [(torch.complex64, 1e-6), (torch.complex128, 1e-15)])
def test_equals_torch_adamw_on_complex_parameters(dtype: torch.dtype, difference: float) -> None:
    """With real ones beside them, which go through the same kernel; and resumed from a state dict."""
    torch.manual_seed(0)
    starts = [torch.randn(5, 3, dtype=dtype), torch.randn(4, dtype=dtype), torch.randn(6, 2, dtype=dtype.to_real())]
    reference, ours = ([nn.Parameter(start.clone()) for start in starts] for _ in range(2))
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    theirs = torch.optim.AdamW(reference, **options)
    optimizer = MuonAdamW([{"params": ours, "algorithm": "adamw"}], **options)
    for step in range(6):
        if step == 3:
            saved = optimizer.state_dict()
            optimizer = MuonAdamW([{"params": ours, "algorithm": "adamw"}])
            optimizer.load_state_dict(saved)
        for p, q in zip(reference, ours, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        theirs.step()
        optimizer.step()
    for p, q, start in zip(reference, ours, starts, strict=True):
        assert (p - q).norm() <= difference * (p - start).norm()
        for key, value in theirs.state[p].items():
            assert optimizer.state[q][key].dtype == value.dtype
            torch.testing.assert_close(optimizer.state[q][key], value)


def test_cautious_decay_of_complex_parameters_is_that_of_their_real_and_imaginary_parts() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(40, dtype=torch.complex64), torch.randn(40, dtype=torch.complex64)
    phases, parts = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    phases.grad, parts.grad = gradient.conj(), torch.view_as_real(gradient.conj().resolve_conj())
    groups = [{"params": [phases, parts], "algorithm": "adamw"}]
    MuonAdamW(groups, lr=0.1, weight_decay=0.5, cautious_weight_decay=True).step()
    assert torch.equal(torch.view_as_real(phases.detach()), parts.detach())


def test_each_group_goes_its_own_way() -> None:
    """Both algorithms in one optimizer do what each does alone."""
    together, apart = network(), network()
    train(together, [MuonAdamW(route_parameters(together), lr=0.01)])
    groups = route_parameters(apart)
    train(apart, [MuonAdamW([group], lr=0.01) for group in groups])
    assert {group["algorithm"] for group in groups} == {"muon", "adamw"}
    assert distance(together, apart) == 0.0


def test_matrices_of_one_shape_go_as_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_muon.optim.update import muon as muon_adamw

    shapes = []

    def spy(matrix: Tensor, *args: object, **options: object) -> Tensor:
        shapes.append(tuple(matrix.shape))
        return orthogonalize(matrix, *args, **options)

    monkeypatch.setattr(muon_adamw, "orthogonalize", spy)
    model = nn.ModuleList([nn.Linear(8, 8) for _ in range(5)] + [nn.Linear(8, 24), nn.Linear(8, 2)])
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    MuonAdamW(route_parameters(model)).step()
    assert sorted(shapes) == [(1, 24, 8), (5, 8, 8)]


def test_a_step_on_one_device_runs_no_distributed_code() -> None:
    """The plan is made in the first step; after that, no function of optim/sharding is called."""
    model = network()
    optimizer = MuonAdamW(route_parameters(model), neuron_beta=0.9, update_scale="nuclear_norm")
    train(model, [optimizer], steps=1)
    called: set[str] = set()

    def listen(frame: FrameType, event: str, _: object) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)

    sys.setprofile(listen)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert any(name.endswith("update/muon.py") for name in called)
    assert not [name for name in called if "/sharding/" in name]


def test_hyperparameters_are_read_at_each_step() -> None:
    model = network()
    optimizer = MuonAdamW(route_parameters(model), lr=0.01)
    before = copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, [optimizer], steps=1)
    assert distance(model, before) == 0.0


def test_gradients_are_left_alone() -> None:
    model = network()
    model(torch.arange(11)).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for nesterov in (True, False):
        MuonAdamW(route_parameters(model), nesterov=nesterov).step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_a_parameter_without_gradient_stays_and_has_no_state() -> None:
    model = network()
    optimizer = MuonAdamW(route_parameters(model), lr=0.1)
    before = copy.deepcopy(model)
    model[1].weight.grad = torch.randn(24, 8)
    optimizer.step()
    assert list(optimizer.state) == [model[1].weight]
    assert not torch.equal(model[1].weight, before[1].weight)
    assert torch.equal(model[3].weight, before[3].weight)
    optimizer.zero_grad()
    optimizer.step()


def test_a_zero_gradient_only_decays() -> None:
    weight = nn.Parameter(torch.ones(4, 6))
    weight.grad = torch.zeros(4, 6)
    MuonAdamW([{"params": [weight], "algorithm": "muon"}], lr=0.5, weight_decay=0.1).step()
    torch.testing.assert_close(weight.data, torch.full((4, 6), 0.95))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (0, 4)])
def test_thin_matrices(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.randn(shape))
    optimizer = MuonAdamW([{"params": [weight], "algorithm": "muon"}], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        optimizer.step()
    assert weight.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters(dtype: torch.dtype) -> None:
    """They follow the float32 run to their own precision; float16 would make NaN of AdamW's eps."""
    reference, ours = network(), network().to(dtype)
    train(reference, [MuonAdamW(route_parameters(reference), lr=0.02)], steps=5)
    optimizer = MuonAdamW(route_parameters(ours), lr=0.02)
    train(ours, [optimizer], steps=5)
    assert all(p.dtype == dtype for p in ours.parameters())
    dtypes = {key: tensor.dtype for state in optimizer.state.values() for key, tensor in state.items()}
    assert dtypes.pop("momentum_buffer") == (dtype if dtype == torch.bfloat16 else torch.float32)
    assert dtypes == {"exp_avg": torch.float32, "exp_avg_sq": torch.float32, "step": torch.float32}
    flat, flat_ours, start = (
        nn.utils.parameters_to_vector(m.float().parameters()) for m in (reference, ours, network())
    )
    assert (flat - flat_ours).norm() < 0.25 * (flat - start).norm()


def test_decay_and_update_are_rounded_once_in_bfloat16() -> None:
    """1 − 1e-3 is one again in bfloat16, and so is 1 − 3.5e-3; together they are not."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    weight.grad = torch.ones(1, 1, dtype=torch.bfloat16)
    factor = float(orthogonalize(torch.ones(1, 1)))
    group = {"params": [weight], "algorithm": "muon"}
    MuonAdamW([group], lr=1.2e-3 / factor, weight_decay=1e-3 * factor / 1.2e-3, update_scale="none").step()
    assert weight.item() == torch.tensor(1 - 2.2e-3).bfloat16().item() < 1.0


def test_closure_is_called_with_gradients_enabled() -> None:
    model = network()
    optimizer = MuonAdamW(route_parameters(model))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(11)).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_an_empty_group_is_no_problem() -> None:
    model = network()
    groups = [*route_parameters(model), {"params": [], "param_names": [], "algorithm": "muon"}]
    train(model, [MuonAdamW(groups)], steps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_resume_is_bit_equal(dtype: torch.dtype) -> None:
    straight, resumed = network().to(dtype), network().to(dtype)
    optimizer = MuonAdamW(route_parameters(straight), lr=0.02)
    train(straight, [optimizer], steps=10, seed=1)
    train(straight, [optimizer], steps=10, seed=2)

    first = MuonAdamW(route_parameters(resumed), lr=0.02)
    train(resumed, [first], steps=10, seed=1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = MuonAdamW(route_parameters(resumed), lr=0.5)
    second.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, [second], steps=10, seed=2)
    assert distance(straight, resumed) == 0.0
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, second.state[q][key])
            assert value.dtype == second.state[q][key].dtype


def test_a_copy_steps_too() -> None:
    model, twin = network(), network()
    optimizer = MuonAdamW(route_parameters(model), lr=0.01)
    train(model, [optimizer], steps=2)
    twin, twins_optimizer = copy.deepcopy((model, optimizer))
    train(model, [optimizer], steps=2)
    train(twin, [twins_optimizer], steps=2)
    assert distance(model, twin) == 0.0


def test_a_state_dict_of_other_parameters_is_refused() -> None:
    saved = MuonAdamW(route_parameters(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))).state_dict()
    other = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(
        ValueError, match=r"only the optimizer has 4.bias, 4.weight; only the checkpoint has 1.bias, 1.w"
    ):
        MuonAdamW(route_parameters(other)).load_state_dict(saved)


def test_hooks_get_what_is_applied_and_only_while_registered() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 12), nn.Linear(12, 2))
    optimizer = MuonAdamW(route_parameters(model), lr=1.0, weight_decay=0.0, update_scale="none")
    seen: dict[str, Tensor] = {}

    def keep(names: list[str], factors: Tensor) -> None:
        seen.update({name: factor.clone() for name, factor in zip(names, factors, strict=True)})

    handle = optimizer.register_orthogonalize_hook(keep)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    handle.remove()
    assert sorted(seen) == ["0.weight", "1.weight", "2.weight"]
    for name, factor in seen.items():
        torch.testing.assert_close(before.get_parameter(name) - factor, model.get_parameter(name))
    seen.clear()
    optimizer.step()
    assert not seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hooks_on_loading_have_the_last_word(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    saved = MuonAdamW(route_parameters(model))
    train(model, [saved], steps=1)
    state = saved.state_dict()
    for entry in state["param_groups"]:
        entry["param_names"] = [f"old.{name}" for name in entry["param_names"]]

    def rename(_: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        for entry in state_dict["param_groups"]:
            entry["param_names"] = [name.removeprefix("old.") for name in entry["param_names"]]
        return state_dict

    def fill(optimizer: torch.optim.Optimizer) -> None:
        for values in optimizer.state.values():
            if "exp_avg" in values:
                values["exp_avg"].fill_(7.0)

    optimizer = MuonAdamW(route_parameters(model))
    optimizer.register_load_state_dict_pre_hook(rename)
    optimizer.register_load_state_dict_post_hook(fill)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["param_names"][0] == "1.weight"
    assert {float(v["exp_avg"].mean()) for v in optimizer.state.values() if "exp_avg" in v} == {7.0}


def test_the_state_of_adamw_on_the_same_groups_loads() -> None:
    """Its averages are of no use to Muon, but the step goes on."""
    model = network()
    theirs = torch.optim.AdamW(route_parameters(model))
    train(model, [theirs], steps=1)
    ours = MuonAdamW(route_parameters(model))
    ours.load_state_dict(theirs.state_dict())
    train(model, [ours], steps=1)


def test_autocast_does_not_change_a_step() -> None:
    """Manual optimization steps inside Lightning's autocast."""
    inside, outside = network(), network()
    train(outside, [MuonAdamW(route_parameters(outside), orthogonalizer="svd")], steps=1)
    optimizer = MuonAdamW(route_parameters(inside), orthogonalizer="svd")
    with torch.autocast("cpu", enabled=False):
        train(inside, [], steps=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        optimizer.step()
    assert distance(inside, outside) < 1e-6


def test_options_of_one_group_are_not_those_of_another() -> None:
    optimizer = MuonAdamW(route_parameters(network()), orthogonalizer_options={"steps": 5})
    optimizer.param_groups[0]["orthogonalizer_options"]["steps"] = 1
    assert optimizer.param_groups[1]["orthogonalizer_options"] == {"steps": 5}


def test_a_sparse_gradient_is_refused_by_name() -> None:
    embedding = nn.Embedding(5, 4, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="weight has a sparse gradient"):
        MuonAdamW(route_parameters(embedding)).step()


def test_adamw_lr_is_for_adamw_groups_without_their_own() -> None:
    groups = route_parameters(network())
    groups[-1]["lr"] = 0.5
    optimizer = MuonAdamW(groups, lr=0.02, adamw_lr=0.001)
    assert [(g["name"], g["lr"]) for g in optimizer.param_groups] == [
        ("matrix", 0.02),
        ("embedding", 0.001),
        ("head", 0.001),
        ("vector", 0.5),
    ]
