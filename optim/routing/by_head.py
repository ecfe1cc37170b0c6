"""Cut the projections of attention into a matrix for each head."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import nn

from lightning_muon.optim.routing.heads import Heads, first_number, heads_of, listed, width_behind
from lightning_muon.optim.routing.roles import Role
from lightning_muon.optim.update.matrix_layout import MatrixLayout

# What a projection gives, by its own name: in transformers, timm, diffusers, torch, GPT-2 and Llama code.
_KINDS = {
    "query": "q q_proj query query_proj to_q wq c_q q_lin q_attn q_b_proj",
    "key": "k k_proj key key_proj to_k wk c_k k_lin",
    "value": "v v_proj value value_proj to_v wv c_v v_lin",
    "key and value": "kv kv_proj to_kv wkv",
    "latent": "kv_b_proj",  # from what multi-head latent attention compresses: DeepSeek-V2, arXiv:2405.04434
    "query, key and value": "qkv qkv_proj to_qkv wqkv c_attn query_key_value",
    "output": "o o_proj out_proj proj output_proj c_proj to_out out_lin wo out dense",
}
_KIND_OF = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_ATTENTION = re.compile(r"att(entio)?n|mha", re.IGNORECASE)


def by_head(role: Role, name: str, shape: Sequence[int], names: Sequence[str], modules: Sequence[nn.Module]) -> Role:
    """Return the role of a matrix of Muon, with a matrix for each head if it is a projection of attention.

    The projections of query, key and value are cut along their outputs, the output projection along its inputs.

    Args:
        role: Its role, which is returned for other matrices.
        name: Its name in its owner, such as ``"weight"``.
        shape: Its shape.
        names: The own name of its owner, then those of the modules around it; that of the model is empty.
        modules: Its owner, then the modules around it, up to the whole model.
    """
    own, names, modules = _own_name(name, names, modules)
    kind = _KIND_OF.get(own.lower())
    if isinstance(modules[0], nn.MultiheadAttention) and own == "in_proj":
        kind = "query, key and value"
    places = list(_attention(kind, names, modules))
    if kind is None or not places or len(shape) != 2:
        return role
    heads = heads_of(places)
    if heads is None:
        return replace(role, reason=f"{role.reason}, not by head: nothing says their number")
    transposed = role.layout.transposed
    fan_out, fan_in = MatrixLayout(transposed=transposed).fans(shape)[0]
    found = _cut(kind, own, heads, (fan_out, fan_in), places)
    if found is None:
        size = f" of {heads.size}" if heads.size else ""
        where = f"{fan_in} inputs" if kind == "output" else f"{fan_out} outputs"
        reason = f"{role.reason}, not by head: {heads.queries} heads{size} do not make its {where}"
        return replace(role, reason=reason)
    layout, said = found
    stored = ", stored (in, out)" if transposed else ""
    reason = f"{role.reason.partition(',')[0]}, {said}{stored}"
    return replace(role, reason=reason, layout=replace(layout, transposed=transposed))


def _cut(
    kind: str, own: str, heads: Heads, fans: tuple[int, int], places: Sequence[nn.Module]
) -> tuple[MatrixLayout, str] | None:
    """Return the layout of a weight (out, in) and the words for it; ``None`` if the heads do not make its shape."""
    fan_out, fan_in = fans
    queries, keys = heads.queries, heads.keys
    if kind == "output":
        size = heads.value_size or heads.size
        fits = queries * size == fan_in if size else fan_in % queries == 0
        layout = MatrixLayout(blocks=queries, along_inputs=True)
        return (layout, f"inputs by head ({queries})") if fits else None
    if kind == "latent":
        sizes = [first_number(places, name) for name in ("qk_nope_head_dim", "v_head_dim")]
        pieces = tuple(size for size in sizes if size is not None) * queries
        fits = len(pieces) == 2 * queries and sum(pieces) == fan_out
        return (MatrixLayout(split_sizes=pieces), f"key and value by head ({queries})") if fits else None
    if kind == "value":
        heads = replace(heads, size=heads.value_size or heads.size)
    choices: dict[str, list[tuple[int, ...]]] = {
        "query": [(queries,)],
        "key": [(keys,)],
        "value": [(keys,)],
        "key and value": [(keys, keys)],
        "query, key and value": [heads.fused, (keys, keys)] if own == "c_attn" else [heads.fused],
    }
    width = width_behind(places[0]) or fan_in
    for numbers in choices[kind]:
        if heads.rows(sum(numbers), fan_out, width):
            what = {3: "query, key and value ", 2: "key and value "}.get(len(numbers), "")
            return MatrixLayout(blocks=sum(numbers)), f"{what}by head ({listed(numbers)})"
    return None


def _own_name(
    name: str, names: Sequence[str], modules: Sequence[nn.Module]
) -> tuple[str, Sequence[str], Sequence[nn.Module]]:
    """Return the name of a projection, and the names and modules around it."""
    if name != "weight" or len(modules) < 2:
        return re.sub("_(weight|kernel)$", "", name), names, modules
    own, names, modules = names[0], names[1:], modules[1:]
    if own.isdigit() and isinstance(modules[0], nn.Sequential | nn.ModuleList) and len(modules) > 1:
        return names[0], names[1:], modules[1:]  # a projection with dropout behind it
    return own, names, modules


def _attention(kind: str | None, names: Sequence[str], modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Return the modules that may say the heads of a projection, the nearest first; none outside of attention.

    Attention has projections of query and key beside each other. The output projection may be in another module beside,
    as in BERT.
    """
    if _has_projections(modules[0]):
        yield from modules
    elif kind == "output" and len(modules) > 1 and _ATTENTION.search(f"{type(modules[1]).__name__} {names[1]}"):
        beside = [module for module in modules[1].modules() if _has_projections(module)]
        if beside:
            yield from (beside[0], *modules[1:])


def _has_projections(module: nn.Module) -> bool:
    names = [name for name, _ in module.named_children()]
    names += [re.sub("_(weight|kernel)$", "", name) for name, _ in module.named_parameters(recurse=False)]
    kinds = {_KIND_OF.get(name.lower()) for name in names}
    together = {"key", "key and value", "latent"}
    has_both = "query" in kinds and bool(kinds & together)
    return has_both or "query, key and value" in kinds or isinstance(module, nn.MultiheadAttention)
