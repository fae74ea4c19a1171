"""What the processor can do that decides in which precision is computed."""

from __future__ import annotations

import platform


def multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; without, bfloat16 is slower than float32."""
    import torch

    if platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
