"""Images for encoders, made of numbers alone."""

import numpy as np


def images_of(height, width, seed):
    """One of each kind: noise, one colour, extremes, smooth, flat shapes."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([3 * x + y, 2 * y, 255 - 2 * x], axis=2) + rng.integers(-9, 9, (height, width, 3))
    flat = np.full((height, width, 3), rng.integers(0, 256, 3), np.uint8)
    shapes = flat.copy()
    shapes[height // 4 : height // 2, width // 3 :] = rng.integers(0, 256, 3)
    return [
        rng.integers(0, 256, (height, width, 3), np.uint8),
        flat,
        (rng.integers(0, 2, (height, width, 1)) * 255).astype(np.uint8).repeat(3, axis=2),
        np.clip(smooth, 0, 255).astype(np.uint8),
        shapes,
    ]
