"""A small model with everything that is awkward to shard, and batches for it."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_muon.optim import MatrixLayout, Rule

TOKENS, WIDTH, EXPERTS, BATCH, LENGTH = 17, 12, 3, 12, 8

# Rules that cut some weights of the model into blocks of several shapes, in every order that memory can have.
_LAYOUTS = {
    "*.qkv.weight": MatrixLayout(split_sizes=(16, 10, 10)),
    "*.c_attn.weight": MatrixLayout(split_sizes=(9, 4, 5), interleaved=2, transposed=True),
    "*.proj.weight": MatrixLayout(blocks=3, along_inputs=True),
    "*.gate_up_proj": MatrixLayout(stacked=True, blocks=2, interleaved=10),
    "*.down_proj": MatrixLayout(stacked=True, split_sizes=(7, 3), along_inputs=True),
    "*.c_fc.weight": MatrixLayout(blocks=4, transposed=True, along_inputs=True),
    "middle.weight": MatrixLayout(split_sizes=(1, 3), interleaved=3),
}
BLOCKS = [Rule(pattern, "muon", layout=layout) for pattern, layout in _LAYOUTS.items()]


class Conv1D(nn.Module):
    """A linear layer that stores (in, out), known by its name."""

    def __init__(self, fan_out: int, fan_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(fan_in, fan_out) / fan_in**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Experts(nn.Module):
    """A stack of experts; in every other batch the last one gets no token on some ranks, or on none."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 20, WIDTH) / WIDTH**0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, 10) / 10**0.5)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        mask = one_hot(choice, EXPERTS).to(x.dtype)
        gate, up = torch.einsum("btd,efd->btef", x, self.gate_up_proj).chunk(2, dim=-1)
        return torch.einsum("btef,edf,bte->btd", torch.tanh(gate) * up, self.down_proj, mask)


class Block(nn.Module):
    """Attention of one head without softmax, experts, and a convolution over positions."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.experts = Experts()
        self.c_fc = Conv1D(14, WIDTH)
        self.c_attn = Conv1D(3 * WIDTH, 14)
        self.down = nn.Linear(3 * WIDTH, WIDTH, bias=False)
        self.conv = nn.Conv1d(WIDTH, WIDTH, kernel, padding="same", groups=2)

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.proj(torch.tanh(q @ k.mT / WIDTH) @ v)
        x = x + self.experts(self.norm(x), choice)
        x = x + self.down(torch.tanh(self.c_attn(torch.tanh(self.c_fc(x)))))
        return x + self.conv(x.mT).mT


class Awkward(nn.Module):
    """Uneven rows, a matrix of one row, fused and transposed and stacked ones, a convolution, frozen and unused."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block(kernel) for kernel in (3, 1))
        self.narrow = nn.Linear(WIDTH, 2, bias=False)
        self.wide = nn.Linear(2, WIDTH, bias=False)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, 7)
        self.middle = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, TOKENS)
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor, choice: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, choice)
        x = x + self.wide(self.narrow(x)) + self.frozen(x)
        logits: Tensor = self.head(x + self.middle(x))
        return logits


def make_model(dtype: torch.dtype = torch.float32) -> Awkward:
    """The same model in every process."""
    torch.manual_seed(0)
    return Awkward().to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Tokens (batch, length), experts (batch, length) and targets (batch, length, tokens) of each step."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for step in range(steps):
        tokens = torch.randint(TOKENS, (BATCH, LENGTH), generator=generator)
        choice = torch.randint(EXPERTS, (BATCH, LENGTH), generator=generator)
        if step % 2:
            choice[: BATCH // 2].clamp_(max=EXPERTS - 2)
        target = torch.randn(BATCH, LENGTH, TOKENS, generator=generator, dtype=dtype)
        result.append((tokens, choice, target))
    return result
