"""The repeated modules of a model, which are the layers of nearly every one."""

from collections import Counter
from collections.abc import Callable, Iterator

from torch import nn

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def repeated_modules(
    module: nn.Module, counts: Callable[[nn.Module], bool], prefix: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules whose class occurs at least twice in one list, with their names; of nested ones the outermost.

    A list is a ``ModuleList``, a ``ModuleDict`` or a ``Sequential``.

    Args:
        module: The model, which is never yielded itself.
        counts: Whether a module may be one of them, such as one with parameters.
        prefix: What the names begin with.
    """
    children = dict(module.named_children())
    numbers = Counter(type(child) for child in children.values() if counts(child))
    for name, child in children.items():
        if isinstance(module, _LISTS) and numbers[type(child)] > 1 and counts(child):
            yield f"{prefix}{name}", child
        else:
            yield from repeated_modules(child, counts, f"{prefix}{name}.")
