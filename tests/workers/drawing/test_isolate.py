"""A generator's batches fit its memory, and neither a row nor a worker is blamed for a device that is small."""

import gc
import weakref

import numpy as np
import pytest
import torch

from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.isolate import AttemptCancelled, FittedGenerator, batch_limits
from millijoule.workers.drawing.out_of_memory import is_out_of_memory
from millijoule.workers.errors import NodeError, RowError
from millijoule.workers.generators.protocol import BatchLimits, GeneratedBatch, GeneratorInfo
from millijoule.workers.schemas import ImageRequest

SIDE = 8


class Device:
    """Holds `capacity` images; each saver that is left makes room for one more. Notes the sizes of calls."""

    def __init__(self, capacity, savers=(), batch_size=8, error=MemoryError):
        self.capacity, self.savers, self.error = capacity, list(savers), error
        self.info = GeneratorInfo("device", "0" * 64, SIDE, SIDE, 1, batch_size)
        self.calls = []

    def generate(self, requests):
        self.calls.append(len(requests))
        if len(requests) > self.capacity:
            raise self.error("CUDA out of memory. Tried to allocate 2.00 GiB")
        if any(r.prompt == "bad" for r in requests):
            raise RowError("bad")
        return GeneratedBatch(np.stack([np.full((SIDE, SIDE, 3), r.seed, np.uint8) for r in requests]))

    def save_memory(self):
        if not self.savers:
            return None
        self.capacity += 1
        return self.savers.pop(0)


def requests(n, **fields):
    return [ImageRequest(f"p{i}", 0, "fine", seed=i, **fields) for i in range(n)]


def drawing(generator, batch_size=None):
    return FittedGenerator(generator, BatchSizer(batch_limits(generator, batch_size)), "a small card")


def unhealthy():
    raise AssertionError("the worker was suspected")


def images(drawing, asked):
    """Seeds of the images that came, in order."""
    keyed = dict(enumerate(asked))
    found = []
    for batch in drawing.batches(keyed):
        for part, outcome in drawing.isolate([keyed[i] for i in batch], unhealthy):
            assert isinstance(outcome, GeneratedBatch)
            assert len(part) == len(outcome.images)
            found += outcome.images[:, 0, 0, 0].tolist()
    return found


def cuda_error(words):
    return torch.OutOfMemoryError(words)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, cuda_error])
@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8])
def test_a_batch_that_does_not_fit_is_halved_and_no_image_is_lost(capacity, error):
    device = Device(capacity, error=error)
    assert images(drawing(device), requests(20)) == list(range(20))
    fits = {1: 1, 2: 2, 3: 2, 5: 4, 8: 8}[capacity]
    failed = [n for n in device.calls if n > capacity]
    assert failed == [n for n in (8, 4, 2) if n > capacity]
    assert device.calls[len(failed) :] == [fits] * (20 // fits) + ([20 % fits] if 20 % fits else [])


def test_the_user_s_batch_size_reaches_the_model_and_is_never_exceeded():
    device = Device(100, batch_size=4)
    images(drawing(device, batch_size=7), requests(20))
    assert device.calls == [7, 7, 6]


def test_a_batch_grows_from_the_model_s_guess_to_its_bound():
    device = Device(100)
    device.batch_limits = lambda width, height: BatchLimits(1, 6)
    images(drawing(device), requests(20))
    assert device.calls == [1, 2, 4, 6, 6, 1]


def test_savers_are_taken_in_order_only_where_one_image_does_not_fit_and_the_log_says_which(caplog):
    device = Device(-1, savers=["slicing", "tiling", "offload", "more offload"], batch_size=2)
    assert images(drawing(device), requests(5)) == [0, 1, 2, 3, 4]
    said = [r.getMessage() for r in caplog.records if "saves memory" in r.getMessage()]
    assert [s.rpartition(": ")[2] for s in said] == ["slicing", "tiling"]
    assert all(s.startswith("a small card: saves memory for images of 8x8 pixels") for s in said)


def test_where_nothing_is_left_that_saves_memory_the_node_is_named_with_size_and_way_out():
    asked = requests(4, width=1024, height=768)
    with pytest.raises(
        NodeError, match=r"a small card: out of memory with a single image of 1024x768 .*Draw smaller"
    ):
        list(drawing(Device(-1, savers=["slicing"])).isolate(asked, unhealthy))


def test_a_bad_row_among_too_many_is_still_the_only_one_lost():
    device = Device(3)
    asked = requests(8)
    asked[5] = ImageRequest("p5", 0, "bad", seed=5)
    parts = list(drawing(device).isolate(asked, unhealthy))
    lost = [r.seed for part, outcome in parts if isinstance(outcome, Exception) for r in part]
    drawn = [s for _, o in parts if not isinstance(o, Exception) for s in o.images[:, 0, 0, 0].tolist()]
    assert (lost, drawn) == ([5], [0, 1, 2, 3, 4, 6, 7])


def test_the_retry_does_not_hold_what_the_failed_call_had_allocated():
    held = []

    class Hungry(Device):
        def generate(self, requests):
            assert not any(activation() is not None for activation in held)
            activations = np.ones(1000)
            held.append(weakref.ref(activations))
            return super().generate(requests)

    gc.disable()
    try:
        images(drawing(Hungry(1)), requests(8))
    finally:
        gc.enable()
    assert len(held) == 3 + 8


def test_a_cancelled_call_is_not_halved():
    class Cancelled(Device):
        def generate(self, requests):
            raise AttemptCancelled

    with pytest.raises(AttemptCancelled):
        list(drawing(Cancelled(8)).isolate(requests(8), unhealthy))


def test_requests_that_cannot_share_a_call_are_drawn_group_by_group():
    device = Device(100)
    device.call_group = lambda request: request.guidance_scale
    asked = dict(
        enumerate(ImageRequest(f"p{i}", 0, "x", i, guidance_scale=[1.0, 2.0, None][i % 3]) for i in range(30))
    )
    batches = list(drawing(device).batches(asked))
    assert sorted(i for batch in batches for i in batch) == list(range(30))
    assert [len(batch) for batch in batches] == [8, 2] * 3
    assert all(len({i % 3 for i in batch}) == 1 for batch in batches)
    assert [batch[0] % 3 for batch in batches] == [0, 0, 1, 1, 2, 2]


def test_a_request_of_which_the_model_cannot_say_what_it_goes_with_goes_alone():
    def group(request):
        if request.seed == 2:
            raise UnicodeError("no such letter")

    device = Device(100)
    device.call_group = group
    assert list(drawing(device).batches(dict(enumerate(requests(5))))) == [[0, 1, 3, 4], [2]]


def real_host_error():
    torch.empty(2**48)


def real_numpy_error():
    np.empty(2**48)


def wrapped():
    try:
        real_host_error()
    except RuntimeError as error:
        raise ValueError("the pipeline failed") from error


@pytest.mark.parametrize("fail", [real_host_error, real_numpy_error, wrapped])
def test_real_errors_of_full_memory_are_told(fail):
    with pytest.raises(Exception) as caught:
        fail()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("cannot draw 'a robot that ran out of memory'"), False),
        (ValueError("out of memory"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (OSError(28, "No space left on device"), False),
    ],
)
def test_other_errors_are_not_mistaken_for_it(error, is_memory):
    assert is_out_of_memory(error) is is_memory
