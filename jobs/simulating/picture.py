"""The comparison of policies as a picture: joules against time, both relative to work-stealing's, a panel per fleet."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 400, 320, 56, 44, 34, 16
_INK, _GRID, _GOAL = (30, 30, 30), (228, 228, 228), (150, 150, 150)
_COLOURS = {
    "work-stealing": (70, 70, 70),
    "speed": (190, 60, 50),
    "energy": (20, 110, 60),
    "cost": (35, 85, 220),
}
#: Saving of joules that the comparison is to show.
GOAL = 0.15
_STEP = 0.1


def draw_policies(fleets: Sequence[Mapping[str, Any]]) -> bytes:
    """PNG bytes of what `jobs.bench.fleet.compare` found, two panels to a column."""
    columns = (len(fleets) + 1) // 2
    picture = Image.new("RGB", (WIDTH * columns, HEIGHT * min(2, len(fleets))), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    for i, fleet in enumerate(fleets):
        _panel(draw, font, fleet, i // 2 * WIDTH, i % 2 * HEIGHT)
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()


def _panel(draw: ImageDraw.ImageDraw, font: Any, fleet: Mapping[str, Any], left: int, top: int) -> None:
    stealing = fleet["rows"][0]
    points = [
        (row["prefer"], row["makespan_s"] / stealing["makespan_s"], row["joules"] / stealing["joules"])
        for row in fleet["rows"]
    ]
    most_x = max(x for _, x, _ in points) * 1.08
    least_y = min(min(y for *_, y in points), 1 - GOAL) - 0.05
    most_y = max(y for *_, y in points) + 0.05

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + LEFT + x / most_x * (WIDTH - LEFT - RIGHT),
            top + HEIGHT - BOTTOM - (y - least_y) / (most_y - least_y) * (HEIGHT - BOTTOM - TOP),
        )

    name = f"fleet {fleet['mix']}{', half of it spot' if fleet['spot'] else ''}"
    draw.text((left + LEFT, top + 8), name, fill=_INK, font=font)
    level = round(least_y / _STEP + 0.5) * _STEP
    while level <= most_y:
        draw.line((*at(0, level), *at(most_x, level)), fill=_GRID)
        draw.text((left + 8, at(0, level)[1] - 7), f"{level:.0%}", fill=_INK, font=font)
        level += _STEP
    for times in range(int(most_x) + 1):
        draw.line((*at(times, least_y), *at(times, most_y)), fill=_GRID)
        draw.text((at(times, 0)[0] - 4, top + HEIGHT - BOTTOM + 6), f"{times}x", fill=_INK, font=font)
    draw.line((*at(0, 1 - GOAL), *at(most_x, 1 - GOAL)), fill=_GOAL, width=2)
    draw.text((left + LEFT, top + HEIGHT - 20), "time; joules of work-stealing: 100%", fill=_INK, font=font)
    line = top + TOP
    for prefer, colour in _COLOURS.items():
        own = sorted((x, y) for p, x, y in points if p == prefer)
        places = [at(x, y) for x, y in own]
        if len(places) > 1:
            draw.line([c for place in places for c in place], fill=colour, width=2)
        for x, y in places:
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        draw.text((left + WIDTH - RIGHT - 90, line), prefer, fill=colour, font=font)
        line += 15
