"""What changes from step to step: counted again here from the trajectory, icon by icon."""

import itertools
from dataclasses import replace

import pytest
import torch
from support.tiny_oscillators import NOUNS

from millijoule.kernels.oscillator import relax_reference
from millijoule.kernels.phase import sin_cos
from millijoule.workers.oscillators.events import count_events

NOUN = torch.arange(NOUNS)
VARIANT = NOUN % 6


def test_a_trajectory_ends_where_phases_do(painter):
    network = painter.network
    steps = list(network.trajectory(NOUN, VARIANT))
    assert len(steps) == 1 + network.config.steps
    assert not steps[0].any()
    assert torch.equal(steps[-1], network.phases(NOUN, VARIANT))


def test_events_are_counted_as_they_are_defined(painter):
    network = painter.network
    found = count_events(network, NOUN, VARIANT)
    steps = [torch.stack(sin_cos(phases)).tolist() for phases in network.trajectory(NOUN, VARIANT)]
    for k, (before, now) in enumerate(itertools.pairwise(steps)):
        same = [
            before[0][i][cell][c] == now[0][i][cell][c] and before[1][i][cell][c] == now[1][i][cell][c]
            for i in range(NOUNS)
            for cell in range(network.config.cells)
            for c in range(network.config.channels)
        ]
        assert abs(found.unchanged[k] - sum(same) / len(same)) < 1e-9
    assert found.at_rest == (0.0,) * network.config.steps


def test_a_network_without_drive_is_at_rest(painter):
    network = painter.network
    drive = replace(network.drive, multiplier=torch.zeros_like(network.drive.multiplier))
    still = replace(network, drive=drive, place=torch.zeros_like(network.place))
    found = count_events(still, NOUN, VARIANT)
    assert found.unchanged == found.at_rest == (1.0,) * network.config.steps


def test_a_network_without_its_coupling_is_that_with_a_coupling_of_zeros(painter):
    network = painter.network
    plain = network.without_coupling()
    assert plain.coupling is None
    assert plain.config.coupling == "none"
    if network.coupling is None:
        assert torch.equal(plain.phases(NOUN, VARIANT), network.phases(NOUN, VARIANT))
        return
    weights = {name: torch.zeros_like(getattr(network.coupling, name)) for name in ("local", "spread")}
    zeros = replace(network, coupling=replace(network.coupling, **weights))
    assert torch.equal(plain.phases(NOUN, VARIANT), zeros.phases(NOUN, VARIANT))
    assert not torch.equal(plain.phases(NOUN, VARIANT), network.phases(NOUN, VARIANT))


def test_from_a_coupled_start_the_plain_reference_ends_where_the_network_does(painter):
    network = painter.network
    noun, variant = torch.arange(NOUNS), torch.arange(NOUNS) % 6
    if network.coupling is None:
        with pytest.raises(ValueError, match="no coupling"):
            network.coupled_start(noun, variant)
    else:
        end = relax_reference(*network.coupled_start(noun, variant), network.config.steps)
        assert torch.equal(end, network.phases(noun, variant).flatten(1))
