"""The whole image on a GPU: from tokens of scenes and seeds to uint8 pixels, for oscillators with and without a coupling.

The equations are those of `workers/oscillators` (`draw.py`, `canvas.py`, `integer_network.py`), in the same integers, so pixels are
the same bits. Five kernels of one stream do it, captured in one CUDA graph; how many icons and cells a batch has stays on the device:

    list_work      tokens, seeds -> work lists of icons and of cells with ink, `hidden` of each icon, what a seed varies
    relax_waves    hidden -> drives, all steps of the phases, their sines and cosines
                   (coupled oscillators: `image_coupling.relax_coupled`)
    near_channels  waves -> channels of the 4x4 cells of each icon, for the whole image enlarged to 8x8
    cover_shares   channels around a cell with ink -> how much of its 64 pixels the icon covers
    blend_pixels   shares, colours, shifts -> pixels

Not one kernel: a cell needs its neighbours' phases, a pixel its neighbours' shares, so there are three points where all blocks wait,
and 502 KiB of weights do not fit the 227 KiB of one multiprocessor, but each kernel's do. A block loads its kernel's weights
once and goes through its part of a list with them. Off the chip an image reads its tokens and seed, 144 bytes, and writes 12,288; what
lies between kernels, at most 18 KB an image, is meant to stay in the second-level cache.

A list's order depends on which block comes first; no pixel does, as every sum is exact and every cell is written once.
"""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
import triton
from torch import Tensor

from millijoule.kernels.gpu.image_coupling import (
    COUPLED_ICONS,
    MAX_RANK,
    CoupledSteps,
    pack_steps,
    relax_coupled,
)
from millijoule.kernels.gpu.image_model import (
    CELLS,
    IMAGE_SIZE,
    MAX_CHANNELS,
    MAX_CODE,
    MAX_HIDDEN,
    MAX_MIX,
    MAX_WIDTH,
    NUM_TOKENS,
    PackedModel,
    Work,
    pack,
)
from millijoule.kernels.gpu.image_phases import list_work, relax_waves
from millijoule.kernels.gpu.image_pixels import blend_pixels, cover_shares, near_channels
from millijoule.kernels.image import ImageWeights
from millijoule.kernels.triton_launch import INTERPRETED, RESIDENT_GENERATIONS, captured, launch

#: Rows of a block in each kernel: images in `list_work`, icons in `relax_waves`, cells in `near_channels` and `cover_shares`, images and fours
#: of their pixels in `blend_pixels`.
LIST_IMAGES, WAVE_ICONS, ROWS, BLEND_IMAGES, FOURS = 16, 64, 64, 1, 512

#: Batches whose buffers and graphs a kernel keeps: full ones, the last one of a job, one image.
KEPT_BATCHES = 4


def misfit(weights: ImageWeights) -> str | None:
    """Why the kernels do not take a model; None: they do."""
    layers = {name: layer[0] for name, layer in weights.layers.items()}
    sizes = {
        "code": (weights.codes.shape[1], MAX_CODE),
        "hidden": (len(layers["read_code"]), MAX_HIDDEN),
        "channels": (weights.channels, MAX_CHANNELS),
        "width": (len(layers["near"]), MAX_WIDTH),
        "mix": (len(layers["mix"]), MAX_MIX),
        "rank": (0 if weights.coupling is None else weights.coupling.gather.shape[1], MAX_RANK),
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


class _Batch:
    """Buffers of one batch size, and what runs the kernels on them: a CUDA graph, or the launches themselves."""

    def __init__(self, kernel: ImageKernel, images: int, steps: int) -> None:
        device = kernel.device
        self.tokens = torch.zeros(images, NUM_TOKENS, dtype=torch.int64, device=device)
        self.seeds = torch.zeros(images, dtype=torch.int64, device=device)
        self.pixels = torch.empty(images, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8, device=device)
        self.work = Work.empty(kernel.packed, images, device)
        coupling = kernel.packed.coupling
        coupled = None if coupling is None else pack_steps(coupling, steps, 2 * kernel.blocks, device)

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
                coupled,
            )

        self.run = captured(launches, device)


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
    coupled: CoupledSteps | None = None,
) -> None:
    """Start the kernels: `tokens` int64 `[images, 17]` and `seeds` int64 `[images]` -> `pixels` uint8 `[images, 64, 64, 3]`."""
    device, images, p, w = tokens.device, len(tokens), packed, work
    numbers = p.numbers
    w.counters.zero_()
    w.covers.zero_()  # cells without ink
    launch(
        list_work,
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
    driven = (w.counters, w.icons, w.hidden, p.drive, numbers["drive"], p.place, p.waves, w.waves)
    if p.coupling is None or coupled is None:
        launch(
            relax_waves,
            CELLS * triton.cdiv(2 * blocks, CELLS),
            device,
            *(*driven, w.icons.shape[1], p.steps, steps),
            SCALED=steps != p.steps,
            HIDDEN=p.hidden,
            CHANNELS=p.channels,
            ICONS=WAVE_ICONS,
            num_warps=4,
        )
    else:
        launch(
            relax_coupled,
            len(coupled.own),
            device,
            *(*driven, coupled.own, p.coupling.local, p.coupling.gather, p.coupling.spread),
            *(coupled.local, coupled.gather, coupled.spread, w.icons.shape[1], p.steps, steps),
            SCALED=steps != p.steps,
            HIDDEN=p.hidden,
            CHANNELS=p.channels,
            RANK=p.coupling.rank,
            ICONS=COUPLED_ICONS,
            num_warps=4,
            num_stages=1,  # what is loaded ahead of a step would be what the last one has not written yet
        )
    launch(
        near_channels,
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
        cover_shares,
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
        blend_pixels,
        IMAGE_SIZE * IMAGE_SIZE // 4 // FOURS * triton.cdiv(images, BLEND_IMAGES),
        device,
        *(w.records, w.levels, w.covers, pixels.flatten(1).view(torch.int32), images),
        JITTER=p.jitter,
        IMAGES=BLEND_IMAGES,
        FOURS=FOURS,
        num_warps=4,
    )
