"""The all-to-alls of a bucket: pieces of matrices to their owners, and polar factors back."""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.optim.polar.orthogonalize import working_precision
from lightning_muon.optim.sharding.buckets import Bucket, Piece
from lightning_muon.optim.update.muon import Stages
from lightning_muon.optim.update.options import MuonOptions

COMMUNICATION_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}

# How many buckets are under way at a time: one arrives, one is orthogonalized, one returns.
STAGES = 3
# Numbers of the matrices or neurons of units, by Piece.key.
UnitNumbers = dict[tuple[int, int], Tensor]


def overlap(steps: Iterable[Iterator[None]]) -> None:
    """Run steps that pause at most twice, while something is on its way, each one stage behind the step before it.

    The newest goes first, so that its data travels while the older ones compute. The order of all stages depends only
    on the number of steps, so ranks that run the same steps issue the same collectives.
    """
    under_way: list[Iterator[None]] = []
    for step in [*steps, *(iter(()) for _ in range(STAGES - 1))]:
        under_way = [step, *under_way[: STAGES - 1]]
        for stage in under_way:
            next(stage, None)


def wire_dtype(source: Tensor, options: MuonOptions) -> torch.dtype:
    """Return the dtype in which the matrices in ``source`` and their polar factors travel.

    The default is bfloat16 where this loses nothing that the orthogonalizer would use: where it computes in bfloat16,
    or ``source`` has no more digits. Else it is float32, or float64 for float64.
    """
    if options["communication_dtype"] is not None:
        return COMMUNICATION_DTYPES[options["communication_dtype"]]
    if source.dtype == torch.float64:
        return torch.float64
    computes_in = working_precision(source, options["orthogonalizer"], options["orthogonalizer_options"].get("dtype"))
    return torch.bfloat16 if torch.bfloat16 in (source.dtype, computes_in) else torch.float32


def gather(
    bucket: Bucket, sources: Sequence[Tensor], moving: UnitNumbers, dtype: torch.dtype
) -> Stages[tuple[list[Tensor], list[Tensor]]]:
    """Send the pieces of a bucket to the owners of their matrices, in ``dtype``; pause while they are on their way.

    Args:
        bucket: What travels together.
        sources: This rank's shards of the parameters.
        moving: For each piece of this rank, which matrices of its unit have a gradient there, shape (matrices,). It
            travels along, so that the owner has what the ranks have found together.
        dtype: The dtype on the wire.

    Returns:
        The elements (numel,) of each unit that this rank owns, and which of its matrices move.
    """
    arriving = None
    if bucket.gathers:
        outgoing = [
            [t for p in pieces for t in (bucket.take(p, sources), moving[p.key])] for pieces in bucket.to_owners
        ]
        incoming = [sum(p.numel + p.unit.count for p in pieces) for pieces in bucket.from_shards]
        arriving = _all_to_all(bucket.group, outgoing, incoming, dtype, sources[0].device)
    yield

    units: dict[tuple[int, int], Tensor] = {}
    found: UnitNumbers = {}
    for p in bucket.here:
        if p.unit.owner == bucket.rank:
            elements = bucket.take(p, sources)
            if p.numel < p.unit.numel:
                whole = elements.new_empty(p.unit.numel, dtype=dtype)
                whole[p.in_unit] = elements
                elements = whole
            units[p.key] = elements
            found[p.key] = moving[p.key] if p.numel else elements.new_zeros(p.unit.count, dtype=torch.bool)
    if arriving is not None:
        for pieces, received in zip(bucket.from_shards, arriving(), strict=True):
            parts = iter(received.split([size for p in pieces for size in (p.numel, p.unit.count)]))
            for p in pieces:
                units[p.key][p.in_unit] = next(parts)
                found[p.key] = found[p.key] | (next(parts) != 0)
    return list(units.values()), list(found.values())


def scatter(
    bucket: Bucket, factors: Sequence[Tensor], numbers: UnitNumbers | None, dtype: torch.dtype, device: torch.device
) -> Stages[tuple[list[Tensor], UnitNumbers | None]]:
    """Send polar factors from the owners to the shards of their matrices; pause while they are on their way.

    Args:
        bucket: What travels together.
        factors: The elements (numel,) of the factor of each unit that this rank owns.
        numbers: Those of the matrices in the units that this rank owns, such as nuclear norms; they travel along, in
            float32 for every ``dtype``.
        dtype: The dtype on the wire. Owners round their factors to it too, so that replicas stay equal.
        device: The device of the result.

    Returns:
        The elements of the factors in this rank's shard of each parameter in the bucket, and the numbers of all units
        in these shards.
    """
    made = {
        (member, unit.start): factor if unit.only_rank is not None else factor.to(dtype)
        for (member, unit), factor in zip(bucket.owned, factors, strict=True)
    }
    words = max(1, 4 // dtype.itemsize)  # elements on the wire for a number in float32

    def number_words(piece: Piece) -> int:
        return words * piece.unit.count if numbers is not None else 0

    arriving = None
    if bucket.scatters:
        outgoing: list[list[Tensor]] = []
        for pieces in bucket.to_shards:
            outgoing.append([])
            for p in pieces:
                outgoing[-1].append(made[p.key][p.in_unit])
                if numbers is not None:
                    outgoing[-1].append(_as_words(numbers[p.key], dtype))
        incoming = [sum(p.numel + number_words(p) for p in pieces) for pieces in bucket.from_owners]
        arriving = _all_to_all(bucket.group, outgoing, incoming, dtype, device)
    yield

    found = {p.key: made[p.key][p.in_unit] for p in bucket.here if p.unit.owner == bucket.rank}
    if arriving is not None:
        for pieces, received in zip(bucket.from_owners, arriving(), strict=True):
            parts = iter(received.split([size for p in pieces for size in (p.numel, number_words(p))]))
            for p in pieces:
                found[p.key], sent = next(parts), next(parts)
                if numbers is not None:
                    numbers[p.key] = _from_words(sent)
    empty = torch.empty(0, dtype=dtype, device=device)
    shards: list[list[Tensor]] = [[] for _ in bucket.members]
    for p in bucket.here:
        if p.numel:
            shards[p.member].append(found[p.key])
    return [torch.cat(pieces) if len(pieces) > 1 else (pieces or [empty])[0] for pieces in shards], numbers


def _all_to_all(
    group: "dist.ProcessGroup",
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], list[Tensor]]:
    """Send tensors to each rank, packed into one; return a function that waits and returns what each rank has sent."""
    tensors = [tensor.to(dtype) for to_rank in outgoing for tensor in to_rank]
    packed = torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype, device=device)
    received = torch.empty(sum(incoming), dtype=dtype, device=device)
    sizes = [sum(tensor.numel() for tensor in to_rank) for to_rank in outgoing]
    work = dist.all_to_all_single(received, packed, list(incoming), sizes, group=group, async_op=True)

    # Not every backend keeps what it sends until it has left, and the allocator would hand out its memory again.
    def wait(_sent: Tensor = packed) -> list[Tensor]:
        work.wait()
        return list(received.split(list(incoming)))

    return wait


def _as_words(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Write float32 numbers as elements of another dtype, bit by bit where that has fewer bits."""
    numbers = numbers.float()
    return numbers.view(dtype) if dtype.itemsize < 4 else numbers.to(dtype)


def _from_words(words: Tensor) -> Tensor:
    # A copy, because a slice of a buffer need not be aligned.
    return words.clone().view(torch.float32) if words.element_size() < 4 else words.float()
