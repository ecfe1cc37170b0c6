"""Matrices that are known by what is beside them: the widths that their owner declares, or a bias."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from lightning_muon.optim.routing.heads import first_number, heads_of
from lightning_muon.optim.routing.place import Place
from lightning_muon.optim.update.matrix_layout import MatrixLayout

# Outputs and inputs, as torch, torch-geometric, Megatron and JetMoE, diffusers and timm, and many others name them.
_WIDTHS = (
    ("out_features", "in_features"),
    ("out_channels", "in_channels"),
    ("output_size", "input_size"),
    ("output_dim", "input_dim"),
    ("out_dim", "in_dim"),
    ("dim_out", "dim_in"),
    ("d_out", "d_in"),
)


def declared_widths(owner: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield each pair of outputs and inputs that a module declares."""
    for names in _WIDTHS:
        outputs, inputs = (first_number([owner], name) for name in names)
        if outputs is not None and inputs is not None:
            yield outputs, inputs


def declared_layout(place: Place) -> MatrixLayout | None:
    """Return where the matrices are in a parameter whose owner declares its numbers of outputs and inputs.

    It is (out, in) or (in, out), a convolution (out, in, kernel…), or a stack of matrices; ``None`` if the shape is
    none of these. Attention, as in torch-geometric, has the outputs of all heads.
    """
    heads = heads_of([place.owner])
    for outputs, inputs in declared_widths(place.owner):
        for fan_out in (outputs, outputs * heads.queries) if heads else (outputs,):
            if (layout := _with_widths(place, fan_out, inputs)) is not None:
                return layout
    return None


def _with_widths(place: Place, outputs: int, inputs: int) -> MatrixLayout | None:
    shape = tuple(place.parameter.shape)
    has_kernel = hasattr(place.owner, "kernel_size") or len(shape) > 3
    for stacked in (False, True):
        first, *rest = shape[stacked:]
        if not rest or (len(rest) > 1 and not (has_kernel and all(size < min(first, rest[0]) for size in rest[1:]))):
            continue
        if stacked and len(rest) > 1 and shape[0] > 1:
            continue
        if (first, rest[0]) == (outputs, inputs):
            return MatrixLayout(stacked=stacked)
        if (first, *rest) == (inputs, outputs):
            return MatrixLayout(stacked=stacked, transposed=True)
    return None


def layout_by_bias(place: Place) -> MatrixLayout | None:
    """Return where the matrices are in a parameter with a bias of their output width beside it.

    The bias of ``gate_weight`` is ``gate_bias``. A stack (n, out, in) has the bias (n, out).
    """
    bias, shape = beside(place, "bias"), tuple(place.parameter.shape)
    if bias is None or len(shape) not in {2, 3}:
        return None
    stack, sizes = shape[:-2], shape[-2:]
    for transposed, size in enumerate(sizes):
        if tuple(bias.shape) == (*stack, size):
            return MatrixLayout(stacked=bool(stack), transposed=bool(transposed))
    return None


def has_bias_of_its_shape(place: Place) -> bool:
    """Return whether a parameter has a bias of its own shape beside it: both act on each element."""
    bias = beside(place, "bias")
    return bias is not None and bias.shape == place.parameter.shape


def beside(place: Place, kind: str) -> Tensor | None:
    """Return the parameter that has the name of this one, with ``weight`` or ``kernel`` replaced."""
    for own in ("weight", "kernel"):
        if place.name.endswith(own):
            found = getattr(place.owner, place.name.removesuffix(own) + kind, None)
            return found if isinstance(found, Tensor) else None
    return None


def by_head_layout(place: Place, outputs: Sequence[str]) -> MatrixLayout | None:
    """Return where the matrix is in a projection of attention that keeps its heads apart, as in XLNet.

    It is (in, heads, size), or (out, heads, size) if its name is among those of an output projection.
    """
    heads = heads_of([place.owner, *place.around])
    if heads is None or heads.size is None or tuple(place.parameter.shape[1:]) != (heads.queries, heads.size):
        return None
    return MatrixLayout(transposed=place.stem not in outputs)
