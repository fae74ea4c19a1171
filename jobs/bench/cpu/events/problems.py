"""Oscillators for `bench events`: made-up ones of which a given share rests, and the icons of a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from millijoule.workers.errors import InputError

if TYPE_CHECKING:
    import torch

    from millijoule.kernels.oscillator import Coupling, Drive

    Problem = tuple[torch.Tensor, Coupling, Drive]

#: Cells in each direction, oscillators of a cell, rank; one cell is a coupling of all with all. The first is the packaged model's.
SHAPES = (
    (4, 32, 32),
    (4, 32, 128),
    (8, 64, 32),
    (8, 64, 128),
    (16, 64, 32),
    (16, 64, 128),
    (1, 1024, 1),
    (1, 2048, 1),
)

#: Oscillators of all images of a call, about.
OSCILLATORS = 1 << 15

#: Phase units that an oscillator moves in a step, at least and at most: two entries of the tables, and 0.2 radians.
SLOWEST, FASTEST = 128, 2048

#: Units of time in a step.
DT = 0.1

#: Every so manieth icon of the model is timed; events are counted of all.
TIMED_ICONS = 24


def made_up(shape: tuple[int, int, int], images: int, quiet: float) -> Problem:
    """Oscillators of which exactly a share `quiet`, of all images together, never move, and all others change their table entry in
    every step. Sums and z are as a trained coupling's would be, but move nothing."""
    import torch

    from millijoule.kernels.oscillator import Coupling, Drive

    grid, channels, rank = shape
    n = grid * grid * channels
    g = torch.Generator().manual_seed(7)

    def integers(*size: int) -> torch.Tensor:
        return torch.randint(-127, 128, size, generator=g, dtype=torch.int8)

    def scales(size: int, value: float) -> torch.Tensor:
        return torch.full((size,), value, dtype=torch.float64)

    coupling = Coupling(
        integers(channels, 5 * channels),
        scales(channels, 1e-12),
        integers(n, rank),
        scales(rank, n**-0.5 / 73),  # weights of standard deviation n**-0.5
        integers(n, rank),
        scales(n, 1e-12),
    )
    phases = torch.randint(0, 65536, (images, n), generator=g, dtype=torch.int32)
    omega = torch.randint(SLOWEST, FASTEST, (images, n), generator=g, dtype=torch.int32)
    resting = torch.randperm(images * n, generator=g)[: round(quiet * images * n)]
    omega.view(-1)[resting] = 0
    none = torch.zeros_like(omega)
    return phases, coupling, Drive(none, none, omega, DT)


def icons_of(model: str) -> tuple[Problem, Problem]:
    """Of all icons of a model at every size, and of those that are timed.

    Raises:
        InputError: its oscillators have no coupling.
    """
    import torch

    from millijoule.workers.generators.registry import model_path
    from millijoule.workers.oscillators.config import VARIANTS
    from millijoule.workers.oscillators.model_file import load_model

    painter, _ = load_model(model_path(model))
    network = painter.network
    if network.coupling is None:
        raise InputError(f"--model {model}: its oscillators have no coupling")
    noun = torch.arange(network.config.nouns).repeat_interleave(VARIANTS)
    variant = torch.arange(VARIANTS).repeat(network.config.nouns)
    some = slice(None, None, TIMED_ICONS)
    return network.coupled_start(noun, variant), network.coupled_start(noun[some], variant[some])
