"""In which precision the optimizer keeps its state."""

import torch
from torch import Tensor

HALF = (torch.float16, torch.bfloat16)


def momentum_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of Muon's momentum: the parameter's, but float32 for float16, whose range ends at 6e-8."""
    return torch.float32 if param.dtype == torch.float16 else param.dtype


def average_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype of averages that change little in a step, such as AdamW's moments: at least float32."""
    return torch.float32 if param.dtype in HALF else param.dtype
