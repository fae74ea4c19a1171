"""The noise of an image: from a generator of its own, so that neither its batch nor its neighbours change it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def seeded(seed: int) -> Any:
    """A torch generator on the CPU that depends on all 64 bits of `seed`.

    torch's `manual_seed` drops the upper 32, which would give two of some 65,000 images the same noise. Seeds below
    2**32 mean what they mean everywhere else; the upper half of larger ones is mixed into the generator's state.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if seed >= 2**32:
        state = generator.get_state()
        words = state.numpy()[24 : 24 + 8 * 624].view(np.uint64)  # of the Mersenne twister, 32 bits in each
        words ^= np.random.SeedSequence(seed >> 32).generate_state(624)
        generator.set_state(state)
    return generator
