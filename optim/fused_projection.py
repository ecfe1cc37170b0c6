"""Projections that hold several matrices one after the other."""

from torch import Tensor, nn

# Two halves, always of one size: key and value, or gate and up.
_HALVES = frozenset({"kv", "kv_proj", "to_kv", "wkv", "gate_up", "gate_up_proj", "w12", "w13", "weights_in"})
# Query, key and value; only where key and value have as many heads as the query are they of one size. The c_attn of a
# cross-attention in GPT-2 holds key and value alone.
_ATTENTION = {"qkv": (3,), "qkv_proj": (3,), "to_qkv": (3,), "wqkv": (3,), "c_attn": (3, 2)}
# Fused in Mamba and ModernBERT, plain elsewhere: what stands behind it tells.
_SOMETIMES = {"in_proj": (2, 3), "wi": (2,)}
# Query, key and value of one head, then of the next: GPT-NeoX, BLOOM, Falcon.
_BY_HEAD = frozenset({"query_key_value"})
_OUTPUT_PROJECTIONS = frozenset({"proj", "out_proj", "o_proj", "c_proj", "to_out", "wo", "out", "dense"})


def fused_blocks(name: str, parent: nn.Module | None, fan_out: int, fan_in: int) -> tuple[int, str]:
    """Count the equal blocks that lie side by side along the outputs of a projection.

    Args:
        name: The projection's own name, such as ``"qkv"``.
        parent: The module around it; its output projection tells how wide one block is.
        fan_out: Outputs of the projection.
        fan_in: Inputs of the projection.

    Returns:
        The number of blocks; and for a fused projection that is not taken apart, why, else an empty string.
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
    """Return how many inputs the output projection beside takes: as many as one block of queries gives."""
    for name, child in parent.named_children() if parent is not None else ():
        if name.lower() in _OUTPUT_PROJECTIONS:
            for part in child.modules():  # it may be in a sequence with a dropout
                weight = getattr(part, "weight", None)
                if isinstance(weight, Tensor) and weight.ndim == 2:
                    return weight.shape[0 if type(part).__name__ == "Conv1D" else 1]
    return None
