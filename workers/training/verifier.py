"""Training of the verifier on true renders: scenes in every combination, freely placed icons, blobs, imperfect pixels.

Half of each batch are renders of scenes as `scenes` lays them out, with all nouns, colours, sizes and backgrounds alike,
held-out combinations included: a judge must know them. The other half are collages of icons that differ from each other
and stand off the windows, so that a wrong count or a stray icon is read as what it is. Blobs in some collages, and
images blurred or shuffled beyond recognition, hold nothing to be found. No generated image is ever used.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from millijoule.kernels.processor import multiplies_bfloat16
from millijoule.workers.generators.model_files import write_model_file
from millijoule.workers.judging import verifier
from millijoule.workers.judging.verifier import GRID, STRIDE, VerifierNet, VerifierShape
from millijoule.workers.scenes.renderer import icon_cover, render_scenes
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    ICON_TOKENS,
    IMAGE_SIZE,
    MAX_COUNT,
    PALETTE,
    SIZES,
    WINDOWS,
    Group,
    Scene,
    complete,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS, NOUNS, check_count
from millijoule.workers.training.loop import schedule
from millijoule.workers.training.optimizer import adamw, clip_and_step, set_learning_rate


@dataclass(frozen=True)
class VerifierConfig(VerifierShape):
    """Everything a training run of the verifier depends on."""

    steps: int = 4000
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    warm_up: int = 100
    seed: int = 0
    collages: float = 0.5  # share of collages in a batch; the others are renders of scenes
    spoiled: float = 0.06  # share of images in which nothing is left to be found
    nouns: int = DEFAULT_NOUNS  # how many of the vocabulary's first it learns

    def __post_init__(self) -> None:
        check_count(self.nouns)

    @property
    def shape(self) -> VerifierShape:
        return VerifierShape(**{f.name: getattr(self, f.name) for f in fields(VerifierShape)})


def sample_any_scene(rng: np.random.Generator, nouns: int = DEFAULT_NOUNS) -> Scene:
    """A completed scene of any of the first `nouns`, colours, counts and layout; held-out combinations are as likely as others."""

    def group(count: int) -> Group:
        return Group(NOUNS[rng.integers(nouns)], count=count)

    kind = rng.random()
    if kind < 0.02:
        scene = Scene(())
    elif kind < 0.45:
        scene = Scene((group(int(rng.integers(1, MAX_COUNT + 1))),))
    else:
        counts = (1, 1) if kind < 0.75 else rng.integers(1, 3, 2)
        scene = Scene((group(int(counts[0])), group(int(counts[1]))))
    return complete(scene, int(rng.integers(2**63)))


# ---- images and what stands in them ---------------------------------------------------------------------------


class LabelledImages(NamedTuple):
    """Images and, per possible icon, what it is; `noun` is -1 where there is none."""

    images: np.ndarray  # uint8 [b, 64, 64, 3]
    noun: np.ndarray  # int64 [b, 4]
    colour: np.ndarray  # int64 [b, 4]
    size: np.ndarray  # int64 [b, 4]
    centre: np.ndarray  # float32 [b, 4, 2]: x, y in pixels
    background: np.ndarray  # int64 [b]


def label_renders(scenes: list[Scene], seed: int) -> LabelledImages:
    """True renders with labels. An icon's centre is its window's: it is drawn within a pixel of there."""
    tokens = scene_tokens(scenes)
    icons = tokens[:, :-1].reshape(-1, MAX_COUNT, ICON_TOKENS) - 1
    noun, colour, size, window = icons.transpose(2, 0, 1)
    windows = np.array(WINDOWS, np.float32)[window]  # where there is no icon, any
    centre = CELL * (windows[..., :2] + windows[..., 2:] / 2)
    return LabelledImages(render_scenes(scenes, 1, seed)[:, 0], noun, colour, size, centre, tokens[:, -1])


#: Sets of half windows (left and top in pixels) that do not overlap, for collages of up to four icons.
_LAYOUTS = (
    ((0, 0), (32, 0), (0, 32), (32, 32)),
    ((16, 0), (0, 32), (32, 32)),
    ((0, 0), (32, 0), (16, 32)),
    ((0, 16), (32, 0), (32, 32)),
    ((0, 0), (0, 32), (32, 16)),
    ((0, 16), (32, 16)),
    ((16, 0), (16, 32)),
    ((16, 16),),
)
_STRAY = 5  # pixels; how far an icon of a collage may stand from its half window
_PAD = 8


class CollageMaker:
    """Puts icons of the first `nouns` that need not match, and blobs, at places that need not be windows."""

    def __init__(self, nouns: int = DEFAULT_NOUNS) -> None:
        def covers(count: int) -> np.ndarray:
            """Of the first of `count` icons, `[noun, size, pixels, pixels]`."""
            groups = (Group(noun, "red", size, count) for noun in NOUNS[:nouns] for size in SIZES)
            covers = [icon_cover(Scene((group,), None, "white", 0))[0] for group in groups]
            return np.array(covers).reshape(nouns, len(SIZES), 64, 64)

        self._nouns = nouns
        self._whole, self._half = covers(1), covers(4)[..., :32, :32]
        self._palette = np.array([PALETTE[c] for c in COLOURS], np.float32)
        self._grounds = np.array([PALETTE[b] for b in BACKGROUNDS], np.float32)
        self._same = np.array([[c == b for c in COLOURS] for b in BACKGROUNDS])

    def make(self, count: int, rng: np.random.Generator) -> LabelledImages:
        background = rng.integers(len(BACKGROUNDS), size=count)
        noun = np.full((count, MAX_COUNT), -1, np.int64)
        size = rng.integers(len(SIZES), size=noun.shape)
        # uniform, never the background's
        colour = (rng.random((*noun.shape, len(COLOURS))) * ~self._same[background][:, None]).argmax(2)
        nouns = rng.integers(self._nouns, size=noun.shape)
        # some of the nouns and colours repeat the first icon's, as in true scenes
        nouns = np.where(rng.random(noun.shape) < 0.3, nouns[:, :1], nouns)
        colour = np.where(rng.random(noun.shape) < 0.3, colour[:, :1], colour)
        centre = np.zeros((*noun.shape, 2), np.float32)
        side = IMAGE_SIZE + 2 * _PAD
        ground = self._grounds[background] + rng.integers(-14, 15, (count, 1))
        canvas = np.tile(ground[:, None, None], (1, side, side, 1)).astype(np.float32)
        for b in range(count):
            kind = rng.random()
            if kind < 0.25:  # one icon of the whole image
                cover, places = self._whole, [(0, 0)]
            else:
                layout = _LAYOUTS[rng.integers(len(_LAYOUTS))]
                cover, places = self._half, [p for p in layout if rng.random() < 0.8]
            pixels = cover.shape[-1]
            for k, (x, y) in enumerate(places):
                moved_x, moved_y = rng.integers(-_STRAY, _STRAY + 1, 2)
                at_x, at_y = x + int(moved_x), y + int(moved_y)
                paint = self._palette[colour[b, k]] + rng.integers(-16, 17)
                if rng.random() < 0.12:
                    mask = _blob(pixels, rng)
                else:
                    mask = cover[nouns[b, k], size[b, k]]
                    noun[b, k] = nouns[b, k]
                    centre[b, k] = at_x + pixels / 2, at_y + pixels / 2
                under = canvas[b, _PAD + at_y : _PAD + at_y + pixels, _PAD + at_x : _PAD + at_x + pixels]
                under += (paint - under) * mask[: under.shape[0], : under.shape[1], None]
        images = np.clip(np.rint(canvas[:, _PAD:-_PAD, _PAD:-_PAD]), 0, 255).astype(np.uint8)
        return LabelledImages(images, noun, colour, size, centre, background)


def _blob(pixels: int, rng: np.random.Generator) -> np.ndarray:
    """A soft-edged shape that is no icon, float32 `[pixels, pixels]`."""
    coarse = torch.from_numpy(rng.standard_normal((1, 1, 5, 5)).astype(np.float32))
    smooth = F.interpolate(coarse, size=(pixels, pixels), mode="bicubic", align_corners=True)[0, 0].numpy()
    axis = np.linspace(-1.2, 1.2, pixels, dtype=np.float32)
    hill = 1.0 - 1.6 * (axis[:, None] ** 2 + axis[None] ** 2)
    return np.clip((smooth * rng.uniform(0.1, 1.0) + hill) * rng.uniform(1.5, 8), 0, 1).astype(np.float32)


def spoil(made: LabelledImages, share: float, rng: np.random.Generator) -> LabelledImages:
    """Blur or shuffle a share of the images until no icon is left; their labels say so."""
    chosen = np.flatnonzero(rng.random(len(made.images)) < share)
    images, noun = made.images.copy(), made.noun.copy()
    for b in chosen:
        pixels = torch.from_numpy(images[b]).permute(2, 0, 1)[None].float()
        if rng.random() < 0.5:
            pixels = F.interpolate(
                F.avg_pool2d(pixels, 16), size=(64, 64), mode="bilinear", align_corners=False
            )
        else:
            tiles = pixels.reshape(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).reshape(64, 3, 8, 8)
            tiles = tiles[torch.from_numpy(rng.permutation(64))]
            pixels = tiles.reshape(8, 8, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(1, 3, 64, 64)
        images[b] = pixels[0].permute(1, 2, 0).round().to(torch.uint8).numpy()
        noun[b] = -1
    return made._replace(images=images, noun=noun)


def roughen(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Light blur, noise, contrast and brightness changes on float `[b, 3, 64, 64]` in [-1, 1]; a third stays as is."""
    b = len(images)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def some(probability: float, low: float, high: float) -> Tensor:
        on = torch.rand(b, 1, 1, 1, generator=generator) < probability
        return on * (low + (high - low) * torch.rand(b, 1, 1, 1, generator=generator))

    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    images = torch.lerp(images, blurred, some(0.35, 0.0, 1.0))
    images = images * (1 + some(0.35, -0.15, 0.15)) + some(0.35, -0.08, 0.08)
    noise = torch.randn(images.shape, generator=generator)
    return torch.add(images, noise * some(0.35, 0.0, 0.12)).clamp_(-1, 1)


# ---- dense targets and the loss --------------------------------------------------------------------------------


class Targets(NamedTuple):
    """What each cell should say: centre (1, 0, or -1 for either), index of its icon's noun (-1 for none) and so on."""

    centre: Tensor  # float32 [b, 8, 8]
    noun: Tensor  # int64 [b, 8, 8]
    colour: Tensor
    size: Tensor
    offset: Tensor  # float32 [b, 8, 8, 2]
    overall: tuple[Tensor, ...]  # what the pooled features must tell, as in `global_parts`


_NEAR = 0.5 * STRIDE + 0.75  # pixels: an icon's centre that lies so near a cell's is named by it


def make_targets(made: LabelledImages, nouns: int = DEFAULT_NOUNS) -> Targets:
    """Dense targets: the cell nearest to an icon's centre must find it, those about as near may."""
    b = len(made.noun)
    there = made.noun >= 0  # [b, 4]
    axis = np.arange(GRID, dtype=np.float32) * STRIDE
    away = made.centre[:, :, None, None] - np.stack(np.meshgrid(axis, axis), 2)  # [b, 4, 8, 8, 2]
    distance = np.abs(away).max(-1) + np.where(there, 0, 1e6).astype(np.float32)[..., None, None]
    which = distance.argmin(1)  # [b, 8, 8]
    nearest = distance.min(1)
    rows, i, j = np.ogrid[:b, :GRID, :GRID]
    centre = np.where(nearest <= 0.5 * STRIDE, 1.0, np.where(nearest < 0.95 * STRIDE, -1.0, 0.0))
    named = nearest <= _NEAR

    def of(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.where(named, values[rows, which], -1))

    present = np.zeros((b, nouns), np.float32)
    colours = np.zeros((b, len(COLOURS)), np.float32)
    image, _ = np.nonzero(there)
    present[image, made.noun[there]] = 1
    colours[image, made.colour[there]] = 1
    places = (nearest <= 0.5 * STRIDE).reshape(b, -1).astype(np.float32)
    overall = (present, colours, made.background, there.sum(1), places)
    return Targets(
        torch.from_numpy(centre.astype(np.float32)),
        of(made.noun),
        of(made.colour),
        of(made.size),
        torch.from_numpy(away[rows, which, i, j] / STRIDE),
        tuple(torch.from_numpy(x) for x in overall),
    )


def verifier_loss(cells: Tensor, overall: Tensor, targets: Targets) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of centres, nouns, colours, sizes and background, offsets, and what the features must tell."""
    known = targets.overall[0].shape[1]
    centre, noun, colour, size, offset = cells.float().split(verifier.cell_parts(known), 1)
    sure = targets.centre >= 0
    loss_centre = 20 * F.binary_cross_entropy_with_logits(centre[:, 0][sure], targets.centre[sure])
    named = targets.noun >= 0

    def at_icons(channels: Tensor) -> Tensor:
        return channels.permute(0, 2, 3, 1)[named]

    parts = {"centre": loss_centre}
    if named.any():
        truth = targets.noun[named]
        parts["noun"] = F.cross_entropy(at_icons(noun), truth)
        parts["colour"] = F.cross_entropy(at_icons(colour), targets.colour[named])
        parts["size"] = 0.3 * F.cross_entropy(at_icons(size), targets.size[named])
        parts["offset"] = F.smooth_l1_loss(at_icons(offset), targets.offset[named])
    told = overall.float().split(verifier.global_parts(known), 1)
    nouns, colours, background, count, places = zip(told, targets.overall, strict=True)
    parts["background"] = F.cross_entropy(*background)
    parts["features"] = (
        known
        / 10
        * F.binary_cross_entropy_with_logits(*nouns)  # a tenth of each noun's, however many there are
        + F.binary_cross_entropy_with_logits(*colours)
        + 0.3 * F.cross_entropy(*count)
        + 4 * F.binary_cross_entropy_with_logits(*places)
    )
    total = torch.stack(list(parts.values())).sum()
    log = {name: float(value.detach()) for name, value in {"loss": total, **parts}.items()}
    if named.any():
        log["noun_right"] = float((at_icons(noun).argmax(1) == truth).float().mean())
    return total, log


# ---- the trainer -----------------------------------------------------------------------------------------------


class VerifierTrainer:
    """A verifier in training; a `loop.Trainer`."""

    def __init__(self, config: VerifierConfig) -> None:
        self.config = config
        self.step = 0
        torch.manual_seed(config.seed)
        self.net = VerifierNet(config.shape, config.nouns).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        parameters = list(self.net.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = adamw(groups, "cpu", lr=config.learning_rate)
        with torch.no_grad():  # centres are rare
            self.net.cells.bias[0] = -3.0  # type: ignore[index]
        self._collages = CollageMaker(config.nouns)

    def batch(self, step: int) -> LabelledImages:
        """The images of one step, which follow from config and step."""
        rng = np.random.Generator(np.random.Philox([self.config.seed, step]))
        collages = round(self.config.batch * self.config.collages)
        scenes = [sample_any_scene(rng, self.config.nouns) for _ in range(self.config.batch - collages)]
        renders = label_renders(scenes, int(rng.integers(2**62)))
        pairs = zip(renders, self._collages.make(collages, rng), strict=True)
        return spoil(LabelledImages(*map(np.concatenate, pairs)), self.config.spoiled, rng)

    def train_step(self) -> dict[str, float]:
        config = self.config
        made = self.batch(self.step)
        rng = np.random.Generator(np.random.Philox([config.seed, self.step, 1]))
        pixels = roughen(verifier.to_input(made.images), rng).contiguous(memory_format=torch.channels_last)
        share = schedule(self.step, config.steps, config.warm_up)
        set_learning_rate(self.optimizer, config.learning_rate * share)
        self.net.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
            outputs = self.net(pixels)
        loss, log = verifier_loss(outputs.cells, outputs.overall, make_targets(made, config.nouns))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_and_step(self.optimizer, self.net.parameters(), 5.0)
        self.step += 1
        return log

    def state(self) -> dict[str, Any]:
        return {"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path, name: str) -> Path:
        """See `export_verifier`."""
        return export_verifier(self.net, folder, name, self.step, self.config)


def export_verifier(net: VerifierNet, folder: Path, name: str, steps: int, config: VerifierConfig) -> Path:
    """Write the net in float16 (its batch statistics in float32) with what it was made from; returns where."""
    tensors = {
        key: (t.float() if "running" in key else t.half()).contiguous()
        for key, t in net.state_dict().items()
        if "num_batches" not in key
    }
    metadata = {
        "steps": str(steps),
        "config": json.dumps(asdict(config)),
        "format": verifier.FORMAT,
        "version": verifier.FORMAT_VERSION,
        "name": name,
        "shape": json.dumps(asdict(net.shape)),
        "nouns": str(net.nouns),
    }
    write_model_file(tensors, folder / "verifier.safetensors", metadata)
    return folder / "verifier.safetensors"
