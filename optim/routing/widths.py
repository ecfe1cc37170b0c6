"""Which widths the modules of a model take and give: who could use the output of a layer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torch import nn

from lightning_muon.optim.routing.module_tree import IMAGE_CHANNELS, Layer

Use = Literal["none", "raw", "earlier", "part", "taken"]
"""Who may use the output of a layer.

- ``none``: no module takes its width;
- ``raw``: only modules that take the inputs of the model, as where an autoencoder gives what it was given;
- ``earlier``: modules that were registered before it, as where the width is that of the residual stream;
- ``part``: later modules, with other outputs beside it, or a part of it: where outputs are joined or cut;
- ``taken``: a later module.
"""
_VOCABULARY = 1000  # rows that make a table one of a vocabulary, beside a larger one
_CUTS = range(2, 10)  # shift, scale and gate of adaptive norms cut an output into up to nine


@dataclass(frozen=True)
class Module:
    """A module with parameters, in the order of registration.

    Args:
        path: Its name.
        takes: Widths of its inputs.
        gives: Widths of its outputs.
        trained: Whether it is trained.
        rows: Rows of the table, if it is an embedding.
        is_matrix: Whether it has matrices, and is no norm and no embedding.
        is_convolution: Whether it is a convolution, whose output may be flattened.
    """

    path: str
    takes: frozenset[int]
    gives: frozenset[int]
    trained: bool = True
    rows: int = 0
    is_matrix: bool = True
    is_convolution: bool = False


class Widths:
    """The modules of a model with their widths.

    Args:
        modules: The modules, in the order of registration.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        self.modules: Sequence[Module] = list(modules)
        self.position = {module.path: index for index, module in enumerate(self.modules)}
        tables = {module.rows for module in self.modules if module.rows}
        self._vocabularies = {rows for rows in tables if rows == max(tables) or rows > _VOCABULARY}

    @cached_property
    def streams(self) -> frozenset[int]:
        """Widths of norms and embeddings, which are those of residual streams."""
        return frozenset(width for module in self.modules if not module.is_matrix for width in module.gives)

    def use_of(self, layer: Layer, apart: frozenset[str] = frozenset()) -> Use:
        """Return who may use the output of a layer.

        Args:
            layer: The layer.
            apart: Modules that cannot, because they are inside another network.
        """
        own, width = self.position[layer.path], layer.outputs
        past = [module for module in self.modules[: own + 1] if module.path not in apart]
        later = [module for module in self.modules[own + 1 :] if module.path not in apart]
        before = {given for module in past for given in module.gives}
        is_ahead = self.is_ahead(layer)
        known = before | {taken for module in past for taken in module.takes}
        channels = {given for module in past if module.is_convolution for given in module.gives}
        between: set[int] = set()
        is_part = False
        for module in later:
            # A frozen network that takes images, as that of a perceptual loss, looks at the output of a model.
            if module.trained or width > IMAGE_CHANNELS:
                is_norm = not module.is_matrix and not module.rows
                if (width in module.takes and not is_norm) or _is_reshaped(layer, module, between):
                    return "taken"
                flattened = set() if module.is_convolution else channels
                wider = {taken for taken in module.takes if taken not in known and not _divides(flattened, taken)}
                is_joined = not is_ahead and not module.rows and any(taken > width for taken in wider - between)
                is_part = is_part or is_joined or any(_is_cut(width, taken) for taken in module.takes - between)
            between |= module.gives
            known |= module.gives
        if is_part:
            return "part"
        if not any(width in module.takes for module in past[:-1]):
            return "none"
        given = any(width in module.gives for module in (*past[:-1], *later))
        return "earlier" if given else "raw"

    def is_ahead(self, layer: Layer) -> bool:
        """Return whether a layer was registered before what gives its input: then nothing later goes on with it."""
        own = self.position[layer.path]
        before, after = self.modules[:own], self.modules[own + 1 :]
        return any(layer.inputs in m.gives for m in after) and not any(layer.inputs in m.gives for m in before)

    def inside(self, path: str) -> list[str]:
        """Return the modules in a module, in the order of registration."""
        return [module.path for module in self.modules if module.path == path or module.path.startswith(f"{path}.")]

    def comes_from_inside(self, layer: Layer) -> bool:
        """Return whether the input of a layer is the output of another module, perhaps flattened."""
        others = [module for module in self.modules if module.path != layer.path]
        if any(layer.inputs in module.gives for module in others):
            return True
        return _divides({width for module in others if module.is_convolution for width in module.gives}, layer.inputs)

    def is_vocabulary(self, layer: Layer) -> bool:
        """Return whether one side of a layer counts the rows of an embedding, such as the words of a vocabulary."""
        if len(layer.shape) != 2:
            return False
        sides = ((layer.outputs, layer.inputs), (layer.inputs, layer.outputs))
        return any(
            rows in self._vocabularies and rows > own > IMAGE_CHANNELS and rows not in self.streams
            for rows, own in sides
        )


def _is_reshaped(layer: Layer, module: Module, between: set[int]) -> bool:
    """Return whether a linear layer takes the flattened output of a convolution, or the other way round."""
    is_convolution = len(layer.shape) > 2
    if not module.is_matrix or module.is_convolution == is_convolution:
        return False
    if is_convolution:
        return any(taken != layer.outputs and _divides({layer.outputs}, taken) for taken in module.takes - between)
    return any(_divides({taken}, layer.outputs) for taken in module.takes - between)


def _is_cut(width: int, taken: int) -> bool:
    halves = width == 2 * taken > 2 * 2
    return halves or (taken > IMAGE_CHANNELS and width % taken == 0 and width // taken in _CUTS)


def _divides(channels: set[int], width: int) -> bool:
    """Return whether a width is that of flattened channels."""
    return any(width % count == 0 for count in channels if count > IMAGE_CHANNELS)


def module_widths(owner: nn.Module) -> tuple[set[int], set[int]] | None:
    """Return the widths that a module of a usual kind takes and gives, ``None`` for others."""
    if isinstance(owner, nn.RNNBase):
        size = (owner.proj_size or owner.hidden_size) * (2 if owner.bidirectional else 1)
        return {owner.input_size, size}, {size, owner.hidden_size}
    if isinstance(owner, nn.RNNCellBase):
        return {owner.input_size, owner.hidden_size}, {owner.hidden_size}
    if isinstance(owner, nn.MultiheadAttention):
        return {owner.embed_dim, owner.kdim, owner.vdim}, {owner.embed_dim}
    if isinstance(owner, nn.Bilinear):
        return {owner.in1_features, owner.in2_features}, {owner.out_features}
    return None
