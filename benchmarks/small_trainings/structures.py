"""Graphs, points and tables: graph regression, a GAN, and a transformer for tabular data."""

from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss, softplus

from benchmarks.small_trainings.training import Loss, Task
from lightning_muon.optim import Rule

NODES, GRAPHS, HELD_OUT_GRAPHS = 16, 2048, 512


@cache
def graphs(seed: int) -> tuple[Tensor, Tensor]:
    """Draw random graphs, and what is to be predicted of them.

    Returns:
        Adjacency matrices (graphs, nodes, nodes). Targets (graphs, 3), about standardized: the logarithm of the number
        of triangles, the largest eigenvalue, and the logarithm of the number of paths of length three from the first
        node back to it.
    """
    g = torch.Generator().manual_seed(seed)
    count = GRAPHS if seed == 0 else HELD_OUT_GRAPHS
    density = 0.1 + 0.3 * torch.rand(count, 1, 1, generator=g)
    # Two communities, more or less connected.
    side = torch.rand(count, NODES, generator=g) < 0.5
    same = side[:, :, None] == side[:, None, :]
    odds = density * torch.where(same, 1.5, 1.5 * torch.rand(count, 1, 1, generator=g))
    upper = (torch.rand(count, NODES, NODES, generator=g) < odds).float().triu(1)
    adjacency = upper + upper.mT
    cubes = torch.linalg.matrix_power(adjacency, 3).diagonal(dim1=-2, dim2=-1)
    largest = torch.linalg.eigvalsh(adjacency)[:, -1]
    targets = torch.stack([(cubes.sum(1) / 6).log1p(), largest, cubes[:, 0].log1p()], dim=1)
    return adjacency, (targets - torch.tensor([2.0, 4.2, 1.1])) / torch.tensor([1.0, 1.2, 1.2])


class GraphConvolution(nn.Module):
    """Each node sees itself and the sum of its neighbours, through a small network."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.own, self.neighbours = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        """Map features (b, nodes, width) to the same shape."""
        x = self.norm(nodes)
        result: Tensor = nodes + self.out(torch.relu(self.own(x) + adjacency @ self.neighbours(x)))
        return result


class GraphNetwork(nn.Module):
    """Graph convolutions, and a readout of the first node and the mean of all."""

    def __init__(self, width: int = 48, depth: int = 4) -> None:
        super().__init__()
        self.start = nn.Linear(2, width)
        self.convs = nn.ModuleList(GraphConvolution(width) for _ in range(depth))
        self.readout = nn.Linear(2 * width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, adjacency: Tensor) -> Tensor:
        """Map adjacency matrices (b, nodes, nodes) to targets (b, 3)."""
        degree = adjacency.sum(-1, keepdim=True) / 4
        first = torch.zeros_like(degree)
        first[:, 0] = 1
        nodes = self.start(torch.cat([degree, first], dim=-1))
        for conv in self.convs:
            nodes = conv(nodes, adjacency)
        summary = torch.cat([nodes[:, 0], nodes.mean(1)], dim=-1)
        result: Tensor = self.head(torch.relu(self.readout(summary)))
        return result


def graph(steps: int = 500) -> Task:
    """Regression of properties of graphs."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(GRAPHS, (64,), generator=generator)
        adjacency, targets = graphs(0)
        return mse_loss(model(adjacency[rows]), targets[rows])

    return Task("graph", GraphNetwork, {None: loss}, lambda m: float(mse_loss(m(graphs(1)[0]), graphs(1)[1])), steps)


NOISE = 8


def ring(count: int, generator: torch.Generator) -> Tensor:
    """Draw points (count, 2) of eight arms of a pinwheel."""
    arm = torch.randint(8, (count,), generator=generator)
    along = 0.4 + 0.8 * torch.rand(count, generator=generator)
    across = 0.04 * torch.randn(count, generator=generator)
    angle = arm * (torch.pi / 4) + 0.8 * along
    outwards = torch.stack([angle.cos(), angle.sin()], dim=1)
    sideways = torch.stack([-angle.sin(), angle.cos()], dim=1)
    return along[:, None] * outwards + across[:, None] * sideways


class Adversaries(nn.Module):
    """A generator and a critic."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.generator, self.critic = self.network(NOISE, width, 2), self.network(2, width, 1)

    @staticmethod
    def network(inputs: int, width: int, outputs: int) -> nn.Sequential:
        """Four linear layers."""
        hidden = [m for _ in range(2) for m in (nn.Linear(width, width), nn.LeakyReLU(0.2))]
        return nn.Sequential(nn.Linear(inputs, width), nn.LeakyReLU(0.2), *hidden, nn.Linear(width, outputs))


def critic_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    """The logistic loss of a GAN, with a penalty on the gradient at real points."""
    networks = cast("Adversaries", model)
    real = ring(128, generator).requires_grad_()
    with torch.no_grad():
        fake = networks.generator(torch.randn(128, NOISE, generator=generator))
    of_real = networks.critic(real)
    (slope,) = torch.autograd.grad(of_real.sum(), real, create_graph=True)
    result: Tensor = (softplus(networks.critic(fake)) + softplus(-of_real)).mean() + slope.square().sum(1).mean()
    return result


def generator_loss(model: nn.Module, generator: torch.Generator) -> Tensor:
    """The loss of the generator of a GAN that does not saturate."""
    networks = cast("Adversaries", model)
    return softplus(-networks.critic(networks.generator(torch.randn(128, NOISE, generator=generator)))).mean()


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return the energy distance of two samples of points (n, 2), times a thousand; zero for equal distributions."""
    return 1000 * float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def gan(steps: int = 1000) -> Task:
    """A GAN of points in a plane. With β₁ and μ of one half, as is usual for GANs."""

    def held_out(model: nn.Module) -> float:
        g = torch.Generator().manual_seed(5)
        networks = cast("Adversaries", model)
        return energy_distance(networks.generator(torch.randn(2048, NOISE, generator=g)), ring(2048, g))

    losses: dict[str | None, Loss] = {"critic": critic_loss, "generator": generator_loss}
    heads = [Rule("*.6.weight", "adamw")]
    return Task("GAN", Adversaries, losses, held_out, steps, (0.5, 0.95), 0.5, heads, noisy=True)


NUMBERS, CATEGORIES, VALUES, ROWS, HELD_OUT_ROWS = 8, 4, 10, 4096, 1024


@cache
def table(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw rows with numbers (rows, numbers), categories (rows, categories) and a target (rows,) of variance one.

    The target has products of numbers, thresholds, and an effect of a pair of categories that changes with a number.
    """
    fixed = torch.Generator().manual_seed(7)
    effects = torch.randn(VALUES, VALUES, generator=fixed)
    slopes = torch.randn(VALUES, generator=fixed)
    g = torch.Generator().manual_seed(seed)
    count = ROWS if seed == 0 else HELD_OUT_ROWS
    x = torch.randn(count, NUMBERS, generator=g)
    c = torch.randint(VALUES, (count, CATEGORIES), generator=g)
    y = x[:, 0] * x[:, 1] + torch.where(x[:, 2] > 0.5, x[:, 3], -x[:, 4]).sin() + effects[c[:, 0], c[:, 1]]
    y = y + slopes[c[:, 2]] * x[:, 5]
    return x, c, (y + 0.1 * torch.randn(count, generator=g)) / 2


class Attention(nn.Module):
    """A block of a transformer with attention in all directions."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (b, tokens, width) to the same shape."""
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, width))
        result: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return result


class TabularTransformer(nn.Module):
    """A token for each column, a number times a vector or the vector of a category, and one to read the result from."""

    def __init__(self, width: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.numbers = nn.Embedding(NUMBERS, width)
        self.categories = nn.Embedding(CATEGORIES * VALUES, width)
        self.shift = nn.Embedding(1 + NUMBERS + CATEGORIES, width)
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Map columns (b, numbers) and (b, categories) to targets (b,)."""
        first = numbers.new_zeros(len(numbers), 1, self.shift.embedding_dim)
        of_numbers = numbers[..., None] * self.numbers.weight
        of_categories = self.categories(categories + VALUES * torch.arange(CATEGORIES))
        x = torch.cat([first, of_numbers, of_categories], dim=1) + self.shift.weight
        for block in self.blocks:
            x = block(x)
        result: Tensor = self.head(self.norm(x[:, 0])).squeeze(-1)
        return result


def tabular(steps: int = 400) -> Task:
    """Regression on a table by a transformer."""

    def loss(model: nn.Module, generator: torch.Generator) -> Tensor:
        rows = torch.randint(ROWS, (128,), generator=generator)
        numbers, categories, target = (values[rows] for values in table(0))
        return mse_loss(model(numbers, categories), target)

    def held_out(model: nn.Module) -> float:
        numbers, categories, target = table(1)
        return float(mse_loss(model(numbers, categories), target))

    return Task("tabular transformer", TabularTransformer, {None: loss}, held_out, steps, noisy=True)
