"""Sampling: continue sequences of tokens with any network that predicts the next one."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everyone knows
from torch import Tensor, nn

from {{ cookiecutter.package_name }}.model import GPT, Cache


@torch.no_grad()
def generate(
    net: nn.Module,
    prompts: Tensor | Sequence[Tensor],
    count: int,
    context: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: int | None = None,
    seeds: Sequence[int] | None = None,
) -> list[Tensor]:
    """Continue prompts, token by token.

    Prompts of several lengths need no padding: all begin at once, and where one goes on, its own token is taken, not
    the network's. So the result of a prompt is the same, but for rounding, whatever it is together with.

    A ``GPT`` keeps the keys and values of earlier tokens. Where the sequence outgrows the context, it goes on with its
    last half. Other networks see the last ``context`` tokens each time.

    Args:
        net: Maps tokens (batch, time), int64, to logits (batch, time, vocabulary), or to an object with ``logits``.
        prompts: Each of shape (time,), dtype int64, with at least one token.
        count: Number of tokens to add to each.
        context: Largest number of tokens that the network takes.
        temperature: Divisor of the logits; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens.
        top_p: Draw from the most likely tokens that together have this probability (arXiv:1904.09751).
        stop: A token that ends a sequence; it is not part of the result.
        seeds: One for each prompt, to draw the same tokens again. Default: torch's generator for all of them.

    Returns:
        Each prompt with the tokens added, shape (time + count,), shorter where it was stopped.

    Raises:
        ValueError: If an argument is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    following = _cached(net, context) if isinstance(net, GPT) else _uncached(net, context)
    starts = [prompt[-context:] for prompt in prompts]
    lengths = [len(start) for start in starts]
    ends = [length + count for length in lengths]
    tokens = torch.nn.utils.rnn.pad_sequence(starts, batch_first=True)
    tokens = F.pad(tokens, (0, count))
    uniform = _uniform(len(starts), seeds)
    for position in range(min(lengths), max(ends)):
        drawing = [row for row, (length, end) in enumerate(zip(lengths, ends, strict=True)) if length <= position < end]
        if not drawing:
            continue
        logits = following(tokens[:, :position])[drawing, -1].float()
        chosen = _draw(logits, uniform(drawing).to(logits.device), temperature, top_k, top_p)
        tokens[drawing, position] = chosen
        if stop is not None:
            for row, token in zip(drawing, chosen.tolist(), strict=True):
                ends[row] = position if token == stop else ends[row]
            if all(end <= position + 1 for end in ends):
                break
    added = [row[length:end] for row, length, end in zip(tokens, lengths, ends, strict=True)]
    return [torch.cat(both) for both in zip(prompts, added, strict=True)]


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


def _uniform(count: int, seeds: Sequence[int] | None) -> Callable[[list[int]], Tensor]:
    """Return a function that draws numbers from 0 to 1 for some of the rows, shape (rows, 1)."""
    if seeds is None:
        return lambda rows: torch.rand(len(rows), 1)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    if len(generators) != count:
        raise ValueError(f"there must be a seed for each prompt: {count}, got {len(generators)}")
    return lambda rows: torch.stack([torch.rand(1, generator=generators[row]) for row in rows])


def _draw(logits: Tensor, uniform: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """Draw a token for each row of logits (rows, vocabulary), given numbers from 0 to 1 (rows, 1); shape (rows,)."""
    if temperature == 0:
        return logits.argmax(-1)
    logits, order = (logits / temperature).sort(descending=True)
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = torch.softmax(logits, dim=-1)
    sums = probabilities.cumsum(-1)
    if top_p is not None:
        # Those before which the sum is not yet reached: at least one.
        probabilities[sums - probabilities >= top_p] = 0.0
        sums = probabilities.cumsum(-1)
    place = (sums <= uniform * sums[:, -1:]).sum(-1, keepdim=True)
    last = probabilities.count_nonzero(-1)[:, None] - 1
    return order.gather(-1, place.minimum(last))[:, 0]
