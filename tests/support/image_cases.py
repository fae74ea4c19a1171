"""Networks and scenes for the image kernels, and how they are drawn in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from millijoule.kernels.oscillator import Coupling
from millijoule.workers.oscillators.config import SIDES, VARIANTS, OscillatorConfig, layer_shapes
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.integer_network import IntegerNetwork, Layer
from millijoule.workers.scenes.scenes import (
    FAMILIES,
    Group,
    Scene,
    complete,
    sample_scene,
    scene_tokens,
)
from millijoule.workers.scenes.vocabulary import NOUNS


def drawn_by_kernels(painter, calls, resident=True, blocks=2):
    """Images of calls, (tokens, seeds, steps) each, of one `ImageKernel`; for `support.interpreted`."""
    from millijoule.kernels.gpu import image as gpu_image

    kernel = gpu_image.ImageKernel(painter.kernel_weights(), "cpu")
    kernel.resident, kernel.blocks = resident, blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            gpu_image, "BLEND_IMAGES", 16
        )  # a program of the interpreter is slow, its arrays are not
        return [kernel.draw(*call) for call in calls]


def drawn_on_device(painter, tokens, seeds):
    """Images of tokens that nothing has looked at; for `support.interpreted`."""
    from millijoule.kernels.gpu.image import ImageKernel

    kernel = ImageKernel(painter.kernel_weights(), "cpu")
    return kernel.draw_on_device(torch.from_numpy(tokens), torch.from_numpy(seeds.view(np.int64))).numpy()


def tokens_of(count, nouns, seed=5):
    """Of scenes of all families, some with one icon, some with two, three and four."""
    rng = np.random.default_rng(seed)
    return scene_tokens(
        [complete(sample_scene(FAMILIES[i % len(FAMILIES)], rng, nouns=nouns), i) for i in range(count)]
    )


def tokens_with(icons, noun):
    """Of one scene of so many equal icons, of the noun of that number."""
    return scene_tokens([complete(Scene((Group(NOUNS[noun], count=icons),)), icons)])


def extreme_painter(seed, coupled=False):
    """A network of odd sizes with numbers of all magnitudes and signs in it, which no training would leave."""
    config = OscillatorConfig(
        *(6, "trained" if coupled else "none"),
        code=7,
        hidden=33,
        channels=3,
        rank=5,
        width=17,
        mix=70,
        steps=6,
    )
    random = torch.Generator().manual_seed(seed)

    def integers(low, high, *shape):
        return torch.randint(low, high, shape, generator=random)

    def layer(outputs, inputs):
        reach = 3000 * inputs**0.5  # of a sum
        unit = 2**24 * 127 / reach
        multiplier = integers(-int(2 * unit), int(3 * unit), outputs)
        bias = integers(-int(reach), int(reach), outputs)
        bias[1], multiplier[1] = 2**30, 2**31 - 1  # what is cut afterwards is more than int32 holds
        return Layer(integers(-128, 128, outputs, inputs).to(torch.int8), bias.to(torch.int32), multiplier)

    layers = {name: layer(*shape) for name, shape in layer_shapes(config).items()}
    drive, share = layers["drive"], layers["share"]
    # the largest multipliers a file can hold; drives then pass what int32 holds, and wrap
    layers["drive"] = replace(drive, multiplier=integers(-(2**31) + 1, 2**31, len(drive.multiplier)))
    layers["share"] = replace(share, multiplier=(8 * share.multiplier).clamp(max=2**31 - 1))
    network = IntegerNetwork(
        config=config,
        codes=integers(-128, 128, config.nouns, config.code).to(torch.int8),
        sizes=integers(-9000, 9000, VARIANTS, config.hidden).to(torch.int32),
        place=integers(-(2**31), 2**31, len(SIDES), config.cells * 3 * config.channels).to(torch.int32),
        **layers,
        coupling=_extreme_coupling(config, integers) if coupled else None,
    )
    return Painter.of(network)


def _extreme_coupling(config, integers):
    """One so strong that multipliers pass what int32 holds."""
    channels, n = config.channels, config.oscillators

    def scales(count):
        return integers(1, 1000, count).double() / 100

    return Coupling(
        *(integers(-127, 128, channels, 5 * channels).to(torch.int8), scales(channels)),
        *(integers(-127, 128, n, config.rank).to(torch.int8), scales(config.rank)),
        *(integers(-127, 128, n, config.rank).to(torch.int8), scales(n)),
    )
