"""Begin a module with weights of another run: weights only, so optimizer and schedule are new."""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_muon.optim.routing.wrapped_names import plain_name
from lightning_muon.strategies.model_state import shard_like
from lightning_muon.strategies.weights import SavedWeights

_EXAMPLES = 2  # of each kind of difference


def start_from(module: nn.Module, saved: SavedWeights, fresh: Sequence[str] = ()) -> str:
    """Copy weights into a module, or into the network in it.

    The network is the argument of the module that the weights come from, if it is the same here; else the child module,
    or the module itself, that shares the most names with them.

    Args:
        module: The module, sharded or not; of its tensors it keeps dtype and device.
        saved: The weights, from :func:`~lightning_muon.strategies.read_weights`.
        fresh: Patterns for names of weights that stay as they are, such as ``head.*``.

    Returns:
        How many weights were copied, as a phrase.

    Raises:
        ValueError: If names or shapes differ, or a pattern matches nothing; nothing is copied then.
    """
    network = _network(module, saved)
    own = {plain_name(name): value for name, value in network.state_dict().items()}
    names = {*own, *saved.tensors}
    for pattern in fresh:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no weight has a name like {pattern!r}; there are {', '.join(sorted(names)[:4])}, …")
    left = {name for name in names if any(fnmatchcase(name, pattern) for pattern in fresh)}
    given = {name: value for name, value in saved.tensors.items() if name not in left}
    problems = list(_differences({name: value for name, value in own.items() if name not in left}, given))
    if problems:
        raise ValueError(f"it does not fit {type(network).__name__}: {'; '.join(problems)}")
    with torch.no_grad():
        for name, value in given.items():
            if isinstance(value, Tensor):
                own[name].copy_(shard_like(value, own[name]))
    extra = {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    if extra:
        network.load_state_dict(extra, strict=False)
    kept = f", {len(left & own.keys())} as they were" if left else ""
    return f"{len(given)} weights of {type(network).__name__}{kept}"


def _network(module: nn.Module, saved: SavedWeights) -> nn.Module:
    children = dict(module.named_children())
    if saved.argument in children:
        return children[saved.argument]

    def shared(candidate: nn.Module) -> int:
        return len({plain_name(name) for name in candidate.state_dict()} & saved.tensors.keys())

    # Of equal ones the first: `net`, if there is one.
    candidates = sorted(children, key=lambda name: name != "net")
    return max([*(children[name] for name in candidates), module], key=shared)


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    shapes = [
        f"{name} is {_size(value)} there and {_size(own[name])} here"
        for name, value in given.items()
        if isinstance(own.get(name), Tensor) and _size(value) != _size(own[name])
    ]
    yield from _told("of another shape", shapes)
    # What is tied to a weight that is given is given too.
    places = {_place(own[name]) for name in given if name in own} - {None}
    yield from _told("only here", [name for name in own if name not in given and _place(own[name]) not in places])
    yield from _told("only there", [name for name in given if name not in own])
    by_place: dict[Any, str] = {}
    two = []
    for name, value in given.items():
        place = _place(own.get(name))
        other = name if place is None else by_place.setdefault(place, name)
        if other != name and not shapes and not torch.equal(value, given[other]):
            two.append(f"{other} and {name}")
    yield from _told("tied here but not there", two)


def _place(value: Any) -> Any:
    """Return what is equal for two names of one weight; ``None`` where there are no elements."""
    if not isinstance(value, Tensor):
        return None
    local = getattr(value, "_local_tensor", value)
    return (local.data_ptr(), tuple(value.shape)) if local.numel() else None


def _size(value: Any) -> str:
    return "×".join(map(str, value.shape)) or "a number" if isinstance(value, Tensor) else "no tensor"


def _told(what: str, names: list[str]) -> Iterator[str]:
    if names:
        more = ", …" if len(names) > _EXAMPLES else ""
        yield f"{len(names)} {what} ({', '.join(names[:_EXAMPLES])}{more})"
