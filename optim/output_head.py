"""Which layers of a model are its output heads."""

from collections.abc import Iterable

from torch import nn

_HEAD_NAMES = {"head", "heads", "lm_head", "classifier", "logits", "unembed", "unembedding", "embed_out", "score"}


def output_heads(model: nn.Module, layers: Iterable[str], tied: Iterable[str]) -> dict[str, str]:
    """Find the output heads among the layers of a model.

    What is tied to an embedding is a head, and so is what is called one. If there is neither, the last layer in the
    order of registration is, unless it is inside an attention or a block that repeats: then the model has no head.

    Args:
        model: The model.
        layers: Names of the modules with a matrix, in the order of registration.
        tied: Names of those whose weight is also an embedding.

    Returns:
        Reason by name of the module.
    """
    layers = list(layers)
    heads = dict.fromkeys(tied, "output head, tied to an embedding")
    for layer in layers:
        own_name, parent_name = ([""] * 2 + layer.split("."))[:-3:-1]
        if own_name in _HEAD_NAMES or parent_name == "heads":
            heads.setdefault(layer, "output head, by its name")
    if not heads and layers and not _inside_block(model, layers[-1]):
        heads[layers[-1]] = "output head, the last layer of the model"
    return heads


def _inside_block(model: nn.Module, layer: str) -> bool:
    """Tell whether a layer is part of an attention, or of a module that has a twin beside it."""
    path = layer.split(".")
    for depth in range(len(path)):
        ancestor = model.get_submodule(".".join(path[:depth]))
        if isinstance(ancestor, nn.MultiheadAttention):
            return True
        if depth == 0:
            continue
        siblings = model.get_submodule(".".join(path[: depth - 1])).children()
        if any(sibling is not ancestor and _anatomy(sibling) == _anatomy(ancestor) for sibling in siblings):
            return True
    return False


def _anatomy(module: nn.Module) -> list[tuple[type, list[tuple[int, ...]]]]:
    return [(type(part), [tuple(p.shape) for p in part.parameters(recurse=False)]) for part in module.modules()]
