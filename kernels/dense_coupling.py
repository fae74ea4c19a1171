"""All-to-all coupled oscillators in integers: a step is one int8 product, the same bits everywhere.

n oscillators theta, pulled by each other through a dense K and by m drivers phi through a drive D of the image's class:

    d theta_i/dt = omega_i  + sum_j K_ij sin(theta_j - theta_i) + sum_k D_ik sin(phi_k - theta_i)
    d phi_k/dt   = omega'_k + sum_l C_kl sin(phi_l - phi_k)

(Kuramoto 1975; with drivers as in Un-0, github.com/unconv-ai/Un-0). An Euler step in integers, with S, C the int8 sine and
cosine of theta and s, c the finer ones of phi; `rq(x, M)` is x * M / 2**24; all divisions by powers of two are floor
divisions after half of the divisor was added:

    U_i     =  rq(sum_j K_ij S_j, M_i)  + H_i + rq(sum_k D_ik s_k, M')        and W_i alike from C_j, c_k
    theta_i <- theta_i + (C_i U_i - S_i W_i + Omega_i) / 2**p

K is int8 with a scale for each row, and may have a fine part, the next 8 bits of each weight, whose field H is made anew in
every `fine_every`-th step and kept in between: sines change slowly, and so does what the last bits make of them. Phases are
int32 of 65,536 to a turn and are not wrapped, as a mean over them needs the turns; look-up takes the lower 16 bits. Sums are
exact in int32 before they are rounded, so the result does not depend on batch, order, threads or device.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from millijoule.kernels.int8_product import Int8Matrix
from millijoule.kernels.native_library import native_form, native_library
from millijoule.kernels.phase import AMPLITUDE, COS_TABLE, SIN_TABLE, TABLE_SHIFT, TURN, sin_cos

#: Fraction bits of the multipliers.
MULTIPLIER_BITS = 24

#: Most fraction bits of C U - S W, in phase units. Fewer are taken where a strong coupling would leave int32.
MAX_PULL_BITS, MIN_PULL_BITS = 11, 3

#: Phase units per radian.
UNITS = TURN / (2 * math.pi)

#: Steps of the fine part within one of the coarse part.
FINE_STEPS = 2 * AMPLITUDE

#: The finer table: entries, what it holds for 1.0, and the shift from a phase's 16 bits to the index.
FINE_TABLE_SIZE, FINE_AMPLITUDE, FINE_TABLE_SHIFT = 4096, 2047, 4

#: The compiled kernel's rows and columns are a multiple of this.
_NATIVE_PADDING = 64

#: Rows of a coupling that are quantised at a time, so that few of them are float64 at once.
_ROWS_AT_A_TIME = 1024

#: Most drivers: their sums are small, and nobody has published more than 8.
MAX_DRIVERS = 256


def _fine_table(shift: int) -> Tensor:
    angles = (2 * math.pi * (i + shift + 0.5) / FINE_TABLE_SIZE for i in range(FINE_TABLE_SIZE))
    return torch.tensor([round(FINE_AMPLITUDE * math.sin(angle)) for angle in angles], dtype=torch.int16)


FINE_SIN_TABLE = _fine_table(0)
FINE_COS_TABLE = _fine_table(FINE_TABLE_SIZE // 4)


class StepsTooLong(ValueError):
    """Steps over which int32 does not hold what such a coupling does; more and shorter ones may do."""


@dataclass(frozen=True)
class DenseCoupling:
    """Quantised weights and their real scales.

    Attributes:
        coarse: int8 `[n, n]`, row = target; K is about `scale[:, None] * (coarse + fine / FINE_STEPS)`.
        scale: float64 `[n]`.
        fine: int8 `[n, n]`; None: there is no fine part.
        fine_every: its field is made anew in every so many steps, 0 where there is none.
        frequency: omega, float64 `[n]`, radians per unit of time.
        drive: D, int16 `[classes, n, m]`, times `drive_scale`.
        driver_coupling: C, int16 `[m, m]`, times `driver_scale`.
        driver_frequency: omega', float64 `[m]`.
        strongest: bounds, in radians per unit of time, of an oscillator's pull (field and frequency) and of a driver's.
    """

    coarse: Tensor
    scale: Tensor
    fine: Tensor | None
    fine_every: int
    frequency: Tensor
    drive: Tensor
    drive_scale: float
    driver_coupling: Tensor
    driver_scale: float
    driver_frequency: Tensor
    strongest: tuple[float, float]

    @property
    def n(self) -> int:
        return self.coarse.shape[0]

    @property
    def m(self) -> int:
        return self.driver_coupling.shape[0]

    def to(self, device: str) -> DenseCoupling:
        return replace(
            self,
            coarse=self.coarse.to(device),
            scale=self.scale.to(device),
            fine=None if self.fine is None else self.fine.to(device),
            frequency=self.frequency.to(device),
            drive=self.drive.to(device),
            driver_coupling=self.driver_coupling.to(device),
            driver_frequency=self.driver_frequency.to(device),
        )

    @cached_property
    def products(self) -> tuple[Int8Matrix, Int8Matrix | None]:
        """K^T to multiply by: coarse and fine part, `[n, n]` each."""
        return Int8Matrix(self.coarse.t()), None if self.fine is None else Int8Matrix(self.fine.t())


@dataclass(frozen=True)
class StepMultipliers:
    """Everything real about a step of one length, as integers.

    Attributes:
        pull_bits: p.
        coarse, fine: M of the two parts, int32 values `[n]`.
        frequency: Omega, int32 values `[n]`.
        drive: M', of sums of drive times finer sines.
        driver_coupling, driver_frequency: the drivers' own, and Omega' `[m]`; in pull units of the finer amplitude.
    """

    pull_bits: int
    coarse: Tensor
    fine: Tensor
    frequency: Tensor
    drive: int
    driver_coupling: int
    driver_frequency: Tensor


def quantize_dense(
    coupling: Tensor,
    frequency: Tensor,
    drive: Tensor,
    driver_coupling: Tensor,
    driver_frequency: Tensor,
    *,
    fine_every: int = 0,
) -> DenseCoupling:
    """From real K `[n, n]`, omega `[n]`, D `[classes, n, m]`, C `[m, m]` and omega' `[m]`, all per unit of time.

    Raises:
        ValueError: more drivers than `MAX_DRIVERS`, or `fine_every` below 0.
    """
    drive, driver_coupling = drive.double(), driver_coupling.double()
    m = len(driver_coupling)
    if m > MAX_DRIVERS:
        raise ValueError(f"{m} drivers: at most {MAX_DRIVERS} are computed in integers")
    if fine_every < 0:
        raise ValueError(f"fine_every {fine_every}: at least 0")
    coarse = torch.empty(coupling.shape, dtype=torch.int8, device=coupling.device)
    fine = torch.empty_like(coarse) if fine_every else None
    scale, field = torch.empty(2, len(coupling), dtype=torch.float64, device=coupling.device)
    for start in range(0, len(coupling), _ROWS_AT_A_TIME):
        rows = slice(start, start + _ROWS_AT_A_TIME)
        weights = coupling[rows].double()
        scale[rows] = weights.abs().amax(1).clamp_min(1e-12) / AMPLITUDE
        weights /= scale[rows, None]
        coarse[rows] = torch.round(weights)
        # of the integers: a weight may have been rounded to twice of what it was
        field[rows] = coarse[rows].abs().sum(1, dtype=torch.int64) * scale[rows]
        if fine is not None:
            rest = (weights - coarse[rows]) * FINE_STEPS
            fine[rows] = torch.round(rest).clamp_(-AMPLITUDE, AMPLITUDE)
            field[rows] += fine[rows].abs().sum(1, dtype=torch.int64) * (scale[rows] / FINE_STEPS)
    # sums over the drivers of D times finer sines have to fit int32
    drive_scale = max(float(drive.abs().amax()) / 32767, _largest_row(drive) * FINE_AMPLITUDE / 2**30, 1e-12)
    driver_scale = max(float(driver_coupling.abs().amax()) / 32767, 1e-12)
    drive_integers = torch.round(drive / drive_scale).to(torch.int16)
    driver_integers = torch.round(driver_coupling / driver_scale).to(torch.int16)
    field += drive_integers.abs().sum(2, dtype=torch.int64).amax(0) * drive_scale
    driver_field = driver_integers.abs().sum(1, dtype=torch.int64) * driver_scale
    return DenseCoupling(
        coarse,
        scale,
        fine,
        fine_every,
        frequency.double(),
        drive_integers,
        drive_scale,
        driver_integers,
        driver_scale,
        driver_frequency.double(),
        # sine and cosine each pull with a field of its own; a hundredth for roundings
        (
            float((2.02 * field + frequency.abs()).max()),
            float((2.02 * driver_field + driver_frequency.abs()).max()),
        ),
    )


def step_multipliers(coupling: DenseCoupling, steps: int, horizon: float) -> StepMultipliers:
    """The integers of one of `steps` steps over `horizon` units of time.

    Raises:
        StepsTooLong: the coupling is so strong that phases, pulls or multipliers would leave int32.
    """
    dt = horizon / steps
    turns = horizon * max(coupling.strongest) / (2 * math.pi)
    if not turns < 2**14:
        raise StepsTooLong(f"phases may run over {turns:.3g} turns: more than int32 holds")
    pull = max(coupling.strongest) * dt * UNITS
    bits = min(MAX_PULL_BITS, math.floor(math.log2(2**31 / max(pull, 1.0) * 0.98)))
    if bits < MIN_PULL_BITS:
        raise StepsTooLong(f"a step may pull a phase over {pull / TURN:.3g} turns: more than int32 holds")
    unit = dt * UNITS * 2**bits  # of C U - S W, per radian per unit of time
    coarse = coupling.scale * (unit / AMPLITUDE**2)
    drive = coupling.drive_scale * (unit / (AMPLITUDE * FINE_AMPLITUDE))
    drivers = coupling.driver_scale * (unit / FINE_AMPLITUDE**2)
    largest = max(float(coarse.max()), drive, drivers) * 2**MULTIPLIER_BITS
    if not largest < 2**31:
        raise StepsTooLong(f"a multiplier of {largest:.3g} does not fit int32: the coupling is too strong")
    return StepMultipliers(
        bits,
        _fixed_point(coarse),
        _fixed_point(coarse / FINE_STEPS),
        torch.round(coupling.frequency * unit).to(torch.int64),
        round(drive * 2**MULTIPLIER_BITS),
        round(drivers * 2**MULTIPLIER_BITS),
        torch.round(coupling.driver_frequency * unit).to(torch.int64),
    )


def fine_sin_cos(phases: Tensor) -> tuple[Tensor, Tensor]:
    """Sine and cosine of int32 phases, int16 in [-2047, 2047] where 2047 is 1.0; any shape, turns do not matter."""
    index = ((phases & (TURN - 1)) >> FINE_TABLE_SHIFT).flatten()
    sin, cos = (
        table.to(phases.device).index_select(0, index).view(phases.shape)
        for table in (FINE_SIN_TABLE, FINE_COS_TABLE)
    )
    return sin, cos


def relax_reference(
    phases: Tensor, coupling: DenseCoupling, classes: Tensor, steps: int, horizon: float
) -> Tensor:
    """Phases int32 `[batch, n]`, not wrapped, after `steps` steps over `horizon` units of time, as plainly as the equations are written.

    Args:
        phases: at the start, int32 `[batch, n + m]`: oscillators, then drivers.
        classes: of each image, int64 `[batch]`; -1: nothing drives it.

    Raises:
        StepsTooLong: see `step_multipliers`.
    """
    multipliers = step_multipliers(coupling, steps, horizon)
    n, p = coupling.n, multipliers.pull_bits
    theta, phi = phases.to(torch.int64).split([n, coupling.m], 1)
    coarse, driver_coupling = coupling.coarse.to(torch.int64), coupling.driver_coupling.to(torch.int64)
    drive = (
        coupling.drive[classes.clamp(min=0)].to(torch.int64) * (classes >= 0)[:, None, None]
    )  # [batch, n, m]
    held = [torch.zeros_like(theta), torch.zeros_like(theta)]
    for step in range(steps):
        waves = [x.to(torch.int64) for x in sin_cos(theta % TURN)]
        driver_waves = [x.to(torch.int64) for x in fine_sin_cos(phi % TURN)]
        if coupling.fine is not None and step % coupling.fine_every == 0:
            fine = coupling.fine.to(torch.int64)
            held = [_requantized(wave @ fine.t(), multipliers.fine) for wave in waves]
        fields, driver_fields = [], []
        for wave, driver_wave, part in zip(waves, driver_waves, held, strict=True):
            driven = (drive * driver_wave[:, None]).sum(2)
            fields.append(
                _requantized(wave @ coarse.t(), multipliers.coarse)
                + part
                + _requantized(driven, multipliers.drive)
            )
            driver_fields.append(_requantized(driver_wave @ driver_coupling.t(), multipliers.driver_coupling))
        theta = theta + _pull(waves, fields, multipliers.frequency, p)
        phi = phi + _pull(driver_waves, driver_fields, multipliers.driver_frequency, p)
    return theta.to(torch.int32)


def relax(phases: Tensor, coupling: DenseCoupling, classes: Tensor, steps: int, horizon: float) -> Tensor:
    """`relax_reference`, fast: the sums are int8 matrix products. Same arguments, same bits, same errors."""
    multipliers = step_multipliers(coupling, steps, horizon)
    batch, n, p = len(phases), coupling.n, multipliers.pull_bits
    coarse, fine = coupling.products
    theta, phi = phases[:, :n].contiguous(), phases[:, n:].to(torch.int64)
    driver_coupling = coupling.driver_coupling.to(torch.int64)
    drive = coupling.drive[classes.clamp(min=0)].to(torch.int32) * (classes >= 0)[:, None, None].to(
        torch.int32
    )
    held: Tensor | int = 0
    for step in range(steps):
        waves = sin_cos(theta & (TURN - 1))  # 2 * [batch, n] int8
        driver_waves = fine_sin_cos(phi)
        source = torch.cat(waves)  # [2 batch, n]
        if fine is not None and step % coupling.fine_every == 0:
            held = _requantized(fine.product(source), multipliers.fine).to(torch.int32)
        driven = torch.cat(
            [(drive * wave[:, None].to(torch.int32)).sum(2, dtype=torch.int32) for wave in driver_waves]
        )
        field = _requantized(coarse.product(source), multipliers.coarse).to(torch.int32)
        field += held
        field += _requantized(driven, multipliers.drive).to(torch.int32)
        sin, cos = (wave.to(torch.int32) for wave in waves)
        pull = (cos * field[:batch]).sub_(sin * field[batch:]).add_(multipliers.frequency.to(torch.int32))
        theta = theta + pull.add_(1 << (p - 1)).bitwise_right_shift_(p)
        sources = [wave.to(torch.int64) for wave in driver_waves]
        fields = [
            _requantized((wave[:, None] * driver_coupling).sum(2), multipliers.driver_coupling)
            for wave in sources
        ]
        phi = phi + _pull(sources, fields, multipliers.driver_frequency, p)
    return theta


class NativeCoupling:
    """A coupling packed for the compiled kernel, in the form that `native_library` names now; calls are `relax`.

    Raises:
        ValueError: there is no compiled kernel.
    """

    def __init__(self, coupling: DenseCoupling) -> None:
        library = native_library()
        if library is None:
            raise ValueError("the compiled kernels are missing")
        self.coupling = coupling
        self._library = library
        self._form = native_form()
        padded = coupling.n + -coupling.n % _NATIVE_PADDING
        self._coarse = self._packed(coupling.coarse, padded)
        self._fine = None if coupling.fine is None else self._packed(coupling.fine, padded)
        classes, n, m = coupling.drive.shape
        drive = torch.zeros(classes, padded, m + m % 2, dtype=torch.int16)
        drive[:, :n, :m] = coupling.drive
        self._drive = (
            drive.view(classes, padded, -1, 2).transpose(1, 2).contiguous()
        )  # [classes, pairs, padded, 2]
        self._driver_coupling = coupling.driver_coupling.contiguous()
        sines, cosines = (table.to(torch.int32) & 0xFF for table in (SIN_TABLE, COS_TABLE))
        self._table = (sines | cosines << 8).to(torch.uint16)

    def _packed(self, weights: Tensor, padded: int) -> tuple[Tensor, Tensor]:
        """Weights as the kernel reads them, and what its sums start from."""
        weights = weights.contiguous()
        size = int(self._library.millijoule_dense_weight_bytes(self._form))
        packed = torch.empty(padded * padded * size, dtype=torch.int8)
        start = torch.empty(padded, dtype=torch.int32)
        self._library.millijoule_dense_pack(
            self._form, _pointer(weights), ctypes.c_int64(len(weights)), _pointer(packed), _pointer(start)
        )
        return packed, start

    def __call__(
        self, phases: Tensor, classes: Tensor, steps: int, horizon: float, *, threads: int = 1
    ) -> Tensor:
        """See `relax`; the bits do not depend on `threads`, which share the batch.

        Raises:
            ValueError: the batch is not of this model, or StepsTooLong, see `step_multipliers`.
            MemoryError: there is not enough of it.
        """
        coupling = self.coupling
        n, m = coupling.n, coupling.m
        multipliers = step_multipliers(coupling, steps, horizon)
        if phases.shape != (len(classes), n + m):
            raise ValueError(
                f"phases {list(phases.shape)} for {len(classes)} images of {n} + {m} oscillators"
            )
        kinds = classes.to(torch.int64).contiguous()
        if len(kinds) and not -1 <= int(kinds.min()) <= int(kinds.max()) < len(coupling.drive):
            raise ValueError(f"classes are -1 to {len(coupling.drive) - 1}")
        state = phases.to(torch.int32).clone(memory_format=torch.contiguous_format)
        padded = n + -n % _NATIVE_PADDING
        by_row = torch.zeros(3, padded, dtype=torch.int32)  # coarse and fine multipliers, frequencies
        by_row[:, :n] = torch.stack([multipliers.coarse, multipliers.fine, multipliers.frequency])
        frequency = multipliers.driver_frequency.to(torch.int32)
        numbers = (ctypes.c_int64 * 9)(
            n,
            m,
            steps,
            max(coupling.fine_every, 1),
            multipliers.pull_bits,
            TABLE_SHIFT,
            FINE_TABLE_SHIFT,
            multipliers.drive,
            multipliers.driver_coupling,
        )
        fine = (None, None) if self._fine is None else tuple(map(_pointer, self._fine))
        failed = self._library.millijoule_dense_relax(
            self._form,
            numbers,
            *(_pointer(row) for row in by_row),
            _pointer(frequency),
            _pointer(self._driver_coupling),
            _pointer(self._table),
            _pointer(FINE_SIN_TABLE),
            _pointer(FINE_COS_TABLE),
            *map(_pointer, self._coarse),
            *fine,
            _pointer(self._drive),
            _pointer(kinds),
            ctypes.c_int64(len(kinds)),
            _pointer(state),
            ctypes.c_int64(threads),
        )
        if failed:
            raise MemoryError(f"{len(kinds)} images of {n} oscillators")
        return state[:, :n]


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _requantized(sums: Tensor, multiplier: Tensor | int) -> Tensor:
    """rq, int64."""
    return (sums.to(torch.int64) * multiplier + (1 << (MULTIPLIER_BITS - 1))) >> MULTIPLIER_BITS


def _pull(waves: list[Tensor], fields: list[Tensor], frequency: Tensor, bits: int) -> Tensor:
    return (waves[1] * fields[0] - waves[0] * fields[1] + frequency + (1 << (bits - 1))) >> bits


def _fixed_point(real: Tensor) -> Tensor:
    return torch.round(real * 2**MULTIPLIER_BITS).to(torch.int64)


def _largest_row(matrix: Tensor) -> float:
    """The largest sum of magnitudes along the last dimension."""
    return float(matrix.abs().sum(-1).max())
