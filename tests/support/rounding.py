"""What rounding once leaves between a float32 computation's result and the exact one."""

import torch
from torch import Tensor


def assert_rounded_once(found: Tensor, exact: Tensor, dtype: torch.dtype, size: float = 1.0) -> None:
    """Within one unit in the last place of `dtype`, and what float32 sums of values of `size` leave.

    Args:
        exact: float64.
    """
    assert found.dtype == dtype
    error = (found.double() - exact).abs()
    allowed = torch.finfo(dtype).eps * exact.abs() + 3e-5 * size
    assert bool((error <= allowed).all()), float((error - allowed).max())
