"""Which layers of a model are its output heads."""

import re
from collections.abc import Iterable, Sequence

from torch import nn

from lightning_muon.optim.layer_tree import Layer, Part, layer_tree

_TIED = "output head, tied to an embedding"
_NAMED = "output head, by its name"
_LAST = "output head, the last layer of the model"

_HEAD_NAME = re.compile(
    r"(^|_)(heads?|classifiers?|(?<!pre_)logits|score|unembed|unembedding|embed_out"
    r"|(text|visual|vision|image|audio)_projection)$",  # the two ends of CLIP and its kin
    re.IGNORECASE,
)
_ATTENTION_NAME = re.compile(r"(^|_)(att|attn|attention)($|_)", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"(Att|Attn|Attention|MHA)$")

_Containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
_Blocks = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer


def output_heads(model: nn.Module, layers: Iterable[Layer]) -> dict[str, str]:
    """Find the output heads among the layers of a model.

    What is tied to an embedding is a head, and so is what is called one, or ends a module that is called one. If a
    model has neither, its last layer in the order of registration is, together with those beside it that take the
    same input, as for the mean and the deviation of a policy. Networks side by side, such as actor and critic, are
    judged one by one. What is inside an attention or a block that repeats is no head.

    Args:
        model: The model.
        layers: The layers that are trained, and those that are tied to an embedding, in the order of registration.

    Returns:
        Reason by name of the module.
    """
    layers = list(layers)
    tied = {layer.path: _TIED for layer in layers if layer.tied}
    return _heads(layer_tree(model, layers), is_end=True) | tied if layers else {}


def is_head_name(name: str) -> bool:
    """Tell whether a module of this name is a head."""
    return bool(_HEAD_NAME.search(name))


def _heads(part: Part, *, is_end: bool) -> dict[str, str]:
    """Find the heads in a part of the model; its last layer counts only where the part is an end of the model."""
    if part.layer:
        return {part.layer.path: _TIED if part.layer.tied else _LAST} if is_end or part.layer.tied else {}
    if _is_attention(part):
        return {}
    children = list(part.children.values())
    named = [child for child in children if is_head_name(child.name) and not _leads_on(child, children[-1])]
    tied = any(child.layer and child.layer.tied for child in children)
    ends = _ends(part.module, children) if is_end and not named and not tied else []

    heads: dict[str, str] = {}
    for child in named:
        several = isinstance(child.module, nn.ModuleList | nn.ModuleDict)
        for head in child.children.values() if several else [child]:
            heads |= {path: _NAMED if reason == _LAST else reason for path, reason in _heads(head, is_end=True).items()}
    blocks = _blocks(part.module, children)
    for child in children:
        if child not in named and child not in blocks:
            heads |= _heads(child, is_end=child in ends)
    return heads


def _leads_on(head: Part, last: Part) -> bool:
    """Tell whether a module that is called a head comes before the output layer, as the transform of ModernBERT."""
    *_, output = head.layers()
    return bool(not head.layer and last.layer and not is_head_name(last.name) and output.fits(last.layer))


def _is_attention(part: Part) -> bool:
    if isinstance(part.module, nn.MultiheadAttention):
        return True
    # A whole model may be called after its attention: only what has a name in it is judged by names.
    of_attention = _ATTENTION_CLASS.search(type(part.module).__name__) or _ATTENTION_NAME.search(part.name)
    return bool(part.name and of_attention)


def _ends(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that give something out of the module, where no name tells it."""
    *earlier, last = children
    if isinstance(module, nn.Sequential | nn.ModuleList):
        return [last]
    final = list(last.layers())
    if len(final) == 1:
        ends = [last]
        for child in reversed(earlier):
            beside = list(child.layers())
            if len(beside) > 1 or beside[0].inputs != final[0].inputs or beside[0].fits(final[0]):
                break
            ends.append(child)
        return ends
    # No single layer ends it: then each child is a network, unless it fits a later one, as encoder and decoder do.
    ends = [last]
    for index, child in enumerate(earlier):
        *trunk, output = child.layers()
        later = (next(other.layers()) for other in children[index + 1 :])
        if trunk and not any(output.fits(first) for first in later):
            ends.append(child)
    return ends


def _blocks(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that are blocks: in a list of modules, or fit to be chained and with a twin beside them."""
    candidates = [child for child in children if not child.layer]
    if isinstance(module, nn.ModuleList):
        return candidates
    anatomies = [_anatomy(child.module) for child in candidates]
    blocks = []
    for child, anatomy in zip(candidates, anatomies, strict=True):
        first, *_, last = [next(child.layers()), *child.layers()]
        if isinstance(child.module, _Blocks) or (anatomies.count(anatomy) > 1 and last.fits(first)):
            blocks.append(child)
    return blocks


def _anatomy(module: nn.Module) -> object:
    """Return what twins have in common: their class or, as containers are all of one class, the shapes inside."""
    if not isinstance(module, _Containers):
        return type(module)
    return [(type(part), [tuple(p.shape) for p in part.parameters(recurse=False)]) for part in module.modules()]
