"""Bugs of other implementations, from docs/every-published-muon-bug.md, that no other test here would find."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_muon.optim import MatrixLayout, MuonAdamW, find_routes, route_parameters
from lightning_muon.optim.sharding.exchange import _all_to_all


def test_clipping_does_not_shorten_muons_steps(
    regression: Callable[..., LightningModule], fit: Callable[..., Trainer]
) -> None:
    """A step of Muon has the norm lr · scale · √rank, whatever the norm to which gradients are clipped."""
    lengths: list[Tensor] = []
    for clip in (None, 1e-12):
        moved: list[float] = []

        def configure(groups: list[dict[str, Any]], moved: list[float] = moved) -> MuonAdamW:
            optimizer = MuonAdamW(groups, lr=0.01, weight_decay=0.0, update_scale="none", orthogonalizer="svd")
            matrices = optimizer.param_groups[0]["params"]
            before: list[Tensor] = []
            optimizer.register_step_pre_hook(lambda *_: before.extend(p.detach().clone() for p in matrices))
            optimizer.register_step_post_hook(
                lambda *_: moved.extend(float((p.detach() - before.pop(0)).norm()) for p in matrices)
            )
            return optimizer

        fit(regression(configure), max_steps=4, gradient_clip_val=clip)
        lengths.append(torch.tensor(moved))
    assert lengths[0].numel() == 8
    torch.testing.assert_close(lengths[1], lengths[0], rtol=1e-4, atol=0)


def test_a_scheduler_keeps_the_ratio_of_learning_rates() -> None:
    """Those of Muon, of AdamW and of single roles; a schedule is a factor for each, not one rate for all."""
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.Linear(8, 3))
    optimizer = MuonAdamW(route_parameters(model, lr_by_role={"embedding": 0.1}), lr=0.02, adamw_lr=0.003)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for step in range(3):
        rates = {group["name"]: group["lr"] / 0.5**step for group in optimizer.param_groups}
        assert rates == pytest.approx({"matrix": 0.02, "embedding": 0.1, "head": 0.003, "vector": 0.003})
        optimizer.step()
        schedule.step()


def test_each_expert_keeps_its_own_norm() -> None:
    """Not the stack that of all of them together."""
    weight = nn.Parameter(torch.randn(3, 6, 4) * torch.tensor([1.0, 10.0, 100.0])[:, None, None])
    group = {"params": [weight], "algorithm": "muon", "layouts": [vars(MatrixLayout(stacked=True))]}
    optimizer = MuonAdamW([group], lr=0.1, fixed_norm=0.01)
    start = weight.detach().norm(dim=(1, 2))
    for _ in range(5):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.detach().norm(dim=(1, 2)), start)


def test_a_scale_for_each_channel_is_no_matrix() -> None:
    """Of shape (channels, 1, 1), as layer scale in convolutional networks has it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)
            self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    model = nn.Sequential(Block(), Block(), nn.Flatten(), nn.Linear(8, 2))
    algorithms = {route.name: route.algorithm for route in find_routes(model)}
    assert algorithms["0.conv.weight"] == "muon"
    assert algorithms["0.gamma"] == algorithms["1.gamma"] == "adamw"


def test_embeddings_are_told_by_their_class_not_by_their_name() -> None:
    """GPT-2 has ``wte`` and ``wpe``; and what is called an embedding may be a linear layer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe, self.markov = nn.Embedding(16, 8), nn.Embedding(10, 8), nn.Embedding(16, 4)
            self.h = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(8, 8)}) for _ in range(2))
            self.lm_head = nn.Linear(8, 16)

    roles = {route.name: (route.algorithm, route.role) for route in find_routes(Model())}
    assert roles["wte.weight"] == roles["wpe.weight"] == roles["markov.weight"] == ("adamw", "embedding")
    assert roles["lm_head.weight"] == ("adamw", "head")
    assert roles["h.0.fc.weight"] == ("muon", "matrix")


def test_groups_come_in_one_order() -> None:
    """Whatever the order of the parameters, which may differ between the stages of a pipeline."""
    layers = {
        "lm_head": nn.Linear(8, 16),
        "embedding": nn.Embedding(16, 8),
        "blocks": nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 8)}) for _ in range(2)),
    }
    ways = [list(layers), ["blocks", "embedding", "lm_head"], ["embedding", "blocks", "lm_head"]]
    orders = [[g["name"] for g in route_parameters(nn.ModuleDict({n: layers[n] for n in way}))] for way in ways]
    assert orders == [["matrix", "embedding", "head", "vector"]] * 3


class _Work:
    """A collective that reads what it sends when it is waited for, as one on another stream of a GPU may."""

    def __init__(self, sent: Tensor, received: Tensor) -> None:
        self.sent, self.received = weakref.ref(sent), weakref.ref(received)

    def wait(self) -> None:
        gc.collect()
        sent, received = self.sent(), self.received()
        assert sent is not None, "what is sent was freed before it had left"
        assert received is not None
        received.copy_(sent)


def test_what_is_sent_lives_until_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator gives the memory of a freed buffer to somebody else, who overwrites it on its way."""

    def later(received: Tensor, sent: Tensor, *_: Sequence[int], **__: Any) -> _Work:
        return _Work(sent, received)

    monkeypatch.setattr(dist, "all_to_all_single", later)
    group: Any = None
    arriving = _all_to_all(group, [[torch.arange(3.0)], [torch.ones(2)]], [3, 2], torch.float32, torch.device("cpu"))
    first, second = arriving()
    assert first.tolist() == [0.0, 1.0, 2.0]
    assert second.tolist() == [1.0, 1.0]
