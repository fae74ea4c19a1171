"""Text of others on terminals and pictures: seen, never obeyed."""

import io
import logging

import pytest
from PIL import Image

from millijoule.workers.judging.contact_sheet import draw_contact_sheet
from millijoule.workers.visible_text import VisibleFormatter, visible, visible_lines

#: Unicode's controls of direction (UAX 9, section 2) and its marks.
TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"


@pytest.mark.parametrize(
    "character", [*TURNING, *map(chr, (0, 7, 8, 11, 27, 127, 0x85, 0x9B)), *"\u2028\u2029\u200b\ufeff\ud800"]
)
def test_what_would_be_obeyed_or_hidden_is_written_as_its_code_point(character):
    expected = f"a[U+{ord(character):04X}]b"
    assert visible(f"a{character}b") == visible_lines(f"a{character}b") == expected


@pytest.mark.parametrize(
    "text",
    ["a cat", "ein Kätzchen", "قطة", "חתול", "猫\u3000二匹", "👩\u200d🚀", "क्\u200dष", "x\u00a0y", "🏳️"],
)
def test_what_people_write_stays(text):
    assert visible(text) == visible_lines(text) == text


def test_lines_become_one_or_stay():
    assert visible("a\r\nb\nc\rd\te") == "a b c d e"
    assert visible_lines("a\nb\tc") == "a\nb\tc"
    assert visible_lines("safe\rspoofed") == "safe[U+000D]spoofed"


def test_log_lines_are_visible():
    record = logging.LogRecord("n", logging.WARNING, "p", 1, "%s: %s", ("a\u202eb", "c\x1b[2J"), None)
    assert VisibleFormatter("%(message)s").format(record) == "a[U+202E]b: c[U+001B][2J"


@pytest.mark.parametrize("character", TURNING)
def test_a_contact_sheet_shows_them(character):
    image = Image.new("RGB", (64, 64))

    def sheet(caption):
        return Image.open(io.BytesIO(draw_contact_sheet([image], [caption]))).tobytes()

    assert sheet(f"cat {character}dog") == sheet(f"cat [U+{ord(character):04X}]dog") != sheet("cat dog")
