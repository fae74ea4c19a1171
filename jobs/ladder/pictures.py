"""A climb for people: the table, the frontier of cost and quality, and the same seeds on every rung."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from millijoule.workers.judging.contact_sheet import COLUMNS, draw_contact_sheet

WIDTH, HEIGHT, MARGIN = 900, 560, 70
_INK, _GRID, _KEPT, _FAILED = (30, 30, 30), (225, 225, 225), (20, 110, 60), (190, 60, 50)


def draw_frontier(rows: Sequence[Mapping[str, Any]], cost: str) -> bytes:
    """PNG bytes: what each rung costs of the dense pipeline (logarithmic) and what it loses, score where there is one.

    Args:
        rows: of a climb; those without figures are left out.
        cost: "joules" or "cpu_seconds".
    """
    scored = any(row.get("score_loss") for row in rows)
    points = [
        (row["rung"], row["cost_ratio"], value, row["failing"] is None)
        for row in rows
        if "refused" not in row and (value := _quality(row, scored)) is not None
    ]
    picture = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=12)
    least = min([c for _, c, _, _ in points] + [0.5])
    lowest, highest = math.log2(least) - 0.3, 0.6
    values = [v for _, _, v, _ in points] + ([0.0] if scored else [])
    bottom, top = (min(values, default=0.0), max(values, default=1.0))
    room = (top - bottom) * 0.1 or 1.0
    bottom, top = bottom - room, top + room

    def place(ratio: float, value: float) -> tuple[float, float]:
        x = MARGIN + (math.log2(ratio) - lowest) / (highest - lowest) * (WIDTH - 2 * MARGIN)
        return x, HEIGHT - MARGIN - (value - bottom) / (top - bottom) * (HEIGHT - 2 * MARGIN)

    for power in range(math.ceil(lowest), 1):
        x, _ = place(2.0**power, bottom)
        draw.line((x, MARGIN, x, HEIGHT - MARGIN), fill=_GRID)
        draw.text((x - 10, HEIGHT - MARGIN + 6), "1" if not power else f"1/{2**-power}", fill=_INK, font=font)
    for k in range(6):
        value = bottom + (top - bottom) * k / 5
        _, y = place(1.0, value)
        draw.line((MARGIN, y, WIDTH - MARGIN, y), fill=_GRID)
        draw.text((MARGIN - 44, y - 7), f"{value:.1f}", fill=_INK, font=font)
    units = {"joules": "joules", "cpu_seconds": "CPU time"}[cost]
    draw.text(
        (MARGIN, HEIGHT - 30), f"{units} per image, as a part of the dense pipeline's", fill=_INK, font=font
    )
    heading = (
        "points of score lost (lower is better)"
        if scored
        else "PSNR to the dense images in dB (higher is better)"
    )
    draw.text((MARGIN, 20), f"{heading}; green passes the gate, red does not", fill=_INK, font=font)
    taken: list[tuple[float, float]] = []
    for name, ratio, value, passes in sorted(points, key=lambda p: p[1]):
        x, y = place(ratio, value)
        colour = _KEPT if passes else _FAILED
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=colour)
        label_y = y - 7
        while any(abs(x - a) < 90 and abs(label_y - b) < 13 for a, b in taken):
            label_y += 13
        taken.append((x, label_y))
        draw.text((x + 7, label_y), name, fill=colour, font=font)
    return _png(picture)


def _quality(row: Mapping[str, Any], scored: bool) -> float | None:
    return row["score_loss"][0] if scored and row["score_loss"] else None if scored else row["psnr_db"]


def draw_rungs(images: Mapping[str, np.ndarray], prompts: Sequence[str]) -> bytes:
    """PNG bytes of a sheet: a line per rung, of the same prompts and seeds; `images` are uint8 `[n, height, width, 3]`."""
    shown, captions = [], []
    for rung, drawn in images.items():
        for image, prompt in zip(drawn[:COLUMNS], prompts[:COLUMNS], strict=True):
            shown.append(Image.fromarray(image))
            captions.append(f"{rung}: {prompt}")
        for _ in range(COLUMNS - len(drawn[:COLUMNS])):  # a line of the sheet is a rung
            shown.append(Image.new("RGB", (1, 1), (255, 255, 255)))
            captions.append("")
    return draw_contact_sheet(shown, captions)


def print_table(rows: Sequence[Mapping[str, Any]], cost: str) -> None:
    """All rungs on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="rungs, each on top of those kept before it", title_justify="left")
    names = (
        "rung",
        {"joules": "joules", "cpu_seconds": "CPU time"}[cost],
        "s/image",
        "MB",
        "PSNR dB",
        "features",
    )
    for i, heading in enumerate((*names, "score", "lost (95 %)", "")):
        table.add_column(heading, justify="left" if i in (0, 8) else "right", no_wrap=i < 8)
    for row in rows:
        if "refused" in row:
            table.add_row(row["rung"], *[""] * 7, f"not measured: {row['refused']}")
            continue
        lost = row["score_loss"]
        table.add_row(
            row["rung"],
            f"x{row['cost_ratio']:.3f}",
            f"{row['per_image']['seconds']:.3f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
            f"{row['feature_distance']:.3f}",
            "" if row["score"] is None else f"{row['score']:.3f}",
            "" if lost is None else f"{lost[0]:.1f} ({lost[1]:.1f} to {lost[2]:.1f})",
            row["failing"] or ("kept" if row.get("kept") else ""),
        )
    Console().print(table)


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
