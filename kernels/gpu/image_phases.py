"""The image kernels' first half: scenes and seeds to work lists, drives and phases."""

from __future__ import annotations

import triton
import triton.language as tl

from millijoule.kernels.gpu.fixed_point import activations, scaled
from millijoule.kernels.oscillator import PULL_BITS
from millijoule.kernels.phase import TABLE_SHIFT, TABLE_SIZE, TURN

_PULL_BITS = tl.constexpr(PULL_BITS)
_PULL_HALF = tl.constexpr(1 << (PULL_BITS - 1))
_TURN = tl.constexpr(TURN)
_TABLE_SHIFT = tl.constexpr(TABLE_SHIFT)
_LAST_ENTRY = tl.constexpr(TABLE_SIZE - 1)


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
def list_work(
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
    total = activations(total, tl.load(numbers + out), tl.load(numbers + HIDDEN + out))
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
def drive_of(
    x, weights, numbers, place, cell, part: tl.constexpr, kind, plain_steps, steps,
    SCALED: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """a, b or omega (`part`) of the oscillators of one cell, int32 `[icons, CHANNELS]`."""
    out = tl.arange(0, CHANNELS)
    row = (cell * 3 + part) * CHANNELS
    total = tl.dot(x, weights, out_dtype=tl.int32) + tl.load(numbers + row + out)[None, :]
    drive = scaled(total, tl.load(numbers + 48 * CHANNELS + row + out))
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
def drive_weights(drive, cell, part: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr):
    """int8 `[HIDDEN, CHANNELS]`."""
    inputs, out = tl.arange(0, HIDDEN), tl.arange(0, CHANNELS)
    return tl.load(drive + ((cell * 3 + part) * CHANNELS + out[None, :]) * HIDDEN + inputs[:, None])


@triton.jit
def sin_cos(table, theta):
    """int32 each, of int32 phases whose upper bits count whole turns."""
    both = tl.load(table + ((theta >> _TABLE_SHIFT) & _LAST_ENTRY))
    return (both << 16) >> 16, both >> 16


@triton.jit
def relax_waves(
    counters, icons, hidden, drive, numbers, place, table, waves, slots, plain_steps, steps,
    SCALED: tl.constexpr, HIDDEN: tl.constexpr, CHANNELS: tl.constexpr, ICONS: tl.constexpr,
):  # fmt: skip
    """Of all icons, the phases of one cell: a block keeps the weights of its cell."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    cell, first = program % 16, program // 16
    halves = tl.load(counters)
    count = halves + tl.load(counters + 1)
    for_a = drive_weights(drive, cell, 0, HIDDEN, CHANNELS)
    for_b = drive_weights(drive, cell, 1, HIDDEN, CHANNELS)
    for_omega = drive_weights(drive, cell, 2, HIDDEN, CHANNELS)
    inputs, out = tl.arange(0, HIDDEN), tl.arange(0, CHANNELS)
    for block in range(first, tl.cdiv(count, ICONS), programs // 16):
        i = block * ICONS + tl.arange(0, ICONS)
        keep = i < count
        kind = (i >= halves).to(tl.int32)
        slot = tl.load(icons + tl.where(kind == 0, i, slots + i - halves), keep, 0)  # [icons]
        x = tl.load(hidden + slot.to(tl.int64)[:, None] * HIDDEN + inputs[None, :])  # [icons, HIDDEN] int8
        a = drive_of(x, for_a, numbers, place, cell, 0, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS)
        b = drive_of(x, for_b, numbers, place, cell, 1, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS)
        omega = drive_of(
            x, for_omega, numbers, place, cell, 2, kind, plain_steps, steps, SCALED, HIDDEN, CHANNELS
        )
        theta = tl.zeros([ICONS, CHANNELS], tl.int32)
        for _ in range(steps):
            s, c = sin_cos(table, theta)
            pull = (c * a - s * b + _PULL_HALF) >> _PULL_BITS
            theta += omega + pull  # whole turns fall away where the table is read
        s, c = sin_cos(table, theta)
        row = waves + (i.to(tl.int64) * 16 + cell)[:, None] * (2 * CHANNELS) + out[None, :]
        tl.store(row, s.to(tl.int8), keep[:, None])  # [icons, CHANNELS] int8
        tl.store(row + CHANNELS, c.to(tl.int8), keep[:, None])  # [icons, CHANNELS] int8
