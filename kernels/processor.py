"""What the processor can do that decides in which precision is computed."""

from __future__ import annotations

import platform


def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Whether the device has instructions for it; without, bfloat16 is slower than float32, up to seventy times."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine().lower() in ("x86_64", "amd64") and not torch.cpu._is_avx512_bf16_supported():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
