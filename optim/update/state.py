"""The optimizer state of a parameter: its names, its dtypes, and averages that are stored in fewer bytes."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_muon.optim.update.options import MomentumDtype
from lightning_muon.optim.update.quantization import dynamic_codes, dynamic_values, linear_codes, linear_values

HALF = (torch.float16, torch.bfloat16)

ADAMW_STATE = frozenset({"exp_avg", "exp_avg_sq", "step"})
MUON_STATE = frozenset({"momentum_buffer", "neuron_mean_square"})
# The averages that ``momentum_dtype`` is about. Codes have a second entry in the state, with this suffix.
AVERAGES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
SCALES = "_scales"
# Smaller parameters of AdamW keep float32: they are sensitive, and take no memory; the bound of bitsandbytes,
# https://huggingface.co/docs/bitsandbytes/reference/optim/adamw (min_8bit_size).
SMALLEST_IN_CODES = 4096

# The state of a parameter, and that of each parameter, by its name.
State = MutableMapping[str, Any]
States = MutableMapping[Tensor, dict[str, Any]]


def state_names(group: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the state of a parameter in a group, in checkpoints."""
    if group["algorithm"] == "adamw":
        return ADAMW_STATE
    return MUON_STATE if group["neuron_beta"] is not None else MUON_STATE - {"neuron_mean_square"}


def state_dtype(name: str, param: Tensor, kept: MomentumDtype | None = None) -> torch.dtype:
    """Return the dtype in which a state is updated; it may be stored in fewer bytes.

    The momentum has the dtype of its parameter, but at least float32 for float16, whose range ends at 6e-8, and
    wherever ``momentum_dtype`` asks for another than that of the parameter. States that change little in a step, such
    as AdamW's averages, have at least float32.
    """
    return _state_dtype(name, param.dtype, kept)


@cache
def _state_dtype(name: str, of_param: torch.dtype, kept: MomentumDtype | None) -> torch.dtype:
    if name == "step":
        return torch.float32
    if name == "momentum_buffer" and of_param == torch.bfloat16 and kept in {None, "bfloat16"}:
        return torch.bfloat16
    return torch.promote_types(of_param, torch.float32)


def state_tensor(state: State, name: str, param: Tensor, dtype: torch.dtype, elements: int | None = None) -> Tensor:
    """Return the state ``name`` of a parameter; a missing one is added to ``state``, zero.

    It has the layout of the parameter, or the shape (elements,) where the ranks share it out (ZeRO-1); the number of
    steps is a scalar.
    """
    if name not in state:
        if name == "step":
            state[name] = torch.zeros((), dtype=dtype)
        elif elements is not None:
            state[name] = torch.zeros(elements, dtype=dtype, device=param.device)
        else:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    tensor: Tensor = state[name]
    return tensor


def stored_dtype(name: str, param: Tensor, kept: MomentumDtype | None) -> torch.dtype:
    """Return the dtype in which a state is stored: int8 for linear codes, uint8 for codes of the dynamic map."""
    if name in AVERAGES and kept == "int8" and not param.is_complex():
        if name == "momentum_buffer":
            return torch.int8
        if param.numel() >= SMALLEST_IN_CODES:
            return torch.uint8
    if name in AVERAGES and kept == "bfloat16" and not param.is_complex():
        return torch.bfloat16
    return state_dtype(name, param, kept)


@dataclass(slots=True)
class Average:
    """A moving average of elements of a parameter, stored as it is, rounded, or as codes of one byte.

    Args:
        name: Its name in the state.
        stored: The elements as they are stored.
        scales: The scales of the codes; ``None`` for other elements.
        dtype: The dtype in which it is updated.
    """

    name: str
    stored: Tensor
    scales: Tensor | None
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Return the values, to be updated in place and given to :meth:`save`."""
        if self.scales is None:
            return self.stored if self.stored.dtype == self.dtype else self.stored.to(self.dtype)
        if self.name == "momentum_buffer":
            return linear_values(self.stored, self.scales)
        return dynamic_values(self.stored, self.scales, signed=self.name == "exp_avg")

    def save(self, values: Tensor, gradient: Tensor | None = None) -> None:
        """Store updated values, in place.

        Codes of entries whose ``gradient`` is exactly zero are rounded towards zero.
        """
        if values is self.stored:
            return
        if self.scales is None:
            self.stored.copy_(values)
            return
        codes = encoded(self.name, values, gradient)
        self.stored.copy_(codes[self.name])
        self.scales.copy_(codes[self.name + SCALES])

    def rows(self, start: int, stop: int) -> "Average":
        """Return the average of some rows."""
        scales = None if self.scales is None else self.scales[start:stop]
        return replace(self, stored=self.stored[start:stop], scales=scales)


def encoded(name: str, values: Tensor, gradient: Tensor | None = None) -> State:
    """Return the codes of an average and their scales, by their names in the state; see :meth:`Average.save`."""
    still = None
    # A look ahead on a CPU, where it saves three passes; elsewhere it would wait for the device.
    if gradient is not None and not (gradient.is_cpu and gradient.count_nonzero() == gradient.numel()):
        still = gradient.reshape(values.shape) == 0
    if name == "momentum_buffer":
        codes, scales = linear_codes(values, still)
    elif name == "exp_avg":
        codes, scales = dynamic_codes(values, signed=True, still=still)
    else:
        codes, scales = dynamic_codes(values, signed=False)
    return {name: codes, name + SCALES: scales}


def read_together(averages: Sequence[Average | None]) -> list[Tensor | None]:
    """Return the values of averages, to be updated in place and given to :func:`save_together`; ``None`` for none."""
    values: list[Tensor | None] = [None] * len(averages)
    for places, members in _of_one_launch(averages):
        if len(members) == 1:
            values[places[0]] = members[0].read()
            continue
        first = members[0]
        scales = [member.scales for member in members if member.scales is not None]
        stored = _join_rows([member.stored for member in members])
        joined = Average(first.name, stored, torch.cat(scales) if scales else None, first.dtype)
        for place, value in zip(places, _split_rows(joined.read(), first.stored), strict=True):
            values[place] = value
    return values


def save_together(
    averages: Sequence[Average | None], values: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
) -> None:
    """Store values that :func:`read_together` returned, and that were updated, in place; see :meth:`Average.save`."""
    for places, members in _of_one_launch(averages):
        new = [value for place in places if (value := values[place]) is not None]
        of_gradients = [gradient for place in places if (gradient := gradients[place]) is not None]
        if len(members) == 1:
            members[0].save(new[0], of_gradients[0] if of_gradients else None)
            continue
        stored = [member.stored for member in members]
        scales = [member.scales for member in members if member.scales is not None]
        if not scales:
            torch._foreach_copy_(stored, new)
            continue
        name = members[0].name
        codes = encoded(name, _join_rows(new), _join_rows(of_gradients))
        torch._foreach_copy_(stored, _split_rows(codes[name], stored[0]))
        torch._foreach_copy_(scales, list(codes[name + SCALES].split(len(scales[0]))))


def _of_one_launch(averages: Sequence[Average | None]) -> Iterator[tuple[list[int], list[Average]]]:
    """Group averages, with their places. Stored ones of one shape are a group where launches take time, as on a GPU."""
    alike: dict[Any, tuple[list[int], list[Average]]] = {}
    for place, average in enumerate(averages):
        if average is not None:
            stored = average.stored
            is_joined = stored.dtype != average.dtype and not stored.is_cpu and stored.numel() > 0
            key = (average.name, stored.shape, stored.dtype, stored.device, average.dtype) if is_joined else place
            places, members = alike.setdefault(key, ([], []))
            places.append(place)
            members.append(average)
    yield from alike.values()


def _join_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Join tensors of one shape so that the rows of each stay rows; one of one dimension is a row."""
    return torch.stack(list(tensors)) if tensors[0].ndim < 2 else torch.cat(list(tensors))


def _split_rows(joined: Tensor, like: Tensor) -> list[Tensor]:
    """Undo :func:`_join_rows` for tensors of the shape of ``like``."""
    return list(joined.unbind() if like.ndim < 2 else joined.split(len(like)))
