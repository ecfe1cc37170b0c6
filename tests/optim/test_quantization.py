"""Codes of one byte: their errors, what they keep exactly, and what they forget."""

import pytest
import torch
from torch import Tensor

from lightning_muon.optim.update.quantization import (
    BLOCK_ELEMENTS,
    LARGEST_CODE,
    block_count,
    dynamic_codes,
    dynamic_map,
    dynamic_values,
    linear_codes,
    linear_values,
)

CPU = torch.device("cpu")
SHAPES = [(64, 100), (3, 5000), (5, BLOCK_ELEMENTS + 1), (7,), (3 * BLOCK_ELEMENTS + 5,), (2, 3, 5), (1, 1), (4, 1)]
KINDS = ("linear", "dynamic", "dynamic, unsigned")


def encode(kind: str, values: Tensor, still: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if kind == "linear":
        return linear_codes(values, still)
    signed = kind == "dynamic"
    return dynamic_codes(values, signed=signed, still=still if signed else None)


def decode(kind: str, codes: Tensor, scales: Tensor) -> Tensor:
    return linear_values(codes, scales) if kind == "linear" else dynamic_values(codes, scales, signed=kind == "dynamic")


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, kind: str = "linear") -> Tensor:
    """Values over many orders of magnitude, not negative for the map without sign."""
    torch.manual_seed(0)
    values = torch.randn(shape, dtype=dtype) * torch.randn(shape, dtype=dtype).mul_(3).exp_()
    return values.abs_() if kind == "dynamic, unsigned" else values


def by_block(values: Tensor, scales: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The values of each block and its scale, by the definition: equal parts of each row, the last one shorter."""
    rows = values.reshape(scales.shape[0], -1)
    size = -(-rows.shape[1] // scales.shape[1])
    return [
        pair for row, of_row in zip(rows, scales, strict=True) for pair in zip(row.split(size), of_row, strict=True)
    ]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_codes_are_off_by_half_a_step(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = some(shape, dtype)
    codes, scales = linear_codes(values)
    assert codes.dtype == torch.int8
    assert codes.shape == values.shape
    assert scales.dtype == dtype
    assert scales.shape == block_count(values.shape)
    assert values.numel() / scales.numel() <= BLOCK_ELEMENTS
    errors = (linear_values(codes, scales) - values).abs()
    for (error, scale), (block, _), (of_block, _) in zip(
        by_block(errors, scales), by_block(values, scales), by_block(codes, scales), strict=True
    ):
        assert scale == pytest.approx(float(block.abs().max()) / LARGEST_CODE, rel=2**-15)
        assert of_block.abs().max() == LARGEST_CODE
        assert error.max() <= scale * (0.5 + LARGEST_CODE * 2**-15)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_codes_are_off_by_half_the_distance_of_two_entries(shape: tuple[int, ...], signed: bool) -> None:
    values = some(shape, kind="dynamic" if signed else "dynamic, unsigned")
    codes, largest = dynamic_codes(values, signed=signed)
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape
    found = dynamic_values(codes, largest, signed=signed)
    per_decade = 64 if signed else 128
    for (block, scale), (decoded, _) in zip(by_block(values, largest), by_block(found, largest), strict=True):
        assert block.abs().max() == scale.abs()
        assert decoded[block == scale].eq(scale).all()  # exactly
        relative, error = (block / scale).abs(), ((decoded - block) / scale).abs()
        for decade in range(6):  # from the uppermost; in the last one the entry 0 is a neighbour
            inside = (relative > 10.0 ** -(decade + 1)) & (relative <= 10.0**-decade)
            half = 0.45 * 10.0**-decade / (per_decade >> decade)
            if inside.any():
                # Codes are looked up by ten significant bits. The neighbour below a decade is closer.
                assert (error[inside] <= half * 1.001 + relative[inside] * 2**-10).all()
        assert (error <= 1e-6)[relative < 1e-6].all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_is_the_published_one(signed: bool) -> None:
    """Leading zeros count the exponent, a one ends them, and the other bits are a linear fraction (section 1.3)."""
    bits = 7 if signed else 8  # without the sign
    expected = [0.0, 1.0]
    for exponent in range(7):
        fractions = 2 ** (bits - 1 - exponent)
        magnitudes = [10.0**-exponent * (0.1 + 0.9 * (i + 0.5) / fractions) for i in range(fractions)]
        expected += magnitudes + ([-m for m in magnitudes] if signed else [])
    assert len(expected) == 256
    torch.testing.assert_close(
        dynamic_map(signed, CPU), torch.tensor(sorted(expected), dtype=torch.float64).float(), atol=0, rtol=2e-7
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_what_was_decoded_is_encoded_alike(kind: str, dtype: torch.dtype, scale: float) -> None:
    """So that a checkpoint of decoded values resumes exactly, also after values that were rounded towards zero."""
    for shape in SHAPES:
        values = some(shape, dtype, kind) * scale
        for still in (None, torch.rand(shape) < 0.5, torch.ones(shape, dtype=torch.bool)):
            codes, scales = encode(kind, values, still)
            decoded = decode(kind, codes, scales)
            again, scales_again = encode(kind, decoded)
            assert torch.equal(codes, again)
            assert torch.equal(scales, scales_again)
            assert torch.equal(decoded, decode(kind, again, scales_again))


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_numbers_decode_alike(kind: str) -> None:
    for exponent in range(36, 46):
        values = some((9, 70), kind=kind) * 10.0**-exponent
        decoded = decode(kind, *encode(kind, values))
        assert decoded.isfinite().all()
        assert torch.equal(decoded, decode(kind, *encode(kind, decoded)))
        assert (decoded - values).abs().max() <= values.abs().max() * 0.02 + 2e-38


@pytest.mark.parametrize("kind", KINDS)
def test_largest_finite_values_stay_finite(kind: str) -> None:
    largest = torch.finfo(torch.float32).max
    values = torch.tensor([[largest, largest / 2, 0.0]])
    decoded = decode(kind, *encode(kind, values))
    assert decoded.isfinite().all()
    torch.testing.assert_close(decoded, values, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_encoded_each_by_itself(kind: str) -> None:
    """The codes of a shard of whole rows are those of the whole tensor."""
    values = some((6, 2, BLOCK_ELEMENTS), kind=kind)
    codes, scales = encode(kind, values)
    for start, stop in ((0, 1), (1, 4), (4, 6), (6, 6)):
        of_shard, scales_of_shard = encode(kind, values[start:stop])
        assert torch.equal(of_shard, codes[start:stop])
        assert torch.equal(scales_of_shard.flatten(), scales[start:stop].flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_the_layout_in_memory_makes_no_difference(kind: str) -> None:
    values = some((8, 6, 5, 4), kind=kind)
    for other in (values.to(memory_format=torch.channels_last), values.transpose(1, 2).contiguous().transpose(1, 2)):
        for one, two in zip(encode(kind, other), encode(kind, values), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (2, 0, 4)])
def test_nothing_is_encoded_as_nothing(kind: str, shape: tuple[int, ...]) -> None:
    codes, scales = encode(kind, torch.zeros(shape))
    assert codes.shape == shape
    assert scales.numel() == 0
    assert decode(kind, codes, scales).shape == shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_of_zeros_is_zero(kind: str) -> None:
    values = some((3, 2 * BLOCK_ELEMENTS), kind=kind)
    values[1, :BLOCK_ELEMENTS] = 0
    decoded = decode(kind, *encode(kind, values))
    assert decoded[1, :BLOCK_ELEMENTS].eq(0).all()
    assert decoded[1, BLOCK_ELEMENTS:].ne(0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_finite_spoils_its_block_alone(kind: str, bad: float, dtype: torch.dtype) -> None:
    values = some((3, 2 * BLOCK_ELEMENTS), dtype, kind)
    expected = decode(kind, *encode(kind, values))
    values[1, 7] = bad
    decoded = decode(kind, *encode(kind, values))
    spoiled = torch.zeros_like(values, dtype=torch.bool)
    spoiled[1, :BLOCK_ELEMENTS] = True
    assert not decoded[spoiled].isfinite().any()
    assert torch.equal(decoded[~spoiled], expected[~spoiled])
    # It stays so when it is saved and loaded, whatever bits NaN has: CUDA sets them all.
    decoded.view(torch.int32 if dtype == torch.float32 else torch.int64)[spoiled] |= (
        0x7FFFFFFF if dtype == torch.float32 else 0x7FFFFFFFFFFFFFFF
    )
    assert decoded[spoiled].isnan().all()
    assert decode(kind, *encode(kind, decoded))[spoiled].isnan().all()


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.parametrize("decay", [0.9, 0.95, 0.98])
def test_entries_without_gradient_are_forgotten(kind: str, decay: float) -> None:
    """A small code times the decay would be rounded to itself, and the entry would never become zero."""
    codes, scales = encode(kind, torch.randn(4, 300, generator=torch.Generator().manual_seed(0)))
    still = torch.zeros(4, 300, dtype=torch.bool)
    still[:, ::3] = True
    for step in range(400):
        torch.manual_seed(step)
        arrived = torch.randn(4, 300).masked_fill(still, 0)
        codes, scales = encode(kind, decode(kind, codes, scales).lerp(arrived, 1 - decay), still)
    decoded = decode(kind, codes, scales)
    assert decoded[still].eq(0).all()
    assert decoded[~still].ne(0).float().mean() > 0.9


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_a_block_without_gradient_decays_with_its_scale(kind: str) -> None:
    """Its entries keep their ratios: they are not rounded towards zero again in every step."""
    first, scales = encode(kind, some((20, 700)))
    start, codes = decode(kind, first, scales), first
    for _ in range(200):
        values = decode(kind, codes, scales).lerp(torch.zeros(20, 700), 1 - 0.95)
        codes, scales = encode(kind, values, torch.ones(20, 700, dtype=torch.bool))
    assert torch.equal(codes, first)
    torch.testing.assert_close(decode(kind, codes, scales) / 0.95**200, start, rtol=200 * 2**-15, atol=0)


def test_a_second_moment_stays_positive() -> None:
    """AdamW divides by its root."""
    values = torch.tensor([1.0, 1e-3, 1e-7, 1e-12, 1e-38, 0.0])
    found = dynamic_values(*dynamic_codes(values, signed=False), signed=False)
    assert found[:-1].gt(0).all()
    assert found[-1] == 0
    assert found[2:-1].max() < 1e-6
