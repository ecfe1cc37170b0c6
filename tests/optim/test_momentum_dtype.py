"""Optimizer state in fewer bytes: the same update of what was stored, saved and loaded with any ``momentum_dtype``."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_muon.optim import MatrixLayout, MuonAdamW, Rule, route_parameters
from lightning_muon.optim.update.quantization import LARGEST_CODE
from lightning_muon.optim.update.state import (
    AVERAGES,
    SCALES,
    SMALLEST_IN_CODES,
    Average,
    encoded,
    read_together,
    save_together,
)

OLD_CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints_0_1_0" / "one_device.pt"
TOKENS, WIDTH = 600, 8


class Network(nn.Module):
    """An embedding that is stored in codes, a convolution, a stack of matrices, a head, and small parameters."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.conv = nn.Conv2d(2, 6, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.layer = nn.Linear(6 * WIDTH // 2, WIDTH)
        self.experts = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH)
        self.head = nn.Linear(WIDTH, 5)
        self.phases = nn.Parameter(torch.randn(70, 70, dtype=torch.complex64))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # (batch, 2, 8)
        x = self.conv(x.view(len(tokens), 2, 2, WIDTH // 2).contiguous(memory_format=torch.channels_last))
        x = torch.tanh(self.layer(x[:, :, 0].flatten(1)))
        # The last expert gets nothing.
        x = x + torch.einsum("bi,eoi->bo", x, self.experts[:2])
        shift = self.phases.real.mean() + self.phases.imag.square().mean()
        return self.head(x) + shift.to(x.dtype)


def network(dtype: torch.dtype = torch.float32) -> Network:
    model = Network()
    for p in model.parameters():
        p.data = p.data if p.is_complex() else p.data.to(dtype)
    return model


def optimizer_of(model: nn.Module, **options: Any) -> MuonAdamW:
    rules = [Rule("experts", "muon", layout=MatrixLayout(stacked=True)), Rule("phases", "adamw")]
    return MuonAdamW(route_parameters(model, rules), **{"lr": 0.01, "batch_elements": 1000, **options})


def backward(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(TOKENS, (32, 2), generator=generator)
    target = torch.randn(32, 5, generator=generator)
    model.zero_grad()
    (model(tokens).float() - target).square().mean().backward()


def train(model: nn.Module, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        backward(model, step)
        optimizer.step()


def round_state(optimizer: MuonAdamW, kept: str) -> None:
    """Store what a float32 state has as the other dtype does, by the definition."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            for name in AVERAGES & state.keys():
                value: Tensor = state[name]
                if param.is_complex():
                    continue
                if kept == "bfloat16":
                    state[name] = value.bfloat16().to(value.dtype)
                elif name == "momentum_buffer" or param.numel() >= SMALLEST_IN_CODES:
                    codes = encoded(name, value, param.grad)
                    state[name] = Average(name, codes[name], codes[name + SCALES], value.dtype).read()


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def reloaded(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    state_dict: dict[str, Any] = torch.load(file, weights_only=True)
    return state_dict


@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"nesterov": False},
        {"polar_first": True},
        {"neuron_beta": 0.9},
        {"cautious_weight_decay": True, "batch_elements": 10**9},
        {"update_scale": "nuclear_norm", "orthogonalizer": "qdwh"},
        {"fixed_norm": 0.1},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_only_what_is_stored_between_steps_is_rounded(kept: str, options: dict[str, Any]) -> None:
    """To the last digit it is training in float32 whose state is rounded after each step."""
    ours, reference = network(), network()
    optimizer = optimizer_of(ours, momentum_dtype=kept, **options)
    expected = optimizer_of(reference, momentum_dtype="float32", **options)
    for step in range(4):
        train(ours, optimizer, range(step, step + 1))
        train(reference, expected, range(step, step + 1))
        round_state(expected, kept)
        assert equal(ours, reference)
    for p, q in zip(ours.parameters(), reference.parameters(), strict=True):
        for name, value in expected.state_of(q).items():
            assert torch.equal(optimizer.state_of(p)[name].to(value.dtype), value), name
    exact = network()
    train(exact, optimizer_of(exact, **options), range(4))
    assert not equal(exact, ours)


@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_parameters_of_other_dtypes(kept: str, dtype: torch.dtype) -> None:
    ours, reference = network(dtype), network(dtype)
    optimizer = optimizer_of(ours, momentum_dtype=kept)
    # With bfloat16 the momentum of a bfloat16 parameter is updated in bfloat16, as it is by default.
    default = {"momentum_dtype": None if kept == "bfloat16" and dtype == torch.bfloat16 else "float32"}
    expected = optimizer_of(reference, **default)
    for step in range(3):
        train(ours, optimizer, range(step, step + 1))
        train(reference, expected, range(step, step + 1))
        round_state(expected, kept)
        assert equal(ours, reference)
    assert all(p.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize(("kept", "share"), [("int8", 0.30), ("bfloat16", 0.5)])
def test_the_bytes_of_the_state(kept: str, share: float) -> None:
    model = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 256), nn.Linear(256, 64), nn.LayerNorm(64))
    optimizer = MuonAdamW(route_parameters(model), momentum_dtype=kept)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    stored = sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values())
    assert stored <= share * sum(8 * p.numel() for p in model.parameters())
    bias = optimizer.state[model[1].bias]
    assert bias["exp_avg"].dtype == (torch.float32 if kept == "int8" else torch.bfloat16)


@pytest.mark.parametrize("kept", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checkpoint_resumes_exactly(kept: str, dtype: torch.dtype) -> None:
    model = network(dtype)
    optimizer = optimizer_of(model, momentum_dtype=kept, neuron_beta=0.9)
    train(model, optimizer, range(3))
    again = copy.deepcopy(model)
    second = optimizer_of(again, momentum_dtype=kept, lr=0.5)
    second.load_state_dict(reloaded(optimizer.state_dict()))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[p].keys() == second.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert value.dtype == second.state[q][name].dtype, name
            assert torch.equal(value, second.state[q][name]), name
    train(model, optimizer, range(3, 6))
    train(again, second, range(3, 6))
    assert equal(model, again)


@pytest.mark.parametrize("saved", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("kept", ["int8", "bfloat16", "float32"])
def test_a_checkpoint_is_converted(saved: str, kept: str) -> None:
    model = network()
    optimizer = optimizer_of(model, momentum_dtype=saved)
    train(model, optimizer, range(3))
    state_dict = reloaded(optimizer.state_dict())
    for state in state_dict["state"].values():
        assert not any(name.endswith(SCALES) for name in state)
        assert all(value.is_floating_point() or value.is_complex() for value in state.values())
    again = copy.deepcopy(model)
    second = optimizer_of(again, momentum_dtype=kept)
    second.load_state_dict(state_dict)
    assert {group["momentum_dtype"] for group in second.param_groups} == {kept}
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        state, expected = second.state_of(q), optimizer.state_of(p)
        assert state.keys() == expected.keys()
        for name in expected:
            found, value = (v if v.is_complex() else v.float() for v in (state[name], expected[name]))
            if name not in AVERAGES or kept in {saved, "float32"} or q.is_complex():
                assert torch.equal(found, value), name
            elif kept == "bfloat16":
                torch.testing.assert_close(found, value, rtol=2**-8, atol=0)
            elif name == "momentum_buffer":
                assert (found - value).abs().max() <= 0.501 * value.abs().max() / LARGEST_CODE
            else:
                assert (found - value).abs().max() <= 0.008 * value.abs().max()
    train(again, second, range(3, 5))
    assert all(p.isfinite().all() for p in again.parameters())


def test_without_momentum_dtype_a_checkpoint_of_codes_is_in_float32_again() -> None:
    model = network()
    optimizer = optimizer_of(model, momentum_dtype="int8")
    train(model, optimizer, range(2))
    plain = optimizer_of(copy.deepcopy(model))
    plain.load_state_dict(optimizer.state_dict())
    assert {v.dtype for s in plain.state.values() for v in s.values()} == {torch.float32, torch.complex64}
    # And a state dict says nothing of what is stored: it has the layout of torch's own.
    for p, state in zip((p for g in plain.param_groups for p in g["params"]), plain.state.values(), strict=True):
        assert all(value.shape == p.shape for name, value in state.items() if name != "step")


@pytest.mark.parametrize("kept", ["int8", "bfloat16"])
def test_copies_and_pickles_go_on_alike(kept: str) -> None:
    model = network()
    optimizer = optimizer_of(model, momentum_dtype=kept, neuron_beta=0.9)
    train(model, optimizer, range(2))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]  # noqa: S301 - ours
    train(model, optimizer, range(2, 4))
    for of_copy, again in pairs:
        train(of_copy, again, range(2, 4))
        assert equal(model, of_copy)


def test_a_checkpoint_of_version_0_1_0_loads() -> None:
    """The momentum within half a step, and of the mean squares of neurons their mean over the row."""
    saved = torch.load(OLD_CHECKPOINT, weights_only=True)["optimizer_states"][0]
    groups = [
        {**{k: group[k] for k in ("algorithm", "param_names", "name")}, "params": [], "neuron_beta": 0.95}
        for group in saved["param_groups"]
    ]
    old = {}
    for group, saved_group in zip(groups, saved["param_groups"], strict=True):
        for key in saved_group["params"]:
            state = saved["state"][key]
            shape = next(v.shape for k, v in state.items() if k != "step")
            group["params"].append(nn.Parameter(torch.zeros(shape)))
            old[group["params"][-1]] = state
        if "layouts" in saved_group:
            group["layouts"] = copy.deepcopy(saved_group["layouts"])
    optimizer = MuonAdamW(groups, momentum_dtype="int8")
    optimizer.load_state_dict(saved)
    seen = set()
    for param, state in old.items():
        for name, value in optimizer.state_of(param).items():
            if name == "momentum_buffer":
                rows = state[name].flatten(1).abs().amax(1)
                error = (value - state[name]).flatten(1).abs().amax(1)
                assert (error <= 0.501 * rows / LARGEST_CODE).all()
                assert optimizer.state[param][name].dtype == torch.int8
            elif name == "neuron_mean_square":
                torch.testing.assert_close(value, state[name].mean(-1, keepdim=True).expand_as(value))
            else:
                assert torch.equal(value, state[name])
            seen.add(name)
    assert seen == {"momentum_buffer", "neuron_mean_square", "exp_avg", "exp_avg_sq", "step"}


def test_an_input_that_died_is_forgotten() -> None:
    """A column without gradient in a matrix whose other columns have one: its momentum becomes exactly zero."""
    weight = nn.Parameter(torch.randn(6, 10))
    optimizer = MuonAdamW([{"params": [weight], "algorithm": "muon"}], momentum_dtype="int8", weight_decay=0.0)
    for step in range(300):
        weight.grad = torch.randn(6, 10, generator=torch.Generator().manual_seed(step))
        if step > 0:
            weight.grad[:, 3] = 0
        optimizer.step()
    momentum = optimizer.state_of(weight)["momentum_buffer"]
    assert momentum[:, 3].eq(0).all()
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight[:, 3], before[:, 3], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrong", ["int4", torch.int8, 8, ["int8"]])
def test_an_unknown_dtype_is_named(wrong: Any) -> None:
    group = {"params": [nn.Parameter(torch.zeros(2, 2))], "algorithm": "muon", "name": "matrices"}
    with pytest.raises(ValueError, match=r"group 0 \(matrices\): momentum_dtype is .*float32, bfloat16, int8, or None"):
        MuonAdamW([group], momentum_dtype=wrong)


def test_averages_that_bfloat16_could_not_decay_are_refused() -> None:
    def group(algorithm: str, **options: Any) -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.ones(2, 2))], "algorithm": algorithm, "name": "some", **options}]

    with pytest.raises(ValueError, match=r"\(some\): betas\[1\] is 0.999, .*to float32 or int8, or betas\[1\] to at"):
        MuonAdamW(group("adamw"), betas=(0.9, 0.999), momentum_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"\(some\): momentum is 0.998, .* momentum to at most 0.996"):
        MuonAdamW(group("muon", momentum=0.998), momentum_dtype="bfloat16")
    for accepted in ({"momentum_dtype": "int8"}, {"momentum_dtype": "float32"}, {}):
        MuonAdamW(group("adamw"), betas=(0.9, 0.999), **accepted)
    # The bound is that of the arithmetic: at it every average decays, beyond it some are rounded to what they were.
    averages = (1 + torch.arange(128) / 128).bfloat16()
    assert (averages.float() * 0.996).bfloat16().lt(averages).all()
    assert (averages.float() * 0.997).bfloat16().eq(averages).any()
    MuonAdamW(group("adamw"), betas=(0.9, 0.996), momentum_dtype="bfloat16")


class ElsewhereTensor(Tensor):
    """A tensor that says it is on another device, where averages of one shape are read and saved together."""

    is_cpu = False


@pytest.mark.parametrize("shape", [(5, 3000), (7, 3, 5), (4000,), (1, 2048)], ids=str)
@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "rounded"])
def test_averages_read_and_saved_together_are_those_of_each(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    together: list[Average | None] = []
    alone: list[Average | None] = []
    gradients: list[Tensor | None] = []
    for of_shape in (shape, shape, None, shape, (2, 2)):
        if of_shape is None:
            for averages in (together, alone):
                averages.append(None)
            gradients.append(None)
            continue
        values = torch.randn(of_shape)
        gradients.append(values * (torch.rand(of_shape) > 0.5))
        state = {name: values.bfloat16()} if name == "rounded" else encoded(name, values)
        for averages, kind in ((together, ElsewhereTensor), (alone, Tensor)):
            stored = state[name].clone().as_subclass(kind)
            scales = state[name + SCALES].clone() if name != "rounded" else None
            averages.append(Average(name, stored, scales, torch.float32))
    found = read_together(together)
    for number, (average, value) in enumerate(zip(alone, found, strict=True)):
        assert (average is None) == (value is None)
        if average is not None and value is not None:
            expected = average.read()
            assert torch.equal(value.as_subclass(Tensor), expected)
            value.mul_(0.7)
            average.save(expected * 0.7, gradients[number])
    save_together(together, found, gradients)
    for own, average in zip(together, alone, strict=True):
        if own is not None and average is not None:
            assert torch.equal(own.stored.as_subclass(Tensor), average.stored)
            assert own.scales is None or average.scales is None or torch.equal(own.scales, average.scales)
