"""Output heads: the layers that give the output of a model, or of a network in it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Size, nn

from lightning_muon.optim.routing.wrapped_names import WRAPPED
from lightning_muon.optim.update.matrix_layout import MatrixLayout

_TIED = "output head, tied to an embedding"
_NAMED = "output head, by its name"
_LAST = "output head, the last layer of the model"

_HEAD_NAME = re.compile(
    r"(^|_)(heads?|classifiers?|(?<!pre_)logits|score|unembed|unembedding|embed_out"
    r"|(text|visual|vision|image|audio)_projection)$",  # the two outputs of CLIP and similar models
    re.IGNORECASE,
)
_ATTENTION_NAME = re.compile(r"(^|_)(att|attn|attention)($|_)", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"(Att|Attn|Attention|MHA)$")

_Containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
_Blocks = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer


@dataclass(frozen=True)
class Layer:
    """Describe a linear or convolutional layer.

    Args:
        path: Name of the module.
        shape: Shape of its weight.
        layout: Where the matrix is in the weight; ``blocks`` are the groups of a convolution.
        tied: Whether the weight is also an embedding.
    """

    path: str
    shape: Size
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    tied: bool = False

    @property
    def inputs(self) -> int:
        """Number of input features or channels."""
        return self.shape[0] if self.layout.transposed else self.shape[1] * self.layout.blocks

    @property
    def outputs(self) -> int:
        """Number of output features or channels."""
        return self.shape[1 if self.layout.transposed else 0]

    def fits(self, later: "Layer") -> bool:
        """Return whether a later layer can take the output of this one, flattened after a convolution."""
        flattened = len(self.shape) > 2 and len(later.shape) == 2
        return later.inputs % self.outputs == 0 if flattened else later.inputs == self.outputs


@dataclass
class Part:
    """A module, unwrapped, that contains layers, or is one.

    ``name`` is its name in the module around it; ``children`` are its parts, in the order of registration.
    """

    name: str
    module: nn.Module
    children: dict[str, "Part"] = field(default_factory=dict)
    layer: Layer | None = None

    def layers(self) -> Iterator[Layer]:
        """Yield the layers, in the order of registration."""
        if self.layer:
            yield self.layer
        for child in self.children.values():
            yield from child.layers()


def output_heads(model: nn.Module, layers: Iterable[Layer]) -> dict[str, str]:
    """Find the output heads among the layers of a model.

    A layer is a head if it is tied to an embedding, if its name says so, or if it is the last of a module whose name
    says so. In a model without these, the last layer in the order of registration is the head, together with layers
    beside it that take the same input, such as the mean and the deviation of a policy. Networks side by side, such as
    actor and critic, are judged one by one. Layers inside an attention or a repeated block are no heads.

    The layers are those that are trained or tied to an embedding, in the order of registration. Return the reason for
    each head, by the name of its module.
    """
    layers = list(layers)
    tied = {layer.path: _TIED for layer in layers if layer.tied}
    return _heads(_layer_tree(model, layers), is_end=True) | tied if layers else {}


def is_head_name(name: str) -> bool:
    """Return whether a module of this name is a head."""
    return bool(_HEAD_NAME.search(name))


def _heads(part: Part, *, is_end: bool) -> dict[str, str]:
    """Find the heads in a part; its last layer counts only at an end of the model. Tied layers are added later."""
    if part.layer:
        return {part.layer.path: _LAST} if is_end else {}
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
            heads |= dict.fromkeys(_heads(head, is_end=True), _NAMED)
    blocks = _blocks(part.module, children)
    for child in children:
        if child not in named and child not in blocks:
            heads |= _heads(child, is_end=child in ends)
    return heads


def _leads_on(head: Part, last: Part) -> bool:
    """Return whether a module named like a head comes before the output layer, as the transform of ModernBERT."""
    *_, output = head.layers()
    return bool(not head.layer and last.layer and output.fits(last.layer))


def _is_attention(part: Part) -> bool:
    if isinstance(part.module, nn.MultiheadAttention):
        return True
    # The class of a whole model may be named after its attention, so only named parts are judged by names.
    of_attention = _ATTENTION_CLASS.search(type(part.module).__name__) or _ATTENTION_NAME.search(part.name)
    return bool(part.name and of_attention)


def _ends(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that give the outputs of the module, where no name says so."""
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
    # It does not end in a single layer: each child is a network, unless it fits a later one, as encoder and decoder do.
    ends = [last]
    for index, child in enumerate(earlier):
        *trunk, output = child.layers()
        later = (next(other.layers()) for other in children[index + 1 :])
        if trunk and not any(output.fits(first) for first in later):
            ends.append(child)
    return ends


def _blocks(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that are blocks: in a list of modules, or chainable with a twin beside them."""
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
    """Return what twins have in common: their class or, for containers, the shapes inside."""
    if not isinstance(module, _Containers):
        return type(module)
    return [(type(part), [tuple(p.shape) for p in part.parameters(recurse=False)]) for part in module.modules()]


def _layer_tree(model: nn.Module, layers: Iterable[Layer]) -> Part:
    """Arrange layers by the modules that contain them; modules without one of these layers are left out."""
    root = Part("", model)
    for layer in layers:
        part, module = root, model
        for name in layer.path.split(".") if layer.path else []:
            module = module.get_submodule(name)
            if name in WRAPPED:
                part.module = module
            else:
                part = part.children.setdefault(name, Part(name, module))
        part.layer = layer
    return root
