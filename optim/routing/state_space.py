"""Fused projections of state-space mixers and of linear attention."""

from torch import Tensor, nn

from lightning_muon.optim.routing.heads import first_number, width_behind
from lightning_muon.optim.update.matrix_layout import MatrixLayout


def state_space_layout(name: str, mixer: nn.Module | None, fan_out: int) -> tuple[MatrixLayout, str] | None:
    """Find the blocks along the outputs of a projection in a mixer, by its own name, such as ``"in_proj"``.

    Return the layout of a weight (out, in) and the words for it, or ``None`` if it is no such projection.
    """
    if mixer is None:
        return None
    if name == "in_proj":
        return _mamba2(mixer, fan_out)
    if name == "x_proj":
        return _step_and_state(mixer, fan_out)
    return _delta(name, mixer, fan_out)


def _mamba2(mixer: nn.Module, fan_out: int) -> tuple[MatrixLayout, str] | None:
    """Gate, input, B and C of the state space and the step size of each head: Mamba-2, arXiv:2405.21060.

    Told by the modules behind: a convolution over input, B and C, an output projection, and a decay for each head.
    """
    inner, convolution, decay = width_behind(mixer), getattr(mixer, "conv1d", None), getattr(mixer, "A_log", None)
    if inner is None or not isinstance(convolution, nn.Conv1d) or not isinstance(decay, Tensor) or decay.ndim != 1:
        return None
    states, heads = convolution.in_channels - inner, decay.numel()
    if states <= 0 or states % 2 or fan_out != inner + convolution.in_channels + heads:
        return None
    sizes = (inner, inner, states // 2, states // 2, heads)
    return MatrixLayout(split_sizes=sizes), "gate, input, B, C and step size, fused"


def _step_and_state(mixer: nn.Module, fan_out: int) -> tuple[MatrixLayout, str] | None:
    """Step size, B and C of Mamba, arXiv:2312.00752: the projection behind takes the step size."""
    decay, behind = getattr(mixer, "A_log", None), getattr(mixer, "dt_proj", None)
    if not isinstance(decay, Tensor) or decay.ndim != 2 or not isinstance(behind, nn.Linear):
        return None
    rank, states = behind.in_features, decay.shape[1]
    if fan_out != rank + 2 * states:
        return None
    return MatrixLayout(split_sizes=(rank, states, states)), "step size, B and C, fused"


def _delta(name: str, mixer: nn.Module, fan_out: int) -> tuple[MatrixLayout, str] | None:
    """Query, key, value, gate, write strength and decay of a gated delta net, arXiv:2412.06464, as transformers has it.

    Those of a key head, with the value heads that share it, are followed by those of the next (Qwen3-Next), but for the
    query, key and value of later models, which are one after another.
    """
    numbers = [first_number([mixer], n) for n in ("num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim")]
    if None in numbers:
        return None
    key_heads, value_heads, key, value = (number or 0 for number in numbers)
    shared = value_heads // key_heads
    kinds: dict[str, tuple[tuple[int, ...], int, str]] = {
        "in_proj_qkvz": ((key, key, shared * value, shared * value), key_heads, "query, key, value and gate"),
        "in_proj_ba": ((shared, shared), key_heads, "write strength and decay"),
        "in_proj_qkv": ((key_heads * key, key_heads * key, value_heads * value), 1, "query, key and value"),
    }
    if name not in kinds:
        return None
    sizes, repeated, said = kinds[name]
    if sum(sizes) * repeated != fan_out:
        return None
    fused = f"{said}, fused by key head" if repeated > 1 else f"{said}, fused"
    return MatrixLayout(split_sizes=sizes, interleaved=repeated), fused
