"""Where time goes, stage by stage, before and now: one bar a side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

WIDTH, LEFT, RIGHT, ROW, BAR = 1000, 90, 40, 22, 16
_INK, _GRID = (30, 30, 30), (225, 225, 225)
_COLOURS = ((90, 90, 90), (200, 140, 30), (20, 110, 60), (190, 60, 50), (35, 85, 220), (150, 150, 150))


def draw_waterfall(sides: Mapping[str, Mapping[str, float]], parts: Sequence[str]) -> bytes:
    """PNG bytes: for each side its parts one behind the other, in microseconds, each in a row of its own.

    Args:
        sides: by name; each has all `parts`, and "job", their sum.
    """
    most = max(side["job"] for side in sides.values())
    height = 40 + len(sides) * ((len(parts) + 1) * ROW + 26) + 20
    picture = Image.new("RGB", (WIDTH, height), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    names = 230

    def x(value: float) -> float:
        return LEFT + names + value / most * (WIDTH - LEFT - names - RIGHT - 60)

    y = 24
    for name, side in sides.items():
        draw.text((12, y), name, fill=_INK, font=font)
        reached = 0.0
        for part, colour in zip(parts, _COLOURS, strict=False):
            draw.text((LEFT, y), part, fill=_INK, font=font)
            draw.line((x(0), y + ROW - 3, WIDTH - RIGHT, y + ROW - 3), fill=_GRID)
            end = reached + side[part]
            draw.rectangle((x(reached), y, max(x(end), x(reached) + 1), y + BAR), fill=colour)
            draw.text((x(end) + 6, y), f"{side[part]:.1f}", fill=_INK, font=font)
            reached = end
            y += ROW
        draw.text((LEFT, y), "together", fill=_INK, font=font)
        draw.rectangle((x(0), y, x(side["job"]), y + BAR), outline=_INK)
        draw.text((x(side["job"]) + 6, y), f"{side['job']:.0f} us", fill=_INK, font=font)
        y += ROW + 26
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
