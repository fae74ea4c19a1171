"""Images of icons in one call of compiled code: from tokens and seeds to pixels, the same bits as the reference's.

The reference is `workers.oscillators.draw.Drawing` in PyTorch, which has the equations. Here everything is one pass over a batch:
shapes that icons share are drawn once, only cells with ink are computed, weights are packed once when a model is loaded, sums are
int8 products in exact int32 (VNNI where the processor has it, else AVX2, else plain), and nothing but pixels leaves.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from millijoule.kernels.native_library import native_library, usual_form
from millijoule.kernels.oscillator import Coupling, gather_multipliers, pull_multipliers
from millijoule.kernels.phase import COS_TABLE, SIN_TABLE

log = logging.getLogger(__name__)

#: Layers in the order in which the compiled code takes them, and of how many groups of inputs each reads: a cell and its eight
#: neighbours, or one.
GROUPS = {"read_code": 1, "drive": 1, "near": 9, "enlarge": 1, "near_again": 9, "mix": 1, "share": 1}

#: What it is compiled for: cells of the oscillators' grid, sizes of an icon, tokens of an image, pixels of its side.
CELLS, SIZES, TOKENS, PIXELS = 16, 3, 17, 64


@dataclass(frozen=True)
class ImageWeights:
    """A model, as the kernel takes it.

    Attributes:
        channels, steps, horizon: as in the model's settings.
        layers: by the names of `GROUPS`: int8 weights `[outputs, inputs]`, int32 bias and multipliers that fit int32, `[outputs]`.
        codes, sizes, place: as in `IntegerNetwork`.
        coupling: None, the oscillators have none.
        ink: of half windows and of the whole image, bool `[nouns, sizes, cells]`.
        colours, grounds: levels, `[n, 3]`.
        windows: left, top and side in cells, `[n, 3]`.
        shares: uint8 by logit.
        shade, jitter: what a seed varies, in levels and pixels, at most.
    """

    channels: int
    steps: int
    horizon: float
    layers: Mapping[str, tuple[Tensor, Tensor, Tensor]]
    codes: Tensor
    sizes: Tensor
    place: Tensor
    coupling: Coupling | None
    ink: tuple[Tensor, Tensor]
    colours: Tensor
    grounds: Tensor
    windows: Tensor
    shares: Tensor
    shade: int
    jitter: int


class ImageKernel:
    """A model packed for this processor. Build with `of`."""

    def __init__(self, weights: ImageWeights, library: ctypes.CDLL, form: int) -> None:
        self._weights = weights
        self._library = library
        self._form = form
        self._model = _packed(weights, library)
        self._multipliers: dict[int, tuple[np.ndarray | None, ...]] = {}
        self._limits = np.array(_token_limits(weights))

    @staticmethod
    def of(weights: ImageWeights, form: int | None = None) -> ImageKernel | None:
        """The kernel of a model, in `form` (of `native_library.FORMS`) or the best there is.

        None where PyTorch draws: see `usual_form`, or a weight is -128, which the AVX2 form cannot negate.
        """
        form = usual_form() if form is None else form
        if form is None or (library := native_library()) is None:
            return None
        int8 = [layer[0] for layer in weights.layers.values()]
        if weights.coupling is not None:
            int8 += [weights.coupling.local, weights.coupling.gather, weights.coupling.spread]
        if any(int(values.min()) == -128 for values in int8):
            log.warning(
                "a weight of this model is -128, which the compiled kernel does not take: PyTorch draws"
            )
            return None
        return ImageKernel(weights, library, form)

    def draw(self, tokens: np.ndarray, seeds: np.ndarray, steps: int | None = None) -> np.ndarray:
        """Images uint8 `[images, 64, 64, 3]` of completed scenes, int64 `[images, 17]`, from uint64 seeds.

        It takes as many threads as PyTorch has; pixels do not depend on them.

        Raises:
            ValueError: tokens or seeds are of another form, or name what there is not.
        """
        tokens = np.ascontiguousarray(tokens, np.int64)
        seeds = np.ascontiguousarray(seeds, np.uint64)
        steps = steps or self._weights.steps
        if tokens.ndim != 2 or tokens.shape[1] != TOKENS or seeds.shape != tokens.shape[:1] or steps < 1:
            raise ValueError(f"tokens {list(tokens.shape)}, seeds {list(seeds.shape)}, {steps} steps")
        icons = tokens[:, :-1].reshape(-1, 4)
        icons = icons[icons[:, 0] != 0]
        if (
            (icons < 1).any()
            or (icons > self._limits[:4]).any()
            or (tokens[:, -1] < 0).any()
            or (tokens[:, -1] >= self._limits[4]).any()
        ):
            raise ValueError("tokens of a scene that this model has no words for")
        images = np.empty((len(tokens), PIXELS, PIXELS, 3), np.uint8)
        failed = self._library.millijoule_draw_images(
            self._model,
            self._form,
            _pointer(tokens),
            _pointer(seeds),
            len(tokens),
            steps,
            torch.get_num_threads(),
            *map(_pointer, self._multipliers_of(steps)),
            _pointer(images),
        )
        if failed:
            raise MemoryError("no memory to draw images")
        return images

    def _multipliers_of(self, steps: int) -> tuple[np.ndarray | None, ...]:
        """Of the coupling in steps of that length."""
        coupling = self._weights.coupling
        if coupling is None:
            return None, None, None
        if steps not in self._multipliers:
            local, spread = pull_multipliers(coupling, self._weights.horizon / steps)
            found = local[: self._weights.channels], gather_multipliers(coupling), spread
            self._multipliers[steps] = tuple(np.ascontiguousarray(x.numpy()) for x in found)
        return self._multipliers[steps]

    def __reduce__(self) -> tuple[Callable[..., ImageKernel | None], tuple[ImageWeights, int]]:
        """A copy packs its own model: two must not free one."""
        return ImageKernel.of, (self._weights, self._form)

    def __del__(self) -> None:
        if model := getattr(self, "_model", None):
            self._library.millijoule_image_model_free(ctypes.c_void_p(model))


class _Layer(ctypes.Structure):
    """`LayerArrays` of cpp/image.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias", "multiplier")),
        *((name, ctypes.c_int32) for name in ("outputs", "inputs", "groups")),
    ]


class _Model(ctypes.Structure):
    """`ImageArrays` of cpp/image.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                *("nouns", "code", "hidden", "channels", "width", "mix", "steps", "rank"),
                *("colours", "grounds", "windows", "shade_levels", "jitter"),
            )
        ),
        ("layers", _Layer * len(GROUPS)),
        ("coupling", _Layer * 3),
        *((name, ctypes.c_void_p) for name in ("codes", "sizes", "place", "half_ink", "whole_ink")),
        *((name, ctypes.c_void_p) for name in ("colour_levels", "ground_levels", "window_places")),
        *((name, ctypes.c_void_p) for name in ("sin_cos", "shares")),
    ]


def _packed(weights: ImageWeights, library: ctypes.CDLL) -> int:
    """The address of the compiled code's own copy of `weights`.

    Raises:
        ValueError: shapes that do not belong together.
        MemoryError: there is no room for it.
    """
    library.millijoule_image_model.restype = ctypes.c_void_p
    library.millijoule_draw_images.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        *(ctypes.c_void_p,) * 4,
    ]
    kept: list[np.ndarray] = []  # what pointers point to, until the copy is made

    def array(values: Tensor, dtype: type, shape: tuple[int, ...]) -> int:
        if tuple(values.shape) != shape:
            raise ValueError(f"weights {list(values.shape)} where {list(shape)} are expected")
        kept.append(np.ascontiguousarray(values.numpy(), dtype))
        return kept[-1].ctypes.data

    nouns, code = weights.codes.shape
    outputs = {name: len(layer[0]) for name, layer in weights.layers.items()}
    hidden, width, mix, channels = outputs["read_code"], outputs["near"], outputs["mix"], weights.channels
    n = CELLS * channels
    shapes = {
        "read_code": (hidden, code),
        "drive": (3 * n, hidden),
        "near": (width, 9 * 2 * channels),
        "enlarge": (4 * width, width),
        "near_again": (width, 9 * width),
        "mix": (mix, width),
        "share": (64, mix),
    }
    model = _Model(nouns=nouns, code=code, hidden=hidden, channels=channels, width=width, mix=mix)
    model.steps, model.shade_levels, model.jitter = weights.steps, weights.shade, weights.jitter
    model.colours, model.grounds, model.windows = map(
        len, (weights.colours, weights.grounds, weights.windows)
    )
    for i, (name, groups) in enumerate(GROUPS.items()):
        values, bias, multiplier = weights.layers[name]
        rows, columns = shapes[name]
        model.layers[i] = _Layer(
            array(values, np.int8, (rows, columns)),
            array(bias, np.int32, (rows,)),
            array(multiplier, np.int32, (rows,)),
            rows,
            columns,
            groups,
        )
    if (coupling := weights.coupling) is not None:
        model.rank = rank = coupling.gather.shape[1]
        model.coupling[0] = _Layer(
            array(coupling.local, np.int8, (channels, 5 * channels)), None, None, channels, 5 * channels, 5
        )
        model.coupling[1] = _Layer(array(coupling.gather.t(), np.int8, (rank, n)), None, None, rank, n, CELLS)
        model.coupling[2] = _Layer(array(coupling.spread, np.int8, (n, rank)), None, None, n, rank, 1)
    model.codes = array(weights.codes, np.int8, (nouns, code))
    model.sizes = array(weights.sizes, np.int32, (2 * SIZES, hidden))
    model.place = array(weights.place, np.int32, (2, 3 * n))
    model.half_ink = array(weights.ink[0], np.uint8, (nouns, SIZES, CELLS))
    model.whole_ink = array(weights.ink[1], np.uint8, (nouns, SIZES, 4 * CELLS))
    model.colour_levels = array(weights.colours, np.int32, (model.colours, 3))
    model.ground_levels = array(weights.grounds, np.int32, (model.grounds, 3))
    model.window_places = array(weights.windows, np.int32, (model.windows, 3))
    waves = SIN_TABLE.to(torch.int32).bitwise_and(0xFFFF) | (COS_TABLE.to(torch.int32) << 16)
    model.sin_cos = array(waves, np.int32, (len(SIN_TABLE),))
    model.shares = array(weights.shares, np.uint8, (2048,))
    found = library.millijoule_image_model(ctypes.byref(model))
    if not found:
        raise MemoryError("no memory for a model")
    return int(found)


def _token_limits(weights: ImageWeights) -> tuple[int, int, int, int, int]:
    """The largest noun, colour, size and window, and how many grounds there are."""
    return len(weights.codes), len(weights.colours), SIZES, len(weights.windows), len(weights.grounds)


def _pointer(values: np.ndarray | None) -> int | None:
    return None if values is None else values.ctypes.data
