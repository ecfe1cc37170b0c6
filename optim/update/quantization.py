"""Averages in eight bits: codes in blocks, with one scale a block.

- ``linear_codes``, ``linear_values``: signed integers times a scale, for the momentum of Muon
- ``dynamic_codes``, ``dynamic_values``: indices into a table of values over seven decades, for the moments of AdamW

A block is a part of a row, so the codes of a shard of whole rows are those of the whole tensor.
"""

from functools import cache

import torch
from torch import Tensor

# Elements that share a scale: arXiv:2509.23106 (Muon) and arXiv:2110.02861 (Adam) train with blocks of 2048.
BLOCK_ELEMENTS = 2048
LARGEST_CODE = 127
# A scale has 16 significant bits, so that a code times a scale is exact in float32: encoding what was decoded gives the
# same codes and scales, and a checkpoint of the decoded values resumes exactly.
SCALE_BITS = 16


def block_count(shape: torch.Size) -> tuple[int, int]:
    """Return the shape (rows, blocks) of the scales of a tensor of this shape; no blocks if it is empty."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, -(-shape.numel() // (max(rows, 1) * BLOCK_ELEMENTS))


def linear_codes(values: Tensor, still: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode values as signed integers of one byte, at most 127, times a scale for each block.

    Values are rounded to the nearest code; those that are ``still`` towards zero: a small code times μ would round to
    itself, and an entry without gradient would never forget. A block with NaN or infinity is decoded to NaN.

    Source: "Effective Quantization of Muon Optimizer States" (2025), arXiv:2509.23106, linear quantization.

    Args:
        values: Shape (rows, …), or (elements,) as one row; float32 or float64.
        still: True where the gradient is exactly zero, of the shape of ``values``. Default: nowhere.

    Returns:
        Codes, int8, of the shape of ``values``; scales, shape (rows, blocks), of its dtype.
    """
    if values.numel() == 0:
        return values.to(torch.int8), values.new_zeros(block_count(values.shape))
    blocks = _blocks(values)
    largest = torch.linalg.vector_norm(blocks, ord=torch.inf, dim=-1, keepdim=True)
    scales = _rounded_up((largest / LARGEST_CODE).clamp_min(torch.finfo(values.dtype).tiny))
    codes = blocks / scales
    if still is not None:
        codes = torch.where(_blocks(still), codes.trunc(), codes)
    return _unblocked(codes.round_().to(torch.int8), values.shape), scales.squeeze(-1)


def linear_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode :func:`linear_codes`: the values in the dtype of the scales, in the shape of the codes."""
    if codes.numel() == 0:
        return codes.to(scales.dtype)
    return _unblocked(_blocks(codes) * scales.unsqueeze(-1), codes.shape)


def dynamic_codes(values: Tensor, *, signed: bool, still: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode values as indices into :func:`dynamic_map`, relative to the largest value of their block.

    Values are rounded to the nearest entry; those that are ``still`` towards zero; positive values without sign never
    to zero, since AdamW divides by their root. A block with NaN or infinity is decoded to NaN.

    Source: Dettmers, Lewis, Shleifer & Zettlemoyer, "8-bit Optimizers via Block-wise Quantization" (2022),
    arXiv:2110.02861, dynamic quantization.

    Args:
        values: Shape (rows, …), or (elements,) as one row; float32 or float64; not negative unless ``signed``.
        signed: Which map.
        still: True where the gradient is exactly zero, of the shape of ``values``. Default: nowhere.

    Returns:
        Codes, uint8, of the shape of ``values``; the value of largest magnitude of each block with its sign, shape
        (rows, blocks), of its dtype.
    """
    if values.numel() == 0:
        return values.to(torch.uint8), values.new_zeros(block_count(values.shape))
    blocks = _blocks(values)
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    largest = torch.where(high >= -low, high, low)  # exactly one relative to itself, which the map contains
    relative = (blocks / torch.where(largest == 0, 1, largest)).bfloat16()
    patterns = relative.contiguous().view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF).flatten()
    codes = _nearest(signed, values.device).index_select(0, patterns)
    if still is not None:
        towards_zero = _towards_zero(signed, values.device).index_select(0, patterns)
        codes = torch.where(_blocks(still).flatten(), towards_zero, codes)
    return _unblocked(codes.view(blocks.shape), values.shape), largest.squeeze(-1)


def dynamic_values(codes: Tensor, largest: Tensor, *, signed: bool) -> Tensor:
    """Decode :func:`dynamic_codes`: the values in the dtype of ``largest``, in the shape of the codes."""
    if codes.numel() == 0:
        return codes.to(largest.dtype)
    entries = dynamic_map(signed, codes.device).to(largest.dtype)
    blocks = _blocks(codes)
    relative = entries.index_select(0, blocks.to(torch.int32).flatten()).view(blocks.shape)
    return _unblocked(relative.mul_(largest.unsqueeze(-1)), codes.shape)


@cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """Return the 256 values of the dynamic map in ascending order, float32.

    A decade from 10⁻⁷ to 1 has twice as many values as the decade below it, evenly spaced; the map of signed values has
    half as many for each sign. Zero and one are values too.
    """
    found = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        middles = ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)).tolist()
        found += [*middles, *(-middle for middle in middles)] if signed else middles
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


@cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """Return the code for each bit pattern of a bfloat16, as unsigned integer."""
    entries = dynamic_map(signed, torch.device("cpu"))
    numbers = _numbers()
    codes = torch.bucketize(numbers, (entries[:-1] + entries[1:]) / 2)
    if not signed:
        codes = torch.where(numbers > 0, codes.clamp_min(1), 0)
    return codes.to(torch.uint8).to(device)


@cache
def _towards_zero(signed: bool, device: torch.device) -> Tensor:
    """Return the code of the next entry towards zero for each bit pattern of a bfloat16, as unsigned integer."""
    entries = dynamic_map(signed, torch.device("cpu"))
    numbers = _numbers()
    below = torch.bucketize(numbers, entries, right=True) - 1
    above = torch.bucketize(numbers, entries)
    codes = torch.where(numbers >= 0, below, above).clamp(0, 255)
    return codes.to(torch.uint8).to(device)


def _numbers() -> Tensor:
    """Return the bfloat16 of each bit pattern, those that are not finite as one."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    numbers = (patterns << 16).view(torch.float32)
    return torch.where(numbers.isfinite(), numbers, 1.0)


def _blocks(tensor: Tensor) -> Tensor:
    """Return a view (rows, blocks, elements) of a tensor; where the blocks would not be equal, a copy with zeros."""
    rows, blocks = block_count(tensor.shape)
    flat = tensor.reshape(rows, -1)
    missing = -flat.shape[1] % blocks
    if missing:
        flat = torch.cat([flat, flat.new_zeros(rows, missing)], dim=1)
    return flat.view(rows, blocks, flat.shape[1] // blocks)


def _unblocked(blocks: Tensor, shape: torch.Size) -> Tensor:
    """Undo :func:`_blocks` for a tensor of this shape."""
    flat = blocks.flatten(1)
    return flat[:, : shape.numel() // flat.shape[0]].reshape(shape)


def _rounded_up(scales: Tensor) -> Tensor:
    """Round positive numbers up to :data:`SCALE_BITS` significant bits; NaN and infinity stay what they are."""
    integer, digits = (torch.int32, 24) if scales.dtype == torch.float32 else (torch.int64, 53)
    unit = 1 << (digits - SCALE_BITS)
    return ((scales.view(integer) + (unit - 1)) & -unit).view(scales.dtype)
