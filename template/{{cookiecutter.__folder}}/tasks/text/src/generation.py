"""Sampling: continue sequences of tokens with any network that predicts the next one."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from {{ cookiecutter.package_name }}.model import GPT, Cache


@torch.no_grad()
def generate(
    net: nn.Module,
    tokens: Tensor,
    count: int,
    context: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """Continue sequences, token by token.

    A ``GPT`` keeps the keys and values of earlier tokens. Where the sequence outgrows the context, it goes on with its
    last half. Other networks see the last ``context`` tokens each time.

    Args:
        net: Maps tokens (batch, time), int64, to logits (batch, time, vocabulary), or to an object with ``logits``.
        tokens: Shape (batch, time), dtype int64, at least one token each.
        count: Number of tokens to add.
        context: Largest number of tokens that the network takes.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens.
        top_p: Draw from the most likely tokens that together have this probability (arXiv:1904.09751).

    Returns:
        Shape (batch, time + count).

    Raises:
        ValueError: If an argument is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    following = _cached(net, context) if isinstance(net, GPT) else _uncached(net, context)
    for _ in range(count):
        chosen = _draw(following(tokens)[:, -1].float(), temperature, top_k, top_p)
        tokens = torch.cat([tokens, chosen], dim=1)
    return tokens


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise a ValueError if an argument of :func:`generate` is out of range."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be over 0 and at most 1, got {top_p}")


def _uncached(net: nn.Module, context: int) -> Callable[[Tensor], Tensor]:
    def logits(tokens: Tensor) -> Tensor:
        output = net(tokens[:, -context:])
        found: Tensor = getattr(output, "logits", output)
        return found

    return logits


def _cached(net: GPT, context: int) -> Callable[[Tensor], Tensor]:
    cache: Cache = []
    seen = 0

    def logits(tokens: Tensor) -> Tensor:
        nonlocal seen
        new = tokens[:, seen:]
        if (cache[0][0].shape[2] if cache else 0) + new.shape[1] > context:
            cache.clear()
            new = tokens[:, -max(1, context // 2) :] if seen else tokens[:, -context:]
        seen = tokens.shape[1]
        found: Tensor = net(new, cache)
        return found

    return logits


def _draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw a token for each row of logits (batch, vocabulary); shape (batch, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits, order = (logits / temperature).sort(descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = torch.softmax(logits, dim=-1)
    if top_p is not None:
        # Those before which the sum is not yet reached: at least one.
        probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0.0
    return order.gather(-1, torch.multinomial(probabilities, num_samples=1))
