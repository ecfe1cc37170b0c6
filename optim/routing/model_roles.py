"""The role of each parameter in a whole model."""

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.parameter import UninitializedParameter

from lightning_muon.optim.routing.by_head import by_head
from lightning_muon.optim.routing.head_names import is_head_name
from lightning_muon.optim.routing.module_tree import Layer
from lightning_muon.optim.routing.output_head import Verdict, output_heads
from lightning_muon.optim.routing.parameter_role import role_of
from lightning_muon.optim.routing.parametrized import unparametrized
from lightning_muon.optim.routing.place import Place
from lightning_muon.optim.routing.roles import Role
from lightning_muon.optim.routing.widths import Module, Widths, module_widths
from lightning_muon.optim.routing.wrapped_names import plain_name

_HEADLESS = Verdict("hidden matrix, the last one: no output head was found", "guess", is_head=False)


@dataclass(frozen=True)
class _Use:
    """One place of a parameter in the model; a tied parameter has several."""

    path: str
    name: str
    parameter: nn.Parameter
    role: Role
    layer: str  # of which it is the weight: the owner's path, but where the weight is parametrized
    place: Place  # in that layer

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """The module that owns it, or whose weight it gives, and those around, up to the model."""
        return self.place.owner, *self.place.around


def model_roles(model: nn.Module, *, per_head: bool = False) -> list[tuple[list[str], nn.Parameter, Role]]:
    """Return each parameter of a model once, with all its names (several where it is tied) and its role.

    Args:
        model: The model.
        per_head: Cut the projections of attention into a matrix for each head.

    Raises:
        ValueError: If a lazy module has not yet seen a batch.
    """
    uses = _uses(model)
    heads = _find_heads(model, uses)
    by_parameter: defaultdict[int, list[_Use]] = defaultdict(list)
    for use in uses:
        by_parameter[id(use.parameter)].append(use)

    result = []
    cut = False
    for same in by_parameter.values():
        role = next((use.role for use in same if use.role.algorithm == "adamw"), same[0].role)
        for use in same:
            verdict = heads.get(use.layer)
            is_last = verdict is _HEADLESS and use.role.algorithm == "muon"
            if verdict is not None and (use.role.is_layer or is_last):
                role = _judged(use.role, verdict)
        if per_head and role.algorithm == "muon":
            place = same[0].place
            names = [*place.names, ""]  # the model has no name
            whole, role = role, by_head(role, place.name, same[0].parameter.shape, names, same[0].owners)
            cut = cut or role.layout != whole.layout
        names = [plain_name(f"{use.path}.{use.name}" if use.path else use.name) for use in same]
        result.append((names, same[0].parameter, role))
    if per_head and not cut:
        warnings.warn(
            "per_head has no effect: no attention module says a number of heads, such as num_heads, that makes the"
            " shapes of its projections. The routing table has the reasons; a rule can cut a projection, such as"
            " Rule('*.q.weight', 'muon', layout=MatrixLayout(blocks=heads)).",
            stacklevel=4,
        )
    return result


def _find_heads(model: nn.Module, uses: Sequence[_Use]) -> dict[str, Verdict]:
    """Return a verdict for each layer that is a head or may be one, by the name of its module.

    What is frozen is judged as if all were trained, which it may be later.
    """
    heads = output_heads(model, _layers(uses), _widths(uses))
    if not all(use.parameter.requires_grad for use in uses):
        thawed = output_heads(model, _layers(uses, frozen=True), _widths(uses, frozen=True))
        frozen = {use.layer for use in uses if use.role.is_layer and not use.parameter.requires_grad}
        # What only looks like the last layer, because the ones behind it are frozen, is hidden.
        heads = {path: verdict for path, verdict in heads.items() if verdict.confidence != "guess" or path in thawed}
        heads = {path: verdict for path, verdict in thawed.items() if path in frozen} | heads
    if not any(verdict.is_head for verdict in heads.values()) and (last := _last_of_headless(uses)):
        heads[last] = _HEADLESS
    return heads


def _last_of_headless(uses: Sequence[_Use]) -> str | None:
    """Return the module with the last matrix of a model without a head, unless an embedding is likely to be the head.

    A table serves as the head without a layer, in ``F.linear(features, table)``, if it is as wide as the features.
    """
    matrices = [use for use in uses if use.role.algorithm == "muon" and use.parameter.requires_grad]
    if not matrices:
        return None
    last = matrices[-1]
    layers = [use for use in matrices if use.role.is_layer]
    width = {Layer(use.layer, use.parameter.shape, use.role.layout).outputs for use in layers[-1:]}
    norms = [use.parameter.shape[-1] for use in uses if use.parameter.ndim == 1 and use.name == "weight"]
    tables = {use.parameter.shape[-1] for use in uses if use.role.is_embedding}
    return None if tables & {*width, *norms[-1:]} else last.layer


def _judged(role: Role, verdict: Verdict) -> Role:
    """Return the role of a layer that is a head, or may be one."""
    role = replace(role, reason=verdict.reason, confidence=verdict.confidence)
    return replace(role, name="head", algorithm="adamw", decay=True) if verdict.is_head else role


def _uses(model: nn.Module) -> list[_Use]:
    modules = list(model.named_modules(remove_duplicate=False))
    unwrapped = {plain_name(path): part for path, part in modules}  # a wrapped module comes after its wrapper
    uses = []
    for path, owner in modules:
        plain = plain_name(path)
        around = _around(plain, unwrapped)
        for name, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(f"{path}.{name} has no shape yet: run a batch through the lazy module first")
            place = Place(owner, plain, name, parameter, tuple(around))
            in_layer = unparametrized(place)
            layer = path if in_layer.path == plain else path.removesuffix(f".parametrizations.{in_layer.name}")
            uses.append(_Use(path, name, parameter, role_of(place), layer, in_layer))
    return uses


def _around(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the modules around that of a path, the nearest first."""
    names = path.split(".") if path else []
    return [modules[".".join(names[:count])] for count in reversed(range(len(names)))]


def _layers(uses: Sequence[_Use], *, frozen: bool = False) -> list[Layer]:
    """Return the layers that may be heads: trained or tied; once each, and again under a second name of a head.

    Frozen layers are neither heads nor twins of blocks: a target network, a teacher, the network of a loss. They are
    only taken with ``frozen``.
    """
    embeddings = {id(use.parameter) for use in uses if use.role.is_embedding}
    layers = []
    seen = set()
    for use in uses:
        key = id(use.parameter)
        if not use.role.is_layer or not (frozen or use.parameter.requires_grad or key in embeddings):
            continue
        if key not in seen or is_head_name(plain_name(use.layer).rpartition(".")[2]):
            layers.append(Layer(use.layer, use.parameter.shape, use.role.layout, key in embeddings))
        seen.add(key)
    return layers


def _widths(uses: Sequence[_Use], *, frozen: bool = False) -> Widths:
    """Return the widths that each module with parameters takes and gives, once each."""
    by_path: defaultdict[str, list[_Use]] = defaultdict(list)
    for use in uses:
        by_path[use.layer].append(use)
    modules = []
    for path, of_one in by_path.items():
        owner, trained = of_one[0].owners[0], frozen or any(use.parameter.requires_grad for use in of_one)
        if widths := module_widths(owner):
            modules.append(Module(path, frozenset(widths[0]), frozenset(widths[1]), trained))
            continue
        takes: set[int] = set()
        gives: set[int] = set()
        rows = 0
        is_matrix = is_convolution = False
        for use in of_one:
            shape = use.parameter.shape
            if use.role.is_embedding and len(shape) == 2:
                rows, width = shape
                takes, gives = takes | {width}, gives | {width}
            elif use.role.is_layer:
                layer = Layer(path, shape, use.role.layout)
                takes, gives = takes | {layer.inputs}, gives | {layer.outputs}
                is_matrix, is_convolution = True, len(shape) > 2
            elif len(shape) > 1 and use.role.name != "vector":
                # A fused projection, a stack of experts, a free parameter.
                sizes = set(shape[-3:] if len(shape) < 4 else shape[:2])
                takes, gives = takes | sizes, gives | sizes
                is_matrix = True
            elif use.name == "weight" and use.parameter.numel() > 1:  # a norm
                takes, gives = takes | set(shape), gives | set(shape)
        modules.append(Module(path, frozenset(takes), frozenset(gives), trained, rows, is_matrix, is_convolution))
    return Widths(modules)
