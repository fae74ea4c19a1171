"""Many images with their prompts on one PNG, for people to look at."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from millijoule.workers.visible_text import visible

#: Images are shown about this large, in pixels: small ones are enlarged by a whole factor, large ones reduced.
SHOWN_PIXELS = 128
CAPTION_LINES = 3
COLUMNS = 8
_MARGIN = 6
_LINE_PIXELS = 13
_CAPTION_CHARS = 22


def draw_contact_sheet(images: Sequence[Image.Image], captions: Sequence[str]) -> bytes:
    """PNG bytes of a sheet with `images` in reading order and each caption, shortened, underneath."""
    columns = min(COLUMNS, max(1, len(images)))
    rows = -(-len(images) // columns)
    cell_width = SHOWN_PIXELS + 2 * _MARGIN
    cell_height = SHOWN_PIXELS + CAPTION_LINES * _LINE_PIXELS + 2 * _MARGIN
    sheet = Image.new("RGB", (columns * cell_width, max(1, rows) * cell_height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = (i % columns) * cell_width + _MARGIN, (i // columns) * cell_height + _MARGIN
        sheet.paste(_fitted(image.convert("RGB")), (x, y))
        lines = textwrap.wrap(visible(caption), _CAPTION_CHARS, max_lines=CAPTION_LINES, placeholder=" ...")
        for k, line in enumerate(lines):
            draw.text((x, y + SHOWN_PIXELS + 2 + k * _LINE_PIXELS), line, fill=(0, 0, 0), font=font)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _fitted(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest * 2 <= SHOWN_PIXELS:
        factor = SHOWN_PIXELS // longest
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS), Image.Resampling.LANCZOS)
    return image
