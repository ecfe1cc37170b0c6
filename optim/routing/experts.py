"""Stacks of experts, and the routers that choose among them."""

import re

from torch import Tensor, nn

from lightning_muon.optim.routing.declared import declared_widths
from lightning_muon.optim.routing.heads import first_number
from lightning_muon.optim.routing.place import Place
from lightning_muon.optim.routing.roles import Role, matrices, unknown
from lightning_muon.optim.update.matrix_layout import MatrixLayout

_EXPERT_NAME = re.compile(r"expert|moe", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"(Router|Gat(e|ing))$")
# A hidden matrix like others: the runs of Muon at scale on mixtures of experts excluded only the embedding, the head
# and vectors: Liu et al. (2025), arXiv:2502.16982, and its code,
# https://github.com/MoonshotAI/Moonlight/blob/master/examples/toy_train.py
ROUTER = "hidden matrix, router of experts"

_NUMBERS = ("num_experts", "n_routed_experts", "num_local_experts", "n_experts")
_GATE_UP = ("gate_up", "w13")
_DOWN = ("down", "w2")


def is_router(place: Place) -> bool:
    """Return whether a matrix gives the scores of experts, by its own name or class, or those of a module around it.

    ``"router"`` is a router; ``"gate"``, or a class named after one, if experts are beside it or it says their number.
    """
    steps = list(zip(place.names, [place.owner, *place.around], strict=False))
    # A router may have its layer inside, as in Switch Transformers: router.classifier, or HunYuan: gate.wg.
    for index, (name, module) in enumerate(steps[:2]):
        if index and len(list(module.children())) > 2:
            return False  # a module with much else inside
        around = [place.owner, *place.around][index + 1 : index + 2]
        among_experts = any(_has_experts(beside) for beside in [*around, module])
        if name == "router" or (among_experts and (name == "gate" or _ROUTER_CLASS.search(type(module).__name__))):
            return True
    return False


def _has_experts(module: nn.Module) -> bool:
    children = [name for name, _ in module.named_children()]
    return any(_EXPERT_NAME.search(name) and "gate" not in name for name in [*children, *vars(module)])


def expert_role(place: Place) -> Role | None:
    """Return the role of a stack of experts, (E, m, n), or of a router that owns its matrix; ``None`` for others."""
    owner, parameter = place.owner, place.parameter
    if parameter.ndim == 2 and _ROUTER_CLASS.search(place.kind) and place.name in {"weight", "kernel"}:
        says_so = first_number([owner], *_NUMBERS) == parameter.shape[0]
        return matrices(MatrixLayout(), ROUTER, name="router", confidence="known" if says_so else "by name")
    if parameter.ndim != 3 or not _EXPERT_NAME.search(f"{place.kind}.{place.path}.{place.name}"):
        return None
    layout = expert_layout(owner, place.name, parameter, place.around[0] if place.around else None)
    if layout is None:
        return unknown("experts, stored (out, in) or (in, out): not known")
    alternating = layout.interleaved > 1
    return matrices(layout, "experts, a matrix each", "gate and up, which alternate" if alternating else "")


def expert_layout(owner: nn.Module, name: str, weights: Tensor, parent: nn.Module | None = None) -> MatrixLayout | None:
    """Find the matrices in a stack of experts, (E, out, in) or (E, in, out), from its owner and its name there.

    Return ``None`` if it is not known which of the two dimensions is the output.
    """
    transposed = _is_transposed(owner, weights)
    if transposed is None:
        return None
    outputs = weights.shape[2 if transposed else 1]
    fused = name.lower().startswith(_GATE_UP) and outputs % 2 == 0
    fused = fused or (not transposed and _halves_feed_another(owner, weights, parent))
    pieces = outputs // 2 if fused and _alternates(owner) else 1
    return MatrixLayout(stacked=True, blocks=2 if fused else 1, transposed=transposed, interleaved=pieces)


def _is_transposed(owner: nn.Module, weights: Tensor) -> bool | None:
    stacks = {key.lower(): stack.shape for key, stack in owner.named_parameters(recurse=False) if stack.ndim == 3}
    gate_up = next((shape for key, shape in stacks.items() if key.startswith(_GATE_UP)), None)
    down = next((shape for key, shape in stacks.items() if key.startswith(_DOWN)), None)
    if gate_up and down:  # the hidden layer is twice as wide in the first, which contains gate and up
        if gate_up[1] == 2 * down[2] and gate_up[2] == down[1]:
            return False
        if gate_up[2] == 2 * down[1] and gate_up[1] == down[2]:
            return True
    for attribute in ("is_transposed", "transposed"):  # transformers sets the first
        if isinstance(stored := getattr(owner, attribute, None), bool):
            return stored
    for widths in declared_widths(owner):
        if widths[0] != widths[1] and sorted(widths) == sorted(weights.shape[1:]):
            return widths != tuple(weights.shape[1:])
    return False if weights.shape[1] == weights.shape[2] else None


def _halves_feed_another(owner: nn.Module, weights: Tensor, parent: nn.Module | None) -> bool:
    """Return whether another stack beside it takes half of the outputs, as behind gate and up in JetMoE."""
    behind = (weights.shape[0], weights.shape[2], weights.shape[1] // 2)
    return any(
        child is not owner and type(child) is type(owner) and tuple(stack.shape) == behind
        for child in (parent.children() if parent is not None else ())
        for stack in child.parameters(recurse=False)
    )


def _alternates(owner: nn.Module) -> bool:
    """Return whether gate and up alternate row by row, as in GPT-OSS."""
    return getattr(owner, "is_concatenated", True) is False or type(owner).__name__.startswith("GptOss")
