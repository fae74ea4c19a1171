"""The image kernels' second half: sines and cosines of phases to shares of pixels, and pixels."""

from __future__ import annotations

import triton
import triton.language as tl

from millijoule.kernels.gpu.fixed_point import activations, scaled


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
def near_channels(
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
        seen = activations(total, tl.load(numbers), tl.load(numbers + WIDTH))  # [rows, WIDTH]
        if whole:
            for quarter in tl.static_range(4):
                if RESIDENT:
                    total = tl.dot(seen, larger[quarter], out_dtype=tl.int32)
                else:
                    total = tl.dot(seen, _weights(enlarge, quarter, WIDTH, WIDTH), out_dtype=tl.int32)
                numbers = enlarge_numbers + quarter * WIDTH + out
                part = activations(total, tl.load(numbers), tl.load(numbers + 4 * WIDTH))
                place = origin + (2 * y + quarter // 2) * 8 + 2 * x + quarter % 2
                target = features + place.to(tl.int64)[:, None] * WIDTH + out[None, :]
                tl.store(target, part, exists[:, None])  # [rows, WIDTH] int8
        else:
            place = origin + y * 8 + x
            target = features + place.to(tl.int64)[:, None] * WIDTH + out[None, :]
            tl.store(target, seen, exists[:, None])  # [rows, WIDTH] int8


@triton.jit
def cover_shares(
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
        seen = activations(total, tl.load(numbers), tl.load(numbers + WIDTH))  # [rows, WIDTH]
        total = tl.zeros([ROWS, 64], tl.int32)
        for half in tl.static_range(2):
            numbers = mix_numbers + half * HALF_MIX + mixed
            if RESIDENT:
                part = tl.dot(seen, to_mix[half], out_dtype=tl.int32)
            else:
                part = tl.dot(seen, _weights(mix, half, WIDTH, HALF_MIX), out_dtype=tl.int32)
            part = activations(part, tl.load(numbers), tl.load(numbers + MIX))  # [rows, HALF_MIX]
            if RESIDENT:
                total = tl.dot(part, of_mix[half], total, out_dtype=tl.int32)
            else:
                weights = tl.load(share + pixel[None, :] * MIX + half * HALF_MIX + mixed[:, None])
                total = tl.dot(part, weights, total, out_dtype=tl.int32)
        numbers = share_numbers + pixel
        logits = scaled(total + tl.load(numbers)[None, :], tl.load(numbers + 64))
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
def blend_pixels(
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
