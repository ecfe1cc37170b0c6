"""Layers that contain several matrices along their outputs: query, key and value, gate and up, and others."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_muon.optim.routing.heads import Heads, first_number, heads_of, listed, width_behind
from lightning_muon.optim.routing.place import Place, is_vector
from lightning_muon.optim.routing.roles import Confidence
from lightning_muon.optim.routing.state_space import state_space_layout
from lightning_muon.optim.update.matrix_layout import MatrixLayout

# Two halves, always of one size: key and value, or gate and up.
_HALVES = frozenset(
    {"kv", "keys_values", "kv_proj", "to_kv", "wkv", "gate_up", "gate_up_proj", "w12", "w13", "weights_in"}
)
# Query, key and value, of one size only if all have the same number of heads. The c_attn of a cross-attention in GPT-2
# contains only key and value.
_ATTENTION = {
    **dict.fromkeys(("qkv", "qkvs", "qkv_proj", "to_qkv", "wqkv", "query_key_value", "queries_keys_values"), (3,)),
    **dict.fromkeys(("kqv", "kqv_lin"), (3,)),
    "c_attn": (3, 2),
}
# Fused in Mamba and ModernBERT, plain elsewhere: the width of the output projection decides.
_SOMETIMES = {"in_proj": (2, 3), "wi": (2,)}
# Query, key and value of one head, or of one group of query heads that share key and value, then of the next: the
# name in GPT-NeoX, BLOOM, Persimmon and Falcon.
_BY_GROUP = "query_key_value"
# Rows of a key and of a value in each head, in timm's LeViT, EfficientFormer, TinyViT and EfficientViT.
_ROWS = ("key_dim", "val_dim")
# CodeGen was trained on four devices, and keeps the query, value and key of each together.
_CODEGEN_PIECES = 4


@dataclass(frozen=True)
class Fused:
    """How a layer is fused.

    Args:
        layout: Where the blocks are in a weight (out, in).
        said: What to say beside the number of equal blocks: how they are fused, or why they are not cut.
        confidence: ``"known"`` if the modules around give the sizes, ``"by name"`` if the name alone says it.
    """

    layout: MatrixLayout
    said: str = ""
    confidence: Confidence = "by name"


def fused(place: Place, fan_out: int, fan_in: int) -> Fused | None:
    """Find the blocks along the outputs of a layer, by its name and by the modules around; ``None`` if it is plain."""
    for name, module in place.as_projection():
        layout, said = fused_layout(name, module, fan_out, fan_in)
        if layout != MatrixLayout() or said:
            sure = layout != MatrixLayout() and name.lower() not in _HALVES
            return Fused(layout, said, "known" if sure else "by name")
    if _feeds_half_of_it(place, fan_out, fan_in):
        return Fused(MatrixLayout(blocks=2), "2 halves, one of which gates the other", "known")
    return None


def fused_layout(name: str, parent: nn.Module | None, fan_out: int, fan_in: int) -> tuple[MatrixLayout, str]:
    """Find the blocks along the outputs of a projection, by its own name, such as ``"qkv"``.

    The module around it, ``parent``, says the numbers of heads, or has an output projection, whose inputs give the
    width of a block.

    Returns:
        The layout of a weight (out, in); and what to say of it beside the number of equal blocks: how blocks are fused,
        or why a fused projection is not cut.
    """
    name = name.lower()
    kind = type(parent).__name__
    if (found := state_space_layout(name, parent, fan_out) or _by_sizes(name, parent, fan_out)) is not None:
        return found
    if name in _HALVES and fan_out % 2 == 0 and not ("kv" in name and fan_out > 2 * (width_behind(parent) or fan_out)):
        return MatrixLayout() if _is_shared(parent, fan_out) else MatrixLayout(blocks=2), ""
    if name == "qkv_proj" and kind.startswith("CodeGen") and fan_out % (3 * _CODEGEN_PIECES) == 0:
        layout = MatrixLayout(blocks=3, interleaved=_CODEGEN_PIECES)
        return layout, f"query, value and key, fused in {_CODEGEN_PIECES} pieces"
    width = width_behind(parent)
    if width is None and name in _ATTENTION:
        width = fan_in
    heads = heads_of([parent]) if parent is not None and (name in _ATTENTION or name in _SOMETIMES) else None
    if _is_by_group(name, parent):
        return _grouped(heads, fan_out, width or fan_in)
    for blocks in _ATTENTION.get(name, _SOMETIMES.get(name, ())):
        if fan_out == blocks * (width or 0):
            pieces = fan_out // blocks if kind == "ZambaMambaMixer" else 1  # Zamba's input and gate alternate
            return MatrixLayout(blocks=blocks, interleaved=pieces), ""
    if name in _SOMETIMES:
        return MatrixLayout(), ""
    if heads is not None and (size := heads.rows(sum(heads.fused), fan_out, width or fan_in)):
        sizes = tuple(size * number for number in heads.fused)
        return MatrixLayout(split_sizes=sizes), f"query, key and value of {listed(heads.fused)} heads, fused"
    whole = "fused, in blocks not known to be equal: left whole"
    return MatrixLayout(), whole if name in _ATTENTION or name in _HALVES else ""


def _is_shared(attention: nn.Module | None, fan_out: int) -> bool:
    """Return whether a projection has the rows of the key alone, which is also the value, as in DeepSeek-V4."""
    heads = heads_of([attention]) if attention is not None else None
    return heads is not None and heads.size is not None and heads.size * heads.keys == fan_out


def _is_by_group(name: str, parent: nn.Module | None) -> bool:
    """Return whether query, key and value alternate by head or by group of heads in a fused projection."""
    if name == "c_attn":  # GPTBigCode's, where key and value have as many heads
        return getattr(parent, "multi_query", None) is False
    if name == "in_proj":  # DeBERTa's, https://github.com/microsoft/DeBERTa
        return type(parent).__name__.startswith("Disentangled")
    if name in _ATTENTION and getattr(parent, "head_first", False) is True:  # timm's MaxViT and CoAtNet
        return True
    return name == _BY_GROUP or (name == "wqkv" and type(parent).__name__.startswith("InternLM2"))


def _grouped(heads: Heads | None, fan_out: int, width: int) -> tuple[MatrixLayout, str]:
    """Return the layout of groups of query heads, each with the key and value that they share behind it."""
    if heads is None:
        return MatrixLayout(), "fused head by head, and nothing says their number: left whole"
    size = heads.rows(sum(heads.fused), fan_out, width)
    if size is None:
        return MatrixLayout(), f"fused, but {listed(heads.fused)} heads do not make {fan_out} outputs: left whole"
    said = f"query, key and value of {listed(heads.fused)} heads, fused"
    if heads.keys == heads.queries:
        return MatrixLayout(blocks=3, interleaved=heads.keys), f"{said} head by head"
    sizes = (size * heads.queries // heads.keys, size, size)
    return MatrixLayout(split_sizes=sizes, interleaved=heads.keys), said if heads.keys == 1 else f"{said} by group"


def _by_sizes(name: str, parent: nn.Module | None, fan_out: int) -> tuple[MatrixLayout, str] | None:
    """Return the layout where the attention says the rows of a key and of a value in a head.

    As in LeViT (arXiv:2104.01136) and its successors, whose heads come one after another, each with query, key and
    value, or with key and value alone; EfficientViT has a projection for each head.
    """
    sizes_said = ("dim_head_qk", "dim_head_v") if name in _HALVES and hasattr(parent, "dim_head_qk") else _ROWS
    key, value = (first_number([parent], size) for size in sizes_said)
    number = getattr(parent, "num_heads", None) or getattr(parent, "num_attention_heads", None)
    if key is not None and value is None and (ratio := first_number([parent], "attention_ratio")):
        value = ratio * key  # LeViT in transformers
    if key is None or value is None or not isinstance(number, int):
        return None
    sizes = (key, key, value) if name in _ATTENTION else (key, value) if name in _HALVES else ()
    what = "query, key and value" if len(sizes) == 3 else "key and value"
    for heads, said in ((number, f"{what}, fused head by head ({number})"), (1, f"{what} of a head, fused")):
        if sizes and sum(sizes) * heads == fan_out:
            return MatrixLayout(split_sizes=sizes, interleaved=heads), said
    return None


def _feeds_half_of_it(place: Place, fan_out: int, fan_in: int) -> bool:
    """Return whether a layer is the first of two in a module, and the second takes half of its outputs.

    As in a gated linear unit, arXiv:2002.05202: one half is multiplied by the activation of the other.
    """
    if fan_out % 2 or fan_out == fan_in:  # if they are equal, the layers may be beside each other
        return False
    for module in place.around:
        pair = list(islice(_layers(module), 3))
        if len(pair) > 1:
            (_, first), (layer, second) = pair[0], pair[-1]
            return len(pair) == 2 and first is place.parameter and _fans(layer, second) == (fan_in, fan_out // 2)
    return False


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, Tensor]]:
    """Yield the matrices in a module with their owners, but for the filters of depthwise convolutions."""
    for owner in module.modules():
        if not isinstance(owner, _ConvNd) or owner.groups == 1:
            for weight in owner.parameters(recurse=False):
                if not is_vector(weight):
                    yield owner, weight


def _fans(layer: nn.Module, weight: Tensor) -> tuple[int, int]:
    """Return the outputs and inputs of a linear layer, or of a convolution."""
    stored = weight.shape[:2]
    return (stored[1], stored[0]) if type(layer).__name__ == "Conv1D" else (stored[0], stored[1])
