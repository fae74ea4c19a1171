"""`millijoule bench clocks MODEL`: joules per accepted image over SM clocks and power limits of one GPU.

Locking clocks needs the right to administer the board; nothing else of this product asks for it, and nothing runs this
unasked. The board is as it was afterwards, whatever happens (`jobs.ladder.clock_guard`); clocks that somebody had locked
before cannot be read and are unlocked. Images do not depend on the clock: they are judged once.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from millijoule.jobs.entry import COMPLETE
from millijoule.jobs.ladder.clock_guard import DRIVER, Clocks, guarded_clocks, open_binding
from millijoule.jobs.ladder.prompts import are_icon_scenes, icon_requests
from millijoule.jobs.ladder.quality import accepted, family_of
from millijoule.jobs.measuring.measurement import describe, write_result
from millijoule.jobs.measuring.stand_ins import board_uuid
from millijoule.jobs.options.model import ModelOptions
from millijoule.jobs.set_up.model_rungs import pipeline_of
from millijoule.workers.diffusion.pipeline_folder import PipelineFolder
from millijoule.workers.errors import InputError, UsageError
from millijoule.workers.meters.meter import EnergyMeter, open_meter
from millijoule.workers.schemas import ImageRequest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BenchOptions:
    """Sweep the clocks of the GPU. Changes the board while it runs, and puts it back."""

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """What `millijoule generate --model` takes."""

    result: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RESULT.json")] = None
    """Where the figures are saved."""

    optimize: str = "none"
    """As `millijoule generate --optimize`."""

    clocks: int = 6
    """How many SM clocks, evenly between half of the highest and the highest."""

    power_limits: Annotated[tuple[float, ...], tyro.conf.arg(metavar="WATTS ...")] = ()
    """Power limits to try as well, at a free clock."""

    seconds: float = 20.0
    """Length of a block. The board's counter moves in steps of some 100 ms."""

    pause: float = 3.0
    """Seconds after each change before a block begins."""

    device: int = 0
    """The GPU's index."""

    stand_in: bool = False
    """Draw on the CPU, with a made-up board: a rehearsal, whose figures mean nothing."""


@dataclass(frozen=True)
class Setting:
    """A clock to hold, or a power limit; None: as the board has it."""

    sm_mhz: int | None = None
    power_mw: int | None = None


def run(options: BenchOptions) -> int:
    if options.clocks < 1 or options.seconds < 0 or options.pause < 0:
        raise UsageError("bench clocks: --clocks at least 1, --seconds and --pause 0 or more")
    with tempfile.TemporaryDirectory(prefix="millijoule-clocks-") as scratch:
        if options.stand_in:
            binding, uuid, device = str(Path(scratch, "board.json")), board_uuid(0), "cpu"
        else:
            binding, (uuid, device) = DRIVER, _gpu(options.device)
        lib = open_binding(binding)
        meter = open_meter([uuid], nvml=None if binding == DRIVER else lib)
        try:
            domain = f"gpu:{uuid}"
            if domain not in meter.domains:
                raise InputError(f"bench clocks: the energy counter of {uuid} cannot be read")
            with guarded_clocks(uuid, binding) as clocks:
                found = _measure(options, clocks, meter, domain, device)
        finally:
            meter.close()
    write_result(
        {**describe("joules per image over clocks of one board", options), "uuid": uuid, **found},
        options.result,
    )
    return COMPLETE


def _gpu(index: int) -> tuple[str, str]:
    import torch

    if not torch.cuda.is_available():
        raise InputError("bench clocks: PyTorch finds no GPU here")
    torch.cuda.set_device(index)
    return f"GPU-{torch.cuda.get_device_properties(index).uuid}", "cuda"


def settings_of(options: BenchOptions, clocks: Clocks) -> list[Setting]:
    """The board as it is, then clocks downwards, then power limits.

    Raises:
        InputError: a power limit is out of the board's range.
    """
    steps = clocks.steps_mhz()
    upper = [mhz for mhz in steps if mhz >= steps[-1] / 2]
    last = len(upper) - 1
    picked = {upper[round(last * k / max(1, options.clocks - 1))] for k in range(options.clocks)}
    low, high = clocks.limits_mw()
    limits = [round(watts * 1000) for watts in options.power_limits]
    for limit in limits:
        if not low <= limit <= high:
            raise InputError(
                f"--power-limits {limit / 1000:g}: this board takes {low / 1000:g} to {high / 1000:g} watts"
            )
    return [
        Setting(),
        *(Setting(sm_mhz=mhz) for mhz in sorted(picked, reverse=True)),
        *(Setting(power_mw=mw) for mw in limits),
    ]


def _measure(
    options: BenchOptions, clocks: Clocks, meter: EnergyMeter, domain: str, device: str
) -> dict[str, Any]:
    """All settings, there and back, so that a drift falls on all alike."""
    import torch

    from millijoule.workers.generators.protocol import every_image
    from millijoule.workers.generators.registry import load_generator

    usual_mw = int(clocks.lib.nvmlDeviceGetPowerManagementLimit(clocks.handle))
    settings = settings_of(options, clocks)
    obtained = ModelOptions(optimize=options.optimize).obtain(options.model, on_gpu=device == "cuda")
    model = obtained.options
    generator = load_generator(obtained.model, device=device, options=model)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    size = model.batch_size or generator.info.batch_size
    requests = icon_requests(size, 0)
    share = _accepted_share(
        pipeline_of(obtained), every_image(generator.generate(requests), requests), requests
    )
    rows = []
    for setting in (*settings, *reversed(settings)):
        clocks.limit(setting.power_mw or usual_mw)
        if setting.sm_mhz is None:
            clocks.unlock()
        else:
            clocks.lock(setting.sm_mhz)
        time.sleep(options.pause)
        synchronize()
        before, began, images = meter.read_afresh(), time.monotonic(), 0
        while not images or time.monotonic() - began < options.seconds:
            generator.generate([replace(r, seed=images + i) for i, r in enumerate(requests)])
            images += size
        synchronize()
        seconds, after = time.monotonic() - began, meter.read_afresh()
        if before.epoch_of(domain) != after.epoch_of(domain):
            raise RuntimeError(f"{domain}: the counter was reset during a block; run it again")
        joules = (after.energy_mj[domain] - before.energy_mj[domain]) / 1000
        rows.append(
            {
                "sm_mhz": setting.sm_mhz,
                "power_limit_mw": setting.power_mw,
                "images": images,
                "seconds": seconds,
                "joules": joules,
            }
        )
        log.info("%s: %.3f J per image", setting, joules / images)
    return {"accepted_share": share, "settings": summary(rows, share), "blocks": rows}


def _accepted_share(
    folder: PipelineFolder | None, images: Any, requests: Sequence[ImageRequest]
) -> float | None:
    """Share of images that show their prompt; None where nobody can tell."""
    from millijoule.workers.judging.image_judge import IconJudge
    from millijoule.workers.scenes.prompts import parse_prompt
    from millijoule.workers.scenes.scenes import IMAGE_SIZE

    if not are_icon_scenes(folder, requests) or images.shape[1:3] != (IMAGE_SIZE, IMAGE_SIZE):
        return None
    prompts = [r.prompt for r in requests]
    return float(
        accepted(IconJudge(), images, prompts, [family_of(parse_prompt(p)[0]) for p in prompts]).mean()
    )


def summary(rows: Sequence[dict[str, Any]], accepted_share: float | None) -> list[dict[str, Any]]:
    """Per setting: joules per image and accepted image, images per second; the fewest joules first."""
    found = []
    for key in dict.fromkeys((r["sm_mhz"], r["power_limit_mw"]) for r in rows):
        own = [r for r in rows if (r["sm_mhz"], r["power_limit_mw"]) == key]
        images, seconds, joules = (sum(r[name] for r in own) for name in ("images", "seconds", "joules"))
        found.append(
            {
                "sm_mhz": key[0],
                "power_limit_mw": key[1],
                "joules_per_image": joules / images,
                "joules_per_accepted_image": joules / images / accepted_share if accepted_share else None,
                "images_per_second": images / seconds,
            }
        )
    return sorted(found, key=lambda s: s["joules_per_image"])
