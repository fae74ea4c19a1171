"""Small networks without a coupling and with one."""

from __future__ import annotations

import pytest
from support.tiny_oscillators import painter_of, tiny_oscillators


@pytest.fixture(scope="session", params=["none", "trained"])
def network(request):
    return tiny_oscillators(request.param)


@pytest.fixture(scope="session")
def painter(network):
    return painter_of(network)
