"""Output heads: the layers that give the output of a model, or of a network in it."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from lightning_muon.optim.routing.module_tree import Layer, Part, blocks_among, is_chain, layer_tree
from lightning_muon.optim.routing.roles import Confidence
from lightning_muon.optim.routing.widths import Use, Widths

_TIED = "output head, tied to an embedding"
_VOCABULARY = "output head, one side is the vocabulary"
_NAMED = "output head, by its name"
_SINK = "output head: no other layer takes its {} outputs"
_LAST = "output head, the last layer of its network"
_LAST_OF_MANY = "output head, perhaps: the last layer, and nothing else says so"
_SINK_INSIDE = "output head, perhaps: no other layer takes its {} outputs, but it is not at the end"
_TAKEN = "output head, perhaps: the last layer of a network, but a later one could take its {} outputs"
_CUT = "hidden matrix, perhaps: its {} outputs are a multiple of its inputs, as a scale and shift are"

_HEAD_NAME = re.compile(
    r"(^|_)(heads?|(?<!pre_)classifiers?|(?<!pre_)logits|score|unembed|unembedding|embed_out"
    r"|(text|visual|vision|image|audio)_projection)$",  # the two outputs of CLIP and similar models
    re.IGNORECASE,
)
_NO_HEAD_NAME = re.compile(r"(^|_)(pos|position|query)(_|$)", re.IGNORECASE)
_INNER_NAME = re.compile(r"(^|_)(gates?|gating|routers?|pos|position)(_|$)", re.IGNORECASE)
# What usually names the last layer, where the structure alone does not say whether it is the output.
_LAST_NAME = re.compile(
    r"(^|_)(out|output|conv_out|proj_out|final(_\w+)?|pred|preds|predictions?|predictors?|generator|decoder_pred"
    r"|mean|mu|log_?std|log_?var|sigma)$",
    re.IGNORECASE,
)
_MODULATION_NAME = re.compile(r"ada|modulat|norm|scale|shift", re.IGNORECASE)
_CRITIC_NAME = re.compile(
    r"(^|_)(disc|discriminators?|critics?|adversary|net_?d|d|q|qf|q_?nets?|vf?)(\d|_|$)", re.IGNORECASE
)


@dataclass(frozen=True)
class Verdict:
    """What is thought of a layer.

    Args:
        reason: One line for the routing table.
        confidence: How sure it is.
        is_head: Whether it is an output head; a guess may be that it is not.
    """

    reason: str
    confidence: Confidence = "known"
    is_head: bool = True


@dataclass(frozen=True)
class _Place:
    """Where a part is in the model.

    Args:
        kind: At the end of the model, or of a module that is named like a head; at the end of a module beside that; or
            elsewhere.
        network: The network that it belongs to: the model, or one of several side by side.
        beside: The other networks.
        is_judged: Whether another network is named as the judge of this one's output.
        named: The module around it that is named like a head.
        is_nested: Whether that one is in a module that is not at the end.
        followers: What comes after the module beside the end.
    """

    kind: Literal["end", "named", "beside", "inside"]
    network: Part
    beside: tuple[Part, ...] = ()
    is_judged: bool = False
    named: Part | None = None
    is_nested: bool = False
    followers: tuple[Part, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A layer that may be a head: in no attention and no block, and nothing follows it in an ``nn.Sequential``."""

    layer: Layer
    parent: Part
    place: _Place


def output_heads(model: nn.Module, layers: Iterable[Layer], widths: Widths) -> dict[str, Verdict]:
    """Find the output heads among the layers of a model, and what is not sure to be one.

    A layer is a head if it is tied to an embedding; if the vocabulary is one of its sides; if its name says so, or it
    is the last of a module whose name does; if it is at the end of the model, or beside that, and no other layer takes
    as many inputs as it gives outputs. Where a network has no such layer, its last in the order of registration is the
    head. Networks side by side, such as actor and critic, are judged one by one. Layers inside an attention or a
    repeated block are no heads.

    Args:
        model: The model.
        layers: The layers that are trained or tied to an embedding, in the order of registration.
        widths: The widths of all modules with parameters.

    Returns:
        A verdict for each layer that is a head or may be one, by the name of its module.
    """
    layers = list(layers)
    if not layers:
        return {}
    tree = layer_tree(model, layers)
    candidates = list(_candidates(tree, tree, _Place("end", tree)))
    uses = {candidate.layer.path: _use(candidate, widths) for candidate in candidates}
    verdicts = {layer.path: Verdict(_TIED) for layer in layers if layer.tied}
    for candidate in candidates:
        if candidate.layer.path not in verdicts and (verdict := _verdict(candidate, candidates, uses, widths)):
            verdicts[candidate.layer.path] = verdict
    heads = {path for path, verdict in verdicts.items() if verdict.is_head}
    for candidate in candidates:
        layer, place = candidate.layer, candidate.place
        is_sink = verdicts.get(layer.path) == Verdict(_SINK.format(layer.outputs))
        if is_sink and any(heads.isdisjoint(follower.paths) for follower in place.followers):
            verdicts[layer.path] = Verdict(_SINK_INSIDE.format(layer.outputs), "guess")
        if (
            place.kind == "end"
            and heads.isdisjoint(place.network.paths)
            and (last := _last(candidate, uses[layer.path]))
        ):
            verdicts[layer.path] = last
    return verdicts


def is_head_name(name: str) -> bool:
    """Return whether a module of this name is a head."""
    return bool(_HEAD_NAME.search(name) and not _NO_HEAD_NAME.search(name))


def _candidates(part: Part, parent: Part, place: _Place) -> Iterator[_Candidate]:
    if part.layer:
        yield _Candidate(part.layer, parent, place)
        return
    if part.is_attention:
        return
    children = list(part.children.values())
    named = [child for child in children if is_head_name(child.name) and not _leads_on(child, children)]
    blocks = blocks_among(part.module, children)
    ends = _ends(part.module, children)
    judges = [child for child in children if _CRITIC_NAME.search(child.name)]
    side_by_side = sum(len(child.paths) > 1 for child in ends) > 1
    for index, child in enumerate(children):
        if child in blocks:
            continue
        if child in named:
            nested = place.is_nested or place.kind in ("beside", "inside")
            several = isinstance(child.module, nn.ModuleList | nn.ModuleDict)
            for head in child.children.values() if several else [child]:
                there = replace(place, kind="named", named=head, is_nested=nested)
                yield from _candidates(head, child if several else part, there)
        elif child in ends or not isinstance(part.module, nn.Sequential):
            there = replace(place, kind=_kind(part, child, place.kind, is_end=child in ends, is_beside=bool(named)))
            if there.kind == "beside" and place.kind in ("end", "named"):
                there = replace(there, followers=tuple(children[index + 1 :]))
            if judges and child not in judges:
                there = replace(there, is_judged=True)
            if side_by_side and child in ends:
                beside = tuple(end for end in ends if end is not child)
                there = replace(there, network=child, beside=(*place.beside, *beside))
            yield from _candidates(child, part, there)
        else:  # nothing in it is a head, other than by name
            inside = _candidates(child, part, replace(place, kind="inside"))
            yield from (candidate for candidate in inside if candidate.place.kind == "named")


def _kind(
    part: Part, child: Part, kind: str, *, is_end: bool, is_beside: bool
) -> Literal["end", "named", "beside", "inside"]:
    """Return the kind of place of a child, from that of the part around it."""
    if kind == "inside" or (kind == "beside" and not is_end):
        return "inside"
    if kind == "beside":  # of the stages in a list, only what is a chain of layers may be a head
        return "inside" if isinstance(part.module, nn.ModuleList) and not child.is_chain else "beside"
    if not is_end or (kind == "named" and is_beside):
        return "beside"
    return "end" if kind == "end" else "named"


def _use(candidate: _Candidate, widths: Widths) -> Use:
    """Return who may use the output of a layer; of another network, only what takes its input."""
    apart: set[str] = set()
    for network in candidate.place.beside:
        inside = widths.inside(network.path)
        apart |= set(inside[1:]) - {layer.path for layer in _entries(network)}
    return widths.use_of(candidate.layer, frozenset(apart))


def _verdict(
    candidate: _Candidate, candidates: Sequence[_Candidate], uses: Mapping[str, Use], widths: Widths
) -> Verdict | None:
    """Judge a layer by its name and by the widths of all modules; ``None`` if these do not make it a head."""
    layer, place = candidate.layer, candidate.place
    if widths.is_vocabulary(layer):
        return Verdict(_VOCABULARY)
    use = uses[layer.path]
    if place.named and _is_named(candidate, use, candidates):
        return Verdict(_NAMED, "by name")
    if place.kind == "named" or any(_INNER_NAME.search(name) for name in layer.path.split(".")):
        return None
    is_cut = _is_cut(layer, candidates, uses)
    from_inside = widths.comes_from_inside(layer)
    if use == "none" or (use == "raw" and from_inside):
        if is_cut:
            return None if _MODULATION_NAME.search(layer.path) else Verdict(_CUT, "guess", is_head=False)
        if place.kind in ("end", "named") or (place.kind == "beside" and from_inside):
            return Verdict(_SINK.format(layer.outputs))
        # What takes the inputs of the model is a stem, whose outputs are put together with others.
        return Verdict(_SINK_INSIDE.format(layer.outputs), "guess") if from_inside else None
    return None


def _is_named(candidate: _Candidate, use: Use, candidates: Sequence[_Candidate]) -> bool:
    """Return whether a layer in a module that is named like a head gives the output of that module."""
    layer, place = candidate.layer, candidate.place
    if use == "taken" and place.is_nested:  # a stage of the model that is called so
        return False
    others = [other for other in candidates if other.place.named is place.named and other is not candidate]
    if place.kind == "named":
        is_modulation = _MODULATION_NAME.search(layer.path) and layer.outputs % layer.inputs == 0
        is_inner = layer.inputs == layer.outputs and any(_gives_more(other.layer, layer) for other in others)
        return not (others and (is_modulation or is_inner))
    # Registered before the inner layers of its module.
    inner = [other.layer for other in others if other.place.kind == "named"]
    return use != "taken" and any(_gives_more(layer, other) for other in inner)


def _gives_more(layer: Layer, inner: Layer) -> bool:
    """Return whether a layer takes the width that an inner layer takes and gives, and gives another."""
    return layer.inputs == inner.inputs == inner.outputs != layer.outputs


def _last(candidate: _Candidate, use: Use) -> Verdict | None:
    """Judge the last layer of a network in which nothing is a head."""
    layer = candidate.layer
    names = layer.path.split(".")
    if any(_INNER_NAME.search(name) for name in names):
        return None
    if candidate.place.network.is_image_to_image:
        return Verdict(_LAST)
    if candidate.place.is_judged:
        return Verdict(f"{_LAST}, which another judges by its name", "by name")
    if use in ("taken", "part"):
        return Verdict(_TAKEN.format(layer.outputs), "guess")
    if isinstance(candidate.parent.module, nn.Sequential):
        return Verdict(_LAST)
    if any(_LAST_NAME.search(name) for name in names):
        return Verdict(f"{_LAST}, and by its name", "by name")
    return Verdict(_LAST_OF_MANY, "guess")


def _is_cut(layer: Layer, candidates: Sequence[_Candidate], uses: Mapping[str, Use]) -> bool:
    """Return whether the outputs are a multiple of the inputs, and another layer with these inputs is a head."""
    count, rest = divmod(layer.outputs, layer.inputs)
    if rest or count < 2:
        return False
    others = (candidate.layer for candidate in candidates if candidate.layer is not layer)
    return any(
        other.inputs == layer.inputs and other.outputs % other.inputs and uses[other.path] in ("none", "raw")
        for other in others
    )


def _leads_on(head: Part, siblings: Sequence[Part]) -> bool:
    """Return whether a module named like a head comes before the output layer, as the transform of ModernBERT."""
    first, *_, output = [*head.layers(), *head.layers()]
    later = siblings[siblings.index(head) + 1 :]
    if head.layer and first.inputs == output.outputs:
        return False
    if first.inputs == output.outputs:  # any layer takes this width: only a single one behind it tells
        later = [part for part in later[-1:] if part.layer and not is_head_name(part.name)]
    leads = (next(part.layers()) for part in later)
    return any(output.fits(first) and first.inputs != first.outputs for first in leads)


def _ends(module: nn.Module, children: Sequence[Part]) -> list[Part]:
    """Return the children that give the outputs of the module, as far as their order and their widths show it."""
    *earlier, last = children
    if isinstance(module, nn.Sequential):
        return [last]
    if isinstance(module, nn.ModuleList):
        shapes = [[layer.shape for layer in child.layers()] for child in children]
        side_by_side = shapes.count(shapes[-1]) == len(shapes) or all(child.is_chain for child in children)
        return list(children) if side_by_side and not is_chain(children) else [last]
    final = list(last.layers())
    ends = [last]
    if len(final) == 1:
        for child in reversed(earlier):
            beside = list(child.layers())
            if len(beside) > 1 or beside[0].inputs != final[0].inputs or beside[0].fits(final[0]):
                break
            ends.append(child)
        return ends
    # It does not end in a single layer: each child is a network, unless it fits a later one, as encoder and decoder do.
    for index, child in enumerate(earlier):
        *trunk, output = child.layers()
        later = [other for other in children[index + 1 :] if not _CRITIC_NAME.search(other.name)]
        fits = any(output.fits(entry) for other in later for entry in _entries(other))
        feeds = any(_feeds(child, other, earlier[:index]) for other in later)
        is_tower = output.outputs == final[-1].outputs and _has_embedding(last)
        if trunk and (not (fits or feeds) or is_tower or child.is_image_to_image):
            ends.append(child)
    return ends


def _entries(part: Part) -> Iterator[Layer]:
    """Yield the layers that may take the input of a module: the first of it, and of each module in it."""
    yield next(part.layers())
    for child in part.children.values() if not isinstance(part.module, nn.Sequential) else ():
        yield next(child.layers())
        if isinstance(child.module, nn.ModuleList):
            yield from (next(entry.layers()) for entry in child.children.values())


def _feeds(part: Part, later: Part, before: Sequence[Part]) -> bool:
    """Return whether the input of a later module is a width that a layer of a module gives, and no other before it."""
    width, own = next(later.layers()).inputs, next(part.layers()).inputs
    given = {layer.outputs for layer in part.layers()}
    return width in given and width != own and all(layer.outputs != width for p in before for layer in p.layers())


def _has_embedding(part: Part) -> bool:
    return any(isinstance(module, nn.Embedding) for module in part.module.modules())
