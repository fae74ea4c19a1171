"""A block is as long as asked for, in whole batches, and its reads are at its ends."""

import dataclasses
import hashlib
import threading
import time

import numpy as np
import pytest
from support.counters import UUIDS, FakeNvml
from support.models import plain

from millijoule.workers.errors import InputError
from millijoule.workers.generators.protocol import GeneratedBatch, Rejection
from millijoule.workers.judging.comparison_blocks import draw_block, hash_pixels, open_sampler, rest_block
from millijoule.workers.meters.meter import open_meter
from millijoule.workers.meters.power_samples import SOURCE, PowerSampler
from millijoule.workers.schemas import CounterRead, ImageRequest

REQUESTS = [ImageRequest(str(i), 0, f"prompt {i}", i) for i in range(10)]


class World:
    """A clock that a drawn batch moves on by `batch_seconds`, and a meter that notes when it was read."""

    def __init__(self, batch_seconds=0.4):
        self.now = 0.0
        self.read_at = []
        self.batch_seconds = batch_seconds
        self.inner = plain("cpu")
        self.info = self.inner.info
        self.drawn = []

    def generate(self, requests):
        self.now += self.batch_seconds
        self.drawn += [r.prompt_id for r in requests]
        return self.inner.generate(requests)

    def read(self):
        self.read_at.append(self.now)
        return CounterRead("boot", int(self.now * 1e9), 0, 0, {"gpu:0": int(self.now * 1000)})

    def clock(self):
        return self.now

    def draw(self, first=0, **options):
        return draw_block(self, REQUESTS, first, self, batch_size=4, clock=self.clock, **options)


def test_a_block_ends_with_the_batch_in_which_its_time_is_up():
    world = World()
    block = world.draw(seconds=3.0)
    assert world.now == pytest.approx(3.2)
    assert len(block.digests) == 32
    assert world.read_at == pytest.approx([0.0, 1.2, 2.4, 3.2])
    assert [r.t_mono_ns for r in block.reads] == [int(t * 1e9) for t in world.read_at]


def test_without_telemetry_only_the_ends_are_read():
    world = World()
    assert len(world.draw(seconds=3.0, telemetry=False).reads) == 2
    assert world.read_at == pytest.approx([0.0, 3.2])


def test_a_slow_batch_is_a_block():
    world = World(batch_seconds=100.0)
    assert len(world.draw(seconds=3.0).digests) == 4
    assert world.now == 100.0


def test_a_number_of_images_can_be_asked_for():
    assert len(World().draw(images=9).digests) == 12


def test_requests_go_round():
    world = World()
    block = world.draw(first=8, images=8)
    assert world.drawn == ["8", "9", "0", "1", "2", "3", "4", "5"]
    assert block.first_request == 8
    assert World().draw(first=18).first_request == 8


def test_only_unknown_pixels_come_back():
    block = World().draw(images=20)
    assert len(block.digests) == 20
    assert block.digests[:10] == block.digests[10:]
    assert set(block.new_pixels) == set(block.digests)
    known = block.digests[:3]
    again = World().draw(images=20, known=set(known))
    assert set(again.new_pixels) == set(block.digests) - set(known)
    assert all(hash_pixels(image) == digest for digest, image in again.new_pixels.items())


def test_a_digest_is_of_size_and_bytes():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert hash_pixels(image) == hashlib.sha256(b"\0\0\0\2\0\0\0\4" + bytes(range(24))).hexdigest()
    assert hash_pixels(image.reshape(4, 2, 3)) != hash_pixels(image)
    wide = np.zeros((2, 8, 3), np.uint8)
    wide[:, ::2] = image
    assert hash_pixels(wide[:, ::2]) == hash_pixels(image)


@pytest.mark.parametrize("shape", [(3, 8, 8, 3), (4, 8, 8), (4, 8, 8, 4)])
def test_other_than_the_images_asked_for_is_an_error(shape):
    world = World()
    world.generate = lambda requests: GeneratedBatch(np.zeros(shape, np.uint8))
    world.info = dataclasses.replace(world.info, name="odd")
    with pytest.raises(InputError, match="model odd: asked for 4 images"):
        world.draw()


def test_what_a_model_rejects_is_blank_whatever_its_pixels_and_no_error():
    world = World()
    draw = world.generate
    hidden = Rejection("filtered", "hidden")
    world.generate = lambda requests: dataclasses.replace(
        draw(requests), rejected=(None, hidden, None, hidden)
    )
    block = world.draw(seconds=0.1)
    black = hash_pixels(np.zeros((world.info.height, world.info.width, 3), np.uint8))
    assert [digest == black for digest in block.digests] == [False, True, False, True]
    assert not block.new_pixels[black].any()
    assert block.new_pixels[block.digests[0]].any()


def test_rest_is_as_long_as_asked_for():
    world, slept = World(), []
    block = rest_block(world, 2.5, sleep=slept.append)
    assert slept == [1.0, 1.0, 0.5]
    assert len(block.reads) == 4
    assert block.digests == ()


# ---- power ---------------------------------------------------------------------------------------------------------


PIXELS = np.zeros((4, 8, 8, 3), np.uint8)


class Real(World):
    """The same with real time: a batch takes 50 ms, and a board that the product's meter watches."""

    def __init__(self, folder, nvml):
        super().__init__()
        self.meter = open_meter(
            ["0"], nvml=nvml, powercap_root=folder / "no", boot_id="b", book_directory=folder
        )

    def generate(self, requests):
        time.sleep(0.05)
        return super().generate(requests)

    def draw(self, first=0, **options):
        return draw_block(self, REQUESTS, first, self.meter, batch_size=4, **options)


def live_samplers():
    return [t for t in threading.enumerate() if t.name == "power-sampler"]


@pytest.mark.long
def test_power_is_sampled_by_a_thread_that_ends_with_the_block(tmp_path):
    nvml = FakeNvml()
    world = Real(tmp_path, nvml)
    block = world.draw(
        seconds=1, sampler=open_sampler(world.meter), clock=lambda: float(nvml.power_reads >= 2)
    )
    (trace,) = block.power
    assert (trace.device, trace.source) == (UUIDS[0], SOURCE)
    assert len(trace.samples) >= 2
    opened, closed = block.reads[0].t_mono_ns, block.reads[-1].t_mono_ns
    assert any(opened < s.t_mono_ns < closed for s in trace.samples)
    assert live_samplers() == []
    again = world.draw(images=4, sampler=open_sampler(world.meter))
    assert not {s for t in again.power for s in t.samples} & set(trace.samples)


def test_a_block_without_telemetry_samples_no_power(tmp_path):
    nvml = FakeNvml()
    world = Real(tmp_path, nvml)
    seen = []
    world.inner.generate = lambda requests: seen.append(live_samplers()) or GeneratedBatch(PIXELS)
    assert world.draw(images=8, telemetry=False, sampler=open_sampler(world.meter)).power == ()
    assert seen == [[], []]
    assert nvml.power_reads == 0


@pytest.mark.long
def test_rest_is_sampled_like_work(tmp_path):
    nvml = FakeNvml()
    world = Real(tmp_path, nvml)

    def sleep(seconds):
        while not nvml.power_reads:
            time.sleep(0.01)

    (trace,) = rest_block(world.meter, 1.5, sampler=open_sampler(world.meter), sleep=sleep).power
    assert len(trace.samples) >= 1
    assert live_samplers() == []


def test_the_thread_ends_when_drawing_fails(tmp_path):
    world = Real(tmp_path, FakeNvml())
    world.inner.generate = lambda requests: GeneratedBatch(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="asked for 4 images"):
        world.draw(sampler=open_sampler(world.meter))
    assert live_samplers() == []


def test_without_boards_there_is_no_sampler(tmp_path):
    bare = open_meter(powercap_root=tmp_path / "no", boot_id="b", book_directory=tmp_path)
    assert open_sampler(bare) is None
    assert isinstance(open_sampler(Real(tmp_path, FakeNvml()).meter), PowerSampler)
