"""Networks in plain PyTorch, each written as its paper's code or a usual tutorial writes it."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm


def mlp(*widths: int) -> nn.Sequential:
    """Return linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class GAN(nn.Module):
    """DCGAN: a generator of images from noise, and a discriminator, each a sequence that ends in a convolution."""

    def __init__(self, noise: int = 16, width: int = 8) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(noise, 2 * width, 4),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, 3, 4, 2, 1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, width, 4, 2, 1),
            nn.LeakyReLU(),
            nn.Conv2d(width, 2 * width, 4, 2, 1),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(),
            nn.Conv2d(2 * width, 1, 4),
        )
        self.noise = noise

    def forward(self, count: int) -> Tensor:
        """Return the judgement of the discriminator on generated images."""
        out: Tensor = self.discriminator(self.generator(torch.randn(count, self.noise, 1, 1)))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (2,)


class SpectralGAN(nn.Module):
    """SN-GAN: the discriminator's layers have spectral_norm; some by the old function, some as parametrizations."""

    def __init__(self, noise: int = 16, width: int = 8, *, old: bool = False) -> None:
        super().__init__()
        norm = spectral_norm if old else parametrizations.spectral_norm
        self.generator = mlp(noise, 32, 48, 2 * 8 * 8)
        self.discriminator = nn.Sequential(
            norm(nn.Conv2d(2, width, 3, 2, 1)),
            nn.LeakyReLU(),
            norm(nn.Conv2d(width, 2 * width, 3, 2, 1)),
            nn.LeakyReLU(),
            nn.Flatten(),
            norm(nn.Linear(8 * width, 1)),
        )
        self.noise = noise

    def forward(self, count: int) -> Tensor:
        """Return the judgement of the discriminator on generated images."""
        images = self.generator(torch.randn(count, self.noise)).unflatten(1, (2, 8, 8))
        out: Tensor = self.discriminator(images)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (2,)


class _ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.InstanceNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.block(x)
        return out


class _Generator(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, width, 7, padding=3),
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, 2, 1),
            nn.ReLU(),
            _ResidualBlock(2 * width),
            _ResidualBlock(2 * width),
            nn.ConvTranspose2d(2 * width, width, 3, 2, 1, 1),
            nn.ReLU(),
            nn.Conv2d(width, 3, 7, padding=3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.model(x)
        return out


class CycleGAN(nn.Module):
    """Twins: two generators between images of one size, and two discriminators."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.G_AB, self.G_BA = _Generator(width), _Generator(width)
        self.D_A, self.D_B = (
            nn.Sequential(
                nn.Conv2d(3, width, 4, 2, 1),
                nn.LeakyReLU(),
                nn.Conv2d(width, 2 * width, 4, 2, 1),
                nn.LeakyReLU(),
                nn.Conv2d(2 * width, 1, 4, 1, 1),
            )
            for _ in range(2)
        )

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Return both judgements, and both images after a cycle."""
        fake_b, fake_a = self.G_AB(a), self.G_BA(b)
        return self.D_A(fake_a), self.D_B(fake_b), self.G_BA(fake_b), self.G_AB(fake_a)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)


class NeRF(nn.Module):
    """The network of neural radiance fields: a density from the position, a color from the direction too."""

    def __init__(self, width: int = 32, depth: int = 4, position: int = 63, direction: int = 27) -> None:
        super().__init__()
        self.skips = (2,)
        sizes = [position, *(width + (position if i in self.skips else 0) for i in range(depth - 1))]
        self.pts_linears = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.views_linears = nn.ModuleList([nn.Linear(direction + width, width // 2)])
        self.feature_linear = nn.Linear(width, width)
        self.alpha_linear = nn.Linear(width, 1)
        self.rgb_linear = nn.Linear(width // 2, 3)

    def forward(self, points: Tensor, views: Tensor) -> Tensor:
        """Return color and density."""
        h = points
        for i, layer in enumerate(self.pts_linears):
            h = layer(h).relu()
            if i in self.skips:
                h = torch.cat([points, h], -1)
        alpha = self.alpha_linear(h)
        h = torch.cat([self.feature_linear(h), views], -1)
        for layer in self.views_linears:
            h = layer(h).relu()
        return torch.cat([self.rgb_linear(h), alpha], -1)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(4, 63), torch.randn(4, 27)


class Siren(nn.Module):
    """A network with sines for one image, a list of layers called net."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 3)])

    def forward(self, x: Tensor) -> Tensor:
        """Return colors at positions."""
        *hidden, last = self.net
        for layer in hidden:
            x = torch.sin(30 * layer(x))
        out: Tensor = last(x)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.rand(4, 2),)


class _FeatureTokenizer(nn.Module):
    """FT-Transformer's: a vector and a bias for each number, a table for each category."""

    def __init__(self, numbers: int, categories: Sequence[int], width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(numbers + 1, width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(numbers + len(categories), width) / width**0.5)
        self.category_embeddings = nn.Embedding(sum(categories), width)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        numbers = torch.cat([numbers.new_ones(len(numbers), 1), numbers], 1)
        tokens = torch.cat([self.weight * numbers[..., None], self.category_embeddings(categories)], 1)
        first, rest = tokens[:, :1], tokens[:, 1:]
        return torch.cat([first, rest + self.bias], 1)


class FTTransformer(nn.Module):
    """A transformer on rows of a table (arXiv:2106.11959)."""

    def __init__(self, numbers: int = 5, categories: Sequence[int] = (3, 4), width: int = 32, outputs: int = 2) -> None:
        super().__init__()
        self.tokenizer = _FeatureTokenizer(numbers, categories, width)
        layer = nn.TransformerEncoderLayer(width, 4, 48, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.norm(self.blocks(self.tokenizer(numbers, categories))[:, 0]))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(4, 5), torch.randint(0, 3, (4, 2))


class ActorCritic(nn.Module):
    """A policy and a value on one trunk, as in PPO's code; the deviation of the policy is a free parameter."""

    def __init__(self, observations: int = 11, actions: int = 3, width: int = 32) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(observations, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.mu = nn.Linear(width, actions)
        self.value = nn.Linear(width, 1)
        self.log_std = nn.Parameter(torch.zeros(1, actions))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean and the deviation of the policy, and the value."""
        h = self.trunk(x)
        return self.mu(h), self.log_std.exp(), self.value(h)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 11),)


class SoftActorCritic(nn.Module):
    """An actor with two outputs, two critics, and their slow copies, which take no gradient."""

    def __init__(self, observations: int = 11, actions: int = 3, width: int = 32) -> None:
        super().__init__()
        self.actor = mlp(observations, width, width)
        self.mean, self.log_deviation = nn.Linear(width, actions), nn.Linear(width, actions)
        self.q1, self.q2 = (mlp(observations + actions, width, width, 1) for _ in range(2))
        self.target_q1, self.target_q2 = deepcopy(self.q1), deepcopy(self.q2)
        for target in (self.target_q1, self.target_q2):
            target.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the deviations and what the critics say of the mean action."""
        h = self.actor(x).relu()
        both = torch.cat([x, self.mean(h).tanh()], -1)
        return self.log_deviation(h), self.q1(both), self.q2(both)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 11),)


class LanguageLSTM(nn.Module):
    """Tokens, an LSTM of two layers, and a head."""

    def __init__(self, vocabulary: int = 50, width: int = 24) -> None:
        super().__init__()
        self.encoder = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, 2, batch_first=True)
        self.decoder = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next tokens."""
        out: Tensor = self.decoder(self.rnn(self.encoder(tokens))[0])
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randint(0, 50, (2, 6)),)


class Translator(nn.Module):
    """nn.Transformer between two languages, as in the tutorial."""

    def __init__(self, source: int = 50, target: int = 60, width: int = 32) -> None:
        super().__init__()
        self.transformer = nn.Transformer(width, 4, 2, 2, 48, batch_first=True)
        self.generator = nn.Linear(width, target)
        self.src_tok_emb = nn.Embedding(source, width)
        self.tgt_tok_emb = nn.Embedding(target, width)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Return the logits of the target."""
        out: Tensor = self.generator(self.transformer(self.src_tok_emb(source), self.tgt_tok_emb(target)))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randint(0, 50, (2, 6)), torch.randint(0, 50, (2, 5))


def _double(inputs: int, outputs: int) -> nn.Sequential:
    first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())


class UNet(nn.Module):
    """Down, up by transposed convolutions, and a convolution of one pixel at the end."""

    def __init__(self, inputs: int = 3, outputs: int = 2, width: int = 8) -> None:
        super().__init__()
        self.inc = _double(inputs, width)
        self.downs = nn.ModuleList([_double(width, 2 * width), _double(2 * width, 4 * width)])
        self.ups = nn.ModuleList([nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merges = nn.ModuleList([_double(4 * width, 2 * width), _double(2 * width, width)])
        self.outc = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of each pixel."""
        kept = [self.inc(x)]
        for down in self.downs:
            kept.append(down(functional.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, merge in zip(self.ups, self.merges, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        out: Tensor = self.outc(x)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(2, 3, 16, 16),)


class _ArcFaceLoss(nn.Module):
    """A vector for each class, to whose angles a margin is added (arXiv:1801.07698)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, width))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        cosine = functional.linear(functional.normalize(x), functional.normalize(self.weight)).clamp(-0.99, 0.99)
        margin = 0.5 * functional.one_hot(labels, len(self.weight))
        return functional.cross_entropy(64 * (cosine.acos() + margin).cos(), labels)


class FaceRecognition(nn.Module):
    """A convolutional network whose classes are in the loss."""

    def __init__(self, classes: int = 20, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 16, 3, 2, 1), nn.Flatten()
        )
        self.embedding = nn.Linear(16 * 16, width)
        self.loss = _ArcFaceLoss(width, classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss."""
        out: Tensor = self.loss(self.embedding(self.backbone(images)), labels)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(4, 3, 16, 16), torch.randint(0, 20, (4,))


class TemporalConvolutions(nn.Module):
    """A TCN: dilated convolutions with weight_norm, by the old function or as a parametrization."""

    def __init__(self, inputs: int = 4, width: int = 16, classes: int = 3, *, old: bool = False) -> None:
        super().__init__()
        norm = weight_norm if old else parametrizations.weight_norm
        self.convs = nn.ModuleList(
            norm(nn.Conv1d(size, width, 3, padding=1 * 2**i, dilation=2**i)) for i, size in enumerate((inputs, 16, 16))
        )
        self.proj = norm(nn.Linear(width, width))
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        for conv in self.convs:
            x = conv(x).relu()
        out: Tensor = self.out(self.proj(x.mean(-1)).relu())
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(2, 4, 12),)


class OrthogonalRNN(nn.Module):
    """A recurrent network whose recurrent matrix an orthogonal parametrization keeps orthogonal."""

    def __init__(self, inputs: int = 6, width: int = 16, classes: int = 3) -> None:
        super().__init__()
        self.width = width
        self.input = nn.Linear(inputs, width)
        self.recurrent = parametrizations.orthogonal(nn.Linear(width, width, bias=False))
        self.output = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits at the end of a series (batch, time, features)."""
        h = x.new_zeros(len(x), self.width)
        with parametrize.cached():
            for step in x.unbind(1):
                h = (self.input(step) + self.recurrent(h)).tanh()
        out: Tensor = self.output(h)
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(2, 4, 6),)


class DLRM(nn.Module):
    """Recommendation: tables of categories, a network for numbers, their products, and a network on top."""

    def __init__(self, numbers: int = 6, categories: Sequence[int] = (30, 40, 50), width: int = 16) -> None:
        super().__init__()
        self.emb_l = nn.ModuleList(nn.EmbeddingBag(count, width, mode="sum") for count in categories)
        self.bot_l = mlp(numbers, 32, width)
        products = (len(categories) + 1) * len(categories) // 2
        self.top_l = mlp(width + products, 32, 24, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        """Return the logit of a click."""
        x = self.bot_l(numbers)
        vectors = torch.stack([x, *(table(c[:, None]) for table, c in zip(self.emb_l, categories.T, strict=True))], 1)
        rows, columns = torch.tril_indices(vectors.shape[1], vectors.shape[1], -1)
        products = (vectors @ vectors.mT)[:, rows, columns]
        out: Tensor = self.top_l(torch.cat([x, products], 1))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randn(4, 6), torch.randint(0, 30, (4, 3))


class TwoTowers(nn.Module):
    """Users and items in one space: the inner product of both towers is the output."""

    def __init__(self, users: int = 30, items: int = 40, width: int = 16) -> None:
        super().__init__()
        self.user_embedding, self.item_embedding = nn.Embedding(users, width), nn.Embedding(items, width)
        self.user_tower, self.item_tower = mlp(width, 32, 16), mlp(width, 32, 16)

    def forward(self, users: Tensor, items: Tensor) -> Tensor:
        """Return a score for each pair."""
        first, second = self.user_tower(self.user_embedding(users)), self.item_tower(self.item_embedding(items))
        return (first * second).sum(-1)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return torch.randint(0, 30, (4,)), torch.randint(0, 30, (4,))


class VAE(nn.Module):
    """A variational autoencoder: the mean and the deviation of the latents are not its output."""

    def __init__(self, pixels: int = 64, width: int = 32, latent: int = 8) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, width)
        self.fc21, self.fc22 = nn.Linear(width, latent), nn.Linear(width, latent)
        self.fc3 = nn.Linear(latent, width)
        self.fc4 = nn.Linear(width, pixels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the image, and mean and log variance of the latents."""
        h = self.fc1(x).relu()
        mean, log_variance = self.fc21(h), self.fc22(h)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.fc4(self.fc3(z).relu()).sigmoid(), mean, log_variance

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.rand(4, 64),)


class Ensemble(nn.Module):
    """Networks of one shape, whose outputs are averaged."""

    def __init__(self, members: int = 3, inputs: int = 10, width: int = 24, outputs: int = 2) -> None:
        super().__init__()
        self.members = nn.ModuleList(mlp(inputs, width, width, outputs) for _ in range(members))

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean."""
        return torch.stack([member(x) for member in self.members]).mean(0)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 10),)


class MultiTask(nn.Module):
    """Heads registered before the body, one in a dictionary for each task."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict({"age": nn.Linear(width, 1), "name": nn.Linear(width, 7)})
        self.body = nn.Sequential(nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the output of each task."""
        h = self.body(x)
        return {name: task(h) for name, task in self.tasks.items()}

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 12),)


class NoisyDuelingDQN(nn.Module):
    """Value and advantage, of noisy layers with free weights of mean and deviation, as in Rainbow."""

    def __init__(self, observations: int = 8, actions: int = 4, width: int = 32) -> None:
        super().__init__()
        self.feature = nn.Linear(observations, width)
        self.value_hidden, self.advantage_hidden = _NoisyLinear(width, width), _NoisyLinear(width, width)
        self.value, self.advantage = _NoisyLinear(width, 1), _NoisyLinear(width, actions)

    def forward(self, x: Tensor) -> Tensor:
        """Return the value of each action."""
        h = self.feature(x).relu()
        advantage: Tensor = self.advantage(self.advantage_hidden(h).relu())
        value: Tensor = self.value(self.value_hidden(h).relu())
        return value + advantage - advantage.mean(-1, keepdim=True)

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 8),)


class _NoisyLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight_mu = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), 0.5 / inputs**0.5))
        self.bias_mu = nn.Parameter(torch.zeros(outputs))
        self.bias_sigma = nn.Parameter(torch.full((outputs,), 0.5 / inputs**0.5))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_mu + self.weight_sigma * torch.randn_like(self.weight_sigma)
        return functional.linear(x, weight, self.bias_mu + self.bias_sigma * torch.randn_like(self.bias_sigma))


class _Coupling(nn.Module):
    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.net = mlp(size // 2, width, width, size)

    def forward(self, x: Tensor) -> Tensor:
        fixed, moved = x.chunk(2, -1)
        scale, shift = self.net(fixed).chunk(2, -1)
        return torch.cat([moved * scale.tanh().exp() + shift, fixed], -1)


class NormalizingFlow(nn.Module):
    """RealNVP: a chain of couplings, each with a network that gives scale and shift; the chain has no head."""

    def __init__(self, size: int = 8, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(_Coupling(size, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """Return the latents."""
        for coupling in self.couplings:
            x = coupling(x)
        return x

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 8),)


class AirbenchNet(nn.Module):
    """A small convolutional network for CIFAR-10 like those of the speedruns: a whitening layer that is frozen."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2, bias=True)
        self.whiten.weight.requires_grad = False
        self.layers = nn.Sequential(nn.GELU(), *self._group(24, width), *self._group(width, 2 * width), nn.MaxPool2d(3))
        self.head = nn.Linear(2 * width, 10, bias=False)

    @staticmethod
    def _group(inputs: int, outputs: int) -> list[nn.Module]:
        first, second = (nn.Conv2d(n, outputs, 3, padding=1, bias=False) for n in (inputs, outputs))
        return [first, nn.MaxPool2d(2), nn.BatchNorm2d(outputs), nn.GELU(), second, nn.BatchNorm2d(outputs), nn.GELU()]

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out: Tensor = self.head(self.layers(self.whiten(x)).flatten(1))
        return out

    def example(self) -> tuple[Any, ...]:
        """Return arguments of forward."""
        return (torch.randn(4, 3, 24, 24),)
