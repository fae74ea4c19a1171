"""The kernels of dense couplings: what one block does in a step, or in all of them."""

from __future__ import annotations

import triton
import triton.language as tl

from millijoule.kernels.dense_coupling import FINE_TABLE_SHIFT, FINE_TABLE_SIZE, MULTIPLIER_BITS
from millijoule.kernels.phase import TABLE_SHIFT, TABLE_SIZE

_HALF = tl.constexpr(1 << (MULTIPLIER_BITS - 1))
_BITS = tl.constexpr(MULTIPLIER_BITS)
_SHIFT = tl.constexpr(TABLE_SHIFT)
_LAST = tl.constexpr(TABLE_SIZE - 1)
_FINE_SHIFT = tl.constexpr(FINE_TABLE_SHIFT)
_FINE_LAST = tl.constexpr(FINE_TABLE_SIZE - 1)


@triton.jit
def _requantized(total, multiplier):
    """`total * multiplier / 2**24`, rounded, as int64."""
    return (total.to(tl.int64) * multiplier + _HALF) >> _BITS


@triton.jit
def _both(table, index):
    """Sine and cosine of a packed table, int32."""
    both = tl.load(table + index)
    return (both << 16) >> 16, both >> 16


@triton.jit
def relax_drivers(
    phi, coupling, frequency, table, waves, images, steps, multiplier,
    DRIVERS: tl.constexpr, PULL_BITS: tl.constexpr,
):  # fmt: skip
    """The course of one image's drivers -> their finer sines and cosines before each step."""
    image = tl.program_id(0)
    k = tl.arange(0, DRIVERS)
    angle = tl.load(phi + image * DRIVERS + k).to(tl.int64)  # [DRIVERS]
    own = tl.load(frequency + k).to(tl.int64)
    weights = tl.load(coupling + k[:, None] * DRIVERS + k[None, :]).to(tl.int64)  # [DRIVERS, DRIVERS]
    for step in range(steps):
        s, c = _both(table, ((angle >> _FINE_SHIFT) & _FINE_LAST).to(tl.int32))
        row = waves + (step * 2 * images + image).to(tl.int64) * DRIVERS + k
        tl.store(row, s.to(tl.int16))  # [DRIVERS]
        tl.store(row + images * DRIVERS, c.to(tl.int16))  # [DRIVERS]
        u = _requantized(tl.sum(weights * s.to(tl.int64)[None, :], 1), multiplier)
        w = _requantized(tl.sum(weights * c.to(tl.int64)[None, :], 1), multiplier)
        angle += (c * u - s * w + own + (1 << (PULL_BITS - 1))) >> PULL_BITS


@triton.jit
def first_waves(theta, table, sources, count, SIZE: tl.constexpr):
    """Sines and cosines of the first phases."""
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    s, c = _both(table, (tl.load(theta + i) >> _SHIFT) & _LAST)  # [SIZE]
    tl.store(sources + i, s.to(tl.int8))
    tl.store(sources + count + i, c.to(tl.int8))


@triton.jit
def _products(
    sources, images, image, weights, columns, starts, tile, n,
    BLOCKS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Sums of all sines and of all cosines of some images by one tile of K's rows, int32 `[IMAGES, ROWS]` both. `BLOCKS`: K is
    block-sparse, a tile a row of blocks."""
    k = tl.arange(0, SOURCES)
    u = tl.zeros([IMAGES, ROWS], tl.int32)
    w = tl.zeros([IMAGES, ROWS], tl.int32)
    sines = sources + image[:, None] * n + k[None, :]
    cosines = sines + images * n
    r = tl.arange(0, ROWS)
    if BLOCKS:
        first, last = tl.load(starts + tile), tl.load(starts + tile + 1)
        rows = weights + first * (ROWS * SOURCES) + r[None, :] * SOURCES + k[:, None]
        for block in range(first, last):
            column = tl.load(columns + block) * SOURCES
            part = tl.load(rows)  # [SOURCES, ROWS] int8
            u = tl.dot(tl.load(sines + column), part, u, out_dtype=tl.int32)  # [IMAGES, SOURCES] int8
            w = tl.dot(tl.load(cosines + column), part, w, out_dtype=tl.int32)
            rows += ROWS * SOURCES
    else:
        rows = weights + (tile * ROWS + r[None, :]) * n + k[:, None]
        for first in range(0, n, SOURCES):
            part = tl.load(rows + first)  # [SOURCES, ROWS] int8
            u = tl.dot(tl.load(sines + first), part, u, out_dtype=tl.int32)  # [IMAGES, SOURCES] int8
            w = tl.dot(tl.load(cosines + first), part, w, out_dtype=tl.int32)
    return u, w


@triton.jit
def hold_field(
    sources, fine, columns, starts, held, numbers, n, images,
    BLOCKS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """The field of the fine part, to be held for some steps."""
    groups = images // IMAGES
    program = tl.program_id(0)
    image = (program % groups) * IMAGES + tl.arange(0, IMAGES)
    tile = program // groups
    row = tile * ROWS + tl.arange(0, ROWS)
    u, w = _products(sources, images, image, fine, columns, starts, tile, n, BLOCKS, IMAGES, ROWS, SOURCES)
    multiplier = tl.load(numbers + n + row)[None, :]
    place = held + image[:, None] * n + row[None, :]
    tl.store(place, _requantized(u, multiplier).to(tl.int32))  # [IMAGES, ROWS]
    tl.store(place + images * n, _requantized(w, multiplier).to(tl.int32))


@triton.jit
def _driven(drive, waves, kind, row, m, n, multiplier, IMAGES: tl.constexpr, ROWS: tl.constexpr):
    """What an image's class does to some oscillators, by its drivers' sines or cosines, int32 `[IMAGES, ROWS]`."""
    total = tl.zeros([IMAGES, ROWS], tl.int32)
    for k in tl.range(0, m, num_stages=1):
        wave = tl.load(waves + k).to(tl.int32)  # [IMAGES]
        weight = drive + (kind * m + k)[:, None] * n + row[None, :]
        total += tl.load(weight, (kind >= 0)[:, None], 0).to(tl.int32) * wave[:, None]  # [IMAGES, ROWS]
    return _requantized(total, multiplier).to(tl.int32)


@triton.jit
def outer_field(
    held, outside, drive, classes, driver_waves, n, m, images, drive_multiplier,
    DRIVERS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of one step, the held field and what the classes do, together."""
    groups = images // IMAGES
    program = tl.program_id(0)
    image = (program % groups) * IMAGES + tl.arange(0, IMAGES)
    row = (program // groups) * ROWS + tl.arange(0, ROWS)
    kind = tl.load(classes + image)  # [IMAGES]
    at = image[:, None] * n + row[None, :]
    for wave in tl.static_range(2):
        waves = driver_waves + (wave * images + image) * DRIVERS
        field = _driven(drive, waves, kind, row, m, n, drive_multiplier, IMAGES, ROWS)
        field += tl.load(held + wave * images * n + at)
        tl.store(outside + wave * images * n + at, field)  # [IMAGES, ROWS]


@triton.jit
def step_phases(
    theta, sources, target, coarse, columns, starts, outside, numbers, drive, classes, driver_waves, table,
    n, m, images, drive_multiplier,
    FINE: tl.constexpr, DRIVERS: tl.constexpr, PULL_BITS: tl.constexpr,
    BLOCKS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """One step of some oscillators of some images. `FINE`: `outside` has the field of the fine part and what drives them."""
    groups = images // IMAGES
    program = tl.program_id(0)
    image = (program % groups) * IMAGES + tl.arange(0, IMAGES)
    tile = program // groups
    row = tile * ROWS + tl.arange(0, ROWS)
    at = image[:, None] * n + row[None, :]
    second = images * n
    u, w = _products(sources, images, image, coarse, columns, starts, tile, n, BLOCKS, IMAGES, ROWS, SOURCES)
    multiplier = tl.load(numbers + row)[None, :]
    u, w = _requantized(u, multiplier).to(tl.int32), _requantized(w, multiplier).to(tl.int32)
    if FINE:
        u += tl.load(outside + at)  # [IMAGES, ROWS]
        w += tl.load(outside + second + at)
    else:
        kind = tl.load(classes + image)  # [IMAGES]
        waves = driver_waves + image * DRIVERS
        u += _driven(drive, waves, kind, row, m, n, drive_multiplier, IMAGES, ROWS)
        tl.debug_barrier()  # what is loaded ahead takes registers
        w += _driven(drive, waves + images * DRIVERS, kind, row, m, n, drive_multiplier, IMAGES, ROWS)
        tl.debug_barrier()
    s, c = tl.load(sources + at).to(tl.int32), tl.load(sources + second + at).to(tl.int32)  # [IMAGES, ROWS]
    pull = c * u - s * w + tl.load(numbers + 2 * n + row)[None, :] + (1 << (PULL_BITS - 1))
    angle = tl.load(theta + at) + (pull >> PULL_BITS)
    tl.store(theta + at, angle)  # [IMAGES, ROWS]
    s, c = _both(table, (angle >> _SHIFT) & _LAST)
    tl.store(target + at, s.to(tl.int8))
    tl.store(target + second + at, c.to(tl.int8))


@triton.jit
def _wait(arrived, count):
    """Come to the barrier, and stay until `count` blocks have: what each wrote before, all read after it."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release")
    while tl.atomic_add(arrived, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def _added(kept, sources, second, column, u, w, SOURCES: tl.constexpr):
    """Sums after a part of K was multiplied, too."""
    # not through the first-level cache, which other blocks' stores do not reach
    sines = tl.load(sources + column * SOURCES, cache_modifier=".cg")  # [SOURCES, IMAGES] int8
    cosines = tl.load(sources + second + column * SOURCES, cache_modifier=".cg")
    return tl.dot(kept, sines, u, out_dtype=tl.int32), tl.dot(kept, cosines, w, out_dtype=tl.int32)


@triton.jit
def step_resident(
    theta, sources, coarse, columns, starts, numbers, drive, classes, driver_waves, table, arrived,
    n, m, images, first_group, first, last, drive_multiplier,
    BLOCKS: tl.constexpr, CHUNKS: tl.constexpr, DRIVERS: tl.constexpr, PULL_BITS: tl.constexpr,
    PARTS: tl.constexpr, IMAGES: tl.constexpr, ROWS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Steps `first` to `last` of some oscillators of some images, their rows of K in shared memory all the time. `BLOCKS`: of
    block-sparse K the blocks of one row, at most `CHUNKS`."""
    tiles = n // ROWS
    program = tl.program_id(0)
    group = first_group + program // tiles
    tile = program % tiles
    row = tile * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, SOURCES)
    start = tl.load(starts + tile) if BLOCKS else 0
    count = tl.load(starts + tile + 1) - start if BLOCKS else CHUNKS
    if BLOCKS:
        stored = coarse + start * (ROWS * SOURCES) + tl.arange(0, ROWS)[:, None] * SOURCES + k[None, :]
    else:
        stored = coarse + row[:, None] * n + k[None, :]
    further: tl.constexpr = ROWS * SOURCES if BLOCKS else SOURCES
    kept = (tl.load(stored),)  # [ROWS, SOURCES] int8
    for chunk in tl.static_range(1, CHUNKS):
        tl.debug_barrier()  # one part after the other: all at once would need too many registers
        if BLOCKS:
            kept += (tl.load(stored + chunk * further, k[None, :] < (count - chunk) * SOURCES, 0),)  # type: ignore[assignment]
        else:
            kept += (tl.load(stored + chunk * further),)  # type: ignore[assignment]
    second = images * n
    for step in range(first, last):
        source = sources + (step % 2) * 2 * second
        target = sources + (1 - step % 2) * 2 * second
        for part in range(PARTS):
            image = (group * PARTS + part) * IMAGES + tl.arange(0, IMAGES)
            beside = source + (image[None, :] * n + k[:, None])
            u = tl.zeros([ROWS, IMAGES], tl.int32)
            w = tl.zeros([ROWS, IMAGES], tl.int32)
            for chunk in tl.static_range(CHUNKS):
                if BLOCKS:
                    if chunk < count:
                        u, w = _added(
                            kept[chunk], beside, second, tl.load(columns + start + chunk), u, w, SOURCES
                        )
                else:
                    u, w = _added(kept[chunk], beside, second, chunk, u, w, SOURCES)
            multiplier = tl.load(numbers + row)[:, None]
            u, w = _requantized(u, multiplier).to(tl.int32), _requantized(w, multiplier).to(tl.int32)
            kind = tl.load(classes + image)  # [IMAGES]
            waves = driver_waves + (step * 2 * images + image) * DRIVERS
            u += tl.trans(_driven(drive, waves, kind, row, m, n, drive_multiplier, IMAGES, ROWS))
            waves += images * DRIVERS
            w += tl.trans(_driven(drive, waves, kind, row, m, n, drive_multiplier, IMAGES, ROWS))
            at = image[None, :] * n + row[:, None]
            angle = tl.load(theta + at)  # [ROWS, IMAGES]; no other block's
            s, c = _both(table, (angle >> _SHIFT) & _LAST)
            pull = c * u - s * w + tl.load(numbers + 2 * n + row)[:, None] + (1 << (PULL_BITS - 1))
            angle += pull >> PULL_BITS
            tl.store(theta + at, angle)  # [ROWS, IMAGES]
            s, c = _both(table, (angle >> _SHIFT) & _LAST)
            tl.store(target + at, s.to(tl.int8))
            tl.store(target + second + at, c.to(tl.int8))
        if step + 1 < last:
            _wait(arrived + group, tiles * (step + 1 - first))
