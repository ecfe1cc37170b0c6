"""The largest attention logit of each head."""

import math

import torch
from torch import Tensor

from lightning_muon.callbacks.attention.calls import AttentionCall
from lightning_muon.optim.update.state import HALF

# A sample takes its queries from at most so many sequences: the keys of each are read as a whole.
SEQUENCES = 4
# Logits of all queries are computed in pieces of at most so many, 16 MiB in float32.
PIECE = 1 << 22


@torch.no_grad()
def largest_logits(call: AttentionCall, queries: int | None = None, turn: int = 0) -> Tensor:
    """Return the largest logit of each head, over queries and all keys that they see: (heads,), float32.

    Logits are what goes into the softmax: query · key · scale, with the soft-cap and what a mask adds. They are
    computed in the precision of queries and keys.

    Args:
        call: The call of attention.
        queries: How many queries of a head to take at most, see :func:`sampled_places`. Default: all.
        turn: Which of the samples.
    """
    if call.logits is not None:
        sequences, places = sampled_places(call.logits.shape[0], call.logits.shape[2], queries, turn)
        return call.logits.detach()[sequences, :, places].amax((0, 2, 3)).float()
    assert call.query is not None  # noqa: S101 - one of both is known
    assert call.key is not None  # noqa: S101
    query, key = (by_head(tensor.detach()) for tensor in (call.query, call.key))
    mask = None if call.mask is None else by_head(call.mask.detach().expand(*call.query.shape[:-1], key.shape[2]))
    batch, heads, length, _ = query.shape
    sequences, places = sampled_places(batch, length, queries, turn)
    chosen = range(length)[places]
    query, key = query[sequences, :, places], key[sequences]
    mask = None if mask is None else mask[sequences, :, places]
    at_once = max(1, PIECE // (heads * key.shape[2]))  # queries of a sequence
    several = max(1, at_once // len(chosen))  # whole sequences
    if call.is_causal:
        at_once = min(at_once, max(64, -(-len(chosen) // 8)))  # so that early queries meet few keys
    largest = query.new_full((heads,), -math.inf, dtype=torch.float32)
    for first in range(0, len(query), several):
        some = slice(first, first + several)
        for start in range(0, len(chosen), at_once):
            rows = slice(start, start + at_once)
            last = chosen[rows] if call.is_causal else None
            keys = slice(None if last is None else last[-1] + 1)
            seen = None if mask is None else mask[some, :, rows, keys]
            found = _largest(query[some, :, rows], key[some, :, keys], seen, last, call)
            largest = torch.maximum(largest, found)
    return largest


def sampled_places(batch: int, length: int, queries: int | None, turn: int) -> tuple[slice, slice]:
    """Return which sequences and which places in each to take, spread evenly over both.

    At most ``queries`` in all, from at most :data:`SEQUENCES` sequences; with another ``turn`` others. In the first
    turn the last place of a sequence is there, whose query sees most keys in causal attention.
    """
    if queries is None or queries >= batch * length:
        return slice(None), slice(None)
    sequences = min(batch, SEQUENCES, queries)
    return _spread(batch, sequences, turn), _spread(length, min(length, queries // sequences), turn)


def _spread(size: int, count: int, turn: int) -> slice:
    step = -(-size // count)  # rounded up, so that over the turns all come
    return slice((size - 1 - turn) % step, None, step)


def by_head(tensor: Tensor) -> Tensor:
    """Return (…, heads, rows, columns) as (batch, heads, rows, columns); (batch, rows, columns) has one head."""
    while tensor.ndim < 4:
        tensor = tensor.unsqueeze(-3)
    return tensor.flatten(0, -4)


def _largest(query: Tensor, key: Tensor, mask: Tensor | None, last: range | None, call: AttentionCall) -> Tensor:
    """Return the largest logit of each head, (heads,), float32.

    Args:
        query: Shape (batch, heads, queries, features).
        key: Shape (batch, key_heads, keys, features); a head of keys serves ``heads / key_heads`` heads in a row.
        mask: Shape (batch, heads, queries, keys), see :class:`AttentionCall`.
        last: The last key that each query sees.
        call: It has scale and soft-cap.
    """
    batch, heads, rows, features = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, features)  # queries of several heads, one below the other
    logits = (grouped @ key.to(query.dtype).transpose(-1, -2)).view(batch, heads, rows, -1)
    scale = features**-0.5 if call.scale is None else call.scale
    if mask is not None or call.softcap is not None or scale < 0:
        logits = (logits.float() if logits.dtype in HALF else logits) * scale
        scale = 1.0
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    if last is not None and last[0] + 1 < logits.shape[-1]:
        # Only the keys behind the first query's are unseen by one.
        behind = torch.arange(last[0] + 1, logits.shape[-1], device=logits.device)
        of_queries = torch.arange(last.start, last.stop, last.step, device=logits.device)
        logits[..., last[0] + 1 :].masked_fill_(behind > of_queries.unsqueeze(1), -math.inf)
    return logits.amax((0, 2, 3)).float() * scale
