"""Output heads: the layers that give the output of a model, or of a network in it."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from lightning_muon.optim.routing.module_tree import Layer, Part, blocks_among, is_chain, layer_tree
from lightning_muon.optim.routing.widths import Widths
from lightning_muon.optim.routing.roles import Confidence

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
    r"(^|_)(heads?|classifiers?|(?<!pre_)logits|score|unembed|unembedding|embed_out"
    r"|(text|visual|vision|image|audio)_projection)$",  # the two outputs of CLIP and similar models
    re.IGNORECASE,
)
_NO_HEAD_NAME = re.compile(r"(^|_)(pos|position|query|gates?|routers?)(_|$)", re.IGNORECASE)
# What usually names the last layer, where the structure alone does not say whether it is the output.
_LAST_NAME = re.compile(
    r"(^|_)(out|output|conv_out|proj_out|final(_\w+)?|pred|preds|predictions?|predictors?|generator|decoder_pred"
    r"|mean|mu|log_?std|log_?var|sigma)$",
    re.IGNORECASE,
)
_MODULATION_NAME = re.compile(r"ada|modulat|norm|scale|shift", re.IGNORECASE)
_CRITIC_NAME = re.compile(r"(^|_)(disc|discriminators?|critics?|adversary|net_?d|d|q|qf|q_?nets?|vf?)(\d|_|$)", re.IGNORECASE)


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


@dataclass
class _Candidate:
    """A layer that may be a head: it is in no attention and no block, and nothing follows it in an ``nn.Sequential``.

    Args:
        layer: The layer.
        place: Whether it is at the end of the model, at the end of a module beside that, or inside; and whether a
            module named like a head ends with it.
        parent: The module around it.
        network: The network that it belongs to: the model, or one of several side by side.
        is_judged: Whether another network is named as the judge of this one's output.
        followers: What comes after the module beside the end that contains the layer.
    """

    layer: Layer
    place: "_Place"
    parent: Part
    network: Part
    is_judged: bool = False
    followers: tuple[Part, ...] = ()


_Place = Literal["end", "beside", "inside", "named"]


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
    candidates = list(_candidates(tree, tree, tree, "end"))
    verdicts = {layer.path: Verdict(_TIED) for layer in layers if layer.tied}
    for candidate in candidates:
        if candidate.layer.path not in verdicts and (verdict := _verdict(candidate, candidates, widths)):
            verdicts[candidate.layer.path] = verdict
    heads = {path for path, verdict in verdicts.items() if verdict.is_head}
    for candidate in candidates:
        layer = candidate.layer
        if any(heads.isdisjoint(follower.paths) for follower in candidate.followers):
            if verdicts.get(layer.path) == Verdict(_SINK.format(layer.outputs)):
                verdicts[layer.path] = Verdict(_SINK_INSIDE.format(layer.outputs), "guess")
        if candidate.place == "end" and heads.isdisjoint(candidate.network.paths):
            if verdict := _last(candidate, widths):
                verdicts[layer.path] = verdict
    return verdicts


def is_head_name(name: str) -> bool:
    """Return whether a module of this name is a head."""
    return bool(_HEAD_NAME.search(name) and not _NO_HEAD_NAME.search(name))


def _candidates(
    part: Part,
    parent: Part,
    network: Part,
    place: _Place,
    *,
    is_judged: bool = False,
    followers: tuple[Part, ...] = (),
) -> Iterator[_Candidate]:
    if part.layer:
        yield _Candidate(part.layer, place, parent, network, is_judged, followers)
        return
    if part.is_attention:
        return
    children = list(part.children.values())
    named = [child for child in children if is_head_name(child.name) and not _leads_on(child, children)]
    blocks = blocks_among(part.module, children)
    ends = _ends(part.module, children, blocks)
    judges = [child for child in children if _CRITIC_NAME.search(child.name)]
    side_by_side = sum(len(list(end.layers())) > 1 for end in ends) > 1
    for index, child in enumerate(children):
        if child in blocks:
            continue
        several = isinstance(child.module, nn.ModuleList | nn.ModuleDict)
        if child in named:
            for head in child.children.values() if several else [child]:
                yield from _candidates(head, child if several else part, network, "named")
        elif child in ends or not isinstance(part.module, nn.Sequential):
            there: _Place = _place_of_child(place, is_end=child in ends, is_beside_named=bool(named))
            judged = is_judged or (child not in judges and bool(judges))
            after = tuple(children[index + 1 :]) if place in ("end", "named") and there == "beside" else followers
            own = child if side_by_side else network
            yield from _candidates(child, part, own, there, is_judged=judged, followers=after)
        else:  # nothing in it is a head, other than by name
            inside = _candidates(child, part, network, "inside")
            yield from (candidate for candidate in inside if candidate.place == "named")


def _place_of_child(place: _Place, *, is_end: bool, is_beside_named: bool) -> _Place:
    if is_end:
        return "beside" if place == "named" and is_beside_named else place
    return "inside" if place in ("beside", "inside") else "beside"


def _verdict(candidate: _Candidate, candidates: Sequence[_Candidate], widths: Widths) -> Verdict | None:
    """Judge a layer by its name and by the widths of all modules; ``None`` if these do not make it a head."""
    layer = candidate.layer
    if widths.is_vocabulary(layer):
        return Verdict(_VOCABULARY)
    if candidate.place == "named":
        return Verdict(_NAMED, "by name")
    if any(_NO_HEAD_NAME.search(name) for name in layer.path.split(".")):
        return None
    use = widths.use_of(layer)
    from_inside = widths.comes_from_inside(layer)
    if use == "none" or (use == "raw" and from_inside):
        if _is_cut(layer, candidates, widths):
            return None if _MODULATION_NAME.search(layer.path) else Verdict(_CUT, "guess", is_head=False)
        if candidate.place == "end" or (candidate.place == "beside" and from_inside):
            return Verdict(_SINK.format(layer.outputs))
        return Verdict(_SINK_INSIDE.format(layer.outputs), "guess")
    return None


def _last(candidate: _Candidate, widths: Widths) -> Verdict | None:
    """Judge the last layer of a network in which nothing is a head."""
    layer = candidate.layer
    names = layer.path.split(".")
    if any(_NO_HEAD_NAME.search(name) for name in names):
        return None
    if candidate.network.is_image_to_image:
        return Verdict(_LAST)
    if candidate.is_judged:
        return Verdict(f"{_LAST}, which another judges by its name", "by name")
    if widths.use_of(layer) in ("taken", "part"):
        return Verdict(_TAKEN.format(layer.outputs), "guess")
    if isinstance(candidate.parent.module, nn.Sequential) or layer.inputs != layer.outputs:
        return Verdict(_LAST)
    if any(_LAST_NAME.search(name) for name in names):
        return Verdict(f"{_LAST}, and by its name", "by name")
    return Verdict(_LAST_OF_MANY, "guess")


def _is_cut(layer: Layer, candidates: Sequence[_Candidate], widths: Widths) -> bool:
    """Return whether the outputs are a multiple of the inputs, and another layer with these inputs is a head."""
    count, rest = divmod(layer.outputs, layer.inputs)
    if rest or count < 2:
        return False
    others = (candidate.layer for candidate in candidates if candidate.layer is not layer)
    return any(
        other.inputs == layer.inputs and other.outputs % other.inputs and widths.use_of(other) in ("none", "raw")
        for other in others
    )


def _leads_on(head: Part, siblings: Sequence[Part]) -> bool:
    """Return whether a module named like a head comes before the output layer, as the transform of ModernBERT."""
    if head.layer:
        return False
    *_, output = head.layers()
    later = [part for part in siblings[siblings.index(head) + 1 :] if not is_head_name(part.name)]
    return any(output.fits(next(part.layers())) for part in later)


def _ends(module: nn.Module, children: Sequence[Part], blocks: Sequence[Part]) -> list[Part]:
    """Return the children that give the outputs of the module, as far as their order and their widths show it."""
    *earlier, last = children
    if isinstance(module, nn.Sequential):
        return [last]
    if isinstance(module, nn.ModuleList):
        return [last] if is_chain(children) else list(children)
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
        fits = any(output.fits(next(other.layers())) for other in later)
        if trunk and (not fits or child.is_image_to_image):
            ends.append(child)
    return ends
