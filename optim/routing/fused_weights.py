"""Parameters that contain several matrices: fused projections, and stacks of experts."""

from torch import Tensor, nn

from lightning_muon.optim.update.matrix_layout import MatrixLayout

# Two halves, always of one size: key and value, or gate and up.
_HALVES = frozenset({"kv", "kv_proj", "to_kv", "wkv", "gate_up", "gate_up_proj", "w12", "w13", "weights_in"})
# Query, key and value, of one size only if all have the same number of heads. The c_attn of a cross-attention in GPT-2
# contains only key and value.
_ATTENTION = {"qkv": (3,), "qkv_proj": (3,), "to_qkv": (3,), "wqkv": (3,), "c_attn": (3, 2)}
# Fused in Mamba and ModernBERT, plain elsewhere: the width of the output projection decides.
_SOMETIMES = {"in_proj": (2, 3), "wi": (2,)}
# Query, key and value of one head, then of the next: GPT-NeoX, BLOOM, Falcon.
_BY_HEAD = frozenset({"query_key_value"})
_OUTPUT_PROJECTIONS = frozenset({"proj", "out_proj", "o_proj", "c_proj", "to_out", "wo", "out", "dense"})

GATE_UP = ("gate_up", "w13")
_DOWN = ("down", "w2")
_WIDTHS = (("out_features", "in_features"), ("output_size", "input_size"))


def fused_blocks(name: str, parent: nn.Module | None, fan_out: int, fan_in: int) -> tuple[int, str]:
    """Count the equal blocks along the outputs of a projection, by its own name, such as ``"qkv"``.

    The module around it, ``parent``, has an output projection, whose inputs give the width of a block.

    Returns:
        The number of blocks; and the reason if a fused projection is not cut, else an empty string.
    """
    name = name.lower()
    if name in _HALVES and fan_out % 2 == 0:
        return 2, ""
    if name in _BY_HEAD:
        return 1, "fused head by head: left whole"
    width = _width_behind(parent)
    if width is None and name in _ATTENTION:
        width = fan_in
    for blocks in _ATTENTION.get(name, _SOMETIMES.get(name, ())):
        if fan_out == blocks * (width or 0):
            return blocks, ""
    return 1, "fused, in blocks not known to be equal: left whole" if name in _ATTENTION or name in _HALVES else ""


def _width_behind(parent: nn.Module | None) -> int | None:
    """Return the number of inputs of the output projection in the same module, which is the width of a block."""
    for name, child in parent.named_children() if parent is not None else ():
        if name.lower() in _OUTPUT_PROJECTIONS:
            for part in child.modules():  # it may be in a sequence with dropout
                weight = getattr(part, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2:
                    return weight.shape[0 if type(part).__name__ == "Conv1D" else 1]
    return None


def expert_layout(owner: nn.Module, name: str, weights: Tensor) -> MatrixLayout | None:
    """Find the matrices in a stack of experts, (E, out, in) or (E, in, out), from its owner and its name there.

    Return ``None`` if it is not known which of the two dimensions is the output.
    """
    transposed = _is_transposed(owner, weights)
    if transposed is None:
        return None
    outputs = weights.shape[2 if transposed else 1]
    fused = name.lower().startswith(GATE_UP) and outputs % 2 == 0 and not interleaved(owner)
    return MatrixLayout(stacked=True, blocks=2 if fused else 1, transposed=transposed)


def _is_transposed(owner: nn.Module, weights: Tensor) -> bool | None:
    stacks = {key.lower(): stack.shape for key, stack in owner.named_parameters(recurse=False) if stack.ndim == 3}
    gate_up = next((shape for key, shape in stacks.items() if key.startswith(GATE_UP)), None)
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


def interleaved(owner: nn.Module) -> bool:
    """Return whether gate and up alternate row by row, as in GPT-OSS: then there are no blocks to cut."""
    return getattr(owner, "is_concatenated", True) is False or type(owner).__name__.startswith("GptOss")
