"""What `bench stages` makes of a device's own log, and what its stand-in device draws and notes."""

import numpy as np
import pytest

from millijoule.jobs.bench.stages import answers, device_times
from millijoule.jobs.measuring import stand_in_device
from millijoule.workers.schemas import ImageRequest


def log_of(*stretches):
    return "".join(f"{begin} {end}\n" for begin, end in stretches)


def test_idle_is_what_the_device_was_not_busy_after_its_first_shard():
    times = device_times(
        log_of((100, 101), (109, 110), (110, 111), (111.5, 112.5), (112.5, 114)), shard_size=2
    )
    assert times["steady_s"] == pytest.approx(4.0)
    assert times["busy_s"] == pytest.approx(3.5)
    assert times["idle_share"] == pytest.approx(0.125)
    assert times["busy"][0] == [0, 1]


def test_the_goal_is_for_this_code_and_jpeg_alone():
    def row(side, image_format, idle_share):
        return {"side": side, "image_format": image_format, "idle_share": idle_share}

    others = [row("before", "png", 0.5), row("now", "webp", 0.4)]
    good = [row("now", "jpeg", share) for share in (0.01, 0.04, 0.9)]
    assert answers([*others, *good])["goal_met"]
    assert answers([*others, *good])["idle_share"]["now"] == {"webp": 0.4, "jpeg": 0.04}
    assert not answers([*others, row("now", "jpeg", 0.06)])["goal_met"]


def test_the_stand_in_device_notes_its_images_and_not_the_warm_up(tmp_path, monkeypatch):
    log = tmp_path / "log"
    for name, value in (
        (stand_in_device.SECONDS, "0.01"),
        (stand_in_device.PIXELS, "16"),
        (stand_in_device.LOG, log),
    ):
        monkeypatch.setenv(name, str(value))
    device = stand_in_device.load("cpu")
    device.generate([ImageRequest("warm-up", 0, "", 0)])
    out = device.generate([ImageRequest(str(i), 0, "", i) for i in range(3)])
    assert (out.images.shape, out.images.dtype) == ((3, 16, 16, 3), np.uint8)
    stretches = [tuple(map(float, line.split())) for line in log.read_text().splitlines()]
    assert len(stretches) == 3
    assert all(end - begin >= 0.01 for begin, end in stretches)
