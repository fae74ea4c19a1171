"""A model of images as the GPU's kernels read it, and what lies between them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.gpu.image_coupling import PackedImageCoupling, pack_coupling
from millijoule.kernels.image import ImageWeights
from millijoule.kernels.phase import COS_TABLE, SIN_TABLE

#: The geometry of an image, in cells and pixels; the kernels are written for it.
GRID, CELL, IMAGE_SIZE, MAX_ICONS = 4, 8, 64, 4
CELLS, IMAGE_CELLS, PIXELS = GRID * GRID, (IMAGE_SIZE // CELL) ** 2, CELL * CELL

#: Numbers of one row of tokens: noun, colour, size and window of each icon, then the ground.
NUM_TOKENS = 4 * MAX_ICONS + 1

#: The least number of inputs that int8 products of tensor cores take.
MIN_INPUTS = 32

#: The largest sizes, with which the weights of each kernel fit a block.
MAX_CODE, MAX_HIDDEN, MAX_CHANNELS, MAX_WIDTH, MAX_MIX = 128, 128, 32, 128, 256


@dataclass(frozen=True)
class Work:
    """What lies between the kernels of one batch; nothing of it is read by the host.

    Attributes:
        counters: int32 `[3]`: icons in half windows, icons in the whole image, cells with ink.
        icons: int32 `[2, slots]`: slots (image * 4 + number) of icons of both kinds.
        cells: int32: slot * 64 + cell of its window, of each cell with ink.
        origins: int32 `[slots]`: twice the image's cell in which the icon's window begins, one more if it is the whole image.
        records: int32 `[images, 64, 2]`: of an image's cell, the levels of the icon that has it, and where that stands.
        levels: int32 `[images]`: of the ground.
        hidden: int8 `[slots, hidden]`.
        waves: int8 `[1 or 2 buffers, icons, 16, 2 channels]`: sines, then cosines; half windows first. Of coupled oscillators, steps read
            one buffer and write the other; the last one writes the first.
        features: int8 `[images * 64, width]`.
        covers: uint8 `[images * 64, 64]`.
    """

    counters: Tensor
    icons: Tensor
    cells: Tensor
    origins: Tensor
    records: Tensor
    levels: Tensor
    hidden: Tensor
    waves: Tensor
    features: Tensor
    covers: Tensor

    @staticmethod
    def empty(packed: PackedModel, images: int, device: str | torch.device) -> Work:
        """For batches of `images`."""
        icons, cells = images * MAX_ICONS, images * IMAGE_CELLS

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        return Work(
            counters=empty(3),
            icons=empty(2, icons),
            cells=empty(icons * IMAGE_CELLS),
            origins=empty(icons),
            records=empty(images, IMAGE_CELLS, 2),
            levels=empty(images),
            hidden=empty(icons, packed.hidden, dtype=torch.int8),
            waves=empty(
                1 if packed.coupling is None else 2, icons, CELLS, 2 * packed.channels, dtype=torch.int8
            ),
            features=empty(cells, packed.width, dtype=torch.int8),
            covers=empty(cells, PIXELS, dtype=torch.uint8),
        )


@dataclass(frozen=True)
class PackedModel:
    """A model as the kernels read it: channels padded with zeros to powers of two, layers split by neighbour.

    Attributes:
        codes: int8 `[nouns, CODE]`.
        sizes: int32 `[6, HIDDEN]`.
        place: int32 `[2, 16, 3, CHANNELS]`.
        read_code: int8 `[HIDDEN, CODE]`.
        drive: int8 `[16, 3, CHANNELS, HIDDEN]`.
        near: int8 `[9, WIDTH, 2 CHANNELS]`.
        enlarge: int8 `[4, WIDTH, WIDTH]`.
        near_again: int8 `[9, WIDTH, WIDTH]`.
        mix: int8 `[MIX, WIDTH]`.
        share: int8 `[64, MIX]`.
        numbers: int32 `[2, ...]` for each layer: bias, then multiplier.
        inked: int64 `[nouns, 6]`, a bit for each cell.
        coupling: None, the oscillators have none.
        waves: int32 `[1024]`: sine in the lower 16 bits, cosine in the upper.
    """

    codes: Tensor
    sizes: Tensor
    place: Tensor
    read_code: Tensor
    drive: Tensor
    near: Tensor
    enlarge: Tensor
    near_again: Tensor
    mix: Tensor
    share: Tensor
    numbers: dict[str, Tensor]
    inked: Tensor
    waves: Tensor
    shares: Tensor
    colours: Tensor
    grounds: Tensor
    windows: Tensor
    shade: int
    jitter: int
    steps: int
    coupling: PackedImageCoupling | None

    @property
    def hidden(self) -> int:
        return self.read_code.shape[0]

    @property
    def channels(self) -> int:
        return self.drive.shape[2]

    @property
    def width(self) -> int:
        return self.near.shape[1]


def pack(weights: ImageWeights, device: str | torch.device) -> PackedModel:
    """A model on `device`, as `PackedModel` has it."""
    layers = weights.layers
    matrices = {name: layer[0] for name, layer in layers.items()}
    own_channels, own_width = weights.channels, len(matrices["near"])
    code, hidden, width, mix = (
        max(triton.next_power_of_2(n), MIN_INPUTS)
        for n in (weights.codes.shape[1], len(matrices["read_code"]), own_width, len(matrices["mix"]))
    )
    # of a layer's inputs, sines and cosines are halves; of a coupling's, one of them is all
    least = MIN_INPUTS // 2 if weights.coupling is None else MIN_INPUTS
    channels = max(triton.next_power_of_2(own_channels), least)
    coupling = None
    if weights.coupling is not None:
        rank = max(triton.next_power_of_2(weights.coupling.gather.shape[1]), MIN_INPUTS)
        coupling = pack_coupling(weights.coupling, weights.horizon, channels, rank, device)

    def padded(x: Tensor, *shape: int) -> Tensor:
        """With zeros at the ends of the last axes."""
        more = [(0, want - have) for want, have in zip(shape, x.shape[-len(shape) :], strict=True)]
        return F.pad(x, [n for pair in reversed(more) for n in pair]).contiguous().to(device)

    def numbers(name: str, shape: tuple[int, ...], size: int) -> Tensor:
        _, bias, multiplier = layers[name]
        return padded(torch.stack([bias.to(torch.int32), multiplier.to(torch.int32)]).view(2, *shape), size)

    near = matrices["near"].view(own_width, 9, 2, own_channels).permute(1, 0, 2, 3)
    near_again = matrices["near_again"].view(own_width, 9, own_width).permute(1, 0, 2)
    bits = torch.ones(IMAGE_CELLS, dtype=torch.int64) << torch.arange(IMAGE_CELLS)
    inked = torch.cat([(x.cpu() * bits[: x.shape[2]]).sum(2) for x in weights.ink], 1)
    waves = (SIN_TABLE.to(torch.int32) & 0xFFFF) | (COS_TABLE.to(torch.int32) << 16)
    return PackedModel(
        codes=padded(weights.codes, code),
        sizes=padded(weights.sizes, hidden),
        place=padded(weights.place.view(2, CELLS, 3, own_channels), channels),
        read_code=padded(matrices["read_code"], hidden, code),
        drive=padded(matrices["drive"].view(CELLS, 3, own_channels, -1), channels, hidden),
        near=padded(near, width, 2, channels).flatten(2),
        enlarge=padded(matrices["enlarge"].view(4, own_width, own_width), width, width),
        near_again=padded(near_again, width, width),
        mix=padded(matrices["mix"], mix, width),
        share=padded(matrices["share"], PIXELS, mix),
        numbers={
            "read_code": numbers("read_code", (-1,), hidden),
            "drive": numbers("drive", (CELLS, 3, own_channels), channels),
            "near": numbers("near", (-1,), width),
            "enlarge": numbers("enlarge", (4, own_width), width),
            "near_again": numbers("near_again", (-1,), width),
            "mix": numbers("mix", (-1,), mix),
            "share": numbers("share", (-1,), PIXELS),
        },
        inked=inked.to(device),
        waves=waves.to(device),
        shares=weights.shares.contiguous().to(device),
        colours=weights.colours.to(device, torch.int32).contiguous(),
        grounds=weights.grounds.to(device, torch.int32).contiguous(),
        windows=weights.windows.to(device, torch.int32).contiguous(),
        shade=weights.shade,
        jitter=weights.jitter,
        steps=weights.steps,
        coupling=coupling,
    )
