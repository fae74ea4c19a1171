"""Run a registered comparison: warm-up, blocks, top-up, judging. What is done is kept; a second call goes on from there."""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from millijoule.jobs.machine import describe_gpu, describe_machine, hash_packages
from millijoule.pipeline.comparison.acceptance import is_blank
from millijoule.pipeline.comparison.parts import PartStore
from millijoule.pipeline.comparison.registration import ARMS, Registration, ScheduledBlock, schedule
from millijoule.pipeline.comparison.result import is_stable
from millijoule.pipeline.comparison.rows import (
    FEATURE_SCHEMA,
    JUDGEMENT_SCHEMA,
    Rows,
    decode_pixels,
    encode_images,
)
from millijoule.pipeline.comparison.sampled_power import add_sampled_power
from millijoule.workers.generators.protocol import Generator
from millijoule.workers.judging.comparison_blocks import DrawnBlock, draw_block, rest_block
from millijoule.workers.judging.image_judge import ImageJudge, ImageMetric
from millijoule.workers.meters.meter import ESTIMATE_METHOD, EnergyMeter
from millijoule.workers.meters.power_samples import PowerSampler
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)

T = TypeVar("T")

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

#: Images judged at once.
JUDGE_BATCH = 256


@dataclass
class ComparisonRun:
    """One session of a comparison: a process that has both generators loaded.

    `open_sampler` gives a new power sampler for each block, or None where power cannot be read. `clock` and `sleep` are the
    real ones outside tests.
    """

    registration: Registration
    generators: Mapping[str, Generator]
    meter: EnergyMeter
    parts: PartStore
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    open_sampler: Callable[[], PowerSampler | None] = lambda: None

    def __post_init__(self) -> None:
        blocks = self.parts.read("blocks").to_pylist()
        self._session = max((b["session"] for b in blocks), default=-1) + 1
        self._ordinal = len(blocks)
        self._done = {b["block_id"] for b in blocks}
        self._drawn = {arm: sum(b["images"] for b in blocks if b["arm"] == arm) for arm in ARMS}
        self._known = set(self.parts.read("pixels", ["sha256"])["sha256"].to_pylist())
        self._warm = False

    def run(self) -> None:
        """Run every scheduled block that is not done, then draw what the gate still needs."""
        planned = schedule(self.registration)
        for number, block in enumerate(planned):
            if block.block_id in self._done:
                continue
            if block.kind == "idle":
                rested = rest_block(
                    self.meter,
                    self.registration.design.block_seconds,
                    sampler=self.open_sampler(),
                    sleep=self.sleep,
                )
                self._store(block, rested)
            else:
                self._warm_up()
                log.info("block %d of %d: %s %s", number + 1, len(planned), block.kind, block.arm)
                self._draw(block, self.registration.design.block_seconds, telemetry=block.telemetry)
        for arm in ARMS:
            missing = len(self.registration.requests) - self._drawn[arm]
            if missing > 0:
                log.info("%d images more of %s, for the quality gate", missing, arm)
                block = self._extra("topup", arm, 0)
                self._draw(block, 0.0, images=missing)

    def _warm_up(self) -> None:
        """Once per session: both arms until their speed settles, or the registered number of windows."""
        if self._warm:
            return
        self._warm = True
        design = self.registration.design
        for arm in ARMS:
            speeds: list[float] = []
            while len(speeds) < design.warmup_max_windows and not is_stable(speeds, design):
                drawn = self._draw(self._extra("warmup", arm, len(speeds)), design.warmup_window_seconds)
                seconds = (drawn.reads[-1].t_mono_ns - drawn.reads[0].t_mono_ns) / 1e9
                speeds.append(len(drawn.digests) / seconds if seconds > 0 else 0.0)
            settled = "settled" if is_stable(speeds, design) else "did not settle"
            log.info("warm-up of %s %s after %d windows", arm, settled, len(speeds))

    def _extra(self, kind: str, arm: str, number: int) -> ScheduledBlock:
        return ScheduledBlock(f"{kind}-{self._session}-{arm}-{number}", kind, arm, arm, True, -1)

    def _draw(
        self, block: ScheduledBlock, seconds: float, *, images: int = 1, telemetry: bool = True
    ) -> DrawnBlock:
        arm = self.registration.arm(block.arm)
        drawn = draw_block(
            self.generators[block.arm],
            list_requests(self.registration, block.arm, self.generators[block.arm]),
            self._drawn[block.arm] % len(self.registration.requests),
            self.meter,
            batch_size=arm.batch_size,
            seconds=seconds,
            images=images,
            telemetry=telemetry,
            known=self._known,
            sampler=self.open_sampler() if telemetry else None,
            clock=self.clock,
        )
        self._store(block, drawn)
        return drawn

    def _store(self, block: ScheduledBlock, drawn: DrawnBlock) -> None:
        self.parts.write(self.registration, self._ordinal, self._session, block, drawn)
        self._ordinal += 1
        self._known |= drawn.new_pixels.keys()
        if block.arm:
            self._drawn[block.arm] += len(drawn.digests)


def list_requests(registration: Registration, arm: str, generator: Generator) -> list[ImageRequest]:
    """The registered requests as `arm` gets them; its own size is left to the generator."""
    r, options, info = registration, registration.arm(arm), generator.info
    native = (info.width, info.height) == (r.width, r.height)
    return [
        ImageRequest(
            str(i),
            0,
            request.prompt,
            request.seed,
            width=None if native else r.width,
            height=None if native else r.height,
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
        )
        for i, request in enumerate(r.requests)
    ]


def describe_environment(
    registration: Registration, generators: Mapping[str, Generator], meter: EnergyMeter, judge_sha256: str
) -> dict[str, Any]:
    """`environment.json`: everything an auditor asks for that this machine tells; what it does not tell is null."""
    gpus = [d.removeprefix("gpu:") for d in meter.domains if d.startswith("gpu:")]
    models = {}
    for name, generator in generators.items():
        arm, info = registration.arm(name), generator.info
        models[name] = {
            "model": arm.model,
            "sha256": arm.sha256,
            "loaded_name": info.name,
            "loaded_sha256": info.sha256,
            "num_inference_steps": arm.num_inference_steps or info.num_inference_steps,
        }
    return {
        **describe_machine(),
        "device": registration.device,
        "judge_sha256": judge_sha256,
        "meter": meter.method,
        "domains": list(meter.domains),
        "estimate": ESTIMATE_METHOD,
        "models": models,
        "gpus": {uuid: describe_gpu(uuid) for uuid in gpus},
        "kernel": platform.release(),
        "cpu_governor": GOVERNOR.read_text().strip() if GOVERNOR.exists() else None,
        "packages_sha256": hash_packages(),
    }


def judge_images(
    registration: Registration,
    parts: PartStore,
    judge: ImageJudge,
    metrics: Sequence[ImageMetric],
    *,
    keep_pixels: bool = True,
    second_meter: pa.Table | None = None,
) -> Rows:
    """Judge every distinct image once and gather all tables. Energy spent here is not part of the comparison.

    Distinct images are held in memory.

    Raises:
        InputError: `second_meter` has power, and power was sampled.
    """
    reads, power = parts.read("reads"), parts.read("power")
    second_meter = add_sampled_power(power, reads, second_meter)
    images, blocks, pixel_table = parts.read("images"), parts.read("blocks"), parts.read("pixels")
    pixels, encoded = decode_pixels(pixel_table), encode_images(images)
    arm_of = dict(zip(blocks["block_id"].to_pylist(), blocks["arm"].to_pylist(), strict=True))
    arms = np.array([arm_of[b] for b in encoded.block_ids])[encoded.block]
    first = {}
    for arm in ARMS:
        mine = np.flatnonzero(arms == arm)
        requests, at = np.unique(encoded.request[mine], return_index=True)
        for request, pair in zip(requests.tolist(), encoded.pair[mine][at].tolist(), strict=True):
            first[arm, request] = encoded.pairs[pair][1]
    judged = [
        row
        for chunk in _chunks(encoded.pairs)
        for row in _judge_chunk(registration, chunk, pixels, judge, metrics)
    ]
    features = [
        {"arm": arm, "request": request, "values": values}
        for chunk in _chunks(sorted(first.items()))
        for ((arm, request), _), values in zip(
            chunk, judge.features(np.stack([pixels[digest] for _, digest in chunk])), strict=True
        )
    ]
    prompts = [request.prompt for request in registration.requests]
    reference = judge.reference_features(prompts, registration.gate.seed)
    for number, values in enumerate(() if reference is None else reference):
        features.append({"arm": "reference", "request": number, "values": values})
    return Rows(
        reads,
        blocks,
        images,
        pa.Table.from_pylist(judged, JUDGEMENT_SCHEMA),
        pa.Table.from_pylist(features, FEATURE_SCHEMA),
        pixel_table if keep_pixels else None,
        second_meter,
        power if power.num_rows else None,
    )


def _judge_chunk(
    registration: Registration,
    chunk: Sequence[tuple[int, str]],
    pixels: Mapping[str, np.ndarray],
    judge: ImageJudge,
    metrics: Sequence[ImageMetric],
) -> list[dict[str, Any]]:
    stack = np.stack([pixels[digest] for _, digest in chunk])
    requests = [registration.requests[request] for request, _ in chunk]
    prompts = [r.prompt for r in requests]
    scores = [list(metric.score(stack, prompts)) for metric in metrics]
    return [
        {
            "request": request,
            "sha256": digest,
            "blank": is_blank(pixels[digest]),
            "accepted": judgement.accepted,
            "icons": judgement.icons,
            "score": judgement.score,
            "metrics": [float(s[i]) for s in scores],
        }
        for i, ((request, digest), judgement) in enumerate(
            zip(chunk, judge.judge(stack, prompts, [r.family for r in requests]), strict=True)
        )
    ]


def _chunks(items: list[T]) -> list[list[T]]:
    return [items[i : i + JUDGE_BATCH] for i in range(0, len(items), JUDGE_BATCH)]
