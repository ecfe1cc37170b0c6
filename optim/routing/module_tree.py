"""The modules of a model that contain layers, as a tree; which of them are blocks, attention, or lists side by side."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from torch import Size, nn

from lightning_muon.optim.routing.wrapped_names import WRAPPED
from lightning_muon.optim.update.matrix_layout import MatrixLayout

_ATTENTION_NAME = re.compile(r"(^|_)(att|attn|attention)($|_)", re.IGNORECASE)
_ATTENTION_CLASS = re.compile(r"(Att|Attn|Attention|MHA)$")

_Containers = nn.Sequential | nn.ModuleList | nn.ModuleDict
_Blocks = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
IMAGE_CHANNELS = 4
"""Channels of an image at most: narrower than any stream of features that blocks pass on."""


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


@dataclass(eq=False)
class Part:
    """A module, unwrapped, that contains layers, or is one.

    ``path`` is its name in the model; ``children`` are its parts by their names, in the order of registration.
    """

    path: str
    module: nn.Module
    children: dict[str, "Part"] = field(default_factory=dict)
    layer: Layer | None = None

    def layers(self) -> Iterator[Layer]:
        """Yield the layers, in the order of registration."""
        if self.layer:
            yield self.layer
        for child in self.children.values():
            yield from child.layers()

    @property
    def name(self) -> str:
        """Its name in the module around it."""
        return self.path.rpartition(".")[2]

    @cached_property
    def paths(self) -> frozenset[str]:
        """The names of its layers."""
        return frozenset(layer.path for layer in self.layers())

    @property
    def is_attention(self) -> bool:
        """Whether it is an attention, of whose layers none gives an output of the model."""
        if isinstance(self.module, nn.MultiheadAttention):
            return True
        # The class of a whole model may be named after its attention, so only named parts are judged by names.
        of_attention = _ATTENTION_CLASS.search(type(self.module).__name__) or _ATTENTION_NAME.search(self.name)
        return bool(self.name and of_attention)

    @property
    def is_residual(self) -> bool:
        """Whether it gives the width that it takes, although its last layer is a wider one."""
        first, *_, last = [next(self.layers()), *self.layers()]
        return last.outputs > first.inputs and any(layer.fits(first) for layer in self.layers())

    @property
    def is_chain(self) -> bool:
        """Whether each of its layers can take the output of the one before."""
        return all(layer.fits(later) for layer, later in pairwise(self.layers()))

    @property
    def has_embedding(self) -> bool:
        """Whether there is an embedding in it."""
        return any(isinstance(module, nn.Embedding) for module in self.module.modules())

    @property
    def is_image_to_image(self) -> bool:
        """Whether it is a network that turns an image into an image."""
        layers = list(self.layers())
        return len(layers) > 1 and layers[0].inputs == layers[-1].outputs <= IMAGE_CHANNELS


def layer_tree(model: nn.Module, layers: Iterable[Layer]) -> Part:
    """Arrange layers by the modules that contain them; modules without one of these layers are left out."""
    root = Part("", model)
    for layer in layers:
        part, module = root, model
        for name in layer.path.split(".") if layer.path else []:
            module = module.get_submodule(name)
            if name in WRAPPED:
                part.module = module
            else:
                part = part.children.setdefault(name, Part(f"{part.path}.{name}".lstrip("."), module))
        part.layer = layer
    return root


def blocks_among(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that are repeated blocks.

    A block gives the width that it takes, and is in a list of modules or beside a twin. In a list, a module with
    attention is a block as well. Twins that take one width and give another, as the members of an ensemble, are
    networks, and so are those that turn images into images. Twins of which each takes what the one before took and gave
    are blocks too.
    """
    candidates = [child for child in children if not child.layer]
    listed = isinstance(module, nn.ModuleList | nn.Sequential)
    kinds = [_anatomy(child.module) for child in candidates]
    blocks = _concatenating(candidates)
    for child, kind in zip(candidates, kinds, strict=True):
        first, *_, last = [next(child.layers()), *child.layers()]
        chains = (last.fits(first) or (listed and child.is_residual)) and not child.is_image_to_image
        repeated = kinds.count(kind) > 1 or isinstance(module, nn.ModuleList)
        is_new = child not in blocks
        if is_new and (isinstance(child.module, _Blocks) or (chains and repeated) or (listed and _attends(child))):
            blocks.append(child)
    return blocks


def is_chain(children: Sequence[Part]) -> bool:
    """Return whether each of some modules can take the output of the one before."""
    ends = [(next(child.layers()), [*child.layers()][-1]) for child in children]
    # A convolution on the edges of a graph takes both nodes of an edge.
    return all(last.fits(first) or first.inputs == 2 * last.outputs for (_, last), (first, _) in pairwise(ends))


def _concatenating(children: Sequence[Part]) -> list[Part]:
    """Return modules of one class, three at least in a row, of which each takes what the one before took and gave."""
    ends = [(next(child.layers()), [*child.layers()][-1], type(child.module)) for child in children]
    joined = [
        kind is later_kind and later.inputs == first.inputs + last.outputs
        for (first, last, kind), (later, _, later_kind) in pairwise(ends)
    ]
    runs = [joined[index - 1 : index + 1] == [True, True] for index in range(1, len(joined))]
    return [child for index, child in enumerate(children) if any(runs[max(index - 2, 0) : index + 1])]


def _attends(part: Part) -> bool:
    """Return whether a module contains attention, other than in a list of blocks of its own."""
    if part.is_attention:
        return True
    return any(_attends(child) for child in part.children.values() if not isinstance(child.module, _Containers))


def _anatomy(module: nn.Module) -> object:
    """Return what twins have in common: their class or, for containers, the shapes inside."""
    if not isinstance(module, _Containers):
        return type(module)
    return [(type(part), [tuple(p.shape) for p in part.parameters(recurse=False)]) for part in module.modules()]
