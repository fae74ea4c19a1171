"""A group of two ranks when things go wrong: in one of them, in both, and when it is to end."""

import os
import signal
import threading
import time

import numpy as np
import psutil
import pytest
from support.tiny_pipelines import SIZES, tiny_pipeline
from torch import distributed as dist

from millijoule.workers.diffusion.generator import DiffusersGenerator
from millijoule.workers.diffusion.pipeline_call import PipelineCall
from millijoule.workers.drawing.batch_size import BatchSizer
from millijoule.workers.drawing.isolate import AttemptCancelled, FittedGenerator, batch_limits
from millijoule.workers.errors import NodeError, SickWorkerError
from millijoule.workers.generators.options import GeneratorOptions
from millijoule.workers.generators.protocol import GeneratedBatch
from millijoule.workers.ranks.rank_main import Rank
from millijoule.workers.rungs.rungs import Rungs
from millijoule.workers.schemas import ImageRequest

SIDE = SIZES["sd15"]


def request(i, steps=2, **fields):
    return ImageRequest(
        "p", i, "a red dog", seed=i, width=SIDE, height=SIDE, num_inference_steps=steps, **fields
    )


def load(ranks=2, options=None):
    options = options or GeneratorOptions(engine="eager", ranks=ranks)
    return DiffusersGenerator.load(tiny_pipeline("sd15"), options=options)


@pytest.fixture
def patched(monkeypatch, forked_ranks):
    """`patched(change)`: a generator of two ranks, the second of which has `change(monkeypatch)` done to it."""
    made = []

    def make(change=lambda patch: None, options=None):
        with monkeypatch.context() as patch:  # the fork takes it along, and keeps it
            change(patch)
            generator = load(options=options)
        made.append(generator)
        return generator

    yield make
    for generator in made:
        generator.close()


def failing_once(error, *, rank, rows=1):
    """Rank `rank` raises `error` in its first step of the first call with more than `rows` rows."""

    def change(patch):
        original = PipelineCall._after_step
        parent = os.getpid()

        def step(self, *args):
            here = 0 if os.getpid() == parent else 1
            if here == rank and args[3]["latents"].shape[0] > rows and not getattr(self, "raised", False):
                self.raised = True
                raise error
            return original(self, *args)

        patch.setattr(PipelineCall, "_after_step", step)

    return change


def fitted(generator):
    return FittedGenerator(generator, BatchSizer(batch_limits(generator, 4)))


def test_memory_that_runs_out_in_one_rank_halves_the_batches_of_all(patched):
    expected = load(1).generate([request(i) for i in range(4)]).images
    generator = patched(failing_once(MemoryError("rank 1 is full"), rank=1))
    drawing = fitted(generator)
    parts = list(drawing.isolate([request(i) for i in range(4)], lambda: pytest.fail("no row is suspect")))
    assert [len(part) for part, _ in parts] == [2, 2]
    images = np.concatenate([outcome.images for _, outcome in parts])
    assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_rank_that_fails_where_another_does_not_is_sick_and_no_row_is_to_blame(patched):
    generator = patched(failing_once(ValueError("a bad card"), rank=1))
    with pytest.raises(
        SickWorkerError, match="rank 1 of 2 fails where another does not: ValueError: a bad card"
    ):
        list(fitted(generator).isolate([request(0), request(1)], lambda: None))
    assert generator.generate([request(0)]).images.any()  # the group stands again


@pytest.mark.parametrize("in_all_ranks", [True, False])
def test_what_this_rank_raises_is_the_row_s(patched, monkeypatch, in_all_ranks):
    original = PipelineCall.arguments

    def arguments(self, rows, settings):
        if any(row.seed == 1 for row in rows):
            raise ValueError("cannot draw this")
        return original(self, rows, settings)

    def change(patch):
        if in_all_ranks:
            patch.setattr(PipelineCall, "arguments", arguments)

    generator = patched(change)
    monkeypatch.setattr(PipelineCall, "arguments", arguments)
    healthy = []
    parts = list(fitted(generator).isolate([request(i) for i in range(3)], lambda: healthy.append(1)))
    outcomes = {r.seed: outcome for part, outcome in parts for r in part}
    assert str(outcomes[1]) == "cannot draw this"
    assert all(isinstance(outcomes[i], GeneratedBatch) for i in (0, 2))
    assert healthy  # the caller was asked whether this device still works


def test_a_call_that_is_called_off_ends_between_two_steps_in_all_ranks(patched, monkeypatch):
    steps = []

    def change(patch):
        def along(self, one):
            original(self, one)
            raise AssertionError("rank 1 went on to the end")

        original = PipelineCall.draw_along
        patch.setattr(PipelineCall, "draw_along", along)

    generator = patched(change)

    def on_step():
        steps.append(1)
        if len(steps) == 2:
            raise AttemptCancelled

    generator.on_step = on_step
    with pytest.raises(AttemptCancelled):
        generator.generate([request(0, steps=6)])
    assert len(steps) == 2
    steps.extend([1] * 10)
    with pytest.raises(SickWorkerError, match="went on to the end"):  # it answers, and draws again
        generator.generate([request(0)])


def test_a_rank_that_dies_ends_the_call_at_once_and_is_named(patched):
    generator = patched()
    (member,) = generator.group.members
    generator.on_step = lambda: os.kill(member.process.pid, signal.SIGKILL)
    with pytest.raises(SickWorkerError, match=r"rank 1 of 2 has ended \(SIGKILL\)"):
        list(fitted(generator).isolate([request(0, steps=4)], lambda: None))
    with pytest.raises(SickWorkerError, match="SIGKILL"):
        generator.generate([request(0)])


def test_memory_savers_are_taken_by_all_ranks(patched):
    generator = patched()
    expected = generator.generate([request(0)]).images
    for words in ("VAE slicing", "VAE tiling"):
        assert generator.save_memory().startswith(words)
    assert np.abs(generator.generate([request(0)]).images.astype(int) - expected).max() <= 1


def test_a_row_is_drawn_again_in_float32_by_all_ranks(patched):
    """Pixels that are no finite numbers are seen by rank 0 alone."""
    generator = patched(options=GeneratorOptions(engine="eager", ranks=2, rungs=Rungs(precision="bfloat16")))
    (request_,) = asked = [request(0)]
    expected = generator.generate(asked).images
    again = generator._in_float32(request_, generator._settings(request_))
    assert again.finite.all()
    assert np.abs(again.images.astype(int) - expected).mean() < 8  # bfloat16's own roundings
    assert isinstance(generator.generate(asked), GeneratedBatch)  # nobody is a call behind


def test_a_rank_that_cannot_load_is_named_and_nothing_is_left(forked_ranks, monkeypatch):
    libraries_have_settled()
    before = what_is_here()

    def fail(self, task):
        raise OSError("no such device")

    monkeypatch.setattr(Rank, "__init__", fail)
    with pytest.raises(NodeError, match="rank 1 of 2 cannot load the model: OSError: no such device"):
        load()
    assert_nothing_is_left(before)


def test_a_closed_group_leaves_nothing_behind(forked_ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    libraries_have_settled()
    before = what_is_here()
    generator = load()
    loaded = generator.cpu_ns
    assert loaded > 0
    generator.generate([request(0)])
    assert generator.cpu_ns > loaded  # what an estimate counts for the other rank
    assert dist.is_initialized()
    generator.close()
    assert generator.cpu_ns == 0
    assert list(tmp_path.glob("millijoule-ranks-*")) == []
    assert_nothing_is_left(before)


def test_two_groups_of_a_node_do_not_meet(patched):
    """Each has its own file to meet in; this process leaves one to be in another."""
    first = patched()
    point = first.group._folder
    first.close()
    second = patched()
    assert second.group._folder != point
    assert second.generate([request(0)]).images.any()


def libraries_have_settled():
    """The first load in a process starts threads of the libraries' own, with ranks or without."""
    from millijoule.workers.generators.registry import load_generator

    load_generator(str(tiny_pipeline("sd15"))).generate([request(0)])


def what_is_here():
    """What other tests' fixtures have running in this process is theirs; so is what a load sets once."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTORCH_NVML_BASED_CUDA_CHECK"}
    return set(threading.enumerate()), environment, children()


def assert_nothing_is_left(before):
    assert not dist.is_initialized()
    threads, environment, processes = before
    assert what_is_here()[1] == environment
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and (set(threading.enumerate()) - threads or children() - processes):
        time.sleep(0.05)
    assert set(threading.enumerate()) - threads == set()
    assert children() - processes == set()


def children():
    return {p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}
