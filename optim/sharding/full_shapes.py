"""A model as it was before FSDP1 flattened it, for those who look at shapes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lightning_muon.optim.sharding.fully_sharded_data_parallel import is_flattened
from lightning_muon.optim.sharding.sharding import Sharding


@contextmanager
def full_shapes(module: nn.Module, shardings: Mapping[Tensor, Sharding]) -> Iterator[dict[int, nn.Parameter]]:
    """Show each parameter of a module in its full shape, as one without values that stands in for it.

    What part a parameter plays is told from shapes, its own and those beside it; FSDP1 leaves 1-D pieces.

    Args:
        module: The module; the context puts its own parameters back.
        shardings: Of its parameters; what is not in there is whole.

    Yields:
        The module's own parameter by the id of the one that stands in for it.

    Raises:
        ValueError: If FSDP1 has flattened a parameter that has no sharding.
    """
    stand_ins: dict[Tensor, nn.Parameter] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for path, owner in module.named_modules():
        for name, parameter in owner._parameters.items():
            if parameter is None:
                continue
            sharding = shardings.get(parameter)
            if sharding is None and is_flattened(parameter):
                raise ValueError(
                    f"{path}.{name} is a piece of what FSDP has flattened, and its shape is not known here:"
                    " route the module that FSDP wraps, or the LightningModule"
                )
            if sharding is not None and sharding.shape != parameter.shape:
                replaced.append((owner, name, parameter))
                stand_ins[parameter] = _stand_in(parameter, sharding.shape)
    try:
        for owner, name, parameter in replaced:
            owner._parameters[name] = stand_ins[parameter]
        yield {id(stand_in): parameter for parameter, stand_in in stand_ins.items()}  # type: ignore[misc]
    finally:
        for owner, name, parameter in replaced:
            owner._parameters[name] = parameter


def _stand_in(parameter: nn.Parameter, shape: torch.Size) -> nn.Parameter:
    stand_in = nn.Parameter(torch.empty(shape, dtype=parameter.dtype, device="meta"), parameter.requires_grad)
    stand_in.__dict__.update(parameter.__dict__)  # such as the mark of Mamba's that must not decay
    return stand_in
