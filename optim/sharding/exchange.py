"""How pieces of matrices get to their owners, and what the owners make of them back."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_muon.optim.orthogonalize import working_precision
from lightning_muon.optim.sharding.rounds import Piece, Round

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

COMMUNICATION_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def wire_dtype(source: Tensor, options: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype in which matrices and their polar factors travel.

    By default bfloat16 where nothing is lost that the orthogonalizer would use: where it computes in bfloat16, or the
    momentum has no more digits. Else float32; float64 for float64.

    Args:
        source: What is to be orthogonalized.
        options: Those of the parameter group.
    """
    if options["communication_dtype"] is not None:
        return COMMUNICATION_DTYPES[options["communication_dtype"]]
    if source.dtype == torch.float64:
        return torch.float64
    computes_in = working_precision(source, options["orthogonalizer"], options["orthogonalizer_options"].get("dtype"))
    return torch.bfloat16 if torch.bfloat16 in (source.dtype, computes_in) else torch.float32


def gather(round_: Round, sources: Sequence[Tensor], dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Send the pieces of a round to the owners of their matrices.

    Args:
        round_: What travels.
        sources: What this rank holds of each parameter in the round.
        dtype: In which it travels.

    Returns:
        A function that waits, and returns the elements (numel,) of each unit that this rank owns.
    """
    flat = [source.reshape(-1) for source in sources]

    def here(member: int, start: int, stop: int) -> Tensor:
        first = round_.shardings[member].held[0]
        return flat[member][start - first : stop - first]

    arriving: Callable[[], list[Tensor]] | None = None
    if round_.gathers:
        outgoing = [[here(p.member, p.start, p.stop) for p in pieces] for pieces in round_.to_owners]
        incoming = [sum(p.stop - p.start for p in pieces) for pieces in round_.from_holders]
        arriving = _all_to_all(round_.group, outgoing, incoming, dtype, flat[0].device)

    def assemble() -> list[Tensor]:
        units = []
        for member, unit in round_.owned:
            start, stop = unit.held[round_.rank]
            mine = here(member, start, stop)
            if stop - start < unit.numel:
                whole = mine.new_empty(unit.numel, dtype=dtype)
                whole[start - unit.start : stop - unit.start] = mine
                mine = whole
            units.append(mine)
        if arriving is not None:
            by_place = {
                (member, unit.start): elements for (member, unit), elements in zip(round_.owned, units, strict=True)
            }
            for pieces, received in zip(round_.from_holders, arriving(), strict=True):
                for p, elements in zip(pieces, received.split([p.stop - p.start for p in pieces]), strict=True):
                    by_place[p.member, p.unit.start][p.start - p.unit.start : p.stop - p.unit.start] = elements
        return units

    return assemble


def scatter(
    round_: Round, factors: Sequence[Tensor], norms: Sequence[Tensor] | None, dtype: torch.dtype, device: torch.device
) -> Callable[[], tuple[list[Tensor], dict[tuple[int, int], Tensor]]]:
    """Send polar factors from the owners to all who hold a piece of their matrices.

    Args:
        round_: What travels.
        factors: The elements (numel,) of the factor of each unit that this rank owns.
        norms: For each unit that this rank owns, a number for each of its matrices, (matrices,): it is sent along, in
            float32 whatever ``dtype`` is.
        dtype: In which factors travel. They are rounded to it on their owner too, so that copies stay equal.
        device: Where.

    Returns:
        A function that waits, and returns the elements of the factors that this rank holds, for each parameter in the
        round; and the numbers, by the position of the parameter and the start of the unit.
    """
    made: dict[tuple[int, int], Tensor] = {}
    known: dict[tuple[int, int], Tensor] = {}
    for number, (member, unit) in enumerate(round_.owned):
        made[member, unit.start] = factors[number] if unit.holder is not None else factors[number].to(dtype)
        if norms is not None:
            known[member, unit.start] = norms[number]
    words = max(1, 4 // dtype.itemsize)  # that a number in float32 takes

    def numbers(piece: Piece) -> int:
        return words * piece.unit.layout.count(piece.unit.shape) if norms is not None else 0

    arriving: Callable[[], list[Tensor]] | None = None
    if round_.scatters:
        outgoing: list[list[Tensor]] = []
        for pieces in round_.to_holders:
            outgoing.append([])
            for p in pieces:
                place = (p.member, p.unit.start)
                outgoing[-1].append(made[place][p.start - p.unit.start : p.stop - p.unit.start])
                if norms is not None:
                    outgoing[-1].append(_as_words(known[place], dtype))
        incoming = [sum(p.stop - p.start + numbers(p) for p in pieces) for pieces in round_.from_owners]
        arriving = _all_to_all(round_.group, outgoing, incoming, dtype, device)

    def assemble() -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
        held: list[list[tuple[int, Tensor]]] = [[] for _ in round_.members]
        for member, unit in round_.owned:
            start, stop = unit.held[round_.rank]
            held[member].append((start, made[member, unit.start][start - unit.start : stop - unit.start]))
        if arriving is not None:
            for pieces, received in zip(round_.from_owners, arriving(), strict=True):
                sizes = [size for p in pieces for size in (p.stop - p.start, numbers(p))]
                parts = iter(received.split(sizes))
                for p in pieces:
                    elements, sent = next(parts), next(parts)
                    held[p.member].append((p.start, elements))
                    if norms is not None:
                        known[p.member, p.unit.start] = _from_words(sent)
        empty = torch.empty(0, dtype=dtype, device=device)
        ordered = [[elements for _, elements in sorted(pieces, key=lambda piece: piece[0])] for pieces in held]
        return [torch.cat(pieces) if len(pieces) > 1 else (pieces or [empty])[0] for pieces in ordered], known

    return assemble


def _all_to_all(
    group: "ProcessGroup",
    outgoing: Sequence[Sequence[Tensor]],
    incoming: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Callable[[], list[Tensor]]:
    """Send tensors to each rank, packed into one; return a function that waits for what each rank has sent."""
    tensors = [tensor.to(dtype) for to_rank in outgoing for tensor in to_rank]
    packed = torch.cat(tensors) if tensors else torch.empty(0, dtype=dtype, device=device)
    received = torch.empty(sum(incoming), dtype=dtype, device=device)
    sizes = [sum(tensor.numel() for tensor in to_rank) for to_rank in outgoing]
    work = dist.all_to_all_single(received, packed, list(incoming), sizes, group=group, async_op=True)

    def wait() -> list[Tensor]:
        work.wait()
        return list(received.split(list(incoming)))

    return wait


def _as_words(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Write float32 numbers as elements of another dtype: bit by bit where that is shorter."""
    numbers = numbers.float()
    return numbers.view(dtype) if dtype.itemsize < 4 else numbers.to(dtype)


def _from_words(words: Tensor) -> Tensor:
    # A copy, because what comes out of the middle of a buffer need not be aligned.
    return words.clone().view(torch.float32) if words.element_size() < 4 else words.float()
