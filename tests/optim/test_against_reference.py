"""MuonAdamW against a short reference in float64, over random combinations of options, layouts and dtypes."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_muon.optim import MatrixLayout, MuonAdamW

CASES = range(200)
STEPS = 4
# The error of all steps in float64 and in float32, as which bfloat16 computes; and that of rounding to bfloat16.
PRECISION = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5}
ROUNDING = 2.0**-8
REAL_OF = {torch.complex64: torch.float32, torch.complex128: torch.float64}

State = dict[str, Any]
Options = dict[str, Any]


def own_scale(fan_out: int, fan_in: int) -> float:
    return 0.5 + fan_out / fan_in


SCALES = {
    "none": lambda *_: 1.0,
    "keller_jordan": lambda fan_out, fan_in: math.sqrt(max(1, fan_out / fan_in)),
    "mup": lambda fan_out, fan_in: math.sqrt(fan_out / fan_in),
    "moonlight": lambda fan_out, fan_in: 0.2 * math.sqrt(max(fan_out, fan_in)),
    "nuclear_norm": lambda *_: 1.0,  # times that of the matrix
    own_scale: own_scale,
}


# The reference: what the docstring of MuonAdamW and the papers that it names say, with plain tensors.


def muon(w: Tensor, g: Tensor, state: State, o: Options) -> Tensor:
    """Return one matrix (fan-out, fan-in) after a step, and update its state."""
    (fan_out, fan_in), mu = w.shape, o["momentum"]
    x = polar(g) if o["polar_first"] else g
    m = state["m"] = mu * state["m"] + (1 - mu) * x
    a = (1 - mu) * x + mu * m if o["nesterov"] else m
    d = (a if o["polar_first"] else polar(a)) * g.any()
    state["averaged"] = (1 - mu) * x, mu * m, a
    if o["neuron_beta"] is not None:
        state["v"] = o["neuron_beta"] * state["v"] + (1 - o["neuron_beta"]) * d.square().mean(1, keepdim=True)
        d = d.norm() * unit(d / (state["v"].sqrt() + 1e-8 / state["unit"]))
    if o["fixed_norm"] is not None:
        least = o["fixed_norm"] * math.sqrt(w.numel())
        new = w - o["lr"] * max(w.norm(), least) * unit(d)
        return unit(new) * max(w.norm(), min(new.norm(), least))
    nuclear = torch.linalg.svdvals(g if o["polar_first"] else a).sum() if o["update_scale"] == "nuclear_norm" else 1.0
    return decayed(w, d, o) - o["lr"] * SCALES[o["update_scale"]](fan_out, fan_in) * nuclear * d


def adamw(w: Tensor, g: Tensor, state: State, o: Options) -> Tensor:
    """Return real weights after a step, and update their state."""
    (beta1, beta2), t = o["betas"], state["t"] + 1
    m, v = beta1 * state["m"] + (1 - beta1) * g, beta2 * state["v"] + (1 - beta2) * g.square()
    state.update(m=m, v=v, t=t)
    d = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + o["eps"])
    return decayed(w, d, o) - o["lr"] * d


def decayed(w: Tensor, d: Tensor, o: Options) -> Tensor:
    return w - o["lr"] * o["weight_decay"] * w * ((d * w >= 0) if o["cautious_weight_decay"] else 1)


def polar(a: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(unit(a), full_matrices=False)
    return (u * (s > 1e-14)) @ vh


def unit(a: Tensor) -> Tensor:
    """The tensor with Frobenius norm one; zero stays zero."""
    largest = a.abs().max()
    return a if largest == 0 else (a / largest) / (a / largest).norm()


def positions(
    shape: tuple[int, ...],
    stacked: bool,
    blocks: int,
    transposed: bool,
    split_sizes: tuple[int, ...],
    interleaved: int,
    along_inputs: bool,
) -> Iterator[Tensor]:
    """Yield for each matrix (fan-out, fan-in) of a parameter where its elements are in the flat parameter."""
    entries = torch.arange(math.prod(shape)).view(shape if stacked else (1, *shape)).flatten(2)
    kernel = math.prod(shape[2 + stacked :]) if transposed != along_inputs else 1
    for entry in entries:
        lines = entry.T if transposed != along_inputs else entry  # those that are cut
        sizes = [size * kernel for size in split_sizes] or [len(lines) // blocks // interleaved] * blocks
        for block in range(len(sizes)):
            cut = torch.cat(lines.split(sizes * interleaved)[block :: len(sizes)])
            yield cut.T if along_inputs else cut


def magnified(x: Tensor, m: Tensor, a: Tensor, o: Options) -> float:
    """How much larger than relative errors of x and m is that of the direction that their sum a gives."""
    least = a.norm() if o["polar_first"] else torch.linalg.svdvals(a).min()
    return float((x.norm() + m.norm()) / least) * 3 if least > 0 else 0.0


# Where the elements are of a parameter without matrices.
ALL: list[Any] = [slice(None)]


# Random cases.


@dataclass
class Member:
    """A parameter, and the reference's weights and state of it in float64."""

    name: str
    param: Tensor
    options: Options
    layout: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights = real(self.param).double().flatten().clone()
        zero = torch.zeros_like(self.weights)
        self.places = list(positions(tuple(self.param.shape), **self.layout)) if self.layout else []
        if self.layout:
            # Factors of blocks of other shapes are stored in proportion to the scale of the first.
            scales = [SCALES[self.options["update_scale"]](*at.shape) for at in self.places]
            places = zip(self.places, scales, strict=True)
            self.states = [{"m": zero[at], "v": zero[at][:, :1], "unit": scale / scales[0]} for at, scale in places]
        else:
            self.states = [{"m": zero, "v": zero, "t": 0}]

    @property
    def precision(self) -> float:
        return PRECISION[REAL_OF.get(self.param.dtype, self.param.dtype)]

    @property
    def rounding(self) -> float:
        return ROUNDING if self.param.dtype == torch.bfloat16 else 0.0

    def step(self) -> None:
        if self.param.grad is None:
            return
        g = real(self.param.grad).double().flatten()
        if not self.layout:
            self.weights = adamw(self.weights, g, self.states[0], self.options)
            return
        for at, state in zip(self.places, self.states, strict=True):
            self.weights[at] = muon(self.weights[at], g[at], state, self.options)

    def values(self, key: str) -> Tensor:
        """The state of all elements."""
        found = torch.zeros_like(self.weights)
        for at, state in zip(self.places or ALL, self.states, strict=True):
            found[at] = state[key] * self.unit(key, state)
        return found

    def unit(self, key: str, state: State) -> float:
        """The unit in which a state is stored."""
        if not self.layout or (key == "m" and not self.options["polar_first"]):
            return 1.0
        return float(state["unit"] ** (1 if key == "m" else 2))

    def follow(self, optimizer: MuonAdamW) -> None:
        """Take over the weights and the state of the optimizer, which has rounded them."""
        self.weights = real(self.param.detach()).double().flatten().clone()
        for key, value in found_state(optimizer, self).items():
            for at, state in zip(self.places or ALL, self.states, strict=True):
                found = value[at] / self.unit(key, state)
                state[key] = found[:, :1].clone() if key == "v" and self.layout else found.clone()


def real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def found_state(optimizer: MuonAdamW, member: Member) -> dict[str, Tensor]:
    """The optimizer's state of a parameter, by the names of the reference, flat and in float64."""
    names = {"momentum_buffer": "m", "neuron_mean_square": "v", "exp_avg": "m", "exp_avg_sq": "v"}
    state = optimizer.state_of(member.param)
    return {names[key]: real(v).double().flatten() for key, v in state.items() if key in names}


def draw_layout(rng: random.Random) -> tuple[tuple[int, ...], dict[str, Any]]:
    """A shape and how its matrices are stored."""
    kind = rng.choice(["whole", "whole", "blocks", "split"])
    stacked, transposed, along_inputs = rng.random() < 0.3, rng.random() < 0.3, rng.random() < 0.3
    interleaved = rng.choice([1, 1, 2, 3]) if kind != "whole" else 1
    sizes = {"whole": [rng.randint(1, 9)], "blocks": [rng.randint(1, 5)] * rng.randint(2, 3)}.get(
        kind, [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
    )
    lines = [sum(sizes) * interleaved, rng.randint(1, 8)]
    if transposed != along_inputs:
        lines.reverse()
    shape = (*[rng.randint(1, 3)] * stacked, *lines, *rng.choice([[], [], [], [2], [1, 3]]))
    layout = {
        "stacked": stacked,
        "blocks": len(sizes) if kind == "blocks" else 1,
        "transposed": transposed,
        "split_sizes": tuple(sizes) if kind == "split" else (),
        "interleaved": interleaved,
        "along_inputs": along_inputs,
    }
    return shape, layout


def draw_options(rng: random.Random) -> Options:
    """Options of all groups of a case, some of which :func:`draw_groups` draws for each group."""
    return {
        "nesterov": rng.random() < 0.5,
        "update_scale": rng.choice(list(SCALES)),
        "polar_first": rng.random() < 0.3,
        "neuron_beta": 0.9 if rng.random() < 0.4 else None,
        "cautious_weight_decay": rng.random() < 0.3,
        "fixed_norm": 0.1 if rng.random() < 0.3 else None,
        "momentum_dtype": rng.choice([None, None, "float32", "bfloat16", "int8"]),
        "batch_elements": rng.choice([None, None, 1, 30]),
    }


def draw_groups(rng: random.Random, dtype: torch.dtype, shared: Options) -> Iterator[tuple[Options, list[Member]]]:
    for number in range(rng.randint(2, 3)):
        options = {**(shared if rng.random() < 0.7 else draw_options(rng)), "algorithm": "muon"}
        options |= {"lr": rng.choice([0.003, 0.01, 0.03]), "weight_decay": rng.choice([0.0, 0.1, 1.0])}
        options |= {"momentum": rng.choice([0.0, 0.5, 0.9, 0.95])}
        for key, values in {"neuron_beta": [0.5, 0.9], "fixed_norm": [0.0, 0.01, 0.5]}.items():
            if options[key] is not None:
                options[key] = rng.choice(values)
        if options["fixed_norm"] is not None:
            options["lr"] = rng.choice([0.01, 0.7])  # slowly, and beyond the norm to which a matrix grows
        members = []
        for i in range(rng.randint(1, 2)):
            shape, layout = draw_layout(rng)
            # Those that start at zero grow first, with fixed_norm.
            param = torch.randn(shape, dtype=dtype) * rng.choice([1.0, 0.1, 0.0])
            members.append(Member(f"muon{number}.{i}", param, options, layout))
        yield options, members
    options = {**shared, "algorithm": "adamw", "lr": 0.01, "weight_decay": rng.choice([0.0, 0.5])}
    options |= {"betas": rng.choice([(0.9, 0.95), (0.0, 0.5), (0.8, 0.999)]), "eps": rng.choice([1e-8, 1e-3])}
    if options["momentum_dtype"] == "bfloat16":  # in which an average must decay faster
        options["betas"] = options["betas"][0], min(options["betas"][1], 0.99)
    # A parameter of at least 4096 elements is stored in codes.
    shapes = [(3, 4), (7,), *([(2, 2100)] if rng.random() < 0.2 else [])]
    params = [torch.randn(shape, dtype=dtype) for shape in shapes]
    if dtype in REAL_OF.values() and rng.random() < 0.5:
        params.append(torch.randn(3, 2, dtype=dtype.to_complex()))
    yield options, [Member(f"adamw.{i}", param, options) for i, param in enumerate(params)]


def draw_gradient(rng: random.Random, member: Member) -> Tensor | None:
    """A gradient as they occur: none, zero, zero for one matrix, small or large."""
    kind = rng.choice(["none", "zero", "one matrix zero", "scaled", *["plain"] * 5])
    if kind == "none":
        return None
    gradient = torch.randn_like(member.param)
    if kind == "zero":
        return gradient.zero_()
    if kind == "one matrix zero" and member.layout:
        gradient.view(-1)[rng.choice(member.places)] = 0
    if kind == "scaled":
        is_wide = gradient.dtype == torch.float64 and member.options["momentum_dtype"] != "bfloat16"
        wide = [1e-200, 1e-30, 1e30, 1e100] if is_wide else [1e-30, 1e30]
        gradient *= rng.choice(wide if member.layout else [1e-6, 1e6])
    return gradient


@pytest.mark.parametrize("seed", CASES)
def test_case(seed: int) -> None:
    rng = random.Random(seed)  # noqa: S311
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float64, torch.float64, torch.float32, torch.bfloat16])
    groups = list(draw_groups(rng, dtype, draw_options(rng)))
    members = [member for _, of_group in groups for member in of_group]
    optimizer = MuonAdamW(
        [
            {
                **options,
                "params": [m.param for m in of_group],
                "param_names": [m.name for m in of_group],
                **({"layouts": [vars(MatrixLayout(**m.layout)) for m in of_group]} if of_group[0].layout else {}),
            }
            for options, of_group in groups
        ],
        orthogonalizer="svd",
    )
    for number in range(STEPS):
        gradients = [draw_gradient(rng, member) for member in members]
        if rng.random() < 0.5:
            set_gradients(members, gradients)
            optimizer.step()
        else:
            set_gradients(members, [None] * len(members))
            assert optimizer.step(partial(set_gradients, members, gradients)) == 1.5
        for member in members:
            before = member.weights.clone()
            member.step()
            assert_equal(optimizer, member, before, f"seed {seed}, step {number}, {describe(member)}")
            if rounds(member, dtype):
                member.follow(optimizer)


def set_gradients(members: list[Member], gradients: list[Tensor | None]) -> float:
    for member, gradient in zip(members, gradients, strict=True):
        member.param.grad = gradient
    return 1.5


def rounds(member: Member, dtype: torch.dtype) -> bool:
    """Whether what is stored, or the sign of a step, has fewer digits than the test asks for."""
    is_stored_smaller = member.options["momentum_dtype"] in {"bfloat16", "int8"}
    return dtype == torch.bfloat16 or is_stored_smaller or member.options["cautious_weight_decay"]


def describe(member: Member) -> str:
    return f"{member.name} {tuple(member.param.shape)} {member.param.dtype} {member.layout} {member.options}"


def assert_equal(optimizer: MuonAdamW, member: Member, before: Tensor, message: str) -> None:
    expected, moves = member.weights, (member.weights - before).abs()
    allowed = member.precision * (1 + expected.abs().max()) + member.rounding * expected.abs()
    options = member.options
    blurred = torch.zeros_like(expected)
    if (
        member.layout
        and member.param.dtype == torch.bfloat16
        and (options["polar_first"] or options["momentum_dtype"] in {None, "bfloat16"})
    ):  # the average or the factor is in bfloat16 too
        for at, state in zip(member.places, member.states, strict=True):
            averaged: Any = state.get("averaged")
            if averaged is not None:
                new, average, source = averaged
                blurred[at] = ROUNDING * magnified(new, average, source, options)
            allowed[at] += blurred[at] * moves[at].max()
    if options["cautious_weight_decay"]:  # the sign of a step that rounding hides
        decay = options["lr"] * options["weight_decay"] * before.abs()
        allowed += torch.where(moves <= decay + 1e-6 * before.abs(), decay, 0)
    assert_within(allowed, real(member.param.detach()), expected, f"{message}: weights")
    for key, found in found_state(optimizer, member).items():
        allowed = state_error(member, key)
        if blurred.any():
            allowed = allowed + (3 * ROUNDING if key == "m" else 2 * blurred) * member.values(key).abs().max()
        assert_within(allowed, found, member.values(key), f"{message}: {key}")


def assert_within(allowed: Tensor, found: Tensor, expected: Tensor, message: str) -> None:
    off = (found.double().flatten() - expected).abs()
    assert bool((off <= allowed).all()), f"{message}: off by {off.max():g}, allowed {allowed[off.argmax()]:g}"


def state_error(member: Member, key: str) -> Tensor:
    """The error that the form in which a state is stored allows, for each element."""
    expected = member.values(key).abs()
    allowed = member.precision * expected.max() * torch.ones_like(expected)
    kept = member.options["momentum_dtype"]
    if member.param.is_complex() or (member.layout and key == "v"):
        return allowed
    if kept == "bfloat16" or (kept is None and member.layout and member.param.dtype == torch.bfloat16):
        return allowed + ROUNDING * expected
    if kept == "int8" and (member.layout or member.param.numel() >= 4096):
        # Between two codes: 1/127 of the largest of a block; of the dynamic map 0.9 in 64 or, without sign, in 128,
        # and half a unit of the bfloat16 that finds the code. Entries without gradient are rounded towards zero.
        step, lost = (1 / 127, 2**-15) if member.layout else (0.9 / (64 if key == "m" else 128), 2**-8)
        still = member.param.grad is None or member.param.grad.flatten() == 0
        rows = expected.view(len(member.param) if member.param.ndim > 1 else 1, -1)
        largest = rows.amax(1, keepdim=True).expand_as(rows).flatten()
        return allowed + largest * (step * torch.where(torch.as_tensor(still), 1.0, 0.5) + lost)
    return allowed
