"""QK-clip: the logits of heads over the limit come to it, all others stay; and a run that it saves."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_muon.callbacks import AttentionLogitMonitor, QKClip
from lightning_muon.optim import MuonAdamW, route_parameters
from tests.callbacks.attending import BATCH, DIM, HEADS, LENGTH, TOKENS, Fused, NextToken, Plain, gpt, llama
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]


class Gpt2(nn.Module):
    """GPT-2 of transformers, whose weights are stored (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": TOKENS, "n_positions": LENGTH, "n_embd": DIM, "n_layer": 1, "n_head": HEADS}
        config = transformers.GPT2Config(**sizes, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
        self.model = transformers.GPT2LMHeadModel(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


NETS: dict[str, Callable[[], nn.Module]] = {
    "llama": partial(llama, kv_heads=HEADS),
    "llama, grouped": llama,
    "llama, eager, grouped": partial(llama, "eager"),
    "llama, biases": partial(llama, kv_heads=HEADS, attention_bias=True),
    "gpt2": Gpt2,
    "multihead": Plain,
    "multihead, weights": partial(Plain, need_weights=True),
    "multihead, separate": partial(Plain, kdim=DIM + 0, vdim=DIM),
    "fused": Fused,
    "fused, grouped": partial(Fused, kv_heads=2),
    "fused, by head": partial(Fused, by_group=True),
    "fused, by group": partial(Fused, kv_heads=2, by_group=True),
}


class Largest(Callback):
    """The largest logit of each head in each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        found = {t.partition("/")[2]: float(v) for t, v in watched(trainer).items() if ".head_" in t}
        self.steps.append(found)


class Still(NextToken):
    """The same batch in each step, and a rate of zero: nothing but the clip changes weights."""

    def __init__(self, make_net: Callable[[], nn.Module], **options: Any) -> None:
        super().__init__(make_net, lambda net: torch.optim.SGD(net.parameters(), lr=0.0), **options)

    def train_dataloader(self) -> DataLoader[Tensor]:
        first = next(iter(super().train_dataloader()))
        return DataLoader([first] * self.steps, batch_size=None)  # type: ignore[arg-type]


def clipped(fit: Fit, make: Callable[[], nn.Module], limit: float, **options: Any) -> tuple[Still, Largest, Trainer]:
    """Two steps: in the second the clip of the first is seen."""
    largest = Largest()
    monitor = AttentionLogitMonitor(queries=None, per_parameter=True, max_logit=None)
    module = Still(make, steps=2)
    trainer = fit(module, callbacks=[QKClip(limit, **options), monitor, largest])
    return module, largest, trainer


@pytest.mark.parametrize("net", NETS)
def test_the_logits_of_heads_over_the_limit_come_to_it(fit: Fit, net: str) -> None:
    """In the first layer, whose input does not change; the weights of other heads keep their bits."""
    if "llama" in net:
        pytest.importorskip("transformers")
    _, unclipped, _ = clipped(fit, NETS[net], 1e9)
    first = {head: logit for head, logit in unclipped.steps[0].items() if ".1." not in head}
    assert len(first) == HEADS
    limit = sorted(first.values())[HEADS // 2] * 0.99  # half of the heads are over it
    module, found, trainer = clipped(fit, NETS[net], limit)
    for head, before in first.items():
        assert found.steps[0][head] == before
        assert found.steps[1][head] == pytest.approx(min(before, limit), rel=1e-5)
    assert float(watched(trainer)["clipped_heads"]) >= 0
    assert unclipped.steps[0] == unclipped.steps[1]
    torch.manual_seed(0)
    old, new = Still(NETS[net]).net.state_dict(), module.net.state_dict()
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert changed
    if "grouped" in net and "llama" in net:
        assert all("q_proj" in name for name in changed)
    elif "llama" in net:
        assert any("k_proj" in name for name in changed)
    rows = {name: int((old[name] != new[name]).any(-1).sum()) for name in changed if old[name].ndim == 2}
    heads = sum(logit > limit for logit in unclipped.steps[0].values())
    if "gpt2" not in net:
        assert sum(rows.values()) == heads * (DIM // HEADS) * (1 if "group" in net else 2)


def test_a_rotary_model_whose_logits_explode(fit: Fit) -> None:
    """Seen before the loss shows it; and QK-clip holds them, and the loss goes on falling.

    Llama without QK-norm learns eight texts by heart with Muon at a rate of 0.2 and no decay. Seen: the limit of 20 is
    foretold from step 5 on and passed at step 16, the losses differ from step 45 on. The logits go to 1153, held to at
    most 35; the loss of the last 40 steps is 0.68, held 0.24.
    """
    pytest.importorskip("transformers")

    class ByHeart(NextToken):
        def train_dataloader(self) -> DataLoader[Tensor]:
            text = torch.randint(0, TOKENS, (2, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
            return DataLoader([text[i % 2] for i in range(self.steps)], batch_size=None)  # type: ignore[arg-type]

    def optimizer(net: nn.Module) -> MuonAdamW:
        groups = route_parameters(net)
        for group in groups:
            group["lr"] = 0.2 if group["algorithm"] == "muon" else 0.01
        return MuonAdamW(groups, weight_decay=0.0)

    def train(*clip: Callback) -> tuple[list[float], list[float], list[float]]:
        logits: list[float] = []
        told: list[float] = []

        class Read(Callback):
            def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
                logits.append(float(watched(trainer)["attention_logit/max"]))
                told.append(float(watched(trainer).get("attention_limit_step", torch.inf)))

        module = ByHeart(partial(llama, kv_heads=HEADS), optimizer, steps=120)
        fit(module, callbacks=[*clip, AttentionLogitMonitor(max_logit=20.0), Read()])
        return module.losses, logits, told

    with pytest.warns(UserWarning, match=r"AttentionLogitMonitor, step \d+: the largest attention logit is "):
        losses, logits, told = train()
    held_losses, held, _ = train(QKClip(max_logit=20.0))
    over = next(step for step, logit in enumerate(logits) if logit > 20.0)
    shown = next(
        step for step in range(120) if sum(losses[step : step + 10]) > 1.5 * sum(held_losses[step : step + 10])
    )
    forecast = next(step for step, at in enumerate(told) if at < torch.inf)
    assert forecast < over < shown
    assert told[over - 1] == pytest.approx(over, abs=5)
    assert max(logits) > 500
    assert max(held) < 40
    assert sum(losses[-40:]) > 1.5 * sum(held_losses[-40:])


def test_qk_norm_is_an_error(fit: Fit) -> None:
    message = r"QKClip cannot clip net\.blocks\.0\.attention, net\.blocks\.1\.attention by its weights: its queries are"
    with pytest.raises(MisconfigurationException, match=rf"{message} not what .* with QK-norm.*remove QKClip"):
        fit(NextToken(gpt), callbacks=[QKClip()])


class Two(nn.Module):
    """One attention that can be clipped, and one that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = Fused(), gpt(depth=1)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.one(tokens) + self.other(tokens)
        return logits


def test_attention_that_cannot_be_clipped_is_told(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"QKClip cannot clip net\.other\.blocks\.0\.attention .*Its logits may grow"):
        _, largest, _ = clipped(fit, Two, 0.01)
    before, after = largest.steps
    changed = {head.rpartition(".")[0] for head in before if before[head] != after[head]}
    assert changed == {"net.one.attention"}


def frozen() -> nn.Module:
    net = Fused()
    net.attention.requires_grad_(requires_grad=False)
    return net


def compiled() -> nn.Module:
    net = Fused()
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(Fused, name="mix"), r"its layers of queries and keys are not found: name them by projections"),
        (frozen, r"its weight is frozen"),
        (compiled, r"no attention was seen in the first step.* not inside of what torch\.compile has compiled"),
        (partial(nn.Embedding, TOKENS, TOKENS), r"no attention was seen in the first step"),
    ],
)
def test_nothing_to_clip_is_an_error(fit: Fit, make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(NextToken(make), callbacks=[QKClip()])


def test_layers_named_by_the_user(fit: Fit) -> None:
    _, largest, _ = clipped(fit, partial(Fused, name="mix"), 0.01, projections=["mix"])
    assert max(largest.steps[0].values()) > 0.02
    assert max(largest.steps[1].values()) == pytest.approx(0.01, rel=1e-5)


def test_queries_that_are_zero_at_first(fit: Fit) -> None:
    """As in muP: their layer is recognized as soon as they are not."""

    def zero() -> nn.Module:
        net = Fused()
        nn.init.zeros_(net.attention.qkv.weight[:DIM])  # type: ignore[union-attr,index]
        nn.init.zeros_(net.attention.qkv.bias[:DIM])  # type: ignore[union-attr,index]
        return net

    largest = Largest()
    monitor = AttentionLogitMonitor(queries=None, per_parameter=True)
    module = NextToken(zero, lambda net: torch.optim.SGD(net.parameters(), 3.0), steps=8)
    fit(module, callbacks=[QKClip(0.01), monitor, largest])
    assert max(largest.steps[0].values()) == 0
    assert 0.01 < max(largest.steps[-1].values()) < 0.2
    largest.steps.clear()
    fit(NextToken(zero, lambda net: torch.optim.SGD(net.parameters(), 3.0), steps=8), callbacks=[monitor, largest])
    assert max(largest.steps[-1].values()) > 0.3


def test_every_n_steps_and_the_log(fit: Fit) -> None:
    """Measured and clipped in the second of two steps; logged on the trainer's cadence, since the last log."""
    counts: list[float] = []

    class Read(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            counts.append(float(watched(trainer).get("clipped_heads", -1.0)))

    largest = Largest()
    monitor = AttentionLogitMonitor(every_n_steps=1, queries=None, per_parameter=True)
    fit(Still(Fused, steps=8), callbacks=[QKClip(0.01, every_n_steps=2), monitor, Read(), largest], log_every_n_steps=4)
    assert max(largest.steps[1].values()) > 0.02
    assert max(largest.steps[2].values()) == pytest.approx(0.01, rel=1e-5)
    assert counts[:2] == [-1.0, float(HEADS)]
    assert counts[-1] <= HEADS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_logit": 0}, "max_logit must be over 0 and finite, got 0"),
        ({"every_n_steps": 0}, "every_n_steps must be at least 1, got 0"),
        ({"queries": 1.5}, "queries must be a whole number or null"),
        ({"projections": "qkv"}, "projections must be the names of one or two layers"),
        ({"projections": ["a", "b", "c"]}, "projections must be the names of one or two layers"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        QKClip(**options)


def test_below_the_limit_training_is_the_same(fit: Fit) -> None:
    plain, watched = NextToken(Plain), NextToken(Plain)
    fit(plain)
    fit(watched, callbacks=[QKClip()])
    assert plain.losses == watched.losses
    for a, b in zip(plain.net.parameters(), watched.net.parameters(), strict=True):
        assert torch.equal(a, b)
