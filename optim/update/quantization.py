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
# The bits of a float32 by which its dynamic code is looked up: sign, exponent, and nine of the fraction.
PATTERN_BITS = 18
# Values that are this much closer to zero than a code are still rounded to it where they are rounded towards zero.
# Otherwise every step would take a code from all entries of a block without gradient, whose scale decays with them:
# μ·code·scale differs from code·(μ·scale) by rounding, and by the bits that the scale has lost. It is above these and
# below the 1 − μ by which the entries of other blocks decay.
TOLERANCE = 2**-10


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
    low, high = _extremes(blocks)
    scales = _shortened((torch.maximum(high, -low) / LARGEST_CODE).clamp_min_(torch.finfo(values.dtype).tiny))
    codes = blocks / scales
    if still is not None:
        codes = torch.where(_blocks(still), (codes * (1 + TOLERANCE)).trunc_(), codes)
    return _unblocked(codes.round_().to(torch.int8), values.shape), scales.squeeze(-1)


def linear_values(codes: Tensor, scales: Tensor) -> Tensor:
    """Decode :func:`linear_codes`: the values in the dtype of the scales, in the shape of the codes."""
    if codes.numel() == 0:
        return codes.to(scales.dtype)
    # The product of both dtypes in one operation is 80 times slower on a CPU.
    return _unblocked(_blocks(codes).to(scales.dtype).mul_(scales.unsqueeze(-1)), codes.shape)


def dynamic_codes(values: Tensor, *, signed: bool, still: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Encode values as indices into :func:`dynamic_map`, relative to the largest value of their block.

    Values are rounded to the nearest entry; those that are ``still`` towards zero; positive values without sign never
    to zero, since AdamW divides by their root (down to 10⁻⁴⁰ of the largest). A block with NaN or infinity is decoded
    to NaN.

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
    low, high = _extremes(blocks)
    largest = torch.where(high >= -low, high, low)  # exactly one relative to itself, which the map contains
    relative = (blocks / torch.where(largest == 0, 1, largest)).float()
    patterns = _patterns(relative.flatten())
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


def _patterns(numbers: Tensor) -> Tensor:
    """Return the first :data:`PATTERN_BITS` bits of numbers in float32, which are overwritten, as integers."""
    shifted = numbers.view(torch.int32).bitwise_right_shift_(32 - PATTERN_BITS)
    return shifted.bitwise_and_((1 << PATTERN_BITS) - 1)


def _numbers() -> Tensor:
    """Return for each pattern the middle of its numbers, zero for zero, and one where they are not finite."""
    patterns = torch.arange(1 << PATTERN_BITS, dtype=torch.int32)
    rest = 32 - PATTERN_BITS
    numbers = ((patterns << rest) + (1 << (rest - 1))).view(torch.float32)
    numbers[patterns.bitwise_and((1 << (PATTERN_BITS - 1)) - 1) == 0] = 0.0
    return torch.where(numbers.isfinite(), numbers, 1.0)


@cache
def _nearest(signed: bool, device: torch.device) -> Tensor:
    """Return the code for each pattern."""
    entries = dynamic_map(signed, torch.device("cpu"))
    numbers = _numbers()
    codes = torch.bucketize(numbers, (entries[:-1] + entries[1:]) / 2)
    if not signed:
        codes = torch.where(numbers > 0, codes.clamp_min(1), 0)
    return codes.to(torch.uint8).to(device)


@cache
def _towards_zero(signed: bool, device: torch.device) -> Tensor:
    """Return the code of the next entry towards zero for each pattern."""
    entries = dynamic_map(signed, torch.device("cpu"))
    numbers = _numbers() * (1 + 2 * TOLERANCE)  # half of it for the numbers of a pattern, which differ by 2⁻⁹
    below = torch.bucketize(numbers, entries, right=True) - 1
    above = torch.bucketize(numbers, entries)
    codes = torch.where(numbers >= 0, below, above).clamp(0, 255)
    return codes.to(torch.uint8).to(device)


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


def _extremes(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest element of each block."""
    if blocks.is_cpu:  # where torch.aminmax takes 20 times as long
        return blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
    low, high = torch.aminmax(blocks, dim=-1, keepdim=True)
    return low, high


def _shortened(scales: Tensor) -> Tensor:
    """Cut positive numbers to :data:`SCALE_BITS` significant bits; NaN and infinity stay what they are.

    The largest element then is at most 127·(1 + 2⁻¹⁵) scales, which still is code 127.
    """
    integer, digits = (torch.int32, 24) if scales.dtype == torch.float32 else (torch.int64, 53)
    return (scales.view(integer) & -(1 << (digits - SCALE_BITS))).view(scales.dtype)
