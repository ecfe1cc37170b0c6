"""A language model, pretrained on Python and fine-tuned on English: all weights, or LoRA.

The text is that of every Python: the source of the standard library, and the help in ``pydoc_data.topics``.
"""

import copy
import statistics
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.small_trainings.training import Result, Task, compared, train
from lightning_muon.optim import Rule

BYTES, WIDTH, DEPTH, HEADS, LENGTH, BATCH = 128, 64, 3, 4, 64, 16
RANK = 8
PYTHON_BYTES, HELD_OUT_ROWS = 2_000_000, 200
Text = Literal["python", "english"]


@cache
def text(which: Text, held_out: bool) -> Tensor:
    """Return the codes of a text (bytes,); its last tenth is held out."""
    if which == "python":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        whole = "".join(file.read_text(errors="replace") for file in files)[:PYTHON_BYTES]
    else:
        whole = "".join(topics.topics[name] for name in sorted(topics.topics))
    codes = torch.tensor(list(whole.encode("ascii", "replace")))
    end = len(codes) * 9 // 10
    return codes[end:] if held_out else codes[:end]


class Block(nn.Module):
    """A block of a transformer that looks back."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, length, width) to the same shape."""
        b, t, _ = x.shape
        normed = self.norm1(x)
        q, k, v = (p(normed).view(b, t, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        result: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))).square())
        return result


class LanguageModel(nn.Module):
    """A GPT of bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(BYTES, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, BYTES, bias=False)

    def forward(self, codes: Tensor) -> Tensor:
        """Map codes (b, length) to logits (b, length, bytes)."""
        x = self.embedding(codes) + self.position.weight[: codes.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class LoRA(nn.Module):
    """A linear layer that is frozen, and beside it one of low rank that starts at zero."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out)."""
        result: Tensor = self.base(x) + self.lora_B(self.lora_A(x))
        return result


def with_lora(model: nn.Module) -> nn.Module:
    """Freeze a model and give each linear layer of its blocks a LoRA; return the same model."""
    model.requires_grad_(False)
    for block in model.get_submodule("blocks").children():
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                block.add_module(name, LoRA(layer))
    return model


def loss_on(which: Text, model: nn.Module, generator: torch.Generator) -> Tensor:
    """Return the cross entropy on a batch of the training text, in nats for each byte."""
    codes = text(which, False)
    starts = torch.randint(len(codes) - LENGTH - 1, (BATCH, 1), generator=generator)
    batch = codes[starts + torch.arange(LENGTH + 1)]
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def held_out_loss(which: Text, model: nn.Module) -> float:
    """Return the cross entropy on held-out text, in nats for each byte."""
    codes = text(which, True)
    rows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    rows = rows[torch.linspace(0, len(rows) - 1, HELD_OUT_ROWS).long()]
    with torch.no_grad():
        return float(cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()))


def pretraining(steps: int = 600) -> Task:
    """The language model on Python."""
    return Task(
        "pretraining",
        LanguageModel,
        {None: lambda model, generator: loss_on("python", model, generator)},
        lambda model: held_out_loss("python", model),
        steps,
    )


# Of LoRA, which of the two matrices Muon updates; and nothing of it where all weights are trained.
WAYS: dict[str, tuple[str, list[Rule]]] = {
    "all weights, AdamW": ("AdamW", []),
    "all weights, MuonAdamW": ("MuonAdamW", []),
    "LoRA, AdamW": ("AdamW", []),
    "LoRA, Muon for A and B": ("MuonAdamW", [Rule("*.lora_?.weight", "muon")]),
    "LoRA, Muon for B, AdamW for A": (
        "MuonAdamW",
        [Rule("*.lora_B.weight", "muon"), Rule("*.lora_A.weight", "adamw")],
    ),
}


def fine_tuning(way: str, pretrained: nn.Module, steps: int = 150) -> Task:
    """A pretrained model on English, in one of the :data:`WAYS`."""

    def model() -> nn.Module:
        copied = copy.deepcopy(pretrained)
        return with_lora(copied) if way.startswith("LoRA") else copied

    return Task(
        way,
        model,
        {None: lambda model, generator: loss_on("english", model, generator)},
        lambda model: held_out_loss("english", model),
        steps,
        rules=WAYS[way][1],
        watch=lambda model: held_out_loss("python", model),
    )


@dataclass(frozen=True)
class Tuned:
    """A way to fine-tune a model.

    Args:
        pretrained_by: The optimizer of the pretraining.
        way: A key of :data:`WAYS`.
        before: The loss on English before.
        result: The losses after.
        forgotten: By how much the loss on Python rose, a mean over the seeds.
    """

    pretrained_by: str
    way: str
    before: float
    result: Result
    forgotten: float


def fine_tuned(quick: bool = False) -> Iterator[Tuned]:
    """Pretrain with each optimizer at its best learning rate, and fine-tune in each way at that way's best."""
    steps: dict[str, Any] = {"steps": 5} if quick else {}
    task = pretraining(**steps)
    for pretraining_result in compared(task, quick=quick):
        kept: list[nn.Module] = []
        train(task, pretraining_result.optimizer, pretraining_result.best, seed=0, after=kept.append)
        before = {"english": held_out_loss("english", kept[0]), "python": held_out_loss("python", kept[0])}
        print(f"pretrained by {pretraining_result.optimizer}: {before}", flush=True)
        for way, (optimizer, _) in WAYS.items():
            tuning = fine_tuning(way, kept[0], **steps)
            (result,) = compared(tuning, [optimizer], quick)
            forgotten = statistics.mean(result.watched) - before["python"]
            yield Tuned(pretraining_result.optimizer, way, before["english"], result, forgotten)
