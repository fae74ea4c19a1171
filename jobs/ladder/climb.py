"""The climb: each rung is tried on top of those that proved themselves, and stays if it is cheaper and passes the gate.

A rung's cost comes from blocks in the order A B B A, A being the pipeline without any rung: a machine that slows down slows
both. Its images are compared with the dense ones of the same prompts and seeds. What was measured is saved rung by rung, and a
climb that was interrupted goes on after the last one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from millijoule.jobs.ladder.candidates import Candidate
from millijoule.jobs.ladder.process import Drawer, Drawn
from millijoule.jobs.ladder.quality import Quality, compare
from millijoule.workers.errors import InputError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.meters.meter import EnergyMeter
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)

ORDER = "ABBA"
#: The pipeline without any rung.
DENSE = "none"
#: Rungs that were kept are measured once more with all images, from the last one downwards, until some pass.
TOP = "top"


@dataclass(frozen=True)
class Gate:
    """What a rung's images must be to pass; None: no matter."""

    min_psnr_db: float | None
    max_score_loss: float | None

    def failing(self, quality: Quality) -> str | None:
        """Why the images do not pass; None: they do."""
        if (
            self.min_psnr_db is not None
            and quality.psnr_db is not None
            and quality.psnr_db < self.min_psnr_db
        ):
            return f"PSNR {quality.psnr_db:.1f} dB, at least {self.min_psnr_db:g} is asked for"
        if self.max_score_loss is not None and quality.score_loss is not None:
            lost = quality.score_loss[0]
            if lost > self.max_score_loss:
                return f"{lost:.1f} points of score lost, at most {self.max_score_loss:g} may be"
        return None


@dataclass(frozen=True)
class Ground:
    """What all rungs of a climb have in common.

    Attributes:
        model: as `load_generator` takes it.
        base: how it is loaded without any rung.
        device: "cpu" or "cuda".
        requests: what is drawn, the same prompts and seeds on every rung.
        threads: of a process that draws; None: PyTorch's default.
        judge: an `ImageJudge`.
        scored: whether it can say if an image shows its prompt.
        meter: counts the energy, by `domains`; none of them: CPU time stands for it.
        block_seconds: length of a block.
        rounds: how often A B B A is repeated.
        first_images: of `requests` that every rung draws; those that are measured again draw all.
        work: folder for images.
    """

    model: str
    base: GeneratorOptions
    device: str
    requests: Sequence[ImageRequest]
    threads: int | None
    judge: Any
    scored: bool
    meter: EnergyMeter
    domains: tuple[str, ...]
    block_seconds: float
    rounds: int
    first_images: int
    work: Path

    @property
    def cost(self) -> str:
        """What is counted: "joules", or "cpu_seconds" where no counter can be read."""
        return "joules" if self.domains else "cpu_seconds"


class Climb:
    """A climb over `candidates`. `rows` are what was measured so far; `save` is called after each.

    Attributes:
        standing: the options with all rungs that were kept.
        cost: of these, as a part of the dense pipeline's.
        top: the highest combination whose images pass in full number; None: there is none.
    """

    def __init__(
        self, ground: Ground, gate: Gate, rows: list[dict[str, Any]], save: Callable[[], None]
    ) -> None:
        self.ground, self.gate, self.rows, self._save = ground, gate, rows, save
        self.standing, self.cost = ground.base, 1.0
        self.top: GeneratorOptions | None = None
        self._kept: list[tuple[str, GeneratorOptions]] = []
        self._dense: Drawer | None = None

    def run(
        self, candidates: Sequence[Candidate], extra: Sequence[tuple[str, GeneratorOptions, int]] = ()
    ) -> None:
        """Climb, then find the top with all images, then measure `extra` (name, options, images)."""
        try:
            self._draw_dense(self.ground.first_images)
            for candidate in candidates:
                self._try(candidate)
            for rung, options in reversed(self._kept):
                name = f"{TOP}: {rung}"
                row = self._row(name) or self._measure(
                    name, f"all that was kept up to {rung}", options, len(self.ground.requests)
                )
                if row in passing(self.rows):
                    self.top = options
                    break
            for name, options, count in extra:
                if self._row(name) is None:
                    self._measure(name, "", options, count)
        finally:
            if self._dense is not None:
                self._dense.close()

    def _row(self, name: str) -> dict[str, Any] | None:
        return next((row for row in self.rows if row["rung"] == name), None)

    def _try(self, candidate: Candidate) -> None:
        options = candidate.on(self.standing)
        row = self._row(candidate.name)
        if row is None:
            row = self._measure(candidate.name, candidate.what, options, self.ground.first_images)
            row["kept"] = "refused" not in row and row["failing"] is None and row["cost_ratio"] < self.cost
            self._save()
        if row["kept"]:
            self.standing, self.cost = options, row["cost_ratio"]
            self._kept.append((candidate.name, options))

    def _measure(self, name: str, what: str, options: GeneratorOptions, count: int) -> dict[str, Any]:
        row: dict[str, Any] = {"rung": name, "what": what, "options": describe(options)}
        log.info("%s: %s", name, row["options"])
        try:
            row |= self._measured(name, options, count)
        except (InputError, RuntimeError) as error:
            row["refused"] = str(error)
            log.info("%s: not measured: %s", name, error)
        self.rows.append(row)
        self._save()
        return row

    def _measured(self, name: str, options: GeneratorOptions, count: int) -> dict[str, Any]:
        ground = self.ground
        with Drawer(ground.model, ground.device, options, ground.threads) as drawer:
            drawer.warm_up(ground.requests)
            blocks = [
                self._block(arm, self._dense_drawer() if arm == "A" else drawer)
                for _ in range(ground.rounds)
                for arm in ORDER
            ]
            drawn = drawer.draw(ground.requests[:count])
        dense = self._draw_dense(count)
        np.save(ground.work / f"{name}.npy", drawn.images[:8])
        prompts = [r.prompt for r in ground.requests[:count]]
        quality = compare(drawn.images, dense, prompts, ground.judge, scored=ground.scored)
        a, b = (per_image([x for x in blocks if x["arm"] == arm]) for arm in "AB")
        return {
            "cost_ratio": b[ground.cost] / a[ground.cost],
            "seconds_ratio": b["seconds"] / a["seconds"],
            "per_image": b,
            "dense_per_image": a,
            "peak_bytes": drawn.peak_bytes,
            **asdict(quality),
            "failing": self.gate.failing(quality),
            "blocks": blocks,
        }

    def _block(self, arm: str, drawer: Drawer) -> dict[str, Any]:
        ground = self.ground
        before = ground.meter.read_afresh() if ground.domains else None
        drawn = drawer.draw_for(ground.requests, ground.block_seconds)
        joules = None
        if before is not None:
            after = ground.meter.read_afresh()
            joules = sum(after.energy_mj[d] - before.energy_mj[d] for d in ground.domains) / 1000
            if any(before.epoch_of(d) != after.epoch_of(d) for d in ground.domains):
                raise RuntimeError("an energy counter was reset during a block; run it again")
        return {
            "arm": arm,
            "images": drawn.images,
            "seconds": drawn.seconds,
            "cpu_seconds": drawn.cpu_seconds,
            "joules": joules,
        }

    def _dense_drawer(self) -> Drawer:
        if self._dense is None:
            ground = self.ground
            self._dense = Drawer(ground.model, ground.device, ground.base, ground.threads)
            self._dense.warm_up(ground.requests)
        return self._dense

    def _draw_dense(self, count: int) -> np.ndarray:
        """The dense images of the first `count` requests: drawn once, and kept for a climb that goes on."""
        path = self.ground.work / f"{DENSE}.npy"
        kept = np.load(path, mmap_mode="r") if path.is_file() else None
        have = 0 if kept is None else len(kept)
        if have < count:
            log.info("%s: drawing %d images", DENSE, count - have)
            drawn: Drawn = self._dense_drawer().draw(self.ground.requests[have:count])
            images = drawn.images if kept is None else np.concatenate([kept, drawn.images])
            unfinished = path.with_suffix(".part.npy")
            np.save(unfinished, images)
            unfinished.replace(path)
            kept = np.load(path, mmap_mode="r")
        assert kept is not None
        return np.array(kept[:count])


def per_image(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds, CPU seconds and joules per image over `blocks`; joules None where they were not counted."""
    images = sum(b["images"] for b in blocks)
    told = {name: [b[name] for b in blocks] for name in ("seconds", "cpu_seconds", "joules")}
    return {name: None if None in values else sum(values) / images for name, values in told.items()}


def describe(options: GeneratorOptions) -> str:
    """`options` in one line."""
    plain = GeneratorOptions()
    said = [
        f"--{name.replace('_', '-')} {getattr(options, name)}"
        for name in ("engine", "batch_size", "cuda_graphs", "fused_modules")
        if getattr(options, name) != getattr(plain, name)
    ]
    if options.vae is not None:
        said.append(f"--vae {options.vae.path}")
    rungs = options.rungs.words()
    return " ".join([*said, *([rungs] if rungs != DENSE else [])]) or DENSE


def passing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that were measured and pass the gate, the cheapest first."""
    return sorted(
        (r for r in rows if "refused" not in r and r["failing"] is None), key=lambda r: r["cost_ratio"]
    )


def save_json(path: Path, result: dict[str, Any]) -> None:
    """Write `result` in one move."""
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)
