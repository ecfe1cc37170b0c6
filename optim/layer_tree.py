"""The layers of a model as a tree, to see what a layer stands beside."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Size, nn

from lightning_muon.optim.matrix_layout import MatrixLayout
from lightning_muon.optim.wrapped_names import WRAPPED


@dataclass(frozen=True)
class Layer:
    """Describe a linear or convolutional layer.

    Args:
        path: Name of the module.
        shape: Of its weight.
        layout: Where the matrix is in the weight; the blocks of a layer are the groups of a convolution.
        tied: Whether the weight is also an embedding.
    """

    path: str
    shape: Size
    layout: MatrixLayout = field(default_factory=MatrixLayout)
    tied: bool = False

    @property
    def inputs(self) -> int:
        """Number of features or channels that the layer takes."""
        return self.shape[0] if self.layout.transposed else self.shape[1] * self.layout.blocks

    @property
    def outputs(self) -> int:
        """Number of features or channels that the layer gives."""
        return self.shape[1 if self.layout.transposed else 0]

    def fits(self, later: "Layer") -> bool:
        """Tell whether a later layer can take what this one gives, flattened between convolution and linear layer."""
        flattened = len(self.shape) > 2 and len(later.shape) == 2
        return later.inputs % self.outputs == 0 if flattened else later.inputs == self.outputs


@dataclass
class Part:
    """A module with layers in it, or a layer.

    Args:
        name: In the module around it.
        module: The module, without wrappers.
        children: The parts of the module, in the order of registration.
        layer: The layer, if the part is one.
    """

    name: str
    module: nn.Module
    children: dict[str, "Part"] = field(default_factory=dict)
    layer: Layer | None = None

    def layers(self) -> Iterator[Layer]:
        """Go through the layers, in the order of registration."""
        if self.layer:
            yield self.layer
        for child in self.children.values():
            yield from child.layers()


def layer_tree(model: nn.Module, layers: Iterable[Layer]) -> Part:
    """Arrange layers by the modules that hold them; modules without one of these layers are left out."""
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
