"""`millijoule bench encode [RESULT.json]`: processor time and bytes per image of every encoder, for icons, sheets of them and photographs.

One process encodes the same images in every form, in blocks there and back, so that a drift of the machine falls on all alike. A
block is one thread's processor time from pixels and requests to files, text included, in parts as a worker has them. Of every PNG
the pixels are compared. "zlib-rle" is how the product encoded before `kernels.png` was compiled. `strategies` says what zlib's levels
would make of an icon's rows, by zlib's time alone.
"""

from __future__ import annotations

import io
import json
import math
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from millijoule.jobs.bench.gpu import scene_requests
from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.measuring.measurement import ResultOptions, describe, write_result
from millijoule.jobs.measuring.stand_in_device import photograph
from millijoule.kernels.native_library import forms_here, only
from millijoule.kernels.png import encode_pngs, encode_pngs_reference
from millijoule.workers.attempts.encoding import TASK_BYTES
from millijoule.workers.errors import UsageError
from millijoule.workers.images.encode import Drawn, encode_images
from millijoule.workers.images.formats import ImageFormat, ImageFormatName, read_image_format
from millijoule.workers.images.png import text_chunks
from millijoule.workers.images.provenance import ModelProvenance

Encoder = Callable[[Sequence[Drawn]], Sequence[Any]]

MODEL_NAME, MODEL_SHA256 = "default", "0123456789abcdef" * 4
BEFORE = "zlib-rle"
GOAL_ICON_US = 40.0

#: Formats that change pixels: in one call of compiled code, and "by pillow", an image at a time.
LOSSY: tuple[ImageFormatName, ...] = ("jpeg", "webp")

#: Of a PNG: signature, header, colour space, and what frames its pixels and its end.
FRAME_BYTES = 8 + 25 + 13 + 12 + 12

STRATEGY_ROUNDS = 3

#: zlib's (level, strategy) that are tried on an icon's rows.
LEVELS = {
    "rle": (1, zlib.Z_RLE),
    "1": (1, zlib.Z_DEFAULT_STRATEGY),
    "6": (6, zlib.Z_DEFAULT_STRATEGY),
    "9": (9, zlib.Z_DEFAULT_STRATEGY),
}


@dataclass(frozen=True)
class BenchOptions(ResultOptions):
    """Measure encoders against each other."""

    icons: int = 258
    """Images of the default generator, 64x64."""

    photographs: tuple[int, ...] = (64, 512, 1024)
    """Pixels a side of made-up photographs (noise with a photograph's spectrum), a million pixels of each, at most 86 images."""

    rounds: int = 15
    """How often the blocks go there and back."""


def run(options: BenchOptions) -> int:
    if min(options.icons, options.rounds, *options.photographs) < 1:
        raise UsageError("--icons, --photographs, --rounds: at least 1")
    encoders = all_encoders()
    icons = _icons(options.icons)
    kinds = {"icons": icons, "sheet of icons 512": [_sheet(icons)]}
    for pixels in options.photographs:
        many = max(1, min(86, 2**20 // pixels**2))
        requests = scene_requests(many)
        kinds[f"photographs {pixels}"] = [Drawn(photograph(pixels, i), requests[i], 1) for i in range(many)]
    measured = {kind: compare(encoders, drawn, options.rounds) for kind, drawn in kinds.items()}
    ours = measured["icons"]["forms"].get(_best())
    result = {
        **describe("processor microseconds (median, least, most) and bytes per image by encoder", options),
        "pillow_zlib": _pillow_zlib(),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "goal": f"an icon in at most {GOAL_ICON_US:g} microseconds, in a smaller file than before",
        "goal_met": ours is not None
        and ours["us_per_image"][0] <= GOAL_ICON_US
        and ours["bytes_over_before"] < 1,
        "kinds": measured,
        "strategies": strategies([one.image for one in icons]),
    }
    write_result(result, options.result)
    return COMPLETE


def all_encoders() -> dict[str, Encoder]:
    """By name; the compiled forms that run here are named as `MILLIJOULE_KERNEL` names them."""
    model = ModelProvenance(MODEL_NAME, MODEL_SHA256)

    def ours(encode: Callable[..., list[bytes]], drawn: Sequence[Drawn]) -> list[bytes]:
        return encode([one.image for one in drawn], [text_chunks(model.of(*one)) for one in drawn])

    def lossy(image_format: ImageFormat, drawn: Sequence[Drawn]) -> Sequence[Any]:
        return encode_images(image_format, drawn, model)

    def pillow(optimize: bool, drawn: Sequence[Drawn]) -> list[bytes]:
        return [_encode_with_pillow(one, model, optimize) for one in drawn]

    def lossy_by_pillow(name: ImageFormatName, drawn: Sequence[Drawn]) -> Sequence[Any]:
        with only("reference"):
            return lossy(read_image_format(name, None), drawn)

    def in_form(form: str, drawn: Sequence[Drawn]) -> list[bytes]:
        with only(form):
            return ours(encode_pngs, drawn)

    return {
        BEFORE: lambda drawn: [_encode_as_before(one) for one in drawn],
        "pillow": partial(pillow, False),
        "pillow optimize": partial(pillow, True),
        "reference": partial(ours, encode_pngs_reference),
        **{form: partial(in_form, form) for form in forms_here()},
        **{name: partial(lossy, read_image_format(name, None)) for name in LOSSY},
        **{f"{name} by pillow": partial(lossy_by_pillow, name) for name in LOSSY},
    }


def compare(encoders: dict[str, Encoder], drawn: Sequence[Drawn], rounds: int) -> dict[str, Any]:
    """Time and bytes of each encoder on the same images.

    Raises:
        RuntimeError: a PNG holds other pixels than the image it was made of.
    """
    many = max(1, TASK_BYTES // drawn[0].image.nbytes)
    parts = [drawn[at : at + many] for at in range(0, len(drawn), many)]
    used: dict[str, list[float]] = {name: [] for name in encoders}
    sizes: dict[str, float] = {}
    for name, encode in encoders.items():  # warms up, too
        files = [file for part in parts for file in encode(part)]
        sizes[name] = sum(map(len, files)) / len(files)
        if not name.startswith(LOSSY):
            _compare_pixels(name, files, drawn)
    for _ in range(rounds):
        for name in (*encoders, *reversed(encoders)):
            began = time.thread_time()
            for part in parts:
                encoders[name](part)
            used[name].append(1e6 * (time.thread_time() - began) / len(drawn))
    before = statistics.median(used[BEFORE])
    return {
        "images": len(drawn),
        "forms": {
            name: {
                "us_per_image": [round(x, 2) for x in (statistics.median(us), min(us), max(us))],
                "bytes_per_image": round(sizes[name], 1),
                "time_over_before": round(statistics.median(us) / before, 4),
                "bytes_over_before": round(sizes[name] / sizes[BEFORE], 4),
                "blocks_us": [round(x, 2) for x in us],
            }
            for name, us in used.items()
        },
    }


def strategies(images: Sequence[np.ndarray]) -> list[dict[str, Any]]:
    """zlib's levels on the rows of images with at most 256 colours: as RGB, less the row above, and as indices of a palette; and what
    `kernels.png` makes of them.

    Bytes are those of the compressed rows, and of the palette's chunk. Time is zlib's alone; of `kernels.png` all it does.
    """
    few: list[np.ndarray] = []
    rows: dict[str, list[tuple[bytes, int]]] = {"rgb": [], "rgb, up": [], "palette": []}
    for image in images:
        height, width, _ = image.shape
        colours, indices = np.unique(image.reshape(-1, 3), axis=0, return_inverse=True)
        if len(colours) > 256:
            continue
        few.append(image)
        pixels = image.reshape(height, -1)
        up = np.concatenate([pixels[:1], pixels[1:] - pixels[:-1]])
        for name, lines, own in (
            ("rgb", pixels, 0),
            ("rgb, up", up, 0),
            ("palette", indices.reshape(height, width).astype(np.uint8), 12 + 3 * len(colours)),
        ):
            filtered = np.concatenate(
                [np.full((height, 1), 2 if name == "rgb, up" else 0, np.uint8), lines], 1
            )
            rows[name].append((filtered.tobytes(), own))
    if not few:
        return []
    found = []

    def add(name: str, encoder: str, sizes: Callable[[], list[int]]) -> None:
        best, total = math.inf, 0
        for _ in range(STRATEGY_ROUNDS):
            began = time.thread_time()
            total = sum(sizes())
            best = min(best, time.thread_time() - began)
        found.append(
            {"rows": name, "encoder": encoder, "images": len(few), "least_us_per_image": round(1e6 * best / len(few), 2),
             "bytes_per_image": round(total / len(few), 1)}
        )  # fmt: skip

    for name, lines_of in rows.items():
        for level, options in LEVELS.items():
            add(name, f"zlib {level}", partial(_deflated_sizes, lines_of, *options))
    add("as it chooses", "kernels.png", partial(_compiled_sizes, few))
    return found


def _deflated_sizes(rows: Sequence[tuple[bytes, int]], level: int, strategy: int) -> list[int]:
    return [len(_deflate(lines, level, strategy)) + own for lines, own in rows]


def _compiled_sizes(images: Sequence[np.ndarray]) -> list[int]:
    return [len(file) - FRAME_BYTES for file in encode_pngs(images, [()] * len(images))]


def _icons(count: int) -> list[Drawn]:
    from millijoule.workers.generators.registry import load_generator

    generator = load_generator("default")
    requests, many = scene_requests(count), generator.info.batch_size
    batches = [requests[at : at + many] for at in range(0, count, many)]
    steps = generator.info.num_inference_steps
    return [
        Drawn(image, request, steps)
        for batch in batches
        for request, image in zip(batch, generator.generate(batch).images, strict=True)
    ]


def _sheet(icons: Sequence[Drawn]) -> Drawn:
    """Eight by eight icons as one image: flat, with more colours than a palette has."""
    images = [icons[i % len(icons)].image for i in range(64)]
    rows = [np.concatenate(images[at : at + 8], axis=1) for at in range(0, 64, 8)]
    return Drawn(np.concatenate(rows), icons[0].request, 1)


def _best() -> str:
    return ("reference", *forms_here())[-1]


def _pillow_zlib() -> str:
    from PIL import features

    return f"{features.version('zlib')}{', zlib-ng' if features.check_feature('zlib_ng') else ''}"


def _compare_pixels(name: str, files: Sequence[bytes], drawn: Sequence[Drawn]) -> None:
    for file, one in zip(files, drawn, strict=True):
        if not np.array_equal(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")), one.image):
            raise RuntimeError(f"{name}: image {one.request.prompt_id} has other pixels than were drawn")


def _encode_with_pillow(one: Drawn, model: ModelProvenance, optimize: bool) -> bytes:
    provenance, info, buffer = model.of(*one), PngInfo(), io.BytesIO()
    info.add_text("parameters", provenance.parameters)
    info.add_text("millijoule", provenance.record)
    Image.fromarray(one.image).save(buffer, "PNG", pnginfo=info, optimize=optimize)
    return buffer.getvalue()


def _encode_as_before(one: Drawn) -> bytes:
    request, (height, width, _) = one.request, one.image.shape
    parameters = (
        f"{request.prompt}\nSteps: {one.steps}, Seed: {request.seed}, Size: {width}x{height}, Model: {MODEL_NAME}, "
        f"Model hash: {MODEL_SHA256[:10]}"
    )
    record = {
        "schema_version": 1, "prompt_id": request.prompt_id, "image_index": request.image_index, "seed": request.seed,
        "prompt": request.prompt, "negative_prompt": request.negative_prompt, "width": width, "height": height,
        "num_inference_steps": one.steps, "guidance_scale": request.guidance_scale, "model": MODEL_NAME,
        "model_sha256": MODEL_SHA256,
    }  # fmt: skip
    text = json.dumps(record, separators=(",", ":"))
    pixels = one.image.reshape(height, width * 3)
    rows = np.empty((height, 1 + width * 3), np.uint8)
    rows[:, 0] = 2
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            _chunk(b"IHDR", size + b"\x08\x02\x00\x00\x00"),
            _chunk(b"sRGB", b"\x00"),
            _chunk(b"tEXt", b"parameters\x00" + parameters.encode("latin-1")),
            _chunk(b"tEXt", b"millijoule\x00" + text.encode("latin-1")),
            _chunk(b"IDAT", _deflate(rows.data, 1, zlib.Z_RLE)),
            _chunk(b"IEND", b""),
        )
    )


def _deflate(rows: bytes | memoryview, level: int, strategy: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, strategy)
    return packer.compress(rows) + packer.flush()


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(data, zlib.crc32(kind))
    return b"".join((len(data).to_bytes(4, "big"), kind, data, checksum.to_bytes(4, "big")))
