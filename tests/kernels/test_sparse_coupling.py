"""Sparse coupling in compiled code: by products or by events, in every form that runs here, the bits of the plain equation; and what
is counted is what changed."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sparse_problems import DT, problem, quantized, settled

from millijoule.kernels.native_library import FORMS, native_library, only
from millijoule.kernels.oscillator import (
    Coupling,
    Drive,
    gather_multipliers,
    quantize_coupling,
    relax,
    relax_by_events,
    relax_pytorch,
    relax_reference,
)
from millijoule.kernels.phase import AMPLITUDE, TURN, sin_cos
from millijoule.kernels.sparse_coupling import SparseKernel

library = native_library()
needs_compiled = pytest.mark.skipif(library is None, reason="the compiled kernels are not built")
COMPILED = [] if library is None else FORMS[: library.millijoule_best_form() + 1]


@pytest.fixture(scope="module", params=COMPILED)
def form(request):
    with only(request.param):
        yield request.param


shapes = st.fixed_dictionaries(
    {
        "grid": st.integers(1, 5),
        "channels": st.sampled_from([1, 3, 4, 7, 12, 16, 20, 32, 37]),
        "rank": st.integers(1, 40),
        "batch": st.integers(0, 21),
        "seed": st.integers(0, 2**31),
        "gain": st.floats(0.01, 30),
        "pull": st.sampled_from([0.0, 0.3, 4.0, 3000.0]),  # the last wraps int32
        "quiet": st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, steps=st.integers(0, 9), up_to=st.sampled_from([None, 0.0, 0.1, 1.0]))
def test_dense_and_events_give_the_bits_of_the_equation(form, shape, steps, up_to):
    coupling, drive, phases = quantized(**shape)
    right = relax_reference(phases, coupling, drive, steps)
    before = phases.clone()
    assert torch.equal(relax(phases, coupling, drive, steps), right)
    assert torch.equal(relax_by_events(phases, coupling, drive, steps, up_to=up_to).phases, right)
    assert torch.equal(phases, before)


def counted(phases, coupling, drive, steps):
    """Events from the trajectory of the plain reference, image by image."""
    sent, spread, left = [], [], []
    trajectory = [phases]
    for step in range(steps):
        trajectory.append(relax_reference(trajectory[-1], coupling, drive, 1))
        if step == 0:
            sent.append(phases.numel())
            spread.append(len(phases) * coupling.gather.shape[1])
        else:
            (s0, c0), (s1, c1) = sin_cos(trajectory[step - 1]), sin_cos(trajectory[step])
            sent.append(int(((s0 != s1) | (c0 != c1)).sum()))
            (zs0, zc0), (zs1, zc1) = (
                [
                    (
                        (w.long() @ coupling.gather.long()) * gather_multipliers(coupling) + (1 << 23) >> 24
                    ).clamp(-AMPLITUDE, AMPLITUDE)
                    for w in waves
                ]
                for waves in ((s0, c0), (s1, c1))
            )
            spread.append(int(((zs0 != zs1) | (zc0 != zc1)).sum()))
    still = [(a == b).all(1) for a, b in itertools.pairwise(trajectory)]
    for k, at_rest in enumerate(still):
        left.append(int((at_rest & ~(still[k - 1] if k else torch.zeros_like(at_rest))).sum()))
    return tuple(sent), tuple(spread), tuple(left)


@pytest.mark.parametrize("choice", ["reference", *COMPILED])
@settings(max_examples=20, deadline=None)
@given(shape=shapes, steps=st.integers(0, 6), up_to=st.sampled_from([None, 0.0, 0.1, 1.0]))
def test_events_are_what_changed(choice, shape, steps, up_to):
    coupling, drive, phases = quantized(**shape)
    with only(choice):
        found = relax_by_events(phases, coupling, drive, steps, up_to=up_to)
    assert (found.sent, found.spread, found.left) == counted(phases, coupling, drive, steps)


@pytest.mark.parametrize("choice", ["reference", *COMPILED])
def test_images_that_come_to_rest_leave_one_after_another(choice):
    """Uncoupled-like oscillators fall to their drives' angles, some images from farther away than others."""
    coupling, drive, phases = settled(batch=12)
    with only(choice):
        found = relax_by_events(phases, coupling, drive, 80)
    assert torch.equal(found.phases, relax_reference(phases, coupling, drive, 80))
    assert sum(found.left) == 12
    assert sum(1 for images in found.left if images) > 3
    last = max(step for step, images in enumerate(found.left) if images)
    assert last < 79
    assert set(found.sent[last + 1 :]) == {0}


@pytest.mark.parametrize("up_to", [0.0, 1.0])
def test_an_image_that_closes_a_gap_brings_all_it_has(form, up_to):
    """Oscillators that creep: sums move them, but hardly any changes its table entry in a step, so what a cell showed before counts."""
    coupling, drive, phases = quantized(3, 4, 2, 9, seed=4, gain=0.02, pull=0.0, quiet=0.0)
    found = relax_by_events(phases, coupling, drive, 8, up_to=up_to)
    right = relax_reference(phases, coupling, drive, 8)
    assert torch.equal(found.phases, right)
    assert sum(found.left) >= 3
    moved, entries = (right != phases)[1::3], found.sent[1]
    assert moved.double().mean() > 0.9
    assert entries < 0.3 * phases.numel()


@needs_compiled
def test_threads_and_batches_change_nothing(form):
    coupling, drive, phases = quantized(3, 20, 9, 23, seed=5, gain=2.0, pull=1.0, quiet=0.5)
    before = torch.get_num_threads()
    try:
        together = relax_by_events(phases, coupling, drive, 7)
        torch.set_num_threads(5)
        assert torch.equal(relax(phases, coupling, drive, 7), together.phases)
        split = relax_by_events(phases, coupling, drive, 7)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(split.phases, together.phases)
    assert (split.sent, split.spread, split.left) == (together.sent, together.spread, together.left)
    for i in range(23):
        own = Drive(*(x[i : i + 1] for x in (drive.a, drive.b, drive.omega)), DT)
        alone = relax_by_events(phases[i : i + 1], coupling, own, 7).phases
        assert torch.equal(alone[0], together.phases[i])


@needs_compiled
def test_sums_and_multipliers_at_their_limits(form):
    """All weights and waves at their extremes, and scales so large that multipliers leave int32 and products wrap int64."""
    channels, grid, rank = 16, 4, 16
    n = grid * grid * channels
    for scale in (1e-3, 1.0, 1e6):

        def full(*shape):
            return torch.full(shape, 127, dtype=torch.int8)

        def scales(*shape, scale=scale):
            return torch.full(shape, scale, dtype=torch.float64)

        coupling = Coupling(
            full(channels, 5 * channels),
            scales(channels),
            full(n, rank),
            scales(rank),
            -full(n, rank),
            scales(n),
        )
        none = torch.zeros(4, n, dtype=torch.int32)
        phases = torch.tensor([0, 1, 2, 3], dtype=torch.int32)[:, None].expand(4, n) * (TURN // 4)
        drive = Drive(none, none, none + 7, DT)
        right = relax_reference(phases, coupling, drive, 4)
        assert torch.equal(relax(phases, coupling, drive, 4), right)
        assert torch.equal(relax_by_events(phases, coupling, drive, 4).phases, right)


@needs_compiled
def test_differences_are_sent_from_one_extreme_to_the_other(form):
    """Half a turn in each step: every sine goes from 127 to -127 and back, with weights of 127."""
    n, rank = 4 * 4 * 32, 32
    full = torch.full((n, rank), 127, dtype=torch.int8)
    nothing = torch.full((n,), 1e-12, dtype=torch.float64)
    coupling = Coupling(
        torch.full((32, 160), 127, dtype=torch.int8),
        nothing[:32],
        full,
        torch.full((rank,), 1e-4).double(),
        full,
        nothing,
    )
    none = torch.zeros(2, n, dtype=torch.int32)
    phases = none + TURN // 4
    drive = Drive(none, none + 1000, none + TURN // 2, DT)
    found = relax_by_events(phases, coupling, drive, 5)
    assert torch.equal(found.phases, relax_reference(phases, coupling, drive, 5))
    assert min(found.sent) == 2 * n
    assert min(found.spread) == 2 * rank


@needs_compiled
def test_a_weight_that_avx2_cannot_negate_is_left_to_pytorch():
    coupling, drive, phases = quantized(2, 8, 4, 3, seed=1, gain=1.0, pull=1.0, quiet=0.0)
    coupling.gather[3, 1] = -128
    assert coupling.kernel is None
    with pytest.raises(ValueError, match="-127 to 127"):
        SparseKernel(coupling.local, coupling.gather, coupling.spread)
    right = relax_reference(phases, coupling, drive, 3)
    assert torch.equal(relax(phases, coupling, drive, 3), right)
    assert torch.equal(relax_by_events(phases, coupling, drive, 3).phases, right)


@needs_compiled
@pytest.mark.parametrize("wrong", ["batch", "n", "dtype", "steps"])
def test_arrays_of_another_form_are_refused(wrong):
    coupling, drive, phases = quantized(2, 8, 4, 3, seed=1, gain=1.0, pull=1.0, quiet=0.0)
    a = {"batch": drive.a[:2], "n": drive.a[:, 1:], "dtype": drive.a.long()}.get(wrong, drive.a)
    with only(COMPILED[-1]), pytest.raises(ValueError, match="of a coupling of 32 oscillators"):
        relax(phases, coupling, Drive(a, drive.b, drive.omega, DT), -1 if wrong == "steps" else 3)


@needs_compiled
def test_weights_that_do_not_belong_together_are_refused():
    coupling, _, _ = quantized(2, 8, 4, 1, seed=1, gain=1.0, pull=1.0, quiet=0.0)
    for local, gather, spread in (
        (coupling.local[:, 1:], coupling.gather, coupling.spread),
        (coupling.local, coupling.gather[1:], coupling.spread[1:]),
        (coupling.local, coupling.gather[:, 1:], coupling.spread),
        (coupling.local.long(), coupling.gather, coupling.spread),
    ):
        with pytest.raises(ValueError, match="coupling"):
            SparseKernel(local, gather, spread)


def test_sums_beyond_int32_are_refused():
    with pytest.raises(ValueError, match="do not fit int32"):
        _ = Coupling(
            torch.full((1, 5), 127, dtype=torch.int8),
            torch.ones(1).double(),
            torch.full((400 * 400, 1), 127, dtype=torch.int8),
            torch.ones(1).double(),
            torch.full((400 * 400, 1), 127, dtype=torch.int8),
            torch.ones(400 * 400).double(),
        ).kernel


@needs_compiled
def test_a_coupling_that_was_used_can_be_sent_to_another_process():
    coupling, drive, phases = quantized(2, 8, 4, 3, seed=1, gain=1.0, pull=1.0, quiet=0.0)
    with only(COMPILED[-1]):
        expected = relax(phases, coupling, drive, 3)
        assert torch.equal(relax(phases, pickle.loads(pickle.dumps(coupling)), drive, 3), expected)


def test_pytorch_is_taken_where_it_is_asked_for(monkeypatch):
    coupling, drive, phases = quantized(2, 8, 4, 3, seed=1, gain=1.0, pull=1.0, quiet=0.0)
    monkeypatch.setattr(SparseKernel, "relax", lambda *_: pytest.fail("compiled code was called"))
    with only("reference"):
        assert torch.equal(relax(phases, coupling, drive, 3), relax_pytorch(phases, coupling, drive, 3))


def test_quantising_what_a_problem_holds_makes_no_minus_128():
    """The premise of taking compiled code for what `train` exports."""
    weights, _, _ = problem(2, 8, 4, 1, seed=1, gain=1.0, pull=1.0)
    coupling = quantize_coupling(*weights)
    assert min(int(x.min()) for x in (coupling.local, coupling.gather, coupling.spread)) >= -127
