"""The roofline of a processor (Williams, Waterman and Patterson 2009), and where kernels stand below it."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 1000, 560, 80, 60, 30, 330
_INK, _GRID, _ROOF = (30, 30, 30), (228, 228, 228), (90, 90, 90)
_COLOURS = ((20, 110, 60), (190, 60, 50), (35, 85, 220), (150, 90, 20), (130, 40, 170), (0, 130, 140), (200, 100, 160), (90, 120, 0))  # fmt: skip


def draw_roofline(peaks: Mapping[str, float], cases: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG bytes: operations per second over operations per byte, both logarithmic; a colour for each case, a mark for each form.

    Args:
        peaks: operations per second by type, and "copy", bytes per second.
        cases: of `bench roofline`.
    """
    roofs = {name: value for name, value in peaks.items() if name != "copy"}
    rates = [form["operations_per_s"] for case in cases for form in case["forms"].values()]
    dense = [case["operations"] / case["bytes_moved"] for case in cases]
    x_least, x_most = math.log10(min(dense)) - 0.7, math.log10(max(dense)) + 0.5
    y_least, y_most = math.log10(min(rates)) - 0.3, math.log10(max(roofs.values())) + 0.3
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)

    def at(intensity: float, rate: float) -> tuple[float, float]:
        x = LEFT + (math.log10(intensity) - x_least) / (x_most - x_least) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (math.log10(rate) - y_least) / (y_most - y_least) * (HEIGHT - BOTTOM - TOP)
        return x, y

    for power in range(math.ceil(y_least), math.floor(y_most) + 1):
        _, y = at(10**x_least, 10.0**power)
        draw.line((LEFT, y, WIDTH - RIGHT, y), fill=_GRID)
        draw.text((8, y - 7), f"{10.0**power / 1e9:g} Gop/s", fill=_INK, font=font)
    for power in range(math.ceil(x_least), math.floor(x_most) + 1):
        x, _ = at(10.0**power, 10**y_least)
        draw.line((x, TOP, x, HEIGHT - BOTTOM), fill=_GRID)
        draw.text((x - 12, HEIGHT - BOTTOM + 6), f"{10.0**power:g}", fill=_INK, font=font)
    draw.text((LEFT, HEIGHT - 26), "operations per byte that must move", fill=_INK, font=font)
    for name, peak in roofs.items():
        knee = min(max(peak / peaks["copy"], 10**x_least), 10**x_most)
        start = max(10**y_least / peaks["copy"], 10**x_least)
        draw.line((*at(start, start * peaks["copy"]), *at(knee, knee * peaks["copy"])), fill=_ROOF, width=2)
        draw.line((*at(knee, peak), *at(10**x_most, peak)), fill=_ROOF, width=2)
        x, y = at(10**x_most, peak)
        draw.text((x - 70, y - 16), name, fill=_ROOF, font=font)
    line = TOP
    for number, (case, intensity) in enumerate(zip(cases, dense, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        draw.text(
            (WIDTH - RIGHT + 16, line), f"{case['kernel']}: {case['shape']}"[:52], fill=colour, font=font
        )
        line += 16
        for mark, (name, form) in enumerate(case["forms"].items()):
            x, y = at(intensity, form["operations_per_s"])
            _mark(draw, mark, x, y, colour)
            _mark(draw, mark, WIDTH - RIGHT + 24, line + 7, colour)
            words = f"{name}: {form['share_of_floor']:.0%} of what the peaks allow"
            draw.text((WIDTH - RIGHT + 36, line), words, fill=_INK, font=font)
            line += 15
        line += 6
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def _mark(draw: ImageDraw.ImageDraw, number: int, x: float, y: float, colour: tuple[int, int, int]) -> None:
    """A small figure: circle, square, triangle, diamond, cross."""
    r = 5
    match number % 5:
        case 0:
            draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=2)
        case 1:
            draw.rectangle((x - r, y - r, x + r, y + r), outline=colour, width=2)
        case 2:
            draw.polygon((x, y - r, x + r, y + r, x - r, y + r), outline=colour)
        case 3:
            draw.polygon((x, y - r - 1, x + r + 1, y, x, y + r + 1, x - r - 1, y), fill=colour)
        case _:
            draw.line((x - r, y - r, x + r, y + r), fill=colour, width=2)
            draw.line((x - r, y + r, x + r, y - r), fill=colour, width=2)
