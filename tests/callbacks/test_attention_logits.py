"""The largest attention logits, against those of all queries and keys in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_muon.callbacks import AttentionLogitMonitor
from lightning_muon.callbacks.attention.calls import AttentionCall
from lightning_muon.callbacks.attention.growth import Growth
from lightning_muon.callbacks.attention.logits import largest_logits, sampled_places
from tests.callbacks.attending import DIM, HEADS, Exact, NextToken, Plain, gpt, llama
from tests.callbacks.watched import watched

Fit = Callable[..., Trainer]

NETS: dict[str, Callable[[], nn.Module]] = {
    "gpt": gpt,
    "gpt, grouped": partial(gpt, kv_heads=2),
    "llama": partial(llama, "sdpa"),
    "llama, eager": partial(llama, "eager"),
    "multihead": Plain,
    "multihead, weights": partial(Plain, need_weights=True),
    "multihead, dropout and separate": partial(Plain, need_weights=True, dropout=0.1, kdim=DIM + 4, vdim=DIM + 4),
}


class Compare(Callback):
    """What was logged in each step, and the exact logits of that step's pass, seen before the optimizer steps."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.exact: list[dict[str, float]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._exact = Exact(pl_module.net)  # type: ignore[arg-type]

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        prefix = "attention_logit/"
        found = {t.removeprefix(prefix): float(v) for t, v in watched(trainer).items() if t.startswith(prefix)}
        self.logged.append(found)
        self.exact.append(self._exact.largest())


@pytest.mark.parametrize("net", NETS)
def test_all_queries(fit: Fit, net: str) -> None:
    """Each head's is that of float64, and so are layers and summaries; nothing is left replaced."""
    if net.startswith("llama"):
        pytest.importorskip("transformers")
    own = F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward
    compare = Compare()
    module = NextToken(NETS[net])
    fit(module, callbacks=[AttentionLogitMonitor(per_parameter=True, queries=None), compare])
    for logged, exact in zip(compare.logged, compare.exact, strict=True):
        assert len(exact) == 2 * HEADS
        for head, value in exact.items():
            assert logged[head] == pytest.approx(value, rel=1e-4, abs=1e-5)
        assert logged["max"] == max(logged[head] for head in exact)
        assert logged["min"] == min(logged[head] for head in exact)
        assert logged["mean"] == pytest.approx(sum(logged[head] for head in exact) / len(exact))
        for layer in {head.rpartition(".")[0] for head in exact}:
            assert logged[layer] == max(logged[head] for head in exact if head.startswith(f"{layer}."))
    assert compare.logged[0] != compare.logged[-1]
    assert own == (F.scaled_dot_product_attention, F.softmax, F.multi_head_attention_forward)


@pytest.mark.parametrize("net", ["gpt", "llama, eager", "multihead, weights"])
def test_a_sample_of_the_queries(fit: Fit, net: str) -> None:
    """At most what all have; exactly what the sampled ones have, of which others come with each measurement."""
    if net.startswith("llama"):
        pytest.importorskip("transformers")

    class Sampled(Compare):
        def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, *arguments)
            for name, logits in self._exact.logits.items():
                sequences, places = sampled_places(logits.shape[0], logits.shape[2], 8, turn=len(self.logged) - 1)
                chosen = logits[sequences, :, places]
                assert chosen.shape[0] * chosen.shape[2] == 8
                for i, value in enumerate(chosen.amax((0, 2, 3)).tolist()):
                    logged = self.logged[-1][f"{name}.head_{i}"]
                    assert logged == pytest.approx(value, rel=1e-4, abs=1e-5)
                    assert logged <= self.exact[-1][f"{name}.head_{i}"] + 1e-4

    compare = Sampled()
    fit(NextToken(NETS[net]), callbacks=[AttentionLogitMonitor(per_parameter=True, queries=8), compare])
    assert any(
        step["max"] < max(exact.values()) - 1e-4 for step, exact in zip(compare.logged, compare.exact, strict=True)
    )


@pytest.mark.parametrize(("batch", "length", "queries"), [(5, 7, 6), (1, 100, 64), (64, 256, 64), (3, 2, 5), (9, 9, 1)])
def test_samples_differ_and_fit(batch: int, length: int, queries: int) -> None:
    """The first has the last place; over the turns all sequences and all places come."""
    seen = set()
    for turn in range(length):
        sequences, places = sampled_places(batch, length, queries, turn)
        chosen = [(b, p) for b in range(batch)[sequences] for p in range(length)[places]]
        assert 1 <= len(chosen) <= queries
        assert turn or (batch - 1, length - 1) in chosen
        seen.update(chosen)
    assert {b for b, _ in seen} == set(range(batch))
    assert {p for _, p in seen} == set(range(length))


@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"softcap": 3.0}, {"is_causal": True}, {"scale": -0.5}])
@pytest.mark.parametrize("mask", ["none", "seen", "added", "rows"])
@pytest.mark.parametrize("shape", [(3, 4, 9, 8), (9, 8), (4, 9, 8), (2, 3, 4, 9, 8)])
def test_scale_mask_and_softcap(
    options: dict[str, Any], mask: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As written in the call, for all shapes that torch takes, in pieces too."""
    monkeypatch.setattr("lightning_muon.callbacks.attention.logits.PIECE", 50)
    query, key = torch.randn(shape, dtype=torch.float64), torch.randn(*shape[:-2], 11, 8, dtype=torch.float64)
    masks: dict[str, Tensor | None] = {
        "none": None,
        "seen": torch.rand(9, 11) < 0.7,
        "added": torch.randn(*shape[:-1], 11, dtype=torch.float64),
        "rows": torch.where(torch.rand(9, 1) < 0.5, 0.0, -torch.inf).double(),
    }
    added = masks[mask]
    logits = query @ key.transpose(-1, -2) * options.get("scale", 8**-0.5)
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    if added is not None:
        logits = torch.where(added, logits, -torch.inf) if added.dtype == torch.bool else logits + added
    if options.get("is_causal"):
        logits = logits.masked_fill(torch.ones(9, 11, dtype=torch.bool).triu(1), -torch.inf)
    heads = shape[-3] if len(shape) > 3 else 1
    expected = logits.reshape(-1, heads, 9, 11).amax((0, 2, 3)).float()
    found = largest_logits(AttentionCall(query, key, added, **options))
    assert torch.allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("piece", [1, 40, 1 << 22])
def test_causal_with_fewer_keys(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_muon.callbacks.attention.logits.PIECE", piece)
    query, key = torch.randn(3, 2, 200, 4), torch.randn(3, 2, 90, 4)
    logits = (query @ key.transpose(-1, -2) / 2).masked_fill(torch.ones(200, 90, dtype=torch.bool).triu(1), -torch.inf)
    found = largest_logits(AttentionCall(query, key, is_causal=True))
    assert torch.allclose(found, logits.amax((0, 2, 3)))


def test_grouped_queries() -> None:
    """A head of keys serves the heads of queries that stand in a row."""
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 7, 4)
    expected = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) / 2).amax((0, 2, 3))
    assert torch.allclose(largest_logits(AttentionCall(query, key)), expected)


def test_off_cadence_nothing_is_computed(fit: Fit) -> None:
    """No hook stands on a module, and attention is torch's own."""
    own = F.scaled_dot_product_attention
    hooks: list[int] = []
    replaced: list[bool] = []

    class Watched(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.modules()))
            replaced.append(F.scaled_dot_product_attention is not own)
            return super().forward(tokens)

    fit(NextToken(Watched, steps=6), callbacks=[AttentionLogitMonitor(every_n_steps=3)])
    assert [bool(count) for count in hooks] == [False, False, True] * 2
    assert replaced == [False, False, True] * 2


def test_accumulated_batches(fit: Fit) -> None:
    """The largest of all passes of a step."""
    compare = Compare()
    callbacks = [AttentionLogitMonitor(per_parameter=True, queries=None), compare]
    fit(NextToken(gpt), callbacks=callbacks, accumulate_grad_batches=2)
    for name, value in compare.logged[1].items():
        if "head" in name:
            assert value == pytest.approx(max(exact[name] for exact in compare.exact[:2]), rel=1e-4)


class ByHand(nn.Module):
    """An attention that multiplies by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, DIM)
        self.attention = HandAttention(DIM, DIM)
        self.head = nn.Linear(DIM, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.attention(self.embedding(tokens)))
        return logits


class HandAttention(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.softmax(x @ x.transpose(1, 2), dim=-1) @ x


def test_attention_that_is_not_seen_is_told_once(fit: Fit) -> None:
    with pytest.warns(UserWarning, match=r"net\.attention did not attend in a way that can be seen") as said:
        trainer = fit(NextToken(ByHand), callbacks=[AttentionLogitMonitor()])
    assert sum("did not attend" in str(warning.message) for warning in said) == 1
    assert "scaled_dot_product_attention, nn.MultiheadAttention" in "".join(str(w.message) for w in said)
    assert not [tag for tag in watched(trainer) if "attention" in tag]


def test_a_model_without_attention_is_left_alone(fit: Fit, regression: Any, recwarn: pytest.WarningsRecorder) -> None:
    fit(regression(lambda groups: torch.optim.SGD(groups, 0.1)), callbacks=[AttentionLogitMonitor()])
    assert not [w for w in recwarn if "AttentionLogitMonitor" in str(w.message)]


@pytest.mark.parametrize("part", ["net", "block"])
def test_compiled_modules(fit: Fit, part: str) -> None:
    """What is compiled as a whole is told; it is not compiled again for a measurement."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled.append(len(inputs))
        return graph.forward

    def make() -> nn.Module:
        net = gpt()
        (net if part == "net" else net.blocks[0].attention).compile(backend=backend)  # type: ignore[union-attr,index]
        return net

    if part == "net":
        with pytest.warns(UserWarning, match=r"torch\.compile has made net\.blocks\.0\.attention, net\.blocks\.1\."):
            trainer = fit(NextToken(make), callbacks=[AttentionLogitMonitor(every_n_steps=2)])
        assert "attention_logit/max" not in watched(trainer)
    else:
        trainer = fit(NextToken(make), callbacks=[AttentionLogitMonitor(every_n_steps=2, per_parameter=True)])
        names = {tag.split("/")[1] for tag in watched(trainer) if "head_0" in tag}
        assert names == {"net.blocks.1.attention.head_0"}
    assert len(compiled) == 1


def test_an_error_in_a_pass_leaves_nothing_replaced(fit: Fit) -> None:
    own = F.scaled_dot_product_attention

    class Broken(Plain):
        def forward(self, tokens: Tensor) -> Tensor:
            super().forward(tokens)
            raise ValueError("in the pass")

    with pytest.raises(ValueError, match="in the pass"):
        fit(NextToken(Broken), callbacks=[AttentionLogitMonitor()])
    assert F.scaled_dot_product_attention is own


def test_names_that_a_file_has_imported(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from torch.nn.functional import scaled_dot_product_attention`, in the file of the module."""
    monkeypatch.setitem(globals(), "attend", F.scaled_dot_product_attention)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, DIM)
            self.mixer = Mixer()

        def forward(self, tokens: Tensor) -> Tensor:
            x: Tensor = self.mixer(self.embedding(tokens))
            return x

    class Mixer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = globals()["attend"](x, x, x)
            return y

    trainer = fit(NextToken(Own), callbacks=[AttentionLogitMonitor(per_parameter=["net.mixer"])])
    assert "attention_logit/net.mixer.head_0" in watched(trainer)


def test_the_step_at_which_the_limit_is_reached(fit: Fit, tensorboard: TensorBoardLogger, events: Any) -> None:
    """By a line through the last values, and a warning when it is reached."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32))
            self.inner = Attending()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.inner(tokens) + self.weight

    class Attending(nn.Module):
        step = 0

        def forward(self, tokens: Tensor) -> Tensor:
            type(self).step += 1
            q = torch.full((1, 1, 1, 1), 2.0 * self.step)
            return F.scaled_dot_product_attention(q, torch.ones_like(q), torch.ones_like(q)).new_zeros(
                *tokens.shape, 32
            )

    with pytest.warns(UserWarning, match=r"step 11: the largest attention logit is 24 in net\.inner\.head_0, over"):
        trainer = fit(
            NextToken(Growing, steps=14), callbacks=[AttentionLogitMonitor(max_logit=23.0)], logger=tensorboard
        )
    told = events(trainer).scalars()["attention_limit_step"]
    assert [step for step, _ in told] == list(range(3, 14))
    assert [value for step, value in told if step < 11] == pytest.approx([10.5] * 8)
    assert [value for step, value in told if step >= 11] == [11.0, 12.0, 13.0]


def test_growth_of_the_first() -> None:
    growth = Growth(100.0, points=4, least=3)
    for step in range(3):
        assert growth.reached_at() is None
        growth.add(10 * step, {"still": 90.0, "slow": 10.0 + step, "fast": 10.0 * step, "falls": 99.0 - step})
    at, name = growth.reached_at() or (math.nan, "")
    assert name == "fast"
    assert at == pytest.approx(100.0)
    for step in range(3, 8):
        growth.add(10 * step, {"still": 90.0, "fast": 30.0})
    assert growth.reached_at() is None
    growth.add(80, {"still": math.nan, "fast": math.nan})
    assert growth.reached_at() is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"max_logit": -1}, "max_logit must be at least 0 and finite, or null"),
        ({"per_parameter": ["net.block.*"]}, r"'net\.block\.\*', which matches no name\. There are net\.blocks"),
    ],
)
def test_wrong_arguments(fit: Fit, options: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        fit(NextToken(gpt), callbacks=[AttentionLogitMonitor(**options)])


def test_the_training_is_the_same(fit: Fit) -> None:
    plain, watched = NextToken(gpt), NextToken(gpt)
    fit(plain)
    fit(watched, callbacks=[AttentionLogitMonitor()])
    assert plain.losses == watched.losses
