"""True images of icon scenes, rendered on the training's own device from what a model reads of the scenes.

The same pixels as `workers.scenes.renderer`, bit for bit; there a core draws some thousands a second, a GPU in training
asks for a hundred thousand. Shapes do not depend on the scenes, so that a step can be captured as a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from millijoule.workers.scenes.renderer import icon_masks
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    ICON_TOKENS,
    IMAGE_SIZE,
    MAX_COUNT,
    PALETTE,
    WINDOWS,
)


class DeviceRenderer:
    """Draws scenes that are given as tokens; see `render`."""

    def __init__(self, device: str) -> None:
        def on_device(values: object, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.as_tensor(values, dtype=dtype).to(device)

        masks = torch.from_numpy(icon_masks())
        self._tile = masks.shape[-1]
        self._sizes = masks.shape[2]
        self._masks = masks.flatten().to(device)
        self._colours = on_device([PALETTE[c] for c in COLOURS], torch.int32)
        self._backgrounds = on_device([PALETTE[b] for b in BACKGROUNDS], torch.int32)
        # of "no window" first: left, top, right, bottom in pixels, and which masks it takes
        self._left = on_device([0, *(x * CELL for x, _, _ in WINDOWS)])
        self._top = on_device([0, *(y * CELL for _, y, _ in WINDOWS)])
        self._side = on_device([0, *(side * CELL for _, _, side in WINDOWS)])
        self._pixels = torch.arange(IMAGE_SIZE, device=device)

    def render(self, tokens: Tensor, shade: Tensor, jitter: Tensor) -> Tensor:
        """True images, uint8 `[scenes, renders, 3, 64, 64]`.

        Args:
            tokens: of completed scenes (`scenes.scene_tokens`), int64 `[scenes, NUM_TOKENS]`.
            shade: int32 `[scenes, renders, 1 + MAX_COUNT]`, as `scene_renderer.draw_variation` draws it.
            jitter: int32 `[scenes, renders, MAX_COUNT, 2]`, likewise.
        """
        ground = self._backgrounds[tokens[:, -1]][:, None] + shade[..., :1]
        image = ground.clamp(0, 255)[..., None, None].expand(-1, -1, -1, IMAGE_SIZE, IMAGE_SIZE)
        icons = tokens[:, :-1].unflatten(1, (MAX_COUNT, ICON_TOKENS))
        for k in range(MAX_COUNT):
            noun, colour, size, window = icons[:, k].unbind(1)
            left, top, side = (t[window][:, None, None] for t in (self._left, self._top, self._side))
            first = (self._tile - side) // 2
            moved = jitter[:, :, k].long()
            inside, at = [], []
            for begin, shift in ((top, moved[..., 1]), (left, moved[..., 0])):
                offset = self._pixels - begin  # [scenes, 1, 64]
                inside.append((offset >= 0) & (offset < side))
                at.append((first + offset - shift[..., None]).clamp(0, self._tile - 1))
            rows, columns = at  # [scenes, renders, 64]
            which = ((noun - 1).clamp_min(0) * 2 + side[:, 0, 0] // IMAGE_SIZE) * self._sizes
            which = (which + (size - 1).clamp_min(0)) * self._tile**2
            index = which[:, None, None, None] + rows[..., :, None] * self._tile + columns[..., None, :]
            cover = self._masks[index].int() * (inside[0][..., :, None] & inside[1][..., None, :])
            cover = cover[:, :, None]
            paint = self._colours[(colour - 1).clamp_min(0)][:, None] + shade[..., 1 + k, None]
            paint = paint.clamp(0, 255)[..., None, None]
            image = (image * (255 - cover) + paint * cover + 127) // 255
        return image.to(torch.uint8)
