"""Parameters that contain several matrices: fused projections, and stacks of experts."""

from torch import Tensor, nn

from lightning_muon.optim.routing.heads import Heads, heads_of, listed, width_behind
from lightning_muon.optim.update.matrix_layout import MatrixLayout

# Two halves, always of one size: key and value, or gate and up.
_HALVES = frozenset({"kv", "kv_proj", "to_kv", "wkv", "gate_up", "gate_up_proj", "w12", "w13", "weights_in"})
# Query, key and value, of one size only if all have the same number of heads. The c_attn of a cross-attention in GPT-2
# contains only key and value.
_ATTENTION = {"qkv": (3,), "qkv_proj": (3,), "to_qkv": (3,), "wqkv": (3,), "c_attn": (3, 2), "query_key_value": (3,)}
# Fused in Mamba and ModernBERT, plain elsewhere: the width of the output projection decides.
_SOMETIMES = {"in_proj": (2, 3), "wi": (2,)}
# Query, key and value of one head, or of one group of query heads that share key and value, then of the next: the
# name in GPT-NeoX, BLOOM, Persimmon and Falcon.
_BY_GROUP = "query_key_value"
# CodeGen was trained on four devices, and keeps the query, value and key of each together.
_CODEGEN_PIECES = 4

_GATE_UP = ("gate_up", "w13")
_DOWN = ("down", "w2")
_WIDTHS = (("out_features", "in_features"), ("output_size", "input_size"))


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
    if name in _HALVES and fan_out % 2 == 0:
        return MatrixLayout(blocks=2), ""
    if name == "qkv_proj" and kind.startswith("CodeGen") and fan_out % (3 * _CODEGEN_PIECES) == 0:
        layout = MatrixLayout(blocks=3, interleaved=_CODEGEN_PIECES)
        return layout, f"query, value and key, fused in {_CODEGEN_PIECES} pieces"
    width = width_behind(parent)
    if width is None and name in _ATTENTION:
        width = fan_in
    heads = heads_of([parent]) if parent is not None and name in _ATTENTION else None
    if _is_by_group(name, parent):
        return _grouped(heads, fan_out, width or fan_in)
    for blocks in _ATTENTION.get(name, _SOMETIMES.get(name, ())):
        if fan_out == blocks * (width or 0):
            return MatrixLayout(blocks=blocks), ""
    if heads is not None and (size := heads.rows(sum(heads.fused), fan_out, width or fan_in)):
        sizes = tuple(size * number for number in heads.fused)
        return MatrixLayout(split_sizes=sizes), f"query, key and value of {listed(heads.fused)} heads, fused"
    whole = "fused, in blocks not known to be equal: left whole"
    return MatrixLayout(), whole if name in _ATTENTION or name in _HALVES else ""


def _is_by_group(name: str, parent: nn.Module | None) -> bool:
    """Return whether query, key and value alternate by head or by group of heads in a fused projection."""
    if name == "c_attn":  # GPTBigCode's, where key and value have as many heads
        return getattr(parent, "multi_query", None) is False
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


def expert_layout(owner: nn.Module, name: str, weights: Tensor) -> MatrixLayout | None:
    """Find the matrices in a stack of experts, (E, out, in) or (E, in, out), from its owner and its name there.

    Return ``None`` if it is not known which of the two dimensions is the output.
    """
    transposed = _is_transposed(owner, weights)
    if transposed is None:
        return None
    outputs = weights.shape[2 if transposed else 1]
    fused = name.lower().startswith(_GATE_UP) and outputs % 2 == 0
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
    for attributes in _WIDTHS:
        widths = tuple(getattr(owner, attribute, None) for attribute in attributes)
        if widths[0] != widths[1] and sorted(widths, key=str) == sorted(weights.shape[1:], key=str):
            return widths != tuple(weights.shape[1:])
    return None


def _alternates(owner: nn.Module) -> bool:
    """Return whether gate and up alternate row by row, as in GPT-OSS."""
    return getattr(owner, "is_concatenated", True) is False or type(owner).__name__.startswith("GptOss")
