"""All-to-all coupled oscillators on a GPU: one kernel a step, all steps in one CUDA graph; `dense_coupling` has the equation.

A block owns some oscillators of some images. It multiplies their rows of K by the sines and cosines of all oscillators, int8 with exact
int32 sums, both with the same K, and goes on in registers: row scales, drive, phases, their new sines and cosines. These go to the
other of two buffers, which the next step reads, so a step reads nothing that it writes. What drives an image comes from its drivers
alone, whose course over all steps is computed first.

A K that has nothing in many of its blocks of 64 by 128 weights is stored and multiplied without them (`dense_weights`); a row's
sums are the same.

For small n, or larger ones of few blocks, `resident` keeps K on the chip instead: each block holds its rows of K in shared memory over all steps, and those that
share images wait for each other at a barrier in global memory. All of them have to run at once, so it is a cooperative launch.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.dense_coupling import (
    FINE_COS_TABLE,
    FINE_SIN_TABLE,
    DenseCoupling,
    StepMultipliers,
    step_multipliers,
)
from millijoule.kernels.gpu.dense_steps import (
    first_waves,
    hold_field,
    outer_field,
    relax_drivers,
    step_phases,
    step_resident,
)
from millijoule.kernels.gpu.dense_weights import (
    BLOCK_ROWS,
    PADDING,
    SOURCES,
    SPARSE_SHARE,
    PackedWeights,
    filled_blocks,
    pack_weights,
)
from millijoule.kernels.phase import COS_TABLE, SIN_TABLE
from millijoule.kernels.triton_launch import INTERPRETED, RESIDENT_GENERATIONS, captured, launch

#: Images and oscillators of a block, which multiplies `SOURCES` at a time.
IMAGES, ROWS = 64, 128

#: Drivers of which one block computes the course.
MAX_DRIVERS = 64

#: n for which K stays on the chip, with the rows of K of a block, which take 128 KiB, and its images: how often how many.
RESIDENT = {1024: (128, 1, 16), 2048: (64, 4, 16)}

#: The same for block-sparse K: n, if no row of blocks has more than `RESIDENT_BLOCKS` of them, and images.
RESIDENT_SPARSE = {4096: (4, 16), 8192: (4, 16)}
RESIDENT_BLOCKS = 16

#: Elements that kernels count in int32, which keeps registers free.
MAX_OFFSET = 2**30

#: Batches whose buffers and graphs are kept.
KEPT_BATCHES = 4


@dataclass(frozen=True)
class PackedCoupling:
    """A coupling on a device, n padded with oscillators that nothing pulls and that pull nothing.

    Attributes:
        n, m: without padding.
        coarse, fine: of N by N; fine is None where there is no such part.
        fine_every: its field is made anew in every so many steps.
        drive: int16 `[classes, m, N]`.
        driver_coupling: int16 `[M, M]`, M a power of two.
        waves, fine_waves: int32 tables, sine in the lower 16 bits, cosine in the upper.
    """

    n: int
    m: int
    coarse: PackedWeights
    fine: PackedWeights | None
    fine_every: int
    drive: Tensor
    driver_coupling: Tensor
    waves: Tensor
    fine_waves: Tensor

    @property
    def padded(self) -> int:
        return self.coarse.padded


@dataclass(frozen=True)
class StepNumbers:
    """`StepMultipliers` on a device: `rows` int32 `[3, N]`: of the coarse part, of the fine part, Omega; `drivers` int32 `[M]`."""

    rows: Tensor
    drivers: Tensor
    drive: int
    driver_coupling: int
    pull_bits: int


@dataclass(frozen=True)
class DenseWork:
    """Buffers of one batch.

    Attributes:
        theta: int32 `[batch, N]`.
        phi: int32 `[batch, M]`.
        classes: int32 `[batch]`.
        sources: int8 `[2 buffers, 2, batch, N]`: sines, cosines.
        held, outside: int32 `[2, batch, N]`: the field of the fine part; that and what drives the oscillators.
        driver_waves: int16 `[steps, 2, batch, M]`.
        arrived: int32 `[groups of images]`: how often blocks have come to the barrier.
    """

    theta: Tensor
    phi: Tensor
    classes: Tensor
    sources: Tensor
    held: Tensor
    outside: Tensor
    driver_waves: Tensor
    arrived: Tensor

    @staticmethod
    def empty(packed: PackedCoupling, batch: int, steps: int, device: str | torch.device) -> DenseWork:
        n, m = packed.padded, packed.driver_coupling.shape[0]

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        field = (2, batch, n) if packed.fine is not None else (1,)
        return DenseWork(
            theta=zeros(batch, n),
            phi=zeros(batch, m),
            classes=zeros(batch),
            sources=zeros(2, 2, batch, n, dtype=torch.int8),
            held=zeros(*field),
            outside=zeros(*field),
            driver_waves=zeros(steps, 2, batch, m, dtype=torch.int16),
            arrived=zeros(batch),
        )


class DenseKernel:
    """A coupling packed for one device; calls are `dense_coupling.relax` there, the same bits.

    Args:
        device: a GPU, or anything in Triton's interpreter.
        resident: keep K on the chip. Only where `may_stay` says so.
        sparse: keep K in blocks. None: where few enough have something in them (`SPARSE_SHARE`).

    Raises:
        ValueError: no GPU, a coupling larger than `MAX_DRIVERS` and `MAX_OFFSET` allow, or K may not stay on the chip.
    """

    def __init__(
        self,
        coupling: DenseCoupling,
        device: str | torch.device,
        *,
        resident: bool = False,
        sparse: bool | None = None,
    ) -> None:
        if coupling.m > MAX_DRIVERS:
            raise ValueError(f"{coupling.m} drivers: at most {MAX_DRIVERS} on a GPU")
        if max(coupling.coarse.numel(), coupling.drive.numel()) > MAX_OFFSET:
            raise ValueError(
                f"{coupling.n} oscillators, {len(coupling.drive)} classes: too large for the kernels"
            )
        if resident and not may_stay(coupling):
            raise ValueError(f"K of {coupling.n} oscillators does not stay on the chip, or has a fine part")
        self.device = torch.device(device)
        if self.device.type != "cuda" and not INTERPRETED:
            raise ValueError(f"{device}: the dense coupling runs on NVIDIA GPUs")
        if resident and self.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(self.device)
            if major not in RESIDENT_GENERATIONS:
                raise ValueError(f"{device}: K does not stay on a chip of compute capability {major}.{minor}")
        self.coupling = coupling
        self.resident = resident
        self.at_once = _multiprocessors(
            self.device
        )  # one block takes most of a multiprocessor's shared memory
        if resident:
            sparse = coupling.n not in RESIDENT
        elif sparse is None:
            sparse = filled_blocks(coupling.coarse)[0] <= SPARSE_SHARE
        self.packed = pack(coupling, self.device, sparse=sparse)
        if resident and (tiles := self.packed.padded // resident_tile(self.packed)[0]) > self.at_once:
            raise ValueError(f"{device}: {tiles} blocks have to run at once, {self.at_once} do")
        self._batches: dict[tuple[int, int, float], _Batch] = {}

    @torch.inference_mode()
    def __call__(self, phases: Tensor, classes: Tensor, steps: int, horizon: float) -> Tensor:
        """Phases int32 `[batch, n]` after `steps` steps, on the device, where they stand until the next call.

        Args:
            phases: at the start, int32 `[batch, n + m]`: oscillators, then drivers.
            classes: of each image, int64 `[batch]`, on the host; -1: nothing drives it.

        Raises:
            ValueError: the batch is not of this model, or too large, or StepsTooLong, see `step_multipliers`.
        """
        n, m, count = self.packed.n, self.packed.m, len(classes)
        if phases.shape != (count, n + m):
            raise ValueError(f"phases {list(phases.shape)} for {count} images of {n} + {m} oscillators")
        if count and not -1 <= int(classes.min()) <= int(classes.max()) < len(self.packed.drive):
            raise ValueError(f"classes are -1 to {len(self.packed.drive) - 1}")
        images = count + -count % IMAGES
        if 2 * images * max(self.packed.padded, steps * self.packed.driver_coupling.shape[0]) > MAX_OFFSET:
            raise ValueError(f"{count} images of {n} oscillators in one call: fewer, please")
        if not count:
            return phases[:, :n].to(self.device)
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            batch = self._batch(images, steps, horizon)
            batch.begin(phases[:, :n], phases[:, n:], classes)
            batch.run()
        return batch.work.theta[:count, :n]

    def _batch(self, images: int, steps: int, horizon: float) -> _Batch:
        key = (images, steps, horizon)
        if key not in self._batches:
            numbers = pack_numbers(self.packed, step_multipliers(self.coupling, steps, horizon), self.device)
            while len(self._batches) >= KEPT_BATCHES:
                del self._batches[next(iter(self._batches))]
            self._batches[key] = _Batch(self, numbers, images, steps)
        return self._batches[key]


def _multiprocessors(device: torch.device) -> int:
    """How many a device has; in the interpreter, which waits for nothing, enough for the smallest case."""
    if device.type != "cuda":
        return 8
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def may_stay(coupling: DenseCoupling) -> bool:
    """Whether K can be kept on the chip: without a fine part, and either of a size in `RESIDENT`, or of one in `RESIDENT_SPARSE` with at most
    `RESIDENT_BLOCKS` blocks in each row of blocks that have something in them."""
    if coupling.fine is not None:
        return False
    if coupling.n in RESIDENT_SPARSE:
        return filled_blocks(coupling.coarse)[1] <= RESIDENT_BLOCKS
    return coupling.n in RESIDENT


def resident_tile(packed: PackedCoupling) -> tuple[int, int, int]:
    """Rows of K that a block keeps, and its images: how often how many."""
    return (BLOCK_ROWS, *RESIDENT_SPARSE[packed.n]) if packed.coarse.sparse else RESIDENT[packed.n]


class _Batch:
    """Buffers of one batch size and step, and what runs the steps on them: a CUDA graph, or the launches themselves."""

    def __init__(self, kernel: DenseKernel, numbers: StepNumbers, images: int, steps: int) -> None:
        self.work = DenseWork.empty(kernel.packed, images, steps, kernel.device)

        def launches() -> None:
            if kernel.resident:
                run_resident(kernel.packed, numbers, self.work, steps, kernel.at_once)
            else:
                run_steps(kernel.packed, numbers, self.work, steps)

        self.run = captured(launches, kernel.device)

    def begin(self, theta: Tensor, phi: Tensor, classes: Tensor) -> None:
        """Put images' first phases and classes where the steps find them; what is left of the batch has no class."""
        work, count = self.work, len(classes)
        work.theta[:count, : theta.shape[1]].copy_(theta)
        work.phi[:count, : phi.shape[1]].copy_(phi)
        work.classes.fill_(-1)
        work.classes[:count].copy_(classes)


def pack(coupling: DenseCoupling, device: str | torch.device, *, sparse: bool = False) -> PackedCoupling:
    """`coupling` on `device`; `sparse`: in blocks."""
    n, m = coupling.n, coupling.m
    more, drivers = -n % PADDING, triton.next_power_of_2(m)
    fine = None if coupling.fine is None else pack_weights(coupling.fine, device, sparse=sparse)

    def table(sin: Tensor, cos: Tensor) -> Tensor:
        return ((sin.to(torch.int32) & 0xFFFF) | (cos.to(torch.int32) << 16)).to(device)

    return PackedCoupling(
        n=n,
        m=m,
        coarse=pack_weights(coupling.coarse, device, sparse=sparse),
        fine=fine,
        fine_every=coupling.fine_every,
        drive=F.pad(coupling.drive.transpose(1, 2), (0, more)).contiguous().to(device),
        driver_coupling=F.pad(coupling.driver_coupling, (0, drivers - m, 0, drivers - m)).to(device),
        waves=table(SIN_TABLE, COS_TABLE),
        fine_waves=table(FINE_SIN_TABLE, FINE_COS_TABLE),
    )


def pack_numbers(
    packed: PackedCoupling, multipliers: StepMultipliers, device: str | torch.device
) -> StepNumbers:
    """`multipliers` on `device`, padded as `packed` is."""
    rows = torch.stack([multipliers.coarse, multipliers.fine, multipliers.frequency]).to(torch.int32)
    drivers = packed.driver_coupling.shape[0] - packed.m
    return StepNumbers(
        rows=F.pad(rows, (0, packed.padded - packed.n)).contiguous().to(device),
        drivers=F.pad(multipliers.driver_frequency.to(torch.int32), (0, drivers)).to(device),
        drive=multipliers.drive,
        driver_coupling=multipliers.driver_coupling,
        pull_bits=multipliers.pull_bits,
    )


def begin_steps(packed: PackedCoupling, numbers: StepNumbers, work: DenseWork, steps: int) -> None:
    """Start what the first step needs: the drivers' course, and sines and cosines of the first phases."""
    images, n = work.theta.shape
    device = work.theta.device
    launch(
        relax_drivers,
        images,
        device,
        *(work.phi, packed.driver_coupling, numbers.drivers, packed.fine_waves, work.driver_waves),
        *(images, steps, numbers.driver_coupling),
        DRIVERS=packed.driver_coupling.shape[0],
        PULL_BITS=numbers.pull_bits,
        num_warps=4,
    )
    launch(
        first_waves,
        images * n // (8 * PADDING),
        device,
        *(work.theta, packed.waves, work.sources, images * n),
        SIZE=8 * PADDING,
        num_warps=4,
    )


def run_steps(packed: PackedCoupling, numbers: StepNumbers, work: DenseWork, steps: int) -> None:
    """Start all kernels of `steps` steps from `work.theta`, which holds the last phases then."""
    images, n = work.theta.shape
    device = work.theta.device
    begin_steps(packed, numbers, work, steps)
    sparse = packed.coarse.sparse
    rows = BLOCK_ROWS if sparse else ROWS
    tiles, drivers = (images // IMAGES) * (n // rows), packed.driver_coupling.shape[0]
    blocks = {"BLOCKS": sparse, "IMAGES": IMAGES, "ROWS": rows, "SOURCES": SOURCES}
    blocks |= {"num_warps": 8, "num_stages": 4}
    weights = (packed.coarse.values, packed.coarse.columns, packed.coarse.starts)
    for step in range(steps):
        sources, target = work.sources[step % 2], work.sources[1 - step % 2]
        driven = (packed.drive, work.classes, work.driver_waves[step])
        if packed.fine is not None:
            if step % packed.fine_every == 0:
                launch(
                    hold_field,
                    tiles,
                    device,
                    sources,
                    *(packed.fine.values, packed.fine.columns, packed.fine.starts),
                    work.held,
                    numbers.rows,
                    n,
                    images,
                    **blocks,
                )
            launch(
                outer_field,
                images * n // (8 * PADDING),
                device,
                *(work.held, work.outside, *driven, n, packed.m, images, numbers.drive),
                DRIVERS=drivers,
                IMAGES=min(IMAGES, 8),
                ROWS=PADDING,
                num_warps=4,
            )
        launch(
            step_phases,
            tiles,
            device,
            *(work.theta, sources, target, *weights, work.outside, numbers.rows, *driven, packed.waves),
            *(n, packed.m, images, numbers.drive),
            FINE=packed.fine is not None,
            DRIVERS=drivers,
            PULL_BITS=numbers.pull_bits,
            **blocks,
        )


def run_resident(
    packed: PackedCoupling,
    numbers: StepNumbers,
    work: DenseWork,
    steps: int,
    at_once: int,
    together: int | None = None,
) -> None:
    """`run_steps` with K on the chip.

    Args:
        at_once: blocks that the device runs at once. Those of one launch wait for each other, so no launch has more; images are
            taken in turn.
        together: steps of one launch, all by default.
    """
    images, n = work.theta.shape
    rows, parts, own = resident_tile(packed)
    k = packed.coarse
    tiles, groups = n // rows, images // (parts * own)
    begin_steps(packed, numbers, work, steps)
    for first in range(0, steps, together or steps):
        work.arrived.zero_()
        for group in range(0, groups, at_once // tiles):
            launch(
                step_resident,
                min(at_once // tiles, groups - group) * tiles,
                work.theta.device,
                *(work.theta, work.sources, k.values, k.columns, k.starts),
                *(numbers.rows, packed.drive, work.classes),
                *(work.driver_waves, packed.waves, work.arrived, n, packed.m, images, group),
                *(first, min(first + (together or steps), steps), numbers.drive),
                BLOCKS=k.sparse,
                CHUNKS=k.fullest or n // SOURCES,
                DRIVERS=packed.driver_coupling.shape[0],
                PULL_BITS=numbers.pull_bits,
                PARTS=parts,
                IMAGES=own,
                ROWS=rows,
                SOURCES=SOURCES,
                num_warps=8,
                num_stages=1,
                launch_cooperative_grid=True,
            )
