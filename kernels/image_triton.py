"""The whole image on a GPU: from tokens of scenes and seeds to uint8 pixels, for the generator without a coupling.

The equations are those of `workers/oscillators` (`draw.py`, `canvas.py`, `integer_network.py`), in the same integers, so pixels are
the same bits. Five kernels of one stream do it, captured in one CUDA graph; how many icons and cells a batch has stays on the device:

    list    tokens, seeds -> work lists of icons and of cells with ink, `hidden` of each icon, what a seed varies
    waves   hidden -> drives, all steps of the phases, their sines and cosines
    near    waves -> channels of the 4x4 cells of each icon, for the whole image enlarged to 8x8
    shares  channels around a cell with ink -> how much of its 64 pixels the icon covers
    blend   shares, colours, shifts -> pixels

Not one kernel: a cell needs its neighbours' phases, a pixel its neighbours' shares, so there are three points where all blocks wait,
and 502 KiB of weights do not fit the 227 KiB of one multiprocessor, but each kernel's do. A block loads its kernel's weights
once and goes through its part of a list with them. Off the chip an image reads its tokens and seed, 144 bytes, and writes 12,288; what
lies between kernels, at most 18 KB an image, is meant to stay in the second-level cache.

A list's order depends on which block comes first; no pixel does, as every sum is exact and every cell is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.image import ImageWeights
from millijoule.kernels.oscillator import MULTIPLIER_BITS, PULL_BITS
from millijoule.kernels.phase import AMPLITUDE, COS_TABLE, SIN_TABLE, TABLE_SHIFT, TABLE_SIZE, TURN
from millijoule.kernels.triton_launch import INTERPRETED, launch

#: The geometry of an image, in cells and pixels; the kernels are written for it.
GRID, CELL, IMAGE_SIZE, MAX_ICONS = 4, 8, 64, 4
CELLS, IMAGE_CELLS, PIXELS = GRID * GRID, (IMAGE_SIZE // CELL) ** 2, CELL * CELL
SIDES = (GRID, 2 * GRID)

#: Numbers of one row of tokens: noun, colour, size and window of each icon, then the ground.
NUM_TOKENS = 4 * MAX_ICONS + 1

#: The least number of inputs that int8 products of tensor cores take.
MIN_INPUTS = 32

#: The largest sizes, with which the weights of each kernel fit a block.
MAX_CODE, MAX_HIDDEN, MAX_CHANNELS, MAX_WIDTH, MAX_MIX = 128, 128, 32, 128, 256

#: Rows of a block in each kernel: images in `list`, icons in `waves`, cells in `near` and `shares`, images and fours
#: of their pixels in `blend`.
LIST_IMAGES, WAVE_ICONS, ROWS, BLEND_IMAGES, FOURS = 16, 64, 64, 1, 512

#: Compute capabilities (their first numbers) whose blocks may have 227 KiB of shared memory: there `shares` and `near` keep all their
#: weights in it; elsewhere each tile reads them again.
RESIDENT_GENERATIONS = (9, 10)

_HALF = tl.constexpr(1 << (MULTIPLIER_BITS - 1))
_BITS = tl.constexpr(MULTIPLIER_BITS)
_PULL_BITS = tl.constexpr(PULL_BITS)
_PULL_HALF = tl.constexpr(1 << (PULL_BITS - 1))
_AMPLITUDE = tl.constexpr(AMPLITUDE)
_TURN = tl.constexpr(TURN)
_TABLE_SHIFT = tl.constexpr(TABLE_SHIFT)
_LAST_ENTRY = tl.constexpr(TABLE_SIZE - 1)


def misfit(weights: ImageWeights) -> str | None:
    """Why the kernels do not take a model; None: they do."""
    if weights.coupling is not None:
        return "its oscillators are coupled"
    layers = {name: layer[0] for name, layer in weights.layers.items()}
    sizes = {
        "code": (weights.codes.shape[1], MAX_CODE),
        "hidden": (len(layers["read_code"]), MAX_HIDDEN),
        "channels": (weights.channels, MAX_CHANNELS),
        "width": (len(layers["near"]), MAX_WIDTH),
        "mix": (len(layers["mix"]), MAX_MIX),
    }
    if any(int(layer[2].abs().max()) >= 2**31 for layer in weights.layers.values()):
        return "a multiplier does not fit int32"
    too_large = [f"{name} {size} is more than {most}" for name, (size, most) in sizes.items() if size > most]
    return ", ".join(too_large) or None


class ImageKernel:
    """A model packed for one device; draws as `kernels.image.ImageKernel`, to the same pixels.

    Args:
        weights: of a model that is no `misfit`.
        device: a GPU, or anything in Triton's interpreter.

    Attributes:
        blocks: how many blocks go through a list together: one for each multiprocessor.
        resident: whether they keep their weights.
    """

    def __init__(self, weights: ImageWeights, device: str | torch.device) -> None:
        if why := misfit(weights):
            raise ValueError(f"the image kernel does not take this model: {why}")
        self.device = torch.device(device)
        self.steps = weights.steps
        self.blocks, self.resident = _multiprocessors(self.device)
        self.packed = pack(weights, self.device)
        self._limits = np.array(
            [len(weights.codes), len(weights.colours), weights.ink[0].shape[1], len(weights.windows)]
        )
        self._batches: dict[tuple[int, int], _Batch] = {}

    def draw(self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Images uint8 `[images, 64, 64, 3]` of completed scenes, int64 `[images, 17]`, from uint64 seeds.

        Raises:
            ValueError: tokens or seeds are of another form, or name what there is not.
        """
        tokens = np.ascontiguousarray(tokens, np.int64)
        seeds = np.ascontiguousarray(seeds, np.uint64)
        steps = steps or self.steps
        if tokens.ndim != 2 or tokens.shape[1] != NUM_TOKENS or seeds.shape != tokens.shape[:1] or steps < 1:
            raise ValueError(f"tokens {list(tokens.shape)}, seeds {list(seeds.shape)}, {steps} steps")
        icons = tokens[:, :-1].reshape(-1, 4)
        icons = icons[icons[:, 0] != 0]
        ground = tokens[:, -1]
        if (
            (icons < 1).any()
            or (icons > self._limits).any()
            or ((ground < 0) | (ground >= len(self.packed.grounds))).any()
        ):
            raise ValueError("tokens of a scene that this model has no words for")
        drawn = self.draw_on_device(torch.from_numpy(tokens), torch.from_numpy(seeds.view(np.int64)), steps)
        return drawn.to("cpu", copy=True).numpy()

    @torch.inference_mode()
    def draw_on_device(self, tokens: Tensor, seeds: Tensor, steps: int | None = None) -> Tensor:
        """Images uint8 `[images, 64, 64, 3]` on the device, where they stand until the next call. Nothing waits for the device.

        Args:
            tokens: of completed scenes, int64 `[images, 17]`. Windows of a scene do not overlap; an icon of which any token
                is out of its range is left out.
            seeds: the bits of uint64 seeds as int64 `[images]`.
        """
        images = len(tokens)
        if tuple(tokens.shape) != (images, NUM_TOKENS) or tuple(seeds.shape) != (images,):
            raise ValueError(f"tokens {list(tokens.shape)}, seeds {list(seeds.shape)}")
        if not images:
            return torch.empty(0, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            batch = self._batch(triton.next_power_of_2(images), steps or self.steps)
            batch.tokens[:images].copy_(tokens)
            batch.tokens[images:].zero_()
            batch.seeds[:images].copy_(seeds)
            batch.run()
        return batch.pixels[:images]

    def _batch(self, images: int, steps: int) -> _Batch:
        """The buffers of a batch, and on a GPU its graph; those of a few sizes are kept."""
        key = (images, steps)
        if key not in self._batches:
            while len(self._batches) >= KEPT_BATCHES:
                del self._batches[next(iter(self._batches))]
            self._batches[key] = _Batch(self, images, steps)
        return self._batches[key]


#: Batches whose buffers and graphs a kernel keeps: full ones, the last one of a job, one image.
KEPT_BATCHES = 4


class _Batch:
    """Buffers of one batch size, and what runs the kernels on them: a CUDA graph, or the launches themselves."""

    def __init__(self, kernel: ImageKernel, images: int, steps: int) -> None:
        device = kernel.device
        self.tokens = torch.zeros(images, NUM_TOKENS, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(images, dtype=torch.int64, device=device)
        self.pixels = torch.empty(images, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.work = Work.empty(kernel.packed, images, device)

        def launches() -> None:
            draw_images(
                kernel.packed,
                self.work,
                self.tokens,
                self.seeds,
                self.pixels,
                steps,
                kernel.blocks,
                kernel.resident,
            )

        self.run: Callable[[], Any] = launches
        if device.type == "cuda":
            launches()  # compiled before it is captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                launches()
            self.run = graph.replay


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
        waves: int8 `[icons, 16, 2 channels]`: sines, then cosines; half windows first.
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
            waves=empty(icons, CELLS, 2 * packed.channels, dtype=torch.int8),
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
    channels = max(triton.next_power_of_2(own_channels), MIN_INPUTS // 2)

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
    )


def _multiprocessors(device: torch.device) -> tuple[int, bool]:
    """How many a device has, and whether one holds the weights of a kernel; in the interpreter, enough to share lists."""
    if device.type != "cuda":
        if not INTERPRETED:
            raise ValueError(f"{device}: the image kernel runs on NVIDIA GPUs")
        return 2, True
    of = torch.cuda.get_device_properties(device)
    return of.multi_processor_count, of.major in RESIDENT_GENERATIONS


def draw_images(
    packed: PackedModel,
    work: Work,
    tokens: Tensor,
    seeds: Tensor,
    pixels: Tensor,
    steps: int,
    blocks: int,
    resident: bool,
) -> None:
    """Start the kernels: `tokens` int64 `[images, 17]` and `seeds` int64 `[images]` -> `pixels` uint8 `[images, 64, 64, 3]`."""
    device, images, p, w = tokens.device, len(tokens), packed, work
    numbers = p.numbers
    w.counters.zero_()
    w.covers.zero_()  # cells without ink
    launch(
        _list,
        triton.cdiv(images, LIST_IMAGES),
        device,
        *(tokens, seeds, p.codes, p.read_code, numbers["read_code"], p.sizes, p.inked, p.windows, p.colours, p.grounds),
        *(w.counters, w.icons, w.cells, w.origins, w.records, w.levels, w.hidden),
        *(images, len(p.codes), len(p.colours), len(p.grounds), len(p.windows), w.icons.shape[1]),
        SHADE=p.shade,
        JITTER=p.jitter,
        SIZES=p.inked.shape[1] // 2,
        CODE=p.codes.shape[1],
        HIDDEN=p.hidden,
        IMAGES=LIST_IMAGES,
        num_warps=8,
    )  # fmt: skip
    launch(
        _waves,
        CELLS * triton.cdiv(2 * blocks, CELLS),
        device,
        *(
            w.counters,
            w.icons,
            w.hidden,
            p.drive,
            numbers["drive"],
            p.place,
            p.waves,
            w.waves,
            w.icons.shape[1],
        ),
        *(p.steps, steps),
        SCALED=steps != p.steps,
        HIDDEN=p.hidden,
        CHANNELS=p.channels,
        ICONS=WAVE_ICONS,
        num_warps=4,
    )
    launch(
        _near,
        blocks,
        device,
        *(w.counters, w.icons, w.origins, w.waves, p.near, numbers["near"], p.enlarge, numbers["enlarge"]),
        *(w.features, w.icons.shape[1]),
        INPUTS=2 * p.channels,
        WIDTH=p.width,
        ROWS=ROWS,
        RESIDENT=resident,
        num_warps=8,
        num_stages=1,
    )
    launch(
        _shares,
        blocks,
        device,
        *(
            w.counters,
            w.cells,
            w.origins,
            w.features,
            p.near_again,
            numbers["near_again"],
            p.mix,
            numbers["mix"],
        ),
        *(p.share, numbers["share"], p.shares, w.covers),
        LIMIT=len(p.shares) // 2,
        WIDTH=p.width,
        MIX=p.mix.shape[0],
        ROWS=ROWS,
        RESIDENT=resident,
        num_warps=8,
        num_stages=1,
    )
    launch(
        _blend,
        IMAGE_SIZE * IMAGE_SIZE // 4 // FOURS * triton.cdiv(images, BLEND_IMAGES),
        device,
        *(w.records, w.levels, w.covers, pixels.flatten(1).view(torch.int32), images),
        JITTER=p.jitter,
        IMAGES=BLEND_IMAGES,
        FOURS=FOURS,
        num_warps=4,
    )


@triton.jit
def _scaled(total, multiplier):
    """int32 sums `[rows, outputs]` times the int32 number of each output, over 2**24, rounded: int64."""
    return (total.to(tl.int64) * multiplier.to(tl.int64)[None, :] + _HALF) >> _BITS


@triton.jit
def _activations(total, bias, multiplier):
    """The same after `bias`, cut to 0 to 127: int8."""
    out = _scaled(total + bias[None, :], multiplier)
    return tl.minimum(tl.maximum(out, 0), _AMPLITUDE).to(tl.int8)


@triton.jit
def _noise(seed, number):
    """Phase `number` of `phase.random_phases` of uint64 seeds, int32 in [0, 65536)."""
    z = seed + (number // 4 + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return ((z >> ((number % 4) * 16).to(tl.uint64)) & 0xFFFF).to(tl.int32)


@triton.jit
def _between(seed, number, most: tl.constexpr):
    """A whole number from -most to most."""
    return ((_noise(seed, number) * (2 * most + 1)) // _TURN) - most


@triton.jit
def _levels(paint, row, shade, keep):
    """Three levels, moved by `shade`, as r, g and b in the bytes of an int32 from the lowest on."""
    packed = row * 0
    for channel in tl.static_range(3):
        level = tl.load(paint + row * 3 + channel, keep, 0) + shade
        packed = packed | (tl.minimum(tl.maximum(level, 0), 255) << (8 * channel))
    return packed


@triton.jit
def _icon(tokens, image, slot, exists, nouns, colours, windows, SIZES: tl.constexpr):
    """Noun, colour, size and window of icons, int32, and whether there is one, all tokens being in their ranges."""
    at = tokens + image.to(tl.int64) * 17 + slot * 4
    noun = tl.load(at, exists, 0) - 1
    colour = tl.load(at + 1, exists, 0) - 1
    size = tl.load(at + 2, exists, 0) - 1
    window = tl.load(at + 3, exists, 0) - 1
    there = (noun >= 0) & (noun < nouns) & (colour >= 0) & (colour < colours)
    there = there & (size >= 0) & (size < SIZES) & (window >= 0) & (window < windows)
    keep = there.to(tl.int64)
    return (
        (noun * keep).to(tl.int32),
        (colour * keep).to(tl.int32),
        (size * keep).to(tl.int32),
        (window * keep).to(tl.int32),
        there,
    )


@triton.jit
def _list(
    tokens, seeds, codes, read_code, numbers, sizes, inked, geometry, paint, grounds,
    counters, icons, cells, origins, records, levels, hidden,
    images, nouns, colours, backgrounds, windows, slots,
    SHADE: tl.constexpr, JITTER: tl.constexpr, SIZES: tl.constexpr,
    CODE: tl.constexpr, HIDDEN: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """Of some images: their icons and cells with ink into the lists, and what of each icon and cell later kernels need."""
    first = tl.program_id(0) * IMAGES
    own = tl.arange(0, IMAGES * 4)
    image, number = first + own // 4, own % 4
    slot = first * 4 + own
    noun, _, size, window, there = _icon(
        tokens, image, number, image < images, nouns, colours, windows, SIZES
    )
    left, top = tl.load(geometry + window * 3), tl.load(geometry + window * 3 + 1)  # [slots]
    whole = (tl.load(geometry + window * 3 + 2) == 8).to(tl.int32)
    tl.store(origins + slot, (image * 64 + top * 8 + left) * 2 + whole, image < images)  # [slots]
    # work lists
    for kind in tl.static_range(2):
        chosen = (there & (whole == kind)).to(tl.int32)
        start = tl.atomic_add(counters + kind, tl.sum(chosen, 0))
        place = start + tl.cumsum(chosen, 0) - 1
        tl.store(icons + kind * slots + place, slot, chosen == 1)
    variant = size + SIZES * whole
    mask = tl.load(inked + noun * (2 * SIZES) + variant, there, 0)  # [slots] int64
    cell = tl.arange(0, 64)
    drawn = ((mask[:, None] >> cell[None, :].to(tl.int64)) & 1).to(tl.int32)  # [slots, 64]
    count = tl.sum(drawn, 1)
    start = tl.atomic_add(counters + 2, tl.sum(count, 0))
    place = start + (tl.cumsum(count, 0) - count)[:, None] + tl.cumsum(drawn, 1) - 1
    tl.store(cells + place, slot[:, None] * 64 + cell[None, :], drawn == 1)
    # from code and size to what drives the icon
    code = tl.arange(0, CODE)
    out = tl.arange(0, HIDDEN)
    x = tl.load(codes + noun[:, None] * CODE + code[None, :])  # [slots, CODE] int8
    weights = tl.load(read_code + out[None, :] * CODE + code[:, None])  # [CODE, HIDDEN] int8
    total = tl.dot(x, weights, out_dtype=tl.int32) + tl.load(
        sizes + variant[:, None] * HIDDEN + out[None, :]
    )  # [slots, HIDDEN]
    total = _activations(total, tl.load(numbers + out), tl.load(numbers + HIDDEN + out))
    tl.store(
        hidden + slot.to(tl.int64)[:, None] * HIDDEN + out[None, :], total, (image < images)[:, None]
    )  # [slots, HIDDEN] int8
    # whose each cell of an image is
    image = first + tl.arange(0, IMAGES)
    exists = image < images
    seed = tl.load(seeds + image, exists, 0).to(tl.uint64)
    ground = tl.load(tokens + image.to(tl.int64) * 17 + 16, exists, 0)
    ground = tl.minimum(tl.maximum(ground, 0), backgrounds - 1).to(tl.int32)
    tl.store(levels + image, _levels(grounds, ground, _between(seed, image * 0, SHADE), exists), exists)
    x, y = cell % 8, cell // 8
    ink = tl.zeros([IMAGES, 64], tl.int32)
    stand = tl.zeros([IMAGES, 64], tl.int32)
    for number in tl.static_range(4):
        _, colour, _, window, there = _icon(
            tokens, image, image * 0 + number, exists, nouns, colours, windows, SIZES
        )
        left, top = tl.load(geometry + window * 3), tl.load(geometry + window * 3 + 1)  # [images]
        side = tl.load(geometry + window * 3 + 2)
        level = _levels(paint, colour, _between(seed, image * 0 + 1 + number, SHADE), exists)
        right = _between(seed, image * 0 + 5 + 2 * number, JITTER) + JITTER
        down = _between(seed, image * 0 + 6 + 2 * number, JITTER) + JITTER
        at = left | (top << 4) | (side << 8) | (right << 12) | (down << 16) | (1 << 20)
        inside = (x[None, :] >= left[:, None]) & (x[None, :] < (left + side)[:, None])
        inside = inside & (y[None, :] >= top[:, None]) & (y[None, :] < (top + side)[:, None])
        inside = inside & there[:, None]
        ink = tl.where(inside, level[:, None], ink)
        stand = tl.where(inside, at[:, None], stand)
    place = records + (image.to(tl.int64)[:, None] * 64 + cell[None, :]) * 2
    tl.store(place, ink, exists[:, None])  # [images, 64]
    tl.store(place + 1, stand, exists[:, None])  # [images, 64]


@triton.jit
def _drive_of(
    x, weights, numbers, place, cell, part: tl.constexpr, kind, plain_steps, steps,
    SCALED: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """a, b or omega (`part`) of the oscillators of one cell, int32 `[icons, CHANNELS]`."""
    out = tl.arange(0, CHANNELS)
    row = (cell * 3 + part) * CHANNELS
    total = tl.dot(x, weights, out_dtype=tl.int32) + tl.load(numbers + row + out)[None, :]
    drive = _scaled(total, tl.load(numbers + 48 * CHANNELS + row + out))
    half = tl.load(place + row + out)
    whole = tl.load(place + 48 * CHANNELS + row + out)
    drive += tl.where(kind[:, None] == 0, half[None, :], whole[None, :]).to(tl.int64)
    if (
        SCALED
    ):  # floor((2 plain_steps drive + steps) / (2 steps)), whichever way a division of negative numbers goes
        above = drive * (2 * plain_steps) + steps
        by = 2 * steps
        drive = tl.where(above >= 0, above, above - by + 1) // by
    return drive.to(tl.int32)


@triton.jit
def _drive_weights(drive, cell, part: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr):
    """int8 `[HIDDEN, CHANNELS]`."""
    inputs, out = tl.arange(0, HIDDEN), tl.arange(0, CHANNELS)
    return tl.load(drive + ((cell * 3 + part) * CHANNELS + out[None, :]) * HIDDEN + inputs[:, None])


@triton.jit
def _sin_cos(table, theta):
    """int32 each, of int32 phases whose upper bits count whole turns."""
    both = tl.load(table + ((theta >> _TABLE_SHIFT) & _LAST_ENTRY))
    return (both << 16) >> 16, both >> 16


@triton.jit
def _waves(
    counters, icons, hidden, drive, numbers, place, table, waves, slots, plain_steps, steps,
    SCALED: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, ICONS: tl.constexpr,
):  # fmt: skip
    """Of all icons, the phases of one cell: a block keeps the weights of its cell."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    cell, first = program % 16, program // 16
    halves = tl.load(counters)
    count = halves + tl.load(counters + 1)
    for_a = _drive_weights(drive, cell, 0, HIDDEN, CHANNELS)
    for_b = _drive_weights(drive, cell, 1, HIDDEN, CHANNELS)
    for_omega = _drive_weights(drive, cell, 2, HIDDEN, CHANNELS)
    inputs, out = tl.arange(0, HIDDEN), tl.arange(0, CHANNELS)
    for block in range(first, tl.cdiv(count, ICONS), programs // 16):
        i = block * ICONS + tl.arange(0, ICONS)
        keep = i < count
        kind = (i >= halves).to(tl.int32)
        slot = tl.load(icons + tl.where(kind == 0, i, slots + i - halves), keep, 0)  # [icons]
        x = tl.load(hidden + slot.to(tl.int64)[:, None] * HIDDEN + inputs[None, :])  # [icons, HIDDEN] int8
        a = _drive_of(x, for_a, numbers, place, cell, 0, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS)
        b = _drive_of(x, for_b, numbers, place, cell, 1, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS)
        omega = _drive_of(
            x, for_omega, numbers, place, cell, 2, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS
        )
        theta = tl.zeros([ICONS, CHANNELS], tl.int32)
        for _ in range(steps):
            s, c = _sin_cos(table, theta)
            pull = (c * a - s * b + _PULL_HALF) >> _PULL_BITS
            theta += omega + pull  # whole turns fall away where the table is read
        s, c = _sin_cos(table, theta)
        row = waves + (i.to(tl.int64) * 16 + cell)[:, None] * (2 * CHANNELS) + out[None, :]
        tl.store(row, s.to(tl.int8), keep[:, None])  # [icons, CHANNELS] int8
        tl.store(row + CHANNELS, c.to(tl.int8), keep[:, None])  # [icons, CHANNELS] int8


@triton.jit
def _weights(layer, tap, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Of a layer `[taps, OUTPUTS, INPUTS]` those of one tap, int8 `[INPUTS, OUTPUTS]`."""
    inputs, out = tl.arange(0, INPUTS), tl.arange(0, OUTPUTS)
    return tl.load(layer + (tap * OUTPUTS + out[None, :]) * INPUTS + inputs[:, None])


@triton.jit
def _nine(layer, INPUTS: tl.constexpr, OUTPUTS: tl.constexpr):
    """Weights of a cell and its eight neighbours, to be kept."""
    return (
        _weights(layer, 0, INPUTS, OUTPUTS),
        _weights(layer, 1, INPUTS, OUTPUTS),
        _weights(layer, 2, INPUTS, OUTPUTS),
        _weights(layer, 3, INPUTS, OUTPUTS),
        _weights(layer, 4, INPUTS, OUTPUTS),
        _weights(layer, 5, INPUTS, OUTPUTS),
        _weights(layer, 6, INPUTS, OUTPUTS),
        _weights(layer, 7, INPUTS, OUTPUTS),
        _weights(layer, 8, INPUTS, OUTPUTS),
    )


@triton.jit
def _beside(x, start, stride, side, row, column, tap, exists, INPUTS: tl.constexpr):
    """Inputs of the neighbour `tap` of some cells, int8 `[rows, INPUTS]`; zeros beyond the window."""
    inputs = tl.arange(0, INPUTS)
    y, x_at = row + (tap // 3 - 1), column + (tap % 3 - 1)
    keep = exists & (y >= 0) & (y < side) & (x_at >= 0) & (x_at < side)
    place = (start + y * stride + x_at).to(tl.int64)
    return tl.load(x + place[:, None] * INPUTS + inputs[None, :], keep[:, None], 0)


@triton.jit
def _near(
    counters, icons, origins, waves, near, near_numbers, enlarge, enlarge_numbers, features, slots,
    INPUTS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Channels of the cells of each icon: convolution at 4x4; for the whole image, each cell's four."""
    halves, wholes = tl.load(counters), tl.load(counters + 1)
    out = tl.arange(0, WIDTH)
    if RESIDENT:
        kept = _nine(near, INPUTS, WIDTH)
        larger = (
            _weights(enlarge, 0, WIDTH, WIDTH),
            _weights(enlarge, 1, WIDTH, WIDTH),
            _weights(enlarge, 2, WIDTH, WIDTH),
            _weights(enlarge, 3, WIDTH, WIDTH),
        )
    of_halves = tl.cdiv(halves * 16, ROWS)
    for block in range(tl.program_id(0), of_halves + tl.cdiv(wholes * 16, ROWS), tl.num_programs(0)):
        whole = block >= of_halves
        row = tl.where(whole, block - of_halves, block) * ROWS + tl.arange(0, ROWS)
        icon, cell = row // 16, row % 16
        exists = icon < tl.where(whole, wholes, halves)
        at = tl.where(whole, slots, 0) + icon
        origin = tl.load(origins + tl.load(icons + at, exists, 0), exists, 0) >> 1  # [rows]
        y, x = cell // 4, cell % 4
        start = (icon + tl.where(whole, halves, 0)).to(tl.int64) * 16
        total = tl.zeros([ROWS, WIDTH], tl.int32)
        if RESIDENT:
            for tap in tl.static_range(9):
                beside = _beside(waves, start, 4, 4, y, x, tap, exists, INPUTS)
                total = tl.dot(beside, kept[tap], total, out_dtype=tl.int32)
        else:
            for tap in range(9):
                beside = _beside(waves, start, 4, 4, y, x, tap, exists, INPUTS)
                total = tl.dot(beside, _weights(near, tap, INPUTS, WIDTH), total, out_dtype=tl.int32)
        numbers = near_numbers + out
        seen = _activations(total, tl.load(numbers), tl.load(numbers + WIDTH))  # [rows, WIDTH]
        if whole:
            for quarter in tl.static_range(4):
                if RESIDENT:
                    total = tl.dot(seen, larger[quarter], out_dtype=tl.int32)
                else:
                    total = tl.dot(seen, _weights(enlarge, quarter, WIDTH, WIDTH), out_dtype=tl.int32)
                numbers = enlarge_numbers + quarter * WIDTH + out
                part = _activations(total, tl.load(numbers), tl.load(numbers + 4 * WIDTH))
                place = origin + (2 * y + quarter // 2) * 8 + 2 * x + quarter % 2
                target = features + place.to(tl.int64)[:, None] * WIDTH + out[None, :]
                tl.store(target, part, exists[:, None])  # [rows, WIDTH] int8
        else:
            place = origin + y * 8 + x
            target = features + place.to(tl.int64)[:, None] * WIDTH + out[None, :]
            tl.store(target, seen, exists[:, None])  # [rows, WIDTH] int8


@triton.jit
def _shares(
    counters, cells, origins, features, near_again, near_numbers, mix, mix_numbers, share, share_numbers,
    table, covers,
    LIMIT: tl.constexpr, WIDTH: tl.constexpr, MIX: tl.constexpr, ROWS: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """How much of the pixels of each cell with ink its icon covers."""
    HALF_MIX: tl.constexpr = MIX // 2
    count = tl.load(counters + 2)
    inputs, pixel, mixed = tl.arange(0, WIDTH), tl.arange(0, 64), tl.arange(0, HALF_MIX)
    if RESIDENT:
        kept = _nine(near_again, WIDTH, WIDTH)
        to_mix = (_weights(mix, 0, WIDTH, HALF_MIX), _weights(mix, 1, WIDTH, HALF_MIX))
        of_mix = (
            tl.load(share + pixel[None, :] * MIX + mixed[:, None]),
            tl.load(share + pixel[None, :] * MIX + HALF_MIX + mixed[:, None]),
        )
    for block in range(tl.program_id(0), tl.cdiv(count, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = row < count
        asked = tl.load(cells + row, exists, 0)  # [rows]
        origin = tl.load(origins + asked // 64, exists, 0)  # [rows]
        side = tl.where(origin % 2 == 1, 8, 4)
        origin = origin >> 1
        y, x = (asked % 64) // side, (asked % 64) % side
        total = tl.zeros([ROWS, WIDTH], tl.int32)
        if RESIDENT:
            for tap in tl.static_range(9):
                beside = _beside(features, origin, 8, side, y, x, tap, exists, WIDTH)
                total = tl.dot(beside, kept[tap], total, out_dtype=tl.int32)
        else:
            for tap in range(9):
                beside = _beside(features, origin, 8, side, y, x, tap, exists, WIDTH)
                total = tl.dot(beside, _weights(near_again, tap, WIDTH, WIDTH), total, out_dtype=tl.int32)
        numbers = near_numbers + inputs
        seen = _activations(total, tl.load(numbers), tl.load(numbers + WIDTH))  # [rows, WIDTH]
        total = tl.zeros([ROWS, 64], tl.int32)
        for half in tl.static_range(2):
            numbers = mix_numbers + half * HALF_MIX + mixed
            if RESIDENT:
                part = tl.dot(seen, to_mix[half], out_dtype=tl.int32)
            else:
                part = tl.dot(seen, _weights(mix, half, WIDTH, HALF_MIX), out_dtype=tl.int32)
            part = _activations(part, tl.load(numbers), tl.load(numbers + MIX))  # [rows, HALF_MIX]
            if RESIDENT:
                total = tl.dot(part, of_mix[half], total, out_dtype=tl.int32)
            else:
                weights = tl.load(share + pixel[None, :] * MIX + half * HALF_MIX + mixed[:, None])
                total = tl.dot(part, weights, total, out_dtype=tl.int32)
        numbers = share_numbers + pixel
        logits = _scaled(total + tl.load(numbers)[None, :], tl.load(numbers + 64))
        logits = tl.minimum(tl.maximum(logits, -LIMIT), LIMIT - 1).to(tl.int32) + LIMIT
        target = covers + (origin + y * 8 + x).to(tl.int64)[:, None] * 64 + pixel[None, :]
        tl.store(target, tl.load(table + logits), exists[:, None])  # [rows, 64] uint8


@triton.jit
def _over(under, level, share):
    """(under * (255 - share) + level * share + 127) // 255 of two levels each, which stand in the two halves of an int32."""
    both = (
        under * (255 - share) + level * share + 0x7F007F
    )  # 65,152 at most: nothing runs into the upper half
    return ((both + 0x10001 + ((both >> 8) & 0xFF00FF)) >> 8) & 0xFF00FF


@triton.jit
def _blend(
    records, levels, covers, pixels, images,
    JITTER: tl.constexpr, IMAGES: tl.constexpr, FOURS: tl.constexpr,
):  # fmt: skip
    """Part of some images, four pixels of a row at a time: they are of one cell, and three words."""
    PARTS: tl.constexpr = 1024 // FOURS
    program = tl.program_id(0)
    image = (program // PARTS * IMAGES + tl.arange(0, IMAGES)).to(tl.int64)[:, None]
    exists = image < images
    four = ((program % PARTS) * FOURS + tl.arange(0, FOURS))[None, :]
    y, x = four // 16, (four % 16) * 4
    record = records + (image * 64 + (y // 8) * 8 + x // 8) * 2
    ink, stand = tl.load(record, exists, 0), tl.load(record + 1, exists, 0)  # [images, fours]
    left, top, side = (stand & 15) * 8, ((stand >> 4) & 15) * 8, ((stand >> 8) & 15) * 8
    right, down = ((stand >> 12) & 15) - JITTER, ((stand >> 16) & 15) - JITTER
    from_y = y - down
    inside = exists & (from_y >= top) & (from_y < top + side)
    row = covers + image * 4096 + ((from_y >> 3) * 512 + (from_y & 7) * 8)
    ground = tl.load(levels + image, exists, 0)  # [images, 1]
    words = pixels + image * 3072 + four * 3
    before = tl.zeros([IMAGES, FOURS], tl.int32)
    for k in tl.static_range(4):
        from_x = x + k - right
        keep = inside & (from_x >= left) & (from_x < left + side)
        share = tl.load(row + ((from_x >> 3) * 64 + (from_x & 7)), keep, 0).to(tl.int32)  # [images, fours]
        red_blue = _over(ground & 0xFF00FF, ink & 0xFF00FF, share)
        pixel = red_blue | (_over((ground >> 8) & 255, (ink >> 8) & 255, share) << 8)
        if k > 0:  # three bytes of each; what is left of the one before comes first
            word = (before >> (8 * (k - 1))) | (pixel << (32 - 8 * k))
            tl.store(words + (k - 1), word, exists)  # [images, fours] int32
        before = pixel
