"""PNG files hold every pixel, whatever the image and the form that wrote it; a decoder of the test's own and Pillow's say so."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from millijoule.kernels import png as module
from millijoule.kernels.native_library import forms_here, only
from millijoule.kernels.png import encode_pngs, encode_pngs_reference

HERE = forms_here()
compiled = pytest.mark.skipif(not HERE, reason="no compiler was there when the package was installed")


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    """(type, content) of each; lengths and checksums are looked at."""
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    found, at = [], 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        whole = png[at + 4 : at + 8 + size]
        assert int.from_bytes(png[at + 8 + size : at + 12 + size], "big") == zlib.crc32(whole)
        found.append((whole[:4], whole[4:]))
        at += 12 + size
    assert at == len(png)
    return found


def unfiltered(raw: bytes, height: int, row_bytes: int, pixel_bytes: int) -> np.ndarray:
    """uint8 `[height, row_bytes]`, byte by byte as section 9.2 has it."""
    rows = np.zeros((height + 1, row_bytes + pixel_bytes), int)
    for y in range(height):
        line = raw[y * (row_bytes + 1) : (y + 1) * (row_bytes + 1)]
        kind, above, row = line[0], rows[y], rows[y + 1]
        for i, x in enumerate(line[1:], pixel_bytes):
            a, b, c = row[i - pixel_bytes], above[i], above[i - pixel_bytes]
            p = a + b - c
            nearest = min((abs(p - a), 0, a), (abs(p - b), 1, b), (abs(p - c), 2, c))[2]
            row[i] = (x + (0, a, b, (a + b) // 2, nearest)[kind]) % 256
    return rows[1:, pixel_bytes:].astype(np.uint8)


def decoded(png: bytes) -> np.ndarray:
    """uint8 `[height, width, 3]`."""
    chunks = chunks_of(png)
    assert [kind for kind, _ in chunks[:2]] == [b"IHDR", b"sRGB"]
    assert chunks[-1] == (b"IEND", b"")
    content = dict(chunks)
    width, height = (int.from_bytes(content[b"IHDR"][at : at + 4], "big") for at in (0, 4))
    bits, colour_type = content[b"IHDR"][8:10]
    assert content[b"IHDR"][10:] == b"\0\0\0"
    unpack = zlib.decompressobj()
    raw = unpack.decompress(content[b"IDAT"])
    assert (unpack.eof, unpack.unused_data) == (True, b"")
    if colour_type == 2:
        assert (bits, len(raw)) == (8, height * (1 + 3 * width))
        return unfiltered(raw, height, 3 * width, 3).reshape(height, width, 3)
    assert colour_type == 3
    row_bytes = (width * bits + 7) // 8
    assert len(raw) == height * (1 + row_bytes)
    packed = unfiltered(raw, height, row_bytes, 1)
    each = np.unpackbits(packed, axis=1).reshape(height, -1, bits)[:, :width]
    indices = (each << np.arange(bits)[::-1]).sum(2)  # [height, width]
    colours = np.frombuffer(content[b"PLTE"], np.uint8).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) == len(colours) <= 2**bits
    return colours[indices]


def opened(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def encode_in(form: str, images, chunks) -> list[bytes]:
    with only(form):
        return encode_pngs(images, chunks)


def encode_in_all_forms(image: np.ndarray, *chunks: bytes) -> bytes:
    """The file, which is the same in all of them."""
    files = {encode_in(form, [image], [chunks])[0] for form in HERE}
    assert len(files) == 1
    return files.pop()


def picture(height: int, width: int, kind: str, colours: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    if kind == "gradient":
        return np.stack([x * 3 + y, y * 5, x * y // 7], 2).astype(np.uint8)
    if kind == "noise":
        return rng.integers(0, 256, (height, width, 3), np.uint8)
    if kind == "smooth":
        return (
            128 + 40 * np.sin(np.stack([x / 9, y / 7, (x + y) / 5], 2)) + rng.normal(0, 2, (height, width, 3))
        ).astype(np.uint8)
    palette = rng.integers(0, 256, (colours, 3), np.uint8)
    if kind == "specks":
        return palette[rng.integers(0, colours, (height, width))]
    flat = np.zeros((height, width), int)  # rectangles of one colour each
    for colour in range(min(colours, 60)):
        top, left = rng.integers(0, height), rng.integers(0, width)
        flat[top : top + rng.integers(1, 9), left : left + rng.integers(1, 30)] = colour
    flat.flat[:colours] = np.arange(min(colours, flat.size))
    return palette[flat]


KINDS = ["gradient", "noise", "smooth", "specks", "rectangles"]


@compiled
@settings(max_examples=150, deadline=None)
@given(
    height=st.integers(1, 24),
    width=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    colours=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
@example(height=1, width=1, kind="noise", colours=1, seed=0)
@example(height=16, width=16, kind="rectangles", colours=256, seed=0)
@example(height=16, width=17, kind="rectangles", colours=257, seed=0)
@example(height=24, width=22, kind="rectangles", colours=16, seed=0)
@example(height=24, width=23, kind="rectangles", colours=4, seed=0)
@example(height=24, width=43, kind="specks", colours=2, seed=0)
@example(height=24, width=64, kind="specks", colours=1, seed=0)
def test_every_pixel_survives_in_every_form(height, width, kind, colours, seed):
    image = picture(height, width, kind, colours, np.random.default_rng(seed))
    png = encode_in_all_forms(image)
    assert np.array_equal(decoded(png), image)
    assert np.array_equal(opened(png), image)


def fibonacci_specks() -> np.ndarray:
    """Counts of colours for which Huffman's own codes would be longer than DEFLATE's may be."""
    counts = [1, 1]
    while len(counts) < 23:
        counts.append(counts[-1] + counts[-2])
    indices = np.repeat(np.arange(23), counts)
    np.random.default_rng(0).shuffle(indices)
    palette = np.random.default_rng(1).integers(0, 256, (23, 3), np.uint8)
    return palette[indices[: len(indices) // 200 * 200].reshape(200, -1)]


def blocks_apart() -> np.ndarray:
    """The same noise again and again, beyond what a match reaches and within; and rows of one byte for longer than a block."""
    rng = np.random.default_rng(3)
    noise = rng.integers(0, 256, (40, 500, 3), np.uint8)
    grey = np.full((60, 500, 3), 7, np.uint8)
    return np.concatenate([noise, noise, grey, noise[:3], grey, noise[:1], noise[1:2]])


LARGE = {
    "noise, stored": lambda: picture(200, 200, "noise", 0, np.random.default_rng(0)),
    "smooth, several blocks": lambda: picture(220, 210, "smooth", 0, np.random.default_rng(0)),
    "rectangles, many colours": lambda: np.tile(
        picture(40, 60, "rectangles", 300, np.random.default_rng(0)), (5, 5, 1)
    ),
    "rectangles, a palette": lambda: np.tile(
        picture(40, 60, "rectangles", 99, np.random.default_rng(0)), (9, 9, 1)
    ),
    "rows longer than a match reaches": lambda: np.repeat(
        picture(1, 40_000, "specks", 200, np.random.default_rng(0)), 3, 0
    ),
    "RGB rows longer than that": lambda: np.repeat(
        picture(1, 12_000, "specks", 900, np.random.default_rng(0)), 4, 1
    ),
    "one colour": lambda: np.full((300, 700, 3), 200, np.uint8),
    "codes that would be too long": fibonacci_specks,
    "repeats near and far": blocks_apart,
}


@compiled
@pytest.mark.parametrize("image", LARGE.values(), ids=LARGE.keys())
def test_larger_images_survive_too(image):
    image = image()
    png = encode_in_all_forms(image)
    assert np.array_equal(opened(png), image)
    raw = zlib.decompress(dict(chunks_of(png))[b"IDAT"])
    assert len(png) < len(raw) * 1.001 + 1000


@compiled
@pytest.mark.parametrize(
    ("colours", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8), (257, None)]
)
def test_few_colours_become_a_palette_of_as_few_bits_as_hold_them(colours, bits):
    rng = np.random.default_rng(0)
    palette = (np.arange(colours)[:, None] * 102_947 >> np.array([0, 8, 16])) & 255  # all different
    image = palette[rng.permutation(64 * 64).reshape(64, 64) % colours].astype(np.uint8)
    png = encode_in_all_forms(image)
    assert list(dict(chunks_of(png))[b"IHDR"][8:10]) == ([bits, 3] if bits else [8, 2])
    assert np.array_equal(decoded(png), image)


@compiled
def test_a_palette_that_costs_more_than_it_saves_is_not_written():
    image = np.arange(48, dtype=np.uint8).reshape(2, 8, 3)
    assert dict(chunks_of(encode_in_all_forms(image)))[b"IHDR"][9] == 2


@pytest.mark.parametrize("form", ["reference", *HERE])
def test_images_of_all_sizes_in_one_call_are_what_they_are_alone(form):
    rng = np.random.default_rng(0)
    images = [picture(h, w, kind, 40, rng) for kind in KINDS for h, w in ((1, 1), (64, 64), (33, 21))]
    chunks = [(b"tEXta\0" + bytes([65 + i]) * i, b"iTXtb") for i in range(len(images))]
    files = encode_in(form, images, chunks)
    assert files == [encode_in(form, [image], [own])[0] for image, own in zip(images, chunks, strict=True)]
    for image, own, png in zip(images, chunks, files, strict=True):
        assert np.array_equal(decoded(png), image)
        found = [kind + content for kind, content in chunks_of(png)]
        assert [chunk for chunk in found if chunk[:4] in (b"tEXt", b"iTXt")] == list(own)


def test_a_batch_and_views_of_any_order_are_taken():
    batch = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    assert [decoded(png).tolist() for png in encode_pngs(batch, [()] * 3)] == batch.tolist()
    views = [batch[0, ::-1], batch[1, :, ::2], batch[2].transpose(1, 0, 2)]
    for view, png in zip(views, encode_pngs(views, [()] * 3), strict=True):
        assert np.array_equal(decoded(png), view)
    assert encode_pngs([], []) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_holds_the_same_pixels(kind):
    image = picture(20, 30, kind, 30, np.random.default_rng(0))
    (png,) = encode_pngs_reference([image], [(b"tEXta\0b",)])
    assert np.array_equal(decoded(png), image)
    assert dict(chunks_of(png))[b"tEXt"] == b"a\0b"


def test_without_the_compiled_form_the_reference_writes(monkeypatch):
    monkeypatch.setattr(module, "native_library", lambda: None)
    image = picture(20, 30, "specks", 5, np.random.default_rng(0))
    assert encode_pngs([image], [()]) == encode_pngs_reference([image], [()])
    assert module.encoder_name() == "zlib"


@compiled
def test_an_image_larger_than_the_compiled_form_takes_is_the_references(monkeypatch):
    assert module.encoder_name() == "compiled"
    rng = np.random.default_rng(0)
    small, large = picture(8, 9, "specks", 9, rng), picture(9, 9, "specks", 9, rng)
    monkeypatch.setattr(module, "MAX_COMPILED_BYTES", small.nbytes)
    assert encode_pngs([small, large], [(), ()]) == [
        *encode_pngs([small], [()]),
        *encode_pngs_reference([large], [()]),
    ]


@compiled
def test_no_memory_is_said_as_such(monkeypatch):
    class Full:
        millijoule_png_bound = staticmethod(lambda height, width: 10)
        millijoule_encode_pngs = staticmethod(lambda *arguments: -1)

    monkeypatch.setattr(module, "native_library", Full)
    with pytest.raises(MemoryError, match="no memory to encode"):
        encode_pngs([np.zeros((1, 1, 3), np.uint8)], [()])


@pytest.mark.parametrize("encode", [encode_pngs, encode_pngs_reference])
@pytest.mark.parametrize(
    ("images", "chunks", "message"),
    [
        ([np.zeros((0, 4, 3), np.uint8)], [()], "with pixels, got uint8 .0, 4, 3."),
        ([np.zeros((4, 0, 3), np.uint8)], [()], "with pixels"),
        ([np.zeros((4, 4, 3))], [()], "got float64"),
        ([np.zeros((4, 4, 4), np.uint8)], [()], "4, 4, 4"),
        ([np.zeros((4, 4), np.uint8)], [()], "4, 4"),
        ([np.zeros((4, 4, 3), np.uint8)], [], "1 images, 0 lists"),
        ([np.zeros((4, 4, 3), np.uint8)] * 2, [(), (b"tEXt",)], "all as long"),
        ([np.zeros((4, 4, 3), np.uint8)], [(b"tEX",)], "four letters"),
    ],
)
def test_what_is_no_image_is_refused(encode, images, chunks, message):
    with pytest.raises(ValueError, match=message):
        encode(images, chunks)
