"""Layers that may be output heads, and where they are in the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lightning_muon.optim.routing.head_names import is_critic_name, is_encoder_name, is_head_name
from lightning_muon.optim.routing.module_tree import Layer, Part, blocks_among, is_chain

Kind = Literal["end", "named", "beside", "inside"]
"""Where a layer is.

- ``end``: at the end of the model, as far as the order and the widths of its modules show it;
- ``named``: at the end of a module that is named like a head;
- ``beside``: at the end of a module beside one of these;
- ``inside``: elsewhere.
"""


@dataclass(frozen=True)
class Place:
    """Where a part is in the model.

    Args:
        kind: The kind of place.
        network: The network that it belongs to: the model, or one of several side by side.
        beside: The other networks.
        is_judged: Whether another network is named as the judge of this one's output.
        is_certain: Whether only ``nn.Sequential`` is around it, which says the order.
        named: The module around it that is named like a head.
        is_nested: Whether that one is in a module that is not at the end.
        followers: What comes after the module beside the end.
    """

    kind: Kind
    network: Part
    beside: tuple[Part, ...] = ()
    is_judged: bool = False
    is_certain: bool = True
    named: Part | None = None
    is_nested: bool = False
    followers: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A layer that may be a head: in no attention and no block, and nothing follows it in an ``nn.Sequential``.

    Args:
        layer: The layer.
        parent: The module around it.
        place: Where it is.
    """

    layer: Layer
    parent: Part
    place: Place


def candidates_in(model: Part) -> list[Candidate]:
    """Return the layers of a model that may be heads, in the order of registration."""
    return list(_candidates(model, model, Place("end", model)))


def entries(part: Part) -> Iterator[Layer]:
    """Yield the layers that may take the input of a module: the first of it, and of each module in it."""
    yield next(part.layers())
    for child in part.children.values() if not isinstance(part.module, nn.Sequential) else ():
        yield next(child.layers())
        if isinstance(child.module, nn.ModuleList):
            yield from (next(entry.layers()) for entry in child.children.values())


def _candidates(part: Part, parent: Part, place: Place) -> Iterator[Candidate]:
    if part.layer:
        yield Candidate(part.layer, parent, place)
        return
    if part.is_attention:
        return
    children = list(part.children.values())
    named = [child for child in children if is_head_name(child.name) and not _leads_on(child, children)]
    blocks, ends = blocks_among(part.module, children), _ends(part.module, children)
    judges = [child for child in children if is_critic_name(child.name)]
    side_by_side = sum(len(child.paths) > 1 for child in ends) > 1
    place = replace(place, is_certain=place.is_certain and isinstance(part.module, nn.Sequential))
    for index, child in enumerate(children):
        if child in blocks:
            continue
        if child in named:
            nested = place.is_nested or place.kind in ("beside", "inside")
            several = isinstance(child.module, nn.ModuleList | nn.ModuleDict) and not _is_one_network(child)
            for head in child.children.values() if several else [child]:
                there = replace(place, kind="named", named=head, is_nested=nested)
                yield from _candidates(head, child if several else part, there)
        elif child in ends or not isinstance(part.module, nn.Sequential):
            kind = _kind(part, child, place.kind, is_end=child in ends, is_beside_named=bool(named))
            there = replace(place, kind=kind, is_judged=place.is_judged or (bool(judges) and child not in judges))
            if kind == "beside" and place.kind in ("end", "named"):
                there = replace(there, followers=tuple(children[index + 1 :]))
            if side_by_side and child in ends:
                beside = tuple(end for end in ends if end is not child)
                there = replace(there, network=child, beside=(*place.beside, *beside))
            yield from _candidates(child, part, there)
        else:  # nothing in it is a head, other than by name
            inside = _candidates(child, part, replace(place, kind="inside"))
            yield from (candidate for candidate in inside if candidate.place.kind == "named")


def _kind(part: Part, child: Part, kind: Kind, *, is_end: bool, is_beside_named: bool) -> Kind:
    """Return the kind of place of a child, from that of the part around it."""
    if kind == "inside" or (kind == "beside" and not is_end):
        return "inside"
    if kind == "beside":  # of the stages in a list, only what is a chain of layers may be a head
        return "inside" if isinstance(part.module, nn.ModuleList) and not child.is_chain else "beside"
    if not is_end and isinstance(part.module, nn.ModuleList):  # a stage before the last
        return "inside"
    if not is_end or (kind == "named" and is_beside_named):
        return "beside"
    return kind


def _is_one_network(part: Part) -> bool:
    """Return whether the layers in a list follow each other: each takes what the one before gives."""
    varies = any(layer.inputs != layer.outputs for layer in part.layers())
    children = list(part.children.values())
    return isinstance(part.module, nn.ModuleList) and len(children) > 1 and varies and is_chain(children)


def _leads_on(head: Part, siblings: Sequence[Part]) -> bool:
    """Return whether a module named like a head comes before the output layer, as the transform of ModernBERT."""
    first, *_, output = [*head.layers(), *head.layers()]
    later = siblings[siblings.index(head) + 1 :]
    if head.layer and first.inputs == output.outputs:
        return False
    if first.inputs == output.outputs:  # any layer takes this width: only a single one behind it tells
        later = [part for part in later[-1:] if part.layer and not is_head_name(part.name)]
    leads = (next(part.layers()) for part in later)
    return any(output.fits(entry) and entry.inputs != entry.outputs for entry in leads)


def _ends(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that give the outputs of the module, as far as their order and their widths show it."""
    *earlier, last = children
    if isinstance(module, nn.Sequential):
        return [last]
    if isinstance(module, nn.ModuleList):
        shapes = [[layer.shape for layer in child.layers()] for child in children]
        are_alike = shapes.count(shapes[-1]) == len(shapes) or all(child.is_chain for child in children)
        return list(children) if are_alike and not is_chain(children) else [last]
    if last.layer:
        return [last, *_beside(last.layer, earlier)]
    # It does not end in a single layer: each child is a network, unless it leads on to a later one.
    return [last, *(child for index, child in enumerate(earlier) if _is_network(child, index, children))]


def _beside(last: Layer, earlier: Sequence[Part]) -> Iterator[Part]:
    """Yield the layers before the last one that take the same input, such as the mean and deviation of a policy."""
    for child in reversed(earlier):
        if child.layer is None or child.layer.inputs != last.inputs or child.layer.fits(last):
            return
        yield child


def _is_network(part: Part, index: int, siblings: Sequence[Part]) -> bool:
    """Return whether a module is a network of its own: no later module but a judge goes on with what it gives."""
    *trunk, output = part.layers()
    if not trunk:
        return False
    earlier, later = siblings[:index], siblings[index + 1 :]
    others = [*earlier, *later]
    has_judge = any(other.is_image_to_image or is_critic_name(other.name) for other in others)
    if part.is_image_to_image and has_judge and not is_encoder_name(part.name):
        return True
    *_, end = siblings[-1].layers()
    if output.outputs == end.outputs and siblings[-1].has_embedding:  # two towers, of which the last reads words
        return True
    takers = [other for other in later if not is_critic_name(other.name)]
    fits = any(output.fits(entry) for other in takers for entry in entries(other))
    return not fits and not any(_feeds(part, other, earlier) for other in takers)


def _feeds(part: Part, later: Part, before: Sequence[Part]) -> bool:
    """Return whether the input of a later module is a width that a layer of a module gives, and no other before it."""
    width, own = next(later.layers()).inputs, next(part.layers()).inputs
    given = {layer.outputs for layer in part.layers()}
    others = {layer.outputs for other in before for layer in other.layers()}
    return width in given and width != own and width not in others
