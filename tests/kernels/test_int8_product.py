"""Every form of an int8 product gives the sums that plain integers give, and the form is chosen by what it takes."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from millijoule.kernels import int8_product as module
from millijoule.kernels.int8_product import FORMS, MAX_FLOAT_SUM, Int8Matrix, fastest_form

CUDA = ["cuda"] if torch.cuda.is_available() else []


def operand(rows: int, columns: int, values: str, rng: np.random.Generator) -> np.ndarray:
    """int8 `[rows, columns]`; extremes are where sums grow or cancel most."""
    if values == "random":
        return rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    if values == "extremes":
        return rng.choice(np.array([-128, 127], np.int8), (rows, columns))
    return np.full((rows, columns), int(values), np.int8)


def exact(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """By einsum in int64: no BLAS, no float."""
    return np.einsum("mk,kn->mn", left.astype(np.int64), right.astype(np.int64))


VALUES = st.sampled_from(["random", "extremes", "-128", "127"])


@pytest.mark.parametrize("form", FORMS)
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 5000),
    n=st.integers(1, 20),
    values=st.tuples(VALUES, VALUES),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
@example(m=1, k=1024, n=1, values=("-128", "-128"), transposed=True, seed=0)  # exactly 2**24
@example(m=3, k=1025, n=1, values=("-128", "-128"), transposed=False, seed=0)
@example(m=2, k=4999, n=1, values=("127", "extremes"), transposed=True, seed=0)
@settings(max_examples=60, deadline=None)
def test_every_form_is_exact(form, m, k, n, values, transposed, seed):
    rng = np.random.default_rng(seed)
    left, right = operand(m, k, values[0], rng), operand(k, n, values[1], rng)
    weights = torch.from_numpy(right)
    if transposed:
        weights = torch.from_numpy(right.T.copy()).t()
    for device in ("cpu", *CUDA):
        found = Int8Matrix(weights.to(device)).product(torch.from_numpy(left).to(device), form).cpu()
        assert found.dtype == torch.int32
        assert np.array_equal(found.numpy(), exact(left, right))


@pytest.mark.parametrize("form", FORMS)
def test_odd_sums_beyond_floats_reach_are_exact(form):
    """Sums float32 cannot hold: one odd step above 2**24 is lost there, and cancelling does not bring it back."""
    k = 4096
    left = np.full((1, k), 127, np.int8)
    right = np.full((k, 3), 127, np.int8)
    right[-1] = [1, 126, -127]
    right[k // 2 :, 2] *= -1
    assert exact(left, right).max() > MAX_FLOAT_SUM
    found = Int8Matrix(torch.from_numpy(right)).product(torch.from_numpy(left), form)
    assert np.array_equal(found.numpy(), exact(left, right))


@given(k=st.integers(1, 6000), n=st.integers(1, 4), values=VALUES, seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_no_partial_sum_of_a_part_can_leave_what_float32_holds(k, n, values, seed):
    right = operand(k, n, values, np.random.default_rng(seed))
    parts = [part.numpy().astype(np.int64) for part in Int8Matrix(torch.from_numpy(right))._float_parts]
    assert np.array_equal(np.concatenate(parts), right)
    assert all(np.abs(part).sum(0).max() * 128 <= MAX_FLOAT_SUM for part in parts)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_neither_autocast_nor_matmul_precision_changes_a_bit(precision):
    rng = np.random.default_rng(1)
    left, right = operand(33, 900, "random", rng), operand(900, 40, "extremes", rng)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            found = Int8Matrix(torch.from_numpy(right)).product(torch.from_numpy(left), "float32")
    finally:
        torch.set_float32_matmul_precision(before)
    assert np.array_equal(found.numpy(), exact(left, right))


def test_sums_that_int32_cannot_hold_are_refused():
    Int8Matrix(torch.full((2**17 - 1, 1), -128, dtype=torch.int8))
    with pytest.raises(ValueError, match="do not fit int32"):
        Int8Matrix(torch.full((2**17, 1), -128, dtype=torch.int8))
    with pytest.raises(ValueError, match="nothing to multiply by"):
        Int8Matrix(torch.zeros(0, 4, dtype=torch.int8))


@pytest.fixture
def untimed(monkeypatch):
    monkeypatch.setattr(module, "known_forms", {})


def weights(k: int, n: int) -> Int8Matrix:
    return Int8Matrix(torch.from_numpy(operand(k, n, "random", np.random.default_rng(k))))


@pytest.mark.parametrize("slow", FORMS)
def test_the_form_that_takes_less_time_is_taken(untimed, monkeypatch, slow):
    """Whichever form this processor is slow at: the choice follows the clock, and the product the choice."""
    clock = 0.0
    used = []
    plain = Int8Matrix.product

    def product(self, left, form=None):
        nonlocal clock
        if form:
            used.append(form)
            clock += 3.0 if form == slow else 1.0
        return plain(self, left, form)

    monkeypatch.setattr(Int8Matrix, "product", product)
    monkeypatch.setattr(module.time, "thread_time", lambda: clock)
    (other,) = set(FORMS) - {slow}
    assert fastest_form(weights(64, 8), 10) == other


def test_a_shape_is_timed_once(untimed, monkeypatch):
    timed = []
    plain = module.time_forms
    monkeypatch.setattr(module, "time_forms", lambda m, rows: timed.append(rows) or plain(m, rows))
    monkeypatch.setattr(module, "TIMED_PRODUCTS", 64 * 8 * 100)
    for rows in (1, 1, 5, 8, 64, 8192, 100):
        weights(64, 8).product(torch.zeros(rows, 64, dtype=torch.int8))
    assert timed == [1, 8, 64]
    weights(64, 9).product(torch.zeros(1, 64, dtype=torch.int8))
    assert timed == [1, 8, 64, 1]


@pytest.mark.parametrize("waiting", range(8))
def test_a_wait_for_the_processor_does_not_decide(untimed, monkeypatch, waiting):
    """One of the timings is long, as if another program had run meanwhile: whichever it is, the choice stays."""
    clock, number = 0.0, 0
    plain = Int8Matrix.product

    def product(self, left, form=None):
        nonlocal clock, number
        clock += (1.0 if form == "float32" else 20.0) + (1000.0 if number == waiting else 0.0)
        number += 1
        return plain(self, left, form)

    monkeypatch.setattr(Int8Matrix, "product", product)
    monkeypatch.setattr(module.time, "thread_time", lambda: clock)
    assert fastest_form(weights(64, 8), 10) == "float32"
    assert number == 8


def test_a_form_that_saturates_or_is_missing_is_never_taken(untimed, monkeypatch, caplog):
    """As pairs of int8 products do in 16 bits on processors before VNNI; here it is also the faster form by far."""

    def saturating(left, right):
        products = left.to(torch.int32)[:, :, None] * right.to(torch.int32)
        return products.unflatten(1, (-1, 2)).sum(2).clamp(-(2**15), 2**15 - 1).sum(1).to(torch.int32)

    monkeypatch.setattr(module.time, "thread_time", lambda: 0.0)
    monkeypatch.setattr(torch, "_int_mm", saturating)
    extremes = Int8Matrix(torch.full((64, 8), -128, dtype=torch.int8))
    assert fastest_form(extremes, 10) == "float32"
    assert "not exact" in caplog.text

    def missing(left, right):
        raise RuntimeError("not implemented for this build")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert fastest_form(weights(66, 8), 10) == "float32"
