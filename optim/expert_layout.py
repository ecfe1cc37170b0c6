"""How the weights of a mixture of experts are stored."""

from torch import Tensor, nn

from lightning_muon.optim.matrix_layout import MatrixLayout

GATE_UP = ("gate_up", "w13")
_DOWN = ("down", "w2")
_WIDTHS = (("out_features", "in_features"), ("output_size", "input_size"))


def expert_layout(owner: nn.Module, name: str, weights: Tensor) -> MatrixLayout | None:
    """Find the matrices in a stack of experts (E, out, in) or (E, in, out).

    Args:
        owner: The module that holds the stack.
        name: The name of the stack in its owner, such as ``"gate_up_proj"``.
        weights: The stack, of 3 dimensions.

    Returns:
        The layout, or None if nothing tells which of the two dimensions is the output.
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
    if gate_up and down:  # the hidden layer is twice as wide in the first, which holds gate and up
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
    """Tell whether gate and up alternate row by row, as in GPT-OSS: there are no blocks to take apart then."""
    return getattr(owner, "is_concatenated", True) is False or type(owner).__name__.startswith("GptOss")
