"""Small models that attend, and the largest logits of their heads in float64, computed from their weights."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

(TEXT,) = Path(__file__).parents[2].glob("template/*/tasks/text/src")

TOKENS, LENGTH, BATCH, DIM, HEADS = 32, 16, 4, 32, 4


def text_model() -> ModuleType:
    """The file of the text task with its GPT, as a module of a package."""
    if "text_task" not in sys.modules:
        for name, file in (("text_task", None), ("text_task.model", TEXT / "model.py")):
            if file is None:
                spec = importlib.util.spec_from_loader(name, None, is_package=True)
            else:
                spec = importlib.util.spec_from_file_location(name, file)
            assert spec is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            if file is None:
                module.__path__ = [str(TEXT)]
            elif spec.loader is not None:
                spec.loader.exec_module(module)
    return sys.modules["text_task.model"]


def gpt(**options: Any) -> nn.Module:
    """A small GPT of the text task, with QK-norm."""
    sizes: dict[str, Any] = {"vocabulary": TOKENS, "dim": DIM, "depth": 2, "heads": HEADS, "context": LENGTH}
    net: nn.Module = text_model().GPT(**{**sizes, **options})
    return net


def llama(attention: str = "sdpa", kv_heads: int = 2, **options: Any) -> nn.Module:
    """A small Llama of transformers: rotary, grouped queries, no QK-norm."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": TOKENS, "hidden_size": DIM, "intermediate_size": 2 * DIM}
    layers = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": kv_heads}
    make_config: Any = transformers.LlamaConfig
    config = make_config(**{**sizes, **layers, **options}, attn_implementation=attention)
    return LogitsOf(transformers.LlamaForCausalLM(config))


class LogitsOf(nn.Module):
    """A model of transformers that returns the logits of the next token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens).logits
        return logits


class Plain(nn.Module):
    """Embedding, blocks of causal ``nn.MultiheadAttention``, head.

    Args:
        need_weights: Let the attention return its weights, for which it multiplies queries and keys itself.
        options: Options of the attention.
    """

    def __init__(self, depth: int = 2, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, DIM)
        blocks = (nn.MultiheadAttention(DIM, HEADS, batch_first=True, **options) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.RMSNorm(DIM) for _ in range(depth))
        self.head = nn.Linear(DIM, TOKENS, bias=False)
        self.need_weights = need_weights
        self.more = options.get("kdim", DIM) - DIM  # zeros in the input of keys and values

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        mask = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            y = norm(x)
            other = nn.functional.pad(y, (0, self.more)) if self.more else y
            x = x + block(y, other, other, attn_mask=mask, need_weights=self.need_weights)[0]
        logits: Tensor = self.head(x)
        return logits


class NextToken(LightningModule):
    """Train a network that maps tokens to logits on one fixed text of noise.

    Args:
        make_net: Makes the network.
        make_optimizer: From the network to its optimizer. Default: AdamW.
        steps: Batches of an epoch.
    """

    def __init__(
        self,
        make_net: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], Any] | None = None,
        steps: int = 4,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = make_net()
        self.make_optimizer = make_optimizer
        self.steps = steps
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        logits = self.net(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net) if self.make_optimizer else torch.optim.AdamW(self.net.parameters(), 1e-2)

    def train_dataloader(self) -> DataLoader[Tensor]:
        text = torch.randint(0, TOKENS, (self.steps, BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        mine = text.chunk(self.trainer.world_size, dim=1)[self.trainer.global_rank]
        return DataLoader(list(mine), batch_size=None)  # type: ignore[arg-type]


class Exact:
    """The logits (batch, heads, queries, keys) of all attentions of a network in its last pass, in float64.

    From what goes into each attention and its weights, by formulas of this file.
    """

    def __init__(self, net: nn.Module) -> None:
        self.logits: dict[str, Tensor] = {}
        for name, module in net.named_modules():
            kind = type(module).__name__
            if kind in {"Attention", "LlamaAttention", "MultiheadAttention"}:
                module.register_forward_pre_hook(self._hook(f"net.{name}", kind), with_kwargs=True)

    def _hook(self, name: str, kind: str) -> Any:
        def compute(module: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            x = (options["hidden_states"] if "hidden_states" in options else inputs[0]).detach().double()
            if kind == "MultiheadAttention":
                weight = module.in_proj_weight if module._qkv_same_embed_dim else None
                parts = weight.chunk(3)[:2] if weight is not None else (module.q_proj_weight, module.k_proj_weight)
                biases = module.in_proj_bias.chunk(3)
                q, k = (
                    heads(of.detach().double() @ part.detach().double().T + bias.detach().double(), HEADS)
                    for of, part, bias in zip(inputs, parts, biases, strict=False)
                )
            elif kind == "LlamaAttention":
                q, k = (
                    heads(x @ part.weight.detach().double().T, len(part.weight) // module.head_dim)
                    for part in (module.q_proj, module.k_proj)
                )
                q, k = rotated(q), rotated(k)
            else:
                size = module.head_dim
                rows = [module.num_heads * size, module.num_kv_heads * size]
                weight = module.qkv.weight.detach().double()
                parts = weight[: rows[0]], weight[rows[0] : sum(rows)]
                q, k = (heads(x @ part.T, len(part) // size) for part in parts)
                q, k = (rotated(t / t.square().mean(-1, keepdim=True).sqrt()) for t in (q, k))
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            unseen = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
            self.logits[name] = logits.masked_fill(unseen, -torch.inf)

        return compute

    def largest(self) -> dict[str, float]:
        """The largest logit of each head, by the name of the module and the place of the head."""
        return {
            f"{name}.head_{i}": float(value)
            for name, logits in self.logits.items()
            for i, value in enumerate(logits.amax((0, 2, 3)))
        }


def heads(x: Tensor, number: int) -> Tensor:
    """(batch, time, features) as (batch, heads, time, features of a head)."""
    return x.unflatten(-1, (number, -1)).transpose(1, 2)


def rotated(x: Tensor) -> Tensor:
    """Rotary positions: each pair (i, i + half) of features turned by place · 10000^(-2i/features)."""
    half = x.shape[-1] // 2
    angles = torch.outer(
        torch.arange(x.shape[-2], dtype=torch.float64), 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    )
    cosine, sine = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Fused(nn.Module):
    """Attention without QK-norm whose queries, keys and values come from one layer.

    Args:
        kv_heads: Heads of keys and values.
        by_group: Whether queries, key and value of one group of heads stand together, as in GPT-NeoX; otherwise all
            queries, then all keys, then all values, as in the GPT.
        name: The name of the layer.
    """

    def __init__(self, kv_heads: int = HEADS, by_group: bool = False, name: str = "qkv") -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, DIM)
        size = DIM // HEADS
        self.attention = FusedAttention()
        self.attention.add_module(name, nn.Linear(DIM, (HEADS + 2 * kv_heads) * size))
        self.attention.layer = name
        self.attention.kv_heads = kv_heads
        self.attention.by_group = by_group
        self.head = nn.Linear(DIM, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.attention(self.embedding(tokens)))
        return logits


class FusedAttention(nn.Module):
    layer: str
    kv_heads: int
    by_group: bool

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule(self.layer)(x)
        numbers = [HEADS, self.kv_heads, self.kv_heads]
        if self.by_group:
            groups = heads(y, self.kv_heads).unflatten(-1, (sum(numbers) // self.kv_heads, -1)).transpose(2, 3)
            q, k, v = (t.flatten(1, 2) for t in groups.split([n // self.kv_heads for n in numbers], dim=2))
        else:
            q, k, v = heads(y, sum(numbers)).split(numbers, dim=1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
