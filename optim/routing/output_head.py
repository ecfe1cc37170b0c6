"""Output heads: the layers that give the output of a model, or of a network in it."""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import nn

from lightning_muon.optim.routing.head_names import (
    in_encoder,
    is_called_inner,
    is_called_last,
    is_called_modulation,
    is_called_output,
    is_tower_name,
)
from lightning_muon.optim.routing.head_places import Candidate, candidates_in, entries
from lightning_muon.optim.routing.module_tree import Layer, Part, layer_tree
from lightning_muon.optim.routing.roles import Confidence
from lightning_muon.optim.routing.widths import Use, Widths

_TIED = "output head, tied to an embedding"
_VOCABULARY = "output head, one side is the vocabulary"
_NAMED = "output head, by its name"
_CALLED_LAST = "output head, by the name of a last layer"
_LAST = "output head, the last layer of its network"
_JUDGED = "output head, the last layer of its network, which another judges by its name"
_SINK = "output head: no other layer takes its {} outputs"
_PERHAPS_SINK = "output head, perhaps: no other layer takes its {} outputs, but it is not at the end"
_PERHAPS_CALLED_LAST = "output head, perhaps, by its name, but a later layer could take its {} outputs"
_PERHAPS_LAST = "output head, perhaps: the last layer, and nothing else says so"
_PERHAPS_TAKEN = "output head, perhaps: the last layer of a network, but a later one could take its {} outputs"
_LISTED = "hidden matrix, perhaps: one of a list of single layers, each of which may give an output"
_MULTIPLE = "hidden matrix, perhaps: its {} outputs are a multiple of its inputs, as a scale and shift are"


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
    candidates = candidates_in(layer_tree(model, layers))
    uses = {candidate.layer.path: _use(candidate, widths) for candidate in candidates}
    verdicts = {layer.path: Verdict(_TIED) for layer in layers if layer.tied}
    for candidate in candidates:
        if candidate.layer.path not in verdicts and (verdict := _verdict(candidate, candidates, uses, widths)):
            verdicts[candidate.layer.path] = verdict
    for candidate in candidates:
        path = candidate.layer.path
        if verdict := _in_view_of_others(candidate, candidates, uses, verdicts, widths):
            verdicts[path] = verdict
    return verdicts


def _use(candidate: Candidate, widths: Widths) -> Use:
    """Return who may use the output of a layer; of another network, only what takes its input."""
    apart: set[str] = set()
    for network in candidate.place.beside:
        inside = widths.inside(network.path)
        apart |= set(inside[1:]) - {layer.path for layer in entries(network)}
    return widths.use_of(candidate.layer, frozenset(apart))


def _verdict(
    candidate: Candidate, candidates: Sequence[Candidate], uses: Mapping[str, Use], widths: Widths
) -> Verdict | None:
    """Judge a layer by its name and by the widths of all modules; ``None`` if these do not make it a head."""
    layer, place, use = candidate.layer, candidate.place, uses[candidate.layer.path]
    if widths.is_vocabulary(layer):
        return Verdict(_VOCABULARY)
    if place.named and _is_named(candidate, use, candidates):
        return Verdict(_NAMED, "guess" if use == "taken" and _is_lone_tower(place.named, candidates) else "by name")
    if place.kind == "named" or is_called_inner(layer.path):
        return None
    if use in ("raw", "earlier") and _feeds_a_head_ahead(layer, candidates, uses, widths):
        return None
    from_inside = widths.comes_from_inside(layer)
    is_sink = use == "none" or (use == "raw" and from_inside)
    if _is_multiple(layer, candidates, uses):
        is_odd = is_sink and not is_called_modulation(layer.path)
        return Verdict(_MULTIPLE.format(layer.outputs), "guess", is_head=False) if is_odd else None

    narrows = layer.inputs != layer.outputs
    is_listed = isinstance(candidate.parent.module, nn.Sequential | nn.ModuleList) or len(place.network.paths) == 1
    is_beside = place.kind == "beside" and from_inside and not in_encoder(layer.path)
    if is_sink and (narrows or is_listed) and (place.kind == "end" or is_beside):
        return Verdict(_SINK.format(layer.outputs))
    is_open = place.kind in ("end", "beside") and use != "taken" and not in_encoder(layer.path)
    if narrows and is_open and is_called_last(layer.path):
        return Verdict(_CALLED_LAST, "by name")
    if narrows and place.kind == "end" and use == "earlier":
        is_stream = layer.outputs in widths.streams
        return Verdict(_PERHAPS_LAST, "guess") if is_stream else Verdict(_LAST)
    if place.kind in ("end", "beside") and is_called_output(layer.path):
        return Verdict(_PERHAPS_CALLED_LAST.format(layer.outputs), "guess")
    if _is_listed_alone(candidate):
        return Verdict(_LISTED, "guess", is_head=False)
    # What takes the inputs of the model is a stem, whose outputs are put together with others.
    is_lost = is_sink and (from_inside or place.kind == "end")
    reason = _PERHAPS_LAST if place.kind == "end" else _PERHAPS_SINK.format(layer.outputs)
    return Verdict(reason, "guess") if is_lost else None


def _feeds_a_head_ahead(layer: Layer, candidates: Sequence[Candidate], uses: Mapping[str, Use], widths: Widths) -> bool:
    """Return whether a head that was registered before the body takes the output of a layer."""
    takers = [one.layer for one in candidates if one.layer.inputs == layer.outputs and uses[one.layer.path] == "none"]
    return any(widths.is_ahead(taker) for taker in takers)


def _is_listed_alone(candidate: Candidate) -> bool:
    """Return whether a layer is in, or like one in, a list of layers that keep the width, as those of a ControlNet."""
    if candidate.place.kind == "end":
        return False
    lists = [child for child in candidate.parent.children.values() if isinstance(child.module, nn.ModuleList)]
    if isinstance(candidate.parent.module, nn.ModuleList):
        lists = [candidate.parent]
    for part in lists:
        layers = [entry.layer for entry in part.children.values()]
        alone = [layer for layer in layers if layer and layer.inputs == layer.outputs]
        # Layers of one width follow one another, as hidden layers do.
        several = len({layer.inputs for layer in alone}) > 1
        if len(layers) == len(alone) and several and candidate.layer.shape in {layer.shape for layer in alone}:
            return True
    return False


def _is_named(candidate: Candidate, use: Use, candidates: Sequence[Candidate]) -> bool:
    """Return whether a layer in a module that is named like a head gives the output of that module."""
    layer, place = candidate.layer, candidate.place
    if use == "taken" and place.is_nested:  # a stage of the model that is called so
        return False
    others = [other for other in candidates if other.place.named is place.named and other is not candidate]
    if place.kind == "named":
        is_modulation = is_called_modulation(layer.path) and layer.outputs % layer.inputs == 0
        is_inner = layer.inputs == layer.outputs and any(_gives_more(other.layer, layer) for other in others)
        return not (others and (is_modulation or is_inner))
    # Registered before the inner layers of its module.
    inner = [other.layer for other in others if other.place.kind == "named"]
    return use != "taken" and any(_gives_more(layer, other) for other in inner)


def _is_lone_tower(named: Part, candidates: Sequence[Candidate]) -> bool:
    """Return whether a layer is called as one of two towers, without another: it may be inside of the model."""
    towers = {one.place.named.path for one in candidates if one.place.named and is_tower_name(one.place.named.name)}
    return bool(named.layer) and towers == {named.path}


def _gives_more(layer: Layer, inner: Layer) -> bool:
    """Return whether a layer takes the width that an inner layer takes and gives, and gives another."""
    return layer.inputs == inner.inputs == inner.outputs != layer.outputs


def _is_multiple(layer: Layer, candidates: Sequence[Candidate], uses: Mapping[str, Use]) -> bool:
    """Return whether the outputs are a multiple of the inputs, and another layer with these inputs may be a head."""
    if layer.inputs == 0 or layer.outputs % layer.inputs or layer.outputs < 2 * layer.inputs:
        return False
    others = (candidate.layer for candidate in candidates if candidate.layer is not layer)
    alike = [other for other in others if other.inputs == layer.inputs and other.outputs % other.inputs]
    return any(uses[other.path] != "taken" for other in alike)


def _in_view_of_others(
    candidate: Candidate,
    candidates: Sequence[Candidate],
    uses: Mapping[str, Use],
    verdicts: Mapping[str, Verdict],
    widths: Widths,
) -> Verdict | None:
    """Judge a layer again when the heads by name and by widths are known; ``None`` leaves it as it is."""
    layer, place, use = candidate.layer, candidate.place, uses[candidate.layer.path]
    heads = {path for path, verdict in verdicts.items() if verdict.is_head}
    if layer.path in verdicts:
        is_sink = verdicts[layer.path] == Verdict(_SINK.format(layer.outputs))
        is_last = widths.is_ahead(layer) or not any(_goes_on(follower, heads) for follower in place.followers)
        if not is_sink or is_last:
            return None
        if is_called_last(layer.path):
            return Verdict(_CALLED_LAST, "by name")
        return Verdict(_PERHAPS_SINK.format(layer.outputs), "guess")
    if place.kind == "beside" and use != "taken" and layer.inputs != layer.outputs:
        return _of_a_twin(candidate, candidates, verdicts)
    if place.kind != "end":
        return None
    if _feeds_a_head_ahead(layer, candidates, uses, widths):
        return None
    if heads.isdisjoint(place.network.paths):
        return _last(candidate, use, widths.streams)
    if use == "taken" or layer.inputs == layer.outputs or _is_multiple(layer, candidates, uses):
        return None
    return _of_a_twin(candidate, candidates, verdicts)


def _of_a_twin(
    candidate: Candidate, candidates: Sequence[Candidate], verdicts: Mapping[str, Verdict]
) -> Verdict | None:
    """Return the verdict of a head beside a layer that takes the same input, as the mean of a policy its deviation."""
    place = candidate.place.kind
    beside = (one.layer for one in candidates if one.parent is candidate.parent and one.place.kind == place)
    twins = [verdicts.get(layer.path) for layer in beside if layer.inputs == candidate.layer.inputs]
    return next((twin for twin in twins if twin is not None and twin.is_head), None)


def _goes_on(follower: Part, heads: Set[str]) -> bool:
    """Return whether what comes after a head contains none, so that it may go on with the output of that head."""
    is_modulation = all(is_called_modulation(path) for path in follower.paths)
    return heads.isdisjoint(follower.paths) and not is_modulation


def _last(candidate: Candidate, use: Use, streams: Set[int]) -> Verdict | None:
    """Judge the last layer of a network in which nothing is a head."""
    layer, place = candidate.layer, candidate.place
    if is_called_inner(layer.path):
        return None
    if place.network.is_image_to_image:
        return Verdict(_LAST)
    if place.is_judged:
        return Verdict(_JUDGED, "by name")
    if use in ("taken", "part"):
        return Verdict(_PERHAPS_TAKEN.format(layer.outputs), "guess")
    is_stream = use == "earlier" and layer.outputs in streams and not place.is_certain
    if isinstance(candidate.parent.module, nn.Sequential) and not is_stream:
        return Verdict(_LAST)
    return Verdict(_CALLED_LAST, "by name") if is_called_last(layer.path) else Verdict(_PERHAPS_LAST, "guess")
