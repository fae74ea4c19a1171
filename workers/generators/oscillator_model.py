"""The oscillator generator as a float network, for training; `workers.generators.oscillator` runs its integer form.

    d theta_i / dt = omega_i(e) + r_i(e) sum_j K_ij g_j(e) sin(theta_j - theta_i) + a_i(e) cos(theta_i) - b_i(e) sin(theta_i)

The prompt drives some oscillators of each cell and the decoder reads some; in the shipped model, all. theta starts at
rest but for the noise (`start_phases`), runs `steps` explicit Euler steps to time `horizon`, and a
convolutional decoder reads sin and cos of the final phases on a grid of cells. K is block-sparse (a cell feels itself and
its four neighbours, by the same blocks everywhere) plus low-rank. The prompt enters as icons e through the drive (a, b),
a shift of the frequencies omega, and bounded gains r, g. After Un-0 (phases, readout without projection) with a complex
drive in place of its random-phase drivers. An icon's drive is computed once and laid on the cells of its window, so
what is learned about a noun in one place holds in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional as F

from millijoule.kernels.oscillator import MAX_Z, SOURCE_UNIT, STENCIL, neighbours
from millijoule.kernels.phase import AMPLITUDE, TURN
from millijoule.workers.scenes.scenes import (
    BACKGROUNDS,
    CELL,
    COLOURS,
    ICON_TOKENS,
    IMAGE_SIZE,
    MAX_COUNT,
    SIZES,
    WINDOWS,
)
from millijoule.workers.scenes.vocabulary import DEFAULT_NOUNS

#: Forward scale of the drive, so that Adam's rate lets it grow: phases must be pulled by radians within the horizon.
DRIVE_SCALE = 4.0

#: Nouns at a size; shape = noun * len(SIZES) + size.
SHAPES = DEFAULT_NOUNS * len(SIZES)

GAIN_RANGE = 0.5  # gains are within 1 +- this

Size = Annotated[int, Meta(ge=1, le=4096)]


@dataclass(frozen=True)
class OscillatorConfig:
    """Sizes of the model: `grid * grid * channels` oscillators.

    `coupling` is what stands between the start phases and the decoder. "trained" is the model, the others are its controls.
    """

    coupling: Literal["trained", "frozen", "none", "mlp"] = "trained"
    grid: Size = 8
    channels: Size = 32  # oscillators per cell
    driven: Size = 32  # the first of them: the prompt drives these alone
    read: Size = 32  # the last of them: the decoder reads these alone
    noise_channels: Size = 8  # the first of them start at random (`start_phases`), the others at phase 0
    rank: Size = 32  # of the global coupling
    noun_width: Size = 48
    colour_width: Size = 16
    hidden: Size = 192
    widths: tuple[Size, ...] = (72, 48, 32)  # decoder channels at grid, 2 grid, 4 grid
    mix: Size = 32  # channels of the last layer but one
    steps: Size = 10
    horizon: Annotated[float, Meta(gt=0, lt=100)] = 1.0

    def __post_init__(self) -> None:
        if not self.noise_channels <= self.driven <= self.channels or self.read > self.channels:
            raise ValueError(
                f"{self.noise_channels} noise channels, {self.driven} driven, {self.read} read, of {self.channels}"
            )
        if self.grid * CELL != IMAGE_SIZE or self.grid * 2 ** len(self.widths) != IMAGE_SIZE:
            raise ValueError(f"grid {self.grid} and {len(self.widths)} widths: not {IMAGE_SIZE} pixels")
        if self.oscillators > TURN:
            raise ValueError(f"{self.oscillators} oscillators, at most {TURN}")

    @property
    def cells(self) -> int:
        return self.grid * self.grid

    @property
    def oscillators(self) -> int:
        return self.cells * self.channels


class PromptDrive(NamedTuple):
    """`drive` `[batch, 3, n]`: a, b, omega in radians per unit of time; `source_gain` g and `row_gain` r `[batch, n]`."""

    drive: Tensor
    source_gain: Tensor
    row_gain: Tensor


#: Of k icons: drives of the shape `[k, cells of the window * 3 driven]` and of the colour `[k, 3 driven]`, and gains before
#: their bounds `[k, 2 C]`.
IconDrive = tuple[Tensor, Tensor, Tensor]


class _Rows(nn.Embedding):
    """A table. Training on a GPU, rows are picked by a product with one-hot rows: its gradient is a product, too, the same
    sum in every run, where that of a look-up depends on which thread comes first."""

    def forward(self, index: Tensor) -> Tensor:
        if not (self.weight.is_cuda and self.weight.requires_grad and torch.is_grad_enabled()):
            return super().forward(index)
        with torch.autocast("cuda", enabled=False):
            chosen = index[:, None] == torch.arange(self.num_embeddings, device=index.device)
            return chosen.to(self.weight.dtype) @ self.weight


class _PromptToDrive(nn.Module):
    """Scene tokens int64 `[batch, NUM_TOKENS]` -> `PromptDrive`: what each icon adds, laid on the cells of its window.

    Noun and size say one part, colour another; their effects on the drive add up, so that no pair of them is special.
    """

    cell_of_window: Tensor

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        self.config = config
        self.background = _Rows(len(BACKGROUNDS), 3 * config.driven)
        cells = cell_of_window(config.grid)
        cells[1] = -1  # the whole image is laid apart
        self.register_buffer("cell_of_window", cells, persistent=False)

    def look_up(self, noun: Tensor, colour: Tensor, size: Tensor, whole: bool) -> IconDrive:
        """Of icons in the whole image or in half windows."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, *, static: bool = False) -> PromptDrive:
        """With `static`, the same values by the same kernels whatever the tokens say, as the capture of a CUDA graph needs
        it; otherwise only what is there is looked up."""
        batch, grid, c, d = len(tokens), self.config.grid, self.config.channels, self.config.driven
        icons = tokens[:, :-1].reshape(batch, MAX_COUNT, ICON_TOKENS)
        base = self.background(tokens[:, -1]).view(batch, 1, 1, 3 * d)
        drive, gain = (self._lay_all if static else self._lay_present)(icons, base)
        gain = (1 + GAIN_RANGE * torch.tanh(gain)).view(batch, grid * grid, 2, c)
        drive = DRIVE_SCALE * drive.reshape(batch, grid * grid, 3, d).transpose(1, 2)
        drive = F.pad(drive, (0, c - d)).reshape(batch, 3, -1)
        return PromptDrive(drive, gain[:, :, 0].flatten(1), gain[:, :, 1].flatten(1))

    def _lay_present(self, icons: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """Drive `[batch, grid, grid, 3 driven]` and unbounded gains `[batch, grid, grid, 2 C]`, window by window."""
        batch, grid, c, d = len(icons), self.config.grid, self.config.channels, self.config.driven
        drive = base.expand(batch, grid, grid, 3 * d)
        gain = drive.new_zeros(batch, grid, grid, 2 * c)
        for number, (left, top, side) in enumerate(WINDOWS):
            image, slot = torch.nonzero(icons[:, :, 3] == 1 + number, as_tuple=True)
            if not len(image):
                continue
            noun, colour, size = (icons[image, slot, k] - 1 for k in range(3))
            shape, tint, gains = self.look_up(noun, colour, size, side == grid)
            patch = shape.view(-1, side, side, 3 * d) + tint[:, None, None]
            gains = gains[:, None, None].expand(-1, side, side, -1)
            window = (0, 0, left, grid - left - side, top, grid - top - side)
            drive = drive.index_add(0, image, F.pad(patch, window).to(drive.dtype))
            gain = gain.index_add(0, image, F.pad(gains, window).to(gain.dtype))
        return drive, gain

    def _lay_all(self, icons: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
        """As `_lay_present`, slot by slot, as if every slot held an icon; what is not there is masked."""
        batch, grid, d = len(icons), self.config.grid, self.config.driven
        noun, colour, size = ((icons[..., k] - 1).clamp_min(0).flatten() for k in range(3))
        looked = self.look_up(noun, colour, size, False)
        shape, tint, gains = (x.unflatten(0, (batch, MAX_COUNT)) for x in looked)
        first = slice(None, None, MAX_COUNT)  # an icon of the whole image is alone
        whole_shape, whole_tint, whole_gains = self.look_up(noun[first], colour[first], size[first], True)
        shape = shape.unflatten(2, (-1, 3 * d))  # [batch, slots, cells of the window, 3 driven]
        whole = (icons[:, 0, 3] == 1)[:, None, None]
        drive = base.flatten(1, 2) + whole * (whole_shape.unflatten(1, (-1, 3 * d)) + whole_tint[:, None])
        gain = (whole * whole_gains[:, None]).expand(-1, grid * grid, -1)
        for k in range(MAX_COUNT):
            at = self.cell_of_window[icons[:, k, 3]]  # [batch, cells], -1 outside
            inside = (at >= 0)[..., None]
            patch = shape[:, k].gather(1, at.clamp_min(0)[..., None].expand(-1, -1, 3 * d))
            drive = drive + inside * (patch + tint[:, k, None])
            gain = gain + inside * gains[:, k, None]
        return drive, gain


class PromptEncoder(_PromptToDrive):
    """The prompt's network in training.

    What the network says of a noun at a size, a table corrects: the network learns what shapes have in common, the table
    what is one shape's own, without disturbing the others.
    """

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__(config)
        c, d, width = config.channels, config.driven, config.noun_width
        self.noun = _Rows(DEFAULT_NOUNS, width)
        self.size = _Rows(2 * len(SIZES), width)  # of icons in the whole image, in half windows
        self.colour = _Rows(len(COLOURS), config.colour_width)
        self.shape1 = nn.Linear(2 * width, config.hidden)
        self.shape2 = nn.Linear(config.hidden, config.hidden)
        self.tint = nn.Linear(config.colour_width, 3 * d)
        self.whole_patch = nn.Linear(config.hidden, config.cells * 3 * d)
        self.half_patch = nn.Linear(config.hidden, config.cells // 4 * 3 * d)
        self.gains = nn.Linear(config.hidden, 2 * c)
        self.whole_table = _Rows(SHAPES, config.cells * 3 * d)
        self.half_table = _Rows(SHAPES, config.cells // 4 * 3 * d)
        with torch.no_grad():  # weak at the start; strong drives at once did not learn
            self.background.weight.mul_(0.5 / DRIVE_SCALE)
            for layer in (self.whole_patch, self.half_patch, self.tint):
                layer.weight.mul_(1 / DRIVE_SCALE)
                layer.bias.mul_(1 / DRIVE_SCALE)
            for table in (self.whole_table, self.half_table):
                table.weight.zero_()

    def look_up(self, noun: Tensor, colour: Tensor, size: Tensor, whole: bool) -> IconDrive:
        words = torch.cat([self.noun(noun), self.size(size if whole else size + len(SIZES))], 1)
        code = F.silu(self.shape1(words))
        code = code + F.silu(self.shape2(code))
        shape = (self.whole_patch if whole else self.half_patch)(code)
        shape = shape + (self.whole_table if whole else self.half_table)(noun * len(SIZES) + size)
        return shape, self.tint(self.colour(colour)), self.gains(code)


class PromptTables(_PromptToDrive):
    """The prompt's network as it is shipped: its answers for every noun, size and colour, to be looked up.

    Its parts depend on so few words that they are evaluated once, at export, and never again.
    """

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__(config)
        c, d = config.channels, config.driven
        self.whole = nn.Embedding(SHAPES, config.cells * 3 * d)
        self.half_window = nn.Embedding(SHAPES, config.cells // 4 * 3 * d)
        self.whole_gains = nn.Embedding(SHAPES, 2 * c)
        self.half_window_gains = nn.Embedding(SHAPES, 2 * c)
        self.tint = nn.Embedding(len(COLOURS), 3 * d)

    @staticmethod
    @torch.no_grad()
    def of(encoder: PromptEncoder) -> PromptTables:
        """Evaluate `encoder` for everything it can be asked."""
        tables = PromptTables(encoder.config)
        shapes = torch.arange(SHAPES)
        noun, size = shapes // len(SIZES), shapes % len(SIZES)
        colour = torch.arange(len(COLOURS))
        for whole in (True, False):
            drive, _, gains = encoder.look_up(noun, colour[noun % len(COLOURS)], size, whole)
            (tables.whole if whole else tables.half_window).weight.copy_(drive)
            (tables.whole_gains if whole else tables.half_window_gains).weight.copy_(gains)
        tables.tint.weight.copy_(encoder.tint(encoder.colour(colour)))
        tables.background.weight.copy_(encoder.background.weight)
        return tables

    def look_up(self, noun: Tensor, colour: Tensor, size: Tensor, whole: bool) -> IconDrive:
        shape = noun * len(SIZES) + size
        if whole:
            return self.whole(shape), self.tint(colour), self.whole_gains(shape)
        return self.half_window(shape), self.tint(colour), self.half_window_gains(shape)


class FloatCoupling(nn.Module):
    """K as five C x C blocks and a rank-r product; `forward` maps sources `[rows, n]` to pulls `[rows, n]`.

    The weights have a forward scale, so that Adam's rate does not depend on the width. With `quantized`, weights, sources
    and z take the values the integer core knows, and gradients pass through unchanged.
    """

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        self.config = config
        c, n = config.channels, config.oscillators
        self.local = nn.Parameter(0.5 * torch.randn(c, len(STENCIL) * c))
        self.gather = nn.Parameter(torch.randn(n, config.rank))
        self.spread = nn.Parameter(0.3 * torch.randn(n, config.rank))
        if config.coupling == "frozen":
            self.requires_grad_(False)

    def weights(self, quantized: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """L `[C, 5 C]`, V `[n, r]`, U `[n, r]`, with their forward scales."""
        local = self.local * self.local.shape[1] ** -0.5
        gather = self.gather * self.gather.shape[0] ** -0.5
        spread = self.spread * self.config.rank**-0.5
        if quantized:
            return _round_rows(local), _round_rows(gather.t()).t(), _round_rows(spread)
        return local, gather, spread

    def forward(
        self, sources: Tensor, weights: tuple[Tensor, Tensor, Tensor], rounded: torch.dtype | None
    ) -> Tensor:
        """`weights` are those of `weights`, quantized or not as this; see `OscillatorModel.forward` for `rounded`."""
        operands = rounded or torch.float32
        local, gather, spread = (w.to(operands) for w in weights)
        if rounded:
            sources = _round(sources, SOURCE_UNIT)
        narrow = sources.to(operands)
        near = neighbours(narrow, self.config.grid, self.config.channels) @ local.t()
        z = (narrow @ gather).float().clamp(-MAX_Z, MAX_Z)
        if rounded:
            z = _round(z, AMPLITUDE / MAX_Z)
        return near.view(sources.shape).float() + (z.to(operands) @ spread.t()).float()


def _round(x: Tensor, unit: float) -> Tensor:
    """x to multiples of 1 / unit; the gradient is that of x."""
    return x + (torch.round(x.detach() * unit) / unit - x.detach())


def _round_rows(weights: Tensor) -> Tensor:
    scale = weights.detach().abs().amax(1, keepdim=True).clamp_min(1e-12) / AMPLITUDE
    return weights + (torch.round(weights.detach() / scale) * scale - weights.detach())


class Decoder(nn.Module):
    """sin and cos of the phases, float `[batch, 2 read, grid, grid]` -> images `[batch, 3, size, size]` in [-1, 1].

    It reads two colours per cell and, at full size, how much of each pixel takes the second: icons are flat shapes on a flat
    ground. Transposed convolutions of four taps in place of up-sampling and nine; the last doubling is a rearrangement.
    """

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        first, *rest = config.widths
        self.input = nn.Conv2d(2 * config.read, first, 3, padding=1)
        self.colours = nn.Conv2d(first, 6, 1)
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(i, o, 4, stride=2, padding=1)
            for i, o in zip(config.widths[:-1], rest, strict=True)
        )
        self.mix = nn.Conv2d(config.widths[-1], config.mix, 3, padding=1)
        self.output = nn.Conv2d(config.mix, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.input(x), 0.2)
        colours = torch.tanh(self.colours(x))
        for layer in (*self.up, self.mix):
            x = F.leaky_relu(layer(x), 0.2)
        cover = torch.sigmoid(F.pixel_shuffle(self.output(x), 2))
        ground, ink = F.interpolate(colours, scale_factor=cover.shape[-1] // colours.shape[-1]).split(3, 1)
        return torch.lerp(ground, ink, cover.to(ground.dtype))  # autocast lifts one and not the other


class CellMlp(nn.Module):
    """The control without oscillators: per cell, start phases and drive to what the decoder reads, in one step.

    As many parameters as the coupling it stands for.
    """

    def __init__(self, config: OscillatorConfig) -> None:
        super().__init__()
        c = config.channels
        coupling = len(STENCIL) * c * c + 2 * config.oscillators * config.rank
        hidden = coupling // (7 * c)
        self.hidden = nn.Linear(5 * c, hidden)
        self.output = nn.Linear(hidden, 2 * c)

    def forward(self, drive: Tensor, phases: Tensor, channels: int) -> Tensor:
        """`[batch, 2, n]` in place of sin and cos, from drive `[batch, 3, n]` and phases `[batch, n]`."""
        x = torch.cat([drive, torch.sin(phases)[:, None], torch.cos(phases)[:, None]], 1)
        x = x.unflatten(2, (-1, channels)).transpose(1, 2).flatten(2)  # [batch, cells, 5 C]
        y = torch.tanh(self.output(F.silu(self.hidden(x))))
        return y.unflatten(2, (2, channels)).transpose(1, 2).flatten(2)


class OscillatorModel(nn.Module):
    """The whole generator. `forward` takes tokens `[batch, tokens]` and start phases `[batch, n]` in radians.

    With `shipped`, what the integer form needs of it: the prompt's network as tables, and no coupling.
    """

    def __init__(self, config: OscillatorConfig, *, shipped: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = PromptTables(config) if shipped else PromptEncoder(config)
        if config.coupling in ("trained", "frozen") and not shipped:
            self.coupling = FloatCoupling(config)
        if config.coupling == "mlp":
            self.mlp = CellMlp(config)
        self.decoder = Decoder(config)

    def waves(
        self,
        prompt: PromptDrive,
        phases: Tensor,
        *,
        rounded: torch.dtype | None = None,
        steps: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """sin and cos of the final phases, `[batch, n]`; phases stay float, only matrix operands may be narrower."""
        config = self.config
        drive, *gains = (x.to(phases.dtype) for x in prompt)
        if config.coupling == "mlp":
            sin, cos = self.mlp(drive, phases, config.channels).unbind(1)
            return sin, cos
        a, b, omega = drive.unbind(1)
        steps = steps or config.steps
        dt = config.horizon / steps
        weights = self.coupling.weights(rounded is not None) if config.coupling != "none" else None
        source_gain, row_gain = (g.repeat(2, 1) for g in gains)
        for _ in range(steps):
            sin, cos = torch.sin(phases), torch.cos(phases)
            if weights is None:
                phases = phases + dt * (omega + cos * a - sin * b)
            else:
                sources = torch.cat([sin, cos]) * source_gain
                pulls = self.coupling(sources, weights, rounded) * row_gain
                from_sin, from_cos = pulls.chunk(2)
                phases = phases + dt * (omega + cos * (from_sin + a) - sin * (from_cos + b))
        return torch.sin(phases), torch.cos(phases)

    def forward(
        self, tokens: Tensor, phases: Tensor, *, rounded: torch.dtype | None = None, samples: int = 1
    ) -> Tensor:
        """Images `[batch, 3, size, size]` in [-1, 1], `samples` of each row of tokens `[batch / samples, tokens]`.

        With `rounded`, weights, sources and intermediates are rounded as in the integer core, and the coupling's matrix
        operands are of that type.
        """
        prompt = self.encoder(tokens, static=tokens.is_cuda)
        prompt = PromptDrive(*(x.repeat_interleave(samples, 0) for x in prompt))
        sin, cos = self.waves(prompt, phases, rounded=rounded)
        return self.decoder(grid_features(sin, cos, self.config))


def grid_features(sin: Tensor, cos: Tensor, config: OscillatorConfig) -> Tensor:
    """`[batch, n]` sines and cosines -> `[batch, 2 channels, grid, grid]`; oscillator = cell * channels + channel."""
    both = torch.stack([sin, cos], 1).view(-1, 2, config.grid, config.grid, config.channels)
    both = both[..., config.channels - config.read :]
    return both.permute(0, 1, 4, 2, 3).flatten(1, 2)


def cell_of_window(grid: int, device: torch.device | None = None) -> Tensor:
    """Which cell of the window each cell is, row by row, -1 outside; int64 `[no window and WINDOWS, cells]`.

    Made on the device itself: a CUDA graph captures no copy from the host.
    """
    cells = torch.full((1 + len(WINDOWS), grid, grid), -1, device=device)
    for number, (left, top, side) in enumerate(WINDOWS):
        within = torch.arange(side**2, device=device).view(side, side)
        cells[1 + number, top : top + side, left : left + side] = within
    return cells.flatten(1)


def noise_size(config: OscillatorConfig) -> int:
    """Random phases that an image starts from."""
    return (1 + MAX_COUNT) * config.noise_channels


def start_phases(noise: Tensor, tokens: Tensor, config: OscillatorConfig) -> Tensor:
    """Lay noise `[batch, noise_size]`, of any unit, on the oscillators of scenes `[batch, tokens]`; start phases `[batch, n]`.

    Noise belongs to what it varies. Half of a cell's noise channels start alike in the whole image, the other half alike in
    the window of an icon, or outside all of them; all other channels start at 0. (Noise of each cell's own gave blotches
    where true images have one shade.)
    """
    inside = (cell_of_window(config.grid, tokens.device) >= 0).long()
    placed = tokens[:, ICON_TOKENS - 1 : -1 : ICON_TOKENS]  # [batch, icons], 0 where there is none
    slots = 1 + torch.arange(MAX_COUNT, device=tokens.device)
    slot = (inside[placed] * slots[:, None]).sum(1)  # [batch, cells]; windows do not overlap
    by_slot = noise.view(len(noise), 1 + MAX_COUNT, config.noise_channels)
    own = by_slot.gather(1, slot[:, :, None].expand(-1, -1, config.noise_channels))
    common = by_slot[:, :1].expand_as(own)
    whole_image = torch.arange(config.noise_channels, device=noise.device) < config.noise_channels // 2
    laid = torch.where(whole_image, common, own)
    return F.pad(laid, (0, config.channels - config.noise_channels)).flatten(1)
