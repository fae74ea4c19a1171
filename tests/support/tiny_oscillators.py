"""Small oscillator networks with random weights, strong enough that shapes have ink in some cells and none in others."""

from __future__ import annotations

import torch

from millijoule.workers.oscillators.config import OscillatorConfig
from millijoule.workers.oscillators.draw import Painter
from millijoule.workers.oscillators.float_network import FloatNetwork
from millijoule.workers.oscillators.quantize import quantize
from millijoule.workers.scenes.scenes import SIZES

NOUNS = 7


def tiny_oscillators(coupling="none", seed=0):
    torch.manual_seed(seed)
    network = FloatNetwork(
        OscillatorConfig(nouns=NOUNS, coupling=coupling, hidden=24, channels=8, rank=4, width=20, mix=30)
    )
    with torch.no_grad():
        for name, weights in network.named_parameters():
            if weights.ndim > 1 and name not in ("local", "gather", "spread"):
                weights.mul_(2)
        # the pixels of a cell lean the same way, so that cells differ
        network.share.weight.copy_(torch.randn(1, 30, 1, 1) + 0.1 * network.share.weight)
    network.train()
    noun = torch.arange(NOUNS)
    for whole in (False, True):
        for size in range(len(SIZES)):
            network(noun, torch.full_like(noun, size), whole, rounded=True)  # ranges of activations
    network.eval()
    with torch.no_grad():
        logits = torch.cat([network(noun, noun % len(SIZES), whole).flatten() for whole in (False, True)])
        network.share.weight.mul_(6 / logits.std())
        network.share.bias.sub_(6 / logits.std() * logits.mean() + 5)
    return network


def painter_of(network):
    return Painter.of(quantize(network))
